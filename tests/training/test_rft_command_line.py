"""RFT on tiny models: the command line."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from test_rft_reward_data import PAIRS

from rft_runs import NEURAL, QUESTIONS, WORDS, make
from training_runs import SGD
from tutelage.cli import main
from tutelage.errors import UserError


@pytest.fixture
def command(training, capsys):
    """Runs a command that must succeed; returns what it printed, on one line."""

    def call(*args):
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        shown, error = capsys.readouterr()
        assert code == 0, error
        return " ".join(shown.split())

    return call


class FakeHub:
    def __init__(self):
        self.files = []

    def create_repo(self, name, **kwargs):
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, *, folder_path, ignore_patterns, **kwargs):
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        self.files += filter_repo_objects(files, ignore_patterns=ignore_patterns)


def test_the_command_line(training, command, monkeypatch, guesser, marks):
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr("tutelage.training.publishing.upload_folder", hub.upload_folder)
    data, pairs, out = (training.folder / name for name in ("rows.jsonl", "pairs.jsonl", "out"))
    rows = [{"prompt": question, "completion": WORDS[0]} for question in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    length = ["--max_completion_length", 6, "--dtype", "float32"]
    arguments = ["rft", "--model_name_or_path", guesser, "--dataset_name", data, "--output_dir", out, "--use_peft"]
    arguments += ["--validation_rows", 8, "--reward_warmup_stages", 1, "--verifier", marks, "--bf16", "false", *length]
    arguments += ["--per_device_train_batch_size", 4, "--num_train_epochs", 1, "--stages_per_epoch", 3]
    arguments += ["--preference_dataset", pairs, "--eval_dataset_name", data, "--eval_rows", 8, "--logging_steps", 1]
    arguments += ["--reward_learning_rate", 1e-2, "--learning_rate", 1e-3]
    arguments += [part for name, value in NEURAL.items() for part in (f"--{name}", value)]
    shown = command(*arguments, "--push_to_hub")
    assert str(out / "report.html") in shown.replace(" ", "")
    for file in ("policy/adapter_model.safetensors", "reward/adapter_model.safetensors", "reward/reward.json"):
        assert (out / file).exists()
        assert file in hub.files
    assert "README.md" in hub.files
    assert not [file for file in hub.files if "stages" in file or "checkpoint" in file or "results" in file]
    assert "chosen" in (out / "README.md").read_text() or "these are its weights" in (out / "README.md").read_text()
    record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert record["algorithm"] == "rft"
    assert sum(entry["chosen"] for entry in record["selection"]) == 1
    assert all(entry["verifier_score"] is not None for entry in record["selection"])
    assert record["evaluation"]["means"]["reward_accuracy"]["n"] <= 8
    assert "verifier score" in (out / "report.html").read_text(encoding="utf-8").lower()

    weights_of = {name: (out / name / "adapter_model.safetensors").read_bytes() for name in ("policy", "reward")}
    command(*arguments, "--resume")
    again = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert again["selection"] == record["selection"]
    assert (again["trained_tokens"], again["sampled_tokens"]) == (record["trained_tokens"], record["sampled_tokens"])
    for name, content in weights_of.items():
        assert (out / name / "adapter_model.safetensors").read_bytes() == content

    evaluation = training.folder / "evaluation"
    command("evaluate", "--model_name_or_path", out, "--dataset_name", data, "--output_dir", evaluation, *length)
    found = json.loads((evaluation / "out" / "results.json").read_text(encoding="utf-8"))["evaluation"]
    assert len(found["rows"]) == len(QUESTIONS)
    scored = training.folder / "scored.jsonl"
    shown = command("score", "--reward", out / "reward", "--dataset_name", pairs, "--output", scored)
    assert "accuracy, preferred over rejected" in shown
    assert len(scored.read_text(encoding="utf-8").splitlines()) == 6


def test_passes_go_over_the_samples_of_a_stage_again(training):
    """Each pass trains on the same scored samples; from the second on the policy is no longer the one that drew them."""
    trainer, seen = make(training, policy_epochs=3, per_device_train_batch_size=4, **SGD), []
    step_of, loss = trainer._step_of, trainer.objective.loss

    def seen_by_loss(tokens, step):
        seen[-1][1].append((tokens.sums().detach() - tokens.known_sums("old_logps")).abs().max().item())
        return loss(tokens, step)

    def noted(batches):
        seen.append((trainer.stage, [], frozenset(group for batch in batches for group in batch)))
        return step_of(batches)

    trainer.objective.loss, trainer._step_of = seen_by_loss, noted
    trainer.train()
    assert trainer.state.global_step == 12
    for stage in (0, 1):
        steps = [(distances, groups) for at, distances, groups in seen if at == stage]
        assert [groups for _, groups in steps[:2]] * 3 == [groups for _, groups in steps], (
            "the same, in the same order"
        )
        moved = [max(distances) for distances, _ in steps if distances]
        assert len(moved) == 6, "each step of the policy phase had something to train on"
        assert moved[0] < 1e-4 < 1e-3 < moved[2]


def test_streamed_data_have_one_pass(training):
    data = training.rows(20).to_iterable_dataset()
    with pytest.raises(UserError, match="policy_epochs"):
        make(training, data=data, policy_epochs=2, max_steps=4)


def test_neither_rows_nor_pairs_of_a_kept_prompt_train(training):
    """The natural call gives the same file twice; a reward that knew the kept answers would pass any gate."""
    rows = [
        {"prompt": f"Is {i}?", "chosen": answer, "rejected": " No"}
        for i in range(20)
        for answer in (" It is.", " So it is.")
    ]
    data = Dataset.from_list(rows)
    trainer = make(training, data=data, options={"preference_dataset": data})
    kept = {group.prompt_ids for group in trainer.stages.phase.candidates.rows.groups}
    assert kept
    assert kept.isdisjoint(tuple(row["prompt_ids"]) for row in trainer.train_dataset)
    assert trainer.stages.phase.learner.fitter.preferences
    assert kept.isdisjoint(pair.prompt_ids for pair in trainer.stages.phase.learner.fitter.preferences)


def test_a_preference_dataset_that_nobody_loads_is_an_error(training):
    with pytest.raises(UserError, match="given no preference data"):
        make(training, preference_dataset="pairs.jsonl")
