"""Walk from one node to another past a forbidden one, in a graph that nobody shows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tutelage.lab.vocabulary import NODES
from tutelage.lab.worlds.task import Words, generator

__all__ = ["Navigate"]

_CHORDS = 16
_DETOUR = 1  # the demonstrator's path is at most this much longer than the shortest


class Navigate:
    """A hidden undirected graph of 16 nodes, a ring and 16 chords: there are several ways, and none is shown.

    The content is start, goal and the forbidden node.

    Args:
        seed: of the graph.
    """

    name = "navigate"

    def __init__(self, seed: int):
        rng = generator(self.name, "graph", seed)
        ring = [NODES[index] for index in rng.permutation(len(NODES))]
        self.neighbors: dict[str, set[str]] = {node: set() for node in NODES}
        for a, b in zip(ring, ring[1:] + ring[:1], strict=True):
            self._connect(a, b)
        chords = 0
        while chords < _CHORDS:
            a, b = (NODES[index] for index in rng.permutation(len(NODES))[:2])
            if b not in self.neighbors[a]:
                self._connect(a, b)
                chords += 1

    def _connect(self, a: str, b: str) -> None:
        self.neighbors[a].add(b)
        self.neighbors[b].add(a)

    def content(self, rng: np.random.Generator) -> Words:
        """See ``Task``: a ring with a node taken out is still connected, so there is always a path."""
        return tuple(NODES[index] for index in rng.permutation(len(NODES))[:3])

    def answer(self, content: Words, rng: np.random.Generator) -> Words:
        """A path without repetition, uniformly drawn from those at most one step longer than the shortest."""
        paths = self._paths(content)
        return paths[int(rng.integers(len(paths)))]

    def mistake(self, content: Words, rng: np.random.Generator) -> Words:
        """A right path with one node between its ends replaced, or one put in, so that a step is no edge."""
        start, goal, _ = content
        path = self.answer(content, rng)
        while True:
            middle = [NODES[index] for index in rng.permutation(len(NODES))[: max(1, len(path) - 2)]]
            wrong = (start, *middle, goal)
            if self.judge(content, wrong) == 0:
                return wrong

    def judge(self, content: Words, answer: Sequence[str]) -> float:
        """1 if it goes from start to goal along edges and never over the forbidden node."""
        start, goal, forbidden = content
        if len(answer) < 2 or answer[0] != start or answer[-1] != goal or forbidden in answer:
            return 0.0
        return float(all(b in self.neighbors.get(a, ()) for a, b in pairwise(answer)))

    def _paths(self, content: Words) -> list[Words]:
        """All paths without repetition that are at most ``_DETOUR`` longer than the shortest, in a fixed order."""
        start, goal, forbidden = content
        found: list[Words] = []
        ends: list[Words] = [(start,)]
        longest = len(NODES)
        while ends and len(ends[0]) < longest:
            grown = [
                (*path, node)
                for path in ends
                for node in sorted(self.neighbors[path[-1]])
                if node != forbidden and node not in path
            ]
            reached = [path for path in grown if path[-1] == goal]
            if reached and not found:
                longest = len(reached[0]) + _DETOUR
            found += reached
            ends = [path for path in grown if path[-1] != goal]
        return found
