"""lab.html: what a grid showed, on one page without scripts or anything from the network."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.lab.figure import draw_scores, draw_sweep
from tutelage.lab.grid import Cell, Grid
from tutelage.lab.plan import OBJECTIVES, Choice, Plan
from tutelage.lab.table import Difference, differences, reported_runs, seed_values, strongest_control

__all__ = ["render", "write_page"]

Rows = Sequence[Mapping[str, Any]]

_NAMES = {"score": "at temperature 1", "score_greedy": "greedy"}
_COLUMNS = (  # measure, objective whose settings it is of, heading, digits
    ("score", "score", "score at T = 1", 3),
    ("score_greedy", "score_greedy", "score, greedy", 3),
    ("score_best", "score", "best of 8, by the judge", 3),
    ("diversity", "score", "different right answers of 8", 2),
    ("demonstration_logp", "score", "held-out log-prob, nats", 2),
    ("kl", "score", "KL to its start, nats", 2),
    ("retention", "score", "another task, greedy", 2),
    ("reward_auc", "score", "reward: right over wrong, AUC", 3),
    ("logp_auc", "score", "own log-prob: right over wrong, AUC", 3),
    ("reward_best", "score", "best of 8, by the reward", 3),
    ("logp_best", "score", "best of 8, by own log-prob", 3),
    ("sampled_tokens", "score", "sampled tokens", 0),
    ("trained_tokens", "score", "trained tokens", 0),
    ("flops", "score", "operations, 10⁹", 1),
    ("seconds", "score", "seconds", 1),
)
_UNITS = {"flops": 1e9}


def write_page(grid: Grid, plan: Plan, rows: Rows, path: Path) -> None:
    """Write the page under a temporary name first."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(render(grid, plan, rows), encoding="utf-8")
    temporary.replace(path)


def render(grid: Grid, plan: Plan, rows: Rows) -> str:
    """The page as HTML. Every text of the grid is escaped."""
    style = files("tutelage.report").joinpath("style.css").read_text(encoding="utf-8")
    parts = [_head(grid, rows), _verdicts(grid, rows), _figure(grid, rows)]
    parts += [_cell(grid, plan, rows, cell) for cell in grid.cells]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(grid.name)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _head(grid: Grid, rows: Rows) -> str:
    runs = {row["run"] for row in rows}
    minutes = sum({row["run"]: row["seconds"] or 0.0 for row in rows}.values()) / 60
    return (
        f'<h1>{escape(grid.name)}</h1><p class="meta">{escape(grid.description)}</p>'
        f'<p class="note">{len(runs)} runs, {minutes:.0f} minutes on one core. Settings were chosen on validation rows of '
        f"seeds {_list(grid.tuning_seeds)}, for samples at temperature 1 and for the likeliest tokens apart; numbers are of "
        f"test rows of seeds {_list(grid.report_seeds)}. No prompt serves both. ± is the standard error over seeds. "
        "Means are of the runs that did not diverge; those that did are counted beside them.</p>"
        f"{_versions(rows)}"
    )


def _versions(rows: Rows) -> str:
    """A sentence where not all runs are of one version of the code."""
    found = Counter({row["run"]: row["code"] for row in rows}.values())
    if len(found) < 2:
        return ""
    told = ", ".join(f"{count} of {escape(code)}" for code, count in found.most_common())
    return f'<p class="note"><strong>The runs are of different versions of the code:</strong> {told}.</p>'


def _verdicts(grid: Grid, rows: Rows) -> str:
    """A sentence per cell and objective: the recipe against the control with the highest mean."""
    if grid.recipe is None:
        return ""
    items = []
    for cell in grid.cells:
        for objective in OBJECTIVES:
            best = strongest_control(rows, cell, _controls(grid), objective)
            found = {d.control: d for d in differences(rows, cell, grid.recipe, _controls(grid), objective)}
            if best is None or best not in found:
                continue
            interval, won = found[best].interval, found[best].won
            items.append(
                f'<li class="{found[best].tone}"><strong>{escape(cell.title)}, {_NAMES[objective]}:</strong> {escape(grid.recipe)} '
                f"against {escape(best)}, the strongest of the others, {_signed(interval.mean)} "
                f"({_signed(interval.low)} to {_signed(interval.high)}), higher on {won} of {interval.n} seeds"
                f"{_without_claim(found[best])}.</li>"
            )
    return f'<ul class="verdicts">{"".join(items)}</ul>'


def _figure(grid: Grid, rows: Rows) -> str:
    """Scores of all methods in all cells; over what is varied, where one number is."""
    varied = {name for cell in grid.cells for name in cell.varied}
    worlds = dict.fromkeys(cell.world for cell in grid.cells)
    drawn = []
    for world in worlds:
        cells = [cell for cell in grid.cells if cell.world == world]
        if len(varied) == 1 and len(cells) > 1:
            (name,) = varied
            lines = {
                method.name: [(float(cell.varied[name]), *_mean(rows, cell, method.name)) for cell in cells]
                for method in grid.methods
            }
            svg, unit = draw_sweep(lines), f"score at temperature 1, over {name}"
        else:
            points = {method.name: _mean(rows, cell, method.name) for cell in cells[:1] for method in grid.methods}
            svg, unit = draw_scores(points), "score at temperature 1, standard error over seeds"
        if svg is not None:
            drawn.append(f"<figure><figcaption>{escape(world)}<span>{escape(unit)}</span></figcaption>{svg}</figure>")
    names = "".join(
        f'<span class="name" style="--c:var(--run-{place % 7})">{escape(method.name)}</span>'
        for place, method in enumerate(grid.methods)
    )
    legend = f'<div class="legend">{names}</div>' if len(varied) == 1 else ""
    return f'<h2>Scores</h2>{legend}<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _mean(rows: Rows, cell: Cell, method: str) -> tuple[float, float]:
    values = list(seed_values(rows, cell, method, "score", "score").values())
    return _mean_and_error(values) if values else (math.nan, math.nan)


