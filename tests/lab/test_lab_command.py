"""A whole grid on an extra tiny base model, through the command line: table, page, and resuming after a kill."""

import json
import math
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from tutelage.cli import main
from tutelage.lab import pool
from tutelage.lab.code import code_version
from tutelage.lab.grid import read_grid
from tutelage.lab.measures import concordance
from tutelage.lab.page import render
from tutelage.lab.plan import make_plan
from tutelage.lab.table import table_rows

GRID = {
    "description": "for the tests <b>of the lab</b>",
    "worlds": {"reverse": {"demonstrations": 16, "prompts": 16, "validation": 8, "test": 8}},
    "tuning": {"seeds": [101]},
    "report": {"seeds": [1, 2]},
    "recipe": "recipe",
    "base": {"steps": 5, "batch_size": 8, "width": 16, "intermediate": 16},
    "methods": {
        "sft": {"algorithm": "sft", "tune": {"learning_rate": [0.003, 0.01]}, "settings": {"num_train_epochs": 1}},
        "untouched": {"algorithm": "none", "start": "sft"},
        "<i>irft</i>": {
            "algorithm": "irft",
            "start": "sft",
            "settings": {"num_train_epochs": 1, "stages_per_epoch": 1, "learning_rate": 0.0001},
        },
        "recipe": {
            "algorithm": "rft",
            "start": "sft",
            "takes_prompts": True,
            "settings": {
                "num_train_epochs": 1,
                "stages_per_epoch": 1,
                "per_device_train_batch_size": 16,
                "gradient_accumulation_steps": 1,
                "reward": "features",
                "reward_features": "text",
                "reward_negatives": "initial",
                "reward_gate": "off",
                "keep_policy": "last",
                "base_model_name_or_path": "{base}",
                "learning_rate": {"like": "sft", "times": 0.1},
            },
        },
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The grid's file and the folder of its run."""
    folder = tmp_path_factory.mktemp("lab")
    grid = folder / "grid.yaml"
    grid.write_text(yaml.safe_dump(GRID, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert main(["lab", "run", str(grid), "--output_dir", str(folder / "out"), "--jobs", "1"]) == 0
    return grid, folder / "out"


def test_the_table_has_a_row_per_run(finished):
    _, folder = finished
    rows = pq.read_table(folder / "runs.parquet").to_pylist()
    reported = [(row["method"], row["seed"]) for row in rows if row["phase"] == "reporting"]
    assert {name for name, _ in reported} == set(GRID["methods"])
    assert {seed for _, seed in reported} == {1, 2}
    assert len((folder / "runs.csv").read_text().splitlines()) == len(rows) + 1
    for row in rows:
        assert math.isfinite(row["score"])
        # Where no answer is right, as may happen to so small a model, there is nothing to rank.
        assert row["reward_auc"] is None or row["method"] == "recipe"
        assert row["reward_auc"] is not None or row["method"] != "recipe" or row["score"] in (0, 1)
        assert (row["steps"] > 0) == (row["method"] != "untouched")
        assert (row["flops"] > 0) == (row["method"] != "untouched")
        assert row["code"] == code_version()
        if row["method"] == "untouched":
            assert row["kl"] == pytest.approx(0, abs=1e-3)


def test_a_start_is_the_run_that_it_was(finished):
    """The run that leaves its start alone measures the same as the start does."""
    _, folder = finished
    rows = pq.read_table(folder / "runs.parquet").to_pylist()
    for seed in (1, 2):
        start, same = (
            next(r for r in rows if (r["method"], r["seed"]) == (method, seed) and "score" in r["chosen_for"].split())
            for method in ("sft", "untouched")
        )
        for name in ("score", "score_greedy", "demonstration_logp", "retention_logp"):
            assert same[name] == pytest.approx(start[name], abs=1e-6)


def test_the_page_shows_every_method_and_escapes_its_name(finished):
    grid, folder = finished
    page = (folder / "lab.html").read_text()
    assert "recipe minus" in page
    assert "&lt;i&gt;irft&lt;/i&gt;" in page
    assert "<i>irft" not in page
    assert "<b>of the lab" not in page
    assert "<script" not in page
    read, results = read_grid(str(grid)), pool.finished_runs(folder)
    plan = make_plan(read, results)
    assert render(read, plan, table_rows(read, plan, results)) == page


def test_what_is_finished_is_not_run_again(finished, monkeypatch, capsys):
    grid, folder = finished
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    monkeypatch.setattr(pool, "ProcessPoolExecutor", None)  # no worker may be asked for
    assert main(["lab", "run", str(grid), "--output_dir", str(folder)]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()} == before
    assert "runs.parquet" in capsys.readouterr().out


def test_results_of_another_version_are_kept_and_counted(finished, tmp_path, monkeypatch, capsys):
    """One of another version, one from before versions were recorded, with no number of operations either."""
    grid, folder = finished
    (tmp_path / "runs").mkdir()
    paths = sorted((folder / "runs").iterdir())
    for place, path in enumerate(paths):
        result = json.loads(path.read_text())
        if place == 0:
            result["code"] = "another"
        if place == 1:
            del result["code"], result["costs"]["flops"]
        (tmp_path / "runs" / path.name).write_text(json.dumps(result))
    monkeypatch.setattr(pool, "ProcessPoolExecutor", None)  # no worker may be asked for
    assert main(["lab", "run", str(grid), "--output_dir", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"2 of {len(paths)} finished runs are of another version of the code, and are kept" in said
    rows = {row["run"]: row for row in pq.read_table(tmp_path / "runs.parquet").to_pylist()}
    assert [rows[path.stem]["code"] for path in paths] == ["another", "unknown"] + [code_version()] * (len(paths) - 2)
    assert [rows[path.stem]["flops"] is None for path in paths] == [False, True] + [False] * (len(paths) - 2)
    page = (tmp_path / "lab.html").read_text()
    assert "different versions of the code" in page
    assert "1 of another" in page
    assert main(["lab", "run", str(grid), "--output_dir", str(folder)]) == 0
    assert "another version" not in capsys.readouterr().out
    assert "different versions" not in (folder / "lab.html").read_text()


def test_a_killed_grid_goes_on_where_it_was(finished, tmp_path, monkeypatch, capsys):
    """The folder of a killed run: some results, half a file, no table."""
    grid, folder = finished
    names = sorted(path.name for path in (folder / "runs").iterdir())
    rows = pq.read_table(folder / "runs.parquet").to_pylist()
    lost = {f"{row['run']}.json" for row in rows if row["method"] in ("untouched", "<i>irft</i>") and row["seed"] == 2}
    (tmp_path / "runs").mkdir()
    for name in names:
        target = tmp_path / "runs" / (name + ".tmp" if name in lost else name)
        text = (folder / "runs" / name).read_text()
        target.write_text(text[: len(text) // 2] if name in lost else text)
    (tmp_path / "weights").symlink_to(folder / "weights")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    begun = time.time()
    assert main(["lab", "run", str(grid), "--output_dir", str(tmp_path), "--jobs", "1"]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").glob("*.json")) == names
    fresh = {path.name for path in (tmp_path / "runs").glob("*.json") if path.stat().st_mtime >= begun - 1}
    assert lost <= fresh
    assert capsys.readouterr().out.count(" s); about") == len(lost)
    for name in lost:
        first, second = (json.loads((root / "runs" / name).read_text())["measures"] for root in (folder, tmp_path))
        assert second == pytest.approx(first, rel=1e-3, abs=1e-4)


def test_a_start_whose_policy_is_gone_is_run_again(finished, tmp_path, monkeypatch):
    grid, folder = finished
    rows = pq.read_table(folder / "runs.parquet").to_pylist()
    lost = next(row["run"] for row in rows if row["method"] == "untouched" and row["seed"] == 1)
    (tmp_path / "runs").mkdir()
    for path in (folder / "runs").iterdir():
        if path.stem != lost:
            (tmp_path / "runs" / path.name).write_text(path.read_text())
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    assert main(["lab", "run", str(grid), "--output_dir", str(tmp_path), "--jobs", "1"]) == 0
    start = json.loads((tmp_path / "runs" / f"{lost}.json").read_text())["definition"]["start"]
    assert {path.stem for path in (tmp_path / "weights").iterdir()} == {lost, start}


def test_what_starts_from_a_run_that_diverged_has_no_numbers(tmp_path, monkeypatch, capsys):
    content = {
        **GRID,
        "methods": {name: GRID["methods"][name] for name in ("sft", "untouched")},
        "recipe": "untouched",
    }
    content["methods"]["sft"] = {"algorithm": "sft", "settings": {"learning_rate": 1e30, "num_train_epochs": 3}}
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["lab", "run", str(grid), "--output_dir", str(tmp_path / "out"), "--jobs", "1"]) == 0
    rows = pq.read_table(tmp_path / "out" / "runs.parquet").to_pylist()
    assert {(row["method"], row["diverged"], row["score"]) for row in rows} == {
        ("sft", True, None),
        ("untouched", True, None),
    }
    assert {row["code"] for row in rows} == {code_version()}
    page = (tmp_path / "out" / "lab.html").read_text()
    assert page.count("<td>2 of 2</td>") == 2
    assert "0 of 2; either diverged on 2, so no win is claimed" in page
    assert "diverged" in capsys.readouterr().out


def test_a_run_that_fails_is_named_and_the_others_are_kept(finished, tmp_path, monkeypatch, capsys):
    _, folder = finished
    failing = {"algorithm": "irft", "start": "sft", "settings": {"num_train_epochs": 1, "stages_per_epoch": 100}}
    content = {**GRID, "methods": {"sft": GRID["methods"]["sft"], "<i>irft</i>": failing}}
    del content["recipe"]
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    out = tmp_path / "out"
    assert main(["lab", "run", str(grid), "--output_dir", str(out), "--jobs", "1"]) == 2
    said = capsys.readouterr().err
    assert "2 run(s) failed, the first of them reverse · <i>irft</i> · reporting seed 1" in said
    assert len(list((out / "runs").glob("*.json"))) >= 4
    assert "stages_per_epoch" in (out / "failures.txt").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "claims", "--output_dir", "OUT", "--jobs", "0"], "field 'jobs': must be at least 1"),
        (["run", "claims", "--output_dir", "OUT", "--seeds", "99"], "field 'seeds': must be between 1 and 8"),
        (
            ["run", "claims", "--output_dir", "OUT", "--worlds", "chess"],
            "field 'worlds': the grid has no world 'chess'",
        ),
        (["run", "nothing.yaml", "--output_dir", "OUT"], "nothing.yaml: there is no such grid"),
        (["run", "claims"], "--output_dir"),
        ([], "run | list"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(args, message, tmp_path, capsys):
    args = [str(tmp_path / "out") if arg == "OUT" else arg for arg in args]
    assert main(["lab", *args]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_list_says_what_there_is(capsys):
    assert main(["lab", "list"]) == 0
    said = capsys.readouterr().out
    for name in ("arrange", "navigate", "compose", "reverse", "claims.yaml", "rewards.yaml", "irft"):
        assert name in said


def test_concordance_counts_pairs():
    # Prompt one: of the pairs right–wrong (2 over 1), (2 over 3), one is ranked rightly. Prompt two has a tie. Three: none.
    values = np.array([[2.0, 1.0, 3.0], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
    scores = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert concordance(values, scores) == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    assert math.isnan(concordance(values, np.ones((3, 3))))
