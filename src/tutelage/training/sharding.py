"""A policy that is sharded over the processes (FSDP2, torch's ``fully_shard`` by way of accelerate): what of training knows it.

The training step runs on the shards: torch gathers a layer when it is reached. Everything else (samples, log-probs, evaluations)
runs within ``unsharded``, where each process holds the whole policy for as long. What is written is gathered first, which takes
all processes, and then written by the first one: checkpoints and exports are the files of one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role
from tutelage.models.adapters import ADAPTER_FILE, named_by_peft
from tutelage.models.loading import base_causal_lm, first_line
from tutelage.models.precision import available_memory
from tutelage.models.sharding import assign, gathered, is_sharded, shard_like
from tutelage.scoring.logps import completion_token_logps
from tutelage.training.parallel import call_within, zero_of

if TYPE_CHECKING:
    from tutelage.training.trainer import DemonstrationTrainer

__all__ = [
    "begin_sharded",
    "check_settings",
    "load_model",
    "load_optimizer",
    "prepare",
    "refuse_sharded",
    "require_room",
    "save_optimizer",
    "whole_state",
    "zero_loss",
]

_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "rmsprop", "sgd")
"""Those that change each number by itself, so that a shard of a weight needs the same shard of its state."""


# --- before training ---------------------------------------------------------------------------------------------------


def prepare(trainer: DemonstrationTrainer) -> None:
    """Have the policy wait where it will be sharded, and accelerate shard it as the passes here need it.

    Raises:
        UserError: what does not work on a sharded policy.
    """
    accelerator: Any = trainer.accelerator
    if not accelerator.is_fsdp2:
        raise UserError(
            f"FSDP was asked for, and accelerate does not shard on this device ({accelerator.device.type}).",
            remedy="Start without FSDP: on a CPU each process holds the whole model.",
        )
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise UserError(
            f"FSDP needs torch 2.13 or newer; this is {torch.__version__}.",
            remedy="Use DDP, or install a newer torch.",
        )
    check_settings(trainer)
    try:
        accelerator.state.fsdp_plugin.set_auto_wrap_policy(trainer.policy)
    except ValueError as error:  # it knows no layer of that name
        raise UserError(
            f"accelerate cannot shard {type(base_causal_lm(trainer.policy)).__name__}: {first_line(error)}",
            remedy="Leave fsdp_transformer_layer_cls_to_wrap out: models name their layers.",
        ) from error
    if accelerator.mixed_precision == "bf16":
        # accelerate's own would round the loss to bfloat16, sum gradients over processes in it, and cast what goes into a layer
        # also where a probe computes in float32; autocast casts it.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    require_room(trainer.policy, trainer.args.device)
    trainer.policy.to(trainer.args.device)
    private: Any = trainer  # to transformers, which would write files that one process cannot read
    private._save_optimizer_and_scheduler = lambda folder: save_optimizer(trainer, Path(folder))
    private._load_from_checkpoint = lambda folder, model=None: load_model(trainer.policy, Path(folder))
    private._load_optimizer_and_scheduler = lambda folder: load_optimizer(trainer, folder)


def require_room(policy: nn.Module, device: torch.device) -> None:
    """Refuse a model that a device does not hold: samples and log-probs need all of it, and so does what comes before training."""
    size, room = sum(p.numel() * p.element_size() for p in policy.parameters()), available_memory(device)
    if size > room:
        raise UserError(
            f"the model takes {size / 2**30:.0f} GiB, and {room / 2**30:.0f} GiB of each device are free: a policy that is sharded "
            "over processes is whole in each while it samples and is scored.",
            remedy="Use a smaller model; or an adapter on a base in 4 bits (--load_in_4bit), with DDP.",
            field="model_name_or_path",
        )


def check_settings(trainer: DemonstrationTrainer) -> None:
    """Refuse, by name, settings that do not work on a sharded policy.

    Raises:
        UserError: names the first such field.
    """
    args: Any = trainer.args
    optimizer = str(getattr(args.optim, "value", args.optim))
    trained = {p.dtype for p in trainer.policy.parameters() if p.requires_grad}
    refused = (
        # accelerate would make them float32, once training has begun: the policy would be another than the start.
        (
            bool(args.bf16) and not trained <= {torch.float32},
            "dtype",
            "--bf16 with trained weights in 16 bits",
            "Leave out --dtype, or --bf16 (--bf16=False)",
        ),
        (optimizer not in _OPTIMIZERS, "optim", f"--optim {optimizer}", f"Use one of {', '.join(_OPTIMIZERS)}"),
        (bool(args.fp16), "fp16", "--fp16", "Use --bf16"),
        (
            bool(args.load_best_model_at_end),
            "load_best_model_at_end",
            "--load_best_model_at_end",
            "Leave it out, and take the checkpoint that trainer_state.json names",
        ),
        (
            bool(getattr(base_causal_lm(trainer.policy), "is_quantized", False)),
            "model_name_or_path",
            "a quantized model",
            "Load it in bfloat16",
        ),
    )
    for is_set, field, what, remedy in refused:
        if is_set:
            raise UserError(
                f"{what} does not work on a model that is sharded over processes (FSDP).",
                remedy=f"{remedy}; or start with DDP (accelerate launch --multi_gpu).",
                field=field,
            )


def refuse_sharded(trainer: DemonstrationTrainer, what: str) -> None:
    """Raise ``UserError`` if the policy is to be sharded: for what needs all of it at any time."""
    if trainer.is_fsdp_enabled:
        raise UserError(
            f"{what} does not work on a model that is sharded over processes (FSDP).",
            remedy="Start with DDP (accelerate launch --multi_gpu), where each process holds the whole model.",
        )


def begin_sharded(policy: nn.Module) -> None:
    """The policy has been sharded: let torch find its parts, and sum gradients of weights that one process did not use."""
    if isinstance(policy, FSDPModule):
        policy.set_reduce_scatter_unused_params(True)
        with torch.no_grad():
            call_within(policy, lambda: torch.zeros(()))
        policy.reset_iter_state()


# --- a step ------------------------------------------------------------------------------------------------------------


def zero_loss(trainer: DemonstrationTrainer) -> Tensor:
    """A loss of 0 for a process that has no row. Of a sharded policy, a pass over three tokens: every layer is gathered by all."""
    policy, pad_token_id = trainer.policy, trainer.tokenization.pad_id
    if not is_sharded(policy):
        return zero_of(policy)
    row = Group((pad_token_id,) * 2, (Completion((pad_token_id,), Role.SAMPLE, True),))
    found = completion_token_logps(policy, [row], layout="padded", pad_token_id=pad_token_id)
    return found.logps_N.sum() * 0.0


# --- what is written, and read again -----------------------------------------------------------------------------------


def whole_state(policy: nn.Module) -> dict[str, Tensor] | None:
    """The state dict of a sharded policy, whole, in the first process; of an adapter, its weights alone. All call it.

    None of a policy that is not sharded: its own is whole.
    """
    if not is_sharded(policy):
        return None
    state = policy.state_dict()
    if isinstance(policy, PeftModel):
        trained = {name for name, p in policy.named_parameters() if p.requires_grad}
        state = {name: value for name, value in state.items() if name in trained}
    return gathered(state)


def load_model(policy: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights: each process reads the files and keeps its part."""
    is_adapter = isinstance(policy, PeftModel)
    state: dict[str, Tensor] = get_peft_model_state_dict(policy) if is_adapter else policy.state_dict()
    files = [folder / ADAPTER_FILE] if is_adapter else sorted(folder.glob("model*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                (known,) = named_by_peft({name: torch.empty(0)}) if is_adapter else (name,)
                assign(state[known], stored.get_tensor(name))


def save_optimizer(trainer: DemonstrationTrainer, folder: Path) -> None:
    """Write the states of optimizer and schedule as one process does."""
    state = cast(Any, trainer.optimizer).state_dict()
    found = {index: gathered(values) for index, values in state["state"].items()}
    if trainer.args.should_save:
        torch.save({**state, "state": found}, folder / OPTIMIZER_NAME)
        torch.save(cast(Any, trainer.lr_scheduler).state_dict(), folder / SCHEDULER_NAME)


def load_optimizer(trainer: DemonstrationTrainer, checkpoint: str | None) -> None:
    """Read what ``save_optimizer`` wrote, or one process: this process keeps its part of each weight's state."""
    if checkpoint is None:
        return
    folder, optimizer = Path(checkpoint), cast(Any, trainer.optimizer)
    state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        parameter = parameters[index]
        for name, value in values.items():
            if isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape:
                values[name] = DTensor.from_local(
                    shard_like(value, parameter).clone(),
                    parameter.device_mesh,
                    parameter.placements,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
    optimizer.load_state_dict(state)
    cast(Any, trainer.lr_scheduler).load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
