"""Sampling with adapters merged into the layers: the same samples, no products of adapters, and where it does not serve, not."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage.errors import NonFiniteLossError
from tutelage.groups import Group
from tutelage.models import merging
from tutelage.models.weights import WeightSet
from tutelage.sampling import SamplingParams, TransformersSampler
from tutelage.scoring.logps import completion_token_logps
from tutelage.testing.models import tiny_model

PARAMS = SamplingParams(max_completion_length=10)
PROMPTS = [tuple(range(5 + 3 * i, 9 + 4 * i)) for i in range(10)]
RANK = 5  # no other dimension of the tiny model is 5


def adapted(dtype=torch.float32, scale=1.0, architecture="llama"):
    """Random adapters; ``scale`` times as large as the random ones of peft."""
    model = tiny_model(architecture, dtype=dtype, initializer_range=0.2)
    torch.manual_seed(1)
    config = LoraConfig(r=RANK, init_lora_weights=False, target_modules="all-linear")
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.lora_B["default"].weight *= scale
    return model


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def drawn(model, merge=True):
    """Samples, and whether the layers were merged while they were drawn."""
    seen = []
    samples = TransformersSampler(model, merge_adapters=merge).sample(
        PROMPTS, PARAMS, on_finished=lambda *_: seen.append(all(m.merged for m in lora_layers(model)))
    )
    assert len(set(seen)) == 1
    assert not any(module.merged for module in lora_layers(model))
    return [sample for samples in samples for sample in samples], seen[0]


class Products(TorchDispatchMode):
    """Counts products with the rank of the adapters as their inner or outer dimension."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.count += RANK in (*args[-1].shape, *args[-2].shape)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
def test_samples_are_those_of_adapters_as_they_are(architecture):
    model = adapted(architecture=architecture)
    found, merged = drawn(model)
    expected, kept = drawn(model, merge=False)
    assert (merged, kept) == (True, False)
    # One row may differ where a random number falls on the edge between two tokens.
    same = [(a, b) for a, b in zip(found, expected, strict=True) if a.token_ids == b.token_ids]
    assert len(same) >= len(PROMPTS) - 1
    for a, b in same:
        torch.testing.assert_close(torch.tensor(a.token_logps), torch.tensor(b.token_logps), atol=1e-4, rtol=1e-4)


def test_log_probs_are_the_policys():
    model = adapted()
    samples, _ = drawn(model)
    groups = [Group(prompt, (sample.completion,)) for prompt, sample in zip(PROMPTS, samples, strict=True)]
    reported = torch.tensor([logp for sample in samples for logp in sample.token_logps])
    torch.testing.assert_close(reported, completion_token_logps(model, groups).logps_N, atol=1e-4, rtol=1e-4)


def test_a_token_step_has_no_products_of_adapters():
    model = adapted()
    drawn(model)  # the first time, what merging changes is measured
    layers = len(lora_layers(model))
    with Products() as products:
        drawn(model)
    assert products.count == layers  # one for each merged weight
    with Products() as products:
        drawn(model, merge=False)
    assert products.count == 2 * layers * PARAMS.max_completion_length


def test_weights_of_another_set_are_merged_while_it_is_active():
    model = adapted()
    weights = WeightSet(model)
    with torch.no_grad():
        for parameter in weights.parameters:
            parameter *= -1.5
    own, _ = drawn(model)
    sampler = TransformersSampler(model)
    with weights.active():
        other = [sample for (sample,) in sampler.sample(PROMPTS, PARAMS)]
    expected, _ = drawn(model)
    assert [s.token_ids for s in expected] == [s.token_ids for s in own]
    assert [s.token_ids for s in other] != [s.token_ids for s in own]
    with weights.active():
        unmerged, _ = drawn(model, merge=False)
    assert sum(a.token_ids != b.token_ids for a, b in zip(other, unmerged, strict=True)) <= 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_weights_come_back_from_an_exception_while_sampling(error):
    model = adapted(torch.bfloat16)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}

    def fail(*_):
        raise error

    with pytest.raises(error):
        TransformersSampler(model).sample(PROMPTS, PARAMS, on_finished=fail)
    assert not any(layer.merged for layer in lora_layers(model))
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])


