"""Sampling in the training process, from the current weights of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TopKLogitsWarper, TopPLogitsWarper

from tutelage.errors import NonFiniteLossError
from tutelage.models.head import LMHead
from tutelage.models.loading import base_causal_lm
from tutelage.models.memory import keep_freed_memory
from tutelage.models.modes import adapters_under_autocast, evaluation_mode
from tutelage.models.regimes import require_one_rope
from tutelage.sampling.base import Sample, SamplingParams, uniforms
from tutelage.sampling.decoding import Decoding, OneLength
from tutelage.sampling.merging import Merging
from tutelage.sampling.probe import probe_sampling

__all__ = ["TransformersSampler", "draw_tokens"]

# Logits that are turned into tokens at once: 4 rows of 262,144 float32 stay in the last-level cache of a CPU core.
_CPU_DRAW_ELEMENTS, _ACCELERATOR_DRAW_ELEMENTS = 2**20, 2**26
# The cumulative distribution is searched in two steps: over blocks of this many tokens, then inside one.
_BLOCK = 512


class TransformersSampler:
    """Draws completions from a causal language model of transformers, adapters included.

    On a CPU it asks the process to keep freed memory (``tutelage.models.memory``).

    Args:
        model: sampled with its current weights at each call, in evaluation mode.
        batch_size: sequences decoded in parallel. Affects speed and memory, not the samples.
        pad_token_id: pads prompts on the left; no sample depends on it.
        merge_adapters: decode with LoRA merged into a copy of the weights below it, where that serves (``Merging``).

    Raises:
        UserError: no way to decode gives the model's own log-probs (``probe_sampling``), or a rope changes within the
            lengths that ``sample`` is asked for.
    """

    def __init__(self, model: nn.Module, *, batch_size: int = 64, pad_token_id: int = 0, merge_adapters: bool = True):
        probe_sampling(model)
        if base_causal_lm(model).device.type == "cpu":
            keep_freed_memory()
        self.model, self.batch_size, self.pad_token_id = model, batch_size, pad_token_id
        self._merging = Merging(model) if merge_adapters else None

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
        """See ``Sampler.sample``. Prompts of similar length are decoded together; finished rows leave the batch.

        Raises:
            UserError: see the class.
        """
        rows = range(len(prompts)) if rows is None else rows
        samples: list[list[Sample]] = [[] for _ in prompts]
        longest = max(map(len, prompts), default=0) + params.max_completion_length
        require_one_rope(
            self.model, longest, what="prompt and completion may have", remedy="Lower --max_completion_length"
        )
        way = probe_sampling(self.model, longest).way

        def draw(places: Sequence[int], params: SamplingParams, draws: Sequence[int]) -> list[list[Sample]]:
            batch = _Batch.of([prompts[place] for place in places], [rows[place] for place in places], draws)
            return self._decode(batch, params, stage, way)

        def one_each(places: Sequence[int], params: SamplingParams) -> list[list[Sample]]:
            found: dict[int, list[Sample]] = {}
            for some in self._batches([len(prompts[place]) for place in places], 1, way):
                together = [places[index] for index in some]
                found |= zip(together, draw(together, params, [0]), strict=True)
            return [found[place] for place in places]

        with (
            evaluation_mode(self.model),
            adapters_under_autocast(self.model),
            self._merging.where_it_serves(prompts, params, one_each) if self._merging else nullcontext(),
        ):
            for places in self._batches([len(prompt) for prompt in prompts], num_samples, way):
                for first in range(0, num_samples, self.batch_size):
                    draws = range(num_samples)[first : first + self.batch_size]
                    for place, drawn in zip(places, draw(places, params, draws), strict=True):
                        samples[place] += drawn
                if on_finished:
                    for place in places:
                        on_finished(place, samples[place])
        return samples

    def _batches(self, lengths: Sequence[int], num_samples: int, way: type[Decoding]) -> Iterator[list[int]]:
        """Places of the prompts that are decoded together: of similar length, or of one where the way demands it."""
        prompts_a_batch = max(1, self.batch_size // num_samples)
        order = sorted(range(len(lengths)), key=lambda index: lengths[index])
        alike = (list(group) for _, group in groupby(order, key=lambda index: lengths[index]))
        for places in alike if way is OneLength else [order]:
            yield from (places[start : start + prompts_a_batch] for start in range(0, len(places), prompts_a_batch))

    def _decode(self, batch: _Batch, params: SamplingParams, stage: int, way: type[Decoding]) -> list[list[Sample]]:
        base = base_causal_lm(self.model)
        head, decoding = LMHead.of(base), way(base, batch.prompts, self.pad_token_id)  # type: ignore[call-arg]
        # The prompt ran once; from here on each of its draws is a row of its own.
        if len(batch.parents) > len(batch.prompts):
            decoding.select(torch.from_numpy(batch.parents))
        live = np.arange(len(batch.rows))  # which draw each row of the tensors belongs to
        running = np.ones(len(live), dtype=bool)
        for position in range(params.max_completion_length):
            numbers = uniforms(params.seed, stage, batch.rows[live], batch.draws[live], position)
            logits = head.raw_logits(decoding.hidden)
            tokens, logps = draw_tokens(logits, numbers, transform=head.transform, params=params)
            running = batch.extend(live, running, tokens, logps, params.stop_ids)
            if not running.any() or position + 1 == params.max_completion_length:
                break
            # Removing rows copies the cache, so rows leave only once an eighth of the batch has finished.
            if running.sum() <= len(live) * 7 // 8:
                keep = torch.from_numpy(np.flatnonzero(running))
                decoding.select(keep)
                tokens = tokens[keep.to(tokens.device)]
                live, running = live[running], running[running]
            decoding.step(tokens)
        return batch.samples()


@dataclass(slots=True)
class _Batch:
    """The sequences of one batch while they grow: draw d of prompt p is row ``p * len(draws) + d``."""

    prompts: list[Sequence[int]]
    parents: np.ndarray
    rows: np.ndarray
    draws: np.ndarray
    token_ids: list[list[int]]
    token_logps: list[list[float]]
    finished: list[bool]

    @staticmethod
    def of(prompts: list[Sequence[int]], rows: list[int], draws: Sequence[int]) -> _Batch:
        parents = np.repeat(np.arange(len(prompts)), len(draws))
        return _Batch(
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
