"""An RFT run that was killed in any of its phases and resumed ends as one that was not: policy, reward and choice."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from test_resume import CountingSampler, KillAt, Killed, weights
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from rft_runs import NEURAL
from training_runs import Training
from tutelage.errors import UserError
from tutelage.training.reward_phase import VALIDATION_ROWS

# 24 rows train: 6 steps in three stages, which begin at 0, 2 and 4. The first leaves the policy as it is. Dropout, order and learning
# rate differ from step to step, so that a state which is not restored shows.
KEPT = 8
SETTINGS = {
    "stages_per_epoch": 3,
    "lr_scheduler_type": "linear",
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 3,
    **NEURAL,
    "sampling_batch_size": 2,  # a record grows by four rows
    "num_samples": 2,
    "validation_rows": KEPT,
    "reward_warmup_stages": 1,
    "reward_learning_rate": 1e-2,
    "reward_epochs": 2,
    "reward_batch_size": 4,
    "early_stopping": "never",
    "truncated_samples": "score",
    "beta": 0.01,
}
POLICIES = {
    "full": {},
    "adapter, all that a stage may use": {
        "adapter": True,
        "reward_replay_stages": 1,
        "reward_negatives": "own,initial,out_of_fold",
        "preferences": True,
    },
}


def make(training, name="run", *, adapter=False, preferences=False, callbacks=(), data=None, **settings):
    pairs = [{"prompt": f"Is {i}?", "chosen": " It is.", "rejected": " No"} for i in range(6)]
    options = {
        "callbacks": list(callbacks),
        "peft_config": training.lora(lora_dropout=0.1) if adapter else None,
        "preference_dataset": Dataset.from_list(pairs) if preferences else None,
    }
    trainer = training.trainer(
        "rft",
        model=training.model(attention_dropout=0.1),
        name=name,
        data=data or training.rows(24 + KEPT),
        options=options,
        **{**SETTINGS, **settings},
    )
    trainer.stages.rollout.sampler = CountingSampler(trainer)
    return trainer


def assert_equal(found, expected):
    """Bit for bit, through lists and dictionaries."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_equal(found[name], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for value, other in zip(found, expected, strict=True):
            assert_equal(value, other)
    else:
        assert found == expected


def assert_same(resumed, whole):
    assert resumed.state.global_step == whole.state.global_step == 6
    assert_equal(weights(resumed), weights(whole))
    assert_equal(resumed.reward.parameters, whole.reward.parameters)
    assert_equal(resumed.stages.phase.learner.fitter.state_dict(), whole.stages.phase.learner.fitter.state_dict())
    assert resumed.stages.phase.selection == whole.stages.phase.selection
    assert resumed.costs.state_dict()["tokens"] == whole.costs.state_dict()["tokens"]
    for stage in range(3):
        for name in ("samples", "rewards"):
            assert resumed.stages.store.lines(stage, name) == whole.stages.store.lines(stage, name)
    logged = [[row for row in trainer.state.log_history if "reward/loss" in row] for trainer in (resumed, whole)]
    assert logged[0] == logged[1]


@pytest.fixture(scope="module", params=POLICIES)
def whole(request, tmp_path_factory):
    """The run that nobody killed, and its settings."""
    training = Training(tmp_path_factory.mktemp("whole"))
    trainer = make(training, **POLICIES[request.param])
    trainer.train()
    ran = [row["policy/phase"] for row in trainer.state.log_history if "policy/phase" in row]
    assert ran == [0, 1, 1], "so that each phase is there to be killed in"
    return trainer, POLICIES[request.param]


def resume(training, settings, checkpoint):
    """The run, gone on from its last checkpoint: the one of step ``checkpoint``, or none."""
    resumed = make(training, **settings)
    last = get_last_checkpoint(resumed.args.output_dir)
    assert (last is None) == (checkpoint is None)
    assert last is None or last.endswith(f"checkpoint-{checkpoint}")
    resumed.train(resume_from_checkpoint=last)
    return resumed


