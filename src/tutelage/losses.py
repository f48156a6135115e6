"""The objectives, as pure functions on tensors: no model, no trainer, no printing.

Log-probs are in nats: sums over the tokens of a completion, or of single tokens where an argument is called ``token_logps``.
Every function returns one value per element and leaves the averaging to the caller. All values and gradients are finite for
finite arguments.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "DivergenceKind",
    "LossKind",
    "RewardLossKind",
    "asft_loss",
    "check_divergence",
    "dft_loss",
    "distribution_divergence",
    "group_normalized_advantages",
    "implicit_reward",
    "importance_ratio",
    "irft_loss",
    "kl_loss",
    "leave_one_out_advantages",
    "log_mixture",
    "policy_gradient_loss",
    "psft_loss",
    "reward_loss",
    "sequence_weights",
    "sft_loss",
]

LossKind = Literal["logistic", "hinge", "linear"]
RewardLossKind = Literal["logistic", "linear"]
DivergenceKind = Literal["forward_kl", "reverse_kl", "jensen_shannon"]

# Nats beyond which an importance ratio grows linearly. e^20 ≈ 5e8: far beyond any useful ratio, and its square, which a
# gradient norm takes, is far from the largest float32.
_LONGEST_LOG_RATIO = 20.0


def sft_loss(demonstration_logps: Tensor) -> Tensor:
    """Negative log-likelihood of demonstrations, −log π(y|x).

    Args:
        demonstration_logps: [D] log-prob of each demonstration (nats per sequence) or of each token (nats per token).

    Returns:
        [D] loss, in the unit of the input. Divide the sum by the number of tokens for the usual SFT loss.
    """
    return -demonstration_logps


def dft_loss(token_logps: Tensor) -> Tensor:
    """Dynamic fine-tuning: each token's negative log-likelihood, weighted by its probability, −sg(p) log p.

    With p = π(y_t | x, y_<t) and sg(·) the stop-gradient (Wu et al. 2025, "On the Generalization of SFT", arXiv 2508.05629).
    The gradient is −∇p, where SFT's is −∇p / p: a token that the policy finds unlikely does not dominate the step.

    Args:
        token_logps: [N] log-prob of each token of the demonstrations (nats per token), with gradient.

    Returns:
        [N] loss of each token (nats), between 0 and 1/e; divide the sum by the number of tokens, as for SFT. The value alone
        is no measure of progress: it is 0 both at p = 0 and at p = 1.

    >>> dft_loss(torch.tensor([0.5, 0.25]).log())
    tensor([0.3466, 0.3466])
    """
    return -token_logps.detach().exp() * token_logps


def asft_loss(token_logps: Tensor, divergences: Tensor, *, weight: float) -> Tensor:
    """Anchored fine-tuning: the loss of DFT plus a divergence from the start, −sg(p) log p + λ D.

    D compares the whole next-token distributions of policy and start (Zhu et al. 2025, "Anchored Supervised Fine-Tuning",
    arXiv 2509.23753). At λ = 0 it is ``dft_loss``.

    Args:
        token_logps: [N] log-prob of each token of the demonstrations (nats per token), with gradient.
        divergences: [N] divergence between policy and start where each token is predicted (nats), with gradient.
        weight: λ ≥ 0.

    Returns:
        [N] loss of each token (nats); no measure of progress, as DFT's.

    >>> asft_loss(torch.tensor([0.5]).log(), torch.tensor([0.2]), weight=0.1)
    tensor([0.3666])
    """
    _require_same_shape(token_logps=token_logps, divergences=divergences)
    return dft_loss(token_logps) + weight * divergences


def psft_loss(token_logps: Tensor, old_token_logps: Tensor, *, clip_range: float) -> Tensor:
    """Proximal fine-tuning: PPO's clipped surrogate with an advantage of 1 for each demonstrated token, −min(ρ, 1 + ε).

    With ρ = π(y_t | x, y_<t) / π_old(y_t | x, y_<t) (Zhu et al. 2025, "Proximal Supervised Fine-Tuning", arXiv 2508.17784).
    The paper writes −min(ρ, clip(ρ, 1 − ε, 1 + ε)); as the advantage is positive, the lower bound never binds. At ρ = 1 the
    gradient is SFT's, −∇log π; a token that gained more than ε since π_old has none.

    Args:
        token_logps: [N] log-prob of each token of the demonstrations (nats per token), with gradient.
        old_token_logps: [N] the same under π_old; no gradient is expected through them.
        clip_range: ε > 0.

    Returns:
        [N] loss of each token, between −(1 + ε) and 0.

    >>> psft_loss(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.25]).log(), clip_range=0.28)
    tensor([-1.0000, -1.2800])
    """
    _require_same_shape(token_logps=token_logps, old_token_logps=old_token_logps)
    return -(token_logps - old_token_logps).clamp(max=math.log1p(clip_range)).exp()


def sequence_weights(
    logps: Tensor, reference_logps: Tensor, lengths: Tensor, *, temperature: float = 1.0, limit: float = 16.0
) -> Tensor:
    """Importance weights of demonstrations: w = min(c, exp(τ/|y| (log π(y|x) − log π_0(y|x)))), without gradient.

    The weights of importance-weighted SFT, whose loss of a demonstration is −w log π(y|x) (Qin and Springenberg 2025,
    "Supervised Fine Tuning on Curated Data is Reinforcement Learning", arXiv 2507.12856), as the authors' code computes them:
    with the mean over tokens in place of the sum. Where π = π_0 they are 1, and the loss is SFT's.

    Args:
        logps, reference_logps: [D] log-probs of the demonstrations under π and π_0 (nats per sequence).
        lengths: [D] their tokens, at least 1.
        temperature: τ ≥ 0; at 0 every weight is 1.
        limit: c, the largest weight.

    Returns:
        [D] weights between 0 and c; no gradient goes through them.

    >>> sequence_weights(torch.tensor([-2.0, -9.0]), torch.tensor([-4.0, -1.0]), torch.tensor([2, 4]))
    tensor([2.7183, 0.1353])
    """
    _require_same_shape(logps=logps, reference_logps=reference_logps, lengths=lengths)
    log_weights = temperature * (logps - reference_logps).detach() / lengths
    return log_weights.clamp(max=math.log(limit)).exp()


def implicit_reward(policy_logps: Tensor, reference_logps: Tensor, *, beta: float) -> Tensor:
    """The reward that a policy implies: r(x, y) = β [log π(y|x) − log π_ref(y|x)], up to a constant in y.

    From the closed form of the KL-regularized policy, π ∝ π_ref exp(r/β) (Li et al. 2024, arXiv 2405.17888, §4.2).

    Args:
        policy_logps, reference_logps: [C] log-probs of the same completions (nats per sequence).
        beta: the temperature β > 0; in units of reward per nat.

    Returns:
        [C] rewards; higher means that the policy made the completion more likely than the reference did.
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
        linear     −z                 the unregularized maximum-likelihood inverse-RL gradient; has no lower bound

    The logistic loss has the form of DPO's (arXiv 2305.18290), with the demonstration preferred to the sample.

    Args:
        policy_demonstration_logps: [P] log π of the demonstration of each pair (nats per sequence).
        policy_sample_logps: [P] log π of the sample.
        reference_demonstration_logps: [P] log π_t of the demonstration; no gradient is expected through it.
        reference_sample_logps: [P] log π_t of the sample.
        beta: the temperature β > 0.
        kind: the decreasing function of the margin.

    Returns:
        [P] loss of each pair; falls as the demonstration becomes more likely relative to the sample.

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


