"""--controls: after a method, train what it has to beat, from the same start and on the same data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from datasets import IterableDataset
from rich.console import Console

from tutelage.algorithms.controls import CONTROLS, MATCHED, Control, control_config, controls, matched
from tutelage.cli.arguments import DataArguments, ModelArguments
from tutelage.cli.output import OutputFolder
from tutelage.data import load_dataset
from tutelage.data.demonstrations import Turns
from tutelage.data.tokenized import tokenize_dataset
from tutelage.data.validation import split_validation, without_prompts
from tutelage.errors import UserError
from tutelage.evaluation.policy import EvaluationSet, can_sample
from tutelage.files import read_json, write_json, write_json_lines
from tutelage.models.loading import load_tokenizer
from tutelage.report.verdicts import signed
from tutelage.results import RunRecord, load_results
from tutelage.terminal import say
from tutelage.training.callbacks import StopAtScore
from tutelage.training.clock import recorded_time
from tutelage.training.config import DemonstrationConfig
from tutelage.training.made import add_made
from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["Controls", "parse_controls"]


def parse_controls(names: Sequence[str], *, has_prompts: bool, has_scores: bool) -> list[str]:
    """Names of controls, in the order of ``CONTROLS``; ``all`` stands for every one that there can be.

    Those that go by the plateau's choice bring it along.

    Args:
        has_prompts: whether the method samples for prompts without demonstrations, which self-training needs.
        has_scores: whether held-out answers get a score, which equal_score needs.

    Raises:
        UserError: an unknown name, or a control without what it needs.

    >>> parse_controls(["gentle", "equal_compute"], has_prompts=False, has_scores=False)
    ['plateau', 'gentle', 'equal_compute']
    """
    unknown = sorted(set(names) - {*CONTROLS, "all"})
    if unknown:
        raise UserError(
            f"there is no control '{unknown[0]}'.", remedy=f"Use {', '.join(CONTROLS)} or all.", field="controls"
        )
    if "self_training" in names and not has_prompts:
        raise UserError(
            "self-training imitates answers to prompts without demonstrations, and there are none.",
            remedy="Add --prompt_dataset to rft, or leave self_training out.",
            field="controls",
        )
    if "equal_score" in names and not has_scores:
        raise UserError(
            "equal_score stops where held-out answers score as the method's do, and they get no score.",
            remedy="Add --eval_dataset_name and --verifier, or leave equal_score out.",
            field="controls",
        )
    impossible = {"self_training": not has_prompts, "equal_score": not has_scores}
    wanted = {*names, *(name for name in CONTROLS if "all" in names and not impossible.get(name))}
    if wanted & set(MATCHED):
        wanted.add("plateau")
    return [name for name in CONTROLS if name in wanted]


class Controls:
    """The controls of a method: what would be refused is refused here, before anything is trained.

    Args:
        names: as given on the command line.
        data, model, method: of the method.

    Raises:
        UserError: as ``parse_controls``; streamed data; too few rows to choose on; or settings that a control refuses.
    """

    def __init__(self, names: Sequence[str], data: DataArguments, model: ModelArguments, method: DemonstrationConfig):
        self.data, self.model, self.method = data, model, method
        self.home = Path(str(method.output_dir)) / "controls"
        wanted = parse_controls(
            names,
            has_prompts=bool(getattr(method, "prompt_dataset", None)),
            has_scores=bool(method.verifier and data.eval_dataset_name),
        )
        if wanted and data.dataset_streaming:
            raise UserError(
                "controls make passes over the data, and streamed data have no end.",
                remedy="Leave --dataset_streaming or --controls out.",
                field="controls",
            )
        adapter = bool(model.use_peft or model.continues_adapter)
        self.matched = [name for name in wanted if name in MATCHED]
        self.runs: dict[str, list[tuple[Control, DemonstrationConfig]]] = {
            name: [(control, self._config(control)) for control in controls(name, adapter=adapter)]
            for name in wanted
            if name not in MATCHED
        }
        chooses = any(len(runs) > 1 for runs in self.runs.values())
        self._split = _Split(data, model, method, self.home) if chooses else None

    def _config(self, control: Control) -> DemonstrationConfig:
        return control_config(control, self.method, str(self.home / control.name))

    def train(self, method: RunRecord, console: Console, train: Callable[..., RunRecord]) -> list[RunRecord]:
        """Train them into ``controls`` in the method's folder; what is finished there is not trained again.

        Args:
            method: its record.
            train: as ``tutelage.cli.train.train``.

        Returns:
            a record of each control; of a control with several runs the best by sampled answers, and the best by greedy
            ones, both chosen on validation rows.
        """
        found: list[RunRecord] = []
        plateau = None
        for name, runs in self.runs.items():
            split = self._split if len(runs) > 1 else None
            records = [self._run(control, config, split, console, train) for control, config in runs]
            if split:
                values = [read_json(self.home / control.name / "validation.json") for control, _ in runs]
                records = _chosen(records, values)
            plateau = records[-1] if name == "plateau" else plateau  # by sampled answers, where they are known
            found += records
        for name in self.matched:
            assert plateau is not None
            control = matched(name, method, plateau)
            record = self._run(control, self._config(control), self._split, console, train)
            if control.until_score is not None:
                say(console, _stopped(control.until_score, record))
            found.append(record)
        return found

    def _run(
        self,
        control: Control,
        config: DemonstrationConfig,
        split: _Split | None,
        console: Console,
        train: Callable[..., RunRecord],
    ) -> RunRecord:
        """The record of one run: of the one that lies there finished, or of one that is trained now."""
        folder = self.home / control.name
        if (folder / "README.md").exists():  # written last
            return load_results(folder)
        say(console, ("\ncontrol", "bold"), f" {control.control}: {control.name}")
        options: dict[str, Any] = {"after": split.measure_into(folder)} if split else {}
        if (score := control.until_score) is not None:
            options["prepare"] = lambda trainer: trainer.add_callback(StopAtScore(trainer, score))
        with OutputFolder(str(folder), overwrite=True) as output:
            train(
                control.algorithm,
                replace(split.data if split else self.data, overwrite_output_dir=True, resume=False),
                self.model,
                config,
                console,
                before_training=output.clear,
                **options,
            )
        return load_results(folder)


def _stopped(target: float, record: RunRecord) -> str:
    """What became of the run that was to stop at a score."""
    assert record.evaluation is not None
    score, passes = record.evaluation.means["score_sampled"].mean, f"{record.demonstration_epochs:.3g} passes"
    reached = f"stopped after {passes}" if score >= target else f"did not get there in {passes}"
    return f"  {record.name}: score {signed(score)}, the method's is {signed(target)}; {reached}"


def _chosen(records: list[RunRecord], values: list[dict[str, float]]) -> list[RunRecord]:
    """The best on validation rows, by each of the values; once where it is the same run."""
    found: dict[str, RunRecord] = {}
    for value in sorted(set.intersection(*map(set, values))):
        best = max(range(len(records)), key=lambda place: values[place][value])
        found.setdefault(records[best].name, records[best])
    return list(found.values())


class _Split:
    """Validation rows for a choice among controls, and the training data without them.

    They are the method's own validation rows where it has some, and else taken from the training data in the same way.
    """

    def __init__(self, data: DataArguments, model: ModelArguments, method: DemonstrationConfig, home: Path):
        self._data, self._path = data, home / "train.jsonl"
        source, turns = str(data.dataset_name), cast(Turns, method.turns)
        self.tokenization = method.tokenization(
            load_tokenizer(
                model.require_name(), revision=model.model_revision, trust_remote_code=model.trust_remote_code
            ),
            now=recorded_time(Path(str(method.output_dir))),
        )
        dataset = load_dataset(source, config_name=data.dataset_config, split=data.dataset_train_split)
        assert not isinstance(dataset, IterableDataset)
        tokenized = cast(Any, tokenize_dataset(dataset, self.tokenization, turns=turns, source=source))
        given = getattr(method, "validation_dataset", None)
        if given:
            raw = load_dataset(given, config_name=data.dataset_config)
        else:
            rows = getattr(method, "validation_rows", None) or min(max(16, len(dataset) // 10), 128, len(dataset) // 2)
            raw, _ = split_validation(
                dataset, tokenized, self.tokenization, rows=rows, seed=method.seed, turns=turns, source=source
            )
        self.rows = EvaluationSet.of(
            cast(Any, raw), self.tokenization, verifier=method.verifier, turns=turns, source=given or source
        )
        left = without_prompts(tokenized, {group.prompt_ids for group in self.rows.groups}, source=source)
        self._kept = None if len(left) == len(tokenized) else [dataset[row] for row in sorted(set(left["row"]))]

    @property
    def data(self) -> DataArguments:
        """The training data without the validation rows: a file of its own, where they were among them."""
        if self._kept is None:
            return self._data
        self._path.parent.mkdir(parents=True, exist_ok=True)
        add_made(self._path.parent, [self._path.name])
        write_json_lines(self._path, self._kept)
        return replace(self._data, dataset_name=str(self._path), dataset_config=None, dataset_train_split="train")

    def measure_into(self, folder: Path) -> Callable[[DemonstrationTrainer], None]:
        """Writes ``validation.json``: what the choice goes by, of a trained policy."""

        def measure(trainer: DemonstrationTrainer) -> None:
            answers = self.rows.verifier is not None and can_sample(trainer.policy)
            with trainer.compute_loss_context_manager():
                means = trainer.evaluation(self.rows, sample=answers, greedy=answers).metrics()
            names = ("score_sampled", "score_greedy") if answers else ("demonstration_logp",)
            add_made(folder, ["validation.json"])
            write_json(folder / "validation.json", {name: means[name] for name in names})

        return measure
