"""A world: a planted task with rows for every purpose, split by what the prompts say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tutelage.errors import UserError
from tutelage.lab.worlds.arrange import Arrange
from tutelage.lab.worlds.compose import Compose
from tutelage.lab.worlds.navigate import Navigate
from tutelage.lab.worlds.reverse import Reverse
from tutelage.lab.worlds.task import Task, Words, generator

__all__ = ["CORRUPTIONS", "WORLDS", "Phase", "Row", "World", "WorldOptions", "split_of"]

WORLDS: dict[str, Callable[[int], Task]] = {
    "arrange": Arrange,
    "navigate": Navigate,
    "compose": Compose,
    "reverse": Reverse,
}

Phase = Literal["tuning", "reporting"]
"""Settings are chosen on the rows of ``tuning``, numbers come from those of ``reporting``."""

Corruption = Literal["wrong", "off_topic", "truncated", "overlong"]
CORRUPTIONS: tuple[Corruption, ...] = ("wrong", "off_topic", "truncated", "overlong")

_SPLITS = (("tuning", 0.3), ("reporting", 0.7))
_ROLES = (("training", 0.75), ("validation", 0.125), ("test", 0.125))
_PATIENCE = 20_000  # draws without a new prompt before a world is held to have no more


@dataclass(frozen=True, slots=True)
class WorldOptions:
    """How much of what a world gives.

    Attributes:
        demonstrations: rows to train on.
        prompts: prompts without demonstrations.
        corrupted: share of the demonstrations that is corrupted, one kind as often as the other.
        quality: probability that the demonstrator does not err.
        validation, test: rows to choose settings on, and rows that numbers come from.
    """

    demonstrations: int = 128
    prompts: int = 1500
    corrupted: float = 0.0
    quality: float = 1.0
    validation: int = 96
    test: int = 192

    def __post_init__(self):
        for name in ("corrupted", "quality"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"must be between 0 and 1, not {getattr(self, name)}.", field=name)
        for name, least in (("demonstrations", 1), ("prompts", 0), ("validation", 1), ("test", 1)):
            if getattr(self, name) < least:
                raise UserError(f"must be at least {least}, not {getattr(self, name)}.", field=name)


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt with an answer, and what training is never told of it.

    Attributes:
        content, answer: words of both; see ``Words``.
        text: the prompt as the model reads it.
        corruption: how the answer was spoiled, None where it was not.
    """

    content: Words
    answer: Words
    text: str
    corruption: Corruption | None = None

    @property
    def demonstration(self) -> dict[str, str]:
        """The row as training sees it."""
        return {"prompt": self.text, "completion": " ".join(self.answer)}


class World:
    """Rows of a planted task, all of them a function of name, seed, phase and options.

    Training, validation and test prompts of both phases are disjoint: a hash of its content says where a prompt belongs.

    Args:
        name: one of ``WORLDS``.
        seed: of what is hidden, and of the rows.
        phase: settings are chosen on one half of all prompts, numbers come from the other.
        options: how many rows of what kind.

    Raises:
        UserError: no such world, or it does not have as many different prompts.
    """

    def __init__(self, name: str, seed: int, phase: Phase, options: WorldOptions | None = None):
        if name not in WORLDS:
            raise UserError(f"there is no world '{name}'.", remedy=f"Worlds: {', '.join(WORLDS)}.", field="worlds")
        self.name, self.seed, self.phase = name, seed, phase
        self.options = options or WorldOptions()
        self.task: Task = WORLDS[name](seed)

    def demonstrations(self) -> list[Row]:
        """Rows to train on, some of them corrupted."""
        count = self.options.demonstrations
        rng = self._generator("answers")
        rows = [self._demonstration(content, rng) for content in self._contents("training", count)]
        spoiled = self._generator("corruption").permutation(count)[: round(self.options.corrupted * count)]
        for number, place in enumerate(spoiled.tolist()):
            kind = CORRUPTIONS[number % len(CORRUPTIONS)]
            rows[place] = self._corrupted(rows[place], kind, rng)
        return rows

    def prompts(self) -> list[str]:
        """Prompts that nobody wrote an answer to."""
        count = self.options.demonstrations
        return [self._text(c) for c in self._contents("training", count + self.options.prompts)[count:]]

    def validation(self) -> list[Row]:
        """Rows to choose settings on."""
        return self._held_out("validation", self.options.validation)

    def test(self) -> list[Row]:
        """Rows that numbers come from."""
        return self._held_out("test", self.options.test)

    def judge(self, row: Row, answer: Sequence[str]) -> float:
        """How good an answer to a row's prompt is; for evaluation alone."""
        return self.task.judge(row.content, answer)

    def _held_out(self, role: str, count: int) -> list[Row]:
        rng = self._generator(role, "answers")
        return [
            Row(content, self.task.answer(content, rng), self._text(content))
            for content in self._contents(role, count)
        ]

    def _demonstration(self, content: Words, rng: np.random.Generator) -> Row:
        write = self.task.answer if rng.random() < self.options.quality else self.task.mistake
        return Row(content, write(content, rng), self._text(content))

    def _corrupted(self, row: Row, kind: Corruption, rng: np.random.Generator) -> Row:
        if kind == "wrong":
            answer = self.task.mistake(row.content, rng)
        elif kind == "off_topic":
            answer = self.task.answer(self._other(row.content, rng), rng)
        elif kind == "truncated":
            answer = row.answer[: max(1, len(row.answer) // 2)]
        else:
            answer = row.answer + row.answer[: max(1, len(row.answer) // 2)]
        return Row(row.content, answer, row.text, kind)

    def _other(self, content: Words, rng: np.random.Generator) -> Words:
        """A prompt whose right answers are wrong for this one: none of its words, where that is possible."""
        others = [self.task.content(rng) for _ in range(32)]
        return min(others, key=lambda other: len(set(other) & set(content)))

    def _text(self, content: Words) -> str:
        return f"{self.name} {' '.join(content)} : "

    def _generator(self, *names: str) -> np.random.Generator:
        return generator(self.name, self.seed, self.phase, *names)

    def _contents(self, role: str, count: int) -> list[Words]:
        """The first ``count`` of an endless list of different prompts of a role; a longer list begins with a shorter one."""
        rng, found = self._generator(role), dict[Words, None]()
        idle = 0
        while len(found) < count and idle < _PATIENCE:
            content = self.task.content(rng)
            idle += 1
            if content not in found and split_of(self.name, content) == (self.phase, role):
                found[content], idle = None, 0
        if len(found) == count:
            return list(found)
        raise UserError(
            f"the world '{self.name}' has {len(found)} different {role} prompts for {self.phase}, not {count}.",
            remedy="Ask for fewer demonstrations, prompts or rows.",
        )


def split_of(world: str, content: Words) -> tuple[str, str]:
    """Phase and role of a prompt: a function of its words alone, so no prompt serves two purposes.

    >>> split_of("reverse", ("s1", "s2", "s3", "s4", "s5")) in {(p, r) for p, _ in _SPLITS for r, _ in _ROLES}
    True
    """
    digest = hashlib.sha256(f"{world} {' '.join(content)}".encode()).digest()
    first, second = (int.from_bytes(part, "big") / 2**64 for part in (digest[:8], digest[8:16]))
    return _pick(_SPLITS, first), _pick(_ROLES, second)


def _pick(shares: Sequence[tuple[str, float]], number: float) -> str:
    for name, share in shares:
        if number < share:
            return name
        number -= share
    return shares[-1][0]
