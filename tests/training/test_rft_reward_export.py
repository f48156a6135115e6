"""What is exported of rewards that are no single model, and what `tutelage score` makes of it."""

import json

import pytest
from peft import PeftModel
from safetensors.torch import load_file

from rft_runs import QUICK, readable, saved
from tutelage.cli import main
from tutelage.data import load_dataset
from tutelage.data.tokenized import group_from_row, tokenize_dataset
from tutelage.errors import UserError
from tutelage.models.loading import load_model
from tutelage.rewards.ensemble import read_ensemble

ROWS = [{"prompt": f"What is {i} + {i}?", "completion": f" The answer is {2 * i}"} for i in range(6)]
SETTINGS = {**QUICK, "reward_gate": "off", "max_completion_length": 6}


def exported(training, *, adapter=False, **settings):
    """A run that is over, and the folder that it wrote."""
    name = saved(training, model=training.model(pad_token_id=None))
    trainer = training.trainer(
        "rft",
        model=load_model(name),
        data=training.rows(20),
        options={"peft_config": training.lora() if adapter else None},
        **readable({**SETTINGS, **settings}),
    )
    trainer.train()
    trainer.export(training.folder / "out")
    return trainer, training.folder / "out"


@pytest.fixture
def score(training, capsys):
    """Runs the command on the rows; returns its exit code, the lines written and what it said."""

    def run(*args):
        data, output = training.folder / "rows.jsonl", training.folder / "scored.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        output.unlink(missing_ok=True)
        capsys.readouterr()
        code = main([str(arg) for arg in ("score", "--dataset_name", data, "--output", output, *args)])
        said = capsys.readouterr()
        lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] if code == 0 else []
        return code, lines, " ".join((said.out if code == 0 else said.err).split())

    return run


def rewards_of(trainer, training):
    """What the trainer's reward gives the rows."""
    data = load_dataset(str(training.folder / "rows.jsonl"), split="train")
    groups = [group_from_row(row) for row in tokenize_dataset(data, trainer.tokenization)]
    return trainer.reward.score(groups).tolist()


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("features", ["text", "hidden,logp"])
def test_a_reward_on_features_is_read_and_explained(training, score, features, adapter):
    trainer, folder = exported(
        training, adapter=adapter, reward="features", reward_features=features, reward_negatives="own,initial"
    )
    assert isinstance(trainer.policy, PeftModel) == adapter
    code, lines, said = score("--reward", folder, "--explain", 4)
    assert code == 0, said
    found = [line["completions"][0]["reward"] for line in lines]
    assert found == pytest.approx(rewards_of(trainer, training), abs=1e-3)
    if features == "text":
        assert max(found) - min(found) > 1e-3
        assert all(len(line["completions"][0]["explanation"]) == 4 for line in lines)


@pytest.mark.parametrize("kind", ["text", "hidden,logp", "model", "model with adapter"])
def test_an_ensemble_is_read_again(training, score, kind):
    adapter, settings = kind.endswith("adapter"), {"reward": "model"}
    if not kind.startswith("model"):
        settings = {"reward": "features", "reward_features": kind, "reward_negatives": "own,initial"}
    trainer, folder = exported(training, adapter=adapter, reward_ensemble=2, reward_combine="min", **settings)
    assert {path.name for path in (folder / "reward").iterdir()} == {"member-00", "member-01", "ensemble.json"}
    code, lines, said = score("--reward", folder)
    assert code == 0, said
    found = [line["completions"][0]["reward"] for line in lines]
    assert found == pytest.approx(rewards_of(trainer, training), abs=1e-3)
    members = [score("--reward", folder / "reward" / f"member-{place:02d}") for place in range(2)]
    if "logp" not in kind:
        assert [code for code, *_ in members] == [0, 0]
        one, other = ([line["completions"][0]["reward"] for line in lines] for _, lines, _ in members)
        # Alone for its prompt, an answer leaves the members nothing to disagree on.
        assert found == pytest.approx([sum(pair) / 2 for pair in zip(one, other, strict=True)], abs=1e-3)
        assert one != other
        assert "6 of 6 rows hold a lone answer: its reward is the mean of the members" in said
        assert not [said for *_, said in members if "lone answer" in said]


def test_an_ensemble_that_is_explained_or_damaged_is_an_error(training, score):
    _, folder = exported(training, reward="features", reward_negatives="own,initial", reward_ensemble=2)
    code, _, said = score("--reward", folder, "--explain")
    assert code != 0
    assert "an ensemble is no sum of features" in said
    assert "member-00" in said
    assert score("--reward", folder / "reward" / "member-00", "--explain")[0] == 0
    path = folder / "reward" / "ensemble.json"
    content = path.read_text(encoding="utf-8")
    for bad in ("{", '{"members": 1, "combine": "mean"}', '{"members": 2, "combine": "max"}', "{}", "[]"):
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(UserError, match=r"ensemble.json: the ensemble cannot be read"):
            read_ensemble(folder / "reward")
    path.write_text(content.replace("2", "3"), encoding="utf-8")
    with pytest.raises(UserError, match=r"member-02: the member is missing"):
        read_ensemble(folder / "reward")


def test_of_likelihoods_nothing_is_exported_and_that_is_said(training, score):
    trainer, folder = exported(training, reward="likelihood", fold_learning_rate=1e-2)
    assert trainer.stages.phase.negatives.folds()
    assert sorted(path.name for path in folder.iterdir()) == ["made.json", "policy"]
    code, _, said = score("--reward", folder)
    assert code != 0
    assert "the run has exported no reward: those of --reward likelihood" in said
    assert "--policy" in said
    assert not (training.folder / "scored.jsonl").exists()


def test_auto_exports_the_one_that_it_took(training, score):
    trainer, folder = exported(training, reward="auto", reward_negatives="own,initial")
    code, lines, said = score("--reward", folder)
    assert code == 0, said
    found = [line["completions"][0]["reward"] for line in lines]
    assert found == pytest.approx(rewards_of(trainer, training), abs=1e-3)
    names = {entry["settings"]["name"] for entry in _facts(folder)["sets"]}
    assert names == set(trainer.stages.phase.learner.taken.removeprefix("features:").split(","))


def _facts(folder):
    return json.loads((folder / "reward" / "feature_reward.json").read_text(encoding="utf-8"))


def test_the_weights_are_those_that_were_learned(training):
    trainer, folder = exported(training, reward="features", reward_negatives="own")
    stored = load_file(trainer.stages.store.path(1) / "reward-features" / "feature_reward.safetensors")
    written = load_file(folder / "reward" / "feature_reward.safetensors")
    assert stored.keys() == written.keys()
    assert all(stored[name].equal(written[name]) for name in stored)
