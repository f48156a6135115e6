"""Who samples, from which weights, and what is known of the samples afterwards."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

from torch import nn

from tutelage.errors import UserError
from tutelage.groups import Group, Role
from tutelage.models.weights import WeightSet, fingerprint
from tutelage.sampling import RemoteSampler, Sample, Sampler, SamplingParams
from tutelage.scoring.logps import Layout, cached_token_logps
from tutelage.training.parallel import ALONE, Processes
from tutelage.training.termination import leave_if_asked

__all__ = ["PolicyScorer", "Rollout"]

_Logps = tuple[tuple[float, ...], ...]
"""Log-probs of the tokens of each completion of a group."""

_MEASURED = 8  # groups on which the sampler's log-probs are held against the trainer's


class PolicyScorer:
    """Log-probs under the policy as it stands, at the settings of a run.

    Args:
        policy: the model in training.
        layout, batch_size, pad_token_id: as for ``cached_token_logps``.
        autocast: makes a context for mixed precision.
        processes: each scores its share.
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        layout: Layout,
        batch_size: int,
        pad_token_id: int,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        processes: Processes = ALONE,
    ):
        self.policy, self.autocast, self.processes = policy, autocast, processes
        self._options: dict[str, Any] = {"layout": layout, "batch_size": batch_size, "pad_token_id": pad_token_id}

    @property
    def alone(self) -> PolicyScorer:
        """The same for one process, which then scores all and waits for no other."""
        return PolicyScorer(self.policy, autocast=self.autocast, **self._options)

    def token_logps(self, groups: Sequence[Group]) -> list[_Logps]:
        """Log-probs of all completion tokens (nats per token); an empty tuple for a prompt alone."""
        held = [group for group in groups if group.completions]
        with self.autocast():
            mine = cached_token_logps(self.policy, self.processes.share(held), **self._options)
        found = iter(self.processes.whole(mine))
        return [next(found) if group.completions else () for group in groups]