def reward_loss(
    preferred_rewards: Tensor,
    other_rewards: Tensor,
    *,
    kind: RewardLossKind = "logistic",
    margin: float = 0.0,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
    regularization: float = 1.0,
) -> Tensor:
    """Contrast the rewards of demonstrations with those of the policy's samples (or preferred with rejected answers).

    With z = r(x, y) − r(x, ỹ) − margin::

        logistic   −(1 − ε) log σ(z) − ε log σ(−z) + c (r(y) + r(ỹ))²
        linear     −z + ρ/2 (r(y)² + r(ỹ)²) + c (r(y) + r(ỹ))²

    ``linear`` is the gradient of maximum-likelihood inverse reinforcement learning (Li et al. 2024, arXiv 2405.17888,
    Algorithm 1), which by itself is unbounded. With the squares, the optimal reward of an answer is (p(y) − p(ỹ)) / (ρ
    (p(y) + p(ỹ))), where p are the answer's probabilities as demonstration and as sample; it stays between −1/ρ and 1/ρ.
    ``logistic`` is the Bradley-Terry likelihood; without margin, smoothing and centering it is TRL's
    ``RewardTrainer``'s, and ``centering`` is its ``center_rewards_coefficient`` (Eisenstein et al. 2023, arXiv
    2312.09244).

    Args:
        preferred_rewards: [P] reward of the demonstration, or of the preferred answer, of each pair.
        other_rewards: [P] reward of the sample, or of the rejected answer.
        kind: which loss.
        margin: by how much the first reward should exceed the second.
        label_smoothing: ε in [0, 0.5): assumed probability that the pair is mislabeled. ``logistic`` only.
        centering: c ≥ 0, keeps rewards around zero.
        regularization: ρ > 0. ``linear`` only.

    Returns:
        [P] loss of each pair; falls as the first reward rises relative to the second.

    Raises:
        ValueError: shapes that differ, or an unknown ``kind``.
    """
    _require_same_shape(preferred_rewards=preferred_rewards, other_rewards=other_rewards)
    gap = preferred_rewards - other_rewards - margin
    if kind == "logistic":
        loss = -(1 - label_smoothing) * F.logsigmoid(gap) - label_smoothing * F.logsigmoid(-gap)
    elif kind == "linear":
        loss = -gap + regularization / 2 * (preferred_rewards**2 + other_rewards**2)
    else:
        raise ValueError(f"unknown loss kind {kind!r}: one of 'logistic', 'linear'")
    return loss + centering * (preferred_rewards + other_rewards) ** 2


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """Reward of each sample minus the mean of the other samples of its prompt, A_i = r_i − Σ_{j≠i} r_j / (n − 1).

    The baseline does not depend on the sample, so the policy gradient stays unbiased (Kool et al. 2019; Ahmadian et
    al. 2024, arXiv 2402.14740, "RLOO"). There is no division by a standard deviation: where rewards hardly differ,
    advantages are small.

    Args:
        rewards: [n] of the samples of one prompt, n ≥ 2, in units of reward.

    Returns:
        [n] advantages, in units of reward; they add up to zero.

    >>> leave_one_out_advantages(torch.tensor([1.0, 0.0, 0.5]))
    tensor([ 0.7500, -0.7500,  0.0000])
    """
    n = rewards.shape[0]
    if n < 2:
        raise ValueError("leave-one-out needs at least two samples")
    return (rewards - rewards.mean()) * n / (n - 1)


