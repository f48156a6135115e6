"""What a world plants: a task with prompts, right and wrong answers, and a judge."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

__all__ = ["Task", "Words", "generator"]

Words = tuple[str, ...]
"""A prompt's content or an answer, without the word that names the task and without the colon."""


class Task(Protocol):
    """A task whose hidden part (colors, graph, grammar, …) comes from a seed.

    All methods are functions of their arguments: the random numbers are handed in.
    """

    name: str

    def content(self, rng: np.random.Generator) -> Words:
        """A prompt's words. Every prompt has an answer."""
        ...

    def answer(self, content: Words, rng: np.random.Generator) -> Words:
        """What the demonstrator writes at full quality."""
        ...

    def mistake(self, content: Words, rng: np.random.Generator) -> Words:
        """What it writes when it errs: an answer of the right form that is wrong or poor."""
        ...

    def judge(self, content: Words, answer: Sequence[str]) -> float:
        """How good an answer is: 1 is right, 0 is wrong."""
        ...


def generator(*names: str | int) -> np.random.Generator:
    """Random numbers that are a function of some names alone.

    >>> float(generator("a", 1).random()) == float(generator("a", 1).random())
    True
    """
    digest = hashlib.sha256("\0".join(map(str, names)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))
