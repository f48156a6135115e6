"""Read what a cell of a row holds: text, a list of messages, a dialogue; and say where it is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tutelage.errors import UserError

__all__ = [
    "Messages",
    "Place",
    "is_empty",
    "read_answer",
    "read_conversation",
    "read_dialogue",
    "read_history",
    "read_messages",
    "read_prompt",
    "read_text",
]

Messages = list[dict[str, str]]

_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SPEAKERS = _ROLES | {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")
"""Who speaks, as ``from`` says it in ShareGPT's messages."""

_MEANINGFUL = (
    "tool_calls",
    "function_call",
    "tool_call_id",
    "tool_responses",
    "reasoning_content",
    "reasoning",
    "thinking",
    "refusal",
    *("image", "images", "video", "videos", "audio", "audios", "files", "attachments"),
)
"""Keys of a message that would be part of the conversation, were they read."""

_TRAINED = ("weight", "train", "train_on_turn", "trainable", "loss", "loss_mask", "loss_weight")
"""Keys with which other tools leave a message out of training."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands, to say so when it is wrong."""

    source: str
    number: int
    field: str = ""

    def at(self, field: str) -> Place:
        return Place(self.source, self.number, field)

    def error(self, problem: str, remedy: str | None = None) -> UserError:
        return UserError(problem, remedy=remedy, file=self.source, row=self.number, field=self.field or None)


def is_empty(value: Any) -> bool:
    """Whether a cell says nothing: none, blank text, an empty list or object, also one written as text."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null", "None")
    return value is None or (isinstance(value, (list, Mapping)) and not value)


def read_text(value: Any, place: Place, what: str = "", *, may_be_empty: bool = False) -> str:
    subject = f"{what} " if what else ""
    if value is None:
        raise place.error(f"{subject}is missing.")
    if not isinstance(value, str):
        raise place.error(f"{subject}must be text, not {type(value).__name__}.")
    if not may_be_empty and not value.strip():
        raise place.error(f"{subject}is empty.", "Fill it or leave the row out.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise place.error(
            f"{subject}is no Unicode text: character {error.start + 1} is half of a surrogate pair.",
            "Take it out, or write the whole character.",
        ) from error
    return value


def read_messages(value: Any, place: Place) -> Messages:
    """Messages with a role and a content, or with ``from`` and ``value``, as ShareGPT has them."""
    if value is None:
        raise place.error("is missing.")
    _refuse_written_messages(value, place)
    if not isinstance(value, list):
        raise place.error(f"must be a list of messages, not {type(value).__name__}.")
    if not value:
        raise place.error("is empty.", "It needs at least one message.")
    return [_message(message, position, place) for position, message in enumerate(value, start=1)]


def _message(message: Any, position: int, place: Place) -> dict[str, str]:
    if not isinstance(message, Mapping):
        problem = f"message {position} must be an object with a role and a content, not {type(message).__name__}."
        raise place.error(problem)
    sharegpt = message.get("from") is not None and message.get("role") is None
    said, known = (message["from"], _SPEAKERS) if sharegpt else (message.get("role"), _ROLES)
    role = known.get(said) if isinstance(said, str) else None
    for one, other, meaning in (("role", "from", _SPEAKERS.get), ("content", "value", str)):
        first, second = message.get(one), message.get(other)
        if None not in (first, second) and meaning(str(first)) != meaning(str(second)):
            raise place.error(
                f"message {position} has both '{one}' and '{other}', and they differ.", "Keep one of them."
            )
    if role is None:
        problem = f"message {position} has the role {said!r}; the roles are {', '.join(known)}."
        raise place.error(problem, "Conversations with tools are not supported: leave them out.")
    if found := next((key for key in _MEANINGFUL if not is_empty(message.get(key))), None):
        raise place.error(
            f"message {position} has '{found}', which would not be learned.",
            "Write reasoning into the content, as <think>…</think>."
            if found in ("reasoning_content", "reasoning", "thinking")
            else "Only messages of text are supported: leave such rows out.",
        )
    if found := next((key for key in _TRAINED if _says_no(message.get(key))), None):
        raise place.error(
            f"message {position} is not to be trained on ('{found}'), which is not supported.",
            "End the conversation with the message to learn from, and leave the key out.",
        )
    content = message.get("value" if sharegpt else "content")
    content = read_text(content, place, f"the content of message {position}", may_be_empty=role == "system")
    return {"role": role, "content": content}


def _says_no(value: Any) -> bool:
    return value is not None and (not value or str(value).strip().lower() in ("false", "0", "0.0", "no"))


def _check_order(messages: Messages, place: Place) -> None:
    first = 1 if messages[0]["role"] == "system" else 0
    for position, message in enumerate(messages[first:]):
        expected = "assistant" if position % 2 else "user"
        if message["role"] != expected:
            number = position + first + 1
            raise place.error(
                f"message {number} is from the {message['role']}, where one from the {expected} should be.",
                "A conversation is a system message, if any, then user and assistant in turn, the user first.",
            )


def read_conversation(value: Any, place: Place) -> Messages:
    """A whole conversation, which ends with the assistant's turn."""
    messages = read_messages(value, place)
    _check_order(messages, place)
    if all(message["role"] != "assistant" for message in messages):
        raise place.error("has no assistant turn, so nothing to learn from.")
    if messages[-1]["role"] != "assistant":
        raise place.error("the last message is not from the assistant.", "The last message is the demonstration.")
    return messages


