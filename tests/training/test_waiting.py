"""A training step does not wait for the device, but for one check before the optimizer moves a weight."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback
from waiting import Reads, waits

from tutelage.groups import Completion, Group, Role
from tutelage.models.weights import WeightSet
from tutelage.rewards.explicit import ExplicitReward
from tutelage.rewards.fitting import RewardFitter, RewardObjective
from tutelage.testing.models import tiny_model
from tutelage.training.metrics import Means

NUMBERS = {"sampler_logps": -2.0, "old_logps": -2.0, "reference_logps": -2.5}


def completion(tokens, role):
    values = {name: tuple(value for _ in tokens) for name, value in NUMBERS.items()}
    return Completion(tokens, role, True, values, {"reward": 0.5, "scaled_reward": 0.3})


def group(row, *roles):
    return Group(
        tuple(range(3, 8 + row)),
        tuple(completion(tuple(range(9, 12 + i)), role) for i, role in enumerate(roles)),
        row=row,
    )


GROUPS = {
    "sft": [group(row, Role.DEMONSTRATION) for row in range(3)],
    "irft": [group(row, Role.DEMONSTRATION, Role.SAMPLE, Role.SAMPLE) for row in range(3)],
    "rft": [group(row, Role.SAMPLE, Role.SAMPLE) for row in range(3)],
    "sdft": [replace(group(row, Role.SAMPLE, Role.SAMPLE), teacher_prompt_ids=(9, 4, 7, 5)) for row in range(3)],
}
SETTINGS = {
    "sft": {},
    "irft": {"sft_weight": 0.1},
    "rft": {"validation_rows": 4, "stages_per_epoch": 1},
    "sdft": {"average": "samples"},
}


def on_device(training, algorithm, adapters, **settings):
    """A trainer whose policy lies on "meta", after all that is measured on it before training."""
    model = training.model()
    if adapters:
        model = get_peft_model(model, training.lora())
    trainer = training.trainer(algorithm, model=model, **SETTINGS[algorithm], **settings)
    trainer.policy.to("meta")
    if trainer.start.weights is not None:
        trainer.start.weights = WeightSet(trainer.policy)
    return trainer


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("algorithm", GROUPS)
def test_a_micro_batch_waits_for_nothing(training, algorithm, adapters):
    trainer, groups = on_device(training, algorithm, adapters), GROUPS[algorithm]
    counts = trainer.objective.counts(groups)
    with waits() as found:
        for _ in range(2):
            loss = trainer.training_step(trainer.model, groups, counts)
    assert loss.is_meta
    assert not found
    gradients = [p.grad for p in trainer.policy.parameters() if p.requires_grad]
    assert gradients
    assert all(gradient is not None for gradient in gradients)


def test_metrics_stay_on_the_device_until_they_are_read():
    means = Means()
    with waits() as found:
        means.add("loss", torch.ones(3, device="meta"))
        means.add("loss", torch.ones(2, device="meta"))
    assert not found
    with pytest.raises(RuntimeError, match="meta"):  # reading is what waits
        means.take()


def test_waiting_is_found():
    """Whether the stand-in for a device tells what waits from what does not."""
    values, host = torch.ones(4, device="meta"), torch.tensor([1, 2])
    for read in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, bool, lambda t: t[t > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(values[:1] if read in (torch.Tensor.item, bool) else values)
    with waits() as found:
        host.to("meta")
        values[host]
        values[[0, 2]]
        torch.tensor([1.0, 2.0], device="meta")
        assert len(found) == 4
        seen = len(found)
        host.to("meta", non_blocking=True)
        values[host.to("meta", non_blocking=True)]
        values.sum() + 1
        assert len(found) == seen


@pytest.mark.parametrize("algorithm", ["sft", "irft", "sdft"])
def test_a_step_reads_from_the_device_once(training, algorithm):
    """Of our own code and of transformers' loop, with as many micro-batches as one likes and whatever is tracked."""
    stages = {} if algorithm == "sft" else {"stages_per_epoch": 1}
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 100, **stages}
    trainer = training.trainer(algorithm, **settings)
    reads, steps = Reads(), []

    class Between(TrainerCallback):
        """From the first forward pass of a step to its end: what comes before it prepares a stage."""

        def on_step_end(self, args, state, control, **kwargs):
            steps.append(reads.found[:])
            reads.found.clear()

    training_step = trainer.training_step

    def counted(*args, **kwargs):
        with reads:
            return training_step(*args, **kwargs)

    trainer.training_step = counted
    check_step = trainer.check_step

    def checked():
        with reads:
            check_step()

    trainer.check_step = checked
    trainer.add_callback(Between())
    trainer.train()
    assert len(steps) == 4
    assert all(step == ["check_step"] for step in steps)


def test_transformers_looks_for_no_nan_after_each_micro_batch(training):
    trainer = training.trainer("sft")
    assert not trainer.args.logging_nan_inf_filter


def test_a_step_of_a_reward_reads_from_the_device_once():
    reward = ExplicitReward.fresh(tiny_model(), shared=False)
    optimizer = torch.optim.AdamW(reward.parameters)
    fitter = RewardFitter(reward, RewardObjective(), optimizer, batch_size=4, micro_batch_size=2)
    groups = [group(row, Role.DEMONSTRATION, Role.SAMPLE) for row in range(4)]
    seen = []
    fitter.fit(groups, phase=0, steps=1)  # finds the layout
    with Reads() as reads:
        fitter.fit(groups, phase=0, steps=3, on_step=lambda *_: seen.append(reads.found[:]) or reads.found.clear())
    assert [[name for name in step if name != "_batches"] for step in seen] == [["_step"]] * 3
