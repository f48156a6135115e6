"""Several processes train as one with the same rows per step does: the same weights, samples, logs and files."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from together import SCENARIOS, run

from training_runs import Training
from tutelage.cli import main
from tutelage.training.parallel import Processes
from vllm_stand_in import serving

SCRIPT = Path(__file__).with_name("together.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
LAUNCH += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


def started(command, more=(), **options):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in names} | {"OMP_NUM_THREADS": "1"}
    environment |= dict(more)
    return subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=500, **options
    )


def why(found):
    """What the processes said, without what the launcher says of them."""
    lines = [line for line in found.stderr.splitlines() if "Error" in line or line.startswith("[rank")]
    return "\n".join(lines)[:8000]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """All scenarios in one process, and in two: once for all tests, since most of the time goes into imports."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    with serving(Training(one).model()) as (server,), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUTELAGE_TEST_VLLM", server.url)
        for name in SCENARIOS:
            run(one, name)
        handed = list(server.loaded)
        found = started([*LAUNCH, SCRIPT, two, *SCENARIOS])
        assert found.returncode == 0, why(found)
        assert len(server.loaded) == 2 * len(handed) > 0, "weights are handed over once, and not by each process"
        assert server.adapters == {}
    return one, two


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_are_one(both, name):
    one, two = (load_file(folder / name / "weights.safetensors") for folder in both)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SCENARIOS)
def test_their_logs_are_those_of_one(both, name):
    """Averaged over rows and not over processes; the shares of accuracy hang on ties, which rounding breaks."""
    one, two = (json.loads((folder / name / "facts.json").read_text()) for folder in both)
    assert (two["trained"], two["sampled"]) == (one["trained"], one["sampled"])
    assert len(two["history"]) == len(one["history"]) > 1
    for row, other in zip(one["history"], two["history"], strict=True):
        assert row.keys() == other.keys()
        for key in row:
            if not key.startswith(("time/", "train_", "reward/seconds", "tokens_per_second", "rewards/accuracy")):
                assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-4), key
    # Padding differs with the shape of a batch, and what every process does is counted for each.
    total = one["operations"]["training"]
    assert total <= 1.2 * two["operations"]["training"] <= 1.6 * total


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith(("irft", "spin", "rft", "sdft"))])
def test_their_samples_are_those_of_one_and_written_once(both, name):
    names = [sorted(p.relative_to(f / name) for p in (f / name / "run").rglob("*") if p.is_file()) for f in both]
    names = [[path for path in found if not path.name.startswith("rng_state")] for found in names]
    assert names[0] == names[1]
    files = [path for path in names[0] if path.name == "samples.jsonl"]
    assert files
    for path in files:
        one, two = ([json.loads(line) for line in (f / name / path).read_text().splitlines()] for f in both)
        assert [row["row"] for row in one] == [row["row"] for row in two]
        for row, other in zip(one, two, strict=True):
            assert [c["token_ids"] for c in row["completions"]] == [c["token_ids"] for c in other["completions"]]


def check_who_writes(folder):
    """The first process; but each its own random state, in a folder that each makes, and what a scenario writes itself."""
    first, second = (json.loads((folder / f"written-{rank}.json").read_text()) for rank in range(2))
    assert any(path.endswith("manifest.json.tmp") for path in first)
    allowed = re.compile(r"[^/]+|[^/]+(/run)?/\.writing/checkpoint-\d+(/rng_state_1\.pth)?|[^/]+/[^/]+-1\.txt")
    assert [path for path in second if not allowed.fullmatch(path)] == []


def test_only_the_first_process_writes(both):
    check_who_writes(both[1])


def test_an_empty_share_is_fine():
    items = list(range(7))
    shares = [Processes(index, 3).share(items) for index in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert Processes(2, 3).share([1, 2]) == []


# --- on the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    training = Training(folder)
    training.model().save_pretrained(folder / "base")
    training.tokenizer.save_pretrained(folder / "base")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in training.rows(20)))
    return folder


def command(data, output, *more, rows):
    common = ["irft", "--model_name_or_path", data / "base", "--dataset_name", data / "data.jsonl", "--use_cpu"]
    common += ["--output_dir", data / output, "--stages_per_epoch", "2", "--per_device_train_batch_size", rows]
    common += ["--bf16=False", "--report_to=none", "--max_completion_length=6", "--optim=sgd", "--learning_rate=0.05"]
    common += ["--save_strategy=steps", "--save_steps=1", "--lr_scheduler_type=constant", "--logging_steps=1"]
    common += ["--num_train_epochs=1", "--save_total_limit=9", "--gradient_accumulation_steps=1"]
    return [str(part) for part in (*common, *more)]


def test_a_run_goes_on_with_another_number_of_processes(data, capsys):
    """Begun by two, continued by one; and what one run says, it says once."""
    assert main(command(data, "whole", rows=4)) == 0
    said = capsys.readouterr().out
    begun = started([*LAUNCH, SCRIPT, data, "command", *command(data, "both", rows=2)])
    assert begun.returncode == 0, why(begun)
    check_who_writes(data)
    for line in ("report: ", "stage 1: sampling", "loading the export back"):
        assert begun.stdout.count(line) == said.count(line) > 0
    for name in ("checkpoint-4", "checkpoint-5"):
        shutil.rmtree(data / "both" / name)
    assert main(command(data, "both", "--resume", rows=2)) == 2
    assert "field 'per_device_train_batch_size'" in capsys.readouterr().err
    assert main(command(data, "both", "--resume", rows=4)) == 0
    assert "going on from" in capsys.readouterr().out
    one, two = (load_file(data / name / "model.safetensors") for name in ("whole", "both"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=0)


def test_what_is_wrong_for_all_is_said_once(data):
    """And within seconds: the launcher ends the others when the first one fails."""
    found = started([*LAUNCH, "-m", "tutelage", *command(data, "wrong", "--num_samples=0", rows=2)])
    assert found.returncode != 0
    assert found.stderr.count("tutelage: error:") == 1
    assert "num_samples" in found.stderr
    assert not (data / "wrong").exists()


# --- faults ------------------------------------------------------------------------------------------------------------


def test_a_process_that_fails_ends_all(tmp_path):
    begun = time.monotonic()
    found = started([*LAUNCH, SCRIPT, tmp_path, "dies"])
    assert found.returncode != 0
    assert "planted failure of one process" in found.stderr
    assert time.monotonic() - begun < 300  # and not the half hour after which a wait for others is given up


def test_a_loss_that_is_not_finite_in_one_process_stops_all_at_the_same_step(tmp_path):
    found = started([*LAUNCH, SCRIPT, tmp_path, "not_finite", "disk_is_full"])
    assert found.returncode == 0, why(found)
    told = [(tmp_path / "not_finite" / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    assert told[0] == told[1]
    assert told[0].startswith("2: the loss is nan at step 3")
    told = [(tmp_path / "disk_is_full" / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    assert told[0] == told[1]
    assert "run.json" in told[0]
