"""Stages: sample from the policy as it stands, let a phase prepare what is trained on, hand out the steps, go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from tutelage.errors import DamagedFileError, UserError
from tutelage.groups import Group
from tutelage.progress import Progress
from tutelage.results import CandidateRecord
from tutelage.rewards.base import Reward
from tutelage.training.best_stage import BEST_FILES, BestStage
from tutelage.training.manifest import Manifest
from tutelage.training.metrics import Costs
from tutelage.training.rollout import Rollout
from tutelage.training.schedule import Draw, StageEpochs, StageSchedule
from tutelage.training.store import SAMPLES, StageStore
from tutelage.training.termination import leave_if_asked

__all__ = ["Phase", "Stages", "distinct_n"]


class Phase(Protocol):
    """What an algorithm does between sampling and the optimizer steps of a stage."""

    @property
    def reward(self) -> Reward | None:
        """A reward that it learns, if it does."""
        ...

    @property
    def chooses(self) -> bool:
        """Whether it sets the policy back to the best that it saw when it is told to ``finish``."""
        ...

    @property
    def selection(self) -> list[CandidateRecord]:
        """The policies that it chose from, as results.json holds them; empty where it chooses nothing."""
        ...

    def prepare(
        self, draw: Draw, recorded: dict[int, Group], *, policy: str | None
    ) -> tuple[dict[int, list[Group]], Mapping[str, float]]:
        """What the optimizer steps of a draw train on; a stage has one draw or several.

        Args:
            draw: its numbers.
            recorded: all its groups by row, with samples and reference log-probs, in the order of the record.
            policy: fingerprint of the policy where it begins; None for a run resumed inside it.

        Returns:
            for each row the groups to train on, and what there is to log.
        """
        ...

    def reads_from(self, stage: int) -> int:
        """The first stage whose files it reads when this one begins; the stage itself where it reads none."""
        ...

    def samples_from(self, stage: int) -> int:
        """The first stage whose samples it reads when this one begins or goes on; the stage itself where it reads no others."""
        ...

    def still_reads(self, stage: int, upcoming: int) -> Sequence[str]:
        """Patterns of the files of a stage, besides its samples, that are read in the stage ``upcoming`` or a later one."""
        ...

    def leaves(self, stage: int) -> Sequence[str]:
        """Names of the files that it leaves of a stage, once that is prepared."""
        ...

    def finish(self, stage: int) -> None:
        """The last step of the run has been taken, in this stage."""
        ...

    def export(self, folder: Path) -> None:
        """Write what it leaves beside the policy."""
        ...


class Stages:
    """The stages of a run. Each owns consecutive optimizer steps and samples once, or several times: in draws.

    At a draw's first step the prompts of all its steps are taken from the data loader; the policy samples for them;
    reference log-probs are computed once and kept; the phase prepares what is trained on; then the steps are handed
    out. Everything sampled lies in the store, and a killed run goes on from there.

    Args:
        rollout: draws samples and scores them.
        store: keeps them.
        phase: what the algorithm does with them.
        stages_per_epoch: T.
        draws_per_stage: how often a stage samples; None for once per optimizer step.
        epochs: how often the steps of a draw go over its samples.
        piece: prompts that are sampled and written at a time.
        save_each_stage: ask for a checkpoint where a stage ends.
        keep: of how many stages the samples stay on the disk, of those that are read no more; None for all.
        check: raises if the policy's weights are not finite: nothing can be sampled from them.
        log: takes what a stage's beginning has to tell.
        watch: told the stage and what was logged of its samples; True if the run is to end there.
        best: of the policies with which stages begin, the best one; None where none is kept.
        costs, progress: as in the trainer.
    """

    def __init__(
        self,
        rollout: Rollout,
        store: StageStore,
        phase: Phase,
        *,
        stages_per_epoch: int,
        draws_per_stage: int | None = 1,
        epochs: int = 1,
        piece: int,
        save_each_stage: bool = True,
        keep: int | None = None,
        check: Callable[[], None],
        log: Callable[[dict[str, float]], None],
        watch: Callable[[int, dict[str, float]], bool] = lambda stage, facts: False,
        best: BestStage | None = None,
        costs: Costs,
        progress: Progress,
    ):
        self.rollout, self.store, self.phase = rollout, store, phase
        self.stages_per_epoch, self.draws_per_stage = stages_per_epoch, draws_per_stage
        self.epochs, self.piece = epochs, piece
        self.save_each_stage, self.keep = save_each_stage, keep
        self._check, self._log, self.costs, self.progress = check, log, costs, progress
        self._watch, self.best, self.has_ended = watch, best, False
        self.schedule: StageSchedule | None = None
        self.draws: StageSchedule | None = None
        self.stage = -1
        self._steps: deque[list[list[Group]]] = deque()
        self._begun: list[Draw] = []

    def plan(self, steps_per_epoch: int) -> None:
        """Lay the stages over an epoch of so many optimizer steps, repetitions included.

        Raises:
            UserError: they do not fit.
        """
        self.schedule = StageSchedule(steps_per_epoch // self.epochs, self.stages_per_epoch, self.epochs)
        self.draws = self.schedule.of_draws(self.draws_per_stage)
        self._steps.clear()

    @property
    def planned(self) -> dict[str, int]:
        """The schedule, for the record of the run."""
        assert self.schedule is not None
        assert self.draws is not None
        return {
            "optimizer_steps_per_epoch": self.schedule.steps_per_epoch * self.epochs,
            "stages_per_epoch": self.schedule.stages_per_epoch,
            "samplings_per_epoch": self.draws.stages_per_epoch,
        }

    def repeated(self, batches: Collection[list[int]], accumulation: int) -> StageEpochs:
        """The batches of an epoch, those of each draw as often as the steps go over them."""
        once = StageSchedule(-(-len(batches) // accumulation), self.stages_per_epoch)
        return StageEpochs(batches, accumulation, once.of_draws(self.draws_per_stage).stages_per_epoch, self.epochs)

    def next_step(self, step: int, max_steps: int, take: Callable[[], list[list[Group]]]) -> list[list[Group]]:
        """The micro-batches of an optimizer step; begins a draw when no step is left of the last one.

        Args:
            step: how many optimizer steps have been taken.
            max_steps: of the run.
            take: gives the demonstrations of the next optimizer step.
        """
        if (
            not self._steps and step < max_steps and not self.has_ended
        ):  # a finished run that is resumed has no stage to begin
            self._begin(step, max_steps, take)
        return self._steps.popleft() if self._steps else []

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due after so many optimizer steps, because a stage ends there."""
        assert self.schedule is not None
        return self.save_each_stage and self.schedule.bounds(self.schedule.stage_of(step - 1))[1] == step

    def made(self, step: int) -> int:
        """How many stages made the policy after so many steps; one that is not over counts."""
        assert self.schedule is not None
        return self.schedule.stage_of(step - 1) + 1 if step else 0

    def finish(self, step: int) -> None:
        """The run has taken its last step.

        Raises:
            DamagedFileError: files of its stages are gone.
        """
        assert self.schedule is not None
        if self.stage < 0:  # resumed where training had ended
            self.stage = self.schedule.stage_of(step - 1)
        for path in self._left_by(self._begun, self.stage + 1):
            if not Manifest(path.parent).has(path.name):
                raise DamagedFileError(
                    "is gone: files of the run's stages were removed while it was on.",
                    remedy="Run again with --resume: what is missing is made again.",
                    file=str(path),
                )
        self.phase.finish(self.stage)
        self.rollout.finish()

    def lacks(self, step: int, damaged: Collection[Path]) -> Path | None:
        """What a run that goes on from a checkpoint of this step would read, and is not there as it was written.

        Args:
            damaged: as ``StageStore.mend`` gives them.
        """
        assert self.schedule is not None
        read = self._left_by(self._read_at(step), self.phase.samples_from(self.schedule.stage_of(step)))
        folders = {path.parent for path in read}
        for path in damaged:
            if any(folder in path.parents for folder in folders):
                return path
        return next((path for path in read if not Manifest(path.parent).has(path.name)), None)

    def _read_at(self, step: int) -> list[Draw]:
        """The draws of earlier steps whose files are read after so many steps."""
        assert self.schedule is not None
        assert self.draws is not None
        if step == 0:
            return []
        stage = self.schedule.stage_of(step)  # of the step that comes next
        first = self.phase.reads_from(stage)
        last = self.draws.stage_of(step - 1)
        draws = (self._draw_of(self.draws.bounds(number)[0]) for number in range(last + 1))
        return [draw for draw in draws if draw.stage >= first]

    def tidy(self, steps: Sequence[int]) -> None:
        """Remove files of stages that a run with checkpoints of these steps reads no more, but for the newest ``keep`` stages.

        Of a stage there remain its manifest, and what the phase says that later stages read.
        """
        assert self.schedule is not None
        if not steps:
            return
        upcoming = self.schedule.stage_of(min(steps))
        newest = self.schedule.stage_of(max(steps) - 1)
        if self.best is not None:
            self.best.tidy(upcoming, newest)
        if self.keep is None:
            return
        best = self.best.needed(upcoming, newest) if self.best else ()
        for stage in range(min(self.phase.samples_from(upcoming), newest + 1 - self.keep)):
            kept = BEST_FILES if stage in best else ()
            self.store.drop(stage, [*self.phase.still_reads(stage, upcoming), *kept])

    def _left_by(self, draws: Sequence[Draw], samples_from: int) -> list[Path]:
        """The files that draws leave, whatever the phase does.

        Args:
            samples_from: the samples of earlier stages may have been removed.
        """
        found = []
        for draw in draws:
            names = [SAMPLES] if draw.index else [SAMPLES, *self.phase.leaves(draw.stage)]
            if draw.stage < samples_from and self.store.is_dropped(draw.stage):
                kept = () if draw.index else self.phase.still_reads(draw.stage, samples_from)
                names = [name for name in names if any(fnmatch(name, pattern) for pattern in kept)]
            found += [self.store.path(draw.stage, draw.index) / name for name in names]
        return found

    # --- a stage ----------------------------------------------------------------------------------------------------

    def _begin(self, step: int, max_steps: int, take: Callable[[], list[list[Group]]]) -> None:
        draw = self._draw_of(step)
        self.stage = draw.stage
        assert self.draws is not None
        first, end = self.draws.bounds(draw.number)
        end = min(end, max_steps)
        steps = [take() for _ in range(step, end)]
        if not all(steps):
            raise UserError(
                f"the data end after {step + sum(map(bool, steps))} of {max_steps} optimizer steps.",
                remedy="Lower --max_steps, or give a stream that is long enough (IterableDataset.repeat).",
                field="max_steps",
            )
        demonstrations = {group.row: group for batches in steps for batch in batches for group in batch}
        policy = None
        if step == first:
            self._check()
            gap = self.store.manifest(draw.stage).get("samples/logp_gap") if draw.index else None
            policy = self.rollout.begin(gap=gap)
        recorded = self._recorded(list(demonstrations.values()), policy, step, draw)
        if policy is not None and draw.index == 0:
            groups = [recorded[row] for row in demonstrations]
            found = sample_facts(groups) | self._facts_of_demonstrations(groups) | self._gap()
            self._log(dict(found))
            if self.best is not None:
                self.best.look(draw.stage)
            if self._watch(draw.stage, found):
                self.stage, self.has_ended = draw.stage - 1, True
                return
        prepared, facts = self.phase.prepare(draw, recorded, policy=policy)
        if facts:
            self._log(dict(facts))
        self._begun.append(draw)
        for batches in steps:
            self._steps.append([[group for entry in batch for group in prepared[entry.row]] for batch in batches])

    def _facts_of_demonstrations(self, groups: Sequence[Group]) -> dict[str, float]:
        """Log-prob of the demonstrations under the policy as it stands, and under the start where it was asked (nats per token)."""
        demonstrations = [completion for group in groups for completion in group.demonstrations]
        tokens = sum(len(completion.token_ids) for completion in demonstrations)

        def mean(name: str) -> float:
            return sum(completion.sum(name) for completion in demonstrations) / tokens

        if not tokens:
            return {}
        has_old = all("old_logps" in completion.token_values for completion in demonstrations)
        is_start = self.rollout.reference_is_initial
        found: dict[str, float] = {}
        if has_old or not is_start or not self.rollout.has_moved:
            found["demonstrations/logp_per_token"] = mean("old_logps" if has_old else "reference_logps")
            if is_start:
                found["demonstrations/logp_per_token_start"] = mean("reference_logps")
        return found

    def _draw_of(self, step: int) -> Draw:
        assert self.schedule is not None
        assert self.draws is not None
        number, stage = self.draws.stage_of(step), self.schedule.stage_of(step)
        return Draw(number, stage, number - self.draws.stage_of(self.schedule.bounds(stage)[0]))

    def _recorded(self, demonstrations: list[Group], policy: str | None, step: int, draw: Draw) -> dict[int, Group]:
        """Samples and reference log-probs of the draw's rows: from disk if they are there, else computed now."""
        recorded = self.store.read(draw.stage, policy, draw.index)
        # A record of other data, or of the same data in another template, is none.
        missing = [group for group in demonstrations if not _is_record(recorded.get(group.row), group)]
        if policy is None:
            if missing:
                raise UserError(
                    f"stage {draw.stage} has no samples for row {missing[0].row}: the data differ from the first run's.",
                    remedy="Resume with the same data, seed and batch size.",
                    file=str(self.store.path(draw.stage, draw.index)),
                )
            return recorded
        kept = [recorded[group.row] for group in demonstrations if _is_record(recorded.get(group.row), group)]
        facts: dict[str, Any] = {"step": step, "rows": len(demonstrations)}
        before = dict(self.costs.seconds)

        def all_facts() -> dict[str, Any]:
            seconds = {
                f"seconds_{what}": self.costs.seconds[what] - before.get(what, 0.0)
                for what in ("sampling", "reference")
            }
            return facts | seconds | self._gap()

        sampled = self._sampled(missing, kept, draw)
        recorded = self.store.write(draw.stage, policy, kept, sampled, all_facts, draw.index)
        self.costs.sampled_tokens += sum(len(c.token_ids) for group in recorded.values() for c in group.samples)
        return recorded

    def _gap(self) -> dict[str, float]:
        gaps = {"samples/logp_gap": self.rollout.gap, "sampler/logp_gap": self.rollout.sampler_gap}
        return {name: gap for name, gap in gaps.items() if gap is not None}

    def _sampled(self, missing: list[Group], kept: list[Group], draw: Draw) -> Iterator[list[Group]]:
        """Samples and scores some prompts at a time; each piece is on disk before the next begins."""
        if kept and (len(kept) >= self.piece or not missing):  # a killed run measured on the same groups
            self.rollout.measure_if_asked(kept[: self.piece])
        done = len(kept)
        with (
            self.progress.phase(f"stage {draw.stage}: sampling", done + len(missing)) as advance,
            closing(self.rollout.draw_in_pieces(missing, self.piece, stage=draw.number)) as pieces,
        ):
            while True:
                with self.costs.timed("sampling"):
                    sampled = next(pieces, None)
                if sampled is None:
                    break
                with self.costs.timed("reference"):
                    scored = self.rollout.score(sampled)
                yield scored
                done += len(scored)
                advance(done)
                leave_if_asked(self.rollout.scorer.processes.any)


