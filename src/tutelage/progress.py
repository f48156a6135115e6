"""Progress events: the engine reports them, the caller decides how to show them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Receives the engine's progress."""

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        """A piece of work begins; the context's value is called with how much of ``total`` is done."""
        ...

    def steps(self, done: int, total: int) -> None:
        """Optimizer steps done and to do in the run."""
        ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        yield lambda done: None

    def steps(self, done: int, total: int) -> None:
        pass
