"""The report claims no more than the rows show, and nothing that a model wrote gets out of its quotes."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from tutelage.algorithms.irft import IRFT
from tutelage.algorithms.rft_labels import RFT_CURVES, rft_card
from tutelage.card import model_card
from tutelage.errors import UserError
from tutelage.evaluation.record import retention
from tutelage.evaluation.reward_quality import ScoredAnswers, reward_quality
from tutelage.evaluation.statistics import mean_interval
from tutelage.report import charts, summary_table, verdicts, write_report
from tutelage.report.page import render
from tutelage.results import (
    AnswerRecord,
    CandidateRecord,
    Curve,
    EvaluationRecord,
    Interval,
    RunRecord,
    SampleRecord,
    load_results,
    run_id,
    write_results,
)

EVIL = '<script>alert("1")</script>'


def evaluation(scores=None, logps=None, rows=None, answers="sampled", *, task="sums", **means):
    """Of ``scores``, what a verifier gave the answers, and ``logps`` of the demonstrations."""
    n = len(scores if scores is not None else logps)
    logps = [-10.0 + 0.01 * row for row in range(n)] if logps is None else logps
    found = {"demonstration_logp": mean_interval(logps)} if None not in logps else {}
    per_row = {"demonstration_logp": logps}
    if scores is not None:
        right = [float(score >= 1) for score in scores]
        found |= {f"score_{answers}": mean_interval(scores), f"accuracy_{answers}": mean_interval(right)}
        per_row |= {f"{answers}_score": scores, f"{answers}_right": right}
    rows = list(range(n)) if rows is None else rows
    return EvaluationRecord("held_out.jsonl", task, rows, found | means, 5.0, 0.0, per_row)


def run(name, algorithm="irft", start="the-start", evaluation=None, **more):
    """A run that started from the run of id ``start``."""
    curves = {"rft": RFT_CURVES, "irft": IRFT.curves, "spin": IRFT.curves}
    more = {
        "settings": {"beta": 0.1, "batch_size": 8},
        "demonstration_epochs": 3.0,
        "trained_tokens": 12345,
        "sampled_tokens": 2345,
        "time_s": {"sampling": 11.0, "reference": 2.0, "training": 61.0, "total": 75.0},
        "peak_memory_bytes": 3 * 2**30,
        "curves": list(curves.get(algorithm, ())),
    } | more
    return RunRecord(
        name, algorithm, "org/model", "sums.jsonl", **{"seed": 0} | more, start=start, evaluation=evaluation
    )


def control(evaluation=None, name="continued-sft", **more):
    return run(name, "sft", evaluation=evaluation, **more)


def the_start(evaluation=None, name="sft", **more):
    return run(name, "sft", None, evaluation, id="the-start", **more)


def scores(right, of=100):
    return [1.0] * right + [0.0] * (of - right)


def sentences(*runs):
    """Verdicts without the one on seeds."""
    return verdicts(runs)[:-1]


def first(*runs):
    return sentences(*runs)[0]


def candidate(stage, reward, kl, verifier_score=None, *, chosen=False, width=0.25):
    scored = [None] * 3
    if verifier_score is not None:
        scored = [verifier_score, verifier_score - 0.02, verifier_score + 0.02]
    return CandidateRecord(stage, reward, reward - width, reward + width, kl, reward - 0.1 * kl, *scored, chosen)


def unscored(found):
    none = {"verifier_score": None, "verifier_score_low": None, "verifier_score_high": None}
    return [replace(each, **none) for each in found]


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


class TestRecord:
    def test_written_and_read_back(self, tmp_path):
        (answer, history) = (AnswerRecord("19", 0.5), [{"step": 1, "loss": 0.25}])
        saved = replace(
            rft(evaluation(scores(3))), history=history, samples=[SampleRecord(3, "12 + 7?", "19", answer)]
        )
        assert write_results(tmp_path / "new", saved) == tmp_path / "new" / "results.json"
        assert load_results(tmp_path / "new") == load_results(tmp_path / "new" / "results.json") == saved

    def test_no_nan_in_the_file(self, tmp_path):
        """Where a value may be missing, a number that is not finite becomes null; elsewhere it is an error."""
        saved = run("irft", evaluation=evaluation(logps=[-1.0] * 3), history=[{"step": 1, "loss": math.nan}])
        saved.evaluation.per_row["demonstration_logp"][1] = -math.inf
        write_results(tmp_path, saved)
        json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
        found = load_results(tmp_path)
        assert found.history == [{"step": 1, "loss": None}]
        assert found.evaluation.per_row["demonstration_logp"] == [-1.0, None, -1.0]
        saved.evaluation.means["demonstration_logp"] = Interval(math.nan, 0.0, 1.0, 3)
        before = (tmp_path / "results.json").read_bytes()
        with pytest.raises(UserError, match=r"evaluation\.means\.demonstration_logp\.mean.*nan cannot stand"):
            write_results(tmp_path, saved)
        assert (tmp_path / "results.json").read_bytes() == before
        (tmp_path / "results.json").write_text('{"schema": 2, "name": NaN}')
        with pytest.raises(UserError, match=r"not a JSON file.*NaN"):
            load_results(tmp_path)

    def test_no_file(self, tmp_path):
        with pytest.raises(UserError, match=r"results\.json: no such file.*output directory"):
            load_results(tmp_path)

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (("schema",), 1, "schema 1, but this version reads schema 2"),
            (("name",), 7, "field 'name': is 7, not a text"),
            (("history",), {}, "field 'history': is 'dict', not a list"),
            (("samples",), ..., "field 'samples': is missing"),
            (("seed",), True, "field 'seed': is True, not a number"),
            (("seed",), 0.5, "field 'seed': is 0.5, not a whole number"),
            (("selection", 1, "kl"), "far", r"field 'selection\[1\].kl': is 'far', not a number"),
            (("selection", 1, "chosen"), 1, r"field 'selection\[1\].chosen': is 1, not true or false"),
            (("curves", 0, "over"), "epoch", r"field 'curves\[0\].over': is 'epoch', not one of step, stage"),
            (("evaluation", "means", "demonstration_logp", "low"), ..., "demonstration_logp.low': is missing"),
            (("evaluation", "per_row", "demonstration_logp"), [1.0], "holds 1 values for 3 rows"),
            (("time_s", "total"), None, "field 'time_s.total': is None, not a number"),
            (("evaluation", "reward_quality"), {}, r"reward_quality\.prompts': is missing"),
            (("retention",), {"before": None}, r"field 'retention\.after': is missing"),
        ],
    )
    def test_a_file_that_is_not_as_it_should_be(self, tmp_path, place, value, message):
        data = json.loads(json.dumps(rft(evaluation(logps=[-1.0, -2.0, -4.0])).to_dict()))
        parent = data
        for part in place[:-1]:
            parent = parent[part]
        parent[place[-1]] = value
        if value is ...:
            del parent[place[-1]]
        path = tmp_path / "results.json"
        path.write_text(json.dumps(data))
        with pytest.raises(UserError, match=message) as error:
            load_results(tmp_path)
        assert str(path) in str(error.value)
        assert error.value.remedy

    @pytest.mark.parametrize("text", ["{", "[]", "3", "\xff"])
    def test_not_a_record(self, tmp_path, text):
        (tmp_path / "results.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"not a JSON file|schema None"):
            load_results(tmp_path)

    def test_fields_of_later_versions_are_left_out(self):
        data = run("irft").to_dict()
        assert RunRecord.from_dict(data | {"weather": "fair"}) == run("irft")

    def test_fields_that_came_later_may_be_absent(self):
        """A file of this schema that was written before they were known reads as one without them."""
        data = json.loads(json.dumps(run("irft", evaluation=evaluation(scores(3))).to_dict()))
        for place, name in ((data, "flops"), (data, "retention"), (data["evaluation"], "reward_quality")):
            del place[name]
        assert RunRecord.from_dict(data) == run("irft", evaluation=evaluation(scores(3)))

    def test_id_outlives_names_costs_and_evaluations(self):
        one = run("irft", history=[{"step": 1, "loss": 0.5}])
        again = run("a", evaluation=evaluation(scores(3)), time_s={}, history=[{"loss": 0.5}, {"train_runtime": 3.0}])
        assert one.id == again.id
        other = {run("irft", history=[{"loss": 0.25}]).id, run("irft", start="x").id, run("irft", seed=1).id}
        assert len(other | {one.id}) == 4

    def test_id_of_the_run_that_wrote_a_model(self, tmp_path):
        saved = run("irft")
        write_results(tmp_path / "run", saved)
        (tmp_path / "run" / "policy").mkdir()
        assert run_id(tmp_path / "run") == run_id(str(tmp_path / "run" / "policy")) == saved.id
        assert run_id("org/model") is None
        (tmp_path / "run" / "results.json").write_text('{"schema": 1}')
        assert run_id(tmp_path / "run") is None

    def test_needs_no_engine(self):
        """A report is written where torch is not even installed."""
        code = "import sys, tutelage.results, tutelage.report; print('torch' in sys.modules, 'peft' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "False False\n"


class TestVerdicts:
    def test_helped_only_if_the_interval_excludes_zero(self):
        against = control(evaluation(scores(30)))
        helped = sentences(against, run("irft", evaluation=evaluation(scores(50))))
        assert helped[0].startswith("irft helped over continued-sft: sampled accuracy 0.50 against 0.30")
        unclear = sentences(against, run("irft", evaluation=evaluation(scores(32))))
        assert re.fullmatch(
            r"irft did not beat continued-sft: sampled accuracy 0\.32 against 0\.30, difference \+0\.02 "
            r"\(95% interval −0\.0\d to 0\.0\d\); no difference that 100 rows can show\.",
            unclear[0],
        )
        worse = sentences(against, run("irft", evaluation=evaluation(scores(10))))
        assert "did worse" in worse[0]
        assert "difference −0.20" in worse[0]

    def test_sft_with_another_loss_is_a_method_and_no_control(self):
        against = control(evaluation(scores(30)))
        dft = run("dft", algorithm="sft", evaluation=evaluation(scores(50)), settings={"loss_kind": "dft"})
        assert sentences(against, dft)[0].startswith(
            "dft helped over continued-sft: sampled accuracy 0.50 against 0.30"
        )
        irft = run("irft", evaluation=evaluation(scores(40)))
        assert not any("over dft" in text or "than dft" in text for text in sentences(against, dft, irft))

    def test_rows_are_paired_by_number(self):
        # The same noisy log-probs, about a tenth of a nat better on every row, in another order: certain if paired.
        rng = np.random.default_rng(0)
        logps, better = rng.normal(-50, 20, size=40), rng.normal(0.1, 0.02, size=40)
        order = np.random.default_rng(1).permutation(40)
        found = evaluation(logps=(logps + better)[order].tolist(), rows=order.tolist())
        text = first(control(evaluation(logps=logps.tolist())), run("irft", evaluation=found))
        assert text.startswith("irft helped over continued-sft: held-out demonstration")
        assert re.search(r"difference \+0\.1\d\d \(95% interval 0\.\d\d\d to 0\.1\d\d\), 40 rows", text)

    def test_only_shared_rows_count(self):
        against = control(evaluation(scores(10, of=20)))
        method = run("irft", evaluation=evaluation(scores(10, of=20), rows=[*range(15), *range(100, 105)]))
        assert "15 rows can show" in first(against, method)
        elsewhere = run("irft", evaluation=evaluation(scores(10, of=20), rows=list(range(100, 120))))
        assert sentences(against, elsewhere) == [
            "irft cannot be judged: it shares no evaluated rows with continued-sft."
        ]

    def test_greedy_where_nothing_was_sampled(self):
        against = control(evaluation(scores(30), answers="greedy"))
        method = run("irft", evaluation=evaluation(scores(60), answers="greedy"))
        assert "greedy accuracy 0.60 against 0.30" in first(against, method)

    def test_no_claim_without_control_evaluation_or_the_same_task(self):
        method = run("irft", evaluation=evaluation(scores(30)))
        assert first(method).startswith("irft has no control:")
        assert sentences(method, control()) == ["irft cannot be judged: continued-sft was not evaluated."]
        other = control(evaluation(scores(30), task="words"))
        assert "other data or on another task" in first(method, other)
        elsewhere = control(replace(evaluation(scores(30)), dataset="other.jsonl"))
        assert "other data or on another task" in first(method, elsewhere)
        assert sentences(run("base", "base", None)) == [
            "There is no method to judge: only the start or the control of a comparison."
        ]

    def test_few_rows_show_nothing(self):
        against = control(evaluation([0.0] * 4))
        assert all("Too few" in text for text in sentences(against, run("irft", evaluation=evaluation([1.0] * 4))))

    def test_nan_is_said(self):
        broken = evaluation(logps=[-1.0] * 19 + [None])
        text = first(control(evaluation(logps=[-1.0] * 20)), run("irft", evaluation=broken))
        assert "1 of the values are NaN" in text

    def test_unequal_budget_and_data(self):
        against = control(evaluation(scores(30)))
        method = run("irft", evaluation=evaluation(scores(30)), demonstration_epochs=6.0)
        expected = "Not an equal budget: irft made 6 demonstration passes, continued-sft 3."
        assert expected in sentences(against, method)
        assert expected not in sentences(against, replace(method, demonstration_epochs=3.1))
        expected = "Not the same data: irft was trained on more.jsonl, continued-sft on sums.jsonl."
        assert expected in sentences(against, replace(method, dataset="more.jsonl"))

    @pytest.mark.parametrize(("logp", "collapsed"), [(-10.9, False), (-11.1, True), (-5.0, False)])
    def test_collapse(self, logp, collapsed):
        start = the_start(evaluation(logps=[-10.0] * 20))
        found = sentences(start, run("spin", "spin", evaluation=evaluation(logps=[logp] * 20)))
        assert collapsed == any(text.startswith("spin collapsed:") for text in found)

    def test_seeds(self):
        one = run("irft", evaluation=evaluation(scores(30)), seed=7)
        assert verdicts([one])[-1].startswith("One seed (7) is one seed")
        assert "(3, 7)" in verdicts([one, control(seed=3)])[-1]

    def test_rft_is_a_method(self):
        found = sentences(control(evaluation(scores(30))), rft(evaluation(scores(50)), selection=[]))
        assert found[0].startswith("rft helped over continued-sft:")
        assert not any("kept" in text or "hacking" in text for text in found)

    def test_which_policy_was_kept(self):
        kept, hacking = sentences(rft())[1:]
        assert kept == (
            "rft kept the policy after 3 stages: learned reward 1.50 on validation rows at 3.40 nats KL, objective "
            "(reward/scale − β·KL) 1.16 against 0.00 at the start, verifier score 0.55 against 0.40."
        )
        assert hacking == (
            "Reward hacking in rft: from the start to the policy after 5 stages the learned reward of validation samples "
            "rose from 0.00 (95% interval −0.25 to 0.25) to 2.30 (95% interval 2.05 to 2.55), but the verifier score fell "
            "from 0.40 to 0.30."
        )

    def test_the_start_was_kept(self):
        chosen = [candidate(0, 0.0, 0.0, chosen=True), candidate(2, 0.2, 6.0), candidate(1, 0.1, 2.0)]
        assert sentences(rft(selection=chosen))[1:] == [
            "rft kept the policy that it started from: no stage beat it; its objective (learned reward/scale − β·KL) is "
            "0.00, that of the best other, after 1 stage, −0.10."
        ]

    @pytest.mark.parametrize(
        ("reward", "verifier_score", "hacked"),
        [(0.6, 0.3, True), (0.6, 0.39, False), (0.4, 0.3, False), (0.6, 0.4, False), (0.6, None, False)],
    )
    def test_hacking_is_a_sure_rise_of_the_reward_and_a_sure_fall_of_the_score(self, reward, verifier_score, hacked):
        pair = [candidate(0, 0.0, 0.0, 0.4, chosen=True), candidate(1, reward, 1.0, verifier_score)]
        assert hacked == any(text.startswith("Reward hacking") for text in sentences(rft(selection=pair)))

    def test_hacking_is_not_read_from_intervals_of_width_zero(self):
        pair = [candidate(0, 0.0, 0.0, 0.4, chosen=True, width=0.0), candidate(1, 0.6, 1.0, 0.3)]
        assert not any(text.startswith("Reward hacking") for text in sentences(rft(selection=pair)))

    def test_names_must_differ(self):
        with pytest.raises(UserError, match="2 runs are called 'irft'"):
            verdicts([run("irft"), run("irft")])
        with pytest.raises(UserError, match="no runs"):
            verdicts([])


class TestControls:
    """The control is a run of sft from the same start, whatever it is called."""

    def test_a_control_by_any_name(self):
        """The same numbers, the control called sft-more instead of continued-sft."""
        start, method = the_start(evaluation(scores(30))), run("irft", evaluation=evaluation(scores(50)))
        for name in ("continued-sft", "sft-more", "base"):
            text = first(start, control(evaluation(scores(49)), name), method)
            assert text.startswith(f"irft did not beat {name}: sampled accuracy 0.50 against 0.49")
        impostor = run("continued-sft", "spin", evaluation=evaluation(scores(10)))
        assert first(start, method, impostor).startswith("irft helped over sft:"), "SPIN is no control"
        elsewhere = control(evaluation(scores(49)), start="another-start")
        assert first(start, method, elsewhere).startswith("irft helped over sft:"), "from another start"

    def test_the_start_is_the_control_where_there_is_no_other(self):
        method = run("irft", evaluation=evaluation(scores(30)))
        assert first(the_start(evaluation(scores(30))), method).startswith("irft did not beat sft:")
        assert first(the_start(evaluation(scores(30)), "irft-0"), method).startswith("irft did not beat irft-0:")
        assert first(run("sft", "spin", evaluation=evaluation(scores(30))), method).startswith("sft has no control")

    def test_a_start_that_no_run_made(self):
        """From a model as it was found: known by its name or its path, however that is written."""
        base = RunRecord("x", "base", "./model", None, 0, evaluation=evaluation(scores(30)))
        method = replace(run("irft", evaluation=evaluation(scores(60)), start=None), model="model")
        assert first(base, method).startswith("irft helped over x:")
        more = replace(control(evaluation(scores(60)), start=None), model="model/")
        assert first(base, method, more).startswith("irft did not beat continued-sft:")
        assert first(replace(base, model="other"), method).startswith("irft has no control")

    def test_the_start_is_no_control(self):
        """Even where its record and the method's name the same model."""
        start, method = the_start(evaluation(scores(60))), run("irft", evaluation=evaluation(scores(50)))
        assert first(start, method, control(evaluation(scores(20)))).startswith("irft helped over continued-sft:")

    def test_a_start_that_was_trained_again_is_another(self):
        """Both runs say which run they started from: that the folder is the same proves nothing."""
        method = run("irft", evaluation=evaluation(scores(60)))
        assert first(method, control(evaluation(scores(30)), start="the-start-2")).startswith("irft has no control")
        unknown = control(evaluation(scores(30)), start=None)
        assert first(method, unknown).startswith("irft helped over continued-sft"), (
            "the same model, as far as is known"
        )

    def test_the_strongest_control_counts(self):
        """By the number at hand: one is better by accuracy, the other by log-prob."""
        accurate = control(evaluation(scores(45), logps=[-20.0 - row / 10 for row in range(100)]), "a")
        likely = control(evaluation(scores(20), logps=[-10.0 - row / 10 for row in range(100)]), "b")
        blank, short = control(name="c"), control(evaluation(scores(4, of=4)), "d")
        method = run("irft", evaluation=evaluation(scores(50), logps=[-15.0 - row / 9 for row in range(100)]))
        found = sentences(accurate, likely, blank, short, method)
        assert found[0].startswith("irft did not beat a: sampled accuracy 0.50 against 0.45")
        assert "a is the strongest of 3 controls by this number" in found[0]
        assert found[1].startswith("irft did worse than b: held-out demonstration log-prob")
        assert len(found) == 2

    @pytest.mark.parametrize("seed", range(20))
    def test_names_and_order_decide_nothing(self, seed):
        """Rename all runs at random and shuffle them: the same verdicts, up to the names."""
        rng = np.random.default_rng(seed)

        def found():
            right, graded = rng.random(60) < rng.uniform(0.2, 0.8), rng.random(60).round(1)
            answers = (graded if rng.random() < 0.3 else right).astype(float).tolist()
            return evaluation(answers, (-20 + rng.normal(0, 3, size=60)).tolist()) if rng.random() < 0.9 else None

        base = RunRecord("base", "base", "org/model", None, 0, evaluation=found())
        sft = run("sft", "sft", None, found(), id="the-start")
        runs = [base, sft, *(control(found(), f"more-{i}", history=[{"loss": i}]) for i in range(rng.integers(3)))]
        runs += [run(name, name, evaluation=found()) for name in ("irft", "spin")]
        runs += [run("again", "irft", runs[-1].id, found()), rft(found()), run("far", "irft", None, found())]
        words = ["continued-sft", "sft", "base", "irft", "spin", "rft", *(f"n{index}" for index in range(len(runs)))]
        names = random.Random(seed).sample(words, len(runs))
        plain = [replace(each, name=f"token-{index:02d}.") for index, each in enumerate(runs)]
        renamed = [replace(each, name=name) for each, name in zip(runs, names, strict=True)]
        expected = verdicts(plain)
        for token, name in zip(plain, names, strict=True):
            expected = [text.replace(token.name, name) for text in expected]
        assert verdicts(renamed) == expected
        random.Random(seed).shuffle(renamed)
        assert sorted(verdicts(renamed)) == sorted(expected)


