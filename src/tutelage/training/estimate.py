"""What a run will take, before it begins: rows, samples and tokens, memory, disk, and seconds from a few rows that are timed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import Trainer

from tutelage.data.records import group_record
from tutelage.data.tokenized import group_from_row
from tutelage.groups import Group
from tutelage.models.loading import base_causal_lm
from tutelage.training.stage_config import StageConfig

if TYPE_CHECKING:
    from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["Disk", "Memory", "Pace", "Work", "disk_of", "memory_of", "pace_of", "state_bytes_per_weight", "work_of"]

_TIMED_ROWS, _TIMED_TOKENS = 4, 64
_MARGIN = 1 << 16  # of a checkpoint's small files


@dataclass(frozen=True, slots=True)
class Work:
    """How much there is to do; what is sampled is at most so much.

    Attributes:
        steps: optimizer steps of the run.
        stages: of the run; 0 without.
        rows: of a stage, or of an epoch without stages; a row counts as often as steps go over it.
        sampled_rows: rows of a stage that are sampled for, those it is validated on included.
        samples: of a stage.
        prompt_tokens, completion_tokens: of the longest prompt and demonstration; of a stream, what the settings allow.
        sample_tokens: of a stage, at most.
        row_tokens: a row's prompt and its completions, at most.
        knows_earlier: whether the loss asks for log-probs or a distribution under an earlier policy: rows are passed once more.
    """

    steps: int
    stages: int
    rows: int
    sampled_rows: int
    samples: int
    prompt_tokens: int
    completion_tokens: int
    sample_tokens: int
    row_tokens: int
    knows_earlier: bool = False


def work_of(trainer: DemonstrationTrainer) -> Work:
    """From the settings and the data of a run that has not begun."""
    args = trainer.args
    values = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    steps, per_epoch, batch = values[6], values[1], values[4]
    prompt, completion = _longest(trainer)
    if trainer.stages is None:
        rows, tokens = min(steps, per_epoch) * batch, prompt + completion
        return Work(steps, 0, rows, 0, 0, prompt, completion, 0, tokens, trainer.knows_earlier)
    settings = cast(StageConfig, args)
    schedule = trainer.stages.schedule
    assert schedule is not None
    stages = schedule.stage_of(steps - 1) + 1
    of_stage = -(-min(steps, per_epoch) // min(stages, schedule.stages_per_epoch))
    candidates = getattr(trainer.stages.phase, "candidates", None)
    sampled = -(-of_stage // trainer.stages.epochs) * batch + (len(candidates.rows.groups) if candidates else 0)
    samples = sampled * settings.num_samples
    longest = max(completion, settings.max_completion_length)
    return Work(
        steps,
        stages,
        of_stage * batch,
        sampled,
        samples,
        prompt,
        completion,
        samples * settings.max_completion_length,
        prompt + completion + settings.num_samples * longest,
    )


def _longest(trainer: DemonstrationTrainer) -> tuple[int, int]:
    data: Any = trainer.train_dataset
    if isinstance(data, IterableDataset):
        return trainer.args.max_prompt_length, trainer.args.max_completion_length
    assert isinstance(data, Dataset)
    found = {"prompt_ids": 0, "demonstration_ids": 0}
    for table in data.select_columns(list(found)).with_format("arrow").iter(batch_size=1000):
        for name in found:
            lengths = pa.concat_arrays(cast(pa.Table, table).column(name).chunks).value_lengths().to_numpy()
            found[name] = max(found[name], int(lengths.max(initial=0)))
    return found["prompt_ids"], found["demonstration_ids"]


# --- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the device that trains.

    Attributes:
        weights: of the policy; they are there already.
        gradients, optimizer: of the trained weights, to come.
        batch: activations of the largest micro-batch, to come: an estimate.
    """

    weights: int
    gradients: int
    optimizer: int
    batch: int

    @property
    def to_come(self) -> int:
        """What is certain of what is to come."""
        return self.gradients + self.optimizer


def memory_of(trainer: DemonstrationTrainer, work: Work) -> Memory:
    """By arithmetic; the optimizer's state is that of one step on a small weight.

    Activations: 34 bytes per token, layer and unit of the hidden size where numbers have 16 bits, attention scores not counted
    (Korthikanti et al. 2022, arXiv 2205.05198); with gradient checkpointing 2 per layer, and one layer's 34.
    """
    policy, args = trainer.policy, trainer.args
    weights = list(policy.parameters())
    trained = [p for p in weights if p.requires_grad]
    config = base_causal_lm(policy).config.get_text_config()
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    width = 1 if args.bf16 or args.fp16 else 2
    per_token = (2 * layers + 34) if args.gradient_checkpointing else 34 * layers
    return Memory(
        weights=sum(_bytes(p) for p in weights),
        gradients=sum(_bytes(p) for p in trained),
        optimizer=round(sum(p.numel() for p in trained) * state_bytes_per_weight(trainer)),
        batch=args.per_device_train_batch_size * work.row_tokens * hidden * per_token * width,
    )


