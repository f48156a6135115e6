"""Two ways to decode with a key-value cache: rows of many lengths in buffers of our own, and rows of one length."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from tutelage.models.attention import attention_by_products
from tutelage.models.loading import model_body

__all__ = ["Decoding", "MixedLengths", "OneLength", "missing_arguments"]

# Prompt tokens that run at once: enough for large products; on a CPU few enough that activations stay near the core.
_CPU_PREFILL_TOKENS, _ACCELERATOR_PREFILL_TOKENS = 2**11, 2**14


def missing_arguments(base: PreTrainedModel) -> list[str]:
    """What the forward of the model's body would have to take for either way, and does not."""
    return [name for name in ("past_key_values", "use_cache") if not _takes(base, name)]


class Decoding(ABC):
    """Rows that grow by a token at a time.

    Attributes:
        hidden: [B, H] the last hidden state of each row.
    """

    hidden: Tensor

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep these rows, [n] indices in any order and number: fewer when some have finished, more for further draws."""

    @abstractmethod
    def step(self, tokens: Tensor) -> None:
        """Append a token to each row, [B] on any device; ``hidden`` is then that of the new tokens."""


class MixedLengths(Decoding):
    """Prompts of any lengths, padded on the left, and a cache that copies nothing when it grows.

    For models whose cache is keys and values of all tokens in every layer, and that take padding on the left.

    Args:
        base: the model, in evaluation mode.
        prompts: at least one.
        pad_token_id: no result depends on it.
    """

    def __init__(self, base: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_token_id: int = 0):
        self._base, self._body = base, model_body(base)
        self._positions = _takes(base, "position_ids")
        width = max(len(prompt) for prompt in prompts)
        tokens = _CPU_PREFILL_TOKENS if base.device.type == "cpu" else _ACCELERATOR_PREFILL_TOKENS
        rows = max(1, tokens // width)
        hidden, caches = [], []
        # A few prompts run at a time, which keeps activations small, and prompts are padded only to others of similar
        # length.
        for start in range(0, len(prompts), rows):
            input_ids, mask = _left_padded(prompts[start : start + rows], pad_token_id)
            caches.append(Cache(layer_class_to_replicate=DynamicLayer))
            with attention_by_products(base, input_ids.shape[1]):
                hidden.append(
                    self._run(input_ids, mask.to(base.device), caches[-1], mask.cumsum(1).sub(1).clamp(min=0))
                )
        layers = zip(*(cache.layers for cache in caches), strict=True)
        self._cache = Cache(layers=[_GrowingLayer.joined(parts, width) for parts in layers])
        self.hidden = torch.cat(hidden)
        self._mask = _left_padded(prompts, pad_token_id)[1].to(base.device)
        self._last = self._mask.sum(1) - 1

    def select(self, rows: Tensor) -> None:
        """See ``Decoding``."""
        rows = rows.to(self.hidden.device)
        self._cache.batch_select_indices(cast(Any, rows))
        self.hidden, self._mask, self._last = self.hidden[rows], self._mask[rows], self._last[rows]

    def step(self, tokens: Tensor) -> None:
        """See ``Decoding``."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        self._last = self._last + 1
        self.hidden = self._run(tokens[:, None], self._mask, self._cache, self._last[:, None])

    def _run(self, input_ids: Tensor, mask: Tensor, cache: Cache, position_ids: Tensor) -> Tensor:
        options = {"position_ids": position_ids.to(self._base.device)} if self._positions else {}
        return self._body(
            input_ids=input_ids.to(self._base.device),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **options,
        ).last_hidden_state[:, -1]


class OneLength(Decoding):
    """Prompts of one length without padding, and the cache that the model makes itself, of whatever kind.

    For models with recurrent or convolutional layers, whose states are no keys and values.

    Args:
        base: the model, in evaluation mode.
        prompts: at least one, all of one length.
        pad_token_id: has no effect.
    """

    def __init__(self, base: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_token_id: int = 0):
        self._base, self._body = base, model_body(base)
        names = ("attention_mask", "position_ids")
        self._options = {name for name in names if _takes(base, name, by_name=True)}
        self._length = len(prompts[0])
        with attention_by_products(base, self._length):
            self.hidden, self._cache = self._run(torch.tensor(prompts), None)

    def select(self, rows: Tensor) -> None:
        """See ``Decoding``."""
        rows = rows.to(self.hidden.device)
        # A cache of the model's own kind knows how to select; of transformers' layers, all can be put into an order.
        own = type(self._cache).batch_select_indices is not Cache.batch_select_indices
        (self._cache.batch_select_indices if own else self._cache.reorder_cache)(cast(Any, rows))
        self.hidden = self.hidden[rows]

    def step(self, tokens: Tensor) -> None:
        """See ``Decoding``."""
        self._length += 1
        self.hidden, self._cache = self._run(tokens[:, None], self._cache)

    def _run(self, input_ids: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        input_ids = input_ids.to(self._base.device)
        start, count = self._length - input_ids.shape[1], len(input_ids)
        options = {
            "attention_mask": torch.ones(count, self._length, dtype=torch.long, device=input_ids.device),
            "position_ids": torch.arange(start, self._length, device=input_ids.device).expand(count, -1),
        }
        outputs = self._body(
            input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in options.items() if name in self._options},
        )
        return outputs.last_hidden_state[:, -1], outputs.past_key_values


def _takes(base: PreTrainedModel, name: str, *, by_name: bool = False) -> bool:
    """Whether the forward of the model's body takes an argument; one that hands all on to another may."""
    parameters = inspect.signature(model_body(base).forward).parameters
    hands_on = "use_cache" not in parameters and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return name in parameters or (hands_on and not by_name)


def _left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    padding = [width - len(prompt) for prompt in prompts]
    ids = [[pad_token_id] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in padding]
    return torch.tensor(ids), torch.tensor(mask)


class _GrowingLayer(DynamicLayer):
    """Keys and values of one layer in a preallocated buffer: a step writes only its own token and copies nothing.

    transformers' dynamic layer concatenates, which copies the whole cache at each step.
    """

    keys: Tensor
    values: Tensor
    _buffers: tuple[Tensor, ...]

    @staticmethod
    def joined(layers: Sequence[DynamicLayer], width: int) -> _GrowingLayer:
        """The rows of several layer caches stacked, each left-padded to ``width`` tokens."""
        joined = _GrowingLayer()
        joined.lazy_initialization(cast(Tensor, layers[0].keys), cast(Tensor, layers[0].values))
        joined._buffers = tuple(
            _stacked([cast(Tensor, getattr(layer, name)) for layer in layers], width) for name in ("keys", "values")
        )
        joined.keys, joined.values = (buffer[:, :, :width] for buffer in joined._buffers)
        return joined

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            # Grow by half, at least 64: only a few copies per completion, and soon less than twice the memory.
            self._buffers = tuple(_grown(states, end + max(64, end // 2)) for states in (self.keys, self.values))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.keys.shape[2]
        self._buffers = tuple(_grown(states[indices], length + 64) for states in (self.keys, self.values))
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def _grown(states: Tensor, length: int) -> Tensor:
    buffer = states.new_empty(*states.shape[:2], length, states.shape[3])
    buffer[:, :, : states.shape[2]] = states
    return buffer


def _stacked(parts: Sequence[Tensor], width: int) -> Tensor:
    rows, (_, heads, _, size) = sum(len(part) for part in parts), parts[0].shape
    buffer, start = parts[0].new_zeros(rows, heads, width + 64, size), 0
    for part in parts:
        buffer[start : start + len(part), :, width - part.shape[2] : width] = part
        start += len(part)
    return buffer
