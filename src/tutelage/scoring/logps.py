"""Log-probs of completions under a model: one forward pass, completion positions alone reach the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from tutelage.groups import Batch, Group, collate_padded, collate_shared_prefix
from tutelage.models.attention import attention_by_products
from tutelage.models.loading import base_causal_lm
from tutelage.models.modes import evaluation_mode
from tutelage.scoring.forward import hidden_states, token_logps
from tutelage.scoring.layout import probe_layout

__all__ = [
    "Layout",
    "cached_logps",
    "completion_logps",
    "end_hidden_states",
    "in_batches",
]

Layout = Literal["auto", "shared_prefix", "padded"]


def completion_logps(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    layout: Layout = "auto",
    pad_token_id: int = 0,
    block_size: int | None = None,
) -> Tensor:
    """Log-prob of every completion given its prompt, log π(y|x) = Σ_i log π(y_i | x, y_<i).

    Args:
        model: a causal language model of transformers, with or without peft adapters, not wrapped otherwise.
        groups: prompts with their completions.
        layout: "shared_prefix" runs the prompt once for all its completions, "padded" repeats it for each; "auto" takes the
            tree where a probe on this model found it to give the same numbers.
        pad_token_id: fills rows up; no result depends on it.
        block_size: tokens of the vocabulary that the head reads at once; changes speed and memory alone.

    Returns:
        [C] float32 sums over tokens (nats per sequence), one per completion, groups in order and completions in order
        within each; differentiable.

    Raises:
        UserError: the model's logits are not its head applied to its hidden states.
    """
    batch = _collate(model, groups, layout, pad_token_id)
    logps_N = token_logps(model, batch, block_size=block_size)
    sums_C = torch.zeros(batch.num_completions, dtype=torch.float32, device=logps_N.device)
    return sums_C.index_add(0, batch.completion_ids.to(logps_N.device), logps_N)


def cached_logps(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    batch_size: int = 16,
    layout: Layout = "auto",
    pad_token_id: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> list[tuple[float, ...]]:
    """Log-probs of many groups without gradient and without dropout, to keep.

    Args:
        batch_size: groups a forward pass.
        on_batch: called with the number of groups done after each batch, for progress.

    Returns:
        one tuple per group, in the order given: the log-prob of each completion (nats per sequence).
    """
    return in_batches(
        lambda batch: completion_logps(model, batch, layout=layout, pad_token_id=pad_token_id),
        model,
        groups,
        batch_size=batch_size,
        on_batch=on_batch,
    )


@torch.no_grad()
def in_batches(
    values_of: Callable[[Sequence[Group]], Tensor],
    model: nn.Module,
    groups: Sequence[Group],
    *,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[tuple[float, ...]]:
    """One number per completion for many groups, without gradient and without the dropout of ``model``.

    Groups of like length share a batch, so little is spent on padding.

    Args:
        values_of: [C] for the completions of a batch of groups.
        batch_size, on_batch: as for ``cached_logps``.

    Returns:
        one tuple per group, in the order given.
    """
    order = sorted(range(len(groups)), key=lambda index: len(groups[index]), reverse=True)
    found: list[tuple[float, ...]] = [()] * len(groups)
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            values = iter(values_of([groups[index] for index in indices]).tolist())
            for index in indices:
                found[index] = tuple(next(values) for _ in groups[index].completions)
            if on_batch:
                on_batch(start + len(indices))
    return found


def end_hidden_states(
    model: nn.Module, groups: Sequence[Group], *, layout: Layout = "auto", pad_token_id: int = 0
) -> Tensor:
    """Last hidden state at the last token of every completion: what a scalar reward head reads.

    For a completion that finished, that is the end-of-turn token; for one that was cut, the token it was cut at.

    Args:
        model: of transformers, with or without a head of any kind; its body alone runs.
        groups, layout, pad_token_id: as for ``completion_logps``.

    Returns:
        [C, H] in the model's precision, groups in order and completions in order within each; differentiable.
    """
    base = base_causal_lm(model)
    batch = _collate(model, groups, layout, pad_token_id).to(base.device)
    # A score is to be what the exported model gives in plain transformers, rounding included; training may be faster.
    attention = attention_by_products(base, batch.input_ids.shape[1]) if torch.is_grad_enabled() else nullcontext()
    with attention:
        hidden_BLH = hidden_states(base, batch)
    return hidden_BLH[batch.end_rows.to(hidden_BLH.device), batch.end_columns.to(hidden_BLH.device)]


def _collate(model: nn.Module, groups: Sequence[Group], layout: Layout, pad_token_id: int) -> Batch:
    if layout == "auto":
        layout = probe_layout(model).layout
    return (collate_shared_prefix if layout == "shared_prefix" else collate_padded)(groups, pad_token_id)
