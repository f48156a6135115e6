"""The parts of a reward phase, made as the settings of a run say."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import Trainer

from tutelage.data.tokenization import Tokenization
from tutelage.errors import UserError
from tutelage.groups import Group, Role
from tutelage.losses import RewardLossKind
from tutelage.models.loading import add_adapter, base_causal_lm, check_vocabulary, load_model, load_tokenizer
from tutelage.models.weights import WeightSet
from tutelage.rewards.base import Reward, scores_by_group
from tutelage.rewards.comparisons import TruncatedSamples
from tutelage.rewards.ensemble import Combine, LikelihoodReward, OwnLogpReward
from tutelage.rewards.explicit import ExplicitReward
from tutelage.rewards.feature_sets import FeatureParts
from tutelage.rewards.fitting import RewardFitter, RewardObjective
from tutelage.rewards.hidden_features import HiddenSource
from tutelage.scoring.logps import Layout
from tutelage.training.config import SFT_LEARNING_RATES
from tutelage.training.flops import count_passes
from tutelage.training.folds import Folds, FoldSettings, base_weights, check_base, fold_of_prompts
from tutelage.training.gate import Gate, pair_accuracy
from tutelage.training.learners import (
    AutoLearner,
    EnsembleLearner,
    FeatureLearner,
    FixedLearner,
    Learner,
    ModelLearner,
)
from tutelage.training.negatives import Negatives
from tutelage.training.reward_config import RewardStageConfig
from tutelage.training.reward_phase import RewardPhaseSettings
from tutelage.training.rollout import Rollout
from tutelage.training.store import StageStore

if TYPE_CHECKING:
    from tutelage.training.trainer import DemonstrationTrainer

__all__ = [
    "make_fitter",
    "make_folds",
    "make_learner",
    "make_negatives",
    "make_reward",
    "phase_settings",
    "refusal",
]


logger = logging.getLogger(__name__)


def make_reward(
    policy: nn.Module,
    args: RewardStageConfig,
    tokenization: Tokenization,
    *,
    layout: Layout,
    autocast: Callable[[], AbstractContextManager],
    peft_config: PeftConfig | None,
) -> ExplicitReward:
    """A reward that has learned nothing yet, or one that goes on from an earlier run's.

    Args:
        policy: its body is shared, unless ``args`` names a model for the reward.
        layout: which one the policy's body takes.
        peft_config: of the adapter on a reward model of its own.

    Raises:
        UserError: the reward model has another tokenizer, or the earlier reward does not fit.
    """
    name = args.reward_model_name_or_path
    options: dict[str, Any] = {
        "batch_size": args.per_device_eval_batch_size,
        "pad_token_id": tokenization.pad_id,
        "autocast": autocast,
    }
    if name is None:
        reward = ExplicitReward.fresh(policy, shared=True, layout=layout, **options)
    else:
        tokenizer = load_tokenizer(name)
        if tokenizer.get_vocab() != tokenization.tokenizer.get_vocab():
            raise UserError(
                f"the tokenizer of {name} is not the policy's: rewards read the policy's tokens.",
                remedy="Use a reward model with the same tokenizer.",
                field="reward_model_name_or_path",
            )
        model: nn.Module = load_model(name, dtype=None, whole=peft_config is None, computing=args.computing)
        check_vocabulary(model, tokenizer)
        if peft_config is not None and not hasattr(model, "peft_config"):
            model = add_adapter(model, peft_config)
        reward = ExplicitReward.fresh(cast(nn.Module, model).to(args.device), shared=False, **options)
        if args.activation_checkpointing:  # a shared body follows the policy
            reward.recompute_activations(cast(Any, args.activation_checkpointing_kwargs))
    if reward.why_no_classifier is not None:
        logger.warning(
            "%s: the reward will be written for tutelage (ExplicitReward.from_pretrained; for TRL, its as_reward_func)",
            reward.why_no_classifier,
        )
    if args.init_reward_from:
        reward.start_from(args.init_reward_from)
    return reward


def phase_settings(args: RewardStageConfig) -> RewardPhaseSettings:
    """The settings of a reward phase among those of a run."""
    return RewardPhaseSettings(
        beta=args.beta,
        down_only=args.reward_scaling == "down_only",
        replay_stages=args.reward_replay_stages,
        warmup_stages=args.reward_warmup_stages,
        truncated_samples=cast(TruncatedSamples, args.truncated_samples),
        gate=cast(Gate, args.reward_gate),
        keep_best=args.keep_policy == "best",
        drop_below=args.drop_below,
    )


def refusal(learner: Learner) -> Callable[[Sequence[Group]], list[bool]] | None:
    """Says of prompts whether the members of an ensemble disagree on their samples by more than the samples differ."""
    if not isinstance(learner, EnsembleLearner):
        return None

    def refused(groups: Sequence[Group]) -> list[bool]:
        samples = [group.select(group.places(Role.SAMPLE)) for group in groups]
        disagreement = iter(learner.reward.disagreement(samples).tolist())
        rewards = scores_by_group(learner.reward, samples)
        return [
            float(np.mean([next(disagreement) for _ in values])) > float(np.std(values, ddof=1)) for values in rewards
        ]

    return refused


_FOLD_SETTINGS = ("num_folds", "fold_epochs", "fold_learning_rate", "fold_batch_size")


def make_folds(
    trainer: DemonstrationTrainer, groups: Sequence[Group], base: Callable[[], WeightSet], folder: Path
) -> Folds:
    """The out-of-fold policies of a run.

    Args:
        groups: the demonstrations.
        base: gives the weights of the model before SFT.
        folder: keeps them.
    """
    args = cast(RewardStageConfig, trainer.args)
    rate = SFT_LEARNING_RATES["adapter" if isinstance(trainer.policy, PeftModel) else "full"]
    settings = FoldSettings(
        num_folds=args.num_folds,
        epochs=args.fold_epochs,
        learning_rate=args.fold_learning_rate or rate,
        batch_size=args.fold_batch_size,
        max_grad_norm=args.max_grad_norm,
        seed=args.seed,
    )
    return Folds(
        trainer.policy,
        base,
        groups,
        folder,
        settings,
        layout=trainer.layout,
        pad_token_id=trainer.tokenization.pad_id,
        autocast=trainer.compute_loss_context_manager,
        processes=trainer.processes,
    )


def make_negatives(
    trainer: DemonstrationTrainer, groups: Sequence[Group], rollout: Rollout, store: StageStore
) -> Negatives:
    """The negatives that are not the policy's own, and what draws them.

    Args:
        groups: the demonstrations that the reward learns from.

    Raises:
        UserError: as ``check_base`` and ``fold_of_prompts``.
    """
    args = cast(RewardStageConfig, trainer.args)
    kinds = args.negative_kinds
    start = rollout.initial
    assert start is not None
    needed = kinds != ("own",) or args.reward == "likelihood"
    check_base(trainer.policy, args.base_model_name_or_path, needed=needed)
    if groups and ("out_of_fold" in kinds or args.reward == "likelihood"):
        fold_of_prompts(groups, args.num_folds)  # fails where there are too few

    @cache
    def base() -> WeightSet:
        return base_weights(trainer.policy, args.base_model_name_or_path, start=start, seed=args.seed)

    @cache
    def folds() -> Folds:
        return make_folds(trainer, groups, base, store.folder / "negatives")

    return Negatives(
        kinds,
        groups,
        rollout,
        store,
        base,
        folds,
        settings={
            "start": rollout.start,
            "base": args.base_model_name_or_path,
            "folds": {name: getattr(args, name) for name in _FOLD_SETTINGS},
        },
        costs=trainer.costs,
        progress=trainer.progress,
    )


def make_learner(
    trainer: DemonstrationTrainer,
    negatives: Negatives,
    *,
    peft_config: PeftConfig | None,
    preferences: list[Group],
    has_prompts: bool,
    tell: Callable[[str], None],
) -> Learner:
    """What fits the reward that the settings name.

    Args:
        negatives: its folds give the reward of likelihoods.
        peft_config: of the adapter on a reward model of its own.
        preferences: preference pairs that a neural reward learns from too.
        has_prompts: whether there are prompts without demonstrations.
        tell: gets a sentence about a choice that is made.
    """
    args = cast(RewardStageConfig, trainer.args)
    treat = cast(TruncatedSamples, args.truncated_samples)
    parts = FeatureParts(
        text=trainer.tokenization.text,
        hidden=HiddenSource(
            cache(lambda: _base_model(trainer, negatives.rollout.initial)),
            layout=trainer.layout,
            batch_size=args.per_device_eval_batch_size,
            pad_token_id=trainer.tokenization.pad_id,
            autocast=trainer.compute_loss_context_manager,
        ),
        logps=trainer.scorer.token_logps,
        settings={"hidden": {"depths": tuple(args.hidden_depths), "pooling": args.hidden_pooling}},
    )
    facts = {
        "max_prompt_length": args.max_prompt_length,
        "max_completion_length": args.max_completion_length,
        "base_model": str(args.base_model_name_or_path or base_causal_lm(trainer.policy).name_or_path),
    }

    def features(names: str) -> Learner:
        return FeatureLearner(names, parts, truncated_samples=treat, seed=args.seed, facts=facts)

    def model(seed: int) -> Learner:
        reward = make_reward(
            trainer.policy,
            args,
            trainer.tokenization,
            layout=trainer.layout,
            autocast=trainer.compute_loss_context_manager,
            peft_config=peft_config,
        )
        if reward.weights is None:  # its body is not the policy's
            count_passes(reward.model, trainer.costs.count_flops)
        fitter = make_fitter(reward, args, preferences, trainer.policy, seed=seed)
        return ModelLearner(
            fitter,
            epochs=args.reward_epochs,
            steps=args.reward_steps,
            truncated_samples=treat,
            seed=seed,
            compares_across_prompts=has_prompts,
        )

    if args.reward == "likelihood":
        return FixedLearner(lambda: _likelihood(trainer, negatives))
    if args.reward == "logp":
        return FixedLearner(lambda: OwnLogpReward(trainer.scorer.token_logps))
    if args.reward == "auto":
        names = ("text", "hidden", "text,logp", "hidden,logp")
        return AutoLearner(
            {f"features:{name}": features(name) for name in names},
            lambda reward, groups: _accuracy(reward, groups, treat),
            tell,
        )
    if args.reward_ensemble == 1:
        return features(args.reward_features) if args.reward == "features" else model(args.seed)
    members = [
        features(args.reward_features) if args.reward == "features" else model(args.seed + place)
        for place in range(args.reward_ensemble)
    ]
    return EnsembleLearner(members, cast(Combine, args.reward_combine), seed=args.seed)


def _base_model(trainer: DemonstrationTrainer, start: WeightSet | None) -> nn.Module:
    """The frozen model whose hidden states are features: under an adapter, the policy's own base."""
    if isinstance(trainer.policy, PeftModel):
        return trainer.policy
    name = cast(RewardStageConfig, trainer.args).base_model_name_or_path or trainer.model_name
    if name:
        model = load_model(name, dtype=None, whole=False, computing=trainer.args.computing)
    else:  # it was never on disk
        assert start is not None
        with start.active():
            model = copy.deepcopy(trainer.policy)
    count_passes(model, trainer.costs.count_flops)
    return cast(nn.Module, model).to(trainer.args.device).requires_grad_(False)