def kept(after, before=None, answers="sampled", task="colors"):
    """What a run kept of another task."""
    start = evaluation(scores(60) if before is None else before, answers=answers, task=task)
    return retention(start, evaluation(after, answers=answers, task=task))


class TestRetention:
    """Of what was forgotten it is only said where a control reached the same, or took as much."""

    def found(self, *runs):
        return [text for text in sentences(*runs) if "forget" in text or "forgot" in text]

    def method(self, **more):
        more = {"retention": kept(scores(55)), "flops": {"total": 1.0e15}} | more
        return run("irft", evaluation=evaluation(scores(50)), **more)

    @pytest.mark.parametrize(("right", "said"), [(50, True), (52, True), (53, False), (48, True), (30, False)])
    def test_at_an_equal_target_score(self, right, said):
        against = control(evaluation(scores(right)), retention=kept(scores(30)))
        found = self.found(against, self.method())
        assert bool(found) == said
        if said:
            assert found[0].startswith(
                "irft forgot less than continued-sft at an equal target score: on the other task sampled accuracy 0.55 "
                "against 0.30, difference +0.25"
            )
            assert found[0].endswith(f"100 rows; target score 0.50 against {right / 100:.2f}.")

    @pytest.mark.parametrize(("flops", "said"), [(1.1e15, True), (1.2e15, False), (0.91e15, True), (None, False)])
    def test_at_equal_compute(self, flops, said):
        more = {} if flops is None else {"flops": {"total": flops}}
        against = control(evaluation(scores(30)), retention=kept(scores(80)), **more)
        found = self.found(against, self.method())
        assert bool(found) == said
        if said:
            assert found[0].startswith("irft forgot more than continued-sft at equal compute:")
            assert "1.0 · 10^15 operations against" in found[0]

    def test_an_unclear_difference_is_no_claim(self):
        against = control(evaluation(scores(50)), retention=kept(scores(54)))
        (text,) = self.found(against, self.method())
        assert text.startswith("irft did not forget less than continued-sft at an equal target score:")
        assert "no difference that 100 rows can show" in text

    def test_log_prob_where_no_verifier_scored_the_other_task(self):
        rng = np.random.default_rng(0)
        low, high = (
            retention(evaluation(logps=[-3.0] * 100, task=None), evaluation(logps=logps.tolist(), task=None))
            for logps in (rng.normal(-5, 0.1, 100), rng.normal(-4, 0.1, 100))
        )
        against = control(evaluation(scores(50)), retention=low)
        (text,) = self.found(against, self.method(retention=high))
        assert "on the other task log-prob −4.0" in text

    @pytest.mark.parametrize(
        "other",
        [None, kept(scores(30), task="words"), retention(*(replace(evaluation(scores(30)), dataset="b"),) * 2)],
        ids=["not measured", "another verifier", "other rows"],
    )
    def test_nothing_is_said_of_different_things(self, other):
        against = control(evaluation(scores(50)), retention=other, flops={"total": 1.0e15})
        assert self.found(against, self.method()) == []

    def test_without_a_verifier_no_target_score_is_equal(self):
        logps = [-1.0 - row / 50 for row in range(100)]
        against = control(evaluation(logps=logps), retention=kept(scores(30)))
        assert self.found(against, run("irft", evaluation=evaluation(logps=logps), retention=kept(scores(55)))) == []

    def test_a_row_per_quantity_on_the_page(self):
        page = render([self.method()])
        assert "<h2>Retention</h2>" in page
        assert "<h2>Retention</h2>" not in render([self.method(retention=None)])
        part = page[page.index("<h2>Retention</h2>") :]
        assert re.search(r"sampled accuracy</td><td>0\.60</td><td>0\.55</td><td>−0\.05 <small>", part)
        assert "sampled score" not in part, "which is the accuracy"
        assert ">retention change<" in page


