"""RFT on tiny models: the gate."""

import copy
import json
import re

import numpy as np
import pytest
from test_rft_truncated_samples import ANSWERS

from rft_runs import Scripted, make, over_samples, phases, plant, run, spread
from training_runs import assert_same_weights, history


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "tutelage.training.reward_phase"]


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda c: -over_samples(c), r"does not beat chance on the validation rows: accuracy 0.00"),
        (spread, r"does not beat chance.*: accuracy 0\.\d\d \(0\.\d\d to"),
        (lambda c: 1.0, "the reward is the same for all samples"),
    ],
)
def test_a_reward_that_knows_nothing_moves_no_policy(training, caplog, reward, said):
    trainer = plant(make(training), reward)
    start = copy.deepcopy(trainer.policy)
    trainer.train()
    assert phases(trainer) == [0, 0]
    assert trainer.state.global_step == 4, "the run goes on"
    assert_same_weights(trainer.policy, start)
    first, second = warnings_of(caplog)
    assert re.search("stage 0: the policy stays as it is: .*" + said, first)
    assert second.startswith("stage 1: ")
    reason = json.loads((trainer.stages.store.path(1) / "reward.json").read_text(encoding="utf-8"))["reason"]
    assert re.search(said, reason)


def test_a_warm_up_is_no_warning_and_a_saturated_reward_is_one(training, caplog):
    trainer = run(training, reward_warmup_stages=9, early_stopping="saturated", saturation=0.51, reward_epochs=4)
    assert phases(trainer) == [0, 0]
    said = warnings_of(caplog)
    assert said
    assert all("reward phase ended after" in line for line in said)
    assert history(trainer, "reward/saturated") == [float(f"stage {s}" in " ".join(said)) for s in (0, 1)]
    assert all(steps < 8 for steps in history(trainer, "reward/steps") if steps)


def test_samples_that_are_all_cut_teach_nothing_and_that_is_said(training, caplog):
    trainer = run(
        training, truncated_samples="floor", options={"sampler": Scripted(lambda row: [ANSWERS[1], ((7,) * 8, False)])}
    )
    assert history(trainer, "samples/truncated_fraction") == [1, 1]
    assert phases(trainer) == [0, 0]
    assert "raise --max_completion_length or use --truncated_samples score" in warnings_of(caplog)[0]
    assert not (trainer.stages.store.path(0) / "reward.safetensors").exists()


# --- the yardsticks: samples so short, so long, or both, that length and log-prob know much or nothing ---------------------

SHORT, LONG = ((7,), True), ((7, 9, 11, 13, 15, 17, 19, 21), True)
SCRIPTS = {"short": [SHORT, ((9,), True)], "long": [LONG, ((9, *LONG[0][1:]), True)], "both": [SHORT, LONG]}


def judged(training, gate, samples, reward=over_samples, **settings):
    options = {"sampler": Scripted(lambda row: SCRIPTS[samples])}
    trainer = plant(make(training, reward_gate=gate, options=options, **settings), reward)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("gate", "samples", "said"),
    [
        ("yardsticks", "both", None),
        (
            "yardsticks",
            "short",
            r"\(accuracy 1.00 on the validation rows\) does not beat the length of an answer \(1.00\)",
        ),
        ("yardsticks", "long", r"does not beat the policy's own log-prob \(1.00\)"),
        ("chance", "short", None),
        ("chance", "long", None),
    ],
)
def test_a_reward_must_beat_what_costs_nothing(training, caplog, gate, samples, said):
    trainer = judged(training, gate, samples)
    assert history(trainer, "validation/accuracy") == [1, 1]
    assert history(trainer, "validation/accuracy_length") == [{"both": 0.5}.get(samples, 1.0)] * 2
    assert history(trainer, "validation/accuracy_logp") == [{"both": 0.5, "short": 0.0, "long": 1.0}[samples]] * 2
    assert phases(trainer) == [int(said is None)] * 2
    assert bool(warnings_of(caplog)) == (said is not None)
    assert said is None or re.search(said, warnings_of(caplog)[0])


def test_no_gate_asks_nothing(training, caplog):
    trainer = judged(training, "off", "both", lambda c: -over_samples(c))
    assert history(trainer, "validation/accuracy") == [0, 0]
    assert phases(trainer) == [1, 1]
    assert not warnings_of(caplog)


def test_the_shortcut_is_visible(training):
    """Correlation of the reward with log-prob and length, over the samples of the stage."""

    def reward(completion):  # candidates of earlier stages do not know their log-probs any more
        known = "old_logps" in completion.token_values
        return (completion.sum("old_logps") if known else 0.0) + 0.5 * len(completion.token_ids)

    trainer = plant(make(training, reward_gate="off"), reward)
    trainer.train()
    samples = [c for group in trainer.stages.store.groups(1) for c in group.samples]
    logps, lengths = ([c.sum("old_logps") for c in samples], [len(c.token_ids) for c in samples])
    rewards = [logp + 0.5 * length for logp, length in zip(logps, lengths, strict=True)]
    for name, values in (("logp", logps), ("length", lengths)):
        expected = np.corrcoef(rewards, values)[0, 1] if np.std(values) else 0.0
        assert history(trainer, f"reward/{name}_correlation")[1] == pytest.approx(expected, abs=1e-4)
    assert history(trainer, "reward/logp_correlation")[1] > 0.9


@pytest.mark.parametrize("copies", [1, 2])
def test_samples_that_copy_their_demonstration_are_told(training, caplog, copies):
    known = {}

    def answers(row):
        return [(known[row], True)] * copies + [LONG] * (3 - copies)

    trainer = make(
        training, num_samples=3, reward_gate="off", keep_policy="last", options={"sampler": Scripted(answers)}
    )
    known.update({row["row"]: tuple(row["demonstration_ids"]) for row in trainer.train_dataset})
    plant(trainer, over_samples).train()
    assert history(trainer, "samples/copies") == [pytest.approx(copies / 3)] * 2
    said = [line for line in warnings_of(caplog) if "equal the demonstration" in line]
    assert len(said) == (2 if copies == 2 else 0)
    assert all("67%" in line and "--prompt_dataset" in line and "--reward_negatives" in line for line in said)
