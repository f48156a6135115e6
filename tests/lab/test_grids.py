"""The reader of grids, and the plan: what is wanted when, and that nothing is reported where it was chosen."""

import copy
from pathlib import Path

import pytest
import yaml

import tutelage
from tutelage.errors import UserError
from tutelage.lab.checks import check_grid
from tutelage.lab.code import hash_sources, numeric_sources
from tutelage.lab.grid import read_grid, shipped_grids
from tutelage.lab.page import render
from tutelage.lab.plan import make_plan
from tutelage.lab.table import (
    Difference,
    differences,
    paired_gap,
    seed_values,
    strongest_control,
    student_interval,
    table_rows,
)

GRID = {
    "description": "for the tests",
    "worlds": {"reverse": {"demonstrations": 8, "prompts": 0, "validation": 8, "test": 8}},
    "tuning": {"seeds": [101, 102]},
    "report": {"seeds": [1, 2, 3]},
    "recipe": "continued",
    "methods": {
        "sft": {"algorithm": "sft", "tune": {"learning_rate": [0.001, 0.01], "num_train_epochs": [1, 2]}},
        "continued": {
            "algorithm": "sft",
            "start": "sft",
            "settings": {
                "learning_rate": {"like": "sft", "times": 0.1},
                "num_train_epochs": {"like": "sft", "times": 2},
            },
        },
    },
}


def changed(path, value):
    """GRID with one value changed; None takes the field away."""
    grid = copy.deepcopy(GRID)
    *parents, last = path.split("/")
    place = grid
    for name in parents:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return grid


@pytest.fixture
def read(tmp_path):
    def read(content):
        path = tmp_path / "grid.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return read_grid(str(path))

    return read


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("methods", None, "'methods': is missing"),
        ("colour", 1, "'colour': is not known"),
        ("worlds/chess", {}, r"'worlds.chess': is not known. Known: arrange"),
        (
            "worlds/reverse/demonstrations",
            "many",
            r"'worlds.reverse.demonstrations': must be a whole number, not 'many'",
        ),
        ("worlds/reverse/demonstrations", 0, r"'worlds.reverse.demonstrations': must be at least 1"),
        ("worlds/reverse/size", 3, r"'worlds.reverse.size': is not known"),
        ("report/seeds", [1, 102], r"'report.seeds': seed 102 is also one that settings are chosen on"),
        ("report/seeds", [1, 1], r"'report.seeds': names a seed twice"),
        ("report/seeds", 8, r"'report.seeds': must be a list of whole numbers"),
        ("recipe", "magic", "'recipe': there is no method 'magic'"),
        ("methods/sft/algorithm", None, r"'methods.sft.algorithm': is missing"),
        ("methods/sft/tune", {"learning_rate": 0.1}, r"'methods.sft.tune.learning_rate': must be a list"),
        ("methods/sft/settings", {"learning_rate": 0.1}, r"'methods.sft.tune.learning_rate': is fixed and tuned"),
        ("methods/sft/start", "base", r"'methods.sft': there is no method 'base'"),
        ("methods/sft/start", "continued", "'methods': sft, continued need one another"),
        ("methods/sft/takes_prompts", "yes", r"'methods.sft.takes_prompts': must be true or false"),
        ("vary", {"corrupted": 0.1}, r"'vary.corrupted': must be a list"),
        ("vary", {"corrupted": [2.0]}, r"'vary.corrupted': must be between 0 and 1"),
        ("vary", {"prompts": ["x"]}, r"'vary.prompts': must be a whole number, not 'x'"),
        ("vary", 0, "'vary': must be a mapping"),
        ("base", [], "'base': must be a mapping"),
        ("description", ["a"], "'description': must be a text"),
        ("tuning", 5, "'tuning': must be a mapping"),
        ("report/seeds", [True], r"'report.seeds': must be a list of whole numbers"),
        ("recipe", ["a"], "'recipe': must be a text"),
        ("worlds/reverse", 5, r"'worlds.reverse': must be a mapping"),
        ("worlds/reverse/tuning", 5, r"'worlds.reverse.tuning': must be a mapping"),
        ("worlds/reverse/tuning", {"prompts": "x"}, r"'worlds.reverse.tuning.prompts': must be a whole number"),
        ("worlds/reverse/most_prompts", "x", r"'worlds.reverse.most_prompts': must be a number, not 'x'"),
        ("worlds/reverse/most_prompts", 5, r"'worlds.reverse.most_prompts': limits what 'vary' has of prompts"),
        ("methods/sft/algorithm", ["sft"], r"'methods.sft.algorithm': must be a text"),
        ("methods/continued/start", ["a"], r"'methods.continued.start': must be a text, not \['a'\]"),
        (
            "methods/continued/settings/learning_rate",
            {"like": ["sft"]},
            r"'methods.continued.settings.learning_rate.like': must be a text",
        ),
        (
            "methods/continued/settings/learning_rate",
            {"like": "sft", "setting": ["a"]},
            r"'methods.continued.settings.learning_rate.setting': must be a text",
        ),
        ("methods/sft/where", 5, r"'methods.sft.where': must be a list"),
        ("methods/sft/where", [5], r"'methods.sft.where.1': must be a mapping"),
        ("methods/sft/where", [{"world": ["a"], "settings": {}}], r"'methods.sft.where.1.world': must be a text"),
    ],
)
def test_a_bad_grid_is_told_by_file_and_field(read, path, value, message):
    with pytest.raises(UserError, match=rf"grid.yaml, field {message}"):
        read(changed(path, value))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"world": "revers"}, r"\.world': the grid has no world 'revers'. Its worlds: reverse, arrange"),
        ({"world": "compose"}, r"\.world': the grid has no world 'compose'"),
        ({"prompts": 3}, r"\.prompts': is not varied, so this never holds"),
        ({"demonstrations": 9}, r"\.demonstrations': 9 is none of the values in 'vary'"),
        ({"world": "reverse", "demonstrations": 16}, "': holds in no cell of the grid"),
    ],
)
def test_a_condition_that_never_holds_is_told(read, condition, message):
    grid = changed("methods/sft/where", [{"demonstrations": 8, "settings": {}}, condition | {"settings": {}}])
    grid["worlds"] = {"reverse": {"most_demonstrations": 8}, "arrange": {}}
    grid["vary"] = {"demonstrations": [8, 16]}
    with pytest.raises(UserError, match=rf"grid.yaml, field 'methods.sft.where.2{message}"):
        read(grid)


