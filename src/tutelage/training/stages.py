"""Stages on the engine: sample from the policy as it stands, cache the reference, train on the chunk, go on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from tutelage.data.demonstrations import is_conversational
from tutelage.errors import UserError
from tutelage.groups import Group, drop_copies
from tutelage.models.weights import WeightSet, fingerprint
from tutelage.sampling import Sampler, SamplingParams, TransformersSampler
from tutelage.scoring.logps import cached_logps
from tutelage.training.config import DemonstrationConfig
from tutelage.training.schedule import StageSchedule
from tutelage.training.store import StageStore
from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["StageConfig", "StageTrainer"]


@dataclass
class StageConfig(DemonstrationConfig):
    """What every algorithm that samples is configured with."""

    stages_per_epoch: int = field(
        default=4,
        metadata={
            "help": "T: the number of stages per epoch. Each samples from the policy as it then "
            "is. More stages: fresher opponents, less collapse, a little more time."
        },
    )
    num_samples: int = field(default=1, metadata={"help": "n: completions sampled for each prompt."})
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature. The theory wants 1: samples of the policy itself."}
    )
    top_k: int = field(default=0, metadata={"help": "Sample from the k likeliest tokens; 0 (the theory's) keeps all."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the likeliest tokens of this total probability; 1 keeps all."}
    )
    reference: str = field(
        default="stage",
        metadata={
            "help": "Which policy the reference log-probs come from: the one at the stage's start, or the initial one.",
            "choices": ["stage", "initial"],
        },
    )
    replay_stages: int = field(
        default=0,
        metadata={
            "help": "Train a stage also on the samples of so many stages before it, scored anew by its reference. "
            "Each adds as many groups to a batch as the batch has."
        },
    )
    sampling_batch_size: int = field(
        default=64, metadata={"help": "Sequences decoded side by side. Changes speed and memory, not the samples."}
    )
    save_each_stage: bool = field(
        default=True,
        metadata={"help": "Write a checkpoint at the end of each stage, besides those of --save_steps."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("stages_per_epoch", 1), ("num_samples", 1), ("replay_stages", 0)):
            if getattr(self, name) < least:
                raise UserError(f"must be at least {least}, not {getattr(self, name)}.", field=name)
        if self.temperature <= 0:
            raise UserError("must be above 0: greedy completions are no samples of the policy.", field="temperature")


class StageTrainer(DemonstrationTrainer):
    """Adds stages to the engine. A stage owns consecutive optimizer steps.

    At a stage's first step the prompts of all its steps are drawn from the data loader; the policy samples for them;
    reference log-probs are computed once and kept; samples equal to their demonstration are dropped and counted; then
    the steps are handed out. Everything sampled lies in ``output_dir/stages`` and a killed run goes on from there.

    Args:
        sampler: draws the samples; by default from the model in memory.
        otherwise: as ``DemonstrationTrainer``.
    """

    args: StageConfig

    def __init__(
        self, model, args: StageConfig, train_dataset=None, *further, sampler: Sampler | None = None, **options
    ):
        conversational = train_dataset is not None and is_conversational(
            train_dataset, source=options.get("source", "training data")
        )
        super().__init__(model, args, train_dataset, *further, **options)
        self.sampling_params = SamplingParams(
            max_completion_length=args.max_completion_length,
            stop_ids=self.tokenization.stop_ids(conversational),
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
        )
        self.sampler = sampler or TransformersSampler(
            self.policy, batch_size=args.sampling_batch_size, pad_token_id=self.tokenization.pad_id
        )
        self.initial = WeightSet(self.policy) if args.reference == "initial" else None
        self.store = StageStore(Path(str(args.output_dir)) / "stages", self._sample_settings())
        self.schedule: StageSchedule | None = None
        self.stage = -1
        self._steps: deque[list[list[Group]]] = deque()
        self._facts: dict[str, Any] = {}
        self.add_callback(_StageEnd(self))
        if train_dataset is not None:  # too many stages should be found before anything begins
            self.set_initial_training_values(args, self.get_train_dataloader())

    def _sample_settings(self) -> dict[str, Any]:
        """What the samples and their reference log-probs depend on besides the policy."""
        names = ("seed", "num_samples", "temperature", "top_k", "top_p", "max_completion_length", "reference")
        return {name: getattr(self.args, name) for name in names}

    def set_initial_training_values(self, args, dataloader):
        """As transformers'; here the number of steps in an epoch becomes known, and with it the stages."""
        values = super().set_initial_training_values(args, dataloader)
        self.schedule = StageSchedule(values[1] // self.passes, self.args.stages_per_epoch, self.passes)
        self._steps.clear()
        return values

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimizer step; begins a stage when none is left of the last one."""
        if not self._steps:
            self._begin_stage(epoch_iterator)
        return self._step_of(self._steps.popleft() if self._steps else [])

    @property
    def passes(self) -> int:
        """How often the steps of a stage go over its samples."""
        return 1

    @property
    def needs_samples(self) -> bool:
        """Whether a demonstration teaches nothing without a sample beside it."""
        return True

    # --- a stage ----------------------------------------------------------------------------------------------------

    def _begin_stage(self, epoch_iterator: Iterator) -> None:
        assert self.schedule is not None
        step = self.state.global_step
        self.stage = self.schedule.stage_of(step)
        first, end = self.schedule.bounds(self.stage)
        end = min(end, self.state.max_steps)
        accumulation = self.args.gradient_accumulation_steps
        steps = [list(islice(epoch_iterator, accumulation)) for _ in range(step, end)]
        if not all(steps):
            raise UserError(
                f"the data end after {step + sum(map(bool, steps))} of {self.state.max_steps} optimizer steps.",
                remedy="Lower --max_steps, or give a stream that is long enough (IterableDataset.repeat).",
                field="max_steps",
            )
        demonstrations = {group.row: group for batches in steps for batch in batches for group in batch}
        at_start = step == first
        if at_start:
            self.check_weights()  # nothing can be sampled from weights that are not finite
        recorded = self._record_stage(list(demonstrations.values()), at_start=at_start)
        if at_start:
            self._watch_stage([recorded[row] for row in demonstrations])
        prepared = self.prepare_stage(recorded, at_start=at_start)
        for batches in steps:
            self._steps.append([[group for entry in batch for group in prepared[entry.row]] for batch in batches])

    def prepare_stage(self, recorded: dict[int, Group], *, at_start: bool) -> dict[int, list[Group]]:
        """What the optimizer steps of a stage train on for each of its rows: an algorithm's say.

        Here the row's group and those replayed with it, without copies of the demonstration.

        Args:
            recorded: all groups of the stage by row, with samples and reference log-probs, in the order of the record.
            at_start: the policy stands where the stage began; False for a run resumed inside the stage.
        """
        replayed = self._replayed(recorded, at_start=at_start)
        prepared = {}
        for row, group in recorded.items():
            groups = [drop_copies(entry) for entry in (group, *replayed.get(row, ()))]
            prepared[row] = [entry for entry in groups if len(entry.completions) > 1 or not self.needs_samples]
        return prepared

    def _record_stage(self, demonstrations: list[Group], *, at_start: bool) -> dict[int, Group]:
        """Samples and reference log-probs of the stage's rows: from disk as far as they are there, else made now."""
        policy = fingerprint(self.policy.named_parameters()) if at_start else None
        recorded = self.store.read(self.stage, policy)
        # A record of other data, or of the same data in another template, is none.
        missing = [group for group in demonstrations if not _is_record(recorded.get(group.row), group)]
        if policy is None:
            if missing:
                raise UserError(
                    f"stage {self.stage} has no samples for row {missing[0].row}: the data differ from the first run's.",
                    remedy="Resume with the same data, seed and batch size.",
                    file=str(self.store.path(self.stage)),
                )
            return recorded
        kept = [recorded[group.row] for group in demonstrations if _is_record(recorded.get(group.row), group)]
        self._facts = {"step": self.state.global_step, "rows": len(demonstrations), "seconds_sampling": 0.0}
        recorded = self.store.write(
            self.stage,
            policy,
            kept,
            self._sampled(missing, done=len(kept)),
            self.tokenization.text,
            lambda: self._facts,
        )
        self.sampled_tokens += sum(len(c.token_ids) for group in recorded.values() for c in group.completions[1:])
        return recorded

    def _sampled(self, demonstrations: list[Group], *, done: int) -> Iterator[list[Group]]:
        """Samples and scores a few batches' worth of prompts at a time; each piece is on disk before the next begins."""
        piece = max(1, 4 * self.args.sampling_batch_size // self.args.num_samples)
        name = f"stage {self.stage}"
        with self.progress.phase(f"{name}: sampling", done + len(demonstrations)) as advance:
            for start in range(0, len(demonstrations), piece):
                groups = demonstrations[start : start + piece]
                begin = time.perf_counter()
                sampled = self.with_samples(groups, stage=self.stage)
                middle = time.perf_counter()
                scored = self.with_reference(sampled)
                self.took("sampling", middle - begin)
                self.took("reference", time.perf_counter() - middle)
                yield scored
                advance(done + start + len(groups))

    def with_samples(self, groups: list[Group], *, stage: int) -> list[Group]:
        """The groups with completions of the policy added; ``stage`` names them in the random stream."""
        with self.compute_loss_context_manager():
            drawn = self.sampler.sample(
                [group.prompt_ids for group in groups],
                self.sampling_params,
                num_samples=self.args.num_samples,
                rows=[group.row for group in groups],
                stage=stage,
            )
        return [
            replace(group, completions=(*group.completions, *(sample.completion for sample in samples)))
            for group, samples in zip(groups, drawn, strict=True)
        ]

    def with_reference(self, groups: list[Group]) -> list[Group]:
        """The groups with log-probs under the reference."""
        with self.initial.active() if self.initial else nullcontext():
            logps = self.policy_logps(groups)
        return [replace(group, reference_logps=values) for group, values in zip(groups, logps, strict=True)]

    def policy_logps(self, groups: Sequence[Group]) -> list[tuple[float, ...]]:
        """Log-probs of all completions under the policy as it stands (nats per sequence), one tuple per group."""
        with self.compute_loss_context_manager():
            return cached_logps(
                self.policy,
                groups,
                batch_size=self.args.per_device_eval_batch_size,
                layout=self.layout,
                pad_token_id=self.tokenization.pad_id,
            )

    def _replayed(self, recorded: dict[int, Group], *, at_start: bool) -> dict[int, tuple[Group, ...]]:
        """For each row of the stage, a group of each earlier stage that is replayed, scored by this stage's reference.

        Their scores lie beside the stage's samples: inside the stage the policy that gave them is gone.
        """
        stages = []
        for earlier in range(max(0, self.stage - self.args.replay_stages), self.stage):
            name = f"replayed-{earlier:04d}"
            if at_start:
                groups = self.store.groups(earlier)[: len(recorded)]
                if self.args.reference == "stage":
                    groups = self.with_reference(groups)
                self.store.write_groups(self.stage, name, groups, self.tokenization.text)
            stages.append(self.store.groups(self.stage, name))
        return dict(zip(recorded, zip(*stages, strict=False), strict=False))

    def took(self, what: str, seconds: float) -> None:
        """Add to the time spent on one kind of work, of the run and of the stage."""
        self.seconds[what] += seconds
        self._facts[f"seconds_{what}"] = self._facts.get(f"seconds_{what}", 0.0) + seconds

    def _watch_stage(self, groups: Sequence[Group]) -> None:
        """Log what the stage's samples look like."""
        samples = [c.token_ids for group in groups for c in group.completions[1:]]
        copies = sum(c.token_ids == g.completions[0].token_ids for g in groups for c in g.completions[1:])
        self.log(
            {
                "pairs/dropped": copies,
                "samples/truncated_fraction": _mean([not c.finished for g in groups for c in g.completions[1:]]),
                "samples/distinct_1": distinct_n(samples, 1),
                "samples/distinct_2": distinct_n(samples, 2),
                "length/demonstrations": _mean([len(g.completions[0].token_ids) for g in groups]),
                "length/samples": _mean([len(sample) for sample in samples]),
            }
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the engine's; every line says which stage it belongs to."""
        super().log({"stage": self.stage, **logs} if self.stage >= 0 else logs, start_time)

    def _place(self) -> str:
        return f" of stage {self.stage}"


class _StageEnd(TrainerCallback):
    """Asks for a checkpoint where a stage ends."""

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        schedule = self.trainer.schedule
        assert schedule is not None
        ends = schedule.bounds(schedule.stage_of(state.global_step - 1))[1] == state.global_step
        if ends and self.trainer.args.save_each_stage and args.save_strategy != IntervalStrategy.NO:
            control.should_save = True


def _is_record(recorded: Group | None, group: Group) -> bool:
    """Whether a recorded group is of this prompt and demonstration."""
    return (
        recorded is not None
        and recorded.prompt_ids == group.prompt_ids
        and recorded.completions[:1] == group.completions
    )


def distinct_n(completions: Sequence[Sequence[int]], n: int) -> float:
    """Share of different n-grams among all n-grams of the completions (Li et al. 2016, arXiv 1510.03055).

    >>> distinct_n([(1, 2, 1), (1, 2)], 1)
    0.4
    """
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
