"""Which runs a grid wants, given the results that are there: settings are chosen on the way, on tuning seeds alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.lab.definitions import Run
from tutelage.lab.grid import Cell, Grid, Like, Method
from tutelage.lab.worlds import Phase

__all__ = ["OBJECTIVES", "Choice", "Plan", "Wanted", "expected_runs", "followed", "make_plan"]

OBJECTIVES = ("score", "score_greedy")
"""What settings are chosen for, apart from one another: samples at temperature 1, and the likeliest tokens."""

Results = Mapping[str, Mapping[str, Any]]
"""Finished runs by name, as ``execute`` returns them. A run that diverged has no measures."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A run with its place in the grid.

    Attributes:
        chosen_for: for which objectives its settings were chosen; empty for a tuning run.
    """

    run: Run
    cell: Cell
    method: str
    chosen_for: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """What tuning found for a method in a cell.

    Attributes:
        settings: for each objective.
        scores: mean validation score over the tuning seeds, for each objective; empty where there was one candidate.
    """

    settings: Mapping[str, Mapping[str, Any]]
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known to be wanted so far.

    Attributes:
        wanted: all such runs, finished or not; starts stand before the runs that need them. Two methods may want one run.
        choices: by the title of the cell and the method; those that are known.
        complete: nothing is left to be chosen.
    """

    wanted: tuple[Wanted, ...]
    choices: Mapping[tuple[str, str], Choice]
    complete: bool


def make_plan(grid: Grid, results: Results) -> Plan:
    """The plan as far as the results allow."""
    wanted: dict[tuple[str, ...], Wanted] = {}
    choices: dict[tuple[str, str], Choice] = {}
    complete = True
    for cell in grid.cells:
        chosen: dict[str, Choice] = {}
        for method in grid.methods:
            if not method.needs <= chosen.keys():
                complete = False
                continue
            tried = [_resolved(candidate, chosen) for candidate in method.candidates(cell)]
            if len(tried) == 1:
                choice = Choice(dict.fromkeys(OBJECTIVES, tried[0]), {})
            else:
                runs = [
                    [_run(grid, cell, method, settings, chosen, "tuning", seed) for seed in grid.tuning_seeds]
                    for settings in tried
                ]
                for run in (run for row in runs for run in row):
                    _want(wanted, Wanted(run, cell, method.name))
                choice = _choose(tried, runs, results)
            if choice is None:
                complete = False
                continue
            chosen[method.name] = choices[cell.title, method.name] = choice
            for settings, objectives in _by_settings(choice):
                for seed in grid.report_seeds:
                    run = _run(grid, cell, method, settings, chosen, "reporting", seed)
                    _want(wanted, Wanted(run, cell, method.name, objectives))
    return Plan(tuple(wanted.values()), choices, complete)


def expected_runs(grid: Grid) -> int:
    """About how many runs the grid will want: at least as many, if no two methods share one."""
    tried = [len(method.candidates(cell)) for cell in grid.cells for method in grid.methods]
    tuning = sum(count for count in tried if count > 1) * len(grid.tuning_seeds)
    return tuning + len(tried) * len(grid.report_seeds)


def _run(
    grid: Grid,
    cell: Cell,
    method: Method,
    settings: Mapping[str, Any],
    chosen: Mapping[str, Choice],
    phase: Phase,
    seed: int,
) -> Run:
    start = None
    if method.start is not None:
        first = grid.method(method.start)
        start = _run(grid, cell, first, chosen[method.start].settings[OBJECTIVES[0]], chosen, phase, seed)
    return Run(
        world=cell.world,
        options=cell.options if phase == "reporting" else cell.tuning,
        seed=seed,
        phase=phase,
        algorithm=method.algorithm,
        settings=settings,
        start=start,
        takes_prompts=method.takes_prompts,
        base=grid.base,
    )


def _want(wanted: dict[tuple[str, ...], Wanted], new: Wanted) -> None:
    """Add it behind its start. A start that no method wanted before it belongs to the method that starts there."""
    if new.run.start is not None and all(name != new.run.start.name for name, *_ in wanted):
        _want(wanted, Wanted(new.run.start, new.cell, f"start of {new.method}"))
    wanted.setdefault((new.run.name, new.method, *new.chosen_for), new)


def _resolved(settings: Mapping[str, Any], chosen: Mapping[str, Choice]) -> dict[str, Any]:
    """Settings with numbers in the place of ``Like``; whole numbers stay whole."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, Like):
            value = followed(chosen[value.method].settings[OBJECTIVES[0]][value.setting or name], value)
        found[name] = value
    return found


def followed(other: Any, like: Like) -> Any:
    """The value of a setting that follows another's: a whole number stays one, at least 1."""
    if like.times == 1:
        return other
    return max(1, round(other * like.times)) if isinstance(other, int) else float(f"{other * like.times:.6g}")


def _choose(tried: list[dict[str, Any]], runs: list[list[Run]], results: Results) -> Choice | None:
    """The settings with the best mean validation score, the first of equals; None while a run is missing."""
    if any(run.name not in results for row in runs for run in row):
        return None
    settings, scores = {}, {}
    for objective in OBJECTIVES:
        means = [float(np.mean([_score(results[run.name], objective) for run in row])) for row in runs]
        best = int(np.argmax(means))
        settings[objective], scores[objective] = tried[best], means[best]
    return Choice(settings, scores)


def _score(result: Mapping[str, Any], objective: str) -> float:
    measures = result["measures"]
    return -np.inf if measures is None else measures[objective]


def _by_settings(choice: Choice) -> Iterable[tuple[Mapping[str, Any], tuple[str, ...]]]:
    """Each chosen setting once, with the objectives that it was chosen for."""
    first, second = (choice.settings[objective] for objective in OBJECTIVES)
    return [(first, OBJECTIVES)] if first == second else [(first, OBJECTIVES[:1]), (second, OBJECTIVES[1:])]
