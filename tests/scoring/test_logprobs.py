"""Tree, padded and one-by-one log-probs agree, with their gradients, on the architectures people train."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role
from tutelage.models import attention
from tutelage.models.head import LMHead, head_logps
from tutelage.scoring.layout import probe_layout
from tutelage.scoring.logps import cached_logps, completion_logps
from tutelage.testing.models import tiny_model

TREE_ARCHITECTURES = ["llama", "qwen3", "mistral", "gemma3", "gpt_neox", "opt"]


def random_groups(seed=0, vocab_size=97, prompts=(9, 3, 12), lengths=((5, 3, 7), (4, 1), (2,))):
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist())

    return [
        Group(tokens(prompt), tuple(Completion(tokens(n), Role.SAMPLE, finished=False) for n in completions))
        for prompt, completions in zip(prompts, lengths, strict=True)
    ]


def one_by_one(model, groups):
    """The model's own forward on each sequence alone: what a reader would write."""
    sums = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt_ids + completion.token_ids])
            logps = F.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
            logps = logps.gather(1, ids[0, 1:, None])[:, 0]
            sums.append(logps[len(group.prompt_ids) - 1 :].sum())
    return torch.stack(sums)


def gradients(model, logps):
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(logps))
    (logps * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", TREE_ARCHITECTURES)
@pytest.mark.parametrize("kind", ["sdpa", "eager", "products"])
def test_tree_equals_padded_equals_one_by_one(architecture, kind, monkeypatch):
    if kind == "products":
        monkeypatch.setattr(attention, "_PRECISIONS", (torch.float32,))
    model = tiny_model(architecture)
    model.set_attn_implementation("eager" if kind == "eager" else "sdpa")
    groups = random_groups()
    assert probe_layout(model).layout == "shared_prefix"
    truth = one_by_one(model, groups)
    truth_gradients = gradients(model, truth)
    for layout in ("shared_prefix", "padded"):
        logps = completion_logps(model, groups, layout=layout, block_size=4)
        torch.testing.assert_close(logps, truth, atol=1e-5, rtol=1e-5)
        found = gradients(model, logps)
        assert found.keys() == truth_gradients.keys()
        for name, gradient in truth_gradients.items():
            scale = max(1.0, gradient.abs().max().item())
            torch.testing.assert_close(found[name] / scale, gradient / scale, atol=5e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_frozen_head_gives_the_adapters_the_same_gradients(architecture):
    """With adapters the head is frozen and its gradient is computed along with the log-probs."""
    config = {"final_logit_softcapping": 5.0} if architecture == "gemma3" else {}
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_model(architecture, **config), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    groups = random_groups()
    truth = one_by_one(model, groups)
    truth_gradients = gradients(model, truth)
    assert truth_gradients
    logps = completion_logps(model, groups, block_size=4)
    torch.testing.assert_close(logps, truth, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(model, logps).items():
        torch.testing.assert_close(gradient, truth_gradients[name], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("block_size", [1, 7, 1000])
def test_log_probs_in_blocks_are_those_of_log_softmax(trained, softcap, bias, block_size):
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 50, bias=bias).requires_grad_(trained)
    linear.weight.data *= 20  # some targets are near certain, others hopeless
    hidden = torch.randn(11, 8, requires_grad=True)
    targets, upstream = torch.randint(50, (11,)), torch.randn(11)
    logits = linear(hidden) * 0.7
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    truth = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    leaves = [hidden, *(p for p in linear.parameters() if trained)]
    found = head_logps(LMHead(linear, 0.7, softcap), hidden, targets, block_size=block_size)
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(truth, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_a_recurrent_model_falls_to_padded_by_itself():
    model = tiny_model("mamba")
    probe = probe_layout(model)
    assert probe.layout == "padded"
    assert "Mamba" in probe.reason
    groups = random_groups()
    torch.testing.assert_close(completion_logps(model, groups), one_by_one(model, groups), atol=1e-4, rtol=1e-5)


def test_unknown_step_after_the_head_is_an_error():
    model = tiny_model("llama")
    forward = model.forward

    def shifted(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs

    model.forward = shifted
    with pytest.raises(UserError, match="after the head"):
        probe_layout(model)


class RoundsByBatch:
    """Changes the last states of rows that stand in a batch, as other kernels do in low precision; by whole nats."""

    def __call__(self, module, inputs, output):
        return output * (1.5 if len(output) > 1 else 1.0)


def test_rounding_of_low_precision_is_no_unknown_step_after_the_head():
    model = tiny_model("llama").to(torch.bfloat16)
    model.is_quantized = True  # else it would be tried in float32
    model.lm_head.weight.data *= 40
    model.model.norm.register_forward_hook(RoundsByBatch())
    assert probe_layout(model).layout == "shared_prefix"


def test_unknown_step_after_the_head_is_an_error_in_low_precision():
    model = tiny_model("llama").to(torch.bfloat16)
    model.lm_head.weight.data *= 40
    forward = model.forward

    def doubled(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs

    model.forward = doubled
    with pytest.raises(UserError, match="after the head"):
        probe_layout(model)


def test_padding_token_and_block_size_change_nothing():
    model, groups = tiny_model("qwen3"), random_groups()
    first = completion_logps(model, groups, pad_token_id=0, block_size=1)
    second = completion_logps(model, groups, pad_token_id=50, block_size=1000)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_cached_logps_come_back_in_order_without_dropout():
    model, groups = tiny_model("gpt_neox", hidden_dropout=0.5), random_groups()
    model.train()
    cached = cached_logps(model, groups, batch_size=2)
    assert model.training
    model.eval()
    flat = [logp for group in cached for logp in group]
    torch.testing.assert_close(torch.tensor(flat), one_by_one(model, groups), atol=1e-5, rtol=1e-5)
    assert [len(group) for group in cached] == [3, 2, 1]
