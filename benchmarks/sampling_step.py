"""What drawing a token costs beside the forward pass that gives its logits.

    python -m benchmarks.sampling_step --model MODEL [--rows 64] [--repeats 15]

One decoding step of a batch with a key-value cache, split into the body, the head, and the draw; beside them
``softmax`` + ``torch.multinomial`` on the same logits. Interleaved, medians, milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from tutelage.models.head import LMHead
from tutelage.models.loading import base_causal_lm, load_model
from tutelage.sampling import SamplingParams
from tutelage.sampling.transformers import draw_tokens


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="tokens in the cache")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    base = base_causal_lm(load_model(options.model, dtype=torch.bfloat16)).eval()
    head = LMHead.of(base)
    ids = torch.randint(1000, 30_000, (options.rows, options.prompt))
    cache = base.base_model(input_ids=ids, use_cache=True).past_key_values
    hidden = torch.empty(0)
    logits = torch.empty(0)

    def body() -> None:
        nonlocal hidden
        hidden = base.base_model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        cache.crop(-1)  # so that every repeat is the same step

    def logits_of_head() -> None:
        nonlocal logits
        logits = head.raw_logits(hidden)

    def draw() -> None:
        draw_tokens(logits, np.random.default_rng(0).random(options.rows), params=SamplingParams())

    def multinomial() -> None:
        torch.multinomial(logits.float().softmax(-1), 1)

    parts: dict[str, Callable[[], None]] = {
        "body": body,
        "head": logits_of_head,
        "draw (ours)": draw,
        "softmax + multinomial": multinomial,
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(options.repeats + 2):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            if repeat >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:22s} {medians[name]:8.1f} ms   ({min(values):.1f} to {max(values):.1f})")
    forward = medians["body"] + medians["head"]
    print(f"draw / forward pass: {medians['draw (ours)'] / forward:.2f}")
    print(f"multinomial / forward pass: {medians['softmax + multinomial'] / forward:.2f}")


if __name__ == "__main__":
    main()
