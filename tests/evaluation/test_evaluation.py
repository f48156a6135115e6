"""Held-out rows: what is asked of a model, what a verifier's score means, and what other data inherit."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from datasets import Dataset

from tutelage.errors import UserError
from tutelage.evaluation.policy import Answers, Evaluation, EvaluationSet, can_sample
from tutelage.evaluation.record import evaluated, retention
from tutelage.results import RunRecord
from tutelage.sampling import Sample
from tutelage.scoring.logps import cached_logps

ROWS = Dataset.from_list(
    [{"prompt": f"What is {i}?", "chosen": f" It is {i}.", "rejected": " No", "grade": i / 4} for i in range(5)]
)


NUMBERS = itertools.count()


def rows_of(training, dataset=ROWS, **options):
    tokenization = training.trainer("sft").tokenization
    return EvaluationSet.of(dataset, tokenization, **options)


class Parrot:
    """A sampler that says the same to every prompt."""

    def __init__(self):
        self.temperatures = []

    def sample(self, prompts, params, *, num_samples=1, rows=None, stage=0, on_finished=None):
        self.temperatures.append(params.temperature)
        drawn = [[Sample((5, 6), (-1.0, -1.0), True)] * num_samples for _ in prompts]
        for place, samples in enumerate(drawn):
            on_finished(place, samples)
        return drawn


@pytest.fixture
def verifier(tmp_path, monkeypatch):
    """Makes a verifier out of the body of a function of ``text`` and ``row``."""

    def made(body):
        name = f"tutelage_test_verifier_{next(NUMBERS)}"  # a module is imported once in a process
        (tmp_path / f"{name}.py").write_text(f"def score(text, row):\n    {body}\n")
        monkeypatch.syspath_prepend(tmp_path)
        return f"{name}:score"

    return made


# --- models that cannot be sampled from ----------------------------------------------------------------------------


def test_a_recurrent_model_is_evaluated_without_answers(training):
    model, rows = training.model("mamba"), rows_of(training)
    assert not can_sample(model)
    assert can_sample(training.model())
    rows.remember_reference(model)
    found = rows.evaluate(model)
    truth = [logps[0] for logps in cached_logps(model, rows.groups)]
    assert found.demonstration_logps == pytest.approx(truth)
    assert (found.sampled, found.greedy) == (None, None)
    with pytest.raises(UserError, match="cannot be sampled from"):
        rows.evaluate(model, greedy=True)


def test_what_a_verifier_cannot_have_is_found_before_training(training, verifier):
    rows = rows_of(training, verifier=verifier("return row['grade']"))
    rows.require_answers(training.model())
    rows_of(training).require_answers(training.model("mamba"))  # nothing to score
    with pytest.raises(UserError, match=r"verifier.*nothing to score.*cannot be sampled from"):
        rows.require_answers(training.model("mamba"))
    with pytest.raises(UserError, match="nothing to score"):
        training.trainer("sft", model=training.model("mamba"), verifier=rows.task, options={"eval_dataset": ROWS})


def test_a_sampler_can_be_handed_in(training):
    parrot, told = Parrot(), []
    found = rows_of(training).evaluate(
        training.model("mamba"), sampler=parrot, sample=True, greedy=True, on_progress=told.append
    )
    assert parrot.temperatures == [1.0, 0.0]
    assert told == list(range(1, 11))
    assert found.sampled.samples[0][0].token_ids == found.greedy.samples[3][0].token_ids == (5, 6)


# --- score and accuracy --------------------------------------------------------------------------------------------


def test_score_and_accuracy_are_two_numbers(training, verifier):
    """Grades 0, 1/4, 1/2, 3/4 and 1: the mean score is 1/2, and one answer of five is right."""
    rows = rows_of(training, verifier=verifier("return row['grade']"))
    found = rows.evaluate(training.model(), greedy=True)
    metrics = found.metrics()
    for kind in ("sampled", "greedy"):
        assert (metrics[f"score_{kind}"], metrics[f"accuracy_{kind}"]) == (0.5, pytest.approx(0.2))
    record = evaluated(RunRecord("x", "base", "m", None, 0), found, rows)
    assert record.evaluation.per_row["sampled_score"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert record.evaluation.per_row["sampled_right"] == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert [sample.sampled.score for sample in record.samples] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert record.evaluation.means["score_sampled"].mean == 0.5
    assert record.evaluation.rows == [sample.row for sample in record.samples] == [0, 1, 2, 3, 4]
    assert RunRecord.from_dict(record.to_dict()) == record


@pytest.mark.parametrize("score", ["nan", "inf"])
def test_a_score_that_is_no_number(training, verifier, score):
    with pytest.raises(UserError, match=rf"row 1: the verifier gave {score}"):
        rows_of(training, verifier=verifier(f"return float('{score}')"))


def test_a_quantity_that_is_not_finite_has_no_mean():
    """Its rows are kept, and a note says what is missing: no number of the run is lost for it."""
    answers = Answers([[Sample((5,), (-1.0,), True)]] * 3, [["a"]] * 3, [[1.0], [0.0], [1.0]])
    found = Evaluation([0, 1, 2], [-1.0, math.nan, -2.0], [1, 1, 1], sampled=answers).record("rows.jsonl")
    assert list(found.means) == ["score_sampled", "accuracy_sampled"]
    assert found.notes == ["demonstration_logp has no mean: 1 of its 3 values are NaN or infinite."]
    data = RunRecord("x", "base", "m", None, 0, evaluation=found).to_dict()
    assert data["evaluation"]["per_row"]["demonstration_logp"] == [-1.0, None, -2.0]
    assert asdict(found)["length_mean"] == 1.0


# --- several answers to a row --------------------------------------------------------------------------------------


class Talker(Parrot):
    """Gives the answers it was told to every prompt."""

    def __init__(self, *answers):
        super().__init__()
        self.told = [Sample(tuple(ids), (-1.0,) * len(ids), True) for ids in answers]

    def sample(self, prompts, params, *, num_samples=1, rows=None, stage=0, on_finished=None):
        drawn = [self.told[:num_samples] for _ in prompts]
        for place, samples in enumerate(drawn):
            on_finished(place, samples)
        return drawn


class Longest:
    """A reward: how many tokens."""

    def score(self, groups):
        return torch.tensor([float(len(c.token_ids)) for group in groups for c in group.completions])


def test_several_answers(training, verifier):
    """Of four answers three are right, two of which are the same but for a space."""
    tokenizer = training.trainer("sft").tokenization.tokenizer
    texts = ["Yes", "Yes ", "No", "Yes!"]
    talker = Talker(*(tokenizer(text, add_special_tokens=False).input_ids for text in texts))
    rows = rows_of(training, verifier=verifier("return float(text.startswith('Yes'))"))
    found = rows.evaluate(training.model(), sampler=talker, num_samples=4, reward=Longest())
    metrics, record = found.metrics(), found.record("rows")
    assert metrics["score_sampled"] == metrics["accuracy_sampled"] == 0.75
    assert metrics["distinct_right"] == 2
    assert record.samples_per_row == 4
    assert record.per_row["sampled_score"] == [0.75] * 5
    assert record.per_row["distinct_right"] == [2.0] * 5
    lengths = [len(sample.token_ids) for sample in talker.told]
    assert metrics["length"] == np.mean(lengths)
    gaps = np.sign([len(g.demonstrations[0].token_ids) - n for g in rows.groups for n in lengths])
    assert metrics["reward_accuracy"] == pytest.approx(np.mean((gaps + 1) / 2))
    quality = record.reward_quality
    assert (quality.prompts, quality.answers, [each.n for each in quality.best_of]) == (5, 4, [1, 2, 4])
    assert quality.correlations["length"] == pytest.approx(1), "the reward is the length"
    right, wrong = [lengths[i] for i in (0, 1, 3)], lengths[2]
    assert quality.auc["reward"].mean == pytest.approx(np.mean([(np.sign(x - wrong) + 1) / 2 for x in right]))
    run = RunRecord("x", "rft", "m", "d", 0, evaluation=record)
    assert RunRecord.from_dict(run.to_dict()) == run


def test_log_probs_of_answers_are_those_of_the_model_and_not_the_samplers(training):
    rows, model = rows_of(training), training.model()
    found = rows.evaluate(model, sampler=Parrot(), sample=True, num_samples=2, score_samples=True)
    with_answers = found.sampled.added_to([group.select(()) for group in rows.groups])
    np.testing.assert_allclose(found.sampled.logps, cached_logps(model, with_answers), atol=1e-4)
    assert found.sampled.logps[0][0] != -2.0
    assert rows.against_start(found, model).sampled.kl == pytest.approx([0.0] * 5, abs=1e-4)


def test_one_answer_tells_nothing_of_diversity(training, verifier):
    rows = rows_of(training, verifier=verifier("return 1.0"))
    found = rows.evaluate(training.model(), sampler=Parrot(), reward=Longest())
    assert "distinct_right" not in found.metrics()
    assert found.record("rows").reward_quality is None


def test_the_first_of_several_answers_is_the_one_that_would_be_drawn_alone(training):
    rows, model = rows_of(training), training.model()
    one, four = (rows.evaluate(model, sample=True, num_samples=n, seed=3).sampled for n in (1, 4))
    assert [row[0].token_ids for row in one.samples] == [row[0].token_ids for row in four.samples]
    assert len({sample.token_ids for row in four.samples for sample in row}) > len(one.samples)


def test_change_of_another_task():
    def found(logps, rows=(0, 1, 2), task=None):
        return Evaluation([*rows], logps, [1] * len(logps), task=task).record("colors")

    change = retention(found([-1.0, -2.0, -3.0]), found([-2.0, -4.0, -3.0])).change
    assert change["demonstration_logp"].mean == -1.0
    assert retention(found([-1.0, -2.0, -3.0]), found([-1.0, math.nan, -3.0])).change == {}
    for other in (found([-1.0, -2.0], rows=(0, 1)), found([-1.0, -2.0, -3.0], task="sums")):
        with pytest.raises(UserError, match="other rows"):
            retention(found([-1.0, -2.0, -3.0]), other)


# --- other data, read as these -------------------------------------------------------------------------------------


def test_other_data_are_read_alike(training, verifier):
    rows = rows_of(training, verifier=verifier("return row['grade']"), limit=2, source="rows.jsonl")
    model = training.model()
    rows.remember_reference(model)
    same = rows.over(ROWS)
    assert (same.limit, same.turns, same.task, same.source) == (2, "last", rows.task, "rows.jsonl")
    assert len(same.groups) == 2
    assert same.reference == rows.reference
    backwards = rows.over(ROWS.select([1, 0]), source="backwards")
    assert backwards.source == "backwards"
    assert backwards.reference == tuple(part[::-1] for part in rows.reference), "π_0 follows the rows"
    assert rows.over(ROWS.select([4, 0])).reference is None, "not known of row 4"


def test_all_turns_stay_all_turns(training):
    talk = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Bye")]
    data = Dataset.from_list([{"messages": [{"role": role, "content": text} for role, text in talk]}] * 3)
    assert len(rows_of(training, data, turns="all").over(data).groups) == 6
    assert len(rows_of(training, data).over(data).groups) == 3


def test_a_trainer_evaluates_other_data_as_its_own(training):
    trainer = training.trainer("irft", eval_rows=3, learning_rate=1e-2, options={"eval_dataset": ROWS})
    trainer.train()
    own, other = trainer.evaluate(), trainer.evaluate(ROWS, metric_key_prefix="other")
    assert own["eval_demonstration_reward"] != 0
    assert other == {name.replace("eval_", "other_", 1): pytest.approx(value) for name, value in own.items()}
    assert np.isfinite(list(own.values())).all()
