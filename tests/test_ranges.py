"""Every number that a user can set has its range, and what is out of it is refused by name before anything is loaded."""

import argparse
import ast
import dataclasses
import math
import typing
from pathlib import Path

import pytest

from tutelage.algorithms.registry import NAMES, find
from tutelage.cli import main
from tutelage.cli.arguments import MODEL_RANGES, DataArguments, ModelArguments, parse
from tutelage.errors import UserError
from tutelage.ranges import LARGEST, SEED, Range, declared_ranges, number, whole
from tutelage.training.arguments import ARGUMENTS, RANGES, Refused

CLI = Path(__file__).resolve().parents[1] / "src" / "tutelage" / "cli"

CONFIGS = {
    **{name: (find(name).config, {"output_dir": "unused"}, RANGES) for name in NAMES},
    "model": (ModelArguments, {}, MODEL_RANGES),
    "data": (DataArguments, {}, {}),
}

NEVER = (math.nan, math.inf, -math.inf, -(2**63), "text", {"a": 1}, True)
HUGE = 2**63


def numeric_fields(config):
    """The fields whose hint takes a number."""

    def takes(hint):
        return hint in (int, float) or any(map(takes, typing.get_args(hint)))

    hints = typing.get_type_hints(config)
    return [entry.name for entry in dataclasses.fields(config) if takes(hints[entry.name])]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_has_its_range_or_is_refused_with_every_value(name):
    config, _, others = CONFIGS[name]
    declared = declared_ranges(config, tuple(others.items()))
    without = [field for field in numeric_fields(config) if field not in declared]
    assert [field for field in without if not isinstance(ARGUMENTS.get(field), Refused)] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_what_no_field_takes_is_refused_by_name(name):
    config, given, others = CONFIGS[name]
    config(**given)
    for field, (allowed, _, is_list) in declared_ranges(config, tuple(others.items())).items():
        for bad in (*NEVER, *([HUGE] if allowed.high <= LARGEST else [])):
            for value in (bad, [bad]) if is_list else (bad,):
                with pytest.raises(UserError) as error:
                    config(**given, **{field: value})
                assert error.value.field == field, (field, value)


@pytest.mark.parametrize(
    ("allowed", "good", "bad"),
    [
        (whole(1), [1, LARGEST], [0, -1, 1.0, 1.5, LARGEST + 1, "1", None, True]),
        (number(0, 1, above=True), [1e-9, 1, 1.0], [0, 1.1, math.nan, "0.5", None]),
        (number(0, 1, below=True), [0, 0.99], [1, -1e-9, math.inf]),
        (number(), [-1e300, 0], [math.inf, -math.inf, math.nan]),
        (SEED, [0, 2**32 - 1], [2**32, -1]),
    ],
)
def test_a_range_holds_its_numbers_alone(allowed, good, bad):
    assert [value for value in good if allowed.problem(value)] == []
    assert [value for value in bad if not allowed.problem(value)] == []


def test_the_problem_names_the_bound_that_was_passed():
    assert whole(1).problem(0) == "must be at least 1, not 0."
    assert whole(1).problem(LARGEST + 1) == f"must be at most {LARGEST}, not {LARGEST + 1}."
    assert number(0, 1, below=True).problem(1) == "must be at least 0 and below 1, not 1."


def test_every_number_of_the_other_commands_is_read_through_a_range():
    """argparse's int and float let NaN and -1 through."""
    bare = [
        f"{path.name}:{node.lineno}"
        for path in sorted(CLI.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.keyword) and node.arg == "type" and ast.unparse(node.value) in ("int", "float")
    ]
    assert bare == []


def test_a_range_reads_what_argparse_hands_it():
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--x", type=whole(0, 3))
    assert parser.parse_args(["--x", "3"]).x == 3
    for text in ("4", "-1", "1.0", "nan", "x", ""):
        with pytest.raises(argparse.ArgumentError, match="must be"):
            parser.parse_args(["--x", text])


COMMANDS = {
    "sample": ["--model_name_or_path", "NONE", "--dataset_name", "NONE", "--output", "OUT"],
    "score": ["--policy", "NONE", "--dataset_name", "NONE", "--output", "OUT"],
    "evaluate": ["--model_name_or_path", "NONE", "--dataset_name", "NONE", "--output_dir", "OUT"],
    "clean": ["NONE", "--model_name_or_path", "NONE", "--output_dir", "OUT", "--drop", "0.1"],
    "data": ["NONE", "--model_name_or_path", "NONE"],
    "extrapolate": [
        "--start",
        "NONE",
        "--aligned",
        "NONE",
        "--output_dir",
        "OUT",
        "--alphas",
        "1,2",
        "--dataset_name",
        "NONE",
    ],
}
OPTIONS = {
    "sample": ["batch_size", "num_samples", "temperature", "top_k", "top_p", "seed", "max_completion_length"],
    "score": ["batch_size", "beta", "max_prompt_length"],
    "evaluate": ["batch_size", "sampling_batch_size", "beta", "eval_samples", "rows", "seed"],
    "clean": ["batch_size", "sampling_batch_size", "fold_epochs", "fold_learning_rate", "num_folds", "lora_r", "show", "seed"],
    "data": ["max_prompt_length", "max_completion_length"],
    "extrapolate": ["batch_size", "sampling_batch_size", "eval_samples", "rows", "seed", "max_completion_length"],
}  # fmt: skip


