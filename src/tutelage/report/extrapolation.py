"""What an extrapolated model gives as α grows: a table for the terminal, and a page with the curves, the length beside each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tutelage.report.charts import over_alpha
from tutelage.report.verdicts import signed
from tutelage.results import Interval

__all__ = ["MEASURES", "Extrapolated", "extrapolation_page", "extrapolation_table", "selection_said"]

MEASURES = {
    "log_prob": ("held-out log-prob", "nats per sequence"),
    "score": ("score at temperature 1", "by the verifier"),
    "greedy_score": ("greedy score", "by the verifier"),
    "reward": ("reward at temperature 1", "of the given reward"),
    "kl": ("KL to the start", "nats per sequence"),
}
"""What is measured of each model, and its unit."""


@dataclass(frozen=True, slots=True)
class Extrapolated:
    """What was measured of the model at one α, on validation rows.

    Attributes:
        alpha: how far beyond the aligned model.
        measures: means over the rows with 95% intervals, some of ``MEASURES``.
        gain: what it has more than the aligned model (α = 0) of what α is chosen by, paired by row; None where that was not measured.
        length: mean of the answers at temperature 1, in tokens; None where none were drawn.
        truncated: share of them that did not end.
    """

    alpha: float
    measures: Mapping[str, Interval]
    gain: Interval | None = None
    length: float | None = None
    truncated: float | None = None


def extrapolation_table(found: Sequence[Extrapolated], chosen: float) -> Table:
    """A line per α for a terminal; the chosen one is marked."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    shown = _shown(found)
    for heading in ("α", *(MEASURES[name][0] for name in shown), "mean length", "truncated"):
        table.add_column(heading, justify="right")
    for each in found:
        numbers = (signed(each.measures[name].mean, 3) if name in each.measures else "–" for name in shown)
        mark = " ←" if each.alpha == chosen else ""
        table.add_row(f"{_alpha(each)}{mark}", *numbers, _number(each.length, 1), _number(each.truncated, 3))
    return table


def selection_said(found: Sequence[Extrapolated], chosen: float, by: str) -> str:
    """Why this α, and what it has more than the aligned model, as a sentence."""
    best = next(each for each in found if each.alpha == chosen)
    text = (
        f"α = {chosen:g} has the highest {MEASURES[by][0]} on the validation rows: {signed(best.measures[by].mean, 3)}"
    )
    if chosen == 0:
        text += ", which is the aligned model: none that was tried does better"
    elif best.gain is not None:
        gain = best.gain
        text += f", {signed(gain.mean, 3)} more than the aligned model (95% interval {signed(gain.low, 3)} to {signed(gain.high, 3)}"
        text += ", too good by what choosing on these rows adds)"
    return f"{text}."


def extrapolation_page(found: Sequence[Extrapolated], *, chosen: float, by: str, title: str, meta: str) -> str:
    """The curves and the table as one HTML page that needs nothing else. Every text is escaped.

    Args:
        chosen: the α that was written; by: the measure that it is the best of.
        title, meta: of the page, and what the models and the rows are.
    """
    shown = _shown(found)
    figures = "".join(_figure(found, name, chosen) for name in sorted(shown, key=lambda name: name != by))
    head = "".join(
        f'<th scope="col">{escape(MEASURES[name][0])}<br>{escape(MEASURES[name][1])}</th>' for name in shown
    )
    head += (
        '<th scope="col">more than α = 0</th><th scope="col">mean length, tokens</th><th scope="col">truncated</th>'
    )
    rows = "".join(_row(each, shown, chosen) for each in found)
    style = files("tutelage.report").joinpath("style.css").read_text(encoding="utf-8")
    note = (
        "Means over the validation rows with 95% intervals; dashed: the mean length of the answers. A ring marks the α that was "
        "written. It was chosen on these rows, so its own value here is too good: measure it on others."
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="meta">{escape(meta)}</p>\n<p>{escape(selection_said(found, chosen, by))}</p>\n'
        f'<div class="charts" style="--c:var(--run-0)">{figures}</div>\n'
        f'<div class="wide"><table class="summary"><thead><tr><th scope="col">α</th>{head}</tr></thead><tbody>{rows}</tbody>'
        f'</table></div>\n<p class="note">{escape(note)}</p>\n</body>\n</html>\n'
    )


def _shown(found: Sequence[Extrapolated]) -> list[str]:
    return [name for name in MEASURES if any(name in each.measures for each in found)]


def _figure(found: Sequence[Extrapolated], name: str, chosen: float) -> str:
    known = [each for each in found if name in each.measures]
    svg = over_alpha(
        [each.alpha for each in known],
        [each.measures[name] for each in known],
        [each.length for each in known],
        chosen,
    )
    title, unit = MEASURES[name]
    labeled = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return f"<figure><figcaption>{escape(title)}<span>{escape(unit)}</span></figcaption>{labeled}</figure>"


def _row(each: Extrapolated, shown: Sequence[str], chosen: float) -> str:
    cells = "".join(f"<td>{_interval(each.measures.get(name))}</td>" for name in shown)
    cells += f"<td>{_interval(each.gain)}</td><td>{_number(each.length, 1)}</td><td>{_number(each.truncated, 3)}</td>"
    mark = " (written)" if each.alpha == chosen else ""
    return f'<tr><th scope="row">{_alpha(each)}{mark}</th>{cells}</tr>'


def _alpha(found: Extrapolated) -> str:
    return f"{found.alpha:g}".replace("-", "−")


def _interval(found: Interval | None) -> str:
    if found is None:
        return '<span class="quiet">–</span>'
    return f"{signed(found.mean, 3)}<small>{signed(found.low, 3)} to {signed(found.high, 3)}</small>"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
