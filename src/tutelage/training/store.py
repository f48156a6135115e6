"""A stage's files on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tutelage.data.records import group_record, read_groups
from tutelage.errors import UserError
from tutelage.files import append_json_lines, read_json, write_json, write_json_lines
from tutelage.groups import Group

__all__ = ["FORMAT", "StageStore"]

FORMAT = 2
"""Of the files of a stage. The first one knew completions by their place and kept log-probs per sequence."""


class StageStore:
    """What each stage sampled, one folder per stage, in files that people can read.

    A stage that samples several times has a folder for each further draw inside its own: ``stage-0003/draw-0001``.
    ``stage-0003/samples.jsonl`` has a line for each prompt: row, text and tokens of the prompt and of each completion
    with its role, and what is known of it. ``manifest.json`` says from which policy, with which settings. While a
    stage is being sampled the file ends in ``.part``; it is renamed when whole, so a killed run is known by it and
    goes on from there. ``replayed-0002.jsonl`` beside it holds samples of stage 2 that stage 3 trains on too, with
    stage 3's reference.

    Args:
        folder: the run's ``stages`` folder.
        settings: what the samples depend on besides the policy (seed, temperature, …); a stage recorded under other
            settings is not reused.
        text: decodes token ids for the reader.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], text: Callable[[Sequence[int]], str]):
        self.folder, self.settings, self.text = Path(folder), settings, text

    def check(self) -> None:
        """Before a run goes on from what is there.

        Raises:
            UserError: the stages are of another version of tutelage.
        """
        for manifest in sorted(self.folder.glob("**/manifest.json")):
            found = read_json(manifest).get("format", 1)
            if found != FORMAT:
                raise UserError(
                    f"the run was begun by another version of tutelage, whose stages have format {found}; this one's "
                    f"have {FORMAT}.",
                    remedy="Finish it with the version that began it, or start anew (--overwrite_output_dir, or "
                    "another --output_dir).",
                    file=str(manifest),
                    field="format",
                )

    def path(self, stage: int, draw: int = 0) -> Path:
        """The stage's folder, or that of one of its further draws."""
        folder = self.folder / f"stage-{stage:04d}"
        return folder / f"draw-{draw:04d}" if draw else folder

    def manifest(self, stage: int, draw: int = 0) -> dict[str, Any]:
        """What is noted of a draw; empty where nothing is."""
        path = self.path(stage, draw) / "manifest.json"
        return read_json(path) if path.exists() else {}

    def sampled(self, stage: int) -> list[Group]:
        """All groups that the draws of a whole stage recorded, in order.

        Raises:
            UserError: the first is missing.
        """
        draws = len(list(self.path(stage).glob("draw-*/samples.jsonl")))
        return [group for draw in range(draws + 1) for group in self.groups(stage, draw=draw)]

    def read(self, stage: int, policy: str | None, draw: int = 0) -> dict[int, Group]:
        """Groups that the stage recorded, by row, with samples and reference log-probs.

        Args:
            policy: fingerprint of the policy at the stage's start. A record of another policy, or of a run killed
                before its first line, is ignored and the result is empty. None when the policy has already moved
                on inside the stage: then the record must be whole.
            draw: which draw of the stage.

        Raises:
            UserError: ``policy`` is None and there is no whole record, or it was made under other settings.
        """
        folder, manifest = self.path(stage, draw), self.manifest(stage, draw)
        whole = folder / "samples.jsonl"
        if policy is None:
            if not whole.exists() or manifest.get("settings") != self.settings:
                raise UserError(
                    f"the samples of stage {stage} are missing or were drawn under other settings.",
                    remedy="Resume with the settings of the first run, or from a checkpoint at the stage's start.",
                    file=str(whole),
                )
            return {group.row: group for group in read_groups(whole)}
        if manifest.get("policy") != policy or manifest.get("settings") != self.settings:
            return {}
        part = whole if whole.exists() else whole.with_suffix(".jsonl.part")
        return {group.row: group for group in read_groups(part)} if part.exists() else {}

    def groups(self, stage: int, name: str = "samples", draw: int = 0) -> list[Group]:
        """Groups of a whole file of a stage, in the order they were written.

        Raises:
            UserError: the file is missing.
        """
        return list(read_groups(self._existing(stage, name, draw)))

    def write_file(self, path: Path, groups: Iterable[Group]) -> None:
        """Groups in a file that belongs to no stage, at once; ``read_file`` reads it."""
        write_json_lines(path, self._records(groups))

    def read_file(self, path: Path) -> list[Group]:
        """The groups of a file that ``write_file`` wrote."""
        return list(read_groups(path))

    def lines(self, stage: int, name: str, draw: int = 0) -> list[Any]:
        """The values of a whole file of JSON lines of a stage.

        Raises:
            UserError: the file is missing.
        """
        with self._existing(stage, name, draw).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def _existing(self, stage: int, name: str, draw: int) -> Path:
        path = self.path(stage, draw) / f"{name}.jsonl"
        if not path.exists():
            raise UserError(
                f"the {name} of stage {stage} are missing.",
                remedy="Keep the run's stages folder until the run is over.",
                file=str(path),
            )
        return path

    def write_groups(self, stage: int, name: str, groups: Iterable[Group]) -> None:
        """Add a file to a stage, at once; ``groups`` reads it."""
        path = self.path(stage) / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write_file(path, groups)

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
        """
        folder = self.path(stage, draw)
        folder.mkdir(parents=True, exist_ok=True)
        whole = folder / "samples.jsonl"
        part = whole.with_suffix(".jsonl.part")
        manifest = {"format": FORMAT, "stage": stage, "policy": policy, "settings": self.settings}
        kept = list(kept)
        whole.unlink(missing_ok=True)
        groups: dict[int, Group] = {}
        write_json_lines(part, self._records(kept))
        # After the file: a kill in between must not give this policy's name to what another one had sampled.
        write_json(folder / "manifest.json", {**manifest, "complete": False})
        with part.open("a", encoding="utf-8") as file:
            for batch in batches:
                append_json_lines(file, self._records(batch))
                groups |= {group.row: group for group in batch}
        os.replace(part, whole)
        write_json(folder / "manifest.json", {**manifest, "complete": True, **facts()})
        return {group.row: group for group in kept} | groups

    def _records(self, groups: Iterable[Group]) -> Iterable[dict[str, Any]]:
        return (group_record(group, self.text) for group in groups)
