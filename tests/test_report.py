"""The report claims no more than the rows show, and nothing that a model wrote gets out of its quotes."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from tutelage.errors import UserError
from tutelage.evaluation.statistics import mean_interval
from tutelage.report import charts, load_run, summary_table, verdicts, write_report
from tutelage.report.page import render
from tutelage.results import model_card, run_record

EVIL = '<script>alert("1")</script>'


def evaluation(scores=None, logps=None, rows=None, score="sampled", **more):
    n = len(scores if scores is not None else logps)
    logps = [-10.0 + 0.01 * row for row in range(n)] if logps is None else logps
    result = {
        "num_rows": n,
        "task": "sums",
        "demonstration_logp": mean_interval(logps).to_dict() if np.isfinite(logps).all() else {},
        "truncated_fraction": 0.0,
        "length_mean": 5.0,
        "per_row": {"row": list(range(n)) if rows is None else rows, "demonstration_logp": logps},
    }
    if scores is not None:
        result[f"accuracy_{score}"] = mean_interval(scores).to_dict()
        result["per_row"][f"{score}_score"] = scores
    return result | more


def run(name, algorithm="irft", start="sft", evaluation=None, **more):
    return {
        "schema": 1,
        "name": name,
        "algorithm": algorithm,
        "model": "org/model",
        "dataset": "sums.jsonl",
        "seed": 0,
        "start": start,
        "settings": {"beta": 0.1, "batch_size": 8},
        "demonstration_epochs": 3.0,
        "trained_tokens": 12345,
        "sampled_tokens": 2345,
        "time_s": {"sampling": 11.0, "reference": 2.0, "training": 61.0, "total": 75.0},
        "peak_memory_bytes": 3 * 2**30,
        "history": [],
        "evaluation": evaluation,
        "samples": [],
        "selection": [],
    } | more


def scores(right, of=100):
    return [1.0] * right + [0.0] * (of - right)


def sentences(*runs):
    """Verdicts without the one on seeds."""
    return verdicts(runs)[:-1]


def candidate(stage, reward, kl, verifier_score=None, *, chosen=False, width=0.25):
    bounds = {"reward_low": reward - width, "reward_high": reward + width}
    objective = reward - 0.1 * kl
    return {
        "stage": stage,
        "reward": reward,
        **bounds,
        "kl": kl,
        "objective": objective,
        "verifier_score": verifier_score,
        "chosen": chosen,
    }


# The learned reward rises to the end; the verifier's score rises for three stages and then falls below the start's.
REWARDS, KLS, GOLD = (0.0, 0.6, 1.1, 1.5, 1.9, 2.3), (0.0, 0.9, 2.0, 3.4, 5.6, 9.8), (0.4, 0.46, 0.52, 0.55, 0.43, 0.3)
HACKED = [candidate(s, *values, chosen=s == 3) for s, values in enumerate(zip(REWARDS, KLS, GOLD, strict=True))]


def rft_history(stages=5, steps=8, skipped=(0,)):
    """As an RFT run logs: a few lines where a stage begins, one a policy step; the first stage trains no policy."""
    rng, rows, step = np.random.default_rng(0), [], 0
    for stage in range(stages):
        noise = float(rng.normal(0, 0.02))
        about = {
            "reward/loss": 0.69 - 0.06 * stage + noise,
            "reward/accuracy": 0.55 + 0.06 * stage,
            "reward/demonstrations": 0.4 + 0.3 * stage,
            "reward/samples": -0.2 + 0.1 * stage,
            "reward/gap": 0.6 + 0.2 * stage,
            "reward/steps": 16.0 - stage,
            "reward/saturated": float(stage > 0),
            "reward/length_correlation": 0.1 * stage - 0.2,
            "time/reward": 4.0,
            "time/sampling": 3.0,
            "time/reference": 1.0,
        }
        kept = {
            "validation/accuracy": 0.53 + 0.03 * stage,
            "validation/reward": REWARDS[stage] + noise,
            "validation/kl": KLS[stage],
            "validation/verifier_score": GOLD[stage],
            "validation/verifier_gap": 0.3 - 0.05 * stage,
            "preference/accuracy": 0.6 + noise,
            "time/validation": 2.0,
        }
        samples = {
            "samples/truncated_fraction": 0.02 * stage,
            "samples/distinct_1": 0.3 - 0.02 * stage,
            "samples/distinct_2": 0.7 - 0.04 * stage,
            "length/demonstrations": 40.0,
            "length/samples": 38.0 + 3 * stage,
            "policy/entropy": 1.2 - 0.1 * stage,
            "policy/phase": float(stage not in skipped),
        }
        rows += [{"step": step, "stage": stage, **found} for found in (about, kept, samples)]
        for _ in range(0 if stage in skipped else steps):
            step += 1
            policy = {"policy/kl": 0.25 * step, "policy/reward": 0.05 * step, "policy/advantage": float(rng.normal())}
            policy |= {"policy/clip_fraction": float(rng.random() / 10), "logps/samples": -20 - step / 10}
            row = {"step": step, "stage": stage, "loss": float(rng.normal()), "time/training": 1.5, **policy}
            rows.append(row)
    return rows


def rft(found=None, **more):
    time = {"sampling": 15.0, "reference": 5.0, "reward": 20.0, "validation": 10.0, "training": 48.0, "total": 98.0}
    more = {"settings": {"beta": 0.1, "num_samples": 4}, "selection": HACKED, "time_s": time} | more
    return run("rft", "rft", evaluation=found, **{"history": rft_history(), **more})


class TestLoad:
    def test_directory_or_file(self, tmp_path):
        saved = run("irft", evaluation=evaluation(scores(3)), history=[{"step": 1, "loss": math.nan}])
        (tmp_path / "results.json").write_text(json.dumps(saved))
        assert load_run(tmp_path)["evaluation"] == saved["evaluation"]
        assert load_run(tmp_path / "results.json")["name"] == "irft"

    def test_first_files_had_no_selection(self, tmp_path):
        record = {key: value for key, value in run("irft").items() if key != "selection"}
        (tmp_path / "results.json").write_text(json.dumps(record))
        assert load_run(tmp_path)["selection"] == []

    def test_no_file(self, tmp_path):
        with pytest.raises(UserError, match=r"results\.json: no such file.*output directory"):
            load_run(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "not a JSON file"),
            ("[]", "schema None"),
            ('{"schema": 2}', "schema 2, but this version reads schema 1"),
            (json.dumps(run("irft") | {"history": {}}), "field 'history'"),
            (json.dumps({key: value for key, value in run("irft").items() if key != "samples"}), "field 'samples'"),
            (json.dumps(run("rft", selection={})), "field 'selection'"),
        ],
    )
    def test_bad_file(self, tmp_path, text, message):
        path = tmp_path / "results.json"
        path.write_text(text)
        with pytest.raises(UserError, match=message) as error:
            load_run(path)
        assert str(path) in str(error.value)


class TestVerdicts:
    def test_helped_only_if_the_interval_excludes_zero(self):
        control = run("continued-sft", "sft", evaluation=evaluation(scores(30)))
        helped = sentences(control, run("irft", evaluation=evaluation(scores(50))))
        assert helped[0].startswith("irft helped over continued-sft: sampled accuracy 0.50 against 0.30")
        unclear = sentences(control, run("irft", evaluation=evaluation(scores(32))))
        assert re.fullmatch(
            r"irft did not beat continued-sft: sampled accuracy 0\.32 against 0\.30, difference \+0\.02 "
            r"\(95% interval −0\.0\d to 0\.0\d\); no difference that 100 rows can show\.",
            unclear[0],
        )
        worse = sentences(control, run("irft", evaluation=evaluation(scores(10))))
        assert "did worse" in worse[0]
        assert "difference −0.20" in worse[0]

    def test_rows_are_paired_by_number(self):
        # The same noisy log-probs, one tenth of a nat better on every row, in another order: certain if paired.
        logps = np.random.default_rng(0).normal(-50, 20, size=40)
        order = np.random.default_rng(1).permutation(40)
        control = run("continued-sft", evaluation=evaluation(logps=logps.tolist()))
        better = run("irft", evaluation=evaluation(logps=(logps[order] + 0.1).tolist(), rows=order.tolist()))
        assert sentences(control, better)[0].startswith("irft helped over continued-sft: held-out demonstration")
        assert "difference +0.10 (95% interval 0.10 to 0.10), 40 rows" in sentences(control, better)[0]

    def test_only_shared_rows_count(self):
        control = run("continued-sft", evaluation=evaluation(scores(10, of=20)))
        method = run("irft", evaluation=evaluation(scores(10, of=20), rows=[*range(15), *range(100, 105)]))
        assert "15 rows can show" in sentences(control, method)[0]
        elsewhere = run("irft", evaluation=evaluation(scores(10, of=20), rows=list(range(100, 120))))
        assert sentences(control, elsewhere) == [
            "irft cannot be judged: it shares no evaluated rows with continued-sft."
        ]

    def test_greedy_where_nothing_was_sampled(self):
        control = run("continued-sft", evaluation=evaluation(scores(30), score="greedy"))
        method = run("irft", evaluation=evaluation(scores(60), score="greedy"))
        assert "greedy accuracy 0.60 against 0.30" in sentences(control, method)[0]

    def test_the_start_is_the_control_without_continued_sft(self):
        start = run("sft", "sft", None, evaluation(scores(30)))
        method = run("irft", evaluation=evaluation(scores(30)))
        assert sentences(start, method)[0].startswith("irft did not beat sft:")
        third = run("continued-sft", "sft", evaluation=evaluation(scores(10)))
        assert sentences(start, method, third)[0].startswith("irft helped over continued-sft:")

    def test_no_claim_without_control_evaluation_or_the_same_task(self):
        method = run("irft", evaluation=evaluation(scores(30)))
        assert sentences(method)[0].startswith("irft has no control:")
        blank = run("continued-sft", "sft")
        assert sentences(method, blank) == ["irft cannot be judged: continued-sft was not evaluated."]
        other = run("continued-sft", "sft", evaluation=evaluation(scores(30), task="words"))
        assert "other data or on another task" in sentences(method, other)[0]
        assert sentences(run("base", "base", None)) == [
            "There is no method to judge: only the start or the control of a comparison."
        ]

    def test_few_rows_show_nothing(self):
        control = run("continued-sft", evaluation=evaluation([0.0] * 4))
        assert all("Too few" in text for text in sentences(control, run("irft", evaluation=evaluation([1.0] * 4))))

    def test_nan_is_said(self):
        control = run("continued-sft", evaluation=evaluation(logps=[-1.0] * 20))
        broken = evaluation(logps=[-1.0] * 19 + [math.nan])
        assert "1 of the values are NaN" in sentences(control, run("irft", start=None, evaluation=broken))[0]

    def test_unequal_budget(self):
        control = run("continued-sft", evaluation=evaluation(scores(30)))
        method = run("irft", evaluation=evaluation(scores(30)), demonstration_epochs=6.0)
        expected = "Not an equal budget: irft made 6 demonstration passes, continued-sft 3."
        assert expected in sentences(control, method)
        assert expected not in sentences(control, method | {"demonstration_epochs": 3.1})

    @pytest.mark.parametrize(("logp", "collapsed"), [(-10.9, False), (-11.1, True), (-5.0, False)])
    def test_collapse(self, logp, collapsed):
        start = run("sft", "sft", None, evaluation(logps=[-10.0] * 20))
        found = sentences(start, run("spin", "spin", evaluation=evaluation(logps=[logp] * 20)))
        assert collapsed == any(text.startswith("spin collapsed:") for text in found)

    def test_seeds(self):
        one = run("irft", evaluation=evaluation(scores(30)), seed=7)
        assert verdicts([one])[-1].startswith("One seed (7) is one seed")
        assert "(3, 7)" in verdicts([one, run("continued-sft", seed=3)])[-1]

    def test_rft_is_a_method(self):
        control = run("continued-sft", "sft", evaluation=evaluation(scores(30)))
        found = sentences(control, rft(evaluation(scores(50)), selection=[]))
        assert found[0].startswith("rft helped over continued-sft:")
        assert not any("kept" in text or "hacking" in text for text in found)

    def test_which_policy_was_kept(self):
        kept, hacking = sentences(rft())[1:]
        assert kept == (
            "rft kept the policy after 3 stages: held-out learned reward 1.50 at 3.40 nats KL, objective (reward/scale − β·KL) "
            "1.16 against 0.00 at the start, verifier score 0.55 against 0.40."
        )
        assert hacking == (
            "Reward hacking in rft: from the start to the policy after 5 stages the held-out learned reward rose from 0.00 "
            "(95% interval −0.25 to 0.25) to 2.30 (95% interval 2.05 to 2.55), but the verifier score fell from 0.40 to 0.30."
        )

    def test_the_start_was_kept(self):
        chosen = [candidate(0, 0.0, 0.0, chosen=True), candidate(2, 0.2, 6.0), candidate(1, 0.1, 2.0)]
        assert sentences(rft(selection=chosen))[1:] == [
            "rft kept the policy that it started from: no stage beat it; its objective (held-out learned reward/scale − β·KL) is "
            "0.00, that of the best other, after 1 stage, −0.10."
        ]

    @pytest.mark.parametrize(
        ("reward", "verifier_score", "hacked"),
        [(0.6, 0.39, True), (0.4, 0.3, False), (0.6, 0.4, False), (0.6, None, False)],
    )
    def test_hacking_is_a_sure_rise_of_the_reward_and_a_fall_of_the_gold_score(self, reward, verifier_score, hacked):
        pair = [candidate(0, 0.0, 0.0, 0.4, chosen=True), candidate(1, reward, 1.0, verifier_score)]
        assert hacked == any(text.startswith("Reward hacking") for text in sentences(rft(selection=pair)))

    def test_names_must_differ(self):
        with pytest.raises(UserError, match="2 runs are called 'irft'"):
            verdicts([run("irft"), run("irft")])
        with pytest.raises(UserError, match="no runs"):
            verdicts([])


@pytest.fixture
def five_runs():
    rng = np.random.default_rng(0)

    def history(stages, method):
        rows = []
        for step in range(1, 25):
            row = {"step": step, "epoch": step / 8, "stage": 1 + (step - 1) * stages // 24, "loss": 1 / step}
            row |= {"logps/demonstrations": -12 + step / 10, "time/training": 2.0, "grad_norm": float(rng.random())}
            if method:
                row |= {"logps/samples": -11.0, "rewards/margin": float(rng.normal()), "time/sampling": 1.0}
            rows += [row, {"step": step, "eval_demonstration_logp": -13 + step / 10}]
        rows[6]["loss"] = math.nan
        return rows

    def samples(name):
        shown = {"row": 3, "prompt": "12 + 7?", "demonstration": "19", "sampled": f"{name}\n\tsays 19"}
        return [shown | {"sampled_score": 1.0, "greedy": "20", "greedy_score": 0.0}]

    kinds = {"base-sft": ("sft", None, 1), "continued-sft": ("sft", "base-sft", 1)}
    kinds |= {name: (name, "base-sft", stages) for name, stages in (("spin", 3), ("irft", 6), ("rft", 24))}
    runs = []
    for name, (algorithm, start, stages) in kinds.items():
        found = evaluation(
            (rng.random(128) < 0.4).astype(float).tolist(),
            rng.normal(-123.0, 20.0, size=128).tolist(),
            accuracy_greedy=mean_interval(scores(40)).to_dict(),
            preference_accuracy=mean_interval(scores(60)).to_dict(),
        )
        method = algorithm != "sft"
        more = {"history": history(stages, method), "samples": samples(name)}
        more["settings"] = {"beta": 0.1 if method else None, "batch_size": 8, "stages": stages}
        runs.append(run(name, algorithm, start, found, **more))
    return runs


def terminal(runs, width=100):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(summary_table(runs))
    return capture.get()


class TestSummary:
    def test_fits_a_terminal(self, five_runs):
        text = terminal(five_runs)
        assert "…" not in text
        assert text == terminal(five_runs, width=300)  # nothing had to be wrapped or cut
        for cell in ("continued-sft", "preference", "1 min 15 s", "3.00 GiB", "0.60", "0.50–0.69"):
            assert cell in text

    def test_columns_without_a_value_are_left_out(self):
        text = terminal([run("irft", peak_memory_bytes=None), run("sft", "sft")])
        assert "accuracy" not in text
        assert "95%" not in text
        assert "3.00 GiB" in text
        assert "–" in text

    def test_explicit_reward(self, five_runs):
        for each in five_runs[3:]:
            each["evaluation"]["reward_accuracy"] = mean_interval(scores(70)).to_dict()
            each["evaluation"]["preference_reward_accuracy"] = mean_interval(scores(81)).to_dict()
        text = terminal(five_runs)
        assert text == terminal(five_runs, width=300)
        assert re.search(r"^rft .* 0\.70 +0\.81$", text, re.MULTILINE)
        assert "min" not in text  # what it cost gave way
        page = render(five_runs)
        assert page.count(">reward accuracy<") == page.count(">preference reward accuracy<") == 1
        assert "1 min 15 s" in page

    def test_a_name_is_no_markup(self):
        assert "[red]x[/red]" in terminal([run("[red]x[/red]")])


class Balance(HTMLParser):
    """Collects the elements of a page and asserts that each is closed where it should be."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in {"meta"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(page):
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    return parser.seen


