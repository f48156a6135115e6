"""Log-probs of completions under a model: one forward pass, with the head on completion positions only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from tutelage.groups import Completion, Group, Role, handed_over, sum_per_completion
from tutelage.models.attention import attention_by_products
from tutelage.models.loading import base_causal_lm
from tutelage.models.modes import evaluation_mode
from tutelage.scoring.forward import TeacherStates, hidden_states, token_logps_and_divergences
from tutelage.scoring.layout import collate_in_layout

__all__ = [
    "Layout",
    "TokenLogps",
    "View",
    "cached_logps",
    "cached_token_logps",
    "completion_logps",
    "completion_token_logps",
    "end_hidden_states",
    "in_batches",
]

Layout = Literal["auto", "shared_prefix", "padded"]
View = Literal["policy", "teacher"]
"""Which prompt of a group is read: its own, or the one a teacher sees (``Group.teacher_prompt_ids``)."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TokenLogps:
    """Log-probs of the completion tokens of some groups, and what else is known of them: what a loss gets.

    Attributes:
        groups: the groups, in order.
        logps_N: [N] log-prob of each completion token (nats per token), with gradient in training.
        completion_ids: [N] which completion each token belongs to; completions count over all groups, in order.
        divergence_N: [N] divergence from a teacher at each token (nats), with gradient in training; None without a teacher.
    """

    groups: Sequence[Group]
    logps_N: Tensor
    completion_ids: Tensor
    divergence_N: Tensor | None = None

    @property
    def num_completions(self) -> int:
        """C."""
        return sum(len(group.completions) for group in self.groups)

    def sums(self) -> Tensor:
        """[C] log-prob of each completion (nats per sequence)."""
        return self.sum(self.logps_N)

    def sum(self, values_N: Tensor) -> Tensor:
        """[C] sums of numbers per token over the tokens of each completion."""
        return sum_per_completion(values_N, self.completion_ids, self.num_completions)

    def lengths(self) -> Tensor:
        """[C] tokens of each completion, as numbers of the log-probs' type."""
        return self._beside([len(completion.token_ids) for completion in self._completions])

    def known(self, name: str) -> Tensor:
        """[N] what ``Completion.token_values`` calls ``name``, without gradient; KeyError if it is not known of all."""
        numbers = chain.from_iterable(c.token_values[name] for group in self.groups for c in group.completions)
        return self._beside(list(numbers))

    def known_sums(self, name: str) -> Tensor:
        """[C] the same, summed over the tokens of each completion."""
        return self._beside([total for group in self.groups for total in group.sums(name)])

    def values(self, name: str) -> Tensor:
        """[C] what ``Completion.values`` calls ``name``; KeyError if it is not known of all."""
        return self._beside([value for group in self.groups for value in group.values(name)])

    def logps_of(self, *roles: Role) -> Tensor:
        """[n] the log-probs of the tokens of completions that have these roles."""
        return self.logps_N[self.index(self._places_of(roles))]

    def only(self, *roles: Role) -> TokenLogps:
        """The same of the completions alone that have these roles."""
        if all(completion.role in roles for completion in self._completions):
            return self
        groups = [group.select(group.places(*roles)) for group in self.groups]
        kept = (completion for group in groups for completion in group.completions)
        ids = [place for place, completion in enumerate(kept) for _ in completion.token_ids]
        places = self.index(self._places_of(roles))
        divergence_N = None if self.divergence_N is None else self.divergence_N[places]
        return TokenLogps(groups, self.logps_N[places], self.index(ids), divergence_N)

    def _places_of(self, roles: Sequence[Role]) -> list[int]:
        """Which of the N tokens are of completions that have these roles."""
        places, start = list[int](), 0
        for completion in self._completions:
            end = start + len(completion.token_ids)
            if completion.role in roles:
                places += range(start, end)
            start = end
        return places

    def sums_of(self, *roles: Role) -> Tensor:
        """[n] the log-probs of the completions that have these roles (nats per sequence)."""
        return self.sums()[self.index(self.of(*roles))]

    def index(self, places: Sequence[int]) -> Tensor:
        """[n] indices on the device of the log-probs, where a list would wait until the device has come to its end."""
        return handed_over(torch.tensor(places, dtype=torch.long), self.logps_N.device)

    def _beside(self, numbers: Sequence[float]) -> Tensor:
        return handed_over(torch.tensor(numbers, dtype=self.logps_N.dtype), self.logps_N.device)

    def of(self, *roles: Role) -> list[int]:
        """Which of the C completions have these roles."""
        return [place for place, completion in enumerate(self._completions) if completion.role in roles]

    @property
    def _completions(self) -> Iterator[Completion]:
        return (completion for group in self.groups for completion in group.completions)


