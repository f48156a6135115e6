"""A stage's files on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from tutelage.data.records import group_from_record, group_record, read_groups
from tutelage.errors import DamagedFileError, UserError
from tutelage.files import (
    append_json_lines,
    json_text,
    read_json,
    size_and_hash,
    storing,
    write_json,
    write_json_lines,
    write_text,
)
from tutelage.groups import Group
from tutelage.training.manifest import MANIFEST, Manifest, move_aside
from tutelage.training.parallel import ALONE, Processes

__all__ = ["FORMAT", "SAMPLES", "StageStore"]

logger = logging.getLogger(__name__)

FORMAT = 3
"""Of the files of a stage. The first one knew completions by their place and kept log-probs per sequence; the second had no
sizes and hashes."""

_KEEP = "Keep the run's stages folder as it is until the run is over; --resume makes again what can be made again."
SAMPLES = "samples.jsonl"
"""What a draw sampled, once it is whole."""
_PART, _SUMS = f"{SAMPLES}.part", f"{SAMPLES}.part.sums"


class StageStore:
    """What each stage sampled, one folder per stage, in files that people can read.

    A stage that samples several times has a folder for each further draw inside its own: ``stage-0003/draw-0001``.
    ``stage-0003/samples.jsonl`` has a line for each prompt: row, text and tokens of the prompt and of each completion
    with its role, and what is known of it. ``manifest.json`` says from which policy, with which settings, and has the size
    and hash of every file of the folder. While a stage is being sampled the file ends in ``.part``, and ``.part.sums`` has a
    hash for each piece of it; it is renamed when whole, so a killed run is known by it and
    goes on from there. ``replayed-0002.jsonl`` beside it holds samples of stage 2 that stage 3 trains on too, with
    stage 3's reference.

    Args:
        folder: the run's ``stages`` folder.
        settings: what the samples depend on besides the policy (seed, temperature, …); a stage recorded under other
            settings is not reused.
        text: decodes token ids for the reader.
        processes: the first writes each file once, and the others go on when it is there.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict[str, Any],
        text: Callable[[Sequence[int]], str],
        processes: Processes = ALONE,
    ):
        self.folder, self.settings, self.text, self.processes = Path(folder), settings, text, processes

    def check(self) -> None:
        """Before a run goes on from what is there; torn manifests are left to ``mend``.

        Raises:
            UserError: the stages are of another version of tutelage.
        """
        for path in self._manifests():
            try:
                found = read_json(path).get("format", 1)
            except (ValueError, AttributeError):  # torn: `mend` deals with it
                continue
            if found != FORMAT:
                raise UserError(
                    f"the run was begun by another version of tutelage, whose stages have format {found}; this one's "
                    f"have {FORMAT}.",
                    remedy="Finish it with the version that began it, or start anew (--overwrite_output_dir, or "
                    "another --output_dir).",
                    file=str(path),
                    field="format",
                )

    def path(self, stage: int, draw: int = 0) -> Path:
        """The stage's folder, or that of one of its further draws."""
        folder = self.folder / f"stage-{stage:04d}"
        return folder / f"draw-{draw:04d}" if draw else folder

    def manifest(self, stage: int, draw: int = 0) -> dict[str, Any]:
        """What is noted of a draw; empty where nothing is.

        Raises:
            DamagedFileError: it is not as it was written.
        """
        return Manifest(self.path(stage, draw)).read()

    def has(self, stage: int, name: str = SAMPLES, draw: int = 0) -> bool:
        """Whether a file of a draw was written whole, and is there."""
        return Manifest(self.path(stage, draw)).has(name)

    # --- reading ----------------------------------------------------------------------------------------------------

    def sampled(self, stage: int) -> list[Group]:
        """All groups that the draws of a whole stage recorded, in order.

        Raises:
            DamagedFileError: a file is missing, or is not as it was written.
        """
        draws = len(list(self.path(stage).glob(f"draw-*/{SAMPLES}")))
        return [group for draw in range(draws + 1) for group in self.groups(stage, draw=draw)]

    def read(self, stage: int, policy: str | None, draw: int = 0) -> dict[int, Group]:
        """Groups that the stage recorded, by row, with samples and reference log-probs.

        Args:
            policy: fingerprint of the policy at the stage's start. A record of another policy, or of a run killed
                before its first line, is ignored and the result is empty. None when the policy has already moved
                on inside the stage: then the record must be whole.
            draw: which draw of the stage.

        Raises:
            DamagedFileError: a whole record is not as it was written.
            UserError: ``policy`` is None and there is no whole record, or it was made under other settings.
        """
        folder, noted = self.path(stage, draw), self.manifest(stage, draw)
        # A damaged one was moved away before the run went on, and its note is still there.
        is_whole = SAMPLES in noted.get("files", {}) and (folder / SAMPLES).is_file()
        if policy is None:
            if not is_whole or noted.get("settings") != self.settings:
                raise UserError(
                    f"the samples of stage {stage} are missing or were drawn under other settings.",
                    remedy="Resume with the settings of the first run, or from a checkpoint at the stage's start.",
                    file=str(folder / SAMPLES),
                )
        elif noted.get("policy") != policy or noted.get("settings") != self.settings:
            return {}
        groups = self.groups(stage, draw=draw) if is_whole else _sound_groups(folder)
        return {group.row: group for group in groups}

    def groups(self, stage: int, name: str = "samples", draw: int = 0) -> list[Group]:
        """Groups of a whole file of a stage, in the order they were written.

        Raises:
            DamagedFileError: the file is missing, or is not as it was written.
        """
        return self.read_file(self.path(stage, draw) / f"{name}.jsonl")

    def read_file(self, path: Path) -> list[Group]:
        """The groups of a file that ``write_file`` wrote; raises as ``groups``."""
        return list(read_groups(Manifest(path.parent).require(path.name, _KEEP)))

    def lines(self, stage: int, name: str, draw: int = 0) -> list[Any]:
        """The values of a whole file of JSON lines of a stage; raises as ``groups``."""
        with Manifest(self.path(stage, draw)).require(f"{name}.jsonl", _KEEP).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def facts(self, stage: int, name: str) -> Any:
        """What a JSON file of a stage holds; raises as ``groups``."""
        return read_json(self.file(stage, name))

    def file(self, stage: int, name: str) -> Path:
        """A whole file of a stage; raises as ``groups``."""
        return Manifest(self.path(stage)).require(name, _KEEP)

    # --- writing ----------------------------------------------------------------------------------------------------

    def make(self, folder: Path) -> Path:
        """A folder of the run's stages, which is made if it is not there. The run's own folder must be.

        The one method that writes and is called by the first process alone.

        Raises:
            UserError: it cannot be made.
        """
        with storing(folder):
            self.folder.mkdir(exist_ok=True)  # no parents: an output folder that is gone is not made again
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write_file(self, path: Path, groups: Iterable[Group]) -> None:
        """Groups in a file that belongs to no stage, at once; ``read_file`` reads it."""
        self._write(path, lambda: write_json_lines(path, self._records(groups)))

    def write_groups(self, stage: int, name: str, groups: Iterable[Group]) -> None:
        """Add a file to a stage, at once; ``groups`` reads it."""
        self.write_file(self.path(stage) / f"{name}.jsonl", groups)

    def write_lines(self, stage: int, name: str, lines: Iterable[Any], draw: int = 0) -> None:
        """Add a file of JSON lines to a draw; ``lines`` reads it."""
        path = self.path(stage, draw) / f"{name}.jsonl"
        self._write(path, lambda: write_json_lines(path, lines))

    def write_facts(self, stage: int, name: str, content: Any) -> None:
        """Add a JSON file to a stage; ``facts`` reads it."""
        path = self.path(stage) / name
        self._write(path, lambda: write_json(path, content))

    def write_with(self, stage: int, name: str, write: Callable[[Path], None]) -> None:
        """Add a file of any kind to a stage: ``write`` gets its path; ``file`` gives it."""
        path = self.path(stage) / name
        self._write(path, lambda: write(path))

    def write_some(self, stage: int, patterns: Sequence[str], write: Callable[[Path], None]) -> None:
        """Add the files of the patterns to a stage, instead of those that it had: ``write`` gets the stage's folder."""
        folder = self.path(stage)

        def names() -> list[str]:
            found = {path for pattern in patterns for path in folder.glob(pattern)}
            found |= {path for inside in found for path in inside.rglob("*")}
            return sorted(str(path.relative_to(folder)) for path in found if path.is_file())

        def replace_them() -> None:
            self.make(folder)
            manifest = Manifest(folder)
            manifest.forget(*manifest.files.keys() & set(names()))
            for name in names():
                (folder / name).unlink()
            with storing(folder):
                write(folder)
            self._note(folder, *names())

        self.processes.on_main(replace_them)

    def forget(self, stage: int, name: str) -> None:
        """Remove a file of a stage, if it is there."""

        def remove() -> None:
            Manifest(self.path(stage)).forget(name)
            (self.path(stage) / name).unlink(missing_ok=True)

        self.processes.on_main(remove)

    def drop(self, stage: int, but: Sequence[str]) -> None:
        """Remove the files of a stage and its further draws, except those of the patterns ``but``; the manifest says so.

        A stage that was never sampled is left as it is.

        Raises:
            DamagedFileError: its manifest is not as it was written.
            UserError: the disk does not take it.
        """
        self.processes.on_main(partial(self._drop, self.path(stage), but))

    @staticmethod
    def _drop(folder: Path, but: Sequence[str]) -> None:
        manifest = Manifest(folder)
        facts = manifest.read()
        if not facts:
            return
        files = facts.pop("files", {})
        kept = {name: noted for name, noted in files.items() if any(fnmatch(name, pattern) for pattern in but)}
        with storing(folder):
            if not facts.get("dropped") or kept != files:
                manifest.write({**facts, "dropped": True}, kept)  # first: what is there and not noted counts as absent
            found = [path for path in folder.rglob("*") if str(path.relative_to(folder)) not in {MANIFEST, *kept}]
            # The manifests of draws first: what they note must not be missing.
            for path in sorted((path for path in found if path.is_file()), key=lambda path: path.name != MANIFEST):
                path.unlink()
            for inner in sorted((path for path in found if path.is_dir()), reverse=True):
                with suppress(OSError):  # what is kept lies in it
                    inner.rmdir()

    def is_dropped(self, stage: int) -> bool:
        """Whether ``drop`` removed files of a stage, and it was not sampled again since."""
        return bool(self.manifest(stage).get("dropped"))

    def _write(self, path: Path, write: Callable[[], None]) -> None:
        def replace_it() -> None:
            self.make(path.parent)
            Manifest(path.parent).forget(path.name)
            with storing(path):
                write()
            self._note(path.parent, path.name)

        self.processes.on_main(replace_it)

    @staticmethod
    def _note(folder: Path, *names: str) -> None:
        with storing(folder / MANIFEST):
            Manifest(folder).note(*names, format=FORMAT)

    def write(
        self,
        stage: int,
        policy: str,
        kept: Iterable[Group],
        batches: Iterable[list[Group]],
        facts: Callable[[], dict[str, Any]],
        draw: int = 0,
    ) -> dict[int, Group]:
        """Record a stage, batch by batch as it is made.

        Args:
            kept: groups that a killed run had already recorded; written again first, without its torn last line.
            batches: groups with samples and reference log-probs; lazily made, each on disk before the next is asked.
            facts: what the manifest says besides, asked for when the stage is whole.
            draw: which draw of the stage.

        Returns:
            all groups by row.

        Raises:
            UserError: the disk does not take it.
        """
        folder, on_main = self.path(stage, draw), self.processes.on_main
        noted = {"format": FORMAT, "stage": stage, "policy": policy, "settings": self.settings}
        record = _Record(folder, noted)
        groups = {group.row: group for group in kept}

        def begin() -> None:
            self.make(folder)
            record.begin(self._records(groups.values()))

        on_main(begin)
        for batch in batches:
            on_main(partial(record.add, self._records(batch)))
            groups |= {group.row: group for group in batch}
        found = facts()
        on_main(partial(record.end, found))
        return groups

    def _records(self, groups: Iterable[Group]) -> Iterable[dict[str, Any]]:
        return (group_record(group, self.text) for group in groups)

    # --- before a run goes on ---------------------------------------------------------------------------------------

    def mend(self) -> list[Path]:
        """Find what is not as it was written, name it, and move it out of the way.

        Returns:
            the damaged or missing files; a manifest stands for its folder.
        """
        run, damaged = self.folder.parent, []
        for path in self._manifests():
            try:
                problems = Manifest(path.parent).problems()
            except DamagedFileError as error:
                problems = {MANIFEST: error.problem.removesuffix(".")}
            for name, problem in problems.items():
                found = path.parent / name
                damaged.append(found)
                moved = f"; moved to {move_aside(found, run)}" if found.exists() else ""
                logger.warning("%s %s%s", found, problem, moved)
        for sums in sorted(self.folder.glob(f"**/{_SUMS}")):
            folder = sums.parent
            if Manifest(folder).has(SAMPLES):
                sums.unlink()  # a run was killed when it had no more use for it
                continue
            sound, altered = _sound_bytes(folder)
            if altered:
                part = folder / _PART
                moved = move_aside(part, run)
                write_text(part, sound.decode())
                rows = sound.count(b"\n")
                logger.warning("%s was altered: its first %d rows are used; moved to %s", part, rows, moved)
        return damaged

    def _manifests(self) -> list[Path]:
        return sorted(self.folder.glob(f"**/{MANIFEST}"))


