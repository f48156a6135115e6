"""Sides of the rows on training: a repetition is one optimizer step over all prompts of the work.

Both sides of a row train on the same tokens, which each asserts of its own data, with the same optimizer and in the same
precision. The peers have the fastest settings that were found.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import DPOConfig, DPOTrainer
from trl import SFTConfig as PeerSFTConfig
from trl import SFTTrainer as PeerSFTTrainer
from trl.experimental.sdft import SDFTConfig as PeerSDFTConfig
from trl.experimental.sdft import SDFTTrainer as PeerSDFTTrainer

from benchmarks.sides import Turns
from benchmarks.workloads import Work, adapter, groups, rows, touched
from tutelage.algorithms import IRFTConfig, IRFTTrainer, SDFTConfig, SDFTTrainer, SFTConfig, SFTTrainer
from tutelage.groups import Group
from tutelage.models.loading import add_adapter, load_model
from tutelage.sampling import Sample, SamplingParams

__all__ = [
    "MOST_TURNS",
    "GivenSamples",
    "ours_sdft",
    "ours_sft",
    "ours_sft_same_tokens",
    "ours_step",
    "ours_streamed_sft",
    "peer_sdft",
    "peer_sft",
    "peer_step",
]

MOST_TURNS = 8
"""The most repetitions of a side, warm-ups included."""

_SHARED: dict[str, Any] = {
    "train_sampling_strategy": "sequential",  # every step takes the same rows
    "bf16": True,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}

_PEER = {"torch_compile": True, "gradient_checkpointing": False}
"""What makes TRL's steps faster; the batches are all of one shape, so compiling happens once, in the first of them."""


class GivenSamples:
    """A sampler that hands back the samples which the groups hold for their prompts."""

    def __init__(self, step: Sequence[Group]):
        self._samples = {
            group.prompt_ids: [
                Sample(c.token_ids, (0.0,) * len(c.token_ids), c.finished) for c in group.completions[1:]
            ]
            for group in step
        }

    def take_weights(self, policy: nn.Module) -> None:
        """Nothing to do: no policy draws these."""

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams, **_: Any) -> list[list[Sample]]:
        """As every sampler's."""
        return [self._samples[tuple(prompt)] for prompt in prompts]


def ours_step(work: Work, turns: Turns) -> None:
    """A step of IRFT on given samples. The first repetition also scores the reference, of all steps at once."""
    step = groups(work)
    settings = _micro_batches(work)
    model = touched(load_model(work.model_path, dtype=_dtype(work)))
    turns.weights_loaded(**settings)
    trainer = IRFTTrainer(
        model,
        IRFTConfig(
            output_dir=tempfile.mkdtemp(),
            stages_per_epoch=1,
            num_train_epochs=1,
            num_samples=work.samples,
            **_limits(work),
            **settings,
            **_SHARED,
        ),
        Dataset.from_list(_demonstrations(work) * MOST_TURNS),
        peft_config=adapter() if work.adapters else None,
        callbacks=[turns.callback()],
        sampler=GivenSamples(step),
    )
    assert _trained(trainer, "demonstration_ids") == _completions(step, 0) * MOST_TURNS
    trainer.train()


def peer_step(work: Work, turns: Turns) -> None:
    """A step of TRL's DPO: chosen is the demonstration, rejected a sample, and the reference is scored beforehand."""
    step = groups(work)
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["samples"][index]}
        for index in range(work.samples)
        for row in rows(work)
    ]
    settings = _PEER | {**_micro_batches(work, len(pairs)), "precompute_ref_log_probs": True}
    model = touched(AutoModelForCausalLM.from_pretrained(work.model_path, dtype=_dtype(work)))
    turns.weights_loaded(**settings)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(output_dir=tempfile.mkdtemp(), max_steps=MOST_TURNS, max_length=None, **settings, **_SHARED),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(work.model_path),
        peft_config=adapter() if work.adapters else None,
        callbacks=[turns.callback()],
    )
    assert _trained(trainer, "chosen_ids") == _completions(step, 0) * work.samples
    assert _trained(trainer, "rejected_ids")[: len(step)] == _completions(step, 1)
    trainer.train()


def ours_sft(work: Work, turns: Turns) -> None:
    """A step of SFT."""
    settings = _micro_batches(work)
    model = touched(load_model(work.model_path, dtype=_dtype(work)))
    turns.weights_loaded(**settings)
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=tempfile.mkdtemp(), max_steps=MOST_TURNS, **_limits(work), **settings, **_SHARED),
        Dataset.from_list(_demonstrations(work)),
        peft_config=adapter() if work.adapters else None,
        callbacks=[turns.callback()],
    )
    assert _trained(trainer, "demonstration_ids") == _completions(groups(work), 0)
    trainer.train()


def ours_sft_same_tokens(work: Work, turns: Turns) -> None:
    """A step of SFT on as many completion tokens as a step of IRFT, and as many at once: a demonstration more for each sample."""
    more = 1 + work.samples
    at_once = _micro_batches(work)["per_device_train_batch_size"]
    ours_sft(replace(work, prompts=work.prompts * more, micro_batch=at_once * more), turns)


def ours_streamed_sft(work: Work, turns: Turns) -> None:
    """SFT on a stream of the rows, 32 per step; a repetition is a whole pass."""
    model = touched(load_model(work.model_path, dtype=_dtype(work)))
    turns.weights_loaded(per_device_train_batch_size=32)
    policy = add_adapter(model, adapter()) if work.adapters else model

    def stream() -> Iterator[dict[str, str]]:
        for start in range(0, work.prompts, 32):
            yield from _demonstrations(replace(work, prompts=32, seed=start))

    while turns.begin():
        SFTTrainer(
            policy,
            SFTConfig(
                output_dir=tempfile.mkdtemp(),
                max_steps=work.prompts // 32,
                per_device_train_batch_size=32,
                **_limits(work),
                **_SHARED,
            ),
            IterableDataset.from_generator(stream),
        ).train()
        turns.end()


