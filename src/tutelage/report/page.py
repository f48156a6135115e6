"""report.html: one self-contained file, without scripts or anything from the network."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from tutelage.report import charts
from tutelage.report.runs import has_verifier_score, is_graded, require_distinct_names, starts_of
from tutelage.report.summary import Cell, Column, duration, summary_columns
from tutelage.report.verdicts import judge, signed
from tutelage.results import Curve, Interval, RunRecord, SampleRecord, told_of_probes

__all__ = ["is_report", "render", "write_report"]

OPEN_PROMPTS = 12  # further prompts with their samples are folded


_MARK = '<meta name="generator" content="tutelage report">'


def is_report(start: str) -> bool:
    """Whether a file that begins so is a page of ours, which another may replace."""
    return _MARK in start


def write_report(runs: Sequence[RunRecord], path: str | Path) -> None:
    """Write report.html for one run or several, under a temporary name first. The same runs give the same file.

    Raises:
        UserError: no runs, or two of the same name.
    """
    path = Path(path)
    text = render(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def render(runs: Sequence[RunRecord]) -> str:
    """The page as HTML. Every text that comes from runs, models or data is escaped.

    Raises:
        UserError: no runs, or two of the same name.
    """
    require_distinct_names(runs)
    title = _title(runs)
    parts = (_summary, _retention, _reward_quality, _selection, _curves, _time, _samples, _settings)
    body = "\n".join([_header(runs, title), *(part(runs) for part in parts)])
    style = files("tutelage.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'{_MARK}\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _title(runs: Sequence[RunRecord]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"


def _header(runs: Sequence[RunRecord], title: str) -> str:
    home = str(Path.home())  # whose it is does not belong on a page that is shown to others
    meta = [
        f"{label} {', '.join(_distinct(str(value).replace(home, '~', 1) for value in values if value is not None))}"
        for label, values in (
            ("model", [run.model for run in runs]),
            ("trained on", [run.dataset for run in runs]),
            ("evaluated on", [run.evaluation and run.evaluation.dataset for run in runs]),
            ("task", [run.evaluation and run.evaluation.task for run in runs]),
            ("seed", [run.seed for run in runs]),
        )
        if any(value is not None for value in values)
    ]
    items = "".join(
        f'<li class="{verdict.tone}"><strong>{escape(verdict.claim)}:</strong> {escape(verdict.evidence)}.</li>'
        for verdict in judge(runs)
    )
    return (
        f'<h1>{escape(title)}</h1>\n<p class="meta">{escape(" · ".join(meta))}</p>\n<ul class="verdicts">{items}</ul>'
    )


def _summary(runs: Sequence[RunRecord]) -> str:
    columns = summary_columns(runs)
    if not columns:
        return ""
    head = "".join(
        f'<th scope="col" title="{escape(column.help)}">{escape(column.heading)}</th>' for column in columns
    )
    rows = "".join(
        f'<tr style="{_color(index)}"><th scope="row">{_name(run, index)}</th>'
        + "".join(f"<td>{_value(column.cells[index], column)}</td>" for column in columns)
        + "</tr>"
        for index, run in enumerate(runs)
    )
    note = "Bars and small numbers: 95% intervals over the rows; the bars of a column share a scale."
    return (
        f'<h2>Summary</h2>\n<div class="wide"><table class="summary"><thead><tr><th scope="col">run</th>{head}</tr>'
        f'</thead><tbody>{rows}</tbody></table></div>\n<p class="note">{note}</p>'
    )


def _value(cell: Cell | None, column: Column) -> str:
    if cell is None:
        return '<span class="quiet">–</span>'
    if cell.interval is None:
        return escape(cell.text)
    bounds = [
        bound
        for other in column.cells
        if other is not None and other.interval is not None
        for bound in (other.interval.low, other.interval.high)
        if math.isfinite(bound)
    ]
    low, width = (min(bounds), max(bounds) - min(bounds)) if bounds else (0.0, 0.0)
    bar = ""
    if width > 0 and all(map(math.isfinite, (cell.interval.low, cell.interval.mean, cell.interval.high))):
        left, middle, right = (
            (bound - low) / width * 100 for bound in (cell.interval.low, cell.interval.mean, cell.interval.high)
        )
        bar = f'<i style="left:{left:.1f}%;width:{right - left:.1f}%"></i><b style="left:{middle:.1f}%"></b>'
        bar = f'<span class="range">{bar}</span>'
    return f"{escape(cell.text)}{bar}<small>{escape(cell.bounds)}</small>"


_QUANTITIES = {
    "sampled_score": "sampled score",
    "sampled_right": "sampled accuracy",
    "greedy_score": "greedy score",
    "greedy_right": "greedy accuracy",
    "demonstration_logp": "log-prob, nats per sequence",
}


def _retention(runs: Sequence[RunRecord]) -> str:
    """A row per run and quantity: what was found on another task before training, and after it."""
    rows = []
    for index, run in enumerate(runs):
        if run.retention is None:
            continue
        before, after, change = run.retention.before, run.retention.after, run.retention.change
        graded = {kind: is_graded([before, after], kind) for kind in ("sampled", "greedy")}
        # A score that is the accuracy says nothing more.
        repeated = {f"{kind}_score" for kind, is_so in graded.items() if not is_so}
        for key, label in _QUANTITIES.items():
            if key not in change or key in repeated:
                continue
            values = [_mean_of(each.per_row[key]) for each in (before, after)]
            rows.append(
                f'<tr style="{_color(index)}"><th scope="row">{_name(run, index)}</th><td>{escape(label)}</td>'
                + "".join(f"<td>{signed(value)}</td>" for value in values)
                + f"<td>{_signed_interval(change[key])}</td><td>{escape(after.dataset)}</td></tr>"
            )
    if not rows:
        return ""
    head = "".join(
        f'<th scope="col">{text}</th>' for text in ("run", "quantity", "before", "after", "change", "the other task")
    )
    note = "Measured on rows of another task, before training and after; the change is paired by row, with its 95% interval."
    return (
        f'<h2>Retention</h2>\n<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f'</table></div>\n<p class="note">{note}</p>'
    )


def _mean_of(values: Sequence[float | None]) -> float:
    return sum(value or 0.0 for value in values) / len(values)


def _signed_interval(interval: Interval) -> str:
    mean = ("+" if interval.mean > 0 else "") + signed(interval.mean)
    return f"{mean} <small>{signed(interval.low)} to {signed(interval.high)}</small>"


def _reward_quality(runs: Sequence[RunRecord]) -> str:
    """Per run with a learned reward and a verifier: best of n by it, and how it ranks right over wrong."""
    judged = [
        (index, run, run.evaluation.reward_quality)
        for index, run in enumerate(runs)
        if run.evaluation and run.evaluation.reward_quality
    ]
    if not judged:
        return ""
    drawn = "".join(
        _figure("Best of n by verifier score", run.name if len(runs) > 1 else "", charts.best_of_n(found, index))
        for index, run, found in judged
    )
    rows = []
    for index, run, found in judged:
        best = found.best_of[-1]
        for way, label, interval in (
            ("reward", "learned reward", best.reward),
            ("logp", "own log-prob", best.logp),
            ("length", "length", None),
            ("", "a random pick", best.mean),
            ("", "the verifier itself", best.oracle),
        ):
            area, correlation = found.auc.get(way), found.correlations.get(way)
            cells = (
                _quiet_or(area and _interval_cell(area)),
                _quiet_or(interval and _interval_cell(interval)),
                _quiet_or(None if correlation is None else signed(correlation)),
            )
            rows.append(
                f'<tr style="{_color(index)}"><th scope="row">{_name(run, index)}</th><td>{label}</td>'
                + "".join(f"<td>{cell}</td>" for cell in cells)
                + "</tr>"
            )
    most = max(found.answers for _, _, found in judged)
    head = "".join(
        f'<th scope="col">{text}</th>'
        for text in ("run", "ranked by", "AUC, right over wrong", "score of the best", "correlation with the reward")
    )
    note = (
        f"{most} answers to each held-out prompt. AUC: how often a right answer stands over a wrong one to the same prompt. "
        "A reward is worth something where it picks better than the policy's own log-prob, which costs nothing. "
        "Correlations are within prompts. Small numbers and the band: 95% intervals over prompts."
    )
    return (
        f'<h2>Reward quality</h2>\n<div class="charts">{drawn}</div>\n<div class="wide"><table><thead><tr>{head}</tr>'
        f'</thead><tbody>{"".join(rows)}</tbody></table></div>\n<p class="note">{note}</p>'
    )


def _interval_cell(interval: Interval) -> str:
    return f"{signed(interval.mean)} <small>{signed(interval.low)}–{signed(interval.high)}</small>"


def _quiet_or(text: str | None) -> str:
    return text or '<span class="quiet">–</span>'


def _selection(runs: Sequence[RunRecord]) -> str:
    """A row of charts per run that chose among policies: what the learned reward says of them, and what the verifier."""
    rows = []
    for index, run in enumerate(runs):
        drawn = "".join(
            _figure(title, run.name if len(runs) > 1 else "", svg)
            for over, title in (("stage", "By stage"), ("kl", "By distance from the start"))
            if (svg := charts.candidate_scores(run, index, over)) is not None
        )
        rows += [f'<div class="charts">{drawn}</div>'] if drawn else []
    if not rows:
        return ""
    note = (
        "Each point is a policy, scored on validation rows by the last learned reward; bars: 95% intervals; "
        "ring: the policy that was kept."
    )
    title = "Learned reward of the candidates"
    if any(map(has_verifier_score, runs)):
        title = "Learned reward against verifier score"
        note += (
            " Where the learned reward rises and the verifier score falls, the policy exploits errors of the reward."
        )
    return "\n".join([f"<h2>{title}</h2>", *rows, f'<p class="note">{note}</p>'])


def _curves(runs: Sequence[RunRecord]) -> str:
    sections = [
        f"<h3>{escape(group)}</h3>\n{drawn}"
        for group, curves in charts.curve_groups(runs).items()
        if (drawn := _grid(runs, curves))
    ]
    rest = _grid(runs, charts.other_curves(runs))
    if rest:
        sections.append(f"<details><summary>Everything else that was logged</summary>\n{rest}</details>")
    if not sections:
        return ""
    legend = "".join(_name(run, index) for index, run in enumerate(runs))
    legend = f'<div class="legend">{legend}</div>' if len(runs) > 1 else ""
    note = '<p class="note">Dotted vertical lines mark the stages of the run of their color.</p>'
    return "\n".join([f"<section><h2>Curves</h2>\n{legend}", *sections, note, "</section>"])


def _grid(runs: Sequence[RunRecord], curves: Iterable[Curve]) -> str:
    drawn = [
        _figure(curve.title, curve.unit, svg) for curve in curves if (svg := charts.draw(runs, curve)) is not None
    ]
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _figure(title: str, unit: str, svg: str) -> str:
    labeled = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return f"<figure><figcaption>{escape(title)}<span>{escape(unit)}</span></figcaption>{labeled}</figure>"


def _time(runs: Sequence[RunRecord]) -> str:
    times = [run.time_s for run in runs]
    longest = max((time.get("total", 0.0) for time in times), default=0.0)
    if longest <= 0:
        return ""
    keys = "".join(
        f'<span style="--o:{opacity}">{part}</span>'
        for part, opacity in charts.TIME_PARTS.items()
        if any(time.get(part) for time in times)
    )
    rows = []
    for index, (run, time) in enumerate(zip(runs, times, strict=True)):
        parts = "".join(
            f'<i style="width:{time[part] / longest * 100:.2f}%;opacity:{opacity}" title="{part} '
            f'{duration(time[part])}"></i>'
            for part, opacity in charts.TIME_PARTS.items()
            if time.get(part)
        )
        total = duration(time["total"]) if "total" in time else "–"
        rows.append(f'{_name(run, index)}<div class="bar" style="{_color(index)}">{parts}</div><span>{total}</span>')
    stages = "".join(
        _figure(run.name, "seconds per stage", svg)
        for index, run in enumerate(runs)
        if (svg := charts.stage_times(run, index)) is not None
    )
    stages = f'<h3>By stage</h3>\n<div class="charts">{stages}</div>' if stages else ""
    return f'<h2>Time</h2>\n<div class="keys">{keys}</div>\n<div class="times">{"".join(rows)}</div>\n{stages}'


def _samples(runs: Sequence[RunRecord]) -> str:
    """A card per prompt, in the order of the first run that shows it, with one column per run."""
    by_run = [{sample.row: sample for sample in run.samples} for run in runs]
    order = _distinct(row for samples in by_run for row in samples)
    if not order:
        return ""
    cards = []
    for row in order:
        given = next(samples[row] for samples in by_run if row in samples)
        answers = "".join(_answer(run, index, by_run[index].get(row)) for index, run in enumerate(runs))
        cards.append(
            f'<article class="prompt"><div class="given"><div><p class="label">Prompt, row {escape(str(row))}</p>'
            f'<pre>{escape(given.prompt)}</pre></div><div><p class="label">Demonstration</p>'
            f'<pre>{escape(given.demonstration or "–")}</pre></div></div><div class="answers">{answers}</div></article>'
        )
    shown, folded = "".join(cards[:OPEN_PROMPTS]), "".join(cards[OPEN_PROMPTS:])
    if folded:
        folded = f"<details><summary>{len(cards) - OPEN_PROMPTS} more prompts</summary>{folded}</details>"
    return f"<h2>Samples</h2>\n{shown}{folded}"


def _answer(run: RunRecord, index: int, sample: SampleRecord | None) -> str:
    answers = {"sampled": sample.sampled, "greedy": sample.greedy} if sample else {}
    parts = [
        f'<p class="label"><span>{kind}</span>{_mark(answer.score)}</p><pre>{escape(answer.text)}</pre>'
        for kind, answer in answers.items()
        if answer is not None
    ]
    return f"<div>{_name(run, index)}{''.join(parts) or '<p class=quiet>not sampled</p>'}</div>"


def _mark(score: float | None) -> str:
    if score is None:
        return ""
    if score >= 1:
        return f'<span class="right">✓ right, {score:.3g}</span>'
    if score <= 0:
        return f'<span class="wrong">✗ wrong, {score:.3g}</span>'
    return f"<span>partly, {score:.3g}</span>"


def _settings(runs: Sequence[RunRecord]) -> str:
    all_settings = [
        {
            "algorithm": run.algorithm,
            "model": run.model,
            "dataset": run.dataset,
            "seed": run.seed,
            "start": ", ".join(start.name for start in starts_of(run, runs)) or run.start,
        }
        | run.settings
        | told_of_probes(run)
        for run in runs
    ]
    keys = _distinct(key for settings in all_settings for key in settings)
    texts = {key: [_setting(settings, key) for settings in all_settings] for key in keys}
    differing = {key: row for key, row in texts.items() if len(set(row)) > 1}
    shared = {key: row[:1] for key, row in texts.items() if key not in differing}
    if len(runs) == 1:
        return f"<h2>Settings</h2>\n{_settings_table(shared)}"
    names = "".join(f'<th scope="col">{_name(run, index)}</th>' for index, run in enumerate(runs))
    head = f"<thead><tr><td></td>{names}</tr></thead>"
    different = _settings_table(differing, head) if differing else "<p>The runs differ in no setting.</p>"
    folded = (
        f"<details><summary>{len(shared)} settings that all runs share</summary>{_settings_table(shared)}</details>"
    )
    return f"<h2>Settings that differ</h2>\n{different}\n{folded}"


def _settings_table(rows: dict[str, list[str]], head: str = "") -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th>{"".join(f"<td>{escape(text)}</td>" for text in row)}</tr>'
        for key, row in rows.items()
    )
    return f'<div class="wide"><table class="settings">{head}<tbody>{body}</tbody></table></div>'


def _setting(settings: dict, key: str) -> str:
    if settings.get(key) is None:
        return "–"
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _name(run: RunRecord, index: int) -> str:
    dash = f" dash-{charts.dash(index)}" if charts.dash(index) else ""
    return f'<span class="name{dash}" style="{_color(index)}">{escape(run.name)}</span>'


def _color(index: int) -> str:
    return f"--c:var(--run-{index % charts.NUM_COLORS})"


def _distinct(values: Iterable) -> list:
    """The values without repetition, in the order of their first."""
    return list(dict.fromkeys(values))
