"""RFT on tiny models: the gate."""

import copy
import json
import re

import pytest
from test_rft_truncated_samples import ANSWERS

from rft_runs import Scripted, make, over_samples, phases, plant, run, spread
from training_runs import assert_same_weights, history


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "tutelage.training.reward_phase"]


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda c: -over_samples(c), r"does not beat chance on the validation rows: accuracy 0.00"),
        (spread, r"does not beat chance.*: accuracy 0\.\d\d \(0\.\d\d to"),
        (lambda c: 1.0, "the reward is the same for all samples"),
    ],
)
def test_a_reward_that_knows_nothing_moves_no_policy(training, caplog, reward, said):
    trainer = plant(make(training), reward)
    start = copy.deepcopy(trainer.policy)
    trainer.train()
    assert phases(trainer) == [0, 0]
    assert trainer.state.global_step == 4, "the run goes on"
    assert_same_weights(trainer.policy, start)
    first, second = warnings_of(caplog)
    assert re.search("stage 0: the policy stays as it is: .*" + said, first)
    assert second.startswith("stage 1: ")
    reason = json.loads((trainer.stages.store.path(1) / "reward.json").read_text(encoding="utf-8"))["reason"]
    assert re.search(said, reason)


def test_a_warm_up_is_no_warning_and_a_saturated_reward_is_one(training, caplog):
    trainer = run(training, reward_warmup_stages=9, early_stopping="saturated", saturation=0.51, reward_epochs=4)
    assert phases(trainer) == [0, 0]
    said = warnings_of(caplog)
    assert said
    assert all("reward phase ended after" in line for line in said)
    assert history(trainer, "reward/saturated") == [float(f"stage {s}" in " ".join(said)) for s in (0, 1)]
    assert all(steps < 8 for steps in history(trainer, "reward/steps") if steps)


def test_samples_that_are_all_cut_teach_nothing_and_that_is_said(training, caplog):
    trainer = run(
        training, truncated_samples="floor", options={"sampler": Scripted(lambda row: [ANSWERS[1], ((7,) * 8, False)])}
    )
    assert history(trainer, "samples/truncated_fraction") == [1, 1]
    assert phases(trainer) == [0, 0]
    assert "raise --max_completion_length or use --truncated_samples score" in warnings_of(caplog)[0]
    assert not (trainer.stages.store.path(0) / "reward.safetensors").exists()
