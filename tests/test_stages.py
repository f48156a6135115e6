"""The schedule of stages, what a stage leaves on disk, and what of it is used again."""

import json
import os
from itertools import pairwise

import pytest
import torch
from peft import get_peft_model

from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role
from tutelage.models.loading import load_model
from tutelage.models.weights import fingerprint
from tutelage.training.schedule import StageSchedule
from tutelage.training.store import StageStore

SETTINGS = {"seed": 0, "temperature": 1.0}


def test_stages_cut_an_epoch_evenly_and_completely():
    for steps in range(1, 25):
        for stages in range(1, steps + 1):
            schedule = StageSchedule(steps, stages)
            bounds = [schedule.bounds(stage) for stage in range(3 * stages)]
            assert bounds[0][0] == 0
            assert bounds[-1][1] == 3 * steps
            assert all(end == first for (_, end), (first, _) in pairwise(bounds))
            assert {end - first for first, end in bounds} <= {steps // stages, -(-steps // stages)}
            owners = [stage for stage, (first, end) in enumerate(bounds) for _ in range(first, end)]
            assert [schedule.stage_of(step) for step in range(3 * steps)] == owners


@pytest.mark.parametrize("stages", [0, 11])
def test_a_number_of_stages_that_cannot_be(stages):
    with pytest.raises(UserError, match="stages_per_epoch"):
        StageSchedule(10, stages)


def group(row):
    demonstration = Completion((7, 8, row + 10, 2), Role.DEMONSTRATION, finished=True)
    samples = [Completion((9, row + 10), Role.SAMPLE, finished=False), Completion((9, 2), Role.SAMPLE, finished=True)]
    return Group((1, 5, row + 10), (demonstration, *samples), row=row, reference_logps=(-1.5, -0.1 * row, -1 / 3))


def text(token_ids):
    return "é" + " ".join(map(str, token_ids))


def store(folder, **settings):
    return StageStore(folder, {**SETTINGS, **settings})


def record(folder, rows, *, stage=0, policy="p0", kept=(), stop_after=None):
    """Write a stage in batches of two, killed after so many of them."""

    def batches():
        for start in range(0, len(rows), 2):
            if stop_after == start // 2:
                raise KeyboardInterrupt
            yield [group(row) for row in rows[start : start + 2]]

    return store(folder).write(stage, policy, kept, batches(), text, lambda: {"rows": len(rows)})


def test_groups_come_back_as_they_were_written(tmp_path):
    written = record(tmp_path, [4, 0, 3])
    assert written == {row: group(row) for row in (4, 0, 3)}
    read = store(tmp_path).read(0, "p0")
    assert read == written
    assert list(read) == [4, 0, 3]
    assert store(tmp_path).read(0, None) == written
    assert store(tmp_path).groups(0) == [group(4), group(0), group(3)]


def test_people_can_read_the_files(tmp_path):
    record(tmp_path, [4, 0])
    folder = tmp_path / "stage-0000"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "samples.jsonl"]
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 2
    assert first["row"] == 4
    assert first["prompt"] == "é1 5 14"
    assert first["demonstration"] == "é7 8 14 2"
    assert first["samples"] == ["é9 14", "é9 2"]
    assert first["finished"] == [True, False, True]
    assert "é" in lines[0], "letters stand as letters"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest == {"stage": 0, "policy": "p0", "settings": SETTINGS, "complete": True, "rows": 2}


def test_a_killed_stage_gives_back_what_it_recorded(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, [0, 1, 2, 3, 4], stop_after=2)
    assert (tmp_path / "stage-0000" / "samples.jsonl.part").exists()
    manifest = json.loads((tmp_path / "stage-0000" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["complete"] is False
    kept = store(tmp_path).read(0, "p0")
    assert kept == {row: group(row) for row in range(4)}
    whole = record(tmp_path, [4], kept=kept.values())
    assert list(whole) == list(range(5))
    assert store(tmp_path).read(0, None) == {row: group(row) for row in range(5)}
    assert not (tmp_path / "stage-0000" / "samples.jsonl.part").exists()


@pytest.mark.parametrize("cut", [1, 40])
def test_a_torn_last_line_is_dropped_and_the_rest_is_used(tmp_path, cut):
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, [0, 1, 2, 3, 4, 5], stop_after=2)
    part = tmp_path / "stage-0000" / "samples.jsonl.part"
    part.write_bytes(part.read_bytes()[:-cut])
    assert list(store(tmp_path).read(0, "p0")) == [0, 1, 2]


def test_a_line_torn_inside_a_character(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, [0, 1, 2, 3], stop_after=1)
    part = tmp_path / "stage-0000" / "samples.jsonl.part"
    content = part.read_bytes()
    part.write_bytes(content[: content.rindex("é".encode()) + 1])
    assert list(store(tmp_path).read(0, "p0")) == [0]


def test_another_policy_or_other_settings_make_a_record_worthless(tmp_path):
    record(tmp_path, [0, 1])
    assert store(tmp_path).read(0, "p1") == {}
    assert store(tmp_path, temperature=0.7).read(0, "p0") == {}
    assert store(tmp_path).read(1, "p0") == {}
    with pytest.raises(UserError, match="other settings"):
        store(tmp_path, temperature=0.7).read(0, None)


def test_what_another_policy_sampled_never_gets_this_policys_name(tmp_path, monkeypatch):
    """Killed at any write on the way: the record is this policy's or it is empty."""
    replace = os.replace
    for writes in range(3):
        folder = tmp_path / str(writes)
        with pytest.raises(KeyboardInterrupt):
            record(folder, [0, 1, 2, 3], policy="old", stop_after=1)
        left = writes

        def dying(source, target):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            replace(source, target)

        monkeypatch.setattr("tutelage.training.store.os.replace", dying)
        with pytest.raises(KeyboardInterrupt):
            record(folder, [6, 7], policy="new")
        monkeypatch.undo()
        assert set(store(folder).read(0, "new")) <= {6, 7}


def test_inside_a_stage_its_record_must_be_whole(tmp_path):
    with pytest.raises(UserError, match="stage 0 are missing"):
        store(tmp_path).read(0, None)
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, [0, 1, 2, 3], stop_after=1)
    with pytest.raises(UserError, match=r"samples\.jsonl"):
        store(tmp_path).read(0, None)
    with pytest.raises(UserError, match="stage 0 are missing"):
        store(tmp_path).groups(0)


def test_the_fingerprint_names_the_weights(training):
    model = training.model()
    name = fingerprint(model.named_parameters())
    assert name == fingerprint(training.model().named_parameters())
    assert name != fingerprint(training.model(seed=1).named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert fingerprint(model.named_parameters()) == name
    optimizer.step()
    moved = fingerprint(model.named_parameters())
    assert moved != name
    model.save_pretrained(training.folder / "saved")
    assert fingerprint(load_model(str(training.folder / "saved")).named_parameters()) == moved


def test_the_fingerprint_of_an_adapter_tells_its_base(training):
    """Fresh adapters of two models are drawn from the same seed: the models differ, and so do the names."""
    names = []
    for seed in (0, 1):
        torch.manual_seed(0)
        model = get_peft_model(training.model(seed=seed), training.lora())
        names.append(fingerprint(model.named_parameters()))
    assert names[0] != names[1]
