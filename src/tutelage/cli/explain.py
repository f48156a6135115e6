"""What `tutelage score` does with a feature reward: score, and tell what spoke for and against each answer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from tutelage.cli.common import computing, load_policy
from tutelage.data import Tokenization
from tutelage.groups import Group
from tutelage.progress import Progress
from tutelage.rewards import FeatureReward, Reward
from tutelage.rewards.feature_reward import Spoken, saved_facts

__all__ = [
    "Explanation",
    "computing_features",
    "feature_reward",
    "feature_rewards",
    "score_in_parts",
    "show_explanations",
]

Explanation = list[Spoken]

_SHOWN = 4  # answers on the screen; all are in the file


def feature_reward(
    options: argparse.Namespace, folder: Path, tokenization: Tokenization, *, logp_model: str | None = None
) -> FeatureReward:
    """A feature reward, whose models are loaded when they are needed.

    Args:
        options: the command's.
        folder: the reward's.
        logp_model: the policy for ``logp`` if the command names none; None takes the one beside the folder.
    """
    return FeatureReward.from_pretrained(
        folder,
        base_model=options.base_model,
        logp_model=options.logp_model or logp_model,
        load=lambda model: load_policy(options, model, tokenization),
        batch_size=options.batch_size,
    )


def computing_features(
    options: argparse.Namespace, folder: Path, reward: FeatureReward
) -> AbstractContextManager[None]:
    """Within, the model that some features need computes as in training."""
    model = options.base_model or options.logp_model or saved_facts(folder).get("base_model")
    needs_model = any(features.name in ("hidden", "logp") for features in reward.sets)
    return computing(options, model, None) if needs_model and model else nullcontext()


def feature_rewards(
    options: argparse.Namespace, name: str, groups: Sequence[Group], tokenization: Tokenization, progress: Progress
) -> tuple[Tensor, list[list[Explanation]] | None]:
    """[C] rewards under a feature reward and, with --explain, what spoke for and against each completion.

    Args:
        options: the command's.
        name: the reward's folder.
    """
    reward = feature_reward(options, Path(name), tokenization)
    with computing_features(options, Path(name), reward):
        rewards_C = score_in_parts(reward, groups, options.batch_size, progress)
        if options.explain is None:
            return rewards_C, None

        def text(ids: Sequence[int]) -> str:
            return tokenization.text(ids, skip_special_tokens=False)

        told: list[list[Explanation]] = []
        with progress.phase("explaining", len(groups)) as advance:
            for group in groups:
                told.append(reward.explain_all(group, top=options.explain, text=text))
                advance(len(told))
    return rewards_C, told


def show_explanations(lines: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A table for each of the first answers of the file."""
    answers = [(line, answer) for line in lines for answer in line["completions"]]
    for line, answer in answers[:_SHOWN]:
        title = f"row {line['row'] + 1}, {answer['role']}: {_short(answer['text'])}  reward {answer['reward']:.3g}"
        table = Table(title=escape(title), title_justify="left", title_style="bold")
        table.add_column("feature")
        for column in ("value", "weight", "contribution"):
            table.add_column(column, justify="right")
        for said in answer["explanation"]:
            numbers = (f"{said['value']:.3g}", f"{said['weight']:+.3g}", f"{said['contribution']:+.3g}")
            table.add_row(escape(said["feature"]), *numbers)
        console.print(table, highlight=False)
    if len(answers) > _SHOWN:
        console.print(f"{len(answers) - _SHOWN} further answers are explained in the file", highlight=False)


def _short(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def score_in_parts(reward: Reward, groups: Sequence[Group], batch_size: int, progress: Progress) -> Tensor:
    """[C] rewards, found some batches at a time to show how far it is."""
    size, parts = 16 * batch_size, []
    with progress.phase("scoring", len(groups)) as advance:
        for start in range(0, len(groups), size):
            parts.append(reward.score(groups[start : start + size]))
            advance(min(start + size, len(groups)))
    return torch.cat(parts)
