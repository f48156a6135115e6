"""JSON files hold what every reader takes."""

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

import tutelage.models.adapters
import tutelage.models.weights
import tutelage.rewards.feature_reward
from tutelage.files import read_json, read_sealed, write_json, write_json_lines, write_sealed
from tutelage.models.adapters import make_readable_by_both
from tutelage.models.weights import save_weights
from tutelage.rewards.feature_reward import FeatureReward


class KilledError(BaseException):
    """What no handler of an error catches."""


BROKEN = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, "NaN")}], "d": 2}
WRITTEN = {"a": None, "b": [1.5, None, {"c": [None, "NaN"]}], "d": 2}


def refuse(name):
    raise AssertionError(f"{name} is no JSON")


def test_no_file_holds_a_number_that_json_does_not_know(tmp_path):
    write_json(tmp_path / "one.json", BROKEN)
    write_json_lines(tmp_path / "lines.jsonl", [BROKEN, BROKEN])
    write_sealed(tmp_path / "sealed.json", BROKEN)
    texts = [(tmp_path / "one.json").read_text(), *(tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [json.loads(text, parse_constant=refuse) for text in texts] == [WRITTEN] * 3
    json.loads((tmp_path / "sealed.json").read_text(), parse_constant=refuse)
    assert read_json(tmp_path / "one.json") == read_sealed(tmp_path / "sealed.json") == WRITTEN


# --- libraries that write under names of their own -----------------------------------------------------------------------


def weights_of(folder):
    save_weights([torch.nn.Parameter(torch.ones(2))], folder / "policy.safetensors")


def adapter_of(folder):
    safetensors.torch.save_file({"x.lora_magnitude_vector": torch.ones(2)}, folder / "adapter_model.safetensors")
    make_readable_by_both(folder)


def features_of(folder):
    FeatureReward([]).save(folder)


@pytest.mark.parametrize("write", [weights_of, adapter_of, features_of])
def test_what_a_killed_library_leaves_is_removed_by_the_next_writer(tmp_path, monkeypatch, write):
    """safetensors writes to a name of its own beside the one that it is given; here it is killed before it renames it."""
    write(tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def killed(tensors, path, metadata=None):
        (Path(path).parent / ".tmpAbC123").write_bytes(b"half")
        raise KilledError

    for module in (tutelage.models.weights, tutelage.models.adapters, tutelage.rewards.feature_reward):
        monkeypatch.setattr(module, "save_file", killed)
    monkeypatch.setattr(
        "tutelage.files.shutil.rmtree", lambda *args, **kwargs: None
    )  # a killed process tidies nothing
    with pytest.raises(KilledError):
        write(tmp_path)
    assert list(tmp_path.rglob(".tmp*"))
    monkeypatch.undo()
    write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
