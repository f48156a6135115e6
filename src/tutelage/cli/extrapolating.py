"""What `tutelage extrapolate` does once its arguments are good: measure each α, write the model, its record, card and page."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from tutelage.card import code, markdown
from tutelage.cli.common import computing, load_data, load_policy, load_tokenization
from tutelage.cli.output import OutputFolder
from tutelage.cli.progress import TerminalProgress
from tutelage.cli.rewards import reward_of_policy
from tutelage.errors import UserError
from tutelage.evaluation.policy import Evaluation, EvaluationSet, can_sample
from tutelage.evaluation.statistics import bootstrap_mean, paired_difference
from tutelage.files import size_and_hash, storing, sync, write_json, write_text, writing_folder
from tutelage.models.extrapolation.arithmetic import Tally
from tutelage.models.extrapolation.finding import Extrapolation, find_extrapolation
from tutelage.models.stored import is_adapter
from tutelage.models.tokenizer import load_tokenizer
from tutelage.report.extrapolation import (
    MEASURES,
    Extrapolated,
    extrapolation_page,
    extrapolation_table,
    selection_said,
)
from tutelage.results import Interval
from tutelage.sampling import TransformersSampler
from tutelage.terminal import say, show
from tutelage.training.made import finish_made

__all__ = ["best_alpha", "extrapolate"]

RECORD, PAGE, CARD = "extrapolation.json", "extrapolation.html", "README.md"
_LAST = ("adapter_config.json", "config.json")  # by these a folder is known to hold a model
_SAME = "θ₁ + α(θ₁ − θ₀), computed in float32 (ExPO, arXiv 2404.16792)"


def extrapolate(options: argparse.Namespace, output: OutputFolder, console: Console) -> None:
    """Write the extrapolated model; with several α the one that does best on validation rows, with the curve.

    Args:
        options: the command's.
        output: where to, entered.
    """
    dtype = getattr(torch, options.dtype) if options.dtype else None
    options.dtype = None  # models compute as `evaluate` has them, whatever they are stored in
    made = find_extrapolation(options.start, options.aligned, dtype=dtype, trust_remote_code=options.trust_remote_code)
    _require_same_tokens(options)
    say(console, f"extrapolating {made.route}")
    alpha, found, folder = options.alpha, [], output.folder
    with TerminalProgress(console, "extrapolate") as progress:
        measuring = _Measuring(options, console, progress) if options.alphas else None
        output.clear()
        output.add(RECORD, unfinished=True)
        if measuring:
            found = measuring.measured(made, folder)
            alpha = best_alpha(found, options.select)
        with progress.phase(f"writing the model at α = {alpha:g}"), writing_folder(folder) as writing:
            tally = made.write(writing, alpha)
            record = _record(options, made, tally, alpha, found, writing)
            _write_texts(options, record, found, alpha, writing)
            sync(writing)
            _publish(writing, output)
    finish_made(folder)
    if found:
        show(console, extrapolation_table(found, alpha))
        say(console, selection_said(found, alpha, options.select))
        say(console, f"page: {folder / PAGE}")
    if tally.rounds:
        say(console, _rounding_said(tally))
    say(console, f"model at α = {alpha:g}: {folder}")


def best_alpha(found: Sequence[Extrapolated], by: str) -> float:
    """The α with the highest mean of a measure; of equals the one nearest to the aligned model.

    Raises:
        UserError: it was not measured of any.
    """
    known = [each for each in found if by in each.measures]
    if not known:
        raise UserError(
            "there is nothing to choose α by: no model has a finite one.",
            remedy="Look at the two models with `tutelage evaluate`, or select by something else.",
            field="select",
        )
    return min(known, key=lambda each: (-each.measures[by].mean, abs(each.alpha), each.alpha)).alpha


def _require_same_tokens(options: argparse.Namespace) -> None:
    """Refuse models whose tokens have other numbers: their embeddings are no states of one model."""
    try:
        first, second = (
            load_tokenizer(name, trust_remote_code=options.trust_remote_code).get_vocab()
            for name in (options.start, options.aligned)
        )
    except UserError:  # weights alone can be extrapolated too
        return
    other = sorted(token for token in first.keys() & second.keys() if first[token] != second[token])
    if other:
        raise UserError(
            f"the token {other[0]!r} has the number {first[other[0]]} in the start and {second[other[0]]} in the aligned model.",
            remedy="Give the model that the training of the aligned one started from.",
            file=options.start,
            field="start",
        )


# --- measuring ---------------------------------------------------------------------------------------------------------


class _Measuring:
    """Measures the model at each α on validation rows. What is measured is what would be written, in its precision.

    Args:
        options: the command's.
    """

    def __init__(self, options: argparse.Namespace, console: Console, progress: TerminalProgress):
        self.options, self.console, self.progress = options, console, progress
        with progress.phase("reading the rows"):
            self.tokenization = load_tokenization(options, options.aligned)
            self.rows = EvaluationSet.of(
                load_data(options),
                self.tokenization,
                verifier=options.verifier,
                limit=options.rows,
                source=options.dataset_name,
            )
        self.reward = None
        if options.reward:
            with computing(options, options.aligned, None), progress.phase("loading the reward"):
                self.reward = reward_of_policy(options, self.tokenization)

    def measured(self, made: Extrapolation, folder: Path) -> list[Extrapolated]:
        """In the order of ``alphas``; the KL to the start is asked last, so that one model is in memory at a time.

        Args:
            folder: where each model is written for as long as it is measured.
        """
        found = [
            self._evaluated(made, folder, alpha, first=not place) for place, alpha in enumerate(self.options.alphas)
        ]
        found = self._against_start(found)
        plain = found[self.options.alphas.index(0.0)]
        return [self._told(alpha, each, plain) for alpha, each in zip(self.options.alphas, found, strict=True)]

    def _evaluated(self, made: Extrapolation, folder: Path, alpha: float, *, first: bool) -> Evaluation:
        options = self.options
        with (
            writing_folder(folder) as writing,
            computing(options, options.aligned, self.console if first else None),
        ):
            with self.progress.phase(f"making the model at α = {alpha:g}"):
                made.write(writing, alpha)
                model = load_policy(options, str(writing), self.tokenization)
            self.rows.require_answers(model)
            answers, greedy = can_sample(model), options.verifier is not None
            if self.reward and not answers:
                TransformersSampler(model)  # says why not
            total = (1 + greedy) * len(self.rows.groups) if answers else None
            with self.progress.phase(f"measuring α = {alpha:g}", total) as advance:
                return self.rows.evaluate(
                    model,
                    batch_size=options.batch_size,
                    sampling_batch_size=options.sampling_batch_size,
                    seed=options.seed,
                    sample=answers,
                    num_samples=options.eval_samples,
                    greedy=greedy,
                    score_samples=answers,
                    reward=self.reward,
                    on_progress=advance,
                )

    def _against_start(self, found: list[Evaluation]) -> list[Evaluation]:
        options = self.options
        if not any(each.sampled for each in found):
            return found
        with (
            computing(options, options.aligned, None),
            self.progress.phase("KL to the start", len(found)) as advance,
        ):
            start = load_policy(options, options.start, self.tokenization)
            told = []
            for number, each in enumerate(found, start=1):
                told.append(self.rows.against_start(each, start, batch_size=options.batch_size))
                advance(number)
        return told

    def _told(self, alpha: float, found: Evaluation, plain: Evaluation) -> Extrapolated:
        record, by = found.record(self.rows.source), self.options.select
        names = {
            "log_prob": "demonstration_logp",
            "score": "score_sampled",
            "greedy_score": "score_greedy",
            "kl": "kl",
        }
        measures = {name: record.means[theirs] for name, theirs in names.items() if theirs in record.means}
        rewards = _values(found, "reward")
        if rewards is not None and np.isfinite(rewards).all():
            measures["reward"] = bootstrap_mean(rewards)
        ours, theirs = _values(found, by), _values(plain, by)
        known = ours is not None and theirs is not None and np.isfinite([ours, theirs]).all()
        return Extrapolated(
            alpha,
            {name: measures[name] for name in MEASURES if name in measures},
            gain=paired_difference(ours, theirs) if known and alpha != 0 else None,  # type: ignore[arg-type]
            length=record.length_mean,
            truncated=record.truncated_fraction,
        )


def _values(found: Evaluation, name: str) -> list[float] | None:
    """A measure's value of each row; None where it was not taken."""
    if name == "log_prob":
        return found.demonstration_logps
    if name == "greedy_score":
        return found.greedy.score if found.greedy else None
    if found.sampled is None:
        return None
    if name == "score":
        return found.sampled.score
    rewards = found.sampled.rewards
    return None if rewards is None else [float(np.mean(row)) for row in rewards]


