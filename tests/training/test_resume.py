"""A run that was killed and resumed ends with the same weights, bit for bit, as one that was not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from training_runs import Training
from tutelage.errors import UserError
from tutelage.sampling import TransformersSampler

# Two epochs of 6 steps, in two stages each: stage boundaries at 3, 6, 9 and 12. Learning rate, shuffling and dropout
# differ from step to step, so that a state which is not restored shows.
SETTINGS = {
    "num_train_epochs": 2,
    "stages_per_epoch": 2,
    "lr_scheduler_type": "linear",
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 3,
    "sampling_batch_size": 1,  # a record grows by four rows, or by two where each has two samples
}
POLICIES = {
    "full with replay": {"replay_stages": 2},
    "adapter": {"adapter": True},
    "adapter with initial reference": {"adapter": True, "replay_stages": 1, "reference": "initial", "num_samples": 2},
}


class Killed(BaseException):
    """What no one catches."""


class KillAt(TrainerCallback):
    """Kills the run at an event of a step (the number of steps done by then)."""

    def __init__(self, event, step):
        self.step = step
        setattr(self, event, self.strike)

    def strike(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


class CountingSampler:
    """The usual sampler; counts the prompts of each stage, and ends the run when it has had enough of one."""

    def __init__(self, trainer, die_in=None, after=0, die=None):
        self.inner = TransformersSampler(trainer.policy, batch_size=16, pad_token_id=trainer.tokenization.pad_id)
        self.die_in, self.after, self.die, self.rows = die_in, after, die or self.kill, {}

    @staticmethod
    def kill():
        raise Killed

    def take_weights(self, policy):
        pass

    def sample(self, prompts, params, *, rows=None, stage=0, **options):
        seen = self.rows.setdefault(stage, [])
        if stage == self.die_in and len(seen) >= self.after:
            self.die()
        seen += rows
        return self.inner.sample(prompts, params, rows=rows, stage=stage, **options)


def make(training, name, *, adapter=False, callbacks=(), data=None, **settings):
    model = training.model(attention_dropout=0.1)
    options = {"callbacks": list(callbacks), "peft_config": training.lora(lora_dropout=0.1) if adapter else None}
    data = data if data is not None else training.rows(24)
    trainer = training.trainer("irft", model=model, name=name, data=data, options=options, **{**SETTINGS, **settings})
    trainer.stages.rollout.sampler = CountingSampler(trainer)
    return trainer


def weights(trainer):
    return {name: parameter.detach() for name, parameter in trainer.policy.named_parameters()}


def assert_same(resumed, whole):
    assert resumed.state.global_step == whole.state.global_step == 12
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    assert resumed.costs.state_dict()["tokens"] == whole.costs.state_dict()["tokens"]
    logged = sum(line.get("time/training", 0.0) for line in resumed.state.log_history)
    assert resumed.costs.seconds["training"] == pytest.approx(logged), "what the killed run spent counts too"
    for stage in range(4):
        assert resumed.stages.store.lines(stage, "samples") == whole.stages.store.lines(stage, "samples")


@pytest.fixture(scope="module", params=POLICIES)
def whole(request, tmp_path_factory):
    """The run that nobody killed, and its settings."""
    training = Training(tmp_path_factory.mktemp("whole"))
    trainer = make(training, "whole", **POLICIES[request.param])
    trainer.train()
    start = make(training, "start", **POLICIES[request.param])
    assert any(not torch.equal(value, weights(start)[name]) for name, value in weights(trainer).items())
    return trainer, POLICIES[request.param]


@pytest.mark.parametrize(
    ("event", "step", "checkpoint"),
    [
        pytest.param("on_save", 3, 3, id="between stages"),
        pytest.param("on_save", 6, 6, id="between epochs"),
        pytest.param("on_step_begin", 6, 6, id="after sampling, before a step"),
        pytest.param("on_step_begin", 5, 4, id="inside a stage"),
        pytest.param("on_pre_optimizer_step", 11, 10, id="inside the last stage"),
    ],
)
def test_killed_at_a_step(training, whole, event, step, checkpoint):
    expected, settings = whole
    with pytest.raises(Killed):
        make(training, "run", callbacks=[KillAt(event, step)], **settings).train()
    resumed = make(training, "run", **settings)
    last = get_last_checkpoint(resumed.args.output_dir)
    assert last is not None
    assert last.endswith(f"checkpoint-{checkpoint}")
    resumed.train(resume_from_checkpoint=last)
    assert_same(resumed, expected)
    stages_sampled = {3: 3, 6: 2, 5: 2, 11: 0}[step] - (event == "on_step_begin" and step == 6)
    assert len(resumed.stages.rollout.sampler.rows) == stages_sampled, "what was sampled is not sampled again"


@pytest.mark.parametrize("stage", [0, 2])
def test_killed_while_sampling(training, whole, stage):
    expected, settings = whole
    killed = make(training, "run", **settings)
    killed.stages.rollout.sampler = CountingSampler(killed, die_in=stage, after=6)
    with pytest.raises(Killed):
        killed.train()
    recorded = killed.stages.rollout.sampler.rows[stage]
    part = killed.stages.store.path(stage) / "samples.jsonl.part"
    assert [json.loads(line)["row"] for line in part.read_text(encoding="utf-8").splitlines()] == recorded
    assert 6 <= len(recorded) < 12

    resumed = make(training, "run", **settings)
    resumed.train(resume_from_checkpoint=get_last_checkpoint(resumed.args.output_dir))
    assert_same(resumed, expected)
    assert sorted(recorded + resumed.stages.rollout.sampler.rows[stage]) == sorted(
        g.row for g in expected.stages.store.groups(stage)
    )
    assert len(resumed.stages.rollout.sampler.rows[stage]) == 12 - len(recorded)
    assert not part.exists()


SCRIPT = """
import os, sys
from pathlib import Path
import torch

