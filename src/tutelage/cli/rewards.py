"""Loading a learned reward by its name: a reward model, a feature reward, or an ensemble of either."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from tutelage.cli.common import computing, load_policy, on_device, precision_of
from tutelage.data import Tokenization
from tutelage.errors import UserError
from tutelage.groups import Group
from tutelage.models.loading import check_vocabulary, load_tokenizer
from tutelage.models.paths import ENSEMBLE, FEATURE_REWARD, run_part
from tutelage.progress import Progress
from tutelage.rewards import ExplicitReward, FeatureReward, Reward
from tutelage.rewards.ensemble import RewardEnsemble, read_ensemble
from tutelage.rewards.feature_reward import saved_facts

__all__ = ["computing_reward", "first_member", "load_reward", "reward_of_policy", "score_in_parts"]


def first_member(name: str) -> str:
    """A reward that is no ensemble: itself, or the first of an ensemble's members. It has the tokenizer.

    Raises:
        UserError: the ensemble cannot be read.
    """
    return str(read_ensemble(Path(name))[0][0]) if (Path(name) / ENSEMBLE).exists() else name


def load_reward(
    options: argparse.Namespace,
    name: str,
    tokenization: Tokenization,
    *,
    base_model: str | None = None,
    logp_model: str | None = None,
) -> Reward:
    """A learned reward. The models of a feature reward are loaded when they are needed.

    Args:
        options: the command's.
        name: of a reward model, or the folder of any reward; in a run's folder, its ``reward``.
        tokenization: of the tokens that are scored.
        base_model: for ``hidden``; None takes the one that the reward names.
        logp_model: the policy, for ``logp``; None takes the one beside the reward.

    Raises:
        UserError: it cannot be read, a member is missing, or a model does not know the tokenizer's tokens.
    """
    folder = Path(name)
    if not (folder / ENSEMBLE).exists():
        return _load_one(options, name, tokenization, base_model, logp_model)
    members, combine = read_ensemble(folder)
    beside = folder.parent / "policy"
    policy = logp_model or (str(beside) if beside.is_dir() else None)
    found = [_load_one(options, str(member), tokenization, base_model, policy) for member in members]
    return RewardEnsemble(found, combine)


def reward_of_policy(
    options: argparse.Namespace, tokenization: Tokenization, *, logp_model: str | None = None
) -> Reward:
    """The reward that ``options.reward`` names, for answers of a policy.

    Args:
        tokenization: the policy's.
        logp_model: as for ``load_reward``.

    Raises:
        UserError: as ``load_reward``; the reward reads other tokens than the policy writes.
    """
    name = run_part(options.reward, "reward")
    tokenizer = load_tokenizer(first_member(name), trust_remote_code=options.trust_remote_code)
    if tokenizer.get_vocab() != tokenization.tokenizer.get_vocab():
        raise UserError(
            "its tokenizer is not the model's: a reward reads the model's tokens.",
            remedy="Give a reward that was learned for this model.",
            file=options.reward,
            field="reward",
        )
    return load_reward(options, name, tokenization, logp_model=logp_model)


def _load_one(
    options: argparse.Namespace, name: str, tokenization: Tokenization, base_model: str | None, logp_model: str | None
) -> Reward:
    if (Path(name) / FEATURE_REWARD).exists():
        return FeatureReward.from_pretrained(
            name,
            base_model=base_model,
            logp_model=logp_model,
            load=lambda model: load_policy(options, model, tokenization),
            batch_size=options.batch_size,
        )
    reward = ExplicitReward.from_pretrained(
        name,
        dtype=precision_of(options, name).weights,
        trust_remote_code=options.trust_remote_code,
        batch_size=options.batch_size,
        pad_token_id=tokenization.pad_id,
    )
    check_vocabulary(reward.model, tokenization.tokenizer)
    on_device(reward.model)
    return reward


def computing_reward(
    options: argparse.Namespace, name: str, reward: Reward, console: Console
) -> AbstractContextManager[None]:
    """Within, the models that a reward needs compute as in training; of reward models the console is told how.

    Args:
        options: those of ``tutelage score``.
        name: as for ``load_reward``, which gave the reward.
    """
    one = reward.members[0] if isinstance(reward, RewardEnsemble) else reward
    if not isinstance(one, FeatureReward):
        return computing(options, first_member(name), console)
    needs_model = any(features.name in ("hidden", "logp") for features in one.sets)
    model = options.base_model or options.logp_model or saved_facts(first_member(name)).get("base_model")
    return computing(options, model, None) if needs_model and model else nullcontext()


def score_in_parts(reward: Reward, groups: Sequence[Group], batch_size: int, progress: Progress) -> Tensor:
    """[C] rewards, found some batches at a time to show how far it is."""
    size, parts = 16 * batch_size, []
    with progress.phase("scoring", len(groups)) as advance:
        for start in range(0, len(groups), size):
            parts.append(reward.score(groups[start : start + size]))
            advance(min(start + size, len(groups)))
    return torch.cat(parts)
