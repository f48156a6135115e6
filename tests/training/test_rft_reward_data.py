"""RFT on tiny models: what the reward learns from."""

import pytest
import torch
from datasets import Dataset
from test_rft_choice import chosen

from rft_runs import make, over_samples, phases, plant, run, trained_on
from training_runs import SGD, Snapshots, assert_same_weights, distance, history
from tutelage.errors import UserError
from tutelage.groups import Role

PAIRS = [{"prompt": f"Is {i}?", "chosen": f" Yes, {i}.", "rejected": f" No, {i}."} for i in range(6)]


def test_preference_pairs_teach_the_reward(training):
    options = {"preference_dataset": Dataset.from_list(PAIRS)}
    trainer = run(training, options=options, demonstration_weight=0.0, num_train_epochs=2, reward_epochs=4)
    assert len(trainer.stages.phase.learner.fitter.preferences) == 6
    assert history(trainer, "preference/accuracy")[-1] == 1.0
    groups = trainer.stages.phase.learner.fitter.preferences
    assert {group.completions[0].role for group in groups} == {Role.PREFERRED}
    without = run(training, name="without", reward_epochs=4)
    assert not history(without, "preference/accuracy")
    assert any(
        not torch.equal(a, b) for a, b in zip(trainer.reward.parameters, without.reward.parameters, strict=True)
    )


def test_preference_data_without_a_pair(training):
    options = {"preference_dataset": training.rows(4), "preference_source": "pairs.jsonl"}
    with pytest.raises(UserError, match=r"pairs.jsonl, field 'preference_dataset': there is no preference pair in it"):
        make(training, options=options)


def test_the_reward_may_learn_again_from_earlier_samples(training):
    trainer = make(training, stages_per_epoch=4, reward_replay_stages=2)
    plant(trainer, over_samples)
    _, reward = trained_on(trainer)
    trainer.train()
    own = [{group.completions for group in trainer.stages.store.groups(stage)} for stage in range(4)]
    assert [len(groups) for groups in own] == [4] * 4
    ends = [0, 4, 12, 24, 36]
    for stage in range(4):
        fitted = [group.completions for group in reward[ends[stage] : ends[stage + 1]]]
        assert len(fitted) == 4 * min(3, stage + 1)
        assert set(fitted) == set().union(*own[max(0, stage - 2) : stage + 1])
    assert len(reward) == 36


@pytest.mark.parametrize("adapter", [False, True])
def test_batch_one_accumulated_four_times_is_batch_four(training, adapter):
    settings = {"adapter": adapter, **SGD, "reward_learning_rate": 0.05, "num_train_epochs": 2, "beta": 0.1}
    runs, ends = [], []
    for size in (1, 4):
        snapshots = Snapshots()
        options = {"preference_dataset": Dataset.from_list(PAIRS), "callbacks": [snapshots]}
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        runs.append(run(training, name=str(size), options=options, **sizes, **settings))
        ends.append(snapshots.models)
    one, four = runs
    assert phases(one) == phases(four)
    assert 1 in phases(one)
    assert one.state.global_step == four.state.global_step == 8
    assert distance(ends[0][0], ends[0][-1]) > 1e-4
    assert_same_weights(ends[0][-1], ends[1][-1], 1e-5)
    start = make(training, name="start", adapter=adapter).reward.parameters
    assert max((a - b).abs().max() for a, b in zip(one.reward.parameters, start, strict=True)) > 1e-2
    for found, expected in zip(one.reward.parameters, four.reward.parameters, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert chosen(one) == chosen(four)