@pytest.mark.parametrize(("stage", "checkpoint"), [(0, None), (2, 4)])
def test_killed_while_sampling(training, whole, stage, checkpoint):
    expected, settings = whole
    killed = make(training, **settings)
    killed.stages.rollout.sampler = CountingSampler(killed, die_in=stage, after=4)
    with pytest.raises(Killed):
        killed.train()
    recorded = killed.stages.rollout.sampler.rows[stage]
    assert len(recorded) == 4
    resumed = resume(training, settings, checkpoint)
    assert_same(resumed, expected)
    assert not set(recorded) & set(resumed.stages.rollout.sampler.rows[stage]), "what was sampled is not sampled again"


@pytest.mark.parametrize(("looks", "checkpoint"), [(0, None), (1, 4), (2, 6)])
def test_killed_while_sampling_for_the_kept_rows(training, whole, looks, checkpoint):
    """The start is looked at, and the policies after stages 1 and 2; the last just before the choice."""
    expected, settings = whole
    killed = make(training, **settings)
    killed.stages.rollout.sampler = CountingSampler(killed, die_in=VALIDATION_ROWS, after=KEPT * looks)
    if looks == 0:
        killed.stages.rollout.sampler.after, killed.stages.rollout.sampler.rows[VALIDATION_ROWS] = 1, [0]
    with pytest.raises(Killed):
        killed.train()
    resumed = resume(training, settings, checkpoint)
    assert_same(resumed, expected)
    assert len(resumed.stages.rollout.sampler.rows[VALIDATION_ROWS]) == KEPT * (3 - looks)


@pytest.mark.parametrize(("stage", "step", "checkpoint"), [(0, 2, None), (2, 1, 4), (2, 3, 4)])
def test_killed_in_the_reward_phase(training, whole, stage, step, checkpoint):
    """After so many of its steps; the rows kept for this stage have been looked at by then and are not drawn again."""
    expected, settings = whole
    killed = make(training, **settings)
    done = []

    def strike(*args):
        done.append(killed.stage)
        if done.count(stage) == step:
            raise Killed

    killed.stages.phase.learner.fitter.optimizer.register_step_post_hook(strike)
    with pytest.raises(Killed):
        killed.train()
    resumed = resume(training, settings, checkpoint)
    assert_same(resumed, expected)
    assert len(resumed.stages.rollout.sampler.rows[VALIDATION_ROWS]) == KEPT * (2 if stage == 0 else 1)


@pytest.mark.parametrize(
    ("event", "step", "checkpoint"),
    [
        pytest.param("on_step_begin", 0, None, id="after the first reward phase"),
        pytest.param("on_step_begin", 4, 4, id="after a reward phase, before a policy step"),
        pytest.param("on_step_begin", 3, 3, id="inside a policy phase"),
        pytest.param("on_pre_optimizer_step", 5, 4, id="inside the last policy phase"),
        pytest.param("on_save", 4, 4, id="between stages"),
        pytest.param("on_train_end", 6, 6, id="at the end, before the choice"),
    ],
)
def test_killed_at_a_step(training, whole, event, step, checkpoint):
    expected, settings = whole
    with pytest.raises(Killed):
        make(training, callbacks=[KillAt(event, step)], **settings).train()
    assert_same(resume(training, settings, checkpoint), expected)


def test_a_finished_run_that_is_resumed_is_the_same(training, whole):
    expected, settings = whole
    shutil.copytree(expected.args.output_dir, training.folder / "run")
    resumed = resume(training, settings, 6)
    assert_same(resumed, expected)
    assert resumed.stages.rollout.sampler.rows == {}


@pytest.mark.parametrize("steps", [2, 3])
def test_a_finished_run_of_part_of_an_epoch_is_the_same(training, steps):
    """Its end may be where a stage would begin, which then must not."""
    settings = {"max_steps": steps, "save_steps": 1, "reward_warmup_stages": 0}
    runs = [make(training, **settings) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=get_last_checkpoint(runs[1].args.output_dir))
    assert runs[0].stages.phase.selection == runs[1].stages.phase.selection
    assert_equal(weights(runs[1]), weights(runs[0]))
    assert_equal(runs[1].reward.parameters, runs[0].reward.parameters)
    assert len(list(runs[0].stages.store.folder.glob("*/samples.jsonl"))) == (steps > 2) + 1


