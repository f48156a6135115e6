"""Inspect a dataset before training: counts, lengths, and what the model will see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean

from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tutelage.data.demonstrations import Turns
from tutelage.data.tokenization import Tokenization
from tutelage.data.tokenized import DataSummary, tokenized_rows
from tutelage.errors import UserError
from tutelage.groups import Group
from tutelage.terminal import label, show
from tutelage.visible import visible

__all__ = ["Example", "Inspection", "Lengths", "Segment", "inspect_dataset", "print_inspection"]

NUM_EXAMPLES = 3
NUM_BINS = 10
MAX_SHOWN = 1200  # characters of a prompt or a completion


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens, before anything is truncated or dropped.

    Attributes:
        minimum, median, mean, p95, maximum: of the lengths; median and 95th percentile are lengths that occur.
        limit: the length limit; longer completions are truncated, longer prompts are too long.
        histogram: (first length, last length, how many) of bins of equal width, from the shortest to the longest.
    """

    minimum: int
    median: int
    mean: float
    p95: int
    maximum: int
    limit: int
    histogram: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, lengths: Sequence[int], limit: int) -> Lengths:
        """Summarize at least one length.

        >>> Lengths.of([1, 2, 2, 5], limit=4).histogram
        ((1, 1, 1), (2, 2, 2), (3, 3, 0), (4, 4, 0), (5, 5, 1))
        """
        ordered = sorted(lengths)
        width = -(-(ordered[-1] - ordered[0] + 1) // NUM_BINS)
        starts = range(ordered[0], ordered[-1] + 1, width)
        return cls(
            minimum=ordered[0],
            median=_percentile(ordered, 50),
            mean=fmean(ordered),
            p95=_percentile(ordered, 95),
            maximum=ordered[-1],
            limit=limit,
            histogram=tuple(
                (start, start + width - 1, sum(start <= length < start + width for length in ordered))
                for start in starts
            ),
        )


def _percentile(ordered: Sequence[int], percent: int) -> int:
    return ordered[-(-len(ordered) * percent // 100) - 1]


@dataclass(frozen=True)
class Segment:
    """A piece of a tokenized text: one special token, or the text between two of them."""

    text: str
    special: bool


@dataclass(frozen=True)
class Example:
    """A demonstration as the model sees it; ``number`` is its row's number in the source, from 1."""

    number: int
    prompt: tuple[Segment, ...]
    completion: tuple[Segment, ...]
    finished: bool


@dataclass(frozen=True)
class Inspection:
    """What ``inspect_dataset`` found.

    Attributes:
        source: file or dataset.
        summary: counts. ``long_prompts`` counts the prompts beyond the limit, whatever ``on_long_prompt`` says.
        prompts, completions: their lengths, those of prompts that are too long included.
        examples: the first demonstrations that would be trained on.
        on_long_prompt: what training would do with prompts that are too long: ``"error"`` or ``"drop"``.
    """

    source: str
    summary: DataSummary
    prompts: Lengths
    completions: Lengths
    examples: tuple[Example, ...]
    on_long_prompt: str


def inspect_dataset(
    dataset: Dataset | IterableDataset,
    tokenization: Tokenization,
    *,
    turns: Turns = "last",
    source: str = "dataset",
) -> Inspection:
    """Read and tokenize the whole dataset, as training would, and count.

    Prompts that are too long are counted and never raise, so that a limit can be chosen from what is seen.

    Raises:
        UserError: as ``tokenize_dataset`` for the first bad row; or there is no demonstration.
    """
    read, summary, examples = DataSummary(), DataSummary(), []
    prompt_lengths, completion_lengths = [], []
    limit = tokenization.max_completion_length
    whole = replace(tokenization, max_prompt_length=_NO_LIMIT, max_completion_length=_NO_LIMIT)
    for row in tokenized_rows(dataset, whole, turns=turns, source=source, summary=read):
        prompt_ids, (completion,) = row.group.prompt_ids, row.group.completions
        prompt_lengths.append(len(prompt_ids))
        completion_lengths.append(len(completion.token_ids))
        if len(prompt_ids) > tokenization.max_prompt_length:
            summary.long_prompts += 1
            continue
        finished = len(completion.token_ids) <= limit
        summary.demonstrations += 1
        summary.pairs += row.pair is not None and _differ(row.pair, limit)
        summary.truncated += not finished
        if len(examples) < NUM_EXAMPLES:
            prompt = _segments(prompt_ids, tokenization)
            answer = _segments(completion.token_ids[:limit], tokenization)
            examples.append(Example(row.demonstration.number, prompt, answer, finished))
    summary.rows, summary.empty, summary.unwanted = read.rows, read.empty, read.unwanted
    if not prompt_lengths:
        raise UserError("no row holds a demonstration.", file=source)
    return Inspection(
        source=source,
        summary=summary,
        prompts=Lengths.of(prompt_lengths, tokenization.max_prompt_length),
        completions=Lengths.of(completion_lengths, tokenization.max_completion_length),
        examples=tuple(examples),
        on_long_prompt=tokenization.on_long_prompt,
    )


_NO_LIMIT = 2**31


def _differ(pair: Group, limit: int) -> bool:
    """Whether the two answers still differ once they are truncated."""
    preferred, rejected = (completion.token_ids[:limit] for completion in pair.completions)
    return preferred != rejected


def _segments(token_ids: Sequence[int], tokenization: Tokenization) -> tuple[Segment, ...]:
    segments = []
    for special, run in groupby(token_ids, key=tokenization.special_ids.__contains__):
        ids = list(run)
        pieces = [[token_id] for token_id in ids] if special else [ids]
        segments += [Segment(tokenization.text(piece, skip_special_tokens=False), special) for piece in pieces]
    return tuple(segments)


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Show an inspection as one page: counts, lengths, examples.

    Data is shown literally: neither markup nor control characters in it reach the terminal.
    """
    show(console, _counts(inspection))
    if inspection.summary.long_prompts and inspection.on_long_prompt == "error":
        remedy = (
            "Training would stop at them: raise --max_prompt_length, or leave them out with --on_long_prompt drop."
        )
        show(console, Text(f"Prompts too long: {inspection.summary.long_prompts:,}. {remedy}", style="bold red"))
    for title, lengths in (("Prompts", inspection.prompts), ("Completions", inspection.completions)):
        show(console, _length_line(title, lengths))
        show(console, _histogram(lengths))
    for example in inspection.examples:
        show(console, _example_panel(example))


def _counts(inspection: Inspection) -> Table:
    summary = inspection.summary
    table = Table(title=label(inspection.source), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("rows", f"{summary.rows:,}", "")
    table.add_row("demonstrations", f"{summary.demonstrations:,}", "that training would use")
    table.add_row("preference pairs", f"{summary.pairs:,}", "for evaluation; training reads the preferred side alone")
    table.add_row(
        "truncated completions", f"{summary.truncated:,}", f"longer than {inspection.completions.limit} tokens"
    )
    for reason, count in summary.dropped.items():
        table.add_row("left out", Text(f"{count:,}", style="yellow"), reason)
    return table


def _length_line(title: str, lengths: Lengths) -> Text:
    statistics = (
        f"min {lengths.minimum}, median {lengths.median}, mean {lengths.mean:.1f}, "
        f"95% within {lengths.p95}, max {lengths.maximum}; limit {lengths.limit}"
    )
    return Text.assemble("\n", (f"{title}, in tokens: ", "bold"), statistics)


def _histogram(lengths: Lengths) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(justify="right", style="dim")
    table.add_column(justify="right")
    table.add_column(no_wrap=True)
    most = max(count for _, _, count in lengths.histogram)
    for first, last, count in lengths.histogram:
        bar = "█" * -(-40 * count // most)
        table.add_row(f"{first}–{last}", f"{count:,}", Text(bar, style="red" if first > lengths.limit else "blue"))
    return table


def _example_panel(example: Example) -> Panel:
    text = _shorten(_styled(example.prompt, "cyan"))
    text.append(_shorten(_styled(example.completion, "green")))
    if not example.finished:
        text.append(" ✂ truncated here", style="bold red")
    return Panel(
        text,
        title=Text.assemble(
            f"row {example.number}: prompt ",
            ("■", "cyan"),
            " completion ",
            ("■", "green"),
            " special tokens ",
            (" ■ ", "reverse"),
        ),
    )


def _styled(segments: Sequence[Segment], style: str) -> Text:
    parts = [(visible(part.text), f"bold reverse {style}" if part.special else style) for part in segments]
    return Text.assemble(*parts)


def _shorten(text: Text) -> Text:
    if len(text) <= MAX_SHOWN:
        return text
    half = MAX_SHOWN // 2
    left_out = Text(f" … {len(text) - 2 * half:,} characters … ", style="dim italic")
    return Text.assemble(text[:half], left_out, text[-half:])