def state_bytes_per_weight(trainer: DemonstrationTrainer) -> float:
    """What the optimizer keeps, from one step on a weight of 256 × 256 numbers; two numbers for one that looks at the model."""
    trained = next(p for p in trainer.policy.parameters() if p.requires_grad)
    weight = nn.Parameter(torch.zeros(256, 256, dtype=trained.dtype, device=trained.device))
    kind, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args, cast(Any, trainer.policy))
    if {"params", "model", "optimizer_dict"} & options.keys():
        return 2.0 * weight.element_size()
    optimizer = kind([weight], **options)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(_bytes(t) for t in tensors if t.numel() > 1) / weight.numel()


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- disk -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes in the output folder.

    Attributes:
        checkpoint: one.
        checkpoints: how many there are at once, the one that is being written included.
        export: the model.
        stages: the samples of the stages that are kept, at most: an estimate.
    """

    checkpoint: int
    checkpoints: int
    export: int
    stages: int

    @property
    def certain(self) -> int:
        """Without the samples."""
        return self.checkpoint * self.checkpoints + self.export


def disk_of(trainer: DemonstrationTrainer, work: Work, memory: Memory, bytes_per_token: float) -> Disk:
    """By arithmetic.

    Args:
        bytes_per_token: of a sample in the stages' files.
    """
    args = trainer.args
    optimizer = 0 if args.save_only_model else memory.optimizer
    none = str(getattr(args.save_strategy, "value", args.save_strategy)) == "no"
    written = max(1, work.stages, work.steps // max(1, round(args.save_steps)) if args.save_steps >= 1 else 1)
    kept = 0 if none else min(written, (args.save_total_limit or written) + 1)
    stages = work.stages
    if isinstance(args, StageConfig) and args.keep_stages is not None:
        # What checkpoints go on from stays too.
        stages = min(stages, max(args.keep_stages, (args.save_total_limit or 0) + (args.stages_read_again or 0)) + 1)
    per_stage = bytes_per_token * (
        work.sample_tokens + work.sampled_rows * (work.prompt_tokens + work.completion_tokens)
    )
    checkpoint = memory.gradients + optimizer + sum(part.nbytes for part in trainer.checkpointed) + _MARGIN
    return Disk(checkpoint, kept, memory.gradients, round(per_stage * stages))


# --- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pace:
    """What a few rows took.

    Attributes:
        step: seconds per token of prompt and completions in an optimizer step.
        sample: seconds per sampled token; 0 where nothing is sampled.
        score: seconds per token in a pass without gradient.
        bytes_per_token: of a sample in the stages' files.
    """

    step: float
    sample: float
    score: float
    bytes_per_token: float


def pace_of(trainer: DemonstrationTrainer) -> Pace:
    """Samples for a few rows, scores them, and computes a gradient of their log-probs; no weight is changed."""
    groups = _some_rows(trainer)
    sampling, bytes_per_token = 0.0, 0.0
    if trainer.stages is not None:
        rollout = trainer.stages.rollout
        begun = perf_counter()
        params = replace(
            rollout.params, max_completion_length=min(_TIMED_TOKENS, rollout.params.max_completion_length)
        )
        with trainer.compute_loss_context_manager():
            drawn = rollout.sampler.sample([g.prompt_ids for g in groups], params, rows=[g.row for g in groups])
        tokens = sum(len(sample.token_ids) for samples in drawn for sample in samples)
        sampling = (perf_counter() - begun) / max(1, tokens)
        groups = [group.add(s.completion for s in samples) for group, samples in zip(groups, drawn, strict=True)]
        scored = rollout.score(groups)
        size = sum(
            len(json.dumps(group_record(g, trainer.tokenization.text), ensure_ascii=False).encode()) for g in scored
        )
        bytes_per_token = size / max(1, sum(len(group) for group in scored))
    tokens = sum(len(group) for group in groups)
    begun = perf_counter()
    trainer.scorer.token_logps(groups)
    scoring = (perf_counter() - begun) / tokens
    begun = perf_counter()
    with trainer.compute_loss_context_manager():
        found = trainer.measure(
            trainer.policy, groups, layout=trainer.layout, pad_token_id=trainer.tokenization.pad_id
        )
    trainer.accelerator.backward(found.sums().sum())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    stepping = (perf_counter() - begun) / tokens
    trainer.policy.zero_grad()
    return Pace(stepping, sampling, scoring, bytes_per_token)


def _some_rows(trainer: DemonstrationTrainer) -> Sequence[Group]:
    data: Any = trainer.train_dataset
    return [group_from_row(row) for row in islice(iter(data), _TIMED_ROWS)]
