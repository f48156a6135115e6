"""What of an output folder may leave the machine: the upload to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import upload_folder

from tutelage.training.clock import CLOCK
from tutelage.training.journal import METRICS

__all__ = ["NOT_UPLOADED", "upload"]

NOT_UPLOADED = (
    "_*",
    "checkpoint-*",
    "stages/*",
    "vllm/*",
    "folds/*",
    "controls/*",
    "retention-start/*",
    "results.json",
    "report.html",
    CLOCK,
    METRICS,
    "progress.json",
    "run.json",
    "made.json",
    "lock.json",
    "damaged/*",
    ".writing/*",
)
"""Patterns of what lies in an output folder besides model, tokenizer and card. Most of it holds the user's data: rows,
samples, and in the folder of the controls their training rows and all this once more."""


def upload(folder: Path, repo_id: str, *, message: str, token: str | None, revision: str | None) -> Any:
    """Upload an output folder to the hub, without what ``NOT_UPLOADED`` names."""
    return upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        commit_message=message,
        token=token,
        revision=revision,
        ignore_patterns=list(NOT_UPLOADED),
    )
