"""What moves the policy: the best of n, prompts that are left out, the scale, ensembles, and which reward is taken."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_rft_truncated_samples import ANSWERS, PLANTED

from rft_runs import Scripted, make, over_samples, phases, plant, spread
from training_runs import Snapshots, assert_same_weights, distance, history
from tutelage.algorithms.rft import BestOfNObjective
from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role
from tutelage.rewards.comparisons import Comparisons, best_of_n, graded, policy_rewards, reward_scale
from tutelage.rewards.explicit import ExplicitReward
from tutelage.rewards.fitting import RewardFitter, RewardObjective
from tutelage.scoring.logps import cached_token_logps, completion_token_logps
from tutelage.testing.models import tiny_model
from tutelage.training.learners import AutoLearner, EnsembleLearner
from tutelage.training.objective import Step

FEATURES = {"reward": "features", "reward_gate": "off", "keep_policy": "last", "validation_rows": None}
PROMPTS = Dataset.from_dict({"prompt": [f"Is {i} more than {i + 1}?" for i in range(8)]})


def sample(tokens, reward, *, finished=True, role=Role.SAMPLE):
    return Completion(tuple(tokens), role, finished, {}, {"reward": reward})


def demonstration(tokens, reward=9.0):
    return sample(tokens, reward, role=Role.DEMONSTRATION)


def plant_score(reward, of):
    """Give the answers of a reward that is no neural one; the fit goes on behind it."""
    reward.score = lambda groups: torch.tensor([float(of(g, c)) for g in groups for c in g.completions])


def updated(trainer):
    """Groups that the policy's steps train on."""
    found, loss = [], trainer.objective.loss
    trainer.objective.loss = lambda tokens, step: found.extend(tokens.groups) or loss(tokens, step)
    return found


# --- the best of n ------------------------------------------------------------------------------------------------------


def test_picks():
    low, high, cut = sample((5, 2), 0.1), sample((6, 2), 0.2), sample((7, 8), 0.9, finished=False)
    shown = demonstration((4, 2))

    def picked(*completions, treat="floor"):
        return [group.completions for group in best_of_n(Group((1,), completions), treat, 1.0)]

    assert picked(low, high) == picked(high, low) == [(high,)]
    assert picked(low, high, cut) == picked(low, high, cut, treat="drop") == [(high,)]
    assert picked(low, high, cut, treat="score") == [(cut,)]
    assert picked(low, cut) == [(low,)], "what is the only whole one is the best"
    assert picked(cut, cut) == picked(cut) == picked() == []
    assert picked(low, sample((9, 2), 0.1)) == [], "none is better than the other"
    assert picked(shown, low, high, cut) == picked(low, shown) == [(shown,)]


def test_the_loss_of_picks_is_the_mean_per_token():
    model = tiny_model()
    groups = [
        Group((1, 5), (demonstration((7, 8, 2)),)),
        Group((1, 6), (sample((9, 2), 0.5),)),
        Group((1,), (sample((9, 9, 4, 2), 0.1),)),
    ]
    objective, tracked = BestOfNObjective(0.1), {}
    tokens = completion_token_logps(model, groups)
    loss = objective.loss(
        tokens, Step(objective.counts(groups), 0, lambda name, values: tracked.update({name: values}))
    )
    expected = [sum(values) for (values,) in cached_token_logps(model, groups)]
    assert objective.counts(groups) == {"tokens": 9}
    assert loss.item() == pytest.approx(-sum(expected) / 9, rel=1e-5)
    assert list(tracked["policy/reward"]) == [0.5, 0.1]
    assert objective.beta(3) == 0.1


def test_a_run_imitates_demonstrations_and_the_best(training):
    options = {"sampler": Scripted(lambda row: ANSWERS), "prompt_dataset": PROMPTS}
    trainer = make(
        training,
        data=training.rows(12),
        policy_update="best_of_n",
        truncated_samples="floor",
        num_samples=3,
        options=options,
    )
    plant(trainer, lambda c: 9.0 if c.role is Role.DEMONSTRATION else PLANTED.get(c.token_ids, 0.9))
    groups = updated(trainer)
    trainer.train()
    assert phases(trainer) == [1, 1]
    assert sorted(group.row for group in groups) == sorted(trainer.train_dataset["row"])
    for group in groups:
        (completion,) = group.completions
        alone = group.row >= 12
        assert completion.role is (Role.SAMPLE if alone else Role.DEMONSTRATION)
        assert not alone or completion.token_ids == (9, 12, 2)


