"""RFT on tiny models: validation rows."""

import pytest
from datasets import Dataset

from rft_runs import QUICK, make, over_samples, phases, plant, trained_on


def talks(count):
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": role, "content": f"{i} {turn} {role}"}
                    for turn in range(2)
                    for role in ("user", "assistant")
                ]
            }
            for i in range(count)
        ]
    )


@pytest.mark.parametrize("kind", ["rows", "stream", "repeated stream", "repeated rows", "all turns"])
def test_kept_rows_train_neither_policy_nor_reward(training, kind):
    rows, settings = training.rows(20), {}
    if kind == "repeated rows":
        rows = Dataset.from_list([*rows, *rows])
    if kind == "all turns":
        rows, settings = talks(12), {"turns": "all"}
    if "stream" in kind:
        rows, settings = rows.to_iterable_dataset(), {"max_steps": 4 if kind == "stream" else 8}
    if kind == "repeated stream":
        rows = rows.repeat(3)
    trainer = make(training, data=rows, **settings)
    plant(trainer, over_samples)
    policy, reward = trained_on(trainer)
    trainer.train()
    assert set(phases(trainer)) == {1}
    # The policy phase trains on samples alone, so there the prompt tells.
    kept = {group.prompt_ids for group in trainer.stages.phase.candidates.rows.groups}
    assert len(kept) == (8 if kind == "all turns" else 4)
    assert all(len(seen) > 8 and kept.isdisjoint(group.prompt_ids for group in seen) for seen in (policy, reward))
    everything = 24 if kind == "all turns" else 20
    assert len({group.prompt_ids for group in reward}) == everything - len(kept), "all others do"
    recorded = {group.prompt_ids for group in trainer.stages.store.groups(0, "validation")}
    assert recorded == kept


def test_how_many_rows_are_kept(training):
    settings = {**QUICK, "validation_rows": None}
    assert len(training.trainer("rft", data=training.rows(40), **settings).stages.phase.candidates.rows.groups) == 16
    assert len(training.trainer("rft", data=training.rows(200), **settings).stages.phase.candidates.rows.groups) == 20
    assert (
        len(training.trainer("rft", data=training.rows(1300), **settings).stages.phase.candidates.rows.groups) == 128
    )
    other = training.trainer("rft", data=training.rows(40), seed=1, **settings).stages.phase.candidates.rows.groups
    assert other != training.trainer("rft", data=training.rows(40), **settings).stages.phase.candidates.rows.groups
