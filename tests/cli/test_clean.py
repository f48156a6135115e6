"""tutelage clean: corrupted demonstrations come first, kept rows are those that were given, a killed command goes on."""

import json
import os
from functools import partial
from shutil import copytree, rmtree

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tutelage.cli import main
from tutelage.data import Tokenization
from tutelage.data.demonstrations import read_rows
from tutelage.evaluation.cleaning import number_dropped, rank_rows
from tutelage.groups import Completion, Role
from tutelage.models.loading import load_model, load_tokenizer
from tutelage.report.cleaning import WorstRow, cleaning_page
from tutelage.rewards import Comparisons, ExplicitReward, FeatureReward
from tutelage.rewards.base import scores_by_group
from tutelage.rewards.ensemble import write_ensemble
from tutelage.rewards.feature_sets import FeatureParts
from tutelage.rewards.hidden_features import HiddenSource
from tutelage.sampling import SamplingParams, TransformersSampler
from tutelage.scoring.logps import cached_token_logps
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer
from tutelage.training.folds import Folds

CORRUPTED = [3, 10, 11, 17, 22]
EVIL = "<script>[red]x[/red]</script>"


def rows():
    """Answers of one word, some of them replaced; every third row has a further column."""
    made = [{"prompt": f"What is {i} + {i}?", "completion": " The answer"} for i in range(24)]
    wrong = [" 8 7 6 5", f" {EVIL}", " No", " What is is is", " 1 + 1 + 1"]
    for place, completion in zip(CORRUPTED, wrong, strict=True):
        made[place]["completion"] = completion
    for place in range(0, 24, 3):
        made[place]["note"] = f"é {place}"
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("clean") / "tiny", tiny_tokenizer("zephyr")
    tiny_model(vocab_size=len(tokenizer), num_hidden_layers=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()), encoding="utf-8")
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def command(capsys):
    """Runs a command; returns the exit code and everything it printed."""

    def call(*args):
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        return code, "".join(capsys.readouterr())

    return call


def clean(model, data, out, *more, amount=("--drop", 0.25)):
    args = ["clean", data, "--model_name_or_path", model, "--output_dir", out, "--max_completion_length", 8]
    args += ["--dtype", "float32", "--fold_epochs", 12, "--fold_learning_rate", 1e-2, "--fold_batch_size", 4]
    return [*args, *amount, *more]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_corrupted_rows_are_the_worst(command, model, data, out):
    code, shown = command(*clean(model, data, out, "--show", 6))
    assert code == 0, shown
    ranking = lines(out / "ranking.jsonl")
    assert sorted(row["row"] for row in ranking) == list(range(24))
    assert [row["rank"] for row in ranking] == list(range(1, 25))
    values = [row["value"] for row in ranking]
    assert values == sorted(values)
    assert {row["row"] for row in ranking[:5]} == set(CORRUPTED)
    assert values[5] - values[4] > 0.3, "far apart, whatever a processor rounds"
    assert [row["kept"] for row in ranking] == [False] * 6 + [True] * 18
    kept = {row["row"] for row in ranking[6:]}
    given = data.read_text(encoding="utf-8").splitlines()
    assert (out / "kept.jsonl").read_text(encoding="utf-8").splitlines() == [given[row] for row in sorted(kept)]
    assert "18 of 24 demonstrations kept" in shown
    page = (out / "clean.html").read_text(encoding="utf-8")
    assert page.count("<article") == 6
    assert "6 of 24 demonstrations dropped" in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "[red]" in shown.replace("\n", "") or "[re" in shown, "markup of the data is shown as it is"
    assert " The answer" in page, "what the model says instead"


def test_the_values_are_out_of_fold_log_probs_per_token(command, model, data, out, monkeypatch):
    """By the adapter of the fold that a row is in, which was trained on the rows of the other folds alone."""
    trained = {}
    train = Folds._train

    def seen(self, weights, groups, fold, on_step):
        trained[fold] = {group.row for group in groups}
        train(self, weights, groups, fold, on_step)
        trained["folds"] = self

    monkeypatch.setattr(Folds, "_train", seen)
    assert command(*clean(model, data, out, "--num_folds", 3, "--fold_epochs", 1))[0] == 0
    folds = trained.pop("folds")
    assert set(trained) == {0, 1, 2}
    values = {row["row"]: row["value"] for row in lines(out / "ranking.jsonl")}
    for fold, seen_rows in trained.items():
        own = folds.members(fold)
        assert not seen_rows & {group.row for group in own}
        group = own[0]
        ids = torch.tensor([group.prompt_ids + group.completions[0].token_ids])
        with folds.weights(fold).active(), torch.no_grad():
            logps = folds.policy(input_ids=ids).logits[0].log_softmax(-1)
        start = len(group.prompt_ids)
        told = [logps[place - 1, ids[0, place]].item() for place in range(start, ids.shape[1])]
        assert values[group.row] == pytest.approx(sum(told) / len(told), abs=1e-4)


