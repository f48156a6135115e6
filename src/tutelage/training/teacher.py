"""The weights of a teacher that is the policy itself: as they were at the start, or an average of those that it has had."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import TrainerCallback

from tutelage.models.weights import WeightSet, load_weights, save_weights
from tutelage.training.start import Start

__all__ = ["AveragedTeacher", "StartTeacher", "Teacher", "TeacherUpdate"]


class Teacher(Protocol):
    """Weights that the policy can take on for a while."""

    def active(self) -> AbstractContextManager[object]:
        """Within, the policy has the teacher's weights."""
        ...


class StartTeacher:
    """The policy with which training started.

    With an adapter that is new it is the base, with the adapter off; else a copy of the trained weights is held: small with an
    adapter, as much as the model where all parameters are trained.

    Args:
        start: of the run, which has taken no step yet.
    """

    def __init__(self, start: Start):
        start.keep()
        self._start = start

    def active(self) -> AbstractContextManager[object]:
        """See ``Teacher.active``."""
        found = self._start.active(step=1)
        assert found is not None  # it was kept
        return found


class AveragedTeacher:
    """An average of the policy's trained weights over the steps: θ̄ ← (1 − a) θ̄ + a θ after each, from θ̄ = θ of the start.

    Of an adapter it is the average of its matrices, not of their product. The average is in float32 at least, whatever the policy's
    weights are in: an a-th of a small step would round to nothing in 16 bits. See ``tutelage.training.checkpoints.Checkpointed``.

    Args:
        policy: the model in training, not sharded.
        rate: a, above 0 and at most 1.
    """

    file = "teacher.safetensors"

    def __init__(self, policy: nn.Module, rate: float):
        self.rate = rate
        self._policy = [p for p in policy.parameters() if p.requires_grad]
        self._weights = WeightSet(policy)
        self.average = [
            p if p.dtype.itemsize >= 4 else nn.Parameter(p.detach().float()) for p in self._weights.parameters
        ]

    @property
    def nbytes(self) -> int:
        """See ``Checkpointed.nbytes``."""
        return sum(p.nbytes for p in self.average)

    def active(self) -> AbstractContextManager[object]:
        """See ``Teacher.active``."""
        return self._weights.active()

    @torch.no_grad()
    def update(self) -> None:
        """The policy has taken a step."""
        for average, weight in zip(self.average, self._policy, strict=True):
            average.lerp_(weight.to(average.dtype), self.rate)
        self._take_average()

    def save(self, folder: Path) -> None:
        """See ``Checkpointed.save``."""
        save_weights(self.average, folder / self.file)

    def load(self, folder: Path) -> None:
        """See ``Checkpointed.load``."""
        load_weights(self.average, folder / self.file)
        self._take_average()

    @torch.no_grad()
    def _take_average(self) -> None:
        for weight, average in zip(self._weights.parameters, self.average, strict=True):
            if weight is not average:
                weight.copy_(average)


class TeacherUpdate(TrainerCallback):
    """Updates an averaged teacher after each optimizer step."""

    def __init__(self, teacher: AveragedTeacher):
        self.teacher = teacher

    def on_step_end(self, args, state, control, **kwargs):
        self.teacher.update()
