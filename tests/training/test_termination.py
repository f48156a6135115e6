"""SIGTERM: a checkpoint at the next border, and a resumed run that ends as if nothing had happened."""

import os
import signal

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from rft_runs import QUICK
from training_runs import weights
from tutelage.cli import main
from tutelage.errors import Terminated
from tutelage.training.termination import listening

RUNS = {
    "irft": {"stages_per_epoch": 2, "num_train_epochs": 2, "sampling_batch_size": 1},
    "rft": {**QUICK, "num_train_epochs": 2, "sampling_batch_size": 1},
}


def make(training, algorithm, name):
    # No checkpoint of its own accord: what there is was written because it was asked to end.
    settings = {"save_strategy": "steps", "save_steps": 1000, "save_each_stage": False, **RUNS[algorithm]}
    model = training.model(attention_dropout=0.1)
    return training.trainer(algorithm, model=model, name=name, data=training.rows(16), **settings)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


class AtStep(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        pass

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            terminate()


def at_a_step(trainer):
    trainer.add_callback(AtStep(2))
    return 3


def while_sampling(trainer):
    sample, seen = trainer.stages.rollout.sampler.sample, []

    def dying(prompts, *args, stage, **options):
        seen.append(stage)
        if stage == 2 and seen.count(2) == 2:
            terminate()
        return sample(prompts, *args, stage=stage, **options)

    trainer.stages.rollout.sampler.sample = dying
    return trainer.stages.schedule.bounds(2)[0]


def in_the_reward_phase(trainer):
    def strike(*args):
        if trainer.stage == 1:
            terminate()

    trainer.stages.phase.learner.fitter.optimizer.register_step_post_hook(strike)
    return trainer.stages.schedule.bounds(1)[0]


@pytest.mark.parametrize(
    ("algorithm", "moment"),
    [("irft", at_a_step), ("irft", while_sampling), ("rft", while_sampling), ("rft", in_the_reward_phase)],
)
def test_it_saves_and_goes_on(training, algorithm, moment):
    whole = make(training, algorithm, "whole")
    whole.train()
    asked = make(training, algorithm, "run")
    step = moment(asked)
    with listening(), pytest.raises(Terminated):
        asked.train()
    last = get_last_checkpoint(asked.args.output_dir)
    assert last is not None
    assert last.endswith(f"checkpoint-{step}")
    resumed = make(training, algorithm, "run")
    resumed.train(resume_from_checkpoint=True)
    expected = weights(whole.policy)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed.policy).items())
    assert resumed.costs.state_dict()["tokens"] == whole.costs.state_dict()["tokens"]


def test_before_the_first_step_nothing_is_to_be_saved(training):
    asked = make(training, "irft", "run")
    sample = asked.stages.rollout.sampler.sample
    asked.stages.rollout.sampler.sample = lambda *args, **options: (terminate(), sample(*args, **options))[1]
    with listening(), pytest.raises(Terminated):
        asked.train()
    assert get_last_checkpoint(asked.args.output_dir) is None


def test_the_command_has_a_code_of_its_own_and_says_how_to_go_on(monkeypatch, capsys):
    def ended(name, args):
        raise Terminated

    monkeypatch.setattr("tutelage.cli._run", ended)
    assert main(["sft"]) == 143
    assert "SIGTERM" in (said := capsys.readouterr().err)
    assert "--resume" in said


def test_afterwards_the_signal_does_what_it_did():
    before = signal.getsignal(signal.SIGTERM)
    with listening():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
