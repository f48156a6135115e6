"""What would fail in the middle of a grid, found before its first run."""

from __future__ import annotations

from typing import Any

from tutelage.errors import UserError
from tutelage.lab.grid import Cell, Grid, Like
from tutelage.lab.plan import followed
from tutelage.lab.running import check_settings
from tutelage.lab.worlds import World

__all__ = ["check_grid"]


def check_grid(grid: Grid, source: str) -> None:
    """Every method's settings against its algorithm's config, and every world against what is asked of it.

    Raises:
        UserError: an unknown algorithm, setting or value; a world without as many prompts.
    """
    for method in grid.methods:
        checked: list[dict[str, Any]] = []
        for cell, candidate in [(each, found) for each in grid.cells for found in method.candidates(each)]:
            try:
                settings = {name: _plausible(grid, cell, name, value) for name, value in candidate.items()}
                if settings in checked:
                    continue
                checked.append(settings)
                check_settings(method.algorithm, settings, takes_prompts=method.takes_prompts)
            except UserError as error:
                field = f"methods.{method.name}" + (f".{error.field}" if error.field else "")
                raise UserError(error.problem, remedy=error.remedy, file=source, field=field) from error
    for cell in grid.cells:
        tuning = World(cell.world, grid.tuning_seeds[0], "tuning", cell.tuning)
        reporting = World(cell.world, grid.report_seeds[0], "reporting", cell.options)
        try:
            for rows in (tuning.prompts, tuning.validation, reporting.prompts, reporting.test):
                rows()
        except UserError as error:
            raise UserError(error.problem, remedy=error.remedy, file=source, field=f"worlds.{cell.world}") from error


def _plausible(grid: Grid, cell: Cell, name: str, value: Any) -> Any:
    """What a setting may be; one that follows another method's has a value once that one's first candidate is taken."""
    if not isinstance(value, Like):
        return value
    setting = value.setting or name
    other = grid.method(value.method).candidates(cell)[0].get(setting)
    if other is None:
        raise UserError(f"the method '{value.method}' has no setting '{setting}' to follow.", field=name)
    found = _plausible(grid, cell, setting, other)
    if value.times != 1 and (isinstance(found, bool) or not isinstance(found, (int, float))):
        raise UserError(f"'{setting}' of the method '{value.method}' is no number that can be multiplied.", field=name)
    return followed(found, value)
