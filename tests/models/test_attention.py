"""Attention by matrix products gives what torch's SDPA gives, and is used where it should be."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tutelage.groups import Completion, Group, Role
from tutelage.models import attention
from tutelage.models.attention import attention_by_products, product_attention
from tutelage.scoring.logps import completion_logps
from tutelage.testing.models import tiny_model

GROUPS = [
    Group((5, 6, 7), (Completion((8, 9), Role.SAMPLE, finished=False), Completion((4,), Role.SAMPLE, finished=False)))
]


class Layer(torch.nn.Module):
    """What SDPA's function reads of a layer."""

    is_causal = True

    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups = groups


def states(shared, heads, length=6, size=8, value_size=8):
    torch.manual_seed(0)
    shapes = [(2, heads, length, size), (2, shared, length, size), (2, shared, length, value_size)]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(("shared", "heads"), [(1, 4), (2, 4), (4, 4)])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("value_size", [8, 5])
def test_products_are_sdpa_with_its_gradients(shared, heads, scaling, value_size):
    torch.manual_seed(1)
    mask = torch.rand(2, 1, 6, 6) < 0.5
    mask |= torch.eye(6, dtype=torch.bool)  # each token sees itself
    upstream = torch.randn(2, 6, heads, value_size)
    outcomes = []
    for function in (sdpa_attention_forward, product_attention):
        leaves = states(shared, heads, value_size=value_size)
        mixed, _ = function(Layer(heads // shared), *leaves, mask, scaling=scaling)
        outcomes.append([mixed, *torch.autograd.grad(mixed, leaves, upstream)])
    for theirs, ours in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_row_of_padding_that_sees_nothing_stays_finite():
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[1, :, 0] = False
    mixed, _ = product_attention(Layer(2), *states(2, 4), mask)
    assert torch.isfinite(mixed).all()


def test_without_a_mask_sdpa_attends_causally():
    leaves = states(2, 4)
    ours, _ = product_attention(Layer(2), *leaves, None)
    theirs, _ = product_attention(Layer(2), *leaves, torch.ones(2, 1, 6, 6, dtype=torch.bool).tril())
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_what_only_some_architectures_ask_for_is_left_to_sdpa():
    mask, bias = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril(), torch.randn(2, 4, 6, 6)
    leaves = states(2, 4)
    ours, _ = product_attention(Layer(2), *leaves, mask, position_bias=bias)
    theirs, _ = sdpa_attention_forward(Layer(2), *leaves, mask, position_bias=bias)
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, product_attention(Layer(2), *leaves, mask)[0])


@pytest.fixture
def calls(monkeypatch):
    """The rows of every call of ``product_attention`` that models make."""
    seen = []

    def counted(module, query, *args, **kwargs):
        seen.append(query.shape[2])
        return product_attention(module, query, *args, **kwargs)

    monkeypatch.setattr(attention, "_PRECISIONS", (torch.float32,))
    attention.AttentionInterface.register(attention._NAME, counted)
    yield seen
    attention.AttentionInterface.register(attention._NAME, product_attention)


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_short_rows_go_by_products_and_long_ones_do_not(calls, monkeypatch, layout):
    model = tiny_model("gemma3")
    short = completion_logps(model, GROUPS, layout=layout)
    assert calls
    assert model.config._attn_implementation == "sdpa"
    calls.clear()
    monkeypatch.setattr(attention, "_LONGEST", 3)
    long = completion_logps(model, GROUPS, layout=layout)
    assert not calls
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)


def test_the_users_choice_stays(calls):
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    completion_logps(model, GROUPS, layout="shared_prefix")
    assert not calls
    assert model.config._attn_implementation == "eager"


def test_recomputed_activations_meet_one_kind_of_attention(calls):
    model = tiny_model("llama")
    truth = torch.autograd.grad(completion_logps(model, GROUPS, layout="shared_prefix").sum(), model.model.norm.weight)
    calls.clear()
    model.gradient_checkpointing_enable()
    model.train()
    found = torch.autograd.grad(completion_logps(model, GROUPS, layout="shared_prefix").sum(), model.model.norm.weight)
    assert not calls
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-5)


def test_bfloat16_alone_goes_by_products(calls, monkeypatch):
    monkeypatch.undo()
    model = tiny_model("llama")
    truth = completion_logps(model, GROUPS, layout="shared_prefix")
    assert not calls
    with torch.autocast("cpu", torch.bfloat16):
        found = completion_logps(model, GROUPS, layout="shared_prefix")
    assert calls
    torch.testing.assert_close(found, truth, atol=0.5, rtol=0.05)
    calls.clear()
    completion_logps(model.to(torch.bfloat16), GROUPS, layout="shared_prefix")
    assert calls
    calls.clear()
    completion_logps(model.to(torch.float16), GROUPS, layout="shared_prefix")
    assert not calls, "products of float16 would overflow"


def test_an_error_inside_gives_the_models_attention_back():
    model = tiny_model("llama", dtype=torch.bfloat16)
    with pytest.raises(ZeroDivisionError), attention_by_products(model, 4):  # noqa: PT012
        assert model.config._attn_implementation == attention._NAME
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
