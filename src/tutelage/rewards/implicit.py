"""The implicit reward of a trained policy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from peft import PeftModel
from torch import Tensor, nn

from tutelage.errors import UserError
from tutelage.groups import Group
from tutelage.losses import implicit_reward
from tutelage.models.weights import WeightSet
from tutelage.scoring.logps import Layout, cached_logps

__all__ = ["ImplicitReward"]


class ImplicitReward:
    """r(x, y) = β [log π(y|x) − log π_0(y|x)] (Li et al. 2024, arXiv 2405.17888, §4.2), up to a constant in y.

    Args:
        policy: π.
        reference: π_0: another model; a ``WeightSet`` of the policy; or None for the base under the policy's adapter.
        beta: temperature, in units of reward per nat.
        layout, batch_size, pad_token_id: as for ``cached_logps``.

    Raises:
        UserError: no reference is given and the policy has no adapter to switch off.
    """

    def __init__(
        self,
        policy: nn.Module,
        reference: nn.Module | WeightSet | None = None,
        *,
        beta: float = 0.1,
        layout: Layout = "auto",
        batch_size: int = 16,
        pad_token_id: int = 0,
    ):
        if reference is None and not isinstance(policy, PeftModel):
            raise UserError(
                "the implicit reward needs the policy that training started from.",
                remedy="Give it (--reference).",
                field="reference",
            )
        self.policy, self.reference, self.beta = policy, reference, beta
        self._options = {"layout": layout, "batch_size": batch_size, "pad_token_id": pad_token_id}

    def score(self, groups: Sequence[Group]) -> Tensor:
        """[C] rewards; see ``Reward``."""
        now = cached_logps(self.policy, groups, **self._options)  # type: ignore[arg-type]
        if isinstance(self.reference, nn.Module):
            then = cached_logps(self.reference, groups, **self._options)  # type: ignore[arg-type]
        else:
            with self._at_reference():
                then = cached_logps(self.policy, groups, **self._options)  # type: ignore[arg-type]
        return implicit_reward(_flat(now), _flat(then), beta=self.beta)

    def _at_reference(self) -> AbstractContextManager[None]:
        if isinstance(self.reference, WeightSet):
            return self.reference.active()
        assert isinstance(self.policy, PeftModel)
        return self.policy.disable_adapter()


def _flat(values: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([value for group in values for value in group])
