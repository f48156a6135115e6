"""What tutelage does on a GPU: whether its numbers are right there, how fast it is, and how far from the device's peak.

    python -m benchmarks.gpu [--json FILE] [--model PATH] [--vocabulary 262144] [--minutes 8] [--parts PART …]
    python -m benchmarks.gpu --device cpu --tiny     # that the script works; its times say nothing

Random weights in the shape of Llama 3.2 1B; nothing is downloaded. All sides of a comparison work on the same tokens
with the same weights in one process and take turns; times are medians, and memory is what PyTorch had allocated at most.
What no longer fits into the minutes is skipped, with a line that says so. The exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.roofline import training_operations
from tutelage.groups import Batch, Completion, Group, Role, collate_shared_prefix, pair_indices
from tutelage.losses import irft_loss
from tutelage.models.loading import add_adapter, base_causal_lm, first_line, load_model
from tutelage.sampling import SamplingParams, TransformersSampler
from tutelage.scoring.logps import cached_logps, completion_logps
from tutelage.testing.tokenizers import tiny_tokenizer

# Dense bfloat16 operations per second that the maker states; the first part of a device's name that fits counts.
PEAKS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}
PEAKS |= {"L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
MFU_TARGET = 0.4  # of an H100's or H200's peak
BETA = 0.1
RANK = 16


class Shape(NamedTuple):
    """So many prompts of so many tokens, each with so many completions of so many tokens."""

    prompts: int
    prompt_tokens: int
    completions: int
    completion_tokens: int

    def __str__(self) -> str:
        return f"{self.prompts} × ({self.prompt_tokens} + {self.completions} × {self.completion_tokens})"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is worked on. ``model`` and ``checked`` are fields of a LlamaConfig.

    ``checked`` has few layers, so that rounding stays small beside mistakes.
    """

    model: dict[str, int]
    checked: dict[str, int]
    check: Shape
    step: Shape
    attention: tuple[Shape, ...]
    sampling: tuple[Shape, ...]
    matmul: int
    repeats: int


_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_FIELDS += ("head_dim", "vocab_size")


def _llama(*values: int) -> dict[str, int]:
    return dict(zip(_FIELDS, values, strict=True))


FULL = Sizes(
    model=_llama(2048, 8192, 16, 32, 8, 64, 128_256),
    checked=_llama(1024, 2816, 4, 16, 8, 64, 32_000),
    check=Shape(6, 300, 4, 96),
    step=Shape(8, 512, 5, 256),
    attention=(Shape(8, 512, 5, 256), Shape(8, 512, 8, 256), Shape(16, 128, 4, 128), Shape(2, 2048, 8, 512)),
    sampling=(Shape(16, 256, 4, 128), Shape(64, 256, 4, 128)),
    matmul=8192,
    repeats=5,
)
TINY = Sizes(
    model=_llama(64, 128, 2, 4, 2, 16, 512),
    checked=_llama(64, 128, 2, 4, 2, 16, 512),
    check=Shape(4, 20, 3, 12),
    step=Shape(4, 16, 3, 8),
    attention=(Shape(2, 16, 3, 8),),
    sampling=(Shape(2, 8, 2, 6),),
    matmul=128,
    repeats=2,
)


@dataclass
class Run:
    """What the parts share: device, sizes, the clock, and what was found so far."""

    device: torch.device
    sizes: Sizes
    model_path: str | None
    deadline: float
    console: Console = field(default_factory=lambda: Console(width=None if sys.stdout.isatty() else 160))
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def on_cuda(self) -> bool:
        """Whether there is a clock to wait for and memory to measure."""
        return self.device.type == "cuda"

    def say(self, line: str) -> None:
        """Print it as it is."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether ``seconds`` are left for ``what``; says so if not."""
        left = self.deadline - time.monotonic()
        if left < seconds:
            self.say(f"skipped: {what}: it may take {seconds:.0f} s and {max(0.0, left):.0f} s are left")
        return left >= seconds

    def check(self, name: str, found: float, limit: float) -> None:
        """``found`` must not exceed ``limit``; NaN does."""
        passed = found <= limit
        self.checks.append({"name": name, "found": found, "limit": limit, "passed": passed})
        self.say(f"{'ok    ' if passed else 'FAILED'} {name}: {found:.2g}, at most {limit:.2g}")

    def row(self, part: str, what: str, side: str, timing: Timing, **numbers: Any) -> None:
        """Record what one side took, and whatever else is known about it."""
        times = {"median_s": timing.median, "min_s": min(timing.seconds), "max_s": max(timing.seconds)}
        memory = {"peak_bytes": timing.peak_bytes, "bytes_before": timing.bytes_before}
        self.rows.append({"part": part, "what": what, "side": side, **times, **memory, **numbers})
        self.say(f"{part}, {what}: {side} {1000 * timing.median:.2f} ms")

    @contextlib.contextmanager
    def attempt(self, what: str, *, seconds: float) -> Iterator[None]:
        """Within, an error or running over ``seconds`` is reported and ends no more than the attempt."""
        try:
            with _time_limit(min(seconds, max(1.0, self.deadline - time.monotonic()))):
                yield
        except Exception as error:  # compilers and peers fail in ways of their own
            problem = f"{type(error).__name__}: {first_line(error)}"
            self.say(f"not measured: {what}: {problem}")
            self.rows.append({"part": "not measured", "what": what, "error": problem})


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)


