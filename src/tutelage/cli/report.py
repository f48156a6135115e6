"""tutelage report: one page that compares runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tutelage.cli.parser import command_parser
from tutelage.cli.unfinished import load_run
from tutelage.errors import UserError
from tutelage.files import storing
from tutelage.report import is_report, summary_table, verdicts, write_report
from tutelage.results import RunRecord
from tutelage.terminal import say, show

__all__ = ["find_starts", "main", "short_labels", "show_runs"]


def main(args: Sequence[str], console: Console) -> None:
    """Write one HTML page that compares runs."""
    parser = command_parser("report", main.__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="Run folders, or their results.json. A run may still be going on."
    )
    parser.add_argument("--output", default="report.html", help="The page to write.")
    options = parser.parse_args(args)
    _require_page(Path(options.output))
    records = [load_run(run) for run in options.runs]
    names = [record.name for record in records]
    for record, label in zip(records, short_labels(options.runs), strict=True):
        if names.count(record.name) > 1:  # two runs of one algorithm: their folders tell them apart
            record.name = label
    find_starts(records, options.runs)
    show_runs(records, Path(options.output), console)


def _require_page(path: Path) -> None:
    """Refuse to replace what is no report of ours.

    Raises:
        UserError: there is a folder, or a file that `tutelage report` did not write.
    """
    if path.is_dir():
        raise UserError("is a folder.", remedy="Name a file.", file=str(path), field="output")
    if not path.exists():
        return
    with path.open("rb") as file:
        ours = is_report(file.read(4096).decode("utf-8", "replace"))
    if not ours:
        raise UserError(
            "the file exists, and is no report.", remedy="Give another name.", file=str(path), field="output"
        )


def find_starts(records: Sequence[RunRecord], folders: Sequence[str]) -> None:
    """A run whose model is another one's folder started from that one, if its record does not say."""
    ids = {Path(folder).resolve(): record.id for folder, record in zip(folders, records, strict=True)}
    for record in records:
        start = ids.get(Path(record.model).resolve())
        if record.start is None and record.algorithm != "base" and start != record.id:
            record.start = start


def show_runs(records: Sequence[RunRecord], path: Path, console: Console) -> None:
    """Write the report; print the table, the verdicts and where the report is."""
    with storing(path):
        write_report(records, path)
    show(console, summary_table(records))
    for sentence in verdicts(records):
        say(console, sentence)
    say(console, f"report: {path}")


def short_labels(names: Sequence[str]) -> list[str]:
    """Short different names: the last parts of the paths, numbered where they are alike."""
    labels: list[str] = []
    for name in names:
        label = Path(name).name or name
        labels.append(
            label if label not in labels else f"{label}-{sum(other.startswith(label) for other in labels) + 1}"
        )
    return labels
