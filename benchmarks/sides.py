"""The two sides of a comparison: each in a fresh process of its own, taking turns.

A side is a function ``side(work, turns)``. It sets itself up, calls ``turns.weights_loaded()`` when its model is in memory, and
then works whenever it is its turn:

    while turns.begin():
        ...                       # one repetition
        turns.end(tokens=512)

``begin`` waits until the other side has finished its repetition, so that both meet the same machine, and returns False
when the measurement is over. A side that trains with a ``transformers.Trainer`` hands over ``turns.callback()``: each optimizer
step is a repetition.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback

from benchmarks.allocator import use_allocator
from benchmarks.workloads import Work

__all__ = ["Measured", "Turns", "compare"]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a side reported.

    Attributes:
        seconds: of each repetition that counts.
        tokens: what each repetition said it worked on or produced; empty if the side did not say.
        peak_bytes: highest resident memory from ``weights_loaded`` to the end, over what was resident then.
        settings: what the side chose for itself.
    """

    seconds: list[float]
    tokens: list[int]
    peak_bytes: int
    settings: dict[str, Any]

    @property
    def median(self) -> float:
        """Seconds; per token where tokens are known, because sides that sample do not draw equally many."""
        if self.tokens:
            return statistics.median(s / t for s, t in zip(self.seconds, self.tokens, strict=True))
        return statistics.median(self.seconds)


class Turns:
    """A side's view of the measurement; see the module."""

    def __init__(self, orders: TextIO, reports: TextIO):
        self._orders, self._reports = orders, reports
        self._settings: dict[str, Any] = {}
        self._baseline, self._begun = 0, 0.0

    def weights_loaded(self, **settings: Any) -> None:
        """Memory counts from here; ``settings`` stand in the table."""
        self._settings = settings
        self._baseline = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew

    def begin(self) -> bool:
        """Wait for the turn and start the clock; False when there are no more turns."""
        self._report(event="ready")
        if not self._orders.readline():
            return False
        self._begun = time.perf_counter()
        return True

    def end(self, tokens: int | None = None) -> None:
        """Stop the clock; ``tokens``: what the repetition worked on or produced."""
        seconds = time.perf_counter() - self._begun
        self._report(
            event="done",
            seconds=seconds,
            tokens=tokens,
            peak_bytes=_resident("VmHWM") - self._baseline,
            settings=self._settings,
        )

    def callback(self) -> TrainerCallback:
        """Makes every optimizer step of a trainer a repetition. The first one holds what comes before it, so drop it."""
        return _StepByStep(self)

    def _report(self, **report: Any) -> None:
        self._reports.write(json.dumps(report) + "\n")
        self._reports.flush()


class _StepByStep(TrainerCallback):
    def __init__(self, turns: Turns):
        self.turns = turns

    def on_train_begin(self, args, state, control, **kwargs):
        control.should_training_stop = not self.turns.begin()

    def on_step_end(self, args, state, control, **kwargs):
        self.turns.end()
        control.should_training_stop = not self.turns.begin()


def compare(
    sides: Sequence[str], work: Work, *, repeats: int, warmups: int, allocators: Sequence[str] | None = None
) -> list[Measured]:
    """Run sides against each other, A B A B …, each in a fresh process.

    Args:
        sides: "module:function" below ``benchmarks``.
        repeats, warmups: repetitions that count, and those before them that do not.
        allocators: of ``benchmarks.allocator``, one a side; all "kept" by default.

    Raises:
        RuntimeError: a side stopped early; its own words are above.
    """
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(_process(side, work, allocator))
            for side, allocator in zip(sides, allocators or ["kept"] * len(sides), strict=True)
        ]
        for process in running:
            _next(process, "ready")
        rounds = []
        for _ in range(warmups + repeats):
            reports = []
            for process in running:
                process.stdin.write("go\n")
                process.stdin.flush()
                reports.append(_next(process, "done"))
                _next(process, "ready")
            rounds.append(reports)
    counted = list(zip(*rounds[warmups:], strict=True))
    return [
        Measured(
            seconds=[report["seconds"] for report in reports],
            tokens=[report["tokens"] for report in reports if report["tokens"]],
            peak_bytes=reports[-1]["peak_bytes"],
            settings=reports[-1]["settings"],
        )
        for reports in counted
    ]


@contextlib.contextmanager
def _process(side: str, work: Work, allocator: str) -> Iterator[subprocess.Popen]:
    with tempfile.TemporaryDirectory() as folder:
        order = json.dumps(dataclasses.asdict(work))
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sides", side, order, allocator],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": folder},
        )
        try:
            yield process
            assert process.stdin is not None
            process.stdin.close()  # no more turns
            process.wait(timeout=60)
        finally:
            process.kill()
            process.wait()


def _next(process: subprocess.Popen, event: str) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a side stopped early: {' '.join(process.args)}")
    report = json.loads(line)
    assert report["event"] == event, f"expected {event}, got {report}"
    return report


def _resident(field: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (at the most) of this process; Linux only."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    """One side: what it prints goes to standard error, its reports to standard output."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, function = sys.argv[1].split(":")
    use_allocator(sys.argv[3])
    side = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    side(Work(**json.loads(sys.argv[2])), Turns(sys.stdin, reports))


if __name__ == "__main__":
    main()
