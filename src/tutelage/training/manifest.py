"""manifest.json of a folder of a run: what is to be known of it, and the size and hash of every file in it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tutelage.errors import DamagedFileError
from tutelage.files import difference, read_sealed, size_and_hash, write_sealed

__all__ = ["DAMAGED", "MANIFEST", "Manifest", "move_aside"]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
DAMAGED = "damaged"
"""Folder of a run that holds what is not as the run wrote it."""


class Manifest:
    """The manifest of one folder.

    A file is noted after it was written. One that is there and not noted is of a writer that was killed: it counts as
    absent. A noted one that differs, or is gone, is damaged; its note stays until it is written again.

    Args:
        folder: the folder; it need not exist before something is noted.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / MANIFEST

    def read(self) -> dict[str, Any]:
        """All that is noted; empty where there is no manifest.

        Raises:
            DamagedFileError: it is not as it was written.
        """
        try:
            return read_sealed(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return {}

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Size and hash of each noted file, by its name below the folder."""
        return self.read().get("files", {})

    def write(self, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """New facts instead of the old ones; the notes of files stay unless others are given."""
        noted = self.files if files is None else files
        write_sealed(self.path, {**facts, "files": dict(sorted(noted.items()))})

    def note(self, *names: str, **facts: Any) -> None:
        """Files as they are now, and facts besides those that are known."""
        found = self.read()
        files = found.pop("files", {}) | {name: size_and_hash(self.folder / name) for name in names}
        self.write(found | facts, files)

    def forget(self, *names: str) -> None:
        """Files that are no longer to be there, or are about to be written anew."""
        found = self.read()
        files = found.pop("files", {})
        if files.keys() & set(names):
            self.write(found, {name: noted for name, noted in files.items() if name not in names})

    def has(self, name: str) -> bool:
        """Whether a file is noted and there."""
        return name in self.files and (self.folder / name).is_file()

    def problems(self, names: Iterable[str] | None = None) -> dict[str, str]:
        """What is wrong with which files, of all that are noted or of those named; a file that is not noted is missing.

        Raises:
            DamagedFileError: as ``read``.
        """
        files = self.files
        found = {
            name: difference(self.folder / name, files[name]) if name in files else "is missing"
            for name in (files if names is None else names)
        }
        return {name: problem for name, problem in found.items() if problem}

    def require(self, name: str, remedy: str) -> Path:
        """The path of a noted file that is as it was written.

        Raises:
            DamagedFileError: it is not, or the manifest is not.
        """
        if problem := self.problems([name]).get(name):
            raise DamagedFileError(f"{problem}.", remedy=remedy, file=str(self.folder / name))
        return self.folder / name


def move_aside(path: Path, run: Path) -> Path:
    """Move what is damaged out of the way, into ``damaged`` in the run's folder; gives its new path. Nothing is deleted."""
    home = run / DAMAGED / path.relative_to(run)
    target, number = home, 1
    while target.exists():
        number += 1
        target = home.with_name(f"{home.name}.{number}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, target)
    return target
