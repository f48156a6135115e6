"""Sides of the rows on sampling and on whole stages.

A repetition is one call of the sampler, or one stage of training as a user's loop pays for it: our trainers go from stage to
stage by themselves, and so does TRL's RLOOTrainer; a DPOTrainer or RewardTrainer has its data from its constructor, so each
stage makes a new one. Every stage takes the same prompts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

from benchmarks.allocator import allocator_in_use, switch_allocator, use_allocator
from benchmarks.sides import Turns
from benchmarks.workloads import Work, adapter, groups, rows, stop_ids, touched
from tutelage.algorithms import IRFTConfig, IRFTTrainer, RFTConfig, RFTTrainer
from tutelage.models.loading import add_adapter, base_causal_lm, load_model
from tutelage.models.modes import evaluation_mode
from tutelage.sampling import SamplingParams, TransformersSampler

__all__ = [
    "ours_irft_stage",
    "ours_rft_stage",
    "ours_sampling",
    "peer_irft_stage",
    "peer_rft_stage",
    "peer_sampling",
]

_BATCH = 8
"""Pairs of an IRFT or DPO step; completions of an RFT or RLOO step."""

_SHARED = {
    "bf16": True,
    "use_cpu": True,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
_PEER = _SHARED | {"gradient_checkpointing": False}
_PEER_PAIRS = 2
"""Pairs or completions that TRL runs at once: as fast as 1 and 8 on a CPU, and in less memory than 8."""
_REWARD_BATCH = 8
"""Of a reward phase: groups per step for ours, pairs at once for TRL's, whose steps have as many prompts."""
_ENDLESS = 1000  # epochs; the turns end before
_LAST = torch.tensor([-1])
"""The last position as an index and not, as ``generate`` takes it by default, as a slice: for a slice of several rows torch's product
on a CPU copies the head once per row, 335 MB each on Gemma."""


# --- sampling -------------------------------------------------------------------------------------------------------


def ours_sampling(work: Work, turns: Turns) -> None:
    """Our sampler, in the trainers' mixed precision."""
    model = _our_model(work)
    turns.weights_loaded(batch_size=64)
    prompts = [group.prompt_ids for group in groups(work)]
    params = SamplingParams(
        max_completion_length=work.completion_tokens,
        stop_ids=frozenset(stop_ids(base_causal_lm(model).config.vocab_size)),
    )
    sampler = TransformersSampler(model, batch_size=64)
    while turns.begin():
        with torch.autocast("cpu", torch.bfloat16):
            drawn = sampler.sample(prompts, params)
        turns.end(tokens=sum(len(sample.token_ids) for samples in drawn for sample in samples))
        params = replace(params, seed=params.seed + 1)


def peer_sampling(work: Work, turns: Turns) -> None:
    """transformers' ``generate`` in the batch size and precision that were fastest here."""
    stops = stop_ids(AutoConfig.from_pretrained(work.model_path).vocab_size)
    settings = _fastest_generation(work, stops)
    model, prompts = _peer_model(work), [group.prompt_ids for group in groups(work)]
    turns.weights_loaded(**settings)
    while turns.begin():
        drawn = _generate(model, prompts, stops=stops, most=work.completion_tokens, **settings)
        turns.end(tokens=sum(map(len, drawn)))


@torch.no_grad()
def _generate(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, stops: list[int], most: int, batch_size: int, autocast: bool
) -> list[list[int]]:
    """A completion of each prompt, up to and with its first stop token; prompts of like length side by side."""
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    completions: list[list[int]] = [[] for _ in prompts]
    with evaluation_mode(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            inputs = _padded([prompts[place] for place in places], side="left")
            drawn = model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=stops,
                pad_token_id=0,
                max_new_tokens=most,
                logits_to_keep=_LAST,
            )[:, inputs["input_ids"].shape[1] :]
            stopped = torch.isin(drawn, torch.tensor(stops)).int()
            lengths = (stopped.cumsum(1) - stopped == 0).sum(1).tolist()
            for place, row, length in zip(places, drawn.tolist(), lengths, strict=True):
                completions[place] = row[:length]
    return completions


