"""A run goes on as what it was begun as: what may be another is stated, anything else is one error."""

import dataclasses
import json
import logging
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from datasets import Dataset
from test_resume import KillAt, Killed
from transformers.trainer_utils import get_last_checkpoint

from rft_runs import QUICK
from tutelage.algorithms.registry import NAMES, find
from tutelage.errors import UserError
from tutelage.training.identity import MAY_CHANGE, digest_of_rows
from tutelage.training.vllm_config import SamplerConfig

FREE = {name for names in MAY_CHANGE.values() for name in names}
SETTINGS = {"stages_per_epoch": 2, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}


def make(training, *, model=None, data=None, callbacks=(), algorithm="irft", peft=None, **settings):
    options = {"callbacks": list(callbacks), "peft_config": peft}
    settings = {**(SETTINGS if algorithm != "sft" else {"save_strategy": "steps", "save_steps": 1}), **settings}
    return training.trainer(algorithm, model=model, data=data, name="run", options=options, **settings)


def stopped(training, **settings):
    with pytest.raises(Killed):
        make(training, callbacks=[KillAt("on_step_begin", 3)], **settings).train()


def refused(trainer):
    checkpoint = get_last_checkpoint(trainer.args.output_dir)
    with pytest.raises(UserError) as error:
        trainer.resume_point()
    with pytest.raises(UserError, match=r"run\.json"):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 0
    return error.value


@pytest.mark.parametrize(
    ("change", "old", "new"),
    [
        ({"learning_rate": 2e-3}, "0.001", "0.002"),
        ({"lr_scheduler_type": "cosine"}, "constant", "cosine"),
        ({"warmup_steps": 5}, "0", "5"),
        ({"beta": [0.5]}, "[0.1]", "[0.5]"),
        ({"per_device_train_batch_size": 2}, "4", "2"),
        ({"gradient_accumulation_steps": 2}, "1", "2"),
        ({"replay_stages": 1}, "0", "1"),
        ({"max_steps": 20}, "-1", "20"),
        ({"num_train_epochs": 3}, "2", "3"),
        ({"seed": 7}, "42", "7"),
        ({"temperature": 0.5}, "1.0", "0.5"),
        ({"save_only_model": True}, "false", "true"),
        ({"max_completion_length": 4}, "8", "4"),
    ],
)
def test_a_setting_that_differs_is_named_with_both_values(training, change, old, new):
    stopped(training)
    error = refused(make(training, **change))
    (name,) = change
    assert name in str(error)
    if error.field == name:  # another length is other data too
        assert f"was begun with {old} and would go on with {new}" in str(error)
    else:
        assert name == "max_completion_length"
        assert "other training data" in str(error)
    assert "run.json" in str(error)
    assert "Resume with what it was begun with" in str(error)


def test_other_data_are_named_with_their_rows(training):
    stopped(training)
    error = refused(make(training, data=training.rows(15)))
    assert error.field == "dataset_name"
    assert "16 rows of training data" in str(error)
    assert "15 rows of training data" in str(error)
    swapped = training.rows().select([1, 0, *range(2, 16)])
    assert refused(make(training, data=swapped)).field == "dataset_name"


def test_another_model_is_named(training):
    stopped(training)
    error = refused(make(training, model=training.model(seed=1)))
    assert error.field == "model_name_or_path"
    assert str(error).count("(weights ") == 2


def test_another_adapter_is_named_by_its_field(training):
    stopped(training, peft=training.lora(lora_dropout=0.1))
    error = refused(make(training, peft=training.lora(lora_dropout=0.2)))
    assert error.field == "adapter lora_dropout"
    assert "0.1 and would go on with 0.2" in str(error)


def test_another_algorithm_is_named(training):
    stopped(training, algorithm="sft")
    assert refused(make(training, algorithm="irft")).field == "algorithm"


def test_other_validation_rows_prompts_and_preferences_are_named(training):
    def rft(prompts=6, pairs=3, validation=4):
        options = {
            "prompt_dataset": Dataset.from_list([{"prompt": f"Say {i}"} for i in range(prompts)]),
            "validation_dataset": Dataset.from_list(
                [{"prompt": f"V {i}", "completion": " v"} for i in range(validation)]
            ),
            "preference_dataset": Dataset.from_list(
                [{"prompt": f"Is {i}?", "chosen": " It is.", "rejected": " No"} for i in range(pairs)]
            ),
        }
        settings = {name: value for name, value in QUICK.items() if name != "validation_rows"}
        return training.trainer("rft", name="run", options=options, save_strategy="steps", save_steps=1, **settings)

    trainer = rft()
    trainer.add_callback(KillAt("on_step_begin", 2))
    with pytest.raises(Killed):
        trainer.train()
    assert refused(rft(prompts=5)).field == "prompt_dataset"
    assert refused(rft(pairs=2)).field == "preference_dataset"
    assert refused(rft(validation=5)).field == "validation_dataset"
    assert rft().resume_point() is not None