class Rollout:
    """Draws samples of the policy and adds what is known of them.

    Where the sampler holds the trainer's weights and draws from the whole distribution, its own log-probs are the
    policy's: they serve, unless they differ from the trainer's by more than ``tolerance``.

    Args:
        sampler: draws completions from the policy as it stands.
        params: how a stage's completions are drawn.
        scorer: log-probs under the policy.
        num_samples: completions per prompt.
        initial: the weights that training started with; None where no log-prob under them is asked for.
        reference_is_initial: the reference is the start and not the policy at the beginning of the stage.
        keep_old: keep the log-probs under the policy that drew the samples too (``old_logps``).
        tolerance: mean difference of log-probs between sampler and trainer (nats per token).
        scores_samples: whether samples need log-probs under the reference too, and not demonstrations alone.
    """

    def __init__(
        self,
        sampler: Sampler,
        params: SamplingParams,
        scorer: PolicyScorer,
        *,
        num_samples: int,
        initial: WeightSet | None = None,
        reference_is_initial: bool = False,
        keep_old: bool = False,
        tolerance: float = 0.0,
        scores_samples: bool = True,
    ):
        if reference_is_initial and initial is None:
            raise ValueError("a reference at the start needs the weights of the start")
        self.sampler, self.params, self.scorer = sampler, params, scorer
        self.num_samples, self.initial = num_samples, initial
        self.reference_is_initial, self.keep_old, self.tolerance = reference_is_initial, keep_old, tolerance
        self.scores_samples = scores_samples
        self.gap: float | None = None
        self._measured: dict[Group, _Logps] = {}
        self._start = self._now = self._trained()

    @property
    def start(self) -> str:
        """A name for the trainable weights that training started with."""
        return self._start

    @property
    def has_moved(self) -> bool:
        """Whether the policy of ``begin`` was another than the one that training started with."""
        return self._now != self._start

    def begin(self, *, gap: float | None = None) -> str:
        """Sampling begins from a policy that may be a new one; gives a name: equal weights have equal names.

        Args:
            gap: what was found when the sampler was held against the trainer earlier in this stage; it is not again.
        """
        frozen = fingerprint((n, p) for n, p in self.scorer.policy.named_parameters() if not p.requires_grad)
        self._now, self.gap, self._measured = self._trained(), gap, {}
        self.sampler.take_weights(self.scorer.policy)
        return f"{frozen}-{self._now}"

    def _trained(self) -> str:
        return fingerprint((n, p) for n, p in self.scorer.policy.named_parameters() if p.requires_grad)

    def draw(
        self,
        groups: Sequence[Group],
        *,
        stage: int,
        params: SamplingParams | None = None,
        weights: WeightSet | None = None,
    ) -> list[Group]:
        """The groups with completions added, which know the log-probs of their tokens under the sampler.

        Args:
            stage: names the samples in the random stream.
            params: instead of those of the stages.
            weights: draw from the policy with these weights instead of its own.
        """
        # A remote sampler draws for all processes at once.
        processes = ALONE if isinstance(self.sampler, RemoteSampler) else self.scorer.processes
        mine = processes.share(groups)
        with weights.active() if weights else nullcontext(), self.scorer.autocast():
            if weights:
                self.sampler.take_weights(self.scorer.policy)
            self._verify(groups, params)
            drawn = self.sampler.sample(
                [group.prompt_ids for group in mine],
                params or self.params,
                num_samples=self.num_samples,
                rows=[group.row for group in mine],
                stage=stage,
                on_finished=lambda *_: leave_if_asked(),
            )
        if weights:
            self.sampler.take_weights(self.scorer.policy)
        return [_with(group, samples) for group, samples in zip(groups, processes.whole(drawn), strict=True)]

    def draw_in_pieces(self, groups: Sequence[Group], size: int, *, stage: int) -> Generator[list[Group], None, None]:
        """As ``draw`` for the stages, ``size`` groups at a time, in order.

        A remote sampler goes on with the next pieces while the caller works on one. If it fails, the groups that it had
        finished come before its error is raised.
        """
        if not isinstance(self.sampler, RemoteSampler):
            for start in range(0, len(groups), size):
                yield self.draw(groups[start : start + size], stage=stage)
            return
        self._verify(groups, None)
        stream = self.sampler.stream(
            [group.prompt_ids for group in groups],
            self.params,
            num_samples=self.num_samples,
            rows=[group.row for group in groups],
            stage=stage,
            on_wait=leave_if_asked,
        )
        finished: dict[int, list[Sample]] = {}
        start = 0
        try:
            with closing(stream):
                for place, samples in stream:
                    finished[place] = samples
                    leave_if_asked()
                    while start < len(groups) and finished.keys() >= set(range(start, min(start + size, len(groups)))):
                        piece = range(start, min(start + size, len(groups)))
                        start = piece.stop
                        yield [_with(groups[place], finished.pop(place)) for place in piece]
        except UserError:
            if finished:
                yield [_with(groups[place], finished[place]) for place in sorted(finished)]
            raise

    def _verify(self, groups: Sequence[Group], params: SamplingParams | None) -> None:
        """A remote sampler has to hold the weights that the policy has now."""
        if isinstance(self.sampler, RemoteSampler) and groups:
            self.sampler.verify(groups, params or self.params, self.scorer.alone.token_logps)

    def finish(self) -> None:
        """No more samples will be drawn."""
        if isinstance(self.sampler, RemoteSampler):
            self.sampler.release()

    @property
    def sampler_gap(self) -> float | None:
        """Mean difference between the log-probs of a remote sampler and the trainer's on its probe (nats per token)."""
        return self.sampler.gap if isinstance(self.sampler, RemoteSampler) else None

    def measure_if_asked(self, groups: Sequence[Group], params: SamplingParams | None = None) -> None:
        """Hold the sampler's log-probs of some fresh samples against the trainer's; ``gap`` is their mean difference.

        Only once per ``begin``, and only where the sampler's might serve, or are those of another process.

        Raises:
            UserError: a remote sampler holds other weights.
        """
        is_remote = isinstance(self.sampler, RemoteSampler)
        if not (params or self.params).is_plain or not (self.tolerance or is_remote) or self.gap is not None:
            return
        measured = list(groups[:_MEASURED])
        own = self.scorer.token_logps(measured)
        gaps = [
            abs(a - b)
            for group, logps in zip(measured, own, strict=True)
            for completion, values in zip(group.completions, logps, strict=True)
            if completion.role is Role.SAMPLE
            for a, b in zip(completion.token_values["sampler_logps"], values, strict=True)
        ]
        self.gap = sum(gaps) / len(gaps) if gaps else 0.0
        self._measured = dict(zip(measured, own, strict=True))
        if isinstance(self.sampler, RemoteSampler):
            self.sampler.require_gap(self.gap)

    def score(self, groups: Sequence[Group], params: SamplingParams | None = None) -> list[Group]:
        """The groups with log-probs under the reference, and under the policy that drew the samples if they are kept.

        Args:
            params: how the samples were drawn, if not as those of the stages.
        """
        if not self.scores_samples:
            return self._score_others(groups, params or self.params)
        needs_policy = self.keep_old or not self.reference_is_initial or not self.has_moved
        found = list(groups)
        policy: list[_Logps] = []
        if needs_policy:
            policy = self._policy_logps(groups, params or self.params)
        if self.keep_old:
            found = [g.with_token_values("old_logps", logps) for g, logps in zip(found, policy, strict=True)]
        reference = policy
        if self.reference_is_initial and self.has_moved:
            assert self.initial is not None
            with self.initial.active():
                reference = self.scorer.token_logps(groups)
        return [g.with_token_values("reference_logps", logps) for g, logps in zip(found, reference, strict=True)]

    def _score_others(self, groups: Sequence[Group], params: SamplingParams) -> list[Group]:
        """Log-probs under the policy of all but the samples."""
        if isinstance(self.sampler, RemoteSampler):  # that it holds the trainer's weights shows in its samples
            self.measure_if_asked(groups, params)
        found = []
        others = [role for role in Role if role is not Role.SAMPLE]
        for group, logps in zip(groups, self._own_logps(groups, others), strict=True):
            rest = iter(logps)
            known = [None if c.role is Role.SAMPLE else next(rest) for c in group.completions]
            found.append(group.with_token_values("reference_logps", known))
        return found

    def rescore(self, groups: Sequence[Group]) -> list[Group]:
        """Groups of an earlier policy with reference log-probs under the policy as it stands."""
        logps = self.scorer.token_logps(groups)
        return [g.with_token_values("reference_logps", values) for g, values in zip(groups, logps, strict=True)]

    def _policy_logps(self, groups: Sequence[Group], params: SamplingParams) -> list[_Logps]:
        """The sampler's log-probs of samples where they serve, the trainer's of everything else."""
        self.measure_if_asked(groups, params)
        if not params.is_plain or self.gap is None or self.gap > self.tolerance:
            return self._own_logps(groups, Role)
        others = [role for role in Role if role is not Role.SAMPLE]
        found = []
        for group, logps in zip(groups, self._own_logps(groups, others), strict=True):
            rest = iter(logps)
            found.append(
                tuple(
                    c.token_values["sampler_logps"] if c.role is Role.SAMPLE else next(rest) for c in group.completions
                )
            )
        return found

    def _own_logps(self, groups: Sequence[Group], roles: Iterable[Role]) -> list[_Logps]:
        """The trainer's log-probs of the completions of some roles; those of measured groups are known already."""
        roles = tuple(roles)
        fresh = [group for group in groups if group not in self._measured]
        scored = iter(self.scorer.token_logps([group.select(group.places(*roles)) for group in fresh]))
        return [
            tuple(self._measured[group][place] for place in group.places(*roles))
            if group in self._measured
            else next(scored)
            for group in groups
        ]


def _with(group: Group, samples: Sequence[Sample]) -> Group:
    return group.add(sample.completion for sample in samples)
