"""RFT on tiny models: truncated samples."""

import pytest

from rft_runs import Scripted, make, phases, plant, trained_on
from training_runs import history
from tutelage.groups import Role

ANSWERS = [((9, 10, 2), True), ((9, 11, 8), False), ((9, 12, 2), True)]
PLANTED = {(9, 10, 2): 0.1, (9, 11, 8): 0.3, (9, 12, 2): 0.2}


@pytest.mark.parametrize(
    ("truncated_samples", "rewards", "compared"),
    [("floor", [0.1, 0.1, 0.2], 2), ("score", [0.1, 0.3, 0.2], 3), ("drop", [0.1, 0.2], 2)],
)
def test_cut_samples(training, truncated_samples, rewards, compared):
    trainer = make(
        training,
        truncated_samples=truncated_samples,
        num_samples=3,
        options={"sampler": Scripted(lambda row: ANSWERS)},
    )
    plant(trainer, lambda c: PLANTED.get(c.token_ids, 0.9))
    policy, reward = trained_on(trainer)
    trainer.train()
    assert phases(trainer) == [1, 1]
    assert len(policy) == len(reward) == 16
    assert all(group.values("scaled_reward") == pytest.approx(rewards) for group in policy)
    assert all(len(group.completions) == 1 + compared for group in reward)
    assert {c.role for group in policy for c in group.completions} == {Role.SAMPLE}
    # In the choice among policies a sample that was left out counts as the worst of all, 0.1.
    mean = (0.1 + 0.3 + 0.2) / 3 if truncated_samples == "score" else (0.1 + 0.1 + 0.2) / 3
    assert history(trainer, "validation/reward")[0] == pytest.approx(mean)


def test_a_prompt_with_one_sample_left_is_left_out(training):
    cut = [ANSWERS[0], ((9, 11, 8), False)]
    trainer = make(
        training, truncated_samples="drop", options={"sampler": Scripted(lambda row: cut if row % 2 else [cut[0]] * 2)}
    )
    plant(trainer, lambda c: PLANTED.get(c.token_ids, 0.9))
    policy, _ = trained_on(trainer)
    trainer.train()
    assert phases(trainer) == [1, 1]
    assert policy
    assert all(group.row % 2 == 0 for group in policy)


def test_rewards_are_scaled_down_by_their_spread_and_never_up(training):
    trainer = make(training, num_samples=3, options={"sampler": Scripted(lambda row: ANSWERS)})
    plant(trainer, lambda c: 100 * PLANTED.get(c.token_ids, 0.9))
    policy, _ = trained_on(trainer)
    trainer.train()
    assert [group.values("scaled_reward") for group in policy] == [
        pytest.approx((1.0, 3.0, 2.0))
    ] * 16  # the spread is 10
    assert history(trainer, "scale") == pytest.approx([10, 10])
    lines = trainer.stages.store.lines(0, "rewards")
    assert [line["rewards"][1:] for line in lines] == [pytest.approx((10, 30, 20))] * 8
