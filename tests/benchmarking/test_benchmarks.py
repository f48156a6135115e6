"""The benchmarks: both sides meet the same tokens, lower bounds count what is computed, the table says what was measured."""

import dataclasses
import io
import json
import math
import sys
import tempfile
from pathlib import Path

import pytest
from benchmarks import __main__ as table
from benchmarks import growth, roofline, training, workloads
from benchmarks.sides import HERE, Measured, Turns, check_checkout, compare
from benchmarks.workloads import Work
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from tutelage.data.tokenization import Tokenization
from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role, collate_shared_prefix
from tutelage.models.loading import load_tokenizer
from tutelage.scoring.logps import completion_logps
from tutelage.testing.models import tiny_model

GEMMA, SMALL = workloads.MODELS


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """The smaller of the models that are measured; it is random, so nothing is downloaded."""
    return str(workloads.prepare_model(SMALL, tmp_path_factory.mktemp("models")))


def tree(prompt, *completions):
    """A group of so many tokens."""
    return Group(
        (3,) * prompt, tuple(Completion((3,) * length, Role.SAMPLE, finished=False) for length in completions)
    )


# --- what both sides work on -----------------------------------------------------------------------------------------


def test_texts_become_the_tokens_that_groups_say(model_path):
    work = Work(model_path, prompts=5, prompt_tokens=12, completion_tokens=8, samples=2, mixed=True)
    tokenization = Tokenization(load_tokenizer(model_path), max_completion_length=work.completion_tokens)
    groups = workloads.groups(work)
    for row, group in zip(workloads.rows(work), groups, strict=True):
        assert tokenization.prompt_ids(row["prompt"]) == group.prompt_ids
        found = [tokenization.completion(row["prompt"], row["completion"], Role.DEMONSTRATION)]
        found += [tokenization.completion(row["prompt"], sample, Role.SAMPLE) for sample in row["samples"]]
        assert tuple(found) == group.completions
    assert len({len(group.prompt_ids) for group in groups}) > 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_our_step_trains_on_the_given_samples_once_a_turn(model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(training, "MOST_TURNS", 3)
    work = Work(model_path, prompts=2, prompt_tokens=6, completion_tokens=4, samples=2)
    reports = io.StringIO()
    training.ours_step(work, Turns(io.StringIO("go\ngo\n"), reports))
    told = [json.loads(line) for line in reports.getvalue().splitlines()]
    assert [report["event"] for report in told] == ["ready", "done", "ready", "done", "ready"]
    assert told[1]["seconds"] > 0
    assert told[1]["settings"] == {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    (samples,) = tmp_path.rglob("samples.jsonl")
    lines = map(json.loads, samples.read_text().splitlines())
    recorded = [[completion["token_ids"] for completion in line["completions"]] for line in lines]
    assert recorded == 3 * [[list(c.token_ids) for c in group.completions] for group in workloads.groups(work)]


# --- lower bounds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
@pytest.mark.parametrize("rank", [4, None], ids=["adapters", "full"])
def test_operations_of_a_step_are_those_that_torch_counts(architecture, rank):
    """torch counts no fused attention on a CPU; ``attention_pairs`` has a test of its own."""
    step = [tree(20, 9, 7), tree(20, 8, 8)]  # of one length: padding is computed too, and is not in the lower bound
    model = tiny_model(architecture)
    expected = roofline.training_operations(model.config, step, rank=rank)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    with FlopCounterMode(display=False) as counter:
        completion_logps(model, step, layout="shared_prefix").sum().backward()
    recomputed = 0 if rank else expected.head // 3  # a trained head meets its logits again in backward
    assert counter.get_total_flops() == expected.body + expected.head + recomputed


@pytest.mark.parametrize("window", [None, 6, 3])
def test_attention_pairs_are_those_of_the_trees_mask(window):
    group = tree(8, 5, 1, 3)
    assert roofline.attention_pairs(group, window) == collate_shared_prefix([group]).shared_prefix_mask(window).sum()


def test_sequences_run_on_until_their_tokens_are_used_up():
    assert roofline.running(8, most=3, tokens=14) == pytest.approx([8, 4, 2])
    assert roofline.running(8, most=3, tokens=24) == pytest.approx([8, 8, 8])


LAYERS = 4 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1536)  # weights: query, output; key, value; the gated MLP
HEAD = 512 * 32_000
PAIR = 4 * 8 * 64 * 4  # operations of a pair of tokens in all layers: 8 heads of 64
CACHED = 2 * 4 * 64 * 2 * 4  # bytes of a token's keys and values in all layers: 4 heads of 64


@pytest.mark.parametrize(
    ("rates", "read", "expected"),
    [
        # every step reads all weights, and the keys and values of 2 completions after 5 and then 6 tokens
        (
            {"body": math.inf, "prompts": math.inf, "head": math.inf},
            1.0,
            2 * 2 * (LAYERS + HEAD) + 2 * (5 + 6) * CACHED,
        ),
        # 2 prompts of 4 tokens, then 2 steps of 2 tokens
        (
            {"body": 1.0, "prompts": 2.0, "head": math.inf},
            math.inf,
            2 * LAYERS * (8 / 2 + 4) + PAIR * 2 * ((1 + 2 + 3 + 4) / 2 + 5 + 6),
        ),
        ({"body": math.inf, "prompts": math.inf, "head": 1.0}, math.inf, 2 * HEAD * 6),
    ],
    ids=["reading", "body", "head"],
)
def test_decoding_lower_bound_by_hand(model_path, monkeypatch, rates, read, expected):
    monkeypatch.setattr(roofline, "_rates", lambda *_, **__: dict(rates))
    monkeypatch.setattr(roofline, "_body_rate", lambda config, tokens: {8: rates["prompts"]}[tokens])
    monkeypatch.setattr(roofline, "bandwidth", lambda: read)
    work = Work(model_path, prompts=2, prompt_tokens=4, completion_tokens=3)
    assert roofline.decoding_lower_bound(work, tokens=6)["seconds"] == pytest.approx(expected)


def test_rates_are_measured():
    assert 1e6 < roofline.matmul_rate(64, 64, 64) < 1e16
    assert 1e6 < roofline.bandwidth(2**20) < 1e15


def test_sides_take_turns_in_processes_of_their_own(model_path):
    work = Work(model_path, prompts=2, prompt_tokens=4, completion_tokens=3, micro_batch=1)
    sides = ["training:ours_step", "stages:ours_sampling"]
    step, sampling = compare(sides, work, repeats=2, warmups=1, allocators=["kept", "installed"])
    assert step.settings == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert (len(step.seconds), step.tokens) == (2, [])
    assert all(0 < tokens <= 6 for tokens in sampling.tokens)
    assert sampling.median == pytest.approx(
        sum(s / t for s, t in zip(sampling.seconds, sampling.tokens, strict=True)) / 2
    )
    assert all(2**20 < side.peak_bytes < 2**31 for side in (step, sampling))


def test_a_side_that_stops_early_is_an_error(model_path):
    with pytest.raises(RuntimeError, match=r"stopped early.*no_such_side"):
        compare(["training:no_such_side"], Work(model_path), repeats=1, warmups=0)


FAKE_SIDES = """
import json, sys, time
import tutelage
assert sys.argv[1] == "training:ours_step"
say = lambda **report: print(json.dumps(report), flush=True)
say(event="ready")
for line in sys.stdin:
    begin = time.process_time()
    while time.process_time() - begin < 0.1:
        pass
    settings = {"tutelage": tutelage.NAME, "work": json.loads(sys.argv[2])}
    say(event="done", seconds=1.0, tokens=None, peak_bytes=1, settings=settings)
    say(event="ready")
"""


def checkout(folder, name):
    """A folder whose sides say which tutelage they imported and what work they were told."""
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "benchmarks" / "__init__.py").touch()
    (folder / "benchmarks" / "sides.py").write_text(FAKE_SIDES, encoding="utf-8")
    (folder / "src" / "tutelage").mkdir(parents=True)
    (folder / "src" / "tutelage" / "__init__.py").write_text(f"NAME = {name!r}", encoding="utf-8")
    return folder


