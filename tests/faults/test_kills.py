"""Runs that are killed, or whose disk takes no more, go on with --resume and end as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def told(mode, folder, number, seed=0):
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), mode, str(folder), str(seed), str(number)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-4000:]
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.timeout(1200)  # about a minute of a core, on a machine that may be busy
def test_forty_kills_in_chains_of_irft_and_rft(tmp_path):
    found = told("kill", tmp_path, 40)
    assert (found["kills"], found["at_events"]) == (40, 20)
    assert min(found["chains"].values()) >= 2


@pytest.mark.timeout(1200)
def test_a_disk_that_takes_no_more(tmp_path):
    """One error at each write that is tried, and the same bytes once there is room again."""
    found = told("full", tmp_path, 2)
    assert found["refused"] + found["harmless"] == 8
    assert found["refused"] >= 6, "a write of a file that is only for readers may be harmless"
