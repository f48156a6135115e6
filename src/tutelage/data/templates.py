"""What a chat template makes of a conversation, and whether it is the conversation.

A template is a program that somebody else wrote. It may leave a message out, write it twice, write an answer into an
open block of reasoning, or ask for the time. What it makes of each row is held against the row before anything is
learned from it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from tutelage.data.messages import Messages
from tutelage.errors import UserError

__all__ = ["ChatTemplate", "Rendered", "asks_for_time", "with_fixed_time"]

_REASONING = re.compile(
    r"<(?P<a>[\w:]*(?:think|thinking|thought|reasoning))>|\[(?P<b>THINK)\]|<\|begin_of_(?P<c>\w+)\|>"
)
"""What opens a block of reasoning."""


@dataclass(frozen=True)
class Rendered:
    """A conversation up to an answer, and the answer.

    Attributes:
        prompt: everything before the answer, as the sampler gets it.
        completion: what follows it, up to but without the end of the turn.
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class _Shape:
    """What the template writes around the messages: ``parts[i]`` comes before the i-th of ``order``."""

    parts: tuple[str, ...]
    order: tuple[int, ...]


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: whose template it is.
        now: the time that the template is told.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, now: datetime):
        self.tokenizer, self.now = tokenizer, now
        self._shapes: dict[tuple[Any, ...], _Shape] = {}

    # --- what is rendered ------------------------------------------------------------------------------------------------

    def prompt(self, messages: Messages) -> str:
        """The conversation with what the template writes to have the assistant answer.

        Raises:
            UserError: there is no template, it refuses the conversation, or the messages are not what it wrote.
        """
        rendered = self._render(messages, ask=True)
        self._check(rendered, messages, ask=True)
        return rendered

    def answered(self, messages: Messages, answer: str, end: str | None) -> Rendered:
        """The conversation with an answer.

        Args:
            messages: before the answer.
            answer: must not be blank.
            end: what ends a turn, if the template writes it.

        Raises:
            UserError: as ``prompt``; or the answer is not what the template wrote in the assistant's last turn.
        """
        prompt = self.prompt(messages)
        whole = [*messages, {"role": "assistant", "content": answer}]
        rendered, after = self._render(whole), self._shape(whole).parts[-1]
        if not rendered.startswith(prompt):  # the template rewrites the prompt once the answer is there
            return Rendered(prompt, _reasoned(self._asked(prompt, messages), answer, answer))
        completion = rendered[len(prompt) :]
        if end is not None:
            completion, found, _ = completion.partition(end)
            if not found:
                raise UserError(f"the chat template does not end this answer with {end}.", remedy=_REMEDY)
            after = after.partition(end)[0]
        if not _ends_with(completion, answer, after):
            raise UserError(
                "what the chat template writes as the assistant's last turn is not the answer of the row.",
                remedy=_REMEDY,
            )
        return Rendered(prompt, _reasoned(self._asked(prompt, messages), completion, answer))

    @cached_property
    def end(self) -> str:
        """What the template writes after an answer, of whatever it is made.

        Raises:
            UserError: as ``prompt``; or the template leaves the answer out.
        """
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "answer"}]
        return self._shape(messages).parts[-1]

    def _render(self, messages: Messages, *, ask: bool = False) -> str:
        source = self._source
        options: dict[str, Any] = {}
        if asks_for_time(source):
            options["chat_template"] = with_fixed_time(source, self.now)
        given: Any = messages
        if self._wants_parts:
            given = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
        return self._applied(given, ask, **options)

    def _applied(self, messages: Any, ask: bool, **options: Any) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=ask, tokenize=False, **options
            )
        except Exception as error:  # the template is a program, and raises what its mistakes raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"the chat template refuses the conversation: {reason.rstrip('.')}.") from error
        if not isinstance(rendered, str):
            raise UserError("the chat template makes no text of the conversation.", remedy=_REMEDY)
        return rendered

    @cached_property
    def _source(self) -> str:
        templates = self.tokenizer.chat_template
        if not templates:
            raise UserError(
                "the data holds conversations, but the tokenizer has no chat template.",
                remedy="Use a model whose tokenizer has one, or give the data as text in 'prompt' and 'completion'.",
            )
        if isinstance(templates, dict):
            if "default" not in templates:
                raise UserError(
                    f"the tokenizer has the chat templates {', '.join(map(str, templates))} and none named 'default'.",
                    remedy="Set tokenizer.chat_template to one of them and save the tokenizer.",
                )
            return templates["default"]
        return templates

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template reads the content of a message as a list of parts, and not as text."""
        source, options = self._source, {}
        if asks_for_time(source):
            options["chat_template"] = with_fixed_time(source, self.now)
        found = []
        for content in (_mark(0), [{"type": "text", "text": _mark(0)}]):
            try:
                found.append(self._applied([{"role": "user", "content": content}], True, **options).count(_mark(0)))
            except UserError:
                found.append(0)
        return found[0] != 1 and found[1] == 1

    # --- whether it is the conversation ----------------------------------------------------------------------------------

    def _shape(self, messages: Messages, *, ask: bool = False) -> _Shape:
        """What the template writes around messages of these roles.

        Raises:
            UserError: it leaves a message out, writes it twice or elsewhere.
        """
        key = (ask, *((message["role"], bool(message["content"].strip())) for message in messages))
        if key not in self._shapes:
            self._shapes[key] = self._found_shape(messages, ask)
        return self._shapes[key]

    def _found_shape(self, messages: Messages, ask: bool) -> _Shape:
        marks = {place: _mark(place) for place, message in enumerate(messages) if message["content"].strip()}
        marked = [{**message, "content": marks.get(place, "")} for place, message in enumerate(messages)]
        rendered = self._render(marked, ask=ask)
        for place, mark in marks.items():
            if (count := rendered.count(mark)) != 1:
                role = messages[place]["role"]
                what = "is not in" if not count else f"is {count} times in"
                last = not ask and place == len(messages) - 1
                raise UserError(
                    f"message {place + 1}, {'the answer' if last else f'from the {role}'}, {what} what the chat template "
                    "writes.",
                    remedy=_REMEDY,
                )
        order = sorted(marks, key=lambda place: rendered.index(marks[place]))
        talk = [place for place in order if messages[place]["role"] != "system"]
        if talk != sorted(talk):
            raise UserError("the chat template writes the messages in another order.", remedy=_REMEDY)
        parts, start = [], 0
        for place in order:
            at = rendered.index(marks[place])
            parts.append(rendered[start:at])
            start = at + len(marks[place])
        return _Shape((*parts, rendered[start:]), tuple(order))

    def _asked(self, prompt: str, messages: Messages) -> str:
        """What the template writes after the last message to have the assistant answer."""
        usual = self._shape(messages, ask=True).parts[-1]
        if prompt.endswith(usual):
            return usual
        last = _pieces(messages[-1]["content"])[-1]
        return prompt[prompt.rindex(last) + len(last) :]

    def _check(self, rendered: str, messages: Messages, *, ask: bool) -> None:
        """Each message's text is in the rendered conversation once and in order.

        The white space around it is the template's to strip. So is the reasoning of earlier answers, which models are
        not shown again.

        Raises:
            UserError: names the message.
        """
        shape = self._shape(messages, ask=ask)
        contents = [messages[place]["content"] for place in shape.order]
        if _is_made_of(rendered, shape.parts, contents):
            return
        # The template looks at what is in the messages: each text is looked for by itself.
        start, left = 0, []
        for place, content in zip(shape.order, contents, strict=True):
            pieces = _pieces(content)
            if messages[place]["role"] == "assistant":
                pieces = pieces[-1:]
            for piece in pieces:
                at = rendered.find(piece, start)
                if at < 0:
                    role = messages[place]["role"]
                    raise UserError(
                        f"the text of message {place + 1}, from the {role}, is not what the chat template writes.",
                        remedy=_REMEDY,
                    )
                left.append(rendered[start:at])
                start = at + len(piece)
        left.append(rendered[start:])
        for place, content in zip(shape.order, contents, strict=True):
            text = content.strip()
            if len(text) > 15 and any(text in part for part in left) and not any(text in part for part in shape.parts):
                raise UserError(f"the chat template writes message {place + 1} twice.", remedy=_REMEDY)


_REMEDY = "Look at the tokenizer's chat_template with this row, or use another template."


def _mark(place: int) -> str:
    """A text that no template treats in a way of its own, and that holds no other's."""
    return f"tutelage{place:04d}text"


