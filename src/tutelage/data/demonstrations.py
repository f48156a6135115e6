"""Read demonstrations from rows in any supported format and check them (``tutelage.data.formats``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tutelage.data.formats import Columns, Format, detect_format, is_unwanted, read_prompt_alone, read_turns
from tutelage.data.messages import Messages, Place
from tutelage.data.origin import located, numbered
from tutelage.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from tutelage.data.columns import Peek

__all__ = [
    "Columns",
    "Demonstration",
    "Messages",
    "Turns",
    "detect_format",
    "holds_prompts_alone",
    "is_conversational",
    "read_prompts",
    "read_row",
    "read_rows",
]

Turns = Literal["last", "all"]

TURNS_PER_ROW = 1000
"""With ``turns="all"`` a demonstration's id is ``index of the row * TURNS_PER_ROW + turn``: it can be computed from
the row alone, so a streamed dataset gives the same ids as a loaded one."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt with its good answer.

    Attributes:
        prompt: text, or a list of messages, each ``{"role": ..., "content": ...}``, that ends with the user's.
        completion: what the demonstration answers; of a conversation, the content of the assistant's message.
        rejected: the dispreferred answer to the same prompt, if the data has one. Training never reads it.
        row: names the demonstration: the index of its row, from 0; see ``TURNS_PER_ROW`` for ``turns="all"``.
        number: number of its row in the dataset, counted from 1, for messages to people.
        fields: all columns of the row; verifiers read them.
    """

    prompt: str | Messages
    completion: str
    rejected: str | None
    row: int
    number: int
    fields: dict[str, Any]

    @property
    def conversational(self) -> bool:
        """True if the prompt is a list of messages."""
        return isinstance(self.prompt, list)


class _Kind:
    """What all rows of a dataset have in common: text or messages, labels or none.

    Raises:
        UserError: a row that has another kind than those before it.
    """

    def __init__(self):
        self.conversational: bool | None = None
        self.labelled: bool | None = None

    def check(self, conversational: bool, place: Place) -> None:
        if self.conversational is None:
            self.conversational = conversational
        elif self.conversational != conversational:
            raise place.error("some rows hold text and some hold lists of messages.", "Write all rows in one way.")

    def check_label(self, unwanted: bool | None, place: Place) -> None:
        labelled = unwanted is not None
        if self.labelled is None:
            self.labelled = labelled
        elif self.labelled != labelled:
            raise place.at("label").error(
                "some rows say whether the answer was wanted and some do not.", "Write true or false in every row."
            )


def read_rows(
    dataset: Dataset | IterableDataset | Peek,
    *,
    turns: Turns = "last",
    source: str = "dataset",
    columns: Columns | None = None,
    left_out: Counter[str] | None = None,
) -> Iterator[list[Demonstration]]:
    """The demonstrations of each row, one list per row, in order.

    The list is empty for a row that is left out (see ``read_row``), so that whoever reads can count them.

    Args:
        columns: those that the user named.
        left_out: counts the rows that are left out: ``empty`` (no answer), ``unwanted`` (labelled false).

    Raises:
        UserError: as ``detect_format`` and ``read_row``, or text and messages are mixed in one dataset.
    """
    format, kind = None, _Kind()
    left_out = Counter() if left_out is None else left_out
    for index, row in numbered(dataset, source):
        if format is None:
            format = detect_format(_columns_of(dataset, row), source=source, given=columns)
        place = Place(source, index + 1)
        named = (columns or Columns()).apply(row)
        try:
            demonstrations = read_row(
                row, number=index + 1, source=source, turns=turns, format=format, columns=columns, left_out=left_out
            )
            if "rejected" not in format.columns:
                kind.check_label(is_unwanted(named, place), place)
            for demonstration in demonstrations:
                kind.check(demonstration.conversational, place)
        except UserError as error:
            raise located(error, dataset, index) from error
        yield demonstrations


def is_conversational(
    dataset: Dataset | IterableDataset, *, source: str = "dataset", columns: Columns | None = None
) -> bool:
    """True if the prompts are lists of messages, which get the chat template; False if they are text.

    Raises:
        UserError: as ``read_rows``, or no row holds a demonstration.
    """
    for demonstrations in read_rows(dataset, source=source, columns=columns):
        if demonstrations:
            return demonstrations[0].conversational
    raise UserError("no row holds a demonstration.", file=source)


def holds_prompts_alone(dataset: Any, columns: Columns | None = None) -> bool:
    """True if there is a prompt and no column with an answer: something to sample from, not to learn from."""
    found = dataset.column_names or list(next(iter(dataset), ()))
    columns = columns or Columns()
    if (columns.prompt or "prompt") not in found or columns.completion or columns.messages:
        return False
    try:
        detect_format(found, given=columns)
    except UserError:
        return True
    return False


def read_prompts(
    dataset: Dataset | IterableDataset | Peek, *, source: str = "dataset", columns: Columns | None = None
) -> Iterator[str | Messages]:
    """The ``prompt`` column, row by row: text, or a list of messages that ends with the user's.

    Raises:
        UserError: names source, row and field of one that is neither, or is empty; or text and messages are mixed.
    """
    kind, columns = _Kind(), columns or Columns()
    for index, row in numbered(dataset, source):
        place = Place(source, index + 1)
        try:
            prompt = read_prompt_alone(columns.apply(row), place)
            kind.check(isinstance(prompt, list), place.at("prompt"))
        except UserError as error:
            raise located(_renamed(error, columns), dataset, index) from error
        yield prompt


def read_row(
    row: Mapping[str, Any],
    *,
    number: int,
    source: str = "dataset",
    turns: Turns = "last",
    format: Format | None = None,
    columns: Columns | None = None,
    left_out: Counter[str] | None = None,
) -> list[Demonstration]:
    """Check a row and read its demonstrations.

    Args:
        row: column names and values.
        number: the row's number in the source, from 1.
        source: file or dataset, for messages to people.
        turns: ``"last"`` reads one demonstration per row. ``"all"`` reads every assistant turn of ``messages``,
            ``conversations`` and ``real``, each with the conversation before it as its prompt; other formats have one
            all the same.
        format: what ``detect_format`` says of the columns, if it is known.
        columns: those that the user named.
        left_out: counts the row if it is left out, as for ``read_rows``.

    Returns:
        At least one demonstration; none if the row is a dialogue in text whose preferred last turn is empty, as it
        happens in data where people were asked to compare a text with silence, or if a ``label`` says that its answer
        was not wanted.

    Raises:
        UserError: names source, row and field. Unknown columns; something that should be text is not, or is empty; a
            role other than system, user and assistant; roles out of order; no assistant turn at the end.

    >>> row = {"prompt": "2 + 2 =", "completion": " 4", "level": 1}
    >>> read_row(row, number=1)
    [Demonstration(prompt='2 + 2 =', completion=' 4', rejected=None, row=0, number=1, fields={'prompt': '2 + 2 =', 'completion': ' 4', 'level': 1})]
    """
    columns = columns or Columns()
    format = format or detect_format(row, source=source, given=columns)
    place = Place(source, number)
    try:
        named = columns.apply(row)
        found = read_turns(format, named, place)
        unwanted = "rejected" not in format.columns and is_unwanted(named, place)
    except UserError as error:
        raise _renamed(error, columns) from error
    if unwanted or not found:
        if left_out is not None:
            left_out["unwanted" if unwanted else "empty"] += 1
        return []
    if turns == "last":
        ids = [number - 1]
        found = found[-1:]
    else:
        ids = range((number - 1) * TURNS_PER_ROW, number * TURNS_PER_ROW)
        if len(found) > TURNS_PER_ROW:
            raise place.error(f"the conversation has more than {TURNS_PER_ROW} assistant turns.")
    fields = dict(row)
    return [
        Demonstration(turn.prompt, turn.completion, turn.rejected, row=id, number=number, fields=fields)
        for id, turn in zip(ids, found, strict=False)
    ]


def _columns_of(dataset: Any, row: Mapping[str, Any]) -> list[str]:
    return list(dataset.column_names or row)


def _renamed(error: UserError, columns: Columns) -> UserError:
    """The error with the column as the data call it."""
    field = columns.named.get(error.field or "", error.field)
    return UserError(error.problem, remedy=error.remedy, file=error.file, row=error.row, field=field)
