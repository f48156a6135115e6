"""The GPU benchmark on a CPU: its checks pass, and each of them fails when what it watches is broken."""

import json
import time
from dataclasses import replace

import pytest
import torch
from benchmarks import gpu
from torch.nn.attention.flex_attention import create_mask

from tutelage.groups import collate_shared_prefix

TINY = ["--device", "cpu", "--tiny"]
RAGGED = gpu.random_groups(gpu.Shape(3, 9, 3, 7), 97, ragged=True)


@pytest.fixture
def run():
    return gpu.Run(torch.device("cpu"), gpu.TINY, None, deadline=time.monotonic() + 60)


def failed(path, part="correctness"):
    """The exit status of one part, and which of its checks failed."""
    status = gpu.main([*TINY, "--parts", part, "--json", str(path)])
    return status, [check["name"] for check in json.loads(path.read_text())["checks"] if not check["passed"]]


def test_the_checks_pass_and_every_side_is_timed(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert gpu.main([*TINY, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert all(check["passed"] for check in found["checks"])
    names = " ".join(check["name"] for check in found["checks"])
    assert all(
        word in names for word in ("shared_prefix", "padded", "sampler", "gradient", "loss of plain", "loss of TRL")
    )
    sides = [(row["part"], row["side"]) for row in found["rows"]]
    training = [("training", side) for side in ("tutelage", "plain", "TRL")]
    others = [("sampling", "tutelage"), ("sampling", "generate"), ("attention", "SDPA")]
    assert sides == [*training, *training, *others]
    assert all(row["tokens_per_s"] > 0 for row in found["rows"] if row["part"] != "attention")
    assert {"machine", "versions", "model"} <= found.keys()
    assert f"0 of {len(found['checks'])} checks failed" in capsys.readouterr().out


def test_log_probs_that_are_off_fail(tmp_path, monkeypatch):
    true = gpu.completion_logps
    monkeypatch.setattr(gpu, "completion_logps", lambda *args, **kwargs: 1.01 * true(*args, **kwargs))
    status, names = failed(tmp_path / "gpu.json")
    assert status == 1
    assert "float32, shared_prefix: log-probs off by (nats per token)" in names
    assert "bfloat16, padded: log-probs off by (nats per token)" in names


def test_a_gradient_that_is_off_fails(tmp_path, monkeypatch):
    true = gpu.completion_logps

    def steeper(*args, **kwargs):
        logps = true(*args, **kwargs)
        return logps + 0.2 * (logps - logps.detach())

    monkeypatch.setattr(gpu, "completion_logps", steeper)
    status, names = failed(tmp_path / "gpu.json")
    assert status == 1
    assert names == [
        f"{precision}, {layout}: gradient of the adapters off by (relative)"
        for precision in ("float32", "bfloat16")
        for layout in ("shared_prefix", "padded")
    ]


def test_a_sampler_that_reports_other_log_probs_fails(tmp_path, monkeypatch):
    class Wrong(gpu.TransformersSampler):
        def sample(self, *args, **kwargs):
            drawn = super().sample(*args, **kwargs)
            return [[replace(s, token_logps=(0.0, *s.token_logps[1:])) for s in samples] for samples in drawn]

    monkeypatch.setattr(gpu, "TransformersSampler", Wrong)
    status, names = failed(tmp_path / "gpu.json")
    assert status == 1
    assert len(names) == 4
    assert all("sampler" in name for name in names)


def test_a_part_that_breaks_off_fails_and_the_others_run(tmp_path, monkeypatch, capsys):
    def broken(run):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.PARTS, "training", broken)
    path = tmp_path / "gpu.json"
    assert gpu.main([*TINY, "--parts", "training", "sampling", "--json", str(path)]) == 1
    assert "no such kernel" in capsys.readouterr().out
    assert {row["part"] for row in json.loads(path.read_text())["rows"]} == {"sampling"}


def test_what_does_not_fit_into_the_time_is_skipped(capsys):
    assert gpu.main([*TINY, "--parts", "sampling", "--minutes", "0"]) == 0
    assert "skipped: sampling" in capsys.readouterr().out


def test_an_attempt_that_takes_too_long_ends_alone(run):
    with run.attempt("a compiler", seconds=0.05):
        time.sleep(5)
    assert run.rows == [{"part": "not measured", "what": "a compiler", "error": "TimeoutError: not done after 0 s"}]


def test_nan_passes_no_check(run):
    run.check("a number", float("nan"), 1.0)
    assert not run.checks[0]["passed"]


@pytest.mark.parametrize("window", [None, 4])
def test_the_block_mask_is_the_tree_mask(window):
    batch = collate_shared_prefix(RAGGED)
    B, L = batch.input_ids.shape
    found = create_mask(gpu.tree_block_mask(batch, window).mask_mod, B, 1, L, L, device="cpu")
    assert torch.equal(found, batch.shared_prefix_mask(window))


def test_flex_attention_with_a_wrong_mask_fails(run, monkeypatch):
    gpu.check_attention(run)
    assert all(check["passed"] for check in run.checks)
    true = gpu.tree_block_mask
    monkeypatch.setattr(
        gpu, "tree_block_mask", lambda batch: true(replace(batch, branch_ids=batch.branch_ids.clamp(max=0)))
    )
    gpu.check_attention(run)
    assert [check["passed"] for check in run.checks] == [True, True, True, False]
