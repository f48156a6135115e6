"""The two sides of a comparison: each in a fresh process of its own, taking turns.

A side is a function ``side(work, turns)``. It sets itself up, calls ``turns.weights_loaded()`` when its model is in memory, and
then works whenever it is its turn:

    while turns.begin():
        ...                       # one repetition
        turns.end(tokens=512)

``begin`` waits until the other side has finished its repetition, so that both meet the same machine, and returns False
when the measurement is over. A side that trains with a ``transformers.Trainer`` hands over ``turns.callback()``: each optimizer
step is a repetition.

A side may come from another checkout of this repository: its process runs that checkout's own ``benchmarks`` and ``tutelage``.
This protocol (the command line of ``main``, "go" on standard input, "ready" and "done" as JSON lines on standard output) is
what they have in common, so a change to it ends comparisons with older checkouts.
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
from tutelage.errors import UserError

__all__ = ["HERE", "Measured", "Turns", "check_checkout", "compare"]

HERE = Path(__file__).resolve().parents[1]
"""This checkout."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a side reported.

    Attributes:
        seconds: of each repetition that counts.
        tokens: what each repetition said it worked on or produced; empty if the side did not say.
        peak_bytes: highest resident memory from ``weights_loaded`` to the end, over what was resident then.
        settings: what the side chose for itself.
        cpu_seconds: of each repetition that counts: processor time of all threads of the side's process. On a machine that
            others use too it says more than the clock.
    """

    seconds: list[float]
    tokens: list[int]
    peak_bytes: int
    settings: dict[str, Any]
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds; per token where tokens are known, because sides that sample do not draw equally many."""
        return statistics.median(self.per_token(self.seconds))

    def per_token(self, seconds: Sequence[float]) -> list[float]:
        """Each of ``seconds`` divided by the tokens of its repetition; as they are where no tokens are known."""
        if not self.tokens:
            return list(seconds)
        return [s / t for s, t in zip(seconds, self.tokens, strict=True)]


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
    sides: Sequence[str],
    work: Work,
    *,
    repeats: int,
    warmups: int,
    allocators: Sequence[str] | None = None,
    checkouts: Sequence[Path] | None = None,
    threads: int | None = None,
) -> list[Measured]:
    """Run sides against each other, A B A B …, each in a fresh process.

    Args:
        sides: "module:function" below ``benchmarks``.
        repeats, warmups: repetitions that count, and those before them that do not.
        allocators: of ``benchmarks.allocator``, one per side; all "kept" by default.
        checkouts: folders whose ``benchmarks`` and ``src`` a side runs, one per side; this checkout by default.
        threads: of each side; by default as many as torch chooses.

    Raises:
        RuntimeError: a side stopped early; its own words are above.
    """
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(_process(side, work, allocator, checkout, threads))
            for side, allocator, checkout in zip(
                sides, allocators or ["kept"] * len(sides), checkouts or [HERE] * len(sides), strict=True
            )
        ]
        for process in running:
            _next(process, "ready")
        rounds = []
        for _ in range(warmups + repeats):
            reports = []
            for process in running:
                before = _cpu_seconds(process.pid)
                process.stdin.write("go\n")
                process.stdin.flush()
                reports.append(_next(process, "done"))
                reports[-1]["cpu_seconds"] = _cpu_seconds(process.pid) - before
                _next(process, "ready")
            rounds.append(reports)
    counted = list(zip(*rounds[warmups:], strict=True))
    return [
        Measured(
            seconds=[report["seconds"] for report in reports],
            tokens=[report["tokens"] for report in reports if report["tokens"]],
            peak_bytes=reports[-1]["peak_bytes"],
            settings=reports[-1]["settings"],
            cpu_seconds=[report["cpu_seconds"] for report in reports],
        )
        for reports in counted
    ]


@contextlib.contextmanager
def _process(side: str, work: Work, allocator: str, checkout: Path, threads: int | None) -> Iterator[subprocess.Popen]:
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sides", side, _order(work), allocator],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env={
                **_environment(checkout),
                "HF_HUB_OFFLINE": "1",
                "TMPDIR": folder,
                **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
            },
        )
        try:
            yield process
            assert process.stdin is not None
            process.stdin.close()  # no more turns
            process.wait(timeout=60)
        finally:
            process.kill()
            process.wait()


def _order(work: Work) -> str:
    """The work as JSON, without the fields that have their default: an older checkout may not know all of them."""
    given = dataclasses.asdict(work)
    defaults = {field.name: field.default for field in dataclasses.fields(work)}
    return json.dumps({name: value for name, value in given.items() if value != defaults[name]})


def _environment(checkout: Path) -> dict[str, str]:
    """Of a process that imports the checkout's own ``benchmarks`` and ``tutelage``, whatever is installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout / "src"), str(checkout)])}


def check_checkout(checkout: Path) -> None:
    """See to it that a side in this folder would run the folder's own sources.

    Raises:
        UserError: it has none, or another installation goes before them.
    """
    if not (checkout / "benchmarks" / "sides.py").exists() or not (checkout / "src" / "tutelage").is_dir():
        raise UserError(
            "this is no checkout with benchmarks: benchmarks/sides.py or src/tutelage is missing.",
            remedy="Make one with `git worktree add FOLDER COMMIT`.",
            file=str(checkout),
        )
    for package in ("tutelage", "benchmarks"):
        code = f"import importlib.util; print(importlib.util.find_spec({package!r}).origin)"
        command = [sys.executable, "-c", code]
        run = subprocess.run(
            command, cwd=checkout, env=_environment(checkout), check=True, stdout=subprocess.PIPE, text=True
        )
        if not Path(run.stdout.strip()).resolve().is_relative_to(checkout.resolve()):
            raise UserError(
                f"Python would import {package} from {run.stdout.strip()} and not from the checkout.",
                remedy="Run the benchmark from an environment that has it installed in no other way than by path.",
                file=str(checkout),
            )


def _cpu_seconds(pid: int) -> float:
    """Processor time of a process and its threads so far, in user and kernel mode; Linux only."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
