"""Samples for the demonstrated prompts that are not the policy's own, drawn once per run and kept on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.errors import UserError
from tutelage.groups import Group
from tutelage.models.weights import WeightSet
from tutelage.progress import Progress
from tutelage.rewards.comparisons import NegativeKind
from tutelage.training.folds import Folds
from tutelage.training.gate import copied_share
from tutelage.training.manifest import Manifest
from tutelage.training.metrics import Costs
from tutelage.training.rollout import Rollout
from tutelage.training.store import FORMAT, StageStore

__all__ = ["NEGATIVES", "Negatives", "parse_negatives"]

logger = logging.getLogger(__name__)

NEGATIVES: tuple[NegativeKind, ...] = ("own", "initial", "out_of_fold")
"""Where samples come from that a reward puts demonstrations above: the policy of the stage, the model before SFT, and
policies that were trained on other folds of the demonstrations."""

_DRAW = 1 << 22  # names these samples in the random stream; those of the stages count from 0


def parse_negatives(text: str) -> tuple[NegativeKind, ...]:
    """Names separated by commas, in the order of ``NEGATIVES``.

    Raises:
        UserError: an unknown name, or none.

    >>> parse_negatives("out_of_fold, own")
    ('own', 'out_of_fold')
    """
    names = {name.strip() for name in text.split(",") if name.strip()}
    unknown = sorted(names - set(NEGATIVES))
    if unknown or not names:
        raise UserError(
            f"must be one or several of {', '.join(NEGATIVES)}, separated by commas, not {text!r}.",
            field="reward_negatives",
        )
    return tuple(kind for kind in NEGATIVES if kind in names)


class Negatives:
    """Samples of the initial model and of out-of-fold policies for the demonstrated prompts.

    They lie in ``stages/negatives``. What a killed run had finished is not made again.

    Args:
        kinds: which of ``NEGATIVES``; ``own`` is not drawn here, because every stage has its own.
        groups: the demonstrations.
        rollout: draws.
        store: of the run.
        base: the weights of the initial model; asked for only when something is drawn.
        folds: of the out-of-fold policies, likewise.
        settings: what they depend on besides what the samples of a stage do; JSON values.
        costs, progress: as in the trainer.
    """

    def __init__(
        self,
        kinds: Sequence[NegativeKind],
        groups: Sequence[Group],
        rollout: Rollout,
        store: StageStore,
        base: Callable[[], WeightSet],
        folds: Callable[[], Folds],
        *,
        settings: Mapping[str, Any],
        costs: Costs,
        progress: Progress,
    ):
        self.kinds, self._groups, self.rollout, self.store = tuple(kinds), list(groups), rollout, store
        self._base, self.folds = base, folds
        self.settings, self.costs, self.progress = settings, costs, progress
        self._found: dict[str, list[Group]] | None = None

    def groups(self) -> dict[str, list[Group]]:
        """By kind, the demonstrations with their negatives; drawn at the first call of a run.

        Raises:
            UserError: those on disk are of other demonstrations or settings.
        """
        if self._found is None:
            found: dict[str, list[Group]] = {}
            if "initial" in self.kinds:
                found["initial"] = self._kept("initial", self._groups, self._initial)
            if "out_of_fold" in self.kinds:
                found["out_of_fold"] = [
                    group
                    for fold in range(self.folds().settings.num_folds)
                    for group in self._kept(
                        f"out_of_fold-{fold}", self.folds().members(fold), lambda fold=fold: self._of_fold(fold)
                    )
                ]
            self._found = found
            for kind, groups in found.items():
                if (share := copied_share(groups)) > 0.5:
                    logger.warning(
                        "%.0f%% of the negatives '%s' equal the demonstration: the model that they come from was trained on "
                        "the demonstrations. Name the model before SFT: --base_model_name_or_path",
                        100 * share,
                        kind,
                    )
        return self._found

    def count(self) -> None:
        """Add what they cost to the costs of the run, whichever process drew them. Once per run."""
        groups = [group for found in self.groups().values() for group in found]
        self.costs.sampled_tokens += sum(len(c.token_ids) for group in groups for c in group.samples)
        if (self.store.folder / "negatives" / "folds.json").exists():  # the likelihood needs them too, and draws none
            self.costs.policy_tokens += self.folds().trained_tokens()

    def _initial(self) -> list[Group]:
        with self.progress.phase("sampling from the initial model"):
            return self.rollout.draw(self._groups, stage=_DRAW, weights=self._base())

    def _of_fold(self, fold: int) -> list[Group]:
        folds = self.folds()
        members = folds.members(fold)
        label = f"SFT without fold {fold}"
        with self.progress.phase(label, folds.steps(len(folds.groups) - len(members))) as advance:
            weights = folds.weights(fold, advance)
        with self.progress.phase(f"sampling for fold {fold}"):
            return self.rollout.draw(members, stage=_DRAW + 1 + fold, weights=weights)

    def _kept(self, name: str, demonstrations: Sequence[Group], draw: Callable[[], list[Group]]) -> list[Group]:
        """The groups of a file of the run's, which is written first if it is not there."""
        folder = self.store.folder / "negatives"
        if not self.store.processes.on_main(lambda: self._has(folder, f"{name}.jsonl")):
            with self.costs.timed("negatives"):
                drawn = draw()
            self.store.write_file(folder / f"{name}.jsonl", drawn)
        found = self.store.read_file(folder / f"{name}.jsonl")
        if [_what(group) for group in found] != [_what(group) for group in demonstrations]:
            raise UserError(
                "the negatives were drawn for other demonstrations.",
                remedy="Resume with the data of the first run.",
                file=str(folder / f"{name}.jsonl"),
            )
        return found

    def _has(self, folder: Path, name: str) -> bool:
        """Whether a file is there; what it depends on is noted, or held against what is noted. For one process."""
        self.store.make(folder)
        manifest, settings = Manifest(folder), {**self.store.settings, **self.settings}
        if "settings" not in (noted := manifest.read()):
            manifest.note(format=FORMAT, settings=settings)
        elif noted["settings"] != settings:
            raise UserError(
                "the negatives were drawn from another start or base, or under other settings.",
                remedy="Resume with the model and settings of the first run.",
                file=str(manifest.path),
            )
        return manifest.has(name)


def _what(group: Group) -> tuple[Any, ...]:
    return group.row, group.prompt_ids, group.demonstrations
