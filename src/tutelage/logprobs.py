"""Log-probs of completions under a model: one forward pass, completion positions alone reach the head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tutelage.attention import attention_by_products
from tutelage.errors import UserError
from tutelage.groups import Batch, Completion, Group, Kind, collate_padded, collate_tree
from tutelage.head_logps import head_logps
from tutelage.models import LMHead, adapters_under_autocast, base_causal_lm, evaluation_mode, precision

__all__ = [
    "Layout",
    "LayoutProbe",
    "cached_logps",
    "completion_logps",
    "end_hidden_states",
    "in_batches",
    "probe_layout",
    "token_logps",
]

logger = logging.getLogger(__name__)

Layout = Literal["auto", "tree", "padded"]


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
        layout: "tree" runs the prompt once for all its completions, "padded" repeats it for each; "auto" takes the
            tree where a probe on this model found it to give the same numbers.
        pad_token_id: fills rows up; no result depends on it.
        block_size: tokens of the vocabulary that the head reads at once; changes speed and memory alone.

    Returns:
        [C] float32 sums over tokens (nats a sequence), one a completion, groups in order and completions in order
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
        one tuple a group, in the order given: the log-prob of each completion (nats a sequence).
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
    """One number a completion for many groups, without gradient and without the dropout of ``model``.

    Groups of like length share a batch, so little is spent on padding.

    Args:
        values_of: [C] for the completions of a batch of groups.
        batch_size, on_batch: as for ``cached_logps``.

    Returns:
        one tuple a group, in the order given.
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

    For a completion that ended, that is the end-of-turn token; for one that was cut, the token it was cut at.

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
        hidden_BLH = _hidden_states(base, batch)
    return hidden_BLH[batch.end_rows.to(hidden_BLH.device), batch.end_columns.to(hidden_BLH.device)]


def token_logps(model: nn.Module, batch: Batch, *, block_size: int | None = None) -> Tensor:
    """Log-prob of every completion token of a batch.

    Args:
        batch: from ``collate_tree`` (its ``attention_mask`` is None) or ``collate_padded``.

    Returns:
        [N] float32 (nats a token), in the order of ``batch.targets``; differentiable.
    """
    base = base_causal_lm(model)
    batch = batch.to(base.device)
    with attention_by_products(base, batch.input_ids.shape[1]):
        hidden_BLH = _hidden_states(base, batch)
    hidden_NH = hidden_BLH[batch.predictor_rows.to(hidden_BLH.device), batch.predictor_columns.to(hidden_BLH.device)]
    return head_logps(LMHead.of(base), hidden_NH, batch.targets.to(hidden_NH.device), block_size=block_size)


def _hidden_states(base: PreTrainedModel, batch: Batch) -> Tensor:
    # A text-only base model never sees the prompt's logits: its body alone runs, the head is ours.
    if batch.attention_mask is not None:
        inputs = {"attention_mask": batch.attention_mask.long()}
    else:
        inputs = {"attention_mask": _tree_attention(base, batch), "position_ids": batch.position_ids}
    with adapters_under_autocast(base):
        return base.base_model(input_ids=batch.input_ids, use_cache=False, **inputs).last_hidden_state


def _tree_attention(base: PreTrainedModel, batch: Batch) -> Tensor | dict[str, Tensor]:
    """The tree's mask in the form the model takes: one 4D mask, or one for each kind of layer."""
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None)

    def mask(window: int | None) -> Tensor:
        mask_BLL = batch.tree_mask(window)
        if config._attn_implementation == "eager":  # adds its mask to the scores instead of selecting by it
            return torch.zeros(mask_BLL.shape, dtype=base.dtype, device=mask_BLL.device).masked_fill(
                ~mask_BLL, torch.finfo(base.dtype).min
            )
        return mask_BLL

    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds:
        return {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
    return mask(window)


@dataclass(frozen=True, slots=True)
class LayoutProbe:
    """What the probe found: the layout to use, and why, in words for the log."""

    layout: Literal["tree", "padded"]
    reason: str


_probes: WeakKeyDictionary[nn.Module, LayoutProbe] = WeakKeyDictionary()


def probe_layout(model: nn.Module) -> LayoutProbe:
    """Compare the layouts on the model itself and say which to use; the answer is kept for the model's lifetime.

    Random tokens go through the model's own ``forward`` one sequence at a time, then through the padded layout and
    the tree. Prompts reach over a sliding window of up to 1,024 tokens, so that a wrong mask shows.

    Raises:
        UserError: not even the padded layout agrees with the model's own logits (an unknown step after its head).
    """
    base = base_causal_lm(model)
    if base not in _probes:
        _probes[base] = _probe(model, base)
        logger.info("layout: %s (%s)", _probes[base].layout, _probes[base].reason)
    return _probes[base]


@torch.no_grad()
def _probe(model: nn.Module, base: PreTrainedModel) -> LayoutProbe:
    config = base.config.get_text_config()
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(config.vocab_size, (length,), generator=generator).tolist())

    window = getattr(config, "sliding_window", None) or 0
    longest = min((window if window <= 1024 else 0) + 4, getattr(config, "max_position_embeddings", None) or 2048)
    groups = [
        Group(tokens(prompt), tuple(Completion(tokens(n), Kind.SAMPLE, ended=False) for n in lengths))
        for prompt, lengths in ((max(longest, 8) - 4, (3, 4, 2)), (3, (2, 4)))
    ]
    # Low precision rounds differently in each layout; a wrong mask or a wrong head moves random tokens by nats.
    tolerance = 1e-3 if precision(base) in (torch.float32, torch.float64) else 0.15

    def disagreement(batch: Batch, truth_N: Tensor) -> float:
        return (token_logps(model, batch) - truth_N).abs().mean().item()

    with evaluation_mode(model):
        truth_N = torch.cat([_own_logps(base, group.prompt_ids, c) for group in groups for c in group.completions])
        padded = disagreement(collate_padded(groups), truth_N)
        if not padded <= tolerance:
            raise UserError(
                f"{type(base).__name__} changes its logits after the head in a way tutelage does not know: its own "
                f"log-probs differ by {padded:.3g} nats a token.",
                remedy="Use another architecture, or report this one with its config.",
            )
        try:
            tree = disagreement(collate_tree(groups), truth_N)
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            # An architecture may refuse the tree in any way it likes; refusing is the answer the probe is after.
            return LayoutProbe("padded", f"{type(base).__name__} does not take the tree: {_first_line(error)}")
    if not tree <= tolerance:
        return LayoutProbe(
            "padded", f"{type(base).__name__}'s log-probs in the tree differ by {tree:.3g} nats a token"
        )
    return LayoutProbe("tree", f"same log-probs as separate rows to {tree:.1g} nats a token")


def _own_logps(base: PreTrainedModel, prompt_ids: tuple[int, ...], completion: Completion) -> Tensor:
    ids = torch.tensor([prompt_ids + completion.token_ids], device=base.device)
    logits = base(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].float()
    targets = torch.tensor(completion.token_ids, device=logits.device)
    return -F.cross_entropy(logits, targets, reduction="none")


def _collate(model: nn.Module, groups: Sequence[Group], layout: Layout, pad_token_id: int) -> Batch:
    if layout == "auto":
        layout = probe_layout(model).layout
    return (collate_tree if layout == "tree" else collate_padded)(groups, pad_token_id)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}".rstrip(": ")
