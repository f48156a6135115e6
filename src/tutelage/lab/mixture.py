"""What the base model is pretrained on: generic skills, and none of the worlds' answers.

Copying, sorting, shuffling, short reversals, walks over no graph at all, and texts of four known grammars.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from tutelage.lab.vocabulary import GRAMMARS, NODES, SYMBOLS, WORDS
from tutelage.lab.worlds.task import Words, generator

__all__ = ["RETENTION", "mixture_row", "retention_rows"]

RETENTION = "sort"
"""The skill that runs are asked about afterwards, to see what they forgot."""

_ALPHABETS: tuple[Words, ...] = (SYMBOLS, NODES, WORDS)
_HELD_OUT = 0.05  # share of the retention prompts that pretraining never sees


def mixture_row(rng: np.random.Generator) -> tuple[str, str]:
    """Prompt and answer of a random skill; never a row that ``retention_rows`` may give."""
    while True:
        name = _NAMES[int(rng.integers(len(_NAMES)))]
        content, answer = _SKILLS[name](rng)
        prompt = _prompt(name, content)
        if name != RETENTION or not _held_out(prompt):
            return prompt, " ".join(answer)


def retention_rows(count: int, seed: int) -> list[tuple[str, str]]:
    """Prompts and answers of a skill of the base model, none of which it was trained on."""
    rng, found = generator("retention", seed), dict[str, str]()
    while len(found) < count:
        content, answer = _SKILLS[RETENTION](rng)
        if _held_out(prompt := _prompt(RETENTION, content)):
            found[prompt] = " ".join(answer)
    return list(found.items())


def _prompt(name: str, content: Sequence[str]) -> str:
    return f"{name} {' '.join(content)} : "


def _held_out(prompt: str) -> bool:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") < _HELD_OUT * 2**64


def _some(rng: np.random.Generator, shortest: int, longest: int, alphabet: Words | None = None) -> list[str]:
    """Different words of one alphabet, in random order."""
    alphabet = alphabet or _ALPHABETS[int(rng.integers(len(_ALPHABETS)))]
    count = int(rng.integers(shortest, longest + 1))
    return [alphabet[index] for index in rng.permutation(len(alphabet))[:count]]


def _copy(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    words = _some(rng, 2, 7)
    return words, words


def _sort(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    words = _some(rng, 3, 5)
    return words, sorted(words, key=lambda word: int(word[1:]))


def _shuffle(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    words = _some(rng, 4, 7)
    return words, [words[index] for index in rng.permutation(len(words))]


def _backward(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Never five symbols: that is for the world to ask."""
    words = _some(rng, 2, 6)
    if len(words) == 5 and words[0] in SYMBOLS:
        words = words[:4]
    return words, words[::-1]


def _walk(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    path = _some(rng, 3, 6, NODES)
    return [path[0], path[-1]], path


def _text(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    name = int(rng.integers(len(GRAMMARS)))
    topics = _some(rng, 2, 2, WORDS)
    text = [topics[int(rng.integers(2))]]
    for _ in range(int(rng.integers(4, 9))):
        successors = _GRAMMARS[name][text[-1]]
        text.append(successors[int(rng.integers(len(successors)))])
    return [GRAMMARS[name], *topics], text


def _grammar(name: str) -> dict[str, Words]:
    rng = generator("mixture", name)
    return {word: tuple(WORDS[index] for index in rng.permutation(len(WORDS))[:4]) for word in WORDS}


_GRAMMARS = [_grammar(name) for name in GRAMMARS]
_SKILLS: dict[str, Callable[[np.random.Generator], tuple[list[str], list[str]]]] = {
    "copy": _copy,
    "sort": _sort,
    "shuffle": _shuffle,
    "backward": _backward,
    "walk": _walk,
    "text": _text,
}
_NAMES = tuple(_SKILLS)
