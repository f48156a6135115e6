"""The folder that a run writes into."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from tutelage.errors import UserError

__all__ = ["OutputFolder"]

# What a run writes into its folder, and hence what --overwrite_output_dir may take away.
_OUTPUTS = (
    "checkpoint-*",
    "stages",
    "controls",
    "retention-start",
    "policy",
    "reward",
    "results.json",
    "template-time.json",
    "report.html",
    "README.md",
    "adapter_*",
    "model*.safetensors*",
)


class OutputFolder:
    """Refuses a folder in use, and removes the empty folder of a run that never started.

    Args:
        outputs: patterns of what a run writes into the folder, and hence of what ``overwrite`` may take away.
        remedy: what to tell a user whose folder is in use.

    Raises:
        UserError: the folder holds something and neither resume nor overwrite was asked for.
    """

    def __init__(
        self,
        folder: str,
        *,
        overwrite: bool,
        resume: bool = False,
        outputs: Sequence[str] = _OUTPUTS,
        remedy: str = "Use --resume to continue its run, --overwrite_output_dir to replace it, or another folder.",
    ):
        self.folder = Path(folder)
        self._keep = self.folder.exists()
        self._replaced: list[Path] = []
        if self._keep and not self.folder.is_dir():
            raise UserError("is a file, not a folder.", file=str(folder), field="output_dir")
        if self._keep and any(self.folder.iterdir()) and not resume:
            if not overwrite:
                raise UserError(
                    "the output folder is not empty.",
                    remedy=remedy,
                    file=str(folder),
                    field="output_dir",
                )
            self._replaced = [path for pattern in outputs for path in self.folder.glob(pattern)]

    def clear(self) -> None:
        """The run begins: take away what an earlier one left, if it is to be replaced, and keep what comes from now on."""
        self._keep = True
        for path in self._replaced:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        # Bad input leaves nothing; a run that began and was stopped leaves its checkpoints and samples.
        if isinstance(error, UserError) and not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)
