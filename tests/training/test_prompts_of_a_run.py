"""A run's prompts and ends: the same after an interruption, and those of the model."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tutelage.algorithms.registry import find
from tutelage.data import tokenize_dataset
from tutelage.errors import UserError
from tutelage.models.loading import end_ids
from tutelage.testing.tokenizers import tiny_tokenizer
from tutelage.training.clock import CLOCK, recorded_time
from tutelage.training.publishing import NOT_UPLOADED

SECONDS = "{{ strftime_now('%Y %H:%M:%S') }}"
TALKS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"{i}"}]}
    for i in range(16)
]


def dated(training):
    training.tokenizer.chat_template = SECONDS + training.tokenizer.chat_template
    return training


class Killed(TrainerCallback):
    """Stops a run inside its second stage, where a checkpoint has just been written."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("algorithm", ["irft", "sft"])
def test_a_resumed_run_has_the_prompts_it_had(training, algorithm):
    dated(training)
    data = Dataset.from_list(TALKS)
    settings = {"data": data, "save_strategy": "steps", "save_steps": 1}
    trainer = training.trainer(algorithm, **settings, options={"callbacks": [Killed()]})
    began = datetime(2024, 2, 5, 7, 8, 9)
    trainer.tokenization.now = began
    trainer.train_dataset = tokenize_dataset(data, replace(trainer.tokenization))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert recorded_time(training.folder / "run") == began
    resumed = training.trainer(algorithm, **settings)
    assert resumed.tokenization.now == began
    assert "2024 07:08:09" in resumed.tokenization.text(resumed.train_dataset[0]["prompt_ids"])
    resumed.train(resume_from_checkpoint=get_last_checkpoint(resumed.args.output_dir))
    assert recorded_time(training.folder / "run") == began


def test_an_interrupted_stage_goes_on(training):
    """Samples of a stage lie on disk with their prompts; prompts with another time would not be theirs."""
    dated(training)
    data = Dataset.from_list(TALKS)
    settings = {"data": data, "stages_per_epoch": 2, "save_strategy": "steps", "save_steps": 1}
    stopped = training.trainer("irft", **settings, options={"callbacks": [Killed()]})
    stopped.tokenization.now -= timedelta(hours=30)
    stopped.train_dataset = tokenize_dataset(data, replace(stopped.tokenization))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = training.trainer("irft", **settings)
    resumed.train(resume_from_checkpoint=get_last_checkpoint(resumed.args.output_dir))
    assert resumed.state.global_step == 4


def test_a_new_run_has_its_own_time(training):
    dated(training)
    trainer = training.trainer("sft", data=Dataset.from_list(TALKS), max_steps=1)
    trainer.tokenization.now = datetime(2024, 2, 5)
    trainer.train()
    args = find("sft").config(output_dir=str(training.folder / "run"), use_cpu=True, bf16=False, report_to=[])
    args.is_new = True
    new = find("sft").trainer(training.model(), args, Dataset.from_list(TALKS), processing_class=training.tokenizer)
    assert new.tokenization.now > datetime(2026, 1, 1)


def test_without_a_clock_in_the_template_nothing_is_recorded(training):
    training.run("sft", data=Dataset.from_list(TALKS), max_steps=1)
    assert not (training.folder / "run" / CLOCK).exists()
    assert CLOCK in NOT_UPLOADED


def test_a_record_of_no_time_is_an_error(training):
    (training.folder / "run").mkdir()
    for content in ("", "{}", json.dumps({"now": 5}), json.dumps({"now": "today"})):
        (training.folder / "run" / CLOCK).write_text(content)
        with pytest.raises(UserError, match=rf"{CLOCK}: is no record of a time"):
            training.trainer("sft", data=Dataset.from_list(TALKS))


# -- ends ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "written", "wanted"),
    [
        ([1, 300], True, {1, 300}),
        (7, True, {7}),
        (None, True, set()),
        (7, False, set()),
        (torch.tensor([1, 7]), True, {1, 7}),
    ],
)
def test_the_ends_of_a_models_generation_config(training, found, written, wanted):
    model = training.model()
    model.generation_config.eos_token_id = found
    model.generation_config._from_model_config = not written
    assert end_ids(model, training.tokenizer) == wanted


def test_an_end_of_the_models_config_counts_if_it_is_a_special_token(training):
    model = training.model(eos_token_id=training.tokenizer.eos_token_id)
    assert model.generation_config._from_model_config
    assert end_ids(model, training.tokenizer) == {training.tokenizer.eos_token_id}


def test_samples_of_a_run_stop_at_them(training):
    model = training.model()
    ends = list(range(0, len(training.tokenizer), 5))
    model.generation_config.eos_token_id = ends
    model.generation_config._from_model_config = False
    trainer = training.trainer("irft", model=model, stages_per_epoch=1, max_steps=1, max_completion_length=32)
    trainer.train()
    lines = (training.folder / "run" / "stages" / "stage-0000" / "samples.jsonl").read_text().splitlines()
    samples = [c for line in lines for c in json.loads(line)["completions"] if c["role"] == "sample"]
    assert sum(c["finished"] for c in samples) > len(samples) / 2
    known = {*ends, training.tokenizer.eos_token_id}
    assert all((c["token_ids"][-1] in known) == c["finished"] for c in samples)
    assert not any(known & set(c["token_ids"][:-1]) for c in samples)
    assert trainer.tokenization.end_ids(trainer.conversational)[0] == tiny_tokenizer("zephyr").eos_token_id
