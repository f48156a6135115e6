"""The optimizer and the schedule that the settings name, tried on a small weight before training."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from tutelage.errors import UserError
from tutelage.models.paths import first_line

__all__ = ["check_optimization"]

_STEPS = 10
_OF_MODELS = {"params", "model", "optimizer_dict"}
"""Options of optimizers that go over a model's own weights, and are not tried on another."""


def check_optimization(args: TrainingArguments, model: nn.Module) -> None:
    """Make the optimizer and the schedule, and take some steps.

    Libraries say what is wrong with their settings when training begins, some of them in the middle of it.

    Args:
        model: for optimizers that are chosen by the model.

    Raises:
        UserError: a package is missing, or a setting is of the wrong kind.
    """
    weight = nn.Parameter(torch.zeros(2, 2))
    name = str(getattr(args.optim, "value", args.optim))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, cast(Any, model))
        if not _OF_MODELS & options.keys():
            kind([weight], **options)
    except Exception as error:  # each library has its own
        raise UserError(
            f"the optimizer '{name}' cannot be made{_with(args.optim_args)}: {first_line(error)}",
            remedy="Install what it needs, correct --optim_args, or use another --optim.",
            field="optim",
        ) from error
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    settings: Any = args.lr_scheduler_kwargs
    try:
        schedule: Any = get_scheduler(
            args.lr_scheduler_type,
            optimizer=torch.optim.SGD([weight], lr=args.learning_rate),
            num_warmup_steps=args.get_warmup_steps(_STEPS),
            num_training_steps=_STEPS,
            scheduler_specific_kwargs=settings,
        )
        for _ in range(_STEPS):
            schedule.optimizer.step()
            schedule.step(*([1.0] if kind in ("reduce_lr_on_plateau", "greedy") else []))
            rates = [group["lr"] for group in schedule.optimizer.param_groups]
            if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
                raise ValueError(f"it gives the learning rate {rates[0]}")
    except Exception as error:
        raise UserError(
            f"the schedule '{kind}' cannot be made{_with(settings)}: {first_line(error)}",
            remedy="Correct --lr_scheduler_kwargs: numbers stand in it without quotes.",
            field="lr_scheduler_kwargs" if settings else "lr_scheduler_type",
        ) from error


def _with(settings: object) -> str:
    return f" with {settings}" if settings else ""
