"""The GPU benchmark on a CPU: every side is timed, and what goes wrong is said. tests/gpu has the numbers."""

import json
import math
import time

import pytest
import torch
from benchmarks import gpu, gpu_run

TINY = ["--device", "cpu", "--tiny"]


@pytest.fixture
def run():
    return gpu_run.Run(torch.device("cpu"), gpu_run.TINY, None, deadline=time.monotonic() + 60)


def test_every_side_is_timed(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert gpu.main([*TINY, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert {"machine", "versions", "commit", "command", "model", "rows", "profiles", "failures"} == found.keys()
    assert {"device", "platform", "nominal_peak"} <= found["machine"].keys()
    sides = [(row["part"], row["side"]) for row in found["rows"]]
    training = [("training", side) for side in ("tutelage", "plain", "TRL")]
    sampling = [("sampling", side) for side in ("tutelage", "adapters beside", "generate")]
    assert sides == [*training, *training, *sampling, ("attention", "SDPA")]
    assert all(row["tokens_per_s"] > 0 for row in found["rows"] if row["part"] != "attention")
    assert all(row["min_s"] <= row["median_s"] <= row["max_s"] for row in found["rows"])
    steps = found["rows"][:6]
    assert all(row["mfu_of_matmul"] > 0 and row["prompts_per_micro_batch"] >= 1 for row in steps)
    merged, beside, _ = (row["operators_per_token_step"] for row in found["rows"][6:9])
    assert 0 < merged < beside
    assert len(found["profiles"]) == 3  # two kinds of steps, and sampling
    for profile in found["profiles"]:
        shares = [entry["share"] for entry in profile["top"]]
        assert len(shares) == 10
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1
    assert found["failures"] == []
    shown = capsys.readouterr().out
    assert "generate" in shown
    assert "merged into 14 layers" in shown
    assert "profile, adapters, 4 × (16 + 3 × 8):" in shown
    assert "FAILED" not in shown


@pytest.mark.parametrize("wrong", [2.0, math.nan])
def test_sides_with_different_losses_fail(tmp_path, monkeypatch, wrong):
    true = gpu.plain_logps

    def plain_logps(model, groups):
        logps_C = true(model, groups)
        return logps_C * torch.linspace(1, wrong, len(logps_C))

    monkeypatch.setattr(gpu, "plain_logps", plain_logps)
    path = tmp_path / "gpu.json"
    assert gpu.main([*TINY, "--parts", "training", "--json", str(path)]) == 1
    failures = json.loads(path.read_text())["failures"]
    assert any("adapters: the loss of plain differs from ours" in failure for failure in failures)
    assert any("all parameters: the loss of plain differs from ours" in failure for failure in failures)
    # NaN goes into the weights, so that no side has a loss any more.
    assert math.isnan(wrong) or not any("TRL" in failure for failure in failures)


def test_a_sampler_that_stops_early_fails(tmp_path, monkeypatch):
    class Early(gpu.TransformersSampler):
        def sample(self, *args, **kwargs):
            return super().sample(*args, **kwargs)[1:]

    monkeypatch.setattr(gpu, "TransformersSampler", Early)
    path = tmp_path / "gpu.json"
    assert gpu.main([*TINY, "--parts", "sampling", "--json", str(path)]) == 1
    failure, _ = json.loads(path.read_text())["failures"]  # ours with merged adapters, and beside them
    assert "tutelage did not draw 6 tokens for each of 16 rows" in failure


def test_a_part_that_breaks_off_fails_and_the_others_run(tmp_path, monkeypatch, capsys):
    def broken(run):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.PARTS, "training", broken)
    path = tmp_path / "gpu.json"
    assert gpu.main([*TINY, "--parts", "training", "sampling", "--json", str(path)]) == 1
    assert "no such kernel" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["failures"] == ["training broke off"]
    assert {row["part"] for row in found["rows"]} == {"sampling"}


def test_what_does_not_fit_into_the_time_is_skipped(capsys):
    assert gpu.main([*TINY, "--parts", "sampling", "--minutes", "0"]) == 0
    assert "skipped: sampling" in capsys.readouterr().out


def test_an_attempt_that_takes_too_long_ends_alone(run):
    with run.attempt("a compiler", seconds=0.05):
        time.sleep(5)
    assert run.rows == [{"part": "not measured", "what": "a compiler", "error": "TimeoutError: not done after 0 s"}]
