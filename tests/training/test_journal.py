"""metrics.jsonl: the lines of the trainer's history, each once, whatever happens to the run."""

import json
import math

import pytest
from test_resume import KillAt, Killed, make

from training_runs import Training
from tutelage.errors import Terminated, UserError
from tutelage.training.journal import METRICS, Journal, read_journal
from tutelage.training.made import made_files
from tutelage.training.publishing import NOT_UPLOADED
from tutelage.training.termination import listening


def lines(trainer):
    """As any reader of JSON would take them; NaN is none."""
    text = (trainer.journal_folder / METRICS).read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def run(training, name, **settings):
    trainer = make(training, name, **settings)
    trainer.journal_folder = training.folder / name
    return trainer


def without_clock(found):
    """Without what a clock decides, and the last line, which is of one process."""
    return [
        {
            name: value
            for name, value in line.items()
            if name not in ("seconds", "tokens_per_second") and not name.startswith("time/")
        }
        for line in found
        if line["event"] != "end"
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = run(Training(tmp_path_factory.mktemp("journal")), "whole-journal")
    trainer.train()
    return trainer


def test_it_is_the_history_of_the_trainer(whole):
    found = lines(whole)
    history = json.loads(json.dumps(whole.state.log_history))
    assert [{k: v for k, v in line.items() if k not in ("event", "seconds")} for line in found] == history
    assert [line["event"] for line in found[:3]] == ["stage", "train", "train"]
    assert found[-1]["event"] == "end"
    assert [line["stage"] for line in found if line["event"] == "stage"] == [0, 1, 2, 3]
    seconds = [line["seconds"] for line in found]
    assert seconds == sorted(seconds)
    assert whole.journal_folder / METRICS in made_files(whole.journal_folder)


@pytest.mark.parametrize("step", [3, 5, 6], ids=["at a stage's end", "behind a checkpoint", "at both"])
def test_a_killed_run_has_each_line_once(training, whole, step):
    name = f"killed-{step}"
    killed = run(training, name, callbacks=[KillAt("on_pre_optimizer_step", step)])
    with pytest.raises(Killed):
        killed.train()
    before = lines(killed)
    assert before[-1]["step"] == step
    with (killed.journal_folder / METRICS).open("a") as file:
        file.write('{"event": "tra')  # torn
    resumed = run(training, name)
    resumed.train(resume_from_checkpoint=True)
    found = lines(resumed)
    assert without_clock(found) == without_clock(lines(whole))
    assert found[:2] == before[:2], "what was logged stays as it was, seconds too"
    seconds = [line["seconds"] for line in found]
    assert seconds == sorted(seconds)


def test_a_run_that_was_asked_to_end_has_each_line_once(training, whole):
    asked = run(training, "asked", save_each_stage=False, save_steps=1000)
    prepare = asked.stages.phase.prepare

    def dying(draw, *args, **options):  # when the stage's line has been logged, and the stage has not begun
        if draw.stage == 2:
            raise Terminated
        return prepare(draw, *args, **options)

    asked.stages.phase.prepare = dying
    with listening(), pytest.raises(Terminated):
        asked.train()
    assert (lines(asked)[-1]["event"], lines(asked)[-1]["stage"]) == ("stage", 2)
    resumed = run(training, "asked", save_each_stage=False, save_steps=1000)
    resumed.train(resume_from_checkpoint=True)
    assert without_clock(lines(resumed)) == without_clock(lines(whole))
    assert resumed.state.log_history == [
        {k: v for k, v in line.items() if k not in ("event", "seconds")} for line in lines(resumed)
    ]


@pytest.mark.parametrize("damage", ["gone", "altered"])
def test_lines_that_are_lost_are_written_again(training, whole, damage):
    killed = run(training, damage, callbacks=[KillAt("on_pre_optimizer_step", 5)])
    with pytest.raises(Killed):
        killed.train()
    path = killed.journal_folder / METRICS
    if damage == "gone":
        path.unlink()
    else:
        path.write_text(path.read_text().replace('"loss"', '"lost"'))
    resumed = run(training, damage)
    resumed.train(resume_from_checkpoint=True)
    assert without_clock(lines(resumed)) == without_clock(lines(whole))
    assert lines(resumed)[1]["seconds"] is None


def test_a_number_that_is_none_is_null(tmp_path):
    class State:
        is_world_process_zero, log_history = True, []

    state, clock = State(), iter([0.0, 2.0])
    journal = Journal(tmp_path, clock=lambda: next(clock))
    journal.on_train_begin(None, state, None)
    state.log_history.append({"loss": math.nan, "grad_norm": math.inf, "epoch": 0.5, "step": 1})
    journal.on_log(None, state, None)
    (line,) = [json.loads(text, parse_constant=pytest.fail) for text in (tmp_path / METRICS).read_text().splitlines()]
    assert line == {
        "event": "train",
        "step": 1,
        "stage": None,
        "epoch": 0.5,
        "seconds": 2.0,
        "loss": None,
        "grad_norm": None,
    }


def test_a_reader_leaves_out_what_is_being_written(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2', encoding="utf-8")
    assert read_journal(tmp_path) == [{"step": 1}]
    assert read_journal(tmp_path / "nowhere") == []


def test_a_file_of_somebody_else_is_not_replaced(training):
    trainer = run(training, "mine")
    (trainer.journal_folder / METRICS).write_text("mine")
    with pytest.raises(UserError, match=r"metrics\.jsonl.*no run of tutelage wrote this file"):
        trainer.train()
    assert (trainer.journal_folder / METRICS).read_text() == "mine"
    assert not (trainer.journal_folder / "run.json").exists()


def test_it_stays_on_the_machine():
    assert {METRICS, "progress.json"} <= set(NOT_UPLOADED)
