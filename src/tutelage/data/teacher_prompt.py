"""The prompt that a teacher sees: a row's own prompt with its demonstration in it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tutelage.data.messages import Messages
from tutelage.errors import UserError

__all__ = ["DEFAULT_TEMPLATE", "TeacherPrompt"]

# The prompt comes last, so that a text goes on after it as it does for the student.
DEFAULT_TEMPLATE = (
    "Here is a good answer to the request that follows, as an example:\n\n{demonstration}\n\n"
    "The request itself, which you answer in your own way:\n\n{prompt}"
)
"""Of the teacher's prompt."""

_FIELDS = ("{prompt}", "{demonstration}")


@dataclass(frozen=True)
class TeacherPrompt:
    """What a teacher sees instead of a prompt.

    Args:
        template: a text with ``{prompt}`` and ``{demonstration}``, which are replaced; all else is as it is, other braces
            included. Of a conversation it becomes the last message, whose text ``{prompt}`` stands for; the messages before it
            stay.
        max_length: of the whole prompt, in tokens.

    Raises:
        UserError: the template lacks a field, or the length is below 1.

    >>> TeacherPrompt("{demonstration} is right. {prompt}", 100).of("2 + 2 =", "4")
    '4 is right. 2 + 2 ='
    """

    template: str
    max_length: int

    def __post_init__(self):
        for field in _FIELDS:
            if field not in self.template:
                raise UserError(
                    f"has no {field}: the teacher would not see the {field[1:-1]}.",
                    remedy="Write {prompt} where the prompt goes and {demonstration} where the demonstration goes.",
                    field="teacher_prompt",
                )
        if self.max_length < 1:
            raise UserError(f"must be at least 1, not {self.max_length}.", field="max_teacher_prompt_length")

    def of(self, prompt: str | Messages, demonstration: str) -> str | Messages:
        """The teacher's prompt.

        Args:
            prompt: text, or messages that end with the user's.
            demonstration: the text of a good answer.
        """
        if isinstance(prompt, str):
            return self._filled(prompt, demonstration)
        last = prompt[-1]
        return [*prompt[:-1], {**last, "content": self._filled(last["content"], demonstration)}]

    def _filled(self, prompt: str, demonstration: str) -> str:
        # At once: a prompt may hold "{demonstration}" itself.
        texts: dict[str, str] = dict(zip(_FIELDS, (prompt, demonstration), strict=True))
        return re.sub("|".join(map(re.escape, _FIELDS)), lambda found: texts[found.group()], self.template)
