"""metrics.jsonl: every line that a run logs, in its folder as soon as it is logged."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tutelage.errors import UserError
from tutelage.files import append_json_lines, plain, storing, write_text
from tutelage.training.made import add_made, is_made

__all__ = ["METRICS", "Journal", "read_journal"]

METRICS = "metrics.jsonl"
"""File in a run's folder with a JSON object for each line that was logged."""

_OWN = ("event", "seconds")
"""What a line has besides the entry of the trainer's history."""


class Journal(TrainerCallback):
    """Writes ``metrics.jsonl`` while a run trains.

    A line is ``event``, ``step``, ``stage``, ``epoch``, ``seconds`` and what was logged. ``event`` is ``train``, ``stage``
    (what a stage's beginning has to tell), ``eval`` or ``end``. ``stage`` is null without stages. ``seconds`` counts from
    the beginning of the run, without the time between a kill and the resumed run, and without work that a kill undid. A
    number that is NaN or infinite is null.

    A run that goes on from a checkpoint keeps the lines that had been logged when the checkpoint was written: those of its
    history. The others are of steps that are taken again. A line that is missing or altered is written again from the
    history, and its ``seconds`` are then null.

    Args:
        folder: the run's.
        clock: seconds, from any start.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic):
        self.path, self.clock = folder / METRICS, clock
        self._zero: float | None = None  # the clock's time at which the run would have begun had nothing stopped it

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        add_made(self.path.parent, [METRICS])
        lines = list(_kept(self.path, state.log_history))
        spent = [line["seconds"] for line in lines if line["seconds"] is not None]
        self._zero = self.clock() - max(spent, default=0.0)
        write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def on_log(self, args, state, control, **kwargs):
        if self._zero is None:
            return
        line = _line(state.log_history[-1], round(self.clock() - self._zero, 3))
        with storing(self.path), self.path.open("a", encoding="utf-8") as file:
            append_json_lines(file, [line])

    def close(self) -> None:
        """The run is over: what is logged from now on is not its."""
        self._zero = None

    def require_own(self) -> None:
        """Refuse to replace a file of somebody else; call it before the run leaves anything.

        Raises:
            UserError: there is one.
        """
        if self.path.exists() and not is_made(self.path.parent, METRICS):
            raise UserError(
                "no run of tutelage wrote this file, and the run would replace it.",
                remedy="Move it away, or name another folder.",
                file=str(self.path),
                field="output_dir",
            )


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run that may be going on: a last line that is being written is left out. Empty where there are none."""
    return list(_lines(folder / METRICS))


def _line(entry: Mapping[str, Any], seconds: float | None) -> dict[str, Any]:
    """A line of an entry of the trainer's history."""
    entry = plain(entry)
    first = {name: entry.get(name) for name in ("step", "stage", "epoch")}
    return {"event": _event(entry), **first, "seconds": seconds, **entry}


def _event(entry: Mapping[str, Any]) -> str:
    if "train_runtime" in entry:
        return "end"
    if any(name.startswith("eval_") for name in entry):
        return "eval"
    return "train" if "loss" in entry else "stage"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines up to the first that is not one: a kill tears the last one."""
    if not path.is_file():
        return
    for text in path.read_bytes().split(b"\n")[:-1]:
        try:
            line = json.loads(text)
        except ValueError:
            return
        if not isinstance(line, dict):
            return
        yield line


def _kept(path: Path, history: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A line for each entry of a history: that of the file, or a new one where the file has another."""
    found = _lines(path)
    for entry in history:
        new = _line(entry, None)
        line = next(found, None)
        is_of_it = line is not None and "seconds" in line and _without_own(line) == _without_own(new)
        yield line if line is not None and is_of_it else new


def _without_own(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in _OWN}