class _Record:
    """What a draw samples, as it grows: a part that is renamed when it is whole.

    Args:
        noted: what the manifest says of it from the beginning.
    """

    def __init__(self, folder: Path, noted: dict[str, Any]):
        self.whole, self.part, self.manifest = folder / SAMPLES, folder / _PART, Manifest(folder)
        self.noted = noted
        self._sums: _Sums | None = None

    def begin(self, lines: Iterable[Any]) -> None:
        """With what a killed run had recorded."""
        self.manifest.forget(SAMPLES)
        with storing(self.whole):
            self.whole.unlink(missing_ok=True)
            write_json_lines(self.part, lines)
            self._sums = _Sums(self.part)
            # After the file: a kill in between must not give this policy's name to what another one had sampled.
            self.manifest.write({**self.noted, "complete": False})

    def add(self, lines: Iterable[Any]) -> None:
        """A further piece, on the disk when this returns."""
        assert self._sums is not None
        with storing(self.part):
            self._sums.append(lines)

    def end(self, facts: dict[str, Any]) -> None:
        """It is whole."""
        assert self._sums is not None
        with storing(self.whole):
            os.replace(self.part, self.whole)
            files = self.manifest.files | {SAMPLES: size_and_hash(self.whole)}
            self.manifest.write({**self.noted, "complete": True, **facts}, files)
            self._sums.path.unlink()


