"""Settings of stages that learn a reward."""

from __future__ import annotations

from dataclasses import dataclass, field

from tutelage.errors import UserError
from tutelage.training.stage_config import StageConfig

__all__ = ["RewardStageConfig"]


@dataclass
class RewardStageConfig(StageConfig):
    """Settings of stages that learn a reward."""

    num_samples: int = field(default=4, metadata={"help": "n: number of completions sampled per prompt; at least 2."})
    reference: str = field(
        default="initial",
        metadata={"help": "Always the initial policy, π_0, to which the KL is measured.", "choices": ["initial"]},
    )
    lr_scheduler_type: str = field(  # type: ignore[assignment]
        default="constant",
        metadata={"help": "linear, cosine, constant, constant_with_warmup, … (SchedulerType of transformers)."},
    )
    per_device_train_batch_size: int = field(
        default=2,
        metadata={
            "help": (
                "Prompts per micro-batch of the policy phase, each with all its samples. Small by default: at a low "
                "learning rate, many noisy steps learn more from the samples of a stage than a few exact ones."
            )
        },
    )
    policy_epochs: int = field(
        default=1,
        metadata={
            "help": (
                "Passes of the policy phase over the samples of a stage, with clipped importance ratios. More passes "
                "at a lower learning rate take longer and keep the policy closer to π_0."
            )
        },
    )
    beta: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the KL to π_0, in units of reward per nat. Larger values keep the policy closer to π_0."
        },
    )
    reward_learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of the reward; constant."})
    reward_batch_size: int = field(
        default=8,
        metadata={"help": "Prompts per optimizer step of the reward."},
    )
    reward_loss: str = field(
        default="logistic",
        metadata={
            "help": (
                "Loss of the reward on pairs of a demonstration and a sample: logistic (Bradley-Terry), or linear "
                "(the contrast of the theory, bounded by squares of the rewards)."
            ),
            "choices": ["logistic", "linear"],
        },
    )
    reward_margin: float = field(
        default=0.0, metadata={"help": "Margin by which the reward of a demonstration should exceed that of a sample."}
    )
    reward_label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": (
                "Label smoothing: assumed probability that the sample is the better answer, in [0, 0.5). Logistic loss "
                "only."
            )
        },
    )
    reward_centering: float = field(
        default=0.01,
        metadata={"help": "Weight of the squared sum of a pair's rewards, which keeps rewards centered on zero."},
    )
    reward_regularization: float = field(
        default=1.0,
        metadata={
            "help": "ρ of the linear loss: weight of the squared rewards, which keeps them within ±1/ρ. Linear loss only."
        },
    )
    reward_epochs: int = field(
        default=2,
        metadata={"help": "K, as passes: how many passes a reward phase makes over the groups it learns from."},
    )
    reward_steps: int | None = field(
        default=None, metadata={"help": "K, as optimizer steps of a reward phase; overrides --reward_epochs."}
    )
    reward_replay_stages: int = field(
        default=0, metadata={"help": "Also fit the reward on the samples of this many previous stages."}
    )
    reward_pairs: str = field(
        default="demonstration_vs_sample",
        metadata={
            "help": (
                "What the reward compares demonstrations with: samples of the current policy, or also fresh samples "
                "of the initial policy."
            ),
            "choices": ["demonstration_vs_sample", "demonstration_vs_sample+initial"],
        },
    )
    reward_warmup_stages: int = field(
        default=1,
        metadata={
            "help": "Number of stages at the start of a run that fit the reward and leave the policy unchanged."
        },
    )
    early_stopping: str = field(
        default="saturated",
        metadata={
            "help": "Stop a reward phase when its training accuracy reaches --saturation, or never stop early.",
            "choices": ["saturated", "never"],
        },
    )
    saturation: float = field(
        default=0.97, metadata={"help": "Training accuracy at which a reward phase stops early."}
    )
    truncated_samples: str = field(
        default="floor",
        metadata={
            "help": (
                "What to do with samples truncated at the length limit. floor: the reward compares them only with "
                "truncated demonstrations, and in the policy phase they never score better than the worst finished "
                "sample of their prompt. drop: as floor for the reward, but left out of the policy phase. score: "
                "treat them like any other sample."
            ),
            "choices": ["floor", "score", "drop"],
        },
    )
    preference_dataset: str | None = field(
        default=None,
        metadata={"help": "Preference pairs that the reward also learns from: a hub name, a folder or a file."},
    )
    preference_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on preference pairs."})
    demonstration_weight: float = field(
        default=1.0, metadata={"help": "Weight of the loss on pairs of a demonstration and a sample."}
    )
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": (
                "A separate model for the reward, with the same tokenizer as the policy. By default the reward "
                "shares the policy's base."
            )
        },
    )
    init_reward_from: str | None = field(
        default=None, metadata={"help": "Start from the reward of an earlier run (the path of its reward folder)."}
    )
    validation_rows: int | None = field(
        default=None,
        metadata={
            "help": (
                "Number of rows held out from training. They decide when the policy phase may run and which stage's "
                "policy is kept. By default a tenth, at least 16 and at most 128."
            )
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples < 2:
            raise UserError(
                f"each sample is compared with the others of its prompt, so {self.num_samples} is too few.",
                remedy="Use --num_samples 2 or more.",
                field="num_samples",
            )
        if self.replay_stages:
            raise UserError(
                "the policy phase does not use samples of earlier stages.",
                remedy="Use --reward_replay_stages.",
                field="replay_stages",
            )
        if self.fp16:
            raise UserError("the reward phase has no loss scaling.", remedy="Use --bf16.", field="fp16")
        for name in ("policy_epochs", "reward_epochs", "reward_steps", "reward_batch_size", "validation_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"must be at least 1, not {getattr(self, name)}.", field=name)
        for name in (
            "preference_weight",
            "demonstration_weight",
            "reward_replay_stages",
            "reward_warmup_stages",
            "beta",
            "reward_margin",
            "reward_centering",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"must be at least 0, not {getattr(self, name):g}.", field=name)
        for name in ("reward_learning_rate", "reward_regularization"):
            if getattr(self, name) <= 0:
                raise UserError(f"must be above 0, not {getattr(self, name):g}.", field=name)
        if not 0 <= self.reward_label_smoothing < 0.5:
            raise UserError("must be at least 0 and below 0.5.", field="reward_label_smoothing")
        if not 0.5 < self.saturation <= 1:
            raise UserError("must be above 0.5 and at most 1.", field="saturation")
