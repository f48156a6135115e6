"""What a stage leaves on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tutelage.errors import UserError
from tutelage.files import write_json
from tutelage.groups import PER_COMPLETION, Completion, Group, Role

__all__ = ["StageStore"]


class StageStore:
    """What each stage sampled, one folder per stage, in files that people can read.

    ``stage-0003/samples.jsonl`` has a line for each prompt: row, text and tokens of prompt, demonstration and samples,
    and the reference log-probs. ``manifest.json`` says from which policy, with which settings. While a stage is being
    sampled the file ends in ``.part``; it is renamed when whole, so a killed run is known by it and goes on from there.
    ``replayed-0002.jsonl`` beside it holds samples of stage 2 that stage 3 trains on too, with stage 3's reference.

    Args:
        folder: the run's ``stages`` folder.
        settings: what the samples depend on besides the policy (seed, temperature, …); a stage recorded under other
            settings is not reused.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]):
        self.folder, self.settings = Path(folder), settings

    def path(self, stage: int) -> Path:
        """The stage's folder."""
        return self.folder / f"stage-{stage:04d}"

    def read(self, stage: int, policy: str | None) -> dict[int, Group]:
        """Groups that the stage recorded, by row, with samples and reference log-probs.

        Args:
            policy: fingerprint of the policy at the stage's start. A record of another policy, or of one killed
                before its first line, is worth nothing and comes back empty. None when the policy has already moved
                on inside the stage: then the record must be whole.

        Raises:
            UserError: ``policy`` is None and there is no whole record, or it was made under other settings.
        """
        folder = self.path(stage)
        manifest = _read_json(folder / "manifest.json")
        whole = folder / "samples.jsonl"
        if policy is None:
            if not whole.exists() or manifest.get("settings") != self.settings:
                raise UserError(
                    f"the samples of stage {stage} are missing or were drawn under other settings.",
                    remedy="Resume with the settings of the first run, or from a checkpoint at the stage's start.",
                    file=str(whole),
                )
            return {group.row: group for group in _read_groups(whole)}
        if manifest.get("policy") != policy or manifest.get("settings") != self.settings:
            return {}
        part = whole if whole.exists() else whole.with_suffix(".jsonl.part")
        return {group.row: group for group in _read_groups(part)} if part.exists() else {}

    def groups(self, stage: int, name: str = "samples") -> list[Group]:
        """Groups of a whole file of a stage, in the order they were written.

        Raises:
            UserError: the file is missing.
        """
        path = self.path(stage) / f"{name}.jsonl"
        if not path.exists():
            raise UserError(
                f"the samples of stage {stage} are missing.",
                remedy="Keep the run's stages folder until the run is over.",
                file=str(path),
            )
        return list(_read_groups(path))

    def write_groups(self, stage: int, name: str, groups: Iterable[Group], text: Callable[[tuple[int, ...]], str]):
        """Add a file to a stage, at once; ``groups`` reads it."""
        _write_groups(self.path(stage) / f"{name}.jsonl", groups, text)

    def write(
        self,
        stage: int,
        policy: str,
        kept: Iterable[Group],
        batches: Iterable[list[Group]],
        text: Callable[[tuple[int, ...]], str],
        facts: Callable[[], dict[str, Any]],
    ) -> dict[int, Group]:
        """Record a stage, batch by batch as it is made.

        Args:
            kept: groups that a killed run had already recorded; written again first, without its torn last line.
            batches: groups with samples and reference log-probs; lazily made, each on disk before the next is asked.
            text: decodes token ids for the reader.
            facts: what the manifest says besides, asked for when the stage is whole.

        Returns:
            all groups by row.
        """
        folder = self.path(stage)
        folder.mkdir(parents=True, exist_ok=True)
        whole = folder / "samples.jsonl"
        part = whole.with_suffix(".jsonl.part")
        manifest = {"stage": stage, "policy": policy, "settings": self.settings}
        kept = list(kept)
        whole.unlink(missing_ok=True)
        groups: dict[int, Group] = {}
        _write_groups(part, kept, text)
        # After the file: a kill in between must not give this policy's name to what another one had sampled.
        write_json(folder / "manifest.json", {**manifest, "complete": False})
        with part.open("a", encoding="utf-8") as file:
            for batch in batches:
                _append(file, batch, text)
                groups |= {group.row: group for group in batch}
        os.replace(part, whole)
        write_json(folder / "manifest.json", {**manifest, "complete": True, **facts()})
        return {group.row: group for group in kept} | groups


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_groups(path: Path, groups: Iterable[Group], text: Callable[[tuple[int, ...]], str]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        _append(file, groups, text)
    os.replace(temporary, path)


def _append(file: IO[str], groups: Iterable[Group], text: Callable[[tuple[int, ...]], str]) -> None:
    for group in groups:
        demonstration, *samples = group.completions
        record = {
            "row": group.row,
            "prompt": text(group.prompt_ids),
            "demonstration": text(demonstration.token_ids),
            "samples": [text(sample.token_ids) for sample in samples],
            "finished": [completion.finished for completion in group.completions],
            **{name: getattr(group, name) for name in PER_COMPLETION if getattr(group, name) is not None},
            "prompt_ids": group.prompt_ids,
            "completion_ids": [completion.token_ids for completion in group.completions],
        }
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def _read_groups(path: Path) -> Iterator[Group]:
    with path.open("rb") as file:  # as bytes: a torn line may end inside a character
        for line in file:
            if not line.endswith(b"\n"):
                return  # torn by a kill in the middle of the line
            record = json.loads(line)
            roles = [Role.DEMONSTRATION] + [Role.SAMPLE] * len(record["samples"])
            completions = zip(record["completion_ids"], roles, record["finished"], strict=True)
            yield Group(
                prompt_ids=tuple(record["prompt_ids"]),
                completions=tuple(Completion(tuple(ids), role, finished) for ids, role, finished in completions),
                row=record["row"],
                **{name: tuple(record[name]) for name in PER_COMPLETION if name in record},
            )