def _fastest_generation(work: Work, stops: list[int]) -> dict[str, Any]:
    """The batch size, and then with or without autocast, that let ``_generate`` draw most tokens per second, 16 for each prompt.

    Found in a process of its own, whose memory is none of the side's.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_try_generation, work, stops, allocator_in_use()).result()


def _try_generation(work: Work, stops: list[int], allocator: str) -> dict[str, Any]:
    use_allocator(allocator)  # the side's, so that what is fastest here is fastest there
    model, prompts = _peer_model(work), [group.prompt_ids for group in groups(work)]
    draw = partial(_generate, model, stops=stops)
    draw(prompts[:2], most=2, batch_size=2, autocast=True)  # the first call of all is slow

    def seconds_per_token(settings: dict[str, Any]) -> float:
        begin = time.perf_counter()
        drawn = draw(prompts, most=min(16, work.completion_tokens), **settings)
        return (time.perf_counter() - begin) / sum(map(len, drawn))

    tried = [{"batch_size": size, "autocast": True} for size in (16, 32, 64)]
    times = [seconds_per_token(settings) for settings in tried]
    tried.append(tried[times.index(min(times))] | {"autocast": False})
    times.append(seconds_per_token(tried[-1]))
    return tried[times.index(min(times))]


# --- IRFT -----------------------------------------------------------------------------------------------------------


def ours_irft_stage(work: Work, turns: Turns) -> None:
    """A stage of ours: sampling, reference log-probs, and steps of 8 prompts."""
    model = _our_model(work)
    turns.weights_loaded(sampling_batch_size=64)
    args = IRFTConfig(
        output_dir=tempfile.mkdtemp(),
        learning_rate=IRFTConfig.adapter_learning_rate,
        stages_per_epoch=work.stages,
        num_train_epochs=_ENDLESS,
        per_device_train_batch_size=_BATCH,
        max_prompt_length=work.prompt_tokens,
        max_completion_length=work.completion_tokens,
        **_SHARED,
    )
    stages = _Stages(turns, steps=work.prompts // _BATCH)
    IRFTTrainer(model, args, Dataset.from_list(rows(work)), callbacks=[stages]).train()


def peer_irft_stage(work: Work, turns: Turns) -> None:
    """``generate``, then a DPOTrainer on its samples."""
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(work.model_path)
    generation = {"stops": [tokenizer.eos_token_id], "most": work.completion_tokens}
    settings = _fastest_generation(work, generation["stops"])
    model, given, prompts = _peer_model(work), rows(work), [group.prompt_ids for group in groups(work)]
    own = {"per_device_train_batch_size": _PEER_PAIRS, "precompute_ref_log_probs": True}
    turns.weights_loaded(**settings, **own, gradient_checkpointing=False)
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        learning_rate=IRFTConfig.adapter_learning_rate,
        num_train_epochs=1,
        gradient_accumulation_steps=_BATCH // own["per_device_train_batch_size"],
        max_length=None,
        beta=0.1,
        **_PEER,
        **own,
    )
    while turns.begin():
        samples = [_text(ids, tokenizer.eos_token_id) for ids in _generate(model, prompts, **generation, **settings)]
        pairs = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": sample}
            for row, sample in zip(given, samples, strict=True)
        ]
        if "ref" in model.peft_config:  # the trainer's copy of the policy as the last stage began
            model.delete_adapter("ref")
        switch_allocator(training=True)
        DPOTrainer(model, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer).train()
        switch_allocator(training=False)
        turns.end()


def _text(token_ids: Sequence[int], eos_id: int) -> str:
    """What the tokenizer reads as as many tokens; TRL adds the end-of-sequence token. The model knows more ids than the
    tokenizer has words: the others are read as unknown."""
    return "".join(f" w{token_id}" for token_id in token_ids if token_id != eos_id)


# --- RFT ------------------------------------------------------------------------------------------------------------


class _FullBatches(RFTTrainer):
    """Makes sure that the policy phase trains on every prompt."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        assert len(inputs) == self.args.per_device_train_batch_size, "the policy phase left prompts out"
        return super().training_step(model, inputs, num_items_in_batch)


