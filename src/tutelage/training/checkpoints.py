"""Checkpoints of a run: written under another name first, so that one that is there is whole."""

from __future__ import annotations

import os
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from tutelage.errors import DamagedFileError
from tutelage.files import sync
from tutelage.training.manifest import MANIFEST, Manifest

__all__ = ["Checkpointed", "RandomState", "checkpoint_problem", "checkpoints", "put_in_place", "step_of"]


@dataclass(frozen=True, slots=True)
class RandomState:
    """The random numbers that come next, of every generator that a checkpoint keeps."""

    python: Any
    numpy: Any
    torch: torch.Tensor
    cuda: torch.Tensor | None

    @staticmethod
    def now() -> RandomState:
        """As it is."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return RandomState(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Go back to it."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


class Checkpointed(Protocol):
    """A part of an algorithm whose state changes from step to step, and lies in the run's checkpoints."""

    @property
    def nbytes(self) -> int:
        """What the state takes on the disk."""
        ...

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint's folder. The first process does it."""
        ...

    def load(self, folder: Path) -> None:
        """Go back to the state that a checkpoint has. Every process does it."""
        ...


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the one with the most steps first."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """How many optimizer steps had been taken."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def put_in_place(written: Path, checkpoint: Path) -> None:
    """Note size and hash of every file of a checkpoint, have it all on the disk, and give it its name."""
    files = [str(path.relative_to(written)) for path in sorted(written.rglob("*")) if path.is_file()]
    Manifest(written).note(*files)
    sync(written)
    if checkpoint.exists():  # of the same step, before the run went back behind it
        os.rename(checkpoint, written.with_name(f"{checkpoint.name}.old"))
    os.rename(written, checkpoint)
    descriptor = os.open(checkpoint.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoint_problem(checkpoint: Path) -> str | None:
    """Why a run cannot go on from a checkpoint, in words that begin with a file's name; None if it can."""
    manifest = Manifest(checkpoint)
    if not manifest.path.exists():
        return f"{MANIFEST} is missing"
    try:
        problems = manifest.problems()
    except DamagedFileError as error:
        return f"{MANIFEST} {error.problem}".removesuffix(".")
    return next((f"{name} {problem}" for name, problem in problems.items()), None)
