"""The data of a reward phase: what it trains on, what it is judged on, and what else it compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset, IterableDataset

from tutelage.data.demonstrations import Turns
from tutelage.data.prompts import mix_prompts, tokenize_prompts
from tutelage.data.tokenization import Tokenization
from tutelage.data.tokenized import group_from_row, preference_group_from_row, tokenize_dataset
from tutelage.data.validation import split_validation, without_prompts
from tutelage.errors import UserError
from tutelage.evaluation.policy import EvaluationSet
from tutelage.groups import Group
from tutelage.rewards.comparisons import TruncatedSamples, contrast
from tutelage.training.reward_config import RewardStageConfig
from tutelage.training.reward_phase import VALIDATION_ROWS
from tutelage.training.rollout import Rollout
from tutelage.training.selection import Candidates
from tutelage.training.store import StageStore

if TYPE_CHECKING:
    from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["known_demonstrations", "make_candidates", "read_preferences", "with_prompts"]


def make_candidates(
    trainer: DemonstrationTrainer,
    dataset: Dataset | IterableDataset,
    validation: Dataset | None,
    rollout: Rollout,
    store: StageStore,
    *,
    source: str,
) -> tuple[Candidates | None, Any]:
    """Validation rows, on which the policies of the run are looked at, and the training data without them.

    Args:
        dataset: the training data as they were read; the trainer has them tokenized.
        validation: rows for the purpose; None takes some of the training data, if the run looks at any.
        source: what errors about ``validation`` call it.

    Raises:
        UserError: too few rows.
    """
    args = cast(RewardStageConfig, trainer.args)
    turns = cast(Turns, args.turns)
    looks = args.reward_gate != "off" or args.keep_policy == "best" or args.reward == "auto"
    if validation is not None:
        rows = EvaluationSet.of(validation, trainer.tokenization, verifier=args.verifier, turns=turns, source=source)
        evaluated = {group.prompt_ids for group in trainer.evaluation_set.groups} if trainer.evaluation_set else set()
        for group, demonstration in zip(rows.groups, rows.demonstrations, strict=True):
            if group.prompt_ids in evaluated:
                raise UserError(
                    "the prompt is also one of the evaluation rows, which nothing may be chosen on.",
                    remedy="Give other validation rows.",
                    file=source,
                    row=demonstration.number,
                    field="validation_dataset",
                )
        left = without_prompts(
            trainer.train_dataset, {group.prompt_ids for group in rows.groups}, source=trainer.source
        )
    elif looks:
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
    else:
        return None, trainer.train_dataset
    # Of the policy itself, however the stages sample: their mean log-ratio is to be the KL.
    plain = replace(rollout.params, temperature=1.0, top_k=0, top_p=1.0)

    def draw(groups: list[Group]) -> list[Group]:
        with trainer.progress.phase("sampling for the validation rows", len(groups)):
            return rollout.score(rollout.draw(groups, stage=VALIDATION_ROWS, params=plain), plain)

    return Candidates(store, rows, trainer.policy, draw), left


def known_demonstrations(trainer: DemonstrationTrainer) -> list[Group]:
    """The demonstrations that negatives are drawn for; none where only the policy's own samples are compared.

    Raises:
        UserError: negatives of streamed data.
    """
    args = cast(RewardStageConfig, trainer.args)
    if args.negative_kinds == ("own",) and args.reward != "likelihood":
        return []
    if isinstance(trainer.train_dataset, IterableDataset):
        raise UserError(
            "of streamed data the demonstrations are not known beforehand: nothing can be divided into folds, or drawn for "
            "all of them.",
            remedy="Leave --dataset_streaming out, or use --reward_negatives own and another reward than likelihood.",
            field="reward_negatives",
        )
    return [group_from_row(cast(dict, row)) for row in cast(Dataset, trainer.train_dataset)]


def with_prompts(
    trainer: DemonstrationTrainer,
    prompts: Dataset | None,
    held_out: Mapping[tuple[int, ...], str],
    source: str,
) -> Any:
    """The training data with prompts that have no demonstration.

    Args:
        held_out: prompts that are not for training, with what they are called; those of the evaluation are added.

    Raises:
        UserError: the settings name prompts and none are given; streamed demonstrations; or as ``tokenize_prompts``.
    """
    args = cast(RewardStageConfig, trainer.args)
    demonstrations = trainer.train_dataset
    if prompts is None:
        if args.prompt_dataset or args.prompt_mix is not None:
            raise UserError(
                "the trainer was given no prompts.",
                remedy="Give --prompt_dataset, or hand them over as prompt_dataset.",
                field="prompt_dataset",
            )
        return demonstrations
    if isinstance(demonstrations, IterableDataset) or isinstance(prompts, IterableDataset):
        raise UserError(
            "streamed data cannot be mixed with prompts.",
            remedy="Leave --dataset_streaming out.",
            field="prompt_dataset",
        )
    evaluated = trainer.evaluation_set.groups if trainer.evaluation_set else []
    found = tokenize_prompts(
        prompts,
        trainer.tokenization,
        first_row=1 + max(cast(Dataset, demonstrations)["row"]),
        conversational=trainer.conversational,
        held_out={**held_out, **{group.prompt_ids: "evaluation rows" for group in evaluated}},
        source=source,
    )
    return mix_prompts(cast(Dataset, demonstrations), found, share=args.prompt_mix, seed=args.seed)


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
