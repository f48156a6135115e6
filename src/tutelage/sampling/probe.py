"""Which way of decoding a model supports: tested on the model itself, not assumed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tutelage.errors import UserError
from tutelage.models.head import LMHead
from tutelage.models.loading import base_causal_lm, model_body
from tutelage.models.memory import is_out_of_memory
from tutelage.models.modes import evaluation_mode, exact_float32, in_float32
from tutelage.models.plain import (
    affordable_row,
    agree,
    does_not_run,
    plain_logps,
    random_tokens,
    require_causal,
    said_by,
    tolerance,
)
from tutelage.models.regimes import bracket, regime_lengths
from tutelage.sampling.decoding import Decoding, MixedLengths, OneLength, missing_arguments

__all__ = ["SamplingProbe", "probe_sampling", "sampling_facts"]

logger = logging.getLogger(__name__)

_SHORT = 16  # tokens of the rows that every model is tried on
_STEPS = 5  # tokens decoded


@dataclass(frozen=True, slots=True)
class SamplingProbe:
    """Result of the probe.

    Attributes:
        way: how to decode.
        reason: as text for the log.
        row_tokens: the longest prompt with its completion that it holds for.
        tried: the longest that was tried, where those are too long to try.
        seconds: what it took.
    """

    way: type[Decoding]
    reason: str
    row_tokens: int
    tried: int
    seconds: float


_known: WeakKeyDictionary[nn.Module, list[SamplingProbe]] = WeakKeyDictionary()


def probe_sampling(model: nn.Module, row_tokens: int = 0) -> SamplingProbe:
    """How to decode with a model: compared with its own ``forward`` on each sequence alone; cached.

    Random tokens are decoded from prompts of several lengths, with a row taken out and one doubled on the way, once
    short and once as long as the longest that will be sampled.

    Args:
        row_tokens: the longest prompt with its completion. 0 for short ones alone.

    Raises:
        UserError: it is bidirectional, or neither way gives the model's own log-probs.
    """
    base = base_causal_lm(model)
    probes = _known.setdefault(base, [])
    lengths = list(regime_lengths(base.config).values())
    wanted = _SHORT if row_tokens <= _SHORT else bracket(row_tokens, lengths)
    found = next((probe for probe in probes if wanted <= probe.row_tokens), None)
    if found is None:
        found = _probe(model, base, wanted, lengths)
        probes.append(found)
        logger.info(
            "sampling from %s: %s up to %d tokens (%s), %.1f s",
            type(base).__name__,
            _NAMES[found.way],
            found.row_tokens,
            found.reason,
            found.seconds,
        )
    return found


def sampling_facts(model: nn.Module) -> dict[str, Any]:
    """What is known by probes, for the record of a run; empty before any."""
    probes = _known.get(base_causal_lm(model), [])
    if not probes:
        return {}
    return {
        "ways": [
            {"way": _NAMES[p.way], "up_to_tokens": p.row_tokens, "tried_tokens": p.tried, "reason": p.reason}
            for p in probes
        ],
        "seconds": round(sum(p.seconds for p in probes), 3),
    }


_NAMES: dict[type[Decoding], str] = {MixedLengths: "mixed lengths", OneLength: "one length"}


@torch.no_grad()
def _probe(model: nn.Module, base: PreTrainedModel, row_tokens: int, lengths: Sequence[int]) -> SamplingProbe:
    start, body = time.perf_counter(), type(model_body(base)).__name__
    longest = affordable_row(base, row_tokens, passes=4)
    # Decoding itself passes each length once, and the longest row is decoded at its end.
    rows = sorted({longest, *(n + 2 for n in lengths if _SHORT < n + 2 <= longest)} if longest > _SHORT else {_SHORT})
    said = []
    with evaluation_mode(model), in_float32(base), exact_float32():
        require_causal(base)
        if missing := missing_arguments(base):
            raise _refusal(body, f"its forward takes no {' and no '.join(missing)}")
        for way in (MixedLengths, OneLength):
            problem = next(filter(None, (_problem(base, way, row) for row in rows)), None)
            if problem is None:
                reason = f"same log-probs as a plain forward in rows of {', '.join(f'{row:,}' for row in rows)} tokens"
                if said:
                    reason += f"; not {said[0]}"
                return SamplingProbe(way, reason, row_tokens, longest, time.perf_counter() - start)
            said.append(f"in {_NAMES[way]}: {problem}")
    raise _refusal(body, "; ".join(said))


def _problem(base: PreTrainedModel, way: type[Decoding], row_tokens: int) -> str | None:
    """What is wrong with a way in rows of this length; None if nothing is."""
    long = row_tokens - _STEPS
    # Log-probs of what follows several prompts: as the sampler decodes, and as one would look them up.
    lengths = (long, long) if way is OneLength else (long, long // 2, 3) if row_tokens <= _SHORT else (long, 3)
    prompts = [random_tokens(base, n, seed=11 + i) for i, n in enumerate(lengths)]
    forced = [random_tokens(base, _STEPS, seed=21 + i) for i in range(len(prompts))]
    try:
        truth_N = torch.cat([plain_logps(base, *row) for row in zip(prompts, forced, strict=True)])
    except Exception as error:
        raise does_not_run(base, error, row_tokens if row_tokens > _SHORT else 0) from error
    try:
        found_N = torch.cat(list(_decoded(base, way, prompts, forced)))
    except Exception as error:  # a cache of an unknown kind may fail in any way
        if is_out_of_memory(error):
            raise does_not_run(base, error, row_tokens) from error
        return said_by(error)
    difference = agree(base, found_N, truth_N)
    return None if difference <= tolerance(base, truth_N) else f"log-probs differ by {difference:.3g} nats per token"


def _decoded(
    base: PreTrainedModel, way: type[Decoding], prompts: Sequence[tuple[int, ...]], forced: Sequence[tuple[int, ...]]
) -> Iterator[Tensor]:
    """Log-probs of the forced tokens of each prompt, while rows come and go."""
    head, decoding = LMHead.of(base), way(base, prompts)  # type: ignore[call-arg]
    live = list(range(len(prompts)))
    found: list[list[Tensor]] = [[] for _ in prompts]

    def keep(rows: list[int]) -> None:
        nonlocal live
        decoding.select(torch.tensor(rows))
        live = [live[row] for row in rows]

    keep([0, *range(len(prompts))])  # two draws of the first prompt
    for step in range(_STEPS):
        logps = head.logits(decoding.hidden).log_softmax(-1)
        for place, row in enumerate(live):
            if len(found[row]) == step:
                found[row].append(logps[place, forced[row][step]])
        if step + 1 == _STEPS:
            break
        if step == 1:
            keep([*range(1, len(live))])  # one draw has finished
        decoding.step(torch.tensor([forced[row][step] for row in live]))
    return iter([torch.stack(each) for each in found])


def _refusal(body: str, reason: str) -> UserError:
    return UserError(
        f"{body} cannot be sampled from: {reason}.",
        remedy="Use a transformer with a key-value cache.",
        field="model_name_or_path",
    )
