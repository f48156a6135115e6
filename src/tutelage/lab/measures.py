"""What is measured of a policy. The judge is asked here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from tutelage.data.tokenization import Tokenization
from tutelage.groups import Completion, Group, Role
from tutelage.lab.worlds import Row, World
from tutelage.rewards.base import Reward, scores_by_group
from tutelage.sampling import SamplingParams, TransformersSampler
from tutelage.sampling.base import Sample
from tutelage.scoring.logps import cached_token_logps

__all__ = ["LENGTHS", "SAMPLES", "Measures", "RewardMeasures", "measure", "measure_reward"]

SAMPLES = 8
"""Samples per prompt at temperature 1."""

LENGTHS = {"max_prompt_length": 16, "max_completion_length": 14}
"""Limits in tokens, in training and in evaluation: a good answer of any world is shorter, a run-away one is cut."""

_RIGHT = 1.0  # the score of a right answer; in the open-ended world the demonstrator's mean
_BATCH = 512
_EVALUATION_STAGE = 1_000_003  # names the samples in the random stream, apart from those of any stage of training


@dataclass(frozen=True, slots=True)
class Measures:
    """Means over the prompts of one policy.

    Attributes:
        score, score_greedy: of samples at temperature 1, and of the likeliest tokens.
        score_best: of the best of ``SAMPLES`` samples, by the judge: what selection could reach.
        diversity: different right answers among the samples of a prompt.
        demonstration_logp: log-prob of held-out demonstrations (nats per sequence).
        kl: to the policy that the run started from (nats per sequence), by samples.
        length: of samples, in tokens; ``truncated``: the share that did not end.
        retention, retention_logp: share of right answers in another task by likeliest tokens, and log-prob of the right
            answer (nats per sequence).
    """

    score: float
    score_greedy: float
    score_best: float
    diversity: float
    demonstration_logp: float
    kl: float
    length: float
    truncated: float
    retention: float
    retention_logp: float


@dataclass(frozen=True, slots=True)
class RewardMeasures:
    """How a reward, and the start's own log-prob, tell the start's samples for a prompt apart.

    Attributes:
        reward_auc, logp_auc: share of the pairs of samples with different scores that it orders as the judge does; a tie
            counts half. NaN where no prompt has such a pair.
        reward_best, logp_best: score of the best of ``SAMPLES`` by it.
        start_score, start_best: mean score of these samples, and of the best by the judge.
    """

    reward_auc: float
    reward_best: float
    logp_auc: float
    logp_best: float
    start_score: float
    start_best: float


def measure_reward(
    reward: Reward, start: nn.Module, tokenizer: PreTrainedTokenizerBase, world: World, rows: Sequence[Row]
) -> RewardMeasures:
    """Let a reward choose among samples of the policy that its run started from, for rows that it has not seen."""
    tokenization = Tokenization(tokenizer, LENGTHS["max_prompt_length"], LENGTHS["max_completion_length"])
    groups = [_group(tokenization, row.text, " ".join(row.answer), place) for place, row in enumerate(rows)]
    sampled = _sample(start, tokenization, groups, temperature=1.0, num_samples=SAMPLES)
    _, scores = _judged(tokenization, world, rows, sampled)
    drawn = [
        Group(group.prompt_ids, row=group.row).add(
            replace(sample.completion, token_values={"old_logps": sample.token_logps}) for sample in samples
        )
        for group, samples in zip(groups, sampled, strict=True)
    ]
    rewards = np.asarray(scores_by_group(reward, drawn))
    logps = np.asarray([group.sums("old_logps") for group in drawn])
    return RewardMeasures(
        reward_auc=concordance(rewards, scores),
        reward_best=_score_of_best(rewards, scores),
        logp_auc=concordance(logps, scores),
        logp_best=_score_of_best(logps, scores),
        start_score=float(scores.mean()),
        start_best=float(scores.max(axis=1).mean()),
    )


def concordance(values: np.ndarray, scores: np.ndarray) -> float:
    """Share of the pairs of a prompt with different scores that the values order as the scores do; a tie counts half.

    Args:
        values, scores: [prompts, samples].

    >>> concordance(np.array([[3.0, 1.0, 1.0]]), np.array([[1.0, 0.0, 1.0]]))
    0.75
    """
    value_gaps = values[:, :, None] - values[:, None, :]
    score_gaps = scores[:, :, None] - scores[:, None, :]
    above = score_gaps > 0
    return float(((np.sign(value_gaps[above]) + 1) / 2).mean()) if above.any() else float("nan")


def _score_of_best(values: np.ndarray, scores: np.ndarray) -> float:
    """Mean score of the sample with the highest value of its prompt, the first of equals."""
    return float(np.take_along_axis(scores, values.argmax(axis=1)[:, None], axis=1).mean())


def measure(
    policy: nn.Module,
    start: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    rows: Sequence[Row],
    retention: Sequence[tuple[str, str]],
) -> Measures:
    """Sample, judge, score.

    Args:
        policy: to measure.
        start: the policy that its run started from.
        rows: validation or test rows of ``world``.
        retention: prompts and answers of another task.
    """
    tokenization = Tokenization(tokenizer, LENGTHS["max_prompt_length"], LENGTHS["max_completion_length"])
    groups = [_group(tokenization, row.text, " ".join(row.answer), place) for place, row in enumerate(rows)]
    sampled = _sample(policy, tokenization, groups, temperature=1.0, num_samples=SAMPLES)
    greedy = _sample(policy, tokenization, groups, temperature=0.0, num_samples=1)

    words, scores = _judged(tokenization, world, rows, sampled)
    _, greedy_scores = _judged(tokenization, world, rows, greedy)
    right = [
        {answer for answer, score in zip(answers, values, strict=True) if score >= _RIGHT}
        for answers, values in zip(words, scores, strict=True)
    ]
    asked = [_group(tokenization, prompt, answer, place) for place, (prompt, answer) in enumerate(retention)]
    kept = _sample(policy, tokenization, asked, temperature=0.0, num_samples=1)
    completions = [sample for samples in sampled for sample in samples]
    return Measures(
        score=float(scores.mean()),
        score_greedy=float(greedy_scores.mean()),
        score_best=float(scores.max(axis=1).mean()),
        diversity=float(np.mean([len(answers) for answers in right])),
        demonstration_logp=_mean_logp(policy, groups),
        kl=_divergence(start, groups, sampled),
        length=float(np.mean([len(sample.token_ids) for sample in completions])),
        truncated=float(np.mean([not sample.finished for sample in completions])),
        retention=float(
            np.mean(
                [
                    drawn[0].token_ids == group.completions[0].token_ids
                    for drawn, group in zip(kept, asked, strict=True)
                ]
            )
        ),
        retention_logp=_mean_logp(policy, asked),
    )


def _judged(
    tokenization: Tokenization, world: World, rows: Sequence[Row], drawn: Sequence[Sequence[Sample]]
) -> tuple[list[list[tuple[str, ...]]], np.ndarray]:
    """The words of the answers, and their scores [prompts, samples]; an answer that did not end is never good."""
    words = [[tuple(tokenization.text(sample.token_ids).split()) for sample in samples] for samples in drawn]
    scores = [
        [
            min(world.judge(row, answer), np.inf if sample.finished else 0.0)
            for answer, sample in zip(answers, samples, strict=True)
        ]
        for row, answers, samples in zip(rows, words, drawn, strict=True)
    ]
    return words, np.asarray(scores)


def _group(tokenization: Tokenization, prompt: str, answer: str, row: int) -> Group:
    completion = tokenization.completion(prompt, answer, Role.DEMONSTRATION)
    return Group(tokenization.prompt_ids(prompt), (completion,), row=row)


def _sample(
    policy: nn.Module, tokenization: Tokenization, groups: Sequence[Group], *, temperature: float, num_samples: int
) -> list[list[Sample]]:
    sampler = TransformersSampler(policy, batch_size=_BATCH, pad_token_id=tokenization.pad_id)
    params = SamplingParams(tokenization.max_completion_length, tokenization.stop_ids(False), temperature=temperature)
    prompts = [group.prompt_ids for group in groups]
    return sampler.sample(prompts, params, num_samples=num_samples, stage=_EVALUATION_STAGE)


def _logps(policy: nn.Module, groups: Sequence[Group]) -> np.ndarray:
    """Log-probs of all completions, summed over tokens."""
    found = cached_token_logps(policy, groups, layout="shared_prefix", batch_size=64)
    return np.asarray([sum(logps) for group in found for logps in group])


def _mean_logp(policy: nn.Module, groups: Sequence[Group]) -> float:
    return float(_logps(policy, groups).mean())


def _divergence(start: nn.Module, groups: Sequence[Group], sampled: list[list[Sample]]) -> float:
    """Mean of log π − log π_start over the samples of π."""
    drawn = [
        Group(
            group.prompt_ids,
            tuple(Completion(s.token_ids, Role.SAMPLE, s.finished) for s in samples),
            row=group.row,
        )
        for group, samples in zip(groups, sampled, strict=True)
    ]
    own = np.asarray([sum(s.token_logps) for samples in sampled for s in samples])
    return float((own - _logps(start, drawn)).mean())
