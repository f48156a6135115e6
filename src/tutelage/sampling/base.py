"""The sampler protocol, and the random numbers that samplers use."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from torch import nn

from tutelage.groups import Completion, Group, Role

__all__ = ["RemoteSampler", "Sample", "Sampler", "SamplingParams", "in_order", "stream_seed", "uniforms"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn.

    The theory assumes ỹ ~ π itself: temperature 1, no top-k, no top-p, which are the defaults.

    Attributes:
        max_completion_length: maximum tokens, end-of-turn included; longer completions are truncated.
        stop_ids: tokens that end a completion; the one that ended it is its last token.
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
        seed: determines every token, together with stage, row, draw and position.
    """

    max_completion_length: int = 256
    stop_ids: frozenset[int] = frozenset()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_completion_length < 1:
            raise ValueError("max_completion_length must be at least 1 token")
        if self.temperature < 0:
            raise ValueError("temperature must be 0 (greedy) or above")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError("top_k must be 0 (off) or above, top_p in (0, 1]")

    @property
    def is_plain(self) -> bool:
        """Whether samples are the policy's own: at temperature 1, from the whole distribution."""
        return self.temperature == 1 and not self.top_k and self.top_p == 1


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion drawn from a policy.

    Attributes:
        token_ids: the tokens, with the stop token that finished it, if one did.
        token_logps: log-prob of each under the policy it was drawn from, temperature and filters included (nats); at
            temperature 0 under the policy as it is.
        finished: False if it was truncated at the length limit.
    """

    token_ids: tuple[int, ...]
    token_logps: tuple[float, ...]
    finished: bool

    @property
    def completion(self) -> Completion:
        """As a member of a group, which knows ``sampler_logps``."""
        return Completion(self.token_ids, Role.SAMPLE, self.finished, {"sampler_logps": self.token_logps})


class Sampler(Protocol):
    """Token ids in, token ids and log-probs out."""

    def take_weights(self, policy: nn.Module) -> None:
        """The policy's weights may be new ones: have what samples hold the same. Called before each stage's samples.

        A sampler that reads the model in the training process has nothing to do.
        """
        ...

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
        """Draw ``num_samples`` completions for each prompt.

        Args:
            prompts: token ids of each prompt.
            rows: the number that names each prompt in the random stream; by default its place in ``prompts``.
            stage: the stage's number, likewise.
            on_finished: called with a prompt's place in ``prompts`` and its samples as soon as all of them are drawn.

        Returns:
            one list of samples per prompt, in the order of ``prompts``.
        """
        ...


@runtime_checkable
class RemoteSampler(Sampler, Protocol):
    """A sampler in another process: it holds a copy of the weights, which may be an old one."""

    gap: float | None
    """Mean difference of log-probs to the trainer's, of the last weights that it took (nats per token); None unless
    ``verify`` was called."""

    def verify(
        self, groups: Sequence[Group], params: SamplingParams, score: Callable[[Sequence[Group]], list]
    ) -> None:
        """Have the next samples drawn only where the log-probs of a probe are the trainer's.

        Args:
            groups: the probe's prompts are taken from these, at the first call.
            params: how completions are drawn.
            score: the trainer's log-probs of all completion tokens under the weights that were taken last, as
                ``PolicyScorer.token_logps`` gives them.

        Raises:
            UserError: the sampler holds other weights; raised here or while samples are drawn.
        """
        ...

    def require_gap(self, gap: float) -> None:
        """Raise if the log-probs of samples differ from the trainer's by more than rounding.

        Raises:
            UserError: they do.
        """
        ...

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
        """As ``sample``: the place and the samples of each prompt as they are finished. Others are drawn meanwhile.

        Close it where not all are wanted.

        Args:
            on_wait: called several times a second while nothing is finished; it may raise.
        """
        ...

    def release(self) -> None:
        """No more samples will be drawn: remove what was handed over."""
        ...


def in_order(
    stream: Generator[tuple[int, list[Sample]], None, None],
    count: int,
    on_finished: Callable[[int, list[Sample]], None] | None = None,
) -> list[list[Sample]]:
    """What ``RemoteSampler.stream`` gives for ``count`` prompts, as ``Sampler.sample`` returns it."""
    found: list[list[Sample]] = [[] for _ in range(count)]
    with closing(stream):
        for place, samples in stream:
            found[place] = samples
            if on_finished:
                on_finished(place, samples)
    return found


def uniforms(seed: int, stage: int, rows: np.ndarray, draws: np.ndarray, position: int) -> np.ndarray:
    """One uniform number in [0, 1) per token, a function only of the token's coordinates.

    A counter-based generator: the coordinates are mixed in one by one with the finalizer of SplitMix64 (Steele, Lea
    and Flood 2014), so samples do not depend on batch size, order, number of processes or resuming.

    Args:
        rows, draws: [B] integers.
        position: of the token in its completion, from 0.

    Returns:
        [B] float64 with 53 random bits.

    >>> a = uniforms(0, 1, np.array([5, 6]), np.array([0, 0]), position=3)
    >>> b = uniforms(0, 1, np.array([6]), np.array([0]), position=3)
    >>> bool(a[1] == b[0]), bool(a[0] == a[1])
    (True, False)
    """
    state = np.zeros(len(rows), dtype=np.uint64)
    for coordinate in (seed, stage, rows, draws, position):
        state = _splitmix64(state ^ np.asarray(coordinate, dtype=np.int64).astype(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def stream_seed(seed: int, stage: int, row: int, draw: int) -> int:
    """A seed for one completion, a function only of its coordinates; below 2⁶³.

    >>> stream_seed(0, 1, 5, 0) == stream_seed(0, 1, 5, 0), stream_seed(0, 1, 5, 0) == stream_seed(0, 1, 5, 1)
    (True, False)
    """
    state = np.zeros(1, dtype=np.uint64)
    for coordinate in (seed, stage, row, draw):
        state = _splitmix64(state ^ np.asarray([coordinate], dtype=np.int64).astype(np.uint64))
    return int(state[0] >> np.uint64(1))


def _splitmix64(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)  # uint64 arrays wrap around, which the generator relies on
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
