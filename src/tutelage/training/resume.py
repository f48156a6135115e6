"""Where a run goes on: its newest whole checkpoint whose stages are whole too, with nothing damaged left in the way."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from tutelage.errors import DamagedFileError
from tutelage.files import WRITING
from tutelage.training.checkpoints import checkpoint_problem, checkpoints, step_of
from tutelage.training.manifest import move_aside
from tutelage.training.stages import Stages

__all__ = ["check_checkpoint", "find_checkpoint"]

logger = logging.getLogger(__name__)


def find_checkpoint(run: Path, stages: Stages | None) -> Path | None:
    """The checkpoint to go on from; None to begin at step 0, with what the stages recorded.

    What is not as the run wrote it is named, and moved into the run's folder ``damaged``. So are checkpoints behind the one
    that is taken: the run goes that way again. The stages must know their schedule.

    Args:
        run: the run's folder.
        stages: of a run that has some.
    """
    shutil.rmtree(run / WRITING, ignore_errors=True)
    damaged = stages.store.mend() if stages else []
    found: Path | None = None
    for checkpoint in checkpoints(run):
        if problem := checkpoint_problem(checkpoint):
            logger.warning("%s is passed over: %s; moved to %s", checkpoint, problem, move_aside(checkpoint, run))
        elif found is None:
            lacking = stages and stages.lacks(step_of(checkpoint), damaged)
            if not lacking:
                found = checkpoint
                continue
            reason = f"what it goes on from is damaged or missing: {lacking}"
            logger.warning("%s is passed over: %s; moved to %s", checkpoint, reason, move_aside(checkpoint, run))
    return found


def check_checkpoint(checkpoint: Path, stages: Stages | None) -> None:
    """Refuse a checkpoint that somebody named, where ``find_checkpoint`` would pass it over.

    Raises:
        DamagedFileError: it is not as the run wrote it, or lacks what it goes on from.
    """
    remedy = "Name an earlier checkpoint, or let --resume find one."
    if problem := checkpoint_problem(checkpoint):
        raise DamagedFileError(f"{problem}.", remedy=remedy, file=str(checkpoint))
    if stages and (lacking := stages.lacks(step_of(checkpoint), stages.store.mend())):
        raise DamagedFileError(f"{lacking} is damaged or missing.", remedy=remedy, file=str(checkpoint))
