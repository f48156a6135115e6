"""tutelage lab: algorithms in planted worlds, to one table and a page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from tutelage.algorithms.registry import NAMES
from tutelage.cli.output import try_folder
from tutelage.cli.parser import CommandParser
from tutelage.errors import UserError
from tutelage.ranges import whole
from tutelage.terminal import say
from tutelage.training.lock import locked

__all__ = ["main"]


def main(args: Sequence[str], console: Console) -> None:
    """Try algorithms in planted worlds, seconds per run, and see paired differences over seeds."""
    parser = CommandParser(prog="tutelage lab", description=main.__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | list")
    run = commands.add_parser(
        "run", help="Run what is missing of a grid; write the table and the page.", allow_abbrev=False
    )
    run.add_argument("grid", metavar="GRID.yaml", help="A file, or a grid that comes with the package.")
    run.add_argument("--output_dir", required=True, help="Where runs, table and page go; run again to resume.")
    run.add_argument("--jobs", type=whole(1, 1024), help="Processes; by default one per core.")
    run.add_argument("--seeds", type=whole(1), help="Only so many of the grid's reporting seeds, from the first.")
    run.add_argument("--worlds", help="Only these worlds, separated by commas.")
    commands.add_parser("list", help="Say which worlds, grids and algorithms there are.", allow_abbrev=False)
    options = parser.parse_args(args)
    if options.command == "list":
        _list(console)
        return
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file, not a folder.", file=str(folder), field="output_dir")
    try_folder(folder)
    from tutelage.cli.libraries import quiet_libraries
    from tutelage.lab.grid import read_grid

    quiet_libraries()
    worlds = None if options.worlds is None else [world for world in options.worlds.split(",") if world]
    grid = read_grid(options.grid).only(worlds, options.seeds)
    # Imported now that the arguments are good: it takes seconds.
    from tutelage.lab.checks import check_grid
    from tutelage.lab.page import write_page
    from tutelage.lab.pool import finished_runs, run_grid
    from tutelage.lab.table import table_rows, write_table

    check_grid(grid, options.grid)
    tell = partial(say, console)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        plan = run_grid(grid, folder, jobs=options.jobs or os.cpu_count() or 1, say=tell)
        rows = table_rows(grid, plan, finished_runs(folder))
        write_table(rows, folder)
        write_page(grid, plan, rows, folder / "lab.html")
    tell(f"table: {folder / 'runs.parquet'}, {folder / 'runs.csv'}")
    tell(f"page: {folder / 'lab.html'}")


def _list(console: Console) -> None:
    from tutelage.lab.grid import shipped_grids
    from tutelage.lab.worlds import WORLDS

    for title, lines in (
        ("worlds", {name: (task.__doc__ or "").split("\n\n")[0] for name, task in WORLDS.items()}),
        ("grids", shipped_grids()),
        ("algorithms", {**{name: f"tutelage {name} --help" for name in NAMES}, "none": "the start as it is"}),
    ):
        say(console, (title, "bold"))
        for name, text in lines.items():
            say(console, f"  {name:<18}{' '.join(text.split())}")
