"""Dynamic fine-tuning against arithmetic written out."""

import math

import torch

from tutelage.losses import dft_loss, sft_loss

PROBABILITIES = [0.5, 0.9, 0.01, 1.0]


def test_each_token_is_weighted_by_its_probability():
    losses = dft_loss(torch.tensor(PROBABILITIES).log())
    expected = [0.5 * math.log(2), -0.9 * math.log(0.9), 0.01 * math.log(100), 0.0]
    torch.testing.assert_close(losses, torch.tensor(expected))


def test_no_gradient_goes_through_the_weight():
    """d/d log p of −sg(p) log p is −p; through the weight as well it would be −p (1 + log p)."""
    logps = torch.tensor(PROBABILITIES).log().requires_grad_()
    dft_loss(logps).sum().backward()
    torch.testing.assert_close(logps.grad, -torch.tensor(PROBABILITIES))


def test_a_step_raises_the_tokens_probability_by_the_gradient_of_p():
    """In logits: −∇p, against −∇log p of SFT, so p times SFT's gradient, token by token."""
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([0, 3, 6, 2, 2])

    def token_logps():
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    (of_dft,) = torch.autograd.grad(dft_loss(token_logps()).sum(), logits)
    (of_p,) = torch.autograd.grad(-token_logps().exp().sum(), logits)
    (of_sft,) = torch.autograd.grad(sft_loss(token_logps()).sum(), logits)
    torch.testing.assert_close(of_dft, of_p)
    torch.testing.assert_close(of_dft, token_logps().exp().detach()[:, None] * of_sft)
    assert (of_dft.gather(1, targets[:, None]) < 0).all(), "descent raises the demonstrated token"


def test_a_hopeless_token_gives_zero_and_no_nan():
    logps = torch.tensor([-1e4, -104.0], requires_grad=True)
    losses = dft_loss(logps)
    losses.sum().backward()
    assert losses.tolist() == logps.grad.tolist() == [0.0, 0.0]