def _cell(grid: Grid, plan: Plan, rows: Rows, cell: Cell) -> str:
    columns = [
        column
        for column in _COLUMNS
        if any(seed_values(rows, cell, method.name, column[0], column[1]) for method in grid.methods)
    ]
    heads = "".join(f'<th scope="col">{escape(heading)}</th>' for _, _, heading, _ in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(method.name)}</th>'
        f"<td>{len(method.candidates(cell))}</td><td>{_diverged(rows, cell, method.name)}</td>"
        + "".join(
            f"<td>{_value(_shown(rows, cell, method.name, measure, objective), digits)}</td>"
            for measure, objective, _, digits in columns
        )
        + "</tr>"
        for method in grid.methods
    )
    first = "".join(f'<th scope="col">{name}</th>' for name in ("method", "settings tried", "diverged"))
    table = f'<div class="wide"><table><thead><tr>{first}{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<h2>{escape(cell.title)}</h2>{table}{_differences(grid, rows, cell)}{_settings(grid, plan, cell)}"


def _diverged(rows: Rows, cell: Cell, method: str) -> str:
    """How many of a method's reporting runs, those of both objectives, diverged."""
    runs = reported_runs(rows, cell, method)
    return f"{sum(row['diverged'] for row in runs.values())} of {len(runs)}"


def _shown(rows: Rows, cell: Cell, method: str, measure: str, objective: str) -> list[float]:
    unit = _UNITS.get(measure, 1)
    return [value / unit for value in seed_values(rows, cell, method, measure, objective).values()]


def _without_claim(found: Difference) -> str:
    return f"; either diverged on {found.diverged}, so no win is claimed" if found.diverged else ""


def _differences(grid: Grid, rows: Rows, cell: Cell) -> str:
    if grid.recipe is None:
        return ""
    by_objective = {
        objective: {d.control: d for d in differences(rows, cell, grid.recipe, _controls(grid), objective)}
        for objective in OBJECTIVES
    }
    strongest = {objective: strongest_control(rows, cell, _controls(grid), objective) for objective in OBJECTIVES}
    body = ""
    for control in _controls(grid):
        cells = ""
        for objective in OBJECTIVES:
            found = by_objective[objective].get(control)
            if found is None:
                cells += '<td><span class="quiet">–</span></td>'
                continue
            interval = found.interval
            mark = " · strongest" if strongest[objective] == control else ""
            cells += (
                f"<td>{_signed(interval.mean)} ({_signed(interval.low)} to {_signed(interval.high)}), "
                f"{found.won} of {interval.n}{_without_claim(found)}{mark}</td>"
            )
        body += f'<tr><th scope="row">{escape(control)}</th>{cells}</tr>'
    heads = "".join(f'<th scope="col">{_NAMES[objective]}</th>' for objective in OBJECTIVES)
    return (
        f"<h3>{escape(grid.recipe)} minus …</h3><p class=note>Paired over seeds, 95% intervals of Student; seeds won. "
        "A run that diverged counts as score 0, and from a pair with one, whichever it is, the recipe gains nothing and can "
        "claim no win.</p>"
        f'<table><thead><tr><th scope="col">method</th>{heads}</tr></thead><tbody>{body}</tbody></table>'
    )


def _settings(grid: Grid, plan: Plan, cell: Cell) -> str:
    body = ""
    for method in grid.methods:
        choice = plan.choices.get((cell.title, method.name))
        if choice is None or not choice.scores:
            continue
        for objective in OBJECTIVES:
            body += (
                f'<tr><th scope="row">{escape(method.name)}</th><td>{_NAMES[objective]}</td>'
                f"<td>{escape(_tuned(method.tune, choice, objective))}</td>"
                f"<td>{choice.scores[objective]:.3f}</td></tr>"
            )
    if not body:
        return ""
    head = "<thead><tr><th>method</th><th>chosen for</th><th>settings</th><th>validation score</th></tr></thead>"
    return f'<details><summary>What was chosen</summary><table class="settings">{head}<tbody>{body}</tbody></table></details>'


def _tuned(names: Mapping[str, Any], choice: Choice, objective: str) -> str:
    return ", ".join(f"{name} {json.dumps(choice.settings[objective][name])}" for name in names)


def _controls(grid: Grid) -> list[str]:
    return [method.name for method in grid.methods if method.name != grid.recipe]


def _value(values: Sequence[float], digits: int) -> str:
    if not values:
        return '<span class="quiet">–</span>'
    mean, error = _mean_and_error(values)
    return f"{mean:,.{digits}f}" + (f" ± {error:,.{digits}f}" if math.isfinite(error) else "")


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def _signed(value: float) -> str:
    if not math.isfinite(value):
        return "−∞" if value < 0 else "+∞"
    return f"{value:+.3f}".replace("-", "−")


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