class TestSeveralAnswers:
    def quality(self):
        rng = np.random.default_rng(0)

        def answers():
            right = (rng.random(8) < 0.5).astype(float)
            rewards, logps = right + rng.normal(0, 0.5, 8), rng.normal(-9, 1, 8)
            return ScoredAnswers(rewards.tolist(), logps.tolist(), [3, 4, 5, 6] * 2, right.tolist())

        return reward_quality([answers() for _ in range(30)])

    def judged(self, name="rft"):
        found = evaluation(scores(50), kl=mean_interval([0.5, 1.5]), distinct_right=mean_interval([2.0, 3.0]))
        return replace(rft(replace(found, samples_per_row=8, reward_quality=self.quality())), name=name)

    def test_shares_of_a_row_are_no_grades(self):
        """Means of eight answers, each right or wrong, are accuracies."""
        shares = [0.25, 0.5, 0.75, 1.0] * 25
        found = evaluation(shares)
        found.per_row["sampled_right"] = shares
        text = first(control(evaluation(scores(30))), run("irft", evaluation=found))
        assert "sampled accuracy 0.62 against 0.30" in text or "sampled accuracy 0.63 against 0.30" in text

    def test_columns(self):
        page = render([self.judged(), run("irft", flops={"total": 2.345e15})])
        for text in (
            ">distinct right answers<",
            ">KL to the start<",
            ">2.50<",
            ">1.00<",
            ">operations<",
            "2.3 · 10^15",
        ):
            assert text in page
        assert ">operations<" not in render([self.judged()])

    def test_reward_quality(self):
        page = render([self.judged(EVIL), run("irft")])
        parse(page)
        part = page[page.index("<h2>Reward quality</h2>") :]
        quality = self.quality()
        for text in ("AUC, right over wrong", "own log-prob", f">{quality.auc['reward'].mean:.2f} <small>"):
            assert text in part
        assert "8 answers to each held-out prompt" in part
        assert "<script" not in page
        assert "<h2>Reward quality</h2>" not in render([run("irft", evaluation=evaluation(scores(3)))])

    def test_the_terminal_shows_what_has_room(self, five_runs):
        for each in five_runs:
            each.evaluation.means |= {name: mean_interval([0.5, 1.5]) for name in ("kl", "distinct_right")}
            each.retention = kept(scores(50))
            each.flops = {"total": 1e15}
        text = terminal(five_runs)
        assert text == terminal(five_runs, width=300)
        assert "operations" not in text


