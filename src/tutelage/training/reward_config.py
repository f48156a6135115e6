"""Settings of stages that learn a reward."""

from __future__ import annotations

from dataclasses import dataclass, field

from tutelage.errors import UserError
from tutelage.training.stage_config import StageConfig

__all__ = ["RewardStageConfig"]


@dataclass
class RewardStageConfig(StageConfig):
    """Settings of stages that learn a reward."""

    num_samples: int = field(default=4, metadata={"help": "n: completions sampled for each prompt; at least 2."})
    reference: str = field(
        default="initial",
        metadata={"help": "Always the initial policy, π_0: the KL holds to it.", "choices": ["initial"]},
    )
    lr_scheduler_type: str = field(  # type: ignore[assignment]
        default="constant",
        metadata={"help": "linear, cosine, constant, constant_with_warmup, … (SchedulerType of transformers)."},
    )
    per_device_train_batch_size: int = field(
        default=2,
        metadata={
            "help": "Prompts in a micro-batch of the policy phase, each with its samples. Small: at a low learning rate many "
            "noisy steps learn more from a stage's samples than a few exact ones."
        },
    )
    policy_epochs: int = field(
        default=1,
        metadata={
            "help": "How often the policy phase goes over a stage's samples; the importance ratios are clipped. Several at a "
            "lower learning rate cost time and keep the policy nearer to π_0."
        },
    )
    beta: float = field(
        default=0.1,
        metadata={"help": "Weight of the KL to π_0, in units of reward a nat. Larger holds the policy nearer."},
    )
    reward_learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of the reward; constant."})
    reward_batch_size: int = field(
        default=8,
        metadata={"help": "Groups an optimizer step of the reward. Its gradient is noisy early; steps help it more."},
    )
    reward_loss: str = field(
        default="logistic",
        metadata={
            "help": "How demonstrations are put over samples: logistic (Bradley-Terry), or linear (the theory's contrast, "
            "bounded by squares of the rewards).",
            "choices": ["logistic", "linear"],
        },
    )
    reward_margin: float = field(default=0.0, metadata={"help": "Reward by which a demonstration should lead."})
    reward_label_smoothing: float = field(
        default=0.0, metadata={"help": "How often a sample may be the better answer, in [0, 0.5); logistic only."}
    )
    reward_centering: float = field(
        default=0.01, metadata={"help": "Weight of the squared sum of a pair's rewards, which keeps them around zero."}
    )
    reward_regularization: float = field(
        default=1.0, metadata={"help": "ρ of the linear loss: rewards stay within ±1/ρ. Linear only."}
    )
    reward_epochs: int = field(
        default=2, metadata={"help": "Epochs of a reward phase over the stage's groups (K, in epochs)."}
    )
    reward_steps: int | None = field(
        default=None, metadata={"help": "K, optimizer steps of a reward phase; goes before --reward_epochs."}
    )
    reward_replay_stages: int = field(
        default=0, metadata={"help": "Fit the reward also on the samples of so many stages before."}
    )
    reward_pairs: str = field(
        default="demonstration_vs_sample",
        metadata={
            "help": "What demonstrations are put over: samples of the policy as it is, or also of the initial policy.",
            "choices": ["demonstration_vs_sample", "demonstration_vs_sample+initial"],
        },
    )
    reward_warmup_stages: int = field(
        default=1, metadata={"help": "The first so many stages of a run fit the reward and leave the policy as it is."}
    )
    early_stopping: str = field(
        default="saturated",
        metadata={
            "help": "End a reward phase whose training accuracy has reached --saturation, or never.",
            "choices": ["saturated", "never"],
        },
    )
    saturation: float = field(default=0.97, metadata={"help": "Training accuracy at which a reward phase ends."})
    truncated_samples: str = field(
        default="floor",
        metadata={
            "help": "Completions cut at the length limit. floor: the reward compares them only with demonstrations that "
            "were cut too, and in the policy phase one is never better than the worst of its prompt that finished. "
            "score: like any other. drop: as floor for the reward, left out of the policy phase.",
            "choices": ["floor", "score", "drop"],
        },
    )
    preference_dataset: str | None = field(
        default=None,
        metadata={"help": "Preference pairs that the reward learns from too: a hub name, folder or file."},
    )
    preference_weight: float = field(default=1.0, metadata={"help": "Weight of the loss of the preference pairs."})
    demonstration_weight: float = field(
        default=1.0, metadata={"help": "Weight of the loss of demonstrations over samples."}
    )
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A separate model for the reward, with the policy's tokenizer; by default the policy's base."
        },
    )
    init_reward_from: str | None = field(
        default=None, metadata={"help": "Start from the reward of an earlier run (its reward folder)."}
    )
    validation_rows: int | None = field(
        default=None,
        metadata={
            "help": "Rows kept from training: on them the policy phase waits for the reward, and the best stage is chosen. "
            "By default a tenth, at least 16 and at most 128."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples < 2:
            raise UserError(
                f"a sample is judged against the others of its prompt, so {self.num_samples} is too few.",
                remedy="Use --num_samples 2 or more.",
                field="num_samples",
            )
        if self.replay_stages:
            raise UserError(
                "the policy phase takes no old samples.", remedy="Use --reward_replay_stages.", field="replay_stages"
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
                raise UserError(f"must not be below 0, but is {getattr(self, name):g}.", field=name)
        for name in ("reward_learning_rate", "reward_regularization"):
            if getattr(self, name) <= 0:
                raise UserError(f"must be above 0, not {getattr(self, name):g}.", field=name)
        if not 0 <= self.reward_label_smoothing < 0.5:
            raise UserError("must be at least 0 and below 0.5.", field="reward_label_smoothing")
        if not 0.5 < self.saturation <= 1:
            raise UserError("must be above 0.5 and at most 1.", field="saturation")
