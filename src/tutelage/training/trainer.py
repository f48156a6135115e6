"""The engine on ``transformers.Trainer``: groups in, log-probs, a loss, and what is watched meanwhile.

An algorithm is a subclass that says how much there is to average over (``counts``) and what the loss is (``loss``);
one that samples derives from ``tutelage.training.stages.StageTrainer``.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import upload_folder
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from tutelage.data.demonstrations import Turns
from tutelage.data.tokenization import group_from_row, tokenize_dataset
from tutelage.errors import NonFiniteLossError, UserError
from tutelage.evaluation.policy import Evaluation, EvaluationSet
from tutelage.groups import Group
from tutelage.models.loading import add_adapter, base_causal_lm, check_vocabulary, load_model, load_tokenizer
from tutelage.models.memory import keep_freed_memory
from tutelage.progress import Progress, Silent
from tutelage.results import Curve, RunRecord, model_card, run_id
from tutelage.scoring.layout import probe_layout
from tutelage.scoring.logps import Layout, completion_logps
from tutelage.training.config import DemonstrationConfig
from tutelage.training.costs import peak_memory_bytes, run_settings

__all__ = ["DemonstrationTrainer"]

logger = logging.getLogger(__name__)


class DemonstrationTrainer(Trainer):
    """Trains a policy from demonstrations; subclasses say with which loss.

    On a CPU it asks the process to keep freed memory (``tutelage.models.memory``).

    Args:
        model: a causal language model, with or without an adapter, or its name or path.
        args: the algorithm's config.
        train_dataset: rows in any of the recognized formats (``docs/data-formats.md``), map-style or streaming.
        eval_dataset: held-out rows, map-style; preference pairs among them are ranked by the implicit reward.
        processing_class: the tokenizer; by default the one that lies with the model.
        peft_config: an adapter to put on the model and to train alone.
        callbacks, optimizers: as for ``transformers.Trainer``.
        progress: is told what runs and how far it is; silent by default.
        source, eval_source: what errors about the data call them: file names, for example.

    Raises:
        UserError: bad data, a tokenizer that does not fit the model, an adapter on a tied head.
    """

    algorithm: ClassVar[str] = ""
    curves: ClassVar[tuple[Curve, ...]] = ()
    args: DemonstrationConfig
    layout: Literal["shared_prefix", "padded"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: DemonstrationConfig,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        progress: Progress | None = None,
        source: str = "training data",
        eval_source: str = "held-out data",
    ):
        if args.device.type == "cpu":
            keep_freed_memory()
        policy = load_model(model, dtype=None, whole=peft_config is None) if isinstance(model, str) else model
        tokenizer = processing_class or load_tokenizer(str(base_causal_lm(policy).name_or_path))
        check_vocabulary(policy, tokenizer)
        if isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
            raise UserError(
                "streamed data have no length, so the run needs one.", remedy="Add --max_steps.", field="max_steps"
            )
        self.tokenization = args.tokenization(tokenizer)
        self.progress: Progress = progress or Silent()
        self.source = source
        self.model_name = model if isinstance(model, str) else base_causal_lm(policy).name_or_path
        if train_dataset is not None:
            with self.progress.phase("reading demonstrations"):
                train_dataset = tokenize_dataset(train_dataset, self.tokenization, turns=args.turns, source=source)  # type: ignore[arg-type]
        if peft_config is not None:
            set_seed(args.seed)  # an adapter's weights are drawn here, before transformers seeds anything
            policy = add_adapter(cast(PreTrainedModel, policy), peft_config)
        if args.learning_rate is None:
            args.learning_rate = (
                args.adapter_learning_rate if isinstance(policy, PeftModel) else args.full_learning_rate
            )
        self._sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.seconds: dict[str, float] = defaultdict(float)
        self._logged: dict[str, float] = {}
        self.trained_tokens = 0
        self.sampled_tokens = 0
        super().__init__(
            model=cast(PreTrainedModel, policy),
            args=args,
            data_collator=collate_rows,  # type: ignore[arg-type]
            train_dataset=train_dataset,  # type: ignore[arg-type]
            eval_dataset=eval_dataset,  # type: ignore[arg-type]
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.world_size > 1 or args.n_gpu > 1:
            raise UserError(
                f"{max(args.world_size, args.n_gpu)} processes or devices: training runs on one so far.",
                remedy="Start one process and show it one device (CUDA_VISIBLE_DEVICES=0).",
            )
        # The loss comes averaged over the whole optimizer step (``num_items_in_batch``): transformers must not divide
        # it by the number of accumulation steps again.
        self.model_accepts_loss_kwargs = True
        self.layout = self._choose_layout(cast(Layout, args.layout))
        self.evaluation_set = (
            EvaluationSet.of(
                eval_dataset,
                self.tokenization,
                turns=cast(Turns, args.turns),
                verifier=args.verifier,
                limit=args.eval_rows,
                source=eval_source,
            )
            if eval_dataset is not None
            else None
        )
        if self.evaluation_set is not None:
            self.evaluation_set.require_answers(self.policy)
        self.add_callback(_Guard(self))
        self.add_callback(_Costs(self))
        logger.info(
            "%s: learning rate %g, %s, layout %s",
            self.algorithm,
            args.learning_rate,
            "adapter" if isinstance(policy, PeftModel) else "all parameters",
            self.layout,
        )

    @property
    def policy(self) -> nn.Module:
        """The model in training, without the wrappers that a launcher puts around it."""
        return self.accelerator.unwrap_model(cast(nn.Module, self.model))

    def _choose_layout(self, layout: Layout) -> Literal["shared_prefix", "padded"]:
        probe = probe_layout(self.policy)
        if layout == "shared_prefix" and probe.layout != "shared_prefix":
            raise UserError(f"the shared-prefix layout does not work: {probe.reason}.", remedy="Use --layout auto.")
        return probe.layout if layout == "auto" else layout

    # --- what an algorithm says -------------------------------------------------------------------------------------

    def counts(self, groups: Sequence[Group]) -> dict[str, int]:
        """How many of each thing that the loss averages over the groups of an optimizer step hold."""
        raise NotImplementedError

    def loss(self, groups: Sequence[Group], logps_C: Tensor, counts: dict[str, int]) -> Tensor:
        """The groups' share of the optimizer step's loss.

        Args:
            groups: one micro-batch.
            logps_C: [C] log-probs of their completions under the policy (nats per sequence), with gradient.
            counts: ``counts`` of all groups of the optimizer step, to divide by.

        Returns:
            scalar; the shares of the micro-batches add up to the loss of the step.
        """
        raise NotImplementedError

    # --- one optimizer step -----------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimizer step, and what to average their loss over."""
        return self._step_of(list(islice(epoch_iterator, num_batches)))

    def _step_of(self, batches: list[list[Group]]) -> tuple[list[list[Group]], dict[str, int]]:
        """Micro-batches of like length, so that little is spent on padding, and the counts of the whole step.

        The loss is averaged over the step, so which micro-batch a group is in changes no result.
        """
        groups = sorted((group for batch in batches for group in batch), key=len)
        ordered = iter(groups)
        return [list(islice(ordered, len(batch))) for batch in batches], self.counts(groups)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: list[Group],  # type: ignore[override]
        return_outputs: bool = False,
        num_items_in_batch: dict[str, int] | None = None,  # type: ignore[override]
    ):
        """The loss of one micro-batch of groups.

        Raises:
            NonFiniteLossError: it is NaN or infinite; raised before any weight moves.
        """
        counts = self.counts(inputs) if num_items_in_batch is None else num_items_in_batch
        logps_C = completion_logps(self.policy, inputs, layout=self.layout, pad_token_id=self.tokenization.pad_id)
        loss = self.loss(inputs, logps_C, counts)
        self.trained_tokens += sum(len(c.token_ids) for group in inputs for c in group.completions)
        if not torch.isfinite(loss):
            raise self.non_finite("loss", loss.item())
        return (loss, None) if return_outputs else loss

    def compute_loss_context_manager(self) -> AbstractContextManager:  # type: ignore[override]
        """Mixed precision for every pass. transformers leaves it to the wrapped ``forward``, past which we call the body."""
        return self.accelerator.autocast()

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As transformers', and a micro-batch may be empty: it has no gradient, not one of zeros.

        An optimizer leaves weights without a gradient where they are; zeros would move them by momentum and decay.
        """
        if inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.scaler is not None:  # fp16's scaler wants to have seen a gradient
            self.accelerator.backward(
                cast(Tensor, sum(p.sum() * 0.0 for p in self.policy.parameters() if p.requires_grad))
            )
        return torch.zeros((), device=self.args.device)

    def floating_point_ops(self, inputs: list[Group]) -> int:  # type: ignore[override]
        """Six operations per parameter and token, as transformers estimates it."""
        return (
            6
            * sum(len(group) for group in inputs)
            * base_causal_lm(self.policy).num_parameters(exclude_embeddings=True)
        )

    def non_finite(self, what: str, value: float) -> NonFiniteLossError:
        """The error that stops training before a weight is spoilt."""
        checkpoint = get_last_checkpoint(str(self.args.output_dir))
        kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet."
        return NonFiniteLossError(
            f"the {what} is {value} at step {self.state.global_step + 1}{self._place()}; training stopped before that step "
            "changed a weight.",
            remedy=f"{kept} Lower --learning_rate or --max_grad_norm.",
        )

    def check_weights(self) -> None:
        """Raise ``NonFiniteLossError`` if a trained weight is NaN or infinite."""
        norm = torch.nn.utils.get_total_norm([p.detach() for p in self.policy.parameters() if p.requires_grad])
        if not torch.isfinite(norm):
            raise self.non_finite("norm of the weights", norm.item())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers'; weights that are not finite are not saved, so that the last checkpoint is a good one."""
        self.check_weights()
        super().save_model(output_dir, _internal_call)

    def export(self, folder: Path) -> None:
        """Write what the run was for: here the model, with its tokenizer."""
        self.save_model(str(folder), _internal_call=True)  # a public call would push before the evaluation

    def _place(self) -> str:
        return ""

    # --- what is watched --------------------------------------------------------------------------------------------

    def track(self, name: str, values: Tensor | Sequence[float]) -> None:
        """Add values to the mean that the next log line shows under ``name``."""
        total = values.detach().sum().item() if isinstance(values, Tensor) else float(sum(values))
        self._sums[name][0] += total
        self._sums[name][1] += len(values)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers', with the means of what was watched since the last training log."""
        if "loss" in logs:
            logs |= {name: total / count for name, (total, count) in self._sums.items() if count}
            self._sums.clear()
            logs |= self._since_last_log()
        super().log(logs, start_time)

    def _since_last_log(self) -> dict[str, float]:
        """Seconds of each kind of work since the last training log, and completion tokens trained on a second."""
        now = {**self.seconds, "tokens": float(self.trained_tokens)}
        spent = {name: value - self._logged.get(name, 0.0) for name, value in now.items()}
        self._logged = now
        tokens = spent.pop("tokens")
        found = {f"time/{name}": value for name, value in spent.items()}
        return found | ({"tokens_per_second": tokens / spent["training"]} if spent.get("training") else {})

    # --- evaluation -------------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        """As transformers'. Held-out log-probs of the policy as it starts are kept: the zero of the implicit reward."""
        if self.evaluation_set is not None:
            with self.progress.phase("held-out log-probs of the start"), self.compute_loss_context_manager():
                self.evaluation_set.remember_reference(
                    self.policy, layout=self.layout, batch_size=self.args.per_device_eval_batch_size
                )
        return super().train(*args, **kwargs)

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out demonstration log-prob, implicit reward, preference accuracy and task score, as far as data allow.

        Raises:
            UserError: there is no held-out data.
        """
        evaluation_set = self.evaluation_set
        if eval_dataset is not None:
            evaluation_set = self._rows_of(eval_dataset)
        if evaluation_set is None:
            raise UserError("there is no held-out data to evaluate on.", remedy="Give an eval_dataset.")
        start = time.perf_counter()
        with self.progress.phase("evaluating"), self.compute_loss_context_manager():
            found = self.evaluation(evaluation_set)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.metrics().items()}
        self.seconds["evaluation"] += time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _rows_of(self, dataset: Dataset) -> EvaluationSet:
        """Other held-out data, read as those that the trainer was given."""
        if self.evaluation_set is not None:
            return self.evaluation_set.over(dataset)
        args = self.args
        return EvaluationSet.of(
            dataset, self.tokenization, turns=cast(Turns, args.turns), verifier=args.verifier, limit=args.eval_rows
        )

    def evaluation(self, rows: EvaluationSet, **options: Any) -> Evaluation:
        """What ``rows.evaluate`` finds of the policy as it stands, at this run's settings."""
        return rows.evaluate(
            self.policy,
            beta=getattr(self, "beta", 1.0),
            layout=self.layout,
            seed=self.args.seed,
            batch_size=self.args.per_device_eval_batch_size,
            **options,
        )

    @staticmethod
    def card(record: RunRecord) -> str:
        """What the model card says of the algorithm."""
        return ""

    def record(self, *, name: str) -> RunRecord:
        """What results.json holds of this run, without its evaluation."""
        record = RunRecord(
            name=name,
            algorithm=self.algorithm,
            model=str(self.model_name),
            dataset=self.source,
            seed=self.args.seed,
            start=run_id(str(self.model_name)),
            settings=run_settings(self.args, self.policy) | {"layout": self.layout},
            demonstration_epochs=round(self.state.epoch or 0.0, 4),
            trained_tokens=self.trained_tokens,
            sampled_tokens=self.sampled_tokens,
            time_s={**self.seconds, "total": sum(self.seconds.values())},
            peak_memory_bytes=peak_memory_bytes(),
            history=self.state.log_history,
            curves=list(self.curves),
        )
        return replace(record, card=self.card(record))

    def push_to_hub(  # type: ignore[override]
        self, commit_message: str = "End of training", *, record: RunRecord | None = None, **kwargs: Any
    ) -> Any:
        """Upload model, tokenizer and card.

        The samples of the stages and the rows in results.json and report.html stay here: they are the user's data.

        Args:
            record: what results.json holds, for the card.
            kwargs: ``token`` and ``revision`` go to the hub, ``model_name`` to the card.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=kwargs.get("token"))
        self.create_model_card(record=record, model_name=kwargs.get("model_name"))
        return upload_folder(
            repo_id=str(self.hub_model_id),
            folder_path=str(self.args.output_dir),
            commit_message=commit_message,
            token=kwargs.get("token") or self.args.hub_token,
            revision=kwargs.get("revision") or self.args.hub_revision,
            ignore_patterns=["_*", "checkpoint-*", "stages/*", "results.json", "report.html"],
        )

    def create_model_card(self, *args, record: RunRecord | None = None, **kwargs) -> None:
        """Write the run's own README.md; ``push_to_hub`` calls it and hands its keyword arguments on.

        Args:
            record: what results.json holds; by default what is known without an evaluation.
            args, kwargs: of transformers' card; only ``model_name`` is read.
        """
        folder = Path(cast(str, self.args.output_dir))
        if record is None:
            record = self.record(name=kwargs.get("model_name") or folder.name)
        (folder / "README.md").write_text(model_card(record), encoding="utf-8")


class _Guard(TrainerCallback):
    """Stops before an optimizer step whose gradient is not finite, takes the time, says how far the run is."""

    def __init__(self, trainer: DemonstrationTrainer):
        self.trainer = trainer
        self.begun = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.progress.steps(state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.accelerator.scaler is not None:
            return  # fp16 finds its loss scale by overflowing, and the scaler leaves such a step out by itself
        gradients = [p.grad for p in self.trainer.policy.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise self.trainer.non_finite("gradient", norm.item())

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.seconds["training"] += time.perf_counter() - self.begun
        self.trainer.progress.steps(state.global_step, state.max_steps)


class _Costs(TrainerCallback):
    """Writes what the run has cost so far into its checkpoints: a resumed run counts what went before."""

    key = "tutelage_costs"

    def __init__(self, trainer: DemonstrationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if costs := cast(dict[str, Any], state.stateful_callbacks).get(self.key):
            self.trainer.seconds.update(costs["seconds"])
            self.trainer.trained_tokens, self.trainer.sampled_tokens = costs["tokens"]
            self.trainer._since_last_log()  # what went before belongs to no line that is still to come

    def on_step_end(self, args, state, control, **kwargs):
        tokens = [self.trainer.trained_tokens, self.trainer.sampled_tokens]
        costs = {"seconds": dict(self.trainer.seconds), "tokens": tokens}
        cast(dict[str, Any], state.stateful_callbacks)[self.key] = costs


def collate_rows(rows: list[dict[str, Any]]) -> list[Group]:
    """Tokenized rows to groups; they become tensors only when the model meets them."""
    return [group_from_row(row) for row in rows]
