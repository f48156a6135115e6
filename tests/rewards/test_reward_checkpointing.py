"""A separate reward model can compute its activations twice instead of keeping them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role
from tutelage.rewards import ExplicitReward
from tutelage.testing.models import tiny_model

GROUPS = [
    Group((5, 6, 7), (Completion((8, 9), Role.DEMONSTRATION, True), Completion((4, 11, 12), Role.SAMPLE, True))),
    Group((9, 10), (Completion((8,), Role.DEMONSTRATION, True), Completion((4, 3), Role.SAMPLE, True))),
]


def separate(adapter):
    model = tiny_model()
    if adapter:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    reward = ExplicitReward.fresh(model, shared=False, layout="padded")
    torch.nn.init.normal_(reward.head.weight, generator=torch.Generator().manual_seed(0))
    model.train()
    return reward


def gradients(reward):
    """And how often a layer ran."""
    calls = []
    layer = next(module for name, module in reward.model.named_modules() if name.endswith("layers.0"))
    hook = layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # recomputing stops inside the MLP
    (reward.rewards(GROUPS) * torch.tensor([1.0, -1.0, 2.0, -2.0])).sum().backward()
    hook.remove()
    return [parameter.grad for parameter in reward.parameters], len(calls)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_same_gradients_from_two_passes(adapter):
    kept, once = gradients(separate(adapter))
    reward = separate(adapter)
    reward.recompute_activations()
    recomputed, twice = gradients(reward)
    assert (once, twice) == (1, 2)
    assert any(gradient is not None for gradient in kept)
    for found, expected in zip(recomputed, kept, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_options_choose_the_layers():
    """Of two layers the first alone: the first layer runs twice, the second once."""
    for layers, expected in ((1, 2), (2, 1)):
        reward = separate(False)
        reward.recompute_activations({"every_n_layers": layers})
        calls = []
        reward.model.model.layers[1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        gradients(reward)
        assert len(calls) == expected


def test_an_architecture_that_cannot_is_an_error():
    reward = separate(False)
    reward.model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="cannot recompute") as error:
        reward.recompute_activations()
    assert error.value.field == "activation_checkpointing"