def test_what_is_no_grid(read):
    with pytest.raises(UserError, match=r"grid.yaml: is no YAML"):
        read("worlds: [")
    with pytest.raises(UserError, match=r"grid.yaml: must be a mapping"):
        read("- a\n- b\n")
    with pytest.raises(UserError, match=r"no_such: there is no such grid. A file, or one of .*claims.yaml"):
        read_grid("no_such")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("methods/sft/algorithm", "dpo", "there is no algorithm 'dpo'"),
        (
            "methods/sft/settings",
            {"learning_speed": 1},
            r"field 'methods.sft.learning_speed': sft has no such setting",
        ),
        ("methods/sft/settings", {"loss_kind": "mse"}, r"field 'methods.sft.loss_kind': must be one of nll, dft"),
        (
            "methods/continued/settings",
            {"warmup_steps": {"like": "sft"}},
            r"field 'methods.continued.warmup_steps': the method 'sft' has no setting 'warmup_steps' to follow",
        ),
        (
            "methods",
            {
                "sft": {"algorithm": "sft", "settings": {"loss_kind": "nll"}},
                "continued": {"algorithm": "sft", "settings": {"loss_kind": {"like": "sft", "times": 2}}},
            },
            r"field 'methods.continued.loss_kind': 'loss_kind' of the method 'sft' is no number",
        ),
        ("methods/sft/takes_prompts", True, r"sft takes no prompts without demonstrations"),
        ("worlds/navigate", {"prompts": 9000}, r"field 'worlds.navigate': the world 'navigate' has \d+ different"),
    ],
)
def test_what_an_algorithm_or_a_world_would_refuse_is_found_before_the_first_run(read, path, value, message):
    with pytest.raises(UserError, match=message):
        check_grid(read(changed(path, value)), "grid.yaml")


def test_the_documentation_says_how_many_settings_each_method_got():
    grid = read_grid("claims")
    counts = {method.name: {len(method.candidates(cell)) for cell in grid.cells} for method in grid.methods}
    text = (Path(__file__).resolve().parents[2] / "docs" / "lab.md").read_text(encoding="utf-8")
    lines = text.split("How many settings each method of `claims`")[1].splitlines()
    names, _, numbers = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in [line for line in lines if line[:1] == "|"][:3]
    )
    assert {name: {int(number)} for name, number in zip(names, numbers, strict=True)} == counts


@pytest.mark.parametrize("name", shipped_grids())
def test_no_shipped_grid_reports_a_seed_that_was_seen_while_settings_were_written(name):
    assert set(read_grid(name).report_seeds).isdisjoint(range(1, 9))