# --- models and groups --------------------------------------------------------------------------------------------


def policy(run: Run, *, full: bool = False) -> nn.Module:
    """The model that is timed: bfloat16 with float32 adapters, or float32 weights that are all trained."""
    dtype = torch.float32 if full else torch.bfloat16
    if run.model_path:
        model = cast(Any, load_model(run.model_path, dtype=dtype)).to(run.device)
    else:
        model = _random_llama(run, run.sizes.model, dtype)
    return (model if full else _adapted(model)).train()


def checked_policy(run: Run) -> nn.Module:
    """A small bfloat16 model with adapters whose weights are wide enough that every mistake shows."""
    fields = run.sizes.checked
    model = _random_llama(run, fields, torch.bfloat16, initializer_range=1.5 * fields["hidden_size"] ** -0.5)
    return _adapted(model, init_lora_weights=False)  # B = 0 would leave A without a gradient


def _random_llama(run: Run, fields: Mapping[str, int], dtype: torch.dtype, **more: Any) -> nn.Module:
    config = LlamaConfig(**fields, **more, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with run.device:  # a billion random numbers take the CPU a while
        return cast(Any, AutoModelForCausalLM.from_config(config, dtype=dtype)).to(run.device)


def _adapted(model: nn.Module, **more: Any) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM", **more)
    return add_adapter(model, config)


def random_groups(shape: Shape, vocab_size: int, *, ragged: bool = False) -> list[Group]:
    """Groups of random tokens, a demonstration first; of up to the shape's lengths where ``ragged``."""
    draw = random.Random(0)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab_size) for _ in range(draw.randint(1, most) if ragged else most))

    kinds = [Role.DEMONSTRATION] + [Role.SAMPLE] * (shape.completions - 1)
    return [
        Group(
            tokens(shape.prompt_tokens),
            tuple(Completion(tokens(shape.completion_tokens), kind, finished=False) for kind in kinds),
        )
        for _ in range(shape.prompts)
    ]


def with_references(groups: Sequence[Group], logps_C: Sequence[float]) -> list[Group]:
    """The groups with reference log-probs some nats off the policy's: at equality every loss is log 2, right or wrong."""
    draw = random.Random(1)
    values = iter(logps_C)
    return [
        replace(group, reference_logps=tuple(next(values) + draw.uniform(-15, 15) for _ in group.completions))
        for group in groups
    ]


def contrast(logps_C: Tensor, groups: Sequence[Group]) -> Tensor:
    """IRFT's loss, the mean over pairs."""
    reference_C = torch.tensor([logp for group in groups for logp in group.reference_logps or ()]).to(logps_C)
    first, others = pair_indices(groups)
    return irft_loss(logps_C[first], logps_C[others], reference_C[first], reference_C[others], beta=BETA).mean()


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


# --- correctness --------------------------------------------------------------------------------------------------


