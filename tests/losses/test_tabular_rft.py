"""RFT where everything can be counted: a prompt with five answers and a policy that is a softmax over them."""

from itertools import product

import pytest
import torch

from tutelage.losses import kl_loss, leave_one_out_advantages, policy_gradient_loss, reward_loss

BETA = 0.8
REWARDS = torch.tensor([1.0, -0.5, 0.3, 0.0, 2.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1], dtype=torch.float64).log()
LOGITS = torch.tensor([0.5, -1.0, 0.2, 0.9, 0.0], dtype=torch.float64)


def log_policy(logits=LOGITS):
    """log π over the answers, of logits that can be learned."""
    logits = logits.clone().requires_grad_()
    return logits, logits.log_softmax(-1)


def gradient(of, value):
    return torch.autograd.grad(value, of)[0]


def kl(logps):
    return (logps.exp() * (logps - REFERENCE)).sum()


def exact_gradient(rewards=REWARDS, beta=BETA):
    """∇ E r − β KL(π‖π_0)."""
    logits, logps = log_policy()
    return gradient(logits, (logps.exp() * rewards).sum() - beta * kl(logps))


def regularized(logps):
    """r − β log(π/π_0), the reward whose policy gradient is that of the regularized objective."""
    return REWARDS - BETA * (logps - REFERENCE).detach()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_expected_policy_gradient_over_all_tuples_of_samples_is_exact(n):
    logits, logps = log_policy()
    scores, expected = regularized(logps), torch.zeros((), dtype=torch.float64)
    for answers in map(list, product(range(5), repeat=n)):
        drawn = logps[answers]
        losses = policy_gradient_loss(drawn, drawn.detach(), leave_one_out_advantages(scores[answers]))
        expected = expected + drawn.detach().sum().exp() * losses.mean()
    torch.testing.assert_close(-gradient(logits, expected), exact_gradient())


def test_policy_gradient_from_samples_is_unbiased():
    """A copy of the logits for each of 20,000 groups of four samples gives one gradient a group, so errors are known."""
    M, n = 20_000, 4
    logits_M = LOGITS.repeat(M, 1).requires_grad_()
    logps_M = logits_M.log_softmax(-1)
    answers = torch.multinomial(LOGITS.softmax(-1).repeat(M, 1), n, True, generator=torch.Generator().manual_seed(0))
    advantages = torch.stack([leave_one_out_advantages(group) for group in regularized(logps_M[0])[answers]])
    drawn = logps_M.gather(1, answers)
    losses = policy_gradient_loss(drawn.flatten(), drawn.detach().flatten(), advantages.flatten())
    found = -gradient(logits_M, losses.sum() / n)
    error = found.std(0) / M**0.5
    truth = exact_gradient()
    assert ((found.mean(0) - truth).abs() < 4 * error).all()
    assert truth.abs().max() > 40 * error.max(), "the errors are small enough to see a bias of a few percent"


def test_mean_log_ratio_of_samples_is_the_kl():
    logps = LOGITS.log_softmax(-1)
    answers = torch.multinomial(logps.exp(), 40_000, True, generator=torch.Generator().manual_seed(0))
    ratios = (logps - REFERENCE)[answers]
    error = ratios.std() / len(answers) ** 0.5
    assert abs(ratios.mean() - kl(logps)) < 4 * error
    assert kl(logps) > 40 * error


def test_expected_gradient_of_kl_loss_is_that_of_the_kl():
    logits, logps = log_policy()
    found = gradient(logits, (logps.detach().exp() * kl_loss(logps, REFERENCE)).sum())
    logits, logps = log_policy()
    torch.testing.assert_close(found, gradient(logits, kl(logps)))


def test_kl_as_a_loss_and_kl_in_the_reward_have_the_same_expected_gradient():
    logits, logps = log_policy()
    advantages = REWARDS - (logps.exp() * REWARDS).sum().detach()
    losses = policy_gradient_loss(logps, logps.detach(), advantages) + BETA * kl_loss(logps, REFERENCE)
    torch.testing.assert_close(-gradient(logits, (logps.detach().exp() * losses).sum()), exact_gradient())


@pytest.mark.parametrize("steps_a_stage", [1, 4])
def test_policy_steps_on_a_fixed_reward_reach_the_closed_form(steps_a_stage):
    """π ∝ π_0 exp(r/β), with samples and advantages of the stage's start and clipped ratios after it."""
    logits = REFERENCE.clone().requires_grad_()
    for _ in range(1200 // steps_a_stage):
        old = logits.detach().log_softmax(-1)
        scores = regularized(old)
        advantages = scores - (old.exp() * scores).sum()
        for _ in range(steps_a_stage):
            losses = policy_gradient_loss(logits.log_softmax(-1), old, advantages)
            step = gradient(logits, (old.exp() * losses).sum())
            with torch.no_grad():
                logits -= 0.8 * step
    closed_form = (REFERENCE + REWARDS / BETA).softmax(-1)
    torch.testing.assert_close(logits.detach().softmax(-1), closed_form, atol=1e-9, rtol=0)


def optimal_log_policy(rewards):
    """log π of the best policy for a reward."""
    return (REFERENCE + rewards / BETA).log_softmax(-1)


def contrast_gradient(rewards, **options):
    """Gradient of the expected reward loss between demonstrations, best for REWARDS, and samples of r's best policy."""
    rewards = rewards.clone().requires_grad_()
    weights = torch.outer(optimal_log_policy(REWARDS).exp(), optimal_log_policy(rewards.detach()).exp())
    first, others = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    losses = reward_loss(rewards[first.flatten()], rewards[others.flatten()], **options)
    return gradient(rewards, (losses * weights.flatten()).sum())


LINEAR = {"kind": "linear", "regularization": 0.0}


@pytest.mark.parametrize("others", [torch.zeros_like(REWARDS), REWARDS / 2, REWARDS.flip(0)])
def test_linear_contrast_is_the_gradient_of_the_demonstrations_likelihood(others):
    """∇_r E_D log π_r = (E_D ∇r − E_π ∇r) / β, though π_r is the best policy for r and moves with it."""
    logits = others.clone().requires_grad_()
    likelihood = (optimal_log_policy(REWARDS).exp() * optimal_log_policy(logits)).sum()
    slope = gradient(logits, likelihood)
    assert slope.abs().max() > 0.1
    torch.testing.assert_close(-contrast_gradient(others, **LINEAR) / BETA, slope)


def test_linear_contrast_vanishes_at_the_true_reward_and_its_shifts():
    for shift in (0.0, 3.0):
        torch.testing.assert_close(
            contrast_gradient(REWARDS + shift, **LINEAR), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0
        )


def test_alternating_reward_steps_and_best_policies_recover_the_demonstrator():
    rewards = torch.zeros(5, dtype=torch.float64)
    for _ in range(800):
        rewards -= 0.5 * contrast_gradient(rewards, **LINEAR)
    torch.testing.assert_close(optimal_log_policy(rewards), optimal_log_policy(REWARDS), atol=1e-9, rtol=0)
    torch.testing.assert_close(rewards - rewards.mean(), REWARDS - REWARDS.mean(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("options", [{"kind": "logistic"}, {"kind": "linear", "regularization": 1.0}])
def test_losses_that_bound_the_reward_pull_it_to_zero_once_the_policy_has_caught_up(options):
    """Where samples are drawn like demonstrations, nothing tells them apart: the step goes against the reward."""
    step = -contrast_gradient(REWARDS - REWARDS.mean(), **options)
    assert (step * (REWARDS - REWARDS.mean())).sum() < -1e-3
