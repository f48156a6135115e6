"""What training does to another task: the start is measured before it, the policy after it, on the same rows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from tutelage.errors import DamagedFileError, UserError
from tutelage.evaluation.policy import EvaluationSet
from tutelage.evaluation.record import retention
from tutelage.files import storing
from tutelage.results import EvaluationRecord, RetentionRecord, RunRecord, load_results, write_results
from tutelage.training.config import DemonstrationConfig
from tutelage.training.manifest import Manifest, move_aside

__all__ = ["Retention"]

logger = logging.getLogger(__name__)

Measure = Callable[[EvaluationSet], EvaluationRecord]
"""Evaluates the policy as it stands on the other task's rows."""


class Retention:
    """The rows of another task, and what was found on them before training.

    The findings lie in the run's folder, as the results.json of the start: a resumed run reads them.

    Args:
        rows: the other task's.
        folder: the run's.
        model: names what the run starts from.
        args: what the findings depend on besides.
    """

    def __init__(self, rows: EvaluationSet, folder: Path, model: str, args: DemonstrationConfig):
        self.rows, self.folder, self.model, self.seed = rows, folder / "retention-start", model, args.seed
        # What the findings depend on: a run that goes on under other settings measures the start anew.
        self.settings: dict[str, Any] = {
            "rows": _digest(rows),
            "verifier": rows.task,
            "eval_samples": args.eval_samples,
            "max_completion_length": args.max_completion_length,
            "precision": str(args.computing),
        }
        self.before: EvaluationRecord | None = None

    def measure_start(
        self, measure: Measure, on_main: Callable[[Callable[[], Any]], Any] = lambda call: call()
    ) -> None:
        """Find out what the start can do, unless that is known. Call it while the policy has the start's weights.

        Args:
            on_main: has something done by the one process that reads and writes.
        """
        if self.before is not None:
            return
        self.before = on_main(self._recorded)
        if self.before is None:
            self.before = measure(self.rows)
            on_main(self._write)

    def _write(self) -> None:
        assert self.before is not None
        with storing(self.folder):
            write_results(self.folder, self._record(self.before))
            Manifest(self.folder).note("results.json")

    def compare(self, measure: Measure) -> RetentionRecord:
        """What changed up to the policy as it stands.

        Raises:
            UserError: training has not begun, so nothing is known of the start.
        """
        if self.before is None:
            raise UserError("the start was not measured on the other task.", remedy="Train first.")
        return retention(self.before, measure(self.rows))

    def _record(self, found: EvaluationRecord) -> RunRecord:
        return RunRecord("start", "base", self.model, None, self.seed, settings=self.settings, evaluation=found)

    def _recorded(self) -> EvaluationRecord | None:
        """The findings of a killed run of the same start, rows and settings."""
        path = self.folder / "results.json"
        try:
            if not Manifest(self.folder).has(path.name):
                return None
            found = load_results(Manifest(self.folder).require(path.name, ""))
        except DamagedFileError as error:
            damaged = self.folder if error.file != str(path) else path
            moved = move_aside(damaged, self.folder.parent)
            logger.warning("%s %s It is measured anew; moved to %s", error.file, error.problem, moved)
            return None
        except UserError:  # of another version: measured anew
            return None
        same = (found.model, found.seed, found.settings) == (self.model, self.seed, self.settings)
        return found.evaluation if same else None


def _digest(rows: EvaluationSet) -> str:
    content = [(group.row, group.prompt_ids, [c.token_ids for c in group.completions]) for group in rows.groups]
    return sha256(repr(content).encode()).hexdigest()[:16]
