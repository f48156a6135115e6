"""A run's history and its candidate policies as inline SVG.

matplotlib draws with stand-in colors that are then replaced by CSS variables, so that one drawing serves the light
and the dark page. No user text goes into a drawing; names and titles are written, and escaped, by the page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeGuard

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tutelage.report.runs import candidates, has_verifier_score
from tutelage.results import Curve, Interval, RewardQualityRecord, RunRecord

__all__ = [
    "NUM_COLORS",
    "TIME_PARTS",
    "best_of_n",
    "candidate_scores",
    "curve_groups",
    "dash",
    "draw",
    "other_curves",
    "over_alpha",
    "stage_times",
]


# What every algorithm logs; the rest comes with the record of the run.
COMMON = (
    Curve("eval_demonstration_logp", "Held-out demonstrations, log-prob", "nats per sequence", "Likelihood"),
    Curve("logps/demonstrations", "Training demonstrations, log-prob", "nats per sequence", "Likelihood"),
    Curve("logps/samples", "Samples, log-prob", "nats per sequence", "Likelihood"),
    Curve("loss", "Training loss", "not comparable between algorithms", "Likelihood"),
    Curve("length/samples", "Length of samples", "tokens", "Samples"),
    Curve("length/demonstrations", "Length of demonstrations", "tokens", "Samples"),
    Curve("samples/distinct_1", "Distinct tokens, distinct-1", "share of all", "Samples"),
    Curve("samples/distinct_2", "Distinct token pairs, distinct-2", "share of all", "Samples"),
    Curve("samples/truncated_fraction", "Truncated at the length limit", "share of samples", "Samples"),
    Curve("tokens_per_second", "Throughput", "completion tokens per second", "Speed"),
)
_FIRST, _LAST = ("Likelihood",), ("Samples", "Speed")  # the groups of the algorithms stand between
# part of the time: opacity of its bar
TIME_PARTS = {
    "negatives": 1.0,
    "sampling": 0.88,
    "reference": 0.72,
    "reward": 0.56,
    "validation": 0.4,
    "training": 0.24,
}
NUM_COLORS = 7  # as many as the style sheet has; further runs repeat them with another dash

_DASHES = ("-", (0, (4, 2)), (0, (1.2, 1.6)))
_NOT_METRICS = {"step", "epoch", "stage", "total_flos"}
_MAX_BOUNDARIES = 30  # with a stage every few steps the marks would hide the curves
_MAX_LABELS = 12  # candidates that are numbered in a drawing
_INK, _RULE, _PAPER = "#fe0001", "#fe0002", "#fe0003"
_CSS = {_INK: "var(--ink-2)", _RULE: "var(--rule)", _PAPER: "var(--paper)"} | {
    f"#fe01{index:02x}": f"var(--run-{index})" for index in range(NUM_COLORS)
}


def curve_groups(runs: Sequence[RunRecord]) -> dict[str, list[Curve]]:
    """The curves by heading: those of all algorithms and those that the records bring."""
    curves = [*COMMON, *dict.fromkeys(curve for run in runs for curve in run.curves)]
    order = dict.fromkeys([*_FIRST, *(curve.group for curve in curves if curve.group not in _LAST), *_LAST])
    return {group or "Further": [curve for curve in curves if curve.group == group] for group in order}


def other_curves(runs: Sequence[RunRecord]) -> list[Curve]:
    """What the histories hold and neither the report nor the run's own record describes, in alphabetical order."""
    keys: set[str] = set()
    for run in runs:
        described = _described(run)
        known = described.keys() | {curve.faint for curve in described.values()} | _NOT_METRICS
        keys |= {key for row in run.history for key, value in row.items() if _is_number(value)} - known
    return [Curve(key, key) for key in sorted(keys) if not key.startswith(("time/", "train_"))]


def _described(run: RunRecord) -> dict[str, Curve]:
    """The run's curves by their keys; its record goes before what is common."""
    return {curve.key: curve for curve in (*COMMON, *run.curves)}


def dash(index: int) -> int:
    """Which dash the run's lines have: 0 is solid."""
    return index // NUM_COLORS % len(_DASHES)


