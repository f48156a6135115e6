"""Curves of a run's history as SVG, to stand inside a page.

matplotlib draws with stand-in colours that are then replaced by CSS variables, so that one drawing serves the light
and the dark page. No text of a user's goes into a drawing: names and titles are the page's to write, and to escape.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tutelage.report.runs import Run

__all__ = ["GROUPS", "NUM_COLOURS", "TIME_PARTS", "Metric", "curve", "dash", "other_metrics", "stage_times"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A key of the history, with the title and the unit that a reader sees."""

    key: str
    title: str
    unit: str = ""


GROUPS = {
    "Likelihood": (
        Metric("eval_demonstration_logp", "Held-out demonstrations, log-prob", "nats a sequence"),
        Metric("logps/demonstrations", "Training demonstrations, log-prob", "nats a sequence"),
        Metric("logps/samples", "Samples, log-prob", "nats a sequence"),
        Metric("loss", "Training loss", "not comparable between algorithms"),
    ),
    "Reward": (
        Metric("rewards/margin", "Reward margin", "demonstration minus sample"),
        Metric("rewards/accuracy", "Reward accuracy", "share of pairs with a positive margin"),
    ),
    "Samples": (
        Metric("length/samples", "Length of samples", "tokens"),
        Metric("length/demonstrations", "Length of demonstrations", "tokens"),
        Metric("samples/distinct_1", "Distinct tokens, distinct-1", "share of all"),
        Metric("samples/distinct_2", "Distinct token pairs, distinct-2", "share of all"),
        Metric("samples/cut_fraction", "Cut at the length limit", "share of samples"),
        Metric("pairs/dropped", "Dropped pairs", "sample equal to its demonstration"),
    ),
    "Speed": (Metric("tokens_per_second", "Throughput", "tokens a second"),),
}
TIME_PARTS = {"sampling": 1.0, "reference": 0.6, "training": 0.3}  # part of the time: opacity of its bar
NUM_COLOURS = 7  # as many as the style sheet has; further runs repeat them with another dash

_DASHES = ("-", (0, (4, 2)), (0, (1.2, 1.6)))
_NOT_METRICS = {"step", "epoch", "stage", "total_flos"}
_MAX_BOUNDARIES = 30  # with a stage every few steps the marks would hide the curves
_INK, _RULE, _PAPER = "#fe0001", "#fe0002", "#fe0003"
_CSS = {_INK: "var(--ink-2)", _RULE: "var(--rule)", _PAPER: "var(--paper)"} | {
    f"#fe01{index:02x}": f"var(--run-{index})" for index in range(NUM_COLOURS)
}


def other_metrics(runs: Sequence[Run]) -> list[Metric]:
    """What the histories hold besides `GROUPS`, in alphabetical order."""
    known = {metric.key for group in GROUPS.values() for metric in group} | _NOT_METRICS
    keys = {key for run in runs for row in run["history"] for key, value in row.items() if _is_number(value)}
    return [Metric(key, key) for key in sorted(keys - known) if not key.startswith(("time/", "train_"))]


def dash(index: int) -> int:
    """Which dash the run's lines have: 0 is solid."""
    return index // NUM_COLOURS % len(_DASHES)


def curve(runs: Sequence[Run], key: str) -> str | None:
    """SVG of one metric over the steps, all runs in one frame; None if no run has a value.

    NaN leaves a gap. Faint vertical lines mark where a run's stage changes.
    """
    series = [_series(run, key) for run in runs]
    if not any(math.isfinite(y) for _, values in series for y in values):
        return None
    figure, axes = _frame()
    for index, (run, (steps, values)) in enumerate(zip(runs, series, strict=True)):
        if not steps:
            continue
        boundaries = _stage_boundaries(run)
        for step in boundaries if len(boundaries) <= _MAX_BOUNDARIES else ():
            axes.axvline(step, color=_colour(index), alpha=0.5, linewidth=0.8, linestyle=_DASHES[2], zorder=1)
        marker = "o" if len(steps) <= 12 else None
        style = _DASHES[dash(index)]
        axes.plot(steps, values, color=_colour(index), linestyle=style, linewidth=1.5, marker=marker, markersize=3)
    axes.set_xlabel("step")
    return _svg(figure)


def stage_times(run: Run, index: int) -> str | None:
    """SVG of the seconds that each stage of a run took, by part; None if the run has fewer than two stages.

    The rows' ``time/...`` are taken as the seconds since the row before.
    """
    seconds: dict[int, dict[str, float]] = {}
    for row in run["history"]:
        for part in TIME_PARTS:
            value = row.get(f"time/{part}")
            if "stage" in row and _is_number(value) and math.isfinite(value):
                stage = seconds.setdefault(int(row["stage"]), dict.fromkeys(TIME_PARTS, 0.0))
                stage[part] += value
    if len(seconds) < 2:
        return None
    figure, axes = _frame()
    stages = sorted(seconds)
    bottom = [0.0] * len(stages)
    for part, opacity in TIME_PARTS.items():
        heights = [seconds[stage][part] for stage in stages]
        axes.bar(stages, heights, bottom=bottom, color=_colour(index), alpha=opacity, width=0.7, zorder=3)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.bar(stages, bottom, color=_PAPER, width=0.7, zorder=2)  # so that the grid does not shine through
    axes.set_xlabel("stage")
    return _svg(figure)


def _series(run: Run, key: str) -> tuple[list[int], list[float]]:
    rows = [row for row in run["history"] if "step" in row and _is_number(row.get(key))]
    return [row["step"] for row in rows], [row[key] if math.isfinite(row[key]) else math.nan for row in rows]


def _stage_boundaries(run: Run) -> list[int]:
    """The steps of the first rows of all stages but the first."""
    rows = [row for row in run["history"] if "stage" in row and "step" in row]
    return [row["step"] for before, row in pairwise(rows) if row["stage"] != before["stage"]]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _colour(index: int) -> str:
    return f"#fe01{index % NUM_COLOURS:02x}"


def _frame() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.4, 2.3), layout="constrained", frameon=False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.tick_params(colors=_INK, labelsize=8.5, length=0)
    axes.xaxis.label.set(color=_INK, fontsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.ticklabel_format(useOffset=False)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element that is the same each time and takes its colours and font from the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "tutelage", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)  # its style is for all "*"
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every drawing, and an id may stand only once in a page
    text = re.sub(r' width="[^"]*" height="[^"]*"(?= viewBox)', "", text, count=1)
    return re.sub("|".join(_CSS), lambda match: _CSS[match[0]], text)