def _likelihood(trainer: DemonstrationTrainer, negatives: Negatives) -> LikelihoodReward:
    """The mean log-prob of an answer under the out-of-fold policies."""
    folds = negatives.folds()

    def under(weights: WeightSet) -> Callable[[Sequence[Group]], Any]:
        def logps(groups: Sequence[Group]) -> Any:
            with weights.active():
                return trainer.scorer.token_logps(groups)

        return logps

    return LikelihoodReward([under(folds.weights(fold)) for fold in range(folds.settings.num_folds)])


def _accuracy(reward: Reward, groups: Sequence[Group], truncated_samples: TruncatedSamples) -> float:
    """How often the reward puts a demonstration over a sample of its prompt; 0 where nothing can be compared."""
    scored = [
        group.with_values("reward", values)
        for group, values in zip(groups, scores_by_group(reward, groups), strict=True)
    ]
    found = pair_accuracy(scored, lambda completion: completion.values["reward"], truncated_samples)
    return found.mean if found else 0.0


def make_fitter(
    reward: ExplicitReward, args: RewardStageConfig, preferences: list[Group], policy: nn.Module, *, seed: int
) -> RewardFitter:
    """What fits the reward, with an optimizer of the policy's kind.

    Args:
        preferences: preference pairs to learn from too.
        policy: for optimizers that are chosen by the model.
        seed: of the order of the groups.
    """
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args, cast(Any, policy))
    settings = {**settings, "lr": args.reward_learning_rate, "weight_decay": args.weight_decay}
    return RewardFitter(
        reward,
        RewardObjective(
            kind=cast(RewardLossKind, args.reward_loss),
            margin=args.reward_margin,
            label_smoothing=args.reward_label_smoothing,
            centering=args.reward_centering,
            regularization=args.reward_regularization,
            demonstration_weight=args.demonstration_weight,
            preference_weight=args.preference_weight,
        ),
        optimizer(reward.parameters, **settings),
        batch_size=args.reward_batch_size,
        micro_batch_size=min(args.reward_batch_size, args.per_device_train_batch_size),
        preferences=preferences,
        max_grad_norm=args.max_grad_norm,
        saturation=args.saturation if args.early_stopping == "saturated" else None,
        seed=seed,
    )
