"""tutelage extrapolate: what is written is what was measured, the best α is chosen, and a killed command loses nothing."""

import json
import os
import signal
import sys
from shutil import copytree

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutelage.cli import main
from tutelage.cli.extrapolating import best_alpha
from tutelage.evaluation.policy import EvaluationSet
from tutelage.files import size_and_hash
from tutelage.models.loading import load_model, load_tokenizer
from tutelage.report.charts import over_alpha
from tutelage.report.extrapolation import Extrapolated, extrapolation_page
from tutelage.results import Interval
from tutelage.rewards import ExplicitReward
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer

EVIL = "<script>[red]x[/red]"
LENGTH = 6


def moved(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A start, a model and an adapter trained from it, and rows."""
    folder, tokenizer = tmp_path_factory.mktemp("extrapolate"), tiny_tokenizer("zephyr")
    size = {"vocab_size": len(tokenizer), "num_hidden_layers": 2}
    tiny_model(**size).save_pretrained(folder / "start")
    moved(tiny_model(**size), 1).save_pretrained(folder / "aligned")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "start"), config)
    moved(adapter, 2)  # the frozen base in memory too; what is saved is the adapter
    adapter.save_pretrained(folder / "adapter")
    for name in ("start", "aligned", "adapter"):
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"What is {i} + {i}?", "completion": " The answer"} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def command(capsys):
    """Runs the command; returns the exit code and everything it printed."""

    def call(*args):
        capsys.readouterr()
        code = main(["extrapolate", *map(str, args)])
        return code, "".join(capsys.readouterr())

    return call


def models(made, aligned="aligned"):
    return "--start", made / "start", "--aligned", made / aligned


def choosing(made, alphas="0.5,2"):
    return "--alphas", alphas, "--dataset_name", made / "rows.jsonl", "--max_completion_length", LENGTH


def few_words(answer, row):
    """A verifier."""
    return 1.0 / (1 + len(answer.split()))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 19).reshape(2, 8)).logits


def test_one_alpha(command, made, tmp_path):
    out = tmp_path / "out"
    code, shown = command(*models(made), "--alpha", 0.5, "--output_dir", out)
    assert code == 0, shown
    start, aligned, found = (
        AutoModelForCausalLM.from_pretrained(path) for path in (made / "start", made / "aligned", out)
    )
    with torch.no_grad():
        for parameter, other in zip(aligned.parameters(), start.parameters(), strict=True):
            parameter += 0.5 * (parameter - other)
    torch.testing.assert_close(logits(found), logits(aligned))
    assert (
        AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(made / "aligned").get_vocab()
    )
    record = json.loads((out / "extrapolation.json").read_text(encoding="utf-8"))
    assert record["alpha"] == 0.5
    assert record["start"] == {
        "name": str(made / "start"),
        "files": {"model.safetensors": size_and_hash(made / "start" / "model.safetensors")},
    }
    assert record["written"] == {"model.safetensors": size_and_hash(out / "model.safetensors")}
    assert "selection" not in record
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "α = 0.5" in card
    assert not (out / "extrapolation.html").exists()
    assert {path.name for path in out.iterdir()} == {
        *(
            "README.md",
            "extrapolation.json",
            "made.json",
            "model.safetensors",
            "config.json",
            "generation_config.json",
        ),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }


def test_alpha_is_chosen_by_the_verifier(command, made, tmp_path):
    out = tmp_path / "out"
    args = *models(made), *choosing(made, "-1,0.5,2"), "--verifier", f"{__name__}:few_words", "--eval_samples", 2
    code, shown = command(*args, "--select", "--output_dir", out)
    assert code == 0, shown
    record = json.loads((out / "extrapolation.json").read_text(encoding="utf-8"))
    found = record["selection"]["candidates"]
    assert record["selection"]["by"] == "score"
    assert [each["alpha"] for each in found] == [-1, 0, 0.5, 2], "the aligned model is always there"
    best = max(found, key=lambda each: each["measures"]["score"]["mean"])
    assert record["alpha"] == best["alpha"]
    assert set(best["measures"]) == {"log_prob", "score", "greedy_score", "kl"}
    assert found[0]["measures"]["kl"]["mean"] == pytest.approx(0, abs=1e-5), "at -1 it is the start"
    assert found[1]["gain"] is None
    difference = found[2]["measures"]["score"]["mean"] - found[1]["measures"]["score"]["mean"]
    assert found[2]["gain"]["mean"] == pytest.approx(difference, abs=1e-9)
    assert all(0 < each["length"] <= LENGTH for each in found)
    page = (out / "extrapolation.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "mean length, tokens" in page
    assert "score at temperature 1" in shown
    alone = tmp_path / "alone"
    assert command(*models(made), f"--alpha={best['alpha']}", "--output_dir", alone)[0] == 0
    assert (alone / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_what_is_measured_is_the_model_at_alpha(command, made, tmp_path, monkeypatch):
    """The log-prob of the demonstrations under weights extrapolated by hand."""
    out, seen = tmp_path / "out", []
    evaluate = EvaluationSet.evaluate

    def kept(self, model, **options):
        seen.append((self, {name: value.clone() for name, value in model.state_dict().items()}))
        return evaluate(self, model, **options)

    monkeypatch.setattr(EvaluationSet, "evaluate", kept)
    assert command(*models(made), *choosing(made), "--output_dir", out)[0] == 0
    start, aligned = (load_file(made / name / "model.safetensors") for name in ("start", "aligned"))
    found = json.loads((out / "extrapolation.json").read_text(encoding="utf-8"))["selection"]
    assert found["by"] == "log_prob"
    for (rows, state), alpha, told in zip(seen, (0.0, 0.5, 2.0), found["candidates"], strict=True):
        for name, value in aligned.items():
            torch.testing.assert_close(state[name], value + alpha * (value - start[name]))
        model = AutoModelForCausalLM.from_pretrained(made / "start")
        model.load_state_dict(state)
        logps = []
        for group in rows.groups:
            ids = torch.tensor([group.prompt_ids + group.completions[0].token_ids])
            with torch.no_grad():
                given = model(input_ids=ids).logits[0].log_softmax(-1)
            first = len(group.prompt_ids)
            logps.append(sum(given[place - 1, ids[0, place]].item() for place in range(first, ids.shape[1])))
        assert told["measures"]["log_prob"]["mean"] == pytest.approx(sum(logps) / len(logps), abs=1e-3)


@pytest.fixture(scope="module")
def reward(made, tmp_path_factory):
    """A reward on the model's body, as good as random."""
    folder = tmp_path_factory.mktemp("reward") / "reward"
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    learned = ExplicitReward.fresh(get_peft_model(load_model(str(made / "start")), lora), shared=True)
    torch.nn.init.normal_(learned.head.weight)
    tokenizer = load_tokenizer(str(made / "start"))
    learned.save_pretrained(folder, tokenizer, max_prompt_length=64, max_completion_length=LENGTH)
    return folder


def test_alpha_is_chosen_by_a_reward(command, made, tmp_path, reward, monkeypatch):
    out, seen = tmp_path / "out", []
    evaluate = EvaluationSet.evaluate

    def kept(self, model, **options):
        seen.append((self.groups, evaluate(self, model, **options)))
        return seen[-1][1]

    monkeypatch.setattr(EvaluationSet, "evaluate", kept)
    args = *models(made), *choosing(made, "-0.5,1"), "--reward", reward, "--eval_samples", 2
    code, shown = command(*args, "--output_dir", out)
    assert code == 0, shown
    record = json.loads((out / "extrapolation.json").read_text(encoding="utf-8"))
    assert record["selection"]["by"] == "reward"
    learned, means = ExplicitReward.from_pretrained(str(reward)), []
    for groups, found in seen:
        assert found.sampled is not None
        answers = [group.select(()) for group in groups]
        means.append(learned.score(found.sampled.added_to(answers)).mean().item())
    told = [each["measures"]["reward"]["mean"] for each in record["selection"]["candidates"]]
    assert told == pytest.approx(means, abs=1e-3)
    assert record["alpha"] == (-0.5, 0, 1)[means.index(max(means))]


def test_an_adapter_on_the_start(command, made, tmp_path):
    out = tmp_path / "out"
    code, shown = command(*models(made, "adapter"), *choosing(made, "-0.5,1"), "--output_dir", out)
    assert code == 0, shown
    record = json.loads((out / "extrapolation.json").read_text(encoding="utf-8"))
    state, source = (load_file(path / "adapter_model.safetensors") for path in (out, made / "adapter"))
    for name, value in source.items():
        torch.testing.assert_close(state[name], value * (1 + record["alpha"]) if "lora_B" in name else value)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made / "start"), out)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--alpha", "nan"), "field 'alpha': must be"),
        (("--alpha", "x"), "field 'alpha': must be"),
        (("--alphas", "0.5,x"), "field 'alphas': must be"),
        (("--alphas", "0"), "field 'alphas': must be numbers to choose from"),
        ((), "one of the arguments --alpha --alphas is required"),
        (("--alpha", "1", "--alphas", "1,2"), "not allowed with"),
        (("--alpha", "1", "--select"), "field 'select': has an effect with --alphas alone"),
        (("--alpha", "1", "--dataset_name", "ROWS"), "field 'dataset_name': has an effect with --alphas alone"),
        (("--alphas", "1,2"), "field 'dataset_name': α is chosen on validation rows"),
        (("--alphas", "1,2", "--dataset_name", "ROWS", "--select", "score"), "there is no verifier to select by"),
        (("--alphas", "1,2", "--dataset_name", "ROWS", "--select", "reward"), "there is no reward to select by"),
        (("--alphas", "1,2", "--dataset_name", "ROWS", "--select", "best"), "invalid choice"),
        (("--alpha", "1", "--dtype", "float8"), "invalid choice"),
        (("--alpha", "1", "--aligned", "NOTHING"), "field 'aligned': no such folder"),
    ],
)
def test_arguments_are_refused_before_anything_is_loaded(command, made, tmp_path, args, said):
    places = {"ROWS": made / "rows.jsonl", "NOTHING": tmp_path / "none" / "x"}
    code, shown = command(*models(made), "--output_dir", tmp_path / "out", *(places.get(arg, arg) for arg in args))
    assert code == 2
    assert said in shown.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_models_that_do_not_fit(command, made, tmp_path):
    copytree(made / "start", tmp_path / "start")
    path = tmp_path / "start" / "model.safetensors"
    state = load_file(path)
    save_file({**state, "model.norm.weight": torch.full((32,), torch.nan)}, path, metadata={"format": "pt"})
    out = tmp_path / "out"
    args = "--start", tmp_path / "start", "--aligned", made / "aligned", "--output_dir", out, "--alpha", 0.5
    code, shown = command(*args)
    assert code == 2
    assert "model.norm.weight holds NaN" in shown
    assert not (out / "config.json").exists()
    save_file(state, path, metadata={"format": "pt"})
    assert command(*args)[0] == 0, "the folder of a command that failed may be used again"


