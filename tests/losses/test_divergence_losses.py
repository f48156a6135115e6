"""Divergences of next-token distributions: against arithmetic written out, and against TRL's self-distillation."""

import math

import pytest
import torch

from tutelage.losses import distribution_divergence

KINDS = ["forward_kl", "reverse_kl", "jensen_shannon"]
P, Q = (0.5, 0.5), (0.25, 0.75)  # of the student, of the teacher


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def random_logits(seed, spread=3.0):
    return spread * torch.randn(6, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_each_kind_by_hand():
    m = [0.3 * q + 0.7 * p for p, q in zip(P, Q, strict=True)]  # the teacher's weight is 0.3
    expected = {
        "forward_kl": 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5),
        "reverse_kl": 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75),
        "jensen_shannon": 0.3 * (0.25 * math.log(0.25 / m[0]) + 0.75 * math.log(0.75 / m[1]))
        + 0.7 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])),
    }
    for kind, value in expected.items():
        found = distribution_divergence(logs(P, Q), logs(Q, Q), kind=kind, mixture=0.3)
        torch.testing.assert_close(found, torch.tensor([value, 0.0], dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_forward_kl_draws_the_student_to_the_teacher_at_every_token_of_the_vocabulary():
    """In logits its gradient is p − q: that of cross-entropy with the teacher's distribution as the label."""
    logits, teacher = random_logits(0).requires_grad_(), random_logits(1)
    distribution_divergence(logits.log_softmax(1), teacher.log_softmax(1), kind="forward_kl").sum().backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(1) - teacher.softmax(1)).detach())


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_have_neither_divergence_nor_gradient(kind):
    logits = random_logits(0).requires_grad_()
    found = distribution_divergence(logits.log_softmax(1), logits.detach().log_softmax(1), kind=kind)
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_are_finite(kind):
    logits = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    found = distribution_divergence(logits.log_softmax(1), logits.detach().flip(1).log_softmax(1), kind=kind)
    assert found.isfinite().all()
    found.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("kind", "alpha"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jensen_shannon", 0.2)])
@pytest.mark.filterwarnings("ignore:.*experimental.*")
def test_values_and_gradients_are_those_of_trls_sdft(kind, alpha):
    """Its ``full_logits`` mode; its alpha is the teacher's weight in the mixture, 0 and 1 name the KLs."""
    theirs = pytest.importorskip("trl.experimental.sdft.loss_utils").compute_full_logit_self_distillation_loss
    logits, teacher = random_logits(0).requires_grad_(), random_logits(1)
    ours = distribution_divergence(
        logits.log_softmax(1), teacher.log_softmax(1), kind=kind, mixture=alpha if 0 < alpha < 1 else 0.5
    )
    peer = theirs(logits[None], teacher[None], distillation_alpha=alpha)[0]
    torch.testing.assert_close(ours, peer, atol=1e-7, rtol=1e-7)
    weights = torch.linspace(-1, 2, len(ours), dtype=torch.float64)
    (our_gradient,), (peer_gradient,) = (torch.autograd.grad((v * weights).sum(), logits) for v in (ours, peer))
    assert peer_gradient.abs().max() > 1e-2
    torch.testing.assert_close(our_gradient, peer_gradient, atol=1e-7, rtol=1e-7)


def test_what_is_refused():
    p, q = logs(P), logs(Q)
    with pytest.raises(ValueError, match="'hellinger', not one of forward_kl"):
        distribution_divergence(p, q, kind="hellinger")
    with pytest.raises(ValueError, match="mixture is 1, not between 0 and 1"):
        distribution_divergence(p, q, kind="jensen_shannon", mixture=1)
    with pytest.raises(ValueError, match="shapes"):
        distribution_divergence(p, logs(Q, Q), kind="forward_kl")
