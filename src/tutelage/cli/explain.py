"""What `tutelage score` tells of a feature reward: what spoke for and against each answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tutelage.data import Tokenization
from tutelage.groups import Group
from tutelage.progress import Progress
from tutelage.rewards import FeatureReward
from tutelage.rewards.feature_reward import Spoken
from tutelage.terminal import label, say, show

__all__ = ["Explanation", "explanations", "show_explanations"]

Explanation = list[Spoken]

_SHOWN = 4  # answers on the screen; all are in the file


def explanations(
    reward: FeatureReward, groups: Sequence[Group], top: int, tokenization: Tokenization, progress: Progress
) -> list[list[Explanation]]:
    """Of each completion of each group, the ``top`` features that spoke most for and against it."""

    def text(ids: Sequence[int]) -> str:
        return tokenization.text(ids, skip_special_tokens=False)

    told: list[list[Explanation]] = []
    with progress.phase("explaining", len(groups)) as advance:
        for group in groups:
            told.append(reward.explain_all(group, top=top, text=text))
            advance(len(told))
    return told


def show_explanations(lines: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A table for each of the first answers of the file."""
    answers = [(line, answer) for line in lines for answer in line["completions"]]
    for line, answer in answers[:_SHOWN]:
        title = f"row {line['row'] + 1}, {answer['role']}: {_short(answer['text'])}  reward {answer['reward']:.3g}"
        table = Table(title=label(title), title_justify="left", title_style="bold")
        table.add_column("feature")
        for column in ("value", "weight", "contribution"):
            table.add_column(column, justify="right")
        for said in answer["explanation"]:
            numbers = (f"{said['value']:.3g}", f"{said['weight']:+.3g}", f"{said['contribution']:+.3g}")
            table.add_row(label(said["feature"]), *numbers)
        show(console, table)
    if len(answers) > _SHOWN:
        say(console, f"{len(answers) - _SHOWN} further answers are explained in the file")


def _short(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