class _Sums:
    """The hashes of the pieces of a file that grows: after each piece, the bytes so far and their hash, one line each.

    Args:
        file: as it is, its first piece.
    """

    def __init__(self, file: Path):
        self.file, self.path = file, file.with_name(_SUMS)
        content = file.read_bytes()
        self._hash, self._size = hashlib.sha256(content), len(content)
        write_json_lines(self.path, [self._line()])

    def append(self, lines: Iterable[Any]) -> None:
        """A further piece, on its way to the disk when this returns."""
        piece = "".join(json_text(line) + "\n" for line in lines).encode()
        with self.file.open("ab") as file:
            file.write(piece)
        self._hash.update(piece)
        self._size += len(piece)
        with self.path.open("a", encoding="utf-8") as file:
            append_json_lines(file, [self._line()])

    def _line(self) -> dict[str, Any]:
        return {"bytes": self._size, "sha256": self._hash.hexdigest()}


def _sound_bytes(folder: Path) -> tuple[bytes, bool]:
    """The pieces of a killed run's record that are as they were written, and whether a whole piece is not.

    What comes after the last whole piece was being written when the run was killed.
    """
    part = folder / _PART if (folder / _PART).is_file() else folder / SAMPLES
    if not part.is_file():
        return b"", False
    content, seen, running = part.read_bytes(), 0, hashlib.sha256()
    for size, noted in _noted_sums(folder / _SUMS):
        if not seen <= size <= len(content):
            break
        running.update(content[seen:size])
        if running.hexdigest() != noted:
            return content[:seen], True
        seen = size
    return content[:seen], False


def _noted_sums(path: Path) -> Iterator[tuple[int, str]]:
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            noted = json.loads(line)
            yield int(noted["bytes"]), noted["sha256"]
        except (ValueError, KeyError, TypeError):
            return  # torn by a kill


def _sound_groups(folder: Path) -> list[Group]:
    return [group_from_record(json.loads(line)) for line in _sound_bytes(folder)[0].split(b"\n") if line]
