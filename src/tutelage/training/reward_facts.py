"""What a reward phase logs, and why its reward may be of no use, whatever the validation rows say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tutelage.groups import Completion, Group
from tutelage.rewards.comparisons import TruncatedSamples, policy_rewards, reward_scale
from tutelage.training.gate import Yardsticks, copied_share, own_logp
from tutelage.training.selection import CandidateScore

__all__ = ["facts_of_samples", "facts_of_validation", "obstacle_to_learning"]


def facts_of_samples(
    scored: Sequence[Group], truncated_samples: TruncatedSamples, *, down_only: bool, plain: bool
) -> dict[str, Any]:
    """What there is to say of the samples of a stage and of their rewards; ``scale`` among it.

    Args:
        scored: groups whose samples know their ``reward`` and their ``old_logps``.
        truncated_samples: how truncated ones are treated.
        down_only: as for ``reward_scale``.
        plain: the samples are the policy's own (temperature 1, whole distribution), so that they tell its entropy.
    """
    samples = [c for group in scored for c in group.samples]
    rewards = [c.values["reward"] for c in samples]
    seen = [policy_rewards(group, truncated_samples) for group in scored]
    found: dict[str, Any] = {
        "reward/samples": float(np.mean(rewards)),
        "reward/length_correlation": _correlation(rewards, [len(c.token_ids) for c in samples]),
        "reward/logp_correlation": _correlation(rewards, [own_logp(c) for c in samples]),
        "scale": reward_scale(seen, down_only=down_only),
        "samples/left_out": float(np.mean([reward is None for row in seen for reward in row])),
    }
    if any(group.demonstrations for group in scored):
        found["samples/copies"] = copied_share(scored)
    if plain:
        found["policy/entropy"] = _entropy(samples)
    return found


def facts_of_validation(score: CandidateScore, measures: Yardsticks | None) -> dict[str, Any]:
    """What there is to say of a policy and of the reward on the validation rows."""
    candidate = score.candidate
    found: dict[str, Any] = {
        "validation/reward": score.reward.mean,
        "validation/kl": candidate.kl,
        "validation/demonstration_logp": candidate.demonstration_logp,
        "validation/copies": copied_share(candidate.groups),
    }
    if score.accuracy is not None:
        found |= {"validation/accuracy": score.accuracy.mean, "validation/accuracy_low": score.accuracy.low}
    if measures is not None:
        found |= {"validation/accuracy_logp": measures.logp, "validation/accuracy_length": measures.length}
    if candidate.verifier_scores is not None:
        found["validation/verifier_score"] = float(np.mean([s for row in candidate.verifier_scores for s in row]))
    if score.verifier_gap is not None:
        found["validation/verifier_gap"] = score.verifier_gap
    return found


def obstacle_to_learning(scored: Sequence[Group], fit: Mapping[str, float]) -> str | None:
    """Why a policy can learn nothing from the scored samples of a stage; None if nothing speaks against it.

    Args:
        fit: what the fit of the reward found; empty where there was nothing to compare.
    """
    if not fit:
        return (
            "no sample can be compared with its demonstration, so the reward could not learn: all are equal to it, or "
            "differ from it by being truncated; then start from an SFT checkpoint, raise --max_completion_length or "
            "use --truncated_samples score"
        )
    # Over all prompts of the draw: those of few prompts may be copies of one answer each.
    if float(np.ptp([c.values["reward"] for group in scored for c in group.samples])) < 1e-6:
        return "the reward is the same for all samples"
    return None


def _entropy(samples: Sequence[Completion]) -> float:
    """Entropy of the policy by its own samples: mean of −log π (nats per token)."""
    return -sum(own_logp(c) for c in samples) / sum(len(c.token_ids) for c in samples)


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson correlation; 0 if one side does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if np.std(a) > 0 and np.std(b) > 0 else 0.0
