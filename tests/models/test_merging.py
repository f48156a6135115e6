"""Adapters merged into the layers for a while: the same numbers, no products of adapters, and the same bits afterwards."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MixtralConfig

from tutelage.models import merging
from tutelage.models.merging import MergedAdapters
from tutelage.models.weights import WeightSet
from tutelage.testing.models import tiny_model

IDS = torch.tensor([[5, 17, 44, 9, 23, 71, 8, 30]])
KINDS = {
    "linear": {"target_modules": "all-linear"},
    "rank-stabilized": {"target_modules": "all-linear", "use_rslora": True},
    "DoRA": {"target_modules": "all-linear", "use_dora": True},
    "biases": {"target_modules": "all-linear", "bias": "all"},
    "bias of the adapter": {"target_modules": ["query_key_value"], "lora_bias": True},
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "experts": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}


def experts():
    """A mixture of experts: two adapters lie on one module, each on a parameter of its own."""
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config)


def adapted(kind="linear", dtype=torch.float32):
    torch.manual_seed(1)
    if kind == "experts":
        model = experts()
    else:
        architecture = "gpt_neox" if kind == "bias of the adapter" else "llama"
        model = tiny_model(architecture, dtype=dtype, initializer_range=0.2, tie_word_embeddings=False)
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **KINDS[kind])).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def state(model):
    """Every tensor that the model computes with, by its bits, and whether gradients are taken."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (t.data_ptr(), t.requires_grad, t.detach().clone().view(torch.uint8)) for name, t in tensors}


def assert_untouched(model, before):
    now = state(model)
    assert now.keys() == before.keys()
    for name, (place, trained, bits) in before.items():
        assert now[name][:2] == (place, trained), name
        assert torch.equal(now[name][2], bits), name
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, LoraLayer))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_layers_compute_the_same(kind):
    model = adapted(kind)
    with model.disable_adapter():
        without = logits(model)
    truth, before = logits(model), state(model)
    assert (truth - without).abs().max() > 1e-2
    adapters = MergedAdapters.of(model)
    assert len(adapters.layers) == sum(isinstance(m, LoraLayer) for m in model.modules())
    with adapters.merged():
        assert all(m.merged for m in model.modules() if isinstance(m, LoraLayer))
        torch.testing.assert_close(logits(model), truth, atol=1e-4, rtol=1e-4)
        with adapters.set_aside():
            assert_untouched(model, before)
            assert torch.equal(logits(model), truth)
        torch.testing.assert_close(logits(model), truth, atol=1e-4, rtol=1e-4)
    assert not adapters.left
    assert_untouched(model, before)
    assert torch.equal(logits(model), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "DoRA", "embedding"])
def test_the_same_bits_come_back_in_low_precision(kind, dtype):
    model = adapted(kind, dtype)
    before, truth = state(model), logits(model)
    with MergedAdapters.of(model).merged():
        assert not torch.equal(logits(model), truth)
    assert_untouched(model, before)
    assert torch.equal(logits(model), truth)


def test_a_merged_weight_is_rounded_once():
    model = adapted("linear", torch.bfloat16)
    (layer, *_) = MergedAdapters.of(model).layers
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    exact = layer.weight.float() + layer.scaling["default"] * (b @ a)
    with torch.autocast("cpu", torch.bfloat16), MergedAdapters.of(model).merged():
        merged = layer.get_base_layer().weight.detach().clone()
    torch.testing.assert_close(merged.float(), exact, atol=0, rtol=2.0**-8)
    assert (merged != exact.bfloat16()).float().mean() < 1e-3  # ties of rounding aside, the nearest


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_the_same_bits_come_back_after_an_exception(error):
    model = adapted()
    before = state(model)
    with pytest.raises(error), MergedAdapters.of(model).merged():
        raise error
    assert_untouched(model, before)


@pytest.mark.parametrize("place", range(1, 12))
def test_the_same_bits_come_back_from_an_interruption_while_merging(monkeypatch, place):
    model = adapted()
    before, calls = state(model), iter(range(1, 1000))
    merge = merging.lora.Linear.merge

    def interrupted(self, *args, **kwargs):
        merge(self, *args, **kwargs)
        if next(calls) == place:
            raise KeyboardInterrupt

    monkeypatch.setattr(merging.lora.Linear, "merge", interrupted)
    with pytest.raises(KeyboardInterrupt), MergedAdapters.of(model).merged():
        raise AssertionError("merged after all")
    assert_untouched(model, before)


def test_the_same_bits_come_back_from_a_second_interruption(monkeypatch):
    model = adapted()
    before, restore, calls = state(model), MergedAdapters._restore, []

    def interrupted(self):
        calls.append(self)
        if len(calls) == 1:
            for layer, _ in self._merged[:3]:  # part of the work
                layer.merged_adapters.clear()
            raise KeyboardInterrupt
        restore(self)

    monkeypatch.setattr(MergedAdapters, "_restore", interrupted)
    with pytest.raises(KeyboardInterrupt), MergedAdapters.of(model).merged():
        pass
    assert_untouched(model, before)


def test_only_active_adapters_are_merged():
    model = adapted()
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    first = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both, before = logits(model), state(model)
    with MergedAdapters.of(model).merged():
        torch.testing.assert_close(logits(model), both, atol=1e-4, rtol=1e-4)
    assert_untouched(model, before)
    model.set_adapter("default")
    with MergedAdapters.of(model).merged():
        torch.testing.assert_close(logits(model), first, atol=1e-4, rtol=1e-4)
    model.set_adapter("second")
    assert len(MergedAdapters.of(model).layers) == sum(
        "q_proj" in n for n, _ in model.named_modules() if n.endswith("q_proj")
    )