# --- what is written ---------------------------------------------------------------------------------------------------


def _record(
    options: argparse.Namespace,
    made: Extrapolation,
    tally: Tally,
    alpha: float,
    found: Sequence[Extrapolated],
    folder: Path,
) -> dict[str, Any]:
    """What extrapolation.json holds; files with their sizes and SHA-256."""
    start, aligned = made.files
    weights = sorted(folder.glob("*.safetensors"))
    record: dict[str, Any] = {
        "format": 1,
        "formula": _SAME,
        "alpha": alpha,
        "route": made.route,
        "start": {"name": options.start, "files": {path.name: size_and_hash(path) for path in start}},
        "aligned": {"name": options.aligned, "files": {path.name: size_and_hash(path) for path in aligned}},
        "written": {path.name: size_and_hash(path) for path in weights},
        "distance": tally.distance,
        "rounded": tally.rounds,
        "rounding": tally.rounding,
    }
    if found:
        record["selection"] = {
            "by": options.select,
            "dataset": options.dataset_name,
            "split": options.split,
            "rows": options.rows,
            "verifier": options.verifier,
            "reward": options.reward,
            "seed": options.seed,
            "samples_per_row": options.eval_samples,
            "candidates": [_as_json(each) for each in found],
        }
    return record


def _as_json(found: Extrapolated) -> dict[str, Any]:
    return {**asdict(found), "measures": {name: asdict(value) for name, value in found.measures.items()}}


