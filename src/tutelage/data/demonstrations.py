"""Read demonstrations from rows in any supported format and check them.

The recognized columns are in ``FORMATS`` and, with an example of each, in ``docs/data-formats.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tutelage.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from tutelage.data.columns import Peek

__all__ = [
    "FORMATS",
    "Demonstration",
    "Format",
    "Messages",
    "Turns",
    "detect_format",
    "holds_prompts_alone",
    "is_conversational",
    "read_prompts",
    "read_row",
    "read_rows",
]

Messages = list[dict[str, str]]
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
        number: number of its row in the source, counted from 1, for messages to people.
        fields: the columns of the row that the format does not use; verifiers read them.
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


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value stands, to say so when it is wrong."""

    source: str
    number: int
    field: str = ""

    def at(self, field: str) -> _Place:
        return _Place(self.source, self.number, field)

    def error(self, problem: str, remedy: str | None = None) -> UserError:
        return UserError(problem, remedy=remedy, file=self.source, row=self.number, field=self.field or None)


@dataclass(frozen=True, slots=True)
class _Turn:
    prompt: str | Messages
    completion: str
    rejected: str | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """A set of columns that makes a row a demonstration.

    Attributes:
        columns: the columns that must be there.
        optional: columns that are read if they are there.
        read: the demonstrations of a row, first turn first.
    """

    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any], _Place], list[_Turn]]
    optional: tuple[str, ...] = ()


def detect_format(columns: Iterable[str], *, source: str = "dataset") -> Format:
    """The format that ``columns`` belong to: the first of ``FORMATS`` whose columns are all there.

    Raises:
        UserError: no format has its columns there; says what was found and what would do.
    """
    found = list(columns)
    for format in FORMATS:
        if set(format.columns) <= set(found):
            return format
    wanted = "; ".join(" + ".join(format.columns) for format in FORMATS)
    raise UserError(
        f"the columns {', '.join(map(repr, found))} match no known format.",
        remedy=f"Rename them; any of these sets works: {wanted}.",
        file=source,
    )


def read_rows(
    dataset: Dataset | IterableDataset | Peek, *, turns: Turns = "last", source: str = "dataset"
) -> Iterator[list[Demonstration]]:
    """The demonstrations of each row, one list per row, in order.

    The list is empty for a row that is left out (see ``read_row``), so that whoever reads can count them.

    Raises:
        UserError: as ``detect_format`` and ``read_row``, or text and messages are mixed in one dataset.
    """
    format, conversational = None, None
    for number, row in enumerate(dataset, start=1):
        format = format or detect_format(dataset.column_names or row, source=source)
        demonstrations = read_row(row, number=number, source=source, turns=turns, format=format)
        for demonstration in demonstrations:
            if conversational is None:
                conversational = demonstration.conversational
            elif conversational != demonstration.conversational:
                raise UserError(
                    "some rows hold text and some hold lists of messages.",
                    remedy="Write all rows in one way.",
                    file=source,
                    row=number,
                )
        yield demonstrations


def is_conversational(dataset: Dataset | IterableDataset, *, source: str = "dataset") -> bool:
    """True if the prompts are lists of messages, which get the chat template; False if they are text.

    Raises:
        UserError: as ``read_rows``, or no row holds a demonstration.
    """
    for demonstrations in read_rows(dataset, source=source):
        if demonstrations:
            return demonstrations[0].conversational
    raise UserError("no row holds a demonstration.", file=source)


def holds_prompts_alone(dataset: Any) -> bool:
    """True if there is a ``prompt`` column and no column with an answer: something to sample from, not to learn from."""
    columns = dataset.column_names or list(next(iter(dataset), ()))
    return "prompt" in columns and not {"completion", "chosen"} & set(columns)


def read_prompts(dataset: Dataset | IterableDataset | Peek, *, source: str = "dataset") -> Iterator[str | Messages]:
    """The ``prompt`` column, row by row: text, or a list of messages that ends with the user's.

    Raises:
        UserError: names source, row and field of one that is neither, or is empty; or text and messages are mixed.
    """
    first: type | None = None
    for number, row in enumerate(dataset, start=1):
        place = _Place(source, number, "prompt")
        prompt = _prompt(row["prompt"], place)
        first = first or type(prompt)
        if type(prompt) is not first:
            raise place.error("some rows hold text and some hold lists of messages.", "Write all rows in one way.")
        yield prompt


