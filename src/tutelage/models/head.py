"""The language-model head, and log-probs of targets under it, computed in blocks of the vocabulary."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

__all__ = ["LMHead", "head_logps", "in_computing_precision", "in_row_chunks", "vocab_block_size", "vocab_blocks"]

# Logits per block. On a CPU a block stays in the last-level cache between the matrix products; an accelerator needs
# large matrix products.
_CPU_ELEMENTS, _ACCELERATOR_ELEMENTS = 2**21, 2**26
# Columns of a block are a multiple of this: kernels for matrix products are slow on sizes that are not a multiple of 8,
# and their tiles are 64 to 256 wide.
_BLOCK_MULTIPLE = 256
# Logits of a few tokens over all of the vocabulary, for a head that cannot be read in blocks.
_WHOLE_ELEMENTS = 2**25

# Fields of transformers' configs that say what becomes of the head's output. One that is not here, the probe of the layout
# refuses.
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, slots=True)
class LMHead:
    """The last linear layer and what the architecture does to its output: cap · tanh(scale · (W h + b) / cap)."""

    module: nn.Module
    scale: float
    softcap: float | None

    @staticmethod
    def of(base: PreTrainedModel) -> LMHead:
        config = base.config.get_text_config()

        def given(names: tuple[str, ...]) -> list[float]:
            return [float(value) for name in names if (value := getattr(config, name, None))]

        module = cast(nn.Module, base.get_output_embeddings())
        scale = math.prod(given(_FACTORS)) / math.prod(given(_DIVISORS))
        return LMHead(module, scale, next(iter(given(_SOFTCAPS)), None))

    @property
    def vocab_size(self) -> int:
        """V, the number of logits."""
        return cast(Tensor, self.module.weight).shape[0]

    @property
    def is_linear(self) -> bool:
        """True for a plain linear layer without adapters, be it sharded (``fully_shard`` makes a class of its own of it).

        Of a sharded head the blocks are rows of the whole weight: ``head_logps`` gathers it, because a head that is read and
        not called has no hook that would, and torch frees it at the end of the backward pass. Call it within the model's
        forward (``training.parallel.call_within``) or within ``models.sharding.unsharded``.
        """
        kind = type(self.module)
        return kind is nn.Linear or (issubclass(kind, FSDPModule) and kind.__bases__[-1] is nn.Linear)

    def raw_logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V] output of the linear layer in the model's precision; ``transform`` turns it into logits."""
        return self.module(hidden_NH)

    def transform(self, raw_NV: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, V] logits in ``dtype`` from the linear layer's output."""
        logits_NV = raw_NV.to(dtype)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV

    def damping(self, logits: Tensor) -> Tensor | None:
        """∂ logits / ∂ (scale · raw), of the logits' shape; None where it is 1 everywhere."""
        return None if self.softcap is None else 1 - (logits / self.softcap) ** 2

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V] float32."""
        return self.transform(self.raw_logits(hidden_NH))

    def detached(self) -> LMHead:
        """The head as it is now: without gradient, without dropout, and without a copy of its weights.

        Trained parameters are replaced by views of their present values. So the result keeps the values of a set of
        weights (``WeightSet.active``) after the model got its own back, until an optimizer steps on that set in place.
        """
        memo = {
            id(p): nn.Parameter(p.detach(), requires_grad=False) if p.requires_grad else p
            for p in self.module.parameters()
        }
        return replace(self, module=copy.deepcopy(self.module, memo).eval())


def vocab_block_size(num_tokens: int, device_type: str) -> int:
    """Tokens of the vocabulary per block: a multiple of 256, for about 2²¹ logits on a CPU and 2²⁶ elsewhere.

    Args:
        num_tokens: N, rows of the block of logits.
        device_type: "cpu", "cuda" and so on.
    """
    elements = _CPU_ELEMENTS if device_type == "cpu" else _ACCELERATOR_ELEMENTS
    return max(1, elements // max(1, num_tokens) // _BLOCK_MULTIPLE) * _BLOCK_MULTIPLE


def in_computing_precision(hidden_NH: Tensor) -> Tensor:
    """Hidden states in autocast's precision where that is on, else as they are."""
    device_type = hidden_NH.device.type
    if torch.is_autocast_enabled(device_type):
        return hidden_NH.to(torch.get_autocast_dtype(device_type))
    return hidden_NH