def draw(runs: Sequence[RunRecord], curve: Curve) -> str | None:
    """SVG of one curve over steps or stages, all runs in one frame; None if no run has a value.

    A run that describes the same key in another way is left out: its numbers mean something else. NaN leaves a gap.
    Faint vertical lines mark where a run's stage changes.
    """
    lines = {curve.key: 1.0} | ({curve.faint: 0.4} if curve.faint else {})
    series = [
        {key: _series(run, key, curve.over) for key in lines}
        if _described(run).get(curve.key, Curve(curve.key, curve.key)) == curve
        else {}
        for run in runs
    ]
    if not any(math.isfinite(y) for found in series for _, values in found.values() for y in values):
        return None
    figure, axes = _frame()
    for index, (run, found) in enumerate(zip(runs, series, strict=True)):
        if not any(places for places, _ in found.values()):
            continue
        boundaries = _stage_boundaries(run) if curve.over == "step" else []
        for step in boundaries if len(boundaries) <= _MAX_BOUNDARIES else ():
            axes.axvline(step, color=_color(index), alpha=0.5, linewidth=0.8, linestyle=_DASHES[2], zorder=1)
        style = {"color": _color(index), "linestyle": _DASHES[dash(index)], "linewidth": 1.5, "markersize": 3}
        for name, (places, values) in found.items():
            axes.plot(places, values, **style, alpha=lines[name], marker="o" if len(places) <= 12 else None)
    axes.set_xlabel(curve.over)
    return _svg(figure)


def candidate_scores(run: RunRecord, index: int, over: str) -> str | None:
    """SVG of the candidate policies' learned reward, with 95% intervals, and verifier score; None for fewer than two.

    The verifier score has the left axis and a dashed line, the learned reward the right one (the left one if it is alone).
    Over the KL the lines follow the stages and the points bear their numbers. A ring marks the policy that was kept.

    Args:
        over: "stage" or "kl".
    """
    found = candidates(run)
    if len(found) < 2:
        return None
    places, rewards, lows, highs, scores = (
        [_finite(getattr(each, field)) for each in found]
        for field in (over, "reward", "reward_low", "reward_high", "verifier_score")
    )
    figure, left = _frame()
    axes, color = left, _color(index)
    if has_verifier_score(run):
        left.plot(places, scores, color=_INK, linestyle=_DASHES[1], linewidth=1.3, marker="s", markersize=3)
        left.set_ylabel("verifier score, dashed", color=_INK, fontsize=8.5)
        axes = left.twinx()
        _style(axes)
    axes.vlines(places, lows, highs, color=color, alpha=0.3, linewidth=3.5)
    axes.plot(places, rewards, color=color, linewidth=1.5, marker="o", markersize=3.5)
    axes.set_ylabel("learned reward", color=color, fontsize=8.5)
    axes.tick_params(axis="y", colors=color)
    for each, place, reward, score in zip(found, places, rewards, scores, strict=True):
        if each.chosen:
            for where, height, ink in ((axes, reward, color), (left, score, _INK)):
                where.plot(place, height, "o", markersize=9, markerfacecolor="none", markeredgecolor=ink)
        if over == "kl" and len(found) <= _MAX_LABELS:
            number = str(each.stage)
            axes.annotate(number, (place, reward), (5, -9), textcoords="offset points", color=_INK, size=7.5)
    left.set_xlabel("stage" if over == "stage" else "KL to the start, nats per sequence")
    if over == "kl":
        left.xaxis.set_major_locator(MaxNLocator(nbins=6))
    return _svg(figure)


