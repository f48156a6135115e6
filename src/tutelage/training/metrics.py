"""What a run has seen and what it has cost, from one log line to the next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from torch import Tensor

__all__ = ["Costs", "Means", "Track"]

Track = Callable[[str, "Tensor | Sequence[float]"], None]
"""Adds values to the mean that the next log line shows under a name."""


class Means:
    """Running means by name. Tensors are summed where they are: nothing waits for a device until the means are read.

    Args:
        gathered: from what this process has to what each process has.
    """

    def __init__(self, gathered: Callable[[Any], list[Any]] = lambda mine: [mine]):
        self._gathered = gathered
        self._sums: dict[str, Any] = {}
        self._counts: defaultdict[str, int] = defaultdict(int)

    def add(self, name: str, values: Tensor | Sequence[float]) -> None:
        """Add values to the mean called ``name``; see ``Track``."""
        total = values.detach().float().sum() if isinstance(values, Tensor) else float(sum(values))
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._counts[name] += len(values)

    def take(self) -> dict[str, float]:
        """The means of what was added since the last call, in any process."""
        mine = {name: (float(total), self._counts[name]) for name, total in self._sums.items()}
        totals: dict[str, tuple[float, int]] = {}
        for each in self._gathered(mine):
            for name, (total, count) in each.items():
                before = totals.get(name, (0.0, 0))
                totals[name] = before[0] + total, before[1] + count
        means = {name: total / count for name, (total, count) in totals.items() if count}
        self._sums.clear()
        self._counts.clear()
        return means


class Costs:
    """Seconds by kind of work, floating-point operations, and tokens.

    Attributes:
        seconds: by kind: ``negatives``, ``sampling``, ``reference``, ``reward``, ``validation``, ``training``,
            ``evaluation``.
        flops: by the same kinds, without ``evaluation``: see ``tutelage.training.flops``. None where a part of the run
            is not known, because a checkpoint does not tell.
        policy_tokens: completion tokens that the policy's optimizer steps trained on.
        reward_tokens: completion tokens that the reward's optimizer steps trained on.
        sampled_tokens: tokens sampled for training, validation rows included.
    """

    def __init__(self):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.flops: defaultdict[str, float] | None = defaultdict(float)
        self.policy_tokens = self.reward_tokens = self.sampled_tokens = 0
        self._timed: list[str] = []
        self._logged: dict[str, float] = {}

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Within, the clock runs for one kind of work."""
        begin = perf_counter()
        try:
            with self.counted(what):
                yield
        finally:
            self.seconds[what] += perf_counter() - begin

    @contextmanager
    def counted(self, what: str) -> Iterator[None]:
        """Within, operations are those of one kind of work, whose seconds are measured elsewhere."""
        self._timed.append(what)
        try:
            yield
        finally:
            self._timed.pop()

    def count_flops(self, operations: float, *, trains: bool) -> None:
        """Add operations to the kind of work that is timed now; outside any, training or ``other``.

        Those of an evaluation are no cost of training, and not counted.
        """
        kind = self._timed[-1] if self._timed else "training" if trains else "other"
        if self.flops is not None and "evaluation" not in self._timed:
            self.flops[kind] += operations

    @property
    def trained_tokens(self) -> int:
        """Completion tokens trained on, of policy and reward."""
        return self.policy_tokens + self.reward_tokens

    def since_last_log(self) -> dict[str, float]:
        """Seconds of each kind of work since the last call, and completion tokens per second of policy training."""
        now = {**self.seconds, "tokens": float(self.policy_tokens)}
        spent = {name: value - self._logged.get(name, 0.0) for name, value in now.items()}
        self._logged = now
        tokens = spent.pop("tokens")
        found = {f"time/{name}": value for name, value in spent.items()}
        return found | ({"tokens_per_second": tokens / spent["training"]} if spent.get("training") else {})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        tokens = [self.policy_tokens, self.reward_tokens, self.sampled_tokens]
        flops = None if self.flops is None else dict(self.flops)
        return {"seconds": dict(self.seconds), "tokens": tokens, "flops": flops}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``; what went before belongs to no line that is still to come."""
        self.seconds.update(state["seconds"])
        *trained, self.sampled_tokens = state["tokens"]
        # Checkpoints of the first version have one number for what both trained on.
        self.policy_tokens, self.reward_tokens = (*trained, 0)[:2]
        flops = state.get("flops")  # an earlier version counted none
        self.flops = None if flops is None else defaultdict(float, flops)
        self.since_last_log()