class TestGradedVerifier:
    """A verifier that gives part of a point is judged by what it gave."""

    def test_the_score_decides_where_it_is_graded(self):
        # No answer is fully right in either run: by accuracy they are the same.
        rng = np.random.default_rng(0)
        worse, better = rng.uniform(0.2, 0.5, size=100), rng.uniform(0.4, 0.9, size=100)
        text = first(control(evaluation(worse.tolist())), run("irft", evaluation=evaluation(better.tolist())))
        assert re.match(r"irft helped over continued-sft: sampled score 0\.\d\d against 0\.\d\d,", text)

    def test_one_run_with_parts_of_a_point_is_enough(self):
        half = evaluation([0.5] * 30 + [1.0] * 30 + [0.0] * 40)
        for runs in ((control(evaluation(scores(30))), run("irft", evaluation=half)),) * 2:
            assert "sampled score 0.45 against 0.30" in first(*runs)
        assert "sampled score 0.30 against 0.45" in first(
            control(half), run("irft", evaluation=evaluation(scores(30)))
        )

    def test_accuracy_decides_where_it_is_not(self):
        text = first(control(evaluation(scores(30))), run("irft", evaluation=evaluation(scores(50))))
        assert "sampled accuracy 0.50 against 0.30" in text

    def test_the_summary_shows_scores_only_where_they_are_graded(self, five_runs):
        assert "score" not in terminal(five_runs)
        five_runs[2].evaluation = evaluation([0.5] * 30 + [1.0] * 30 + [0.0] * 40)
        assert "sampled score" in " ".join(terminal(five_runs, width=300).split()) or ">sampled score<" in render(
            five_runs
        )
        assert re.search(r">sampled score<", render(five_runs))


