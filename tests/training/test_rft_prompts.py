"""RFT with prompts without demonstrations: what the policy trains on, what the reward compares, the command line."""

import json
import re

import pytest
from datasets import Dataset

from rft_runs import QUESTIONS, QUICK, WORDS, phases, readable, trained_on
from rft_runs import make as make_neural
from tutelage.cli import main
from tutelage.errors import UserError

PROMPTS = [f"Is {i} more than {i + 1}?" for i in range(16)]
SETTINGS = {
    **QUICK,
    "reward": "features",
    "reward_negatives": "own,initial",
    "reward_gate": "off",
    "keep_policy": "last",
    "validation_rows": None,
    "reward_replay_stages": None,
}


def prompts(texts=PROMPTS):
    return Dataset.from_dict({"prompt": list(texts)})


def make(training, *, data=None, options=None, **settings):
    options = {"prompt_dataset": prompts(), **(options or {})}
    data = training.rows(8) if data is None else data
    return training.trainer("rft", data=data, options=options, **readable({**SETTINGS, **settings}))


def compared(trainer):
    """What the reward is fitted to, stage by stage."""
    found, learner = [], trainer.stages.phase.learner
    fit = learner.fit
    learner.fit = lambda comparisons, **options: found.append(comparisons) or fit(comparisons, **options)
    return found


def updated(trainer):
    """Groups that the policy's steps train on."""
    found, loss = [], trainer.objective.loss
    trainer.objective.loss = lambda tokens, step: found.extend(tokens.groups) or loss(tokens, step)
    return found


def test_the_policy_trains_on_both_and_the_reward_compares_both(training):
    trainer = make(training)
    fits, groups = compared(trainer), updated(trainer)
    trainer.train()
    assert phases(trainer) == [1, 1]
    assert trainer.state.global_step == 6
    assert {group.row for group in groups} <= set(range(24))
    assert {group.row >= 8 for group in groups} == {True, False}
    last = fits[-1]
    sampled = [group for stage in (0, 1) for group in trainer.stages.store.sampled(stage)]
    assert sorted(group.row for group in sampled) == list(range(24))
    assert set(last.paired["own"]) == {group for group in sampled if group.row < 8}
    assert set(last.unpaired) == {group for group in sampled if group.row >= 8}
    assert len(last.paired["own"]) + len(last.unpaired) == 24
    assert sorted(group.row for group in last.paired["initial"]) == list(range(8))


def test_the_policy_trains_on_prompts_alone(training):
    trainer = make(training, prompt_mix=1.0)
    fits, groups = compared(trainer), updated(trainer)
    trainer.train()
    assert phases(trainer) == [1, 1]
    assert {group.row for group in groups} <= set(range(8, 24))
    assert len(groups) > 8
    assert len(fits) == 2
    for found in fits:
        assert sorted(group.row for group in found.paired["initial"]) == list(range(8))
        assert all(group.demonstrations for group in found.paired["initial"])
        assert found.paired["own"] == []
    facts = json.loads((trainer.stages.store.path(1) / "reward.json").read_text(encoding="utf-8"))
    assert facts["reward/demonstrations"] > facts["reward/samples"]
    assert "samples/copies" not in facts


def test_the_share_of_prompts_in_an_epoch(training):
    trainer = make(training, prompt_mix=0.8)
    trainer.train()
    sampled = [group for stage in (0, 1) for group in trainer.stages.store.sampled(stage)]
    assert len([group for group in sampled if group.row >= 8]) == 16
    assert len([group for group in sampled if group.row < 8]) == 4


def test_a_neural_reward_compares_demonstrations_with_samples_of_other_prompts(training):
    settings = {"reward_gate": "off", "keep_policy": "last", "validation_rows": None}
    trainer = make_neural(training, data=training.rows(8), options={"prompt_dataset": prompts()}, **settings)
    _, groups = trained_on(trainer)
    seen, across = [], trainer.stages.phase.learner.fitter._rewards_across
    trainer.stages.phase.learner.fitter._rewards_across = lambda batch, unpaired: (
        seen.extend((group.row, other.row) for group, other in zip(batch, unpaired, strict=False))
        or across(batch, unpaired)
    )
    trainer.train()
    assert groups
    assert all(group.row < 8 for group in groups)
    assert seen
    assert all(row < 8 <= other for row, other in seen)


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({"prompt_mix": 0.5}, {"prompt_dataset": None}, r"'prompt_dataset': the trainer was given no prompts"),
        ({"prompt_dataset": "p.jsonl"}, {"prompt_dataset": None}, r"'prompt_dataset': the trainer was given no prom"),
        (
            {"prompt_mix": 1.0, "reward_negatives": "own"},
            {},
            r"'reward_negatives': the policy samples for no demonstrated",
        ),
    ],
)
def test_settings_that_make_no_sense(training, settings, options, said):
    with pytest.raises(UserError, match=said):
        make(training, options=options, **settings)


