"""Every file of a stage and of a checkpoint that is not as the run wrote it is named, and made again where it can be."""

import logging
import random
import shutil

import pytest
import torch
from test_resume import KillAt, Killed
from transformers.trainer_utils import get_last_checkpoint

from rft_runs import QUICK
from training_runs import Training, weights
from tutelage.errors import UserError
from tutelage.training.identity import check_identity
from tutelage.training.manifest import DAMAGED
from tutelage.training.resume import find_checkpoint

RUNS = {
    # Stages of three steps, a checkpoint at the end of each and one inside the second.
    "irft": {"stages_per_epoch": 2, "replay_stages": 1, "num_train_epochs": 1, "sampling_batch_size": 2},
    "rft": {**QUICK, "sampling_batch_size": 2, "reward_negatives": "own,out_of_fold"},
}


def make(training, algorithm, name, callbacks=()):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3, **RUNS[algorithm]}
    return training.trainer(
        algorithm,
        model=training.model(num_hidden_layers=1),
        name=name,
        data=training.rows(20),
        options={"callbacks": list(callbacks)},
        **settings,
    )


@pytest.fixture(scope="module", params=RUNS)
def runs(request, tmp_path_factory):
    """A finished run, one that was killed inside its last stage, and one that was killed while it sampled."""
    training = Training(tmp_path_factory.mktemp(request.param))
    whole = make(training, request.param, "whole")
    whole.train()
    assert whole.state.global_step >= 4
    with pytest.raises(Killed):
        make(training, request.param, "killed", [KillAt("on_pre_optimizer_step", whole.state.global_step - 1)]).train()
    sampling = make(training, request.param, "sampling")
    sample, seen = sampling.stages.rollout.sampler.sample, []

    def dying(prompts, *args, stage, **options):
        seen.append(stage)
        if seen.count(1) == 2:
            raise Killed
        return sample(prompts, *args, stage=stage, **options)

    sampling.stages.rollout.sampler.sample = dying
    with pytest.raises(Killed):
        sampling.train()
    return training, request.param, whole


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path, draw):
    path.write_bytes(path.read_bytes()[: draw.randrange(1, path.stat().st_size)])


def empty(path, draw):
    path.write_bytes(b"")


def delete(path, draw):
    path.unlink()


def swap(path, draw):
    """With another file of the run."""
    others = [
        p for p in path.parents[1].rglob(f"*{path.suffix}") if p.is_file() and p.read_bytes() != path.read_bytes()
    ]
    other = draw.choice(sorted(others) or [path])
    content = other.read_bytes()
    other.write_bytes(path.read_bytes())
    path.write_bytes(content)


WAYS = (flip, flip, truncate, empty, delete, swap)


def files_of(folder):
    """What a resumed run reads: what it exports is written anew."""
    found = [p for part in ("stages", "checkpoint-*") for home in folder.glob(part) for p in sorted(home.rglob("*"))]
    return [p.relative_to(folder) for p in [folder / "run.json", *found] if p.is_file()]


def test_every_altered_file_is_named(runs, tmp_path, caplog):
    """More than a hundred for each algorithm; no message names a file that is as it was."""
    training, algorithm, whole = runs
    draw, tried = random.Random(0), 0
    trainer = make(training, algorithm, "asked")
    identity = trainer.identity()
    for run in ("whole", "killed", "sampling"):
        names = files_of(training.folder / run)
        draw.shuffle(names)
        for place, name in enumerate(names[:40]):
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(training.folder / run, copy)
            trainer.stages.store.folder = copy / "stages"
            before = (copy / name).read_bytes()
            way = WAYS[(place + tried) % len(WAYS)]
            way(copy / name, draw)
            if (copy / name).exists() and (copy / name).read_bytes() == before:
                continue
            tried += 1
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                try:
                    check_identity(copy, identity)
                    found = find_checkpoint(copy, trainer.stages)
                    said = caplog.text
                except UserError as error:
                    found, said = None, str(error)
            told = f"{run}/{name}, {way.__name__}: {said}"
            if ".part" in name.name:  # what comes after a torn piece is drawn again, and nobody need hear of it
                stage = next(stage for stage in range(9) if f"stage-{stage:04d}" in str(name))
                record = trainer.stages.store.read(stage, trainer.stages.store.manifest(stage)["policy"])
                assert record.items() <= whole.stages.store.read(stage, None).items(), told
            elif way is delete and name.name == "manifest.json" and name.parts[0] == "stages":
                # Whatever it noted counts as absent: it is made again, or a checkpoint that needs it is passed over.
                assert found is None or str(name.parent) in said or not said, told
            else:
                assert name.name in said, told
                assert name.parts[0] in said, told
            if name.name != "run.json" and way is not delete and str(copy / DAMAGED) in said:
                assert [p for p in (copy / DAMAGED).rglob("*") if p.is_file()], told
    assert tried >= 100, tried


# One of each kind, and where the run then goes on: from the stage that can make it again, or from where it was.
KINDS = {
    "irft": [
        "stages/stage-0001/samples.jsonl",
        "stages/stage-0001/replayed-0000.jsonl",
        "stages/stage-0001/manifest.json",
        "stages/stage-0000/samples.jsonl",
        "checkpoint-*/optimizer.pt",
        "checkpoint-*/manifest.json",
    ],
    "rft": [
        "stages/stage-0001/rewards.jsonl",
        "stages/stage-0001/reward.safetensors",
        "stages/stage-0000/policy.safetensors",
        "stages/stage-0000/validation.jsonl",
        "stages/negatives/fold-0.safetensors",
        "checkpoint-*/model.safetensors",
    ],
}


@pytest.mark.parametrize("place", range(6))
def test_what_was_altered_is_made_again(runs, caplog, place):
    training, algorithm, whole = runs
    pattern = KINDS[algorithm][place]
    name = f"again-{place}"
    shutil.copytree(training.folder / "killed", training.folder / name, dirs_exist_ok=True)
    path = sorted((training.folder / name).glob(pattern))[-1]
    (flip, empty, delete)[place % 3](path, random.Random(place))
    resumed = make(training, algorithm, name)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert path.name in caplog.text or "delete" in (flip, empty, delete)[place % 3].__name__
    assert resumed.state.global_step == whole.state.global_step
    expected = weights(whole.policy)
    assert all(torch.equal(value, expected[key]) for key, value in weights(resumed.policy).items())
    for stage in range(2):
        found, other = (t.stages.store.path(stage) for t in (resumed, whole))
        for file in other.glob("*.jsonl"):
            assert (found / file.name).read_bytes() == file.read_bytes()
    assert resumed.stages.phase.selection == whole.stages.phase.selection


def test_a_checkpoint_that_is_named_must_be_whole(runs):
    training, algorithm, _ = runs
    shutil.copytree(training.folder / "killed", training.folder / "named", dirs_exist_ok=True)
    resumed = make(training, algorithm, "named")
    checkpoint = get_last_checkpoint(resumed.args.output_dir)
    assert checkpoint is not None
    with open(f"{checkpoint}/model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(
        UserError, match=r"checkpoint-\d+: model.safetensors has 1,000 bytes where .* were written.*--resume"
    ):
        resumed.train(resume_from_checkpoint=checkpoint)
