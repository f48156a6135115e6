"""Where a measurement was made, and with what."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.roofline import nominal_peak

__all__ = ["commit", "gpu", "provenance"]


def provenance(module: str) -> dict[str, Any]:
    """Machine, versions, commit, and the command, of ``python -m module``."""
    return {
        "machine": {
            "cpu": _field("/proc/cpuinfo", "model name"),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory": _field("/proc/meminfo", "MemTotal"),
            "platform": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate", "tutelage")},
        },
        "commit": commit(Path(__file__).parent),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """The device that torch computes on: its name, and of a GPU memory, driver and the peak that its maker states."""
    if device.type != "cuda":
        return {"device": platform.machine(), "nominal_peak": None}
    properties = torch.cuda.get_device_properties(device)
    found = {"device": properties.name, "memory_bytes": properties.total_memory, "driver": _driver()}
    return found | {"cuda": torch.version.cuda, "nominal_peak": nominal_peak(device)}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):  # containers may come without it
        return "unknown"


def _field(file: str, name: str) -> str:
    """The first line of the form ``name : value`` in a file of the Linux kernel's."""
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def commit(folder: Path) -> str:
    """The commit that a folder has checked out, and whether files differ from it."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
        return run.stdout.strip()

    return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
