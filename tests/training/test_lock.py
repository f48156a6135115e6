"""One run at a time in a folder."""

import json
import os
import signal
import socket

import pytest

from tutelage.errors import UserError
from tutelage.training.lock import LOCK, locked


class Other:
    """Another process that holds a folder until it is told to end, or is killed."""

    def __init__(self, folder):
        ready, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with locked(folder):
                os.write(tell, b"x")
                signal.pause()
            os._exit(0)
        assert os.read(ready, 1) == b"x"

    def kill(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


@pytest.fixture
def other(tmp_path):
    process = Other(tmp_path)
    yield process
    process.kill()


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path, other):
    with (
        pytest.raises(
            UserError, match=rf"another run writes .*process {other.pid} on {socket.gethostname()}, since 20"
        ),
        locked(tmp_path),
    ):
        raise AssertionError("two runs in one folder")
    assert json.loads((tmp_path / LOCK).read_text())["process"] == other.pid, "its file is as it was"


def test_the_lock_of_a_killed_run_is_known_as_one(tmp_path, other):
    other.kill()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def left(folder, **facts):
    own = {"host": socket.gethostname(), "process": 1, "process_begun": None, "since": "yesterday"}
    (folder / LOCK).write_text(json.dumps({**own, **facts}), encoding="utf-8")


def test_a_run_on_another_host_cannot_be_seen(tmp_path):
    left(tmp_path, host="elsewhere")
    with (
        pytest.raises(UserError, match=r"process 1 on elsewhere.*cannot be seen from here.*remove .*lock.json"),
        locked(tmp_path),
    ):
        pass
    assert (tmp_path / LOCK).exists()
    (tmp_path / LOCK).unlink()
    with locked(tmp_path):
        pass


def test_a_process_that_is_on_though_the_system_gave_its_lock_away(tmp_path, other):
    """As where somebody removed the file and put it back: its process still runs."""
    content = (tmp_path / LOCK).read_text()
    (tmp_path / LOCK).unlink()
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(UserError, match="may still write"), locked(tmp_path):
        pass


def test_another_process_may_have_the_number_by_now(tmp_path):
    left(tmp_path, process=os.getppid(), process_begun="1")
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_torn_file_is_of_a_process_that_was_killed(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def test_the_same_process_may_ask_twice(tmp_path):
    with locked(tmp_path):
        with locked(tmp_path):
            pass
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_training_holds_it(training, monkeypatch):
    trainer, held = training.trainer("sft"), []
    monkeypatch.setattr(trainer, "_train", lambda *args: held.append((training.folder / "run" / LOCK).exists()))
    trainer.train()
    assert held == [True]
    assert not (training.folder / "run" / LOCK).exists()
