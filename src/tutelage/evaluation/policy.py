"""What a policy learned: held-out log-probs, the implicit reward on preference pairs, task score."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn

from tutelage.data.demonstrations import Demonstration, Turns
from tutelage.data.origin import selected
from tutelage.data.tokenization import Tokenization
from tutelage.data.tokenized import tokenized_rows
from tutelage.errors import UserError
from tutelage.evaluation.reward_quality import ScoredAnswers, reward_quality
from tutelage.evaluation.statistics import bootstrap_mean, mean_interval
from tutelage.evaluation.verifiers import Verifier, load_verifier
from tutelage.groups import Group, drop_copies
from tutelage.results import EvaluationRecord, RewardQualityRecord
from tutelage.rewards.base import Reward
from tutelage.sampling import Sample, SamplingParams, TransformersSampler
from tutelage.sampling.base import Sampler
from tutelage.scoring.logps import Layout, cached_logps

_WITH_UNIT = {
    "demonstration_logp",
    "demonstration_reward",
    "preference_gap",
    "preference_logp_gap",
    "kl",
    "distinct_right",
}

__all__ = ["Answers", "Evaluation", "EvaluationSet", "can_sample", "ranking"]


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers to each row, equally many, and what is known of them: one list per row, one entry per answer.

    Attributes:
        samples: as they were drawn from the policy.
        texts: for people and verifiers.
        scores: the verifier's; None without one.
        logps, start_logps: log-probs under the policy that drew them, and under the start (nats per sequence); None
            where they were not asked for.
        rewards: by a learned reward; None without one.
    """

    samples: list[list[Sample]]
    texts: list[list[str]]
    scores: list[list[float]] | None = None
    logps: list[tuple[float, ...]] | None = None
    start_logps: list[tuple[float, ...]] | None = None
    rewards: list[list[float]] | None = None

    @property
    def count(self) -> int:
        """Answers to each row."""
        return len(self.samples[0])

    @property
    def score(self) -> list[float] | None:
        """The verifier's mean score of each row's answers; None without a verifier."""
        return None if self.scores is None else [float(np.mean(row)) for row in self.scores]

    @property
    def right(self) -> list[float] | None:
        """The share of each row's answers with a full score, what accuracy is the mean of; None without a verifier."""
        if self.scores is None:
            return None
        return [float(np.mean([score >= 1 for score in row])) for row in self.scores]

    @property
    def distinct_right(self) -> list[float] | None:
        """How many different right answers each row has, by their text without spaces at its ends.

        None without a verifier, and where there is one answer only, which says nothing of diversity.
        """
        if self.scores is None or self.count < 2:
            return None
        return [
            float(len({text.strip() for text, score in zip(texts, scores, strict=True) if score >= 1}))
            for texts, scores in zip(self.texts, self.scores, strict=True)
        ]

    @property
    def kl(self) -> list[float] | None:
        """Mean of log π − log π_0 over each row's answers: its mean estimates KL(π‖π_0) (nats per sequence)."""
        if self.logps is None or self.start_logps is None:
            return None
        return [float(np.mean(np.subtract(now, then))) for now, then in zip(self.logps, self.start_logps, strict=True)]

    def added_to(self, groups: Sequence[Group]) -> list[Group]:
        """The rows' groups with the answers as samples."""
        return [
            group.add(sample.completion for sample in samples)
            for group, samples in zip(groups, self.samples, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results, one value per held-out row.

    Attributes:
        rows: the rows' numbers.
        demonstration_logps: log π of the demonstration (nats per sequence).
        demonstration_lengths: tokens.
        demonstration_rewards: implicit reward of the demonstration, β log π/π_0; None without a reference.
        preference_rewards: [pairs, 2] implicit rewards of preferred and rejected answer, log π/π_0 (nats); None
            without pairs or reference.
        preference_logps: [pairs, 2] log π of the same; None without pairs.
        reward_accuracy, preference_reward_accuracy: how a learned reward ranks the demonstration against the sampled
            answers (rows where one differs), and the preferred against the rejected answer: 1, 0, or 0.5 for a tie, and
            the mean over several answers; None without a learned reward.
        sampled, greedy: answers drawn at temperature 1, and the likeliest-token one.
    """

    rows: list[int]
    demonstration_logps: list[float]
    demonstration_lengths: list[int]
    demonstration_rewards: list[float] | None = None
    preference_rewards: np.ndarray | None = None
    preference_logps: np.ndarray | None = None
    reward_accuracy: list[float] | None = None
    preference_reward_accuracy: list[float] | None = None
    sampled: Answers | None = None
    greedy: Answers | None = None
    task: str | None = None

    def _values(self) -> dict[str, list[float]]:
        """Per-row values of each quantity that has some."""
        values: dict[str, Any] = {"demonstration_logp": self.demonstration_logps}
        if self.demonstration_rewards is not None:
            values["demonstration_reward"] = self.demonstration_rewards
        for name, pairs in (("preference", self.preference_rewards), ("preference_logp", self.preference_logps)):
            if pairs is not None:
                gaps = pairs[:, 0] - pairs[:, 1]
                # A tie counts half. At the start the implicit reward is zero everywhere, so all are ties.
                values[f"{name}_accuracy"] = np.where(gaps == 0, 0.5, gaps > 0).tolist()
                values[f"{name}_gap"] = gaps.tolist()
        for name in ("reward_accuracy", "preference_reward_accuracy"):
            if getattr(self, name):
                values[name] = getattr(self, name)
        if self.sampled is not None:
            rows = self.sampled.samples
            values["length"] = [float(np.mean([len(sample.token_ids) for sample in row])) for row in rows]
            values["truncated"] = [float(np.mean([not sample.finished for sample in row])) for row in rows]
        for name, answers in (("sampled", self.sampled), ("greedy", self.greedy)):
            if answers is not None and answers.scores is not None:
                values[f"score_{name}"] = answers.score
                values[f"accuracy_{name}"] = answers.right
        return values | self._of_samples()

    def _of_samples(self) -> dict[str, list[float]]:
        """What only answers at temperature 1 tell, by row."""
        if self.sampled is None:
            return {}
        found = {"distinct_right": self.sampled.distinct_right, "kl": self.sampled.kl}
        return {name: values for name, values in found.items() if values is not None}

    def reward_quality(self) -> RewardQualityRecord | None:
        """How the learned reward ranks each row's answers; None without one, without a verifier, or for one answer."""
        answers = self.sampled
        if answers is None or answers.rewards is None or answers.logps is None or answers.scores is None:
            return None
        lengths = [[float(len(sample.token_ids)) for sample in row] for row in answers.samples]
        numbers = zip(answers.rewards, answers.logps, lengths, answers.scores, strict=True)
        return reward_quality([ScoredAnswers(*row) for row in numbers])

    def metrics(self) -> dict[str, float]:
        """Means by name, for logs; ``loss`` is the usual one of SFT (nats per token)."""
        means = {name: float(np.mean(values)) for name, values in self._values().items()}
        return {"loss": -sum(self.demonstration_logps) / sum(self.demonstration_lengths)} | means

    def record(self, source: str) -> EvaluationRecord:
        """The ``evaluation`` of results.json: means with 95% intervals, and the values of each row.

        A quantity that is NaN or infinite somewhere has no mean; a note says so.

        Args:
            source: where the rows come from.
        """
        values = self._values()
        truncated, length = values.pop("truncated", None), values.pop("length", None)
        means, notes = {}, []
        for name, numbers in values.items():
            broken = int((~np.isfinite(numbers)).sum())
            if broken:
                notes.append(f"{name} has no mean: {broken} of its {len(numbers)} values are NaN or infinite.")
            else:
                # A quantity with a unit is no proportion, even where every row happens to be 0: the KL at the start.
                means[name] = (bootstrap_mean if name in _WITH_UNIT else mean_interval)(numbers)
        per_row: dict[str, list[float | None]] = {"demonstration_logp": [*self.demonstration_logps]}
        for name, answers in (("sampled", self.sampled), ("greedy", self.greedy)):
            if answers is not None and answers.scores is not None:
                per_row |= {f"{name}_score": [*(answers.score or ())], f"{name}_right": [*(answers.right or ())]}
        per_row |= {name: [*numbers] for name, numbers in self._of_samples().items()}
        return EvaluationRecord(
            dataset=source,
            task=self.task,
            rows=self.rows,
            means=means,
            length_mean=None if length is None else float(np.mean(length)),
            truncated_fraction=None if truncated is None else float(np.mean(truncated)),
            per_row=per_row,
            notes=notes,
            samples_per_row=None if self.sampled is None else self.sampled.count,
            reward_quality=self.reward_quality(),
        )


@dataclass
class EvaluationSet:
    """Held-out rows, tokenized once, and what is remembered about them.

    Attributes:
        demonstrations, groups: the rows, and each with its demonstration as tokens.
        pairs: preferred and rejected answer of the rows that have both.
        verifier: scores answers, if there is one.
        task: its name.
        source: where the rows come from.
        turns, limit: which turns were taken of how many of the first rows (None: of all), for further data of the kind.
        reference: log-probs of ``groups`` and ``pairs`` under π_0, once remembered.
    """

    demonstrations: list[Demonstration]
    groups: list[Group]
    pairs: list[Group]
    tokenization: Tokenization
    verifier: Verifier | None = None
    task: str | None = None
    source: str = "held-out data"
    turns: Turns = "last"
    limit: int | None = None
    reference: tuple[list[tuple[float, ...]], list[tuple[float, ...]]] | None = field(default=None, repr=False)

    @staticmethod
    def of(
        dataset: Dataset,
        tokenization: Tokenization,
        *,
        verifier: str | None = None,
        limit: int | None = None,
        turns: Turns = "last",
        source: str = "held-out data",
    ) -> EvaluationSet:
        """Read held-out rows.

        Args:
            verifier: see ``load_verifier``.
            limit: use only the first ``limit`` rows.
            turns: as for training.

        Raises:
            UserError: bad data; or no row remains.
        """
        if limit is not None:
            dataset = selected(dataset, range(min(limit, len(dataset))))
        rows = list(tokenized_rows(dataset, tokenization, turns=turns, source=source))
        demonstrations = [row.demonstration for row in rows]
        groups = [row.group for row in rows]
        pairs = [row.pair for row in rows if row.pair is not None]
        if not groups:
            raise UserError("no row is left to evaluate on.", remedy="Give at least one.", file=source)
        check = load_verifier(verifier) if verifier else None
        if check is not None:  # before any training, not after it
            _score(check, demonstrations[0].completion, demonstrations[0], source)
        return EvaluationSet(demonstrations, groups, pairs, tokenization, check, verifier, source, turns, limit)

    def over(self, dataset: Dataset, *, source: str | None = None) -> EvaluationSet:
        """Other data, read as these were: the same tokenization, turns, limit and verifier.

        The log-probs under π_0 are kept where every row of the new data is one of these; for others π_0 itself has to
        be asked (``remember_reference``).

        Args:
            source: where the data come from; by default the same name.

        Raises:
            UserError: as ``of``.
        """
        other = EvaluationSet.of(
            dataset,
            self.tokenization,
            verifier=self.task,
            limit=self.limit,
            turns=self.turns,
            source=self.source if source is None else source,
        )
        if self.reference is not None:
            known = (
                {_content(group): logps for group, logps in zip(groups, values, strict=True)}
                for groups, values in zip((self.groups, self.pairs), self.reference, strict=True)
            )
            found = [
                [logps.get(_content(group)) for group in groups]
                for groups, logps in zip((other.groups, other.pairs), known, strict=True)
            ]
            logps, pair_logps = ([each for each in part if each is not None] for part in found)
            if len(logps) == len(other.groups) and len(pair_logps) == len(other.pairs):
                other.reference = logps, pair_logps
        return other

    def require_answers(self, model: nn.Module) -> None:
        """Find out before training whether the model can give the answers that the verifier is to score.

        Raises:
            UserError: there is a verifier, and the model cannot be sampled from.
        """
        if self.verifier is None:
            return
        try:
            TransformersSampler(model)
        except UserError as error:
            raise UserError(
                f"the verifier has nothing to score: {error.problem}",
                remedy="Leave --verifier out, or use a transformer with a key-value cache.",
                field="verifier",
            ) from error

    def verify(self, index: int, token_ids: Sequence[int]) -> float:
        """The verifier's score of an answer to a row; there must be a verifier."""
        assert self.verifier is not None
        return _score(self.verifier, self.tokenization.text(token_ids), self.demonstrations[index], self.source)

    def remember_reference(self, model: nn.Module, *, layout: Layout = "auto", batch_size: int = 16) -> None:
        """Keep the log-probs under the model as it is now as those of π_0, the zero of the implicit reward."""
        self.reference = self._logps(model, layout, batch_size)

    def evaluate(
        self,
        model: nn.Module,
        *,
        beta: float = 1.0,
        layout: Layout = "auto",
        batch_size: int = 16,
        sampler: Sampler | None = None,
        sampling_batch_size: int = 64,
        seed: int = 0,
        sample: bool | None = None,
        num_samples: int = 1,
        greedy: bool = False,
        score_samples: bool = False,
        reward: Reward | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """Evaluate the policy.

        Args:
            beta: temperature of the implicit reward.
            batch_size: groups per forward pass of the log-probs.
            sampler: draws the answers, from these very weights; by default transformers, where there is something to draw.
            sampling_batch_size: sequences that the default sampler decodes side by side.
            seed: of the answers.
            sample: draw answers to each row at temperature 1; by default if there is a verifier to score them.
            num_samples: how many.
            greedy: also decode one greedily.
            score_samples: keep the log-probs of the sampled answers under the policy, for ``against_start``. With a
                reward they are kept anyway.
            reward: a learned reward to evaluate.
            on_progress: called with the number of rows answered so far, sampled and greedy together.

        Raises:
            UserError: answers are to be drawn and the model cannot be sampled from (see ``can_sample``); the verifier
                failed.
        """
        logps, pair_logps = self._logps(model, layout, batch_size)
        demonstration_logps = [logp for (logp,) in logps]  # a held-out row has one demonstration
        rewards, preference_rewards = None, None
        if self.reference is not None:
            initial, initial_pairs = self.reference
            rewards = [beta * (now - then) for now, (then,) in zip(demonstration_logps, initial, strict=True)]
            if self.pairs:
                preference_rewards = np.array(pair_logps) - np.array(initial_pairs)
        sample = self.verifier is not None if sample is None else sample
        answered = 0

        def count(place: int, drawn: Sequence[Sample]) -> None:
            nonlocal answered
            answered += 1
            if on_progress:
                on_progress(answered)

        if sampler is None and (sample or greedy):  # only then: a recurrent model has log-probs, and no sampler
            sampler = TransformersSampler(model, batch_size=sampling_batch_size, pad_token_id=self.tokenization.pad_id)
        sampled = self._answers(sampler, 1.0, seed, count, num_samples) if sampler and sample else None
        reward_accuracy = None
        if sampled and (score_samples or reward):
            sampled = replace(sampled, logps=self._sample_logps(sampled, model, layout, batch_size))
        if sampled and reward:
            scored = _with_rewards(reward, sampled.added_to(self.groups))
            sampled = replace(sampled, rewards=[[c.values["reward"] for c in group.samples] for group in scored])
            reward_accuracy = _accuracies(scored)
        return Evaluation(
            rows=[group.row for group in self.groups],
            demonstration_logps=demonstration_logps,
            demonstration_lengths=[len(c.token_ids) for group in self.groups for c in group.demonstrations],
            demonstration_rewards=rewards,
            preference_rewards=preference_rewards,
            preference_logps=np.array(pair_logps) if self.pairs else None,
            reward_accuracy=reward_accuracy,
            preference_reward_accuracy=ranking(reward, self.pairs) if reward else None,
            sampled=sampled,
            greedy=self._answers(sampler, 0.0, seed, count) if sampler and greedy else None,
            task=self.task,
        )

    def against_start(
        self, evaluation: Evaluation, start: nn.Module, *, layout: Layout = "auto", batch_size: int = 16
    ) -> Evaluation:
        """The evaluation with the distance of its sampled answers from the start.

        Args:
            evaluation: of these rows, with the log-probs of its answers (``score_samples``). One without sampled
                answers is given back as it is.
            start: the model that training started from, or the policy with the start's weights.
        """
        answers = evaluation.sampled
        if answers is None:
            return evaluation
        start_logps = self._sample_logps(answers, start, layout, batch_size)
        return replace(evaluation, sampled=replace(answers, start_logps=start_logps))

    def _sample_logps(
        self, answers: Answers, model: nn.Module, layout: Layout, batch_size: int
    ) -> list[tuple[float, ...]]:
        """Log-probs of the answers as the demonstrations' are computed, which a sampler's may differ from."""
        bare = [group.select(()) for group in self.groups]
        per_batch = max(1, batch_size // answers.count)  # as many completions per forward pass as elsewhere
        options: dict[str, Any] = {"layout": layout, "pad_token_id": self.tokenization.pad_id}
        return cached_logps(model, answers.added_to(bare), batch_size=per_batch, **options)

    def _logps(
        self, model: nn.Module, layout: Layout, batch_size: int
    ) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
        def logps(groups: list[Group]) -> list[tuple[float, ...]]:
            return cached_logps(
                model, groups, layout=layout, batch_size=batch_size, pad_token_id=self.tokenization.pad_id
            )

        pairs = zip(self.pairs, logps(self.pairs), strict=True)
        return logps(self.groups), [_better_first(group, values) for group, values in pairs]

    def _answers(
        self,
        sampler: Sampler,
        temperature: float,
        seed: int,
        on_finished: Callable[[int, list[Sample]], None],
        num_samples: int = 1,
    ) -> Answers:
        params = SamplingParams(
            max_completion_length=self.tokenization.max_completion_length,
            stop_ids=self.tokenization.stop_ids(self.demonstrations[0].conversational),
            temperature=temperature,
            seed=seed,
        )
        samples = sampler.sample(
            [group.prompt_ids for group in self.groups],
            params,
            num_samples=num_samples,
            rows=[group.row for group in self.groups],
            on_finished=on_finished,
        )
        texts = [[self.tokenization.text(sample.token_ids) for sample in row] for row in samples]
        scores = None
        if self.verifier is not None:
            scores = [
                [_score(self.verifier, text, demonstration, self.source) for text in row]
                for row, demonstration in zip(texts, self.demonstrations, strict=True)
            ]
        return Answers(samples, texts, scores)


def ranking(reward: Reward, groups: Sequence[Group]) -> list[float]:
    """For each group with a pair: 1 where its better completion has the higher reward, 0.5 for a tie, else 0.

    Of several pairs the mean.
    """
    return _accuracies(_with_rewards(reward, groups))


def _with_rewards(reward: Reward, groups: Sequence[Group]) -> list[Group]:
    rewards = iter(reward.score(groups).tolist())
    return [group.with_values("reward", [next(rewards) for _ in group.completions]) for group in groups]


def _accuracies(scored: Sequence[Group]) -> list[float]:
    """One value per group that has a pair besides copies of its demonstration."""
    found = []
    for group in map(drop_copies, scored):
        rewards = group.values("reward")
        gaps = [rewards[better] - rewards[worse] for better, worse in group.pairs]
        if gaps:
            found.append(float(np.mean((np.sign(gaps) + 1) / 2)))
    return found


def _better_first(group: Group, values: Sequence[float]) -> tuple[float, float]:
    """The values of the two sides of a group's one pair."""
    ((better, worse),) = group.pairs
    return values[better], values[worse]


def can_sample(model: nn.Module) -> bool:
    """Whether answers can be drawn from the model in this process: known before any training."""
    try:
        TransformersSampler(model)
    except UserError:
        return False
    return True


def _content(group: Group) -> tuple:
    """What log-probs of a group depend on."""
    return group.prompt_ids, tuple(completion.token_ids for completion in group.completions)


def _score(verifier: Verifier, text: str, demonstration: Demonstration, source: str) -> float:
    try:
        score = float(verifier(text, demonstration.fields))
    except UserError:
        raise
    except Exception as error:  # whatever a user's function may raise, the row should be named
        raise UserError(
            f"the verifier failed: {type(error).__name__}: {error}.",
            remedy="Fix the verifier or the row; it is called with the answer's text and the row.",
            file=source,
            row=demonstration.number,
        ) from error
    if not math.isfinite(score):
        raise UserError(
            f"the verifier gave {score}.",
            remedy="A score is a finite number: 1 or more is right, 0 is wrong.",
            file=source,
            row=demonstration.number,
        )
    return score
