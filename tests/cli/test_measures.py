"""What training commands and ``tutelage evaluate`` measure besides score and log-prob, from the command line to the page."""

import json

import pytest

from rft_runs import QUICK
from tutelage.cli import main
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer

SUMS = [{"prompt": f"What is {i} + {i}?", "completion": f" {2 * i}"} for i in range(12)]
COLORS = [{"prompt": f"Color {i}?", "completion": " red"} for i in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("measures") / "tiny", tiny_tokenizer("zephyr")
    tiny_model(vocab_size=len(tokenizer), num_hidden_layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two tasks, and a verifier that gives half of all answers a full score."""
    for name, rows in (("sums", SUMS), ("colors", COLORS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "tutelage_measures.py").write_text(
        "def even(text, row):\n    return float(sum(map(ord, text)) % 2 == 0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def command(capsys):
    """Runs a command; returns the exit code and everything it printed, on one line."""

    def call(*args):
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return code, " ".join("".join(capsys.readouterr()).split())

    return call


def train(algorithm, model, data, out, *more):
    args = [algorithm, "--model_name_or_path", model, "--dataset_name", data / "sums.jsonl", "--output_dir", out]
    args += ["--max_completion_length", 6, "--bf16", "false", "--dtype", "float32", "--logging_steps", 1]
    return [*args, "--per_device_train_batch_size", 4, "--num_train_epochs", 1, "--learning_rate", 1e-3, *more]


def measured(data, *, retention=True):
    args = ["--eval_dataset_name", data / "sums.jsonl", "--verifier", "tutelage_measures:even", "--eval_samples", 4]
    if retention:
        args += ["--retention_dataset", data / "colors.jsonl", "--retention_verifier", "tutelage_measures:even"]
    return args


def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_a_run_of_rft(command, model, data):
    """Everything that is measured of one run stands in its record and on its page."""
    out = data / "out"
    settings = ["--use_peft", *(part for name, value in QUICK.items() for part in (f"--{name}", value))]
    code, shown = command(*train("rft", model, data, out, *measured(data), *settings))
    assert code == 0, shown
    record = results(out)
    evaluation = record["evaluation"]
    assert {"distinct_right", "kl"} <= evaluation["means"].keys()
    assert evaluation["samples_per_row"] == 4
    assert [each["n"] for each in evaluation["reward_quality"]["best_of"]] == [1, 2, 4]
    assert {"reward", "logp", "length"} == evaluation["reward_quality"]["auc"].keys()
    kept = record["retention"]
    assert {"sampled_score", "greedy_score", "demonstration_logp"} <= kept["change"].keys()
    assert kept["before"]["dataset"] == str(data / "colors.jsonl")
    assert {"sampling", "reference", "validation", "total"} <= record["flops"].keys()
    page = (out / "report.html").read_text(encoding="utf-8")
    for heading in ("Retention", "Reward quality"):
        assert f"<h2>{heading}</h2>" in page
    for column in ("distinct right answers", "KL to the start", "retention change", "operations"):
        assert f">{column}<" in page

    code, shown = command(*train("rft", model, data, out, *measured(data), *settings, "--resume"))
    assert code == 0, shown
    again = results(out)
    assert again["retention"]["before"] == kept["before"]
    assert again["evaluation"]["means"]["kl"]["mean"] == pytest.approx(evaluation["means"]["kl"]["mean"], abs=1e-4)
    assert again["flops"]["sampling"] == record["flops"]["sampling"]


def test_evaluate(command, model, data):
    """Against the reference, which is the start: the KL and what was forgotten, of a model and of the start itself."""
    run, out = data / "run", data / "evaluation"
    code, shown = command(*train("sft", model, data, run, "--learning_rate", 1e-2))
    assert code == 0, shown
    assert results(run)["retention"] is None
    args = ["evaluate", "--model_name_or_path", run, "--reference", model, "--dataset_name", data / "sums.jsonl"]
    args += ["--output_dir", out, "--max_completion_length", 6, "--dtype", "float32"]
    args += [arg for arg in measured(data) if arg not in ("--eval_dataset_name", data / "sums.jsonl")]
    code, shown = command(*args)
    assert code == 0, shown
    start, found = results(out / "tiny"), results(out / "run")
    zero = start["evaluation"]["means"]["kl"]
    assert (zero["mean"], zero["low"], zero["high"]) == pytest.approx((0, 0, 0), abs=1e-4)
    assert found["evaluation"]["means"]["kl"]["mean"] > 0.01
    assert (start["retention"], found["retention"]["before"]["rows"]) == (None, list(range(12)))
    assert found["retention"]["change"]["demonstration_logp"]["mean"] != 0
    assert found["flops"]["total"] > 0, "what the run cost stays with it"


BAD = {
    "no answers": (["--eval_samples", 0], ["'eval_samples'", "at least 1"]),
    "a verifier without rows": (
        ["--retention_verifier", "tutelage_measures:even"],
        ["'retention_verifier'", "Add --retention_dataset"],
    ),
    "no such data": (["--retention_dataset", "nowhere.jsonl"], ["nowhere.jsonl"]),
    "no such verifier": (
        ["--retention_dataset", "COLORS", "--retention_verifier", "colors"],
        ["not a verifier", "module:function"],
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("which", ["sft", "evaluate"])
def test_bad_options(command, model, data, case, which):
    options, said = BAD[case]
    options = [data / "colors.jsonl" if option == "COLORS" else option for option in options]
    out = data / "out"
    args = train("sft", model, data, out)
    if which == "evaluate":
        args = ["evaluate", "--model_name_or_path", model, "--reference", model, "--dataset_name", data / "sums.jsonl"]
        args += ["--output_dir", out]
    code, shown = command(*args, *options)
    assert code == 2
    assert "Traceback" not in shown
    for words in said:
        assert words in shown
    assert not out.exists()


def test_rows_of_another_task_that_are_no_demonstrations(command, model, data):
    (data / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')
    code, shown = command(*train("sft", model, data, data / "out", "--retention_dataset", data / "bad.jsonl"))
    assert code == 2
    assert "bad.jsonl, row 2, field 'completion'" in shown
    assert not (data / "out").exists()


def test_what_was_forgotten_needs_a_start(command, model, data):
    args = ["evaluate", "--model_name_or_path", model, "--dataset_name", data / "sums.jsonl"]
    code, shown = command(*args, "--output_dir", data / "out", "--retention_dataset", data / "colors.jsonl")
    assert code == 2
    assert "'retention_dataset': needs the start" in shown
    assert "Add --reference" in shown
