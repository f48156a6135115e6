"""The losses of RFT against arithmetic written out, and against the loss of TRL's reward trainer."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from tutelage.groups import Completion, Group, Role
from tutelage.losses import (
    group_normalized_advantages,
    kl_loss,
    leave_one_out_advantages,
    policy_gradient_loss,
    reward_loss,
)
from tutelage.rewards import ExplicitReward

# Three pairs with gaps z = r(y) − r(ỹ) of 0.8, −1 and 0, sums of 1.2, 0 and 4, and sums of squares of 1.04, 0.5 and 8.
FIRST = torch.tensor([1.0, -0.5, 2.0])
OTHERS = torch.tensor([0.2, 0.5, 2.0])


def softplus(z):
    """−log σ(−z)."""
    return math.log(1 + math.exp(z))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [softplus(-0.8), softplus(1.0), math.log(2)]),
        # the gap less the margin: 0.3, −1.5, −0.5
        ({"margin": 0.5}, [softplus(-0.3), softplus(1.5), softplus(0.5)]),
        (
            {"label_smoothing": 0.1},
            [0.9 * softplus(-0.8) + 0.1 * softplus(0.8), 0.9 * softplus(1.0) + 0.1 * softplus(-1.0), math.log(2)],
        ),
        ({"centering": 0.01}, [softplus(-0.8) + 0.0144, softplus(1.0), math.log(2) + 0.16]),
        (
            {"margin": 0.5, "label_smoothing": 0.1, "centering": 0.01},
            [
                0.9 * softplus(-0.3) + 0.1 * softplus(0.3) + 0.0144,
                0.9 * softplus(1.5) + 0.1 * softplus(-1.5),
                0.9 * softplus(0.5) + 0.1 * softplus(-0.5) + 0.16,
            ],
        ),
        ({"kind": "linear", "regularization": 0.5}, [-0.8 + 0.26, 1 + 0.125, 2.0]),
        ({"kind": "linear"}, [-0.8 + 0.52, 1 + 0.25, 4.0]),
        (
            {"kind": "linear", "regularization": 0.5, "margin": 0.5, "centering": 0.01},
            [-0.3 + 0.26 + 0.0144, 1.5 + 0.125, 0.5 + 2 + 0.16],
        ),
    ],
)
def test_reward_loss_of_three_pairs(options, expected):
    torch.testing.assert_close(reward_loss(FIRST, OTHERS, **options), torch.tensor(expected))


def test_the_gradient_raises_demonstrations_and_lowers_samples():
    """d/dz of logistic is −(1 − ε) σ(−z) + ε σ(z); of linear −1, to which the squares add ρ r."""
    slopes = [1 / (1 + math.exp(z)) for z in (0.8, -1.0, 0.0)]
    cases = [
        ({}, [-s for s in slopes], slopes),
        ({"label_smoothing": 0.1}, [0.1 - s for s in slopes], [s - 0.1 for s in slopes]),
        ({"kind": "linear", "regularization": 0.1}, [-0.9, -1.05, -0.8], [1.02, 1.05, 1.2]),
    ]
    for options, of_first, of_others in cases:
        first, others = FIRST.clone().requires_grad_(), OTHERS.clone().requires_grad_()
        reward_loss(first, others, **options).sum().backward()
        torch.testing.assert_close(first.grad, torch.tensor(of_first))
        torch.testing.assert_close(others.grad, torch.tensor(of_others))


@pytest.mark.parametrize("regularization", [0.5, 2.0])
def test_the_linear_loss_has_its_minimum_where_its_docstring_says(regularization):
    """Answers 0 and 3 are only ever demonstrated or sampled: their rewards stand at the bounds ±1/ρ."""
    demonstrated = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    sampled = torch.tensor([0.0, 0.1, 0.4, 0.5], dtype=torch.float64)
    first, others = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    weights = torch.outer(demonstrated, sampled)

    def expected_loss(rewards):
        losses = reward_loss(
            rewards[first.flatten()], rewards[others.flatten()], kind="linear", regularization=regularization
        )
        return (losses * weights.flatten()).sum()

    rewards = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([rewards], lr=1.0 / regularization)
    for _ in range(200):
        optimizer.zero_grad()
        expected_loss(rewards).backward()
        optimizer.step()
    closed_form = (demonstrated - sampled) / (regularization * (demonstrated + sampled))
    torch.testing.assert_close(rewards.detach(), closed_form)
    assert closed_form[[0, 3]].tolist() == [1 / regularization, -1 / regularization]
    assert closed_form.abs().max() <= 1 / regularization


@pytest.mark.parametrize(
    ("kind", "losses", "slopes"), [("logistic", [0.0, 2e4], [0.0, -1.0]), ("linear", [1e8 - 2e4, 1e8 + 2e4], None)]
)
def test_extreme_rewards_stay_finite(kind, losses, slopes):
    first = torch.tensor([1e4, -1e4], requires_grad=True)
    found = reward_loss(first, -first.detach(), kind=kind)
    found.sum().backward()
    assert found.tolist() == losses
    assert first.grad.tolist() == (slopes or [9_999.0, -10_001.0])


@pytest.mark.parametrize(("options", "margin"), [({}, None), ({"center_rewards_coefficient": 0.1}, None), ({}, 0.7)])
def test_reward_loss_equals_that_of_trl(options, margin, training):
    """Value and gradient, on pairs of token ids whose longer side is the chosen one, the rejected one, and neither."""
    prompt = [5, 6, 7]
    pairs = [([8, 9, 10, 2], [11, 2]), ([12, 2], [13, 14, 15, 16, 2]), ([17, 2], [18, 2])]
    rows = [{"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected} for chosen, rejected in pairs]
    if margin is not None:
        rows = [{**row, "margin": margin} for row in rows]
    training.tokenizer.pad_token = "<s>"  # no answer holds it: transformers reads the last token that is no pad token
    config = training.model(num_labels=1).config
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    arguments = RewardConfig(
        output_dir=str(training.folder),
        per_device_train_batch_size=3,
        bf16=False,
        use_cpu=True,
        report_to=[],
        **options,
    )
    trainer = RewardTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), processing_class=training.tokenizer
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model.eval(), inputs)
    theirs.backward()
    their_gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    sequences = [
        ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    assert sorted(sequences[:3]) == sorted(row["chosen_ids"] for row in rows)
    completions = [Completion(tuple(ids[3:]), Role.PREFERRED, finished=True) for ids in sequences]
    model.zero_grad()
    rewards = ExplicitReward(model, model.score, layout="padded").rewards([Group(tuple(prompt), tuple(completions))])
    ours = reward_loss(
        rewards[:3], rewards[3:], centering=options.get("center_rewards_coefficient", 0.0), margin=margin or 0.0
    ).mean()
    ours.backward()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, their_gradients[name], atol=1e-5, rtol=1e-4)


def test_leave_one_out_advantages_of_three_samples():
    """2 − (−1 + 5)/2 = 0, −1 − (2 + 5)/2 = −4.5, 5 − (2 − 1)/2 = 4.5; twice the reward is twice the advantage."""
    rewards = torch.tensor([2.0, -1.0, 5.0])
    torch.testing.assert_close(leave_one_out_advantages(rewards), torch.tensor([0.0, -4.5, 4.5]))
    torch.testing.assert_close(leave_one_out_advantages(2 * rewards + 7), torch.tensor([0.0, -9.0, 9.0]))


def test_group_normalized_advantages_of_three_samples():
    """The mean of 1, 2, 6 is 3 and their standard deviation √((4 + 1 + 9)/2) = √7, which its scale cannot change."""
    rewards = torch.tensor([1.0, 2.0, 6.0])
    expected = torch.tensor([-2.0, -1.0, 3.0])
    torch.testing.assert_close(group_normalized_advantages(rewards), expected / (7**0.5 + 1e-4))
    torch.testing.assert_close(group_normalized_advantages(100 * rewards, epsilon=0), expected / 7**0.5)
    assert group_normalized_advantages(torch.ones(3)).tolist() == [0, 0, 0]


def test_policy_gradient_loss_of_three_samples():
    """Ratios 1.5, 1.5 and 0.9. A good sample earns nothing beyond 1.2; a bad one pays in full; the third is within.

    min(1.5 · 1, 1.2 · 1) = 1.2;  min(1.5 · −1, 1.2 · −1) = −1.5;  min(0.9 · 2, 0.9 · 2) = 1.8
    """
    old = torch.tensor([-10.0, -20.0, -5.0])
    logps = (old + torch.tensor([1.5, 1.5, 0.9]).log()).requires_grad_()
    losses = policy_gradient_loss(logps, old, torch.tensor([1.0, -1.0, 2.0]))
    torch.testing.assert_close(losses, torch.tensor([-1.2, 1.5, -1.8]), atol=1e-5, rtol=0)
    losses.sum().backward()  # d ratio / d log π = ratio; nothing where the clip holds
    torch.testing.assert_close(logps.grad, torch.tensor([0.0, 1.5, -1.8]), atol=1e-5, rtol=0)


def test_policy_gradient_loss_clips_a_bad_sample_that_already_lost_and_takes_its_range():
    old = torch.zeros(2)
    logps = torch.tensor([0.5, 0.8]).log().requires_grad_()
    losses = policy_gradient_loss(logps, old, torch.tensor([-1.0, -1.0]), clip_range=0.3)
    torch.testing.assert_close(losses, torch.tensor([0.7, 0.8]))  # max(0.5, 0.7) and max(0.8, 0.8)
    losses.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([0.0, 0.8]))


def test_at_ratio_one_the_gradient_is_that_of_reinforce():
    advantages = torch.tensor([0.3, -2.0, 0.0])
    logps = torch.tensor([-10.0, -400.0, -3.0], requires_grad=True)
    policy_gradient_loss(logps, logps.detach(), advantages).sum().backward()
    torch.testing.assert_close(logps.grad, -advantages)


def test_kl_loss_is_half_the_square():
    logps = torch.tensor([-10.0, -30.0, -5.0], requires_grad=True)
    losses = kl_loss(logps, torch.tensor([-12.0, -25.0, -5.0]))
    assert losses.tolist() == [2.0, 12.5, 0.0]
    losses.sum().backward()
    assert logps.grad.tolist() == [2.0, -5.0, 0.0]


def test_shapes_that_differ_unknown_kinds_and_lone_samples_are_refused():
    with pytest.raises(ValueError, match=r"other_rewards.*\(2,\)"):
        reward_loss(FIRST, OTHERS[:2])
    with pytest.raises(ValueError, match="unknown loss kind 'hinge': one of 'logistic', 'linear'"):
        reward_loss(FIRST, OTHERS, kind="hinge")
    with pytest.raises(ValueError, match=r"advantages.*\(3, 1\)"):
        policy_gradient_loss(FIRST, OTHERS, FIRST[:, None])
    with pytest.raises(ValueError, match=r"reference_logps.*\(\)"):
        kl_loss(FIRST, torch.tensor(0.0))
    with pytest.raises(ValueError, match="at least two samples"):
        leave_one_out_advantages(torch.ones(1))
    with pytest.raises(ValueError, match="at least two samples"):
        group_normalized_advantages(torch.ones(1))