def peer_sft(work: Work, turns: Turns) -> None:
    """A step of TRL's SFT, on the completions alone."""
    settings = _PEER | {
        **_micro_batches(work),
        "padding_free": False,
    }
    model = touched(AutoModelForCausalLM.from_pretrained(work.model_path, dtype=_dtype(work)))
    turns.weights_loaded(**settings)
    trainer = PeerSFTTrainer(
        model,
        args=PeerSFTConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=MOST_TURNS,
            max_length=None,
            completion_only_loss=True,
            **settings,
            **_SHARED,
        ),
        train_dataset=Dataset.from_list(_demonstrations(work)),
        processing_class=AutoTokenizer.from_pretrained(work.model_path),
        peft_config=adapter() if work.adapters else None,
        callbacks=[turns.callback()],
    )
    completions = [[token for token in labels if token != -100] for labels in _trained(trainer, "labels")]
    assert completions == _completions(groups(work), 0)
    trainer.train()


_SEEN = "{demonstration} {prompt}"
"""What the teacher sees: the tokenizer has no words for a sentence around them."""


def ours_sdft(work: Work, turns: Turns) -> None:
    """A step of SDFT on given samples; the teacher is the base, with the adapter off."""
    step = groups(work)
    settings = _micro_batches(work)
    model = touched(load_model(work.model_path, dtype=_dtype(work)))
    turns.weights_loaded(**settings)
    trainer = SDFTTrainer(
        model,
        SDFTConfig(
            output_dir=tempfile.mkdtemp(),
            stages_per_epoch=1,
            samplings_per_stage=1,
            num_train_epochs=1,
            num_samples=work.samples,
            average="samples",
            teacher_prompt=_SEEN,
            **_limits(work),
            **settings,
            **_SHARED,
        ),
        Dataset.from_list(_demonstrations(work) * MOST_TURNS),
        peft_config=adapter() if work.adapters else None,
        callbacks=[turns.callback()],
        sampler=GivenSamples(step),
    )
    assert _trained(trainer, "teacher_prompt_ids") == _seen_by_teacher(step) * MOST_TURNS
    trainer.train()


class _Given(PeerSDFTTrainer):
    """TRL's trainer on given samples."""

    given: dict[tuple[int, ...], list[int]]

    def _generate(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        return prompt_ids, [self.given[tuple(ids)] for ids in prompt_ids]


def peer_sdft(work: Work, turns: Turns) -> None:
    """A step of TRL's SDFT on the same samples: forward KL on all logits, and the base as the teacher."""
    step = groups(work)
    settings = {**_micro_batches(work), "gradient_checkpointing": False, "distillation_mode": "full_logits"}
    model = touched(AutoModelForCausalLM.from_pretrained(work.model_path, dtype=_dtype(work)))
    turns.weights_loaded(**settings)
    trainer = _Given(
        model,
        args=PeerSDFTConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=MOST_TURNS,
            num_generations=1,
            distillation_alpha=0.0,
            teacher_prompt_template=_SEEN.replace("demonstration", "privileged_context"),
            shuffle_dataset=False,
            max_completion_length=work.completion_tokens,
            **settings,
            **{name: value for name, value in _SHARED.items() if name != "train_sampling_strategy"},
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": row["prompt"], "privileged_context": row["completion"]} for row in rows(work)]
        ),
        processing_class=AutoTokenizer.from_pretrained(work.model_path),
        peft_config=adapter() if work.adapters else None,
        callbacks=[turns.callback()],
    )
    trainer.given = {group.prompt_ids: list(group.completions[1].token_ids) for group in step}
    args, tokenizer = cast(Any, trainer.args), cast(Any, trainer.processing_class)
    seen = [args.teacher_prompt_template.format(**row) for row in cast(Any, trainer.train_dataset)]
    assert tokenizer(text=seen)["input_ids"] == _seen_by_teacher(step)
    trainer.train()


def _seen_by_teacher(step: Sequence[Group]) -> list[list[int]]:
    """Each demonstration without its end, and the prompt."""
    return [[*group.completions[0].token_ids[:-1], *group.prompt_ids] for group in step]


def _micro_batches(work: Work, rows: int = 0) -> dict[str, int]:
    """How many prompts, or pairs, of a step either side runs at once.

    With adapters 2 by default: a third of the memory of all 8, and a tenth slower on Gemma. 8 where all parameters are trained, because
    each micro-batch adds a gradient of every weight to the last one's, 671 MB of it the head's alone on Gemma.
    """
    rows = rows or work.prompts
    size = min(rows, work.micro_batch or (2 if work.adapters else 8))
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": rows // size}


def _dtype(work: Work) -> torch.dtype:
    """Weights that stay frozen are kept in bfloat16, weights that are trained in float32."""
    return torch.bfloat16 if work.adapters else torch.float32


def _limits(work: Work) -> dict[str, int]:
    return {"max_prompt_length": work.prompt_tokens, "max_completion_length": work.completion_tokens}


def _demonstrations(work: Work) -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows(work)]


def _trained(trainer: Trainer, column: str) -> list[list[int]]:
    """What a trainer made of its rows."""
    return cast(Dataset, trainer.train_dataset)[column][:]


def _completions(step: Sequence[Group], index: int) -> list[list[int]]:
    """The tokens of each group's completion of that place: 0 is the demonstration."""
    return [list(group.completions[index].token_ids) for group in step]
