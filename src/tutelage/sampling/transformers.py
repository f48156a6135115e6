"""Sampling in the training process, from the current weights of the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import Cache, DynamicLayer

from tutelage.errors import NonFiniteLossError, UserError
from tutelage.models.attention import attention_by_products
from tutelage.models.head import LMHead
from tutelage.models.loading import base_causal_lm
from tutelage.models.memory import keep_freed_memory
from tutelage.models.modes import adapters_under_autocast, evaluation_mode
from tutelage.sampling.base import Sample, SamplingParams, uniforms

__all__ = ["TransformersSampler", "draw_tokens"]

# Logits that are turned into tokens at once: 4 rows of 262,144 float32 stay in the last-level cache of a CPU core.
_CPU_DRAW_ELEMENTS, _ACCELERATOR_DRAW_ELEMENTS = 2**20, 2**26
# The cumulative distribution is searched in two steps: over blocks of this many tokens, then inside one.
_BLOCK = 512
# Prompt tokens that run at once: enough for large products; on a CPU few enough that activations stay near the core.
_CPU_PREFILL_TOKENS, _ACCELERATOR_PREFILL_TOKENS = 2**11, 2**14


class TransformersSampler:
    """Draws completions from a causal language model of transformers, adapters included.

    On a CPU it asks the process to keep freed memory (``tutelage.models.memory``).

    Args:
        model: sampled with its current weights at each call, in evaluation mode.
        batch_size: sequences decoded in parallel. Affects speed and memory, not the samples.
        pad_token_id: pads prompts on the left; no sample depends on it.

    Raises:
        UserError: the model has no key-value cache that can be reduced to the unfinished rows.
    """

    def __init__(self, model: nn.Module, *, batch_size: int = 64, pad_token_id: int = 0):
        body = base_causal_lm(model).base_model
        missing = {"past_key_values", "position_ids"} - set(inspect.signature(body.forward).parameters)
        if missing:
            raise UserError(
                f"{type(body).__name__} cannot be sampled from: its forward takes no {' and no '.join(sorted(missing))}.",
                remedy="Use a transformer with a key-value cache.",
            )
        if base_causal_lm(model).device.type == "cpu":
            keep_freed_memory()
        self.model, self.batch_size, self.pad_token_id = model, batch_size, pad_token_id

    def take_weights(self, policy: nn.Module) -> None:
        """Nothing to do: the model is sampled from as it stands."""

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        num_samples: int = 1,
        rows: Sequence[int] | None = None,
        stage: int = 0,
        on_finished: Callable[[int, list[Sample]], None] | None = None,
    ) -> list[list[Sample]]:
        """See ``Sampler.sample``. Prompts of similar length are decoded together; finished rows leave the batch."""
        rows = range(len(prompts)) if rows is None else rows
        samples: list[list[Sample]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        prompts_a_batch = max(1, self.batch_size // num_samples)
        with evaluation_mode(self.model), adapters_under_autocast(self.model):
            for start in range(0, len(order), prompts_a_batch):
                places = order[start : start + prompts_a_batch]
                draws = range(num_samples)
                for first in range(0, num_samples, self.batch_size):
                    decoding = _Decoding.of(
                        [prompts[place] for place in places],
                        [rows[place] for place in places],
                        draws[first : first + self.batch_size],
                    )
                    for place, drawn in zip(places, self._decode(decoding, params, stage), strict=True):
                        samples[place] += drawn
                if on_finished:
                    for place in places:
                        on_finished(place, samples[place])
        return samples

    def _decode(self, batch: _Decoding, params: SamplingParams, stage: int) -> list[list[Sample]]:
        base = base_causal_lm(self.model)
        head, device = LMHead.of(base), base.device
        hidden, cache, attention_mask = self._prefill(batch.prompts)
        # The prompt ran once; from here on each of its draws is a row of its own.
        if len(batch.parents) > len(batch.prompts):
            parents = torch.from_numpy(batch.parents).to(device)
            cache.batch_select_indices(parents)
            hidden, attention_mask = hidden[parents], attention_mask[parents]
        last = attention_mask.sum(1) - 1
        live = np.arange(len(batch.rows))  # which draw each row of the tensors belongs to
        running = np.ones(len(live), dtype=bool)
        for position in range(params.max_completion_length):
            numbers = uniforms(params.seed, stage, batch.rows[live], batch.draws[live], position)
            tokens, logps = draw_tokens(head.raw_logits(hidden), numbers, transform=head.transform, params=params)
            running = batch.extend(live, running, tokens, logps, params.stop_ids)
            if not running.any() or position + 1 == params.max_completion_length:
                break
            # Removing rows copies the cache, so rows leave only once an eighth of the batch has finished.
            if running.sum() <= len(live) * 7 // 8:
                keep = torch.from_numpy(np.flatnonzero(running)).to(device)
                cache.batch_select_indices(keep)
                attention_mask, last, tokens = attention_mask[keep], last[keep], tokens[keep.to(tokens.device)]
                live, running = live[running], running[running]
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(live), 1)], dim=1)
            last = last + 1
            hidden = base.base_model(
                input_ids=tokens[:, None].to(device),
                attention_mask=attention_mask,
                position_ids=last[:, None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        return batch.samples()

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Cache, Tensor]:
        """Run each prompt once: its last hidden state, the cache, and the mask of what is no padding.

        A few prompts run at a time, which keeps activations small, and prompts are padded only to others of similar
        length.
        """
        base = base_causal_lm(self.model)
        width = max(len(prompt) for prompt in prompts)
        tokens = _CPU_PREFILL_TOKENS if base.device.type == "cpu" else _ACCELERATOR_PREFILL_TOKENS
        rows = max(1, tokens // width)
        hidden, caches = [], []
        for start in range(0, len(prompts), rows):
            input_ids, attention_mask = _left_padded(prompts[start : start + rows], self.pad_token_id)
            attention_mask = attention_mask.to(base.device)
            caches.append(Cache(layer_class_to_replicate=DynamicLayer))
            with attention_by_products(base, input_ids.shape[1]):
                outputs = base.base_model(
                    input_ids=input_ids.to(base.device),
                    attention_mask=attention_mask,
                    position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
                    past_key_values=caches[-1],
                    use_cache=True,
                )
            hidden.append(outputs.last_hidden_state[:, -1])
        layers = zip(*(cache.layers for cache in caches), strict=True)
        cache = Cache(layers=[_GrowingLayer.joined(parts, width) for parts in layers])
        return torch.cat(hidden), cache, _left_padded(prompts, self.pad_token_id)[1].to(base.device)


@dataclass(slots=True)
class _Decoding:
    """The sequences of one batch while they grow: draw d of prompt p is row ``p * len(draws) + d``."""

    prompts: list[Sequence[int]]
    parents: np.ndarray
    rows: np.ndarray
    draws: np.ndarray
    token_ids: list[list[int]]
    token_logps: list[list[float]]
    finished: list[bool]

    @staticmethod
    def of(prompts: list[Sequence[int]], rows: list[int], draws: Sequence[int]) -> _Decoding:
        parents = np.repeat(np.arange(len(prompts)), len(draws))
        return _Decoding(
            prompts=prompts,
            parents=parents,
            rows=np.asarray(rows, dtype=np.int64)[parents],
            draws=np.tile(np.asarray(draws, dtype=np.int64), len(prompts)),
            token_ids=[[] for _ in parents],
            token_logps=[[] for _ in parents],
            finished=[False for _ in parents],
        )

    def extend(
        self, live: np.ndarray, running: np.ndarray, tokens: Tensor, logps: Tensor, stop_ids: frozenset[int]
    ) -> np.ndarray:
        """Append a token to each running row; returns which rows still run."""
        for place, (index, token, logp) in enumerate(zip(live, tokens.tolist(), logps.tolist(), strict=True)):
            if running[place]:
                self.token_ids[index].append(token)
                self.token_logps[index].append(logp)
                self.finished[index] = token in stop_ids
        return running & ~np.asarray([self.finished[index] for index in live])

    def samples(self) -> list[list[Sample]]:
        made: list[list[Sample]] = [[] for _ in self.prompts]
        for parent, ids, logps, finished in zip(
            self.parents, self.token_ids, self.token_logps, self.finished, strict=True
        ):
            made[parent].append(Sample(tuple(ids), tuple(logps), finished))
        return made


def draw_tokens(
    logits_BV: Tensor,
    numbers_B: np.ndarray,
    *,
    params: SamplingParams,
    transform: Callable[[Tensor], Tensor] = Tensor.float,
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverse-CDF sampling, with one uniform number per row.

    Methods that need a random number per vocabulary entry (``torch.multinomial``, Gumbel noise) cost several times a
    decoding step with 262,144 tokens; here only a softmax and its block sums read the whole vocabulary.

    Args:
        logits_BV: [B, V], in any precision.
        numbers_B: [B] uniform numbers in [0, 1).
        params: temperature and filters.
        transform: from raw logits to float32 logits, applied to a few rows at a time.

    Returns:
        [B] tokens and [B] float32 log-probs (nats) under the distribution they were drawn from; at temperature 0, under
        the model's own.

    Raises:
        NonFiniteLossError: a row has a logit that is NaN or +∞, or none that is finite.
    """
    elements = _CPU_DRAW_ELEMENTS if logits_BV.device.type == "cpu" else _ACCELERATOR_DRAW_ELEMENTS
    rows = max(1, elements // logits_BV.shape[1])
    drawn = [
        _draw(transform(logits), torch.from_numpy(numbers).to(logits.device), params)
        for logits, numbers in zip(
            logits_BV.split(rows), np.split(numbers_B, range(rows, len(numbers_B), rows)), strict=True
        )
    ]
    tokens, logps = map(torch.cat, zip(*drawn, strict=True))
    if not torch.isfinite(logps).all():
        raise NonFiniteLossError(
            "the policy's logits are not finite, so nothing can be sampled from it.",
            remedy="Lower --learning_rate, or look for NaN in the weights.",
        )
    return tokens, logps


def _draw(logits: Tensor, numbers: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """[B] tokens and their log-probs, which are NaN where a row's logits are not finite."""
    if params.temperature == 0:
        tokens = logits.argmax(1, keepdim=True)
        return tokens[:, 0], logits.log_softmax(1).gather(1, tokens)[:, 0]
    probs = _filtered(logits, params).softmax(1)
    blocks = nn.functional.pad(probs, (0, -probs.shape[1] % _BLOCK)).view(len(probs), -1, _BLOCK)
    block_sums = blocks.sum(2).double()
    cumulative = block_sums.cumsum(1)
    threshold = numbers[:, None] * cumulative[:, -1:]  # which is one, but for rounding
    block = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=cumulative.shape[1] - 1)
    # Rounding must not select a block or a token of probability zero: the last possible one takes the remainder.
    block = torch.minimum(block, _last_positive(block_sums))
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0].double()
    remainder = (threshold - (cumulative.gather(1, block) - block_sums.gather(1, block))).clamp_(min=0)
    offset = torch.searchsorted(inside.cumsum(1), remainder, right=True).clamp_(max=_BLOCK - 1)
    offset = torch.minimum(offset, _last_positive(inside))
    tokens = (block * _BLOCK + offset).clamp_(max=probs.shape[1] - 1)  # NaN gives an index beyond the last
    return tokens[:, 0], probs.gather(1, tokens).log_()[:, 0]


def _filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    if params.temperature != 1:
        logits = logits / params.temperature
    no_ids = torch.empty(0)  # these warpers read only the scores, and keep the highest
    if params.top_k:
        logits = TopKLogitsWarper(params.top_k)(no_ids, logits)  # type: ignore[arg-type]
    if params.top_p < 1:
        logits = TopPLogitsWarper(params.top_p)(no_ids, logits)  # type: ignore[arg-type]
    return logits


def _last_positive(values: Tensor) -> Tensor:
    """[B, 1] index of the last positive value of each row."""
    return values.shape[1] - 1 - (values > 0).flip(1).int().argmax(1, keepdim=True)


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