class TestPage:
    def test_one_file_that_needs_nothing_else(self, five_runs, tmp_path):
        path = tmp_path / "new" / "report.html"
        write_report(five_runs, path)
        assert [file.name for file in path.parent.iterdir()] == ["report.html"]
        page = path.read_text(encoding="utf-8")
        elements = parse(page)
        assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in elements}
        for _, attributes in elements:
            assert "src" not in attributes
            assert attributes.get("href", attributes.get("xlink:href", "#"))[0] == "#"
        assert not re.search(r"url\((?!#)|@import", page)
        for heading in ("Summary", "Curves", "Time", "Samples", "Settings that differ"):
            assert f"<h2>{heading}</h2>" in page
        assert all(sentence.split(": ", 1)[1] in page for sentence in verdicts(five_runs))
        assert page.count("<svg") >= 8

    def test_same_runs_same_file(self, five_runs):
        assert render(five_runs) == render(json.loads(json.dumps(five_runs)))

    def test_ids_stand_once_for_one_thing(self, five_runs):
        definitions = re.findall(r'id="([^"]+)">\s*<(rect[^>]*>|path[^>]*>)', render([*five_runs[:4], rft()]))
        by_id = {}
        for name, content in definitions:
            assert by_id.setdefault(name, content) == content

    def test_everything_is_escaped(self, five_runs):
        sample = {"row": EVIL, "sampled_score": 0.5, "greedy_score": None}
        sample |= dict.fromkeys(("prompt", "demonstration", "sampled", "greedy"), EVIL)
        evil = five_runs[3] | {
            "name": EVIL,
            "model": EVIL,
            "dataset": EVIL,
            "settings": {EVIL: EVIL, "list": [EVIL]},
            "samples": [sample],
            "history": [{"step": 1, EVIL: 1.0, "loss": 0.5}, {"step": 2, EVIL: 2.0}],
        }
        control = run(EVIL, "continued-sft", evaluation=five_runs[1]["evaluation"], demonstration_epochs=9.0)
        for runs in ([evil], [evil, *five_runs[:2]], [control, five_runs[3]]):
            page = render(runs)
            assert "script" not in {tag for tag, _ in parse(page)}
            assert "<script" not in page
            assert page.count("&lt;script&gt;alert(") >= 5

    def test_samples_side_by_side(self, five_runs):
        page = render(five_runs)
        card = page[page.index('<article class="prompt">') : page.index("</article>")]
        assert page.count("<article") == 1
        for each in five_runs:
            assert f"{each['name']}\n\tsays 19" in card
        assert card.count("✓ right, 1") == card.count("✗ wrong, 0") == 5
        five_runs[1]["samples"] = []
        assert "not sampled" in render(five_runs)

    def test_many_prompts_are_folded(self, five_runs):
        shown = five_runs[0]["samples"][0]
        page = render([five_runs[0] | {"samples": [shown | {"row": row} for row in range(20)]}])
        assert page.count("<article") == 20
        assert "<summary>8 more prompts</summary>" in page

    def test_rft(self):
        page = render([rft()])
        parse(page)
        for heading in ("Learned reward against verifier score", "Learned reward", "Policy"):
            assert re.search(f"<h[23]>{heading}</h", page)
        assert "Everything else" not in page  # every key that RFT logs has a title
        for part in ("sampling", "reference", "reward", "validation", "training"):
            assert f">{part}</span>" in page
        assert ">reward</span>" not in render([run("irft")])
        assert "<h2>Learned reward" not in render([run("irft")])

    def test_candidates_without_a_verifier(self):
        page = render([rft(selection=[{**each, "verifier_score": None} for each in HACKED])])
        assert "<h2>Learned reward of the candidates</h2>" in page
        assert "By distance from the start" in page
        assert "verifier score, dashed" not in page

    def test_settings(self, five_runs):
        page = render(five_runs)
        differing, shared = page[page.index("Settings that differ") :].split("<details>")
        assert ">beta<" in differing
        assert ">batch_size<" not in differing
        assert ">batch_size<" in shared
        single = render(five_runs[3:4])
        assert "Settings that differ" not in single
        assert ">batch_size<" in single

    def test_a_run_with_nothing_in_it(self):
        page = render([run("irft", time_s=None, peak_memory_bytes=None, demonstration_epochs=None)])
        parse(page)
        for heading in ("Summary", "Curves", "Time", "Samples"):
            assert f"<h2>{heading}</h2>" not in page

    def test_nan_in_the_evaluation(self, five_runs):
        five_runs[3]["evaluation"]["demonstration_logp"] = {
            "mean": math.nan,
            "low": math.nan,
            "high": math.nan,
            "n": 9,
        }
        parse(render(five_runs))
        terminal(five_runs)

    def test_a_run_has_its_color_everywhere(self, five_runs):
        page = render(five_runs)
        spin = re.findall(r'style="--c:var\((--run-\d)\)"[^<]*>spin<', page)
        assert set(spin) == {"--run-2"}
        assert len(spin) >= 4  # legend, summary, time, samples, settings