def read_row(
    row: Mapping[str, Any],
    *,
    number: int,
    source: str = "dataset",
    turns: Turns = "last",
    format: Format | None = None,
) -> list[Demonstration]:
    """Check a row and read its demonstrations.

    Args:
        row: column names and values.
        number: the row's number in the source, from 1.
        source: file or dataset, for messages to people.
        turns: ``"last"`` reads one demonstration per row. ``"all"`` reads every assistant turn of ``messages`` and of
            ``real``, each with the conversation before it as its prompt; other formats have one all the same.
        format: what ``detect_format`` says of the columns, if it is known.

    Returns:
        At least one demonstration; none if the row is a dialogue in text whose preferred last turn is empty, as it
        happens in data where people were asked to compare a text with silence.

    Raises:
        UserError: names source, row and field. Unknown columns; something that should be text is not, or is empty; a
            role other than system, user and assistant; roles out of order; no assistant turn at the end.

    >>> row = {"prompt": "2 + 2 =", "completion": " 4", "level": 1}
    >>> read_row(row, number=1)
    [Demonstration(prompt='2 + 2 =', completion=' 4', rejected=None, row=0, number=1, fields={'prompt': '2 + 2 =', 'completion': ' 4', 'level': 1})]
    """
    format = format or detect_format(row, source=source)
    place = _Place(source, number)
    found = format.read(row, place)
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


def _read_prompt_completion(row: Mapping[str, Any], place: _Place) -> list[_Turn]:
    prompt = _prompt(row.get("prompt"), place.at("prompt"))
    history, completion = _answer(row.get("completion"), place.at("completion"))
    if history:
        raise place.at("completion").error("must be one assistant message; the messages before it are the prompt.")
    return [_Turn(_as_messages(prompt) if history is not None else prompt, completion)]


def _read_prompt_pair(row: Mapping[str, Any], place: _Place) -> list[_Turn]:
    prompt = _prompt(row.get("prompt"), place.at("prompt"))
    history, chosen = _answer(row.get("chosen"), place.at("chosen"))
    rejected_history, rejected = _answer(row.get("rejected"), place.at("rejected"))
    for field, dialogue in (("chosen", history), ("rejected", rejected_history)):
        if dialogue and not _belongs_to(prompt, dialogue):
            raise place.at(field).error("is a whole dialogue, but the 'prompt' of the row is not what comes first.")
    if history is not None:
        prompt = history or _as_messages(prompt)
    comparable = (not rejected_history or rejected_history == prompt) and rejected != chosen
    return [_Turn(prompt, chosen, rejected if comparable else None)]


def _read_dialogue_pair(row: Mapping[str, Any], place: _Place) -> list[_Turn]:
    prompt, chosen = _dialogue(row.get("chosen"), place.at("chosen"))
    rejected_prompt, rejected = _dialogue(row.get("rejected"), place.at("rejected"))
    if not chosen.strip():
        return []
    comparable = rejected_prompt == prompt and rejected.strip() and rejected != chosen
    return [_Turn(prompt, chosen, rejected if comparable else None)]


