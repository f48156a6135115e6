"""The central data structure, a prompt with its completions, and the two layouts of a batch of them.

Shape suffixes used throughout the project::

    B  rows of a batch          L  positions of a row       G  groups
    C  completions, in order    N  completion tokens of all completions of a batch, in order
    P  pairs                    H  hidden size              V  vocabulary size
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import product
from typing import Any

import torch

__all__ = [
    "Batch",
    "Completion",
    "Group",
    "Role",
    "collate_padded",
    "collate_shared_prefix",
    "drop_copies",
    "pair_indices",
    "sum_per_completion",
]


class Role(StrEnum):
    """What a completion is: a demonstration, a sample, or a side of a preference pair."""

    DEMONSTRATION = "demonstration"
    SAMPLE = "sample"
    PREFERRED = "preferred"
    REJECTED = "rejected"


_BETTER, _WORSE = (Role.DEMONSTRATION, Role.PREFERRED), (Role.SAMPLE, Role.REJECTED)


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer to a prompt.

    Two completions are equal if tokens, role and ``finished`` are; what is known of them does not count.

    Attributes:
        token_ids: the tokens; the end-of-turn token is the last one if, and only if, ``finished``.
        role: demonstration, sample, preferred or rejected.
        finished: True if it ended by itself, False if it was truncated at the length limit.
        token_values: what is known of each token, by name; one number per token. The engine's names are
            ``sampler_logps`` (log-prob under the distribution it was drawn from), ``old_logps`` (under the policy
            that drew it, at temperature 1) and ``reference_logps``, all in nats.
        values: what is known of the whole completion, by name. The engine's names are ``reward`` (what the reward
            gave it), ``scaled_reward`` (as the policy phase of RFT sees it) and ``start_logp`` (its log-prob under the
            policy that the run started with, nats).
    """

    token_ids: tuple[int, ...]
    role: Role
    finished: bool
    token_values: Mapping[str, tuple[float, ...]] = field(default_factory=dict, compare=False)
    values: Mapping[str, float] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        if not self.token_ids:
            raise ValueError("a completion needs at least one token")
        for name, numbers in self.token_values.items():
            if len(numbers) != len(self.token_ids):
                raise ValueError(f"{len(numbers)} {name} for {len(self.token_ids)} tokens")

    def sum(self, name: str) -> float:
        """What ``token_values`` calls ``name``, summed over the tokens: of log-probs, the completion's (nats per sequence)."""
        return sum(self.token_values[name])


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with its completions: the unit that every algorithm works on.

    Attributes:
        prompt_ids: tokens of the prompt, with the BOS token if the tokenizer has one. At least one.
        completions: in any order, of any roles; none for a prompt alone.
        row: number of the row in the dataset, from 0; identifies the group in logs and on disk.
        teacher_prompt_ids: a second view of the prompt, which a teacher sees: with a demonstration in it, for example.
    """

    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...] = ()
    row: int = -1
    teacher_prompt_ids: tuple[int, ...] | None = None

    def __post_init__(self):
        if not self.prompt_ids or (self.teacher_prompt_ids is not None and not self.teacher_prompt_ids):
            raise ValueError("a group needs a prompt of at least one token")

    def places(self, *roles: Role) -> list[int]:
        """Where the completions of these roles stand among the completions."""
        return [place for place, completion in enumerate(self.completions) if completion.role in roles]

    def of(self, *roles: Role) -> tuple[Completion, ...]:
        """The completions of these roles, in order."""
        return tuple(completion for completion in self.completions if completion.role in roles)

    @property
    def demonstrations(self) -> tuple[Completion, ...]:
        """The completions that are demonstrations."""
        return self.of(Role.DEMONSTRATION)

    @property
    def samples(self) -> tuple[Completion, ...]:
        """The completions that a policy drew."""
        return self.of(Role.SAMPLE)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Places of all pairs of a better and a worse completion.

        Demonstrations and preferred answers are better than samples and rejected ones.
        """
        return list(product(self.places(*_BETTER), self.places(*_WORSE)))

    def select(self, places: Iterable[int]) -> Group:
        """The group with the completions at ``places`` alone."""
        return replace(self, completions=tuple(self.completions[place] for place in places))

    def add(self, completions: Iterable[Completion]) -> Group:
        """The group with further completions."""
        return replace(self, completions=(*self.completions, *completions))

    def seen_by_teacher(self) -> Group:
        """The group under the teacher's view of its prompt.

        Raises:
            ValueError: it has no such view.
        """
        if self.teacher_prompt_ids is None:
            raise ValueError(f"the group of row {self.row} has no teacher_prompt_ids")
        return replace(self, prompt_ids=self.teacher_prompt_ids)

    def with_token_values(self, name: str, values: Sequence[Sequence[float] | None]) -> Group:
        """The group with numbers per token, one list per completion; None leaves a completion as it is."""
        return self._with("token_values", name, [None if v is None else tuple(v) for v in values])

    def without(self, name: str) -> Group:
        """The group without what ``token_values`` calls ``name``."""
        return replace(
            self,
            completions=tuple(
                replace(c, token_values={key: value for key, value in c.token_values.items() if key != name})
                for c in self.completions
            ),
        )

    def with_values(self, name: str, values: Sequence[float | None]) -> Group:
        """The group with one number per completion; None leaves a completion as it is."""
        return self._with("values", name, values)

    def _with(self, what: str, name: str, values: Sequence[Any]) -> Group:
        return replace(
            self,
            completions=tuple(
                c if value is None else replace(c, **{what: {**getattr(c, what), name: value}})
                for c, value in zip(self.completions, values, strict=True)
            ),
        )

    def sums(self, name: str) -> tuple[float, ...]:
        """Sums over tokens of what ``name`` calls, one per completion.

        Raises:
            KeyError: it is not known of all completions.
        """
        return tuple(completion.sum(name) for completion in self.completions)

    def values(self, name: str) -> tuple[float, ...]:
        """What ``name`` calls, one number per completion.

        Raises:
            KeyError: it is not known of all completions.
        """
        return tuple(completion.values[name] for completion in self.completions)

    def __len__(self) -> int:
        """Tokens: the prompt once and every completion."""
        return len(self.prompt_ids) + sum(len(completion.token_ids) for completion in self.completions)


