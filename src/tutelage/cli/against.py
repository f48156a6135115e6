"""What `tutelage score --against` tells: how often answers have more reward than other answers to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from rich.console import Console

from tutelage.data.messages import Place
from tutelage.evaluation.statistics import Interval
from tutelage.evaluation.win_rate import win_rate
from tutelage.groups import Completion, Group, Role
from tutelage.terminal import say

__all__ = ["joined", "parted", "show_win_rate"]


def joined(groups: Sequence[Group], others: Sequence[Group], *, source: str, other_source: str) -> list[Group]:
    """Each group with the answers of the other group of its row behind its own.

    They are scored together, because some rewards compare the answers to a prompt with each other.

    Args:
        source, other_source: of the groups and of the others, for messages to people.

    Raises:
        UserError: a row of the others is missing, is there twice or has another prompt; or one of the two has no answer to compare.
    """
    by_row: dict[int, Group] = {}
    for other in others:
        if by_row.setdefault(other.row, other) is not other:
            raise Place(other_source, other.row + 1).error("is there twice.", "Give each row of the data once.")
    found = []
    for group in groups:
        place, other = Place(other_source, group.row + 1, "prompt"), by_row.get(group.row)
        if other is None:
            raise place.error("is missing.", "Give answers to the same rows of the same data.")
        if other.prompt_ids != group.prompt_ids:
            raise place.error("is another prompt than in --dataset_name.", "Give answers to the same rows.")
        for of, answers in ((source, _answers(group)), (other_source, _answers(other))):
            if not answers:
                raise Place(of, group.row + 1).error(
                    "has no sample and no demonstration to compare.", "Give what `tutelage sample` wrote."
                )
        found.append(replace(group, completions=(*group.completions, *other.completions)))
    return found


def parted(scored: Sequence[Group], groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """What ``joined`` put together, now scored, apart again: the groups, and the others."""
    places = [len(group.completions) for group in groups]
    pairs = list(zip(scored, places, strict=True))
    first = [replace(group, completions=group.completions[:place]) for group, place in pairs]
    return first, [replace(group, completions=group.completions[place:]) for group, place in pairs]


def show_win_rate(groups: Sequence[Group], others: Sequence[Group], console: Console) -> None:
    """Raw and at equal length, with the model's coefficients.

    Args:
        groups, others: scored, row by row.
    """
    rewards, lengths = zip(*(_of(group) for group in groups), strict=True)
    other_rewards, other_lengths = zip(*(_of(group) for group in others), strict=True)
    found = win_rate(rewards, other_rewards, lengths, other_lengths)
    say(console, f"win rate: {_shown(found.raw)}; a tie counts half")
    say(console, f"mean length: {fmean(lengths):.1f} tokens against {fmean(other_lengths):.1f}")
    if (model := found.controlled) is None:
        say(console, "win rate at equal length: not told, because one side wins every row or lengths do not vary")
        return
    say(console, f"win rate at equal length: {_shown(model.rate)}")
    say(
        console,
        f"  logit of a win = {model.intercept:.3f} + {model.coefficient:.3f} · tanh(difference in tokens / {model.deviation:.1f})",
    )


def _answers(group: Group) -> Sequence[Completion]:
    """Its samples; its demonstration where it has none."""
    return group.of(Role.SAMPLE) or group.of(Role.DEMONSTRATION)


def _of(group: Group) -> tuple[list[float], float]:
    answers = _answers(group)
    return [answer.values["reward"] for answer in answers], fmean(len(answer.token_ids) for answer in answers)


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.4g} [{interval.low:.4g}, {interval.high:.4g}], {interval.n} rows"
