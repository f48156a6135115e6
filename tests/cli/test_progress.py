"""What is printed where the output is no terminal, and how the quickstart is sized and timed; with a clock of our own."""

import io

import pytest
from rich.console import Console

from tutelage.cli.progress import TerminalProgress
from tutelage.cli.quickstart import Pace, Plan, size_for


class Clock:
    """Seconds that pass when we say so."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def shown(clock):
    """A progress without a terminal, and the lines it has printed."""
    console = Console(file=io.StringIO(), width=200)
    progress = TerminalProgress(console, "irft", every=30, clock=clock)
    return progress, lambda: console.file.getvalue().splitlines()


def test_long_phase_prints_a_line_now_and_then(shown, clock):
    progress, lines = shown
    with progress.phase("sampling", 100) as advance:
        assert lines() == ["irft: sampling (100)"]
        for done in range(1, 41):
            clock.now += 3
            advance(done)
    # One line per 30 s; 3 s per answer, so 90, 80, 70, 60 answers are 270, 240, 210, 180 s.
    assert lines()[1:] == [
        "irft: sampling 10/100, about 4 min 30 s left",
        "irft: sampling 20/100, about 4 min 00 s left",
        "irft: sampling 30/100, about 3 min 30 s left",
        "irft: sampling 40/100, about 3 min 00 s left",
    ]


def test_work_that_reports_nothing_is_told_too(shown, clock):
    progress, lines = shown
    with progress.phase("held-out log-probs of the start"):
        clock.now += 29
        progress.tick()
        assert len(lines()) == 1
        clock.now += 2
        progress.tick()
        progress.tick()
    assert lines()[1:] == ["irft: held-out log-probs of the start, 31.0 s so far"]


def test_time_left_comes_from_the_steps_of_this_run(shown, clock):
    progress, lines = shown
    progress.steps(10, 20)  # resumed at step 10: the steps before tell nothing
    clock.now += 40
    progress.steps(14, 20)
    assert lines() == ["irft: step 14/20, about 1 min 00 s left"]


def test_a_phase_within_a_run_is_what_is_told(shown, clock):
    progress, lines = shown
    progress.steps(1, 20)
    with progress.phase("sampling", 10) as advance:
        clock.now += 30
        advance(5)
    clock.now += 30
    progress.tick()
    assert lines() == [
        "irft: sampling (10)",
        "irft: sampling 5/10, about 30.0 s left",
        "irft: step 1/20, 1 min 00 s so far",
    ]


def test_a_run_of_days_prints_ever_fewer_lines(shown, clock):
    progress, lines = shown
    counts = []
    for _ in range(3):
        for _ in range(24 * 60):
            clock.now += 60
            progress.steps(1, 1000)
        counts.append(len(lines()))
    first, *later = [after - before for before, after in zip([0, *counts], counts, strict=False)]
    assert first < 260, "not one a minute"
    assert later == [144, 144], "one every ten minutes"


def test_a_thread_tells_it(clock):
    import time

    console = Console(file=io.StringIO(), width=200)
    with TerminalProgress(console, "sft", every=0.5) as progress, progress.phase("evaluating"):
        time.sleep(2.5)
    assert "sft: evaluating, " in console.file.getvalue()


# --- the quickstart ----------------------------------------------------------------------------------------------------


def test_a_fast_machine_gets_what_was_asked_for():
    pace = Pace(scored=0.003, answered=0.005)
    assert size_for(pace, 420, 256, 200) == (256, 200)


@pytest.mark.parametrize("budget", [420, 360, 300])
def test_a_slow_machine_gets_fewer_rows_within_the_time(budget):
    pace = Pace(scored=0.015, answered=0.03)
    assert pace.total(256, 200) > 420
    rows, test_rows = size_for(pace, budget, 256, 200)
    assert pace.total(rows, test_rows) <= budget
    assert rows % 16 == test_rows % 16 == 0
    assert pace.total(rows + 32, test_rows + 32) > budget, "no more is left out than must be"


def test_some_rows_remain_whatever_the_machine():
    assert size_for(Pace(100, 100), 1, 256, 200) == (48, 48)
    assert size_for(Pace(100, 100), -1, 256, 200) == (48, 48)


def test_work_by_hand():
    """Self-training: 2 picks with gradient (3 passes), 8 samples drawn and scored; and 2 passes and 2 answers held out."""
    assert Pace(scored=1, answered=10).seconds("self-training", 4, 3) == 4 * (6 + 8 + 80) + 3 * (2 + 20)


def test_time_left_of_the_parts(clock):
    console = Console(file=io.StringIO(), width=200)
    plan = Plan(console, {"base": 10, "sft": 60, "irft": 30}, clock)
    with plan.part("base", "the model"):
        assert plan.left == 100
        clock.now += 20  # twice what was expected, so the rest is too
    assert plan.left == 180
    with plan.part("sft", "training"):
        clock.now += 50  # 70 for what should have been 70
    assert plan.left == 30
    assert "3/3" not in console.file.getvalue()
    assert "about 3 min 00 s left" in console.file.getvalue()