torch.set_num_threads(int(sys.argv[4]))
sys.path[:0] = sys.argv[1:3]
from test_resume import POLICIES, CountingSampler, Training, make
trainer = make(Training(Path(sys.argv[3])), "run", **POLICIES["adapter"])
trainer.stages.rollout.sampler = CountingSampler(trainer, die_in=2, after=6, die=lambda: os._exit(9))
trainer.train()
"""


@pytest.mark.parametrize("whole", ["adapter"], indirect=True)
def test_a_process_that_dies_while_sampling(training, whole):
    expected, settings = whole
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        *map(str, Path(__file__).parents[:2]),
        str(training.folder),
        str(torch.get_num_threads()),
    ]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 9
    resumed = make(training, "run", **settings)
    part = resumed.stages.store.path(2) / "samples.jsonl.part"
    recorded = part.read_bytes().count(b"\n")
    with part.open("ab") as file:
        file.write(b'{"row": 3, "prompt": "torn')
    resumed.train(resume_from_checkpoint=get_last_checkpoint(resumed.args.output_dir))
    assert_same(resumed, expected)
    assert len(resumed.stages.rollout.sampler.rows[2]) == 12 - recorded


def stop_in_stage_zero(training, name, **settings):
    """A run that recorded part of its first stage."""
    trainer = make(training, name, **settings)
    trainer.stages.rollout.sampler = CountingSampler(trainer, die_in=0, after=6)
    with pytest.raises(Killed):
        trainer.train()
    return trainer.stages.rollout.sampler.rows[0]


@pytest.mark.parametrize("change", ["policy", "base", "temperature", "prompts", "demonstrations"])
def test_a_record_of_something_else_is_thrown_away(training, change):
    settings = {"adapter": change == "base"}
    recorded = stop_in_stage_zero(training, "run", **settings)
    if change == "temperature":
        settings["temperature"] = 0.5
    if change == "prompts":
        settings["data"] = training.rows(24).map(lambda row: {"prompt": "Now: " + row["prompt"]})
    if change == "demonstrations":
        settings["data"] = training.rows(24).map(lambda row: {"completion": row["completion"] + "!"})
    resumed = make(training, "run", **settings)
    if change in ("policy", "base"):
        resumed.policy.get_input_embeddings().weight.data += 0.01
    resumed.train()
    assert set(recorded) <= set(resumed.stages.rollout.sampler.rows[0])
    assert len(resumed.stages.rollout.sampler.rows[0]) == 12
    groups = resumed.stages.store.groups(0)
    demonstrations = {row["row"]: tuple(row["demonstration_ids"]) for row in resumed.train_dataset}
    assert len(groups) == 12
    assert all(group.completions[0].token_ids == demonstrations[group.row] for group in groups)


def test_inside_a_stage_its_samples_must_be_there(training, caplog):
    with pytest.raises(Killed):
        make(training, "run", callbacks=[KillAt("on_step_begin", 5)]).train()
    resumed = make(training, "run")
    last = get_last_checkpoint(resumed.args.output_dir)
    other_data = make(training, "run", data=training.rows(24).select(range(23, -1, -1)))
    with pytest.raises(UserError, match="other training data"):
        other_data.train(resume_from_checkpoint=last)
    (resumed.stages.store.path(1) / "samples.jsonl").unlink()
    with pytest.raises(UserError, match=r"checkpoint-4: .*stage-0001/samples.jsonl is damaged or missing.*--resume"):
        resumed.train(resume_from_checkpoint=last)
    again = make(training, "run")
    with caplog.at_level("WARNING"):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12
    assert again.stages.rollout.sampler.rows.keys() == {1, 2, 3}, "from the start of the stage, which is sampled again"
    assert "checkpoint-4 is passed over" in caplog.text
