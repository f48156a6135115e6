"""Runs as results.json describes them, and the part that each plays in a comparison."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutelage.errors import UserError

__all__ = [
    "Run",
    "candidates",
    "control_of",
    "find_run",
    "has_verifier_score",
    "is_control",
    "is_start",
    "load_run",
    "require_distinct_names",
]

Run = dict[str, Any]

SCHEMA = 1
_REQUIRED = {
    "name": str,
    "algorithm": str,
    "model": str,
    "dataset": str,
    "seed": int,
    "settings": dict,
    "history": list,
    "evaluation": dict | None,
    "samples": list,
    "selection": list,
}


def load_run(directory_or_file: str | Path) -> Run:
    """The results.json of a run.

    Args:
        directory_or_file: the run's directory, or its results.json.

    Raises:
        UserError: no such file, not JSON, another schema, or a field that is missing or of the wrong type.
    """
    path = Path(directory_or_file)
    if path.is_dir():
        path = path / "results.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            "no such file.",
            file=str(path),
            remedy="Give the output directory of a run that has finished, or its results.json.",
        ) from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(
            f"not a JSON file ({error}).", file=str(path), remedy="Run again, or restore the file from a copy."
        ) from None
    found = run.get("schema") if isinstance(run, dict) else None
    if found != SCHEMA:
        raise UserError(
            f"results of schema {found!r}, but this version reads schema {SCHEMA}.",
            file=str(path),
            field="schema",
            remedy="Read it with the version of tutelage that wrote it, or run again.",
        )
    run = {"selection": []} | run  # the first files of this schema had no such field
    for field, kind in _REQUIRED.items():
        if field not in run or not isinstance(run[field], kind):
            raise UserError(
                "missing, or not of the type that results have.",
                file=str(path),
                field=field,
                remedy="Run again: a file that tutelage wrote has it.",
            )
    return run


def require_distinct_names(runs: Sequence[Run]) -> None:
    """Runs are told apart by their names alone, in tables, curves and comparisons.

    Raises:
        UserError: no run at all, or two of the same name.
    """
    if not runs:
        raise UserError("no runs to report on.", remedy="Give at least one run.")
    name, count = Counter(run["name"] for run in runs).most_common(1)[0]
    if count > 1:
        raise UserError(f"{count} runs are called {name!r}.", field="name", remedy="Rename all but one of them.")


def find_run(runs: Sequence[Run], name: str | None) -> Run | None:
    """The run called ``name``."""
    return next((run for run in runs if run["name"] == name), None)


def candidates(run: Run) -> list[dict[str, Any]]:
    """The policies that the run chose from, by stage, the start first; empty where nothing was chosen.

    Of each: ``stage`` (how many made it), ``reward`` (mean of its samples on validation rows, by the last reward) with the 95% bounds
    ``reward_low`` and ``reward_high``, ``kl`` to the start (nats per sequence), ``objective`` (reward/scale − β·KL), ``verifier_score``
    (mean score, with ``verifier_score_low`` and ``verifier_score_high``, None without a verifier) and ``chosen``.
    """
    return sorted(run["selection"], key=lambda candidate: candidate["stage"])


def has_verifier_score(run: Run) -> bool:
    """Whether a verifier scored the policies that the run chose from."""
    return any(candidate["verifier_score"] is not None for candidate in candidates(run))


def is_control(run: Run) -> bool:
    """Continued SFT: as much training as the methods get, without what is special about them."""
    return "continued-sft" in (run["name"], run["algorithm"])


def is_start(run: Run) -> bool:
    """What the methods start from: the untrained base model, or SFT."""
    return not is_control(run) and not {"base", "sft"}.isdisjoint((run["name"], run["algorithm"]))


def control_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """What ``run`` has to beat: continued SFT if it is among the runs, else the run that it started from."""
    return next(filter(is_control, runs), None) or find_run(runs, run.get("start"))
