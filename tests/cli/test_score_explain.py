"""tutelage score with a feature reward: its scores, and what spoke for and against each answer."""

import json

import pytest

from tutelage.cli import main
from tutelage.data import Tokenization
from tutelage.groups import Group, Role
from tutelage.models.loading import load_model, load_tokenizer
from tutelage.rewards import Comparisons, FeatureReward
from tutelage.rewards.feature_sets import FeatureParts
from tutelage.rewards.hidden_features import HiddenSource
from tutelage.scoring.logps import cached_token_logps
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer

ROWS = [{"prompt": f"What is {i} + {i}?", "completion": f" [b]{2 * i}[/b]"} for i in range(6)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain") / "base"
    tokenizer = tiny_tokenizer("zephyr")
    tiny_model(vocab_size=len(tokenizer), num_hidden_layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def learned(base, folder, names):
    """A feature reward that prefers the rows' answers, and groups of the rows' demonstrations."""
    model, tokenizer = load_model(str(base)), load_tokenizer(str(base))
    tokenization = Tokenization(tokenizer, max_completion_length=9)
    groups = []
    for number, row in enumerate(ROWS):
        answers = [(row["completion"], Role.DEMONSTRATION), (" no", Role.SAMPLE), (" the", Role.SAMPLE)]
        completions = [tokenization.completion(row["prompt"], text, role) for text, role in answers]
        groups.append(Group(tokenization.prompt_ids(row["prompt"]), tuple(completions), number))
    parts = FeatureParts(hidden=HiddenSource(lambda: model), logps=lambda found: cached_token_logps(model, found))
    reward = FeatureReward.of(names, parts)
    reward.fit(Comparisons({"own": groups}), truncated_samples="score")
    reward.save(folder / "reward", tokenizer, base_model=str(base), max_prompt_length=64, max_completion_length=9)
    return reward, [group.select([0]) for group in groups]


@pytest.fixture
def score(tmp_path, capsys):
    """Runs the command on the rows; returns its exit code, the lines written and what it said."""

    def run(*args):
        data, output = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        code = main([str(arg) for arg in ("score", "--dataset_name", data, "--output", output, *args)])
        said = capsys.readouterr()
        lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] if code == 0 else []
        return code, lines, said.out if code == 0 else said.err

    return run


@pytest.mark.parametrize(("names", "form"), [("text", "run"), ("text,hidden", "folder")])
def test_scores_are_the_rewards(names, form, base, tmp_path, score):
    reward, groups = learned(base, tmp_path / "run", names)
    code, lines, said = score("--reward", tmp_path / "run" / ("reward" if form == "folder" else ""), "--explain", 3)
    assert code == 0, said
    found = [answer["reward"] for line in lines for answer in line["completions"]]
    assert found == pytest.approx(reward.score(groups).tolist(), abs=1e-4)
    told = [answer["explanation"] for line in lines for answer in line["completions"]]
    for group, spoken in zip(groups, told, strict=True):
        assert len(spoken) == 3
        assert [said["contribution"] for said in spoken] == pytest.approx(
            [said.contribution for said in reward.explain(group, 0, top=3)], abs=1e-4
        )


def test_what_is_told_is_escaped(base, tmp_path, score):
    """The answers hold what rich would read as markup."""
    learned(base, tmp_path / "run", "text")
    code, lines, said = score("--reward", tmp_path / "run", "--explain", 500)
    assert code == 0, said
    assert "row 1, demonstration: [b]0[/b]" in said
    assert "contribution" in said
    assert "2 further answers are explained in the file" in said
    bracketed = [spoken["feature"] for spoken in lines[0]["completions"][0]["explanation"] if "[" in spoken["feature"]]
    assert bracketed
    assert bracketed[0] in said


def test_without_the_flag_nothing_is_explained(base, tmp_path, score):
    learned(base, tmp_path / "run", "text")
    _, lines, said = score("--reward", tmp_path / "run")
    assert "explanation" not in lines[0]["completions"][0]
    assert "contribution" not in said
    assert max(answer["tokens"] for line in lines for answer in line["completions"]) <= 9  # as the reward was learned


def test_logp_needs_the_policy(base, tmp_path, score):
    reward, groups = learned(base, tmp_path / "run", "text,logp")
    code, _, said = score("--reward", tmp_path / "run")
    assert code == 2
    assert "'logp' need a model" in said
    assert "--logp_model" in said
    code, lines, said = score("--reward", tmp_path / "run", "--logp_model", base)
    assert code == 0, said
    found = [answer["reward"] for line in lines for answer in line["completions"]]
    assert found == pytest.approx(reward.score(groups).tolist(), abs=1e-3)


@pytest.mark.parametrize("args", [("--explain", "3"), ("--base_model", "BASE"), ("--logp_model", "BASE")])
def test_flags_of_feature_rewards_alone(args, base, score):
    code, _, said = score("--policy", base, *(str(base) if arg == "BASE" else arg for arg in args))
    assert code == 2
    assert f"field '{args[0][2:]}': applies only to a feature reward." in said


def test_a_number_below_one_is_refused(base, tmp_path, score):
    learned(base, tmp_path / "run", "text")
    code, _, said = score("--reward", tmp_path / "run", "--explain", 0)
    assert code == 2
    assert "must be at least 1" in said
