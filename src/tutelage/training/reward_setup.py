"""The parts of a reward phase, made as the settings of a run say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import nn
from transformers import Trainer

from tutelage.data.demonstrations import Turns
from tutelage.data.tokenization import Tokenization, preference_group_from_row, tokenize_dataset
from tutelage.data.validation import split_validation
from tutelage.errors import UserError
from tutelage.evaluation.policy import EvaluationSet
from tutelage.groups import Group
from tutelage.losses import RewardLossKind
from tutelage.models.loading import add_adapter, check_vocabulary, load_model, load_tokenizer
from tutelage.rewards.comparisons import TruncatedSamples, contrast
from tutelage.rewards.explicit import ExplicitReward
from tutelage.rewards.fitting import RewardFitter, RewardObjective
from tutelage.scoring.logps import Layout
from tutelage.training.reward_config import RewardStageConfig
from tutelage.training.reward_phase import VALIDATION_ROWS
from tutelage.training.rollout import Rollout
from tutelage.training.selection import Candidates
from tutelage.training.store import StageStore

if TYPE_CHECKING:
    from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["make_candidates", "make_fitter", "make_reward", "read_preferences"]


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
    if args.init_reward_from:
        reward.start_from(args.init_reward_from)
    return reward


def make_candidates(
    trainer: DemonstrationTrainer, dataset: Dataset | IterableDataset, rollout: Rollout, store: StageStore
) -> tuple[Candidates, Any]:
    """Validation rows, on which the policies of the run are looked at, and the training data without them.

    Args:
        dataset: the training data as they were read; the trainer has them tokenized.

    Raises:
        UserError: too few rows.
    """
    args = cast(RewardStageConfig, trainer.args)
    turns = cast(Turns, args.turns)
    raw, left = split_validation(
        dataset,
        trainer.train_dataset,
        trainer.tokenization,
        rows=args.validation_rows,
        seed=args.seed,
        turns=turns,
        source=trainer.source,
    )
    rows = EvaluationSet.of(raw, trainer.tokenization, verifier=args.verifier, turns=turns, source=trainer.source)
    # Of the policy itself, however the stages sample: their mean log-ratio is to be the KL.
    plain = replace(rollout.params, temperature=1.0, top_k=0, top_p=1.0)

    def draw(groups: list[Group]) -> list[Group]:
        with trainer.progress.phase("sampling for the validation rows", len(groups)):
            return rollout.score(rollout.draw(groups, stage=VALIDATION_ROWS, params=plain), plain)

    return Candidates(store, rows, trainer.policy, draw), left


def make_fitter(
    reward: ExplicitReward, args: RewardStageConfig, preferences: list[Group], policy: nn.Module
) -> RewardFitter:
    """What fits the reward, with an optimizer of the policy's kind.

    Args:
        preferences: preference pairs to learn from too.
        policy: for optimizers that are chosen by the model.
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
        seed=args.seed,
    )


def read_preferences(
    dataset: Dataset | None, args: RewardStageConfig, tokenization: Tokenization, source: str
) -> list[Group]:
    """Preference pairs as a reward compares them, in the random order of the seed.

    Raises:
        UserError: the settings name preference data and none are given, or there is no pair in them.
    """
    if dataset is None:
        if args.preference_dataset:
            raise UserError(
                "the trainer was given no preference data.",
                remedy="Load them (tutelage.data.load_dataset) and hand them over as preference_dataset.",
                field="preference_dataset",
            )
        return []
    rows = tokenize_dataset(dataset, tokenization, turns=cast(Turns, args.turns), source=source)
    groups = [group for row in rows if (group := preference_group_from_row(cast(dict, row))) is not None]
    if not groups:
        raise UserError(
            "there is no preference pair in it.",
            remedy="Give rows with 'chosen' and 'rejected'.",
            file=source,
            field="preference_dataset",
        )
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(args.seed)).tolist()
    truncated_samples = cast(TruncatedSamples, args.truncated_samples)
    return [pair for index in order for pair in contrast(groups[index], truncated_samples)]
