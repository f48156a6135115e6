"""ExPO: the arithmetic by hand, files that transformers and peft load, adapters exactly, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tutelage.errors import UserError
from tutelage.models.extrapolation.arithmetic import Tally, extrapolated
from tutelage.models.extrapolation.finding import find_extrapolation
from tutelage.models.stored import StoredTensor, write_tensors
from tutelage.testing.models import tiny_model

IDS = torch.arange(3, 19).reshape(2, 8)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def write(made, folder, alpha):
    folder.mkdir()
    return made.write(folder, alpha)


def moved(model, seed, size=0.05):
    """The model some way off, as training would leave it; some weights stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            if place % 4 != 3:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def by_hand(start, aligned, alpha):
    """A model whose weights are extrapolated in memory."""
    with torch.no_grad():
        for parameter, other in zip(aligned.parameters(), start.parameters(), strict=True):
            parameter.copy_(parameter + alpha * (parameter - other))
    return aligned


# --- arithmetic --------------------------------------------------------------------------------------------------------


def test_the_formula_and_its_ends():
    start, aligned = torch.tensor([1.0, -2.0, 0.1]), torch.tensor([2.0, -2.0, -0.3])
    assert torch.allclose(extrapolated(aligned, start, 0.5), torch.tensor([2.5, -2.0, -0.5]))
    assert torch.equal(extrapolated(aligned, start, 0.0), aligned)
    assert torch.equal(extrapolated(aligned, start, -1.0), start)
    assert torch.equal(extrapolated(aligned, start, 37.5)[1], aligned[1]), "where both agree nothing moves"


def test_sixteen_bits_are_computed_in_thirty_two():
    """In bfloat16 the step would be lost: 1/256 is the distance of the neighbors of 1."""
    start, aligned = (torch.tensor([value]).to(torch.bfloat16) for value in (1.0, 1.0078125))
    exact = 1.0078125 + 0.3 * 0.0078125
    assert extrapolated(aligned, start, 0.3, torch.float32).item() == pytest.approx(exact, abs=1e-7)
    tally = Tally()
    tally.add(aligned, start, 0.3, extrapolated(aligned, start, 0.3))
    assert tally.rounds
    assert tally.distance == pytest.approx(0.0078125)
    assert tally.rounding == pytest.approx(0.3, rel=1e-4)


