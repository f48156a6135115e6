"""The objectives, as pure functions on tensors: no model, no trainer, no printing.

Log-probs are sums over the tokens of a completion, in nats. Every function returns one value an element and leaves the
averaging to the caller.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LossKind", "implicit_reward", "irft_loss", "sft_loss"]

LossKind = Literal["logistic", "hinge", "linear"]


def sft_loss(demonstration_logps: Tensor) -> Tensor:
    """Negative log-likelihood of demonstrations, −log π(y|x).

    Args:
        demonstration_logps: [D] log-prob of each demonstration (nats a sequence) or of each token (nats a token).

    Returns:
        [D] loss, in the unit of the input. Divide the sum by the number of tokens for the usual SFT loss.
    """
    return -demonstration_logps


def implicit_reward(policy_logps: Tensor, reference_logps: Tensor, *, beta: float) -> Tensor:
    """The reward that a policy implies: r(x, y) = β [log π(y|x) − log π_ref(y|x)], up to a constant in y.

    From the closed form of the KL-regularised policy, π ∝ π_ref exp(r/β) (Li et al. 2024, arXiv 2405.17888, §4.2).

    Args:
        policy_logps, reference_logps: [C] log-probs of the same completions (nats a sequence).
        beta: the temperature β > 0; in units of reward a nat.

    Returns:
        [C] rewards; higher means that the policy raised the completion over the reference.
    """
    _require_same_shape(policy_logps=policy_logps, reference_logps=reference_logps)
    return beta * (policy_logps - reference_logps)


def irft_loss(
    policy_demonstration_logps: Tensor,
    policy_sample_logps: Tensor,
    reference_demonstration_logps: Tensor,
    reference_sample_logps: Tensor,
    *,
    beta: float,
    kind: LossKind = "logistic",
) -> Tensor:
    """Contrast demonstrations with the policy's own samples through the implicit reward.

    With the margin z = β[log π(y|x) − log π_t(y|x) − log π(ỹ|x) + log π_t(ỹ|x)], y a demonstration and ỹ ~ π_t::

        logistic   −log σ(z)          IRFT, Algorithm 2 of Li et al. 2024 (arXiv 2405.17888); SPIN (arXiv 2401.01335)
        hinge      max(0, 1 − z)      SPIN's alternative ℓ
        linear     −z                 the unregularised maximum-likelihood inverse-RL gradient; has no lower bound

    The logistic loss has the form of DPO's (arXiv 2305.18290), with the demonstration preferred to the sample.

    Args:
        policy_demonstration_logps: [P] log π of the demonstration of each pair (nats a sequence).
        policy_sample_logps: [P] log π of the sample.
        reference_demonstration_logps: [P] log π_t of the demonstration; no gradient is expected through it.
        reference_sample_logps: [P] log π_t of the sample.
        beta: the temperature β > 0.
        kind: the decreasing function of the margin.

    Returns:
        [P] loss of each pair; falls as the demonstration gains on the sample.

    Raises:
        ValueError: shapes that differ, or an unknown ``kind``.
    """
    _require_same_shape(
        policy_demonstration_logps=policy_demonstration_logps,
        policy_sample_logps=policy_sample_logps,
        reference_demonstration_logps=reference_demonstration_logps,
        reference_sample_logps=reference_sample_logps,
    )
    margin = implicit_reward(policy_demonstration_logps, reference_demonstration_logps, beta=beta) - implicit_reward(
        policy_sample_logps, reference_sample_logps, beta=beta
    )
    if kind == "logistic":
        return -F.logsigmoid(margin)
    if kind == "hinge":
        return torch.relu(1 - margin)
    if kind == "linear":
        return -margin
    raise ValueError(f"unknown loss kind {kind!r}: one of 'logistic', 'hinge', 'linear'")


def _require_same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"one value a pair is expected in each argument, got shapes {shapes}")
