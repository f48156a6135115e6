"""Attention over short rows on a CPU: two matrix products and a softmax."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tutelage.models.modes import precision

__all__ = ["attention_by_products", "attention_kind", "product_attention"]

_NAME = "tutelage_products"
_LONGEST = 512  # tokens of a row
_PRECISIONS = (torch.bfloat16,)  # unscaled scores would overflow in float16
_has_its_own: WeakSet[PreTrainedModel] = WeakSet()


def attention_kind(config: PreTrainedConfig) -> str | None:
    """The name under which the model's attention is registered with transformers: "sdpa", "eager", "flash_attention_2", …

    Args:
        config: the model's, or of the part of it whose attention is asked for (``get_text_config``).
    """
    # transformers sets it publicly (``set_attn_implementation``) and has no public way to read it.
    return config._attn_implementation


@contextmanager
def attention_by_products(base: PreTrainedModel, length: int) -> Iterator[None]:
    """Context in which a model on a CPU uses ``product_attention`` instead of SDPA, in bfloat16 and for short rows.

    torch's fused kernel for CPUs runs at a fraction of the rate of matrix products. It saves storing the
    probabilities, heads × L² numbers per row and layer, for the backward pass. So rows of more than 512 tokens keep
    it, and so do models with activation checkpointing, which recompute outside this context.

    Args:
        length: L, tokens of the longest row.
    """
    config = base.config
    is_text_alone = config.get_text_config() is config  # other parts of a model would be switched along
    is_slow = base.device.type == "cpu" and attention_kind(config) == "sdpa" and precision(base) in _PRECISIONS
    recomputes = (m.gradient_checkpointing for m in base.modules() if hasattr(m, "gradient_checkpointing"))
    if not (is_slow and is_text_alone and length <= _LONGEST) or base in _has_its_own or next(recomputes, False):
        yield
        return
    base.set_attn_implementation(_NAME)
    if attention_kind(config) != _NAME:  # the architecture has one kind of attention, as transformers now said
        _has_its_own.add(base)
    try:
        yield
    finally:
        base.set_attn_implementation("sdpa")


def product_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """softmax(Q Kᵀ · scaling) V under a mask, in the form of transformers' ``AttentionInterface``.

    Query heads that share a key and a value are rows of one matrix product, so neither is repeated.

    Args:
        query: [B, heads, L, D].
        key: [B, shared heads, S, D].
        value: [B, shared heads, S, E].
        attention_mask: [B, 1, L, S], True where a token may be attended to. Without a mask (rows of one length), with
            a mask of another kind, with dropout, and with options that only some architectures use, SDPA is called
            instead.

    Returns:
        [B, L, heads, E], and None for the attention probabilities.
    """
    asked_for_more = any(options.get(name) is not None for name in ("position_bias", "softcap"))
    if dropout or asked_for_more or attention_mask is None or attention_mask.dtype != torch.bool:
        return sdpa_attention_forward(  # type: ignore[return-value]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    batch, heads, length, size = query.shape
    shared, seen = key.shape[1:3]
    rows = query.reshape(batch, shared, heads // shared * length, size)
    scores = (rows @ key.transpose(2, 3)).mul_(size**-0.5 if scaling is None else scaling)
    by_head = scores.view(batch, shared, heads // shared, length, seen)
    # The lowest number and not −∞: a row of padding that sees nothing should come out finite.
    by_head.masked_fill_(~attention_mask[:, :, None], torch.finfo(scores.dtype).min)
    mixed = scores.softmax(-1) @ value
    return mixed.view(batch, heads, length, value.shape[3]).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, product_attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
