"""--dry_run: what a training run would need and take, without a trace of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from tutelage.errors import UserError
from tutelage.models.precision import available_memory
from tutelage.report.summary import duration
from tutelage.terminal import say
from tutelage.training.checkpoints import checkpoint_problem, checkpoints
from tutelage.training.estimate import Disk, Memory, Pace, Work, disk_of, memory_of, pace_of, work_of
from tutelage.training.identity import check_identity
from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["rehearse"]


def rehearse(trainer: DemonstrationTrainer, console: Console, *, resume: bool) -> None:
    """Print what a run would need and take, by arithmetic and from a few rows that are timed.

    Args:
        resume: the run in the output folder would go on.

    Raises:
        UserError: memory or disk do not suffice for what is certain; or another run is in the folder that would be gone on with.
    """
    folder = Path(str(trainer.args.output_dir))
    if resume:
        check_identity(folder, trainer.identity())
    work = work_of(trainer)
    memory = memory_of(trainer, work)
    free = available_memory(trainer.args.device)
    _require(
        memory.to_come, free, "memory", "gradients and the optimizer's state", "per_device_train_batch_size", _SMALLER
    )
    pace = pace_of(trainer)
    disk = disk_of(trainer, work, memory, pace.bytes_per_token)
    room = shutil.disk_usage(next(path for path in (folder, *folder.resolve().parents) if path.exists())).free
    _require(disk.certain, room, "disk", "checkpoints and the model", "output_dir", _LESS_DISK)
    for line in (*_of_work(work), *_of_memory(memory, free), *_of_disk(disk, room), *_of_time(work, pace)):
        say(console, f"  {line}")
    if resume:
        whole = next((path for path in checkpoints(folder) if checkpoint_problem(path) is None), None)
        say(
            console,
            f"  it would go on from {whole}" if whole else "  no checkpoint is whole: it would begin at step 0",
        )
    say(console, "  the settings and the data are good; nothing was written")


_SMALLER = "Use --use_peft, another --optim, or a smaller model."
_LESS_DISK = "Lower --save_total_limit, use --use_peft or --save_only_model, or name an --output_dir on another disk."


def _require(needed: int, free: int, what: str, of: str, field: str, remedy: str) -> None:
    if needed > free:
        raise UserError(
            f"{of} take {_size(needed)}, and {_size(free)} of {what} are free.", remedy=remedy, field=field
        )


def _of_work(work: Work) -> Iterator[str]:
    if not work.stages:
        yield f"{work.steps:,} optimizer steps; an epoch has {work.rows:,} rows of at most {work.row_tokens:,} tokens"
        return
    yield f"{work.steps:,} optimizer steps in {work.stages:,} stages"
    yield (
        f"a stage: samples for {work.sampled_rows:,} rows, {work.samples:,} samples of at most {work.sample_tokens:,} tokens; "
        f"steps over {work.rows:,} rows of at most {work.row_tokens:,} tokens"
    )


def _of_memory(memory: Memory, free: int) -> Iterator[str]:
    yield (
        f"memory: {_size(memory.weights)} weights (loaded), {_size(memory.gradients)} gradients, {_size(memory.optimizer)} "
        f"optimizer, about {_size(memory.batch)} for the largest batch; {_size(free)} are free"
    )
    if memory.to_come + memory.batch > free:
        yield "warning: that may not suffice: lower --per_device_train_batch_size, or use --gradient_checkpointing"


def _of_disk(disk: Disk, room: int) -> Iterator[str]:
    kept = (
        f"{disk.checkpoints} × {_size(disk.checkpoint)} checkpoints at once" if disk.checkpoints else "no checkpoints"
    )
    stages = f", at most about {_size(disk.stages)} of samples" if disk.stages else ""
    yield f"disk: {kept}, {_size(disk.export)} model{stages}; {_size(room)} are free"
    if disk.certain + disk.stages > room:
        yield "warning: that may not suffice: give --keep_stages, or another --output_dir"


def _of_time(work: Work, pace: Pace) -> Iterator[str]:
    tokens = work.rows * work.row_tokens
    training = tokens * pace.step
    if not work.stages:
        earlier = tokens * pace.score if work.knows_earlier else 0.0
        parts = f"{duration(earlier)} of it for log-probs under an earlier policy; " if work.knows_earlier else ""
        yield (
            f"time: an epoch about {duration(training + earlier)} at most ({parts}an estimate from a few rows, evaluations not "
            "counted)"
        )
        return
    sampling = work.sample_tokens * pace.sample
    scoring = work.sampled_rows * work.row_tokens * pace.score
    each = sampling + scoring + training
    yield (
        f"time: a stage about {duration(each)} at most (sampling {duration(sampling)}, reference {duration(scoring)}, steps "
        f"{duration(training)}), all {work.stages:,} about {duration(work.stages * each)}: an estimate from a few rows that are "
        "timed, as if every sample reached the limit; the fit of a reward, out-of-fold policies and evaluations are not counted"
    )


def _size(count: int) -> str:
    """Bytes for people to read.

    >>> _size(1500), _size(3 * 2**30)
    ('1.5 KiB', '3.0 GiB')
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
