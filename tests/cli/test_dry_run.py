"""--dry_run: what it says holds of the run, it leaves nothing, and it refuses what the run would refuse."""

import json
import re

import pytest

from tutelage.cli import main
from tutelage.data.records import read_groups
from tutelage.training.estimate import disk_of, memory_of, pace_of, state_bytes_per_weight, work_of

SETTINGS = ["--bf16=False", "--use_cpu", "--report_to=none", "--per_device_train_batch_size=4", "--learning_rate=1e-3"]
SETTINGS += ["--max_completion_length=6", "--save_strategy=steps", "--save_steps=1000", "--num_train_epochs=2"]
SETTINGS += ["--max_prompt_length=64"]
RFT = [
    "--reward=features",
    "--reward_features=text",
    "--reward_negatives=own",
    "--validation_rows=4",
    "--num_samples=2",
]
COMMANDS = {
    "sft": [],
    "spin": [],
    "irft": ["--stages_per_epoch=2", "--use_peft", "--lora_r=4"],
    "rft": [*RFT, "--stages_per_epoch=2"],
    "sdft": ["--stages_per_epoch=2", "--samplings_per_stage=1", "--teacher=average"],
}


@pytest.fixture
def arguments(training):
    """Makes a command line on a tiny model and 20 rows on disk."""
    training.model().save_pretrained(training.folder / "base")
    training.tokenizer.save_pretrained(training.folder / "base")
    lines = [json.dumps(row) + "\n" for row in training.rows(20)]
    (training.folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")

    def made(algorithm, *more, out="out"):
        base, data = training.folder / "base", training.folder / "data.jsonl"
        named = [f"--model_name_or_path={base}", f"--dataset_name={data}", f"--output_dir={training.folder / out}"]
        return [algorithm, *named, *SETTINGS, *COMMANDS[algorithm], *more]

    return made


def told(capsys, args, code=0):
    capsys.readouterr()
    assert main(args) == code
    found = capsys.readouterr()
    return " ".join((found.err if code else found.out).split())


def content(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("algorithm", COMMANDS)
def test_it_leaves_nothing_and_says_what_the_run_then_does(training, arguments, capsys, algorithm):
    before = content(training.folder)
    text = told(capsys, arguments(algorithm, "--dry_run", out="new/out"))
    assert content(training.folder) == before
    assert "nothing was written" in text
    for part in ("memory:", "disk:", "time:"):
        assert part in text
    told(capsys, arguments(algorithm))
    out = training.folder / "out"
    record = json.loads((out / "results.json").read_text())
    steps = record["history"][-1]["step"]
    assert f"{steps} optimizer steps" in text
    if algorithm == "sft":
        assert "an epoch has 20 rows" in text
        return
    folders = sorted(out.glob("stages/stage-*/samples.jsonl"))
    assert f"in {len(folders)} stages" in text
    rows, samples = map(int, re.search(r"samples for (\d+) rows, (\d+) samples", text).groups())
    sampled = [sum(len(group.samples) for group in read_groups(path)) for path in folders]
    counted = [len(list(read_groups(path))) for path in folders]
    validation = 4 if algorithm == "rft" else 0
    assert max(counted) <= rows - validation < max(counted) + 8  # the last batch of an epoch may not be full
    assert samples == rows * (2 if algorithm == "rft" else 1)
    assert max(sampled) <= samples
    spent = sum(len(c.token_ids) for path in folders for group in read_groups(path) for c in group.samples)
    assert spent <= len(folders) * samples * 6


@pytest.mark.parametrize("algorithm", ["sft", "irft", "sdft"])
def test_memory_and_disk_are_those_of_a_run(training, algorithm):
    peft = {"peft_config": training.lora()} if algorithm == "irft" else {}
    more = {"teacher": "average"} if algorithm == "sdft" else {}
    trainer = training.trainer(algorithm, options=peft, save_strategy="steps", save_steps=2, name="run", **more)
    work = work_of(trainer)
    memory, pace = memory_of(trainer, work), pace_of(trainer)
    disk = disk_of(trainer, work, memory, pace.bytes_per_token)
    trainer.train()
    state = [v for s in trainer.optimizer.state.values() for v in s.values() if v.numel() > 1]
    assert memory.optimizer == sum(v.numel() * v.element_size() for v in state)
    trained = [p for p in trainer.policy.parameters() if p.requires_grad]
    assert memory.gradients == sum(p.numel() * p.element_size() for p in trained)
    assert (memory.weights > memory.gradients) == (algorithm == "irft")
    folder = training.folder / "run"
    weights = ("safetensors", "optimizer.pt")
    (size, *_) = [
        sum(path.stat().st_size for path in found.iterdir() if path.name.endswith(weights))
        for found in folder.glob("checkpoint-*")
    ]
    assert size == pytest.approx(disk.checkpoint, abs=100_000)
    # Of four steps SFT saves two; the others' four stages save four, of which two are kept and one is being written.
    assert disk.checkpoints == {"sft": 2, "irft": 3, "sdft": 3}[algorithm]
    samples = sum(path.stat().st_size for path in folder.glob("stages/**/samples.jsonl"))
    assert samples <= disk.stages * 1.2
    assert (disk.stages == 0) == (algorithm == "sft")


def test_what_is_timed_changes_nothing(training):
    whole = training.run("irft", name="whole")
    trainer = training.trainer("irft", name="run")
    pace = pace_of(trainer)
    assert min(pace.step, pace.sample, pace.score) > 0
    trainer.train()
    found = [p.detach() for p in trainer.policy.parameters()]
    assert all((a == b).all() for a, b in zip(found, whole.policy.parameters(), strict=True))


@pytest.mark.parametrize(("optim", "bytes_each"), [("adamw_torch", 8), ("sgd", 0), ("adagrad", 4)])
def test_what_optimizers_keep(training, optim, bytes_each):
    assert state_bytes_per_weight(training.trainer("sft", optim=optim)) == bytes_each


def test_fewer_stages_are_kept(training):
    settings = {"num_train_epochs": 10, "stages_per_epoch": 4, "save_strategy": "steps"}
    sizes = []
    for keep in (None, 1):
        trainer = training.trainer("irft", keep_stages=keep, **settings)
        work = work_of(trainer)
        assert work.stages == 40
        sizes.append(disk_of(trainer, work, memory_of(trainer, work), 10.0).stages)
    assert sizes[1] * 40 == sizes[0] * 3


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("available_memory", lambda device: 10_000, "10.0? KiB|9.8 KiB"),
        (
            "shutil.disk_usage",
            lambda path: type("Usage", (), {"free": 50_000}),
            "of disk are free.*--save_total_limit",
        ),
    ],
)
def test_what_does_not_suffice_is_one_error(training, arguments, capsys, monkeypatch, place, value, said):
    before = content(training.folder)
    monkeypatch.setattr(f"tutelage.cli.dry_run.{place}", value)
    text = told(capsys, arguments("sft", "--dry_run"), code=2)
    assert text.startswith("tutelage: error: ")
    assert re.search(said, text)
    assert content(training.folder) == before


@pytest.mark.parametrize(
    "more",
    [
        ["--stages_per_epoch=50"],
        ["--learning_rate=-1"],
        ["--max_prompt_length=2"],
        ["--keep_stages=1", "--replay_stages=3"],
        ["--load_best_stage_at_end"],
    ],
)
def test_it_refuses_what_the_run_refuses(training, arguments, capsys, more):
    before = content(training.folder)
    text = told(capsys, arguments("irft", *more, "--dry_run"), code=2)
    assert content(training.folder) == before
    assert text == told(capsys, arguments("irft", *more), code=2)


def test_a_run_that_would_go_on_is_not_touched(training, arguments, capsys):
    told(capsys, arguments("irft"))
    out = training.folder / "out"
    before = content(out)
    assert "not empty" in told(capsys, arguments("irft", "--dry_run"), code=2)
    text = told(capsys, arguments("irft", "--dry_run", "--resume"))
    assert re.search(r"go on from \S*checkpoint-\d+", text)
    told(capsys, arguments("irft", "--dry_run", "--overwrite_output_dir"))
    other = told(capsys, arguments("irft", "--dry_run", "--resume", "--seed=7"), code=2)
    assert "seed" in other
    assert content(out) == before
