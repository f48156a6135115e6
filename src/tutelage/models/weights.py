"""Sets of values for a model's trainable weights: hold, swap, save and fingerprint them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from tutelage.files import replacing_alone

__all__ = [
    "WeightSet",
    "fingerprint",
    "load_weights",
    "save_weights",
]


class WeightSet:
    """Another set of values for a model's trainable weights: π_0's, or those of a reward on the same frozen base.

    Holds only the trainable weights: a few megabytes with adapters, which share the frozen base; as much as the model
    itself when all parameters are trained.

    Attributes:
        parameters: the set's own parameters, for an optimizer; gradients of a backward pass within ``active`` land here.
    """

    def __init__(self, model: nn.Module):
        self._slots = [p for p in model.parameters() if p.requires_grad]
        self.parameters = [nn.Parameter(p.detach().clone()) for p in self._slots]
        self._is_active = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the model has this set's weights. Tensors are swapped, not copied.

        Run the backward pass inside too, because autograd reads the weights then. Nesting has no further effect.
        """
        if self._is_active:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        self._is_active = not self._is_active
        torch.clear_autocast_cache()  # autocast knows a weight by its identity, not by its values
        for slot, parameter in zip(self._slots, self.parameters, strict=True):
            slot.data, parameter.data = parameter.data, slot.data
            slot.grad, parameter.grad = parameter.grad, slot.grad


def save_weights(parameters: Iterable[nn.Parameter], path: Path) -> None:
    """Write weights in order, atomically; ``load_weights`` reads them."""
    with replacing_alone(path) as temporary:
        save_file({str(index): p.detach().cpu().contiguous() for index, p in enumerate(parameters)}, temporary)


@torch.no_grad()
def load_weights(parameters: Iterable[nn.Parameter], path: Path) -> None:
    """Load weights that ``save_weights`` wrote, in the same order."""
    state = load_file(path)
    for index, parameter in enumerate(parameters):
        parameter.copy_(state[str(index)])


def fingerprint(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """A short name for the state of weights: equal states have equal names, and others other ones.

    Every byte is hashed (SHA-256), with name, type and shape. Frozen weights, which training does not change, are hashed once per
    process: as long as 64 of a tensor's numbers are what they were, its earlier hash is taken.

    Costs a second per 1.5 GB of weights on a processor with SHA instructions, and for weights on a GPU the copy to the host besides.

    Args:
        parameters: names and weights, as ``named_parameters`` of a module gives them.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(_hash(parameter) if parameter.requires_grad else _frozen_hash(parameter))
    return digest.hexdigest()[:16]


_CHUNK = 2**26  # bytes that are on the host at a time
_frozen = WeakTensorKeyDictionary()  # of each frozen weight: 64 of its numbers, and its hash


def _hash(parameter: nn.Parameter) -> bytes:
    digest = hashlib.sha256()
    for chunk in parameter.detach().flatten().view(torch.uint8).split(_CHUNK):
        digest.update(chunk.cpu().numpy().data)
    return digest.digest()


def _frozen_hash(parameter: nn.Parameter) -> bytes:
    flat = parameter.detach().flatten()
    probe = flat[:: max(1, flat.numel() // 64)][:64].contiguous().view(torch.uint8).cpu().numpy().tobytes()
    if parameter not in _frozen or _frozen[parameter][0] != probe:
        _frozen[parameter] = probe, _hash(parameter)
    return _frozen[parameter][1]
