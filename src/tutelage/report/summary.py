"""The summary: one row per run, and only the columns that have a value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tutelage.report.runs import require_distinct_names
from tutelage.report.verdicts import scientific, signed
from tutelage.results import Interval, RunRecord
from tutelage.visible import visible

__all__ = ["Cell", "Column", "duration", "summary_columns", "summary_table"]


@dataclass(frozen=True, slots=True)
class Cell:
    """What a run has in a column: the value as text, and its interval where it has one."""

    text: str
    interval: Interval | None = None
    digits: int = 2

    @property
    def bounds(self) -> str:
        """The interval as text, "" without one."""
        if self.interval is None:
            return ""
        low, high = (signed(bound, self.digits) for bound in (self.interval.low, self.interval.high))
        return f"{low} to {high}" if "−" in low else f"{low}–{high}"


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading, what its number is, and one cell per run, None where the run has no value."""

    heading: str
    help: str
    cells: tuple[Cell | None, ...]


_TERMINAL_COLUMNS, _TERMINAL_WIDTH = 7, 100
_COSTS = {"passes", "time", "operations", "peak memory"}


def summary_columns(runs: Sequence[RunRecord]) -> list[Column]:
    """The columns of the summary that hold at least one value, without the names of the runs.

    A column of scores that reads as the accuracy beside it, because the verifier gives whole points, is left out.
    """
    columns = [Column(heading, help, tuple(read(run) for run in runs)) for heading, help, read in _COLUMNS]
    texts = {column.heading: [cell and cell.text for cell in column.cells] for column in columns}
    repeated = {h for h in texts if "score" in h and texts[h] == texts[h.replace("score", "accuracy")]}
    return [column for column in columns if any(column.cells) and column.heading not in repeated]


def summary_table(runs: Sequence[RunRecord]) -> Table:
    """The summary for a terminal of 100 columns: one row per run, with the 95% intervals below the values.

    Where there are more columns than have room, what the runs cost is left to the page, and then the last ones are.

    Raises:
        UserError: no runs, or two of the same name.
    """
    require_distinct_names(runs)
    columns = summary_columns(runs)
    if len(columns) > _TERMINAL_COLUMNS:
        columns = [column for column in columns if column.heading not in _COSTS]
    wide = Console(width=10 * _TERMINAL_WIDTH)
    while wide.measure(table := _table(runs, columns)).maximum > _TERMINAL_WIDTH and columns:
        columns = columns[:-1]
    return table


def _table(runs: Sequence[RunRecord], columns: Sequence[Column]) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        caption="95% intervals below the values" if any(_has_interval(column) for column in columns) else None,
        caption_justify="left",
    )
    table.add_column("run", overflow="fold", max_width=20)
    for column in columns:
        table.add_column(column.heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for index, run in enumerate(runs):
        cells = [_terminal(column.cells[index]) for column in columns]
        table.add_row(Text(visible(run.name, lines=False)), *cells)  # Text: a name is no markup
    return table


def duration(seconds: float) -> str:
    """Seconds for people to read.

    >>> duration(8.25), duration(75), duration(7530)
    ('8.2 s', '1 min 15 s', '2 h 05 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _has_interval(column: Column) -> bool:
    return any(cell is not None and cell.interval is not None for cell in column.cells)


def _terminal(cell: Cell | None) -> Text:
    if cell is None:
        return Text("–", style="dim")
    return Text.assemble(cell.text, *([("\n" + cell.bounds, "dim")] if cell.bounds else []))


def _evaluated(key: str, digits: int = 2) -> Callable[[RunRecord], Cell | None]:
    def read(run: RunRecord) -> Cell | None:
        found = run.evaluation.means.get(key) if run.evaluation else None
        return Cell(signed(found.mean, digits), found, digits) if found else None

    return read


def _passes(run: RunRecord) -> Cell | None:
    passes = run.demonstration_epochs
    return None if passes is None else Cell(f"{passes:.3g}")


def _time(run: RunRecord) -> Cell | None:
    total = run.time_s.get("total")
    return None if total is None else Cell(duration(total))


def _retained(run: RunRecord) -> Cell | None:
    """The change of the other task's score, or of its log-prob where no verifier scored it."""
    change = run.retention.change if run.retention else {}
    found = next(
        (change[key] for key in ("sampled_score", "greedy_score", "demonstration_logp") if key in change), None
    )
    return Cell(("+" if found.mean > 0 else "") + signed(found.mean), found) if found else None


def _operations(run: RunRecord) -> Cell | None:
    total = run.flops.get("total")
    return None if total is None else Cell(scientific(total))


def _memory(run: RunRecord) -> Cell | None:
    peak = run.peak_memory_bytes
    return None if peak is None else Cell(f"{peak / 2**30:.2f} GiB")


_COLUMNS = (
    ("passes", "Times the run went through the demonstrations", _passes),
    ("sampled accuracy", "Share of prompts whose sampled answer is right", _evaluated("accuracy_sampled")),
    ("greedy accuracy", "Share of prompts whose greedy answer is right", _evaluated("accuracy_greedy")),
    ("sampled score", "Mean verifier score of the sampled answers", _evaluated("score_sampled")),
    ("greedy score", "Mean verifier score of the greedy answers", _evaluated("score_greedy")),
    (
        "demonstration log-prob",
        "Log-prob of held-out demonstrations, nats per sequence",
        _evaluated("demonstration_logp"),
    ),
    (
        "distinct right answers",
        "Different right answers among the sampled answers to a prompt",
        _evaluated("distinct_right"),
    ),
    ("KL to the start", "Mean log-ratio of the sampled answers to the start, nats per sequence", _evaluated("kl")),
    (
        "retention change",
        "Change of the other task's score since the start (its log-prob, in nats, where no verifier scored it)",
        _retained,
    ),
    (
        "preference accuracy",
        "Share of preference pairs that the implicit reward puts in the right order",
        _evaluated("preference_accuracy"),
    ),
    (
        "reward accuracy",
        "Share of rows whose demonstration the learned reward puts above the policy's sampled answer",
        _evaluated("reward_accuracy"),
    ),
    (
        "preference reward accuracy",
        "Share of preference pairs that the learned reward puts in the right order",
        _evaluated("preference_reward_accuracy"),
    ),
    ("time", "Wall-clock time of training, sampling included", _time),
    ("operations", "Floating-point operations of training, sampling included: an estimate", _operations),
    ("peak memory", "Most memory in use at once", _memory),
)
