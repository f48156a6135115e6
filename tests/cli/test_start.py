"""How the program is started: from a folder with files of any name, and by a launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from tutelage.errors import UserError
from tutelage.evaluation.verifiers import load_verifier
from tutelage.launch import check_launch

SOURCE = Path(__file__).resolve().parents[2] / "src"


def test_modules_of_the_current_folder_are_not_run(tmp_path):
    """Data folders hold what others wrote: a file there may be called as a library is."""
    for name in ("json", "zipfile", "email", "yaml", "rich", "importlib_metadata", "argparse"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run: ' + __file__)", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    for arguments, code in ((["--help"], 0), (["report", "nothing"], 2)):
        found = subprocess.run(
            [sys.executable, "-m", "tutelage", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "run: " not in found.stdout + found.stderr
        assert found.returncode == code, found.stderr


@pytest.mark.parametrize(("asked", "refused"), [(["--num_processes", "2"], True), (["--num_processes", "1"], False)])
def test_a_launcher_on_a_cpu_starts_one_process_and_that_is_said(asked, refused, monkeypatch):
    """With what accelerate itself puts into the environment."""
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    options = launch_command_parser().parse_args(
        [*asked, "--cpu", "--num_machines", "1", "--mixed_precision", "no", "x.py"]
    )
    options.use_cpu, options.dynamo_backend = True, "no"
    _, environment = prepare_simple_launcher_cmd_env(options)
    if refused:
        with pytest.raises(UserError, match="accelerate launch was asked for several processes and started one"):
            check_launch(environment=environment)
    else:
        assert check_launch(environment=environment) is None


@pytest.mark.parametrize("body", ["raise KeyError('x')", "def f(:", "import nothing_of_this_name", "g = 1", "1 / 0"])
def test_a_verifier_whose_module_fails_is_one_error(body, tmp_path, monkeypatch):
    name = f"module_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        load_verifier(f"{name}:f")
    assert error.value.field == "verifier"
    for odd in (".x:f", "..:f", "os:", ":f", "f", "os.path:nothing", "os:name"):
        with pytest.raises(UserError):
            load_verifier(odd)
