"""What merging adapters into the layers gains while sampling, on this machine.

    python -m benchmarks.merged_sampling [--model qwen3-32k] [--dtype bfloat16] [--rows 64] [--tokens 32] [--repeats 5]

The same prompts are sampled by two samplers of one model, one that merges and one that does not, in turns; what is found out
once, whether merging serves, is not timed. Medians of processor milliseconds per token step of all rows, and the operators that
a profiler counts in one.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.profiling import operators_per_step
from benchmarks.workloads import MODELS, Work, adapter, groups, prepare_model
from tutelage.models.loading import add_adapter, load_model
from tutelage.models.merging import MergedAdapters
from tutelage.models.precision import given_precision
from tutelage.sampling import SamplingParams, TransformersSampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-32k", help=f"{' or '.join(MODELS)}, or a folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each completion")
    parser.add_argument(
        "--update", type=float, default=1e-3, help="standard deviation of the adapters' second factors"
    )
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tutelage.sampling.merging").setLevel(logging.INFO)
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = str(prepare_model(options.model, Path(folder)) if options.model in MODELS else options.model)
        torch.manual_seed(0)
        model = add_adapter(load_model(path, dtype=dtype), adapter()).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=options.update)
    work = Work(path, prompts=options.rows, prompt_tokens=options.prompt, samples=0)
    prompts = [group.prompt_ids for group in groups(work)]
    samplers = {
        "merged": TransformersSampler(model, batch_size=options.rows),
        "beside": TransformersSampler(model, batch_size=options.rows, merge_adapters=False),
    }
    times: dict[str, list[float]] = {name: [] for name in samplers}
    sides: dict[str, Callable[[int], object]] = {
        name: lambda length, sampler=sampler: sampler.sample(prompts, SamplingParams(max_completion_length=length))
        for name, sampler in samplers.items()
    }
    with given_precision(dtype, "--dtype").autocast(model.device):
        for side in sides.values():
            side(options.tokens)
        for _ in range(options.repeats):
            for name, side in sides.items():
                begun = time.process_time()
                side(options.tokens)
                times[name].append((time.process_time() - begun) / options.tokens)
        operators = {name: operators_per_step(side) for name, side in sides.items()}
    for name, seconds in times.items():
        median, least, most = (1000 * f(seconds) for f in (statistics.median, min, max))
        print(
            f"{name}: {median:.1f} processor ms a token ({least:.1f}–{most:.1f}), {operators[name]:.0f} operators a token"
        )
    ratios = [b / a for a, b in zip(times["merged"], times["beside"], strict=True)]
    print(f"beside / merged: {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
    needed = sum(MergedAdapters.of(model).bytes_needed().values())
    print(f"merging takes {needed / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
