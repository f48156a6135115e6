"""How fast tutelage is on a GPU, and how far from the device's peak.

    python -m benchmarks.gpu [--json FILE] [--model PATH] [--vocabulary 262144] [--minutes 8] [--parts PART …]
    python -m benchmarks.gpu --device cpu --tiny     # that the script works; its times say nothing

Whether the numbers are right there is tested by ``pytest tests/gpu``.

Random weights in the shape of Llama 3.2 1B; nothing is downloaded. All sides of a comparison work on the same tokens
with the same weights in one process and take turns; times are medians, and memory is what PyTorch had allocated at most.
What no longer fits into the minutes is skipped, with a line that says so. The exit status is 1 if a part broke off, or if the
sides of a comparison did not compute the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from rich.table import Table
from torch import Tensor, nn

from benchmarks.gpu_attention import attention
from benchmarks.gpu_run import (
    FULL,
    TINY,
    Run,
    Shape,
    autocast,
    free_memory,
    measured,
    policy,
    random_groups,
    said,
    take_turns,
    vocab_size,
)
from benchmarks.profiling import launches_per_step, operators_per_step, profiled
from benchmarks.provenance import gpu, provenance
from benchmarks.roofline import matmul_rate, nominal_peak, training_operations
from benchmarks.workloads import adapter
from tutelage.groups import Group, handed_over, pair_indices
from tutelage.losses import irft_loss
from tutelage.models.loading import base_causal_lm
from tutelage.sampling import SamplingParams, TransformersSampler
from tutelage.scoring.logps import cached_logps, completion_logps
from tutelage.testing.tokenizers import tiny_tokenizer

MFU_TARGET = 0.4  # of an H100's or H200's peak
BETA = 0.1
LOSS_TOLERANCE = 0.03  # between two sides in bfloat16
References = Sequence[Sequence[float]]  # of each group, the reference log-prob of each completion


# --- the loss -----------------------------------------------------------------------------------------------------


def contrast(logps_C: Tensor, groups: Sequence[Group], references: References) -> Tensor:
    """IRFT's loss, the mean over pairs."""
    reference_C = handed_over(torch.tensor([logp for values in references for logp in values]), logps_C.device)
    first, others = (handed_over(torch.tensor(places), logps_C.device) for places in pair_indices(groups))
    return irft_loss(logps_C[first], logps_C[others], reference_C[first], reference_C[others], beta=BETA).mean()


def references_off(logps: References) -> list[list[float]]:
    """Reference log-probs some nats off these: where both are equal every loss is log 2, right or wrong."""
    draw = random.Random(1)
    return [[logp + draw.uniform(-15, 15) for logp in values] for values in logps]


# --- the plain implementation -------------------------------------------------------------------------------------


