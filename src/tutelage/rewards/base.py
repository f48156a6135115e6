"""What a reward is: one number for a completion, given its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from tutelage.data.tokenization import Tokenization
from tutelage.groups import Completion, Group, Role

__all__ = ["Reward", "own_logps", "reward_func", "scores_by_group"]


class Reward(Protocol):
    """Scores the completions of groups. Higher is better; only differences within a prompt are meaningful."""

    def score(self, groups: Sequence[Group]) -> Tensor:
        """Reward of every completion, without gradient.

        Args:
            groups: prompts with their completions.

        Returns:
            [C] float32 on the CPU, groups in order and completions in order within each.
        """
        ...


def scores_by_group(reward: Reward, groups: Sequence[Group]) -> list[tuple[float, ...]]:
    """Rewards of the completions, one tuple per group."""
    values = iter(reward.score(groups).tolist())
    return [tuple(next(values) for _ in group.completions) for group in groups]


def own_logps(
    groups: Sequence[Group], logps: Callable[[Sequence[Group]], Sequence[Sequence[Sequence[float]]]]
) -> list[float]:
    """Log-prob of each completion (nats per sequence) under the policy that drew it, or under a scorer.

    Args:
        logps: log-probs of the tokens of each completion of groups; asked, once, for the groups with a completion that
            does not know its ``old_logps``, if there are any.

    Returns:
        C sums, groups in order and completions in order within each.
    """
    known = [all("old_logps" in c.token_values for c in group.completions) for group in groups]
    unknown = [group for group, is_known in zip(groups, known, strict=True) if not is_known]
    found = iter(logps(unknown) if unknown else ())
    return [
        total
        for group, is_known in zip(groups, known, strict=True)
        for total in (group.sums("old_logps") if is_known else map(sum, next(found)))
    ]


def reward_func(reward: Reward, tokenization: Tokenization, name: str) -> Callable[..., list[float]]:
    """A function for ``reward_funcs`` of TRL's trainers (``GRPOTrainer``, ``RLOOTrainer``).

    It scores the tokens that TRL sampled (``completion_ids``) after the prompt as ``tokenization`` writes it. A completion
    has finished if it ends with a token that ends a turn.

    Args:
        name: what TRL calls it in its logs.
    """

    def learned_reward(prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        groups = [
            Group(
                tokenization.prompt_ids(prompt),
                (Completion(tuple(ids), Role.SAMPLE, ids[-1] in tokenization.stop_ids(not isinstance(prompt, str))),),
            )
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]
        return reward.score(groups).tolist()

    learned_reward.__name__ = name
    return learned_reward
