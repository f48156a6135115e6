"""Which batch layout a model supports: tested on the model itself, not assumed."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tutelage.errors import UserError
from tutelage.groups import Batch, Completion, Group, Role, collate_padded, collate_shared_prefix
from tutelage.models.loading import base_causal_lm
from tutelage.models.memory import is_out_of_memory
from tutelage.models.modes import evaluation_mode, exact_float32, in_float32
from tutelage.models.plain import (
    affordable_row,
    agree,
    does_not_run,
    is_exact,
    plain_logps,
    random_tokens,
    require_causal,
    said_by,
    tolerance,
)
from tutelage.models.regimes import bracket, regime_lengths, require_one_rope, rope_switch
from tutelage.scoring.forward import token_logps

__all__ = ["LayoutProbe", "collate_in_layout", "probe_facts", "probe_layout"]

logger = logging.getLogger(__name__)

_SHORT = 12  # tokens of the rows that every model is tried on
_LAST = 48  # tokens of a long row's completions: the logits of more would be large


@dataclass(frozen=True, slots=True)
class LayoutProbe:
    """Result of the probe.

    Attributes:
        layout: the one to use.
        reason: as text for the log.
        row_tokens, group_tokens: the longest sequence (a prompt with one completion) and the longest group (a prompt
            with all its completions) that it holds for.
        tried: the same of the sequences and groups that were tried, where those are too long to try.
        seconds: what it took.
    """

    layout: Literal["shared_prefix", "padded"]
    reason: str
    row_tokens: int = 0
    group_tokens: int = 0
    tried: tuple[int, int] = (0, 0)
    seconds: float = 0.0

    def covers(self, row_tokens: int, group_tokens: int) -> bool:
        """Whether it holds for rows and groups of these lengths."""
        return row_tokens <= self.row_tokens and group_tokens <= self.group_tokens


@dataclass(slots=True)
class _Known:
    """What is known of a model: that it is causal and runs in the padded layout, and what was tried at which length."""

    short: LayoutProbe
    long: list[LayoutProbe] = field(default_factory=list)

    def of(self, row_tokens: int, group_tokens: int) -> LayoutProbe | None:
        if self.short.covers(row_tokens, group_tokens):
            return self.short
        for probe in self.long:
            # What works for long rows does for short ones; what does not, does not for longer ones.
            if probe.covers(row_tokens, group_tokens) and (
                probe.layout == "shared_prefix" or (probe.tried[0] <= row_tokens and probe.tried[1] <= group_tokens)
            ):
                return probe
        return None


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def probe_layout(model: nn.Module, row_tokens: int = 0, group_tokens: int = 0) -> LayoutProbe:
    """Compare the layouts on the model itself and return the one to use; cached for the model's lifetime.

    Random tokens go through the model's own ``forward`` one sequence at a time, then through the padded layout and
    the shared-prefix layout. The sequences are as long as the longest that will be run, so that they pass every length
    at which the model begins to compute otherwise: windows, chunks, tables of positions. A probe of long rows is
    bounded; where rows are longer, and the config names a length that was not passed, the padded layout is used.

    Args:
        row_tokens: the longest prompt with its completion that will be run. 0 for short ones alone.
        group_tokens: the longest prompt with all its completions.

    Raises:
        UserError: a later token changes an earlier logit; not even the padded layout agrees with the model's own
            logits (an unknown operation after the head, or numbers that depend on what else is in a batch); the model
            chooses its rotary frequencies by the longest row, and these rows are long enough for both.
    """
    base = base_causal_lm(model)
    require_one_rope(
        model,
        row_tokens,
        what="rows of this run have up to",
        remedy="Lower --max_prompt_length or --max_completion_length",
    )
    known = _known.get(base)
    if known is None:
        known = _known[base] = _Known(_said(base, _short_probe(model, base)))
    group_tokens = max(row_tokens, group_tokens)
    found = known.of(row_tokens, group_tokens)
    if found is None:
        lengths = [*regime_lengths(base.config).values(), *([switch.length] if (switch := rope_switch(base)) else [])]
        row = bracket(row_tokens, lengths)
        # There are always two completions, so that where they stand in a row shows.
        group = bracket(group_tokens, lengths) if group_tokens > row_tokens else row + min(_LAST, row // 2)
        row = max(row_tokens, min(row, group - _LAST))
        found = next((p for p in known.long if (p.row_tokens, p.group_tokens) == (row, group)), None)
        if found is None:
            found = _said(base, _long_probe(model, base, known.short.layout, row, group, lengths))
            known.long.append(found)
    return found


def probe_facts(model: nn.Module) -> dict[str, Any]:
    """What is known of a model by probes, for the record of a run; empty before any."""
    base = base_causal_lm(model)
    if base not in _known:
        return {}
    probes = [_known[base].short, *_known[base].long]
    switch = rope_switch(base)
    return {
        "causal": True,
        "layouts": [
            {
                "layout": p.layout,
                "up_to_tokens": [p.row_tokens, p.group_tokens],
                "tried_tokens": list(p.tried),
                "reason": p.reason,
            }
            for p in probes
        ],
        "lengths_in_config": regime_lengths(base.config),
        "rope_switch": None if switch is None else {"kind": switch.kind, "tokens": switch.length},
        "seconds": round(sum(p.seconds for p in probes), 3),
    }


def collate_in_layout(
    model: nn.Module,
    groups: Sequence[Group],
    layout: Literal["auto", "shared_prefix", "padded"] = "auto",
    pad_token_id: int = 0,
) -> Batch:
    """A batch of groups in the layout asked for; "auto" takes what ``probe_layout`` finds for rows of their length.

    Raises:
        UserError: see ``probe_layout``; also in a layout asked for, where the rows are too long for one rope.
    """
    rows = max((_longest_row(group) for group in groups), default=0)
    if layout == "auto":
        layout = probe_layout(model, rows, max(map(len, groups), default=0)).layout
    else:
        require_one_rope(model, rows, what="a row has", remedy="Lower --max_prompt_length or --max_completion_length")
    return (collate_shared_prefix if layout == "shared_prefix" else collate_padded)(groups, pad_token_id)


def _longest_row(group: Group) -> int:
    return len(group.prompt_ids) + max((len(c.token_ids) for c in group.completions), default=0)


def _said(base: PreTrainedModel, probe: LayoutProbe) -> LayoutProbe:
    logger.info(
        "layout of %s: %s up to %d tokens (%s), %.1f s",
        type(base).__name__,
        probe.layout,
        probe.row_tokens,
        probe.reason,
        probe.seconds,
    )
    return probe


# --- the two probes -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _short_probe(model: nn.Module, base: PreTrainedModel) -> LayoutProbe:
    """A few short rows: is the model causal, is its head all there is after its body, which layouts does it take."""
    start = time.perf_counter()
    groups = [
        _group(base, _SHORT - 4, (3, 4, 2), seed=3),
        _group(base, 3, (2, 4), seed=4),
    ]
    with evaluation_mode(model), in_float32(base), exact_float32():
        require_causal(base)
        probe = _compared(model, base, groups, groups)
    tokens = max(map(len, groups))
    return LayoutProbe(*probe, _SHORT, tokens, (_SHORT, tokens), time.perf_counter() - start)


@torch.no_grad()
def _long_probe(
    model: nn.Module,
    base: PreTrainedModel,
    short: Literal["shared_prefix", "padded"],
    row_tokens: int,
    group_tokens: int,
    lengths: Sequence[int],
) -> LayoutProbe:
    """A group as long as the longest, and shorter rows beside it in the padded layout."""
    start = time.perf_counter()
    row, group = _affordable(base, row_tokens, group_tokens)
    long = _long_group(base, row, group)
    rows = [long.select([0]), _group(base, 3, (4,), seed=6)]
    with evaluation_mode(model), in_float32(base), exact_float32():
        layout, reason = _compared(model, base, rows, [long] if short == "shared_prefix" else [])
    if (row, group) != (row_tokens, group_tokens):
        reason += f"; tried up to {row:,} tokens per row and {group:,} per group, longer ones take too long"
        missed = [n for n in lengths if row < n < row_tokens or group < n < group_tokens]
        if missed and layout == "shared_prefix":
            layout, reason = "padded", f"{reason}, and the config names a length of {missed[0]:,}"
    return LayoutProbe(layout, reason, row_tokens, group_tokens, (row, group), time.perf_counter() - start)


def _compared(
    model: nn.Module, base: PreTrainedModel, padded: Sequence[Group], shared: Sequence[Group]
) -> tuple[Literal["shared_prefix", "padded"], str]:
    """The layout in which log-probs are those of sequences alone, and the reason.

    Args:
        padded: run in the padded layout.
        shared: run in the shared-prefix layout, where the first and the last completion of each are compared; none
            where it is known not to work.

    Raises:
        UserError: the padded layout differs.
    """
    name = type(base).__name__
    try:
        truth = _Truth(base)
        truth_N = torch.cat([truth.of(group, place) for group, place in _each(padded)])
        found_N = token_logps(model, collate_padded(padded))
    except UserError:
        raise
    except Exception as error:
        longest = max(map(_longest_row, padded))
        raise does_not_run(base, error, longest if longest > _SHORT else 0) from error
    allowed = tolerance(base, truth_N)
    rounding = agree(base, found_N, truth_N)
    if not rounding <= allowed:
        # Low precision rounds otherwise for every shape of a batch; by how much, the model's own log-probs show.
        alone_N = torch.cat(
            [token_logps(model, collate_padded([group.select([place])])) for group, place in _each(padded)]
        )
        alone = agree(base, alone_N, truth_N)
        if not alone <= allowed:
            _refuse_head(name, alone)
        allowed = max(allowed, 3 * rounding)
        if is_exact(base):
            _refuse_batch(name, rounding, max(map(_longest_row, padded)))
    if not shared:
        return "padded", f"{name} does not take the shared-prefix layout"
    ends = [(group, place) for group in shared for place in sorted({0, len(group.completions) - 1})]
    shared_truth_N = torch.cat([truth.of(group, place) for group, place in ends])
    try:
        logps_N = token_logps(model, batch := collate_shared_prefix(shared))
    except Exception as error:
        # An architecture may reject the shared-prefix layout with any error; finding that out is the purpose of the
        # probe.
        if is_out_of_memory(error):
            if (tokens := max(map(len, shared))) <= 2 * _SHORT:
                raise does_not_run(base, error, tokens) from error
            # The padded layout takes less for the same rows.
            return "padded", f"a group of {tokens:,} tokens does not fit into memory: {said_by(error)}"
        return "padded", f"{name} does not take the shared-prefix layout: {said_by(error)}"
    chosen = torch.cat([_of_completion(logps_N, batch, shared, group, place) for group, place in ends])
    difference = agree(base, chosen, shared_truth_N)
    longest = max(map(_longest_row, shared))
    if not difference <= allowed:
        return (
            "padded",
            f"{name}'s log-probs in the shared-prefix layout differ by {difference:.3g} nats per token, in rows of {longest:,}",
        )
    return "shared_prefix", f"same log-probs as separate rows of {longest:,} tokens to {difference:.1g} nats per token"


class _Truth:
    """The plain model's log-probs, each sequence run once."""

    def __init__(self, base: PreTrainedModel):
        self._base = base
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}

    def of(self, group: Group, place: int) -> Tensor:
        """[N] of the completion at ``place``."""
        key = group.prompt_ids, group.completions[place].token_ids
        if key not in self._known:
            self._known[key] = plain_logps(self._base, *key)
        return self._known[key]


