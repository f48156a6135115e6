"""Log-probs of the demonstrations under an earlier policy: that of the run's start, or that of some steps ago."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from datasets import IterableDataset

from tutelage.data.tokenized import group_from_row
from tutelage.errors import UserError
from tutelage.files import read_json, write_json
from tutelage.groups import Group
from tutelage.progress import Progress
from tutelage.training.rollout import PolicyScorer
from tutelage.training.termination import leave_if_asked

__all__ = ["OLD_LOGPS", "Earlier", "OldLogps", "StartLogps"]

OLD_LOGPS = "old_logps.json"
"""File of a checkpoint: log-probs that the steps after it still need, of a policy that is there no more."""

_CHUNK = 1024  # rows that are scored at a time: Python's lists of tokens are large

_Step = list[list[Group]]
"""Micro-batches of an optimizer step."""


class Earlier(Protocol):
    """Adds to the demonstrations of each optimizer step what is known of them under an earlier policy."""

    def begin(self, checkpoint: Path | None) -> None:
        """Training begins. The policy still has the weights of the run's start.

        Args:
            checkpoint: that the run goes on from.
        """
        ...

    def next_step(self, take: Callable[[], _Step], steps_left: int) -> _Step:
        """The micro-batches of the next optimizer step.

        Args:
            take: gives those of the next step in the data; none where the epoch is over.
            steps_left: of the run, this one included.
        """
        ...

    def save(self, checkpoint: Path) -> None:
        """Write into a checkpoint what ``begin`` cannot find out again."""
        ...


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

    def begin(self, checkpoint: Path | None) -> None:
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
        return [[group.with_values("start_logp", [self._known[_key(group)]]) for group in batch] for batch in take()]

    def save(self, checkpoint: Path) -> None:
        pass


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

    def begin(self, checkpoint: Path | None) -> None:
        self._taken.clear()
        self._logps = deque(read_json(checkpoint / OLD_LOGPS) if checkpoint else [])

    def next_step(self, take: Callable[[], _Step], steps_left: int) -> _Step:
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

    def save(self, checkpoint: Path) -> None:
        write_json(checkpoint / OLD_LOGPS, list(self._logps))


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