def test_a_file_is_what_safetensors_reads(tmp_path):
    values = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "ü": torch.tensor(3),
        "c": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
        "h": torch.randn(3).half(),
    }
    layout = {name: StoredTensor("", value.dtype, tuple(value.shape)) for name, value in values.items()}
    write_tensors(tmp_path / "x.safetensors", layout, lambda name: [values[name]], {"format": "pt"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype is value.dtype
        assert torch.equal(found[name], value)
    save_file(values, tmp_path / "y.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "x.safetensors").stat().st_size == (tmp_path / "y.safetensors").stat().st_size


# --- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("at_once", [None, 100])
def test_logits_are_those_of_weights_extrapolated_by_hand(tmp_path, architecture, at_once, monkeypatch):
    if at_once:
        monkeypatch.setattr(
            "tutelage.models.stored._AT_ONCE", at_once
        )  # several parts per tensor, the last one smaller
    start, aligned = tiny_model(architecture), moved(tiny_model(architecture), 1)
    folders = save(start, tmp_path / "start"), save(aligned, tmp_path / "aligned", max_shard_size="20KB")
    made = find_extrapolation(*map(str, folders))
    tally = write(made, tmp_path / "out", 0.7)
    names = {path.name for path in (tmp_path / "aligned").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names, "as many shards, index and configs"
    assert len(names) > 5
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    pairs = zip(aligned.parameters(), start.parameters(), strict=True)
    assert tally.distance == pytest.approx(sum((a - b).square().sum().item() for a, b in pairs) ** 0.5, rel=1e-5)
    assert not tally.rounds
    expected = by_hand(start, aligned, 0.7)
    torch.testing.assert_close(logits(found), logits(expected))
    assert not torch.allclose(logits(found), logits(start))


def test_the_ends_are_the_two_models_bit_for_bit(tmp_path):
    start, aligned = tiny_model(dtype=torch.float32), moved(tiny_model(), 1).bfloat16()
    save(start, tmp_path / "start")
    save(aligned, tmp_path / "aligned")
    made = find_extrapolation(str(tmp_path / "start"), str(tmp_path / "aligned"))
    for alpha, source, dtype in ((0.0, "aligned", "bfloat16"), (-1.0, "start", "float32")):
        out = tmp_path / f"out{alpha}"
        tally = write(made, out, alpha)
        assert not tally.rounds
        found, expected = load_file(out / "model.safetensors"), load_file(tmp_path / source / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype, "what a loader takes"
    kept = find_extrapolation(str(tmp_path / "start"), str(tmp_path / "aligned"), dtype=torch.bfloat16)
    assert write(kept, tmp_path / "rounded", -1.0).rounds, "said where the start is rounded"


def test_stored_precision_and_another(tmp_path):
    save(tiny_model().bfloat16(), tmp_path / "start")
    save(moved(tiny_model(), 1).bfloat16(), tmp_path / "aligned")
    names = str(tmp_path / "start"), str(tmp_path / "aligned")
    tally = write(find_extrapolation(*names), tmp_path / "same", 0.3)
    assert tally.rounds
    assert 0 < tally.rounding < 0.2
    wide = write(find_extrapolation(*names, dtype=torch.float32), tmp_path / "wide", 0.3)
    assert not wide.rounds
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "same", dtype="auto")
    assert loaded.dtype is torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto").dtype is torch.float32


def test_a_tied_weight_is_stored_once_and_both_ends_move(tmp_path):
    start, aligned = tiny_model("gemma3"), moved(tiny_model("gemma3"), 1)
    save(start, tmp_path / "start")
    save(aligned, tmp_path / "aligned")
    write(find_extrapolation(str(tmp_path / "start"), str(tmp_path / "aligned")), tmp_path / "out", 1.0)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    torch.testing.assert_close(found.lm_head.weight, 2 * aligned.lm_head.weight - start.lm_head.weight)


def test_a_tied_weight_that_one_of_them_stores_twice(tmp_path):
    save(tiny_model("gemma3"), tmp_path / "start")
    save(moved(tiny_model("gemma3"), 1), tmp_path / "aligned")
    path = tmp_path / "start" / "model.safetensors"
    state = load_file(path)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, path, metadata={"format": "pt"})
    names = str(tmp_path / "start"), str(tmp_path / "aligned")
    write(find_extrapolation(*names), tmp_path / "out", 0.5)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"model\.embed_tokens\.weight.*stored with different values|lm_head\.weight.*stored"
    ):
        find_extrapolation(*names)


def test_tied_in_only_one(tmp_path):
    save(tiny_model("llama", tie_word_embeddings=True), tmp_path / "start")
    save(tiny_model("llama", tie_word_embeddings=False), tmp_path / "aligned")
    with pytest.raises(
        UserError, match=r"lm_head\.weight and model\.embed_tokens\.weight are one tensor in the start"
    ):
        find_extrapolation(str(tmp_path / "start"), str(tmp_path / "aligned"))


def test_tokenizers_and_licenses_are_copied_and_pickles_are_not(tmp_path):
    save(tiny_model(), tmp_path / "start")
    aligned = save(moved(tiny_model(), 1), tmp_path / "aligned")
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
        "tokenizer.bin",
        "training_args.bin",
        "results.json",
    ):
        (aligned / name).write_text("x")
    (aligned / "additional_chat_templates").mkdir()
    (aligned / "additional_chat_templates" / "tools.jinja").write_text("y")
    write(find_extrapolation(str(tmp_path / "start"), str(aligned)), tmp_path / "out", 0.5)
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {
        *(
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "chat_template.jinja",
            "LICENSE",
        ),
        "additional_chat_templates/tools.jinja",
    }


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    save(tiny_model(), folder / "start")
    save(moved(tiny_model(), 1), folder / "aligned")
    return folder


def altered(two, tmp_path, change):
    """The two models, the start's weights changed."""
    shutil.copytree(two, tmp_path / "two")
    path = tmp_path / "two" / "start" / "model.safetensors"
    state = change(load_file(path))
    save_file(state, path, metadata={"format": "pt"})
    return str(tmp_path / "two" / "start"), str(tmp_path / "two" / "aligned")


NORM = "model.norm.weight"
BAD = {
    "missing": (lambda s: {k: v for k, v in s.items() if k != NORM}, "model.norm.weight of .* is not in the start"),
    "extra": (lambda s: {**s, "model.extra": torch.ones(2)}, "model.extra of .* is not in the aligned model"),
    "shape": (lambda s: {**s, NORM: torch.ones(31)}, r"model.norm.weight has the shape \[31\], and \[32\]"),
    "integers": (
        lambda s: {**s, NORM: torch.ones(32, dtype=torch.int32)},
        "model.norm.weight is stored as float32 and int32",
    ),
    "float8": (lambda s: {**s, NORM: torch.ones(32).to(torch.float8_e4m3fn)}, "stored as float32 and float8_e4m3fn"),
    "nan": (lambda s: {**s, NORM: torch.full((32,), torch.nan)}, "model.norm.weight holds NaN"),
}


@pytest.mark.parametrize("kind", BAD)
def test_two_that_are_no_states_of_one_model(two, tmp_path, kind):
    change, said = BAD[kind]
    names = altered(two, tmp_path, change)
    with pytest.raises(UserError, match=said):
        write(find_extrapolation(*names), tmp_path / "out", 0.5)


def test_configs_that_differ(two, tmp_path):
    shutil.copytree(two, tmp_path / "two")
    path = tmp_path / "two" / "start" / "config.json"
    config = json.loads(path.read_text())
    names = str(tmp_path / "two" / "start"), str(tmp_path / "two" / "aligned")
    path.write_text(json.dumps({**config, "attention_dropout": 0.3, "eos_token_id": 5, "use_cache": False}))
    find_extrapolation(*names)  # no logit depends on them
    path.write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match=r"the two configs differ: rms_norm_eps is 1e-06 .* and 0\.5"):
        find_extrapolation(*names)
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match="quantized"):
        find_extrapolation(*names)


