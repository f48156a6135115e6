"""What `tutelage clean` does once its arguments are good: a number per row, the ranking, the kept rows, the page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from rich.console import Console
from torch import nn

from tutelage.cli.common import computing, load_data, load_policy, load_tokenization, on_device, precision_of
from tutelage.cli.progress import TerminalProgress
from tutelage.cli.rewards import reward_of_policy
from tutelage.data import Tokenization
from tutelage.data.readers import extension, read_file
from tutelage.data.tokenized import TokenizedRow, tokenized_rows
from tutelage.errors import UserError
from tutelage.evaluation.cleaning import Ranked, number_dropped, rank_rows
from tutelage.evaluation.policy import can_sample
from tutelage.files import write_json_lines, write_text
from tutelage.groups import Group
from tutelage.models.loading import add_adapter
from tutelage.progress import Progress
from tutelage.report.cleaning import WorstRow, cleaning_page, worst_table
from tutelage.rewards.base import scores_by_group
from tutelage.sampling import Sample, SamplingParams, TransformersSampler
from tutelage.scoring.logps import cached_logps
from tutelage.terminal import say, show
from tutelage.training.folds import Folds, FoldSettings, base_weights
from tutelage.training.made import add_made

__all__ = ["clean"]

_MEASURES = {
    "log_prob": "value: log-prob per token (nats) under an adapter that was not trained on the row",
    "reward": "value: reward of the demonstration minus that of the model's own greedy answer",
}


def clean(options: argparse.Namespace, console: Console, *, before_training: Callable[[], None]) -> None:
    """Rank the demonstrations, write ranking, kept rows and page, and show the worst.

    Args:
        options: the command's.
        before_training: called when data, model and settings have been found good.
    """
    name, folder = options.model_name_or_path, Path(options.output_dir)
    tokenization = load_tokenization(options, name)
    dataset = load_data(options)
    rows = list(tokenized_rows(dataset, tokenization, source=options.dataset_name))
    if not rows:
        raise UserError("no demonstration remains.", remedy="Look at the data.", file=options.dataset_name)
    dropped = number_dropped(len(rows), drop=options.drop, keep=options.keep)
    originals = _originals(options, dataset)
    lines = {row.demonstration.row: _line(originals[row.demonstration.row], row, options.dataset_name) for row in rows}
    with computing(options, name, console), TerminalProgress(console, "clean") as progress:
        judge = (_OutOfFold if options.by == "log_prob" else _ByReward)(options, rows, tokenization, progress)
        before_training()
        folder.mkdir(parents=True, exist_ok=True)
        add_made(folder, ("ranking.jsonl", "kept.jsonl", "clean.html"))
        places = {row.group.row: place for place, row in enumerate(rows)}
        ranking = rank_rows([row.group.row for row in rows], judge.values(), dropped=dropped)
        worst = [places[each.row] for each in ranking[: options.show]]
        answers = judge.answers(worst)
    shown = [
        _worst_row(each, rows[places[each.row]], answers.get(places[each.row])) for each in ranking[: options.show]
    ]
    write_json_lines(folder / "ranking.jsonl", map(asdict, ranking))
    write_text(folder / "kept.jsonl", "".join(lines[each.row] for each in sorted(ranking, key=_row) if each.kept))
    title, measure = f"Demonstrations of {Path(options.dataset_name).name}, ranked", _MEASURES[options.by]
    page = cleaning_page(shown, title=title, measure=measure, dropped=dropped, total=len(rows))
    write_text(folder / "clean.html", page)
    if shown:
        show(console, worst_table(shown, f"× dropped; {measure}"))
    kept = f"{len(rows) - dropped} of {len(rows)} demonstrations kept: {folder / 'kept.jsonl'}"
    left = f"\n{len(originals) - len(rows)} rows were left out: no answer, or a prompt that is too long"
    say(console, kept + (left if len(originals) > len(rows) else ""))
    say(console, f"ranking: {folder / 'ranking.jsonl'}\npage: {folder / 'clean.html'}")


# --- numbers and answers -------------------------------------------------------------------------------------------------


class _Answering:
    """Draws greedy answers of a policy."""

    def __init__(self, options: argparse.Namespace, rows: Sequence[TokenizedRow], tokenization: Tokenization):
        self.options, self.rows, self.tokenization = options, rows, tokenization

    def drawn(self, policy: nn.Module, places: Sequence[int]) -> list[Sample]:
        """One answer for each of the rows at ``places``."""
        sampler = TransformersSampler(
            policy, batch_size=self.options.sampling_batch_size, pad_token_id=self.tokenization.pad_id
        )
        params = SamplingParams(
            max_completion_length=self.options.max_completion_length,
            stop_ids=self.tokenization.stop_ids(self.rows[0].demonstration.conversational),
            temperature=0.0,
        )
        prompts = [self.rows[place].group.prompt_ids for place in places]
        return [drawn for (drawn,) in sampler.sample(prompts, params)]

    def texts(self, samples: Sequence[Sample]) -> list[str]:
        return [self.tokenization.text(sample.token_ids) for sample in samples]


class _OutOfFold(_Answering):
    """Each row is judged, and answered, by the adapter of its fold, which has not seen it."""

    def __init__(
        self,
        options: argparse.Namespace,
        rows: Sequence[TokenizedRow],
        tokenization: Tokenization,
        progress: Progress,
    ):
        super().__init__(options, rows, tokenization)
        self.progress = progress
        with progress.phase("loading the model"):
            torch.manual_seed(options.seed)
            model = load_policy(options, options.model_name_or_path, tokenization)
            if not isinstance(model, PeftModel):
                model = add_adapter(model, _lora(options.lora_r))
        self.policy = on_device(model)
        device = torch.device(torch.accelerator.current_accelerator() or "cpu")
        precision = precision_of(options, options.model_name_or_path)
        settings = FoldSettings(
            num_folds=options.num_folds,
            epochs=options.fold_epochs,
            learning_rate=options.fold_learning_rate,
            batch_size=options.fold_batch_size,
            seed=options.seed,
        )
        self.folds = Folds(
            self.policy,
            lambda: base_weights(self.policy, None, seed=options.seed),
            [row.group for row in rows],
            Path(options.output_dir) / "folds",
            settings,
            pad_token_id=tokenization.pad_id,
            autocast=partial(precision.autocast, device),
        )

    def values(self) -> list[float]:
        """Log-prob per token of each row (nats)."""
        found: dict[int, float] = {}
        for fold in range(self.options.num_folds):
            with self._as(fold), self.progress.phase(f"log-probs of fold {fold}") as advance:
                members = self.folds.members(fold)
                logps = cached_logps(
                    self.policy,
                    members,
                    batch_size=self.options.batch_size,
                    pad_token_id=self.tokenization.pad_id,
                    on_batch=advance,
                )
            for group, (logp,) in zip(members, logps, strict=True):
                found[group.row] = logp / len(group.completions[0].token_ids)
        return [found[row.group.row] for row in self.rows]

    def answers(self, places: Sequence[int]) -> dict[int, str]:
        """By place, where the model can be sampled from."""
        if not can_sample(self.policy):
            return {}
        found: dict[int, str] = {}
        for fold in range(self.options.num_folds):
            own = [place for place in places if self.folds.of_group[place] == fold]
            if own:
                with self._as(fold), self.progress.phase(f"answers of fold {fold}"):
                    found |= zip(own, self.texts(self.drawn(self.policy, own)), strict=True)
        return found

    def _as(self, fold: int) -> AbstractContextManager[None]:
        members = self.folds.members(fold)
        steps = self.folds.steps(len(self.rows) - len(members))
        with self.progress.phase(f"adapter for fold {fold}", steps) as advance:
            return self.folds.weights(fold, advance).active()


class _ByReward(_Answering):
    """Each row is judged against the model's own answer: a reward compares answers to the same prompt.

    Raises:
        UserError: the model cannot be sampled from, or the reward reads other tokens.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        rows: Sequence[TokenizedRow],
        tokenization: Tokenization,
        progress: Progress,
    ):
        super().__init__(options, rows, tokenization)
        self.progress = progress
        with progress.phase("loading the model and the reward"):
            self.policy = load_policy(options, options.model_name_or_path, tokenization)
            TransformersSampler(self.policy)  # else it would be found out after loading
            self.reward = reward_of_policy(options, tokenization, logp_model=options.model_name_or_path)
        self._samples: list[Sample] = []

    def values(self) -> list[float]:
        """The demonstration's reward minus the answer's, of each row."""
        with self.progress.phase("answers", len(self.rows)):
            self._samples = self.drawn(self.policy, range(len(self.rows)))
        groups: list[Group] = [
            row.group.add([sample.completion]) for row, sample in zip(self.rows, self._samples, strict=True)
        ]
        with self.progress.phase("rewards", len(groups)):
            return [float(ours - theirs) for ours, theirs in scores_by_group(self.reward, groups)]

    def answers(self, places: Sequence[int]) -> dict[int, str]:
        """By place."""
        return dict(zip(places, self.texts([self._samples[place] for place in places]), strict=True))


def _lora(rank: int) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


# --- rows ----------------------------------------------------------------------------------------------------------------


def _originals(options: argparse.Namespace, dataset: Any) -> list[Mapping[str, Any]]:
    """The rows as they were written: a table would give each row the columns of all."""
    path = Path(options.dataset_name).expanduser()
    if options.split == "train" and path.is_file() and extension(path) != ".parquet":
        return list(read_file(path))
    return list(dataset)


def _line(original: Mapping[str, Any], row: TokenizedRow, source: str) -> str:
    try:
        line = json.dumps(original, ensure_ascii=False)
        if not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError:  # half of a surrogate pair: only an escape can write it
                line = json.dumps(original)
        return line + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(
            f"cannot be written as JSON: {error}.",
            remedy="Take out the columns that hold no text, numbers or lists.",
            file=source,
            row=row.demonstration.number,
        ) from error


def _row(ranked: Ranked) -> int:
    return ranked.row


def _worst_row(ranked: Ranked, row: TokenizedRow, answer: str | None) -> WorstRow:
    prompt = row.demonstration.prompt
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    return WorstRow(**asdict(ranked), prompt=prompt, demonstration=row.demonstration.completion, answer=answer)