def correctness(run: Run) -> None:
    """Log-probs, gradients and the sampler against the plain implementation in float32.

    In float32 they must be the same but for the order of sums. In bfloat16 they may be off by twice as much as the
    plain implementation in bfloat16 is, and a little for luck.
    """
    model = checked_policy(run)
    exact = copy.deepcopy(model).float()
    groups = random_groups(run.sizes.check, run.sizes.checked["vocab_size"], ragged=True)
    with torch.no_grad():
        truth_C = one_by_one(exact, groups)
    groups = with_references(groups, truth_C.tolist())
    true_gradient = gradient(exact, contrast(one_by_one(exact, groups), groups))
    implementations: dict[str, Callable[[nn.Module, Sequence[Group]], Tensor]] = {
        "plain": one_by_one,
        "shared_prefix": partial(completion_logps, layout="shared_prefix"),
        "padded": partial(completion_logps, layout="padded"),
    }
    for precision, candidate in (("float32", exact), ("bfloat16", model)):
        mixed = precision == "bfloat16"
        limits = (1e-4, 1e-3)
        for name, logps_of in implementations.items():
            with _autocast(run, enabled=mixed):
                logps_C = logps_of(candidate, groups)
                loss = contrast(logps_C, groups)
            found = (
                per_token_error(logps_C.detach(), truth_C, groups),
                relative_error(gradient(candidate, loss), true_gradient),
            )
            if name == "plain" and mixed:
                limits = (2 * found[0] + 0.003, 2 * found[1] + 0.01)
            elif name != "plain":
                run.check(f"{precision}, {name}: log-probs off by (nats per token)", found[0], limits[0])
                run.check(f"{precision}, {name}: gradient of the adapters off by (relative)", found[1], limits[1])
        check_sampler(run, candidate, exact, [group.prompt_ids for group in groups], mixed=mixed)


@torch.no_grad()
def check_sampler(
    run: Run, candidate: nn.Module, exact: nn.Module, prompts: Sequence[tuple[int, ...]], *, mixed: bool
) -> None:
    """The log-probs that the sampler reports are those of the tokens it drew."""
    params = SamplingParams(max_completion_length=run.sizes.check.completion_tokens)
    with _autocast(run, enabled=mixed):
        drawn = TransformersSampler(candidate).sample(prompts, params, num_samples=3)
        groups = [
            Group(prompt, tuple(sample.completion for sample in samples))
            for prompt, samples in zip(prompts, drawn, strict=True)
        ]
        ours_C, plain_C = completion_logps(candidate, groups, layout="shared_prefix"), one_by_one(candidate, groups)
    reported_C = torch.tensor([sum(sample.token_logps) for samples in drawn for sample in samples]).to(ours_C)
    truth_C = one_by_one(exact, groups)
    limit = 2 * per_token_error(plain_C, truth_C, groups) + 0.003 if mixed else 1e-4
    name = f"{'bfloat16' if mixed else 'float32'}, sampler: reported log-probs off by (nats per token), beside "
    run.check(name + "the plain implementation's", per_token_error(reported_C, truth_C, groups), limit)
    run.check(name + "completion_logps'", per_token_error(reported_C, ours_C, groups), limit)


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    """∂loss/∂(trained weights), as one float32 vector."""
    parts = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return torch.cat([part.float().flatten() for part in parts])


def per_token_error(found_C: Tensor, truth_C: Tensor, groups: Sequence[Group]) -> float:
    """Root mean square over completions of the difference divided by the completion's length: nats per token."""
    lengths = torch.tensor([len(c.token_ids) for group in groups for c in group.completions]).to(truth_C)
    return ((found_C - truth_C) / lengths).square().mean().sqrt().item()


