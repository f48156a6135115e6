"""Divergence between two next-token distributions, over the whole vocabulary, a block of it at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tutelage.losses import DivergenceKind, check_divergence, distribution_divergence, log_mixture
from tutelage.models.head import LMHead, in_computing_precision, in_row_chunks, vocab_block_size, vocab_blocks

__all__ = ["head_divergence"]


def head_divergence(
    head: LMHead,
    hidden_NH: Tensor,
    teacher_hidden_NH: Tensor,
    *,
    kind: DivergenceKind,
    mixture: float = 0.5,
    teacher_head: LMHead | None = None,
    block_size: int | None = None,
) -> Tensor:
    """Divergence of the student's next-token distribution p from the teacher's q at each token.

    The kinds are those of ``tutelage.losses.distribution_divergence``.

    "jensen_shannon" has the convention of TRL's ``GKDTrainer.generalized_jsd_loss``, whose ``beta`` is ``mixture``. TRL takes
    β = 0 and β = 1 for the two KLs; here they are named, and β is strictly between.

    Nothing of size N × V is ever there, and the gradient goes to the student's side alone. A frozen linear head gets the
    gradient in the forward pass and keeps [N, H] for backward; a trained one reads its blocks again.

    Args:
        head: the student's.
        hidden_NH: the student's last hidden states.
        teacher_hidden_NH: the teacher's, [N, the teacher's hidden size]; no gradient goes there.
        kind: which divergence.
        mixture: β, the teacher's weight in the mixture; read for "jensen_shannon" alone.
        teacher_head: the teacher's, if it has another one; no gradient goes to it, or to ``head`` as the teacher's.
            A head with dropout on it drops in the mode it is in (``LMHead.detached`` is without).
        block_size: tokens of the vocabulary that are read at once; changes speed and memory alone.

    Returns:
        [N] float32 nats, float64 where the hidden states are; at least 0 up to rounding, and not clamped. Finite for
        finite logits of up to ±1e4. In bfloat16 the logits themselves are rounded, which adds about 1e-3 nats.

    Raises:
        ValueError: an unknown kind, a mixture that is not between 0 and 1, different numbers of tokens, or
            vocabularies of different sizes.
    """
    teacher_head = teacher_head or head
    check_divergence(kind, mixture)
    if len(hidden_NH) != len(teacher_hidden_NH):
        raise ValueError(f"{len(hidden_NH)} tokens of the student, {len(teacher_hidden_NH)} of the teacher")
    if head.vocab_size != teacher_head.vocab_size:
        raise ValueError(f"{head.vocab_size} logits of the student, {teacher_head.vocab_size} of the teacher")
    teacher_hidden_NH = teacher_hidden_NH.detach()
    dtype = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32

    if head.is_linear and teacher_head.is_linear:
        linear, teacher_linear = cast(nn.Linear, head.module), cast(nn.Linear, teacher_head.module)
        teacher_bias_V = None if teacher_linear.bias is None else teacher_linear.bias.detach()
        student = in_computing_precision(hidden_NH), linear.weight, linear.bias
        teacher = in_computing_precision(teacher_hidden_NH), teacher_linear.weight.detach(), teacher_bias_V
        block_size = block_size or vocab_block_size(len(hidden_NH), hidden_NH.device.type)
        comparison = _Comparison(head, teacher_head, kind, mixture, block_size, dtype)
        return cast(Tensor, _HeadDivergence.apply(*student, *teacher, comparison))

    def chunk_divergence(hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head.transform(teacher_head.raw_logits(teacher_hidden), dtype)
        logits = head.transform(head.raw_logits(hidden), dtype)
        return distribution_divergence(
            logits.log_softmax(1), teacher_logits.log_softmax(1), kind=kind, mixture=mixture
        )

    return in_row_chunks(chunk_divergence, head.vocab_size, hidden_NH, teacher_hidden_NH)


_Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]
"""Hidden states, weights and bias of the student's head, then of the teacher's."""


@dataclass(frozen=True, slots=True)
class _Comparison:
    """How the two sides are compared: what the passes below share beside tensors."""

    head: LMHead
    teacher_head: LMHead
    kind: DivergenceKind
    mixture: float
    block_size: int
    dtype: torch.dtype

    def blocks(self, inputs: _Inputs) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Of each block of the vocabulary: where it is, the student's weights, both sides' logits."""
        student = vocab_blocks(self.head, *inputs[:3], self.block_size, self.dtype)
        teacher = vocab_blocks(self.teacher_head, *inputs[3:], self.block_size, self.dtype)
        for (block, weight, logits), (_, _, teacher_logits) in zip(student, teacher, strict=True):
            yield block, weight, logits, teacher_logits


