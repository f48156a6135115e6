"""The parts of training in stages, made as the settings of a run say."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage.errors import UserError
from tutelage.models.weights import WeightSet
from tutelage.sampling import Sampler, TransformersSampler
from tutelage.sampling.vllm import VLLMSampler, check_adapter
from tutelage.sampling.vllm_server import VLLMServer, parse_urls
from tutelage.training.best_stage import BestStage
from tutelage.training.remote import SharedSampler
from tutelage.training.rollout import Rollout
from tutelage.training.sharding import refuse_sharded
from tutelage.training.stage_config import StageConfig
from tutelage.training.stages import Phase, Stages
from tutelage.training.store import StageStore

if TYPE_CHECKING:
    from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["make_rollout", "make_stages", "make_store"]


def make_store(trainer: DemonstrationTrainer) -> StageStore:
    """Where the run's stages lie on disk."""
    folder = Path(str(trainer.args.output_dir)) / "stages"
    return StageStore(folder, _settings(trainer).sample_settings(), trainer.tokenization.text, trainer.processes)


def make_rollout(
    trainer: DemonstrationTrainer,
    sampler: Sampler | None,
    *,
    reference_is_initial: bool,
    keep_old: bool = False,
    scores_samples: bool = True,
) -> Rollout:
    """What samples and scores.

    Args:
        sampler: draws; by default what the settings name.
        reference_is_initial, keep_old, scores_samples: as for ``Rollout``.

    Raises:
        UserError: the model cannot be sampled from, or its adapter is not served by vLLM.
    """
    args = _settings(trainer)
    return Rollout(
        sampler or _make_sampler(trainer, args),
        args.sampling_params(trainer.tokenization.stop_ids(trainer.conversational)),
        trainer.scorer,
        num_samples=args.num_samples,
        initial=WeightSet(trainer.policy) if reference_is_initial else None,
        reference_is_initial=reference_is_initial,
        keep_old=keep_old,
        tolerance=args.sampler_logps_tolerance,
        scores_samples=scores_samples,
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

    Raises:
        UserError: there are no rows to find the best stage by.
    """
    args = _settings(trainer)
    best = None
    if args.keeps_best_stage:
        field = "load_best_stage_at_end" if args.load_best_stage_at_end else "on_collapse"
        if trainer.evaluation_set is None:
            raise UserError(
                "there are no held-out rows to find the best stage by.", remedy="Add --eval_dataset_name.", field=field
            )
        metric = "score_sampled" if args.verifier else "demonstration_logp"
        best = BestStage(store, trainer.policy, lambda: trainer.evaluate()[f"eval_{metric}"], metric)
    elif args.on_collapse == "best" and not phase.chooses:
        raise UserError(
            "there are no validation rows to find the best stage by.",
            remedy="Use --validation_rows or --validation_dataset.",
            field="on_collapse",
        )
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
        watch=trainer.watch_for_collapse,
        best=best,
        costs=trainer.costs,
        progress=trainer.progress,
    )


def _make_sampler(trainer: DemonstrationTrainer, args: StageConfig) -> Sampler:
    if args.sampler == "transformers":
        return TransformersSampler(
            trainer.policy, batch_size=args.sampling_batch_size, pad_token_id=trainer.tokenization.pad_id
        )
    refuse_sharded(trainer, "--sampler vllm")
    check_adapter(trainer.policy)
    processes = trainer.processes
    if processes.count == 1:
        return _vllm_sampler(args)
    return SharedSampler(_vllm_sampler(args) if processes.is_main else None, processes)


def _vllm_sampler(args: StageConfig) -> VLLMSampler:
    return VLLMSampler(
        [VLLMServer(url, timeout=args.vllm_timeout) for url in parse_urls(str(args.vllm_url))],
        _folder(args),
        concurrency=args.vllm_concurrency,
        tolerance=args.vllm_tolerance,
    )


def _folder(args: StageConfig) -> Path:
    """Where weights are handed over; runs that share --vllm_folder have folders of their own in it."""
    output = Path(str(args.output_dir)).absolute()
    if args.vllm_folder is None:
        return output / "vllm"
    return Path(args.vllm_folder) / f"{output.name}-{hashlib.sha256(str(output).encode()).hexdigest()[:8]}"


def _settings(trainer: DemonstrationTrainer) -> StageConfig:
    assert isinstance(trainer.args, StageConfig)
    return trainer.args
