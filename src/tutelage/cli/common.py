"""What the commands that do not train share once their arguments are good: loading, and precision."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console

from tutelage.cli.parser import columns_of
from tutelage.data import Tokenization, load_dataset
from tutelage.models.loading import check_vocabulary, end_ids, load_model
from tutelage.models.precision import Precision, choose_precision, given_precision, model_size
from tutelage.models.tokenizer import load_tokenizer
from tutelage.terminal import say

__all__ = [
    "computing",
    "load_data",
    "load_policy",
    "load_tokenization",
    "on_device",
    "precision_of",
]


def load_data(options: argparse.Namespace) -> Any:
    """The dataset that the arguments name."""
    return load_dataset(options.dataset_name, config_name=options.dataset_config, split=options.split)


def load_tokenization(options: argparse.Namespace, name: str) -> Tokenization:
    """How a model's prompts and completions become tokens; ``load_policy`` adds what its generation config ends with."""
    return Tokenization(
        load_tokenizer(name, trust_remote_code=options.trust_remote_code),
        options.max_prompt_length,
        options.max_completion_length,
        options.on_long_prompt,
        columns=columns_of(options),
    )


def load_policy(options: argparse.Namespace, name: str, tokenization: Tokenization) -> Any:
    """A language model that knows the tokenizer's tokens, ready to sample from and to score with.

    ``tokenization`` learns which tokens end the model's text.
    """
    weights = precision_of(options, name).weights
    model = load_model(name, dtype=weights, trust_remote_code=options.trust_remote_code)
    check_vocabulary(model, tokenization.tokenizer)
    tokenization.model_end_ids |= end_ids(model, tokenization.tokenizer)
    return on_device(model)


def precision_of(options: argparse.Namespace, name: str) -> Precision:
    """What to compute in: what --dtype says, else what training chooses on this machine. The first model decides."""
    if not hasattr(options, "precision"):
        size = model_size(name, trust_remote_code=options.trust_remote_code)
        if options.dtype is None:
            options.precision = choose_precision(size, frozen=True)
        elif options.dtype == "auto":
            options.precision = given_precision("auto", "--dtype", size and size.stored)
        else:
            options.precision = given_precision(getattr(torch, options.dtype), "--dtype")
    return options.precision


@contextmanager
def computing(options: argparse.Namespace, name: str, console: Console | None) -> Iterator[None]:
    """Within, models compute as in training; the console is told in which precision, and why."""
    precision = precision_of(options, name)
    if console is not None:
        say(console, f"computing in {precision}")
    with precision.autocast(torch.accelerator.current_accelerator() or "cpu"):
        yield


def on_device(model: Any) -> Any:
    """The model on the accelerator, if there is one, with dropout off."""
    return model.to(torch.accelerator.current_accelerator() or "cpu").eval()