def test_a_killed_command_goes_on(command, model, data, out, monkeypatch):
    """What is trained is not trained again; a finished ranking is cut elsewhere in no time."""
    train = Folds._train

    def dies(self, weights, groups, fold, on_step):
        if fold == 1:
            raise KeyboardInterrupt
        train(self, weights, groups, fold, on_step)

    args = clean(model, data, out, "--fold_epochs", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Folds, "_train", dies)
        assert command(*args)[0] == 130
    assert [path.name for path in sorted(out.iterdir())] == ["folds", "made.json"]
    first = (out / "folds" / "fold-0.safetensors").read_bytes()
    code, shown = command(*args)
    assert code == 2
    assert "not empty" in shown
    assert "--resume" in shown
    assert command(*args, "--resume")[0] == 0
    assert (out / "folds" / "fold-0.safetensors").read_bytes() == first

    whole = lines(out / "ranking.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(Folds, "_train", lambda *args: pytest.fail("trained again"))
        again = clean(model, data, out, "--fold_epochs", 2, "--resume", amount=("--keep", 5))
        assert command(*again)[0] == 0
    assert [row["value"] for row in lines(out / "ranking.jsonl")] == [row["value"] for row in whole]
    assert len(lines(out / "kept.jsonl")) == 5

    before = {path.name: os.stat(path).st_mtime_ns for path in out.iterdir()}
    code, shown = command(*clean(model, data, out, "--resume", "--fold_epochs", 3))
    assert code == 2
    assert "other settings" in shown
    assert {path.name: os.stat(path).st_mtime_ns for path in out.iterdir()} == before
    assert command(*clean(model, data, out, "--overwrite_output_dir", "--fold_epochs", 3))[0] == 0


@pytest.fixture(scope="module")
def reward(model, tmp_path_factory):
    """A reward on the model's body, as good as random."""
    folder = tmp_path_factory.mktemp("clean") / "reward"
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    learned = ExplicitReward.fresh(get_peft_model(load_model(str(model)), lora), shared=True)
    torch.nn.init.normal_(learned.head.weight)
    learned.save_pretrained(folder, load_tokenizer(str(model)), max_prompt_length=64, max_completion_length=8)
    return folder


def test_by_a_reward(command, model, data, out, reward):
    """The demonstration's reward minus that of the greedy answer to the same prompt."""
    code, shown = command(*clean(model, data, out, "--by", "reward", "--reward", reward))
    assert code == 0, shown
    tokenization = Tokenization(load_tokenizer(str(model)), 512, 8)
    policy, learned = load_model(str(model)), ExplicitReward.from_pretrained(str(reward))
    demonstrations = [found for (found,) in read_rows(_Rows(rows()), source="rows")]
    groups = [tokenization.group(found) for found in demonstrations]
    params = SamplingParams(max_completion_length=8, stop_ids=tokenization.stop_ids(False), temperature=0.0)
    drawn = TransformersSampler(policy).sample([group.prompt_ids for group in groups], params)
    both = [
        group.add([Completion(sample.token_ids, Role.SAMPLE, sample.finished)])
        for group, (sample,) in zip(groups, drawn, strict=True)
    ]
    expected = [ours - theirs for ours, theirs in scores_by_group(learned, both)]
    found = {row["row"]: row["value"] for row in lines(out / "ranking.jsonl")}
    assert [found[place] for place in range(24)] == pytest.approx(expected, abs=1e-4)
    assert not (out / "folds").exists()


@pytest.fixture(scope="module")
def runs(model, reward, tmp_path_factory):
    """The folders of runs by what their reward is; those of ensembles are pessimistic."""
    home = tmp_path_factory.mktemp("runs")
    base, tokenization = load_model(str(model)), Tokenization(load_tokenizer(str(model)), 512, 8)
    groups = [
        tokenization.group(found).add(
            [tokenization.completion(found.prompt, text, Role.SAMPLE) for text in (" No", " 1")]
        )
        for found in (found for (found,) in read_rows(_Rows(rows()), source="rows"))
    ]
    parts = FeatureParts(hidden=HiddenSource(lambda: base), logps=lambda found: cached_token_logps(base, found))

    def features(seed, folder):
        learned = FeatureReward.of("text,hidden,logp", parts)
        learned.fit(Comparisons({"own": groups}).resampled(seed), truncated_samples="score")
        learned.save(
            folder, tokenization.tokenizer, base_model=str(model), max_prompt_length=64, max_completion_length=8
        )

    features(0, home / "features" / "reward")
    members = {
        "features": [partial(features, 1), partial(features, 2)],
        "models": [partial(copytree, reward), partial(copytree, reward)],
    }
    for name, writers in members.items():
        write_ensemble(home / f"ensemble of {name}" / "reward", writers, "mean_minus_std")
    return home


@pytest.mark.parametrize("kind", ["features", "ensemble of features", "ensemble of models"])
def test_by_the_reward_of_a_run(command, model, data, out, runs, kind):
    """Of two answers, both lose the same by the members' deviation, so that the difference is that of their mean."""
    code, shown = command(*clean(model, data, out, "--by", "reward", "--reward", runs / kind))
    assert code == 0, shown
    folder = runs / kind / "reward"
    members = sorted(folder.glob("member-*")) or [folder]
    means = {row["row"]: row["value"] for row in lines(out / "ranking.jsonl")}
    assert len(set(means.values())) > 4
    singly = []
    for member in members:
        again = out.with_name(member.name)
        code, shown = command(*clean(model, data, again, "--by", "reward", "--reward", member))
        assert code == 0, shown
        singly.append({row["row"]: row["value"] for row in lines(again / "ranking.jsonl")})
    expected = [sum(values[place] for values in singly) / len(singly) for place in range(24)]
    assert [means[place] for place in range(24)] == pytest.approx(expected, abs=1e-4)


def test_an_ensemble_without_a_member_is_an_error(command, model, data, out, runs, tmp_path):
    copytree(runs / "ensemble of models", tmp_path / "run")
    rmtree(tmp_path / "run" / "reward" / "member-01")
    code, shown = command(*clean(model, data, out, "--by", "reward", "--reward", tmp_path / "run"))
    assert code == 2
    assert "the member is missing" in shown


class _Rows(list):
    column_names = ("prompt", "completion", "note")


BAD = {
    "no amount": ((), [], ["--drop", "--keep"]),
    "two amounts": (("--drop", 0.1, "--keep", 3), [], ["not allowed with"]),
    "all of them": (("--drop", 1), [], ["'drop'", "below 1"]),
    "a negative share": (("--drop", -0.1), [], ["'drop'", "at least 0"]),
    "none kept": (("--keep", 0), [], ["'keep'", "at least 1"]),
    "more than there are": (("--keep", 25), [], ["'keep'", "the number of rows, 24"]),
    "one fold": (("--drop", 0.1), ["--num_folds", 1], ["'num_folds'", "at least 2"]),
    "more folds than prompts": (("--drop", 0.1), ["--num_folds", 25], ["24 different prompts", "25 folds"]),
    "no epochs": (("--drop", 0.1), ["--fold_epochs", 0], ["'fold_epochs'", "above 0"]),
    "rate nan": (("--drop", 0.1), ["--fold_learning_rate", "nan"], ["'fold_learning_rate'", "finite"]),
    "no reward": (("--drop", 0.1), ["--by", "reward"], ["'reward'", "Add --reward"]),
    "a reward for nothing": (("--drop", 0.1), ["--reward", "r"], ["'reward'", "Add --by reward"]),
    "no such reward": (
        ("--drop", 0.1),
        ["--by", "reward", "--reward", "/nowhere/r"],
        ["/nowhere/r", "no such folder"],
    ),
    "negative show": (("--drop", 0.1), ["--show", -1], ["'show'"]),
    "long prompts": (("--drop", 0.1), ["--max_prompt_length", 2], ["row 1", "--max_prompt_length"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(command, model, data, out, case):
    amount, options, said = BAD[case]
    code, shown = command(*clean(model, data, out, *options, amount=amount))
    assert code == 2
    assert "Traceback" not in shown
    for words in said:
        assert words in shown
    assert not out.exists()


def test_a_loss_that_is_no_number_leaves_what_was_trained(command, model, data, out):
    code, shown = command(*clean(model, data, out, "--fold_learning_rate", 1e30))
    assert code == 2
    assert "--fold_learning_rate" in shown
    assert not (out / "kept.jsonl").exists()


def test_rows_left_out_are_counted(command, model, tmp_path, out):
    path = tmp_path / "rows.jsonl"
    long = {"prompt": "What is " + "1 + " * 30 + "1?", "completion": " 31"}
    path.write_text("".join(json.dumps(row) + "\n" for row in [long, *rows()[:6]]))
    args = clean(model, path, out, "--fold_epochs", 1, "--on_long_prompt", "drop", "--max_prompt_length", 40)
    code, shown = command(*args)
    assert code == 0, shown
    assert "1 rows were left out" in shown
    assert 0 not in [row["row"] for row in lines(out / "ranking.jsonl")]


# --- the pure parts ------------------------------------------------------------------------------------------------


def test_shares_round_down():
    assert [number_dropped(n, drop=0.3) for n in (1, 3, 4, 10, 100)] == [0, 0, 1, 3, 30]
    assert number_dropped(7, keep=7) == 0


def test_ties_keep_the_order_of_the_rows():
    found = rank_rows([5, 2, 9], [0.0, 0.0, -1.0], dropped=1)
    assert [(each.row, each.rank, each.kept) for each in found] == [(9, 1, False), (2, 2, True), (5, 3, True)]


def test_a_value_that_is_no_number_has_no_rank():
    with pytest.raises(ValueError, match="row 3"):
        rank_rows([0, 2], [1.0, float("nan")], dropped=0)


def test_the_page_escapes_everything():
    row = WorstRow(0, 1, -2.5, kept=False, prompt=EVIL, demonstration=EVIL, answer=EVIL)
    page = cleaning_page([row], title=EVIL, measure=EVIL, dropped=1, total=2)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 6