def head_logps(head: LMHead, hidden_NH: Tensor, targets_N: Tensor, *, block_size: int | None = None) -> Tensor:
    """Log-prob of each target, without ever building an N × V tensor.

    Args:
        hidden_NH: last hidden states.
        targets_N: token ids.
        block_size: tokens of the vocabulary that are read at once; by default ``vocab_block_size``.

    Returns:
        [N] float32 (nats); differentiable with respect to the hidden states and the head.
    """
    if head.is_linear:
        linear = cast(nn.Linear, head.module)
        if isinstance(linear, FSDPModule):
            linear.unshard()
        hidden_NH = in_computing_precision(hidden_NH)
        block_size = block_size or vocab_block_size(len(hidden_NH), hidden_NH.device.type)
        return cast(Tensor, _HeadLogps.apply(hidden_NH, linear.weight, linear.bias, targets_N, head, block_size))

    def chunk_logps(hidden: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(head.logits(hidden), targets, reduction="none")

    return in_row_chunks(chunk_logps, head.vocab_size, hidden_NH, targets_N)


def in_row_chunks(function: Callable[..., Tensor], vocab_size: int, *tensors: Tensor) -> Tensor:
    """``function`` of a few tokens and all of the vocabulary at a time, for a head that cannot be read in blocks.

    A head with an adapter, for example, runs as it is. Activation checkpointing keeps one chunk's logits at a time.

    Args:
        function: of the chunks of ``tensors``, [n, ...] each, to [n].
        tensors: [N, ...] each.

    Returns:
        [N].
    """
    rows = max(16, _WHOLE_ELEMENTS // vocab_size)
    chunks = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([cast(Tensor, checkpoint(function, *chunk, use_reentrant=False)) for chunk in chunks])
    return torch.cat([function(*chunk) for chunk in chunks])


class _HeadLogps(torch.autograd.Function):
    """log p(y) = z_y − log Σ_v exp z_v with z = W h, by online softmax (as FlashAttention, arXiv 2205.14135).

    We keep a running maximum and sum (online softmax) and discard each block. ∂ log p(y)/∂h = W_y − Σ_v p_v W_v, times
    the gradient from above, which is one factor per token. So the same pass sums Σ_v p_v W_v, and a frozen head costs two
    matrix products. A head that is trained reads its blocks again in backward.
    """

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, bias_V, targets_N, head: LMHead, block_size: int) -> Tensor:  # type: ignore[override]
        is_trained = any(ctx.needs_input_grad[1:3])
        highest_N1 = hidden_NH.new_full((len(hidden_NH), 1), -torch.inf, dtype=torch.float32)
        total_N1, chosen_N1 = torch.zeros_like(highest_N1), torch.zeros_like(highest_N1)
        mean_NH = None
        if ctx.needs_input_grad[0] and not is_trained:
            mean_NH = torch.zeros_like(hidden_NH, dtype=torch.float32)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for block, weight, logits in vocab_blocks(head, hidden_NH, weight_VH, bias_V, block_size):
                inside_N1, places_N1 = _places(targets_N, block)
                chosen_N1 = torch.where(inside_N1, logits.gather(1, places_N1), chosen_N1)
                higher_N1 = torch.maximum(highest_N1, logits.amax(1, keepdim=True))
                shrink_N1 = (highest_N1 - higher_N1).exp_()
                damping = head.damping(logits)
                exponentials = logits.sub_(higher_N1).exp_()
                total_N1 = total_N1 * shrink_N1 + exponentials.sum(1, keepdim=True)
                highest_N1 = higher_N1
                if mean_NH is not None:
                    if damping is not None:
                        exponentials *= damping
                    mean_NH.mul_(shrink_N1).add_(exponentials.to(hidden_NH.dtype) @ weight)
        log_total_N1 = highest_N1 + total_N1.log()
        ctx.head, ctx.block_size, ctx.slopes_NH = head, block_size, None
        if mean_NH is not None:
            own_NH = weight_VH[targets_N].float()
            if (damping := head.damping(chosen_N1)) is not None:
                own_NH *= damping
            ctx.slopes_NH = mean_NH.div_(-total_N1).add_(own_NH).mul_(head.scale).to(hidden_NH.dtype)
        elif is_trained:
            ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, log_total_N1)
        return (chosen_N1 - log_total_N1)[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N: Tensor):  # type: ignore[override]
        if ctx.slopes_NH is not None:
            return (ctx.slopes_NH * grad_N[:, None]).to(ctx.slopes_NH.dtype), None, None, None, None, None
        hidden_NH, weight_VH, bias_V, targets_N, log_total_N1 = ctx.saved_tensors
        hidden_grad_NH = torch.zeros_like(hidden_NH, dtype=torch.float32)
        weight_grad_VH = torch.empty_like(weight_VH)
        bias_grad_V = None if bias_V is None else torch.empty_like(bias_V)
        factor_N1 = ctx.head.scale * grad_N[:, None]
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for block, weight, logits in vocab_blocks(ctx.head, hidden_NH, weight_VH, bias_V, ctx.block_size):
                inside_N1, places_N1 = _places(targets_N, block)
                damping = ctx.head.damping(logits)
                probs = logits.sub_(log_total_N1).exp_()
                slopes = probs.scatter_add_(1, places_N1, -inside_N1.float()).mul_(-factor_N1)
                if damping is not None:
                    slopes *= damping
                if bias_grad_V is not None:
                    bias_grad_V[block] = slopes.sum(0)
                slopes = slopes.to(hidden_NH.dtype)
                hidden_grad_NH += slopes @ weight
                weight_grad_VH[block] = slopes.T @ hidden_NH
        return hidden_grad_NH.to(hidden_NH.dtype), weight_grad_VH, bias_grad_V, None, None, None


def vocab_blocks(
    head: LMHead,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    size: int,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """One block of the vocabulary after another: where it is, its weights, and its logits [N, size] in ``dtype``."""
    for start in range(0, len(weight_VH), size):
        block = slice(start, min(start + size, len(weight_VH)))
        weight = weight_VH[block].to(hidden_NH.dtype)
        bias = None if bias_V is None else bias_V[block].to(hidden_NH.dtype)
        yield block, weight, head.transform(F.linear(hidden_NH, weight, bias), dtype)


def _places(targets_N: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """[N, 1] whether each target is in the block, and its position there (arbitrary if it is not)."""
    places_N1 = (targets_N - block.start)[:, None]
    last = block.stop - block.start - 1
    return (places_N1 >= 0) & (places_N1 <= last), places_N1.clamp(0, last)
