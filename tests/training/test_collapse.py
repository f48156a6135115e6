"""Collapse: what counts as one, and that a run then warns, stops or goes back; the best stage at the end."""

import json
import logging
import shutil

import pytest
import torch
from test_resume import KillAt, Killed

from rft_runs import QUICK
from training_runs import Snapshots, assert_same_weights, distance, history, weights
from tutelage.algorithms.registry import find
from tutelage.cli import main
from tutelage.errors import CollapsedError, UserError
from tutelage.report import verdicts
from tutelage.results import RunRecord
from tutelage.training.checkpoints import checkpoints
from tutelage.training.collapse import CollapseLimits, first_facts, signs_of_collapse

# --- what counts as one ------------------------------------------------------------------------------------------------

LIMITS = CollapseLimits(truncated=0.9, distinct=0.5, logp=0.1)
FIRST = {
    "samples/truncated_fraction": 0.2,
    "samples/distinct_2": 0.6,
    "demonstrations/logp_per_token": -2.0,
}


@pytest.mark.parametrize(
    ("facts", "first", "said"),
    [
        ({}, {}, []),
        ({"samples/truncated_fraction": 0.91}, {}, ["truncated_fraction is 0.91 (limit 0.9; 0.2 in the first stage)"]),
        ({"samples/truncated_fraction": 0.9}, {}, []),
        ({"samples/truncated_fraction": 0.95}, {"samples/truncated_fraction": 0.95}, []),  # so was the start
        (
            {"samples/distinct_2": 0.29},
            {},
            ["distinct_2 is 0.29 (limit 0.3, which is 0.5 of the 0.6 in the first stage)"],
        ),
        ({"samples/distinct_2": 0.31}, {}, []),
        ({"demonstrations/logp_per_token": -2.21}, {}, ["-2.21 (limit -2.2, 10% below the -2 of the start)"]),
        ({"demonstrations/logp_per_token": -2.19}, {}, []),
        # The start's on the same rows goes before the first stage's on others.
        ({"demonstrations/logp_per_token": -2.3, "demonstrations/logp_per_token_start": -2.2}, {}, []),
        (
            {"samples/truncated_fraction": 1.0, "samples/distinct_2": 0.1, "demonstrations/logp_per_token": -9.0},
            {},
            ["truncated", "distinct_2", "logp"],
        ),
    ],
)
def test_signs_by_hand(facts, first, said):
    found = signs_of_collapse({**FIRST, **facts}, {**FIRST, **first}, LIMITS)
    assert len(found) == len(said)
    assert all(text in sign for text, sign in zip(said, found, strict=True))


def test_without_demonstrations_their_log_prob_says_nothing():
    facts = {"samples/truncated_fraction": 0.1, "samples/distinct_2": 0.5}
    assert signs_of_collapse(facts, FIRST, LIMITS) == []


def test_the_first_stage_is_the_first_that_was_logged():
    lines = [{"eval_loss": 1.0}, {"samples/distinct_2": 0.7}, {"samples/distinct_2": 0.1}]
    assert first_facts(lines) == {"samples/distinct_2": 0.7}
    assert first_facts([]) == {}


# --- what a run does ---------------------------------------------------------------------------------------------------

# A learning rate that ruins the policy; four stages of two steps.
RUIN = {
    "stages_per_epoch": 4,
    "learning_rate": 0.3,
    "save_strategy": "steps",
    "save_steps": 1000,
    "loss_kind": "linear",
}


def ruined(training, name, callbacks=(), **settings):
    data, options = training.rows(32), {"eval_dataset": training.rows(6), "callbacks": list(callbacks)}
    return training.trainer("irft", data=data, name=name, options=options, **{**RUIN, **settings})


def test_it_warns_once_per_stage_and_goes_on(training, caplog):
    with caplog.at_level(logging.WARNING, "tutelage"):
        trainer = ruined(training, "run")
        trainer.train()
    told = [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()]
    assert told
    assert len(told) == len({text.split(":")[0] for text in told})
    assert "at the beginning of stage 1" in told[0]
    assert "limit" in told[0]
    assert trainer.state.global_step == 8


