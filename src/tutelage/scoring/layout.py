"""Which batch layout a model supports: tested on the model itself, not assumed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from tutelage.errors import UserError
from tutelage.groups import Batch, Completion, Group, Role, collate_padded, collate_shared_prefix
from tutelage.models.loading import base_causal_lm
from tutelage.models.modes import evaluation_mode, exact_float32, precision
from tutelage.scoring.forward import token_logps

__all__ = ["LayoutProbe", "collate_in_layout", "probe_layout"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayoutProbe:
    """Result of the probe: the layout to use, and the reason, as text for the log."""

    layout: Literal["shared_prefix", "padded"]
    reason: str


_probes: WeakKeyDictionary[nn.Module, LayoutProbe] = WeakKeyDictionary()


def probe_layout(model: nn.Module) -> LayoutProbe:
    """Compare the layouts on the model itself and return the one to use; cached for the model's lifetime.

    Random tokens go through the model's own ``forward`` one sequence at a time, then through the padded layout and
    the shared-prefix layout. Prompts are longer than a sliding window of up to 1,024 tokens, so that a wrong mask
    shows.

    Raises:
        UserError: not even the padded layout agrees with the model's own logits (an unknown operation after the head).
    """
    base = base_causal_lm(model)
    if base not in _probes:
        _probes[base] = _probe(model, base)
        logger.info("layout: %s (%s)", _probes[base].layout, _probes[base].reason)
    return _probes[base]


def collate_in_layout(
    model: nn.Module,
    groups: Sequence[Group],
    layout: Literal["auto", "shared_prefix", "padded"] = "auto",
    pad_token_id: int = 0,
) -> Batch:
    """A batch of groups in the layout asked for; "auto" takes what ``probe_layout`` finds for the model."""
    if layout == "auto":
        layout = probe_layout(model).layout
    return (collate_shared_prefix if layout == "shared_prefix" else collate_padded)(groups, pad_token_id)


@torch.no_grad()
def _probe(model: nn.Module, base: PreTrainedModel) -> LayoutProbe:
    config = base.config.get_text_config()
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(config.vocab_size, (length,), generator=generator).tolist())

    window = getattr(config, "sliding_window", None) or 0
    longest = min((window if window <= 1024 else 0) + 4, getattr(config, "max_position_embeddings", None) or 2048)
    groups = [
        Group(tokens(prompt), tuple(Completion(tokens(n), Role.SAMPLE, finished=False) for n in lengths))
        for prompt, lengths in ((max(longest, 8) - 4, (3, 4, 2)), (3, (2, 4)))
    ]
    exact = precision(base) in (torch.float32, torch.float64)

    def disagreement(batch: Batch, truth_N: Tensor) -> float:
        return (token_logps(model, batch) - truth_N).abs().mean().item()

    with evaluation_mode(model), exact_float32():
        truth_N = torch.cat([_own_logps(base, group.prompt_ids, c) for group in groups for c in group.completions])
        # Low precision rounds differently in each layout; a wrong mask or head changes log-probs by whole nats.
        tolerance = 1e-3 if exact else 0.15
        padded = disagreement(collate_padded(groups), truth_N)
        if not exact and padded > tolerance:
            tolerance = max(tolerance, 3 * _rounding(base, groups))
        if not padded <= tolerance:
            raise UserError(
                f"{type(base).__name__} changes its logits after the head in an unsupported way: its own "
                f"log-probs differ by {padded:.3g} nats per token.",
                remedy="Use another architecture, or report this one with its config.",
            )
        try:
            shared = disagreement(collate_shared_prefix(groups), truth_N)
        except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            # An architecture may reject the shared-prefix layout with any error; finding that out is the purpose of
            # the probe.
            return LayoutProbe(
                "padded", f"{type(base).__name__} does not take the shared-prefix layout: {_first_line(error)}"
            )
    if not shared <= tolerance:
        return LayoutProbe(
            "padded",
            f"{type(base).__name__}'s log-probs in the shared-prefix layout differ by {shared:.3g} nats per token",
        )
    return LayoutProbe("shared_prefix", f"same log-probs as separate rows to {shared:.1g} nats per token")


def _own_logps(base: PreTrainedModel, prompt_ids: tuple[int, ...], completion: Completion) -> Tensor:
    ids = torch.tensor([prompt_ids + completion.token_ids], device=base.device)
    logits = base(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].float()
    targets = torch.tensor(completion.token_ids, device=logits.device)
    return -F.cross_entropy(logits, targets, reduction="none")


def _rounding(base: PreTrainedModel, groups: Sequence[Group]) -> float:
    """Mean difference of the model's own log-probs between sequences alone and in one batch (nats per token).

    Nothing but rounding tells the two apart. It is large where training has made the numbers large that random tokens
    cause.
    """
    firsts = [(group.prompt_ids, group.completions[0]) for group in groups]
    rows = [torch.tensor(prompt + completion.token_ids, device=base.device) for prompt, completion in firsts]
    mask = pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True)
    logits_BLV = base(input_ids=pad_sequence(rows, batch_first=True), attention_mask=mask, use_cache=False).logits
    found = []
    for (prompt, completion), ids, logits_LV in zip(firsts, rows, logits_BLV, strict=True):
        logits_NV = logits_LV[len(prompt) - 1 : len(ids) - 1].float()
        logps_N = -F.cross_entropy(logits_NV, ids[len(prompt) :], reduction="none")
        found.append((logps_N - _own_logps(base, prompt, completion)).abs())
    return torch.cat(found).mean().item()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}".rstrip(": ")
