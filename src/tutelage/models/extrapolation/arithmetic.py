"""The arithmetic of ExPO on one weight, and a tally over all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Tally", "computed_in", "extrapolated", "squared_norm"]


def extrapolated(aligned: Tensor, start: Tensor, alpha: float, dtype: torch.dtype | None = None) -> Tensor:
    """θ₁ + α(θ₁ − θ₀), the formula of ExPO, for one weight.

    In float32, or in float64 where either weight is. Where both agree, the result is θ₁ itself. α = 0 gives θ₁ and α = −1 gives
    θ₀, bit for bit unless ``dtype`` rounds them.

    Args:
        aligned, start: θ₁ and θ₀, of one shape and of any floating types.
        alpha: how far beyond θ₁, in units of the way from θ₀ to it.
        dtype: of the result; by default that of ``aligned``.

    >>> extrapolated(torch.tensor([2.0, 5.0]), torch.tensor([1.0, 5.0]), 0.5)
    tensor([2.5000, 5.0000])
    """
    dtype = aligned.dtype if dtype is None else dtype
    if alpha in (0, -1):
        return (start if alpha else aligned).to(dtype)
    wide = computed_in(aligned, start)
    aligned = aligned.to(wide)
    return aligned.add(aligned - start.to(wide), alpha=alpha).to(dtype)


def computed_in(*weights: Tensor) -> torch.dtype:
    """float32, or float64 where a weight is."""
    return torch.float64 if any(weight.dtype is torch.float64 for weight in weights) else torch.float32


@dataclass(slots=True)
class Tally:
    """How far two models are apart, and what rounding did to what was made of them.

    Attributes:
        squared_distance: ‖θ₁ − θ₀‖² over the weights seen so far; of LoRA, of what it adds to the weights of the base.
        squared_rounding: squared norm of what rounding to the stored precision changed in whole weights.
        differs: whether any weight is not the same in both.
        rounds: whether any number that was computed could not be stored as it was.
    """

    squared_distance: float = 0.0
    squared_rounding: float = 0.0
    differs: bool = False
    rounds: bool = False

    def add(self, aligned: Tensor, start: Tensor, alpha: float, result: Tensor) -> None:
        """See one weight; arguments as for ``extrapolated``, and what it gave."""
        wide = computed_in(aligned, start)
        squared = squared_norm(aligned.to(wide) - start.to(wide))
        self.squared_distance += squared
        self.differs |= squared > 0
        exact = extrapolated(aligned, start, alpha, wide)
        self.squared_rounding += self.rounded(exact, result)

    def rounded(self, exact: Tensor, result: Tensor) -> float:
        """See what rounding made of a tensor; the squared norm of what it changed."""
        if result.dtype is exact.dtype:
            return 0.0
        squared = squared_norm(exact - result.to(exact.dtype))
        self.rounds |= squared > 0
        return squared

    @property
    def distance(self) -> float:
        """‖θ₁ − θ₀‖."""
        return math.sqrt(self.squared_distance)

    @property
    def rounding(self) -> float:
        """The norm of what rounding changed in whole weights, in units of the distance."""
        return math.sqrt(self.squared_rounding / self.squared_distance) if self.squared_distance else 0.0


def squared_norm(value: Tensor) -> float:
    """‖value‖² in float64."""
    norm = torch.linalg.vector_norm(value, dtype=torch.float64).item() if value.numel() else 0.0
    return norm * norm
