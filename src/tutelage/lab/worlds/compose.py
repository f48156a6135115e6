"""Write a text about three topics in a hidden grammar, as well as possible: open-ended, and the quality has no top."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tutelage.lab.vocabulary import WORDS
from tutelage.lab.worlds.task import Words, generator

__all__ = ["Compose"]

_SUCCESSORS, _SHORTEST, _LONGEST, _DRAFTS = 4, 5, 9, 8
_TOPIC, _LIKED, _REPEAT, _BREAK, _LENGTH = 0.5, 4.0, 0.5, 0.5, 0.5  # weights of the quality
_CALIBRATION = 200  # prompts that fix the scale of the quality


class Compose:
    """Each of 24 words has four successors; each word is liked or disliked. A text of 5 to 9 words should keep to the
    grammar, name all three topics, repeat nothing and use words that are liked.

    The demonstrator writes eight drafts and keeps the best.

    Args:
        seed: of grammar and likings.
    """

    name = "compose"

    def __init__(self, seed: int):
        rng = generator(self.name, "grammar", seed)
        self.successors = {
            word: tuple(WORDS[index] for index in rng.permutation(len(WORDS))[:_SUCCESSORS]) for word in WORDS
        }
        self.weights = {word: rng.dirichlet(np.full(_SUCCESSORS, 2.0)) for word in WORDS}
        self.liking = dict(zip(WORDS, rng.permutation(np.linspace(-1, 1, len(WORDS))).tolist(), strict=True))
        self._zero, self._one = 0.0, 1.0
        rng = generator(self.name, "scale", seed)
        contents = [self.content(rng) for _ in range(_CALIBRATION)]
        drafts = [[self._quality(c, self._draft(c, rng)) for _ in range(_DRAFTS)] for c in contents]
        self._zero, self._one = float(np.mean(drafts)), float(np.mean(np.max(drafts, axis=1)))

    def content(self, rng: np.random.Generator) -> Words:
        """Three topics; see ``Task``."""
        return tuple(WORDS[index] for index in rng.permutation(len(WORDS))[:3])

    def answer(self, content: Words, rng: np.random.Generator) -> Words:
        """The best of eight drafts."""
        return max((self._draft(content, rng) for _ in range(_DRAFTS)), key=lambda text: self._quality(content, text))

    def mistake(self, content: Words, rng: np.random.Generator) -> Words:
        """The worst of eight drafts."""
        return min((self._draft(content, rng) for _ in range(_DRAFTS)), key=lambda text: self._quality(content, text))

    def judge(self, content: Words, answer: Sequence[str]) -> float:
        """Quality: 0 is a draft's mean, 1 the mean of the demonstrator; it can lie below 0 and above 1."""
        return (self._quality(content, answer) - self._zero) / (self._one - self._zero)

    def _draft(self, content: Words, rng: np.random.Generator) -> Words:
        text = [content[int(rng.integers(len(content)))]]
        for _ in range(int(rng.integers(_SHORTEST, _LONGEST + 1)) - 1):
            text.append(str(rng.choice(self.successors[text[-1]], p=self.weights[text[-1]])))
        return tuple(text)

    def _quality(self, content: Words, text: Sequence[str]) -> float:
        unknown = sum(word not in self.liking for word in text)
        breaks = sum(b not in self.successors.get(a, ()) for a, b in pairwise(text)) + unknown
        outside = max(_SHORTEST - len(text), len(text) - _LONGEST, 0)
        liked = sum(self.liking.get(word, 0.0) for word in text) / max(1, len(text))
        return (
            _TOPIC * len(set(content) & set(text))
            + _LIKED * liked
            - _REPEAT * (len(text) - len(set(text)))
            - _BREAK * breaks
            - _LENGTH * outside
        )
