"""Models that compute otherwise beyond some length, or look ahead: right numbers in every batch, or one clear refusal."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    Llama4TextConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    XLMConfig,
)

from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role
from tutelage.models.regimes import rope_switch
from tutelage.sampling import SamplingParams, TransformersSampler, probe
from tutelage.scoring import layout
from tutelage.scoring.layout import probe_facts, probe_layout
from tutelage.scoring.logps import cached_token_logps, completion_token_logps

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def made(config, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, **{"dtype": torch.float32, **options}).eval()


def neo(window=256, **more):
    kinds = [[["global", "local"], 1]]
    size = {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "vocab_size": 97, "initializer_range": 0.2}
    return made(GPTNeoConfig(attention_types=kinds, window_size=window, max_position_embeddings=512, **size, **more))


def longrope(length=64):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 8.0],
        "original_max_position_embeddings": length,
    }
    return made(Phi3Config(**SIZE, original_max_position_embeddings=length, rope_parameters=rope))


def dynamic(length=64):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return made(LlamaConfig(**{**SIZE, "max_position_embeddings": length}, rope_parameters=rope))


def llama4(chunk=16):
    moe = {"num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8, "interleave_moe_layer_step": 2}
    kinds = ["chunked_attention", "full_attention"]
    config = Llama4TextConfig(**SIZE, **moe, attention_chunk_size=chunk, layer_types=kinds, no_rope_layers=[1, 0])
    return made(config)


def groups_of(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(count):
        return tuple(torch.randint(3, 97, (count,), generator=generator).tolist())

    return [
        Group(tokens(prompt), tuple(Completion(tokens(n), Role.SAMPLE, finished=False) for n in lengths))
        for prompt, *lengths in shapes
    ]


@torch.no_grad()
def truth(model, groups):
    """The model's own forward on each sequence alone."""
    found = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt_ids + completion.token_ids])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1]
            found.append(-F.cross_entropy(logits, torch.tensor(completion.token_ids), reduction="none"))
    return torch.cat(found)


@torch.no_grad()
def assert_plain(model, groups):
    torch.testing.assert_close(
        completion_token_logps(model, groups).logps_N, truth(model, groups), atol=2e-5, rtol=1e-5
    )


# --- windows and chunks, whatever they are called ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        # the rows are shorter than the window, and only the row of the shared prefix is longer
        (neo, [(20, 120, 110, 100)]),
        (neo, [(200, 120, 90), (30, 20)]),
        (neo, [(300, 20, 20)]),
        (lambda: neo(16), [(10, 20, 9), (4, 3)]),
        (llama4, [(10, 4, 3)]),
        (llama4, [(10, 4, 12, 30), (3, 5)]),
        (lambda: llama4(64), [(70, 20, 9), (130, 5, 4)]),
    ],
)
def test_any_window_gives_the_plain_models_numbers(model, shapes):
    assert_plain(model(), groups_of(*shapes))


def test_a_window_no_row_reaches_costs_nothing():
    model = neo()
    assert probe_layout(model).layout == "shared_prefix"
    assert probe_layout(model, 100, 256).layout == "shared_prefix"
    assert probe_layout(model, 100, 257).layout == "padded", "the second completion would stand beyond the window"
    assert probe_layout(model, 300, 320).layout == "padded"
    assert probe_layout(model, 100, 200).layout == "shared_prefix", "short rows go on as before"


def test_what_holds_for_one_completion_is_not_taken_to_hold_for_two():
    model = neo()
    for shape in [(300, 20), (300, 20, 20), (300, 20), (20, 120, 110, 100)]:
        assert_plain(model, groups_of(shape))


def test_a_length_is_tried_once(monkeypatch):
    model = neo()
    for _ in range(3):
        for shape in [(300, 20, 20), (310, 11, 9), (5, 5), (100, 20, 20), (300, 20)]:
            completion_token_logps(model, groups_of(shape))
    assert len(probe_facts(model)["layouts"]) <= 5


def test_a_window_of_an_unknown_name_is_passed_all_the_same(monkeypatch):
    monkeypatch.setattr("tutelage.scoring.layout.regime_lengths", lambda config: {})
    for shapes in ([(20, 120, 110, 100)], [(300, 20, 20)]):
        assert_plain(neo(), groups_of(*shapes))


def test_a_slow_probe_is_bounded_and_says_so(monkeypatch):
    monkeypatch.setattr("tutelage.models.plain._CPU_OPERATIONS", 1e8)
    model = neo()
    probe = probe_layout(model, 400, 500)
    assert probe.layout == "padded"
    assert probe.tried[0] < 256
    assert "take too long" in probe.reason
    assert "256" in probe.reason
    assert probe_facts(model)["layouts"][-1]["tried_tokens"] == list(probe.tried)


def test_what_was_found_is_kept():
    model = neo()
    assert probe_facts(model) == {}
    assert_plain(model, groups_of((300, 20, 20)))
    facts = probe_facts(model)
    assert facts["causal"] is True
    assert facts["lengths_in_config"] == {"window_size": 256, "max_position_embeddings": 512}
    assert [each["layout"] for each in facts["layouts"]] == ["shared_prefix", "padded"]
    assert facts["layouts"][1]["up_to_tokens"] == [464, 512]
    assert facts["seconds"] > 0