class TestWidth:
    """No verdict from an interval of width zero, and none that cannot be seen in the digits."""

    @staticmethod
    def by_logp(differences, around=-22.3):
        n = len(differences)
        theirs = np.random.default_rng(0).normal(around, 1.0, size=n)
        pair = (evaluation(logps=values.tolist()) for values in (theirs, theirs + np.asarray(differences)))
        against, method = pair
        return first(control(against), run("irft", evaluation=method))

    def test_equal_numbers(self):
        text = self.by_logp(np.zeros(64))
        assert text.startswith("No difference between irft and continued-sft: ")
        assert "equal up to rounding over 64 rows" in text
        rounding = self.by_logp(np.random.default_rng(1).uniform(0, 2e-4, size=64))
        assert rounding.startswith("No difference between irft and continued-sft: ")

    @pytest.mark.parametrize("n", [10, 64])
    @pytest.mark.parametrize("difference", [0.1, -3.0])
    def test_the_same_difference_everywhere(self, n, difference):
        text = self.by_logp([difference] * n)
        assert text.startswith("No verdict on irft against continued-sft: ")
        assert f"each of the {n} rows differs by the same {difference:.2f}".replace("-", "−") in text

    def test_the_digits_show_the_claim(self):
        text = self.by_logp(np.random.default_rng(1).normal(0.0012, 0.0008, size=64))
        assert text.startswith("irft helped over continued-sft")
        assert "−22.30 against −22.30" not in text
        found = re.search(
            r"log-prob −([\d.]+) against −([\d.]+) nats, difference \+([\d.]+) \(95% interval ([\d.]+) to", text
        )
        ours, theirs, difference, low = map(float, found.groups())
        assert ours < theirs
        assert 0 < low < difference

    @pytest.mark.parametrize(("differing", "claim"), [(5, "Too few rows differ"), (6, "irft helped over")])
    def test_a_handful_of_rows(self, differing, claim):
        """Five rows of a hundred: the bootstrap is sure of them, a sign test (2 / 2^5 = 6%) is not."""
        differences = np.zeros(100)
        differences[:differing] = np.linspace(0.4, 0.6, differing)
        assert self.by_logp(differences).startswith(claim)


