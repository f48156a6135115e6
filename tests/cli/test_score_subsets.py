"""tutelage score: pairs with a subset, and lists of chosen and rejected answers, as in RewardBench and RewardBench 2."""

import csv
import json
import re

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tutelage.cli import main
from tutelage.data import Tokenization
from tutelage.evaluation.reward_bench import TiesRow, ties_score
from tutelage.groups import Role
from tutelage.models.loading import load_model, load_tokenizer
from tutelage.rewards import ExplicitReward
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer

ANSWERS = [" 4", " 5", " The answer is 6", " Yes, and no."]
PAIRS = [
    {"prompt": f"What is {i} + {i}?", "chosen": ANSWERS[i % 4], "rejected": ANSWERS[(i + 1) % 4], "subset": subset}
    for i, subset in enumerate(["donotanswer", "mine\x1b[31m", "donotanswer", "mine\x1b[31m", "hep-go", "hep-go"])
]
LISTS = [
    {"id": f"{i}", "prompt": f"What is {i}?", "chosen": [ANSWERS[i % 4]], "rejected": ANSWERS[:i] + ANSWERS[i + 1 :]}
    | {"subset": "Math"}
    for i in range(4)
]
TIES = [
    {"id": f"{kind}:{i}", "prompt": f"Name {i}", "chosen": ANSWERS[:right], "rejected": ANSWERS[right:]}
    | {"subset": "Ties"}
    for i in (7, 8)
    for kind, right in (("ref", 1), ("tied", 2))
]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subsets")
    tokenizer = tiny_tokenizer("zephyr")
    tiny_model(vocab_size=len(tokenizer), num_hidden_layers=2).save_pretrained(folder / "base")
    learned = ExplicitReward.fresh(load_model(str(folder / "base")), shared=False)
    torch.manual_seed(0)
    torch.nn.init.normal_(learned.head.weight)
    learned.save_pretrained(folder / "reward", tokenizer, max_prompt_length=64, max_completion_length=32)
    return folder / "reward"


@pytest.fixture
def score(reward, tmp_path, capsys):
    """The exit code, what was printed or the error, and the lines that were written."""

    def run(rows, *args):
        data, output = tmp_path / "data.jsonl", tmp_path / "out" / "scored.jsonl"
        output.unlink(missing_ok=True)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        capsys.readouterr()
        command = ["score", "--reward", reward, "--dataset_name", data, "--output", output, *args]
        code = main([str(part) for part in command])
        shown, error = capsys.readouterr()
        lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else None
        return code, shown if code == 0 else error, lines

    return run


@pytest.fixture(scope="module")
def truth(reward):
    """The reward of an answer as transformers gives it."""
    model = AutoModelForSequenceClassification.from_pretrained(reward)
    tokens = Tokenization(load_tokenizer(str(reward)), max_completion_length=32)

    def of(prompt, answer):
        ids = tokens.prompt_ids(prompt) + tokens.completion(prompt, answer, Role.SAMPLE).token_ids
        return model(torch.tensor([ids])).logits.item()

    return of


def row_of(shown, name):
    """The cells of a subset in the table."""
    (line,) = [line for line in shown.splitlines() if name in line and "│" in line]
    return [cell.strip() for cell in line.strip()[1:-1].split("│")]


def test_pairs_by_subset_and_section(score, truth):
    code, shown, lines = score(PAIRS)
    assert code == 0
    assert [line["subset"] for line in lines] == [row["subset"] for row in PAIRS]
    wins = [truth(row["prompt"], row["chosen"]) > truth(row["prompt"], row["rejected"]) for row in PAIRS]
    for name, section in (("donotanswer", "Safety"), ("hep-go", "Reasoning"), ("mine", None)):
        of_subset = [won for won, row in zip(wins, PAIRS, strict=True) if row["subset"].startswith(name)]
        _, measure, found, _, rows, left_out = row_of(shown, name)
        assert (measure, found, rows, left_out) == ("pairs", f"{sum(of_subset) / 2:.3f}", "2", "")
        if section:
            assert f"{section}: {sum(of_subset) / 2:.3f} (not all" in shown
    assert "\x1b[31m" not in shown
    assert "mean of its sections" not in shown