def test_tokens_with_other_numbers(command, made, tmp_path):
    copytree(made / "start", tmp_path / "start")
    path = tmp_path / "start" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    first, second = (token for token in vocab if vocab[token] in (20, 21))
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(content), encoding="utf-8")
    args = (
        "--start",
        tmp_path / "start",
        "--aligned",
        made / "aligned",
        "--output_dir",
        tmp_path / "out",
        "--alpha",
        0.5,
    )
    code, shown = command(*args)
    assert code == 2
    assert "has the number" in shown
    assert "in the start and" in shown


# --- the folder --------------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_or_replaced_without_what_others_made(command, made, tmp_path):
    out = tmp_path / "out"
    args = *models(made), "--output_dir", out
    assert command(*args, *choosing(made))[0] == 0
    assert (out / "extrapolation.html").exists()
    before = (out / "model.safetensors").read_bytes()
    code, shown = command(*args, "--alpha", 1)
    assert code == 2
    assert "not empty" in shown
    assert "--overwrite_output_dir" in shown
    assert (out / "model.safetensors").read_bytes() == before
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    assert command(*args, "--alpha", 1, "--overwrite_output_dir")[0] == 0
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert not (out / "extrapolation.html").exists(), "of the model that is gone"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"mine")
    code, shown = command(*models(made), "--output_dir", tmp_path / "mine", "--alpha", 1, "--overwrite_output_dir")
    assert code == 2
    assert "no run of tutelage wrote this file" in shown
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == b"mine"
    for name in ("start", "aligned"):
        code, shown = command(*models(made), "--output_dir", made / name, "--alpha", 1, "--overwrite_output_dir")
        assert code == 2
        assert "the command reads it" in shown