# --- ropes that depend on the batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [longrope, dynamic])
@pytest.mark.parametrize("layout", ["auto", "padded", "shared_prefix"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_rows_beyond_the_switch_are_refused_in_any_batch(model, layout, batch_size):
    groups = groups_of((20, 10, 8), (40, 20, 25), (30, 9))
    with pytest.raises(UserError, match=r"rotary .*64 tokens .*65 tokens"):
        cached_token_logps(model(), groups, batch_size=batch_size, layout=layout)


@pytest.mark.parametrize("model", [longrope, dynamic])
def test_rows_up_to_the_switch_are_scored_alike_in_any_batch(model):
    # the row of the shared prefix is longer than the switch
    groups = groups_of((20, 10, 8, 12, 30), (40, 24, 23), (30, 9), (3, 2))
    assert_plain(model(), groups)
    one, all_at_once = (cached_token_logps(model(), groups, batch_size=size) for size in (1, 16))
    for alone, together in zip(one, all_at_once, strict=True):
        for first, second in zip(alone, together, strict=True):
            torch.testing.assert_close(torch.tensor(first), torch.tensor(second), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("model", [longrope, dynamic])
def test_no_sample_grows_beyond_the_switch(model):
    sampler = TransformersSampler(model())
    prompts = [group.prompt_ids for group in groups_of((30, 1), (50, 1))]
    drawn = sampler.sample(prompts, SamplingParams(max_completion_length=14))
    assert {len(sample.token_ids) for samples in drawn for sample in samples} == {14}
    with pytest.raises(UserError, match=r"65 tokens.*--max_completion_length"):
        sampler.sample(prompts, SamplingParams(max_completion_length=15))


def test_a_rope_that_stays_switches_nowhere():
    assert rope_switch(made(LlamaConfig(**SIZE))) is None
    assert rope_switch(made(Phi3Config(**SIZE))) is None
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    model = made(LlamaConfig(**SIZE, rope_parameters=yarn))
    assert rope_switch(model) is None
    assert_plain(model, groups_of((60, 20, 30), (3, 4)))


def test_numbers_that_depend_on_the_batch_for_another_reason_are_refused():
    model = made(LlamaConfig(**SIZE))

    def by_longest(module, inputs, output):
        return output * (1 + 0.1 * (output.shape[1] > 100))

    model.model.norm.register_forward_hook(by_longest)
    assert probe_layout(model).layout == "shared_prefix"
    with pytest.raises(UserError, match="beside other rows"):
        probe_layout(model, 120)


# --- models that look ahead ---------------------------------------------------------------------------------------------

LOOKING_AHEAD = {
    "gemma3": lambda: Gemma3TextConfig(**SIZE, head_dim=8, use_bidirectional_attention=True),
    "qwen2": lambda: Qwen2Config(**SIZE, is_causal=False),
    "llama": lambda: LlamaConfig(**SIZE, is_causal=False),
    "bert": lambda: BertConfig(**SIZE),
    "xlm": lambda: XLMConfig(vocab_size=97, emb_dim=32, n_layers=2, n_heads=4),
}


@pytest.mark.parametrize("name", LOOKING_AHEAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_a_model_that_looks_ahead_is_refused(name, dtype, spread):
    config = LOOKING_AHEAD[name]()
    config.initializer_range = config.init_std = config.embed_init_std = spread
    model = made(config, dtype=dtype)
    if name == "llama" and not looks_ahead(model):
        pytest.skip("this version of transformers takes no is_causal for Llama")
    for use in (probe_layout, TransformersSampler, lambda model: completion_token_logps(model, groups_of((5, 3)))):
        with pytest.raises(UserError, match="bidirectional: a later token changes"):
            use(model)


@torch.no_grad()
def looks_ahead(model):
    first = torch.arange(3, 15)[None]
    second = torch.cat([first[:, :6], first[:, 6:].flip(1)], 1)
    return not torch.equal(model(first).logits[0, :6], model(second).logits[0, :6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_a_mixture_of_experts_is_no_looking_ahead(dtype):
    assert probe_layout(llama4().to(dtype)).layout in ("shared_prefix", "padded")


# --- rows that the model has no positions for, and memory that runs out ---------------------------------------------------


def few_positions(kind):
    size = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        return made(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    return made(OPTConfig(**size, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64))


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_rows_longer_than_the_table_of_positions_are_refused_before_sampling_and_scoring(kind):
    model, prompts = few_positions(kind), [(5, 6, 7, 8)]
    fits, too_long = (SamplingParams(max_completion_length=n, stop_ids=frozenset()) for n in (60, 61))
    ((sample,),) = TransformersSampler(model).sample(prompts, fits)
    assert len(sample.token_ids) == 60
    with pytest.raises(UserError, match=r"and not on \d+ tokens, which .* its config names .* 64"):
        TransformersSampler(few_positions(kind)).sample(prompts, too_long)
    assert probe_layout(model, 64)
    with pytest.raises(UserError, match=r"and not on \d+ tokens, which .* its config names .* 64"):
        probe_layout(few_positions(kind), 65)


NO_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_is_no_fault_of_the_model(error, monkeypatch):
    model = made(LlamaConfig(**SIZE))

    def fail(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(layout, "collate_shared_prefix", fail)
        with pytest.raises(UserError, match="there is not enough memory to run LlamaForCausalLM"):
            probe_layout(model, 64)
    assert probe_layout(model).layout == "shared_prefix"
    with monkeypatch.context() as patch:
        patch.setattr(layout, "collate_shared_prefix", fail)
        found = probe_layout(model, 64)
    assert found.layout == "padded"
    assert "does not fit into memory" in found.reason
    monkeypatch.setattr(probe, "_decoded", fail)
    with pytest.raises(UserError, match="there is not enough memory to run LlamaForCausalLM"):
        probe.probe_sampling(model)
