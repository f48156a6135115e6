"""What `tutelage score` tells of rows that belong to subsets, as RewardBench's do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from tutelage.data.messages import Place
from tutelage.evaluation.reward_bench import TiesRow, best_of, pair_accuracy, section_scores, ties_score
from tutelage.evaluation.statistics import Interval, mean_interval
from tutelage.groups import Group, Role
from tutelage.terminal import label, say, show

__all__ = ["SUBSET", "Subset", "Subsets", "show_subsets"]

SUBSET = "subset"  # the column

_TIES = "ties"  # the subset of RewardBench 2 that has a score of its own


@dataclass(frozen=True, slots=True)
class Subset:
    """A subset with its score.

    Attributes:
        measure: what the score is.
        interval: None for the score of ties, which is no mean over rows.
        left_out: rows that say nothing: no chosen or no rejected answer, or both the same after truncation.
    """

    name: str
    measure: str
    score: float
    rows: int
    interval: Interval | None
    left_out: int


class Subsets:
    """Which rows belong to which subset. Everything that can be wrong with them is found here, before anything is scored.

    Args:
        groups: with preferred and rejected answers; not scored yet.
        dataset: the rows they come from.
        source: file or data set, for messages to people.

    Raises:
        UserError: a row names no subset; has several chosen answers outside of "Ties"; or is one of "Ties" and has no id that
            says which.
    """

    def __init__(self, groups: Sequence[Group], dataset: Any, source: str):
        self._names: dict[int, str] = {}
        self._ties: dict[int, tuple[str, str]] = {}  # kind and prompt, by row
        for group in groups:
            row, place = dataset[group.row], Place(source, group.row + 1)
            name = row[SUBSET]
            if not isinstance(name, (str, int)) or not str(name).strip():
                raise place.at(SUBSET).error("must name a subset.", "Fill it, or leave the column out.")
            self._names[group.row] = str(name)
            if str(name).lower() == _TIES:
                self._add_ties(group, row.get("id"), place.at("id"))
            elif len(group.of(Role.PREFERRED)) > 1:
                raise place.at("chosen").error(
                    "has several answers.", 'Only rows of the subset "Ties" may; in others one is the best.'
                )

    def _add_ties(self, group: Group, id: object, place: Place) -> None:
        kind, _, prompt = str(id).partition(":")
        if kind not in ("ref", "tied") or not prompt:
            raise place.error(
                f"is {id!r}, and does not say which prompt of the subset this is.",
                "Write ref:1 for a prompt with one right answer and tied:1 for its kin with several.",
            )
        if (kind, prompt) in self._ties.values():
            raise place.error(f"is {id!r}, as in another row.", "Give each row its own.")
        self._ties[group.row] = (kind, prompt)

    def name(self, group: Group) -> str:
        """Of the group's row."""
        return self._names[group.row]

    def scores(self, groups: Sequence[Group]) -> list[Subset]:
        """Of the groups, now scored; subsets in the order in which they appear."""
        members: dict[str, list[Group]] = {}
        for group in groups:
            members.setdefault(self.name(group), []).append(group)
        return [self._score(name, found) for name, found in members.items()]

    def _score(self, name: str, groups: Sequence[Group]) -> Subset:
        told = [group for group in groups if _says_something(group)]
        left_out = len(groups) - len(told)
        if not told:
            return Subset(name, "no pairs", math.nan, 0, None, left_out)
        if name.lower() == _TIES:
            kinds: dict[str, dict[str, TiesRow]] = {"ref": {}, "tied": {}}
            for group in told:
                kind, prompt = self._ties[group.row]
                kinds[kind][prompt] = TiesRow(_rewards(group, Role.PREFERRED), _rewards(group, Role.REJECTED))
            return Subset(name, "ties", ties_score(kinds["ref"], kinds["tied"]), len(told), None, left_out)
        most = 1 + max(len(group.of(Role.REJECTED)) for group in told)
        interval = mean_interval([_won(group) for group in told])
        measure = "pairs" if most == 2 else f"best of {most}"
        return Subset(name, measure, interval.mean, interval.n, interval, left_out)


def show_subsets(subsets: Sequence[Subset], console: Console) -> None:
    """A table of the subsets, and RewardBench's sections where its subsets are here."""
    table = Table(title=label("by subset, as RewardBench counts: a tie is no win"), title_justify="left")
    table.add_column("subset")
    for column in ("measure", "score", "95% interval", "rows", "left out"):
        table.add_column(column, justify="right")
    for subset in subsets:
        bounds = f"{subset.interval.low:.3f} to {subset.interval.high:.3f}" if subset.interval else "–"
        shown = f"{subset.score:.3f}" if subset.rows else "–"
        table.add_row(label(subset.name), subset.measure, shown, bounds, str(subset.rows), str(subset.left_out or ""))
    show(console, table)
    known = {subset.name: subset.score for subset in subsets if subset.rows}
    sections = section_scores(known)
    for name, (score, whole) in sections.items():
        say(console, f"{name}: {score:.3f}" + ("" if whole else " (not all of its subsets are here)"))
    if len(sections) == 4 and all(whole for _, whole in sections.values()):
        say(console, f"RewardBench, mean of its sections: {fmean(score for score, _ in sections.values()):.3f}")
    elif not sections and len(known) > 1:
        say(console, f"mean of the subsets: {fmean(known.values()):.3f}")


def _says_something(group: Group) -> bool:
    """Whether there are right and wrong answers, and none is both (as after truncation)."""
    right, wrong = ({c.token_ids for c in group.of(role)} for role in (Role.PREFERRED, Role.REJECTED))
    return bool(right and wrong) and not right & wrong


def _won(group: Group) -> float:
    (chosen,), rejected = _rewards(group, Role.PREFERRED), _rewards(group, Role.REJECTED)
    return pair_accuracy(chosen, *rejected) if len(rejected) == 1 else best_of(chosen, rejected)


def _rewards(group: Group, role: Role) -> list[float]:
    return [completion.values["reward"] for completion in group.of(role)]
