"""What a launcher's environment says of processes. Nothing here takes time to import."""

from __future__ import annotations

import os
from collections.abc import Mapping

from tutelage.errors import UserError

__all__ = ["asks_for_fsdp", "check_launch", "is_distributed", "process_index"]


def process_index(environment: Mapping[str, str] = os.environ) -> int:
    """The number of this process among those that a launcher started, from 0."""
    found = environment.get("RANK", "0")
    return int(found) if found.isdigit() else 0


def is_distributed(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started several processes."""
    return environment.get("WORLD_SIZE", "1") not in ("", "0", "1")


def asks_for_fsdp(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether accelerate is to shard the model."""
    return _is_set(environment, "ACCELERATE_USE_FSDP")


def check_launch(devices: int = 1, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse several devices in one process, ways of sharding that do not work, and a launcher that started too few processes.

    Args:
        devices: that this process would compute on.
        environment: of the process, in which launchers say how many there are.

    Raises:
        UserError: as said. ``accelerate launch --cpu`` starts one process without mpirun, whatever it is asked for.
    """
    if devices > 1:
        raise UserError(
            f"{devices} devices in one process.",
            remedy=f"Start one process for each (accelerate launch --multi_gpu --num_processes {devices} -m tutelage …), or "
            "show this one a single device (CUDA_VISIBLE_DEVICES=0).",
        )
    if _is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
        raise UserError("the launcher was asked for DeepSpeed, which does not work here.", remedy=_ROADS)
    if _is_set(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UserError("the launcher was asked for a parallelism_config, which does not work here.", remedy=_ROADS)
    if asks_for_fsdp(environment):
        _check_fsdp(environment)
    # accelerate names a place to meet where several processes are wanted, and their number only to those it starts.
    if (
        "ACCELERATE_MIXED_PRECISION" in environment
        and "MASTER_ADDR" in environment
        and "WORLD_SIZE" not in environment
    ):
        raise UserError(
            "accelerate launch was asked for several processes and started one.",
            remedy="On a CPU start them with torchrun --nproc_per_node 2 -m tutelage …; or use --num_processes 1.",
        )


_ROADS = "Start with DDP (accelerate launch --multi_gpu, or torchrun), or with FSDP2 as examples/accelerate/fsdp2_8.yaml sets it."

_FSDP = {
    "FSDP_VERSION": ("fsdp_version", ("2",), "1"),
    "FSDP_AUTO_WRAP_POLICY": ("fsdp_auto_wrap_policy", ("transformer_based_wrap",), "no_wrap"),
    "FSDP_STATE_DICT_TYPE": ("fsdp_state_dict_type", ("full_state_dict",), "full_state_dict"),
    "FSDP_RESHARD_AFTER_FORWARD": ("fsdp_reshard_after_forward", ("true", "1"), "true"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("fsdp_cpu_ram_efficient_loading", ("false", "0"), "false"),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", ("false", "0"), "false"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", ("false", "0"), "false"),
    "FSDP_IGNORED_MODULES": ("fsdp_ignored_modules", ("",), ""),
}
"""Variables of accelerate that change how a model is sharded: their name in its config file, what works, and what unset means."""


def _check_fsdp(environment: Mapping[str, str]) -> None:
    """Refuse what of FSDP does not work.

    Raises:
        UserError: names the setting and the values that work.
    """
    for variable, (setting, accepted, unset) in _FSDP.items():
        value = environment.get(variable, unset)
        if value.lower() in accepted:
            continue
        instead = " Use --gradient_checkpointing." if "ACTIVATION" in variable else ""
        raise UserError(
            f"FSDP with {setting} {value!r} does not work here.{instead}",
            remedy=f"Set {setting} to {accepted[0] or 'nothing'} ({variable}). {_ROADS}",
        )
    if not is_distributed(environment):
        raise UserError(
            "FSDP shards a model over processes, and one was started.", remedy="Start several, or leave FSDP out."
        )


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1")
