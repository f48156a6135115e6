"""Which precision a machine computes in: the rule on given times, memory, CUDA, and what the commands make of it."""

import pytest
import torch

from tutelage.algorithms import SFTConfig
from tutelage.cli.arguments import parse
from tutelage.models import precision
from tutelage.models.loading import load_model
from tutelage.models.precision import ModelSize, choose_precision, given_precision, measure_products, model_size
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer

SIZE = ModelSize(hidden=64, intermediate=128, vocabulary=300, parameters=10**9)


@pytest.fixture
def machine(monkeypatch):
    """A machine whose products take given milliseconds in float32 and in bfloat16, with so much memory."""

    def make(wide, half, memory=10**11):
        times = {torch.float32: wide / 1000, torch.bfloat16: half / 1000}
        monkeypatch.setattr(precision, "measure_products", lambda size, device: times)
        monkeypatch.setattr(precision, "available_memory", lambda device="cpu": memory)

    return make


@pytest.fixture
def saved(tmp_path):
    tokenizer = tiny_tokenizer("gemma3")
    tiny_model("llama", vocab_size=len(tokenizer)).to(torch.bfloat16).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.mark.parametrize(
    ("wide", "half", "chosen"),
    [
        (2.0, 1.0, torch.bfloat16),
        (2.0, 2.3, torch.bfloat16),  # within what noise can do: bfloat16 saves memory
        (2.0, 2.5, torch.float32),
        (2.1, 9.8, torch.float32),
    ],
)
def test_float32_only_where_it_is_clearly_faster(machine, wide, half, chosen):
    machine(wide, half)
    assert choose_precision(SIZE, device="cpu").dtype is chosen


def test_the_reason_tells_the_times(machine):
    machine(2.1, 9.8)
    assert str(choose_precision(SIZE, device="cpu")) == "float32 (a product takes 2.1 ms, in bfloat16 9.8 ms)"
    machine(2.1, 1.0)
    assert str(choose_precision(SIZE, device="cpu")) == "bfloat16 (a product takes 1.0 ms, in float32 2.1 ms)"


@pytest.mark.parametrize(("memory", "chosen"), [(8.1e9, torch.float32), (7.9e9, torch.bfloat16)])
def test_frozen_weights_in_float32_must_fit(machine, memory, chosen):
    """10^9 weights are 4 GB; they may take half of what is free."""
    machine(2.0, 9.0, memory)
    found = choose_precision(SIZE, device="cpu", frozen=True)
    assert found.dtype is chosen
    assert found.weights == ("auto" if chosen is torch.bfloat16 else torch.float32)
    assert ("4.0 GB" in found.reason) == (chosen is torch.bfloat16)
    assert choose_precision(SIZE, device="cpu", frozen=False).dtype is torch.float32


@pytest.mark.parametrize(("supported", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_cuda_cards_are_asked_and_not_timed(monkeypatch, supported, chosen):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card 5")
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: asked.append(including_emulation) or supported,
    )
    monkeypatch.setattr(precision, "measure_products", None)
    found = choose_precision(SIZE, device="cuda")
    assert (found.dtype, asked) == (chosen, [False])
    assert "Card 5" in found.reason


def test_measuring(monkeypatch):
    """Both precisions are timed, large products are cut, the threads are as before, and it happens once."""
    measure_products.cache_clear()
    threads = torch.get_num_threads()
    times = measure_products(ModelSize(10**5, 10**5, 10**6), torch.device("cpu"))
    assert set(times) == {torch.float32, torch.bfloat16}
    assert all(0 < seconds < 5 for seconds in times.values())
    assert torch.get_num_threads() == threads
    assert measure_products(ModelSize(10**5, 10**5, 10**6), torch.device("cpu")) is times


def test_model_size(saved):
    config = tiny_model("llama", vocab_size=len(tiny_tokenizer("gemma3"))).config
    size = model_size(saved)
    assert (size.hidden, size.intermediate, size.vocabulary) == (
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
    )
    assert size.parameters == load_model(saved).num_parameters()
    assert size.stored is torch.bfloat16
    assert model_size(saved + "-not") is None


@pytest.mark.parametrize(
    ("times", "settings", "mixed"),
    [
        ((2.0, 1.0), {}, True),
        ((2.0, 9.0), {}, False),
        ((2.0, 9.0), {"bf16": True}, True),
        ((2.0, 1.0), {"bf16": False}, False),
        ((2.0, 1.0), {"fp16": True}, False),
    ],
)
def test_config(machine, tmp_path, times, settings, mixed):
    machine(*times)
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **settings).bf16 is mixed