def test_a_side_of_another_checkout_runs_that_checkouts_sources(tmp_path):
    folders = [checkout(tmp_path / name, name) for name in ("new", "old")]
    for folder in folders:
        check_checkout(folder)
    work = Work("model", prompts=3)
    found = compare(["training:ours_step"] * 2, work, repeats=2, warmups=1, checkouts=folders, threads=1)
    assert [side.settings["tutelage"] for side in found] == ["new", "old"]
    # A field that has its default is not sent: an older checkout may not know it.
    assert [side.settings["work"] for side in found] == [{"model_path": "model", "prompts": 3}] * 2
    assert all(len(side.cpu_seconds) == 2 and min(side.cpu_seconds) >= 0.09 for side in found)


def test_this_checkout_runs_its_own_sources():
    check_checkout(HERE)


def test_a_folder_that_is_no_checkout_is_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("step", "--baseline", str(tmp_path), ours=None, peer=None)
    message = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path) in message
    assert "src/tutelage is missing" in message


def test_a_checkout_that_another_installation_goes_before_is_refused(tmp_path):
    folder = checkout(tmp_path / "old", "old")
    (folder / "src" / "tutelage" / "__init__.py").unlink()
    (folder / "src" / "tutelage").rmdir()
    (folder / "src" / "tutelage").symlink_to(HERE / "src" / "tutelage")
    with pytest.raises(UserError, match="would import tutelage from"):
        check_checkout(folder)


