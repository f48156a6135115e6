"""The policy gradient far from ratio 1, where the exponential of a log-ratio overflows, by hand."""

import math

import pytest
import torch

from tutelage.losses import importance_ratio, policy_gradient_loss

E20 = math.exp(20.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "gradient"),
    [
        (100.0, 2.0, -2.4, 0.0),  # gained more than ε: clipped at 1.2
        (100.0, -2.0, 2 * E20 * 81, 2 * E20),  # not clipped; e^20 (1 + 100 − 20), slope e^20
        (100.0, 0.0, 0.0, 0.0),
        (-100.0, 2.0, 0.0, 0.0),  # a ratio of e^−100
        (-100.0, -2.0, 1.6, 0.0),  # lost more than ε: clipped at 0.8
        (-100.0, 0.0, 0.0, 0.0),
        (1e4, 2.0, -2.4, 0.0),
        (1e4, -2.0, 2 * E20 * 9981, 2 * E20),
        (-1e4, 2.0, 0.0, 0.0),
        (-1e4, -2.0, 1.6, 0.0),
    ],
)
def test_far_log_ratios_give_finite_losses_and_gradients(log_ratio, advantage, loss, gradient, dtype):
    old = torch.tensor([-300.0], dtype=dtype)
    logps = (old + log_ratio).requires_grad_()
    found = policy_gradient_loss(logps, old, torch.tensor([advantage], dtype=dtype))
    found.sum().backward()
    assert found.item() == pytest.approx(loss, rel=1e-5, abs=1e-30)
    assert logps.grad.item() == pytest.approx(gradient, rel=1e-5, abs=1e-30)


def test_one_extreme_sample_leaves_the_others_alone():
    """A NaN in one element would reach every weight through the sum."""
    old, advantages = torch.zeros(3), torch.tensor([-1.0, 0.0, 1.0])
    logps = torch.tensor([500.0, 500.0, 0.1], requires_grad=True)
    policy_gradient_loss(logps, old, advantages).sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([E20, 0.0, -math.exp(0.1)]))
    assert torch.linalg.vector_norm(logps.grad).isfinite()


def test_the_ratio_is_exact_to_20_nats_and_its_tangent_beyond():
    log_ratio = torch.tensor([-30.0, 0.0, 19.9, 20.0, 20.1, 25.0], dtype=torch.float64, requires_grad=True)
    ratio = importance_ratio(log_ratio, torch.zeros(6, dtype=torch.float64))
    ratio.sum().backward()
    expected = [math.exp(-30), 1.0, math.exp(19.9), E20, 1.1 * E20, 6 * E20]
    assert ratio.tolist() == pytest.approx(expected, rel=1e-12)
    assert log_ratio.grad.tolist() == pytest.approx([math.exp(-30), 1.0, math.exp(19.9), E20, E20, E20], rel=1e-12)