def _closing(opening: re.Match[str]) -> str:
    if opening["a"]:
        return f"</{opening['a']}>"
    return "[/THINK]" if opening["b"] else f"<|end_of_{opening['c']}|>"


def _open_block(text: str) -> tuple[str, str] | None:
    """What opens the last block of reasoning in a text and what would close it; None if none is open."""
    blocks = list(_REASONING.finditer(text))
    if not blocks or _closing(blocks[-1]) in text[blocks[-1].end() :]:
        return None
    return blocks[-1].group(), _closing(blocks[-1])


def _reasoned(asked: str, completion: str, answer: str) -> str:
    """The completion, where there are blocks of reasoning: not in an open one, and none twice.

    Args:
        asked: what the template writes to have the assistant answer.

    Raises:
        UserError: ``asked`` opens a block, and the answer has no reasoning to close it with; or the template writes a
            block of its own beside the answer's.
    """
    opened = _open_block(asked)
    if opened is None:
        own, written = len(_REASONING.findall(answer)), len(_REASONING.findall(completion))
        if own and written > own:
            raise UserError(
                "the chat template writes a block of reasoning of its own beside the answer's.",
                remedy="Take the reasoning out of the answers, or use a template that reads it.",
            )
        return completion
    opening, closing = opened
    if completion.lstrip().startswith(opening):  # it is open already
        completion = completion.lstrip().removeprefix(opening)
        completion = completion.lstrip("\n") if asked.endswith("\n") else completion
    if closing not in completion or opening in completion.partition(closing)[0]:
        raise UserError(
            f"the chat template opens a {opening} block for the assistant, and the answer does not close it: all of it "
            "would be learned as reasoning.",
            remedy=f"Begin the answers with {opening}…{closing} (it may be empty), or use a template that opens none.",
        )
    return completion