class _OnlineSoftmax:
    """Running maximum and sum of exponentials of one side's logits (arXiv 1805.02867)."""

    def __init__(self, like_NH: Tensor, dtype: torch.dtype):
        self.highest_N1: Tensor | None = None
        self.total_N1 = like_NH.new_zeros((len(like_NH), 1), dtype=dtype)

    def shift(self, logits: Tensor) -> Tensor:
        """Make the block's logits relative to the running maximum, in place.

        Returns:
            [N, 1] by how much the maximum rose; sums over earlier blocks shrink by exp of minus this.
        """
        highest_N1 = logits.amax(1, keepdim=True)
        if self.highest_N1 is not None:
            highest_N1 = torch.maximum(highest_N1, self.highest_N1)
        rise_N1 = torch.zeros_like(highest_N1) if self.highest_N1 is None else highest_N1 - self.highest_N1
        self.highest_N1 = highest_N1
        logits.sub_(highest_N1)
        return rise_N1

    def add(self, rise_N1: Tensor, exponentials: Tensor) -> None:
        self.total_N1 = self.total_N1 * (-rise_N1).exp() + exponentials.sum(1, keepdim=True)

    @property
    def log_normalizer_N1(self) -> Tensor:
        return cast(Tensor, self.highest_N1) + self.total_N1.log()


class _HeadDivergence(torch.autograd.Function):
    """With logits z = W h of the student, every kind has ∂D/∂z_v = w_v − (Σ_u w_u) p_v, where w_v is

    −q_v (forward KL), p_v log(p_v/q_v) (reverse KL), (1 − β) p_v log(p_v/m_v) (Jensen-Shannon).

    So a frozen head needs Σ_v w_v W_v and Σ_v p_v W_v, which the forward pass sums up along with the divergence: four
    matrix products for a KL, and six for Jensen-Shannon, which has to know both normalizers before it can mix.
    A trained head reads its blocks again in backward.
    """

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:  # type: ignore[override]
        inputs, comparison = cast(_Inputs, arguments[:-1]), cast(_Comparison, arguments[-1])
        hidden_NH = inputs[0]
        is_trained = any(ctx.needs_input_grad[1:3])
        sums = _mixture_sums if comparison.kind == "jensen_shannon" else _kl_sums
        with torch.autocast(hidden_NH.device.type, enabled=False):
            divergence_N1, expected_N1, log_totals, slopes_NH = sums(
                comparison, inputs, with_slopes=ctx.needs_input_grad[0] and not is_trained
            )
        ctx.comparison, ctx.slopes_NH = comparison, None
        if slopes_NH is not None:
            ctx.slopes_NH = slopes_NH.mul_(comparison.head.scale).to(hidden_NH.dtype)
        elif is_trained:
            ctx.save_for_backward(*inputs, expected_N1, *log_totals)
        return divergence_N1[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N: Tensor):  # type: ignore[override]
        if ctx.slopes_NH is not None:
            return (ctx.slopes_NH * grad_N[:, None]).to(ctx.slopes_NH.dtype), *[None] * 6
        inputs, (expected_N1, log_total_N1, log_teacher_total_N1) = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        hidden_NH, weight_VH, bias_V = inputs[:3]
        comparison: _Comparison = ctx.comparison
        hidden_grad_NH = torch.zeros_like(hidden_NH, dtype=comparison.dtype)
        weight_grad_VH = torch.empty_like(weight_VH)
        bias_grad_V = None if bias_V is None else torch.empty_like(bias_V)
        factor_N1 = comparison.head.scale * grad_N[:, None]
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for block, weight, logits, teacher_logits in comparison.blocks(inputs):
                damping = comparison.head.damping(logits)
                log_p, log_q = logits.sub_(log_total_N1), teacher_logits.sub_(log_teacher_total_N1)
                if comparison.kind == "forward_kl":
                    slopes = log_p.exp_().sub_(log_q.exp_())
                else:
                    slopes = _log_ratio(comparison, log_p, log_q).sub_(expected_N1).mul_(log_p.exp_())
                slopes *= factor_N1
                if damping is not None:
                    slopes *= damping
                if bias_grad_V is not None:
                    bias_grad_V[block] = slopes.sum(0)
                slopes = slopes.to(hidden_NH.dtype)
                hidden_grad_NH += slopes @ weight
                weight_grad_VH[block] = slopes.T @ hidden_NH
        return hidden_grad_NH.to(hidden_NH.dtype), weight_grad_VH, bias_grad_V, *[None] * 4


