"""What the trainer does between steps."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from tutelage.errors import Terminated
from tutelage.training.checkpoints import RandomState
from tutelage.training.sharding import begin_sharded
from tutelage.training.termination import is_asked, leave_if_asked

if TYPE_CHECKING:
    from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["CostsInCheckpoints", "Guard", "StageEnd", "StopAtScore", "Termination"]


class Guard(TrainerCallback):
    """Begins a sharded run, stops before an optimizer step with a non-finite gradient, measures time, reports progress."""

    def __init__(self, trainer: DemonstrationTrainer):
        self.trainer = trainer
        self.begun = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        begin_sharded(self.trainer.policy)
        self.trainer.progress.steps(state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.check_step()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.random_state = RandomState.now()
        self.trainer.costs.seconds["training"] += time.perf_counter() - self.begun
        self.trainer.progress.steps(state.global_step, state.max_steps)


class CostsInCheckpoints(TrainerCallback):
    """Writes the run's costs so far into its checkpoints, so that a resumed run includes them."""

    key = "tutelage_costs"

    def __init__(self, trainer: DemonstrationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if costs := cast(dict[str, Any], state.stateful_callbacks).get(self.key):
            self.trainer.costs.load_state_dict(costs)

    def on_step_end(self, args, state, control, **kwargs):
        cast(dict[str, Any], state.stateful_callbacks)[self.key] = self.trainer.costs.state_dict()


class StageEnd(TrainerCallback):
    """Asks for a checkpoint where a stage ends."""

    def __init__(self, trainer: DemonstrationTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        stages = self.trainer.stages
        if stages is not None and stages.saves_after(state.global_step):
            control.should_save |= args.save_strategy != IntervalStrategy.NO


class StopAtScore(TrainerCallback):
    """Stops after the first epoch with which the sampled answers to the held-out rows have reached a mean score."""

    def __init__(self, trainer: DemonstrationTrainer, score: float):
        self.trainer, self.score = trainer, score

    def on_epoch_end(self, args, state, control, **kwargs):
        trainer, rows = self.trainer, self.trainer.evaluation_set
        assert rows is not None
        with trainer.costs.timed("evaluation"):
            found = trainer.evaluation(rows).metrics()["score_sampled"]
        control.should_training_stop |= found >= self.score


class Termination(TrainerCallback):
    """Where the process is asked to end: a checkpoint after the step, and then the end."""

    def __init__(self, trainer: DemonstrationTrainer):
        self.trainer = trainer
        self.asked = False

    def on_step_end(self, args, state, control, **kwargs):
        self.asked = self.trainer.processes.any(is_asked())
        control.should_save |= self.asked

    def on_save(self, args, state, control, **kwargs):
        if self.asked:
            raise Terminated
        leave_if_asked()
