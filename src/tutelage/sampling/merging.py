"""Whether to sample with adapters merged into the layers: always where that changes nothing but rounding, else as measured."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from tutelage.errors import NonFiniteLossError
from tutelage.models.loading import base_causal_lm
from tutelage.models.merging import MergedAdapters
from tutelage.models.modes import exact_float32
from tutelage.models.plain import agree, is_exact, plain_logps, tolerance
from tutelage.models.weights import fingerprint
from tutelage.sampling.base import Sample, SamplingParams

__all__ = ["GAP_RATIO", "TOLERANCE", "Merging"]

logger = logging.getLogger(__name__)

TOLERANCE = 0.01
"""In low precision merged adapters serve while log-probs of samples differ by no more than this from those of the model as it is
(mean, nats per token): so near, a sampler's log-probs pass for the policy's (``--sampler_logps_tolerance``)."""

GAP_RATIO = 1.5
"""Nor need they be nearer than so many times what rounding makes of the same weights, decoded and in one forward pass: samples are
that far from the trainer's policy in any case."""

_PROBED, _TOKENS = 8, 32  # samples that are drawn to find out, and tokens of each at most
_EXACT_PROBED, _EXACT_TOKENS = 2, 4


@dataclass(slots=True)
class _Known:
    """Of a model: which adapters were tried last, whether they serve, and what was said last."""

    adapters: str = ""
    serve: bool = False
    said: str = ""


_known: WeakKeyDictionary[PreTrainedModel, _Known] = WeakKeyDictionary()

Draw = Callable[[Sequence[int], SamplingParams], list[list[Sample]]]
"""From places among the prompts to a sample of each."""


class Merging:
    """Decides for one model, each time that its adapters are others, and says in the log what was found.

    A merged weight W + BA is rounded to the precision of W. In float32 that is the rounding of any other order of computing.
    In bfloat16, updates below 1/256 of a weight are lost in part, and how much of the policy that takes is measured.

    Args:
        model: that samples are drawn from.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._known = _known.setdefault(base_causal_lm(model), _Known())

    @contextmanager
    def where_it_serves(self, prompts: Sequence[Sequence[int]], params: SamplingParams, draw: Draw) -> Iterator[bool]:
        """Context in which adapters are merged if that serves; says whether they are. Afterwards all weights are what they were.

        Args:
            prompts: the first are those that samples are drawn for to find out.
            params: how completions are drawn; those to find out, at temperature 1 and without filters.
            draw: with the model as it stands when it is called.
        """
        adapters = MergedAdapters.of(self.model)
        if not adapters.layers:
            if adapters.left:
                self._say(f"sampling with adapters as they are: {_counted(adapters)}")
            yield False
            return
        base = base_causal_lm(self.model)
        size = sum(adapters.bytes_needed().values())
        if not adapters.fits():
            self._say(
                f"sampling with adapters as they are: merging them takes {size / 1e9:.1f} GB, more than half of what is free"
            )
            yield False
            return
        if len(prompts) < (1 if is_exact(base) else _PROBED):
            yield False  # too few samples to measure on, and too little to gain
            return
        with adapters.merged():
            serves = bool(adapters.layers) and self._serves(base, adapters, prompts, params, draw)
            if not serves:
                adapters.put_back()
            yield serves

    def _serves(
        self,
        base: PreTrainedModel,
        adapters: MergedAdapters,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        draw: Draw,
    ) -> bool:
        # Merging exactly or not at all depends on the kinds of layers; what is lost to rounding, on the values too.
        name = "exact" if is_exact(base) else fingerprint(_adapter_weights(adapters))
        name += f" {len(adapters.layers)} {sorted({n for layer in adapters.layers for n in layer.merged_adapters})}"
        if self._known.adapters != name:
            gap, allowed = self._gap(base, adapters, prompts, params, draw)
            self._known.adapters, self._known.serve = name, gap <= allowed
            how = "merged into" if gap <= allowed else "beside"
            found = f"sampling with adapters {how} {len(adapters.layers)} layers"
            logger.info("%s: log-probs differ by %.2g nats per token (at most %.2g)", found, gap, allowed)
            if adapters.left:
                self._say(f"some adapters stay as they are: {_counted(adapters)}")
        return self._known.serve

    @staticmethod
    def _gap(
        base: PreTrainedModel,
        adapters: MergedAdapters,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        draw: Draw,
    ) -> tuple[float, float]:
        """How far log-probs are from the model's as it is without merging, and how far they may be (nats per token)."""
        exact = is_exact(base)
        count, tokens = (_EXACT_PROBED, _EXACT_TOKENS) if exact else (_PROBED, _TOKENS)
        places = range(min(count, len(prompts)))
        length = min(tokens, params.max_completion_length)
        plain_params = replace(params, temperature=1.0, top_k=0, top_p=1.0, max_completion_length=length)
        try:
            drawn = draw(places, plain_params)
        except NonFiniteLossError:  # a sum may overflow in float16; what is wrong without merging, sampling will say
            return math.nan, 0.0
        rows = [(prompts[place], sample.token_ids) for place, (sample,) in zip(places, drawn, strict=True)]
        sampled_N = torch.tensor([logp for (sample,) in drawn for logp in sample.token_logps])

        def plain() -> torch.Tensor:
            return torch.cat([plain_logps(base, *row) for row in rows]).cpu()

        if exact:
            with exact_float32():
                merged_N = plain()
                with adapters.set_aside():
                    truth_N = plain()
            return agree(base, merged_N, truth_N), tolerance(base, truth_N)
        merged_N = plain()
        with adapters.set_aside():
            truth_N = plain()
        return agree(base, sampled_N, truth_N), max(TOLERANCE, GAP_RATIO * agree(base, sampled_N, merged_N))

    def _say(self, line: str) -> None:
        if line != self._known.said:
            self._known.said = line
            logger.info(line)


def _counted(adapters: MergedAdapters) -> str:
    return "; ".join(f"{count} layers, as {reason}" for reason, count in adapters.left.items())


def _adapter_weights(adapters: MergedAdapters) -> Iterator[tuple[str, nn.Parameter]]:
    for index, layer in enumerate(adapters.layers):
        for name, parameter in cast(nn.Module, layer).named_parameters():
            if not name.startswith("base_layer."):
                yield f"{index} {name}", parameter
