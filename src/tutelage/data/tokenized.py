"""The demonstrations of a dataset as tokens, and what became of its rows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets

from tutelage.data.demonstrations import Demonstration, Turns, holds_prompts_alone, read_prompts, read_rows
from tutelage.data.origin import located
from tutelage.data.teacher_prompt import TeacherPrompt
from tutelage.data.tokenization import Tokenization
from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role

__all__ = [
    "FEATURES",
    "DataSummary",
    "TokenizedPrompt",
    "TokenizedRow",
    "group_from_row",
    "preference_group_from_row",
    "row_of_group",
    "tokenize_dataset",
    "tokenized_prompts",
    "tokenized_rows",
]

logger = logging.getLogger(__name__)


@dataclass
class DataSummary:
    """What became of the rows of a dataset, counted while they were tokenized.

    Attributes:
        rows: rows read.
        demonstrations: demonstrations kept.
        pairs: how many of them can be compared with a rejected answer.
        truncated: how many of them were truncated at the length limit.
        empty: rows left out because the last turn of a dialogue in text is empty.
        unwanted: rows left out because their label says that the answer was not wanted.
        long_prompts: demonstrations left out because their prompt is too long.
        long_teacher_prompts: those left out because the prompt that a teacher sees is too long.
    """

    rows: int = 0
    demonstrations: int = 0
    pairs: int = 0
    truncated: int = 0
    empty: int = 0
    unwanted: int = 0
    long_prompts: int = 0
    long_teacher_prompts: int = 0

    @property
    def dropped(self) -> dict[str, int]:
        """Why something was left out, and how often; empty if nothing was."""
        reasons = {
            "empty last turn of a dialogue": self.empty,
            "labelled false": self.unwanted,
            "prompt too long": self.long_prompts,
            "prompt of the teacher too long": self.long_teacher_prompts,
        }
        return {reason: count for reason, count in reasons.items() if count}


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A demonstration as it was read and as tokens.

    Attributes:
        demonstration: as it was read, with the row's other columns.
        group: its prompt and the demonstration.
        pair: the prompt with the preferred and the rejected answer, if the row has both and they differ.
    """

    demonstration: Demonstration
    group: Group
    pair: Group | None


