"""The reward phase: a reward learns to rank demonstrations above samples (and preferred above rejected answers)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import NonFiniteLossError
from tutelage.groups import Group, Role, handed_over, pair_indices
from tutelage.losses import RewardLossKind, reward_loss
from tutelage.models.modes import adapters_under_autocast
from tutelage.rewards.explicit import ExplicitReward

__all__ = [
    "RewardFitter",
    "RewardObjective",
]

_FACTS = ("loss", "accuracy", "demonstrations", "samples")


@dataclass(frozen=True, slots=True)
class RewardObjective:
    """What a reward phase minimizes: w_d · loss of demonstrations vs. samples + w_p · loss of preference pairs.

    The weighted sum is that of Li et al. 2024, "Joint Demonstration and Preference Learning" (AIHF, arXiv 2406.06874).

    Attributes:
        kind, margin, label_smoothing, centering, regularization: of ``reward_loss``.
        demonstration_weight, preference_weight: w_d and w_p.
    """

    kind: RewardLossKind = "logistic"
    margin: float = 0.0
    label_smoothing: float = 0.0
    centering: float = 0.0
    regularization: float = 1.0
    demonstration_weight: float = 1.0
    preference_weight: float = 1.0

    def of_pairs(self, first_P: Tensor, others_P: Tensor) -> Tensor:
        """[P] loss of each pair."""
        return reward_loss(
            first_P,
            others_P,
            kind=self.kind,
            margin=self.margin,
            label_smoothing=self.label_smoothing,
            centering=self.centering,
            regularization=self.regularization,
        )


class RewardFitter:
    """Carries a reward's optimizer from one reward phase to the next.

    Args:
        reward: what learns.
        objective: what it minimizes.
        optimizer: over ``reward.parameters``.
        batch_size: groups per optimizer step.
        micro_batch_size: groups per forward pass.
        preferences: preference pairs as groups; every step takes the next ``batch_size`` of them.
        max_grad_norm: gradients are clipped to this norm; 0 turns clipping off.
        saturation: a phase stops early when the accuracy over its last 4 · ``batch_size`` groups reaches this value; a
            single batch would be too noisy. None never stops early.
        seed: of the order of the groups.
    """

    def __init__(
        self,
        reward: ExplicitReward,
        objective: RewardObjective,
        optimizer: torch.optim.Optimizer,
        *,
        batch_size: int,
        micro_batch_size: int | None = None,
        preferences: Sequence[Group] = (),
        max_grad_norm: float = 1.0,
        saturation: float | None = 0.97,
        seed: int = 0,
    ):
        self.reward, self.objective, self.optimizer = reward, objective, optimizer
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size or batch_size
        self.preferences = list(preferences)
        self.max_grad_norm, self.saturation, self.seed = max_grad_norm, saturation, seed
        self.steps_done, self.tokens_done = 0, 0

    def fit(
        self,
        groups: Sequence[Group],
        *,
        phase: int,
        epochs: int = 1,
        steps: int | None = None,
        unpaired: Sequence[Group] = (),
        on_step: Callable[[int, dict[str, float]], None] = lambda done, facts: None,
    ) -> dict[str, float]:
        """One reward phase.

        Args:
            groups: with at least one pair each (see ``contrast``).
            phase: its number, which decides the order of the groups.
            epochs: over the groups. ``steps`` in optimizer steps goes before it.
            unpaired: prompts without a demonstration, with samples: every step also holds the demonstrations of its
                groups against samples of as many of these.
            on_step: called after each step with the number of steps done and the metrics of the step.

        Returns:
            means over the phase, each batch seen before its step: ``loss``, ``accuracy`` (a tie counts half),
            ``demonstrations`` and ``samples`` (rewards), ``steps``, and ``saturated``, 1 if it stopped early.

        Raises:
            NonFiniteLossError: a loss or gradient is NaN or infinite; raised before that step moves a weight.
        """
        wanted = self.planned_steps(len(groups), epochs, steps)
        seen: list[dict[str, float]] = []
        saturated = False
        batches = self._batches(groups, phase)
        others = self._batches(unpaired, phase) if unpaired else None
        self.reward.model.train()
        for _ in range(wanted):
            seen.append(self._step(next(batches), phase, next(others) if others else []))
            self.steps_done += 1
            on_step(len(seen), seen[-1])
            if self.saturation is not None and len(seen) < wanted and self._accuracy_of_late(seen) >= self.saturation:
                saturated = True
                break
        self.optimizer.zero_grad()  # nothing is kept that the policy phase has no use for
        total = sum(facts["pairs"] for facts in seen)
        means = {name: sum(facts[name] * facts["pairs"] for facts in seen) / max(1.0, total) for name in _FACTS}
        return {**means, "steps": float(len(seen)), "saturated": float(saturated)}

    def _accuracy_of_late(self, seen: list[dict[str, float]]) -> float:
        """Accuracy over the last steps that hold 4 · ``batch_size`` groups; 0 before there are so many."""
        groups = pairs = right = 0.0
        for facts in reversed(seen):
            groups, pairs = groups + facts["groups"], pairs + facts["pairs"]
            right += facts["accuracy"] * facts["pairs"]
            if groups >= 4 * self.batch_size:
                return right / pairs
        return 0.0

    def planned_steps(self, groups: int, epochs: int = 1, steps: int | None = None) -> int:
        """Optimizer steps that a phase over so many groups takes if it does not stop early; none without a group."""
        if not groups:
            return 0
        return steps if steps is not None else epochs * math.ceil(groups / self.batch_size)

    def _batches(self, groups: Sequence[Group], phase: int) -> Iterator[list[Group]]:
        """Batches pass by pass, each pass in a new order that depends only on seed, phase and pass."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + phase)
        while True:
            order = torch.randperm(len(groups), generator=generator).tolist()
            for start in range(0, len(order), self.batch_size):
                yield [groups[index] for index in order[start : start + self.batch_size]]

    def _preference_batch(self) -> list[Group]:
        first = self.steps_done * self.batch_size
        return [self.preferences[index % len(self.preferences)] for index in range(first, first + self.batch_size)]

    def _step(self, batch: list[Group], phase: int, unpaired: list[Group]) -> dict[str, float]:
        """One optimizer step; its metrics cover only demonstrations and samples.

        All numbers that are read come from the device at once, before the optimizer moves a weight.
        """
        sums: list[Tensor] = []
        losses: list[Tensor] = []

        def backward(loss: Tensor) -> None:
            losses.append(loss.detach())
            loss.backward()

        pairs = sum(len(group.pairs) for group in batch)
        preferences = self._preference_batch() if self.preferences else []
        self.optimizer.zero_grad()
        with self.reward.active(), adapters_under_autocast(self.reward.model, self.reward.autocast):
            for first_P, others_P, weights_P in self._rewards(batch):
                losses_P = self.objective.of_pairs(first_P, others_P)
                loss = (losses_P * weights_P).sum() / len(batch)
                backward(self.objective.demonstration_weight * loss)
                won_P = ((first_P - others_P).sign() + 1) / 2
                sums += [values.detach().sum() for values in (losses_P, won_P, first_P, others_P)]
            for first_P, others_P in self._rewards_across(batch, unpaired):
                loss = self.objective.of_pairs(first_P, others_P).sum() / len(batch)
                backward(self.objective.demonstration_weight * loss)
            for first_P, others_P, weights_P in self._rewards(preferences):
                losses_P = self.objective.of_pairs(first_P, others_P)
                loss = (losses_P * weights_P).sum() / len(preferences)
                backward(self.objective.preference_weight * loss)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.reward.parameters if p.grad is not None])
        read = torch.stack([value.float() for value in (*losses, norm, *sums)]).tolist()
        checked, totals = read[: len(losses) + 1], read[len(losses) + 1 :]
        for place, value in enumerate(checked):
            if not math.isfinite(value):
                raise _non_finite("loss" if place < len(losses) else "gradient", value, phase)
        if self.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self.reward.parameters, self.max_grad_norm, norm)
        self.optimizer.step()
        means = {name: sum(totals[place::4]) / pairs for place, name in enumerate(_FACTS)}
        return means | {"pairs": float(pairs), "groups": float(len(batch))}

    def _rewards(self, groups: Sequence[Group]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rewards of both sides of all pairs, by micro-batch, and weights that give every group equal total weight."""
        ordered = sorted(groups, key=len)
        for start in range(0, len(ordered), self.micro_batch_size):
            batch = ordered[start : start + self.micro_batch_size]
            with self.reward.autocast():
                rewards_C = self.reward.rewards(batch)
            self.tokens_done += sum(len(c.token_ids) for group in batch for c in group.completions)
            first, others = (
                handed_over(torch.tensor(places, dtype=torch.long), rewards_C.device) for places in pair_indices(batch)
            )
            weights = torch.tensor(
                [1 / len(group.pairs) for group in batch for _ in group.pairs], dtype=rewards_C.dtype
            )
            yield rewards_C[first], rewards_C[others], handed_over(weights, rewards_C.device)

    def _rewards_across(self, batch: Sequence[Group], unpaired: Sequence[Group]) -> Iterator[tuple[Tensor, Tensor]]:
        """Rewards of demonstrations and of samples of other prompts, in pairs that both ended or both did not."""
        pairs = []
        for group, other in zip(batch, unpaired, strict=False):
            for (place, better), (elsewhere, worse) in product(
                enumerate(group.completions), enumerate(other.completions)
            ):
                if better.role is Role.DEMONSTRATION and better.finished == worse.finished:
                    pairs.append((group.select([place]), other.select([elsewhere])))
                    break
        for start in range(0, len(pairs), self.micro_batch_size):
            part = pairs[start : start + self.micro_batch_size]
            both = [side for pair in part for side in pair]
            with self.reward.autocast():
                rewards_C = self.reward.rewards(both)
            self.tokens_done += sum(len(c.token_ids) for group in both for c in group.completions)
            yield rewards_C[0::2], rewards_C[1::2]

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and how many steps it made on how many completion tokens."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps_done": self.steps_done,
            "tokens_done": self.tokens_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done, self.tokens_done = state["steps_done"], state["tokens_done"]


def _non_finite(what: str, value: float, phase: int) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"the {what} of the reward is {value} in the reward phase of stage {phase}; it stopped before a weight changed.",
        remedy="Lower --reward_learning_rate.",
    )
