"""What the benchmark on a GPU is made of: shapes, random models and groups, a clock, and a record of what was found."""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.profiling import top
from benchmarks.workloads import adapter
from tutelage.groups import Completion, Group, Role
from tutelage.models.loading import add_adapter, base_causal_lm, first_line, load_model

__all__ = [
    "FULL",
    "TINY",
    "Run",
    "Shape",
    "Sizes",
    "Timing",
    "autocast",
    "free_memory",
    "measured",
    "policy",
    "random_groups",
    "random_llama",
    "said",
    "take_turns",
    "vocab_size",
]


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

    ``checked`` and ``check`` are of the tests in tests/gpu; few layers, so that rounding stays small beside mistakes.
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
    sampling=(Shape(8, 8, 2, 6),),
    matmul=128,
    repeats=2,
)


class Timing(NamedTuple):
    """Seconds of each repetition; bytes that PyTorch had allocated at most, and before it began (None on a CPU)."""

    seconds: list[float]
    peak_bytes: int | None
    bytes_before: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Run:
    """What the parts share: device, sizes, the clock, and what was found so far."""

    device: torch.device
    sizes: Sizes
    model_path: str | None
    deadline: float
    console: Console = field(default_factory=lambda: Console(width=None if sys.stdout.isatty() else 160))
    rows: list[dict[str, Any]] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def on_cuda(self) -> bool:
        """Whether there is a clock to wait for and memory to measure."""
        return self.device.type == "cuda"

    def say(self, line: str) -> None:
        """Print it as it is."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def fail(self, what: str) -> None:
        """Say that something went wrong; the exit status will be 1."""
        self.failures.append(what)
        self.say(f"FAILED {what}")

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether ``seconds`` are left for ``what``; says so if not."""
        left = self.deadline - time.monotonic()
        if left < seconds:
            self.say(f"skipped: {what}: it may take {seconds:.0f} s and {max(0.0, left):.0f} s are left")
        return left >= seconds

    def row(self, part: str, what: str, side: str, timing: Timing, **numbers: Any) -> None:
        """Record what one side took, and whatever else is known about it."""
        times = {"median_s": timing.median, "min_s": min(timing.seconds), "max_s": max(timing.seconds)}
        memory = {"peak_bytes": timing.peak_bytes, "bytes_before": timing.bytes_before}
        self.rows.append({"part": part, "what": what, "side": side, **times, **memory, **numbers})
        self.say(f"{part}, {what}: {side} {1000 * timing.median:.2f} ms")

    def top(self, what: str, events: Any) -> None:
        """Record what a profiler found to take most of the time, ten lines of it."""
        entries = top(events)
        self.profiles.append({"what": what, "top": [entry._asdict() for entry in entries]})
        self.say(f"profile, {what}:")
        for entry in entries:
            self.say(f"  {entry.share:6.1%} {entry.milliseconds:9.2f} ms {entry.count:6d} × {entry.name[:100]}")

    @contextlib.contextmanager
    def attempt(self, what: str, *, seconds: float) -> Iterator[None]:
        """Within, an error or running over ``seconds`` is reported and ends no more than the attempt."""
        try:
            with time_limit(min(seconds, max(1.0, self.deadline - time.monotonic()))):
                yield
        except Exception as error:  # compilers and peers fail in ways of their own
            problem = f"{type(error).__name__}: {first_line(error)}"
            self.say(f"not measured: {what}: {problem}")
            self.rows.append({"part": "not measured", "what": what, "error": problem})


@contextlib.contextmanager
def said(run: Run, name: str) -> Iterator[None]:
    """Within, what a logger says of its choices is said here too."""
    logger, handler = logging.getLogger(name), logging.Handler(logging.INFO)
    handler.emit = lambda record: run.say(record.getMessage())
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, before)


# --- clock and memory --------------------------------------------------------------------------------------------------


def take_turns(
    run: Run, sides: Mapping[str, Callable[[], object]], *, repeats: int, warmups: int = 1
) -> dict[str, Timing]:
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


def free_memory(run: Run) -> None:
    """Give back what no one holds any more."""
    gc.collect()
    if run.on_cuda:
        torch.cuda.empty_cache()


# --- models and groups --------------------------------------------------------------------------------------------


def policy(run: Run, *, full: bool = False) -> nn.Module:
    """The model that is timed: bfloat16 with float32 adapters, or float32 weights that are all trained."""
    dtype = torch.float32 if full else torch.bfloat16
    if run.model_path:
        model = cast(Any, load_model(run.model_path, dtype=dtype)).to(run.device)
    else:
        model = random_llama(run.device, run.sizes.model, dtype)
    return (model if full else moved(add_adapter(model, adapter()))).train()


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """Adapters that change what the model computes, as after some training; new ones add zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=1e-3)
    return model


def random_llama(device: torch.device, fields: Mapping[str, int], dtype: torch.dtype, **more: Any) -> nn.Module:
    """A model of random weights; ``fields`` and ``more`` are of a LlamaConfig."""
    config = LlamaConfig(**fields, **more, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    with device:  # a billion random numbers take the CPU a while
        return cast(Any, AutoModelForCausalLM.from_config(config, dtype=dtype)).to(device)


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


def autocast(run: Run) -> torch.autocast:
    """Mixed precision as in training."""
    return torch.autocast(run.device.type, torch.bfloat16)


def vocab_size(model: nn.Module) -> int:
    """V."""
    return base_causal_lm(model).config.get_text_config().vocab_size
