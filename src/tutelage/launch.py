"""What a launcher's environment says of processes. Nothing here takes time to import."""

from __future__ import annotations

import os
from collections.abc import Mapping

from tutelage.errors import UserError

__all__ = ["check_launch", "is_distributed", "process_index"]


def process_index(environment: Mapping[str, str] = os.environ) -> int:
    """The number of this process among those that a launcher started, from 0."""
    found = environment.get("RANK", "0")
    return int(found) if found.isdigit() else 0


def is_distributed(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started several processes."""
    return environment.get("WORLD_SIZE", "1") not in ("", "0", "1")


def check_launch(devices: int = 1, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse several devices in one process, sharded models, and a launcher that started too few processes.

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
    for name, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if environment.get(name, "false").lower() in ("true", "1"):
            raise UserError(
                f"the launcher was asked for {what}; so far each process holds the whole model (DDP).",
                remedy="Start them with accelerate launch --multi_gpu, or with torchrun.",
            )
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
