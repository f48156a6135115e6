"""Progress in the terminal: what is running, how far it is, and how long it will still take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from transformers import TrainerCallback

from tutelage.errors import UserError
from tutelage.files import write_json
from tutelage.report.summary import duration
from tutelage.terminal import say
from tutelage.visible import visible

__all__ = ["PROGRESS", "LogLines", "TerminalProgress"]

PROGRESS = "progress.json"
"""File in a run's folder that says what runs now; it is there as long as something does."""

_SHOWN = {
    "loss": "loss",
    "logps/demonstrations": "log π(demo)",
    "logps/samples": "log π(sample)",
    "rewards/margin": "margin",
    "rewards/accuracy": "accuracy",
    "reward/steps": "reward steps",
    "reward/accuracy": "reward accuracy",
    "validation/accuracy": "validation accuracy",
    "validation/kl": "KL to the start",
    "validation/verifier_score": "verifier score",
    "policy/phase": "policy phase",
    "policy/reward": "reward",
    "policy/kl": "KL",
    "policy/clip_fraction": "clip fraction",
    "pairs/dropped": "dropped",
    "samples/truncated_fraction": "truncated",
    "length/samples": "sample length",
    "eval_demonstration_logp": "held-out log π(demo)",
    "eval_accuracy_sampled": "held-out accuracy",
    "eval_preference_accuracy": "pair accuracy",
}


class TerminalProgress:
    """Two live lines: the run with its remaining time, and the current phase.

    Where the output is no terminal, a line is printed when a piece of work begins, and one every ``every`` seconds (more
    rarely after twenty minutes, every ten minutes after some hours) that says how far it is and how long it will still take.
    A thread of its own prints it where the work reports nothing. With ``tell_in`` the same is in a file, for those who look at
    the run from elsewhere.

    Args:
        console: where to draw.
        name: what the run is called.
        every: seconds between two lines.
        tell_every: seconds between two writes of the file.
        clock: seconds, from any start.
    """

    def __init__(
        self,
        console: Console,
        name: str,
        *,
        every: float = 30.0,
        tell_every: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.console, self.name, self.every, self.clock = console, visible(name, lines=False), every, clock
        self.tell_every = tell_every
        self._path: Path | None = None
        self._told = clock()
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", style="progress.description", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._run = self._bars.add_task(self.name, total=None, left="")
        self._steps: _Pace | None = None
        self._phases: list[_Pace] = []
        self._begun = self._last_line = clock()
        self._lock = threading.RLock()
        self._closed = threading.Event()

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        threading.Thread(target=self._keep_telling, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._bars.stop()
        with self._lock:
            path, self._path = self._path, None
        if path is not None:
            with suppress(OSError):  # the folder may be gone
                path.unlink(missing_ok=True)

    def tell_in(self, folder: Path) -> None:
        """Keep ``progress.json`` in a folder up to date, until the work is over.

        Raises:
            UserError: it cannot be written.
        """
        write_json(folder / PROGRESS, self.now())
        self._path = folder / PROGRESS

    def now(self) -> dict[str, Any]:
        """What runs now: the phases, the outermost first, and the optimizer steps, each with its seconds left if known."""
        with self._lock:
            return {
                "now": str(self._phases[-1] if self._phases else self._steps or "beginning"),
                "steps": self._steps.told() if self._steps else None,
                "phases": [pace.told() for pace in self._phases],
                "updated": datetime.now().astimezone().isoformat(timespec="seconds"),
            }

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        pace = _Pace(name, self.clock, total)
        with self._lock:
            self._phases.append(pace)
            self._say(f"{name} ({total})" if total else name)
        task = self._bars.add_task(f"  {visible(name, lines=False)}", total=total, left="")

        def advance(done: int) -> None:
            pace.done = done
            self._bars.update(task, completed=done, left=pace.left)
            self.tick()

        try:
            yield advance
        finally:
            with self._lock:
                self._phases.remove(pace)
            self._bars.remove_task(task)

    def steps(self, done: int, total: int) -> None:
        if self._steps is None:
            # Measured over whole steps from the run's start, so it counts the stages' sampling too.
            self._steps = _Pace("step", self.clock, total, first=done)
        self._steps.done, self._steps.total = done, total
        self._bars.update(self._run, completed=done, total=total, left=self._steps.left)
        self.tick()

    def tick(self) -> None:
        """Print how far it is, if no terminal shows it and the last line is ``every`` seconds old."""
        with self._lock:
            current = self._phases[-1] if self._phases else self._steps
            every = max(self.every, min(600.0, (self.clock() - self._begun) / 40))
            if current is not None and self.clock() - self._last_line >= every:
                self._say(str(current))
            if self._path is not None and self.clock() - self._told >= self.tell_every:
                self._told = self.clock()
                with suppress(UserError):  # a full disk is told by what the run itself writes
                    write_json(self._path, self.now())

    def _say(self, text: str) -> None:
        if not self.console.is_terminal:
            say(self.console, f"{self.name}: {text}")
            self._last_line = self.clock()

    def _keep_telling(self) -> None:
        while not self._closed.wait(1.0):
            self.tick()


class _Pace:
    """How far a piece of work is, and how long it still takes at the pace so far."""

    def __init__(self, name: str, clock: Callable[[], float], total: int | None, first: int = 0):
        self.name, self.clock, self.total, self.first = name, clock, total, first
        self.begun, self.done = clock(), first

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far; None where that cannot be told."""
        if not self.total or not self.first < self.done <= self.total:
            return None
        pace = (self.clock() - self.begun) / (self.done - self.first)
        return pace * (self.total - self.done)

    @property
    def left(self) -> str:
        """'about 3 min left'; nothing where that cannot be told, or nothing is left."""
        return f"about {duration(self.seconds_left)} left" if self.seconds_left else ""

    def told(self) -> dict[str, Any]:
        """As JSON types."""
        left, spent = self.seconds_left, self.clock() - self.begun
        return {
            "name": self.name,
            "done": self.done,
            "total": self.total,
            "seconds": round(spent, 1),
            "seconds_left": None if left is None else round(left, 1),
        }

    def __str__(self) -> str:
        spent = f"{duration(self.clock() - self.begun)} so far"
        far = f"{self.name} {self.done}/{self.total}" if self.total and self.done else self.name
        return ", ".join(part for part in (far, self.left or spent) if part)


class LogLines(TrainerCallback):
    """A short line for each log of the trainer, with the most important metrics."""

    def __init__(self, console: Console):
        self.console = console

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = [f"{label} {_number(logs[name])}" for name, label in _SHOWN.items() if logs and name in logs]
        if shown:
            stage = f" stage {logs['stage']}" if logs and "stage" in logs else ""
            say(self.console, (f"  step {state.global_step}{stage}", "dim"), "  " + "  ".join(shown))


def _number(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