def tokenized_rows(
    dataset: Dataset | IterableDataset,
    tokenization: Tokenization,
    *,
    turns: Turns = "last",
    source: str = "dataset",
    summary: DataSummary | None = None,
    seen_by_teacher: TeacherPrompt | None = None,
) -> Iterator[TokenizedRow]:
    """Read and tokenize a dataset's demonstrations one by one; the way from rows to groups that everything takes.

    Args:
        dataset: of a recognized format, map-style or streamed.
        turns: as in ``read_row``.
        source: file or dataset, for messages to people.
        summary: is counted up as rows are read.
        seen_by_teacher: makes a second view of each prompt; None for none.

    Yields:
        every demonstration that remains: those with a prompt that is too long, in either view, are left out or raise, as
        ``tokenization`` says.

    Raises:
        UserError: as ``read_rows`` and ``Tokenization.group`` for the first bad row.
    """
    summary = DataSummary() if summary is None else summary
    left_out: Counter[str] = Counter()
    read = read_rows(dataset, turns=turns, source=source, columns=tokenization.columns, left_out=left_out)
    for index, demonstrations in enumerate(read):
        summary.rows += 1
        if not demonstrations:
            summary.empty += left_out.pop("empty", 0)
            summary.unwanted += left_out.pop("unwanted", 0)
        for demonstration in demonstrations:
            try:
                group = tokenization.group(demonstration, source=source)
                summary.long_prompts += group is None
                if group is not None and seen_by_teacher is not None:
                    seen_ids = tokenization.teacher_prompt_ids(demonstration, seen_by_teacher, source=source)
                    group = None if seen_ids is None else replace(group, teacher_prompt_ids=seen_ids)
                    summary.long_teacher_prompts += group is None
                pair = None if group is None else tokenization.pair(group, demonstration, source=source)
            except UserError as error:
                raise located(error, dataset, index) from error
            if group is None:
                continue
            summary.demonstrations += 1
            summary.pairs += pair is not None
            summary.truncated += not group.completions[0].finished
            yield TokenizedRow(demonstration, group, pair)


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt to sample from.

    Attributes:
        group: the prompt, with the demonstration that the data give, if they give one.
        conversational: whether it is a list of messages.
    """

    group: Group
    conversational: bool


def tokenized_prompts(
    dataset: Dataset | IterableDataset,
    tokenization: Tokenization,
    *,
    source: str = "dataset",
    summary: DataSummary | None = None,
) -> Iterator[TokenizedPrompt]:
    """The prompts of a dataset of a recognized format, or of one that holds a ``prompt`` column and no answers.

    Args:
        summary: is counted up; what is left out is logged once all are read.

    Raises:
        UserError: as ``tokenized_rows``; or a prompt is no text and no list of messages.
    """
    columns, summary = tokenization.columns, DataSummary() if summary is None else summary
    if not holds_prompts_alone(dataset, columns):
        for row in tokenized_rows(dataset, tokenization, source=source, summary=summary):
            yield TokenizedPrompt(row.group, row.demonstration.conversational)
        log_dropped(summary, source)
        return
    field = columns.prompt or "prompt"
    for index, prompt in enumerate(read_prompts(dataset, source=source, columns=columns)):
        try:
            prompt_ids = tokenization.short_prompt_ids(prompt)
        except UserError as error:
            error = UserError(error.problem, remedy=error.remedy, file=source, row=index + 1, field=field)
            raise located(error, dataset, index) from error
        summary.rows += 1
        if prompt_ids is None:
            summary.long_prompts += 1
        else:
            yield TokenizedPrompt(Group(prompt_ids, row=index), isinstance(prompt, list))
    log_dropped(summary, source)


def log_dropped(summary: DataSummary, source: str) -> None:
    """Say what was left out of a dataset, and why."""
    for reason, count in summary.dropped.items():
        logger.warning("%s: left out %d of %d: %s", source, count, summary.rows, reason)


FEATURES = Features(  # of what is tokenized; without a demonstration its tokens are an empty list
    {
        "row": Value("int64"),
        "prompt_ids": List(Value("int32")),
        "demonstration_ids": List(Value("int32")),
        "demonstration_finished": Value("bool"),
        "rejected_ids": List(Value("int32")),
        "rejected_finished": Value("bool"),
    }
)


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    tokenization: Tokenization,
    *,
    turns: Turns = "last",
    source: str = "dataset",
    summary: DataSummary | None = None,
    seen_by_teacher: TeacherPrompt | None = None,
) -> Dataset | IterableDataset:
    """The tokens of every demonstration, and of the rejected answer where there is one.

    Columns of the result: ``row``; ``prompt_ids``, ``demonstration_ids`` and ``rejected_ids``, lists of tokens, the
    last one empty without a rejected answer; ``demonstration_finished`` and ``rejected_finished``; with ``seen_by_teacher`` also
    ``teacher_prompt_ids``. ``group_from_row`` and ``preference_group_from_row`` read them. No data is cached on disk.

    Args:
        dataset: of a recognized format; streamed data is read lazily, other data entirely, now.
        tokenization: how.
        turns: as in ``read_row``.
        source: file or dataset, for messages to people.
        summary: is counted up; of streamed data, while it is read.
        seen_by_teacher: as in ``tokenized_rows``.

    Raises:
        UserError: as ``read_rows`` and ``Tokenization.group`` for the first bad row; or nothing remains.
    """
    arguments = {
        "dataset": dataset,
        "tokenization": tokenization,
        "turns": turns,
        "source": source,
        "summary": summary or DataSummary(),
        "seen_by_teacher": seen_by_teacher,
    }
    features = (
        FEATURES if seen_by_teacher is None else Features({**FEATURES, "teacher_prompt_ids": List(Value("int32"))})
    )
    if isinstance(dataset, IterableDataset):
        # One generator, hence one shard: numbering rows in shards would give two rows the same number.
        return IterableDataset.from_generator(_columns, features=features, gen_kwargs=arguments)
    rows = _columns(**arguments)
    chunks = iter(lambda: list(islice(rows, 1000)), [])  # Python's lists of tokens are large: not all at once
    tokenized = concatenate_datasets([Dataset.from_list(chunk, features=features) for chunk in chunks])
    log_dropped(arguments["summary"], source)
    return tokenized


def _columns(
    dataset: Dataset | IterableDataset, tokenization: Tokenization, source: str, summary: DataSummary, **options: Any
) -> Iterator[dict[str, Any]]:
    any_left = False
    for row in tokenized_rows(dataset, tokenization, source=source, summary=summary, **options):
        any_left = True
        yield row_of_group(row.group, row.pair)
    if not any_left:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in summary.dropped.items())
        raise UserError(
            f"no demonstration remains: {reasons}.",
            remedy=f"Look at the data or raise --max_{'teacher_' if summary.long_teacher_prompts else ''}prompt_length.",
            file=source,
        )


def row_of_group(group: Group, pair: Group | None = None) -> dict[str, Any]:
    """The columns of a prompt with its demonstration, if it has one, and with its rejected answer, if it has one."""
    demonstration = group.completions[0] if group.completions else None
    rejected = pair.completions[1] if pair else None
    return {
        "row": group.row,
        "prompt_ids": list(group.prompt_ids),
        "demonstration_ids": list(demonstration.token_ids) if demonstration else [],
        "demonstration_finished": demonstration.finished if demonstration else False,
        "rejected_ids": list(rejected.token_ids) if rejected else [],
        "rejected_finished": rejected.finished if rejected else False,
        **({} if group.teacher_prompt_ids is None else {"teacher_prompt_ids": list(group.teacher_prompt_ids)}),
    }


def group_from_row(row: Mapping[str, Any]) -> Group:
    """The prompt with its demonstration, if it has one, from a row of ``tokenize_dataset`` or ``tokenize_prompts``."""
    seen = row.get("teacher_prompt_ids")
    group = Group(tuple(row["prompt_ids"]), row=row["row"], teacher_prompt_ids=tuple(seen) if seen else None)
    if not row["demonstration_ids"]:
        return group
    demonstration = Completion(tuple(row["demonstration_ids"]), Role.DEMONSTRATION, row["demonstration_finished"])
    return group.add([demonstration])


def preference_group_from_row(row: Mapping[str, Any]) -> Group | None:
    """The prompt with its preferred and rejected answer, from a row of ``tokenize_dataset``; None without a pair."""
    if not row["rejected_ids"]:
        return None
    preferred = Completion(tuple(row["demonstration_ids"]), Role.PREFERRED, row["demonstration_finished"])
    rejected = Completion(tuple(row["rejected_ids"]), Role.REJECTED, row["rejected_finished"])
    return Group(tuple(row["prompt_ids"]), (preferred, rejected), row=row["row"])
