"""One small run per algorithm against the numbers that the first engine gave (commit da1607c), in float32 with SGD.

Adam would turn the rounding of a vanishing gradient into a full step; SGD keeps what differs between processors small.
"""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from rft_runs import NEURAL
from tutelage.data.tokenized import group_from_row
from tutelage.scoring.logps import cached_logps

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "runs.json").read_text(encoding="utf-8"))
SGD = {"optim": "sgd", "learning_rate": 0.05, "train_sampling_strategy": "sequential"}
RUNS = {
    "sft": {"num_train_epochs": 2},
    "spin": {"num_train_epochs": 2, "beta": [0.5]},
    "irft": {"stages_per_epoch": 2, "num_samples": 2, "beta": [0.5], "replay_stages": 1, "sft_weight": 0.1},
    "irft_initial": {
        "stages_per_epoch": 3,
        "num_samples": 2,
        "beta": [0.5, 1.0, 2.0],
        "reference": "initial",
        "temperature": 0.7,
        "loss_kind": "hinge",
    },
    "rft": {
        **NEURAL,
        "stages_per_epoch": 2,
        "num_train_epochs": 2,
        "num_samples": 3,
        "validation_rows": 6,
        "reward_warmup_stages": 0,
        "reward_learning_rate": 0.3,
        "reward_batch_size": 4,
        "reward_epochs": 4,
        "early_stopping": "never",
        "truncated_samples": "score",
        "beta": 0.05,
        "per_device_train_batch_size": 4,
    },
}


def assert_close(found, expected, place):
    """Integers and words equal, floats to what processors differ by."""
    if isinstance(expected, dict):
        assert found.keys() >= expected.keys(), place
        for key, value in expected.items():
            assert_close(found[key], value, f"{place}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_close(a, b, f"{place}/{index}")
    elif isinstance(expected, float):
        # Log-probs are tens of nats; weights, which steps of 0.05 move by a few hundredths, ones and less.
        assert found == pytest.approx(expected, abs=1e-4 if "/weights/" in place else 1e-3, rel=1e-5), place
    else:
        assert found == expected, place


def recorded(trainer, stage):
    """What a stage left on disk, in the words of the golden record."""
    store = trainer.stages.store
    groups = store.groups(stage)
    found = {
        "row": [group.row for group in groups],
        "prompt_ids": [list(group.prompt_ids) for group in groups],
        "token_ids": [[list(c.token_ids) for c in group.completions] for group in groups],
        "finished": [[c.finished for c in group.completions] for group in groups],
        "reference_logps": [list(group.sums("reference_logps")) for group in groups],
    }
    if trainer.algorithm == "rft":
        reward = json.loads((store.path(stage) / "reward.json").read_text(encoding="utf-8"))
        found |= {
            "old_logps": [list(group.sums("old_logps")) for group in groups],
            "rewards": [line["rewards"] for line in store.lines(stage, "rewards")],
            "phase": reward["policy/phase"],
            "scale": reward["scale"],
            "kl": reward["validation/kl"],
            "accuracy": reward["validation/accuracy"],
            "reward_loss": reward["reward/loss"],
        }
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_numbers_that_it_always_gave(training, name):
    expected, algorithm = GOLDEN[name], name.split("_")[0]
    groups = [
        group_from_row(row) for row in training.trainer("sft", data=training.rows(24), name="rows").train_dataset
    ]
    trainer = training.run(algorithm, data=training.rows(24), **SGD, **RUNS[name])
    found = {
        "loss": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "final_logps": [logps[0] for logps in cached_logps(trainer.policy, groups)],
        "weights": {
            place: p.detach().flatten()[:: max(1, p.numel() // 8)][:8].tolist()
            for place, p in trainer.policy.named_parameters()
        },
    }
    for stage, stage_expected in enumerate(expected.get("stages", ())):
        stage_expected.pop("reason", None)  # words, not numbers
        assert_close(recorded(trainer, stage), stage_expected, f"stage {stage}")
    if algorithm == "rft":
        found["selection"] = [asdict(candidate) for candidate in trainer.stages.phase.selection]
    assert_close(found, {key: expected[key] for key in found}, name)
