"""A policy that is sharded over two processes trains as one process does, and its files are those of one process."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_processes import LAUNCH, SCRIPT, check_who_writes, started, why
from together import run

from training_runs import Training
from tutelage.errors import UserError
from tutelage.testing.models import tiny_model
from tutelage.training.sharding import check_settings, require_room

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "TUTELAGE_TEST_SHARDED": "1",
}
NAMES = ["sft", "sft-psft", "sft-iw", "spin", "irft", "irft-adapter", "irft-tied"]
RESUMED, HALVED = "irft-resumed", "irft-bf16"

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


def newest_is(run, step):
    """Make the checkpoint of a step a run's newest."""
    for path in run.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The scenarios in one process, and sharded over two; then each goes on with what the other had written."""
    one, two, on = (tmp_path_factory.mktemp(name) for name in ("one", "two", "on"))
    for name in (*NAMES, RESUMED, HALVED):
        run(one, name)
    shutil.copytree(one / RESUMED, two / RESUMED)
    newest_is(two / RESUMED / "run", 2)
    found = started([*LAUNCH, SCRIPT, two, *NAMES, RESUMED, HALVED, "refused", "not_finite"], FSDP)
    assert found.returncode == 0, why(found)
    shutil.copytree(two / RESUMED, on / RESUMED)
    newest_is(on / RESUMED / "run", 4)
    run(on, RESUMED)
    return one, two, on


def facts(folder, name):
    return json.loads((folder / name / "facts.json").read_text())


def assert_same(one, other, name, file):
    one, two = (load_file(folder / name / file) for folder in (one, other))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*NAMES, RESUMED])
def test_a_sharded_policy_learns_what_one_process_does(both, name):
    one, two, _ = both
    assert_same(one, two, name, "weights.safetensors")
    ours, theirs = facts(one, name), facts(two, name)
    assert (theirs["trained"], theirs["sampled"]) == (ours["trained"], ours["sampled"])
    assert len(theirs["history"]) == len(ours["history"]) > 1
    for row, other in zip(ours["history"], theirs["history"], strict=True):
        assert row.keys() == other.keys()
        for key in row:
            if not key.startswith(("time/", "train_", "tokens_per_second", "rewards/accuracy")):
                assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-4), key


@pytest.mark.parametrize("name", NAMES)
def test_each_process_holds_its_part_and_the_head_is_read_in_blocks(both, name):
    one, two, _ = both
    assert facts(one, name)["held"] == 1
    assert facts(two, name)["held"] == pytest.approx(0.5, abs=0.01)
    assert facts(two, name)["reads the head in blocks"]
    assert facts(one, name)["reads the head in blocks"]


@pytest.mark.parametrize("name", [name for name in (*NAMES, RESUMED) if name.startswith(("irft", "spin"))])
def test_its_samples_are_those_of_one_process(both, name):
    one, two, _ = both
    files = sorted(path.relative_to(one / name) for path in (one / name / "run").rglob("samples.jsonl"))
    assert files
    for file in files:
        ours, theirs = (
            [json.loads(line) for line in (folder / name / file).read_text().splitlines()] for folder in (one, two)
        )
        assert [row["row"] for row in ours] == [row["row"] for row in theirs]
        for row, other in zip(ours, theirs, strict=True):
            assert [c["token_ids"] for c in row["completions"]] == [c["token_ids"] for c in other["completions"]]


@pytest.mark.parametrize("name", NAMES)
def test_its_export_is_that_of_one_process(both, name):
    one, two, _ = both
    names = [sorted(path.name for path in (folder / name / "export").iterdir()) for folder in (one, two)]
    assert names[0] == names[1]
    (file,) = [name for name in names[0] if name.endswith("model.safetensors")]
    assert_same(one, two, name, f"export/{file}")
    with (
        safe_open(one / name / "export" / file, "pt") as ours,
        safe_open(two / name / "export" / file, "pt") as theirs,
    ):
        assert ours.keys() == theirs.keys()
    config = "adapter_config.json" if "adapter" in file else "config.json"
    ours, theirs = (json.loads((folder / name / "export" / config).read_text()) for folder in (one, two))
    for found in (ours, theirs):
        found["target_modules"] = sorted(found.get("target_modules", ()))
    assert ours == theirs


def test_its_best_stage_is_restored(both):
    one, two, _ = both
    ours, theirs = facts(one, "irft-tied")["best"], facts(two, "irft-tied")["best"]
    assert ours["stages"] == theirs["stages"] < theirs["last_stages"]


def test_a_run_goes_on_sharded_and_whole(both):
    """Begun by one process, continued by two that shard it, and again by one; each optimizer state is read by the other."""
    one, _, on = both
    assert_same(one, on, RESUMED, "weights.safetensors")
    assert facts(on, RESUMED)["history"][-1]["step"] == facts(one, RESUMED)["history"][-1]["step"] > 4


def test_in_bfloat16_it_is_close_and_keeps_float32_weights(both):
    """Rounding is another: weights are gathered in bfloat16, which one process rounds when it computes. Samples may differ."""
    one, two, _ = both
    ours, theirs = (load_file(folder / HALVED / "weights.safetensors") for folder in (one, two))
    for key, value in ours.items():
        assert theirs[key].dtype == value.dtype == torch.float32
        torch.testing.assert_close(theirs[key], value, atol=0.03, rtol=0)
    ours, theirs = (
        next(row["logps/demonstrations"] for row in facts(folder, HALVED)["history"] if "loss" in row)
        for folder in (one, two)
    )
    assert theirs == pytest.approx(ours, rel=0.01)
    losses = [[row["loss"] for row in facts(folder, HALVED)["history"] if "loss" in row] for folder in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert any(loss != round_to_bfloat16(loss) for loss in losses[1])


def round_to_bfloat16(value):
    return torch.tensor(value, dtype=torch.float64).bfloat16().item()


def test_the_first_process_alone_writes(both):
    check_who_writes(both[1])


# --- what is refused, and what goes wrong ------------------------------------------------------------------------------

REFUSED = {
    "rft": "rft does not work on a model that is sharded",
    "asft": "--loss_kind asft does not work on a model that is sharded",
    "sdft": "sdft does not work on a model that is sharded",
    "optim": "--optim adafactor does not work on a model that is sharded",
    "load_best_model_at_end": "--load_best_model_at_end does not work on a model that is sharded",
    "vllm": "--sampler vllm does not work on a model that is sharded",
    "layer": "accelerate cannot shard LlamaForCausalLM: Could not find the transformer layer class OtherLayer",
    "twice": "a sharded policy is trained once",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_work_is_refused_by_all(both, what):
    for rank in (0, 1):
        assert REFUSED[what] in (both[1] / "refused" / f"{what}-{rank}.txt").read_text()


def test_a_loss_that_is_not_finite_in_one_process_stops_all(both):
    told = [(both[1] / "not_finite" / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    assert told[0] == told[1]
    assert told[0].startswith("2: the loss is nan at step 3")


def test_where_accelerate_does_not_shard_it_is_said(monkeypatch, tmp_path):
    """It would train with DDP, whatever it was asked for."""
    monkeypatch.setattr("tutelage.training.trainer.asks_for_fsdp", lambda: True)
    with pytest.raises(UserError, match=r"accelerate does not shard on this device \(cpu\)"):
        Training(tmp_path).trainer("sft")


def test_a_model_that_no_device_holds_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("tutelage.training.sharding.available_memory", lambda device: 1000)
    with pytest.raises(UserError, match="GiB of each device are free"):
        require_room(Training(tmp_path).model(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "model", "problem"),
    [
        ({"fp16": True}, torch.float32, "--fp16"),
        ({"bf16": True}, torch.bfloat16, "--bf16 with trained weights in 16 bits"),
        ({}, "quantized", "a quantized model"),
    ],
)
def test_a_precision_that_does_not_work_is_refused(settings, model, problem):
    args = {"optim": "sgd", "fp16": False, "bf16": False, "load_best_model_at_end": False, **settings}
    policy = tiny_model(dtype=torch.float32 if model == "quantized" else model)
    policy.is_quantized = model == "quantized"
    with pytest.raises(UserError, match=f"{problem} does not work on a model that is sharded"):
        check_settings(SimpleNamespace(args=SimpleNamespace(**args), policy=policy))  # type: ignore[arg-type]
