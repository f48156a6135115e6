"""The weights that a run started with, so that what the policy has become can be held against them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from peft import PeftModel
from torch import nn

from tutelage.models.weights import WeightSet

__all__ = ["Start"]


class Start:
    """Knows the weights that a run started with, as long as they can be known.

    Args:
        policy: the model being trained, with the weights of the start.
        new_adapter: its adapter was made for this run, so without it the policy may be what it started as.
        keep: hold a copy of the trained weights where there is no other way back. Ask for it before a checkpoint is loaded.
    """

    def __init__(self, policy: nn.Module, *, new_adapter: bool, keep: bool):
        self._policy = policy
        self._is_base = (
            new_adapter
            and isinstance(policy, PeftModel)
            # Some adapters begin with a change of the base (PiSSA, OLoRA, LoftQ): for them the base is not the start.
            and getattr(policy.active_peft_config, "init_lora_weights", None) in (True, "gaussian")
            # Biases of the base that are trained with it stay as they are trained where the adapter is off.
            and getattr(policy.active_peft_config, "bias", "none") == "none"
        )
        self.weights: WeightSet | None = None
        if keep:
            self.keep()

    def keep(self) -> None:
        """Hold a copy of the trained weights from now on, where there is no other way back. Call it before training."""
        if self.weights is None and not self._is_base:
            self.weights = WeightSet(self._policy)

    def share(self, weights: WeightSet) -> None:
        """Somebody else holds the start's weights: once is enough."""
        self.weights = weights

    def active(self, step: int) -> AbstractContextManager | None:
        """Within, the policy has the weights that it started with; None where they are known no more.

        Args:
            step: optimizer steps that the policy has taken.
        """
        if self.weights is not None:
            return self.weights.active()
        if self._is_base:
            return self._policy.disable_adapter()  # type: ignore[operator]
        return nullcontext() if step == 0 else None