def test_what_is_logged_of_demonstrations_is_what_the_policy_gives_them(training):
    trainer = training.trainer("irft", stages_per_epoch=2, name="run")
    logps = []
    begin = trainer.stages.phase.prepare

    def prepare(draw, recorded, **options):
        groups = list(recorded.values())
        own = trainer.scorer.token_logps([group.select(group.places("demonstration")) for group in groups])
        logps.append(
            sum(map(sum, (values for row in own for values in row))) / sum(len(v) for row in own for v in row)
        )
        return begin(draw, recorded, **options)

    trainer.stages.phase.prepare = prepare
    trainer.train()
    assert history(trainer, "demonstrations/logp_per_token") == pytest.approx(logps, abs=1e-5)
    assert len(logps) == 2


def test_it_stops_with_a_checkpoint_and_may_go_on(training):
    trainer = ruined(training, "run", on_collapse="stop", save_each_stage=False)
    with pytest.raises(CollapsedError, match=r"collapsed at the beginning of stage 1: .*limit.*--resume"):
        trainer.train()
    (checkpoint,) = checkpoints(training.folder / "run")
    assert checkpoint.name == "checkpoint-2"
    again = ruined(training, "run", on_collapse="stop", save_each_stage=False)
    with pytest.raises(CollapsedError):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    goes_on = ruined(training, "run", on_collapse="warn", save_each_stage=False)
    goes_on.train(resume_from_checkpoint=True)
    assert goes_on.state.global_step == 8
    assert len(history(goes_on, "samples/distinct_2")) == 4, "each stage's line once"


def test_it_goes_back_to_the_best_stage_and_ends(training):
    start = weights(training.model())
    trainer = ruined(training, "run", on_collapse="best")
    trainer.train()
    assert trainer.state.global_step == 2
    assert_same_weights(trainer.policy, start)
    record = trainer.record(name="irft")
    best = record.best_stage
    assert (best["stages"], best["last_stages"], best["collapsed"]) == (0, 1, True)
    assert best["metric"] == "demonstration_logp"
    assert best["value"] == pytest.approx(history(trainer, "eval_demonstration_logp")[0])
    assert RunRecord.from_dict(json.loads(json.dumps(record.to_dict()))).best_stage == best
    (told,) = [text for text in verdicts([record]) if "kept the policy" in text]
    assert "irft kept the policy after 0 stages" in told
    assert "the last one had collapsed" in told


def test_a_policy_that_collapsed_is_never_the_best(training):
    """By its log-prob it would be: SFT raises that, and truncates all the same."""
    options = {"eval_dataset": training.rows(16), "callbacks": [snapshots := Snapshots()]}
    settings = {**RUIN, "learning_rate": 3e-3, "sft_weight": 10.0, "collapse_distinct": 1.0, "on_collapse": "best"}
    trainer = training.trainer("irft", data=training.rows(32), name="run", options=options, **settings)
    signs = []
    trainer.stages._watch, watch = (
        (lambda stage, facts: signs.append(stage) or watch(stage, facts)),
        trainer.stages._watch,
    )
    trainer.train()
    values = history(trainer, "eval_demonstration_logp")
    assert values[-1] > values[-2], "training made the demonstrations likelier"
    assert trainer.record(name="x").best_stage["stages"] == signs[-1] - 1
    assert distance(trainer.policy, snapshots.models[2 * (signs[-1] - 1)]) == 0


@pytest.mark.parametrize("name", ["irft", "spin"])
def test_the_best_stage_is_loaded_at_the_end(training, name):
    """Log-prob rises, then a stage ruins it: what is kept is the policy before that."""
    settings = {"num_train_epochs": 4, "load_best_stage_at_end": True, "learning_rate": 1e-3, "save_strategy": "steps"}
    settings |= {"stages_per_epoch": 1} if name == "irft" else {}
    options = {"eval_dataset": training.rows(16), "callbacks": [snapshots := Snapshots()]}
    trainer = training.trainer(name, data=training.rows(16), name="run", options=options, **settings)
    measured = iter([-9.0, -5.0, -3.0, -7.0, -4.0])
    trainer.stages.best.measure = lambda: next(measured)
    trainer.train()
    assert trainer.record(name="x").best_stage | {"metric": ""} == {
        "stages": 2, "metric": "", "value": -3.0, "last_stages": 4, "last_value": -4.0, "collapsed": False,
    }  # fmt: skip
    assert_same_weights(trainer.policy, weights(snapshots.models[8]))
    assert distance(trainer.policy, snapshots.models[-1]) > 0
    trainer.export(training.folder / "out")
    assert trainer.check_export(training.folder / "out")