def _write_texts(
    options: argparse.Namespace,
    record: Mapping[str, Any],
    found: Sequence[Extrapolated],
    alpha: float,
    folder: Path,
) -> None:
    write_json(folder / RECORD, record)
    write_text(folder / CARD, _card(options, record, found, is_adapter=is_adapter(folder)))
    if found:
        meta = f"start {options.start} · aligned {options.aligned} · measured on {options.dataset_name}"
        meta = meta.replace(str(Path.home()), "~")  # whose it is does not belong on a page that is shown to others
        title = f"{Path(options.aligned).name} extrapolated"
        page = extrapolation_page(found, chosen=alpha, by=options.select, title=title, meta=meta)
        write_text(folder / PAGE, page)


def _card(
    options: argparse.Namespace, record: Mapping[str, Any], found: Sequence[Extrapolated], *, is_adapter: bool
) -> str:
    """README.md of the model."""
    alpha = record["alpha"]
    lines = [
        "---",
        "library_name: " + ("peft" if is_adapter else "transformers"),
        'tags: [tutelage, "extrapolation"]',
        "---",
        "",
        f"# {markdown(Path(options.output_dir).name)}",
        "",
        f"Not trained, but extrapolated by tutelage: {_SAME}, with α = {alpha:g}, θ₀ {code(options.start)} and "
        f"θ₁ {code(options.aligned)}. By {record['route']}.",
        "",
        f"`{RECORD}` has the hashes of the weights that it was made of.",
        "",
    ]
    if found:
        best = next(each for each in found if each.alpha == alpha)
        told = (
            f"α was chosen on {code(options.dataset_name)}, and what it did there is too good by what choosing adds."
        )
        lines += [told, "", "| quantity | mean | 95% interval | n |", "| --- | --- | --- | --- |"]
        lines += [_line(MEASURES[name][0], value) for name, value in best.measures.items()]
        if best.length is not None:
            lines.append(f"| mean length of answers, tokens | {best.length:.4g} | – | – |")
        lines.append("")
    return "\n".join(lines)


def _line(name: str, value: Interval) -> str:
    return f"| {markdown(name)} | {value.mean:.4g} | {value.low:.4g} to {value.high:.4g} | {value.n} |"


def _rounding_said(tally: Tally) -> str:
    share = f" by {tally.rounding:.1%} of the way from the start to the aligned model" if tally.rounding else ""
    return f"rounding to the stored precision moved weights{share}; --dtype float32 keeps them"


def _publish(writing: Path, output: OutputFolder) -> None:
    """Give the files their names, those by which a model is known last: a killed command leaves none that could be loaded."""
    folder = output.folder
    names = sorted(str(path.relative_to(writing)) for path in writing.rglob("*") if path.is_file())
    names.sort(key=lambda name: name in _LAST)
    output.add(*names, unfinished=True)
    with storing(folder):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(writing / name, folder / name)
