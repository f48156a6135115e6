"""Whether a policy has collapsed, by what a stage's beginning logs of its samples and of the demonstrations."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tutelage.errors import CollapsedError

__all__ = ["CollapseLimits", "act_on_collapse", "first_facts", "signs_of_collapse"]

logger = logging.getLogger(__name__)

_TRUNCATED, _DISTINCT, _LOGP = "samples/truncated_fraction", "samples/distinct_2", "demonstrations/logp_per_token"
_START = f"{_LOGP}_start"


@dataclass(frozen=True, slots=True)
class CollapseLimits:
    """Beyond these a policy counts as collapsed.

    Attributes:
        truncated: share of the samples that reach the length limit; it must have risen since the first stage, too.
        distinct: distinct-2 of the samples, as a share of what it was in the first stage: it depends on how many there are.
        logp: fall of the demonstrations' log-prob since the start, as a share of it (nats per token).
    """

    truncated: float
    distinct: float
    logp: float


def first_facts(history: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """What the first stage of a run logged of its samples, from the trainer's history; empty where there was none."""
    return next((line for line in history if _DISTINCT in line), {})


def signs_of_collapse(facts: Mapping[str, float], first: Mapping[str, float], limits: CollapseLimits) -> list[str]:
    """What speaks for a collapse, each with its measure, value and limit; empty if nothing does.

    Args:
        facts, first: what the beginnings of this stage and of the first one logged. The log-prob of the demonstrations is
            held against that of the start on the same rows where that is known, else against that of the first stage's rows.
    """
    found = []
    truncated, before = facts[_TRUNCATED], first.get(_TRUNCATED, 0.0)
    if truncated > limits.truncated and truncated > before:
        found.append(f"{_TRUNCATED} is {truncated:.3g} (limit {limits.truncated:g}; {before:.3g} in the first stage)")
    distinct, before = facts[_DISTINCT], first.get(_DISTINCT, 0.0)
    if distinct < limits.distinct * before:
        found.append(
            f"{_DISTINCT} is {distinct:.3g} (limit {limits.distinct * before:.3g}, which is {limits.distinct:g} of the "
            f"{before:.3g} in the first stage)"
        )
    logp, start = facts.get(_LOGP), facts.get(_START, first.get(_LOGP))
    if logp is not None and start is not None and start - logp > limits.logp * abs(start):
        limit = start - limits.logp * abs(start)
        found.append(
            f"{_LOGP} is {logp:.4g} (limit {limit:.4g}, {limits.logp:.0%} below the {start:.4g} of the start)"
        )
    return found


def act_on_collapse(stage: int, signs: Sequence[str], action: str) -> bool:
    """Warn, or end the run; True if it goes back to the best stage and ends.

    Args:
        stage: that begins with the collapsed policy.
        signs: as ``signs_of_collapse`` gives them.
        action: ``on_collapse``.

    Raises:
        CollapsedError: the run is to stop.
    """
    told = f"the policy has collapsed at the beginning of stage {stage}: {'; '.join(signs)}"
    if action == "stop":
        raise CollapsedError(
            f"{told}.",
            remedy="The last checkpoint is of that policy; --resume --on_collapse warn goes on. Else lower --learning_rate or "
            "raise --beta, and start anew.",
        )
    logger.warning("%s%s", told, "; the run goes back to the best stage and ends" if action == "best" else "")
    return action == "best"
