"""How many processes a launcher was asked for. Nothing here takes time to import."""

from __future__ import annotations

import os
from collections.abc import Mapping

from tutelage.errors import UserError

__all__ = ["require_one_process"]

_REMEDY = "Start one process and show it one device (CUDA_VISIBLE_DEVICES=0)."


def require_one_process(found: int = 1, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse several processes or devices.

    Args:
        found: how many are known to be there.
        environment: of the process, in which launchers say how many there should be.

    Raises:
        UserError: more than one; or ``accelerate launch`` was asked for several and started one, as it does on a CPU without
            mpirun.
    """
    told = environment.get("WORLD_SIZE", "1")
    found = max(found, int(told) if told.isdigit() else 1)
    if found > 1:
        raise UserError(f"{found} processes or devices: training runs on one so far.", remedy=_REMEDY)
    # accelerate names a place to meet where several processes are wanted, and their number only to those it starts.
    if (
        "ACCELERATE_MIXED_PRECISION" in environment
        and "MASTER_ADDR" in environment
        and "WORLD_SIZE" not in environment
    ):
        raise UserError(
            "accelerate launch was asked for several processes and started one: training runs on one so far.",
            remedy="Use --num_processes 1, or start tutelage without accelerate.",
        )
