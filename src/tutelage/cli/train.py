"""tutelage sft | spin | irft | rft | sdft: train, evaluate, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PrinterCallback, ProgressCallback

from tutelage.algorithms.registry import find
from tutelage.card import model_card
from tutelage.cli.arguments import DataArguments, ModelArguments, parse
from tutelage.cli.controls import Controls
from tutelage.cli.dry_run import rehearse
from tutelage.cli.libraries import quiet_libraries
from tutelage.cli.output import RESULTS, OutputFolder
from tutelage.cli.progress import PROGRESS, LogLines, TerminalProgress
from tutelage.data import load_dataset
from tutelage.errors import UserError
from tutelage.evaluation.policy import can_sample
from tutelage.evaluation.record import evaluated
from tutelage.files import storing, write_text
from tutelage.launch import process_index
from tutelage.models.loading import load_tokenizer
from tutelage.models.precision import given_precision
from tutelage.report import summary_table, verdicts, write_report
from tutelage.report.summary import duration
from tutelage.results import RunRecord, write_results
from tutelage.scoring.layout import probe_layout
from tutelage.terminal import say, show
from tutelage.training.config import DemonstrationConfig
from tutelage.training.costs import reset_peak_memory
from tutelage.training.made import add_made
from tutelage.training.termination import leave_if_asked, listening
from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["main", "train"]


def main(args: Sequence[str], console: Console) -> None:
    """Run the algorithm that the first argument names, as the others say."""
    algorithm, *args = args
    quiet_libraries()
    data, model, training = parse(algorithm, find(algorithm).config, args)
    if not data.dataset_name:
        raise UserError("no dataset is given.", remedy="Add --dataset_name DATA.", field="dataset_name")
    model.require_name()
    if training.world_size > 1 and data.controls:
        raise UserError(
            "controls are trained by one process.",
            remedy="Leave --controls out, and train them afterwards by commands of their own.",
            field="controls",
        )
    controls = Controls(data.controls, data, model, training)
    folder = Path(training.output_dir)
    report = folder / "report.html"
    resume, dry = data.resume, data.dry_run
    if dry and training.world_size > 1:
        raise UserError("is for one process.", remedy="Start it without a launcher.", field="dry_run")
    if process_index() > 0:
        train(algorithm, data, model, training, console)
        return
    with OutputFolder(
        training.output_dir, resume=resume, overwrite=data.overwrite_output_dir, leaves_nothing=dry
    ) as output:
        if dry:
            training.push_to_hub = False  # which would make a repository
            with TerminalProgress(console, training.run_name or algorithm) as progress:
                trainer = _prepared(algorithm, data, model, training, console, progress)
                rehearse(trainer, console, resume=resume)
            return
        record = train(algorithm, data, model, training, console, before_training=output.clear)
        with storing(report):
            write_report([record], report)  # before the controls, which may fail
        records = [record, *controls.train(record, console, train)]
        with storing(report):
            write_report(records, report)
    show(console, summary_table(records))
    for sentence in verdicts(records):
        say(console, sentence)
    say(console, f"model and results: {folder}\nreport: {report}")


def train(
    algorithm: str,
    data: DataArguments,
    model: ModelArguments,
    training: DemonstrationConfig,
    console: Console,
    *,
    before_training: Callable[[], None] = lambda: None,
    prepare: Callable[[DemonstrationTrainer], None] = lambda trainer: None,
    after: Callable[[DemonstrationTrainer], None] = lambda trainer: None,
) -> RunRecord:
    """Train, save, evaluate; returns what results.json holds.

    Args:
        before_training: called when data, model and settings have been found good.
        prepare: called with the trainer before training, to add callbacks.
        after: called with the trainer when all is measured.
    """
    with listening():
        return _train(algorithm, data, model, training, console, before_training, prepare, after)


def _train(
    algorithm: str,
    data: DataArguments,
    model: ModelArguments,
    training: DemonstrationConfig,
    console: Console,
    before_training: Callable[[], None],
    prepare: Callable[[DemonstrationTrainer], None],
    after: Callable[[DemonstrationTrainer], None],
) -> RunRecord:
    name = training.run_name or algorithm
    reset_peak_memory()
    with TerminalProgress(console, name) as progress:
        trainer = _prepared(algorithm, data, model, training, console, progress)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(LogLines(console))
        prepare(trainer)
        checkpoint = trainer.resume_point() if data.resume else None
        if data.resume and checkpoint is None:
            say(console, f"  no checkpoint in {training.output_dir}: starting at step 0")
        if checkpoint is not None:
            say(console, f"  going on from {checkpoint}")
        folder, on_main = Path(str(training.output_dir)), trainer.processes.on_main

        def begin() -> None:
            before_training()
            with storing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                add_made(folder, [*RESULTS, PROGRESS])
            progress.tell_in(folder)

        on_main(begin)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.export(folder)
        record = trainer.record(name=name)
        on_main(partial(write_results, folder, record))  # before the evaluation, which may fail
        with progress.phase("loading the export back"):
            checked = trainer.check_export(folder)
        for sentence in checked:
            say(console, f"  {sentence}")
        record = _final_evaluation(trainer, record, progress)
        after(trainer)
    say(console, f"  {name} took {duration(record.time_s['total'])}")

    def end() -> None:
        write_results(folder, record)
        write_text(folder / "README.md", model_card(record))
        if training.push_to_hub:
            trainer.push_to_hub(record=record)

    on_main(end)
    return record


def _prepared(
    algorithm: str,
    data: DataArguments,
    model: ModelArguments,
    training: DemonstrationConfig,
    console: Console,
    progress: TerminalProgress,
) -> DemonstrationTrainer:
    """The trainer, with its model and data found good, before training."""
    trainer_class = find(algorithm).trainer
    training.disable_tqdm = True
    training.is_new = not data.resume  # type: ignore[misc]
    sources = _load_datasets(data, training)
    policy, tokenizer, peft_config = _load_model(model, console, progress)
    trainer = _checked(
        trainer_class,
        policy,
        training,
        processing_class=tokenizer,
        peft_config=peft_config,
        progress=progress,
        **sources,
    )
    trainer.model_name = model.require_name()
    if data.retention_dataset:
        trainer.watch_retention(
            _load_whole(data.retention_dataset, split=data.dataset_test_split),
            verifier=data.retention_verifier,
            source=data.retention_dataset,
        )
    say(
        console,
        (training.run_name or algorithm, "bold"),
        f": {trainer.model_name}, learning rate {trainer.args.learning_rate:g}, "
        f"layout {trainer.layout} ({probe_layout(trainer.policy).reason}), "
        f"computing in {model.precision or given_precision(training.computing, '--bf16')}",
    )
    return trainer


def _load_datasets(data: DataArguments, training: DemonstrationConfig) -> dict[str, Any]:
    """What the trainer is told of its data: to train on, to evaluate, and what else the algorithm takes."""
    load = partial(load_dataset, config_name=data.dataset_config)
    source = str(data.dataset_name)
    eval_source = str(data.eval_dataset_name or source)
    loaded: dict[str, Any] = {
        "train_dataset": load(source, split=data.dataset_train_split, streaming=data.dataset_streaming),
        "eval_dataset": None,
        "source": source,
        "eval_source": eval_source,
    }
    if data.eval_dataset_name:
        config, split = data.dataset_config, data.dataset_test_split
        loaded["eval_dataset"] = _load_whole(eval_source, config_name=config, split=split)
    elif training.eval_strategy != "no":
        loaded["eval_dataset"] = load(eval_source, split=data.dataset_test_split)
    for kind in ("prompt", "validation", "preference"):
        if name := getattr(training, f"{kind}_dataset", None):
            loaded |= {f"{kind}_dataset": load(name, split="train"), f"{kind}_source": name}
    return loaded


def _load_whole(source: str, *, split: str, config_name: str | None = None) -> Any:
    """Data to evaluate on. A file given for the purpose is read whole; it has no splits of its own."""
    split = "train" if Path(source).is_file() else split
    return load_dataset(source, config_name=config_name, split=split)


def _load_model(model: ModelArguments, console: Console, progress: TerminalProgress) -> tuple[Any, Any, Any]:
    """Policy, tokenizer, and the adapter to put on the policy if it has none."""
    with progress.phase("loading the model"):
        tokenizer = load_tokenizer(
            model.require_name(), revision=model.model_revision, trust_remote_code=model.trust_remote_code
        )
        policy = model.load()
    continued = getattr(policy, "peft_config", None)
    if not continued:
        return policy, tokenizer, model.peft_config()
    rank = getattr(next(iter(continued.values())), "r", "?")
    say(console, f"  training continues the adapter of {model.model_name_or_path} (r {rank}); --lora_* have no effect")
    return policy, tokenizer, None


def _final_evaluation(trainer: DemonstrationTrainer, record: RunRecord, progress: TerminalProgress) -> RunRecord:
    """The record with what the evaluation rows, and those of another task, show of the trained policy."""
    rows = trainer.evaluation_set
    if rows is None:
        return replace(record, retention=trainer.retained())
    with trainer.passes():
        answers = can_sample(trainer.policy)  # log-probs of a recurrent model can be had, answers cannot
    count = 2 * len(rows.groups) if answers else None  # sampled and greedy
    with progress.phase("evaluating", count) as advance:

        def on_progress(done: int) -> None:
            advance(done)
            leave_if_asked()

        evaluation = trainer.evaluation(rows, sample=answers, greedy=answers, on_progress=on_progress)
    return replace(evaluated(record, evaluation, rows), retention=trainer.retained())


def _checked(trainer_class: type[DemonstrationTrainer], *args: Any, **options: Any) -> DemonstrationTrainer:
    """The trainer; what libraries refuse in its settings is the user's to mend."""
    try:
        return trainer_class(*args, **options)
    except UserError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:
        # transformers and its integrations refuse settings that do not go together, or that need what is missing.
        reason = " ".join(str(error).split())
        raise UserError(f"training cannot start: {reason}", remedy="--debug shows the traceback.") from error