def drop_copies(group: Group) -> Group:
    """The group without the samples that equal one of its demonstrations.

    Such a pair has a constant loss and no gradient, whatever the policy.
    """
    demonstrations = {completion.token_ids for completion in group.demonstrations}
    return group.select(
        place
        for place, completion in enumerate(group.completions)
        if completion.role is not Role.SAMPLE or completion.token_ids not in demonstrations
    )


def pair_indices(groups: Sequence[Group]) -> tuple[list[int], list[int]]:
    """Where the two sides of every pair stand among the completions of a batch: the better ones, and the worse ones."""
    better, worse, start = [], [], 0
    for group in groups:
        for first, second in group.pairs:
            better.append(start + first)
            worse.append(start + second)
        start += len(group.completions)
    return better, worse


def handed_over(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on a device. A copy from the host does not wait until the device has done what it was given before.

    CUDA takes what it copies from the host before the call returns; MPS does not.
    """
    waits = tensor.device.type != "cpu" or torch.device(device).type == "mps"
    return tensor.to(device, non_blocking=not waits)


def sum_per_completion(values_N: torch.Tensor, completion_ids: torch.Tensor, num_completions: int) -> torch.Tensor:
    """[C] sums over the tokens of each completion; differentiable.

    Args:
        values_N: numbers per token.
        completion_ids: [N] which completion each token belongs to, from 0.
        num_completions: C.
    """
    return values_N.new_zeros(num_completions).index_add(0, handed_over(completion_ids, values_N.device), values_N)


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of a batch of groups.

    Attributes:
        input_ids: [B, L] token ids, padded at the right.
        position_ids: [B, L]; in the shared-prefix layout they restart after the prompt for each completion.
        attention_mask: [B, L] bool (padded layout: False on padding) or None (shared-prefix layout: see
            ``branch_ids``).
        branch_ids: [B, L]; 0 for the prompt, k for the k-th completion of the row, -1 for padding.
        predictor_rows, predictor_columns: [N] position of the hidden state that predicts each completion token.
        targets: [N] the completion tokens.
        completion_ids: [N] which completion of the batch, counted in order, each token belongs to.
        end_rows, end_columns: [C] position of the last token of each completion.
        num_completions: C.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    branch_ids: torch.Tensor
    predictor_rows: torch.Tensor
    predictor_columns: torch.Tensor
    targets: torch.Tensor
    completion_ids: torch.Tensor
    end_rows: torch.Tensor
    end_columns: torch.Tensor
    num_completions: int

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        tensors = {
            name: handed_over(value, device)
            for name in self.__dataclass_fields__
            if isinstance(value := getattr(self, name), torch.Tensor)
        }
        return replace(self, **tensors)

    def shared_prefix_mask(self, window: int | None = None) -> torch.Tensor:
        """The attention mask of the shared-prefix layout.

        A completion token attends to the prompt and to its own completion, up to itself.

        Args:
            window: width of a sliding window in tokens, counted as if the completion were alone in the sequence; None
                for full attention.

        Returns:
            [B, 1, L, L] bool, True where the query (third axis) may attend to the key (fourth axis). A padding
            position attends to itself alone, so that no row of the softmax is empty.
        """
        query_branch, key_branch = self.branch_ids[:, :, None], self.branch_ids[:, None, :]
        distance = self.position_ids[:, :, None] - self.position_ids[:, None, :]
        mask = ((key_branch == query_branch) | (key_branch == 0)) & (query_branch >= 0) & (distance >= 0)
        if window is not None:
            mask &= distance < window
        mask |= torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
        return mask[:, None]


def collate_shared_prefix(groups: Sequence[Group], pad_token_id: int = 0) -> Batch:
    """One row per group: the prompt once, then each completion, positions restarting after the prompt.

    >>> demonstration = Completion((7, 8, 2), Role.DEMONSTRATION, finished=True)
    >>> sample = Completion((9, 2), Role.SAMPLE, finished=True)
    >>> batch = collate_shared_prefix([Group((1, 5), (demonstration, sample)), Group((1,), (demonstration,))])
    >>> batch.input_ids
    tensor([[1, 5, 7, 8, 2, 9, 2],
            [1, 7, 8, 2, 0, 0, 0]])
    >>> batch.position_ids
    tensor([[0, 1, 2, 3, 4, 2, 3],
            [0, 1, 2, 3, 0, 0, 0]])
    >>> batch.branch_ids
    tensor([[ 0,  0,  1,  1,  1,  2,  2],
            [ 0,  1,  1,  1, -1, -1, -1]])
    >>> batch.predictor_columns  # the last prompt position predicts the first token of every completion
    tensor([1, 2, 3, 1, 5, 0, 1, 2])
    >>> batch.targets
    tensor([7, 8, 2, 9, 2, 7, 8, 2])
    >>> batch.completion_ids
    tensor([0, 0, 0, 1, 1, 2, 2, 2])
    >>> batch.end_rows, batch.end_columns
    (tensor([0, 0, 1]), tensor([4, 6, 3]))
    >>> batch.shared_prefix_mask()[0, 0].int()
    tensor([[1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 0, 1, 0],
            [1, 1, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    return _collate(groups, pad_token_id, shared_prefix=True)


def collate_padded(groups: Sequence[Group], pad_token_id: int = 0) -> Batch:
    """One row per completion: the prompt repeated before each, padded at the right.

    >>> demonstration = Completion((7, 8, 2), Role.DEMONSTRATION, finished=True)
    >>> sample = Completion((9, 2), Role.SAMPLE, finished=True)
    >>> batch = collate_padded([Group((1, 5), (demonstration, sample))])
    >>> batch.input_ids
    tensor([[1, 5, 7, 8, 2],
            [1, 5, 9, 2, 0]])
    >>> batch.attention_mask.int()
    tensor([[1, 1, 1, 1, 1],
            [1, 1, 1, 1, 0]], dtype=torch.int32)
    >>> batch.predictor_rows, batch.predictor_columns
    (tensor([0, 0, 0, 1, 1]), tensor([1, 2, 3, 1, 2]))
    """
    rows = [Group(group.prompt_ids, (completion,)) for group in groups for completion in group.completions]
    return _collate(rows, pad_token_id, shared_prefix=False)


def _collate(rows: Sequence[Group], pad_token_id: int, *, shared_prefix: bool) -> Batch:
    rows = [row for row in rows if row.completions]
    if not rows:
        raise ValueError("a batch needs at least one completion")
    width = max(len(row) for row in rows)
    input_ids, position_ids, branch_ids = [], [], []
    predictor_rows, predictor_columns, targets, completion_ids = [], [], [], []
    end_rows, end_columns = [], []
    for row_index, row in enumerate(rows):
        start = len(row.prompt_ids)
        tokens, positions, branches = list(row.prompt_ids), list(range(start)), [0] * start
        for branch, completion in enumerate(row.completions, start=1):
            length = len(completion.token_ids)
            predictor_rows += [row_index] * length
            predictor_columns += [start - 1, *range(len(tokens), len(tokens) + length - 1)]
            targets += completion.token_ids
            completion_ids += [len(end_rows)] * length
            tokens += completion.token_ids
            end_rows.append(row_index)
            end_columns.append(len(tokens) - 1)
            positions += range(start, start + length)
            branches += [branch] * length
        padding = width - len(tokens)
        input_ids.append(tokens + [pad_token_id] * padding)
        position_ids.append(positions + [0] * padding)
        branch_ids.append(branches + [-1] * padding)
    branches_BL = torch.tensor(branch_ids)
    return Batch(
        input_ids=torch.tensor(input_ids),
        position_ids=torch.tensor(position_ids),
        attention_mask=None if shared_prefix else branches_BL >= 0,
        branch_ids=branches_BL,
        predictor_rows=torch.tensor(predictor_rows),
        predictor_columns=torch.tensor(predictor_columns),
        targets=torch.tensor(targets),
        completion_ids=torch.tensor(completion_ids),
        end_rows=torch.tensor(end_rows),
        end_columns=torch.tensor(end_columns),
        num_completions=len(end_rows),
    )
