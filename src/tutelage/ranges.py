"""Which numbers a setting takes: declared beside the setting, checked before anything is loaded."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tutelage.errors import UserError

__all__ = ["LARGEST", "SEED", "TEMPERATURE", "Range", "check_ranges", "declared_ranges", "number", "whole"]

LARGEST = 2**31 - 1
"""Of whole numbers without a bound of their own: libraries keep them in 32 or 64 bits."""


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers from ``low`` to ``high``. As the ``type`` of an argument of argparse it reads and checks a text.

    Attributes:
        low, high: the bounds; infinite ones are no bounds, but no number is infinite.
        above, below: whether the bound itself is left out.
        is_whole: whether only whole numbers are meant.
        why_not_less: what the user is told of smaller numbers.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    is_whole: bool = False
    why_not_less: str = ""

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, for the user; None if it is in the range."""
        if isinstance(value, bool) or not isinstance(value, Integral if self.is_whole else Real):
            return f"must be {'a whole number' if self.is_whole else 'a number'}, not {_shown(value)}."
        found: Any = value
        if not math.isfinite(found):
            return f"must be a finite number, not {value}."
        inside = (found > self.low if self.above else found >= self.low) and (
            found < self.high if self.below else found <= self.high
        )
        why = f": {self.why_not_less}" if self.why_not_less and found <= self.low else ""
        return None if inside else f"must be {self._told(value)}, not {_shown(value)}{why}."

    def _told(self, value: Any) -> str:
        """The bounds; of one that is there for the libraries' sake only if the value is beyond it."""
        low = f"{'above' if self.above else 'at least'} {self.low:.12g}"
        high = f"{'below' if self.below else 'at most'} {self.high:.12g}"
        if not math.isfinite(self.high) or (self.high == LARGEST and value < self.high):
            return low
        return high if not math.isfinite(self.low) or self.high == LARGEST else f"{low} and {high}"

    def __call__(self, text: str) -> int | float:
        """The number that a command line gives.

        Raises:
            argparse.ArgumentTypeError: it is none, or out of the range.
        """
        value: Any = text
        with suppress(ValueError):
            value = int(text) if self.is_whole else float(text)
        if problem := self.problem(value):
            raise argparse.ArgumentTypeError(problem)
        return value


def whole(low: int, high: int = LARGEST) -> Range:
    """Whole numbers."""
    return Range(low, high, is_whole=True)


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False) -> Range:
    """Numbers; the bounds are left out with ``above`` and ``below``."""
    return Range(low, high, above, below)


SEED = whole(0, 2**32 - 1)
"""NumPy takes no other seed."""

TEMPERATURE = Range(1e-4, 1e4, why_not_less="greedy completions are not samples of the policy")
"""Of samples. Logits divided by less leave the range of float32."""


def check_ranges(config: Any, others: Mapping[str, Range] | None = None) -> None:
    """Check every number of a config that has a range.

    Args:
        config: a dataclass. A field's range stands in its type, as in ``Annotated[int, whole(1)]``; the numbers of a list hold
            to it one by one.
        others: ranges of fields that a library declared.

    Raises:
        UserError: names the first field that is out of its range.
    """
    for name, (allowed, may_be_none, may_be_list) in declared_ranges(
        type(config), tuple((others or {}).items())
    ).items():
        value = getattr(config, name)
        if value is None and may_be_none:
            continue
        for each in value if may_be_list and isinstance(value, list | tuple) else [value]:
            if problem := allowed.problem(each):
                raise UserError(problem, field=name)


@cache
def declared_ranges(kind: type, others: tuple[tuple[str, Range], ...] = ()) -> dict[str, tuple[Range, bool, bool]]:
    """The ranges of a dataclass's fields by name, and whether a field may be None or a list."""
    found = {}
    hints = get_type_hints(kind, include_extras=True)
    for entry in fields(kind):
        hint, allowed = hints[entry.name], dict(others).get(entry.name)
        if get_origin(hint) is Annotated:
            hint, allowed = get_args(hint)
        if allowed is not None:
            found[entry.name] = allowed, NoneType in get_args(hint), get_origin(hint) is list
    return found


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple | set):
        return "a list"
    return f"{value:.12g}" if isinstance(value, float) else repr(value)