@pytest.mark.parametrize(("command", "option"), [(name, option) for name in OPTIONS for option in OPTIONS[name]])
def test_commands_refuse_before_they_look_for_a_file(command, option, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for value in ("nan", "inf", "-1", "x"):
        assert main([command, *COMMANDS[command], f"--{option}={value}"]) == 2
        said = capsys.readouterr().err
        assert f"field '{option}': must be" in said
        assert "NONE" not in said
    assert list(tmp_path.iterdir()) == []


def in_file(tmp_path, text, *args, algorithm="irft"):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    given = ["--config", str(path), "--output_dir", "unused", "--model_name_or_path", "NONE", "--bf16", "False", *args]
    return parse(algorithm, find(algorithm).config, given)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("save_strategy: no", "save_strategy", "no"),  # YAML 1.1: false
        ("eval_strategy: no", "eval_strategy", "no"),
        ("run_name: no", "run_name", "no"),
        ("run_name: 0042", "run_name", "0042"),  # YAML 1.1: 34
        ("run_name: 1e3", "run_name", "1e3"),
        ("learning_rate: 1e-6", "learning_rate", 1e-6),  # YAML 1.1: a text
        ("lr_scheduler_kwargs: {min_lr: 1e-6, deep: [2E+3, .5]}", "lr_scheduler_kwargs", {"min_lr": 1e-6, "deep": [2e3, 0.5]}),
        ("lr_scheduler_kwargs: {min_lr: '1e-6'}", "lr_scheduler_kwargs", {"min_lr": "1e-6"}),
        ("num_samples: 1_0", "num_samples", 10),
        ("bf16: no", "bf16", False),
        ("dataset_name: 12", "dataset_name", "12"),
        ("beta: [1e-1]", "beta", [0.1]),
        ("verifier: reasoning_gym:chain_sum", "verifier", "reasoning_gym:chain_sum"),
        ("trust_remote_code: no", "trust_remote_code", False),
        ("run_name: null", "run_name", None),
    ],
)  # fmt: skip
def test_a_file_says_what_its_writer_meant(text, field, value, tmp_path):
    (found,) = {repr(getattr(part, field)) for part in in_file(tmp_path, text) if hasattr(part, field)}
    expected = found.replace("SaveStrategy.NO: 'no'", "'no'").replace("IntervalStrategy.NO: 'no'", "'no'").strip("<>")
    assert expected == repr(value)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("learning_rate: {a: 1}", "learning_rate"),
        ("learning_rate: [1]", "learning_rate"),
        ("use_peft: {a: 1}", "use_peft"),
        ("run_name: {a: 1}", "run_name"),
        ("controls: {a: 1}", "controls"),
        ("optim_args: [1]", "optim_args"),
        ("num_samples: 1\nnum_samples: 2", "num_samples"),
        ("lora_r: 0", "lora_r"),
        ("lora_dropout: .nan", "lora_dropout"),
        ("temperature: .inf", "temperature"),
        ("sft_weight: -1", "sft_weight"),
        ("lora_target_modules: [--trust_remote_code]", "lora_target_modules"),
        ("verifier: os:system", "verifier"),
        ("retention_verifier: os:system", "retention_verifier"),
        ("trust_remote_code: yes", "trust_remote_code"),
        ("trust_remote_code: 1", "trust_remote_code"),
    ],
)
def test_a_file_with_the_wrong_kind_of_value_is_refused_by_name(text, field, tmp_path):
    with pytest.raises(UserError) as error:
        in_file(tmp_path, text)
    assert error.value.field == field


def test_code_that_a_file_names_runs_if_the_command_line_names_it_too(tmp_path):
    with pytest.raises(UserError, match="--reward_features text,my:features"):
        in_file(tmp_path, "reward_features: text,my:features", algorithm="rft")
    found = in_file(
        tmp_path, "reward_features: text,my:features", "--reward_features", "text,my:features", algorithm="rft"
    )
    assert found[2].reward_features == "text,my:features"
    assert in_file(tmp_path, "trust_remote_code: true", "--trust_remote_code")[1].trust_remote_code
    assert in_file(tmp_path, "verifier: mine:judge", "--verifier=mine:judge")[2].verifier == "mine:judge"


def test_numbers_of_numpy_are_numbers():
    import numpy as np

    assert whole(1).problem(np.int64(3)) is None
    assert number(0).problem(np.float32(3)) is None
    assert isinstance(whole(1), Range)
