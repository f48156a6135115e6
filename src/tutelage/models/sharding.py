"""Weights of which each process holds a part (torch's ``fully_shard``, FSDP2): whole again, and assigned to.

A sharded model is a ``FSDPModule``, and its parameters are ``DTensor``s while it stands still. Nothing here changes a model of
which this process holds all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from tutelage.models.loading import base_causal_lm

__all__ = ["as_shards", "assign", "gathered", "is_sharded", "parts", "shard_like", "unsharded", "whole"]

_whole: WeakSet[nn.Module] = WeakSet()  # models within ``unsharded``


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of its weights."""
    return isinstance(model, FSDPModule)


def parts(model: nn.Module) -> list[FSDPModule]:
    """The modules whose weights come and go together, the model among them."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Context in which every process holds all weights of a sharded model, in the precision that they compute in.

    All processes enter and leave it together. What a pass does within needs no other process. Weights that are changed within
    are not kept. Nesting has no further effect, nor has it on a model that is not sharded.

    The model has run a forward before, in which torch finds its parts.
    """
    if not isinstance(model, FSDPModule) or model in _whole:
        yield
        return
    freed = _freed_after_forward(model)
    model.set_reshard_after_forward(False)
    _unshard(model)
    _whole.add(model)
    try:
        yield
    finally:
        _whole.discard(model)
        model.reset_iter_state()
        for part in freed:
            part.set_reshard_after_forward(True, recurse=False)


@contextmanager
def as_shards(model: nn.Module) -> Iterator[None]:
    """Context in which the parameters of a sharded model are its shards, also within ``unsharded``."""
    if not isinstance(model, FSDPModule) or model not in _whole:
        yield
        return
    model.reset_iter_state()
    try:
        yield
    finally:
        _unshard(model)


def _unshard(model: nn.Module) -> None:
    for part in parts(model):
        part.unshard()


def _freed_after_forward(model: nn.Module) -> list[FSDPModule]:
    """The parts whose weights are not needed from their forward to their backward: layers, and an embedding by itself.

    accelerate keeps the others whole in between (root, last norm and head), and so does this.
    """
    base = base_causal_lm(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    is_tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)
    return [
        part
        for part in parts(model)
        if part is not model
        and (any(True for _ in cast(nn.Module, part).children()) or (part is embedding and not is_tied))
    ]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is sharded: then every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors for the first process to write, on the host; the others get empty ones. All call it.

    Tensors that are not sharded come back as they are. What is stored once, as tied weights are, is gathered once.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    known: dict[int, Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            place = tensor.to_local().data_ptr()
            full = known.get(place) if place else None
            if full is None:
                full = whole(tensor.detach())
                full = full.cpu() if is_first else full.new_empty(0, device="cpu")
                known[place] = full
            tensor = full
        found[name] = tensor
    return found


def shard_like(value: Tensor, like: DTensor) -> Tensor:
    """This process's part of a whole tensor, cut as another one is, in its precision and on its device."""
    value = value.detach().to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter the values of a whole tensor; of a sharded one, this process its part."""
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(shard_like(value, parameter))
    else:
        parameter.copy_(value)
