"""The worst demonstrations beside the model's own answers: a table for the terminal, and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from tutelage.report.verdicts import signed
from tutelage.visible import visible

__all__ = ["WorstRow", "cleaning_page", "worst_table"]

_SHOWN_CHARACTERS = 240  # of a text in a terminal


@dataclass(frozen=True, slots=True)
class WorstRow:
    """A demonstration with the model's own answer.

    Attributes:
        row: its number in the data, from 0.
        rank: from 1, the worst.
        value: what it is ranked by.
        kept: whether it stays.
        prompt, demonstration, answer: as text; no answer where the model cannot be sampled from.
    """

    row: int
    rank: int
    value: float
    kept: bool
    prompt: str
    demonstration: str
    answer: str | None


def worst_table(rows: Sequence[WorstRow], measure: str) -> Table:
    """The rows for a terminal, long texts cut.

    Args:
        measure: what the values are.
    """
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, caption_justify="left", caption=measure)
    for heading in ("rank", "row", "value"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("prompt", "demonstration", "the model's own answer"):
        table.add_column(heading, overflow="fold", ratio=1)
    for row in rows:
        texts = (row.prompt, row.demonstration, "–" if row.answer is None else row.answer)
        numbers = (f"{row.rank}{'' if row.kept else ' ×'}", str(row.row), signed(row.value, 3))
        table.add_row(
            *numbers, *(Text(visible(_short(text), lines=False)) for text in texts)
        )  # Text: what people wrote is no markup
    return table


def cleaning_page(rows: Sequence[WorstRow], *, title: str, measure: str, dropped: int, total: int) -> str:
    """The rows as one HTML page that needs nothing else. Every text is escaped.

    Args:
        title: of the page.
        measure: what the values are.
        dropped, total: numbers of demonstrations.
    """
    cards = "\n".join(_card(row) for row in rows)
    style = files("tutelage.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="meta">{dropped} of {total} demonstrations dropped · the {len(rows)} worst are shown · '
        f"{escape(measure)}</p>\n{cards}\n</body>\n</html>\n"
    )


def _card(row: WorstRow) -> str:
    mark = '<span class="right">kept</span>' if row.kept else '<span class="wrong">dropped</span>'
    answer = "–" if row.answer is None else row.answer
    sides = "".join(
        f'<div><p class="label">{label}</p><pre>{escape(text)}</pre></div>'
        for label, text in (("Demonstration", row.demonstration), ("The model's own answer", answer))
    )
    return (
        f'<article class="prompt"><div class="given"><div><p class="label"><span>Rank {row.rank}, row {row.row}, '
        f"value {signed(row.value, 3)}</span>{mark}</p><pre>{escape(row.prompt)}</pre></div></div>"
        f'<div class="answers">{sides}</div></article>'
    )


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
