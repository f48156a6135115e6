"""The error for mistakes that the user can fix."""

from __future__ import annotations

from tutelage.visible import visible

__all__ = ["CollapsedError", "DamagedFileError", "NonFiniteLossError", "Terminated", "UserError"]


class UserError(ValueError):
    """Bad input: what is wrong, where (file, row, field) and what to do about it.

    The command line prints only the message and exits with code 2; from Python it is an ordinary ``ValueError``.

    Args:
        problem: what is wrong, one sentence.
        remedy: what to do, one sentence.
        file: the file or dataset the problem is in.
        row: the row's number, counted from 1 as an editor counts lines.
        field: the column or argument.
    """

    def __init__(
        self,
        problem: str,
        *,
        remedy: str | None = None,
        file: str | None = None,
        row: int | None = None,
        field: str | None = None,
    ):
        self.problem, self.remedy, self.file, self.row, self.field = problem, remedy, file, row, field
        place = ", ".join(
            part
            for part in (
                file and visible(file, lines=False),
                row is not None and f"row {row}",
                field and f"field '{field}'",
            )
            if part
        )
        message = f"{place}: {problem}" if place else problem
        super().__init__(f"{message} {remedy}" if remedy else message)


class NonFiniteLossError(UserError):
    """The loss is NaN or infinite; raised before the optimizer step, so no weight has changed."""


class CollapsedError(UserError):
    """A policy has collapsed, and the run was to end there; it has saved what a resumed one needs."""


class DamagedFileError(UserError):
    """A file of a run is not as the run wrote it: torn, altered or gone."""


class Terminated(BaseException):
    """The process was asked to end (SIGTERM), and has saved what a resumed run needs."""
