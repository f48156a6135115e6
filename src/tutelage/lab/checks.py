"""What would fail in the middle of a grid, found before its first run."""

from __future__ import annotations

from typing import Any

from tutelage.errors import UserError
from tutelage.lab.grid import Grid, Like
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
        for candidate in [candidate for cell in grid.cells for candidate in method.candidates(cell)]:
            # What follows another method is a number that is checked there.
            settings = {name: value for name, value in candidate.items() if not isinstance(value, Like)}
            if settings in checked:
                continue
            checked.append(settings)
            try:
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