@pytest.mark.parametrize(
    ("times", "memory", "args", "computed", "weights", "reason"),
    [
        ((2.0, 1.0), 10**11, ["--use_peft"], torch.bfloat16, torch.bfloat16, "in float32 2.0 ms"),
        ((2.0, 9.0), 10**11, ["--use_peft"], torch.float32, torch.float32, "in bfloat16 9.0 ms"),
        ((2.0, 9.0), 1000, ["--use_peft"], torch.bfloat16, torch.bfloat16, "are free"),
        ((2.0, 9.0), 1000, [], torch.float32, torch.float32, "in bfloat16 9.0 ms"),
        ((2.0, 1.0), 10**11, [], torch.bfloat16, torch.float32, "in float32 2.0 ms"),
        ((2.0, 9.0), 10**11, ["--use_peft", "--bf16"], torch.bfloat16, torch.bfloat16, "as --bf16 says"),
        ((2.0, 1.0), 10**11, ["--use_peft", "--bf16=false"], torch.float32, torch.float32, "as --bf16 says"),
        ((2.0, 9.0), 10**11, ["--dtype", "bfloat16"], torch.bfloat16, torch.bfloat16, "as --dtype says"),
        ((2.0, 1.0), 10**11, ["--dtype", "float32"], torch.bfloat16, torch.float32, "in float32 2.0 ms"),
    ],
)
def test_train_command(machine, saved, tmp_path, times, memory, args, computed, weights, reason):
    """What is computed in, what weights are loaded in, and what the first line says."""
    machine(*times, memory)
    command = ["--model_name_or_path", saved, "--output_dir", str(tmp_path / "out"), "--use_cpu", "--report_to=none"]
    _, model, training = parse("sft", SFTConfig, [*command, *args])
    assert training.computing is computed
    assert model.precision.dtype is computed
    assert reason in model.precision.reason
    assert {p.dtype for p in model.load().parameters()} == {weights}


def test_given():
    assert str(given_precision(torch.float32, "--dtype")) == "float32 (as --dtype says)"
    assert given_precision("auto", "--dtype", torch.float16).dtype is torch.float16


@pytest.mark.parametrize("times", [(2.0, 1.0), (2.0, 9.0)])
def test_evaluate_computes_as_training_does(machine, saved, tmp_path, times, monkeypatch):
    """The log-probs that `tutelage evaluate` finds are those of the training's evaluation, bit by bit."""
    import json

    from tutelage.cli import main

    machine(*times)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} + 1?", "completion": f" {i + 1}"}) + "\n" for i in range(6)))
    common = ["--dataset_name", str(data), "--max_completion_length", "6"]
    out = tmp_path / "out"
    train = ["sft", "--model_name_or_path", saved, *common, "--output_dir", str(out), "--eval_dataset_name", str(data)]
    train += ["--use_peft", "--report_to", "none", "--save_strategy", "no", "--num_train_epochs", "1"]
    assert main([*train, "--use_cpu"]) == 0
    trained = json.loads((out / "results.json").read_text("utf-8"))["evaluation"]["per_row"]["demonstration_logp"]
    assert main(["evaluate", "--model_name_or_path", str(out), *common, "--output_dir", str(tmp_path / "e")]) == 0
    found = json.loads((tmp_path / "e" / "out" / "results.json").read_text("utf-8"))["evaluation"]["per_row"]
    assert found["demonstration_logp"] == pytest.approx(trained, rel=1e-6)


def test_evaluate_takes_both_batch_sizes(saved, tmp_path, monkeypatch):
    import json

    from tutelage.cli import main
    from tutelage.evaluation.policy import EvaluationSet

    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "1 + 1?", "completion": " 2"}) + "\n")
    seen, evaluate = {}, EvaluationSet.evaluate

    def recorded(self, model, **options):
        seen.update(options)
        return evaluate(self, model, **options)

    monkeypatch.setattr(EvaluationSet, "evaluate", recorded)
    command = ["evaluate", "--model_name_or_path", saved, "--dataset_name", str(data), "--output_dir", tmp_path / "e"]
    command += ["--batch_size", 3, "--sampling_batch_size", 5, "--max_completion_length", 4, "--dtype", "float32"]
    assert main([str(arg) for arg in command]) == 0
    assert (seen["batch_size"], seen["sampling_batch_size"]) == (3, 5)
