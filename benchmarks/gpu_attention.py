"""The attention part of the benchmark on a GPU: a dense mask in SDPA against FlexAttention, and the body compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.gpu_run import Run, Shape, Timing, autocast, free_memory, policy, random_groups, take_turns, vocab_size
from tutelage.groups import Batch, collate_shared_prefix
from tutelage.models.loading import base_causal_lm

__all__ = [
    "attention",
    "attention_inputs",
    "attentions",
    "body_of",
    "body_states",
    "layer_masks",
    "shared_prefix_block_mask",
    "with_flex",
]


def attention(run: Run) -> None:
    """A dense mask in SDPA against FlexAttention, alone and in the whole body, and the body compiled.

    Last of the parts: compilers may take what time is left. On a CPU FlexAttention has no backward; there neither it nor
    compiling is timed. tests/gpu checks the numbers.
    """
    if not run.on_cuda:
        run.say("skipped: timing FlexAttention and compiled models: on CUDA alone")
    for shape in run.sizes.attention if run.on_cuda else ():
        if run.has_time(f"attention {shape}", 40):
            with run.attempt(f"attention {shape}", seconds=90):
                time_attention(run, shape)
            free_memory(run)
    if run.has_time("the whole body", 90 if run.on_cuda else 5):
        time_body(run)


def shared_prefix_block_mask(batch: Batch, window: int | None = None) -> BlockMask:
    """``Batch.shared_prefix_mask`` for FlexAttention, which skips the blocks where nobody attends to anybody."""
    branch_BL, position_BL = batch.branch_ids, batch.position_ids

    def may_attend(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        branch, distance = branch_BL[b, query], position_BL[b, query] - position_BL[b, key]
        in_reach = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        related = (branch_BL[b, key] == branch) | (branch_BL[b, key] == 0)
        return (related & (branch >= 0) & in_reach) | (query == key)

    B, L = batch.input_ids.shape
    return create_block_mask(may_attend, B, None, L, L, device=str(branch_BL.device))


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attentions(batch: Batch) -> dict[str, Attention]:
    """Both ways to attend in the shared-prefix layout.

    SDPA with a mask wants keys and values repeated, as transformers does it.
    """
    mask, block_mask = batch.shared_prefix_mask(), shared_prefix_block_mask(batch)
    torch.compiler.reset()  # each shape is compiled anew; after several, dynamo would go on uncompiled
    flex: Any = torch.compile(flex_attention, dynamic=False) if mask.is_cuda else flex_attention

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return {"SDPA": dense, "FlexAttention": lambda q, k, v: flex(q, k, v, block_mask=block_mask, enable_gqa=True)}


def attention_inputs(fields: Mapping[str, int], batch: Batch) -> list[Tensor]:
    """Random bfloat16 queries, keys and values in a model's heads; with gradients where FlexAttention has them.

    Args:
        fields: of the model's config.
    """
    device = batch.input_ids.device
    generator = torch.Generator(device).manual_seed(0)
    B, L = batch.input_ids.shape
    shapes = [(B, fields[f"num_{kind}_heads"], L, fields["head_dim"]) for kind in ("attention", *["key_value"] * 2)]
    made = [torch.randn(shape, device=device, generator=generator).bfloat16() for shape in shapes]
    return [states.requires_grad_(device.type == "cuda") for states in made]


def time_attention(run: Run, shape: Shape) -> None:
    """Forward and backward of one layer's attention, and beside it what making the mask costs, once per step."""
    batch = collate_shared_prefix(random_groups(shape, 100)).to(run.device)
    inputs = attention_inputs(run.sizes.model, batch)
    upstream = torch.randn_like(inputs[0])

    def step(attend: Attention) -> None:
        torch.autograd.grad(attend(*inputs), inputs, upstream)

    sides = {name: partial(step, attend) for name, attend in attentions(batch).items()}
    sides |= {"dense mask": batch.shared_prefix_mask, "block mask": partial(shared_prefix_block_mask, batch)}
    found = take_turns(run, sides, repeats=4 * run.sizes.repeats, warmups=3)
    for name, timing in found.items():
        run.row("attention", f"one layer, {shape}", name, timing)
    compare(run, f"one layer, {shape}", found)


def compare(run: Run, what: str, found: Mapping[str, Timing]) -> None:
    """Say which way to attend is faster here."""
    if "FlexAttention" in found:
        ratio = found["FlexAttention"].median / found["SDPA"].median
        run.say(f"{what}: FlexAttention takes {ratio:.2f} of SDPA's time")


def body_states(body: nn.Module, batch: Batch, masks: Any) -> Tensor:
    """[B, L, H] last hidden states in the shared-prefix layout; ``masks`` as ``layer_masks`` makes them."""
    return body(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=masks, use_cache=False
    ).last_hidden_state


def layer_masks(model: nn.Module, make: Callable[[int | None], Any]) -> Any:
    """The mask that ``make`` makes of a sliding window or None: one, or one for each kind of layer the model has."""
    config = base_causal_lm(model).config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    return {kind: make(_window(config, kind)) for kind in kinds} or make(getattr(config, "sliding_window", None))


def body_of(model: nn.Module) -> nn.Module:
    """The model without its head."""
    return base_causal_lm(model).base_model


def with_flex(model: nn.Module) -> nn.Module:
    """A copy that attends with FlexAttention."""
    other = copy.deepcopy(model)
    base_causal_lm(other).set_attn_implementation("flex_attention")
    return other


def time_body(run: Run) -> None:
    """Forward and backward of the body with adapters: SDPA, FlexAttention, and SDPA with the body compiled.

    The head, the same for all, is left out.
    """
    torch.compiler.reset()
    model = policy(run)
    batch = collate_shared_prefix(random_groups(run.sizes.step, vocab_size(model))).to(run.device)
    dense = layer_masks(model, batch.shared_prefix_mask)

    def step(body: nn.Module, masks: Any) -> None:
        with autocast(run):
            states = body_states(body, batch, masks)
        states.float().square().mean().backward()
        body.zero_grad()

    sides = {"SDPA": partial(step, body_of(model), dense)}
    if run.on_cuda:
        blocks = layer_masks(model, partial(shared_prefix_block_mask, batch))
        sides["FlexAttention"] = partial(step, body_of(with_flex(model)), blocks)
        sides["SDPA, compiled"] = partial(step, cast(nn.Module, torch.compile(body_of(model), dynamic=False)), dense)
    working = {}
    for name, side in sides.items():
        with run.attempt(f"the whole body, {name}", seconds=120):
            side()  # compiles
            working[name] = side
    found = take_turns(run, working, repeats=run.sizes.repeats, warmups=2)
    for name, timing in found.items():
        run.row("attention", f"whole body, {run.sizes.step}", name, timing)
    compare(run, "whole body", found)


def _window(config: Any, kind: str) -> int | None:
    return config.sliding_window if kind == "sliding_attention" else None
