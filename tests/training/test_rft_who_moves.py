"""RFT on tiny models: who moves, and when."""

import pytest
import torch

from rft_runs import QUICK, make, over_samples, phases, plant, saved
from training_runs import Snapshots, assert_same_weights, distance, weights
from tutelage.models.loading import load_model
from tutelage.scoring.logps import cached_logps


def test_the_base_and_the_start_stay_as_they_are(training):
    trainer = make(training, adapter=True, num_train_epochs=2)
    frozen = {name: value for name, value in weights(trainer.policy).items() if "lora" not in name}
    start = [parameter.detach().clone() for parameter in trainer.stages.rollout.initial.parameters]
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    trainer.train()
    assert 1 in phases(trainer)
    assert distance(snapshots.models[0], snapshots.models[-1]) > 1e-4
    found = weights(trainer.policy)
    assert frozen
    assert all(torch.equal(found[name], value) for name, value in frozen.items())
    assert all(map(torch.equal, trainer.stages.rollout.initial.parameters, start))


def test_the_reference_of_an_sft_adapter_is_the_base_with_that_adapter(training):
    sft = training.run(
        "sft",
        model=load_model(saved(training)),
        name="sft",
        learning_rate=1e-2,
        options={"peft_config": training.lora()},
    )
    sft.save_model()
    start = load_model(sft.args.output_dir)
    trainer = training.trainer(
        "rft", model=load_model(sft.args.output_dir), data=training.rows(20), name="rft", **{**QUICK, "beta": 0.1}
    )
    trainer.train()
    assert phases(trainer) == [1, 1]
    for stage in (0, 1):
        groups = trainer.stages.store.groups(stage)
        found = torch.tensor([group.sums("reference_logps") for group in groups])
        torch.testing.assert_close(found, torch.tensor(cached_logps(start, groups)), atol=1e-4, rtol=0)
        with start.disable_adapter():
            assert (found - torch.tensor(cached_logps(start, groups))).abs().mean() > 0.1
    old = torch.tensor([group.sums("old_logps") for group in trainer.stages.store.groups(1)])
    assert (old - found).abs().mean() > 1e-3, "the policy had moved by then"


@pytest.mark.parametrize("optimizer", [{"optim": "adamw_torch"}, {"optim": "sgd", "optim_args": "momentum=0.9"}])
def test_the_policy_stays_while_the_reward_warms_up(training, optimizer):
    snapshots = Snapshots()
    trainer = make(training, reward_warmup_stages=1, weight_decay=0.1, options={"callbacks": [snapshots]}, **optimizer)
    reward = [parameter.detach().clone() for parameter in trainer.reward.parameters]
    trainer.train()
    assert phases(trainer) == [0, 1]
    assert_same_weights(snapshots.models[2], snapshots.models[0])
    assert distance(snapshots.models[3], snapshots.models[0]) > 1e-5
    assert any(not torch.equal(a, b) for a, b in zip(trainer.reward.parameters, reward, strict=True))


@pytest.mark.parametrize("optimizer", [{"optim": "adamw_torch"}, {"optim": "sgd", "optim_args": "momentum=0.9"}])
def test_a_policy_phase_left_out_moves_nothing_by_momentum_or_decay(training, optimizer):
    snapshots = Snapshots()
    trainer = make(training, weight_decay=0.1, options={"callbacks": [snapshots]}, **optimizer)
    plant(trainer, lambda c: over_samples(c) if trainer.stage == 0 else -over_samples(c))
    trainer.train()
    assert phases(trainer) == [1, 0]
    assert distance(snapshots.models[1], snapshots.models[0]) > 1e-5
    assert_same_weights(snapshots.models[4], snapshots.models[2])
