"""One row per run, and what the rows say: means over seeds, and paired differences."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

from tutelage.lab.code import code_of
from tutelage.lab.grid import Cell, Grid
from tutelage.lab.plan import Plan, Wanted
from tutelage.results import Interval

__all__ = [
    "Difference",
    "differences",
    "paired_gap",
    "reported_runs",
    "seed_values",
    "strongest_control",
    "table_rows",
    "write_table",
]

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Difference:
    """The recipe minus a control, on the seeds that both have.

    Attributes:
        control: its name.
        interval: mean over seeds with Student's 95% interval.
        won: number of seeds on which the recipe is higher; never one on which either diverged.
        diverged: number of seeds on which either diverged. Where there is one, no win may be claimed.
    """

    control: str
    interval: Interval
    won: int
    diverged: int = 0

    @property
    def tone(self) -> str:
        """``helped`` or ``hurt`` where the interval is on one side of 0, else ``neutral``."""
        if self.interval.high < 0:
            return "hurt"
        return "helped" if self.interval.low > 0 and not self.diverged else "neutral"


def table_rows(grid: Grid, plan: Plan, results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The finished runs that the grid wants, in its order; the columns of all rows are the same."""
    return [_row(grid, wanted, results[wanted.run.name]) for wanted in plan.wanted if wanted.run.name in results]


def _row(grid: Grid, wanted: Wanted, result: Mapping[str, Any]) -> dict[str, Any]:
    run = wanted.run
    start = next((m.start for m in grid.methods if m.name == wanted.method), None)
    options = {name: getattr(run.options, name) for name in run.options.__dataclass_fields__}
    return {
        "grid": grid.name,
        "cell": wanted.cell.title,
        "world": run.world,
        **options,
        "method": wanted.method,
        "algorithm": run.algorithm,
        "start": start,
        "phase": run.phase,
        "seed": run.seed,
        "chosen_for": " ".join(wanted.chosen_for),
        "settings": json.dumps(dict(run.settings), sort_keys=True),
        **{name: (result["measures"] or {}).get(name) for name in _MEASURES},
        **{name: result["costs"].get(name) for name in _COSTS},
        "diverged": result["measures"] is None,
        "code": code_of(result),
        "run": run.name,
    }


_MEASURES = (
    "score",
    "score_greedy",
    "score_best",
    "diversity",
    "demonstration_logp",
    "kl",
    "length",
    "truncated",
    "retention",
    "retention_logp",
    "reward_auc",
    "reward_best",
    "logp_auc",
    "logp_best",
    "start_score",
    "start_best",
)
_COSTS = ("steps", "trained_tokens", "sampled_tokens", "flops", "seconds_training", "seconds_measuring", "seconds")


def write_table(rows: Rows, folder: Path) -> None:
    """``runs.csv`` and ``runs.parquet``, under temporary names first."""
    with (folder / "runs.csv.tmp").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), folder / "runs.parquet.tmp")
    for name in ("runs.csv", "runs.parquet"):
        (folder / f"{name}.tmp").replace(folder / name)


def reported_runs(rows: Rows, cell: Cell, method: str, objective: str | None = None) -> dict[str, Mapping[str, Any]]:
    """The reporting rows of a method by the names of their runs, diverged ones among them.

    Args:
        objective: only those whose settings were chosen for it.
    """
    return {
        row["run"]: row
        for row in rows
        if row["cell"] == cell.title
        and row["method"] == method
        and row["phase"] == "reporting"
        and (objective is None or objective in row["chosen_for"].split())
    }


def seed_values(rows: Rows, cell: Cell, method: str, measure: str, objective: str) -> dict[int, float]:
    """A measure of a method by reporting seed, with the settings that were chosen for an objective.

    A run that diverged has no measures and is left out.
    """
    found = reported_runs(rows, cell, method, objective).values()
    return {row["seed"]: row[measure] for row in found if row[measure] is not None}


def differences(rows: Rows, cell: Cell, recipe: str, controls: Sequence[str], measure: str) -> list[Difference]:
    """The recipe against each control in a measure that settings are chosen for; a control without a common seed is left out.

    A run that diverged stays in: see ``paired_gap``.
    """
    own = _outcomes(rows, cell, recipe, measure)
    found = []
    for control in controls:
        other = _outcomes(rows, cell, control, measure)
        seeds = [seed for seed in own if seed in other]
        if seeds:
            gaps = [paired_gap(own[seed], other[seed]) for seed in seeds]
            diverged = sum(own[seed] is None or other[seed] is None for seed in seeds)
            found.append(Difference(control, student_interval(gaps), sum(gap > 0 for gap in gaps), diverged))
    return found


def paired_gap(own: float | None, other: float | None) -> float:
    """The recipe's score minus a control's on one seed; None is a run that diverged.

    That one counts as 0, and the recipe gains nothing from it, whichever of the two it is: a control that diverges has
    not been beaten.

    >>> paired_gap(0.5, 0.25), paired_gap(None, 0.25), paired_gap(0.5, None)
    (0.25, -0.25, 0.0)
    """
    if own is not None and other is not None:
        return own - other
    return min(0.0, (own or 0.0) - (other or 0.0))


def _outcomes(rows: Rows, cell: Cell, method: str, measure: str) -> dict[int, float | None]:
    """A measure by reporting seed, with the settings that were chosen for it; None where the run diverged."""
    return {row["seed"]: row[measure] for row in reported_runs(rows, cell, method, measure).values()}


def strongest_control(rows: Rows, cell: Cell, controls: Sequence[str], measure: str) -> str | None:
    """The control with the highest mean on the reporting seeds: harder to beat than one chosen before.

    The mean is of the runs that did not diverge: one that did would make its control easier to beat.
    """
    means = {
        control: float(np.mean(list(values.values())))
        for control in controls
        if (values := seed_values(rows, cell, control, measure, measure))
    }
    return max(means, key=lambda control: means[control]) if means else None


def student_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean with Student's interval: seeds are few, and a bootstrap of few values is too narrow.

    One value has an interval without bounds.

    >>> interval = student_interval([0.1, 0.2, 0.3])
    >>> round(interval.mean, 3), round(interval.low, 3), round(interval.high, 3)
    (0.2, -0.048, 0.448)
    """
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, -np.inf, np.inf, len(array))
    half = float(stats.t.ppf((1 + confidence) / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return Interval(mean, mean - half, mean + half, len(array))
