"""The formats of a row: which columns make one, and what each of them means.

They are in ``FORMATS`` and, with an example of each, in ``docs/data-formats.md``. Columns that would change what a row
says are read as their formats mean, or refused by name; all others are left to verifiers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tutelage.data.messages import (
    Messages,
    Place,
    is_empty,
    read_answer,
    read_conversation,
    read_dialogue,
    read_history,
    read_prompt,
    read_text,
)
from tutelage.errors import UserError

__all__ = ["FORMATS", "Columns", "Format", "Turn", "detect_format", "is_unwanted", "read_prompt_alone", "read_turns"]


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt, the answer to learn, and the one that was not preferred."""

    prompt: str | Messages
    completion: str
    rejected: str | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """A set of columns that makes a row a demonstration.

    Attributes:
        columns: the columns that must be there.
        read: the demonstrations of a row, first turn first.
        optional: columns that are read if they are there.
        refused: columns that a row of this format would be wrong without, and that are not read.
    """

    columns: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Place], list[Turn]]
    optional: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns that a user names, where a dataset has no recognized ones, or more than one set of them.

    Attributes:
        prompt, completion: read as ``prompt`` and ``completion``; None for those of these names.
        messages: read as ``messages``; then nothing else is.

    Raises:
        UserError: ``messages`` with one of the others.
    """

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None

    def __post_init__(self):
        if self.messages is not None and (self.prompt is not None or self.completion is not None):
            raise UserError(
                "a conversation has no prompt and no completion beside it.",
                remedy="Give --messages_column, or --prompt_column and --completion_column.",
                field="messages_column",
            )

    @property
    def named(self) -> dict[str, str]:
        """For each column of a format that a user named another one for, that one."""
        pairs = (("prompt", self.prompt), ("completion", self.completion), ("messages", self.messages))
        return {name: column for name, column in pairs if column is not None}

    def apply(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row as the formats call its columns; one that the user named means nothing else beside that."""
        if not (named := self.named):
            return row
        rest = {name: value for name, value in row.items() if name not in named.values()}
        return rest | {name: row.get(column) for name, column in named.items()}


def detect_format(columns: Iterable[str], *, source: str = "dataset", given: Columns | None = None) -> Format:
    """The format that ``columns`` belong to: the first of ``FORMATS`` whose columns are all there.

    Args:
        given: what the user named; it decides.

    Raises:
        UserError: no format has its columns there, or a named one is not there; says what was found and what would do.
    """
    found, named = list(columns), (given or Columns()).named
    for name, column in named.items():
        if column not in found:
            raise _unknown(column, name, found, source)
    present = {*found, *named}
    formats = [format for format in FORMATS if not named or set(named) <= {*format.columns, *format.optional}]
    for format in formats:
        if set(format.columns) <= present and not ("prompt" in present and "question" in format.columns):
            return format
    wanted = "; ".join(" + ".join(format.columns) for format in formats)
    raise UserError(
        f"the columns {', '.join(map(repr, found))} match no known format.",
        remedy=f"Any of these sets works: {wanted}. Or say which columns to read: --prompt_column and "
        "--completion_column, or --messages_column.",
        file=source,
    )


def _unknown(column: str, name: str, found: Collection[str], source: str) -> UserError:
    return UserError(
        f"there is no column '{column}', only {', '.join(map(repr, found))}.",
        remedy=f"Check --{name}_column.",
        file=source,
        field=column,
    )


def read_turns(format: Format, row: Mapping[str, Any], place: Place) -> list[Turn]:
    """The demonstrations of a row, with the system message and the earlier turns that stand in other columns.

    Raises:
        UserError: as the formats; or a column says something that would be left out.
    """
    for column in _called(row, (*_REFUSED, *format.refused)):
        if not is_empty(row[column]):
            raise place.at(column).error(
                "would be left out, and the row says something else without it.",
                "Put it into the prompt, or leave it out by naming the columns to read: "
                "--prompt_column and --completion_column."
                if _called((column,), format.refused)
                else "Only conversations of text, without tools, are supported: rename the column if it means another.",
            )
    turns = format.read(row, place)
    before = _before(row, place)
    if before is None:
        return turns
    if format.read is _read_dialogue_pair and any(isinstance(turn.prompt, str) for turn in turns):
        if before:
            raise place.at(_called(row, (*_SYSTEM, "history"))[0]).error(
                "has no place in a dialogue that is written as text.", "Write the dialogue as messages."
            )
        return turns
    return [Turn(_preceded(before, turn.prompt, place), turn.completion, turn.rejected) for turn in turns]


