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

from tutelage.lab.grid import Cell, Grid
from tutelage.lab.plan import Plan, Wanted
from tutelage.results import Interval

__all__ = ["Difference", "differences", "seed_values", "strongest_control", "table_rows", "write_table"]

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Difference:
    """The recipe minus a control, on the seeds that both have.

    Attributes:
        control: its name.
        interval: mean over seeds with Student's 95% interval.
        won: number of seeds on which the recipe is higher.
    """

    control: str
    interval: Interval
    won: int


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
_COSTS = ("steps", "trained_tokens", "sampled_tokens", "seconds_training", "seconds_measuring", "seconds")


def write_table(rows: Rows, folder: Path) -> None:
    """``runs.csv`` and ``runs.parquet``, under temporary names first."""
    with (folder / "runs.csv.tmp").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), folder / "runs.parquet.tmp")
    for name in ("runs.csv", "runs.parquet"):
        (folder / f"{name}.tmp").replace(folder / name)


def seed_values(rows: Rows, cell: Cell, method: str, measure: str, objective: str) -> dict[int, float]:
    """A measure of a method by reporting seed, with the settings that were chosen for an objective."""
    return {
        row["seed"]: row[measure]
        for row in rows
        if row["cell"] == cell.title
        and row["method"] == method
        and row["phase"] == "reporting"
        and objective in row["chosen_for"].split()
        and row[measure] is not None
    }


def differences(rows: Rows, cell: Cell, recipe: str, controls: Sequence[str], measure: str) -> list[Difference]:
    """The recipe against each control in a measure that settings are chosen for; a control without a common seed is left out."""
    own = seed_values(rows, cell, recipe, measure, measure)
    found = []
    for control in controls:
        other = seed_values(rows, cell, control, measure, measure)
        gaps = [own[seed] - other[seed] for seed in own if seed in other]
        if gaps:
            found.append(Difference(control, student_interval(gaps), sum(gap > 0 for gap in gaps)))
    return found


def strongest_control(rows: Rows, cell: Cell, controls: Sequence[str], measure: str) -> str | None:
    """The control with the highest mean on the reporting seeds: harder to beat than one chosen before."""
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
