"""The one adapter to ``transformers.Trainer``: groups in, log-probs per token, a loss, and what is tracked meanwhile.

An algorithm hands its parts in: an ``Objective`` (what the loss is), and ``Stages`` if it samples.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from tutelage.card import model_card
from tutelage.data.demonstrations import Turns, is_conversational
from tutelage.data.teacher_prompt import TeacherPrompt
from tutelage.data.tokenized import group_from_row, tokenize_dataset
from tutelage.errors import CollapsedError, NonFiniteLossError, Terminated, UserError
from tutelage.evaluation.policy import Evaluation, EvaluationSet
from tutelage.evaluation.probes import model_probes
from tutelage.files import WRITING, storing, write_text, writing_folder
from tutelage.groups import Group
from tutelage.launch import asks_for_fsdp, check_launch
from tutelage.models.loading import (
    add_adapter,
    base_causal_lm,
    check_vocabulary,
    end_ids,
    load_model,
    load_tokenizer,
    refuse_virtual_tokens,
)
from tutelage.models.memory import keep_freed_memory
from tutelage.models.modes import adapters_under_autocast, without_dropout
from tutelage.models.router import router_loss
from tutelage.models.sharding import is_sharded, unsharded, whole
from tutelage.progress import Progress, Silent
from tutelage.results import AlgorithmInfo, EvaluationRecord, RetentionRecord, RunRecord, run_id
from tutelage.scoring.layout import probe_layout
from tutelage.scoring.logps import Layout, completion_token_logps
from tutelage.training import sharding
from tutelage.training.callbacks import CostsInCheckpoints, Guard, StageEnd, Termination
from tutelage.training.checkpoints import Checkpointed, RandomState, checkpoints, put_in_place, step_of
from tutelage.training.clock import record_time, recorded_time
from tutelage.training.collapse import act_on_collapse, first_facts, signs_of_collapse
from tutelage.training.config import DemonstrationConfig
from tutelage.training.costs import peak_memory_bytes, run_settings
from tutelage.training.earlier import Earlier
from tutelage.training.exporting import check_export, finish_export, prepare_export, write_whole
from tutelage.training.flops import counted
from tutelage.training.identity import RUN, Data, check_identity, identity_of, record_identity
from tutelage.training.journal import Journal
from tutelage.training.lengths import probed_lengths
from tutelage.training.loaders import alone, rebuilt, unshared
from tutelage.training.lock import locked
from tutelage.training.made import add_made
from tutelage.training.metrics import Costs, Means
from tutelage.training.objective import Measure, Objective, Step
from tutelage.training.optimization import check_optimization
from tutelage.training.parallel import Processes, call_within, takes_calls, zero_of
from tutelage.training.publishing import upload
from tutelage.training.resume import check_checkpoint, find_checkpoint
from tutelage.training.retention import Retention
from tutelage.training.rollout import PolicyScorer
from tutelage.training.stages import Stages
from tutelage.training.start import Start

__all__ = ["DemonstrationTrainer"]

logger = logging.getLogger(__name__)


class DemonstrationTrainer(Trainer):
    """Trains a policy from demonstrations with the parts that an algorithm hands in.

    On a CPU it asks the process to keep freed memory (``tutelage.models.memory``). ``args`` is copied: the learning
    rate that is chosen where none is given stands in ``trainer.args`` and not in the config of the caller.

    Args:
        model: a causal language model, with or without an adapter, or its name or path.
        args: the algorithm's config.
        train_dataset: rows in any of the recognized formats (``docs/data-formats.md``), map-style or streaming.
        eval_dataset: held-out rows, map-style; preference pairs among them are ranked by the implicit reward.
        processing_class: the tokenizer; by default the one saved with the model.
        peft_config: an adapter to add to the model; only the adapter is then trained.
        callbacks, optimizers: as for ``transformers.Trainer``.
        progress: receives progress events; silent by default.
        source, eval_source: what errors about the data call them: file names, for example.
        info: the algorithm's name, and what its records say of themselves.
        objective: its loss.
        seen_by_teacher: makes a second view of each training row's prompt, ``Group.teacher_prompt_ids``; None for none.

    Attributes:
        measure: what the objective's loss is computed from.
        earlier: adds to each step's demonstrations what is known of them under an earlier policy; set before training, without stages.
        checkpointed: parts whose state lies in checkpoints; added to before training.

    Raises:
        UserError: bad data, a tokenizer that does not fit the model, an adapter on a tied head.
    """

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
        *,
        progress: Progress | None = None,
        source: str = "training data",
        eval_source: str = "held-out data",
        info: AlgorithmInfo,
        objective: Objective,
        seen_by_teacher: TeacherPrompt | None = None,
    ):
        args = copy.copy(args)
        self.info, self.algorithm, self.objective = info, info.name, objective
        self.measure: Measure = completion_token_logps
        self.checkpointed: list[Checkpointed] = []
        self.stages: Stages | None = None
        self.earlier: Earlier | None = None
        if args.device.type == "cpu":
            keep_freed_memory()
        policy, tokenizer = _loaded(model, processing_class, args, whole=peft_config is None)
        if isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
            raise UserError(
                "streamed data have no length, so the run needs one.", remedy="Add --max_steps.", field="max_steps"
            )
        recorded = None if args.is_new else recorded_time(Path(str(args.output_dir)))
        self.tokenization = args.tokenization(tokenizer, model_end_ids=end_ids(policy, tokenizer), now=recorded)
        self.progress: Progress = progress or Silent()
        self.source, self.eval_source = source, eval_source
        self.model_name = model if isinstance(model, str) else base_causal_lm(policy).name_or_path
        self.conversational = train_dataset is not None and is_conversational(
            train_dataset, source=source, columns=self.tokenization.columns
        )
        if train_dataset is not None:
            with self.progress.phase("reading demonstrations"):
                train_dataset = tokenize_dataset(
                    train_dataset,
                    self.tokenization,
                    turns=cast(Turns, args.turns),
                    source=source,
                    seen_by_teacher=seen_by_teacher,
                )
        if peft_config is not None:
            set_seed(args.seed)  # adapter weights are initialized here, before transformers sets any seed
            policy = add_adapter(cast(PreTrainedModel, policy), peft_config)
        if args.learning_rate is None:
            args.learning_rate = (
                args.adapter_learning_rate if isinstance(policy, PeftModel) else args.full_learning_rate
            )
        self.processes = Processes(args.process_index, args.world_size)
        if self.processes.count > 1:
            takes_calls(policy)
        self.means, self.costs = Means(self.processes.gathered), Costs()
        self._losses: list[Tensor] = []  # of the micro-batches of a step, on their device
        self.other_data: dict[str, Data] = {}
        self.random_state: RandomState | None = None
        self._logged = 0
        self._going_on: str | None = None
        self._unwrapped: tuple[nn.Module, nn.Module] | None = None
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
        check_launch(args.n_gpu)
        if asks_for_fsdp():
            sharding.prepare(self)
        # The loss comes averaged over the whole optimizer step (``num_items_in_batch``): transformers must not divide
        # it by the number of accumulation steps again.
        self.model_accepts_loss_kwargs = True
        self.layout = self._choose_layout(cast(Layout, args.layout))
        _warn_of_router(self.policy)
        self.exported_tokenizer = tokenizer if train_dataset is None else self._tried_export(tokenizer)
        if train_dataset is not None and optimizers == (None, None):
            check_optimization(args, self.policy)
        self.scorer = PolicyScorer(
            self.policy,
            layout=self.layout,
            batch_size=args.per_device_eval_batch_size,
            pad_token_id=self.tokenization.pad_id,
            autocast=self.passes,
            processes=self.processes,
        )
        held_out = {"verifier": args.verifier, "source": eval_source}
        self.evaluation_set = None if eval_dataset is None else self._evaluation_rows(eval_dataset, **held_out)
        if self.evaluation_set is not None:
            self.evaluation_set.require_answers(self.policy)
        self.retention: Retention | None = None
        self.start = Start(
            self.policy,
            new_adapter=peft_config is not None,
            keep=self.evaluation_set is not None and (args.eval_kl or isinstance(policy, PeftModel)),
        )
        self.journal = Journal(Path(str(args.output_dir)))
        self.add_callback(self.journal)
        self.add_callback(Guard(self))
        self.add_callback(CostsInCheckpoints(self))
        self.add_callback(Termination(self))
        logger.info(
            "%s: learning rate %g, %s, layout %s",
            self.algorithm,
            args.learning_rate,
            "adapter" if isinstance(policy, PeftModel) else "all parameters",
            self.layout,
        )

    def train_in_stages(self, stages: Stages) -> None:
        """Hand in the stages, before training.

        Raises:
            UserError: they do not fit into an epoch, or they repeat streamed data.
        """
        self.stages = stages
        if stages.rollout.initial is not None:
            self.start.share(stages.rollout.initial)
        self.add_callback(StageEnd(self))
        if self.train_dataset is not None:  # fail before training if there are too many stages
            self.set_initial_training_values(self.args, self.get_train_dataloader())

    @property
    def knows_earlier(self) -> bool:
        """Whether the objective is told of other weights than the policy's, which takes passes besides those of the steps."""
        return self.earlier is not None or self.measure is not completion_token_logps

    @property
    def policy(self) -> nn.Module:
        """The model being trained, without the wrappers of a launcher."""
        model = cast(nn.Module, self.model)
        if self._unwrapped is None or self._unwrapped[0] is not model:
            # Asked for several times a step; accelerate looks for optional packages each time.
            self._unwrapped = model, self.accelerator.unwrap_model(model)
        return self._unwrapped[1]

    @property
    def stage(self) -> int:
        """Number of the stage, from 0; -1 without stages and before the first."""
        return self.stages.stage if self.stages else -1

    def _choose_layout(self, layout: Layout) -> Literal["shared_prefix", "padded"]:
        probe = probe_layout(self.policy, *probed_lengths(self.policy, self.args, self.train_dataset, self.source))
        if layout == "shared_prefix" and probe.layout != "shared_prefix":
            raise UserError(f"the shared-prefix layout does not work: {probe.reason}.", remedy="Use --layout auto.")
        return probe.layout if layout == "auto" else layout

    def _tried_export(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Fail before training if the policy cannot be written; the tokenizer that goes with it."""
        stop_ids = self.tokenization.stop_ids(self.conversational)
        return prepare_export(self.policy, tokenizer, stop_ids, self.tokenization.end_of_turn_id(self.conversational))

    # --- one optimizer step -----------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """As transformers'; where the steps of a stage are taken several times, its batches come several times.

        Raises:
            UserError: several epochs per stage of streamed data.
        """
        loader = super().get_train_dataloader()
        if self.processes.count > 1:
            rows = self.args.train_batch_size * self.processes.count
            loader = unshared(loader, self.train_dataset, rows, seed=self.args.data_seed)
        if self.stages is None or self.stages.epochs == 1:
            return loader
        if isinstance(self.train_dataset, IterableDataset):
            raise UserError(
                "streamed data allows only one pass.", remedy="Leave --policy_epochs at 1.", field="policy_epochs"
            )
        batches = self.stages.repeated(cast(Any, loader.batch_sampler), self.args.gradient_accumulation_steps)
        repeated = rebuilt(loader, loader.dataset, batch_sampler=batches)
        if self.processes.count > 1:
            return alone(repeated, seed=self.args.data_seed)
        return self.accelerator.prepare(repeated)

    def set_initial_training_values(self, args, dataloader):
        """As transformers'; here the number of steps in an epoch becomes known, and with it the stages."""
        values = super().set_initial_training_values(args, dataloader)
        if self.stages is not None:
            self.stages.plan(values[1])
        return values

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimizer step, and what to average their loss over."""

        def take() -> list[list[Group]]:
            return list(islice(epoch_iterator, self.args.gradient_accumulation_steps))

        step, end = self.state.global_step, self.state.max_steps
        if self.stages is not None:
            self._logged = len(self.state.log_history)
            return self._step_of(self.stages.next_step(step, end, take))
        if self.earlier is not None:
            with self.costs.timed("reference"):
                return self._step_of(self.earlier.next_step(take, end - step))
        return self._step_of(list(islice(epoch_iterator, num_batches)))

    def _step_of(self, batches: list[list[Group]]) -> tuple[list[list[Group]], dict[str, int]]:
        """Micro-batches of similar length, which keeps padding low, and the counts of the whole step.

        The loss is averaged over the step, so which micro-batch or process a group is in changes no result.
        """
        groups = sorted((group for batch in batches for group in batch), key=len)
        ordered = iter(groups)
        self.costs.policy_tokens += sum(len(c.token_ids) for group in groups for c in group.completions)
        self.step_is_empty = not groups
        self._losses.clear()
        own = [self.processes.share(list(islice(ordered, len(batch)))) for batch in batches]
        return own, self.objective.counts(groups)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: list[Group],  # type: ignore[override]
        return_outputs: bool = False,
        num_items_in_batch: dict[str, int] | None = None,  # type: ignore[override]
    ):
        """The loss of one micro-batch of groups. That it is finite is looked at in ``check_step``, before any weight moves."""
        counts = self.objective.counts(inputs) if num_items_in_batch is None else num_items_in_batch

        def share() -> Tensor:
            with self.costs.counted("training"):  # passes without gradient too
                tokens = self.measure(self.policy, inputs, layout=self.layout, pad_token_id=self.tokenization.pad_id)
            return self.objective.loss(tokens, Step(counts, self.stage, self.means.add))

        # A wrapper averages gradients over processes; the shares of a step are to be added.
        loss = share() if self.processes.count == 1 else call_within(model, share) * self.processes.count
        self._losses.append(loss.detach())
        return (loss, None) if return_outputs else loss

    def check_step(self) -> None:
        """Before the optimizer's step: raise ``NonFiniteLossError`` in all processes where a loss or gradient is not finite.

        It is the one place in a step that waits for the device, because nothing that is not finite may reach a weight.
        """
        if self.step_is_empty and self.processes.count > 1:
            self.policy.zero_grad(set_to_none=True)
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in self.policy.parameters() if p.grad is not None]))
        *losses, norm = torch.stack([value.to(self.args.device) for value in (*self._losses, norm)]).tolist()
        self._losses.clear()
        bad = [value for values in self.processes.gathered(losses) for value in values if not math.isfinite(value)]
        if bad:
            raise self.non_finite("loss", bad[0])
        if self.accelerator.scaler is not None:
            return  # fp16 finds its loss scale by overflowing, and the scaler leaves such a step out by itself
        if not math.isfinite(norm):
            raise self.non_finite("gradient", norm)

    def compute_loss_context_manager(self) -> AbstractContextManager:  # type: ignore[override]
        """Mixed precision for every forward pass; transformers applies it only in the wrapped ``forward``."""
        return self.accelerator.autocast()

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Context for all that runs the policy besides the training step: whole weights, mixed precision. All processes enter it."""
        with unsharded(self.policy), self.compute_loss_context_manager():
            yield

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As in transformers, but a micro-batch may be empty; it then has no gradient instead of a zero gradient.

        An optimizer skips weights without a gradient; zeros would still move them by momentum and weight decay.
        """
        if inputs:
            dropout = nullcontext() if self.objective.uses_dropout else without_dropout(self.policy)
            with dropout, adapters_under_autocast(self.policy, self.compute_loss_context_manager):
                return super().training_step(model, inputs, num_items_in_batch)
        if self.processes.count > 1:  # the others wait for this one's gradient
            self.accelerator.backward(call_within(model, partial(sharding.zero_loss, self)))
        elif self.accelerator.scaler is not None:  # fp16's gradient scaler needs to have seen a gradient
            self.accelerator.backward(zero_of(self.policy))
        return torch.zeros((), device=self.args.device)

    def floating_point_ops(self, inputs: list[Group]) -> int:  # type: ignore[override]
        """Six operations per parameter and token, as transformers estimates it."""
        return (
            6
            * sum(len(group) for group in inputs)
            * base_causal_lm(self.policy).num_parameters(exclude_embeddings=True)
        )

    def non_finite(self, what: str, value: float) -> NonFiniteLossError:
        """The error that stops training before any weight is corrupted."""
        folder = Path(str(self.args.output_dir))
        folder = folder.parent if folder.name == WRITING else folder  # while a checkpoint is written
        checkpoint = next(iter(checkpoints(folder)), None)
        kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet."
        return NonFiniteLossError(
            f"the {what} is {value} at step {self.state.global_step + 1}{self._place()}; training stopped before that step "
            "changed a weight.",
            remedy=f"{kept} Lower --learning_rate or --max_grad_norm.",
        )

    def check_weights(self) -> None:
        """Raise ``NonFiniteLossError`` if a trained weight is NaN or infinite."""
        norm = whole(torch.nn.utils.get_total_norm([p.detach() for p in self.policy.parameters() if p.requires_grad]))
        if not torch.isfinite(norm):
            raise self.non_finite("norm of the weights", norm.item())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, except that non-finite weights are not saved, so the last checkpoint is always good."""
        self.check_weights()
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, sharding.whole_state(self.policy))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # transformers calls this in every process
            finish_export(Path(str(output_dir or self.args.output_dir)), self.policy, self.exported_tokenizer)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers', into a folder of another name, which is renamed when all of it is on the disk.

        Private to transformers, as ``_save`` is: nothing public stands between the files of a checkpoint and their names.

        Raises:
            UserError: the disk does not take it; earlier checkpoints are as they were.
        """
        home, state = Path(str(self.args.output_dir)), self.state
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        with self._writing(home) as folder:
            self.args.output_dir = str(folder)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(home)
            self.processes.wait()  # each process writes its own random state
            best = home / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
            if state.best_global_step and (best.exists() or state.best_global_step == state.global_step):
                state.best_model_checkpoint = str(best)
            if self.processes.is_main:
                state.save_to_json(str(folder / name / TRAINER_STATE_NAME))
                for part in self.checkpointed:
                    part.save(folder / name)
                put_in_place(folder / name, home / name)
                rotate_checkpoints(str(home), self.args.save_total_limit, state.best_model_checkpoint, use_mtime=True)
        self.processes.wait()
        self._tidy_stages()

    @contextmanager
    def _writing(self, home: Path) -> Iterator[Path]:
        """The folder for files that are not whole yet: one for all processes, made and removed by the first."""
        with writing_folder(home) if self.processes.is_main else nullcontext(home / WRITING) as folder:
            self.processes.wait()
            yield folder

    def _tidy_stages(self) -> None:
        """Remove what no checkpoint of the run goes on from any more, if it is to be removed."""
        if self.stages is not None:
            self.stages.tidy([step_of(path) for path in checkpoints(Path(str(self.args.output_dir)))])

    def export(self, folder: Path) -> None:
        """Write what the run was for: the policy with its tokenizer; in ``policy`` beside ``reward`` where one was learned.

        Files get their names when all of them are whole.
        """
        phase = self.stages.phase if self.stages else None
        self.check_weights()
        state = sharding.whole_state(self.policy)

        def write(home: Path) -> None:
            policy = home / "policy" if phase and phase.reward is not None else home
            self._save(str(policy), state)
            if phase:
                phase.export(home)

        self.processes.on_main(partial(write_whole, folder, write))

    def check_export(self, folder: Path) -> list[str]:
        """Load back what ``export`` wrote into a folder, with the libraries that others will use, and compare.

        Returns:
            what was compared, a sentence each.

        Raises:
            UserError: something loads as other than what was trained.
        """
        reward = self.stages.phase.reward if self.stages else None
        weights = sharding.whole_state(self.policy)
        with unsharded(self.policy):
            return self.processes.on_main(partial(check_export, folder, self.policy, reward, weights))

    def _place(self) -> str:
        return f" of stage {self.stage}" if self.stages else ""

    # --- the run: from its beginning or a checkpoint to its last step --------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):  # type: ignore[override]
        """As in transformers. The initial policy's held-out log-probs are cached, as π_0 of the implicit reward.

        What the run is lies in ``run.json`` of its folder from now on, and the folder is locked until training is over.

        Args:
            resume_from_checkpoint: a checkpoint of this run; True for the one that ``resume_point`` finds.
            args, kwargs: as in transformers.

        Raises:
            UserError: another run writes into the folder, the folder cannot be written, or the run is another one than
                that which the checkpoint is of.
        """
        folder = Path(str(self.args.output_dir))
        if is_sharded(self.policy):
            raise UserError("a sharded policy is trained once.", remedy="Make another trainer of its export.")
        with ExitStack() as until_the_end:
            begin = partial(self._begin, folder, resume_from_checkpoint, until_the_end)
            return self._train(self.processes.on_main(begin), *args, **kwargs)

    def _begin(self, folder: Path, checkpoint: str | bool | None, until_the_end: ExitStack) -> str | None:
        """Lock the folder and write down what the run is; the checkpoint to go on from. The first process does it."""
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        until_the_end.enter_context(locked(folder))
        until_the_end.callback(self.journal.close)
        self.journal.require_own()
        if checkpoint is True:
            checkpoint = self._resume_point()
        elif checkpoint and str(checkpoint) != self._going_on:
            check_identity(Path(str(checkpoint)).parent, self.identity())
            check_checkpoint(Path(str(checkpoint)), self.stages)
        if not checkpoint:
            record_identity(folder, self.identity())
        if self.stages is not None:
            self.stages.store.check()
        if self.tokenization.asks_for_time:
            record_time(folder, self.tokenization.now)
        return str(checkpoint) if checkpoint else None

    def _train(self, checkpoint: str | None, *args, **kwargs):
        if self.evaluation_set is not None and self.evaluation_set.reference is None:
            with self.progress.phase("held-out log-probs of the start"):
                self._remember_start(self.evaluation_set)
        if self.retention is not None:
            self.retention.measure_start(self._measured_retention, self.processes.on_main)
        with counted(self.policy, self.costs.count_flops):
            if self.earlier is not None:
                with self.costs.timed("reference"):
                    self.earlier.begin()
            for part in self.checkpointed if checkpoint else ():
                part.load(Path(str(checkpoint)))
            try:
                output = super().train(checkpoint, *args, **kwargs)
            except (Terminated, CollapsedError):
                self._save_at_last_step()
                raise
            if self.stages is not None:
                if self.stages.best is not None and (self.stages.has_ended or self.args.load_best_stage_at_end):  # type: ignore[attr-defined]
                    self.stages.best.choose(self.stages.made(self.state.global_step), collapsed=self.stages.has_ended)
                self.stages.finish(self.state.global_step)
                self._tidy_stages()  # where the run was killed between its last checkpoint and this
        return output

    def watch_for_collapse(self, stage: int, facts: dict[str, float]) -> bool:
        """Warn of a policy that has collapsed, or end the run, as ``on_collapse`` says: True if it is to end here.

        Args:
            stage: that begins with the policy.
            facts: what its beginning has logged.

        Raises:
            CollapsedError: the run is to stop.
        """
        args = cast(Any, self.args)
        signs = signs_of_collapse(facts, first_facts(self.state.log_history), args.collapse_limits) if stage else []
        ends = bool(signs) and act_on_collapse(stage, signs, args.on_collapse)
        self.control.should_training_stop |= ends
        return ends

    def _save_at_last_step(self) -> None:
        """A checkpoint of the last step that was taken: the process was asked to end while it prepared the next one."""
        step = self.state.global_step
        if step and not (Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}").exists():
            assert self.random_state is not None
            self.random_state.restore()  # preparing takes from it, and will again
            del self.state.log_history[self._logged :]  # and logs what it has found, and will again
            self._save_checkpoint(cast(nn.Module, self.model), None)

    def resume_point(self) -> str | None:
        """The checkpoint that the run in the output folder goes on from: call it before ``train``, and hand it on.

        It is the newest whole one; what is damaged is named and moved aside. Where there is none the run begins at step 0,
        with what its stages recorded.

        Raises:
            UserError: the run there is another one: the error names what differs.
        """
        self._going_on = self.processes.on_main(self._resume_point)
        return self._going_on

    def _resume_point(self) -> str | None:
        folder = Path(str(self.args.output_dir))
        if not (folder / RUN).exists() and not checkpoints(folder) and not (folder / "stages").exists():
            return None
        with locked(folder):
            if self.stages is not None:
                self.stages.store.check()
            check_identity(folder, self.identity())
            found = find_checkpoint(folder, self.stages)
        return str(found) if found else None

    def identity(self) -> dict[str, Any]:
        """What ``run.json`` holds of the run that begins with the policy as it stands."""
        return identity_of(self)

    # --- what is tracked --------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers', with the means of what was tracked since the last training log, and the stage."""
        if "loss" in logs:
            logs |= self.means.take() | self.costs.since_last_log()
        super().log({"stage": self.stage, **logs} if self.stage >= 0 else logs, start_time)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def watch_retention(
        self, dataset: Dataset, *, verifier: str | None = None, source: str = "retention data"
    ) -> None:
        """Measure what training does to another task: call it before training.

        The start is evaluated when training begins, and its findings lie in the run's folder; ``record`` has what the
        policy has become beside them after ``retained``.

        Args:
            dataset: the other task's rows, read as the held-out ones are.
            verifier: scores its answers; see ``load_verifier``.
            source: what errors about the data call them.

        Raises:
            UserError: bad data, or a verifier that has no answers to score.
        """
        rows = self._evaluation_rows(dataset, verifier=verifier, source=source)
        rows.require_answers(self.policy)
        self.retention = Retention(rows, Path(str(self.args.output_dir)), str(self.model_name), self.args)

    def _measured_retention(self, rows: EvaluationSet) -> EvaluationRecord:
        answers = rows.verifier is not None
        name = f"another task: {rows.source}"
        with (
            self.progress.phase(name, 2 * len(rows.groups) if answers else None) as advance,
            self.passes(),
        ):
            found = rows.evaluate(
                self.policy, greedy=answers, seed=self.args.seed, on_progress=advance, **self._evaluation_options
            )
        return found.record(rows.source)

    def retained(self) -> RetentionRecord | None:
        """What training did to another task, by the policy as it stands; None where none is watched."""
        return self.retention.compare(self._measured_retention) if self.retention else None

    def _evaluation_rows(self, dataset: Dataset, *, verifier: str | None, source: str) -> EvaluationSet:
        return EvaluationSet.of(
            dataset,
            self.tokenization,
            turns=cast(Turns, self.args.turns),
            verifier=verifier,
            limit=self.args.eval_rows,
            source=source,
        )

    def _remember_start(self, rows: EvaluationSet) -> None:
        with self.passes():
            rows.remember_reference(self.policy, layout=self.layout, batch_size=self.args.per_device_eval_batch_size)

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out demonstration log-prob, implicit reward, preference accuracy and task score, if the data allow.

        Args:
            eval_dataset: rows instead of those that the trainer was made with, read by the same settings. The implicit
                reward is left out where the weights that training started with are known no more.

        Raises:
            UserError: there is no held-out data.
        """
        rows = self.evaluation_set
        if eval_dataset is not None:
            rows = (
                self.evaluation_set.over(eval_dataset)
                if self.evaluation_set
                else self._evaluation_rows(eval_dataset, verifier=self.args.verifier, source=self.eval_source)
            )
            if rows.reference is None and (start := self.start.active(self.state.global_step)) is not None:
                with start:
                    self._remember_start(rows)
        if rows is None:
            raise UserError("there is no held-out data to evaluate on.", remedy="Give an eval_dataset.")
        with (
            self.costs.timed("evaluation"),
            self.progress.phase("evaluating"),
        ):
            found = self.evaluation(rows)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.metrics().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, *args, **kwargs):  # type: ignore[override]
        """Refused: a language model's answers are no predictions of labels.

        Raises:
            UserError: always.
        """
        raise UserError(
            "there are no labels to predict.",
            remedy="Use trainer.evaluate, or `tutelage sample` for answers.",
            field="predict",
        )

    def evaluation(self, rows: EvaluationSet, **options: Any) -> Evaluation:
        """What ``rows.evaluate`` finds of the policy as it stands, at this run's settings.

        Sampled answers are held against the start, where its weights are known.
        """
        start = self.start.active(self.state.global_step)
        with self.passes():
            found = rows.evaluate(
                self.policy,
                beta=self.objective.beta(self.stage),
                seed=self.args.seed,
                score_samples=start is not None,
                reward=self.stages.phase.reward if self.stages else None,
                **self._evaluation_options,
                **options,
            )
            if start is None:
                return found
            with start:
                batch_size = self.args.per_device_eval_batch_size
                return rows.against_start(found, self.policy, layout=self.layout, batch_size=batch_size)

    @property
    def _evaluation_options(self) -> dict[str, Any]:
        return {
            "layout": self.layout,
            "num_samples": self.args.eval_samples,
            "batch_size": self.args.per_device_eval_batch_size,
            "sampling_batch_size": self.args.sampling_batch_size,
        }

    def record(self, *, name: str) -> RunRecord:
        """What results.json holds of this run, without its evaluation."""
        costs = self.costs
        flops = None if costs.flops is None else self.processes.summed(costs.flops)
        record = RunRecord(
            name=name,
            algorithm=self.algorithm,
            model=str(self.model_name),
            dataset=self.source,
            seed=self.args.seed,
            start=run_id(str(self.model_name)),
            settings=run_settings(self.args, self.policy) | {"layout": self.layout},
            demonstration_epochs=round(self.state.epoch or 0.0, 4),
            trained_tokens=costs.trained_tokens,
            sampled_tokens=costs.sampled_tokens,
            time_s={**costs.seconds, "total": sum(costs.seconds.values())},
            flops={**flops, "total": sum(flops.values())} if flops else {},
            peak_memory_bytes=peak_memory_bytes(),
            history=self.state.log_history,
            curves=list(self.info.curves),
            selection=self.stages.phase.selection if self.stages else [],
            best_stage=self.stages.best.chosen if self.stages and self.stages.best else {},
            probes=model_probes(self.policy),
        )
        return replace(record, card=self.info.card(record))

    def push_to_hub(  # type: ignore[override]
        self, commit_message: str = "End of training", *, record: RunRecord | None = None, **kwargs: Any
    ) -> Any:
        """Upload model, tokenizer and card.

        Nothing of ``publishing.NOT_UPLOADED`` is uploaded, such as samples of the stages and the rows in results.json:
        they are the user's data.

        Args:
            record: what results.json holds, for the card.
            kwargs: ``token`` and ``revision`` go to the hub, ``model_name`` to the card.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=kwargs.get("token"))
        self.create_model_card(record=record, model_name=kwargs.get("model_name"))
        return upload(
            Path(str(self.args.output_dir)),
            str(self.hub_model_id),
            message=commit_message,
            token=kwargs.get("token") or self.args.hub_token,
            revision=kwargs.get("revision") or self.args.hub_revision,
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
        add_made(folder, ["README.md"])
        write_text(folder / "README.md", model_card(record))


def _loaded(
    model: str | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    args: DemonstrationConfig,
    *,
    whole: bool,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, loaded where they are names, and tried with each other."""
    policy = load_model(model, dtype=None, whole=whole, computing=args.computing) if isinstance(model, str) else model
    tokenizer = tokenizer or load_tokenizer(str(base_causal_lm(policy).name_or_path))
    check_vocabulary(policy, tokenizer)
    if isinstance(policy, PeftModel):
        refuse_virtual_tokens(policy.active_peft_config)
    return policy, tokenizer


def _warn_of_router(policy: nn.Module) -> None:
    base = base_causal_lm(policy)
    if unused := router_loss(base.config):
        logger.warning(
            "%s: the router's auxiliary loss (%s) is not added: the objective alone trains the router",
            type(base).__name__,
            unused,
        )


def collate_rows(rows: list[dict[str, Any]]) -> list[Group]:
    """Tokenized rows to groups; tensors are made only at the forward pass."""
    return [group_from_row(row) for row in rows]