def _log_ratio(comparison: _Comparison, log_p: Tensor, log_q: Tensor) -> Tensor:
    """w_v / p_v of the reverse KL, log(p_v/q_v), or of Jensen-Shannon, (1 − β) log(p_v/m_v)."""
    if comparison.kind == "reverse_kl":
        return log_p - log_q
    return log_p.sub(log_mixture(log_p, log_q, comparison.mixture)).mul_(1 - comparison.mixture)


_Sums = tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor | None]
"""Divergence, Σ_v w_v, both sides' log-normalizers (all [N, 1]), and [N, H] Σ_v ∂D/∂z_v W_v or None."""


def _kl_sums(comparison: _Comparison, inputs: _Inputs, *, with_slopes: bool) -> _Sums:
    """Either KL in one pass.

    With a the side whose probabilities weigh, b the other, and both sides' logits relative to their running maximum,
    KL(a ‖ b) = E_a[z_a − z_b] − log total_a + log total_b. Relative logits stay small where a has its mass, and so does
    what rounding makes of their difference.

    Σ_v w_v of the reverse KL is the divergence itself; for the forward KL nobody reads it.
    """
    hidden_NH, is_reverse = inputs[0], comparison.kind == "reverse_kl"
    student, teacher = _OnlineSoftmax(hidden_NH, comparison.dtype), _OnlineSoftmax(hidden_NH, comparison.dtype)
    weighing, other = (student, teacher) if is_reverse else (teacher, student)
    gap_N1 = torch.zeros_like(student.total_N1)  # Σ_v exp(z_a) (z_a − z_b)
    mean_NH = weighted_NH = None
    if with_slopes:
        # Σ_v exp(z) W_v of the student, and the same with the weights of the kind in place of exp(z).
        mean_NH = torch.zeros_like(hidden_NH, dtype=comparison.dtype)
        weighted_NH = torch.zeros_like(mean_NH)
    for _, weight, logits, teacher_logits in comparison.blocks(inputs):
        damping = comparison.head.damping(logits) if with_slopes else None
        rise_N1, teacher_rise_N1 = student.shift(logits), teacher.shift(teacher_logits)
        weighing_rise_N1, other_rise_N1 = (rise_N1, teacher_rise_N1) if is_reverse else (teacher_rise_N1, rise_N1)
        gaps = logits - teacher_logits if is_reverse else teacher_logits - logits
        exponentials, teacher_exponentials = logits.exp_(), teacher_logits.exp_()
        gaps *= exponentials if is_reverse else teacher_exponentials
        # The gaps of earlier blocks were counted from the maxima of then.
        late_N1 = weighing_rise_N1 - other_rise_N1
        gap_N1 = (gap_N1 - late_N1 * weighing.total_N1) * (-weighing_rise_N1).exp() + gaps.sum(1, keepdim=True)
        student.add(rise_N1, exponentials)
        teacher.add(teacher_rise_N1, teacher_exponentials)
        if mean_NH is not None and weighted_NH is not None:
            weights = gaps if is_reverse else teacher_exponentials
            if damping is not None:
                weights *= damping
                exponentials *= damping
            if is_reverse:
                weighted_NH.sub_(late_N1 * mean_NH)
            weighted_NH.mul_((-weighing_rise_N1).exp()).add_(weights.to(hidden_NH.dtype) @ weight)
            mean_NH.mul_((-rise_N1).exp()).add_(exponentials.to(hidden_NH.dtype) @ weight)
    gap_N1 /= weighing.total_N1  # E_a[z_a − z_b], relative
    divergence_N1 = gap_N1 - weighing.total_N1.log() + other.total_N1.log()
    slopes_NH = None
    if mean_NH is not None and weighted_NH is not None:
        mean_NH /= student.total_N1
        weighted_NH /= weighing.total_N1
        slopes_NH = weighted_NH.sub_(mean_NH.mul_(gap_N1)) if is_reverse else mean_NH.sub_(weighted_NH)
    return divergence_N1, divergence_N1, (student.log_normalizer_N1, teacher.log_normalizer_N1), slopes_NH