def test_streamed_data_are_not_mixed(training):
    streams = {"data": training.rows(8).to_iterable_dataset(), "max_steps": 4, "reward_negatives": "own"}
    with pytest.raises(UserError, match=r"'prompt_dataset': streamed data cannot be mixed with prompts"):
        make(training, **streams)
    with pytest.raises(UserError, match=r"'prompt_dataset': streamed data cannot be mixed with prompts"):
        make(training, options={"prompt_dataset": prompts().to_iterable_dataset()})


def test_held_out_prompts_are_refused(training):
    data, rows = training.rows(8), training.rows(20)
    held_out = rows.select(range(10, 14))
    mixed = {"prompt_dataset": prompts([*PROMPTS, rows[11]["prompt"]]), "prompt_source": "p.jsonl"}
    with pytest.raises(UserError, match=r"p.jsonl, row 17, field 'prompt': .* one of the validation rows"):
        make(training, data=data, options={**mixed, "validation_dataset": held_out})
    with pytest.raises(UserError, match=r"p.jsonl, row 17, field 'prompt': .* one of the evaluation rows"):
        make(training, data=data, options={**mixed, "eval_dataset": held_out})
    trainer = make(training, data=data, options={**mixed, "validation_dataset": rows.select(range(12, 16))})
    assert len(trainer.train_dataset) == 25


# --- the command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def files(training):
    """Writes rows into a file; gives its path."""

    def write(name, rows):
        path = training.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def arguments(training, files, guesser):
    """A command of which some arguments can be changed."""
    data = [{"prompt": question, "completion": WORDS[0]} for question in QUESTIONS]
    known = {
        "model_name_or_path": guesser,
        "dataset_name": files("rows.jsonl", data[:16]),
        "prompt_dataset": files("prompts.jsonl", [{"prompt": f"{i}?"} for i in range(60, 76)]),
        "validation_dataset": files("validation.jsonl", data[24:]),
        "output_dir": training.folder / "out",
        "max_completion_length": 6,
        "dtype": "float32",
        "bf16": "false",
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "stages_per_epoch": 2,
        "fold_learning_rate": 1e-2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_peft": "true",
    }

    def made(**changes):
        given = {**known, **changes}
        return ["rft", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]

    return made


def test_the_command_line(training, arguments, capsys):
    assert main(arguments()) == 0, capsys.readouterr().err
    out = training.folder / "out"
    for file in (
        "policy/adapter_model.safetensors",
        "reward/feature_reward.json",
        "stages/negatives/initial.jsonl",
        "stages/negatives/out_of_fold-1.jsonl",
        "stages/stage-0001/draw-0001/rewards.jsonl",
        "report.html",
    ):
        assert (out / file).exists(), file
    record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert record["settings"]["prompt_dataset"] == str(training.folder / "prompts.jsonl")
    rows = [
        json.loads(line)["row"]
        for path in sorted((out / "stages").glob("stage-*/**/samples.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert sorted(rows) == list(range(32))
    assert len((out / "stages/stage-0000/validation.jsonl").read_text(encoding="utf-8").splitlines()) == 8

    before = {name: (out / "policy" / name).read_bytes() for name in ("adapter_model.safetensors",)}
    capsys.readouterr()
    assert main([*arguments(), "--resume"]) == 0, capsys.readouterr().err
    again = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert again["selection"] == record["selection"]
    assert again["sampled_tokens"] == record["sampled_tokens"]
    assert {name: (out / "policy" / name).read_bytes() for name in before} == before

    capsys.readouterr()
    scored = training.folder / "scored.jsonl"
    command = ["score", "--reward", out, "--dataset_name", training.folder / "rows.jsonl", "--output", scored]
    assert main([str(part) for part in [*command, "--explain", 3]]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in scored.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 16
    assert all(0 < len(line["completions"][0]["explanation"]) <= 3 for line in lines)


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("prompt_dataset", [{"prompt": "60?"}, {"prompt": ""}], r"bad.jsonl, row 2, field 'prompt': is empty"),
        ("prompt_dataset", [{"question": "60?"}], r"bad.jsonl: the columns 'question' match no known format"),
        (
            "prompt_dataset",
            [{"prompt": "60?"}, {"prompt": QUESTIONS[25]}],
            r"bad.jsonl, row 2, field 'prompt': .*valid",
        ),
        ("prompt_dataset", [{"prompt": [{"role": "user", "content": "60?"}]}], r"bad.jsonl, row 1, .* a conversation"),
        ("validation_dataset", [{"prompt": "60?"}], r"bad.jsonl: the columns 'prompt' match no known format"),
    ],
)
def test_bad_files_leave_nothing_behind(training, arguments, files, capsys, name, rows, said):
    assert main(arguments(**{name: files("bad.jsonl", rows)})) != 0
    shown = " ".join(capsys.readouterr().err.split())
    assert re.search(said, shown.replace(f"{training.folder}/", "")), shown
    assert not (training.folder / "out").exists()


def test_files_that_are_not_there(training, arguments, capsys):
    for name in ("prompt_dataset", "validation_dataset", "base_model_name_or_path"):
        assert main(arguments(**{name: training.folder / "nothing"})) != 0
        assert "nothing" in capsys.readouterr().err
    assert not (training.folder / "out").exists()
