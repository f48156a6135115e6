"""Settings of every algorithm that samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tutelage.errors import UserError
from tutelage.sampling.base import SamplingParams
from tutelage.training.config import DemonstrationConfig

__all__ = ["StageConfig"]


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
            "help": "Train a stage also on the samples of so many stages before it, scored again by its reference. The "
            "groups of each are spread evenly over the stage's rows."
        },
    )
    sampler_logps_tolerance: float = field(
        default=0.002,
        metadata={
            "help": "The sampler's own log-probs serve as those of the policy where they differ from the trainer's by no "
            "more than this on average (nats per token), which saves a pass over the samples. The difference is "
            "measured once per stage and logged as samples/logp_gap. 0 always takes the trainer's."
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
        if self.sampler_logps_tolerance < 0:
            raise UserError(
                f"must not be below 0, but is {self.sampler_logps_tolerance:g}.", field="sampler_logps_tolerance"
            )
        if self.temperature <= 0:
            raise UserError("must be above 0: greedy completions are no samples of the policy.", field="temperature")

    def sampling_params(self, stop_ids: frozenset[int]) -> SamplingParams:
        """How a stage's completions are drawn."""
        return SamplingParams(
            max_completion_length=self.max_completion_length,
            stop_ids=stop_ids,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
        )

    def sample_settings(self) -> dict[str, Any]:
        """What the samples and their reference log-probs depend on besides the policy."""
        names = ("seed", "num_samples", "temperature", "top_k", "top_p", "max_completion_length", "reference")
        return {name: getattr(self, name) for name in names}
