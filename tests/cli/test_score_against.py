"""tutelage score --against: the win rate of two sets of answers under one reward."""

import json
import re

import pytest
import torch

from tutelage.cli import main
from tutelage.evaluation.win_rate import win_rate
from tutelage.models.loading import load_model
from tutelage.rewards import ExplicitReward
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer

PROMPTS = [f"What is {i} + {i}?" for i in range(8)]
SHORT = [{"prompt": prompt, "completion": f" {i}"} for i, prompt in enumerate(PROMPTS)]
LONG = [{"prompt": prompt, "completion": " The answer is" + f" {i}" * (1 + i % 3)} for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("against")
    tokenizer = tiny_tokenizer("zephyr")
    tiny_model(vocab_size=len(tokenizer), num_hidden_layers=2).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    learned = ExplicitReward.fresh(load_model(str(folder / "base")), shared=False)
    torch.manual_seed(0)
    torch.nn.init.normal_(learned.head.weight)
    learned.save_pretrained(folder / "reward", tokenizer, max_prompt_length=64, max_completion_length=32)
    return folder / "reward"


@pytest.fixture
def score(reward, tmp_path, capsys):
    """The exit code, what was printed or the error, and the lines that were written, of scoring one file against another."""

    def run(rows, against, *args):
        files = []
        for name, data in (("a", rows), ("b", against)):
            files.append(tmp_path / f"{name}.jsonl")
            files[-1].write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
        output = tmp_path / "scored.jsonl"
        output.unlink(missing_ok=True)
        scorer = [] if "--policy" in args else ["--reward", reward]
        command = ["score", *scorer, "--dataset_name", files[0], "--output", output]
        command += ["--against", files[1]] if against else []
        capsys.readouterr()
        code = main([str(part) for part in [*command, *args]])
        shown, error = capsys.readouterr()
        lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else None
        return code, shown if code == 0 else error, lines

    return run


def test_win_rate_of_two_files(score):
    """Rewards are those of scoring each alone, rows are matched by number, and the printed rates are theirs."""
    code, shown, lines = score(LONG, SHORT)
    assert code == 0
    alone = {name: score(rows, [])[2] for name, rows in (("long", LONG), ("short", SHORT))}
    rewards = {name: [[line["completions"][0]["reward"]] for line in found] for name, found in alone.items()}
    lengths = {name: [line["completions"][0]["tokens"] for line in found] for name, found in alone.items()}
    for line, own, other in zip(lines, rewards["long"], rewards["short"], strict=True):
        assert [line["completions"][0]["reward"]] == [pytest.approx(own[0], abs=1e-4)]
        assert [line["against"][0]["reward"]] == [pytest.approx(other[0], abs=1e-4)]
    expected = win_rate(rewards["long"], rewards["short"], lengths["long"], lengths["short"])
    assert float(re.search(r"win rate: (\S+)", shown).group(1)) == pytest.approx(expected.raw.mean, abs=1e-3)
    if expected.controlled:
        at_equal = float(re.search(r"win rate at equal length: (\S+)", shown).group(1))
        assert at_equal == pytest.approx(expected.controlled.rate.mean, rel=1e-3)
    assert "against" in shown


@pytest.mark.parametrize("by", ["reward", "policy"])
def test_against_itself_is_one_half(by, score, reward, tmp_path):
    """An answer that both files have is a tie, however passes of other batches round."""
    rows = [{"prompt": f"What is {i}?", "completion": " The answer is" + f" {i}" * (1 + i % 7)} for i in range(40)]
    arguments = []
    if by == "policy":
        tiny_model(vocab_size=len(tiny_tokenizer("zephyr")), num_hidden_layers=2, seed=1).save_pretrained(
            tmp_path / "policy"
        )
        tiny_tokenizer("zephyr").save_pretrained(tmp_path / "policy")
        arguments = ["--policy", tmp_path / "policy", "--reference", reward.parent / "base"]
    code, shown, lines = score(rows, rows, *arguments)
    assert code == 0
    assert "win rate: 0.5 [0.5, 0.5], 40 rows" in shown
    assert all(line["completions"][0]["reward"] == line["against"][0]["reward"] for line in lines)


def test_rows_without_counterpart_are_told(score):
    code, shown, lines = score(LONG[:6], SHORT)
    assert (code, len(lines)) == (0, 6)
    assert "2 of 8 rows have no counterpart" in shown


@pytest.mark.parametrize(
    ("against", "words"),
    [
        (SHORT[:-1], ["b.jsonl", "row 8", "missing"]),
        (
            [*SHORT[:-1], {"prompt": "Another?", "completion": " 7"}],
            ["b.jsonl", "row 8", "'prompt'", "another prompt"],
        ),
        ([*SHORT[:-1], {"prompt": PROMPTS[7], "completion": ""}], ["b.jsonl", "row 8", "'completion'"]),
        ([{"prompt": p, "chosen": " 4", "rejected": " 5"} for p in PROMPTS], ["b.jsonl", "row 1", "no sample"]),
    ],
)
def test_refusals(score, against, words):
    code, error, lines = score(LONG, against)
    assert (code, lines) == (2, None)
    (line,) = error.strip().splitlines()
    assert all(word in line for word in words), line