_TAGS = re.compile(r"</?[\w:]*(?:think|thinking|thought|reasoning)>|\[/?THINK\]|<\|(?:begin|end)_of_\w+\|>")


def _pieces(text: str) -> list[str]:
    """A text without the marks around its reasoning, about which templates set white space as they like."""
    return [piece.strip() for piece in _TAGS.split(text) if piece.strip()] or [text.strip()]


def _is_made_of(rendered: str, parts: Sequence[str], contents: Sequence[str]) -> bool:
    """Whether the rendered text is the parts with the contents between them, stripped or not."""
    at = len(parts[0])
    if not rendered.startswith(parts[0]):
        return False
    for content, part in zip(contents, parts[1:], strict=True):
        forms = dict.fromkeys((content, content.strip(), content.rstrip(), content.lstrip()))
        form = next((form for form in forms if rendered.startswith(form + part, at)), None)
        if form is None:
            return False
        at += len(form) + len(part)
    return at == len(rendered)


def _ends_with(completion: str, answer: str, after: str) -> bool:
    """Whether a turn ends with the answer, all of it, and with what the template writes after every answer."""
    body = completion.rstrip()
    for tail in (after.rstrip(), ""):
        if tail and not body.endswith(tail):
            continue
        inner = body.removesuffix(tail).rstrip()
        if inner.endswith(answer.strip()):
            return True
        pieces, at = _pieces(answer), 0
        for piece in pieces[:-1]:
            at = inner.find(piece, at)
            if at < 0:
                return False
            at += len(piece)
        return len(inner) - len(pieces[-1]) >= at and inner.endswith(pieces[-1])
    return False


# --- time ----------------------------------------------------------------------------------------------------------------

_DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZf%"
_FLAGS = "-_0^#"

# A macro of the template's own name hides the function, which cannot be handed in. It ends in a line break, which the
# template's environment removes, so that the template itself begins on a new line as before.
_MACRO = (
    "{% macro strftime_now(format) %}{% set at = namespace(open=false, flag='') %}"
    "{% for c in format %}"
    "{% if not at.open %}{% if c == '%' %}{% set at.open = true %}{% set at.flag = '' %}{% else %}{{ c }}{% endif %}"
    "{% elif c in '" + _FLAGS + "' and not at.flag %}{% set at.flag = c %}"
    "{% else %}{{ tutelage_now[at.flag ~ c] if (at.flag ~ c) in tutelage_now else '%' ~ at.flag ~ c }}"
    "{% set at.open = false %}{% endif %}"
    "{% endfor %}{% endmacro %}\n"
)


def asks_for_time(template: str) -> bool:
    """Whether a template reads the clock."""
    return "strftime_now" in template


def with_fixed_time(template: str, now: datetime) -> str:
    """The template with a clock that stands still."""
    known = {}
    for directive in _DIRECTIVES:
        for flag in ("", *_FLAGS):
            known[flag + directive] = now.strftime(f"%{flag}{directive}")
    literal = "{% set tutelage_now = " + repr(known) + " %}\n"
    return literal + _MACRO + template
