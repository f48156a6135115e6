"""Settings of every algorithm that samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from tutelage.errors import UserError
from tutelage.ranges import TEMPERATURE, number, whole
from tutelage.sampling.base import SamplingParams
from tutelage.training.collapse import CollapseLimits
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

    keep_stages: Annotated[int | None, whole(1)] = field(
        default=None,
        metadata={
            "help": "Bounds the disk: of the stages that are needed no more, keep the samples of this many of the latest. What a "
            "checkpoint that is kept goes on from stays anyway. By default of all."
        },
    )

    on_collapse: str = field(
        default="warn",
        metadata={
            "help": "What to do where a stage begins with a policy beyond a limit of --collapse_*: log a warning, stop with a "
            "checkpoint, or go back to the best stage's policy (as --load_best_stage_at_end) and end there.",
            "choices": ["warn", "stop", "best"],
        },
    )
    collapse_truncated: Annotated[float, number(0, 1)] = field(
        default=0.9,
        metadata={
            "help": "Collapsed if more than this share of the samples is truncated, and more than in the first stage."
        },
    )
    collapse_distinct: Annotated[float, number(0, 1)] = field(
        default=0.5,
        metadata={"help": "Collapsed if distinct-2 of the samples falls below this share of the first stage's."},
    )
    collapse_logp: Annotated[float, number(0)] = field(
        default=0.1,
        metadata={
            "help": "Collapsed if the log-prob of the demonstrations (nats per token) falls by more than this share since the start."
        },
    )
    load_best_stage_at_end: bool = field(
        default=False,
        metadata={
            "help": "Export the policy of the stage that did best on the held-out rows (--eval_dataset_name): by the mean score of "
            "sampled answers with --verifier, else by the log-prob of the demonstrations. They are evaluated at each stage."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.keep_stages is not None and (problem := self._kept_stages_problem(self.keep_stages)):
            raise UserError(f"cannot bound the stages: {problem[0]}", remedy=problem[1], field="keep_stages")

    @property
    def collapse_limits(self) -> CollapseLimits:
        """Beyond which a policy counts as collapsed."""
        return CollapseLimits(self.collapse_truncated, self.collapse_distinct, self.collapse_logp)

    @property
    def keeps_best_stage(self) -> bool:
        """Whether the weights of the best stage are needed, of an algorithm that does not choose by itself."""
        return self.load_best_stage_at_end or self.on_collapse == "best"

    def _kept_stages_problem(self, keep: int) -> tuple[str, str] | None:
        """Why stages cannot be removed, and what to do about it."""
        if str(getattr(self.save_strategy, "value", self.save_strategy)) == "no":
            return "a stage is removed after a checkpoint, and there are none.", "Use --save_strategy steps."
        if self.save_total_limit is None:
            return (
                "every checkpoint is kept, and needs its stages.",
                "Give --save_total_limit, the number of checkpoints to keep.",
            )
        read = self.stages_read_again
        if read is None:
            return (
                "the reward is fitted to the samples of all stages.",
                f"Give --reward_replay_stages, at most {keep}.",
            )
        if read > keep:
            return f"the samples of {read} earlier stages are read again.", f"Use {read} or more."
        return None

    @property
    def stages_read_again(self) -> int | None:
        """Of how many earlier stages the samples are read when one begins; None for all."""
        return self.replay_stages

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
