"""tutelage score: the rewards of demonstrations, preference pairs and recorded samples, and a run folder as a model."""

import json
import re
import shutil
from statistics import fmean

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tutelage.cli import main
from tutelage.data import Tokenization
from tutelage.groups import Completion, Group, Role
from tutelage.models.loading import load_model, load_tokenizer, run_part
from tutelage.rewards import ExplicitReward
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer
from tutelage.training.store import StageStore

SUMS = [
    {"prompt": f"What is {i} + {i}?", "completion": [" ", " The answer is "][i % 2] + f"{2 * i}"} for i in range(6)
]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " Yes, and no."} for row in SUMS]
PAIRS[0] |= {"chosen": PAIRS[0]["rejected"], "rejected": PAIRS[0]["chosen"]}  # so that no random reward wins all
LIMIT = 5  # tokens of a completion, as the rewards were trained


def saved_base(folder, style="zephyr", seed=0):
    tokenizer = tiny_tokenizer(style)
    tiny_model(vocab_size=len(tokenizer), num_hidden_layers=2, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return saved_base(tmp_path_factory.mktemp("score") / "base")


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """A policy without an adapter."""
    return saved_base(tmp_path_factory.mktemp("score") / "other", seed=1)


@pytest.fixture(scope="session")
def run(base, tmp_path_factory):
    """The folder of a run that learned a policy and a reward, as two adapters; nothing may write into it."""
    folder = tmp_path_factory.mktemp("score") / "run"
    tokenizer = load_tokenizer(str(base))
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    policy = get_peft_model(load_model(str(base)), lora)
    policy.save_pretrained(str(folder / "policy"))
    tokenizer.save_pretrained(folder / "policy")
    reward = ExplicitReward.fresh(policy, shared=True, pad_token_id=tokenizer.pad_token_id)
    torch.nn.init.normal_(reward.head.weight)
    reward.save_pretrained(folder / "reward", tokenizer, max_prompt_length=64, max_completion_length=LIMIT)
    return folder


@pytest.fixture(scope="session")
def whole(base, tmp_path_factory):
    """A reward model without an adapter."""
    folder = tmp_path_factory.mktemp("score") / "whole"
    reward = ExplicitReward.fresh(load_model(str(base)), shared=False)
    torch.nn.init.normal_(reward.head.weight)
    reward.save_pretrained(folder, load_tokenizer(str(base)), max_prompt_length=64, max_completion_length=LIMIT)
    return folder


@pytest.fixture
def tutelage(capsys):
    """Runs a command that must succeed; returns what it printed, on one line."""

    def run(*args):
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        shown, error = capsys.readouterr()
        assert code == 0, error
        return " ".join(shown.split())

    return run


@pytest.fixture
def score(tutelage, tmp_path):
    """Scores rows or a file; returns the lines written and what was printed."""

    def run(data, *args):
        output = tmp_path / "new" / "scored.jsonl"
        shown = tutelage("score", "--dataset_name", as_file(tmp_path, data), "--output", output, *args)
        lines = read(output)
        shutil.rmtree(output.parent)
        return lines, shown

    return run


@pytest.fixture
def refusal(capsys, tmp_path):
    """The one line that refuses to score, after which nothing is there."""

    def run(data, *args):
        output = tmp_path / "out" / "scored.jsonl"
        command = ["score", "--dataset_name", as_file(tmp_path, data), "--output", output, *args]
        assert main([str(arg) for arg in command]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("tutelage: error: ")
        assert not output.parent.exists()
        return line

    return run


def as_file(folder, data):
    if not isinstance(data, list):
        return data
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tokenization(folder, max_completion_length=LIMIT):
    return Tokenization(load_tokenizer(str(folder)), max_completion_length=max_completion_length)


def classified(folder):
    """Scores tokens as transformers does it by itself."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    return lambda ids: model(torch.tensor([ids])).logits.item()


def rewards(lines, kind):
    """Of the completions of one kind, a list for each row."""
    return [[found["reward"] for found in line["completions"] if found["role"] == kind] for line in lines]


def singles(lines, kind):
    """Of the one completion of a kind in each row that has one."""
    return [reward for (reward,) in filter(None, rewards(lines, kind))]


def about(values):
    """Their mean, to the digits that are printed."""
    return pytest.approx(fmean(values), rel=1e-3)


def printed(shown, what):
    """A mean and the number of rows it is over."""
    mean, rows = re.search(rf"{what}: (\S+) \[\S+, \S+\], (\d+) rows", shown).groups()
    return float(mean), int(rows)


# --- a learned reward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["run folder", "adapter", "whole"])
def test_explicit_reward_of_demonstrations(form, score, run, whole):
    """As transformers scores the same tokens; how long they may be comes from the reward."""
    folder = whole if form == "whole" else run / "reward"
    lines, shown = score(SUMS, "--reward", run if form == "run folder" else folder, "--batch_size", 4)
    truth, tokens = classified(folder), tokenization(folder)
    assert [line["row"] for line in lines] == list(range(6))
    for line, row in zip(lines, SUMS, strict=True):
        expected = tokens.completion(row["prompt"], row["completion"], Role.DEMONSTRATION)
        (found,) = line["completions"]
        assert line["prompt"] == row["prompt"]
        assert (found["role"], found["text"]) == ("demonstration", tokens.text(expected.token_ids))
        assert (found["finished"], found["tokens"]) == (expected.finished, len(expected.token_ids))
        ids = tokens.prompt_ids(row["prompt"]) + expected.token_ids
        assert found["reward"] == pytest.approx(truth(ids), abs=1e-4)
    assert {line["completions"][0]["finished"] for line in lines} == {True, False}, (
        "the limit cuts some and not others"
    )
    assert "6 rows: " in shown
    assert printed(shown, "mean reward, demonstration") == (about(singles(lines, "demonstration")), 6)
    assert "accuracy" not in shown


def test_given_lengths_go_before_the_rewards(score, run):
    lines, _ = score(SUMS, "--reward", run, "--max_completion_length", 2)
    assert {line["completions"][0]["tokens"] for line in lines} == {2}


def test_preference_pairs(score, run):
    rows = [*PAIRS, {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}]  # the last holds no pair, only a demonstration
    lines, shown = score(rows, "--reward", run)
    truth, tokens = classified(run / "reward"), tokenization(run / "reward")
    for line, row in zip(lines, PAIRS, strict=False):
        assert [found["role"] for found in line["completions"]] == ["preferred", "rejected"]
        for found, text in zip(line["completions"], (row["chosen"], row["rejected"]), strict=True):
            ids = tokens.prompt_ids(row["prompt"]) + tokens.completion(row["prompt"], text, Role.SAMPLE).token_ids
            assert found["reward"] == pytest.approx(truth(ids), abs=1e-4)
    assert [found["role"] for found in lines[-1]["completions"]] == ["demonstration"]
    preferred, rejected = singles(lines, "preferred"), singles(lines, "rejected")
    wins = [better > worse for better, worse in zip(preferred, rejected, strict=True)]
    assert 0 < sum(wins) < 6
    assert printed(shown, "accuracy, preferred over rejected") == (about(wins), 6)
    assert printed(shown, "mean reward, preferred") == (about(preferred), 6)
    assert printed(shown, "mean reward, rejected") == (about(rejected), 6)
    assert printed(shown, "mean reward, demonstration") == (about(singles(lines, "demonstration")), 1)


def test_samples(score, tutelage, run, tmp_path):
    """What `tutelage sample` drew from a run's policy is scored by its tokens, which its text would not give back."""
    samples = tmp_path / "samples.jsonl"
    arguments = ["--dataset_name", as_file(tmp_path, SUMS), "--output", samples, "--num_samples", 3]
    tutelage("sample", "--model_name_or_path", run, "--max_completion_length", 8, *arguments)
    lines, shown = score(samples, "--reward", run)
    truth, tokens = classified(run / "reward"), tokenization(run / "reward", 8)
    changed = 0
    for line, row in zip(lines, read(samples), strict=True):
        demonstration, *drawn = line["completions"]
        assert (line["row"], line["prompt"]) == (row["row"], row["prompt"])
        assert (demonstration["role"], {found["role"] for found in drawn}) == ("demonstration", {"sample"})
        shown_demonstration, *samples_of_row = row["completions"]
        own = truth(row["prompt_ids"] + shown_demonstration["token_ids"])
        assert demonstration["reward"] == pytest.approx(own, abs=1e-4)
        for found, sample in zip(drawn, samples_of_row, strict=True):
            ids, text = sample["token_ids"], sample["text"]
            assert found["finished"] == sample["finished"]
            assert len(sample["token_values"]["sampler_logps"]) == len(ids)
            assert (found["text"], found["tokens"]) == (text, len(ids))
            assert found["reward"] == pytest.approx(truth(row["prompt_ids"] + ids), abs=1e-4)
            changed += tokens.tokenizer(text, add_special_tokens=False)["input_ids"] != ids
    assert changed
    drawn = rewards(lines, "sample")
    assert printed(shown, "mean reward, sample") == (about([fmean(values) for values in drawn]), 6)
    assert printed(shown, "mean reward, best of 3") == (about([max(values) for values in drawn]), 6)


def test_samples_for_prompts_alone(score, tutelage, run, tmp_path):
    samples = tmp_path / "samples.jsonl"
    prompts = as_file(tmp_path, [{"prompt": row["prompt"]} for row in SUMS])
    arguments = ["--dataset_name", prompts, "--output", samples, "--max_completion_length", 6]
    tutelage("sample", "--model_name_or_path", run, *arguments)
    lines, shown = score(samples, "--reward", run)
    assert all([found["role"] for found in line["completions"]] == ["sample"] for line in lines)
    assert "demonstration" not in shown


@pytest.fixture
def stage_file(run, tmp_path):
    """A stage's samples.jsonl as training writes it."""
    tokens = tokenization(run / "reward")
    store = StageStore(tmp_path / "stages", {}, tokens.text)
    store.path(0).mkdir(parents=True)
    samples = Completion((40, 50, 60), Role.SAMPLE, finished=False), Completion((70, 2), Role.SAMPLE, finished=True)
    groups = [
        Group(
            tokens.prompt_ids(row["prompt"]),
            (tokens.completion(row["prompt"], row["completion"], Role.DEMONSTRATION), *samples),
            row=number,
        )
        for number, row in enumerate(SUMS)
    ]
    store.write_groups(0, "samples", groups)
    return store.path(0) / "samples.jsonl", groups


def test_samples_of_a_stage(score, run, stage_file):
    path, groups = stage_file
    lines, shown = score(path, "--reward", run, "--dtype", "float32")
    truth = classified(run / "reward")
    for line, group in zip(lines, groups, strict=True):
        for found, completion in zip(line["completions"], group.completions, strict=True):
            assert (found["role"], found["finished"]) == (completion.role, completion.finished)
            assert found["reward"] == pytest.approx(truth(group.prompt_ids + completion.token_ids), abs=1e-4)
    assert printed(shown, "mean reward, best of 2")[1] == 6


# --- the reward that a policy implies ----------------------------------------------------------------------------------


def logp(model, prompt_ids, token_ids):
    """As transformers counts it by itself."""
    logps = model(torch.tensor([[*prompt_ids, *token_ids]])).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(token_ids)[:, None]).sum().item()


@pytest.mark.parametrize("form", ["run folder", "adapter", "adapter and reference", "whole and reference"])
def test_implicit_reward(form, score, run, base, other, stage_file):
    """β log π/π_0; of an adapter, π_0 is its base unless one is named."""
    path, groups = stage_file
    base_model = AutoModelForCausalLM.from_pretrained(base)
    if form == "whole and reference":
        arguments, policy, reference = (other, "--reference", base), AutoModelForCausalLM.from_pretrained(other), base
    else:
        named = {"run folder": (run,), "adapter": (run / "policy",)}
        reference = base if form in named else other
        arguments = named.get(form, (run, "--reference", other))
        policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(run / "policy"))
    start = base_model if reference == base else AutoModelForCausalLM.from_pretrained(other)
    lines, _ = score(path, "--policy", *arguments, "--beta", 0.5)
    for line, group in zip(lines, groups, strict=True):
        for found, completion in zip(line["completions"], group.completions, strict=True):
            gain = logp(policy, group.prompt_ids, completion.token_ids) - logp(
                start, group.prompt_ids, completion.token_ids
            )
            assert found["reward"] == pytest.approx(0.5 * gain, abs=1e-4)