def completion_token_logps(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    layout: Layout = "auto",
    view: View = "policy",
    pad_token_id: int = 0,
    block_size: int | None = None,
    teacher: TeacherStates | None = None,
) -> TokenLogps:
    """Log-prob of every completion token given its prompt and what comes before it, log π(y_i | x, y_<i).

    Args:
        model: a transformers causal language model, with or without peft adapters, and no other wrapper.
        groups: prompts with their completions, at least one.
        layout: "shared_prefix" runs the prompt once for all its completions, "padded" repeats it for each; "auto"
            takes the shared-prefix layout where a probe on this model found it to give the same numbers.
        view: which prompt the completions are conditioned on.
        pad_token_id: pads rows; no result depends on it.
        block_size: vocabulary tokens per block of the head; affects only speed and memory.
        teacher: what a teacher says of the same tokens (``teacher_states``), to compare the model's distributions with.

    Returns:
        float32 log-probs (nats per token), with the divergences from the teacher where there is one; differentiable.

    Raises:
        UserError: the model's logits are not its head applied to its hidden states.
        ValueError: no completion, or a group without the view.
    """
    if view == "teacher":
        groups = [group.seen_by_teacher() for group in groups]
    batch = collate_in_layout(model, groups, layout, pad_token_id)
    logps_N, divergence_N = token_logps_and_divergences(model, batch, teacher, block_size=block_size)
    return TokenLogps(groups, logps_N, handed_over(batch.completion_ids, logps_N.device), divergence_N)


def completion_logps(model: nn.Module, groups: Sequence[Group], **options: Any) -> Tensor:
    """Log-prob of every completion given its prompt, log π(y|x) = Σ_i log π(y_i | x, y_<i).

    Args:
        options: of ``completion_token_logps``.

    Returns:
        [C] float32 sums over tokens (nats per sequence), groups in order and completions in order within each;
        differentiable.
    """
    return completion_token_logps(model, groups, **options).sums()


def cached_token_logps(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    batch_size: int = 16,
    layout: Layout = "auto",
    view: View = "policy",
    pad_token_id: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> list[tuple[tuple[float, ...], ...]]:
    """Log-probs of the tokens of many groups without gradient and without dropout, to keep.

    Args:
        batch_size: groups per forward pass.
        on_batch: called with the number of groups done after each batch, for progress.
        layout, view, pad_token_id: as for ``completion_token_logps``.

    Returns:
        for each group, in the order given, the log-probs of each completion's tokens (nats per token).
    """

    def of_batch(batch: Sequence[Group]) -> list[tuple[tuple[float, ...], ...]]:
        scored = completion_token_logps(model, batch, layout=layout, view=view, pad_token_id=pad_token_id)
        numbers = iter(scored.logps_N.tolist())
        return [tuple(tuple(next(numbers) for _ in c.token_ids) for c in group.completions) for group in batch]

    return in_batches(of_batch, model, groups, batch_size=batch_size, on_batch=on_batch)


def cached_logps(model: nn.Module, groups: Sequence[Group], **options: Any) -> list[tuple[float, ...]]:
    """As ``cached_token_logps``, summed over tokens: the log-prob of each completion (nats per sequence)."""
    return [tuple(map(sum, logps)) for logps in cached_token_logps(model, groups, **options)]


@torch.no_grad()
def in_batches(
    values_of: Callable[[Sequence[Group]], Sequence[_T]],
    model: nn.Module,
    groups: Sequence[Group],
    *,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[_T]:
    """One value per group for many groups, without gradient and without the dropout of ``model``.

    Groups of similar length share a batch, which keeps padding low.

    Args:
        values_of: one value for each group of a batch.
        batch_size, on_batch: as for ``cached_token_logps``.

    Returns:
        the values, in the order given.
    """
    order = sorted(range(len(groups)), key=lambda index: len(groups[index]), reverse=True)
    found: dict[int, _T] = {}
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            found |= zip(indices, values_of([groups[index] for index in indices]), strict=True)
            if on_batch:
                on_batch(start + len(indices))
    return [found[index] for index in range(len(groups))]


def end_hidden_states(
    model: nn.Module, groups: Sequence[Group], *, layout: Layout = "auto", pad_token_id: int = 0
) -> Tensor:
    """Last hidden state at the last token of every completion: what a scalar reward head reads.

    For a completion that finished, that is the end-of-turn token; for a truncated one, its last token.

    Args:
        model: a transformers model, with or without a head of any kind; only its body runs.
        groups, layout, pad_token_id: as for ``completion_token_logps``.

    Returns:
        [C, H] in the model's precision, groups in order and completions in order within each; differentiable.
    """
    base = base_causal_lm(model)
    batch = collate_in_layout(model, groups, layout, pad_token_id).to(base.device)
    # Scores must equal those of the exported model in plain transformers, rounding included; training may be faster.
    attention = attention_by_products(base, batch.input_ids.shape[1]) if torch.is_grad_enabled() else nullcontext()
    with attention:
        hidden_BLH = hidden_states(base, batch)
    return hidden_BLH[batch.end_rows.to(hidden_BLH.device), batch.end_columns.to(hidden_BLH.device)]