# --- the table -------------------------------------------------------------------------------------------------------


def test_rows_come_in_the_tables_order_with_each_model_and_choice_of_parameters():
    cases = [(row.name, *choice) for row, *choice in table.cases(["sampling", "all"], workloads.MODELS)]
    names = ["step", "step_n4", "sft_step", "sdft_step", "sampling", "irft_stage", "rft_stage", "irft_vs_sft"]
    assert list(dict.fromkeys(name for name, *_ in cases)) == names
    choices = [[model, parameters] for model in workloads.MODELS for parameters in ("adapters", "full")]
    for name in names:
        both = name in ("step", "sft_step")
        expected = choices if both else [choice for choice in choices if choice[1] == "adapters"]
        assert [choice for case, *choice in cases if case == name] == expected
    assert [row.name for row, *_ in table.cases(["sft_step", "step"], [SMALL])] == 2 * ["step"] + 2 * ["sft_step"]
    assert [trained for _, _, trained in table.cases(["all"], [SMALL], ["full"])] == ["full", "full"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """``python -m benchmarks``, with two sides' measurements and a lower bound that are given."""

    def run(*arguments, ours, peer, lower_bound=None):
        asked, allocators = [], []

        def compare(sides, work, **how):
            asked.append((sides, work))
            allocators.append(how.get("allocators"))
            return [ours, peer]

        monkeypatch.setattr(table, "prepare_model", lambda name, folder: folder / name)
        monkeypatch.setattr(table, "compare", compare)
        monkeypatch.setattr(
            table, "measured_lower_bound", lambda kind, work, tokens: {**lower_bound, "tokens": tokens}
        )
        file = tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, "--json", str(file), "--cache", str(tmp_path)])
        table.main()
        written = json.loads(file.read_text())
        if "--baseline" not in arguments:
            assert [("kept", row["peer"]["settings"]["allocator"]) for row in written["rows"]] == allocators
        return asked, written, capsys.readouterr().out

    return run


def test_a_row_says_what_was_measured_and_whether_targets_are_met(run):
    ours = Measured([1.0, 3.0, 2.0], [], 500, {})
    peer = Measured([9.0, 12.0, 10.0], [], 1000, {"padding_free": False})
    asked, written, shown = run("step", "--models", GEMMA, ours=ours, peer=peer, lower_bound={"seconds": 1.2})
    assert [work.adapters for _, work in asked] == [True, False]
    assert {"machine", "versions", "commit", "command", "rows"} == set(written)
    row = written["rows"][0]
    assert (row["name"], row["model"], row["parameters"]) == ("step", GEMMA, "adapters")
    assert (row["ratio_time"], row["ratio_memory"], row["lower_bound_share"]) == pytest.approx((0.2, 0.5, 0.6))
    assert row["peer"] == {
        "median_s": 10.0,
        "min_s": 9.0,
        "max_s": 12.0,
        "seconds": [9.0, 12.0, 10.0],
        "tokens": [],
        "peak_bytes": 1000,
        "settings": {"padding_free": False, "allocator": "unmapped"},
        "cpu_seconds": [],
    }
    for words in (
        "2 s [1–3]",
        "10 s [9–12]",
        "0.20 ≤ 0.20 met",
        "0.50 ≤ 0.33 missed",
        "0.60 ≥ 0.50 met",
        "padding_free",
    ):
        assert words in shown


