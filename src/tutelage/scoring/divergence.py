"""Divergence of a model from a teacher at each completion token: the teacher sees another prompt, or is another model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tutelage.errors import UserError
from tutelage.groups import Group, handed_over, sum_per_completion
from tutelage.losses import DivergenceKind
from tutelage.models.head import LMHead
from tutelage.models.head_divergence import head_divergence
from tutelage.models.loading import base_causal_lm
from tutelage.models.modes import evaluation_mode
from tutelage.scoring.forward import TeacherStates, predictor_hidden_states
from tutelage.scoring.layout import collate_in_layout
from tutelage.scoring.logps import Layout

__all__ = ["TokenDivergences", "completion_divergence", "teacher_states"]


@dataclass(frozen=True, slots=True)
class TokenDivergences:
    """Divergences at the completion tokens of some groups: what the loss of a distillation gets.

    Attributes:
        groups: the groups, in order.
        divergences_N: [N] of each completion token (nats), with gradient in training.
    """

    groups: Sequence[Group]
    divergences_N: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion, groups in order."""
        return [len(c.token_ids) for c in chain.from_iterable(group.completions for group in self.groups)]

    def sums(self) -> Tensor:
        """[C] sum over the tokens of each completion (nats per sequence)."""
        lengths = torch.tensor(self.lengths)
        completion_ids = torch.arange(len(lengths)).repeat_interleave(lengths)
        return sum_per_completion(self.divergences_N, completion_ids, len(lengths))

    def means(self) -> Tensor:
        """[C] mean over the tokens of each completion (nats per token)."""
        lengths = torch.tensor(self.lengths, dtype=self.divergences_N.dtype)
        return self.sums() / handed_over(lengths, self.divergences_N.device)


@torch.no_grad()
def teacher_states(
    teacher: nn.Module,
    groups: Sequence[Group],
    *,
    kind: DivergenceKind,
    mixture: float = 0.5,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    layout: Layout = "auto",
    pad_token_id: int = 0,
) -> TeacherStates:
    """What a teacher says of the completion tokens of some groups, without gradient and without dropout.

    Args:
        teacher: a causal language model; the student itself, with other weights in ``context``, is one too.
        groups: prompts as the teacher sees them, with the completions.
        kind, mixture: how the student will be compared with it; see ``head_divergence``.
        context: makes the context that the pass runs in: ``weights.active`` of a ``WeightSet``, or ``model.disable_adapter``
            of peft. The head is taken as it is there.
        layout, pad_token_id: as for ``completion_token_logps``.
    """
    with evaluation_mode(teacher), context():
        base = base_causal_lm(teacher)
        hidden_NH = predictor_hidden_states(base, collate_in_layout(teacher, groups, layout, pad_token_id))
        return TeacherStates(hidden_NH, LMHead.of(base).detached(), kind, mixture)


def completion_divergence(
    model: nn.Module,
    groups: Sequence[Group],
    teacher_groups: Sequence[Group],
    *,
    kind: DivergenceKind,
    mixture: float = 0.5,
    teacher: nn.Module | None = None,
    teacher_context: Callable[[], AbstractContextManager[object]] = nullcontext,
    layout: Layout = "auto",
    pad_token_id: int = 0,
    block_size: int | None = None,
) -> Tensor:
    """Divergence of the student's next-token distribution from the teacher's at every completion token.

    The teacher's forward pass runs first, without gradient and without dropout, and leaves [N, H] hidden states; its
    logits are only ever there a block of the vocabulary at a time.

    Args:
        model: the student, a causal language model of transformers with or without peft adapters.
        groups: prompts as the student sees them, with the completions.
        teacher_groups: the same completions with the prompts that the teacher sees.
        kind, mixture, block_size: as for ``head_divergence``.
        teacher: another model with the same vocabulary, on the same device; by default ``model`` itself.
        teacher_context: makes the context that the teacher's pass runs in: ``weights.active`` of a ``WeightSet``,
            or ``model.disable_adapter`` of peft. The teacher's head is taken as it is there.
        layout, pad_token_id: as for ``completion_logps``; "auto" is found out for each model.

    Returns:
        [N] float32 nats per token, groups in order, completions in order within each; differentiable with respect to
        the student. ``Batch.completion_ids`` says which completion each belongs to.

    Raises:
        ValueError: the groups differ in their completions, or ``kind`` or ``mixture`` are out of range.
        UserError: the two models have vocabularies of different sizes.
    """
    _check_same_completions(groups, teacher_groups)
    teacher = model if teacher is None else teacher
    base, teacher_base = base_causal_lm(model), base_causal_lm(teacher)
    _check_same_vocabulary(base, teacher_base)
    seen = teacher_states(
        teacher,
        teacher_groups,
        kind=kind,
        mixture=mixture,
        context=teacher_context,
        layout=layout,
        pad_token_id=pad_token_id,
    )
    batch = collate_in_layout(model, groups, layout, pad_token_id)
    return head_divergence(
        LMHead.of(base),
        predictor_hidden_states(base, batch),
        seen.hidden_NH,
        kind=kind,
        mixture=mixture,
        teacher_head=seen.head,
        block_size=block_size,
    )


def _check_same_completions(groups: Sequence[Group], teacher_groups: Sequence[Group]) -> None:
    if len(groups) != len(teacher_groups):
        raise ValueError(f"{len(groups)} groups of the student, {len(teacher_groups)} of the teacher")
    for index, (group, seen) in enumerate(zip(groups, teacher_groups, strict=True)):
        if [c.token_ids for c in group.completions] != [c.token_ids for c in seen.completions]:
            raise ValueError(f"group {index} (row {group.row}) has other completions for the teacher")


def _check_same_vocabulary(base: PreTrainedModel, teacher_base: PreTrainedModel) -> None:
    sizes = [LMHead.of(side).vocab_size for side in (base, teacher_base)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"the student's head has {sizes[0]} tokens, the teacher's {sizes[1]}.",
            remedy="Distributions are compared token by token: take a teacher with the student's tokenizer, and resize "
            "the larger head (model.resize_token_embeddings) if one of them has spare rows.",
        )
