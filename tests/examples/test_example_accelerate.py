"""The configs for accelerate: it parses them, and what it makes of them is what training takes."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from tutelage.launch import asks_for_fsdp, check_launch

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "accelerate"
PROCESSES = {"ddp_8": (1, 8), "fsdp2_8": (1, 8), "fsdp2_2x8": (2, 16)}


def test_each_is_tried():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == PROCESSES.keys()


@pytest.fixture
def environment(request, monkeypatch):
    """What accelerate puts into the environment of the processes, but for their number."""
    file = str(FOLDER / f"{request.param}.yaml")
    options, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", file, "-m", "tutelage"])
    )
    options.num_machines, options.num_processes = 1, 8  # it starts those of one machine
    found = prepare_multi_gpu_env(options)
    monkeypatch.setattr("os.environ", {**found, "WORLD_SIZE": "8", "RANK": "0"})
    return {**found, "WORLD_SIZE": "8", "RANK": "0"}


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_parses_it(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == PROCESSES[name]
    assert config.mixed_precision == "bf16"


@pytest.mark.parametrize("environment", PROCESSES, indirect=True)
def test_training_takes_what_it_sets(environment, request):
    assert check_launch(1, environment) is None
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert asks_for_fsdp(environment) == ("fsdp" in request.node.callspec.params["environment"])


@pytest.mark.parametrize("environment", ["fsdp2_8", "fsdp2_2x8"], indirect=True)
def test_accelerate_shards_as_it_says(environment):
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