def read_prompt(value: Any, place: Place) -> str | Messages:
    """Text, or messages of which the last is the user's."""
    if not isinstance(value, list):
        _refuse_written_messages(value, place)
        return read_text(value, place)
    messages = read_messages(value, place)
    _check_order(messages, place)
    if messages[-1]["role"] != "user":
        raise place.error("the last message of a prompt must be from the user.")
    return messages


def read_answer(value: Any, place: Place) -> tuple[Messages | None, str]:
    """The text of an answer, and what comes before it: None for text, messages (perhaps none) for messages."""
    if not isinstance(value, list):
        _refuse_written_messages(value, place)
        return None, read_text(value, place)
    messages = read_messages(value, place)
    if [message["role"] for message in messages] != ["assistant"]:
        messages = read_conversation(value, place)
    return messages[:-1], messages[-1]["content"]


def read_dialogue(value: Any, place: Place) -> tuple[str | Messages, str]:
    """Split a whole dialogue before its last turn, which may be empty in text."""
    if isinstance(value, list):
        messages = read_conversation(value, place)
        return messages[:-1], messages[-1]["content"]
    _refuse_written_messages(value, place)
    history, marker, answer = read_text(value, place).rpartition("\n\nAssistant:")
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


def read_history(value: Any, place: Place) -> Messages:
    """Earlier turns: pairs of what the user and what the assistant said, or messages."""
    if is_empty(value):
        return []
    _refuse_written_messages(value, place)
    if not isinstance(value, list):
        raise place.error(
            f"must be a list of earlier turns, not {type(value).__name__}.", "Rename the column if it means another."
        )
    if all(isinstance(turn, Mapping) for turn in value):
        return read_messages(value, place)
    messages = []
    for position, turn in enumerate(value, start=1):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise place.error(f"turn {position} must be a pair: what the user said, what the assistant said.")
        for role, content in zip(("user", "assistant"), turn, strict=True):
            text = read_text(content, place, f"what the {role} said in turn {position}")
            messages.append({"role": role, "content": text})
    return messages


_WRITTEN = re.compile(r"""\s*\[?\s*\{\s*['"](role|content|from|value)['"]\s*:""")
_KEYS = [re.compile(rf"""['"]({names})['"]\s*:""") for names in ("role|from", "content|value")]


def _refuse_written_messages(value: Any, place: Place) -> None:
    """Messages that were written as text, as tables of text hold them, would be learned with their braces."""
    if isinstance(value, str) and _WRITTEN.match(value) and all(key.search(value) for key in _KEYS):
        raise place.error(
            "is a list of messages written as text.",
            "Give the list itself, in a .jsonl or .parquet file; json.loads makes one of the text.",
        )
    if isinstance(value, Mapping):
        raise place.error("must be text or a list of messages, not one object.", "Put it into a list.")
