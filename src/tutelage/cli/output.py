"""The folder that a command writes into: it is tried before the work, locked, and nothing in it is lost that is not its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tutelage.errors import UserError
from tutelage.files import read_json, storing
from tutelage.training.lock import LOCK, locked
from tutelage.training.made import MADE, add_made, is_unfinished, made_files

__all__ = ["RESULTS", "OutputFolder", "try_folder"]

RESULTS = ("results.json", "report.html", "README.md")
"""What a training command writes besides the model."""

# Files that a run writes into its folder, besides checkpoints and stages.
_OUTPUTS = (
    *RESULTS,
    "template-time.json",
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    "adapter_*",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template.jinja",
    "training_args.bin",
    "policy/*",
    "reward/*",
    "checkpoint-*/*",
    "stages/*",
    "vllm/*",
    "retention-start/*",
    "run.json",
    "metrics.jsonl",
    "progress.json",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
)
_PROBE = 1 << 16


class OutputFolder:
    """Refuses a folder that cannot be written, that is in use, or that holds what the command reads.

    As a context it makes and locks the folder, and removes it again where a run never started.

    Args:
        outputs: patterns of files that the command writes: none that it did not write itself may be there.
        remedy: what to tell a user whose folder is in use.
        reads: files and folders that the command reads, by the name of their setting.
        leaves_nothing: the folder is removed again unless it was there.
        again: a folder may be used again in which the same command was killed before its end.

    Raises:
        UserError: as said, or the folder holds something and neither resume nor overwrite was asked for.
    """

    def __init__(
        self,
        folder: str,
        *,
        overwrite: bool,
        resume: bool = False,
        outputs: Sequence[str] = _OUTPUTS,
        remedy: str = "Use --resume to continue its run, --overwrite_output_dir to replace it, or another folder.",
        reads: Mapping[str, str | None] | None = None,
        again: bool = False,
        leaves_nothing: bool = False,
    ):
        self.folder = Path(folder)
        self._keep, self._leaves_nothing = self.folder.exists(), leaves_nothing
        self._replaced: list[Path] = []
        self._made: list[Path] = []
        self._stack = ExitStack()
        if self._keep and not self.folder.is_dir():
            raise UserError("is a file, not a folder.", file=str(folder), field="output_dir")
        read = {field: Path(name) for field, name in (reads or {}).items() if name and Path(name).exists()}
        for field, path in read.items():
            if path.resolve() == self.folder.resolve():
                raise _is_read(field, path, "is the output folder")
        holds_something = self._keep and any(path.name != LOCK for path in self.folder.iterdir())
        if holds_something and not resume:
            again = again and is_unfinished(self.folder)
            if not overwrite and not again:
                raise UserError("the output folder is not empty.", remedy=remedy, file=str(folder), field="output_dir")
            self._replaced = made_files(self.folder)
            self._refuse_what_is_read(read)
            self._refuse_what_others_made(outputs)
        elif holds_something and not _may_go_on(self.folder):
            self._refuse_what_others_made(outputs)
        try_folder(self.folder)

    def _refuse_what_is_read(self, read: Mapping[str, Path]) -> None:
        cleared = {path.resolve() for path in self._replaced}
        for field, path in read.items():
            files = [path, *(path.iterdir() if path.is_dir() else ()), *_bases(path)]
            for file in files:
                if file.resolve() in cleared:
                    raise _is_read(field, file, "lies in what would be replaced")

    def _refuse_what_others_made(self, outputs: Sequence[str]) -> None:
        replaced = set(self._replaced)
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if path.is_file() and path not in replaced and any(fnmatch(name, pattern) for pattern in outputs):
                if "/" in name and not any("/" in pattern and fnmatch(name, pattern) for pattern in outputs):
                    continue
                raise UserError(
                    "no run of tutelage wrote this file, and the command would replace it.",
                    remedy="Move it away, or name another folder.",
                    file=str(path),
                    field="output_dir",
                )

    def clear(self) -> None:
        """The run begins: take away what an earlier one left, if it is to be replaced, and keep what comes from now on."""
        self._keep = True
        with storing(self.folder):
            for path in self._replaced:
                if path not in (self.folder / LOCK, self.folder / MADE):
                    path.unlink(missing_ok=True)
            for folder in sorted({parent for path in self._replaced for parent in path.parents}, reverse=True):
                if self.folder in folder.parents:
                    with suppress(OSError):  # what others put there stays
                        folder.rmdir()
            if self._replaced:
                (self.folder / MADE).unlink(missing_ok=True)

    def add(self, *names: str, unfinished: bool = False) -> None:
        """Note files that the command is about to write."""
        add_made(self.folder, names, unfinished=unfinished)

    def __enter__(self) -> OutputFolder:
        self._made = _make(self.folder)
        self._stack.enter_context(locked(self.folder))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        self._stack.close()
        # Bad input leaves nothing; a run that began and was stopped leaves its checkpoints and samples.
        if (isinstance(error, UserError) or self._leaves_nothing) and not self._keep:
            _unmake(self._made)


def try_folder(folder: Path) -> None:
    """Write into a folder and leave it as it is; it need not exist.

    Raises:
        UserError: it cannot be made or written.
    """
    made = _make(folder)
    probe = folder / ".tutelage-probe"  # of one name, so that the next command removes what a killed one left
    try:
        with storing(folder), probe.open("wb") as file:
            with suppress(OSError):  # some systems keep what is open; it goes at the end
                probe.unlink()
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
    finally:
        with suppress(OSError):
            probe.unlink()
        _unmake(made)


def _may_go_on(folder: Path) -> bool:
    """Whether a run was begun in a folder, so that --resume has something to look at; what that is it says itself."""
    return any(any(folder.glob(name)) for name in ("run.json", MADE, "checkpoint-*", "stages", "folds"))


def _make(folder: Path) -> list[Path]:
    """Make a folder with its parents; gives those that were not there, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    with storing(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            _unmake(missing)
            raise
    return missing


def _unmake(folders: Sequence[Path]) -> None:
    for path in folders:
        with suppress(OSError):  # not empty, or never made
            path.rmdir()


def _bases(path: Path) -> list[Path]:
    """The base of an adapter, where it is a folder, with what lies in it."""
    config: Any = None
    with suppress(OSError, ValueError):
        config = read_json(path / "adapter_config.json")
    name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    base = Path(name) if name else None
    return [base, *base.iterdir()] if base and base.is_dir() else []


def _is_read(field: str, path: Path, problem: str) -> UserError:
    return UserError(
        f"the command reads it, and it {problem}.",
        remedy="Name another --output_dir.",
        file=str(path),
        field=field,
    )
