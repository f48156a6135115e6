"""A sampler on servers for several processes: the first one asks for all, and all of them get what it found."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from torch import nn

from tutelage.groups import Group
from tutelage.sampling import RemoteSampler, Sample, SamplingParams
from tutelage.sampling.base import in_order
from tutelage.training.parallel import Processes

__all__ = ["SharedSampler"]

T = TypeVar("T")


class SharedSampler:
    """A ``RemoteSampler`` that only the first process has: weights are handed over once, and every request is made once.

    All processes make the same calls. An error of the first one is raised in all of them.

    Args:
        sampler: the first process's; None in the others.
        processes: that share it.
    """

    def __init__(self, sampler: RemoteSampler | None, processes: Processes):
        self.sampler, self.processes = sampler, processes
        self.gap: float | None = None

    def take_weights(self, policy: nn.Module) -> None:
        """See ``Sampler.take_weights``."""
        self._ask(lambda sampler: sampler.take_weights(policy))

    def verify(
        self, groups: Sequence[Group], params: SamplingParams, score: Callable[[Sequence[Group]], list]
    ) -> None:
        """See ``RemoteSampler.verify``; only the first process calls ``score``, which must not wait for the others."""
        self._ask(lambda sampler: sampler.verify(groups, params, score))

    def require_gap(self, gap: float) -> None:
        """See ``RemoteSampler.require_gap``."""
        self._ask(lambda sampler: sampler.require_gap(gap))

    def release(self) -> None:
        """See ``RemoteSampler.release``."""
        self._ask(lambda sampler: sampler.release())

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        num_samples: int = 1,
        rows: Sequence[int] | None = None,
        stage: int = 0,
        on_finished: Callable[[int, list[Sample]], None] | None = None,
    ) -> list[list[Sample]]:
        """See ``Sampler.sample``."""
        stream = self.stream(prompts, params, num_samples=num_samples, rows=rows, stage=stage)
        return in_order(stream, len(prompts), on_finished)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        num_samples: int = 1,
        rows: Sequence[int] | None = None,
        stage: int = 0,
        on_wait: Callable[[], None] = lambda: None,
    ) -> Generator[tuple[int, list[Sample]], None, None]:
        """See ``RemoteSampler.stream``."""
        mine = (
            self.sampler.stream(prompts, params, num_samples=num_samples, rows=rows, stage=stage, on_wait=on_wait)
            if self.sampler
            else None
        )
        try:
            while True:
                found = self._ask(lambda _: next(mine, None) if mine else None)
                if found is None:
                    return
                yield found
        finally:
            if mine is not None:
                mine.close()

    def _ask(self, call: Callable[[RemoteSampler], T]) -> T:
        """What the first process finds, in all; and the gap that it knows afterwards."""

        def on_main() -> tuple[T, float | None]:
            assert self.sampler is not None
            return call(self.sampler), self.sampler.gap

        found, self.gap = self.processes.on_main(on_main)
        return found
