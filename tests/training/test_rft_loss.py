"""RFT on tiny models: the loss."""

import copy
import math

import pytest
import torch

from rft_runs import make, over_samples, plant, spread
from training_runs import SGD, Snapshots, assert_same_weights, distance
from tutelage.groups import Completion, Group, Role
from tutelage.scoring.logps import TokenLogps, completion_logps
from tutelage.training.objective import Step

BETA, CLIP = 0.3, 0.2
NOW = [[-3.0, -5.0, -2.0], [-4.0, -4.5]]  # log π, of two prompts with three samples and two
OLD = [[-3.1, -4.0, -2.0], [-4.3, -4.5]]  # the ratios: 1.105, 0.368, 1; 1.350, 1
REFERENCE = [[-3.5, -4.0, -2.2], [-4.0, -5.0]]
REWARDS = [[1.0, 0.2, 0.4], [0.5, -0.5]]


def by_hand(advantages, kl):
    """Loss and gradient of each sample, in plain numbers."""
    losses, gradients = [], []
    for now, old, reference, rewards in zip(NOW, OLD, REFERENCE, REWARDS, strict=True):
        shaped = [
            r - (BETA * (logp - start) if kl == "reward" else 0)
            for r, logp, start in zip(rewards, now, reference, strict=True)
        ]
        n, mean = len(shaped), sum(shaped) / len(shaped)
        if advantages == "leave_one_out":
            advantage = [value - (sum(shaped) - value) / (n - 1) for value in shaped]
        else:
            deviation = math.sqrt(sum((value - mean) ** 2 for value in shaped) / (n - 1))
            advantage = [(value - mean) / (deviation + 1e-4) for value in shaped]
        for a, logp, before, start in zip(advantage, now, old, reference, strict=True):
            ratio = math.exp(logp - before)
            clipped = (a > 0 and ratio > 1 + CLIP) or (a < 0 and ratio < 1 - CLIP)
            loss = -a * (max(min(ratio, 1 + CLIP), 1 - CLIP) if clipped else ratio)
            gradient = 0.0 if clipped else -a * ratio
            if kl == "loss":
                loss, gradient = loss + BETA * (logp - start) ** 2 / 2, gradient + BETA * (logp - start)
            losses.append(loss)
            gradients.append(gradient)
    return losses, gradients


@pytest.mark.parametrize("kl", ["reward", "loss"])
@pytest.mark.parametrize("advantages", ["leave_one_out", "group_normalized"])
def test_the_loss_of_a_step_by_hand(training, advantages, kl):
    trainer = make(training, advantages=advantages, kl=kl, beta=BETA, clip_range=CLIP)
    groups = [
        Group(
            (1,),
            tuple(
                Completion(
                    (5, i),
                    Role.SAMPLE,
                    True,
                    {"old_logps": (before / 4, before * 3 / 4), "reference_logps": (start, 0.0)},
                    {"scaled_reward": reward},
                )
                for i, (before, start, reward) in enumerate(zip(old, reference, rewards, strict=True))
            ),
        )
        for old, reference, rewards in zip(OLD, REFERENCE, REWARDS, strict=True)
    ]
    logps_C = torch.tensor([value for row in NOW for value in row], requires_grad=True)
    tokens = TokenLogps(groups, (logps_C / 2).repeat_interleave(2), torch.arange(5).repeat_interleave(2))
    assert trainer.objective.counts(groups) == {"samples": 5}
    loss = trainer.objective.loss(tokens, Step({"samples": 10}, 0, lambda *_: None))  # one of two micro-batches
    loss.backward()
    losses, gradients = by_hand(advantages, kl)
    assert loss.item() == pytest.approx(sum(losses) / 10, rel=1e-4)
    assert logps_C.grad.tolist() == pytest.approx([gradient / 10 for gradient in gradients], rel=1e-4, abs=1e-7)
    assert any(gradient == 0 for gradient in gradients) or kl == "loss", "one of them is clipped"


@pytest.mark.parametrize("adapter", [False, True])
def test_the_policy_phase_equals_a_loop_written_out(training, adapter):
    """From the record of a stage and the rewards in it: two steps of SGD on −Σ A ρ / samples."""
    trainer = make(training, adapter=adapter, stages_per_epoch=1, max_steps=1, data=training.rows(8), **SGD)
    plant(trainer, over_samples)
    policy = copy.deepcopy(trainer.policy)
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    trainer.train()
    groups = [group.select([1, 2]) for group in trainer.stages.store.groups(0)]
    found = [line["rewards"] for line in trainer.stages.store.lines(0, "rewards")]
    expected = [[2.0, *map(spread, group.completions)] for group in groups]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-6, rtol=0)
    logps = completion_logps(policy, groups)
    rewards = torch.tensor(found)[:, 1:]
    advantages = (rewards - rewards.flip(1)).flatten()  # of two samples; the policy is π_0 yet, so no KL
    (-(logps * advantages).sum() / 8).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    assert distance(policy, snapshots.models[0]) > 1e-4
    assert_same_weights(snapshots.models[1], policy, 1e-5)
