"""All runs of a grid on all cores. A finished run is a file; nothing that is finished is run again."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Set
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.errors import NonFiniteLossError, UserError
from tutelage.files import read_json, write_json
from tutelage.lab.base import base_folder
from tutelage.lab.code import code_of, code_version
from tutelage.lab.definitions import Run
from tutelage.lab.grid import Grid
from tutelage.lab.plan import Plan, Wanted, expected_runs, make_plan

__all__ = ["finished_runs", "run_grid"]

Say = Callable[[str], None]


def run_grid(grid: Grid, folder: Path, *, jobs: int, say: Say, cache: Path | None = None) -> Plan:
    """Run what is missing.

    Args:
        grid: what is wanted.
        folder: finished runs lie in ``runs``, policies in ``weights``.
        jobs: processes, each with one thread; they stay alive, so that libraries are imported once.
        say: shows a line of progress.
        cache: where the base model is kept.

    Returns:
        the plan, whose runs are finished.

    Raises:
        UserError: a run failed; all others that could run without it are finished.
    """
    runs, weights = folder / "runs", folder / "weights"
    for each in (runs, weights):
        each.mkdir(parents=True, exist_ok=True)
    results = finished_runs(folder)
    failures: dict[str, tuple[Wanted, str]] = {}
    progress = _Progress(grid, results, say)
    plan = make_plan(grid, results)
    _tell_other_code(plan, results, folder, say)
    if plan.complete and all(wanted.run.name in results for wanted in plan.wanted):
        return plan
    say("the base model: pretrained once, about a minute on a core, if it is not there yet")
    base_folder(grid.base, cache)
    context = multiprocessing.get_context("spawn")
    with _one_thread(), ProcessPoolExecutor(jobs, context, initializer=_begin) as pool:
        running: dict[Future, Wanted] = {}
        try:
            while True:
                for run in _without_start(plan, results):
                    results[run.name] = _diverged(run, "its start diverged")
                    write_json(runs / f"{run.name}.json", results[run.name])
                    plan = make_plan(grid, results)
                busy = {wanted.run.name for wanted in running.values()}
                ready = _ready(plan, results, busy | failures.keys(), weights)
                for wanted in ready[: 2 * jobs - len(running)]:  # one waits behind each that runs
                    running[pool.submit(_work, wanted.run, weights, cache)] = wanted
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    wanted = running.pop(future)
                    result = future.result()
                    if "failure" in result:
                        failures[wanted.run.name] = wanted, result["failure"]
                        say(f"failed: {_title(wanted)}: {result['failure'].strip().splitlines()[-1]}")
                        continue
                    write_json(runs / f"{wanted.run.name}.json", result)
                    results[wanted.run.name] = result
                    progress.finished(wanted, result)
                plan = make_plan(grid, results)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failures:
        wanted, text = next(iter(failures.values()))
        (folder / "failures.txt").write_text("\n\n".join(text for _, text in failures.values()), encoding="utf-8")
        raise UserError(
            f"{len(failures)} run(s) failed, the first of them {_title(wanted)}: {text.strip().splitlines()[-1]}",
            remedy="The other runs are kept; mend the grid and run it again.",
            file=str(folder / "failures.txt"),
        )
    return plan


def _ready(plan: Plan, results: Mapping[str, Any], others: Set[str], weights: Path) -> list[Wanted]:
    """Runs that can begin, each once: those that others wait for go first.

    A start whose policy is no longer there is run again for the runs that need it.
    """
    found: dict[str, Wanted] = {}
    for wanted in plan.wanted:
        if wanted.run.name in results:
            continue
        while (start := wanted.run.start) is not None and not (weights / f"{start.name}.safetensors").exists():
            wanted = replace(wanted, run=start)
        if wanted.run.name not in others:
            found.setdefault(wanted.run.name, wanted)
    return sorted(found.values(), key=lambda wanted: wanted.run.phase != "tuning")


def _without_start(plan: Plan, results: Mapping[str, Any]) -> list[Run]:
    """Unfinished runs whose start diverged: there is no policy that they could begin with."""
    return [
        wanted.run
        for wanted in plan.wanted
        if wanted.run.name not in results
        and wanted.run.start is not None
        and results.get(wanted.run.start.name, {"measures": {}})["measures"] is None
    ]


def finished_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """The results in a folder by the names of their runs."""
    return {path.stem: read_json(path) for path in sorted((folder / "runs").glob("*.json"))}


def _tell_other_code(plan: Plan, results: Mapping[str, Any], folder: Path, say: Say) -> None:
    names = {wanted.run.name for wanted in plan.wanted} & results.keys()
    others = sum(code_of(results[name]) != code_version() for name in names)
    if others:
        say(
            f"{others} of {len(names)} finished runs are of another version of the code, and are kept; "
            f"remove {folder} to repeat them"
        )


def _title(wanted: Wanted) -> str:
    return f"{wanted.cell.title} · {wanted.method} · {wanted.run.phase} seed {wanted.run.seed}"


@contextlib.contextmanager
def _one_thread():
    """The workers that are made within have one thread each: more would wait for one another."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# --- in a worker --------------------------------------------------------------------------------------------------------


def _begin() -> None:
    """Import what runs need, once; end where the parent ends."""
    import torch

    import tutelage.lab.running  # noqa: F401

    parent = multiprocessing.parent_process()
    assert parent is not None
    code_version()  # of the sources that were imported, not of those that an edit leaves later
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a trainer collects garbage at its end, which takes longer than its steps if all modules are looked at


def _work(run: Run, weights: Path, cache: Path | None) -> dict[str, Any]:
    from tutelage.lab.running import execute

    # transformers prints what it logs
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            return execute(run, weights, cache)
        except NonFiniteLossError as error:  # a rate that is too high is a finding
            return _diverged(run, str(error))
        except Exception:
            return {"failure": traceback.format_exc()}


def _diverged(run: Run, why: str) -> dict[str, Any]:
    return {"definition": run.definition, "code": code_version(), "measures": None, "costs": {}, "diverged": why}


class _Progress:
    """Lines with the time that is left, by the seconds that runs of a kind have taken."""

    def __init__(self, grid: Grid, results: Mapping[str, Any], say: Say):
        self.expected, self.say = expected_runs(grid), say
        self.begun, self.before, self.done = time.perf_counter(), len(results), 0
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def finished(self, wanted: Wanted, result: Mapping[str, Any]) -> None:
        """Say that a run is done."""
        self.done += 1
        left = max(0, self.expected - self.before - self.done)
        pace = (time.perf_counter() - self.begun) / self.done
        shown = "diverged"
        if result["measures"] is not None:
            shown = f"score {result['measures']['score']:.3f}, greedy {result['measures']['score_greedy']:.3f}"
        seconds = result["costs"].get("seconds", np.nan)
        self.say(
            f"{self.before + self.done} of about {max(self.expected, self.before + self.done)}: {_title(wanted)}: {shown} "
            f"({seconds:.1f} s); about {max(1, round(left * pace / 60))} min left"
        )
