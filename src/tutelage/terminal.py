"""The one place that writes to a console: what users named is shown as it is, neither as markup nor as control bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from tutelage.visible import visible

__all__ = ["SafeConsole", "label", "say", "show"]


class SafeConsole(Console):
    """A console in which no text is markup and no text holds control bytes, whoever prints it."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's, with what is no control code of rich's own made visible."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


def label(text: object, style: str = "") -> Text:
    """A name as a cell, a title or a part of a line."""
    return Text(visible(text, lines=False), style=style)


def say(console: Console, *parts: str | tuple[str, str], style: str = "") -> None:
    """Print a line (or several) made of parts; a pair is a text and its style."""
    shown = [visible(part) if isinstance(part, str) else (visible(part[0]), part[1]) for part in parts]
    console.print(Text.assemble(*shown, style=style), highlight=False)


def show(console: Console, renderable: RenderableType) -> None:
    """Print a table or a panel, whose texts are labels."""
    console.print(renderable, highlight=False)