def test_best_of_four_and_ties(score, truth):
    code, shown, lines = score([*LISTS, *TIES])
    assert code == 0
    assert [found["role"] for found in lines[-1]["completions"]] == ["preferred"] * 2 + ["rejected"] * 2
    rewards = [[truth(row["prompt"], text) for text in (*row["chosen"], *row["rejected"])] for row in LISTS]
    best = sum(found[0] == max(found) for found in rewards) / 4
    assert row_of(shown, "Math")[1:3] == ["best of 4", f"{best:.3f}"]
    kinds = {"ref": {}, "tied": {}}
    for row in TIES:
        kind, key = row["id"].split(":")
        sides = [[truth(row["prompt"], text) for text in row[side]] for side in ("chosen", "rejected")]
        kinds[kind][key] = TiesRow(*sides)
    ties = ties_score(kinds["ref"], kinds["tied"])
    assert row_of(shown, "Ties")[1:4] == ["ties", f"{ties:.3f}", "–"]
    assert float(re.search(r"mean of the subsets: (\S+)", shown).group(1)) == pytest.approx(
        (best + ties) / 2, abs=1e-3
    )


def test_lists_without_subsets_are_scored_too(score):
    code, shown, lines = score([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in LISTS])
    assert code == 0
    assert "accuracy, preferred over rejected" in shown
    assert "by subset" not in shown
    assert "subset" not in lines[0]


def test_rows_that_say_nothing_are_counted(score):
    """After truncation to two tokens both answers of the second row are the same."""
    rows = [PAIRS[0], PAIRS[2] | {"chosen": " The answer is 6", "rejected": " The answer is 7"}]
    code, shown, _ = score(rows, "--max_completion_length", 2)
    assert code == 0
    assert row_of(shown, "donotanswer")[4:] == ["1", "1"]


def test_lists_with_a_right_answer_that_is_wrong_too_say_nothing(score):
    code, shown, _ = score([*LISTS, LISTS[0] | {"rejected": [ANSWERS[0], " 5"]}])
    assert code == 0
    assert row_of(shown, "Math")[4:] == ["4", "1"]


def test_all_left_out_is_shown(score):
    rows = [PAIRS[0] | {"chosen": " The answer is 6", "rejected": " The answer is 7"}]
    code, shown, _ = score(rows, "--max_completion_length", 2)
    assert code == 0
    assert row_of(shown, "donotanswer")[1:] == ["no pairs", "–", "–", "0", "1"]


def test_long_prompts_of_lists_are_told_or_refused(score, caplog):
    long = LISTS[0] | {"prompt": "What? " * 40}
    code, _, lines = score([*LISTS, long], "--max_prompt_length", 30, "--on_long_prompt", "drop")
    assert (code, len(lines)) == (0, 4)
    assert "left out 1 of 5: prompt too long" in caplog.text
    code, error, lines = score([long], "--max_prompt_length", 30, "--on_long_prompt", "drop")
    assert (code, lines) == (2, None)
    assert "no row remains" in error


def test_lists_in_csv_are_refused(reward, tmp_path, capsys):
    """CSV has no lists: they would be scored as texts with brackets."""
    data = tmp_path / "data.csv"
    with data.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*LISTS[0]])
        writer.writeheader()
        writer.writerows(LISTS)
    output = tmp_path / "scored.jsonl"
    command = ["score", "--reward", reward, "--dataset_name", data, "--output", output]
    assert main([str(part) for part in command]) == 2
    error = capsys.readouterr().err
    assert "row 1" in error
    assert "JSON lines or Parquet" in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*PAIRS, PAIRS[0] | {"subset": None}], ["row 7", "'subset'"]),
        ([*PAIRS, PAIRS[0] | {"subset": " "}], ["row 7", "'subset'"]),
        ([*LISTS, LISTS[0] | {"chosen": ANSWERS[:2]}], ["row 5", "'chosen'", "several"]),
        ([*LISTS, TIES[0] | {"id": "3"}], ["row 5", "'id'", "ref:1"]),
        ([*TIES, TIES[0]], ["row 5", "'id'", "another row"]),
        ([*LISTS, LISTS[0] | {"rejected": []}], ["row 5", "'rejected'", "list of texts"]),
        ([*LISTS, LISTS[0] | {"rejected": [" 5", ""]}], ["row 5", "'rejected'", "answer 2"]),
        ([*LISTS, LISTS[0] | {"prompt": ""}], ["row 5", "'prompt'", "empty"]),
    ],
)
def test_refusals(score, rows, words):
    """Before the reward is loaded, and nothing is written."""
    code, error, lines = score(rows)
    assert (code, lines) == (2, None)
    (line,) = error.strip().splitlines()
    assert all(word in line for word in words), line
