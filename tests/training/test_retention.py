"""What training did to another task, and how far the policy is from the start."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import TrainerCallback

from rft_runs import QUICK
from tutelage.errors import UserError
from tutelage.evaluation.policy import EvaluationSet
from tutelage.models.weights import WeightSet
from tutelage.results import load_results
from tutelage.scoring.logps import cached_logps

OTHER = Dataset.from_list([{"prompt": f"Color {i}?", "completion": " red"} for i in range(6)])
HELD_OUT = Dataset.from_list([{"prompt": f"What is {i} + 1?", "completion": f" {i + 1}"} for i in range(5)])


def mean(values):
    return sum(values) / len(values)


def test_before_and_after(training):
    trainer = training.trainer("sft", learning_rate=1e-2, num_train_epochs=3)
    trainer.watch_retention(OTHER, source="colors")
    rows = EvaluationSet.of(OTHER, trainer.tokenization)
    before = [logp for (logp,) in cached_logps(trainer.policy, rows.groups)]
    with pytest.raises(UserError, match="was not measured"):
        trainer.retained()
    trainer.train()
    after = [logp for (logp,) in cached_logps(trainer.policy, rows.groups)]
    found = trainer.retained()
    assert found.before.per_row["demonstration_logp"] == pytest.approx(before)
    assert found.after.per_row["demonstration_logp"] == pytest.approx(after)
    assert abs(mean(after) - mean(before)) > 0.1
    assert found.change["demonstration_logp"].mean == pytest.approx(mean(after) - mean(before))
    assert (found.before.dataset, found.before.samples_per_row) == ("colors", None), "no verifier, no answers"


def test_answers_to_another_task_are_scored(training, marks):
    trainer = training.trainer("sft", eval_samples=3)
    trainer.watch_retention(OTHER, verifier=marks)
    trainer.train()
    found = trainer.retained()
    assert {"sampled_score", "greedy_score", "distinct_right"} <= found.change.keys()
    assert found.after.samples_per_row == 3


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_killed_run_knows_what_the_start_could_do(training, monkeypatch):
    """It is read, not measured again; under other settings it is measured."""
    saved = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    killed = training.trainer("sft", **saved)
    killed.watch_retention(OTHER)
    killed.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    before = load_results(training.folder / "run" / "retention-start").evaluation

    resumed = training.trainer("sft", **saved)
    resumed.watch_retention(OTHER)
    measured = []
    monkeypatch.setattr(resumed, "_measured_retention", measured.append)
    resumed.train(resume_from_checkpoint=True)
    assert measured == []
    assert resumed.retention.before == before

    others = training.trainer("sft", **saved)
    others.watch_retention(OTHER.select(range(4)))
    others.train(resume_from_checkpoint=True)
    assert others.retention.before.rows == [0, 1, 2, 3]
    assert others.retention.before.per_row["demonstration_logp"] == pytest.approx(
        before.per_row["demonstration_logp"][:4], abs=1e-4
    )


def test_damaged_findings_are_measured_anew(training):
    folder = training.folder / "run" / "retention-start"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{")
    trainer = training.trainer("sft")
    trainer.watch_retention(OTHER)
    trainer.train()
    assert json.loads((folder / "results.json").read_text())["evaluation"]["rows"] == list(range(6))


# --- KL to the start -----------------------------------------------------------------------------------------------


def expected_kl(trainer, rows, found, start):
    """Of the recorded answers, by the policy as it is and by a model that was kept from before training."""
    groups = found.sampled.added_to([group.select(()) for group in rows.groups])
    now, then = (cached_logps(model, groups) for model in (trainer.policy, start))
    return [mean([a - b for a, b in zip(*each, strict=True)]) for each in zip(now, then, strict=True)]


@pytest.mark.parametrize("kind", ["new adapter", "continued adapter", "full", "rft"])
def test_kl(training, kind):
    options, settings, algorithm = {"eval_dataset": HELD_OUT}, {"eval_samples": 4, "learning_rate": 1e-2}, "sft"
    model = training.model()
    if kind == "new adapter":
        options["peft_config"] = training.lora()
    elif kind == "continued adapter":
        torch.manual_seed(0)
        model = get_peft_model(model, training.lora(init_lora_weights=False))
    elif kind == "full":
        settings["eval_kl"] = True
    else:
        algorithm, settings = "rft", {**QUICK, **settings}
    start = copy.deepcopy(model)
    trainer = training.trainer(algorithm, model=model, options=options, **settings)
    trainer.train()
    if algorithm == "rft":  # whose gate may have left the policy where it was
        with torch.no_grad():
            for parameter in trainer.policy.parameters():
                parameter.mul_(1.1)
    rows = trainer.evaluation_set
    found = trainer.evaluation(rows, sample=True)
    assert found.sampled.count == 4
    assert found.sampled.kl == pytest.approx(expected_kl(trainer, rows, found, start), abs=1e-4)
    assert mean(found.sampled.kl) > 0.01
    record = found.record("rows")
    assert record.means["kl"].mean == pytest.approx(mean(found.sampled.kl))
    assert record.per_row["kl"] == found.sampled.kl


def test_kl_of_a_resumed_run_is_to_the_start_and_not_to_the_checkpoint(training):
    saved = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "eval_kl": True}
    options = {"eval_dataset": HELD_OUT}
    whole = training.run("sft", options=options, name="whole", **saved)
    killed = training.trainer("sft", options=options, **saved)
    killed.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = training.trainer("sft", options=options, **saved)
    resumed.train(resume_from_checkpoint=True)
    kl = [trainer.evaluation(trainer.evaluation_set, sample=True).sampled.kl for trainer in (whole, resumed)]
    assert kl[0] == pytest.approx(kl[1], abs=1e-4)


def test_without_the_start_there_is_no_kl(training):
    trainer = training.run("sft", options={"eval_dataset": HELD_OUT}, learning_rate=1e-2)
    found = trainer.evaluation(trainer.evaluation_set, sample=True)
    assert found.sampled.kl is None
    assert "kl" not in found.record("rows").means


def test_at_the_start_the_kl_is_zero_and_has_no_width(training):
    trainer = training.trainer("sft", options={"eval_dataset": HELD_OUT})
    found = trainer.evaluation(trainer.evaluation_set, sample=True)
    kl = found.record("rows").means["kl"]
    assert (kl.mean, kl.low, kl.high, kl.n) == (0, 0, 0, 5)


def test_the_start_is_held_once(training):
    """A run whose stages hold the start's weights already does not hold them a second time."""
    settings = {"reference": "initial", "eval_kl": True}
    trainer = training.trainer("irft", options={"eval_dataset": HELD_OUT}, **settings)
    assert isinstance(trainer.stages.rollout.initial, WeightSet)
    assert trainer.start.weights is trainer.stages.rollout.initial