def test_ties_count_half(score, base):
    """A policy that has not moved implies no reward, so every pair is a tie; β is 0.1 and answers may be long."""
    lines, shown = score(PAIRS, "--policy", base, "--reference", base)
    assert {*singles(lines, "preferred"), *singles(lines, "rejected")} == {0.0}
    assert printed(shown, "accuracy, preferred over rejected") == (0.5, 6)
    assert max(found["tokens"] for line in lines for found in line["completions"]) > LIMIT


def test_beta_scales(score, run):
    tenth, half = (singles(score(SUMS, "--policy", run, *beta)[0], "demonstration") for beta in ((), ("--beta", 0.5)))
    assert half == pytest.approx([5 * reward for reward in tenth], rel=1e-4)


# --- refusals ----------------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "neither": ([], ["--reward --policy", "required"]),
    "both": (["--reward", "RUN", "--policy", "RUN"], ["--policy", "not allowed with", "--reward"]),
    "reward with reference": (["--reward", "RUN", "--reference", "BASE"], ["'reference'", "use --policy"]),
    "reward with beta": (["--reward", "RUN", "--beta", "0.1"], ["'beta'", "use --policy"]),
    "beta 0": (["--policy", "RUN", "--beta", "0"], ["'beta'", "above 0"]),
    "batch of 0": (["--reward", "RUN", "--batch_size", "0"], ["'batch_size'", "at least 1"]),
    "no length": (["--reward", "RUN", "--max_completion_length", "0"], ["'max_completion_length'", "at least 1"]),
    "no such reward": (["--reward", "/no/where"], ["/no/where", "'reward'", "no such folder"]),
    "a language model for a reward": (["--reward", "BASE"], ["'reward'", "not a reward model"]),
    "no such policy": (["--policy", "/no/where"], ["/no/where", "'policy'", "no such folder"]),
    "no such reference": (["--policy", "RUN", "--reference", "/no/where"], ["/no/where", "'reference'"]),
    "no reference": (["--policy", "BASE"], ["'reference'", "Give it (--reference)"]),
    "strange reference": (
        ["--policy", "RUN", "--reference", "STRANGER"],
        ["'reference'", "tokenizer differs from that of"],
    ),
    "long prompt": (["--reward", "RUN", "--max_prompt_length", "2"], ["row 1", "limit is 2", "--max_prompt_length"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case, refusal, run, base, tmp_path):
    arguments, said = BAD_OPTIONS[case]
    folders = {"RUN": run, "BASE": base}
    if "STRANGER" in arguments:
        folders["STRANGER"] = saved_base(tmp_path / "stranger", style="qwen3")
    error = refusal(SUMS, *[folders.get(argument, argument) for argument in arguments])
    for words in said:
        assert words in error


def test_output_in_use(refusal, capsys, run, tmp_path):
    output = tmp_path / "scored.jsonl"
    output.write_text("mine", encoding="utf-8")
    command = ["score", "--reward", run, "--dataset_name", as_file(tmp_path, SUMS), "--output", output]
    assert main([str(arg) for arg in command]) == 2
    assert "'output': the file already exists" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == "mine"


def ids(text):
    return tiny_tokenizer("zephyr")(text, add_special_tokens=False)["input_ids"]


def answer(word, **changes):
    return {"role": "sample", "text": word, "finished": False, "token_ids": ids(word), **changes}


def sampled(*answers, **changes):
    """A line of `tutelage sample`."""
    answers = list(answers) or [answer("is"), answer("the")]
    return {"row": 0, "prompt": "What", "completions": answers, "prompt_ids": ids("What"), **changes}


BAD_DATA = {
    "no rows": ([], ["is empty"]),
    "unknown columns": ([{"query": "2 + 2", "reply": "4"}], ["'query', 'reply'", "prompt + completion"]),
    "empty completion": ([SUMS[0], {"prompt": "2 + 2", "completion": ""}], ["row 2", "'completion'", "is empty"]),
    "samples without prompt_ids": ([sampled(prompt_ids=None)], ["row 1", "'prompt_ids'", "is missing"]),
    "samples without a list": ([sampled(), sampled(completions=None)], ["row 2", "'completions'", "is missing"]),
    "a sample without tokens": ([sampled(answer("is"), answer("", token_ids=[]))], ["row 1", "one token"]),
    "a role that is none": ([sampled(answer("is", role="friend"))], ["row 1", "friend"]),
    "a sample without a text": ([sampled(answer("is"), answer("the", text=None))], ["row 1", "cannot be scored"]),
    "another text": ([sampled(), sampled(answer("is", text="a"))], ["row 2", "do not decode", "same tokenizer"]),
    "a token too high": ([sampled(answer("is", token_ids=[10**6]))], ["row 1", "not in the model's vocabulary"]),
    "a token below 0": ([sampled(answer("is", token_ids=[-1]))], ["row 1", "not in the model's vocabulary"]),
    "words for tokens": ([sampled(answer("is", token_ids=["is"]))], ["row 1", "not in the model's vocabulary"]),
}


def test_what_bad_samples_are_made_from_is_good(score, run):
    (line,), _ = score([sampled()], "--reward", run)
    assert [found["text"] for found in line["completions"]] == ["is", "the"]


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case, refusal, run):
    rows, said = BAD_DATA[case]
    error = refusal(rows, "--reward", run)
    assert "data.jsonl" in error
    for words in said:
        assert words in error