def test_disabled_adapters_and_those_merged_by_others_are_left_alone():
    model = adapted()
    with model.disable_adapter():
        assert not MergedAdapters.of(model).layers
    model.merge_adapter()
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().weight
    merged = weight.detach().clone()
    found = MergedAdapters.of(model)
    assert not found.layers
    with found.merged():
        pass
    assert torch.equal(weight, merged)


def test_a_weight_that_two_layers_use_keeps_its_adapter():
    model = tiny_model("llama", initializer_range=0.2, tie_word_embeddings=True)
    torch.manual_seed(1)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["embed_tokens", "q_proj"])
    model = get_peft_model(model, config).eval()
    truth, before = logits(model), state(model)
    adapters = MergedAdapters.of(model)
    assert dict(adapters.left) == {"another layer uses their weights too": 1}
    with adapters.merged():
        torch.testing.assert_close(logits(model), truth, atol=1e-4, rtol=1e-4)
    assert_untouched(model, before)


class Quantized(torch.Tensor):
    """Stands for the tensors of quantization libraries, which are classes of their own."""


def test_quantized_weights_keep_their_adapters():
    model = adapted()
    layer = model.base_model.model.model.layers[0].mlp.up_proj.get_base_layer()
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantized), requires_grad=False)
    adapters = MergedAdapters.of(model)
    assert dict(adapters.left) == {"their weights are quantized or not on a device": 1}
    truth, before = logits(model), state(model)
    with adapters.merged():
        torch.testing.assert_close(
            logits(model).as_subclass(torch.Tensor), truth.as_subclass(torch.Tensor), atol=1e-4, rtol=1e-4
        )
    assert_untouched(model, before)


def test_a_layer_that_peft_does_not_merge_keeps_its_adapter(monkeypatch):
    model = adapted()
    truth, before, merge = logits(model), state(model), merging.lora.Linear.merge
    refused = model.base_model.model.model.layers[0].self_attn.v_proj

    def merged_in_part(self, *args, **kwargs):
        merge(self, *args, **kwargs)
        if self is refused:
            raise NotImplementedError("aLoRA does not support merging")

    monkeypatch.setattr(merging.lora.Linear, "merge", merged_in_part)
    adapters = MergedAdapters.of(model)
    count = len(adapters.layers)
    with adapters.merged():
        assert (len(adapters.layers), list(adapters.left.values())) == (count - 1, [1])
        assert not refused.merged
        torch.testing.assert_close(logits(model), truth, atol=1e-4, rtol=1e-4)
    assert_untouched(model, before)


def test_nothing_is_merged_where_memory_runs_out(monkeypatch):
    model = adapted()
    before = state(model)

    def full(self, *args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(merging.lora.Linear, "merge", full)
    adapters = MergedAdapters.of(model)
    with adapters.merged():
        assert not adapters.layers
        assert_untouched(model, before)
    assert_untouched(model, before)


def test_what_merging_takes():
    model = adapted()
    adapters = MergedAdapters.of(model)
    weights = [layer.get_base_layer().weight for layer in adapters.layers]
    copies, updates = sum(4 * w.numel() for w in weights), 8 * max(w.numel() for w in weights)
    assert dict(adapters.bytes_needed()) == {torch.device("cpu"): copies + updates}


@pytest.mark.parametrize(("free", "fits"), [(2.0, True), (1.9, False)])
def test_merging_takes_no_more_than_half_of_what_is_free(monkeypatch, free, fits):
    adapters = MergedAdapters.of(adapted())
    needed = sum(adapters.bytes_needed().values())
    monkeypatch.setattr(merging, "available_memory", lambda device: free * needed)
    assert adapters.fits() is fits


def test_another_set_of_weights_is_merged_while_it_is_active():
    model = adapted()
    weights = WeightSet(model)
    with torch.no_grad():
        for parameter in weights.parameters:
            parameter *= -2
    own = logits(model)
    with weights.active():
        truth = logits(model)
        assert (truth - own).abs().max() > 1e-2
        with MergedAdapters.of(model).merged():
            torch.testing.assert_close(logits(model), truth, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(model), own)


def test_autocast_does_not_remember_weights_across_merging():
    """It keeps low-precision copies of trained weights by the identity of the parameter."""
    model = adapted()
    for layer in MergedAdapters.of(model).layers:
        layer.get_base_layer().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        truth = logits(model)
        with model.disable_adapter():
            without = logits(model)
        with MergedAdapters.of(model).merged():
            assert (logits(model) - truth).abs().mean() < 0.1 * (without - truth).abs().mean()
        assert torch.equal(logits(model), truth)


def test_gradients_after_merging_are_those_before():
    model = adapted().train()
    model.gradient_checkpointing_enable()

    def gradients():
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    with MergedAdapters.of(model).merged():
        logits(model.eval())
    model.train()
    after = gradients()
    assert before
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())


class Products(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.inner = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.inner.append(args[-1].shape[-2])
        return func(*args, **(kwargs or {}))


def test_merged_layers_have_no_products_of_adapters():
    model = adapted()
    with Products() as products:
        logits(model)
    assert 4 in products.inner  # the rank
    with MergedAdapters.of(model).merged(), Products() as merged:
        logits(model)
    assert 4 not in merged.inner
    layers = len(MergedAdapters.of(model).layers)
    assert len(merged.inner) == len(products.inner) - 2 * layers