def killed_at(training, step, **settings):
    with pytest.raises(Killed):
        make(training, callbacks=[KillAt("on_step_begin", step)], **settings).train()


def test_stages_that_are_gone_are_made_again(training, whole, caplog):
    """Not a fresh reward in the place of the learned one."""
    expected, settings = whole
    killed_at(training, 4, **settings)
    resumed = make(training, **settings)
    shutil.rmtree(resumed.stages.store.path(1))
    last = get_last_checkpoint(resumed.args.output_dir)
    with pytest.raises(UserError, match=r"checkpoint-4: .*stage-0001/samples.jsonl is damaged or missing.*--resume"):
        resumed.train(resume_from_checkpoint=last)
    resumed = make(training, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is passed over" in caplog.text
    assert_same(resumed, expected)


def test_a_run_whose_stages_are_removed_while_it_is_on_does_not_end_well(training):
    run = make(training)
    run.add_callback(RemoveStages(run.stages.store.folder))
    with pytest.raises(UserError, match=r"stage-0000/samples.jsonl: is gone: .*removed while it was on.*--resume"):
        run.train()


class RemoveStages(TrainerCallback):
    def __init__(self, folder):
        self.folder = folder

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            shutil.rmtree(self.folder)


@pytest.mark.parametrize("change", ["rows", "temperature"])
def test_policies_are_not_compared_on_other_rows_or_settings(training, change):
    killed_at(training, 4)
    settings = {"temperature": 0.5} if change == "temperature" else {"data": training.rows(40).select(range(8, 40))}
    resumed = make(training, **settings)
    said = r"field 'temperature'" if change == "temperature" else r"other training data.*validation_dataset"
    with pytest.raises(UserError, match=said):
        resumed.train(resume_from_checkpoint=get_last_checkpoint(resumed.args.output_dir))
    with pytest.raises(UserError, match=r"stage-0000/candidate.json: the validation rows.*differ"):
        resumed.stages.phase.candidates.read(0)


@pytest.mark.parametrize("change", ["rows", "temperature", "policy"])
def test_a_record_of_the_start_of_something_else_is_thrown_away(training, change):
    killed_at(training, 0)
    settings = {
        "rows": {"data": training.rows(40).select(range(8, 40))},
        "temperature": {"temperature": 0.5},
        "policy": {},
    }[change]
    again = make(training, **settings)
    if change == "policy":
        again.policy.get_input_embeddings().weight.data += 0.01
    again.stages.phase._look(0, again.stages.rollout.begin())
    assert len(again.stages.rollout.sampler.rows[VALIDATION_ROWS]) == KEPT
    recorded = json.loads((again.stages.store.path(0) / "candidate.json").read_text(encoding="utf-8"))
    assert recorded["settings"]["temperature"] == again.args.temperature
    found = [(group.prompt_ids, group.completions[:1]) for group in again.stages.store.groups(0, "validation")]
    assert found == [(group.prompt_ids, group.completions) for group in again.stages.phase.candidates.rows.groups]


@pytest.mark.parametrize(("step", "checkpoint"), [(7, 6), (11, 9), (4, 4)])
def test_killed_inside_the_passes_of_a_stage(training, step, checkpoint):
    """Two passes of two steps per stage: stages begin at 0, 4 and 8."""
    settings = {"policy_epochs": 2}
    whole = make(training, "whole", **settings)
    whole.train()
    assert whole.state.global_step == 12
    with pytest.raises(Killed):
        make(training, callbacks=[KillAt("on_step_begin", step)], **settings).train()
    resumed = resume(training, settings, checkpoint)
    assert_equal(weights(resumed), weights(whole))
    assert_equal(resumed.reward.parameters, whole.reward.parameters)
    assert resumed.stages.phase.selection == whole.stages.phase.selection
    assert resumed.costs.state_dict()["tokens"] == whole.costs.state_dict()["tokens"]
