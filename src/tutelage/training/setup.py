"""The parts of training in stages, made as the settings of a run say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.models.weights import WeightSet
from tutelage.sampling import Sampler, TransformersSampler
from tutelage.training.rollout import Rollout
from tutelage.training.stage_config import StageConfig
from tutelage.training.stages import Phase, Stages
from tutelage.training.store import StageStore

if TYPE_CHECKING:
    from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["make_rollout", "make_stages", "make_store"]


def make_store(trainer: DemonstrationTrainer) -> StageStore:
    """Where the run's stages lie on disk."""
    folder = Path(str(trainer.args.output_dir)) / "stages"
    return StageStore(folder, _settings(trainer).sample_settings(), trainer.tokenization.text)


def make_rollout(
    trainer: DemonstrationTrainer,
    sampler: Sampler | None,
    *,
    reference_is_initial: bool,
    keep_old: bool = False,
) -> Rollout:
    """What samples and scores: by default with the model in memory.

    Args:
        sampler: in its place.
        reference_is_initial, keep_old: as for ``Rollout``.

    Raises:
        UserError: the model cannot be sampled from.
    """
    args = _settings(trainer)
    return Rollout(
        sampler
        or TransformersSampler(
            trainer.policy, batch_size=args.sampling_batch_size, pad_token_id=trainer.tokenization.pad_id
        ),
        args.sampling_params(trainer.tokenization.stop_ids(trainer.conversational)),
        trainer.scorer,
        num_samples=args.num_samples,
        initial=WeightSet(trainer.policy) if reference_is_initial else None,
        reference_is_initial=reference_is_initial,
        keep_old=keep_old,
        tolerance=args.sampler_logps_tolerance,
    )


def make_stages(
    trainer: DemonstrationTrainer,
    rollout: Rollout,
    store: StageStore,
    phase: Phase,
    *,
    draws_per_stage: int | None = 1,
    epochs: int = 1,
) -> Stages:
    """The stages, with a phase of the algorithm's.

    Args:
        draws_per_stage, epochs: as for ``Stages``.
    """
    args = _settings(trainer)
    return Stages(
        rollout,
        store,
        phase,
        stages_per_epoch=args.stages_per_epoch,
        draws_per_stage=draws_per_stage,
        epochs=epochs,
        piece=max(1, 4 * args.sampling_batch_size // args.num_samples),
        save_each_stage=args.save_each_stage,
        keep=args.keep_stages,
        check=trainer.check_weights,
        log=trainer.log,
        costs=trainer.costs,
        progress=trainer.progress,
    )


def _settings(trainer: DemonstrationTrainer) -> StageConfig:
    assert isinstance(trainer.args, StageConfig)
    return trainer.args