def read_prompt_alone(row: Mapping[str, Any], place: Place) -> str | Messages:
    """The ``prompt`` of a row, with the system message and the earlier turns that stand in other columns.

    Raises:
        UserError: it is neither text nor messages that end with the user's, or is empty.
    """
    for column in _called(row, _REFUSED):
        if not is_empty(row[column]):
            raise place.at(column).error(
                "would be left out, and the prompt says something else without it.", "Rename it if it means another."
            )
    prompt = read_prompt(row.get("prompt"), place.at("prompt"))
    before = _before(row, place)
    return prompt if before is None else _preceded(before, prompt, place)


_REFUSED = ("tools", "functions", "images", "image", "videos", "video", "audios", "audio", "chat_template_kwargs")
_SYSTEM = ("system", "system_prompt", "system_message", "sys_prompt", "system_instruction")
_LABELS = ("label", "kto_tag", "kto_label", "desirable", "is_desirable")
_NUMBERS = ("0", "1", "-1", "0.0", "1.0", "-1.0")
_WORDS = ("desirable", "undesirable", "wanted", "unwanted", "chosen", "rejected", "preferred", "dispreferred")
_JUDGED = (*_NUMBERS, *_WORDS)
"""Labels that may say whether an answer was wanted, and that are not true or false."""


def _called(row: Iterable[str], names: Collection[str]) -> list[str]:
    """The columns of these names, in whatever case they are written."""
    return [column for column in row if column.strip().lower() in names]


def _before(row: Mapping[str, Any], place: Place) -> Messages | None:
    """System message and earlier turns from columns of their own; None where there are no such columns.

    Whether there are such columns, not what this row has in them, makes the prompts conversations: all rows are one
    or the other.
    """
    columns, histories = _called(row, _SYSTEM), _called(row, ("history",))
    if not columns and not histories:
        return None
    system = ""
    for name in columns:
        text = "" if row[name] is None else read_text(row[name], place.at(name), may_be_empty=True)
        if system.strip() and text.strip() and text != system:
            raise place.at(name).error(f"differs from the column '{columns[0]}'.", "Keep one of them.")
        system = text if text.strip() else system
    history = []
    for name in histories:
        told = read_history(row[name], place.at(name))
        if history and told and told != history:
            raise place.at(name).error(f"differs from the column '{histories[0]}'.", "Keep one of them.")
        history = told or history
    if system.strip() and history and history[0]["role"] == "system":
        raise place.at("history").error("begins with a system message, and the row has one.", "Keep one of them.")
    return [{"role": "system", "content": system}, *history] if system.strip() else history


def _preceded(before: Messages, prompt: str | Messages, place: Place) -> Messages:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if before and messages[0]["role"] == "system":
        if before == messages[:1]:
            return messages
        raise place.error("the conversation begins with a system message, and a column has another.", "Keep one.")
    whole = [*before, *messages]
    for position, message in enumerate(whole[whole[0]["role"] == "system" :]):
        if message["role"] != ("assistant" if position % 2 else "user"):
            raise place.at("history").error("does not end with the assistant's turn.", "The prompt comes after it.")
    return whole


def is_unwanted(row: Mapping[str, Any], place: Place) -> bool | None:
    """Whether a row of unpaired preferences holds an answer that was not wanted; None where it has no such label.

    Raises:
        UserError: the label is 0 or 1, or a word that may mean this or something else.
    """
    for name in _called(row, _LABELS):
        label = row[name]
        if isinstance(label, str) and label.strip().lower() in ("true", "false"):
            label = label.strip().lower() == "true"
        if isinstance(label, bool):
            return not label
        if str(label).strip().lower() in _JUDGED:
            raise place.at(name).error(
                f"is {label!r}, and answers that were not wanted must not be learned.",
                "Write true or false for wanted or not, or rename the column if it means another.",
            )
    return None