@pytest.mark.parametrize("name", shipped_grids())
def test_the_shipped_grids_are_good(name):
    grid = read_grid(name)
    check_grid(grid, name)
    assert grid.recipe is None or grid.method(grid.recipe)


def test_null_takes_a_merged_setting_away(read):
    grid = read(changed("methods/continued/settings", {"learning_rate": None, "num_train_epochs": 2}))
    assert grid.method("continued").settings == {"num_train_epochs": 2}


def test_a_part_of_a_grid(read):
    grid = read(GRID)
    assert grid.only(["reverse"], 2).report_seeds == (1, 2)
    with pytest.raises(UserError, match="'seeds': must be between 1 and 3"):
        grid.only(None, 4)
    with pytest.raises(UserError, match="'worlds': the grid has no world 'arrange'"):
        grid.only(["arrange"])


def test_settings_in_some_cells(read):
    where = [{"world": "reverse", "settings": {"max_steps": 3}}, {"corrupted": 0.4, "settings": {"max_steps": 5}}]
    grid = read(changed("methods/sft/where", where) | {"vary": {"corrupted": [0.0, 0.4]}})
    assert [grid.method("sft").candidates(cell)[0]["max_steps"] for cell in grid.cells] == [3, 5]
    assert [cell.title for cell in grid.cells] == ["reverse, corrupted 0", "reverse, corrupted 0.4"]


# --- the plan -----------------------------------------------------------------------------------------------------------


def answered(grid, score):
    """A plan whose runs all have results, by a function of a run's settings and seed."""
    results = {}
    while True:
        plan = make_plan(grid, results)
        missing = [wanted.run for wanted in plan.wanted if wanted.run.name not in results]
        if not missing:
            return plan, results
        for run in missing:
            results[run.name] = {"measures": score(run), "costs": {}, "definition": run.definition}


def by_rate(run):
    """High rates are better at temperature 1, low rates greedy; the second pass helps a little."""
    rate, epochs = run.settings["learning_rate"], run.settings["num_train_epochs"]
    bonus = 0.1 * run.seed + (0.5 if run.start else 0.0)
    return {"score": rate + epochs / 1e4 + bonus, "score_greedy": -rate + epochs / 1e4 + bonus}


def test_nothing_is_reported_before_it_is_chosen(read):
    grid = read(GRID)
    plan = make_plan(grid, {})
    assert not plan.complete
    assert {wanted.run.phase for wanted in plan.wanted} == {"tuning"}
    assert len(plan.wanted) == 4 * 2


def test_settings_are_chosen_for_each_objective_apart_and_reported_on_other_seeds_and_rows(read):
    grid = read(GRID)
    plan, _ = answered(grid, by_rate)
    assert plan.complete
    choice = plan.choices["reverse", "sft"].settings
    assert choice["score"] == {"learning_rate": 0.01, "num_train_epochs": 2}
    assert choice["score_greedy"] == {"learning_rate": 0.001, "num_train_epochs": 2}
    for wanted in plan.wanted:
        if wanted.chosen_for:
            assert wanted.run.phase == "reporting"
            assert wanted.run.seed in grid.report_seeds
        else:
            assert wanted.run.phase == "tuning"
            assert wanted.run.seed in grid.tuning_seeds


def test_a_method_starts_from_the_choice_for_samples_and_follows_its_settings(read):
    plan, _ = answered(read(GRID), by_rate)
    continued = [wanted.run for wanted in plan.wanted if wanted.method == "continued"]
    assert len(continued) == 3
    for run in continued:
        assert run.settings == {"learning_rate": 0.001, "num_train_epochs": 4}
        assert run.start.settings == {"learning_rate": 0.01, "num_train_epochs": 2}
        assert (run.start.seed, run.start.phase) == (run.seed, "reporting")


def test_a_rate_that_diverges_is_never_chosen(read):
    def score(run):
        diverged = run.settings["learning_rate"] == 0.01 and run.seed == 101
        return None if diverged else by_rate(run)

    plan, _ = answered(read(GRID), score)
    assert plan.choices["reverse", "sft"].settings["score"]["learning_rate"] == 0.001


def test_paired_differences_and_the_strongest_control(read):
    grid = read(GRID)
    plan, results = answered(grid, by_rate)
    rows = table_rows(grid, plan, results)
    (found,) = differences(rows, grid.cells[0], "continued", ["sft"], "score")
    # By seed: 0.5 + (0.001 + 0.0004) − (0.01 + 0.0002), without any spread.
    assert found.interval.mean == pytest.approx(0.5 + 0.0014 - 0.0102)
    assert found.interval.high - found.interval.low == pytest.approx(0, abs=1e-9)
    assert (found.won, found.interval.n) == (3, 3)
    assert strongest_control(rows, grid.cells[0], ["sft"], "score") == "sft"
    assert {row["phase"] for row in rows} == {"tuning", "reporting"}


