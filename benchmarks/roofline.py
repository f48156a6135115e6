"""The least that a training step or a decoding can take: what its mathematics needs, at rates measured on this machine.

    python -m benchmarks.roofline step '{"model_path": "…"}'

prints a lower bound (roofline) and what it is made of, as JSON. Operations are those of matrix products, a multiplication and an addition
counting two; what is elementwise (norms, softmax, the optimizer) costs nothing here, so a lower bound is out of reach, and the
question is how far.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from benchmarks.workloads import Work, adapter, groups
from tutelage.groups import Group

__all__ = [
    "LOWER_BOUNDS",
    "PEAKS",
    "Operations",
    "attention_pairs",
    "bandwidth",
    "decoding_lower_bound",
    "linear_layers",
    "matmul_rate",
    "measured_lower_bound",
    "nominal_peak",
    "running",
    "sft_lower_bound",
    "step_lower_bound",
    "training_operations",
]

_BYTES = 2  # of a number: weights, keys and values in bfloat16
_READS_EMBEDDING = re.compile(r"layers\.0\.self_attn\.[qkv]_proj$")


# --- what the mathematics needs -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operations:
    """Floating-point operations: of the body's linear layers and their adapters, of attention, and of the head."""

    body: int
    attention: int
    head: int


def linear_layers(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every linear layer of the body, by name."""
    with torch.device("meta"):
        body = AutoModelForCausalLM.from_config(config).base_model
    return {
        name: (module.in_features, module.out_features)
        for name, module in body.named_modules()
        if isinstance(module, nn.Linear)
    }


def attention_pairs(group: Group, window: int | None = None) -> int:
    """Pairs of a token and a token it attends to, in the shared-prefix layout.

    Positions restart after the prompt for each completion, so a token sees what it would see if the completion stood
    alone; the prompt counts once.
    """
    start = len(group.prompt_ids)
    ends = (start + len(completion.token_ids) for completion in group.completions)
    prompt = _causal_pairs(start, window)
    return prompt + sum(_causal_pairs(end, window) - prompt for end in ends)


def _causal_pairs(length: int, window: int | None) -> int:
    """Σ min(i + 1, window) over the positions i of a sequence."""
    seen = min(length, window or length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def training_operations(config: PreTrainedConfig, step: Sequence[Group], *, rank: int | None) -> Operations:
    """Operations of one optimizer step, forward and backward.

    T tokens through a weight of I inputs and O outputs take 2·T·I·O operations forward, as many again for the gradient of
    the input and as many again for the gradient of the weight, each where it is needed::

        body       T: all tokens, each prompt once; weights have gradients where all parameters are trained
        adapters   I × r and r × O beside each linear layer of the body; weights have gradients
        attention  4 · heads · head_dim · pairs forward (scores, then values); twice that backward, a gradient for each
                   side of the two products. What flash attention recomputes is its own choice and not counted.
        head       T: completion tokens, I: H, O: V; weights have gradients where all parameters are trained

    Where only adapters are trained the embedding needs no gradient, so the inputs of the first layer's query, key and
    value need none.

    Args:
        rank: r of the adapters; None where all parameters are trained.
    """
    tokens, full = sum(map(len, step)), rank is None
    body = 0
    for name, (inputs, outputs) in linear_layers(config).items():
        needs_input_gradient = full or not _READS_EMBEDDING.search(name)
        body += 2 * tokens * inputs * outputs * (1 + needs_input_gradient + full)
        if rank is not None:
            body += 2 * tokens * inputs * rank * (2 + needs_input_gradient) + 6 * tokens * rank * outputs
    pairs = sum(attention_pairs(group, window) for group in step for window in _windows(config))
    attention = 3 * _attention(config) * pairs
    head = 2 * _completion_tokens(step) * config.hidden_size * config.vocab_size * (2 + full)
    return Operations(body, attention, head)


def running(sequences: int, most: int, tokens: float) -> list[float]:
    """How many of ``sequences`` have a token at each position, if each ends with the same chance at every token.

    Args:
        most: tokens after which a sequence is truncated.
        tokens: of all sequences together; they decide the chance.

    >>> [round(left, 2) for left in running(8, most=3, tokens=14)]
    [8.0, 4.0, 2.0]
    """
    low, high = 0.0, 1.0
    for _ in range(50):  # bisection: the more go on, the more tokens
        going_on = (low + high) / 2
        if sequences * sum(going_on**position for position in range(most)) < tokens:
            low = going_on
        else:
            high = going_on
    return [sequences * low**position for position in range(most)]


def _attention(config: PreTrainedConfig) -> int:
    """Operations of scores and values for a pair of tokens in one layer."""
    return 4 * config.num_attention_heads * _head_dim(config)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """How many tokens each layer sees; None for all."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def _completion_tokens(step: Sequence[Group]) -> int:
    return sum(len(completion.token_ids) for group in step for completion in group.completions)


# --- what the machine does ------------------------------------------------------------------------------------------


PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}
PEAKS |= {"L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
"""Dense bfloat16 operations per second that the maker states; the first part of a device's name that fits counts."""


def nominal_peak(device: torch.device) -> float | None:
    """Operations per second that the maker states for a GPU; None if it is not in ``PEAKS``, or no GPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def matmul_rate(
    m: int, k: int, n: int, dtype: torch.dtype = torch.bfloat16, device: torch.device | None = None
) -> float:
    """Operations per second of an [m, k] input times an [n, k] weight, as in a linear layer; on a CPU by default."""
    inputs, weight = (torch.rand(shape, device=device).to(dtype) for shape in ((m, k), (n, k)))
    wait = torch.cuda.synchronize if inputs.is_cuda else lambda: None

    def product() -> None:
        F.linear(inputs, weight)
        wait()

    wait()
    return 2 * m * k * n / _least_seconds(product)


def bandwidth(size: int = 2**29) -> float:
    """Bytes per second of reading a buffer of ``size`` bytes, which no cache should hold."""
    return size / _least_seconds(torch.ones(size // 4).sum)


@torch.no_grad()
def _least_seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    times = []
    for _ in range(2 + repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times[2:])  # a lower bound is what the machine can do, not what it does on a bad day


def _rates(config: PreTrainedConfig, *, body_tokens: int, head_tokens: int) -> dict[str, float]:
    """Operations per second of the body's products, and of the head's in the fastest of a few blocks of the vocabulary."""
    return {
        "body": _body_rate(config, body_tokens),
        "head": max(matmul_rate(head_tokens, config.hidden_size, block) for block in (2048, 8192, 32_000)),
    }


def _body_rate(config: PreTrainedConfig, tokens: int) -> float:
    return matmul_rate(tokens, config.hidden_size, config.intermediate_size)


# --- lower bounds ---------------------------------------------------------------------------------------------------


def step_lower_bound(work: Work, tokens: float = 0) -> dict[str, Any]:
    """Of an optimizer step on demonstrations and samples."""
    return _training_lower_bound(work, groups(work))


def sft_lower_bound(work: Work, tokens: float = 0) -> dict[str, Any]:
    """Of an optimizer step on the demonstrations alone."""
    return _training_lower_bound(work, [group.select([0]) for group in groups(work)])


def _training_lower_bound(work: Work, step: Sequence[Group]) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(work.model_path)
    operations = training_operations(config, step, rank=cast(LoraConfig, adapter()).r if work.adapters else None)
    rates = _rates(config, body_tokens=sum(map(len, step)), head_tokens=_completion_tokens(step))
    return {
        "seconds": (operations.body + operations.attention) / rates["body"] + operations.head / rates["head"],
        "tokens": 0,
        "operations": dataclasses.asdict(operations),
        "operations_per_second": rates,
    }


def decoding_lower_bound(work: Work, tokens: float) -> dict[str, Any]:
    """Of sampling ``tokens`` tokens for all prompts side by side.

    The prompts run through the body once and give the first token of each completion. Every token after that is a step
    that takes the larger of two: its operations, and reading all weights once and the keys and values of each completion
    that still runs. How many do is known from ``tokens`` alone: see ``running``.
    """
    config = AutoConfig.from_pretrained(work.model_path)
    prompts = [len(group.prompt_ids) for group in groups(work)]
    layers = sum(inputs * outputs for inputs, outputs in linear_layers(config).values())
    head = config.hidden_size * config.vocab_size
    cached = 2 * config.num_key_value_heads * _head_dim(config)  # numbers per token and layer
    windows = _windows(config)
    rates = _rates(config, body_tokens=len(prompts), head_tokens=len(prompts))
    rates["prompts"] = _body_rate(config, sum(prompts))
    bytes_per_second = bandwidth()

    def seconds(tokens: float, pairs: float, sequences: float, rate: float) -> float:
        body = 2 * layers * tokens + _attention(config) * pairs
        return body / rate + 2 * head * sequences / rates["head"]

    pairs = sum(_causal_pairs(n, window) for n in prompts for window in windows)
    total = seconds(sum(prompts), pairs, len(prompts), rates["prompts"])
    for position, left in enumerate(running(len(prompts), work.completion_tokens, tokens)[1:], start=1):
        context = sum(prompts) / len(prompts) + position
        pairs = left * sum(min(context, window or context) for window in windows)
        reading = _BYTES * (layers + head + cached * pairs) / bytes_per_second
        total += max(seconds(left, pairs, left, rates["body"]), reading)
    return {
        "seconds": total,
        "tokens": tokens,
        "operations_per_second": rates,
        "bytes_per_second": bytes_per_second,
    }


LOWER_BOUNDS: dict[str, Callable[[Work, float], dict[str, Any]]] = {
    "step": step_lower_bound,
    "sft": sft_lower_bound,
    "decoding": decoding_lower_bound,
}


def measured_lower_bound(kind: str, work: Work, tokens: float = 0) -> dict[str, Any]:
    """A lower bound whose rates are measured now, in a fresh process.

    Args:
        kind: of ``LOWER_BOUNDS``.
        tokens: sampled per repetition; read by "decoding".

    Returns:
        ``seconds`` per repetition, and the operations and rates they follow from.
    """
    command = [sys.executable, "-m", "benchmarks.roofline", kind, json.dumps(dataclasses.asdict(work)), str(tokens)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """One lower bound: kind, work, and tokens where it samples."""
    kind, work, *tokens = sys.argv[1:]
    print(json.dumps(LOWER_BOUNDS[kind](Work(**json.loads(work)), *map(float, tokens)), indent=1))


if __name__ == "__main__":
    main()