def _mixture_sums(comparison: _Comparison, inputs: _Inputs, *, with_slopes: bool) -> _Sums:
    """Jensen-Shannon in two passes: the normalizers of both sides, then the mixture of what they normalize.

    Σ_v w_v is (1 − β) KL(p ‖ m).
    """
    hidden_NH = inputs[0]
    student, teacher = _OnlineSoftmax(hidden_NH, comparison.dtype), _OnlineSoftmax(hidden_NH, comparison.dtype)
    for _, _, logits, teacher_logits in comparison.blocks(inputs):
        for side, block_logits in ((student, logits), (teacher, teacher_logits)):
            rise_N1 = side.shift(block_logits)
            side.add(rise_N1, block_logits.exp_())
    log_normalizers = student.log_normalizer_N1, teacher.log_normalizer_N1
    student_part_N1, teacher_part_N1 = torch.zeros_like(student.total_N1), torch.zeros_like(student.total_N1)
    mean_NH = weighted_NH = None
    if with_slopes:
        mean_NH = torch.zeros_like(hidden_NH, dtype=comparison.dtype)  # Σ_v p_v W_v
        weighted_NH = torch.zeros_like(mean_NH)  # Σ_v w_v W_v
    for _, weight, logits, teacher_logits in comparison.blocks(inputs):
        damping = comparison.head.damping(logits) if with_slopes else None
        log_p, log_q = logits.sub_(log_normalizers[0]), teacher_logits.sub_(log_normalizers[1])
        log_m = log_mixture(log_p, log_q, comparison.mixture)
        teacher_part_N1 += log_q.sub(log_m).mul_(log_q.exp_()).sum(1, keepdim=True)
        weights = log_m.neg_().add_(log_p)
        probs = log_p.exp_()
        weights *= probs
        student_part_N1 += weights.sum(1, keepdim=True)
        if mean_NH is not None and weighted_NH is not None:
            if damping is not None:
                weights *= damping
                probs *= damping
            weighted_NH += weights.to(hidden_NH.dtype) @ weight
            mean_NH += probs.to(hidden_NH.dtype) @ weight
    expected_N1 = (1 - comparison.mixture) * student_part_N1
    slopes_NH = None
    if mean_NH is not None and weighted_NH is not None:
        slopes_NH = weighted_NH.mul_(1 - comparison.mixture).sub_(mean_NH.mul_(expected_N1))
    return comparison.mixture * teacher_part_N1 + expected_N1, expected_N1, log_normalizers, slopes_NH