def test_what_may_change_may(training):
    stopped(training)
    resumed = make(training, logging_steps=5, per_device_eval_batch_size=2, sampling_batch_size=3, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8


def test_models_alone_are_no_checkpoints_to_go_on_from(training):
    stopped(training, save_only_model=True)
    for again in ({}, {"save_only_model": True}):
        error = refused(make(training, **again))
        assert error.field == "save_only_model"
        assert "without the optimizer" in str(error)


def test_held_out_rows_may_come_later_but_not_be_others(training):
    stopped(training)

    def evaluated(count):
        return training.trainer("irft", name="run", options={"eval_dataset": training.rows(count)}, **SETTINGS)

    resumed = evaluated(3)
    assert resumed.resume_point() is not None
    trainer = evaluated(3)
    trainer.add_callback(KillAt("on_step_begin", 3))
    with pytest.raises(Killed):
        trainer.train()
    assert refused(evaluated(4)).field == "eval_dataset_name"


def test_a_record_that_is_gone_or_altered(training):
    stopped(training)
    path = training.folder / "run" / "run.json"
    content = path.read_text(encoding="utf-8")
    path.write_text(content.replace("0.001", "0.002"), encoding="utf-8")
    assert "was altered" in str(refused(make(training)))
    path.unlink()
    assert "run.json: is missing" in str(refused(make(training)))


def test_people_can_read_the_record(training):
    make(training, peft=training.lora(), hub_token="hf_secret").train()
    path = training.folder / "run" / "run.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["algorithm"] == "irft"
    assert found["data"]["training"]["rows"] == 16
    assert found["settings"]["learning_rate"] == 1e-3
    assert found["adapter"]["r"] == 4
    assert found["schedule"] == {"optimizer_steps_per_epoch": 4, "stages_per_epoch": 2, "samplings_per_epoch": 2}
    assert {"tutelage", "torch", "transformers"} <= found["versions"].keys()
    assert "hf_secret" not in path.read_text(encoding="utf-8")


def test_other_versions_are_said_and_go_on(training, caplog, monkeypatch):
    monkeypatch.setattr("tutelage.training.identity.version", lambda name: "0.0.1")
    stopped(training)
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING):
        assert make(training).resume_point() is not None
    assert "begun with torch 0.0.1" in caplog.text


@pytest.mark.parametrize("algorithm", NAMES)
def test_what_may_change_is_there_and_changes_no_weight(algorithm):
    """A list of exceptions: a new setting is compared until somebody says why it need not be."""
    names = {entry.name for entry in dataclasses.fields(find(algorithm).config)}
    learned_from = {
        "learning_rate",
        "seed",
        "data_seed",
        "max_steps",
        "num_train_epochs",
        "optim",
        "weight_decay",
        "bf16",
    }
    assert not FREE & learned_from
    of_stages = {
        "save_each_stage",
        "sampling_batch_size",
        "keep_stages",
        "on_collapse",
        "collapse_truncated",
        "collapse_distinct",
        "collapse_logp",
        *SamplerConfig.__annotations__,
    }
    assert FREE - names <= of_stages, "of another version of transformers"


def test_the_digest_of_rows_is_of_what_they_hold(training):
    tokenized = make(training).train_dataset
    rows, digest = digest_of_rows(tokenized)
    assert rows == 16
    again = Dataset.from_list(tokenized.to_list(), features=tokenized.features)
    assert digest_of_rows(again) == (16, digest), "whatever chunks they lie in"
    assert digest_of_rows(tokenized.select(range(16)).select(range(16))) == (16, digest)
    assert digest_of_rows(tokenized.select(range(15)))[1] != digest
    row = tokenized[3]
    digests = {digest}
    for name in ("prompt_ids", "demonstration_ids"):
        for place in range(len(row[name])):
            rows = tokenized.to_list()
            rows[3][name][place] += 1
            digests.add(digest_of_rows(Dataset.from_list(rows, features=tokenized.features))[1])
    assert len(digests) == 1 + len(row["prompt_ids"]) + len(row["demonstration_ids"])
    assert digest_of_rows(tokenized, prompts_alone=True)[0] == 0


def test_the_docs_state_what_may_change():
    page = (Path(__file__).parents[2] / "docs" / "resuming.md").read_text(encoding="utf-8")
    stated = [name.strip("`") for name in re.findall(r"`[a-z_*]+`", page)]
    for name in FREE:
        assert any(fnmatch(name, pattern) for pattern in stated) or name.startswith("dataloader_"), name