def diverging(*lost):
    """As ``by_rate``, but some reporting runs diverge, by their start and seed."""
    return lambda run: None if (run.start is not None, run.seed) in lost and run.phase == "reporting" else by_rate(run)


@pytest.mark.parametrize("objective", ["score", "score_greedy"])
def test_a_recipe_that_diverges_counts_as_score_0(read, objective):
    grid = read(GRID)
    rows = table_rows(grid, *answered(grid, diverging((True, 2))))
    (found,) = differences(rows, grid.cells[0], "continued", ["sft"], objective)
    lost = seed_values(rows, grid.cells[0], "sft", objective, objective)[2]
    assert lost > 0
    (whole,) = differences(table_rows(grid, *answered(grid, by_rate)), grid.cells[0], "continued", ["sft"], objective)
    assert found.interval.mean == pytest.approx((2 * whole.interval.mean - lost) / 3)
    assert (found.won, found.diverged, found.interval.n) == (2, 1, 3)


def test_nothing_is_won_against_a_control_that_diverges(read):
    grid = read(GRID)
    rows = table_rows(grid, *answered(grid, diverging((False, 1), (False, 2), (False, 3))))
    (found,) = differences(rows, grid.cells[0], "continued", ["sft"], "score")
    assert (found.interval.mean, found.won, found.diverged) == (0, 0, 3)
    assert strongest_control(rows, grid.cells[0], ["sft"], "score") is None
    assert paired_gap(None, -0.2) == 0  # where scores can be lower than 0, diverging is no gain either
    assert paired_gap(-0.2, None) == -0.2


def test_no_win_is_claimed_with_a_diverged_run(read):
    grid = read(GRID)
    _, results = answered(grid, by_rate)
    page = render(grid, *planned(grid, results))
    assert 'class="helped"' in page
    assert "no win is claimed" not in page
    assert "<td>0 of 6</td>" in page  # sft: three seeds, for two objectives
    one = next(
        w.run for w in make_plan(grid, results).wanted if w.method == "sft" and w.chosen_for and w.run.seed == 3
    )
    results[one.name] = results[one.name] | {"measures": None}
    page = render(grid, *planned(grid, results))
    assert "<td>1 of 6</td>" in page
    assert "either diverged on 1, so no win is claimed" in page
    assert Difference("sft", student_interval([0.5, 0.5, 0.5]), 3, diverged=0).tone == "helped"
    assert Difference("sft", student_interval([0.5, 0.5, 0.5]), 3, diverged=1).tone == "neutral"
    assert Difference("sft", student_interval([-0.5, -0.5, -0.5]), 0, diverged=1).tone == "hurt"


def planned(grid, results):
    plan = make_plan(grid, results)
    return plan, table_rows(grid, plan, results)


# --- the code that results are of ---------------------------------------------------------------------------------------


def test_the_page_says_when_it_mixes_versions_of_the_code(read):
    grid = read(GRID)
    _, results = answered(grid, by_rate)
    assert {row["code"] for row in planned(grid, results)[1]} == {"unknown"}
    assert "different versions" not in render(grid, *planned(grid, results))
    results[next(iter(results))]["code"] = "<b>"
    assert f"different versions of the code:</strong> {len(results) - 1} of unknown, 1 of &lt;b&gt;" in render(
        grid, *planned(grid, results)
    )


def test_the_hash_follows_what_numbers_depend_on_and_no_page(tmp_path):
    root = Path(tutelage.__file__).parent
    found = {path.relative_to(root).as_posix() for path in numeric_sources(root)}
    assert {"losses.py", "training/trainer.py", "lab/running.py", "lab/measures.py", "lab/worlds/reverse.py"} <= found
    assert not any(name.startswith(("cli/", "report/")) for name in found)
    assert "lab/page.py" not in found
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    for path, text in ((first, "1"), (second, "2")):
        path.write_text(text)
    before = hash_sources(tmp_path, [first, second])
    assert before == hash_sources(tmp_path, [first, second])
    assert before != hash_sources(tmp_path, [second])
    second.write_text("3")
    assert before != hash_sources(tmp_path, [first, second])


def test_one_seed_proves_nothing():
    interval = student_interval([0.3])
    assert (interval.low, interval.high) == (float("-inf"), float("inf"))