def relative_error(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖."""
    return ((found.float() - truth).norm() / truth.norm()).item()


def _autocast(run: Run, *, enabled: bool = True) -> torch.autocast:
    return torch.autocast(run.device.type, torch.bfloat16, enabled=enabled)


# --- clock and memory ---------------------------------------------------------------------------------------------


class Timing(NamedTuple):
    """Seconds of each repetition; bytes that PyTorch had allocated at most, and before it began (None on a CPU)."""

    seconds: list[float]
    peak_bytes: int | None
    bytes_before: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def timed(run: Run, sides: Mapping[str, Callable[[], object]], *, repeats: int, warmups: int = 1) -> dict[str, Timing]:
    """Run the sides in turns, A B A B …, and measure what comes after the warm-ups."""
    found: dict[str, list[Timing]] = {name: [] for name in sides}
    for repeat in range(warmups + repeats):
        for name, side in sides.items():
            once = measured(run, side)
            if repeat >= warmups:
                found[name].append(once)
    return {
        name: Timing([seconds for each in times for seconds in each.seconds], *times[-1][1:])
        for name, times in found.items()
    }


def measured(run: Run, side: Callable[[], object]) -> Timing:
    """One repetition."""
    if run.on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if run.on_cuda else None
    start = time.perf_counter()
    side()
    if run.on_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return Timing([seconds], torch.cuda.max_memory_allocated() if run.on_cuda else None, before)


def nominal_peak(run: Run) -> float | None:
    """Operations a second that the maker states for the device; None if it is not in the table."""
    name = torch.cuda.get_device_name() if run.on_cuda else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def matmul_rate(run: Run) -> float:
    """Operations a second of one large bfloat16 matrix product, on this device, now."""
    n = run.sizes.matmul
    a, b = (torch.randn(n, n, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / timed(run, {"matmul": lambda: a @ b}, repeats=10, warmups=5)["matmul"].median


# --- training -----------------------------------------------------------------------------------------------------


def training(run: Run) -> None:
    """One IRFT step, forward, backward and optimizer: ours, the plain implementation and TRL's DPOTrainer."""
    rate = matmul_rate(run)
    peak = nominal_peak(run)
    stated = f"the maker states {peak / 1e12:.0f}" if peak else "the device is not in the table of peaks"
    run.say(f"one large matrix product: {rate / 1e12:.2f} TFLOP/s; {stated}")
    for full, trained in ((False, "adapters"), (True, "all parameters")):
        if run.has_time(f"training, {trained}", 60 if run.on_cuda else 5):
            training_step(run, trained, full=full, rate=rate)
            _free(run)


def training_step(run: Run, trained: str, *, full: bool, rate: float) -> None:
    """Time a step of every side and say how much of the device's peak the needed operations make of it."""
    model = policy(run, full=full)
    groups = random_groups(run.sizes.step, _vocab_size(model))
    with _autocast(run):
        logps = cached_logps(model, groups, batch_size=2, layout="shared_prefix")
    groups = with_references(groups, [logp for values in logps for logp in values])
    needed = needed_operations(model, groups, full=full)
    # At learning rate 0 an optimizer works as ever, and all sides meet the same weights.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=run.on_cuda)
    losses: dict[str, Callable[[Sequence[Group]], Tensor]] = {
        "tutelage": lambda part: contrast(completion_logps(model, part, layout="shared_prefix"), part),
        "plain": lambda part: contrast(plain_logps(model, part), part),
    }
    with contextlib.ExitStack() as stack:
        with run.attempt("TRL's DPOTrainer", seconds=90):
            losses["TRL"] = dpo_loss(run, model, stack.enter_context(tempfile.TemporaryDirectory()))

        def step(side: str, size: int) -> float:
            total = torch.zeros((), device=run.device)
            try:
                for start in range(0, len(groups), size):
                    part = groups[start : start + size]
                    with _autocast(run):
                        loss = losses[side](part) * len(part) / len(groups)
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
            run.check(f"{trained}: loss of {side} differs from ours by", gap, 0.03)
        found = timed(run, {side: partial(step, side, sizes[side]) for side in sizes}, repeats=run.sizes.repeats)
    what = f"{trained}, {run.sizes.step}"
    peak = nominal_peak(run)
    for side, timing in found.items():
        run.row(
            "training",
            what,
            side,
            timing,
            prompts_a_micro_batch=sizes[side],
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
            _free(run)
        size //= 2
    if not seconds:
        raise torch.OutOfMemoryError("not even one prompt fits")
    return min(seconds, key=seconds.__getitem__)


def needed_operations(model: nn.Module, groups: Sequence[Group], *, full: bool) -> int:
    """Floating-point operations that one training step on the groups needs, however it is computed."""
    config = base_causal_lm(model).config.get_text_config()
    operations = training_operations(config, groups, rank=None if full else RANK)
    return operations.body + operations.attention + operations.head


def _window(config: Any, kind: str) -> int | None:
    return config.sliding_window if kind == "sliding_attention" else None


def dpo_loss(run: Run, model: nn.Module, folder: str) -> Callable[[Sequence[Group]], Tensor]:
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

    def loss(part: Sequence[Group]) -> Tensor:
        inputs = trainer.data_collator([row for group in part for row in preference_rows(group)])
        return trainer.compute_loss(trainer.model, {name: value.to(run.device) for name, value in inputs.items()})

    return loss


def preference_rows(group: Group) -> list[dict[str, Any]]:
    """The group as rows that TRL has tokenized: its demonstration is chosen over each of its samples."""
    (demonstration, reference), *others = zip(group.completions, group.reference_logps or (), strict=True)
    shared = {"prompt_ids": list(group.prompt_ids), "chosen_ids": list(demonstration.token_ids)}
    return [
        {**shared, "rejected_ids": list(c.token_ids), "ref_chosen_logps": reference, "ref_rejected_logps": logp}
        for c, logp in others
    ]


# --- sampling -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def sampling(run: Run) -> None:
    """Our sampler and ``generate``, at temperature 1, with adapters under autocast as in training; nothing stops early."""
    model = policy(run).eval()
    for shape in run.sizes.sampling:
        if not run.has_time(f"sampling {shape}", 40 if run.on_cuda else 5):
            continue
        rows, length = shape.prompts * shape.completions, shape.completion_tokens
        sides = sampling_sides(run, model, shape)
        for name, side in sides.items():  # short ones warm up; and both must draw what is counted
            run.check(f"sampling {shape}: tokens that {name} leaves out", abs(side(4) - 4 * rows), 0)
        found = timed(run, {name: partial(side, length) for name, side in sides.items()}, repeats=3, warmups=0)
        for name, timing in found.items():
            run.row("sampling", str(shape), name, timing, tokens_per_s=rows * length / timing.median)


def sampling_sides(run: Run, model: nn.Module, shape: Shape) -> dict[str, Callable[[int], int]]:
    """Functions from the length of the completions to the number of tokens drawn."""
    prompts = [group.prompt_ids for group in random_groups(shape, _vocab_size(model))]
    ids = torch.tensor(prompts, device=run.device)
    sampler = TransformersSampler(model, batch_size=shape.prompts * shape.completions)

    def ours(length: int) -> int:
        params = SamplingParams(max_completion_length=length)
        with _autocast(run):
            drawn = sampler.sample(prompts, params, num_samples=shape.completions)
        return sum(len(sample.token_ids) for samples in drawn for sample in samples)

    def generate(length: int) -> int:
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
        settings |= {"min_new_tokens": length, "max_new_tokens": length, "num_return_sequences": shape.completions}
        with _autocast(run):
            made = cast(Any, model).generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return made[:, ids.shape[1] :].numel()

    return {"tutelage": ours, "generate": generate}


# --- attention ----------------------------------------------------------------------------------------------------


def attention(run: Run) -> None:
    """A dense mask in SDPA against FlexAttention, alone and in the whole body, and the body compiled.

    Last of the parts: compilers may take what time is left. On a CPU FlexAttention has no backward; there its unfused
    forward is checked, and neither it nor compiling is timed.
    """
    if not run.on_cuda:
        run.say("skipped: timing FlexAttention and compiled models: on CUDA alone")
    with run.attempt("FlexAttention's numbers", seconds=90):
        check_attention(run)
    for shape in run.sizes.attention if run.on_cuda else ():
        if run.has_time(f"attention {shape}", 40):
            with run.attempt(f"attention {shape}", seconds=90):
                time_attention(run, shape)
            _free(run)
    if run.on_cuda and run.has_time("FlexAttention's numbers in a body", 60):
        with run.attempt("FlexAttention's numbers in a body", seconds=90):
            check_body(run)
    if run.has_time("the whole body", 90 if run.on_cuda else 5):
        time_body(run)


def tree_block_mask(batch: Batch, window: int | None = None) -> BlockMask:
    """``Batch.shared_prefix_mask`` for FlexAttention, which skips the blocks where nobody attends to anybody."""
    branch_BL, position_BL = batch.branch_ids, batch.position_ids

    def may_attend(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        branch, distance = branch_BL[b, query], position_BL[b, query] - position_BL[b, key]
        in_reach = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        related = (branch_BL[b, key] == branch) | (branch_BL[b, key] == 0)
        return (related & (branch >= 0) & in_reach) | (query == key)

    B, L = batch.input_ids.shape
    return create_block_mask(may_attend, B, None, L, L, device=str(branch_BL.device))


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attentions(batch: Batch) -> dict[str, Attention]:
    """Both ways to attend in the shared-prefix layout. SDPA with a mask wants keys and values repeated, as transformers does it."""
    mask, block_mask = batch.shared_prefix_mask(), tree_block_mask(batch)
    torch.compiler.reset()  # each shape is compiled anew; after several, dynamo would go on uncompiled
    flex: Any = torch.compile(flex_attention, dynamic=False) if mask.is_cuda else flex_attention

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return {"SDPA": dense, "FlexAttention": lambda q, k, v: flex(q, k, v, block_mask=block_mask, enable_gqa=True)}


def attention_inputs(run: Run, batch: Batch) -> list[Tensor]:
    """Random bfloat16 queries, keys and values in the model's heads; with gradients where FlexAttention has them."""
    fields = run.sizes.model
    generator = torch.Generator(run.device).manual_seed(0)
    B, L = batch.input_ids.shape
    shapes = [(B, fields[f"num_{kind}_heads"], L, fields["head_dim"]) for kind in ("attention", *["key_value"] * 2)]
    made = [torch.randn(shape, device=run.device, generator=generator).bfloat16() for shape in shapes]
    return [states.requires_grad_(run.on_cuda) for states in made]


def check_attention(run: Run) -> None:
    """Outputs and gradients of both against SDPA in float32, on rows of different lengths.

    FlexAttention may be off by twice as much as SDPA in bfloat16 is, and a little for luck.
    """
    batch = collate_shared_prefix(random_groups(run.sizes.check, 100, ragged=True)).to(run.device)
    inputs = attention_inputs(run, batch)
    exact = [states.detach().float().requires_grad_(run.on_cuda) for states in inputs]

    def results(attend: Attention, states: Sequence[Tensor]) -> list[Tensor]:
        out = attend(*states)
        if not out.requires_grad:
            return [out]
        upstream = torch.randn(out.shape, device=out.device, generator=torch.Generator(out.device).manual_seed(1))
        return [out, *torch.autograd.grad(out, states, upstream.to(out.dtype))]

    ways = attentions(batch)
    truth = results(ways["SDPA"], exact)
    errors = {
        name: [relative_error(found, true) for found, true in zip(results(attend, inputs), truth, strict=True)]
        for name, attend in ways.items()
    }
    for what, dense, flex in zip(("output", "∂q", "∂k", "∂v"), *errors.values(), strict=False):
        run.check(f"attention in the shared-prefix layout, SDPA: {what} off by (relative)", dense, 0.05)
        run.check(
            f"attention in the shared-prefix layout, FlexAttention: {what} off by (relative)", flex, 2 * dense + 0.005
        )


def time_attention(run: Run, shape: Shape) -> None:
    """Forward and backward of one layer's attention, and beside it what making the mask costs, once per step."""
    batch = collate_shared_prefix(random_groups(shape, 100)).to(run.device)
    inputs = attention_inputs(run, batch)
    upstream = torch.randn_like(inputs[0])

    def step(attend: Attention) -> None:
        torch.autograd.grad(attend(*inputs), inputs, upstream)

    sides = {name: partial(step, attend) for name, attend in attentions(batch).items()}
    sides |= {"dense mask": batch.shared_prefix_mask, "block mask": partial(tree_block_mask, batch)}
    found = timed(run, sides, repeats=4 * run.sizes.repeats, warmups=3)
    for name, timing in found.items():
        run.row("attention", f"one layer, {shape}", name, timing)
    compare(run, f"one layer, {shape}", found)


def compare(run: Run, what: str, found: Mapping[str, Timing]) -> None:
    """Say which way to attend is faster here."""
    if "FlexAttention" in found:
        ratio = found["FlexAttention"].median / found["SDPA"].median
        run.say(f"{what}: FlexAttention takes {ratio:.2f} of SDPA's time")


def body_states(body: nn.Module, batch: Batch, masks: Any) -> Tensor:
    """[B, L, H] last hidden states in the shared-prefix layout; ``masks`` as ``tree_masks`` makes them."""
    return body(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=masks, use_cache=False
    ).last_hidden_state


def tree_masks(model: nn.Module, make: Callable[[int | None], Any]) -> Any:
    """The mask that ``make`` makes of a sliding window or None: one, or one for each kind of layer the model has."""
    config = base_causal_lm(model).config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    return {kind: make(_window(config, kind)) for kind in kinds} or make(getattr(config, "sliding_window", None))


def body_of(model: nn.Module) -> nn.Module:
    """The model without its head."""
    return base_causal_lm(model).base_model


def with_flex(model: nn.Module) -> nn.Module:
    """A copy that attends with FlexAttention."""
    other = copy.deepcopy(model)
    base_causal_lm(other).set_attn_implementation("flex_attention")
    return other


@torch.no_grad()
def check_body(run: Run) -> None:
    """transformers takes our block mask: hidden states against SDPA's in float32."""
    torch.compiler.reset()
    model = checked_policy(run)
    batch = collate_shared_prefix(random_groups(run.sizes.check, 100, ragged=True)).to(run.device)
    dense, blocks = (tree_masks(model, make) for make in (batch.shared_prefix_mask, partial(tree_block_mask, batch)))
    real = batch.branch_ids >= 0
    truth = body_states(body_of(copy.deepcopy(model).float()), batch, dense)[real]
    with _autocast(run):
        plain = body_states(body_of(model), batch, dense)[real]
        found = body_states(body_of(with_flex(model)), batch, blocks)[real]
    limit = 2 * relative_error(plain, truth) + 0.01
    run.check("body with FlexAttention: hidden states off by (relative)", relative_error(found, truth), limit)


def time_body(run: Run) -> None:
    """Forward and backward of the body with adapters: SDPA, FlexAttention, and SDPA with the body compiled.

    The head, the same for all, is left out.
    """
    torch.compiler.reset()
    model = policy(run)
    batch = collate_shared_prefix(random_groups(run.sizes.step, _vocab_size(model))).to(run.device)
    dense = tree_masks(model, batch.shared_prefix_mask)

    def step(body: nn.Module, masks: Any) -> None:
        with _autocast(run):
            states = body_states(body, batch, masks)
        states.float().square().mean().backward()
        body.zero_grad()

    sides = {"SDPA": partial(step, body_of(model), dense)}
    if run.on_cuda:
        blocks = tree_masks(model, partial(tree_block_mask, batch))
        sides["FlexAttention"] = partial(step, body_of(with_flex(model)), blocks)
        sides["SDPA, compiled"] = partial(step, cast(nn.Module, torch.compile(body_of(model), dynamic=False)), dense)
    working = {}
    for name, side in sides.items():
        with run.attempt(f"the whole body, {name}", seconds=120):
            side()  # compiles
            working[name] = side
    found = timed(run, working, repeats=run.sizes.repeats, warmups=2)
    for name, timing in found.items():
        run.row("attention", f"whole body, {run.sizes.step}", name, timing)
    compare(run, "whole body", found)


def _vocab_size(model: nn.Module) -> int:
    return base_causal_lm(model).config.get_text_config().vocab_size


# --- the command --------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Run], None]] = {
    part.__name__: part for part in (correctness, training, sampling, attention)
}


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
    found = {"machine": machine(run), "versions": versions(), "model": options.model or sizes.model}
    run.say(json.dumps(found["machine"] | found["versions"], ensure_ascii=False))
    for name in options.parts:
        try:
            PARTS[name](run)
        except Exception:  # what the other parts find is worth having all the same
            run.say(traceback.format_exc())
            run.check(f"{name} broke off: errors", 1, 0)
        _free(run)
        if options.json:
            whole = found | {"rows": run.rows, "checks": run.checks}
            options.json.write_text(json.dumps(whole, indent=2, ensure_ascii=False), encoding="utf-8")
    run.console.print(table(run.rows))
    failed = [check["name"] for check in run.checks if not check["passed"]]
    run.say(f"{len(failed)} of {len(run.checks)} checks failed" + "".join(f"\nFAILED {name}" for name in failed))
    return 1 if failed else 0


def machine(run: Run) -> dict[str, Any]:
    """What the numbers were found on."""
    found: dict[str, Any] = {"device": platform.machine(), "platform": platform.platform()}
    if run.on_cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory, "driver": _driver()}
    return found | {"nominal_peak": nominal_peak(run)}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):  # containers may come without it
        return "unknown"


def versions() -> dict[str, Any]:
    """Of what the numbers depend on."""
    names = ("tutelage", "torch", "transformers", "peft", "trl")
    return {name: version(name) for name in names} | {"python": platform.python_version(), "cuda": torch.version.cuda}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """All rows that were measured; memory in GiB, and beside it how much of it was there before the step."""
    made = Table("part", "what", "side", "ms [min–max]", "tokens/s", "GiB (before)", "MFU (of a measured matmul)")
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
        )
    return made


def _free(run: Run) -> None:
    gc.collect()
    if run.on_cuda:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
