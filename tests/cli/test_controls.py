"""--controls: what a method has to beat, trained after it from the same start and on the same data."""

import json
from dataclasses import replace

import pytest
from rich.console import Console
from test_measures import command, data, model, results, train  # noqa: F401 — fixtures

from tutelage.algorithms.controls import CONTROLS, control_config, controls, matched
from tutelage.algorithms.rft import RFTConfig
from tutelage.algorithms.sft import SFTConfig
from tutelage.cli.arguments import parse
from tutelage.cli.controls import parse_controls
from tutelage.cli.train import train as train_a_run
from tutelage.errors import UserError
from tutelage.report import verdicts
from tutelage.report.runs import is_control, is_method
from tutelage.results import EvaluationRecord, Interval, RunRecord, load_results
from tutelage.training.callbacks import StopAtScore
from tutelage.training.config import SFT_LEARNING_RATES

RFT = ["--validation_rows", 4, "--num_samples", 2, "--stages_per_epoch", 1, "--gradient_accumulation_steps", 1]
RFT += ["--fold_epochs", 1, "--truncated_samples", "score", "--seed", 3]


@pytest.fixture(autouse=True)
def more_data(data):  # noqa: F811
    for name, rows in {
        "prompts": [{"prompt": f"What is {i} + 20?"} for i in range(6)],
        "other": [{"prompt": f"What is {i} + 9?", "completion": f" {i + 9}"} for i in range(4)],
    }.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measured(data):  # noqa: F811
    return ["--eval_dataset_name", data / "sums.jsonl", "--verifier", "tutelage_measures:even"]


