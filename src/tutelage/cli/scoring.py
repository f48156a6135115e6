"""What `tutelage score` does once its arguments are good: groups of what a file holds, their rewards, what is told."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from tutelage.cli.against import joined, parted, show_win_rate
from tutelage.cli.common import computing, load_data, load_policy, load_tokenization
from tutelage.cli.explain import Explanation, explanations, show_explanations
from tutelage.cli.progress import TerminalProgress
from tutelage.cli.rewards import computing_reward, first_member, load_reward, score_in_parts
from tutelage.cli.subsets import SUBSET, Subsets, show_subsets
from tutelage.data import Tokenization, group_from_row, preference_group_from_row, tokenize_dataset
from tutelage.data.choices import choice_groups, holds_choices
from tutelage.data.loading import load_dataset
from tutelage.data.records import group_from_record
from tutelage.errors import UserError
from tutelage.evaluation.statistics import Interval, bootstrap_mean, mean_interval
from tutelage.files import write_json_lines
from tutelage.groups import Group, Role
from tutelage.losses import implicit_reward
from tutelage.models.loading import load_tokenizer
from tutelage.models.paths import FEATURE_REWARD
from tutelage.models.precision import model_size
from tutelage.progress import Progress
from tutelage.rewards import FeatureReward, ImplicitReward, Reward
from tutelage.rewards.ensemble import RewardEnsemble
from tutelage.rewards.feature_reward import saved_facts
from tutelage.scoring.logps import cached_logps
from tutelage.terminal import say

__all__ = ["score"]

# What every line of `tutelage sample`, and of a stage's samples.jsonl, holds.
_RECORD_COLUMNS = ("row", "prompt", "completions", "prompt_ids")


def score(options: argparse.Namespace, name: str, output: Path, console: Console) -> None:
    """Score every completion of the data, write the rewards, tell their means.

    Args:
        options: the command's.
        name: of the reward model or the policy.
        output: file to write.
    """
    tokenization = load_tokenization(options, first_member(name) if options.reward else name)
    vocabulary = _vocabulary(options, name, tokenization)
    dataset = load_data(options)
    groups = _groups(dataset, tokenization, options.dataset_name, vocabulary)
    subsets = _subsets(groups, dataset, options.dataset_name)
    together = groups
    if options.against:
        other_data = load_dataset(options.against, config_name=options.dataset_config, split=options.split)
        others = _groups(other_data, tokenization, options.against, vocabulary)
        together = joined(groups, others, source=options.dataset_name, other_source=options.against)
        if unused := len(others) - len(groups):
            say(console, f"{options.against}: {unused} of {len(others)} rows have no counterpart and are left out")
    reward, rewards, told = _rewards_of(options, name, together, tokenization, console)
    values = iter(rewards)
    together = [_rewarded(group, [next(values) for _ in group.completions]) for group in together]
    scored, others = parted(together, groups)
    summary = [*_summary(scored), *_pessimism(reward, together)]
    output.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [_line(group, tokenization) for group in scored]
    if subsets:
        lines = [line | {SUBSET: subsets.name(group)} for line, group in zip(lines, scored, strict=True)]
    for line, other in zip(lines, others, strict=True) if options.against else ():
        line["against"] = _line(other, tokenization)["completions"]
    if told:
        for line, of_line in zip(lines, told, strict=True):
            for answer, spoken in zip(line["completions"] + line.get("against", []), of_line, strict=True):
                answer["explanation"] = [asdict(said) for said in spoken]
    write_json_lines(output, lines)
    if told:
        show_explanations(lines, console)
    say(console, f"{len(scored)} rows: {output}")
    for line in summary:
        say(console, line)
    if subsets:
        show_subsets(subsets.scores(scored), console)
    if options.against:
        show_win_rate(scored, others, console)


def _rewarded(group: Group, rewards: Sequence[float]) -> Group:
    """The group with its rewards. The same answer twice has one reward: passes of other batches round differently, and a tie is a tie."""
    first: dict[tuple[tuple[int, ...], bool], float] = {}
    pairs = zip(group.completions, rewards, strict=True)
    return group.with_values("reward", [first.setdefault((c.token_ids, c.finished), reward) for c, reward in pairs])


def _rewards_of(
    options: argparse.Namespace, name: str, groups: Sequence[Group], tokenization: Tokenization, console: Console
) -> tuple[Reward | None, list[float], list[list[Explanation]] | None]:
    """The reward (None for an implied one), its values of all completions, and what spoke for and against them if asked."""
    reward: Reward | None = None
    told: list[list[Explanation]] | None = None
    with TerminalProgress(console, "score") as progress:
        if options.reward:
            with progress.phase("loading the reward"):
                models = {"base_model": options.base_model, "logp_model": options.logp_model}
                reward = load_reward(options, name, tokenization, **models)
            with computing_reward(options, name, reward, console):
                rewards_C = score_in_parts(reward, groups, options.batch_size, progress)
                if options.explain is not None and isinstance(reward, FeatureReward):
                    told = explanations(reward, groups, options.explain, tokenization, progress)
        else:
            with computing(options, name, console):
                rewards_C = _implied_rewards(options, name, groups, tokenization, progress)
    if not rewards_C.isfinite().all():
        raise UserError("the rewards are NaN or infinite.", remedy="Check its weights.", file=name)
    return reward, rewards_C.tolist(), told


# --- what is scored ----------------------------------------------------------------------------------------------------


def _vocabulary(options: argparse.Namespace, name: str, tokenization: Tokenization) -> int:
    """How many tokens the model knows that scores. Vocabularies are padded: it may have more than its tokenizer, and draw them."""
    folder = first_member(name) if options.reward else name
    if options.reward and (Path(folder) / FEATURE_REWARD).exists():
        folder = options.base_model or options.logp_model or saved_facts(folder).get("base_model")
    size = model_size(str(folder), trust_remote_code=options.trust_remote_code) if folder else None
    return max(len(tokenization.tokenizer), size.vocabulary if size else 0)


def _groups(dataset: Any, tokenization: Tokenization, source: str, vocabulary: int) -> list[Group]:
    """Every prompt with the completions that its row holds."""
    columns = set(dataset.column_names)
    if not tokenization.columns.named and holds_choices(dataset):
        return choice_groups(dataset, tokenization, source=source)
    if "completions" not in columns:
        rows = tokenize_dataset(dataset, tokenization, source=source)
        return [preference_group_from_row(row) or group_from_row(row) for row in rows]  # type: ignore[arg-type]
    return [_recorded(row, number, tokenization, source, vocabulary) for number, row in enumerate(dataset, start=1)]


def _subsets(groups: Sequence[Group], dataset: Any, source: str) -> Subsets | None:
    """Which subsets the rows belong to, where the data hold right and wrong answers and name subsets."""
    return Subsets(groups, dataset, source) if {SUBSET, "rejected"} <= {*dataset.column_names} else None


def _recorded(row: Mapping[str, Any], number: int, tokenization: Tokenization, source: str, vocabulary: int) -> Group:
    """A prompt with its demonstration, if it has one, and its samples, as they were recorded.

    Raises:
        UserError: a column is missing, or tokens and texts do not belong together under this tokenizer.
    """
    for field in _RECORD_COLUMNS:
        if row.get(field) is None:
            raise UserError(
                "is missing.",
                remedy="Give a file as `tutelage sample` wrote it.",
                file=source,
                row=number,
                field=field,
            )
    try:
        return _group_of_record(row, tokenization, vocabulary)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the samples cannot be scored: {error}.",
            remedy="Give a file that `tutelage sample` or a training stage wrote, and a model with the same tokenizer.",
            file=source,
            row=number,
        ) from error


def _group_of_record(row: Mapping[str, Any], tokenization: Tokenization, vocabulary: int) -> Group:
    group = group_from_record(row)
    texts = [row["prompt"], *(completion["text"] for completion in row["completions"])]
    for ids, text in zip([group.prompt_ids, *(c.token_ids for c in group.completions)], texts, strict=True):
        if not all(type(id) is int and 0 <= id < vocabulary for id in ids):
            raise ValueError("a token is not in the model's vocabulary")
        if tokenization.text(ids) != text:
            raise ValueError("with the model's tokenizer, the tokens do not decode to the text next to them")
    return group


# --- scoring -----------------------------------------------------------------------------------------------------------


def _implied_rewards(
    options: argparse.Namespace, name: str, groups: Sequence[Group], tokenization: Tokenization, progress: Progress
) -> Tensor:
    """[C] implicit rewards of a policy. A reference of its own is loaded when the policy has gone."""
    arguments = {"batch_size": options.batch_size, "pad_token_id": tokenization.pad_id}
    if options.reference is None:
        policy = load_policy(options, name, tokenization)
        return score_in_parts(
            ImplicitReward(policy, beta=options.beta, **arguments), groups, options.batch_size, progress
        )
    tokenizer = load_tokenizer(options.reference, trust_remote_code=options.trust_remote_code)
    if tokenizer.get_vocab() != tokenization.tokenizer.get_vocab():
        raise UserError(
            f"its tokenizer differs from that of {name}.",
            remedy="Give the model that the policy's training started from.",
            file=options.reference,
            field="reference",
        )
    logps = []
    for who, model in (("policy", name), ("reference", options.reference)):
        with progress.phase(f"scoring under the {who}", len(groups)) as advance:
            found = cached_logps(load_policy(options, model, tokenization), groups, on_batch=advance, **arguments)
        logps.append(torch.tensor([logp for group in found for logp in group]))
    return implicit_reward(*logps, beta=options.beta)


# --- what is told ------------------------------------------------------------------------------------------------------


def _line(group: Group, tokenization: Tokenization) -> dict[str, Any]:
    return {
        "row": group.row,
        "prompt": tokenization.text(group.prompt_ids),
        "completions": [
            {
                "role": str(completion.role),
                "text": tokenization.text(completion.token_ids),
                "reward": completion.values["reward"],
                "finished": completion.finished,
                "tokens": len(completion.token_ids),
            }
            for completion in group.completions
        ],
    }


def _summary(groups: Sequence[Group]) -> Iterator[str]:
    """Means over rows with their intervals; where a row holds several samples, their mean counts."""
    by_role = {role: [found for group in groups if (found := _rewards(group, role))] for role in Role}
    for role, rows in by_role.items():
        if rows:
            yield f"mean reward, {role}: {_shown(bootstrap_mean([fmean(rewards) for rewards in rows]))}"
    if samples := by_role[Role.SAMPLE]:
        best = bootstrap_mean([max(rewards) for rewards in samples])
        yield f"mean reward, best of {max(map(len, samples))}: {_shown(best)}"
    pairs = zip(by_role[Role.PREFERRED], by_role[Role.REJECTED], strict=True)
    wins = [fmean((a > b) + (a == b) / 2 for a in preferred for b in rejected) for preferred, rejected in pairs]
    if wins:
        yield f"accuracy, preferred over rejected: {_shown(mean_interval(wins))}; a tie counts half"


def _pessimism(reward: Reward | None, groups: Sequence[Group]) -> Iterator[str]:
    """That an ensemble which should be pessimistic is not, where an answer is alone for its prompt."""
    lone = sum(len(group.completions) == 1 for group in groups)
    if lone and isinstance(reward, RewardEnsemble) and reward.combine != "mean":
        yield (
            f"{lone} of {len(groups)} rows hold a lone answer: its reward is the mean of the members, without the pessimism "
            f"of {reward.combine}, because members are compared within a prompt"
        )


def _rewards(group: Group, role: Role) -> list[float]:
    """Rewards of the group's completions of one role."""
    return [completion.values["reward"] for completion in group.of(role)]


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.4g} [{interval.low:.4g}, {interval.high:.4g}], {interval.n} rows"