def group_normalized_advantages(rewards: Tensor, *, epsilon: float = 1e-4) -> Tensor:
    """Rewards of one prompt's samples, centered and divided by their standard deviation (Shao et al. 2024, arXiv
    2402.03300, GRPO).

    A difference of 0.01 between samples gets the same weight as one of 10, so the noise of a new reward is amplified.

    Args:
        rewards: [n] of the samples of one prompt, n ≥ 2.
        epsilon: added to the standard deviation.

    Returns:
        [n] advantages, dimensionless.
    """
    if rewards.shape[0] < 2:
        raise ValueError("a standard deviation needs at least two samples")
    return (rewards - rewards.mean()) / (rewards.std() + epsilon)


def importance_ratio(logps: Tensor, old_logps: Tensor) -> Tensor:
    """ρ = π(ỹ|x) / π_t(ỹ|x), continued along its tangent beyond a log-ratio of 20 nats so that it cannot overflow.

    The exponential of 88 nats is the largest float32, and the log-ratio of a long completion may pass that. Up to
    L = 20 nats the ratio is exact; beyond, it is e^L (1 + log ρ − L), whose gradient with respect to log π is e^L: still large, and of
    the right sign, where clamping the log-ratio would give 0.

    Args:
        logps, old_logps: [S] log-probs of the same completions (nats per sequence).

    Returns:
        [S] ratios; finite, with finite gradients.
    """
    _require_same_shape(logps=logps, old_logps=old_logps)
    log_ratio = logps - old_logps
    return log_ratio.clamp(max=_LONGEST_LOG_RATIO).exp() * (1 + torch.relu(log_ratio - _LONGEST_LOG_RATIO))