def test_missing_data(refusal, run, tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere.jsonl", "--reward", run)


def test_a_reward_with_broken_weights(refusal, base, tmp_path):
    reward = ExplicitReward.fresh(load_model(str(base)), shared=False)
    torch.nn.init.constant_(reward.head.weight, float("nan"))
    reward.save_pretrained(tmp_path / "broken", load_tokenizer(str(base)))
    error = refusal(SUMS, "--reward", tmp_path / "broken")
    assert "broken" in error
    assert "NaN" in error


# --- the folder of a run with a reward ---------------------------------------------------------------------------------


def test_run_part(run, tmp_path):
    assert run_part(str(run), "policy") == str(run / "policy")
    assert run_part(str(run), "reward") == str(run / "reward")
    assert run_part(str(run / "policy"), "policy") == str(run / "policy")
    assert run_part("gpt2", "policy") == "gpt2"
    (tmp_path / "policy").mkdir()
    (tmp_path / "config.json").write_text("{}")
    assert run_part(str(tmp_path), "policy") == str(tmp_path), "a model of its own goes first"


def test_training_and_evaluation_take_a_run_folder(tutelage, run, base, tmp_path):
    data = as_file(tmp_path, SUMS)
    lengths = ["--dataset_name", data, "--max_completion_length", 6, "--dtype", "float32"]
    tutelage("sft", "--model_name_or_path", run, "--output_dir", tmp_path / "sft", "--bf16", "false", *lengths)
    adapter = json.loads((tmp_path / "sft" / "adapter_config.json").read_text("utf-8"))
    assert (adapter["base_model_name_or_path"], adapter["r"]) == (str(base), 4)
    shown = tutelage("evaluate", "--model_name_or_path", run, "--output_dir", tmp_path / "evaluation", *lengths)
    assert "report: " in shown
    found = json.loads((tmp_path / "evaluation" / "run" / "results.json").read_text("utf-8"))["evaluation"]
    tokens, policy = tokenization(run, 6), load_model(str(run))
    assert isinstance(policy, PeftModel)
    truth = [
        logp(
            policy,
            tokens.prompt_ids(row["prompt"]),
            tokens.completion(row["prompt"], row["completion"], Role.SAMPLE).token_ids,
        )
        for row in SUMS
    ]
    assert found["means"]["demonstration_logp"]["mean"] == pytest.approx(fmean(truth), rel=1e-4)


def test_samples_of_a_padded_vocabulary_are_scored(training, capsys):
    """The model has rows that its tokenizer names no token for, and draws them; its own samples are good ones."""
    model = training.model(vocab_size=len(training.tokenizer) + 40)
    folder = training.folder / "padded"
    model.save_pretrained(folder)
    training.tokenizer.save_pretrained(folder)
    data, drawn, output = (training.folder / name for name in ("rows.jsonl", "drawn.jsonl", "scored.jsonl"))
    data.write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(8)), encoding="utf-8")
    common = ["--dataset_name", str(data), "--max_completion_length", "16"]
    assert main(["sample", "--model_name_or_path", str(folder), *common, "--output", str(drawn)]) == 0
    rows = [json.loads(line) for line in drawn.read_text(encoding="utf-8").splitlines()]
    assert max(token for row in rows for answer in row["completions"] for token in answer["token_ids"]) >= len(
        training.tokenizer
    )
    policies = ["--policy", str(folder), "--reference", str(folder)]
    assert main(["score", *policies, "--dataset_name", str(drawn), "--output", str(output)]) == 0, capsys.readouterr()
    assert len(output.read_text(encoding="utf-8").splitlines()) == 8
    rows[0]["completions"][0]["token_ids"][0] = len(training.tokenizer) + 40
    drawn.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    output.unlink()
    assert main(["score", *policies, "--dataset_name", str(drawn), "--output", str(output)]) == 2
    assert "not in the model's vocabulary" in capsys.readouterr().err