@pytest.fixture
def five_runs():
    rng = np.random.default_rng(0)

    def history(stages, method):
        rows = []
        for step in range(1, 25):
            row = {"step": step, "epoch": step / 8, "stage": 1 + (step - 1) * stages // 24, "loss": 1 / step}
            row |= {"logps/demonstrations": -12 + step / 10, "time/training": 2.0, "grad_norm": float(rng.random())}
            if method:
                row |= {"logps/samples": -11.0, "time/sampling": 1.0}
                row |= {method: float(rng.normal())}
            rows += [row, {"step": step, "eval_demonstration_logp": -13 + step / 10}]
        rows[6]["loss"] = math.nan
        return rows

    def samples(name):
        answers = AnswerRecord(f"{name}\n\tsays 19", 1.0), AnswerRecord("20", 0.0)
        return [SampleRecord(3, "12 + 7?", "19", *answers)]

    kinds = {"base-sft": ("sft", None, 1), "continued-sft": ("sft", "the-start", 1)}
    kinds |= {name: (name, "the-start", stages) for name, stages in (("spin", 3), ("irft", 6), ("rft", 24))}
    runs = []
    for name, (algorithm, start, stages) in kinds.items():
        found = evaluation(
            (rng.random(128) < 0.4).astype(float).tolist(),
            rng.normal(-123.0, 20.0, size=128).tolist(),
            accuracy_greedy=mean_interval(scores(40)),
            preference_accuracy=mean_interval(scores(60)),
        )
        method = {"sft": None, "rft": "policy/reward"}.get(algorithm, "rewards/margin")
        more = {"history": history(stages, method), "samples": samples(name)}
        more["settings"] = {"beta": 0.1 if method else None, "batch_size": 8, "stages": stages}
        more["id"] = "the-start" if start is None else ""
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
            each.evaluation.means["reward_accuracy"] = mean_interval(scores(70))
            each.evaluation.means["preference_reward_accuracy"] = mean_interval(scores(81))
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
        assert render(five_runs) == render(
            [RunRecord.from_dict(json.loads(json.dumps(each.to_dict()))) for each in five_runs]
        )

    def test_ids_stand_once_for_one_thing(self, five_runs):
        definitions = re.findall(r'id="([^"]+)">\s*<(rect[^>]*>|path[^>]*>)', render([*five_runs[:4], rft()]))
        by_id = {}
        for name, content in definitions:
            assert by_id.setdefault(name, content) == content

    def test_everything_is_escaped(self, five_runs):
        sample = SampleRecord(0, EVIL, EVIL, AnswerRecord(EVIL, 0.5), AnswerRecord(EVIL))
        evil = replace(
            five_runs[3],
            name=EVIL,
            model=EVIL,
            dataset=EVIL,
            settings={EVIL: EVIL, "list": [EVIL]},
            samples=[sample],
            history=[{"step": 1, EVIL: 1.0, "loss": 0.5}, {"step": 2, EVIL: 2.0}],
            curves=[Curve("loss", EVIL, EVIL, EVIL)],
        )
        stood_against = control(five_runs[1].evaluation, EVIL, demonstration_epochs=9.0)
        for runs in ([evil], [evil, *five_runs[:2]], [stood_against, five_runs[3]]):
            page = render(runs)
            assert "script" not in {tag for tag, _ in parse(page)}
            assert "<script" not in page
            assert page.count("&lt;script&gt;alert(") >= 5

    def test_samples_side_by_side(self, five_runs):
        page = render(five_runs)
        card = page[page.index('<article class="prompt">') : page.index("</article>")]
        assert page.count("<article") == 1
        for each in five_runs:
            assert f"{each.name}\n\tsays 19" in card
        assert card.count("✓ right, 1") == card.count("✗ wrong, 0") == 5
        five_runs[1].samples = []
        assert "not sampled" in render(five_runs)

    def test_many_prompts_are_folded(self, five_runs):
        (shown,) = five_runs[0].samples
        page = render([replace(five_runs[0], samples=[replace(shown, row=row) for row in range(20)])])
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
        page = render([rft(selection=unscored(HACKED))])
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
        page = render([run("irft", time_s={}, peak_memory_bytes=None, demonstration_epochs=None)])
        parse(page)
        for heading in ("Summary", "Curves", "Time", "Samples"):
            assert f"<h2>{heading}</h2>" not in page

    def test_a_quantity_without_a_mean(self, five_runs):
        def dashes():
            return render(five_runs).count('<span class="quiet">–</span>')

        before = dashes()
        del five_runs[3].evaluation.means["demonstration_logp"]
        parse(render(five_runs))
        assert dashes() == before + 1
        terminal(five_runs)

    def test_a_run_has_its_color_everywhere(self, five_runs):
        page = render(five_runs)
        spin = re.findall(r'style="--c:var\((--run-\d)\)"[^<]*>spin<', page)
        assert set(spin) == {"--run-2"}
        assert len(spin) >= 4  # legend, summary, time, samples, settings


class TestCharts:
    LOSS = next(curve for curve in charts.COMMON if curve.key == "loss")

    def test_colors_come_from_the_page(self, five_runs):
        svg = charts.draw(five_runs, self.LOSS)
        assert svg is not None
        assert all(f"var(--run-{index})" in svg for index in range(5))
        assert not re.search(r"(fill|stroke): #", svg)
        assert re.search(r"<svg [^>]*viewBox", svg)
        assert "width=" not in svg.split(">")[0]

    def test_nothing_to_draw(self):
        empty = run("irft", history=[{"step": 1, "loss": math.nan}, {"step": 2, "loss": None}, {"loss": 1.0}])
        assert charts.draw([empty], self.LOSS) is None
        assert charts.draw([empty], Curve("rewards/margin", "Margin")) is None

    def test_nan_leaves_a_gap(self):
        def subpaths(values):
            history = [{"step": step, "loss": value} for step, value in enumerate(values)]
            svg = charts.draw([run("irft", history=history)], self.LOSS)
            assert svg is not None
            (line,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--run-0\)', svg)
            return line.count("M")

        values = [1.0 / (1 + step) for step in range(20)]
        assert subpaths(values) == 1
        for missing in (math.nan, math.inf, None):  # None: what a record holds of such a number
            assert subpaths([*values[:9], missing, *values[10:]]) == 2

    def test_stage_boundaries_unless_they_would_hide_the_curve(self):
        def marks(steps, stages):
            history = [{"step": step, "stage": step * stages // steps, "loss": 1.0} for step in range(steps)]
            svg = charts.draw([run("irft", history=history)], self.LOSS)
            assert svg is not None
            return svg.count("stroke-opacity: 0.5")

        assert marks(60, 1) == 0
        assert marks(60, 4) == 3
        assert marks(60, 60) == 0

    def test_stages_without_a_step_share_a_boundary(self):
        history = [{"step": 0, "stage": stage, "loss": 1.0} for stage in range(4)]
        svg = charts.draw([run("rft", history=history)], self.LOSS)
        assert svg is not None
        assert svg.count("stroke-opacity: 0.5") == 1

    def test_over_stages(self):
        # Two stages without a policy step share step 0; over stages they stand apart.
        history = [{"step": 0, "stage": 0, "a": 1.0, "b": 2.0}, {"step": 0, "stage": 1, "a": 3.0, "b": 1.0}]

        def lines(over, faint=None):
            curve = Curve("a", "A", faint=faint, over=over)
            svg = charts.draw([run("rft", history=history, curves=[curve])], curve)
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
        curve = Curve("a", "A", faint="b", over="stage")
        assert charts.draw([run("rft", history=[{"stage": 0, "b": 1.0}], curves=[curve])], curve) is not None

    def test_an_algorithm_brings_its_curves(self):
        """A report draws what it has never heard of, under the headings of the record."""
        history = [{"step": step, "stage": 0, "teacher/gap": 1.0, "teacher/kl": 2.0, "odd": 3.0} for step in range(3)]
        curves = [Curve("teacher/gap", "Gap to the teacher", "nats", "Teacher", faint="teacher/kl")]
        page = render([run("distilled", "sdft", history=history, curves=curves)])
        assert "<h3>Teacher</h3>" in page
        assert "Gap to the teacher<span>nats</span>" in page
        rest = page[page.index("Everything else") :]
        assert ">odd<" in rest
        assert "teacher" not in rest.lower()

    def test_one_key_with_two_meanings_has_two_frames(self):
        """A run's numbers stand under its own title alone."""
        mine, yours = Curve("gap", "Gap to the sample", group="A"), Curve("gap", "Gap to the teacher", group="B")
        history = [{"step": 1, "gap": 1.0}, {"step": 2, "gap": 2.0}]
        runs = [run("a", history=history, curves=[mine]), run("b", history=history, curves=[yours])]
        for curve, color, other in ((mine, 0, 1), (yours, 1, 0)):
            svg = charts.draw(runs, curve)
            assert svg is not None
            assert f"var(--run-{color})" in svg
            assert f"var(--run-{other})" not in svg
        assert charts.other_curves(runs) == []

    def test_candidates(self):
        svg = charts.candidate_scores(rft(), 2, "kl")
        assert svg is not None
        assert not re.search(r"(fill|stroke): #", svg)
        assert "verifier score, dashed" in svg
        assert "var(--run-2)" in svg
        broken = [replace(each, kl=math.nan, verifier_score=math.nan) for each in HACKED]
        assert charts.candidate_scores(rft(selection=broken), 0, "kl") is not None
        assert charts.candidate_scores(rft(selection=HACKED[:1]), 0, "stage") is None
        assert charts.candidate_scores(run("irft"), 0, "stage") is None

    def test_the_policy_that_was_kept_has_a_ring(self):
        def rings(selection):
            svg = charts.candidate_scores(rft(selection=selection), 0, "stage")
            assert svg is not None
            return re.findall(r'<use [^>]*x="([\d.]+)"[^>]*fill-opacity: 0; stroke', svg)

        chosen, rewards_only = rings(HACKED), rings(unscored(HACKED))
        assert len(set(chosen)) == 1
        assert (len(chosen), len(rewards_only)) == (2, 1)
        assert rings([replace(each, chosen=False) for each in HACKED]) == []

    def test_time_by_stage(self):
        rows = [{"step": step, "stage": 1 + step // 3, "time/training": 2.0} for step in range(6)]
        rows[0]["time/sampling"], rows[3]["time/sampling"] = 5.0, math.nan
        assert charts.stage_times(run("irft", history=rows), 0) is not None
        assert charts.stage_times(run("sft", history=rows[:3]), 0) is None

    def test_other_metrics_are_all_there(self, five_runs):
        assert [curve.key for curve in charts.other_curves(five_runs)] == ["grad_norm"]
        assert "grad_norm" in render(five_runs)


class TestModelCard:
    @staticmethod
    def card(record, story):
        return model_card(replace(record, card=story(record)))

    def test_rft(self):
        card = self.card(rft(), rft_card)
        assert "Trained with **rft** by tutelage, starting from `org/model`, on `sums.jsonl` (seed 0, 3 passes" in card
        assert "The data are demonstrations and preference pairs." in card
        assert "5 stages: at the start of each, 4 completion(s) per prompt were sampled" in card
        assert "in 4 of the stages the policy was then improved with that reward by leave-one-out REINFORCE" in card
        assert "These are the weights after 3 of them, chosen on validation rows." in card
        assert "made the demonstrations more likely" not in card

    def test_rft_with_other_advantages(self):
        card = self.card(rft(settings={"num_samples": 4, "advantages": "group_normalized"}), rft_card)
        assert "by REINFORCE with group-normalized advantages under a KL penalty to the start" in card
        assert "leave-one-out" not in card

    def test_rft_that_kept_its_start(self):
        chosen = [candidate(0, 0.0, 0.0, chosen=True), candidate(1, 0.1, 2.0)]
        card = self.card(rft(history=[], selection=chosen), rft_card)
        assert "The data are demonstrations alone." in card
        assert "No stage beat the start: these are its weights." in card

    def test_irft(self):
        card = self.card(run("irft", history=[{"pairs/dropped": 0}, {"loss": 0.5}]), IRFT.card)
        assert "1 stages" in card
        assert "made the demonstrations more likely" in card
        assert "REINFORCE" not in card

    def test_an_algorithm_without_a_story_gets_no_other_ones(self):
        card = model_card(run("new", "new-method", evaluation=evaluation(scores(3))))
        assert "Trained with **new-method**" in card
        assert "stages" not in card
        assert "Li et al" not in card
        assert "| accuracy_sampled | 0.03 |" in card

    def test_notes_on_the_evaluation(self):
        found = replace(evaluation(scores(3)), notes=["demonstration_logp has no mean: 1 of its 100 values are NaN."])
        assert "demonstration_logp has no mean" in model_card(run("irft", evaluation=found))


def test_a_record_begins_empty():
    record = RunRecord("base", "base", "org/model", None, 0)
    assert (record.selection, record.evaluation, record.demonstration_epochs) == ([], None, None)


def _leaves(value, path=()):
    """The places of all numbers in JSON-like data made of dataclasses."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield path
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, (*path, key))
    elif isinstance(value, list):
        for key, each in enumerate(value):
            yield from _leaves(each, (*path, key))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_number_of_a_record_makes_its_file_other_than_json(number, tmp_path):
    """Whichever number is not finite: null, or an error that names it, and then nothing is written."""
    whole = rft(evaluation(scores(3, 5)), history=rft_history(1, 1), flops={"total": 1.0})
    outcomes = set()
    for place, path in enumerate(_leaves(whole.to_dict())):
        if path == ("schema",):
            continue
        record = target = RunRecord.from_dict(whole.to_dict())
        *inner, last = path
        for key in inner:
            target = getattr(target, key) if isinstance(key, str) and hasattr(target, key) else target[key]
        if isinstance(target, dict | list):
            target[last] = number
        else:
            object.__setattr__(target, last, number)  # some are frozen
        folder = tmp_path / str(place)
        try:
            file = write_results(folder, record)
        except UserError as error:
            outcomes.add("error" if error.field else "an error without a field")
            assert not (folder / "results.json").exists()
        else:
            outcomes.add("null")
            json.loads(
                file.read_text(encoding="utf-8"), parse_constant=lambda name, at=path: pytest.fail(f"{name}: {at}")
            )
            load_results(file)
    assert outcomes == {"error", "null"}