def test_a_baseline_is_compared_turn_by_turn(run, monkeypatch, tmp_path):
    monkeypatch.setattr(table, "check_checkout", lambda folder: None)
    new = Measured([1.0, 2.0, 4.0], [], 500, {}, cpu_seconds=[1.0, 1.0, 1.0])
    old = Measured([1.5, 4.0, 5.0], [], 1000, {}, cpu_seconds=[1.1, 1.2, 1.4])
    arguments = ["step", "--models", SMALL, "--baseline", str(tmp_path), "--threads", "1"]
    asked, written, shown = run(*arguments, ours=new, peer=old)
    assert [sides for sides, _ in asked] == [["training:ours_step"] * 2] * 2
    row = written["rows"][0]
    assert row["ratio_time"] == {"median": 1.5, "min": 1.25, "max": 2.0}
    assert row["ratio_cpu_time"] == pytest.approx({"median": 1.2, "min": 1.1, "max": 1.4})
    assert row["ratio_memory"] == 2.0
    assert (row["new"]["median_s"], row["baseline"]["median_s"]) == (2.0, 4.0)
    assert "baseline" in written
    for words in ("2 s [1–4]", "4 s [1.5–5]", "1.50 [1.25–2.00]", "1.20 [1.10–1.40]", "old / new"):
        assert words in shown


def test_a_baseline_that_samples_is_compared_per_token(run, monkeypatch, tmp_path):
    monkeypatch.setattr(table, "check_checkout", lambda folder: None)
    new = Measured([2.0, 8.0], [10, 20], 1, {}, cpu_seconds=[1.0, 2.0])
    old = Measured([9.0, 9.0], [30, 10], 1, {}, cpu_seconds=[6.0, 4.0])
    _, written, _ = run("sampling", "--models", SMALL, "--baseline", str(tmp_path), ours=new, peer=old)
    assert written["rows"][0]["ratio_time"] == pytest.approx({"median": 1.875, "min": 1.5, "max": 2.25})
    assert written["rows"][0]["ratio_cpu_time"] == pytest.approx({"median": 3.0, "min": 2.0, "max": 4.0})


def test_peers_can_be_shown_as_installed(run):
    side = Measured([1.0], [], 1, {})
    _, written, _ = run(
        "irft_vs_sft", "step", "--peer_allocator", "installed", ours=side, peer=side, lower_bound={"seconds": 1}
    )
    allocators = {row["name"]: row["peer"]["settings"]["allocator"] for row in written["rows"]}
    assert allocators == {"step": "installed", "irft_vs_sft": "kept"}  # our own trainers ask for theirs


@pytest.mark.parametrize("measured", [1, 4, 5])
def test_growth_is_drawn_after_every_sweep(measured, tmp_path):
    found = [
        {
            **dataclasses.asdict(dataclasses.replace(sweep, sides=dict(sweep.sides))),
            "points": [{"value": v, "side": "ours", "seconds": v, "mebibytes": v} for v in sweep.values],
        }
        for sweep in growth.SWEEPS[:measured]
    ]
    growth.draw(found, tmp_path / "growth.png", SMALL)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_where_tokens_are_known_times_are_of_a_token(run):
    ours, peer = Measured([2.0, 8.0], [10, 20], 1, {}), Measured([9.0, 9.0], [10, 10], 1, {})
    _, written, shown = run("sampling", "--models", SMALL, ours=ours, peer=peer, lower_bound={"seconds": 1.5})
    (row,) = written["rows"]
    assert row["ours"]["median_s"] == pytest.approx(0.3)
    assert row["ratio_time"] == pytest.approx(1 / 3)
    assert row["lower_bound_share"] == pytest.approx(1.5 / (15 * 0.3))  # 15 tokens, of which each took 0.3 seconds
    assert "300 ms/token [200–400]" in shown


def test_an_unknown_row_is_one_error_that_lists_them(run, capsys):
    with pytest.raises(SystemExit):
        run("stepp", ours=None, peer=None)
    message = capsys.readouterr().err.splitlines()[-1]
    assert "stepp" in message
    assert all(row.name in message for row in table.ROWS)


@pytest.mark.parametrize("turns", [["--repeats", "0"], ["--repeats", "16"], ["--warmups", "-1"]])
def test_more_turns_than_a_side_takes_are_refused(run, capsys, turns):
    with pytest.raises(SystemExit):
        run("step", *turns, ours=None, peer=None)
    assert f"at least 1, and {training.MOST_TURNS}" in capsys.readouterr().err