def test_nothing_is_merged_without_memory_for_it(monkeypatch, caplog):
    model = adapted()
    monkeypatch.setattr(merging, "available_memory", lambda device: 10_000)
    sampler, seen = TransformersSampler(model), []
    with caplog.at_level(logging.INFO, logger="tutelage.sampling.merging"):
        for _ in range(2):
            sampler.sample(PROMPTS, PARAMS, on_finished=lambda *_: seen.append(lora_layers(model)[0].merged))
    assert not any(seen)
    assert len([line for line in caplog.messages if "more than half of what is free" in line]) == 1


@pytest.mark.parametrize("scale", [0.0, 0.01, 0.1, 1.0])
def test_the_log_says_what_was_chosen_in_low_precision(caplog, scale):
    with caplog.at_level(logging.INFO, logger="tutelage.sampling.merging"):
        _, merged = drawn(adapted(torch.bfloat16, scale=scale))
    assert ("merged into" if merged else "beside") in caplog.text
    assert "nats per token" in caplog.text
    assert merged or scale  # without an update, nothing is lost
    print(scale, caplog.text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_that_changes_the_policy_is_found_and_not_used(monkeypatch, caplog, dtype):
    merge = merging.lora.Linear.merge

    def lossy(self, *args, **kwargs):
        weight = self.get_base_layer().weight
        before = weight.detach().clone()
        merge(self, *args, **kwargs)
        weight.data = before

    monkeypatch.setattr(merging.lora.Linear, "merge", lossy)
    model = adapted(dtype)
    with caplog.at_level(logging.INFO, logger="tutelage.sampling.merging"):
        found, merged = drawn(model)
    assert not merged
    assert "beside" in caplog.text
    expected, _ = drawn(model, merge=False)
    assert [s.token_ids for s in found] == [s.token_ids for s in expected]


def test_a_merged_weight_that_overflows_is_not_used(monkeypatch):
    merge = merging.lora.Linear.merge

    def overflowing(self, *args, **kwargs):
        merge(self, *args, **kwargs)
        self.get_base_layer().weight.data[0, 0] = torch.inf

    monkeypatch.setattr(merging.lora.Linear, "merge", overflowing)
    model = adapted()
    found, merged = drawn(model)
    assert not merged
    expected, _ = drawn(model, merge=False)
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_not_finite_are_an_error_as_ever(dtype):
    model = adapted(dtype)
    sampler = TransformersSampler(model)
    sampler.sample(PROMPTS, PARAMS)
    with torch.no_grad():
        lora_layers(model)[0].lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteLossError):
        sampler.sample(PROMPTS, PARAMS)
    assert not any(module.merged for module in lora_layers(model))


def test_it_is_measured_anew_for_new_weights_alone(caplog):
    model = adapted(torch.bfloat16)
    sampler = TransformersSampler(model)

    def lines():
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="tutelage.sampling.merging"):
            sampler.sample(PROMPTS, PARAMS)
        return len(caplog.messages)

    assert [lines(), lines()] == [1, 0]
    with torch.no_grad():
        lora_layers(model)[-1].lora_B["default"].weight *= 1.1
    assert [lines(), lines()] == [1, 0]


def test_few_prompts_keep_their_adapters_in_low_precision():
    model = adapted(torch.bfloat16)
    seen = []
    TransformersSampler(model).sample(
        PROMPTS[:3], PARAMS, on_finished=lambda *_: seen.append(lora_layers(model)[0].merged)
    )
    assert seen == [False] * 3


def test_a_model_without_adapters_and_no_prompts():
    assert TransformersSampler(adapted()).sample([], PARAMS) == []
    assert len(TransformersSampler(tiny_model()).sample(PROMPTS, PARAMS)) == len(PROMPTS)


def test_filters_and_temperature_do_not_reach_the_measurement(caplog):
    found = []
    for params in (PARAMS, SamplingParams(max_completion_length=10, temperature=0.3, top_k=5)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="tutelage.sampling.merging"):
            TransformersSampler(adapted(torch.bfloat16)).sample(PROMPTS, params)
        found.append(caplog.messages[:])
    assert found[0] == found[1]
    assert found[0]
