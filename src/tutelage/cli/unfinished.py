"""What there is to report of a run that has not ended: run.json, metrics.jsonl and progress.json in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.errors import UserError
from tutelage.files import read_json
from tutelage.results import RunRecord, load_results, run_id

__all__ = ["load_run"]


def load_run(directory_or_file: str | Path) -> RunRecord:
    """The record of a run; of one that is still going on, or was stopped, what is known so far.

    Args:
        directory_or_file: as for ``load_results``.

    Raises:
        UserError: as ``load_results``, or neither results.json nor run.json is there.
    """
    folder = Path(directory_or_file)
    if not folder.is_dir() or not any((folder / name).exists() for name in ("run.json", "progress.json")):
        return load_results(folder)
    progress = _progress(folder)
    if not (folder / "results.json").exists():
        return _record_so_far(folder, progress)
    record = load_results(folder)
    if progress:  # training is over, and something else runs, or ran when the run was killed
        record.unfinished = f"its training is over; {_where(folder, progress)}"
    return record


def _record_so_far(folder: Path, progress: Mapping[str, Any]) -> RunRecord:
    # Here, because torch takes seconds to import and a report of finished runs needs none of it.
    from tutelage.algorithms.registry import find
    from tutelage.files import read_sealed
    from tutelage.training.costs import shown_settings
    from tutelage.training.identity import RUN
    from tutelage.training.journal import read_journal

    try:
        run = read_sealed(folder / RUN)
    except FileNotFoundError:
        raise UserError(
            "no such file: the run has not begun to train.", file=str(folder / RUN), remedy="Wait until it has."
        ) from None
    algorithm, lines = find(run["algorithm"]), read_journal(folder)
    settings = {name: run["settings"][name] for name in shown_settings(algorithm.config) if name in run["settings"]}
    model = run["model"]["name"]
    seconds = next((line["seconds"] for line in reversed(lines) if line["seconds"] is not None), None)
    return RunRecord(
        name=run["settings"].get("run_name") or run["algorithm"],
        algorithm=run["algorithm"],
        model=model,
        dataset=run["data"]["training"]["source"],
        seed=run["settings"]["seed"],
        start=run_id(model),
        settings=settings,
        demonstration_epochs=next((line["epoch"] for line in reversed(lines) if line["epoch"] is not None), None),
        time_s={} if seconds is None else {"total": seconds},
        history=[
            {name: value for name, value in line.items() if value is not None and name not in ("event", "seconds")}
            for line in lines
        ],
        curves=list(algorithm.info.curves),
        unfinished=f"{_how_far(lines)}; {_where(folder, progress)}",
    )


def _how_far(lines: Sequence[Mapping[str, Any]]) -> str:
    if not lines:
        return "nothing is logged yet"
    last = lines[-1]
    stage = "" if last["stage"] is None else f" in stage {last['stage']}"
    epoch = "" if last["epoch"] is None else f", epoch {last['epoch']:.3g}"
    return f"its last logged line is of step {last['step']}{stage}{epoch}"


def _where(folder: Path, progress: Mapping[str, Any]) -> str:
    """What runs now, or that nothing does."""
    from tutelage.training.lock import is_locked

    on = is_locked(folder)
    now = progress.get("now")
    if on is False:
        was = f" (what it was at, as of {progress.get('updated')}: {now})" if now else ""
        return f"it was stopped{was}. Go on with --resume"
    steps, told = progress.get("steps"), ""
    if isinstance(steps, dict) and steps.get("total") and len(progress.get("phases") or []):
        told = f" (step {steps['done']}/{steps['total']})"
    seen = "" if on else ", if the other host that it runs on still does"
    return (f"now: {now}{told}, as of {progress.get('updated')}" if now else "it is going on") + seen


def _progress(folder: Path) -> dict[str, Any]:
    try:
        found = read_json(folder / "progress.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