def _each(groups: Sequence[Group]) -> list[tuple[Group, int]]:
    return [(group, place) for group in groups for place in range(len(group.completions))]


def _of_completion(logps_N: Tensor, batch: Batch, groups: Sequence[Group], group: Group, place: int) -> Tensor:
    before = next(i for i, each in enumerate(groups) if each is group)
    index = sum(len(each.completions) for each in groups[:before]) + place
    return logps_N[(batch.completion_ids == index).to(logps_N.device)]


def _group(base: PreTrainedModel, prompt: int, completions: Sequence[int], seed: int) -> Group:
    tokens = iter(random_tokens(base, prompt + sum(completions), seed))

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(tokens) for _ in range(count))

    prompt_ids = take(prompt)
    return Group(prompt_ids, tuple(Completion(take(n), Role.SAMPLE, finished=False) for n in completions))


def _long_group(base: PreTrainedModel, row: int, group: int) -> Group:
    """A prompt with as many completions as make a group of ``group`` tokens; with the first, it has ``row`` tokens."""
    last = min(_LAST, row // 2, max(1, group - row))
    prompt = row - last
    count, rest = divmod(group - prompt, last)
    return _group(base, prompt, [last] * count + ([rest] if rest else []), seed=5)


def _affordable(base: PreTrainedModel, row: int, group: int) -> tuple[int, int]:
    """The lengths to try instead of these, in proportion."""
    tried = affordable_row(base, group, passes=1 + 8 * row / group)
    return (row, group) if tried == group else (max(_SHORT, row * tried // group), tried)


# --- what is refused ----------------------------------------------------------------------------------------------------


def _refuse_head(name: str, difference: float) -> NoReturn:
    raise UserError(
        f"{name} changes its logits before or after the head in an unsupported way: its own log-probs differ by "
        f"{difference:.3g} nats per token.",
        remedy="Use another architecture, or report this one with its config.",
        field="model_name_or_path",
    )


def _refuse_batch(name: str, difference: float, longest: int) -> NoReturn:
    raise UserError(
        f"{name} gives a row other numbers beside other rows: in a padded batch with a row of {longest:,} tokens, "
        f"log-probs differ by {difference:.3g} nats per token.",
        remedy="Use another architecture, or report this one with its config.",
        field="model_name_or_path",
    )
