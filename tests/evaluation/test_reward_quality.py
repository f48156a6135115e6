"""The quality of a reward against what others compute: scikit-learn's AUC, all subsets, NumPy's correlation."""

from itertools import combinations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tutelage.evaluation.reward_quality import (
    ScoredAnswers,
    auc,
    best_of,
    reward_quality,
    within_prompt_correlation,
)


def answers(rng, n=8):
    """Of a policy that is right in about half the cases, with rewards and log-probs that have ties."""
    scores = (rng.random(n) < 0.5).astype(float)
    rewards = np.round(scores + rng.normal(0, 1, n))
    return ScoredAnswers(
        rewards.tolist(), np.round(rng.normal(-9, 2, n)).tolist(), rng.integers(1, 9, n).tolist(), scores.tolist()
    )


@pytest.mark.parametrize("seed", range(20))
def test_auc(seed):
    rng = np.random.default_rng(seed)
    values, right = rng.integers(0, 4, 12).tolist(), (rng.random(12) < 0.4).astype(int).tolist()
    right[:2] = [0, 1]
    assert auc(values, right) == pytest.approx(roc_auc_score(right, values))


def test_auc_needs_right_and_wrong():
    assert auc([1.0, 2.0], [1.0, 1.5]) is None
    assert auc([1.0, 2.0], [0.0, 0.9]) is None, "part of a point is not right"


@pytest.mark.parametrize("n", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("seed", range(5))
def test_best_of_n_is_the_mean_over_all_subsets(n, seed):
    rng = np.random.default_rng(seed)
    values, scores = rng.integers(0, 4, 8).tolist(), rng.random(8).tolist()

    def pick(subset):
        most = max(values[place] for place in subset)
        return np.mean([scores[place] for place in subset if values[place] == most])

    expected = np.mean([pick(subset) for subset in combinations(range(8), n)])
    assert best_of(n, values, scores) == pytest.approx(expected)


def test_best_of_more_than_there_are():
    with pytest.raises(ValueError, match="no subset of 3 among 2"):
        best_of(3, [1.0, 2.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="no subset of 0"):
        best_of(0, [1.0], [0.0])


def test_correlation_is_within_prompts():
    """Between prompts the longer answers have the larger reward; within each the shorter ones have."""
    rng = np.random.default_rng(0)
    lengths = [rng.normal(10 * prompt, 1, 6) for prompt in range(5)]
    rewards = [10 * prompt - (row - row.mean()) + rng.normal(0, 0.1, 6) for prompt, row in enumerate(lengths)]
    assert np.corrcoef(np.concatenate(rewards), np.concatenate(lengths))[0, 1] > 0.9
    centered = [np.concatenate([row - row.mean() for row in rows]) for rows in (rewards, lengths)]
    found = within_prompt_correlation(rewards, lengths)
    assert found < -0.9
    assert found == pytest.approx(np.corrcoef(*centered)[0, 1])


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 / 3])
def test_what_does_not_vary_has_no_correlation(value):
    assert within_prompt_correlation([[1.0, 2.0, 4.0]], [[value] * 3]) is None


def test_the_record():
    rng = np.random.default_rng(0)
    prompts = [answers(rng) for _ in range(40)]
    found = reward_quality(prompts)
    assert (found.prompts, found.answers) == (40, 8)
    assert [each.n for each in found.best_of] == [1, 2, 4, 8]
    mixed = [p for p in prompts if 0 < sum(p.scores) < 8]
    expected = np.mean([roc_auc_score(p.scores, p.rewards) for p in mixed])
    assert found.auc["reward"].mean == pytest.approx(expected)
    assert found.auc["reward"].n == len(mixed)
    first, last = found.best_of[0], found.best_of[-1]
    assert first.reward.mean == first.logp.mean == first.oracle.mean == pytest.approx(first.mean.mean)
    assert last.mean == first.mean
    assert last.oracle.mean == pytest.approx(np.mean([max(p.scores) for p in prompts]))
    assert first.mean.mean < last.reward.mean < last.oracle.mean
    assert set(found.correlations) == {"logp", "length"}


def test_a_reward_that_is_the_log_prob_or_its_opposite():
    """The shortcut of a reward that says "improbable is good" is visible at a glance."""
    rng = np.random.default_rng(1)
    plain = [answers(rng) for _ in range(30)]
    same, opposite = (
        reward_quality([ScoredAnswers([sign * x for x in p.logps], p.logps, p.lengths, p.scores) for p in plain])
        for sign in (1, -1)
    )
    assert same.correlations["logp"] == pytest.approx(1)
    assert opposite.correlations["logp"] == pytest.approx(-1)
    assert same.auc["reward"] == same.auc["logp"]
    assert opposite.auc["reward"].mean == pytest.approx(1 - same.auc["logp"].mean)


def test_nothing_to_say():
    assert reward_quality([]) is None
    assert reward_quality([ScoredAnswers([1.0], [-1.0], [2], [1.0])]) is None, "one answer is no choice"
    broken = ScoredAnswers([1.0, float("nan")], [-1.0, -2.0], [2, 2], [1.0, 0.0])
    assert reward_quality([broken]) is None
    agreed = reward_quality([ScoredAnswers([1.0, 2.0], [-1.0, -2.0], [2, 2], [1.0, 1.0])])
    assert agreed.auc == {}
    assert agreed.correlations == {"logp": pytest.approx(-1)}