# --- what a sample is worth ---------------------------------------------------------------------------------------------


def test_what_did_not_finish_gets_the_least():
    group = Group((1,), (sample((5, 2), 0.5), sample((6, 7), 0.9, finished=False), sample((8, 2), -0.5)))
    assert policy_rewards(group, "floor") == [0.5, -0.5, -0.5]
    assert policy_rewards(group, "drop") == [0.5, None, -0.5]
    worse = Group((1,), (sample((5, 2), 0.5), sample((6, 7), -3.0, finished=False)))
    assert policy_rewards(worse, "floor") == [0.5, -3.0]
    assert graded(group.select([1, 1]), "floor", 1.0) == []


def test_the_scale():
    rows = [[1.0, 3.0, None], [0.0, 0.5, 1.0], [4.0]]
    spread_within = ((2.0 + 0.25) / 2) ** 0.5  # variances 2 and 1/4; one alone varies not at all
    assert reward_scale(rows) == reward_scale(rows, down_only=True) == pytest.approx(spread_within)
    small = [[0.1, 0.3], [0.0, 0.2]]
    assert reward_scale(small) == pytest.approx(0.02**0.5)
    assert reward_scale(small, down_only=True) == 1.0
    assert reward_scale([[1.0, 1.0], []]) == 1.0
    (group,) = graded(Group((1,), (demonstration((4, 2)), sample((5, 2), 1.0), sample((6, 2), 2.0))), "floor", 0.5)
    assert group.values("scaled_reward") == (2.0, 4.0)


@pytest.mark.parametrize(("scaling", "scale"), [("spread", 0.1), ("down_only", 1.0)])
def test_the_scale_of_a_run(training, scaling, scale):
    answers = [ANSWERS[0], ANSWERS[2], ((9, 13, 2), True)]
    trainer = make(training, reward_scaling=scaling, num_samples=3, options={"sampler": Scripted(lambda row: answers)})
    plant(trainer, lambda c: {**PLANTED, (9, 13, 2): 0.3}.get(c.token_ids, 0.9))
    groups = updated(trainer)
    trainer.train()
    assert history(trainer, "scale") == pytest.approx([scale] * 2)
    expected = tuple(reward / scale for reward in (0.1, 0.2, 0.3))
    assert [group.values("scaled_reward") for group in groups] == [pytest.approx(expected)] * len(groups)
    assert len(groups) == 16


@pytest.mark.parametrize("keep", ["last", "best"])
def test_which_policy_is_kept(training, keep):
    """A reward that finds the start best: its samples alone are worth something."""
    snapshots, start = Snapshots(), {}
    trainer = make(training, keep_policy=keep, beta=0.0, options={"callbacks": [snapshots]})

    def of(completion):
        if completion.role is Role.DEMONSTRATION:
            return 9.0
        return spread(completion) + 5.0 * (completion.token_ids in start)

    plant(trainer, of)
    look = trainer.stages.phase.candidates.look

    def looked(stage, policy):
        found = look(stage, policy)
        start.update({c.token_ids: 1 for group in found for c in group.samples} if stage == 0 else {})
        return found

    trainer.stages.phase.candidates.look = looked
    trainer.train()
    assert phases(trainer) == [1, 1]
    selection = trainer.stages.phase.selection
    assert max(selection, key=lambda entry: entry.objective).stage == 0
    assert [entry.stage for entry in selection if entry.chosen] == [0 if keep == "best" else 2]
    assert_same_weights(trainer.policy, snapshots.models[0 if keep == "best" else -1])
    assert distance(snapshots.models[0], snapshots.models[-1]) > 1e-4