def killed(args, at, folder):
    """Runs the command in a process that dies at the given write below a folder; whether it died."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event, given):
            nonlocal seen
            is_write = event in ("os.rename", "os.mkdir", "os.remove") or (
                event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if is_write and str(given[0]).startswith(str(folder)):
                seen += 1
                if seen == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        os._exit(main([str(arg) for arg in ("extrapolate", *args)]))
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_killed_at_any_write_it_leaves_no_half_model_and_may_run_again(command, made, tmp_path):
    args = *models(made), "--alpha", 0.5
    whole = tmp_path / "whole"
    assert command(*args, "--output_dir", whole)[0] == 0
    expected = {
        path.name: path.read_bytes() for path in whole.iterdir() if path.name not in ("README.md", "made.json")
    }
    kills = 0
    for at in range(2, 60, 4):
        out = tmp_path / f"out-{at}"
        if not killed((*args, "--output_dir", out), at, out):
            break
        kills += 1
        if (out / "config.json").exists():
            assert {name for name in expected if not (out / name).exists()} <= {"config.json"}, "it is written last"
        code, shown = command(*args, "--output_dir", out)
        if code == 2:
            assert (out / "config.json").exists(), f"killed at write {at}:\n{shown}"
            assert "not empty" in shown, "it was killed after its end"
        assert {name: (out / name).read_bytes() for name in expected} == expected
        assert not (out / ".writing").exists() or code == 2
    assert kills >= 7


# --- choosing, and the page --------------------------------------------------------------------------------------------


def measured(alpha, mean, **others):
    return Extrapolated(alpha, {"score": Interval(mean, mean - 0.1, mean + 0.1, 8)}, **others)


def test_the_best_alpha():
    assert best_alpha([measured(0.0, 0.5), measured(0.5, 0.7), measured(1.0, 0.6)], "score") == 0.5
    assert best_alpha([measured(-1.0, 0.7), measured(0.5, 0.7), measured(2.0, 0.7)], "score") == 0.5, (
        "nearest to aligned"
    )
    assert best_alpha([Extrapolated(0.0, {}), measured(1.0, 0.1)], "score") == 1.0, "one that has no mean is left out"
    with pytest.raises(ValueError, match="nothing to choose"):
        best_alpha([Extrapolated(0.0, {})], "score")


def test_the_page_escapes_and_says_what_was_gained():
    found = [
        measured(0.0, 0.5, length=4.0),
        measured(0.5, 0.7, gain=Interval(0.2, 0.1, 0.3, 8), length=6.5, truncated=0.25),
    ]
    page = extrapolation_page(found, chosen=0.5, by="score", title=EVIL, meta=f"start {EVIL}")
    assert "<script" not in page
    assert page.count("&lt;script&gt;[red]x") == 3
    assert "0.200 more than the aligned model" in page
    assert "too good by what choosing on these rows adds" in page
    assert "6.5" in page
    assert "none that was tried does better" in extrapolation_page(found, chosen=0.0, by="score", title="", meta="")


def test_the_curve_has_the_length_beside_it():
    values = [Interval(mean, mean - 1, mean + 1, 4) for mean in (1.0, 3.0, 2.0)]
    drawn = over_alpha([0.0, 0.5, 1.0], values, [3.0, 4.0, 5.0], 0.5)
    assert "mean length" in drawn
    assert "mean length" not in over_alpha([0.0, 0.5, 1.0], values, [None] * 3, 0.5)
    assert drawn != over_alpha([0.0, 0.5, 1.0], values, [3.0, 4.0, 5.0], 1.0), "the ring"
    assert "NaN" not in over_alpha([0.0, 0.5, 1.0], values, [3.0, None, 5.0], 0.5)