# --- formats -------------------------------------------------------------------------------------------------------------


def _read_prompt_completion(row: Mapping[str, Any], place: Place) -> list[Turn]:
    prompt = read_prompt(row.get("prompt"), place.at("prompt"))
    history, completion = read_answer(row.get("completion"), place.at("completion"))
    if history:
        raise place.at("completion").error("must be one assistant message; the messages before it are the prompt.")
    return [Turn(_as_messages(prompt) if history is not None else prompt, completion)]


def _read_prompt_pair(row: Mapping[str, Any], place: Place) -> list[Turn]:
    prompt = read_prompt(row.get("prompt"), place.at("prompt"))
    history, chosen = read_answer(row.get("chosen"), place.at("chosen"))
    rejected_history, rejected = read_answer(row.get("rejected"), place.at("rejected"))
    for field, dialogue in (("chosen", history), ("rejected", rejected_history)):
        if dialogue and not _belongs_to(prompt, dialogue):
            raise place.at(field).error("is a whole dialogue, but the 'prompt' of the row is not what comes first.")
    if history is not None:
        prompt = history or _as_messages(prompt)
    comparable = (not rejected_history or rejected_history == prompt) and rejected != chosen
    return [Turn(prompt, chosen, rejected if comparable else None)]


def _read_dialogue_pair(row: Mapping[str, Any], place: Place) -> list[Turn]:
    prompt, chosen = read_dialogue(row.get("chosen"), place.at("chosen"))
    rejected_prompt, rejected = read_dialogue(row.get("rejected"), place.at("rejected"))
    if not chosen.strip():
        return []
    comparable = rejected_prompt == prompt and rejected.strip() and rejected != chosen
    return [Turn(prompt, chosen, rejected if comparable else None)]


def _read_messages(field: str) -> Callable[[Mapping[str, Any], Place], list[Turn]]:
    def read(row: Mapping[str, Any], place: Place) -> list[Turn]:
        messages = read_conversation(row.get(field), place.at(field))
        return [
            Turn(messages[:position], message["content"])
            for position, message in enumerate(messages)
            if message["role"] == "assistant"
        ]

    return read


def _read_alpaca(row: Mapping[str, Any], place: Place) -> list[Turn]:
    instruction = read_text(row.get("instruction"), place.at("instruction"))
    output = read_text(row.get("output"), place.at("output"))
    parts = [instruction]
    if row.get("input") is not None:
        parts.append(read_text(row["input"], place.at("input"), may_be_empty=True))
    parts = [part for part in parts if part.strip()]
    if _called(row, (*_SYSTEM, "history")):  # a turn of a conversation, not a text to go on with
        return [Turn("\n\n".join(parts), output)]
    return [Turn("".join(f"{part}\n\n" for part in parts), output)]


def _read_question(row: Mapping[str, Any], place: Place) -> list[Turn]:
    question = read_text(row.get("question"), place.at("question"))
    return [Turn(question, read_text(row.get("answer"), place.at("answer")))]


FORMATS = (
    Format(("prompt", "completion"), _read_prompt_completion),
    Format(("prompt", "chosen", "rejected"), _read_prompt_pair),
    Format(("real", "generated"), _read_messages("real")),
    Format(("chosen", "rejected"), _read_dialogue_pair),
    Format(("messages",), _read_messages("messages")),
    Format(("conversations",), _read_messages("conversations")),
    Format(("instruction", "output"), _read_alpaca, optional=("input",)),
    Format(("question", "answer"), _read_question, refused=("context", "passage", "choices", "options")),
)
"""Every known format; where a dataset has the columns of several, the first counts."""


def _as_messages(prompt: str | Messages) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _belongs_to(prompt: str | Messages, history: Messages) -> bool:
    return {"role": "user", "content": prompt} in history if isinstance(prompt, str) else prompt == history