class TestCharts:
    def test_colors_come_from_the_page(self, five_runs):
        svg = charts.curve(five_runs, "loss")
        assert svg is not None
        assert all(f"var(--run-{index})" in svg for index in range(5))
        assert not re.search(r"(fill|stroke): #", svg)
        assert re.search(r"<svg [^>]*viewBox", svg)
        assert "width=" not in svg.split(">")[0]

    def test_nothing_to_draw(self):
        empty = run("irft", history=[{"step": 1, "loss": math.nan}, {"step": 2, "loss": None}, {"loss": 1.0}])
        assert charts.curve([empty], "loss") is None
        assert charts.curve([empty], "rewards/margin") is None

    def test_nan_leaves_a_gap(self):
        def subpaths(values):
            history = [{"step": step, "loss": value} for step, value in enumerate(values)]
            svg = charts.curve([run("irft", history=history)], "loss")
            assert svg is not None
            (line,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--run-0\)', svg)
            return line.count("M")

        values = [1.0 / (1 + step) for step in range(20)]
        assert subpaths(values) == 1
        assert subpaths([*values[:9], math.nan, *values[10:]]) == 2
        assert subpaths([*values[:9], math.inf, *values[10:]]) == 2

    def test_stage_boundaries_unless_they_would_hide_the_curve(self):
        def marks(steps, stages):
            history = [{"step": step, "stage": step * stages // steps, "loss": 1.0} for step in range(steps)]
            svg = charts.curve([run("irft", history=history)], "loss")
            assert svg is not None
            return svg.count("stroke-opacity: 0.5")

        assert marks(60, 1) == 0
        assert marks(60, 4) == 3
        assert marks(60, 60) == 0

    def test_stages_without_a_step_share_a_boundary(self):
        history = [{"step": 0, "stage": stage, "loss": 1.0} for stage in range(4)]
        svg = charts.curve([run("rft", history=history)], "loss")
        assert svg is not None
        assert svg.count("stroke-opacity: 0.5") == 1

    def test_over_stages(self):
        # Two stages without a policy step share step 0; over stages they stand apart.
        history = [{"step": 0, "stage": 0, "a": 1.0, "b": 2.0}, {"step": 0, "stage": 1, "a": 3.0, "b": 1.0}]
        skipped = run("rft", "rft", history=history)

        def lines(over, faint=None):
            svg = charts.curve([skipped], "a", over=over, faint=faint)
            assert svg is not None
            paths = re.findall(
                r'<path d="M ([\d.]+) [\d.]+ \s*L ([\d.]+) [^"]*"[^>]*stroke: var\(--run-0\)([^"]*)', svg
            )
            return [(start == end, "opacity: 0.4" in style) for start, end, style in paths if "width: 1.5" in style]

        assert lines("step") == [(True, False)]
        assert lines("stage") == [(False, False)]
        assert lines("stage", faint="b") == [(False, False), (False, True)]
        assert lines("stage", faint="none") == [(False, False)]

    def test_faint_curve_alone(self):
        assert charts.curve([run("rft", history=[{"stage": 0, "b": 1.0}])], "a", faint="b", over="stage") is not None

    def test_candidates(self):
        svg = charts.candidate_scores(rft(), 2, "kl")
        assert svg is not None
        assert not re.search(r"(fill|stroke): #", svg)
        assert "verifier score, dashed" in svg
        assert "var(--run-2)" in svg
        broken = [{**each, "kl": math.nan, "verifier_score": math.nan} for each in HACKED]
        assert charts.candidate_scores(rft(selection=broken), 0, "kl") is not None
        assert charts.candidate_scores(rft(selection=HACKED[:1]), 0, "stage") is None
        assert charts.candidate_scores(run("irft"), 0, "stage") is None

    def test_the_policy_that_was_kept_has_a_ring(self):
        def rings(selection):
            svg = charts.candidate_scores(rft(selection=selection), 0, "stage")
            assert svg is not None
            return re.findall(r'<use [^>]*x="([\d.]+)"[^>]*fill-opacity: 0; stroke', svg)

        chosen, rewards_only = rings(HACKED), rings([{**each, "verifier_score": None} for each in HACKED])
        assert len(set(chosen)) == 1
        assert (len(chosen), len(rewards_only)) == (2, 1)
        assert rings([{**each, "chosen": False} for each in HACKED]) == []

    def test_time_by_stage(self):
        rows = [{"step": step, "stage": 1 + step // 3, "time/training": 2.0} for step in range(6)]
        rows[0]["time/sampling"], rows[3]["time/sampling"] = 5.0, math.nan
        assert charts.stage_times(run("irft", history=rows), 0) is not None
        assert charts.stage_times(run("sft", history=rows[:3]), 0) is None

    def test_other_metrics_are_all_there(self, five_runs):
        assert [metric.key for metric in charts.other_metrics(five_runs)] == ["grad_norm"]
        assert "grad_norm" in render(five_runs)


class TestModelCard:
    def test_rft(self):
        card = model_card(rft())
        assert "from demonstrations and preference pairs by" in card
        assert "5 stages: at the start of each, 4 completion(s) a prompt were sampled" in card
        assert "in 4 of the stages the policy was then improved with that reward by leave-one-out REINFORCE" in card
        assert "These are the weights after 3 of them, chosen on validation rows." in card
        assert "raised the demonstrations over them" not in card

    def test_rft_with_other_advantages(self):
        card = model_card(rft(settings={"num_samples": 4, "advantages": "group_normalized"}))
        assert "by REINFORCE with group-normalized advantages under a KL penalty to the start" in card
        assert "leave-one-out" not in card

    def test_rft_that_kept_its_start(self):
        card = model_card(rft(history=[], selection=[candidate(0, 0.0, 0.0, chosen=True), candidate(1, 0.1, 2.0)]))
        assert "from demonstrations alone by" in card
        assert "No stage beat the start: these are its weights." in card

    def test_irft(self):
        card = model_card(run("irft", history=[{"pairs/dropped": 0}, {"loss": 0.5}]))
        assert "1 stages" in card
        assert "raised the demonstrations over them" in card
        assert "REINFORCE" not in card


def test_run_record_has_an_empty_selection():
    assert (
        run_record(name="base", algorithm="base", model="org/model", dataset="sums.jsonl", seed=0)["selection"] == []
    )
