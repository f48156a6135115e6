"""The losses of SFT: of each kind the settings that it reads, what it needs to know beside the tokens, and the loss itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from tutelage.losses import DivergenceKind, asft_loss, dft_loss, psft_loss, sequence_weights, sft_loss
from tutelage.results import Curve
from tutelage.scoring.logps import TokenLogps
from tutelage.training.earlier import AnchoredLogps, OldLogps, StartLogps
from tutelage.training.metrics import Track
from tutelage.training.sharding import refuse_sharded
from tutelage.training.teacher import StartTeacher

if TYPE_CHECKING:
    from tutelage.algorithms.sft import SFTConfig
    from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["CURVES", "LOSS_KINDS", "LossKind"]

Losses = Callable[[TokenLogps, "SFTConfig", Track], Tensor]
"""Losses of a micro-batch of demonstrations, of tokens or of sequences: their sum is divided by the tokens of the step."""


@dataclass(frozen=True, slots=True)
class LossKind:
    """A loss of SFT.

    Attributes:
        losses: from the tokens' log-probs; tracks what there is to log.
        settings: those that this kind alone reads, with their defaults.
        prepare: hands the trainer what the loss needs to know of other policies; before training.
        uses_dropout: whether the policy trains with dropout, where its model has some.
    """

    losses: Losses
    settings: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[DemonstrationTrainer, SFTConfig], None] = lambda trainer, args: None
    uses_dropout: bool = True


def _nll(tokens: TokenLogps, args: SFTConfig, track: Track) -> Tensor:
    return sft_loss(tokens.logps_N)


def _dft(tokens: TokenLogps, args: SFTConfig, track: Track) -> Tensor:
    return dft_loss(tokens.logps_N)


def _asft(tokens: TokenLogps, args: SFTConfig, track: Track) -> Tensor:
    assert tokens.divergence_N is not None
    assert args.anchor_weight is not None
    track("tokens/divergence_from_start", tokens.divergence_N)
    return asft_loss(tokens.logps_N, tokens.divergence_N, weight=args.anchor_weight)


def _anchor(trainer: DemonstrationTrainer, args: SFTConfig) -> None:
    refuse_sharded(trainer, "--loss_kind asft")
    kind = cast(DivergenceKind, f"{args.anchor_kl}_kl")
    trainer.measure = AnchoredLogps(StartTeacher(trainer.start), kind)


def _psft(tokens: TokenLogps, args: SFTConfig, track: Track) -> Tensor:
    assert args.clip_range is not None
    old_logps_N = tokens.known("old_logps")
    # In logs: the exponential of a clipped log-ratio may be rounded below 1 + ε.
    track("tokens/clip_fraction", (tokens.logps_N.detach() - old_logps_N >= math.log1p(args.clip_range)).float())
    return psft_loss(tokens.logps_N, old_logps_N, clip_range=args.clip_range)


def _know_old(trainer: DemonstrationTrainer, args: SFTConfig) -> None:
    assert args.old_policy_steps is not None
    earlier = OldLogps(trainer.scorer, args.old_policy_steps)
    trainer.earlier = earlier
    trainer.checkpointed.append(earlier)


def _iw(tokens: TokenLogps, args: SFTConfig, track: Track) -> Tensor:
    assert args.weight_temperature is not None
    assert args.weight_limit is not None
    logps_C = tokens.sums()
    weights_C = sequence_weights(
        logps_C,
        tokens.values("start_logp"),
        tokens.lengths(),
        temperature=args.weight_temperature,
        limit=args.weight_limit,
    )
    track("demonstrations/weight", weights_C)
    return weights_C * sft_loss(logps_C)


def _know_start(trainer: DemonstrationTrainer, args: SFTConfig) -> None:
    if trainer.train_dataset is not None:
        trainer.earlier = StartLogps(trainer.scorer, trainer.train_dataset, trainer.progress)


LOSS_KINDS = {
    "nll": LossKind(_nll),
    "dft": LossKind(_dft),
    "asft": LossKind(_asft, {"anchor_weight": 0.1, "anchor_kl": "forward"}, _anchor),
    # π_old was scored without dropout, and ratios should start at 1.
    "psft": LossKind(_psft, {"clip_range": 0.28, "old_policy_steps": 8}, _know_old, uses_dropout=False),
    "iw": LossKind(_iw, {"weight_temperature": 1.0, "weight_limit": 16.0}, _know_start),
}

CURVES = (
    Curve("tokens/divergence_from_start", "Divergence from the start", "nats per token of the demonstrations", "Loss"),
    Curve("tokens/clip_fraction", "Clipped tokens", "share that has no gradient", "Loss"),
    Curve("demonstrations/weight", "Importance weight", "mean over demonstrations", "Loss"),
)
"""What only some of the losses log."""
