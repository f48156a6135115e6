"""tutelage report of a run that is still going on, or was stopped."""

import json
import os

import pytest

from tutelage.cli import main
from tutelage.cli.progress import PROGRESS, TerminalProgress
from tutelage.cli.unfinished import load_run
from tutelage.errors import UserError
from tutelage.terminal import SafeConsole
from tutelage.training.lock import is_locked, locked


class Stop(BaseException):
    """What no one catches."""


@pytest.fixture
def stopped(training, monkeypatch):
    """The folder of a run that was killed in its second stage."""
    trainer = training.trainer("irft", name="run", stages_per_epoch=2)

    def strike(draw, *args, **options):
        if draw.stage == 1:
            raise Stop
        return prepare(draw, *args, **options)

    prepare, trainer.stages.phase.prepare = trainer.stages.phase.prepare, strike
    with pytest.raises(Stop):
        trainer.train()
    return training.folder / "run"


def reported(run, capsys):
    capsys.readouterr()
    assert main(["report", str(run), "--output", str(run.parent / "page.html")]) == 0
    return " ".join(capsys.readouterr().out.split()), (run.parent / "page.html").read_text(encoding="utf-8")


def test_a_run_that_was_stopped(stopped, capsys):
    told, page = reported(stopped, capsys)
    for text in (told, page):
        assert "irft is not finished" in text
        assert "step 2 in stage 1" in text
        assert "it was stopped" in text
        assert "--resume" in text
    assert "control" not in told, "what has not ended is not judged"
    assert "Training loss" in page


def test_a_run_that_is_going_on(stopped, capsys):
    progress = TerminalProgress(SafeConsole(file=open(os.devnull, "w")), "irft")  # noqa: SIM115
    progress.steps(2, 4)
    with locked(stopped), progress, progress.phase("stage 1: sampling", 100) as advance:
        advance(40)
        progress.tell_in(stopped)
        told, _ = reported(stopped, capsys)
    assert "irft is not finished" in told
    assert "now: stage 1: sampling 40/100" in told
    assert "(step 2/4)" in told
    assert "stopped" not in told
    assert not (stopped / PROGRESS).exists(), "it is there as long as something runs"


def test_a_run_that_is_being_evaluated(stopped, capsys):
    training = json.loads((stopped / "run.json").read_text())
    assert training["algorithm"] == "irft"
    record = load_run(stopped)
    record.unfinished = ""
    from tutelage.results import write_results

    write_results(stopped, record)
    assert load_run(stopped).unfinished == ""
    (stopped / PROGRESS).write_text(json.dumps({"now": "evaluating 3/40", "updated": "then"}))
    told, _ = reported(stopped, capsys)
    assert "its training is over" in told
    assert "it was stopped (what it was at, as of then: evaluating 3/40)" in told


def test_where_no_run_has_begun(tmp_path):
    with pytest.raises(UserError, match=r"results\.json"):
        load_run(tmp_path)
    (tmp_path / PROGRESS).write_text("{}")
    with pytest.raises(UserError, match="has not begun to train"):
        load_run(tmp_path)


def test_what_the_file_says(tmp_path):
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    clock = Clock()
    progress = TerminalProgress(SafeConsole(file=open(os.devnull, "w")), "irft", clock=clock)  # noqa: SIM115
    progress.tell_in(tmp_path)
    progress.steps(0, 10)
    clock.now = 8.0
    progress.steps(4, 10)
    clock.now = 20.0
    with progress.phase("sampling", 50) as advance:
        clock.now = 30.0
        advance(20)
        found = json.loads((tmp_path / PROGRESS).read_text())
    assert found["now"] == "sampling 20/50, about 15.0 s left"
    assert found["phases"] == [{"name": "sampling", "done": 20, "total": 50, "seconds": 10.0, "seconds_left": 15.0}]
    # 4 of 10 steps in 30 s, sampling included
    assert found["steps"] == {"name": "step", "done": 4, "total": 10, "seconds": 30.0, "seconds_left": 45.0}


def test_who_holds_a_folder_is_seen_without_taking_it(tmp_path):
    assert is_locked(tmp_path) is False
    with locked(tmp_path):
        assert is_locked(tmp_path) is True
    assert is_locked(tmp_path) is False
    (tmp_path / "lock.json").write_text(json.dumps({"host": "elsewhere", "process": 1}))
    assert is_locked(tmp_path) is None
    (tmp_path / "lock.json").write_text("")
    assert is_locked(tmp_path) is False
