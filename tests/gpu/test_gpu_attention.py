"""SDPA and FlexAttention in the shared-prefix layout, on rows of different lengths.

FlexAttention may be off by twice as much as SDPA in bfloat16 is, and a little for luck. On a CPU it has no backward: only
its output is compared there.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from benchmarks import gpu_attention
from benchmarks.gpu_attention import (
    attention_inputs,
    attentions,
    body_of,
    body_states,
    layer_masks,
    shared_prefix_block_mask,
    with_flex,
)
from benchmarks.gpu_run import Shape, random_groups
from gpu_helpers import mixed, random_policies, relative_error
from torch.nn.attention.flex_attention import create_mask

from tutelage.groups import collate_shared_prefix


@pytest.mark.parametrize("window", [None, 4])
def test_the_block_mask_is_the_batchs_mask(setting, window):
    batch = collate_shared_prefix(random_groups(Shape(3, 9, 3, 7), 97, ragged=True)).to(setting.device)
    B, L = batch.input_ids.shape
    found = create_mask(
        shared_prefix_block_mask(batch, window).mask_mod, B, 1, L, L, device=str(batch.input_ids.device)
    )
    assert torch.equal(found, batch.shared_prefix_mask(window))


def attention_errors(setting):
    """For the output, and on a GPU the gradients: how far SDPA and FlexAttention are off SDPA in float32."""
    batch = collate_shared_prefix(random_groups(setting.sizes.check, 100, ragged=True)).to(setting.device)
    inputs = attention_inputs(setting.sizes.model, batch)
    exact = [states.detach().float().requires_grad_(states.requires_grad) for states in inputs]

    def results(attend, states):
        out = attend(*states)
        if not out.requires_grad:
            return [out]
        upstream = torch.randn(out.shape, device=out.device, generator=torch.Generator(out.device).manual_seed(1))
        return [out, *torch.autograd.grad(out, states, upstream.to(out.dtype))]

    ways = attentions(batch)
    truth = results(ways["SDPA"], exact)
    return {
        name: [relative_error(found, true) for found, true in zip(results(attend, inputs), truth, strict=True)]
        for name, attend in ways.items()
    }


def test_attention(setting):
    errors = attention_errors(setting)
    assert all(dense <= 0.05 for dense in errors["SDPA"])
    assert all(flex <= 2 * dense + 0.005 for dense, flex in zip(*errors.values(), strict=True))


def test_a_wrong_block_mask_would_show(setting, monkeypatch):
    monkeypatch.setattr(
        gpu_attention,
        "shared_prefix_block_mask",
        lambda batch: shared_prefix_block_mask(replace(batch, branch_ids=batch.branch_ids.clamp(max=0))),
    )
    errors = attention_errors(setting)
    assert errors["FlexAttention"][0] > 2 * errors["SDPA"][0] + 0.005


@torch.no_grad()
def test_transformers_takes_the_block_mask(setting):
    """Hidden states of the whole body against SDPA's in float32."""
    if setting.device.type == "cpu":
        pytest.skip("transformers compiles FlexAttention, which takes minutes on a CPU")
    torch.compiler.reset()
    models = random_policies(setting)
    batch = collate_shared_prefix(random_groups(setting.sizes.check, 100, ragged=True)).to(setting.device)
    dense, blocks = (
        layer_masks(models["bfloat16"], make)
        for make in (batch.shared_prefix_mask, partial(shared_prefix_block_mask, batch))
    )
    real = batch.branch_ids >= 0
    truth = body_states(body_of(models["float32"]), batch, dense)[real]
    with mixed(setting, "bfloat16"):
        plain = body_states(body_of(models["bfloat16"]), batch, dense)[real]
        found = body_states(body_of(with_flex(models["bfloat16"])), batch, blocks)[real]
    assert relative_error(found, truth) <= 2 * relative_error(plain, truth) + 0.01