def best_of_n(quality: RewardQualityRecord, index: int) -> str:
    """SVG of the verifier's score of the best of n answers: by the learned reward with its 95% interval, by own log-prob,
    by the verifier itself, and of a random pick."""
    figure, axes = _frame()
    sizes = [each.n for each in quality.best_of]
    color = _color(index)
    axes.fill_between(
        sizes,
        [each.reward.low for each in quality.best_of],
        [each.reward.high for each in quality.best_of],
        color=color,
        alpha=0.15,
        linewidth=0,
    )
    lines = (
        ("the verifier", [each.oracle.mean for each in quality.best_of], _INK, _DASHES[2]),
        ("learned reward", [each.reward.mean for each in quality.best_of], color, _DASHES[0]),
        ("own log-prob", [each.logp.mean for each in quality.best_of], _INK, _DASHES[1]),
        ("random", [each.mean.mean for each in quality.best_of], _INK, (0, (6, 2, 1, 2))),
    )
    for label, values, ink, style in lines:
        axes.plot(sizes, values, color=ink, linestyle=style, linewidth=1.5, marker="o", markersize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel("n answers to pick from")
    axes.legend(fontsize=7.5, frameon=False, labelcolor=_INK, loc="best")
    return _svg(figure)


def over_alpha(
    alphas: Sequence[float], values: Sequence[Interval], lengths: Sequence[float | None], chosen: float
) -> str:
    """SVG of a measure with its 95% interval as a model is extrapolated; the mean length of the answers is dashed, on the right axis.

    Args:
        alphas: in order; a vertical line marks 0, the aligned model.
        values, lengths: one for each; no length is drawn where none is known.
        chosen: the α with a ring.
    """
    figure, axes = _frame()
    color = _color(0)
    axes.axvline(0, color=_RULE, linewidth=1.0, zorder=1)
    axes.fill_between(
        alphas, [each.low for each in values], [each.high for each in values], color=color, alpha=0.15, linewidth=0
    )
    axes.plot(alphas, [each.mean for each in values], color=color, linewidth=1.5, marker="o", markersize=3.5)
    if chosen in alphas:
        height = values[alphas.index(chosen)].mean
        axes.plot(chosen, height, "o", markersize=9, markerfacecolor="none", markeredgecolor=color)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_xlabel("α")
    if any(length is not None for length in lengths):
        right = axes.twinx()
        _style(right)
        shown = [_finite(length) for length in lengths]
        right.plot(alphas, shown, color=_INK, linestyle=_DASHES[1], linewidth=1.2, marker="s", markersize=2.5)
        right.set_ylabel("mean length, tokens, dashed", color=_INK, fontsize=8.5)
    return _svg(figure)


def stage_times(run: RunRecord, index: int) -> str | None:
    """SVG of the seconds that each stage of a run took, by part; None if the run has fewer than two stages.

    The rows' ``time/...`` are taken as the seconds since the row before.
    """
    seconds: dict[int, dict[str, float]] = {}
    for row in run.history:
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
        axes.bar(stages, heights, bottom=bottom, color=_color(index), alpha=opacity, width=0.7, zorder=3)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.bar(stages, bottom, color=_PAPER, width=0.7, zorder=2)  # so that the grid does not shine through
    axes.set_xlabel("stage")
    return _svg(figure)


def _series(run: RunRecord, key: str, over: str) -> tuple[list[int], list[float]]:
    # A number that was not finite is None in the record.
    rows = [row for row in run.history if over in row and key in row and (row[key] is None or _is_number(row[key]))]
    return [row[over] for row in rows], [_finite(row[key]) for row in rows]


def _stage_boundaries(run: RunRecord) -> list[int]:
    """The steps of the first rows of all stages but the first; stages that took no step share one."""
    rows = [row for row in run.history if "stage" in row and "step" in row]
    return list(dict.fromkeys(row["step"] for before, row in pairwise(rows) if row["stage"] != before["stage"]))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: object) -> float:
    """The number, or NaN for what can't be drawn."""
    return value if _is_number(value) and math.isfinite(value) else math.nan


def _color(index: int) -> str:
    return f"#fe01{index % NUM_COLORS:02x}"


def _frame() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.4, 2.3), layout="constrained", frameon=False)
    axes = figure.add_subplot()
    _style(axes)
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure, axes


def _style(axes: Axes) -> None:
    axes.patch.set_facecolor("none")  # twins decide by themselves whose patch is visible
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.tick_params(colors=_INK, labelsize=8.5, length=0)
    axes.xaxis.label.set(color=_INK, fontsize=8.5)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.ticklabel_format(useOffset=False)


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element that is the same each time and takes its colors and font from the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "tutelage", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)  # its style is for all "*"
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every drawing, and an id may stand only once in a page
    text = re.sub(r' width="[^"]*" height="[^"]*"(?= viewBox)', "", text, count=1)
    return re.sub("|".join(_CSS), lambda match: _CSS[match[0]], text)
