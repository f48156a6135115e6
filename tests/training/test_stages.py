"""The schedule of stages, what a stage leaves on disk, and what of it is used again."""

import hashlib
import json
import os
from itertools import pairwise

import pytest
import torch
from peft import get_peft_model

from tutelage.data.records import read_groups
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
    group = Group((1, 5, row + 10), (demonstration, *samples), row=row, teacher_prompt_ids=(1, 6))
    logps = [[-1.5, -0.25, -0.1 * row, -1e-9], [-1 / 3, -0.1 * row], [-0.0, -2.0]]
    return group.with_token_values("reference_logps", logps).with_values("reward", [0.5, None, -1.0])


def known(groups):
    """Everything that groups know: values do not count where groups are compared."""
    return [
        (group, [(dict(c.token_values), dict(c.values)) for c in group.completions])
        for group in (groups.values() if isinstance(groups, dict) else groups)
    ]


def text(token_ids):
    return "é" + " ".join(map(str, token_ids))


def store(folder, **settings):
    return StageStore(folder, {**SETTINGS, **settings}, text)


def record(folder, rows, *, stage=0, policy="p0", kept=(), stop_after=None):
    """Write a stage in batches of two, killed after so many of them."""

    def batches():
        for start in range(0, len(rows), 2):
            if stop_after == start // 2:
                raise KeyboardInterrupt
            yield [group(row) for row in rows[start : start + 2]]

    return store(folder).write(stage, policy, kept, batches(), lambda: {"rows": len(rows)})


def test_groups_come_back_as_they_were_written(tmp_path):
    written = record(tmp_path, [4, 0, 3])
    assert written == {row: group(row) for row in (4, 0, 3)}
    read = store(tmp_path).read(0, "p0")
    assert read == written
    assert list(read) == [4, 0, 3]
    assert store(tmp_path).read(0, None) == written
    assert store(tmp_path).groups(0) == [group(4), group(0), group(3)]
    assert known(read) == known([group(4), group(0), group(3)])
    assert read[4].completions[0].values == {"reward": 0.5}
    assert read[4].completions[1].values == {}


def test_people_can_read_the_files(tmp_path):
    record(tmp_path, [4, 0])
    folder = tmp_path / "stage-0000"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "samples.jsonl"]
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 2
    assert first["row"] == 4
    assert first["prompt"] == "é1 5 14"
    completions = first["completions"]
    assert [found["role"] for found in completions] == ["demonstration", "sample", "sample"]
    assert [found["text"] for found in completions] == ["é7 8 14 2", "é9 14", "é9 2"]
    assert [found["finished"] for found in completions] == [True, False, True]
    assert list(first) == ["row", "prompt", "completions", "prompt_ids", "teacher_prompt_ids"], "texts first"
    assert list(completions[0]) == ["role", "text", "finished", "values", "token_ids", "token_values"]
    assert "é" in lines[0], "letters stand as letters"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest.pop("format") == 3
    content = (folder / "samples.jsonl").read_bytes()
    noted = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest.pop("files") == {"samples.jsonl": noted}
    assert len(manifest.pop("sha256")) == 64
    assert manifest == {"stage": 0, "policy": "p0", "settings": SETTINGS, "complete": True, "rows": 2}


@pytest.mark.parametrize(
    ("completions", "said"),
    [
        ([{"role": "sample", "finished": True}], "token_ids"),
        ([{"role": "friend", "finished": True, "token_ids": [1]}], "friend"),
        ([{"role": "sample", "finished": True, "token_ids": [1], "token_values": {"x": [1, 2]}}], "2 x for 1 tokens"),
    ],
)
def test_a_line_that_is_no_group_is_named(tmp_path, completions, said):
    record(tmp_path, [4, 0])
    path = tmp_path / "stage-0000" / "samples.jsonl"
    first, second = path.read_text(encoding="utf-8").splitlines()
    line = json.dumps({**json.loads(second), "completions": completions})
    path.write_text(f"{first}\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"samples\.jsonl, row 2.*{said}"):
        list(read_groups(path))


def test_stages_of_an_earlier_version_are_refused(tmp_path):
    folder = tmp_path / "stage-0000"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"stage": 0, "policy": "p0", "complete": true}', encoding="utf-8")
    with pytest.raises(UserError, match=r"manifest.json, field 'format': .*another version.*format 1.*--overwrite"):
        store(tmp_path).check()
    assert folder.exists()


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
    assert list(store(tmp_path).read(0, "p0")) == [0, 1], "by pieces of two, each of which has its hash"


def test_a_line_torn_inside_a_character(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, [0, 1, 2, 3], stop_after=1)
    part = tmp_path / "stage-0000" / "samples.jsonl.part"
    content = part.read_bytes()
    part.write_bytes(content[: content.rindex("é".encode()) + 1])
    assert list(store(tmp_path).read(0, "p0")) == []


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
    for writes in range(5):
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

        monkeypatch.setattr("os.replace", dying)
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
    with pytest.raises(UserError, match=r"samples\.jsonl: is missing"):
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
