"""Adapters are trained in float32 and multiplied in bfloat16: how many copies that takes."""

import traceback
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage.groups import Completion, Group, Role
from tutelage.models.modes import adapters_under_autocast
from tutelage.rewards.explicit import ExplicitReward
from tutelage.rewards.fitting import RewardFitter, RewardObjective

GROUPS = [
    Group(tuple(range(3, 9 + row)), (Completion((10, 11, 12 + row), Role.DEMONSTRATION, True),), row=row)
    for row in range(2)
]
PAIRS = [
    Group(
        tuple(range(3, 9)),
        (Completion((10, 11, 12), Role.DEMONSTRATION, True), Completion((13, 14), Role.SAMPLE, True)),
        row=row,
    )
    for row in range(2)
]


class Casts(TorchDispatchMode):
    """Counts copies into another precision: of the weights of adapters, by name; and of what peft casts."""

    def __init__(self, model):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in model.named_parameters() if "lora_" in name}
        self.weights, self.inputs = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._to_copy and (kwargs or {}).get("dtype") not in (None, args[0].dtype):
            if name := self.names.get(args[0].data_ptr()):
                self.weights[name] += 1
            self.inputs += any("_cast_input_dtype" in frame.name for frame in traceback.extract_stack())
        return func(*args, **(kwargs or {}))


def adapted(training, recomputes):
    model = training.model(dtype=torch.bfloat16)
    if recomputes:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, training.lora())


@pytest.mark.parametrize("recomputes", [False, True])
def test_each_weight_of_an_adapter_is_cast_once_a_pass(training, recomputes):
    model = adapted(training, recomputes)
    trainer = training.trainer("sft", model=model, bf16=True, gradient_checkpointing=recomputes)
    weights = [p for name, p in trainer.policy.named_parameters() if "lora_" in name]
    assert {p.dtype for p in weights} == {torch.float32}
    with Casts(trainer.policy) as casts:
        trainer.training_step(trainer.model, GROUPS, trainer.objective.counts(GROUPS))
    assert len(casts.weights) == len(weights)
    assert set(casts.weights.values()) == {2 if recomputes else 1}
    assert casts.inputs == 0
    assert {p.grad.dtype for p in weights} == {torch.float32}


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_same_of_a_reward(training, recomputes):
    model = adapted(training, recomputes).train()

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    reward = ExplicitReward.fresh(model, shared=True, autocast=autocast)
    optimizer = torch.optim.SGD(reward.parameters, lr=0.1)
    fitter = RewardFitter(reward, RewardObjective(), optimizer, batch_size=2, max_grad_norm=0.0)
    fitter.fit(PAIRS, phase=0, steps=1)
    with reward.active():
        casts = Casts(model)
    with casts:
        fitter.fit(PAIRS, phase=0, steps=1)
    assert set(casts.weights.values()) == {2 if recomputes else 1}
    assert casts.inputs == 0


def test_casting_back_and_forth_changes_no_number(training, monkeypatch):
    gradients, inputs = [], []
    for saves in (True, False):
        torch.manual_seed(3)
        trainer = training.trainer("sft", model=adapted(training, recomputes=True), bf16=True)
        if not saves:  # as it would be if only the forward pass did without
            monkeypatch.setattr("tutelage.training.trainer.adapters_under_autocast", lambda *_: nullcontext())
        with Casts(trainer.policy) as casts:
            trainer.training_step(trainer.model, GROUPS, trainer.objective.counts(GROUPS))
        gradients.append([p.grad for p in trainer.policy.parameters() if p.requires_grad])
        inputs.append(casts.inputs)
    assert inputs[0] == 0 < inputs[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_peft_casts_what_is_not_under_autocast(training):
    model = adapted(training, recomputes=False)
    with Casts(model) as casts, adapters_under_autocast(model):
        model(input_ids=torch.tensor([[4, 5, 6]]))
    assert casts.inputs > 0
    assert not casts.weights
