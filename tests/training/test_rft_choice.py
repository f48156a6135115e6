"""RFT on tiny models: the choice."""

import math

import pytest
import torch

from rft_runs import make, phases, spread
from training_runs import Snapshots, assert_same_weights, distance
from tutelage.groups import Completion, Group, Role
from tutelage.scoring.logps import cached_logps
from tutelage.training.selection import Candidate, compare


class Judged:
    """A reward that gives every candidate's samples the value it is told, and every demonstration more."""

    def __init__(self, trainer, values):
        self.trainer, self.values = trainer, values
        trainer.reward.scores = self.scores

    def scores(self, groups):
        stage = next((s for s, c in self.trainer.stages.phase.candidates.by_stage.items() if c.groups is groups), None)
        value = None if stage is None else self.values(self.trainer.stage).get(stage, 0.0)
        return [
            tuple(
                99.0 if c.role == Role.DEMONSTRATION else spread(c) if value is None else value for c in g.completions
            )
            for g in groups
        ]


def judged_run(training, values, **settings):
    snapshots = Snapshots()
    trainer = make(training, stages_per_epoch=4, adapter=True, options={"callbacks": [snapshots]}, **settings)
    Judged(trainer, values)
    trainer.train()
    assert phases(trainer) == [1] * 4
    return trainer, snapshots.models


def chosen(trainer):
    (stage,) = [entry.stage for entry in trainer.stages.phase.selection if entry.chosen]
    return stage


@pytest.mark.parametrize("best", [0, 1, 4])
def test_the_best_candidate_is_what_is_exported(training, best):
    trainer, models = judged_run(training, lambda stage: {best: 5.0}, beta=0.0)
    assert [entry.stage for entry in trainer.stages.phase.selection] == [0, 1, 2, 3, 4]
    assert [entry.reward for entry in trainer.stages.phase.selection] == [5.0 * (stage == best) for stage in range(5)]
    assert chosen(trainer) == best
    assert_same_weights(trainer.policy, models[best])
    assert all(distance(models[best], model) > 1e-5 for stage, model in enumerate(models) if stage != best)
    groups = trainer.stages.store.groups(best, "validation")
    found = torch.tensor(cached_logps(trainer.policy, groups))
    torch.testing.assert_close(found, torch.tensor([g.sums("old_logps") for g in groups]), atol=1e-4, rtol=0)


def test_the_start_wins_where_nothing_beats_it(training):
    trainer, models = judged_run(training, lambda stage: {}, beta=0.0)
    assert chosen(trainer) == 0
    assert_same_weights(trainer.policy, models[0])


def test_reward_is_weighed_against_kl(training):
    """A β so large that the KL decides, though later stages have more reward."""
    trainer, models = judged_run(
        training, lambda stage: {s: 0.01 * s for s in range(5)}, beta=50.0, learning_rate=1e-2
    )
    for entry in trainer.stages.phase.selection:
        assert entry.objective == pytest.approx(entry.reward - 50.0 * entry.kl, abs=1e-4)
    best = max(trainer.stages.phase.selection, key=lambda entry: entry.objective)
    assert best.kl < trainer.stages.phase.selection[-1].kl
    assert trainer.stages.phase.selection[0].kl == 0
    assert (best.stage, best.chosen) == (chosen(trainer), True)
    assert_same_weights(trainer.policy, models[best.stage])


def test_a_reward_that_changes_its_mind_finds_the_start_again(training):
    """It prefers the start, then a candidate whose weights are gone by then, and in the end the start among those left."""
    values = {1: {0: 5.0}, 2: {0: 5.0, 1: 0.0, 2: 1.0}, 3: {0: 5.0, 1: 9.0, 2: 0.0, 3: 1.0}}
    last = {0: 5.0, 1: 9.0, 2: 0.0, 3: 1.0, 4: 0.0}
    trainer = None

    def of(stage):
        return last if trainer is not None and 4 in trainer.stages.phase.candidates.by_stage else values.get(stage, {})

    snapshots = Snapshots()
    trainer = make(training, stages_per_epoch=4, beta=0.0, options={"callbacks": [snapshots]})
    Judged(trainer, of)
    trainer.train()
    assert chosen(trainer) == 0
    assert_same_weights(trainer.policy, snapshots.models[0])
    assert [entry.reward for entry in trainer.stages.phase.selection] == [5.0, 9.0, 0.0, 1.0, 0.0]


def test_candidates_are_compared_on_one_scale():
    """Scaled each by its own spread, the second would look worse, though each of its samples has the higher reward."""

    def candidate(stage, *samples):
        zero = {"reference_logps": (0.0,), "old_logps": (0.0,)}
        completions = [Completion((9,), Role.DEMONSTRATION, True, zero, {"reward": 20.0})]
        completions += [Completion((i + 1,), Role.SAMPLE, True, zero, {"reward": r}) for i, r in enumerate(samples)]
        return Candidate(stage, [Group((1,), tuple(completions))] * 4)

    both = [candidate(0, 10.0, 10.5), candidate(1, 11.0, 17.0)]
    first, second = compare(both, [c.groups for c in both], beta=0.1, truncated_samples="score")
    assert second.reward.mean > first.reward.mean
    assert second.objective > first.objective
    scale = math.sqrt((0.125 + 18.0) / 2)  # variances of two samples: 0.5² / 2 and 6² / 2
    assert first.objective == pytest.approx(10.25 / scale)
    assert second.objective == pytest.approx(14.0 / scale)
