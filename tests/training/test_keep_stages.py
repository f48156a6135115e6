"""--keep_stages: the disk is bounded, and a run still goes on from every checkpoint with the same weights and samples."""

import shutil

import pytest
import torch
from test_resume import KillAt, Killed
from test_resume import make as make_irft
from test_rft_resume import make as make_rft

from training_runs import Training, weights
from tutelage.algorithms.registry import find
from tutelage.errors import UserError
from tutelage.training.checkpoints import checkpoints
from tutelage.training.manifest import Manifest

KEPT = {"save_total_limit": 2, "keep_stages": 1}
IRFT = {"replay_stages": 1, "num_train_epochs": 3, "save_steps": 1000, **KEPT}  # six stages of three steps
RFT = {
    "reward_replay_stages": 1,
    "num_train_epochs": 2,
    "samplings_per_stage": 2,
    "save_steps": 1000,
    **KEPT,
}  # six of two
RUNS = {
    "irft": lambda training, name, **more: make_irft(training, name, **{**IRFT, **more}),
    "rft": lambda training, name, **more: make_rft(training, name, **{**RFT, **more}),
}
STEPS = {"irft": (3, 18), "rft": (2, 12)}  # of a stage, of the run


def stages_with_samples(trainer):
    return [int(path.parent.name[-4:]) for path in sorted(trainer.stages.store.folder.glob("stage-*/samples.jsonl"))]


def files(trainer):
    """Every file of the stages but the manifests, by its name and content."""
    folder = trainer.stages.store.folder
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if path.name != "manifest.json"}


def assert_same(found, expected):
    values = weights(expected.policy)
    assert all(torch.equal(value, values[name]) for name, value in weights(found.policy).items())
    mine, theirs = files(found), files(expected)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name] and not name.endswith((".pt", "reward.json"))] == []


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """Of an algorithm: how its runs are made, a run that kept all stages, and one that did not."""
    training = Training(tmp_path_factory.mktemp("keep"))
    everything = RUNS[request.param](training, "everything", keep_stages=None)
    everything.train()
    bounded = RUNS[request.param](training, "bounded")
    bounded.train()
    return training, request.param, everything, bounded


def test_the_disk_is_bounded_and_nothing_else_differs(run):
    _, algorithm, everything, bounded = run
    expected = weights(everything.policy)
    assert all(torch.equal(value, expected[name]) for name, value in weights(bounded.policy).items())
    assert stages_with_samples(everything) == [0, 1, 2, 3, 4, 5]
    # The checkpoints that are kept stand at the beginning of stage 5, which replays stage 4, and at the end of it.
    assert stages_with_samples(bounded) == [4, 5]
    kept = {name: content for name, content in files(bounded).items() if not name.endswith((".pt", "reward.json"))}
    assert kept == {name: content for name, content in files(everything).items() if name in kept}
    names = {path.name for path in bounded.stages.store.path(0).rglob("*")}
    assert {"samples.jsonl", "rewards.jsonl"}.isdisjoint(names)
    if algorithm == "irft":
        assert names == {"manifest.json"}
    else:
        assert {"validation.jsonl", "candidate.json", "reward.json"} <= names
        assert bounded.stages.phase.selection == everything.stages.phase.selection
        assert not list(bounded.stages.store.path(0).glob("draw-*"))
        assert [bool(list(bounded.stages.store.path(s).glob("reward.safetensors"))) for s in range(6)] == [
            False, False, False, False, True, True,
        ]  # fmt: skip


@pytest.mark.parametrize("place", [0, 1])
def test_it_goes_on_from_every_checkpoint_that_is_kept(run, place):
    training, algorithm, _, bounded = run
    name = f"from-{place}"
    shutil.copytree(bounded.args.output_dir, training.folder / name)
    for newer in checkpoints(training.folder / name)[:place]:
        shutil.rmtree(newer)
    resumed = RUNS[algorithm](training, name)
    checkpoint = resumed.resume_point()
    assert checkpoint == str(checkpoints(training.folder / name)[0])
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_same(resumed, bounded)


def test_a_killed_run_goes_on(run):
    training, algorithm, _, bounded = run
    of_stage, _ = STEPS[algorithm]
    killed = RUNS[algorithm](training, "killed", callbacks=[KillAt("on_step_begin", 4 * of_stage + 1)])
    with pytest.raises(Killed):
        killed.train()
    resumed = RUNS[algorithm](training, "killed")
    assert resumed.resume_point().endswith(f"checkpoint-{4 * of_stage}")
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, bounded)


def test_without_a_whole_checkpoint_it_begins_anew(run):
    training, algorithm, _, bounded = run
    shutil.copytree(bounded.args.output_dir, training.folder / "anew")
    for checkpoint in checkpoints(training.folder / "anew"):
        (checkpoint / "trainer_state.json").write_text("{}")
    resumed = RUNS[algorithm](training, "anew")
    assert resumed.resume_point() is None
    resumed.train()
    assert_same(resumed, bounded)


def test_a_removal_that_was_killed_is_finished(run, monkeypatch):
    _, algorithm, _, bounded = run
    folder = bounded.stages.store.path(0)
    draw = folder / "draw-0001"
    draw.mkdir()
    (draw / "samples.jsonl").write_text("x")
    Manifest(draw).note("samples.jsonl")
    (folder / "samples.jsonl").write_text("x")
    removed = []
    unlink = type(folder).unlink
    monkeypatch.setattr(type(folder), "unlink", lambda self, **o: (removed.append(self.name), unlink(self, **o))[1])
    of_stage, last = STEPS[algorithm]
    bounded.stages.tidy([last - of_stage, last])
    assert not draw.exists()
    assert not (folder / "samples.jsonl").exists()
    assert removed[0] == "manifest.json", "what a draw's manifest notes is never missing"
    assert bounded.stages.store.mend() == []


@pytest.mark.parametrize(
    ("algorithm", "settings", "said"),
    [
        ("irft", {"save_strategy": "no"}, "there are none"),
        ("irft", {"save_total_limit": None}, "every checkpoint is kept"),
        ("irft", {"replay_stages": 2}, "2 earlier stages are read again.* Use 2 or more"),
        ("rft", {}, "samples of all stages.* Give --reward_replay_stages, at most 1"),
        ("rft", {"reward_replay_stages": 2}, "2 earlier stages"),
    ],
)
def test_what_cannot_be_bounded_is_refused(tmp_path, algorithm, settings, said):
    settings = {"save_strategy": "steps", "keep_stages": 1, "bf16": False, "use_cpu": True, **settings}
    with pytest.raises(UserError, match=f"field 'keep_stages'.*{said}"):
        find(algorithm).config(output_dir=str(tmp_path), **settings)