def policy_gradient_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_range: float = 0.2) -> Tensor:
    """REINFORCE with clipped importance ratios, −min(ρA, clip(ρ, 1 − ε, 1 + ε) A), ρ = π(ỹ|x) / π_t(ỹ|x).

    The ratio is that of the whole completion, as in RLOO (Ahmadian et al. 2024, arXiv 2402.14740); the clipping is PPO's
    (Schulman et al. 2017, arXiv 1707.06347). At ρ = 1 its gradient is REINFORCE's, −A ∇log π.

    Far from ρ = 1, by the sign of the advantage: a good sample (A > 0) that gained more than ε has loss −(1 + ε) A and no
    gradient. A bad one (A < 0) that lost more than ε has loss −(1 − ε) A and no gradient. A bad one that gained is not
    clipped: its loss is −ρA, and its gradient grows with ρ until ``importance_ratio`` bounds it. A = 0 gives 0.

    Args:
        logps: [S] log π of each sample (nats per sequence), with gradient.
        old_logps: [S] log π_t, under the policy that drew them.
        advantages: [S] in units of reward; no gradient is expected through them.
        clip_range: ε > 0.

    Returns:
        [S] loss of each sample; falls as good samples gain probability and bad ones lose it.
    """
    _require_same_shape(logps=logps, old_logps=old_logps, advantages=advantages)
    ratio = importance_ratio(logps, old_logps)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)


def kl_loss(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """A loss on samples of π whose expected gradient is that of KL(π‖π_0): ½ (log π − log π_0)².

    Schulman's "k2" (2020, "Approximating KL divergence"). Its value does not estimate the KL; the mean of log π − log
    π_0 over samples of π does.

    Args:
        logps: [S] log π of each sample (nats per sequence), with gradient.
        reference_logps: [S] log π_0.

    Returns:
        [S] loss of each sample.
    """
    _require_same_shape(logps=logps, reference_logps=reference_logps)
    return (logps - reference_logps) ** 2 / 2


def distribution_divergence(
    student_logps_NV: Tensor, teacher_logps_NV: Tensor, *, kind: DivergenceKind, mixture: float = 0.5
) -> Tensor:
    """Divergence of a student's next-token distribution p from a teacher's q over the whole vocabulary.

    ::

        forward_kl      KL(q ‖ p) = Σ_v q_v (log q_v − log p_v)
        reverse_kl      KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)
        jensen_shannon  β KL(q ‖ m) + (1 − β) KL(p ‖ m)  with  m = β q + (1 − β) p  and  β = mixture

    The loss per token of SDFT (Shenfeld et al. 2026, arXiv 2601.19897). The last is the generalized Jensen-Shannon divergence of
    GKD (Agarwal et al. 2023, arXiv 2306.13649, eq. 1). ``tutelage.models.head_divergence`` computes the same from hidden states,
    a block of the vocabulary at a time.

    Args:
        student_logps_NV: [N, V] log p of each token of the vocabulary (nats), normalized, with gradient.
        teacher_logps_NV: [N, V] log q; no gradient is expected through it.
        kind: which divergence.
        mixture: β, strictly between 0 and 1; read for "jensen_shannon" alone.

    Returns:
        [N] nats; at least 0 up to rounding.

    Raises:
        ValueError: shapes that differ, an unknown kind, or a mixture out of range.

    >>> p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> distribution_divergence(p, q, kind="forward_kl")
    tensor([0.1308])
    """
    _require_same_shape(student_logps_NV=student_logps_NV, teacher_logps_NV=teacher_logps_NV)
    check_divergence(kind, mixture)
    log_p, log_q = student_logps_NV, teacher_logps_NV
    if kind == "forward_kl":
        terms = log_q.exp() * (log_q - log_p)
    elif kind == "reverse_kl":
        terms = log_p.exp() * (log_p - log_q)
    else:
        log_m = log_mixture(log_p, log_q, mixture)
        terms = mixture * log_q.exp() * (log_q - log_m) + (1 - mixture) * log_p.exp() * (log_p - log_m)
    return terms.sum(-1)


def check_divergence(kind: DivergenceKind, mixture: float) -> None:
    """Raise ``ValueError`` for an unknown kind of divergence, or a mixture that is not between 0 and 1 where it is read."""
    if kind not in get_args(DivergenceKind):
        raise ValueError(f"kind is '{kind}', not one of {', '.join(get_args(DivergenceKind))}")
    if kind == "jensen_shannon" and not 0 < mixture < 1:
        raise ValueError(f"mixture is {mixture}, not between 0 and 1; the KLs have a kind of their own")


def log_mixture(log_p: Tensor, log_q: Tensor, mixture: float) -> Tensor:
    """log(β q + (1 − β) p) with β = mixture, from log-probs.

    Below exp(−87) the mixture itself would round to 0, and its logarithm to −∞.
    """
    return torch.logaddexp(log_p + math.log1p(-mixture), log_q + math.log(mixture))


def _require_same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"one value per pair is expected in each argument, got shapes {shapes}")
