"""Settings of stages that learn a reward."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from tutelage.errors import UserError
from tutelage.ranges import LARGEST, number, whole
from tutelage.rewards.comparisons import NegativeKind
from tutelage.training.config import default_of
from tutelage.training.negatives import parse_negatives
from tutelage.training.stage_config import StageConfig

__all__ = ["NEURAL_SETTINGS", "RewardStageConfig"]

NEURAL_SETTINGS = (
    "preference_dataset",
    "preference_weight",
    "demonstration_weight",
    "reward_model_name_or_path",
    "init_reward_from",
    "reward_learning_rate",
    "reward_batch_size",
    "reward_loss",
    "reward_margin",
    "reward_label_smoothing",
    "reward_centering",
    "reward_regularization",
    "reward_epochs",
    "reward_steps",
    "early_stopping",
    "saturation",
)
"""What only a neural reward reads."""

_FIXED = ("likelihood", "logp")  # rewards that are fitted to nothing


@dataclass
class RewardStageConfig(StageConfig):
    """Settings of stages that learn a reward."""

    num_samples: Annotated[int, whole(1)] = field(
        default=4, metadata={"help": "n: number of completions sampled per prompt; at least 2."}
    )
    reference: str = field(
        default="initial",
        metadata={"help": "Always the initial policy, π_0, to which the KL is measured.", "choices": ["initial"]},
    )
    warmup_steps: Annotated[float, number(0, LARGEST)] = field(
        default=0.1,
        metadata={
            "help": "Steps over which the learning rate rises; below 1, their share of all steps. A fresh optimizer at the "
            "full rate can undo what any reward would gain.",
        },
    )
    per_device_train_batch_size: Annotated[int, whole(1)] = field(
        default=4,
        metadata={
            "help": "Prompts per micro-batch of the policy phase, each with all its samples.",
        },
    )
    gradient_accumulation_steps: Annotated[int, whole(1)] = field(
        default=2, metadata={"help": "Micro-batches per optimizer step of the policy phase."}
    )
    samplings_per_stage: Annotated[int | None, whole(1)] = field(
        default=None,
        metadata={
            "help": (
                "How often the policy phase of a stage samples anew. By default at every optimizer step, so that each is "
                "on-policy; 1 samples for the whole stage at once."
            ),
        },
    )
    prompt_dataset: str | None = field(
        default=None,
        metadata={
            "help": (
                "Prompts without demonstrations, for the policy phase and for the reward: a hub name, a folder or a file "
                "in any of the formats; answers in it are not used."
            )
        },
    )
    prompt_mix: Annotated[float | None, number(0, 1, above=True)] = field(
        default=None,
        metadata={
            "help": (
                "Share of prompts without demonstrations among those that the policy samples for, above 0 and at most 1. By "
                "default every row of both kinds comes once per epoch."
            ),
        },
    )
    policy_epochs: Annotated[int, whole(1)] = field(
        default=1,
        metadata={
            "help": (
                "Passes of the policy phase over the samples of a stage, with clipped importance ratios. More passes "
                "at a lower learning rate take longer and keep the policy closer to π_0."
            ),
        },
    )
    beta: Annotated[float, number(0)] = field(
        default=0.3,
        metadata={
            "help": "Weight of the KL to π_0, in units of scaled reward per nat (see --reward_scaling). Larger values keep the "
            "policy closer to π_0.",
        },
    )
    reward: str = field(
        default="features",
        metadata={
            "help": (
                "What kind of reward is learned: features (logistic regression on features of the answers; see "
                "--reward_features), model (a body with a scalar head), likelihood (the mean log-prob of out-of-fold "
                "policies), logp (the policy's own log-prob: nothing is learned, and with --policy_update best_of_n it is "
                "self-training, a control), or auto (fits the kinds that are cheap, and takes the one that ranks the "
                "validation rows best)."
            ),
            "choices": ["features", "model", "likelihood", "logp", "auto"],
        },
    )
    reward_features: str = field(
        default="text",
        metadata={
            "help": (
                "Sets of features, separated by commas: text (n-grams, copies of the prompt, coverage, length, repeats), "
                "hidden (hidden states of the base model), logp (the policy's own log-prob), module:function."
            )
        },
    )
    hidden_depths: Annotated[list[float], number(0, 1)] = field(
        default_factory=lambda: [1 / 3, 1 / 2, 2 / 3],
        metadata={
            "help": "Depths whose hidden states are the features 'hidden': 0 is the embedding, 1 the last layer's output.",
        },
    )
    hidden_pooling: str = field(
        default="mean",
        metadata={
            "help": (
                "Hidden states of an answer: their mean over its tokens, or the last token's. With depth 1 and last alone, "
                "the reward is also saved as a model for sequence classification."
            ),
            "choices": ["mean", "last"],
        },
    )
    reward_negatives: str = field(
        default="own,initial,out_of_fold",
        metadata={
            "help": (
                "What demonstrations are put above, separated by commas: own (samples of the policy), initial (samples of "
                "the model before SFT), out_of_fold (samples of policies that did not train on the row)."
            )
        },
    )
    num_folds: Annotated[int, whole(2)] = field(
        default=2,
        metadata={"help": "K: number of folds, and of the policies trained for out_of_fold."},
    )
    fold_epochs: Annotated[float, number(0, LARGEST, above=True)] = field(
        default=3.0,
        metadata={
            "help": "Passes of the SFT of an out-of-fold policy over its demonstrations.",
        },
    )
    fold_learning_rate: Annotated[float | None, number(0, above=True)] = field(
        default=None,
        metadata={
            "help": "Peak learning rate of that SFT; by default that of tutelage sft.",
        },
    )
    fold_batch_size: Annotated[int, whole(1)] = field(
        default=8, metadata={"help": "Demonstrations per optimizer step of that SFT."}
    )
    base_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": (
                "The model before SFT, for the negatives initial and out_of_fold when all parameters are trained. By "
                "default the start. With an adapter it is always the adapter's base."
            )
        },
    )
    reward_ensemble: Annotated[int, whole(1)] = field(
        default=1,
        metadata={"help": "Number of rewards, each fitted to its own resample of the prompts."},
    )
    reward_combine: str = field(
        default="mean_minus_std",
        metadata={
            "help": "How the rewards of an ensemble are combined.",
            "choices": ["mean", "mean_minus_std", "min"],
        },
    )
    reward_gate: str = field(
        default="yardsticks",
        metadata={
            "help": (
                "What a reward must do on the validation rows before it may move the policy: yardsticks (rank "
                "demonstrations over samples better than chance, the policy's own log-prob and the length do), chance "
                "(better than chance), or off."
            ),
            "choices": ["yardsticks", "chance", "off"],
        },
    )
    reward_scaling: str = field(
        default="spread",
        metadata={
            "help": (
                "Rewards are divided by their standard deviation within a prompt (spread), or only where that is above 1 "
                "(down_only)."
            ),
            "choices": ["spread", "down_only"],
        },
    )
    drop_below: Annotated[float | None, number(0, 1, below=True)] = field(
        default=None,
        metadata={
            "help": (
                "Leave out prompts whose best sample has a reward under this quantile of the demonstrations' own rewards, "
                "such as 0.05. Only for rewards that compare across prompts."
            ),
        },
    )
    keep_policy: str = field(
        default="best",
        metadata={
            "help": "Which policy is kept at the end: the best on the validation rows by reward and KL, or the last.",
            "choices": ["best", "last"],
        },
    )
    reward_learning_rate: Annotated[float, number(0, above=True)] = field(
        default=3e-4, metadata={"help": "Learning rate of the reward; constant."}
    )
    reward_batch_size: Annotated[int, whole(1)] = field(
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
    reward_margin: Annotated[float, number(0)] = field(
        default=0.0,
        metadata={
            "help": "Margin by which the reward of a demonstration should exceed that of a sample.",
        },
    )
    reward_label_smoothing: Annotated[float, number(0, 0.5, below=True)] = field(
        default=0.0,
        metadata={
            "help": (
                "Label smoothing: assumed probability that the sample is the better answer, in [0, 0.5). Logistic loss "
                "only."
            ),
        },
    )
    reward_centering: Annotated[float, number(0)] = field(
        default=0.01,
        metadata={
            "help": "Weight of the squared sum of a pair's rewards, which keeps rewards centered on zero.",
        },
    )
    reward_regularization: Annotated[float, number(0, above=True)] = field(
        default=1.0,
        metadata={
            "help": "ρ of the linear loss: weight of the squared rewards, which keeps them within ±1/ρ. Linear loss only.",
        },
    )
    reward_epochs: Annotated[int, whole(1)] = field(
        default=2,
        metadata={
            "help": "K, as passes: how many passes a reward phase makes over the groups it learns from.",
        },
    )
    reward_steps: Annotated[int | None, whole(1)] = field(
        default=None,
        metadata={"help": "K, as optimizer steps of a reward phase; overrides --reward_epochs."},
    )
    reward_replay_stages: Annotated[int | None, whole(0)] = field(
        default=None,
        metadata={
            "help": "Also fit the reward on the samples of this many previous stages; by default of all.",
        },
    )
    reward_warmup_stages: Annotated[int, whole(0)] = field(
        default=0,
        metadata={
            "help": "Number of stages at the start of a run that fit the reward and leave the policy unchanged.",
        },
    )
    early_stopping: str = field(
        default="saturated",
        metadata={
            "help": "Stop a reward phase when its training accuracy reaches --saturation, or never stop early.",
            "choices": ["saturated", "never"],
        },
    )
    saturation: Annotated[float, number(0.5, 1, above=True)] = field(
        default=0.97,
        metadata={
            "help": "Training accuracy at which a reward phase stops early.",
        },
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
    preference_weight: Annotated[float, number(0)] = field(
        default=1.0, metadata={"help": "Weight of the loss on preference pairs."}
    )
    demonstration_weight: Annotated[float, number(0)] = field(
        default=1.0,
        metadata={"help": "Weight of the loss on pairs of a demonstration and a sample."},
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
    validation_dataset: str | None = field(
        default=None,
        metadata={
            "help": (
                "Validation rows, in any of the formats, instead of rows held out from training. Best are rows that the "
                "start was not trained on either."
            )
        },
    )
    validation_rows: Annotated[int | None, whole(1)] = field(
        default=None,
        metadata={
            "help": (
                "Number of rows held out from training. They decide when the policy phase may run and which stage's "
                "policy is kept. By default a tenth, at least 16 and at most 128."
            ),
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
        if self.load_best_stage_at_end:
            raise UserError(
                "the policy that is kept is chosen by the reward.",
                remedy="Use --keep_policy best.",
                field="load_best_stage_at_end",
            )
        if self.on_collapse == "best" and self.keep_policy != "best":
            raise UserError(
                "the policy that is kept is the last.", remedy="Use --keep_policy best.", field="on_collapse"
            )
        if self.fp16:
            raise UserError("the reward phase has no loss scaling.", remedy="Use --bf16.", field="fp16")
        if not self.hidden_depths:
            raise UserError("names no depth.", remedy="Give numbers from 0 to 1.", field="hidden_depths")
        if self.validation_dataset is not None and self.validation_rows is not None:
            raise UserError(
                "the validation rows are given by --validation_dataset.",
                remedy="Leave --validation_rows out.",
                field="validation_rows",
            )
        only_own = parse_negatives(self.reward_negatives) == ("own",)
        if only_own and self.prompt_mix == 1 and self.reward not in _FIXED:
            raise UserError(
                "the policy samples for no demonstrated prompt, so there are no samples of its own to compare.",
                remedy="Lower --prompt_mix, or use --reward_negatives initial,out_of_fold.",
                field="reward_negatives",
            )
        if self.reward_ensemble > 1 and self.reward not in ("features", "model"):
            raise UserError(
                f"there is no ensemble of the reward '{self.reward}'.",
                remedy="Use --reward features or --reward model.",
                field="reward_ensemble",
            )
        self._refuse_what_has_no_effect()

    @property
    def keeps_best_stage(self) -> bool:
        """False: the policies are chosen among by the reward (``keep_policy``)."""
        return False

    @property
    def stages_read_again(self) -> int | None:
        """Of how many earlier stages the reward is fitted to the samples; None for all."""
        return self.reward_replay_stages

    @property
    def negative_kinds(self) -> tuple[NegativeKind, ...]:
        """The negatives that the reward is fitted to; one that is fitted to nothing needs none."""
        return ("own",) if self.reward in _FIXED else parse_negatives(self.reward_negatives)

    def _refuse_what_has_no_effect(self) -> None:
        """Settings of another reward than the one that is learned."""
        given = {entry.name for entry in fields(self) if getattr(self, entry.name) != default_of(entry)}
        for name in NEURAL_SETTINGS:
            if name in given and self.reward != "model":
                raise UserError(
                    f"only a neural reward takes it, and the reward is '{self.reward}'.",
                    remedy="Add --reward model, or leave it out.",
                    field=name,
                )
        if "reward_features" in given and self.reward != "features":
            raise UserError(
                f"only a reward on features takes it, and the reward is '{self.reward}'.",
                remedy="Use --reward features, or leave it out.",
                field="reward_features",
            )
        reads_hidden = self.reward == "auto" or "hidden" in self.reward_features
        for name, is_read, remedy in (
            ("hidden_depths", reads_hidden, "Add hidden to --reward_features, or leave it out."),
            ("hidden_pooling", reads_hidden, "Add hidden to --reward_features, or leave it out."),
            ("reward_combine", self.reward_ensemble > 1, "Add --reward_ensemble, or leave it out."),
        ):
            if name in given and not is_read:
                raise UserError("no reward of this run reads it.", remedy=remedy, field=name)
        if self.reward == "logp" and self.reward_gate != "off":
            raise UserError(
                "the policy's own log-prob cannot beat itself, so the policy would never move.",
                remedy="Add --reward_gate off.",
                field="reward_gate",
            )
        if self.drop_below is not None and self.reward_ensemble > 1 and self.reward_combine != "mean":
            raise UserError(
                f"'{self.reward_combine}' compares only the answers to one prompt, so no prompt's best can be called too low.",
                remedy="Use --reward_combine mean, or leave --drop_below out.",
                field="drop_below",
            )

    def sample_settings(self) -> dict[str, Any]:
        """What the samples depend on; with how a run is divided, which decides what policy each draw is of."""
        names = ("stages_per_epoch", "samplings_per_stage")
        return super().sample_settings() | {name: getattr(self, name) for name in names}
