"""Settings of every algorithm that samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from tutelage.ranges import TEMPERATURE, number, whole
from tutelage.sampling.base import SamplingParams
from tutelage.training.vllm_config import SamplerConfig

__all__ = ["StageConfig"]


@dataclass
class StageConfig(SamplerConfig):
    """Settings shared by every algorithm that samples in stages."""

    stages_per_epoch: Annotated[int, whole(1)] = field(
        default=4,
        metadata={
            "help": (
                "T: number of stages per epoch. Each stage begins by sampling from the current policy. More stages "
                "mean fresher samples and less risk of collapse, for a little more time."
            ),
        },
    )
    num_samples: Annotated[int, whole(1)] = field(
        default=1, metadata={"help": "n: number of completions sampled per prompt."}
    )
    temperature: Annotated[float, TEMPERATURE] = field(
        default=1.0,
        metadata={
            "help": "Sampling temperature. The theory assumes 1, which samples from the policy itself.",
        },
    )
    top_k: Annotated[int, whole(0)] = field(
        default=0,
        metadata={
            "help": "Sample from the k most likely tokens only; 0 (as the theory assumes) means no limit.",
        },
    )
    top_p: Annotated[float, number(0, 1, above=True)] = field(
        default=1.0,
        metadata={
            "help": (
                "Sample from the smallest set of tokens with this total probability; 1 (as the theory assumes) means no "
                "limit."
            ),
        },
    )
    reference: str = field(
        default="stage",
        metadata={
            "help": (
                "The policy that gives the reference log-probs: the one at the start of the stage, or the initial one."
            ),
            "choices": ["stage", "initial"],
        },
    )
    replay_stages: Annotated[int, whole(0)] = field(
        default=0,
        metadata={
            "help": (
                "Also train on the samples of this many previous stages, with reference log-probs recomputed. Each "
                "adds as many groups to a batch as the batch already has."
            ),
        },
    )
    sampler_logps_tolerance: Annotated[float, number(0)] = field(
        default=0.01,
        metadata={
            "help": "The sampler's own log-probs serve as those of the policy where they differ from the trainer's by no "
            "more than this on average (nats per token), which saves a pass over the samples. The difference is "
            "measured once per stage and logged as samples/logp_gap. 0 always takes the trainer's.",
        },
    )
    save_each_stage: bool = field(
        default=True,
        metadata={"help": "Write a checkpoint at the end of each stage, in addition to those of --save_steps."},
    )

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
        remote = {} if self.sampler == "transformers" else {"sampler": self.sampler}
        return {**{name: getattr(self, name) for name in names}, **remote}