# --- prompts that are left out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["gradient", "best_of_n"])
def test_prompts_whose_best_is_too_low_are_left_out(training, update):
    """Demonstrations have 0 … 3 by row; those of half of the prompts lie under their median. They stay demonstrations."""
    options = {"prompt_dataset": PROMPTS}
    settings = {**FEATURES, "reward_negatives": "own,initial", "drop_below": 0.5, "policy_update": update}
    trainer = make(training, data=training.rows(8), options=options, **settings)

    def of(group, completion):
        if completion.role is Role.DEMONSTRATION:
            return group.row % 4
        return 1.0 + (group.row % 2) + 0.5 * spread(completion)

    plant_score(trainer.reward, of)
    groups = updated(trainer)
    trainer.train()
    assert phases(trainer) == [1, 1]
    facts = trainer.stages.store
    low = {row for row in range(16) if row % 2 == 0}
    for stage in (0, 1):
        line = (facts.path(stage) / "reward.json").read_text(encoding="utf-8")
        assert '"drop_below": ' in line
        assert '"drop_below": null' not in line
    trained = {group.row for group in groups if group.samples}
    assert trained
    assert not trained & low
    demonstrated = {group.row for group in groups if group.demonstrations}
    assert demonstrated == (set(range(8)) if update == "best_of_n" else set())


def test_the_quantile_is_that_of_rows_which_the_reward_has_not_seen(training):
    settings = {**FEATURES, "reward_negatives": "own", "drop_below": 0.25, "keep_policy": "best", "validation_rows": 4}
    trainer = make(training, **settings)
    plant_score(
        trainer.reward, lambda group, c: 10.0 * len(c.token_ids) if c.role is Role.DEMONSTRATION else spread(c)
    )
    trainer.train()
    rows = trainer.stages.phase.candidates.rows.groups
    expected = np.quantile([10.0 * len(group.demonstrations[0].token_ids) for group in rows], 0.25)
    facts = json.loads((trainer.stages.store.path(0) / "reward.json").read_text(encoding="utf-8"))
    assert facts["drop_below"] == pytest.approx(expected)


def test_a_truncated_sample_is_not_the_best_of_its_prompt(training):
    answers = [((9, 10, 2), True), ((9, 11, 8), False), ((9, 12, 2), True)]
    options = {"sampler": Scripted(lambda row: answers)}
    settings = {**FEATURES, "truncated_samples": "floor", "drop_below": 0.0, "num_samples": 3}
    trainer = make(training, data=training.rows(16), options=options, **{**settings, "reward_negatives": "own"})
    plant_score(trainer.reward, lambda g, c: {1: {11: 9.0, 10: 0.1, 12: 0.2}.get(c.token_ids[1], 5.0)}[1])
    groups = updated(trainer)
    trainer.train()
    assert phases(trainer) == [1, 1]
    assert groups == []


@pytest.mark.parametrize(
    "settings",
    [
        {"reward": "features", "reward_features": "hidden"},
        {"reward": "features", "reward_features": "text,logp"},
        {"reward": "auto"},
        {"reward": "likelihood"},
        {"reward": "model"},
        {"reward": "features", "reward_features": "text,logp", "reward_ensemble": 2, "reward_combine": "mean"},
    ],
    ids=str,
)
def test_rewards_that_compare_within_a_prompt_cannot_call_it_too_low(training, settings):
    with pytest.raises(UserError, match=r"'drop_below': this reward compares only the answers to one prompt"):
        make(training, drop_below=0.05, **settings)


def test_a_neural_reward_compares_across_prompts_if_it_sees_samples_of_others(training):
    trainer = make(training, drop_below=0.05, options={"prompt_dataset": PROMPTS})
    assert trainer.stages.phase.learner.compares_across_prompts


