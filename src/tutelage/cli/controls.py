"""--controls: after a method, train what it has to beat, from the same start and on the same data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from tutelage.algorithms.controls import CONTROLS, control_config, controls
from tutelage.cli.arguments import DataArguments, ModelArguments
from tutelage.cli.output import OutputFolder
from tutelage.data import load_dataset
from tutelage.data.demonstrations import Turns
from tutelage.data.tokenization import tokenize_dataset
from tutelage.data.validation import split_validation, without_prompts
from tutelage.errors import UserError
from tutelage.evaluation.policy import EvaluationSet, can_sample
from tutelage.files import read_json, write_json
from tutelage.models.loading import load_tokenizer
from tutelage.results import RunRecord, load_results
from tutelage.training.config import DemonstrationConfig
from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["parse_controls", "train_controls"]


def parse_controls(names: Sequence[str]) -> list[str]:
    """Names of controls, in the order of ``CONTROLS``; ``all`` stands for every one.

    Raises:
        UserError: an unknown name.

    >>> parse_controls(["self_training", "plateau"]), parse_controls(["all"]) == list(CONTROLS)
    (['plateau', 'self_training'], True)
    """
    unknown = sorted(set(names) - {*CONTROLS, "all"})
    if unknown:
        raise UserError(
            f"there is no control '{unknown[0]}'.", remedy=f"Use {', '.join(CONTROLS)} or all.", field="controls"
        )
    return [name for name in CONTROLS if name in names or "all" in names]


def train_controls(
    names: Sequence[str],
    data: DataArguments,
    model: ModelArguments,
    method: DemonstrationConfig,
    console: Console,
    train: Callable[..., RunRecord],
) -> list[RunRecord]:
    """Train the controls into ``controls`` in the method's folder; what is finished there is not trained again.

    Args:
        names: from ``parse_controls``.
        data, model, method: of the method.
        train: as ``tutelage.cli.train.train``.

    Returns:
        a record of each control; of SFT to its plateau the best run by sampled answers, and the best by greedy ones,
        both chosen on validation rows.
    """
    home = Path(str(method.output_dir)) / "controls"
    found: list[RunRecord] = []
    for name in names:
        wanted = controls(name, adapter=_trains_adapter(model), takes_prompts=hasattr(method, "prompt_dataset"))
        chooses = len(wanted) > 1
        split = _Split(data, model, method, home) if chooses else None
        records, values = [], []
        for control in wanted:
            folder = home / control.name
            if not (folder / "README.md").exists():  # written last
                console.print(f"\n[bold]control[/bold] {name}: {control.name}", highlight=False)
                own = replace(split.data if split else data, overwrite_output_dir=True, resume=False)
                with OutputFolder(str(folder), overwrite=True) as output:
                    train(
                        control.algorithm,
                        own,
                        model,
                        control_config(control, method, str(folder)),
                        console,
                        before_training=output.clear,
                        **({"after": split.measure_into(folder)} if split else {}),
                    )
            records.append(load_results(folder))
            if split:
                values.append(read_json(folder / "validation.json"))
        found += _chosen(name, records, values) if chooses else records
    return found


def _chosen(name: str, records: list[RunRecord], values: list[dict[str, float]]) -> list[RunRecord]:
    """The best on validation rows, by each of the values; once where it is the same run."""
    found: dict[str, RunRecord] = {}
    for value in sorted(set.intersection(*map(set, values))):
        best = max(range(len(records)), key=lambda place: values[place][value])
        found.setdefault(records[best].name, records[best])
    return list(found.values())


def _trains_adapter(model: ModelArguments) -> bool:
    return bool(model.use_peft or model.continues_adapter)


class _Split:
    """Validation rows for a choice among controls, and the training data without them.

    They are the method's own validation rows where it has some, and else taken from the training data in the same way.
    """

    def __init__(self, data: DataArguments, model: ModelArguments, method: DemonstrationConfig, home: Path):
        source, turns = str(data.dataset_name), cast(Turns, method.turns)
        self.tokenization = method.tokenization(load_tokenizer(model.require_name()))
        dataset = cast(Any, load_dataset(source, config_name=data.dataset_config, split=data.dataset_train_split))
        tokenized = cast(Any, tokenize_dataset(dataset, self.tokenization, turns=turns, source=source))
        given = getattr(method, "validation_dataset", None)
        if given:
            raw = load_dataset(given)
        else:
            rows = getattr(method, "validation_rows", None)
            raw, _ = split_validation(
                dataset, tokenized, self.tokenization, rows=rows, seed=method.seed, turns=turns, source=source
            )
        self.rows = EvaluationSet.of(
            cast(Any, raw), self.tokenization, verifier=method.verifier, turns=turns, source=given or source
        )
        left = without_prompts(tokenized, {group.prompt_ids for group in self.rows.groups}, source=source)
        home.mkdir(parents=True, exist_ok=True)
        path = home / "train.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(dataset[row], ensure_ascii=False) + "\n" for row in sorted(set(left["row"])))
        self.data = replace(data, dataset_name=str(path), dataset_config=None, dataset_train_split="train")

    def measure_into(self, folder: Path) -> Any:
        """Writes ``validation.json``: what the choice goes by, of a trained policy."""

        def measure(trainer: DemonstrationTrainer) -> None:
            answers = self.rows.verifier is not None and can_sample(trainer.policy)
            with trainer.compute_loss_context_manager():
                means = trainer.evaluation(self.rows, sample=answers, greedy=answers).metrics()
            names = ("score_sampled", "score_greedy") if answers else ("demonstration_logp",)
            write_json(folder / "validation.json", {name: means[name] for name in names})

        return measure