def test_pickles_damage_and_the_same_model(two, tmp_path):
    shutil.copytree(two, tmp_path / "two")
    names = str(tmp_path / "two" / "start"), str(tmp_path / "two" / "aligned")
    with pytest.raises(UserError, match="its weights are those of the aligned model"):
        write(find_extrapolation(names[1], names[1]), tmp_path / "out", 0.5)
    path = tmp_path / "two" / "start" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors.*cannot be read"):
        find_extrapolation(*names)
    path.unlink()
    (path.parent / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*pickled"):
        find_extrapolation(*names)


def test_buffers_of_integers_are_equal_or_refused(two, tmp_path):
    shutil.copytree(two, tmp_path / "two")
    buffer = torch.arange(3)
    for name in ("start", "aligned"):
        path = tmp_path / "two" / name / "model.safetensors"
        save_file({**load_file(path), "model.steps": buffer}, path, metadata={"format": "pt"})
    names = str(tmp_path / "two" / "start"), str(tmp_path / "two" / "aligned")
    write(find_extrapolation(*names, dtype=torch.bfloat16), tmp_path / "out", 0.5)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.steps"], buffer)
    path = tmp_path / "two" / "start" / "model.safetensors"
    save_file({**load_file(path), "model.steps": buffer + 1}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.steps, which holds no weights but torch\.int64, differs"):
        write(find_extrapolation(*names), tmp_path / "other", 0.5)


def test_what_leaves_the_range_of_the_stored_precision(two, tmp_path):
    made = find_extrapolation(str(two / "start"), str(two / "aligned"), dtype=torch.float16)
    with pytest.raises(UserError, match=r"leaves the range of torch\.float16 at alpha = 1e\+08"):
        write(made, tmp_path / "out", 1e8)


# --- adapters ----------------------------------------------------------------------------------------------------------


def adapter(base, folder, seed, **options):
    """An adapter with random weights on a saved base."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
    )
    made = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.requires_grad:
                size = 0.2 if "lora_" in name else 0.05
                parameter += size * torch.randn(parameter.shape, generator=generator)
    made.save_pretrained(folder)
    return folder


def merged(folder, target):
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return save(model.merge_and_unload(), target)


def loaded(folder):
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(tiny_model("llama", num_hidden_layers=2), tmp_path_factory.mktemp("base") / "base")


KINDS = {
    "lora": {},
    "rslora and patterns": {
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_the_start_is_extrapolated_exactly(base, tmp_path, kind):
    """By its own weights and by whole models it gives the same logits."""
    aligned = adapter(base, tmp_path / "aligned", 1, **KINDS[kind])
    tally = write(find_extrapolation(str(base), str(aligned)), tmp_path / "out", 0.5)
    whole = find_extrapolation(str(base), str(merged(aligned, tmp_path / "merged")))
    other = write(whole, tmp_path / "whole", 0.5)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"))
    found = logits(loaded(tmp_path / "out"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - logits(loaded(aligned))).abs().max() > 0.05
    assert tally.distance == pytest.approx(other.distance, rel=1e-4)
    assert not tally.rounds
    shape = {name: value.shape for name, value in load_file(tmp_path / "out" / "adapter_model.safetensors").items()}
    assert shape == {name: value.shape for name, value in load_file(aligned / "adapter_model.safetensors").items()}
    write(find_extrapolation(str(base), str(aligned)), tmp_path / "zero", 0.0)
    assert (tmp_path / "zero" / "adapter_model.safetensors").read_bytes() == (
        aligned / "adapter_model.safetensors"
    ).read_bytes()
    write(find_extrapolation(str(base), str(aligned)), tmp_path / "one", -1.0)
    assert torch.equal(logits(loaded(tmp_path / "one")), logits(AutoModelForCausalLM.from_pretrained(base)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["alike", "of another rank, elsewhere"])
def test_two_adapters_are_joined_exactly(base, tmp_path, kind, other):
    options = dict(KINDS[kind])
    aligned = adapter(base, tmp_path / "aligned", 1, **options)
    if other != "alike":
        embedding = ["embed_tokens"] if kind == "embedding" else []  # peft then writes the embedding itself too
        options |= {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj", *embedding]}
    start = adapter(base, tmp_path / "start", 2, **options)
    tally = write(find_extrapolation(str(start), str(aligned)), tmp_path / "out", 0.5)
    whole = find_extrapolation(
        str(merged(start, tmp_path / "merged-start")), str(merged(aligned, tmp_path / "merged-aligned"))
    )
    other_tally = write(whole, tmp_path / "whole", 0.5)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"))
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)
    assert tally.distance == pytest.approx(other_tally.distance, rel=1e-4)
    for alpha, source in ((0.0, aligned), (-1.0, start)):
        out = tmp_path / f"end{alpha}"
        write(find_extrapolation(str(start), str(aligned)), out, alpha)
        assert (out / "adapter_model.safetensors").read_bytes() == (source / "adapter_model.safetensors").read_bytes()
        assert torch.equal(logits(loaded(out)), logits(loaded(source)))


def test_adapters_in_sixteen_bits_say_that_they_round(base, tmp_path):
    aligned = adapter(base, tmp_path / "aligned", 1)
    path = aligned / "adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    assert write(find_extrapolation(str(base), str(aligned)), tmp_path / "out", 0.3).rounds
    assert not write(find_extrapolation(str(base), str(aligned), dtype=torch.float32), tmp_path / "wide", 0.3).rounds
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora is True"),
    "bias": ({"bias": "lora_only"}, "bias is lora_only"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights pissa changes the weights of the base"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_are_not_linear(base, tmp_path, kind):
    options, said = REFUSED[kind]
    aligned = adapter(base, tmp_path / "aligned", 1, **options)
    with pytest.raises(UserError, match=said):
        find_extrapolation(str(base), str(aligned))


def test_models_that_do_not_belong_together(base, two, tmp_path):
    aligned = adapter(base, tmp_path / "aligned", 1)
    head = adapter(base, tmp_path / "head", 1, modules_to_save=["lm_head"])
    elsewhere = adapter(two / "start", tmp_path / "elsewhere", 1)
    cases = {
        (two / "start", aligned): "is not the model that the aligned adapter was trained on",
        (aligned, base): "is an adapter, and the aligned model is a whole one",
        (elsewhere, aligned): "is an adapter of another base",
        (head, aligned): r"lm_head\.weight is a weight of its own \(modules_to_save\) in the start alone",
        (aligned, aligned): "its weights are those of the start",
    }
    for number, ((start, other), said) in enumerate(cases.items()):
        with pytest.raises(UserError, match=said):
            write(find_extrapolation(str(start), str(other)), tmp_path / f"out{number}", 0.5)
    assert find_extrapolation(str(base), str(aligned)).files[0] == [base / "model.safetensors"]
    shutil.copytree(base, tmp_path / "moved")
    find_extrapolation(str(tmp_path / "moved"), str(aligned))  # the same weights in another place


def test_a_tied_base_with_a_head_of_its_own_in_the_adapter(tmp_path):
    base = save(tiny_model("llama", tie_word_embeddings=True), tmp_path / "base")
    aligned = adapter(base, tmp_path / "aligned", 1, modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"holds no lm_head\.weight, which the adapter has whole"):
        find_extrapolation(str(base), str(aligned))


def test_an_index_that_names_files_elsewhere(two, tmp_path):
    model = save(tiny_model(), tmp_path / "sharded", max_shard_size="20KB")
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for change, said in (
        (lambda name: "../" + name, "is no index of shards"),
        (
            lambda name: sorted(index["weight_map"].values())[0],
            r"is not in .*where model\.safetensors\.index\.json has it",
        ),
    ):
        path.write_text(json.dumps({"weight_map": {key: change(name) for key, name in index["weight_map"].items()}}))
        with pytest.raises(UserError, match=said):
            find_extrapolation(str(model), str(two / "aligned"))


def test_what_a_folder_is(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_extrapolation(str(tmp_path / "none"), str(tmp_path / "none"))
    assert Path(tmp_path).exists()


def test_hub_names_fetch_safetensors_and_no_pickles(two, tmp_path, monkeypatch):
    asked = []

    def fetch(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(two / name.split("/")[1])

    monkeypatch.setattr("tutelage.models.extrapolation.source.snapshot_download", fetch)
    write(find_extrapolation("someone/start", "someone/aligned"), tmp_path / "out", 0.5)
    assert [name for name, _, _ in asked] == ["someone/start", "someone/aligned"]
    assert "model*.safetensors" in asked[0][2]
    assert not any(pattern.endswith((".bin", ".pt", "*.safetensors*")) or pattern == "*" for pattern in asked[0][2])