def ours_rft_stage(work: Work, turns: Turns) -> None:
    """A stage of ours: sampling, one pass of the reward phase, one of the policy phase, and a look at the validation row."""
    model = _our_model(work)
    own = {"validation_rows": 1, "truncated_samples": "score", "reward_batch_size": _REWARD_BATCH}
    turns.weights_loaded(**own, sampling_batch_size=64)
    args = RFTConfig(
        output_dir=tempfile.mkdtemp(),
        learning_rate=RFTConfig.adapter_learning_rate,
        num_samples=work.samples,
        stages_per_epoch=1,
        num_train_epochs=_ENDLESS,
        per_device_train_batch_size=_BATCH // work.samples,
        max_prompt_length=work.prompt_tokens,
        max_completion_length=work.completion_tokens,
        reward="model",
        reward_negatives="own",
        reward_replay_stages=0,
        reward_epochs=1,
        reward_gate="off",  # random words teach a reward nothing, and the policy phase would wait for it
        samplings_per_stage=1,
        gradient_accumulation_steps=1,
        warmup_steps=0,
        early_stopping="never",
        **_SHARED,
        **own,
    )
    data = Dataset.from_list(rows(replace(work, prompts=work.prompts + 1)))
    stages = _Stages(turns, steps=work.prompts * work.samples // _BATCH)
    _FullBatches(model, args, data, callbacks=[stages]).train()


def peer_rft_stage(work: Work, turns: Turns) -> None:
    """A RewardTrainer on the samples of the last round, then a round of an RLOOTrainer that goes on from stage to stage."""
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(work.model_path)
    policy = touched(AutoModelForCausalLM.from_pretrained(work.model_path, dtype=torch.bfloat16))
    completions = work.prompts * work.samples
    # RLOO cannot be told of ``_LAST``: with all rows at once its copies of a large head would not fit into memory.
    together = completions if policy.config.vocab_size < 100_000 else min(completions, 16)
    own = {"per_device_train_batch_size": _PEER_PAIRS, "generation_batch_size": together}
    # The reward model counts as memory over the weights: ours does with the policy's.
    turns.weights_loaded(**own, reward_micro_batch=_REWARD_BATCH, gradient_checkpointing=False)
    reward = _AlternatedReward(work, tokenizer)
    args = RLOOConfig(
        output_dir=tempfile.mkdtemp(),
        learning_rate=RFTConfig.adapter_learning_rate,
        num_train_epochs=_ENDLESS,
        gradient_accumulation_steps=_BATCH // _PEER_PAIRS,
        num_generations=work.samples,
        max_completion_length=work.completion_tokens,
        beta=0.1,
        **_PEER,
        **own,
    )
    stages = _Stages(turns, steps=completions // _BATCH, at_start=reward.fit)
    RLOOTrainer(
        policy,
        reward.score,
        args,
        train_dataset=Dataset.from_list(reward.prompts()),
        processing_class=tokenizer,
        callbacks=[stages, _BeforeGeneration(steps=together // _BATCH)],
        peft_config=adapter(),
    ).train()


class _AlternatedReward:
    """A reward model that a RewardTrainer fits to the samples of the last round, and that scores the next round's."""

    def __init__(self, work: Work, tokenizer: Any):
        base = AutoModelForSequenceClassification.from_pretrained(work.model_path, num_labels=1, dtype=torch.bfloat16)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
        self.model = get_peft_model(touched(base), config)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=3e-4, fused=True)  # goes on from round to round
        self.tokenizer, self.work = tokenizer, work
        self.groups = groups(work)
        self.demonstrations = [(*group.prompt_ids, *group.completions[0].token_ids) for group in self.groups]
        self.pairs = [  # before the first round there are the samples that came with the data
            {"chosen_ids": demonstration, "rejected_ids": (*group.prompt_ids, *sample.token_ids)}
            for group, demonstration in zip(self.groups, self.demonstrations, strict=True)
            for sample in group.completions[1:]
        ]

    def prompts(self) -> list[dict[str, Any]]:
        """The rows of an RLOOTrainer, with what ``score`` reads beside the prompt."""
        return [
            {"prompt": row["prompt"], "prompt_ids": group.prompt_ids, "demonstration": demonstration}
            for row, group, demonstration in zip(rows(self.work), self.groups, self.demonstrations, strict=True)
        ]

    def fit(self) -> None:
        """One pass over the pairs of the last round."""
        args = RewardConfig(
            output_dir=tempfile.mkdtemp(),
            num_train_epochs=1,
            per_device_train_batch_size=_REWARD_BATCH,
            gradient_accumulation_steps=self.work.samples,  # so a step has the pairs of as many prompts as ours
            center_rewards_coefficient=0.01,
            max_length=None,
            **_PEER,
        )
        RewardTrainer(
            self.model,
            args,
            train_dataset=Dataset.from_list(self.pairs[-self.work.prompts * self.work.samples :]),
            processing_class=self.tokenizer,
            optimizers=(self.optimizer, None),
        ).train()

    @torch.no_grad()
    def score(self, prompt_ids, demonstration, completion_ids, **_) -> list[float]:
        """The reward of each completion, in TRL's form; each makes a pair with its demonstration."""
        switch_allocator(training=True)  # the samples are drawn
        sampled = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        self.pairs += [
            {"chosen_ids": chosen, "rejected_ids": rejected}
            for chosen, rejected in zip(demonstration, sampled, strict=True)
        ]
        with evaluation_mode(self.model), torch.autocast("cpu", torch.bfloat16):
            return self.model(**_padded(sampled, side="right")).logits[:, 0].tolist()


# --- what they share ------------------------------------------------------------------------------------------------


class _Stages(TrainerCallback):
    """Makes so many optimizer steps, a stage, a repetition; ``at_start`` is the first thing of it."""

    def __init__(self, turns: Turns, *, steps: int, at_start: Callable[[], None] = lambda: None):
        self.turns, self.steps, self.at_start = turns, steps, at_start

    def on_train_begin(self, args, state, control, **kwargs):
        self.turns.begin()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self.at_start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            self.turns.end()
            control.should_training_stop = not self.turns.begin()


class _BeforeGeneration(TrainerCallback):
    """RLOO draws samples within the first of so many optimizer steps, and ``generate`` grew under what is best for training."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            switch_allocator(training=False)


def _our_model(work: Work) -> nn.Module:
    model = touched(load_model(work.model_path, dtype=torch.bfloat16))
    set_seed(work.seed)
    return add_adapter(model, adapter()) if work.adapters else model


def _peer_model(work: Work) -> Any:
    model = touched(AutoModelForCausalLM.from_pretrained(work.model_path, dtype=torch.bfloat16))
    set_seed(work.seed)
    return get_peft_model(model, adapter()) if work.adapters else model


def _padded(sequences: Sequence[Sequence[int]], *, side: str) -> dict[str, Tensor]:
    rows = [torch.tensor(sequence) for sequence in sequences]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_side=side),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side),
    }
