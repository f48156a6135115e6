"""The fit of a linear reward: planted preferences are recovered; what is compared, weighed and judged."""

import numpy as np
import pytest

from rewards.planted import auc, completion, reversed_prompts, samples_alone
from tutelage.groups import Group, Role
from tutelage.rewards import Comparisons, FeatureReward
from tutelage.rewards.comparisons import hardest_kind
from tutelage.rewards.linear import (
    UNPAIRED,
    accuracies,
    choose_strength,
    compare,
    fit_linear,
    spread_within,
)

TRAINING, _ = reversed_prompts(60)
TEST, TRUTH = reversed_prompts(40, seed=1)


def test_a_planted_rule_is_found_on_held_out_prompts():
    reward = FeatureReward.of("text")
    facts = reward.fit(Comparisons({"out_of_fold": TRAINING}))
    assert auc(reward, TEST, TRUTH) > 0.95
    assert facts["accuracy/out_of_fold"] > 0.95
    assert facts["judged/out_of_fold"] == 1


def test_labels_at_random_teach_nothing():
    """The rule does not come from the features themselves: a demonstration like any sample is no better on held-out prompts."""
    shuffled = [
        Group(g.prompt_ids, (completion(g.samples[0].token_ids[:-1], Role.DEMONSTRATION), *g.samples[1:]), g.row)
        for g in TRAINING
    ]
    facts = FeatureReward.of("text").fit(Comparisons({"own": shuffled}))
    assert 0.3 < facts["accuracy/own"] < 0.7


def test_the_hardest_kind_judges():
    easy = [
        g.select([0]).add([completion([30, 30, 30]), completion([31, 30])]) for g in TRAINING
    ]  # nothing like an answer
    facts = FeatureReward.of("text").fit(Comparisons({"initial": easy, "out_of_fold": TRAINING}))
    assert facts["judged/out_of_fold"] == 1
    assert {name for name in facts if name.startswith("judged")} == {"judged/out_of_fold"}
    assert facts["accuracy/initial"] == 1
    assert [hardest_kind(kinds) for kinds in (["initial", "own"], ["initial"], [UNPAIRED], [])] == [
        "own",
        "initial",
        UNPAIRED,
        None,
    ]


def test_strength_is_judged_by_order_and_not_by_confidence():
    design = compare(Comparisons({"own": TRAINING}))
    good = np.where(np.arange(len(design.better)) % 5, 1.0, -1.0)
    bad = np.where(np.arange(len(design.better)) % 2, 0.001, -0.001)
    assert choose_strength(design, np.stack([bad, 100 * good], axis=1)) == 1
    assert choose_strength(design, np.stack([good, 100 * good], axis=1)) == 0  # equal: the stronger penalty


def test_unpaired_samples_alone_teach_what_all_demonstrations_share():
    """Where every sample of a prompt is its demonstration, nothing is paired."""
    copies = [g.select([0]).add([completion(g.completions[0].token_ids[:-1])]) for g in TRAINING]
    others = samples_alone(reversed_prompts(60, seed=2)[0])
    reward = FeatureReward.of("text")
    assert reward.fit(Comparisons({"own": copies}))["pairs"] == 0
    assert not reward.is_fitted
    facts = reward.fit(Comparisons({"own": copies}, others))
    assert facts[f"judged/{UNPAIRED}"] == 1
    assert auc(reward, TEST, TRUTH) > 0.8


def test_weights_of_a_prompt_and_kind_sum_to_one():
    groups = [TRAINING[0], TRAINING[1].select([0, 1]), TRAINING[2].add([completion([20, 21], finished=False)])]
    design = compare(Comparisons({"own": groups, "initial": groups[:1]}, samples_alone(TRAINING[10:14])), partners=4)
    weights = {}
    for better, kind, weight in zip(design.better, design.kinds, design.weights, strict=True):
        weights[kind, better] = weights.get((kind, better), 0) + weight
    assert list(weights.values()) == pytest.approx([1] * len(weights))
    assert {kind for kind, _ in weights} == {"own", "initial", UNPAIRED}
    assert (design.kinds == UNPAIRED).sum() == 3 * 4  # once for each prompt, whatever the kinds


def test_samples_of_several_stages_leave_the_weight_of_a_prompt():
    """The first prompt has samples of five stages, the second of one and in another stage a copy of its demonstration."""
    first, second = _without_copies()[:2]
    copy = second.select([0]).add([completion(second.completions[0].token_ids[:-1])])
    replayed = [first.select([0, 1 + stage % 3]) for stage in range(5)]
    design = compare(Comparisons({"own": [*replayed, second, copy], "initial": [first]}))
    assert _weights(design) == {
        ("own", first.prompt_ids): pytest.approx(1),
        ("own", second.prompt_ids): pytest.approx(1),
        ("initial", first.prompt_ids): pytest.approx(1),
    }


def test_in_a_resample_a_prompt_weighs_as_often_as_it_was_drawn():
    replayed = [group.select([0, place]) for group in _without_copies()[:8] for place in (1, 2)]
    drawn = Comparisons({"own": replayed}).resampled(0)
    times = {prompt: [group.prompt_ids for group in drawn.paired["own"]].count(prompt) / 2 for prompt in drawn.prompts}
    assert max(times.values()) > 1
    assert _weights(compare(drawn)) == {("own", prompt): pytest.approx(count) for prompt, count in times.items()}


