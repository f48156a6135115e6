"""Progress in the terminal: what runs, how far, how long still."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from transformers import TrainerCallback

from tutelage.report.summary import duration

__all__ = ["LogLines", "TerminalProgress"]

_SHOWN = {
    "loss": "loss",
    "logps/demonstrations": "log π(demo)",
    "logps/samples": "log π(sample)",
    "rewards/margin": "margin",
    "rewards/accuracy": "accuracy",
    "reward/steps": "reward steps",
    "reward/accuracy": "reward accuracy",
    "validation/accuracy": "on validation rows",
    "validation/kl": "KL to the start",
    "validation/verifier_score": "verifier score",
    "policy/phase": "policy phase",
    "policy/reward": "reward",
    "policy/kl": "KL",
    "policy/clip_fraction": "clipped",
    "pairs/dropped": "dropped",
    "samples/truncated_fraction": "cut share",
    "length/samples": "sample length",
    "eval_demonstration_logp": "held-out log π(demo)",
    "eval_accuracy_sampled": "held-out accuracy",
    "eval_preference_accuracy": "pair accuracy",
}


class TerminalProgress:
    """Two live lines: the run with the time it still needs, and the piece of work in hand.

    Where the output is no terminal, a line is printed when a piece of work begins and at each tenth of the run.

    Args:
        console: where to draw.
        name: what the run is called.
    """

    def __init__(self, console: Console, name: str):
        self.console, self.name = console, name
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("[progress.description]{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._run = self._bars.add_task(name, total=None, left="")
        self._begun: float | None = None
        self._first = 0
        self._tenth = 0

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        if not self.console.is_terminal:
            self.console.print(f"{self.name}: {name}" + (f" ({total} prompts)" if total else ""), highlight=False)
        task = self._bars.add_task(f"  {name}", total=total, left="")
        try:
            begun = time.monotonic()

            def advance(done: int) -> None:
                pace = (time.monotonic() - begun) / max(1, done)
                left = f"about {duration(pace * (total - done))} left" if total and done < total else ""
                self._bars.update(task, completed=done, left=left)

            yield advance
        finally:
            self._bars.remove_task(task)

    def steps(self, done: int, total: int) -> None:
        if self._begun is None:
            self._begun, self._first = time.monotonic(), done
        left = ""
        if done > self._first:
            # Measured over whole steps from the run's start, so it counts the stages' sampling too.
            pace = (time.monotonic() - self._begun) / (done - self._first)
            left = f"about {duration(pace * (total - done))} left" if done < total else ""
        self._bars.update(self._run, completed=done, total=total, left=left)
        tenth = 10 * done // max(1, total)
        if not self.console.is_terminal and tenth > self._tenth:
            self.console.print(f"{self.name}: step {done}/{total} {left}".rstrip(), highlight=False)
        self._tenth = max(tenth, self._tenth)


class LogLines(TrainerCallback):
    """A short line for each log of the trainer: the quantities a person steers by."""

    def __init__(self, console: Console):
        self.console = console

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = [f"{label} {_number(logs[name])}" for name, label in _SHOWN.items() if logs and name in logs]
        if shown:
            stage = f" stage {logs['stage']}" if logs and "stage" in logs else ""
            self.console.print(f"  [dim]step {state.global_step}{stage}[/dim]  " + "  ".join(shown), highlight=False)


def _number(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