def test_a_method_is_judged_against_its_controls(command, model, data, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    run = train("rft", model, data, out, *measured(data), *RFT, "--controls", "gentle", "self_training", "plateau")
    run += ["--prompt_dataset", data / "prompts.jsonl"]
    code, shown = command(*run)
    assert code == 0, shown
    names = {folder.name for folder in (out / "controls").iterdir() if folder.is_dir()}
    plateau, own = (
        {control.name for control in controls(name, adapter=False)} for name in ("plateau", "self_training")
    )
    assert names == {"gentle-sft", *plateau, *own}
    records = {name: load_results(out / "controls" / name) for name in names}
    assert all(is_control(record) and not is_method(record) for record in records.values())
    assert {record.start for record in records.values()} == {load_results(out).start}
    gentle = records["gentle-sft"]
    assert gentle.settings["learning_rate"] == pytest.approx(SFT_LEARNING_RATES["full"] / 10)
    assert gentle.seed == 3
    assert {records[name].settings["policy_update"] for name in own} == {"best_of_n"}
    # Of the runs to the plateau those count that are best on validation rows, which none of them trained on.
    values = {name: json.loads((out / "controls" / name / "validation.json").read_text()) for name in plateau}
    assert all(set(value) == {"score_sampled", "score_greedy"} for value in values.values())
    page = (out / "report.html").read_text(encoding="utf-8")
    for value in ("score_sampled", "score_greedy"):
        best = max(found[value] for found in values.values())
        assert any(found[value] == best and name in page for name, found in values.items())
    lines = (out / "controls" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12 - 4
    assert {record.evaluation.rows[0] for record in records.values()} == {0}
    sentences = " ".join(verdicts([load_results(out), *records.values()]))
    assert "controls by this number" in sentences

    written = {path: path.read_bytes() for path in (out / "controls").rglob("results.json")}
    code, _ = command(*run, "--resume")
    assert code == 0
    assert written == {path: path.read_bytes() for path in (out / "controls").rglob("results.json")}, "trained once"


def test_controls_matched_to_the_method(command, model, data, tmp_path):  # noqa: F811
    """SFT with as many operations, and SFT stopped where it scores as the method does."""
    out = tmp_path / "out"
    run = train("irft", model, data, out, *measured(data), "--stages_per_epoch", 1, "--num_samples", 4)
    code, shown = command(*run, "--controls", "equal_compute", "equal_score")
    assert code == 0, shown
    method = load_results(out)
    compute, score = (load_results(out / "controls" / f"sft-{name}") for name in ("equal-compute", "equal-score"))
    assert compute.flops["total"] == pytest.approx(method.flops["total"], rel=0.25)  # whole steps, other padding
    assert compute.demonstration_epochs > method.demonstration_epochs
    target, reached = (record.evaluation.means["score_sampled"].mean for record in (method, score))
    assert (score.demonstration_epochs < 24) == (reached >= target)
    assert "sft-equal-score: score" in shown
    plateau = {control.name for control in controls("plateau", adapter=False)}
    assert {load_results(out / "controls" / name).settings["learning_rate"] for name in plateau} >= {
        compute.settings["learning_rate"],
        score.settings["learning_rate"],
    }


@pytest.mark.parametrize(("target", "passes"), [(0.0, 1), (1.1, 24)])
def test_training_stops_at_the_score_or_at_its_end(command, model, data, tmp_path, target, passes):  # noqa: F811
    plateau = RunRecord(name="p", algorithm="sft", model="m", dataset="d", seed=0, settings={"learning_rate": 1e-3})
    scored = EvaluationRecord("rows", "even", [0], {"score_sampled": Interval(target, target, target, 1)})
    control = matched("equal_score", replace(plateau, evaluation=scored), plateau)
    folder = tmp_path / "control"
    data_arguments, arguments, config = parse(
        "sft", SFTConfig, [str(part) for part in train("sft", model, data, folder, *measured(data))[1:]]
    )
    config = control_config(control, config, str(folder))
    record = train_a_run(
        "sft",
        data_arguments,
        arguments,
        config,
        Console(),
        prepare=lambda trainer: trainer.add_callback(StopAtScore(trainer, control.until_score)),
    )
    assert record.demonstration_epochs == passes


def test_what_cannot_be_matched_is_said():
    counted = RunRecord(
        name="counted",
        algorithm="sft",
        model="m",
        dataset="d",
        seed=0,
        settings={"learning_rate": 1.0},
        demonstration_epochs=2.0,
    )
    uncounted = replace(counted, name="resumed")
    counted.flops = {"total": 8.0}
    assert matched("equal_compute", counted, counted).settings["num_train_epochs"] == 2.0
    for pair in ((uncounted, counted), (counted, uncounted)):
        with pytest.raises(UserError, match="operations of resumed were not counted"):
            matched("equal_compute", *pair)
    with pytest.raises(UserError, match="answers of counted have no score"):
        matched("equal_score", counted, counted)


def test_a_control_that_was_killed_is_trained_anew(command, model, data, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    run = train("rft", model, data, out, *RFT, "--controls", "gentle")
    assert command(*run)[0] == 0
    folder = out / "controls" / "gentle-sft"
    (folder / "README.md").unlink()  # what a run writes last
    (folder / "results.json").write_text("{}", encoding="utf-8")
    assert command(*run, "--resume")[0] == 0
    assert results(folder)["algorithm"] == "sft"


def test_an_unknown_control_is_refused_before_anything_is_trained(command, model, data, tmp_path):  # noqa: F811
    for given, said in BAD.items():
        code, shown = command(*train("irft", model, data, tmp_path / "out", *given))
        assert code != 0
        assert said in shown
        assert not (tmp_path / "out").exists()


BAD = {
    ("--controls", "plateu"): "field 'controls': there is no control 'plateu'",
    ("--controls", "equal_score"): "they get no score",
    ("--controls", "self_training"): "self-training imitates answers to prompts without demonstrations",
    ("--controls", "gentle", "--dataset_streaming", "--max_steps", 2): "streamed data have no end",
}


def test_names():
    assert parse_controls([], has_prompts=True, has_scores=True) == []
    assert parse_controls(["all", "gentle"], has_prompts=True, has_scores=True) == list(CONTROLS)
    assert parse_controls(["all"], has_prompts=False, has_scores=False) == ["plateau", "gentle", "equal_compute"]
    with pytest.raises(UserError, match="no control 'sft'"):
        parse_controls(["sft"], has_prompts=True, has_scores=True)


@pytest.mark.parametrize("algorithm", ["irft", "sft"])
def test_controls_of_other_methods(command, model, data, tmp_path, algorithm):  # noqa: F811
    """Of few rows, half at most are for the choice."""
    out = tmp_path / "out"
    more = ["--stages_per_epoch", 1] if algorithm == "irft" else []
    code, shown = command(*train(algorithm, model, data, out, *more, "--controls", "all"))
    assert code == 0, shown
    plateau = {control.name for control in controls("plateau", adapter=False)}
    assert {folder.name for folder in (out / "controls").iterdir() if folder.is_dir()} == {
        "gentle-sft",
        "sft-equal-compute",
        *plateau,
    }
    assert len((out / "controls" / "train.jsonl").read_text(encoding="utf-8").splitlines()) == 6


def test_validation_rows_of_their_own_leave_the_data_as_they_are(command, model, data, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    run = train("rft", model, data, out, *RFT[2:], "--validation_dataset", data / "other.jsonl")
    code, shown = command(*run, "--reward_gate", "off", "--controls", "plateau")
    assert code == 0, shown
    assert not (out / "controls" / "train.jsonl").exists()
    trained = {load_results(folder).dataset for folder in (out / "controls").iterdir()}
    assert trained == {load_results(out).dataset}


def test_what_a_control_carries_over(tmp_path):
    method = RFTConfig(
        output_dir=str(tmp_path),
        seed=7,
        verifier="a:b",
        max_completion_length=9,
        prompt_dataset="prompts.jsonl",
        learning_rate=1.0,
        per_device_train_batch_size=3,
        push_to_hub=True,
        reward="model",
        reward_epochs=9,
        reward_ensemble=3,
    )
    gentle, own = (
        control_config(controls(name, adapter=True)[0], method, str(tmp_path / name))
        for name in ("gentle", "self_training")
    )
    assert isinstance(gentle, SFTConfig)
    assert (gentle.seed, gentle.verifier, gentle.max_completion_length) == (7, "a:b", 9)
    assert gentle.learning_rate == pytest.approx(SFT_LEARNING_RATES["adapter"] / 10)
    assert gentle.per_device_train_batch_size == SFTConfig(output_dir="").per_device_train_batch_size
    assert (own.prompt_dataset, own.learning_rate, own.reward) == ("prompts.jsonl", 1.0, "logp")
    assert not gentle.push_to_hub
    assert not own.push_to_hub
    assert gentle.output_dir == str(tmp_path / "gentle")