# --- ensembles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disagree", ["nowhere", "on odd rows", "everywhere"])
def test_prompts_on_which_members_disagree_are_refused(training, disagree):
    trainer = make(training, data=training.rows(16), reward_ensemble=2, **FEATURES)
    members = trainer.stages.phase.learner.members
    plant_score(members[0].reward, lambda group, c: over_samples(c))

    def other(group, completion):
        contrary = {"nowhere": False, "everywhere": True, "on odd rows": group.row % 2 == 1}[disagree]
        return -over_samples(completion) if contrary else over_samples(completion)

    plant_score(members[1].reward, other)
    groups = updated(trainer)
    trainer.train()
    refused = {"nowhere": 0.0, "everywhere": 1.0, "on odd rows": None}[disagree]
    if refused is not None:
        assert history(trainer, "reward/refused") == [refused] * 2
    else:
        assert sum(history(trainer, "reward/refused")) == pytest.approx(1.0), "half of two stages of as many rows"
    rows = {group.row for group in groups}
    assert rows == {"nowhere": set(range(16)), "everywhere": set(), "on odd rows": set(range(0, 16, 2))}[disagree]


class Told:
    """A learner whose fits find what they are told to find, from groups that hold some prompt."""

    tokens_done = 0
    compares_across_prompts = True

    def __init__(self, name="", facts=None, needs=None):
        self.name, self.facts, self.needs, self.seen = name, facts, needs, []
        self.reward = self

    def fit(self, comparisons, *, stage, validation=(), on_step):
        self.seen.append(comparisons)
        return {} if self.needs is not None and self.needs not in comparisons.prompts else dict(self.facts)


def test_a_member_whose_resample_is_empty_takes_all(training):
    """And what is logged is what all members log: of another resample, a kind of negatives may be missing."""
    groups = [Group((1, row), (demonstration((4, 2)), sample((5, 2), 0.0)), row) for row in range(3)]
    comparisons = Comparisons({"own": groups})
    gone = next(
        (row, seed)
        for seed in range(20)
        for row in range(3)
        if (1, row) not in comparisons.resampled(seed).prompts and (1, row) in comparisons.resampled(seed + 1).prompts
    )
    members = [Told(facts={"pairs": 3.0}, needs=(1, gone[0])), Told(facts={"pairs": 5.0, "accuracy/own": 1.0})]
    learner = EnsembleLearner(members, "mean", seed=gone[1])
    facts = learner.fit(comparisons, stage=0, on_step=lambda done: None)
    assert facts == {"pairs": 4.0}
    assert [seen.prompts for seen in members[0].seen] == [
        comparisons.resampled(gone[1]).prompts,
        comparisons.prompts,
    ]
    assert len(members[1].seen) == 1
    nothing = EnsembleLearner([Told(facts={}), Told(facts={})], "mean", seed=0)
    assert nothing.fit(comparisons, stage=0, on_step=lambda done: None) == {}


# --- which reward -------------------------------------------------------------------------------------------------------


def test_auto_takes_the_best_and_says_so():
    said, accuracy = [], {"first": 0.6, "second": 0.9, "third": 1.0}
    learners = {name: Told(name, {"of": number}) for number, name in enumerate(accuracy)}
    learners["third"].facts = {}  # had nothing to compare
    learner = AutoLearner(learners, lambda reward, rows: accuracy[reward.name], said.append)
    found = learner.fit(Comparisons({}), stage=2, on_step=lambda done: None)
    assert found == {"of": 1}
    assert learner.reward is learners["second"]
    assert said == ["stage 2: of first 0.600, second 0.900 (accuracy on validation rows) it takes second"]
    accuracy["first"] = 0.95
    learner.fit(Comparisons({}), stage=3, on_step=lambda done: None)
    assert learner.reward is learners["first"]
    for told in learners.values():
        told.facts = {}
    assert learner.fit(Comparisons({}), stage=4, on_step=lambda done: None) == {}
    assert learner.reward is learners["first"]


def test_a_run_takes_the_planted_best(training, caplog):
    settings = {"reward": "auto", "reward_negatives": "own", "data": training.rows(20)}
    trainer = make(training, reward_gate="off", **settings)
    learners = trainer.stages.phase.learner.learners
    for name, learner in learners.items():
        plant_score(learner.reward, lambda g, c, n=name: over_samples(c) if n == "features:hidden" else spread(c))
    with caplog.at_level(logging.INFO, "tutelage.algorithms.rft"):
        trainer.train()
    said = [r.getMessage() for r in caplog.records if "it takes" in r.getMessage()]
    assert len(said) == 2
    assert all("features:hidden 1.000" in line and line.endswith("it takes features:hidden") for line in said)
    assert all(name in said[0] for name in learners)
    assert trainer.reward is learners["features:hidden"].reward