def _read_messages(row: Mapping[str, Any], place: _Place, field: str = "messages") -> list[_Turn]:
    messages = _conversation(row.get(field), place.at(field))
    return [
        _Turn(messages[:position], message["content"])
        for position, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def _read_spin(row: Mapping[str, Any], place: _Place) -> list[_Turn]:
    return _read_messages(row, place, "real")


def _read_alpaca(row: Mapping[str, Any], place: _Place) -> list[_Turn]:
    instruction = _text(row.get("instruction"), place.at("instruction"))
    output = _text(row.get("output"), place.at("output"))
    parts = [instruction]
    if row.get("input") is not None:
        parts.append(_text(row["input"], place.at("input"), may_be_empty=True))
    return [_Turn("".join(f"{part}\n\n" for part in parts if part.strip()), output)]


FORMATS = (
    Format(("prompt", "completion"), _read_prompt_completion),
    Format(("prompt", "chosen", "rejected"), _read_prompt_pair),
    Format(("real", "generated"), _read_spin),
    Format(("chosen", "rejected"), _read_dialogue_pair),
    Format(("messages",), _read_messages),
    Format(("instruction", "output"), _read_alpaca, optional=("input",)),
)
"""Every known format; where a dataset has the columns of several, the first counts."""


def _text(value: Any, place: _Place, what: str = "", *, may_be_empty: bool = False) -> str:
    subject = f"{what} " if what else ""
    if value is None:
        raise place.error(f"{subject}is missing.")
    if not isinstance(value, str):
        raise place.error(f"{subject}must be text, not {type(value).__name__}.")
    if not may_be_empty and not value.strip():
        raise place.error(f"{subject}is empty.", "Fill it or leave the row out.")
    return value


def _messages(value: Any, place: _Place) -> Messages:
    if value is None:
        raise place.error("is missing.")
    if not isinstance(value, list):
        raise place.error(f"must be a list of messages, not {type(value).__name__}.")
    if not value:
        raise place.error("is empty.", "It needs at least one message.")
    messages = []
    for position, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            problem = f"message {position} must be an object with a role and a content, not {type(message).__name__}."
            raise place.error(problem)
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            problem = f"message {position} has the role {role!r}; the roles are system, user and assistant."
            raise place.error(problem, "Conversations with tools are not supported: leave them out.")
        content = _text(
            message.get("content"), place, f"the content of message {position}", may_be_empty=role == "system"
        )
        messages.append({"role": role, "content": content})
    return messages


def _check_order(messages: Messages, place: _Place) -> None:
    first = 1 if messages[0]["role"] == "system" else 0
    for position, message in enumerate(messages[first:]):
        expected = "assistant" if position % 2 else "user"
        if message["role"] != expected:
            number = position + first + 1
            raise place.error(
                f"message {number} is from the {message['role']}, where one from the {expected} should be.",
                "A conversation is a system message, if any, then user and assistant in turn, the user first.",
            )


def _conversation(value: Any, place: _Place) -> Messages:
    """A whole conversation, which ends with the assistant's turn."""
    messages = _messages(value, place)
    _check_order(messages, place)
    if all(message["role"] != "assistant" for message in messages):
        raise place.error("has no assistant turn, so nothing to learn from.")
    if messages[-1]["role"] != "assistant":
        raise place.error("the last message is not from the assistant.", "The last message is the demonstration.")
    return messages


def _prompt(value: Any, place: _Place) -> str | Messages:
    if not isinstance(value, list):
        return _text(value, place)
    messages = _messages(value, place)
    _check_order(messages, place)
    if messages[-1]["role"] != "user":
        raise place.error("the last message of a prompt must be from the user.")
    return messages


def _answer(value: Any, place: _Place) -> tuple[Messages | None, str]:
    """The text of an answer, and what comes before it: None for text, messages (perhaps none) for messages."""
    if not isinstance(value, list):
        return None, _text(value, place)
    messages = _messages(value, place)
    if [message["role"] for message in messages] != ["assistant"]:
        messages = _conversation(value, place)
    return messages[:-1], messages[-1]["content"]


def _dialogue(value: Any, place: _Place) -> tuple[str | Messages, str]:
    """Split a whole dialogue before its last turn, which may be empty in text."""
    if isinstance(value, list):
        messages = _conversation(value, place)
        return messages[:-1], messages[-1]["content"]
    history, marker, answer = _text(value, place).rpartition("\n\nAssistant:")
    if not marker:
        raise place.error(
            "has no assistant turn.",
            "A dialogue in text has turns that start with '\\n\\nHuman:' and '\\n\\nAssistant:'.",
        )
    if "\n\nHuman:" in answer:
        raise place.error("the last turn is not from the assistant.", "The last turn is the demonstration.")
    if not history.strip():
        raise place.error("has no turn before the assistant's, so no prompt.")
    return history + marker, answer


def _as_messages(prompt: str | Messages) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _belongs_to(prompt: str | Messages, history: Messages) -> bool:
    return {"role": "user", "content": prompt} in history if isinstance(prompt, str) else prompt == history
