"""The rivals of the negative log-likelihood, against arithmetic written out and against the formulas on logits."""

import math

import pytest
import torch

from tutelage.algorithms.sft import SFTConfig
from tutelage.algorithms.sft_losses import LOSS_KINDS
from tutelage.groups import Completion, Group, Role
from tutelage.losses import asft_loss, dft_loss, policy_gradient_loss, psft_loss, sequence_weights, sft_loss
from tutelage.scoring.logps import TokenLogps

TARGETS = torch.tensor([0, 3, 6, 2, 2])


@pytest.fixture
def logits():
    return torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)


def token_logps(logits):
    return logits.log_softmax(-1).gather(1, TARGETS[:, None])[:, 0]


def gradient(loss, logits):
    return torch.autograd.grad(loss.sum(), logits)[0]


# --- ASFT ---------------------------------------------------------------------------------------------------------------


def test_the_anchor_is_added_to_dft():
    losses = asft_loss(torch.tensor([0.5, 0.9]).log(), torch.tensor([0.2, 0.0]), weight=0.3)
    torch.testing.assert_close(losses, torch.tensor([0.5 * math.log(2) + 0.06, -0.9 * math.log(0.9)]))


def test_without_weight_it_is_dft(logits):
    divergences = (logits**2).sum(1)
    ours = asft_loss(token_logps(logits), divergences, weight=0.0)
    torch.testing.assert_close(ours, dft_loss(token_logps(logits)))
    torch.testing.assert_close(gradient(ours, logits), gradient(dft_loss(token_logps(logits)), logits))


def test_the_gradient_of_asft_is_that_of_minus_p_plus_the_kl(logits):
    """With torch's KL, both ways; the first term's gradient is that of −p, the paper's view of DFT."""
    start = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    for reverse in (False, True):
        policy = logits.log_softmax(-1)
        first, second = (start, policy) if reverse else (policy, start)
        divergences = torch.nn.functional.kl_div(first, second, reduction="none", log_target=True).sum(1)
        ours = gradient(asft_loss(token_logps(logits), divergences, weight=0.7), logits)
        policy = logits.log_softmax(-1)
        written = -token_logps(logits).exp().sum() + 0.7 * (
            (policy.exp() * (policy - start)).sum() if reverse else (start.exp() * (start - policy)).sum()
        )
        torch.testing.assert_close(ours, gradient(written, logits))


# --- PSFT ---------------------------------------------------------------------------------------------------------------


def test_ratios_are_clipped_above_alone():
    new, old = torch.tensor([0.5, 0.4, 0.1, 0.6]), torch.tensor([0.5, 0.2, 0.4, 0.5])
    losses = psft_loss(new.log(), old.log(), clip_range=0.25)
    torch.testing.assert_close(losses, torch.tensor([-1.0, -1.25, -0.25, -1.2]))


@pytest.mark.parametrize("clip_range", [0.1, 0.28, 0.32, 0.57, 1.15])
def test_clipped_tokens_are_counted(clip_range):
    """Also where the exponential of the clipped log-ratio is rounded below 1 + ε, as float32 does at 0.32."""
    demonstration = Completion((2, 3, 4), Role.DEMONSTRATION, True)
    group = Group((1,), (demonstration,)).with_token_values("old_logps", [[-3.0, -3.0, -1.0]])
    tokens = TokenLogps([group], torch.tensor([-1.0, -2.9, -2.0]), torch.zeros(3, dtype=torch.long))
    tracked = {}
    args = SFTConfig(output_dir="x", loss_kind="psft", clip_range=clip_range, use_cpu=True)
    LOSS_KINDS["psft"].losses(tokens, args, tracked.__setitem__)
    clipped = [gain > math.log1p(clip_range) for gain in (2.0, 0.1, -1.0)]
    assert tracked["tokens/clip_fraction"].tolist() == [float(each) for each in clipped]


def test_it_is_ppo_with_an_advantage_of_one():
    """PPO's clipped surrogate, as it is tested for RFT, on single tokens; values and gradients."""
    generator = torch.Generator().manual_seed(2)
    new, old = (torch.randn(40, dtype=torch.float64, generator=generator) for _ in range(2))
    for loss in (
        psft_loss,
        lambda n, o, clip_range: policy_gradient_loss(n, o, torch.ones_like(n), clip_range=clip_range),
    ):
        point = new.clone().requires_grad_()
        values = loss(point, old, clip_range=0.2)
        (slopes,) = torch.autograd.grad(values.sum(), point)
        if loss is psft_loss:
            ours = values.detach(), slopes
    torch.testing.assert_close(ours, (values.detach(), slopes))
    assert 0 < (ours[1] == 0).sum() < 40


def test_at_the_old_policy_its_gradient_is_that_of_sft(logits):
    logps = token_logps(logits)
    ours = gradient(psft_loss(logps, logps.detach(), clip_range=0.1), logits)
    torch.testing.assert_close(ours, gradient(sft_loss(token_logps(logits)), logits))


def test_extreme_ratios_are_finite():
    logps = torch.tensor([-1e4, 0.0, -200.0], requires_grad=True)
    losses = psft_loss(logps, torch.tensor([0.0, -1e4, -200.0]), clip_range=0.5)
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.tensor([0.0, -1.5, -1.0]))
    assert logps.grad.tolist() == [0.0, 0.0, -1.0]


# --- importance weights -------------------------------------------------------------------------------------------------


def test_weights_are_ratios_per_token_with_a_limit():
    logps, start = torch.tensor([-2.0, -9.0, -1.0, -3.0]), torch.tensor([-4.0, -1.0, -90.0, -3.0])
    weights = sequence_weights(logps, start, torch.tensor([2, 4, 3, 7]), temperature=0.5, limit=16.0)
    torch.testing.assert_close(weights, torch.tensor([math.exp(0.5), math.exp(-1.0), 16.0, 1.0]))
    assert sequence_weights(logps, start, torch.tensor([2, 4, 3, 7]), temperature=0.0).tolist() == [1.0] * 4


def test_no_gradient_goes_through_the_weights(logits):
    """Of w · (−log p) the gradient is w times SFT's, with the weight written out from the logits."""
    logps = token_logps(logits).sum()[None]
    start = torch.tensor([-8.0], dtype=torch.float64)
    weights = sequence_weights(logps, start, torch.tensor([5]))
    expected = math.exp((logps.item() + 8.0) / 5)
    assert expected != pytest.approx(1.0, abs=0.05)
    of_sft = gradient(sft_loss(token_logps(logits)), logits)
    torch.testing.assert_close(gradient(weights * sft_loss(logps), logits), expected * of_sft)


def test_at_the_start_it_is_sft(logits):
    logps = token_logps(logits).sum()[None]
    weights = sequence_weights(logps, logps.detach(), torch.tensor([5]), temperature=2.0)
    assert weights.tolist() == [1.0]


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: asft_loss(a, b, weight=1.0),
        lambda a, b: psft_loss(a, b, clip_range=0.2),
        lambda a, b: sequence_weights(a, b, b),
    ],
)
def test_shapes_that_differ_are_refused(loss):
    with pytest.raises(ValueError, match=r"\(3,\).*\(1,\)"):
        loss(torch.zeros(3), torch.zeros(1))