def plain_logps(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """[C] what a reader would write: a row for each prompt with a completion, full logits, log_softmax."""
    rows = [(group.prompt_ids, completion.token_ids) for group in groups for completion in group.completions]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, present, scored = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        present[row, :end] = 1
        scored[row, len(prompt) : end] = 1
    device = next(model.parameters()).device
    ids, present, scored = ids.to(device), present.to(device), scored.to(device)
    logits = model(input_ids=ids, attention_mask=present, use_cache=False).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (logps * scored[:, 1:]).sum(1)


def one_by_one(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """[C] the plain implementation on one row at a time, so that no padding takes part."""
    alone = [group.select([i]) for group in groups for i in range(len(group.completions))]
    return torch.cat([plain_logps(model, [group]) for group in alone])


# --- training -----------------------------------------------------------------------------------------------------


def training(run: Run) -> None:
    """One IRFT step, forward, backward and optimizer: ours, the plain implementation and TRL's DPOTrainer."""
    n = run.sizes.matmul
    rate, peak = matmul_rate(n, n, n, device=run.device), nominal_peak(run.device)
    stated = f"the maker states {peak / 1e12:.0f}" if peak else "the device is not in the table of peaks"
    run.say(f"one large matrix product: {rate / 1e12:.2f} TFLOP/s; {stated}")
    for full, trained in ((False, "adapters"), (True, "all parameters")):
        if run.has_time(f"training, {trained}", 60 if run.on_cuda else 5):
            training_step(run, trained, full=full, rate=rate)
            free_memory(run)


def training_step(run: Run, trained: str, *, full: bool, rate: float) -> None:
    """Time a step of every side and say how much of the device's peak the needed operations make of it."""
    model = policy(run, full=full)
    groups = random_groups(run.sizes.step, vocab_size(model))
    with autocast(run):
        references = references_off(cached_logps(model, groups, batch_size=2, layout="shared_prefix"))
    needed = needed_operations(model, groups, full=full)
    # At learning rate 0 an optimizer works as ever, and all sides meet the same weights.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=run.on_cuda)
    losses: dict[str, Callable[[Sequence[Group], References], Tensor]] = {
        "tutelage": lambda part, known: contrast(completion_logps(model, part, layout="shared_prefix"), part, known),
        "plain": lambda part, known: contrast(plain_logps(model, part), part, known),
    }
    with contextlib.ExitStack() as stack:
        with run.attempt("TRL's DPOTrainer", seconds=90):
            losses["TRL"] = dpo_loss(run, model, stack.enter_context(tempfile.TemporaryDirectory()))

        def step(side: str, size: int) -> float:
            total = torch.zeros((), device=run.device)
            try:
                for start in range(0, len(groups), size):
                    part, known = (values[start : start + size] for values in (groups, references))
                    with autocast(run):
                        loss = losses[side](part, known) * len(part) / len(groups)
                    loss.backward()
                    total += loss.detach()
                optimizer.step()
            finally:
                optimizer.zero_grad()  # at the end, so that no side begins with gradients in memory
            return total.item()

        sizes: dict[str, int] = {}
        for side in losses:
            with run.attempt(f"a training step of {side}", seconds=60):
                sizes[side] = best_micro_batch(run, partial(step, side))
        for side in [side for side in sizes if side != "tutelage"]:
            gap = abs(step(side, sizes[side]) - step("tutelage", sizes["tutelage"]))
            if not gap <= LOSS_TOLERANCE:  # NaN is not
                run.fail(f"{trained}: the loss of {side} differs from ours by {gap:.2g}")
        found = take_turns(run, {side: partial(step, side, sizes[side]) for side in sizes}, repeats=run.sizes.repeats)
        what = f"{trained}, {run.sizes.step}"
        with run.attempt(f"a profile of {what}", seconds=60):
            run.top(what, profiled(partial(step, "tutelage", sizes["tutelage"])))
    peak = nominal_peak(run.device)
    for side, timing in found.items():
        run.row(
            "training",
            what,
            side,
            timing,
            prompts_per_micro_batch=sizes[side],
            tokens_per_s=sum(map(len, groups)) / timing.median,
            needed_operations=needed,
            mfu=needed / timing.median / peak if peak else None,
            mfu_of_matmul=needed / timing.median / rate,
        )
    if peak and any(part in torch.cuda.get_device_name() for part in ("H100", "H200")):
        mfu = needed / found["tutelage"].median / peak
        run.say(f"{what}: {mfu:.0%} of peak, target {MFU_TARGET:.0%}: {'met' if mfu >= MFU_TARGET else 'MISSED'}")


def best_micro_batch(run: Run, step: Callable[[int], object]) -> int:
    """Prompts at once with which a step is fastest, of those that fit into memory."""
    seconds: dict[int, float] = {}
    size = run.sizes.step.prompts
    while size:
        with contextlib.suppress(torch.OutOfMemoryError):
            step(size)  # the first one finds memory and kernels
            seconds[size] = measured(run, partial(step, size)).median
        if size not in seconds:
            free_memory(run)
        size //= 2
    if not seconds:
        raise torch.OutOfMemoryError("not even one prompt fits")
    return min(seconds, key=seconds.__getitem__)


def needed_operations(model: nn.Module, groups: Sequence[Group], *, full: bool) -> int:
    """Floating-point operations that one training step on the groups needs, however it is computed."""
    config = base_causal_lm(model).config.get_text_config()
    operations = training_operations(config, groups, rank=None if full else cast(LoraConfig, adapter()).r)
    return operations.body + operations.attention + operations.head


def dpo_loss(run: Run, model: nn.Module, folder: str) -> Callable[[Sequence[Group], References], Tensor]:
    """The loss of TRL's DPOTrainer on the same pairs, reference log-probs given, without activation checkpointing.

    The trainer is made with one row of text that nobody trains on; its collator and its loss then work on our tokens.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    settings = {"bf16": True, "use_cpu": not run.on_cuda, "report_to": "none", "disable_tqdm": True, "beta": BETA}
    settings |= {"precompute_ref_log_probs": True, "gradient_checkpointing": False, "max_length": None}
    rows = Dataset.from_list([{"prompt": "What is 1 + 1?", "chosen": " 2", "rejected": " 3"}])
    trainer: Any = DPOTrainer(
        cast(Any, model),
        args=DPOConfig(output_dir=folder, **settings),
        train_dataset=rows,
        processing_class=tiny_tokenizer("plain"),
    )
    trainer.model.train()

    def loss(part: Sequence[Group], known: References) -> Tensor:
        inputs = trainer.data_collator(
            [row for each in zip(part, known, strict=True) for row in preference_rows(*each)]
        )
        return trainer.compute_loss(trainer.model, {name: value.to(run.device) for name, value in inputs.items()})

    return loss


def preference_rows(group: Group, references: Sequence[float]) -> list[dict[str, Any]]:
    """The group as rows that TRL has tokenized: its demonstration is chosen over each of its samples."""
    (demonstration, reference), *others = zip(group.completions, references, strict=True)
    shared = {"prompt_ids": list(group.prompt_ids), "chosen_ids": list(demonstration.token_ids)}
    return [
        {**shared, "rejected_ids": list(c.token_ids), "ref_chosen_logps": reference, "ref_rejected_logps": logp}
        for c, logp in others
    ]


# --- sampling -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def sampling(run: Run) -> None:
    """Our sampler and ``generate``, at temperature 1, with adapters under autocast as in training; nothing stops early.

    Ours merges the adapters into the layers, if it finds that this serves; beside it, the same with adapters as they are.
    Launches of a token step, which bind small models, are counted by a profiler; on a CPU the operators.
    """
    model = policy(run).eval()
    for shape in run.sizes.sampling:
        if not run.has_time(f"sampling {shape}", 60 if run.on_cuda else 5):
            continue
        rows, length = shape.prompts * shape.completions, shape.completion_tokens
        sides = sampling_sides(run, model, shape)
        short = min(32, length)
        with said(run, "tutelage.sampling.merging"):
            for name, side in sides.items():  # short ones warm up; and all must draw what is counted
                if side(short) != short * rows:
                    run.fail(f"sampling {shape}: {name} did not draw {short} tokens for each of {rows} rows")
        found = take_turns(run, {name: partial(side, length) for name, side in sides.items()}, repeats=3, warmups=0)
        for name, timing in found.items():
            counts: dict[str, float] = {"operators_per_token_step": operators_per_step(sides[name])}
            if run.on_cuda:
                counts["launches_per_token_step"] = launches_per_step(sides[name])
            run.row("sampling", str(shape), name, timing, tokens_per_s=rows * length / timing.median, **counts)
        with run.attempt(f"a profile of sampling {shape}", seconds=60):
            run.top(f"sampling {shape}", profiled(partial(sides["tutelage"], short)))


def sampling_sides(run: Run, model: nn.Module, shape: Shape) -> dict[str, Callable[[int], int]]:
    """Functions from the length of the completions to the number of tokens drawn."""
    prompts = [group.prompt_ids for group in random_groups(shape, vocab_size(model))]
    ids = torch.tensor(prompts, device=run.device)
    size = shape.prompts * shape.completions
    samplers = {
        "tutelage": TransformersSampler(model, batch_size=size),
        "adapters beside": TransformersSampler(model, batch_size=size, merge_adapters=False),
    }

    def ours(sampler: TransformersSampler, length: int) -> int:
        params = SamplingParams(max_completion_length=length)
        with autocast(run):
            drawn = sampler.sample(prompts, params, num_samples=shape.completions)
        return sum(len(sample.token_ids) for samples in drawn for sample in samples)

    def generate(length: int) -> int:
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
        settings |= {"min_new_tokens": length, "max_new_tokens": length, "num_return_sequences": shape.completions}
        with autocast(run):
            made = cast(Any, model).generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return made[:, ids.shape[1] :].numel()

    return {**{name: partial(ours, sampler) for name, sampler in samplers.items()}, "generate": generate}


# --- the command --------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Run], None]] = {part.__name__: part for part in (training, sampling, attention)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write what was found to")
    parser.add_argument("--model", help="folder of a model to time instead of the random one")
    parser.add_argument("--vocabulary", type=int, help="tokens of the random model; 262144 is Gemma's")
    parser.add_argument("--minutes", type=float, default=8.0, help="parts that no longer fit are skipped")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU manages")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # trainers spread over what they see
        if not torch.cuda.is_available():
            parser.error("no CUDA device is there; --device cpu --tiny tries the script without one")
    elif not options.tiny:
        parser.error("the full shapes want a GPU: add --tiny")
    torch.set_float32_matmul_precision("highest")  # TF32 in the reference would hide what is to be found
    sizes = TINY if options.tiny else FULL
    if options.vocabulary:
        sizes = replace(sizes, model=sizes.model | {"vocab_size": options.vocabulary})
    deadline = time.monotonic() + 60 * options.minutes
    run = Run(torch.device(options.device), sizes, options.model, deadline)
    found = provenance("benchmarks.gpu") | {"model": options.model or sizes.model}
    found["machine"] |= gpu(run.device)
    run.say(json.dumps(found["machine"] | found["versions"], ensure_ascii=False))
    for name in options.parts:
        try:
            PARTS[name](run)
        except Exception:  # what the other parts find is worth having all the same
            run.say(traceback.format_exc())
            run.fail(f"{name} broke off")
        free_memory(run)
        if options.json:
            whole = found | {"rows": run.rows, "profiles": run.profiles, "failures": run.failures}
            options.json.write_text(json.dumps(whole, indent=2, ensure_ascii=False), encoding="utf-8")
    run.console.print(table(run.rows))
    for failure in run.failures:
        run.say(f"FAILED {failure}")
    return 1 if run.failures else 0


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """All rows that were measured; memory in GiB, and beside it how much of it was there before the step."""
    made = Table("part", "what", "side", "ms [min–max]", "tokens/s", "GiB (before)", "MFU (of a measured matmul)")
    made.add_column("launches (operators) a token step")
    for row in rows:
        if "median_s" not in row:
            continue
        median, least, most = (f"{1000 * row[name]:.4g}" for name in ("median_s", "min_s", "max_s"))
        peak, before = (f"{(row[name] or 0) / 2**30:.1f}" for name in ("peak_bytes", "bytes_before"))
        mfu, of_matmul = (
            "–" if (share := row.get(name)) is None else f"{share:.1%}" for name in ("mfu", "mfu_of_matmul")
        )
        made.add_row(
            *(row[name] for name in ("part", "what", "side")),
            f"{median} [{least}–{most}]",
            f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else "",
            f"{peak} ({before})" if row["peak_bytes"] else "",
            f"{mfu} ({of_matmul})" if "mfu" in row else "",
            f"{row.get('launches_per_token_step', 0):.0f} ({row['operators_per_token_step']:.0f})"
            if "operators_per_token_step" in row
            else "",
        )
    return made


if __name__ == "__main__":
    sys.exit(main())
