"""The command line as people meet it: what it refuses and how it says so, its help, and runs from end to end."""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from peft import PeftConfig

from tutelage.algorithms.registry import NAMES, find
from tutelage.cli import main
from tutelage.cli.arguments import DataArguments, ModelArguments, parse
from tutelage.data import Tokenization
from tutelage.groups import Role
from tutelage.models.loading import load_tokenizer
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer

SUMS = [{"prompt": f"What is {i} + {i}?", "completion": f" {2 * i}"} for i in range(8)]
QUICK = {
    "max_completion_length": 6,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "bf16": "false",
    "dtype": "float32",
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def write_rows(path, rows):
    """A .jsonl file; a row that is already text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def save_model(folder, style="gemma3", architecture="llama", vocab_size=None, without=()):
    """A tiny model with its tokenizer, some of whose special tokens may be missing."""
    tokenizer = tiny_tokenizer(style)
    for token in without:
        setattr(tokenizer, token, None)
    tiny_model(architecture, vocab_size=vocab_size or len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model whose tokenizer has everything."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def sums(tmp_path):
    return write_rows(tmp_path / "sums.jsonl", SUMS)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def tutelage(capsys):
    """Runs a command in this process; returns the exit code, stdout and stderr."""

    def run(*args):
        capsys.readouterr()
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refusal(tutelage):
    """The one line that refuses a command, and refuses it as every command is refused."""

    def run(*args):
        code, _, error = tutelage(*args)
        assert code == 2
        lines = error.strip().splitlines()
        assert len(lines) == 1, error
        assert lines[0].startswith("tutelage: error: ")
        assert "Traceback" not in error
        return lines[0]

    return run


def training(command, model, data, out, **options):
    """The arguments of a training run; True is a flag, a tuple several values."""
    options = {"model_name_or_path": model, "dataset_name": data, "output_dir": out, **QUICK, **options}
    args = [command]
    for name, value in options.items():
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        args += [f"--{name}", *map(str, values)]
    return args


# --- data that cannot be used ------------------------------------------------------------------------------------------

GOOD = {"prompt": "2 + 2?", "completion": "four"}
BAD_ROWS = {
    "unknown columns": ([{"query": "2 + 2", "reply": "4"}], ["'query', 'reply'", "prompt + completion"]),
    "no rows": ([], ["is empty", "at least one row"]),
    "empty prompt": (
        [GOOD, {"prompt": " ", "completion": "4"}],
        ["row 2", "'prompt'", "is empty", "leave the row out"],
    ),
    "empty completion": ([GOOD, {"prompt": "2 + 2", "completion": ""}], ["row 2", "'completion'", "is empty"]),
    "a number for a text": ([GOOD, GOOD, {"prompt": "2 + 2", "completion": 4}], ["row 3", "'completion'", "not int"]),
    "a number for a content": (
        [{"messages": [user("2 + 2?"), assistant(4)]}],
        ["row 1", "'messages'", "message 2", "not int"],
    ),
    "roles out of order": (
        [{"messages": [user("a"), assistant("b")]}, {"messages": [assistant("a"), user("b")]}],
        ["row 2", "'messages'", "message 1 is from the assistant", "user and assistant in turn"],
    ),
    "no assistant turn": ([{"messages": [user("2 + 2?")]}], ["row 1", "'messages'", "no assistant turn"]),
    "broken JSON": ([GOOD, '{"prompt": "2 + 2'], ["row 2", "not valid JSON", "one JSON object"]),
    "long prompt": (
        [GOOD, {"prompt": "2 + 2 " * 100, "completion": "4"}],
        ["row 2", "limit is 40", "--on_long_prompt drop", "--max_prompt_length"],
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(case, refusal, model, tmp_path, out):
    rows, said = BAD_ROWS[case]
    data = write_rows(tmp_path / "bad.jsonl", rows)
    error = refusal(*training("sft", model, data, out, max_prompt_length=40))
    assert data in error
    for words in said:
        assert words in error
    assert not out.exists()


def test_missing_file(refusal, model, tmp_path, out):
    error = refusal(*training("irft", model, tmp_path / "nowhere.jsonl", out))
    assert "nowhere.jsonl" in error
    assert "does not exist. Check the path." in error
    assert not out.exists()


def test_unknown_kind_of_file(refusal, model, tmp_path, out):
    data = tmp_path / "rows.docx"
    data.write_bytes(b"PK")
    error = refusal(*training("irft", model, data, out))
    assert "rows.docx" in error
    assert ".jsonl" in error
    assert not out.exists()


def test_unreadable_file(refusal, model, tmp_path, out):
    data = tmp_path / "rows.parquet"
    data.write_bytes(b"no parquet")
    assert "rows.parquet" in refusal(*training("irft", model, data, out))
    assert not out.exists()


def test_long_prompts_are_dropped_and_counted(tutelage, model, tmp_path, out):
    data = write_rows(tmp_path / "rows.jsonl", [*SUMS, {"prompt": "2 + 2 " * 100, "completion": "4"}])
    code, _, _ = tutelage(*training("sft", model, data, out, max_prompt_length=40, on_long_prompt="drop"))
    assert code == 0
    code, shown, _ = tutelage("data", data, "--model_name_or_path", model, "--max_prompt_length", 40)
    assert code == 0
    assert re.search(r"rows\D+9", shown)
    assert re.search(r"demonstrations\D+8", shown)


# --- models that do not fit --------------------------------------------------------------------------------------------


def test_conversations_need_a_chat_template(refusal, tmp_path, out):
    model = save_model(tmp_path / "plain", "plain")
    data = write_rows(tmp_path / "talk.jsonl", [{"messages": [user("2 + 2?"), assistant("4")]}])
    error = refusal(*training("irft", model, data, out))
    for words in ("talk.jsonl", "row 1", "no chat template", "Use a model whose tokenizer has one"):
        assert words in error
    assert not out.exists()


def test_tokenizer_without_pad_and_end(refusal, tmp_path, sums, out):
    model = save_model(tmp_path / "endless", "plain", without=["pad_token", "eos_token"])
    error = refusal(*training("irft", model, sums, out))
    assert "no EOS token" in error
    assert "Set tokenizer.eos_token" in error
    assert not out.exists()


def test_tokenizer_larger_than_the_model(refusal, tmp_path, sums, out):
    model = save_model(tmp_path / "small", vocab_size=100)
    error = refusal(*training("irft", model, sums, out))
    assert re.search(r"'model_name_or_path': the tokenizer has \d+ tokens, the model's embedding 100", error)
    assert "resize_token_embeddings" in error
    assert not out.exists()


def test_adapter_on_a_tied_head(refusal, tmp_path, sums, out):
    model = save_model(tmp_path / "tied", architecture="gemma3")
    error = refusal(*training("irft", model, sums, out, use_peft=True, lora_target_modules="lm_head"))
    for words in ("'lora_target_modules'", "lm_head", "all-linear"):
        assert words in error
    assert not out.exists()


def test_no_such_model(refusal, tmp_path, sums, out):
    error = refusal(*training("irft", tmp_path / "nowhere", sums, out))
    assert "'model_name_or_path'" in error
    assert "nowhere" in error
    assert not out.exists()


# --- arguments that make no sense --------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "more stages than steps": ("irft", {"stages_per_epoch": 20}, ["'stages_per_epoch'", "20 stages", "2 or less"]),
    "SPIN with two stages": ("spin", {"stages_per_epoch": 2}, ["'stages_per_epoch'", "not 2", "Use irft"]),
    "beta below 0": ("irft", {"beta": -1}, ["'beta'", "above 0"]),
    "two betas for three stages": ("irft", {"beta": (0.1, 0.2), "stages_per_epoch": 3}, ["'beta'", "3 stages"]),
    "temperature 0": ("irft", {"temperature": 0}, ["'temperature'", "at least 0.0001"]),
    "smoothed labels": ("sft", {"label_smoothing_factor": 0.1}, ["'label_smoothing_factor'", "Leave it at 0"]),
    "no number": ("irft", {"num_samples": "two"}, ["--num_samples", "'two'", "irft --help"]),
    "no such choice": ("irft", {"loss_kind": "squared"}, ["--loss_kind", "'squared'", "'logistic'"]),
    "a misspelt argument": (
        "irft",
        {"stages_per_epochs": 2},
        ["--stages_per_epochs", "Did you mean --stages_per_epoch?"],
    ),
    "an argument of another command": ("sft", {"beta": 0.1}, ["unknown argument '--beta'"]),
    "no such split": ("sft", {"dataset_train_split": "dev"}, ["sums.jsonl", "'dev'", "train[:90%]"]),
    "evaluation without data": ("sft", {"eval_strategy": "epoch"}, ["sums.jsonl", "'test'"]),
    "no such verifier": ("sft", {"eval_dataset_name": "DATA", "verifier": "sums"}, ["'verifier'", "module:function"]),
    "a best model of nothing": ("sft", {"load_best_model_at_end": True}, ["eval"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case, refusal, model, sums, out):
    command, options, said = BAD_OPTIONS[case]
    options = {name: sums if value == "DATA" else value for name, value in options.items()}
    error = refusal(*training(command, model, sums, out, **options))
    for words in said:
        assert words in error
    assert not out.exists()


@pytest.mark.parametrize("missing", ["dataset_name", "model_name_or_path", "output_dir"])
def test_missing_argument(missing, refusal, model, sums, out):
    args = training("irft", model, sums, out)
    place = args.index(f"--{missing}")
    error = refusal(*args[:place], *args[place + 2 :])
    assert f"Add --{missing} " in error
    assert not out.exists()


def test_unknown_command(refusal):
    error = refusal("irtf")
    assert "unknown command 'irtf'" in error
    assert "irft" in error


def test_missing_arguments_of_other_commands(refusal, model, sums):
    assert "--output" in refusal("sample", "--model_name_or_path", model, "--dataset_name", sums)
    assert "--reward --policy" in refusal("score", "--dataset_name", sums, "--output", "scored.jsonl")
    assert "--model_name_or_path" in refusal("evaluate", "--dataset_name", sums, "--output_dir", "nowhere")
    assert "RUN" in refusal("report")
    assert "DATA" in refusal("data", "--model_name_or_path", model)


# --- a config file -----------------------------------------------------------------------------------------------------

BAD_CONFIGS = {
    "not YAML": ("beta: [0.1\n", ["config.yaml", "row 2", "not YAML"]),
    "a list": ("- beta\n", ["config.yaml", "name: value"]),
    "unknown key": ("stage_per_epoch: 2\n", ["config.yaml", "'stage_per_epoch'", "Did you mean stages_per_epoch?"]),
    "no such choice": ("layout: bush\n", ["--layout", "'bush'", "'shared_prefix'"]),
    "no number": ("num_samples: 1.5\n", ["--num_samples", "'1.5'"]),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config(case, refusal, model, sums, tmp_path, out):
    text, said = BAD_CONFIGS[case]
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    error = refusal(*training("irft", model, sums, out, config=tmp_path / "config.yaml"))
    for words in said:
        assert words in error
    assert not out.exists()


def test_missing_config(refusal, model, sums, tmp_path, out):
    error = refusal(*training("irft", model, sums, out, config=tmp_path / "nowhere.yaml"))
    assert "nowhere.yaml" in error
    assert "--config" in error
    assert "--config needs a file" in refusal(*training("irft", model, sums, out), "--config")
    assert not out.exists()


def parsed(tmp_path, content, *args):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return parse("irft", find("irft").config, [f"--config={path}", *args])


def test_config_and_command_line(tmp_path):
    """The command line wins over the file, and the file over the defaults; lists, flags and nothing arrive as such."""
    content = {
        "output_dir": "runs/a",
        "use_peft": True,
        "beta": [0.1, 0.2],
        "stages_per_epoch": 2,
        "learning_rate": "5e-7",  # YAML 1.1 reads 5e-7 without a point as text
        "lora_target_modules": ["q_proj", "v_proj"],
        "save_each_stage": False,
        "eval_dataset_name": None,
        "report_to": ["tensorboard", "wandb"],
        "max_steps": -1,
    }
    data, model, training = parsed(tmp_path, content, "--beta", "0.3", "0.4", "--seed", "7")
    assert (data.eval_dataset_name, model.use_peft, model.lora_target_modules) == (None, True, ["q_proj", "v_proj"])
    assert (training.beta, training.learning_rate, training.seed) == ([0.3, 0.4], 5e-7, 7)
    assert (training.save_each_stage, training.report_to) == (False, ["tensorboard", "wandb"])
    assert (training.output_dir, training.max_steps) == ("runs/a", -1)
    _, _, training = parsed(tmp_path, content)
    assert training.beta == [0.1, 0.2]


# --- help --------------------------------------------------------------------------------------------------------------


def our_fields(*kinds):
    """Fields that a class of this project defines."""
    bases = [base for kind in kinds for base in kind.__mro__ if base.__module__.startswith("tutelage.")]
    own = {name for base in bases for name in inspect.get_annotations(base)}
    return {entry.name: entry for kind in kinds for entry in dataclasses.fields(kind) if entry.name in own}


@pytest.mark.parametrize("command", NAMES)
def test_help(command, tutelage):
    code, shown, _ = tutelage(command, "--help")
    assert code == 0
    explained = dict(re.findall(r"^  --(\w+)\n((?:      .+\n?)+)", shown, re.MULTILINE))
    for name, entry in our_fields(DataArguments, ModelArguments, find(command).config).items():
        assert " ".join(entry.metadata["help"].split()) in " ".join(explained[name].split()), name
    assert all(text.strip() for text in explained.values())
    assert "adam_beta1" not in explained
    assert max(map(len, shown.splitlines())) <= 100
    code, everything, _ = tutelage(command, "--help_all")
    assert code == 0
    inherited = {entry.name for entry in dataclasses.fields(find(command).config) if entry.init}
    assert inherited <= set(re.findall(r"^  --(\w+)$", everything, re.MULTILINE))


def test_usage(tutelage):
    code, shown, _ = tutelage()
    assert code == 0
    for command in (
        "quickstart",
        "sft",
        "spin",
        "irft",
        "rft",
        "sample",
        "score",
        "evaluate",
        "extrapolate",
        "report",
        "data",
        "clean",
        "vllm-command",
    ):
        assert command in shown
    assert tutelage("--help")[1] == shown


@pytest.mark.parametrize(
    "command", ["sample", "score", "evaluate", "extrapolate", "report", "data", "clean", "vllm-command"]
)
def test_help_of_other_commands(command, tutelage):
    code, shown, _ = tutelage(command, "--help")
    assert code == 0
    assert "default: None" not in shown
    arguments = re.split(r"\n  (?=--)", shown.partition("options:")[2])[1:]
    assert arguments
    for argument in arguments:
        assert re.search(r"\w\.(\s|$)", argument), f"no sentence about {argument}"


# --- the output folder -------------------------------------------------------------------------------------------------


def test_output_folder_in_use(tutelage, refusal, model, sums, out):
    run = training("sft", model, sums, out)
    assert tutelage(*run)[0] == 0
    first = (out / "results.json").read_text(encoding="utf-8")
    error = refusal(*run)
    for words in (str(out), "not empty", "--resume", "--overwrite_output_dir"):
        assert words in error
    assert (out / "results.json").read_text(encoding="utf-8") == first
    code, shown, _ = tutelage(*run, "--resume")
    assert code == 0
    assert "no checkpoint" not in shown
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    assert tutelage(*run, "--overwrite_output_dir", "--seed", 7)[0] == 0
    assert json.loads((out / "results.json").read_text(encoding="utf-8"))["seed"] == 7
    assert (out / "notes.txt").exists()  # what no run wrote is not a run's to remove


def test_output_folder_is_a_file(refusal, model, sums, out):
    out.write_text("mine", encoding="utf-8")
    assert "is a file" in refusal(*training("sft", model, sums, out))
    assert out.read_text(encoding="utf-8") == "mine"


def test_resume_says_that_there_is_nothing_to_resume(tutelage, model, sums, out):
    code, shown, _ = tutelage(*training("sft", model, sums, out), "--resume")
    assert code == 0
    assert "no checkpoint in" in shown


@pytest.mark.parametrize("command", ["sft", "spin"])
def test_loss_that_is_no_number(command, refusal, model, sums, out):
    """Training stops before the step, says which, and leaves what it had written."""
    error = refusal(*training(command, model, sums, out, learning_rate=1e30))
    assert re.search(r"the (loss|gradient) is (nan|inf|-inf) at step 2", error)
    assert "Lower --learning_rate" in error
    assert out.exists()
    assert not (out / "results.json").exists()


# --- what does not train -----------------------------------------------------------------------------------------------


def test_sample(tutelage, refusal, model, sums, tmp_path):
    output = tmp_path / "new" / "samples.jsonl"
    command = ["sample", "--model_name_or_path", model, "--dataset_name", sums, "--output", output]
    command += ["--max_completion_length", 6, "--num_samples", 2, "--dtype", "float32"]
    assert tutelage(*command)[0] == 0
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in lines] == list(range(8))
    tokenization = Tokenization(load_tokenizer(model), max_completion_length=6)
    for line, row in zip(lines, SUMS, strict=True):
        shown, *samples = line["completions"]
        assert (line["prompt"], shown["text"]) == (row["prompt"], row["completion"])
        assert tuple(line["prompt_ids"]) == tokenization.prompt_ids(row["prompt"])
        demonstration = tokenization.completion(row["prompt"], row["completion"], Role.DEMONSTRATION)
        assert tuple(shown["token_ids"]) == demonstration.token_ids
        assert (shown["role"], shown["finished"]) == ("demonstration", demonstration.finished)
        assert [sample["role"] for sample in samples] == ["sample", "sample"]
        for sample in samples:
            assert 1 <= len(sample["token_ids"]) <= 6
            assert sample["finished"] or len(sample["token_ids"]) == 6
            logps = sample["token_values"]["sampler_logps"]
            assert len(logps) == len(sample["token_ids"])
            assert all(logp < 0 for logp in logps)
    before = output.read_bytes()
    error = refusal(*command)
    assert str(output) in error
    assert "exists" in error
    assert output.read_bytes() == before


def test_sample_takes_prompts_alone(tutelage, refusal, model, tmp_path):
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in SUMS])
    command = ["sample", "--model_name_or_path", model, "--dataset_name", data, "--max_completion_length", 6]
    assert tutelage(*command, "--output", tmp_path / "samples.jsonl")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in SUMS]
    assert all([found["role"] for found in line["completions"]] == ["sample"] for line in lines)
    error = refusal(*command, "--output", tmp_path / "more.jsonl", "--max_prompt_length", 2)
    assert "row 1, field 'prompt'" in error


def test_evaluate_and_report(tutelage, refusal, model, sums, tmp_path):
    other = save_model(tmp_path / "other", architecture="qwen3")
    out = tmp_path / "evaluation"
    command = ["evaluate", "--model_name_or_path", other, "--reference", model, "--dataset_name", sums]
    command += ["--output_dir", out, "--max_completion_length", 6, "--dtype", "float32", "--beta", 0.5]
    code, shown, _ = tutelage(*command)
    assert code == 0
    assert "no method to judge" in shown
    assert (out / "report.html").stat().st_size > 1000
    start, found = (json.loads((out / name / "results.json").read_text("utf-8")) for name in ("tiny", "other"))
    assert (start["name"], start["start"], found["name"], found["start"]) == ("tiny", None, "other", start["id"])
    assert found["evaluation"]["rows"] == list(range(8))
    start, found = (each["evaluation"]["means"] for each in (start, found))
    assert start["demonstration_reward"]["mean"] == pytest.approx(0, abs=1e-5)
    gain = found["demonstration_logp"]["mean"] - start["demonstration_logp"]["mean"]
    assert found["demonstration_reward"]["mean"] == pytest.approx(0.5 * gain, rel=1e-4)
    assert "not empty" in refusal(*command)

    page = tmp_path / "page.html"
    code, shown, _ = tutelage("report", out / "tiny", out / "other" / "results.json", "--output", page)
    assert code == 0
    assert "other" in page.read_text(encoding="utf-8")
    assert "nowhere" in refusal("report", tmp_path / "nowhere")
    # Its own page is written anew; what is none stays.
    assert tutelage("report", out / "tiny", out / "other", "--output", page)[0] == 0
    kept = tmp_path / "kept.jsonl"
    kept.write_text("{}\n")
    assert "the file exists, and is no report" in refusal("report", out / "tiny", "--output", kept)
    assert kept.read_text() == "{}\n"
    assert "is a folder" in refusal("report", out / "tiny", "--output", tmp_path)


def test_a_recurrent_model_is_trained_and_evaluated(tutelage, refusal, sums, tmp_path, monkeypatch):
    """By log-probs alone, for no answers can be drawn from it; with a verifier that is said before training."""
    mamba, out = save_model(tmp_path / "mamba", architecture="mamba"), tmp_path / "out"
    run = training("sft", mamba, sums, out, eval_dataset_name=sums)
    assert tutelage(*run)[0] == 0
    record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert record["evaluation"]["means"]["demonstration_logp"]["n"] == 8
    assert {sample["sampled"] for sample in record["samples"]} == {None}
    command = ["evaluate", "--model_name_or_path", out, "--dataset_name", sums, "--max_completion_length", 6]
    assert tutelage(*command, "--output_dir", tmp_path / "evaluation")[0] == 0
    (tmp_path / "tutelage_test_kind.py").write_text("def score(text, row):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    error = refusal(*run, "--overwrite_output_dir", "--verifier", "tutelage_test_kind:score")
    assert "nothing to score" in error
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == record, "what was there is left alone"


def test_results_are_there_when_the_evaluation_fails(refusal, model, sums, out, tmp_path, monkeypatch):
    (tmp_path / "tutelage_test_moody.py").write_text(
        "calls = []\ndef score(text, row):\n    calls.append(text)\n    return 1 / (2 - len(calls))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = training("sft", model, sums, out, eval_dataset_name=sums)
    assert "the verifier failed: ZeroDivisionError" in refusal(*run, "--verifier", "tutelage_test_moody:score")
    record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert record["history"]
    assert record["evaluation"] is None


def test_report_of_a_chain(tutelage, model, sums, tmp_path):
    """SFT, then twice IRFT from its folder; the runs of one name are told apart, and know what they started from."""
    sft, first, second = (tmp_path / name for name in ("sft", "first", "second"))
    evaluated = {"eval_dataset_name": sums, "eval_rows": 4}
    assert tutelage(*training("sft", model, sums, sft, **evaluated))[0] == 0
    assert tutelage(*training("irft", sft, sums, first, stages_per_epoch=2, **evaluated))[0] == 0
    assert tutelage(*training("irft", sft, sums, second, use_peft=True, stages_per_epoch=1, **evaluated))[0] == 0
    record = json.loads((first / "results.json").read_text(encoding="utf-8"))
    assert (record["model"], record["algorithm"]) == (str(sft), "irft")
    assert len(list((first / "stages").glob("stage-*/samples.jsonl"))) == 2
    out = tmp_path / "evaluation"
    command = ["evaluate", "--model_name_or_path", first, sft, "--reference", model, "--dataset_name", sums]
    assert tutelage(*command, "--output_dir", out, "--max_completion_length", 6)[0] == 0
    names = ("first", "sft", "tiny")
    found, start, base = (json.loads((out / name / "results.json").read_text("utf-8")) for name in names)
    assert found["start"] == record["start"] == start["id"], "a run knows what it started from"
    assert start["start"] == base["id"]
    page = tmp_path / "report.html"
    code, shown, _ = tutelage("report", sft, first, second, "--output", page)
    assert code == 0
    assert "Too few rows to compare first with sft" in " ".join(shown.split())
    assert "Too few rows to compare second with sft" in " ".join(shown.split())


def test_data(tutelage, refusal, model, tmp_path):
    rows = [
        {"messages": [user(f"{i} + {i}?"), assistant(str(2 * i)), user("Sure?"), assistant("Yes.")]} for i in range(5)
    ]
    data = write_rows(tmp_path / "talk.jsonl", rows)
    code, shown, _ = tutelage("data", data, "--model_name_or_path", model, "--turns", "all")
    assert code == 0
    assert re.search(r"rows\D+5", shown)
    assert re.search(r"demonstrations\D+10", shown)
    assert "nowhere" in refusal("data", tmp_path / "nowhere.jsonl", "--model_name_or_path", model)


# --- in a process of its own -------------------------------------------------------------------------------------------


def process(*args):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tutelage", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_a_whole_run(adapter, model, sums, out):
    options = {"stages_per_epoch": 2, "eval_dataset_name": sums, **({"use_peft": True} if adapter else {})}
    done = process(*training("irft", model, sums, out, **options))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert str(out / "report.html") in "".join(done.stdout.split("\n"))
    record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert record["demonstration_epochs"] == 1
    assert len(record["evaluation"]["rows"]) == 8
    losses = [row["loss"] for row in record["history"] if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: at a stage's start the margin is 0
    assert len(losses) == 2
    assert (out / "README.md").exists()
    if adapter:
        assert PeftConfig.from_pretrained(out).base_model_name_or_path == model
        assert not (out / "model.safetensors").exists()
    else:
        assert (out / "model.safetensors").exists()
    for stage in range(2):
        manifest = json.loads((out / "stages" / f"stage-{stage:04d}" / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["complete"]


def test_help_in_a_process():
    done = process("irft", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: tutelage irft ")


def test_error_in_a_process(tmp_path, model, out):
    run = training("irft", model, tmp_path / "nowhere.jsonl", out)
    done = process(*run, "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "tutelage.errors.UserError" in done.stderr
    done = process("irtf")  # before torch is imported, so it costs nothing
    assert done.returncode == 2
    assert done.stderr.startswith("tutelage: error: ")
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_the_command_for_vllm_is_printed_for_a_shell(tutelage, refusal, model):
    code, shown, _ = tutelage("vllm-command", model, "--lora_r", 20, "--max_prompt_length", 100, "--port", 8123)
    assert code == 0
    assert f"--model {model} " in shown
    assert all(part in shown for part in ("--max-lora-rank 32", "--max-model-len 357", "--port 8123"))
    assert "no such folder" in refusal("vllm-command", "/no/such/model")
    assert "lora_r" in refusal("vllm-command", model, "--lora_r", 0)