def sample_facts(groups: Sequence[Group]) -> dict[str, float]:
    """What the samples of a stage look like, for its first log line."""
    samples = [completion for group in groups for completion in group.samples]
    demonstrations = [completion for group in groups for completion in group.demonstrations]
    copies = sum(s.token_ids in {d.token_ids for d in g.demonstrations} for g in groups for s in g.samples)
    shown = {"length/demonstrations": _mean([len(c.token_ids) for c in demonstrations])} if demonstrations else {}
    return {
        "pairs/dropped": copies,
        "samples/truncated_fraction": _mean([not c.finished for c in samples]),
        "samples/distinct_1": distinct_n([c.token_ids for c in samples], 1),
        "samples/distinct_2": distinct_n([c.token_ids for c in samples], 2),
        **shown,
        "length/samples": _mean([len(c.token_ids) for c in samples]),
    }


def _is_record(recorded: Group | None, group: Group) -> bool:
    """Whether a recorded group is of this prompt and these demonstrations."""
    return (
        recorded is not None
        and recorded.prompt_ids == group.prompt_ids
        and recorded.teacher_prompt_ids == group.teacher_prompt_ids
        and recorded.demonstrations == group.demonstrations
    )


def distinct_n(completions: Sequence[Sequence[int]], n: int) -> float:
    """Fraction of distinct n-grams among all n-grams of the completions (Li et al. 2016, arXiv 1510.03055).

    >>> distinct_n([(1, 2, 1), (1, 2)], 1)
    0.4
    """
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
