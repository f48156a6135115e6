"""An estimate of the floating-point operations of a run, counted where tokens pass through the model.

A forward pass takes 2 operations per parameter and token, a forward and backward pass 6 (Kaplan et al. 2020, arXiv
2001.08361). The parameters are those of all layers and of the head, once; the embedding, which is looked up, is left
out. Attention scores, the optimizer and recomputed activations are not in it, and of an adapter on a frozen base, which
has no gradients of its own, the backward pass takes less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tutelage.models.loading import base_causal_lm, model_body

__all__ = ["FORWARD", "FORWARD_AND_BACKWARD", "count_passes", "counted", "parameters_per_token"]

FORWARD, FORWARD_AND_BACKWARD = 2, 6


def parameters_per_token(model: nn.Module) -> int:
    """Parameters that each token meets: all but the embedding, with the head once, whether it is tied or not."""
    base = base_causal_lm(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", ...)
    return base.num_parameters(exclude_embeddings=True) + (head.weight.numel() if tied else 0)  # type: ignore[union-attr]


def count_passes(model: nn.Module, count: Callable[..., None]) -> RemovableHandle:
    """From now on, what passes through the body of a model is counted, padding included.

    Args:
        model: with a head of any kind.
        count: called with the operations of each forward pass, and whether it ``trains``.

    Returns:
        what ends it.
    """
    body = model_body(base_causal_lm(model))
    return body.register_forward_pre_hook(_Counter(parameters_per_token(model), count), with_kwargs=True)


@contextmanager
def counted(model: nn.Module, count: Callable[..., None]) -> Iterator[None]:
    """The same, within: for a model that others use too."""
    handle = count_passes(model, count)
    try:
        yield
    finally:
        handle.remove()


class _Counter:
    """A hook that counts a forward pass. In a copy of the model, whose work is none of the run's, it counts nothing."""

    def __init__(self, parameters: int, count: Callable[..., None]):
        self.parameters, self.count = parameters, count

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        if given is None:
            return
        trains = torch.is_grad_enabled()
        tokens = given.shape[0] * given.shape[1]
        self.count((FORWARD_AND_BACKWARD if trains else FORWARD) * self.parameters * tokens, trains=trains)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Counter:
        return _Counter(self.parameters, _nothing)


def _nothing(operations: float, *, trains: bool) -> None:
    """Counts nothing."""