def test_the_likelihood_is_the_mean_of_the_fold_policies(training):
    trainer = make(training, fold_learning_rate=1e-2, **{**FEATURES, "reward": "likelihood"})
    trainer.train()
    assert phases(trainer) == [1, 1]
    assert history(trainer, "reward/fixed") == [1, 1]
    negatives = trainer.stages.phase.negatives
    assert negatives.kinds == ("own",)
    assert not list((trainer.stages.store.folder / "negatives").glob("*.jsonl")), "it fits nothing"
    groups, folds = trainer.stages.store.groups(0), negatives.folds()
    sums = []
    for fold in range(2):
        model = copy.deepcopy(training.model())
        weights = folds.weights(fold)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), weights.parameters, strict=True):
                parameter.copy_(value)
        sums.append([sum(values) for group in cached_token_logps(model, groups) for values in group])
    assert trainer.reward.score(groups).tolist() == pytest.approx(np.mean(sums, axis=0).tolist(), abs=1e-3)
    assert np.abs(np.subtract(*sums)).max() > 0.1
    trained = sum(len(c.token_ids) for stage in (0, 1) for g in trainer.stages.store.sampled(stage) for c in g.samples)
    assert trainer.costs.policy_tokens > trained, "what the folds trained on counts too"


# --- the unpaired term --------------------------------------------------------------------------------------------------


def test_the_unpaired_term_by_hand():
    """One step of SGD on −log σ of demonstrations over samples of their prompt, and of another prompt that has none."""

    def made():
        reward = ExplicitReward.fresh(tiny_model(), shared=False)
        with torch.no_grad():
            reward.head.weight += torch.linspace(-1, 1, reward.head.weight.numel())
        return reward

    paired = [
        Group((1, 5), (demonstration((7, 8, 2)), sample((9, 2), 0.0), sample((6, 2), 0.0)), 0),
        Group((1, 6), (demonstration((4, 2)), sample((3, 2), 0.0)), 1),
    ]
    unpaired = [
        Group((1, 20), (sample((30, 31), 0.0, finished=False), sample((32, 2), 0.0)), 2),
        Group((1, 21), (sample((33, 34), 0.0, finished=False),), 3),  # compares with no demonstration that finished
    ]
    reward, expected = made(), made()
    fitter = RewardFitter(
        reward,
        RewardObjective(demonstration_weight=0.5),
        torch.optim.SGD(reward.parameters, lr=0.1),
        batch_size=2,
        micro_batch_size=1,
        max_grad_norm=0.0,
    )
    order = [next(fitter._batches(groups, 0)) for groups in (paired, unpaired)]
    partner = {group.row: other for group, other in zip(*order, strict=True)}
    fitter.fit(paired, phase=0, steps=1, unpaired=unpaired)

    def r(group, place):
        return expected.rewards([group.select([place])])[0]

    def over(better, worse):
        return -torch.nn.functional.logsigmoid(better - worse)

    expected.model.train()
    of_pairs = (over(r(paired[0], 0), r(paired[0], 1)) + over(r(paired[0], 0), r(paired[0], 2))) / 2
    of_pairs = of_pairs + over(r(paired[1], 0), r(paired[1], 1))
    across = sum(over(r(group, 0), r(unpaired[0], 1)) for group in paired if partner[group.row] is unpaired[0])
    assert isinstance(across, torch.Tensor)
    (0.5 * (of_pairs + across) / 2).backward()
    for found, start in zip(reward.parameters, expected.parameters, strict=True):
        moved = start if start.grad is None else start - 0.1 * start.grad
        torch.testing.assert_close(found, moved, atol=1e-5, rtol=1e-4)
    beside = next(len(g.completions[0].token_ids) for g in paired if partner[g.row] is unpaired[0])
    assert fitter.tokens_done == (3 + 2 + 2) + (2 + 2) + (beside + 2)
