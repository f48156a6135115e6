"""The time that chat templates are told: one per run, so that a resumed run has the prompts it had."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from tutelage.errors import UserError
from tutelage.files import read_json, write_json

__all__ = ["CLOCK", "record_time", "recorded_time"]

CLOCK = "template-time.json"
"""Of the run's folder; it is there if the chat template asks for the time."""


def recorded_time(folder: Path) -> datetime | None:
    """When the run in a folder began; None if it has no record of it.

    Raises:
        UserError: the record cannot be read.
    """
    path = folder / CLOCK
    if not path.exists():
        return None
    try:
        return datetime.fromisoformat(read_json(path)["now"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"is no record of a time ({type(error).__name__}: {error}).",
            remedy="Restore the file, or start the run anew in another folder.",
            file=str(path),
        ) from error


def record_time(folder: Path, now: datetime) -> None:
    """Write it down."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CLOCK, {"now": now.isoformat()})