def resumable(training, name, callbacks=(), **settings):
    values = {0: -9.0, 1: -5.0, 2: -8.0, 3: -3.0, 4: -7.0, 5: -6.0, 6: -4.0}
    settings = {**RUIN, "learning_rate": 1e-3, "stages_per_epoch": 6, "load_best_stage_at_end": True, **settings}
    options = {"eval_dataset": training.rows(4), "callbacks": list(callbacks)}
    trainer = training.trainer("irft", data=training.rows(24), name=name, options=options, **settings)
    trainer.stages.best.measure = lambda: values[trainer.state.global_step]  # a step is a stage
    return trainer


@pytest.mark.parametrize("keep", [None, 1])
def test_a_run_that_goes_back_finds_the_same_best_one(training, keep):
    settings = {"save_total_limit": 2, "keep_stages": keep}
    whole = resumable(training, "whole", **settings)
    whole.train()
    assert whole.record(name="x").best_stage["stages"] == 3
    found = sorted(path.parent.name for path in whole.stages.store.folder.rglob("best.safetensors"))
    assert found == ["stage-0003"], "others are needed no more"
    with pytest.raises(Killed):
        resumable(training, "run", callbacks=[KillAt("on_step_begin", 4)], **settings).train()
    shutil.rmtree(checkpoints(training.folder / "run")[0])  # back behind the best one, to stage 3
    resumed = resumable(training, "run", **settings)
    assert resumed.resume_point().endswith("checkpoint-3")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.record(name="x").best_stage == whole.record(name="x").best_stage
    expected = weights(whole.policy)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed.policy).items())


def test_rft_goes_back_by_its_own_choice(training, caplog):
    settings = {**QUICK, "stages_per_epoch": 4, "learning_rate": 0.5, "on_collapse": "best", "reward_gate": "off"}
    trainer = training.trainer("rft", data=training.rows(36), name="run", **settings)
    with caplog.at_level(logging.WARNING, "tutelage"):
        trainer.train()
    assert any("goes back to the best stage and ends" in record.getMessage() for record in caplog.records)
    assert trainer.state.global_step < trainer.state.max_steps
    (chosen,) = [candidate for candidate in trainer.record(name="rft").selection if candidate.chosen]
    assert chosen.stage <= trainer.stage + 1


# --- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"on_collapse": "best"}, {"load_best_stage_at_end": True}])
def test_without_rows_there_is_no_best(training, settings):
    (field,) = settings
    with pytest.raises(UserError, match=f"field '{field}'.*no held-out rows.*--eval_dataset_name"):
        training.trainer("irft", **settings)


@pytest.mark.parametrize(
    ("settings", "field", "said"),
    [
        ({"load_best_stage_at_end": True}, "load_best_stage_at_end", "keep_policy best"),
        ({"on_collapse": "best", "keep_policy": "last"}, "on_collapse", "keep_policy best"),
    ],
)
def test_rft_chooses_by_its_reward(tmp_path, settings, field, said):
    with pytest.raises(UserError, match=f"field '{field}'.*{said}"):
        find("rft").config(output_dir=str(tmp_path), bf16=False, use_cpu=True, **settings)


def test_the_exit_code(training, monkeypatch, capsys):
    def collapsed(args, console):
        raise CollapsedError("the policy has collapsed.", remedy="Go on.")

    monkeypatch.setattr("tutelage.cli.report.main", collapsed)
    assert main(["report", "x"]) == 3
    assert "collapsed" in capsys.readouterr().err
