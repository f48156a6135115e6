"""Which of transformers' ``TrainingArguments`` are honored here, and which are refused by name.

Training overrides parts of ``transformers.Trainer``: the pass through the model, the batches of an optimizer step, and the
evaluation. An argument that only an overridden part reads would be accepted and do nothing. ``ARGUMENTS`` holds one entry for every
field, so that none is forgotten; a test compares it with the installed version of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any

from transformers import TrainingArguments

from tutelage.errors import UserError
from tutelage.ranges import LARGEST, SEED, Range, number, whole

__all__ = ["ARGUMENTS", "RANGES", "Honored", "Refused", "check_arguments"]


@dataclass(frozen=True, slots=True)
class Honored:
    """The argument has the effect that transformers documents; nothing to check."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Values of the argument that would have no effect, or a wrong one.

    Attributes:
        problem, remedy: for the user.
        accepts: whether a value may stand, given all arguments; by default the field's default alone.
    """

    problem: str
    remedy: str
    accepts: Callable[[Any, TrainingArguments], bool] | None = None


def _samples(args: Any) -> bool:
    """Whether the algorithm samples, so that log-probs of two passes are compared."""
    return hasattr(args, "num_samples")


def _selects(args: Any) -> bool:
    """Whether the algorithm chooses the exported policy by itself."""
    return hasattr(args, "validation_rows")


def _no_dispatch(value: Any, args: Any) -> bool:
    if isinstance(value, str):
        if not value.lstrip().startswith("{"):
            return False  # a file, which would have to be read to know
        value = json.loads(value)
    found = value.get("dispatch_batches") if isinstance(value, dict) else getattr(value, "dispatch_batches", None)
    return not found


def _knows_its_metric(value: Any, args: TrainingArguments) -> bool:
    is_best = str(getattr(value, "value", value)) == "best"
    return not is_best or args.metric_for_best_model is not None or args.load_best_model_at_end


def _needs_low_rank_optimizer(value: Any, args: TrainingArguments) -> bool:
    return not value or str(getattr(args.optim, "value", args.optim)).startswith(("galore", "apollo"))


_COMPILE = Refused(
    "torch.compile is not supported: the model's body is called directly, past the compiled module.",
    "Leave it out.",
)
_LIGER = Refused(
    "Liger kernels are not supported: their fused loss replaces a forward pass that training does not use.",
    "Leave it out; log-probs are computed in blocks of the vocabulary without it.",
)
_OWN_EVALUATION = Refused(
    "has no effect: the evaluation is tutelage's own and makes no predictions to collect.",
    "Leave it out; --per_device_eval_batch_size bounds its memory.",
)
_SHARDED = Refused(
    "is not read here: how processes share a model, their launcher says.",
    "Leave it out; for FSDP2 start with accelerate launch --config_file examples/accelerate/fsdp2_8.yaml.",
)
_FULL_EVAL = Refused(
    "has no effect: the evaluation computes in the precision of training.",
    "Use --bf16 or --fp16 for both.",
)

_HONORED = [
    "output_dir",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "num_train_epochs",
    "max_steps",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
    "tf32",
    "use_cpu",
    "seed",
    "data_seed",
    "full_determinism",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "torch_empty_cache_steps",
    "ddp_backend",
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_static_graph",
    "ddp_timeout",
    "skip_memory_metrics",
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "logging_nan_inf_filter",
    "log_level",
    "disable_tqdm",
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "eval_on_start",
    "metric_for_best_model",
    "greater_is_better",
    "save_steps",
    "save_total_limit",
    "save_only_model",
    "restore_callback_states_from_checkpoint",
    "push_to_hub",
    "hub_token",
    "hub_private_repo",
    "hub_model_id",
    "hub_strategy",
    "hub_revision",
    "dataloader_drop_last",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "do_train",
    "do_eval",
    "average_tokens_across_devices",
    "log_on_each_node",
    "log_level_replica",
    "save_on_each_node",
    "local_rank",
]
# The last line: with one process every value means the same. do_train and do_eval: each command does both.

_REFUSED: dict[str, Refused] = {
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "use_cache": Refused(
        "has no effect: training never keeps keys and values, sampling always does.", "Leave it out."
    ),
    "neftune_noise_alpha": Refused(
        "would put noise into the policy's log-probs and none into the reference's, so their difference would be wrong.",
        "Use it with sft alone.",
        lambda value, args: not value or not _samples(args),
    ),
    "auto_find_batch_size": Refused(
        "is not supported: another batch size would move the bounds of the stages.",
        "Lower --per_device_train_batch_size and raise --gradient_accumulation_steps; the result is the same.",
    ),
    "label_smoothing_factor": Refused("label smoothing is not supported.", "Leave it at 0."),
    "label_names": Refused("has no effect: there are no labels.", "Leave it out."),
    "include_num_input_tokens_seen": Refused(
        "would count nothing.",
        "Leave it out; results.json has trained_tokens and sampled_tokens.",
        lambda value, args: value in (False, "no"),
    ),
    "optim": Refused(
        "layer-wise optimizers change weights during the backward pass, before a gradient that is not finite is found.",
        "Use the optimizer without 'layerwise'.",
        lambda value, args: "layerwise" not in str(getattr(value, "value", value)),
    ),
    "optim_target_modules": Refused(
        "has an effect with the optimizers galore_* and apollo_* alone.",
        "Choose one of them with --optim, or leave it out.",
        _needs_low_rank_optimizer,
    ),
    "prediction_loss_only": _OWN_EVALUATION,
    "eval_do_concat_batches": _OWN_EVALUATION,
    "eval_use_gather_object": _OWN_EVALUATION,
    "eval_accumulation_steps": _OWN_EVALUATION,
    "include_for_metrics": _OWN_EVALUATION,
    "batch_eval_metrics": _OWN_EVALUATION,
    "bf16_full_eval": _FULL_EVAL,
    "fp16_full_eval": _FULL_EVAL,
    "save_strategy": Refused(
        "'best' needs to know which metric.",
        "Add --metric_for_best_model (eval_loss, for example).",
        _knows_its_metric,
    ),
    "load_best_model_at_end": Refused(
        "rft chooses the policy that it exports by itself, on its validation rows.",
        "Leave it out.",
        lambda value, args: not value or not _selects(args),
    ),
    "enable_jit_checkpoint": Refused(
        "is not supported: the run would end early and look finished.",
        "Leave it out; a killed run goes on with --resume from its last checkpoint and samples.",
    ),
    "ignore_data_skip": Refused(
        "a run resumed inside a stage or an epoch needs the rows that come next, not the first ones.", "Leave it out."
    ),
    "hub_always_push": Refused("has no effect: a run is pushed once, at its end.", "Leave it out."),
    "debug": Refused(
        "only underflow_overflow has an effect here.",
        "Use --debug underflow_overflow or leave it out.",
        lambda value, args: not value or "tpu" not in str(value),
    ),
    "dataloader_in_order": Refused(
        "rows in an order that depends on timing cannot be resumed or repeated.", "Leave it on."
    ),
    "remove_unused_columns": Refused(
        "would remove the tokens: rows hold none of the columns that transformers looks for.",
        "Leave it off.",
        lambda value, args: not value,
    ),
    "train_sampling_strategy": Refused(
        "only 'random' and 'sequential' are supported.",
        "Use one of them; the micro-batches of an optimizer step hold rows of like length anyway.",
        lambda value, args: value in ("random", "sequential"),
    ),
    "length_column_name": Refused(
        "has no effect: rows are not sampled by length.",
        "Leave it out; micro-batches hold rows of like length anyway.",
    ),
    "accelerator_config": Refused(
        "dispatch_batches is not supported: batches hold no tensors that a first process could hand out.",
        "Leave it out, and give the other settings as JSON text or a dictionary.",
        _no_dispatch,
    ),
    "parallelism_config": _SHARDED,
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "deepspeed": _SHARDED,
    "do_predict": Refused("has no effect.", "Leave it out; tutelage sample draws answers from the trained model."),
    "resume_from_checkpoint": Refused(
        "has no effect as a setting.", "Use --resume, or call trainer.train(resume_from_checkpoint=...)."
    ),
}

ARGUMENTS: dict[str, Honored | Refused] = {name: Honored() for name in _HONORED} | _REFUSED
"""What becomes of every field of ``TrainingArguments``, by name."""

_SHARE_OR_STEPS = number(0, LARGEST, above=True)  # below 1 it is a share of all steps

RANGES: dict[str, Range] = {
    "per_device_train_batch_size": whole(1),
    "per_device_eval_batch_size": whole(1),
    "num_train_epochs": number(0, LARGEST, above=True),
    "max_steps": whole(-1),
    "gradient_accumulation_steps": whole(1),
    "learning_rate": number(0, above=True),
    "warmup_steps": number(0, LARGEST),
    "weight_decay": number(0),
    "adam_beta1": number(0, 1, below=True),
    "adam_beta2": number(0, 1, below=True),
    "adam_epsilon": number(0),
    "max_grad_norm": number(0),
    "neftune_noise_alpha": number(0),
    "torch_empty_cache_steps": whole(1),
    "ddp_bucket_cap_mb": whole(1),
    "ddp_timeout": whole(1),
    "logging_steps": _SHARE_OR_STEPS,
    "eval_steps": _SHARE_OR_STEPS,
    "eval_delay": number(0, LARGEST),
    "save_steps": _SHARE_OR_STEPS,
    "save_total_limit": whole(0),
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": whole(0, 1024),
    "dataloader_prefetch_factor": whole(1, 2**16),
    "local_rank": whole(-1),
}
"""The numbers that inherited arguments take; those that are refused with every value need none."""

_DEFAULTS = {
    entry.name: entry.default_factory() if entry.default_factory is not MISSING else entry.default
    for entry in fields(TrainingArguments)
}


def check_arguments(args: TrainingArguments) -> None:
    """Refuse, by name, values that training would ignore or get wrong.

    Call it before ``TrainingArguments.__post_init__``, which answers some of them with errors of its own.

    Raises:
        UserError: names the first such field.
    """
    for name, entry in _REFUSED.items():
        if name not in _DEFAULTS:  # of another version of transformers
            continue
        value, default = getattr(args, name), _DEFAULTS[name]
        unchanged = value == default or not (value or default)
        if not (entry.accepts(value, args) if entry.accepts else unchanged):
            raise UserError(entry.problem, remedy=entry.remedy, field=name)