def _without_copies():
    return [g for g in TRAINING if g.completions[0].token_ids not in {sample.token_ids for sample in g.samples}]


def _weights(design):
    """The sum of the weights of the pairs by kind and prompt."""
    prompts = [group.prompt_ids for group in design.groups for _ in group.completions]
    found = {}
    for better, kind, weight in zip(design.better, design.kinds, design.weights, strict=True):
        found[kind, prompts[better]] = found.get((kind, prompts[better]), 0) + weight
    return found


def test_truncated_samples_are_compared_as_contrast_says():
    cut = Group((1, 5, 9), (completion([20, 21], Role.DEMONSTRATION), completion([20], finished=False)))
    assert len(compare(Comparisons({"own": [cut]})).better) == 0
    assert len(compare(Comparisons({"own": [cut]}), truncated_samples="score").better) == 1
    other = Group((1, 6), (completion([30], finished=False),))
    assert len(compare(Comparisons({"own": [cut]}, [other])).better) == 0
    assert len(compare(Comparisons({"own": [cut]}, [other]), truncated_samples="score").better) == 2


def test_folds_are_of_prompts():
    """The same prompt in two rows and in two kinds is in one fold."""
    twice = [*TRAINING[:10], *TRAINING[:10]]
    design = compare(Comparisons({"own": twice, "initial": TRAINING[:10]}))
    folds = {}
    start = 0
    for group in design.groups:
        folds.setdefault(group.prompt_ids, set()).add(int(design.folds_C[start]))
        start += len(group.completions)
    assert len(folds) == 10
    assert all(len(found) == 1 for found in folds.values())
    assert len(set.union(*folds.values())) == 5


def test_projection_of_wide_dense_features_finds_what_they_hold(monkeypatch):
    monkeypatch.setattr("tutelage.rewards.linear.ENTRIES", 0)  # so that 256 are many
    design = compare(Comparisons({"own": TRAINING}))
    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((len(design.folds_C), 400))
    matrix[np.unique(design.better)] += 0.5  # every feature speaks a little
    fit = fit_linear(design, matrix, unpaired=False)
    assert fit.weights.shape == (400,)
    assert fit.weights.mean() > 0
    assert fit.accuracies(design)["own"] > 0.9
    assert (matrix[design.better] @ fit.weights > matrix[design.worse] @ fit.weights).mean() > 0.95


def test_spread_is_within_prompts_and_counts_samples_that_equal_the_demonstration():
    copy = completion(TRAINING[0].completions[0].token_ids[:-1])
    first = TRAINING[0].select([0]).add([copy, completion([20]), completion([21])])
    second = TRAINING[1].select([0]).add([completion([22]), completion([23])])
    only_copies = TRAINING[2].select([0]).add([completion(TRAINING[2].completions[0].token_ids[:-1])] * 2)
    design = compare(Comparisons({"own": [first, second, only_copies]}))
    # The copy was left out of the comparison; its score is the demonstration's.
    scores = np.array([3.0, 1.0, 1.0, 0.0, -100.0, -100.0, 7.0])
    assert spread_within(design, scores) == pytest.approx((np.var([3, 1, 1], ddof=1) / 2) ** 0.5)
    assert spread_within(design, np.zeros(7)) == 1


def test_accuracy_by_kind_counts_ties_half():
    design = compare(Comparisons({"own": TRAINING[:3], "initial": TRAINING[3:6]}))
    margins = np.where(design.kinds == "own", 0.0, 1.0)
    assert accuracies(margins, design) == {"own": 0.5, "initial": 1.0}


def test_one_pair_is_enough_to_learn_and_not_to_cross_validate():
    reward = FeatureReward.of("text")
    facts = reward.fit(Comparisons({"own": [TRAINING[0].select([0]).add([completion([20])])]}))
    assert facts["pairs"] == 1
    assert not any(name.startswith("accuracy") for name in facts)
    better, worse = reward.scores([TRAINING[0].select([0]).add([completion([20])])])[0]
    assert better > worse


def test_equal_arguments_give_equal_rewards_and_seeds_matter():
    others = samples_alone(reversed_prompts(60, seed=3)[0])

    def fitted(seed):
        reward = FeatureReward.of("text")
        reward.fit(Comparisons({"own": TRAINING}, others), seed=seed)
        return reward.score(TEST)

    assert fitted(0).equal(fitted(0))
    assert not fitted(0).equal(fitted(1))


def test_a_strength_that_is_given_is_taken_and_costs_no_search():
    reward = FeatureReward.of("text")
    facts = reward.fit(Comparisons({"own": TRAINING}), strengths={"text": 0.05}, cross_validate=False)
    assert facts["strength/text"] == 0.05
    assert "accuracy/own" not in facts
    assert "accuracy/own" in reward.fit(Comparisons({"own": TRAINING}), strengths={"text": 0.05})


def test_resamples_draw_prompts():
    made = Comparisons({"own": TRAINING, "initial": TRAINING}, samples_alone(TEST))
    drawn = made.resampled(0)
    assert [len(groups) for groups in drawn.paired.values()] == [60, 60]
    assert len(drawn.unpaired) == 40
    assert [g.row for g in drawn.paired["own"]] == [g.row for g in drawn.paired["initial"]]
    assert 25 < len(drawn.prompts) < 50  # 63% in expectation
    assert drawn == made.resampled(0)
    assert drawn != made.resampled(1)
