"""SIGTERM: the run ends at the next border, and leaves what a resumed one needs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tutelage.errors import Terminated
from tutelage.launch import is_distributed

__all__ = ["is_asked", "leave_if_asked", "listening"]

_asked = False  # a signal is the process's, and so is this


@contextmanager
def listening() -> Iterator[None]:
    """Within, the first SIGTERM asks the run to end at its next border; a second one ends the process at once.

    A border is the end of an optimizer step of the policy, of a reward or of a fold, and of a piece that is sampled.
    Only the main thread may call it.
    """

    def ask(number: int, frame: Any) -> None:
        global _asked
        _asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    global _asked
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _asked = False


def is_asked() -> bool:
    """Whether the run is to end."""
    return _asked


def leave_if_asked(anywhere: Callable[[bool], bool] | None = None) -> None:
    """Raise ``Terminated`` if the run is to end: call it at a border.

    Args:
        anywhere: whether something is so in any process. Several processes leave together, and thus only where this is given.
    """
    if (_asked and not is_distributed()) if anywhere is None else anywhere(_asked):
        raise Terminated
