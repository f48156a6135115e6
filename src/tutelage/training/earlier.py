"""What a loss of SFT is told of an earlier policy: that of the run's start, or that of some steps ago."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from datasets import IterableDataset
from torch import nn

from tutelage.data.tokenized import group_from_row
from tutelage.errors import UserError
from tutelage.files import read_json, write_json
from tutelage.groups import Group
from tutelage.losses import DivergenceKind
from tutelage.progress import Progress
from tutelage.scoring.divergence import teacher_states
from tutelage.scoring.logps import Layout, TokenLogps, completion_token_logps
from tutelage.training.rollout import PolicyScorer
from tutelage.training.teacher import Teacher
from tutelage.training.termination import leave_if_asked

__all__ = ["OLD_LOGPS", "AnchoredLogps", "Earlier", "OldLogps", "StartLogps"]

OLD_LOGPS = "old_logps.json"
"""File of a checkpoint: log-probs that the steps after it still need, of a policy that is there no more."""

_BYTES = 24  # of a number in a JSON file
_CHUNK = 1024  # rows that are scored at a time: Python's lists of tokens are large

_Step = list[list[Group]]
"""Micro-batches of an optimizer step."""


class Earlier(Protocol):
    """Adds to the demonstrations of each optimizer step what is known of them under an earlier policy.

    One whose numbers cannot be found out again is ``Checkpointed`` too.
    """

    def begin(self) -> None:
        """Training begins. The policy still has the weights of the run's start, also where it goes on from a checkpoint."""
        ...

    def next_step(self, take: Callable[[], _Step], steps_left: int) -> _Step:
        """The micro-batches of the next optimizer step.

        Args:
            take: gives those of the next step in the data; none where the epoch is over.
            steps_left: of the run, this one included.
        """
        ...


class AnchoredLogps:
    """Log-probs of the tokens with the divergence from a teacher at each: see ``tutelage.training.objective.Measure``.

    Args:
        teacher: whose weights the policy takes on for the teacher's pass, which is without gradient.
        kind: see ``head_divergence``.
    """

    def __init__(self, teacher: Teacher, kind: DivergenceKind):
        self.teacher = teacher
        self.kind: DivergenceKind = kind

    def __call__(
        self, model: nn.Module, groups: Sequence[Group], /, *, layout: Layout, pad_token_id: int
    ) -> TokenLogps:
        options: dict[str, Any] = {"layout": layout, "pad_token_id": pad_token_id}
        said = teacher_states(model, groups, kind=self.kind, context=self.teacher.active, **options)
        return completion_token_logps(model, groups, teacher=said, **options)


class StartLogps:
    """The log-prob of each demonstration under the policy that the run started with, computed once.

    Completions get it as ``start_logp`` in ``Completion.values`` (nats per sequence).

    Args:
        scorer: log-probs under the policy.
        data: tokenized rows.
        progress: receives progress events.

    Raises:
        UserError: the data are streamed: they cannot be read before training.
    """

    def __init__(self, scorer: PolicyScorer, data: Any, progress: Progress):
        if isinstance(data, IterableDataset):
            raise UserError(
                "streamed data are read once, and --loss_kind iw needs their log-probs before training.",
                remedy="Load the data, or use another --loss_kind.",
                field="loss_kind",
            )
        self.scorer, self.data, self.progress = scorer, data, progress
        self._known: dict[tuple[int, int], float] = {}

    def begin(self) -> None:
        """See ``Earlier.begin``."""
        if self._known:
            return
        with self.progress.phase("log-probs of the demonstrations at the start", len(self.data)) as advance:
            rows = iter(self.data)
            while groups := [group_from_row(row) for row in islice(rows, _CHUNK)]:
                for group, logps in zip(groups, self.scorer.token_logps(groups), strict=True):
                    self._known[_key(group)] = sum(map(sum, logps))
                advance(len(self._known))
                leave_if_asked(self.scorer.processes.any)

    def next_step(self, take: Callable[[], _Step], steps_left: int) -> _Step:
        """See ``Earlier.next_step``."""
        return [[group.with_values("start_logp", [self._known[_key(group)]]) for group in batch] for batch in take()]


def _key(group: Group) -> tuple[int, int]:
    """Names a demonstration: of one row, turns of a conversation differ in their prompts' lengths."""
    return group.row, len(group.prompt_ids)


class OldLogps:
    """Log-probs of the tokens under π_old, the policy where a window of optimizer steps began.

    The demonstrations of all steps of a window are taken at its beginning and scored with the policy as it stands; completions
    get the numbers as ``old_logps`` in ``Completion.token_values``. A window ends with its epoch at the latest.

    Args:
        scorer: log-probs under the policy.
        steps: optimizer steps of a window.
    """

    def __init__(self, scorer: PolicyScorer, steps: int):
        self.scorer, self.steps = scorer, steps
        self._taken: deque[_Step] = deque()  # empty where the run goes on inside a window
        self._logps: deque[list[dict[str, Any]]] = deque()  # of each step of the window that is still to come

    def begin(self) -> None:
        """See ``Earlier.begin``."""
        self._taken.clear()
        self._logps.clear()

    def next_step(self, take: Callable[[], _Step], steps_left: int) -> _Step:
        """See ``Earlier.next_step``."""
        if not self._logps:
            self._taken = deque(step for _ in range(min(self.steps, steps_left)) if (step := take()))
            self._logps = deque(self._score(self._taken))
        if not self._logps:
            return []
        return _with_old_logps(self._taken.popleft() if self._taken else take(), self._logps.popleft())

    def _score(self, steps: Iterable[_Step]) -> list[list[dict[str, Any]]]:
        held = [[group for batch in step for group in batch] for step in steps]
        found = iter(self.scorer.token_logps([group for groups in held for group in groups]))
        return [[{"row": group.row, "logps": next(found)} for group in groups] for groups in held]

    @property
    def nbytes(self) -> int:
        """See ``Checkpointed.nbytes``; before training it is 0, and then a few numbers per token of a window."""
        return sum(_BYTES * len(record["logps"]) for records in self._logps for record in records)

    def save(self, folder: Path) -> None:
        """See ``Checkpointed.save``."""
        write_json(folder / OLD_LOGPS, list(self._logps))

    def load(self, folder: Path) -> None:
        """See ``Checkpointed.load``."""
        self._taken.clear()
        self._logps = deque(read_json(folder / OLD_LOGPS))


def _with_old_logps(step: _Step, records: list[dict[str, Any]]) -> _Step:
    rows = [group.row for batch in step for group in batch]
    if rows != [record["row"] for record in records]:
        raise UserError(
            "a checkpoint has log-probs of other rows than the data give.",
            remedy="Resume with the same data, seed and batch size.",
            field="resume",
        )
    logps = iter(records)
    return [[group.with_token_values("old_logps", next(logps)["logps"]) for group in batch] for batch in step]
