"""Ensembles: how members are combined, where they disagree, members on bootstraps; log-prob over several models."""

import pytest
import torch

from rewards.planted import auc, reversed_prompts
from tutelage.rewards import Comparisons, FeatureReward
from tutelage.rewards.base import own_logps
from tutelage.rewards.ensemble import LikelihoodReward, OwnLogpReward, RewardEnsemble
from tutelage.rewards.feature_sets import LogpFeatures
from tutelage.scoring.logps import cached_logps, cached_token_logps
from tutelage.testing.models import tiny_model

GROUPS, _ = reversed_prompts(2, samples=1)  # two prompts of two completions
TRAINING, _ = reversed_prompts(30)
TEST, TRUTH = reversed_prompts(20, seed=1)


class Given:
    """A reward of given numbers."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def score(self, groups):
        return torch.tensor(self.numbers, dtype=torch.float32)


ONE, OTHER = Given(1, 3, 0, 4), Given(11, 9, 0, 8)  # within the prompts: ∓1, ∓2 and ±1, ∓4


def test_the_mean():
    assert RewardEnsemble([ONE, OTHER]).score(GROUPS).tolist() == [6, 6, 0, 6]


def test_a_members_constant_within_a_prompt_is_no_disagreement():
    shifted = Given(101, 103, -50, -46)
    ensemble = RewardEnsemble([ONE, shifted], "mean_minus_std")
    assert ensemble.disagreement(GROUPS).tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(ensemble.score(GROUPS), RewardEnsemble([ONE, shifted]).score(GROUPS))


def test_less_where_members_disagree():
    """Within the prompts: −1 and 1, 1 and −1; −2 and −4, 2 and 4; the means of both members are 6 and 3."""
    std = 2**0.5
    pessimist = RewardEnsemble([ONE, OTHER], "mean_minus_std")
    assert pessimist.disagreement(GROUPS).tolist() == pytest.approx([std] * 4)
    assert pessimist.score(GROUPS).tolist() == pytest.approx([6 - std, 6 - std, -std, 6 - std])
    assert RewardEnsemble([ONE, OTHER], "min").score(GROUPS).tolist() == [5, 5, -1, 5]
    assert pessimist.scores(GROUPS) == [
        tuple(pessimist.score(GROUPS)[:2].tolist()),
        tuple(pessimist.score(GROUPS)[2:].tolist()),
    ]


def test_an_answer_alone_loses_nothing_and_of_two_both_lose_the_same():
    lone = [group.select([0]) for group in GROUPS]
    for combine in ("mean_minus_std", "min"):
        assert RewardEnsemble([Given(1, 3), Given(11, 9)], combine).score(lone).tolist() == [6, 6]
    found = RewardEnsemble([ONE, OTHER], "mean_minus_std").score(GROUPS)
    plain = RewardEnsemble([ONE, OTHER]).score(GROUPS)
    assert (found - plain).tolist() == pytest.approx([-(2**0.5)] * 4)


def test_own_log_probs_are_those_that_are_known_and_else_a_scorers():
    known = GROUPS[0].with_token_values("old_logps", [[-1.0] * len(c.token_ids) for c in GROUPS[0].completions])
    asked = []

    def scorer(groups):
        asked.append(list(groups))
        return [[[-2.0] * len(c.token_ids) for c in group.completions] for group in groups]

    groups = [GROUPS[1], known]
    expected = [
        factor * len(c.token_ids) for factor, group in ((-2, GROUPS[1]), (-1, known)) for c in group.completions
    ]
    assert own_logps(groups, scorer) == expected
    assert OwnLogpReward(scorer).score(groups).tolist() == expected
    assert LogpFeatures(scorer).matrix(groups)[:, 0].tolist() == expected
    assert asked == [[GROUPS[1]]] * 3
    assert own_logps([known], None) == expected[2:]


@pytest.mark.parametrize(("members", "combine"), [([ONE], "mean"), ([ONE, OTHER], "median")])
def test_what_is_no_ensemble(members, combine):
    with pytest.raises(ValueError, match=r"two members|combine"):
        RewardEnsemble(members, combine)


def test_members_on_bootstraps_differ_and_agree_on_the_rule():
    def fitted(seed):
        members = [FeatureReward.of("text") for _ in range(3)]
        for place, member in enumerate(members):
            member.fit(Comparisons({"own": TRAINING}).resampled(3 * seed + place))
        return RewardEnsemble(members, "mean_minus_std")

    ensemble = fitted(0)
    scores = [member.score(TEST) for member in ensemble.members]
    assert not scores[0].equal(scores[1])
    assert ensemble.disagreement(TEST).min() > 0
    assert auc(ensemble, TEST, TRUTH) > 0.85
    assert fitted(0).score(TEST).equal(ensemble.score(TEST))
    assert not fitted(1).score(TEST).equal(ensemble.score(TEST))


def test_the_likelihood_is_the_mean_over_models():
    models = [tiny_model(seed=seed) for seed in range(2)]
    reward = LikelihoodReward([lambda groups, m=model: cached_token_logps(m, groups) for model in models])
    sums = [torch.tensor([x for group in cached_logps(model, TEST[:2]) for x in group]) for model in models]
    torch.testing.assert_close(reward.score(TEST[:2]), (sums[0] + sums[1]) / 2, atol=1e-4, rtol=1e-5)
    assert [len(scores) for scores in reward.scores(TEST[:2])] == [7, 7]
    with pytest.raises(ValueError, match="at least one"):
        LikelihoodReward([])
