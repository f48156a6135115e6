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

__all__ = ["commit", "provenance"]


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
