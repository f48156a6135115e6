"""Divergences over the whole vocabulary in blocks: values and gradients are those of full logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from tutelage.models.head import LMHead, head_logps, vocab_block_size
from tutelage.models.head_divergence import head_divergence
from tutelage.models.weights import WeightSet
from tutelage.testing.models import tiny_model

KINDS = ["forward_kl", "reverse_kl", "jensen_shannon"]
N, H, V = 11, 8, 50


def full_divergence(logits, teacher_logits, kind, mixture=0.5):
    """The formulas, on full logits."""
    p, q = logits.softmax(1), teacher_logits.softmax(1)
    if kind == "forward_kl":
        return (q * (q.log() - p.log())).sum(1)
    if kind == "reverse_kl":
        return (p * (p.log() - q.log())).sum(1)
    m = mixture * q + (1 - mixture) * p
    return (mixture * q * (q.log() - m.log()) + (1 - mixture) * p * (p.log() - m.log())).sum(1)


def linear(bias=False, *, seed=0, in_features=H, dtype=torch.float64, requires_grad=False, spread=1.0):
    torch.manual_seed(seed)
    made = torch.nn.Linear(in_features, V, bias=bias, dtype=dtype).requires_grad_(requires_grad)
    made.weight.data *= spread
    return made


def hidden_states(*, seed=1, size=H, dtype=torch.float64, requires_grad=True):
    return torch.randn(
        N, size, dtype=dtype, generator=torch.Generator().manual_seed(seed), requires_grad=requires_grad
    )


@pytest.mark.parametrize("block_size", [1, 7, 1000])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_full_logits(kind, softcap, bias, trained, block_size):
    module = linear(bias, requires_grad=trained, spread=5.0)
    head = LMHead(module, 0.7, softcap)
    hidden, teacher_hidden = hidden_states(), hidden_states(seed=2)
    upstream = torch.linspace(-1, 1, N, dtype=torch.float64)

    def logits_of(states):
        logits = module(states) * 0.7
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    truth = full_divergence(logits_of(hidden), logits_of(teacher_hidden).detach(), kind, 0.3)
    found = head_divergence(head, hidden, teacher_hidden, kind=kind, mixture=0.3, block_size=block_size)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, truth, atol=1e-10, rtol=1e-10)
    leaves = [hidden, *(p for p in module.parameters() if trained)]
    ours, theirs = (torch.autograd.grad(values, leaves, upstream) for values in (found, truth))
    for our, their in zip(ours, theirs, strict=True):
        assert their.abs().max() > 1e-3
        torch.testing.assert_close(our, their, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, trained):
    hidden, teacher_hidden = hidden_states()[:3], hidden_states(seed=2)[:3]
    module, teacher_head = linear(bias=True, requires_grad=trained), LMHead(linear(seed=5), 1.0, None)
    leaves = (hidden.detach().requires_grad_(), *(p for p in module.parameters() if trained))

    def divergence(states, *_):
        return head_divergence(
            LMHead(module, 1.3, 3.0), states, teacher_hidden, kind=kind, teacher_head=teacher_head, block_size=16
        )

    assert torch.autograd.gradcheck(divergence, leaves)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_close_to_float64(kind, trained):
    module = linear(spread=20.0)
    hidden, teacher_hidden = hidden_states(), hidden_states(seed=2)
    truth = full_divergence(module(hidden), module(teacher_hidden).detach(), kind)
    (truth_grad,) = torch.autograd.grad(truth.sum(), hidden)
    low = linear(spread=20.0, dtype=torch.float32, requires_grad=trained)
    low.weight.data.copy_(module.weight)
    hidden = hidden.detach().float().requires_grad_()
    found = head_divergence(LMHead(low, 1.0, None), hidden, teacher_hidden.float(), kind=kind, block_size=7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, atol=3e-5, rtol=1e-5)
    (grad,) = torch.autograd.grad(found.sum(), hidden)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad.double(), truth_grad, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0), ("reverse_kl", 1), ("jensen_shannon", 0.2)])
@pytest.mark.filterwarnings("ignore:.*experimental.*")
def test_as_trl(kind, beta):
    GKDTrainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    module, hidden, teacher_hidden = linear(), hidden_states(), hidden_states(seed=2)
    theirs = GKDTrainer.generalized_jsd_loss(
        module(hidden)[None], module(teacher_hidden)[None], beta=beta, reduction="none"
    )
    ours = head_divergence(LMHead(module, 1.0, None), hidden, teacher_hidden, kind=kind, mixture=beta or 0.5)
    # TRL's β is a float32 number
    torch.testing.assert_close(ours, theirs.sum(-1)[0], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_another_teacher_has_its_own_head(kind):
    """Another hidden size, bias, scale and cap."""
    module, teacher = linear(), linear(bias=True, seed=5, in_features=13)
    hidden, teacher_hidden = hidden_states(), hidden_states(seed=2, size=13)
    truth = full_divergence(module(hidden), 4 * torch.tanh(teacher(teacher_hidden) * 3 / 4), kind)
    found = head_divergence(
        LMHead(module, 1.0, None),
        hidden,
        teacher_hidden,
        kind=kind,
        teacher_head=LMHead(teacher, 3.0, 4.0),
        block_size=7,
    )
    torch.testing.assert_close(found, truth)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), hidden), torch.autograd.grad(truth.sum(), hidden), atol=1e-10, rtol=1e-8
    )


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_gets_no_gradient(kind, separate):
    module = linear(requires_grad=True)
    teacher = linear(seed=5, requires_grad=True) if separate else module
    hidden, teacher_hidden = hidden_states(), hidden_states(seed=2)
    found = head_divergence(
        LMHead(module, 1.0, None), hidden, teacher_hidden, kind=kind, teacher_head=LMHead(teacher, 1.0, None)
    )
    found.sum().backward()
    assert teacher_hidden.grad is None
    assert hidden.grad is not None
    assert module.weight.grad is not None
    if separate:
        assert teacher.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_against_the_gradient_brings_the_student_nearer(kind):
    head, hidden, teacher_hidden = LMHead(linear(spread=3.0), 1.0, None), hidden_states(), hidden_states(seed=2)
    before = head_divergence(head, hidden, teacher_hidden, kind=kind)
    (slope,) = torch.autograd.grad(before.sum(), hidden)
    after = head_divergence(head, hidden - 1e-3 * slope, teacher_hidden, kind=kind)
    assert (after < before).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions(kind):
    """At the teacher itself the divergence and its gradient are 0, whatever is added to all logits."""
    module, hidden = linear(bias=True), hidden_states()
    shifted = linear(bias=True)
    shifted.bias.data += 100
    found = head_divergence(
        LMHead(module, 1.0, None), hidden, hidden, kind=kind, teacher_head=LMHead(shifted, 1.0, None), block_size=7
    )
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-12, rtol=0)
    (grad,) = torch.autograd.grad(found.sum(), hidden)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(kind, trained):
    """One-hot teacher and student on the same token, on different tokens, and a flat one: closed forms, no NaN."""
    eye = torch.nn.Linear(V, V, bias=False)
    eye.weight.data = torch.eye(V)
    eye.requires_grad_(trained)
    hidden, teacher_hidden = torch.zeros(4, V), torch.zeros(4, V)
    hidden[0, 3], teacher_hidden[0, 3] = 1e4, 1e4
    hidden[1, 3], teacher_hidden[1, 40] = 1e4, 1e4
    hidden[2], hidden[2, 3], teacher_hidden[2, 40] = -1e4, 1e4, 1e4
    teacher_hidden[3, 40] = 1e4
    hidden.requires_grad_()
    found = head_divergence(LMHead(eye, 1.0, None), hidden, teacher_hidden, kind=kind, mixture=0.2, block_size=7)
    (grad,) = torch.autograd.grad(found.sum(), hidden)
    apart = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    # A flat student and a teacher that is certain: m is 0.2 + 0.8/V at the teacher's token and 0.8/V at the others.
    at = 0.2 + 0.8 / V
    flat = -0.2 * math.log(at) + 0.8 * (math.log(1 / V / at) / V - (V - 1) / V * math.log(0.8))
    expected = {
        "forward_kl": [0, 1e4, 2e4, math.log(V)],
        "reverse_kl": [0, 1e4, 1e4, (V - 1) / V * 1e4 - math.log(V)],
        "jensen_shannon": [0, apart, apart, flat],
    }[kind]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-6)
    assert grad.isfinite().all()
    assert grad[3, 40] < 0  # the flat student's logit of the teacher's token rises
    torch.testing.assert_close(grad.sum(1), torch.zeros(4), atol=1e-3, rtol=0)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_never_tokens_times_vocabulary(kind, trained):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return result

    tokens, vocabulary, block_size = 300, 4000, 128
    module = torch.nn.Linear(H, vocabulary, bias=False).requires_grad_(trained)
    hidden, teacher_hidden = torch.randn(tokens, H, requires_grad=True), torch.randn(tokens, H)
    with Largest() as largest:
        head = LMHead(module, 1.0, 5.0)
        head_divergence(head, hidden, teacher_hidden, kind=kind, block_size=block_size).sum().backward()
    assert hidden.grad is not None
    assert tokens * vocabulary > 10 * largest.numel
    assert largest.numel == tokens * block_size


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_with_an_adapter(kind, monkeypatch):
    """The adapter gets its gradient as the student's, and none as the teacher's; a few tokens go at a time."""
    monkeypatch.setattr("tutelage.models.head._WHOLE_ELEMENTS", 1)
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_model(dtype=torch.float64), LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    )
    head = LMHead.of(model.get_base_model())
    assert not head.is_linear
    trained = [p for p in model.parameters() if p.requires_grad]
    states, teacher_states = torch.randn(2, 40, 32, dtype=torch.float64)
    truth = full_divergence(head.module(states), head.module(teacher_states).detach(), kind, 0.3)
    found = head_divergence(head, states, teacher_states, kind=kind, mixture=0.3)
    torch.testing.assert_close(found, truth)
    ours, theirs = (torch.autograd.grad(values.sum(), trained) for values in (found, truth))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)
    with torch.no_grad():
        torch.testing.assert_close(head_divergence(head, states, teacher_states, kind=kind, mixture=0.3), truth)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, trained):
    """Under autocast the products run in bfloat16; sums and gradients keep the type of what they belong to."""
    module = linear(dtype=torch.float32, requires_grad=trained)
    hidden, teacher_hidden = hidden_states(dtype=torch.float32), hidden_states(seed=2, dtype=torch.float32)
    rounded = module.weight.to(torch.bfloat16)
    logits, teacher_logits = (
        F.linear(states.to(torch.bfloat16), rounded).float() for states in (hidden, teacher_hidden)
    )
    truth = full_divergence(logits, teacher_logits, kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head_divergence(LMHead(module, 1.0, None), hidden, teacher_hidden, kind=kind, block_size=7)
    found.sum().backward()
    assert found.dtype == hidden.grad.dtype == torch.float32
    torch.testing.assert_close(found, truth, atol=1e-3, rtol=1e-3)
    (truth_grad,) = torch.autograd.grad(
        full_divergence(module(hidden), module(teacher_hidden).detach(), kind).sum(), hidden
    )
    assert F.cosine_similarity(hidden.grad.flatten(), truth_grad.flatten(), dim=0) > 0.999
    if trained:
        assert module.weight.grad.dtype == torch.float32


def test_what_cannot_be_compared_is_an_error():
    head, hidden = LMHead(linear(), 1.0, None), hidden_states()
    with pytest.raises(ValueError, match="kind"):
        head_divergence(head, hidden, hidden, kind="kl")
    for mixture in (0.0, 1.0, 1.5):
        with pytest.raises(ValueError, match="mixture"):
            head_divergence(head, hidden, hidden, kind="jensen_shannon", mixture=mixture)
    with pytest.raises(ValueError, match="tokens"):
        head_divergence(head, hidden, hidden[:3], kind="forward_kl")
    other = LMHead(torch.nn.Linear(H, V + 1, dtype=torch.float64), 1.0, None)
    with pytest.raises(ValueError, match="logits"):
        head_divergence(head, hidden, hidden, kind="forward_kl", teacher_head=other)


def test_no_tokens():
    head, none = LMHead(linear(), 1.0, None), torch.zeros(0, H, dtype=torch.float64)
    for kind in KINDS:
        assert head_divergence(head, none, none, kind=kind).shape == (0,)


@pytest.mark.parametrize("on_head", [False, True])
def test_a_detached_head_keeps_the_weights_of_then(on_head):
    """The values of a set of weights stay after the model got its own back, and nothing is copied."""
    torch.manual_seed(0)
    model = tiny_model().requires_grad_(True)
    if on_head:
        model = get_peft_model(
            model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.5)
        )
        model.train()
    head = LMHead.of(model.get_base_model() if on_head else model)
    states = torch.randn(5, 32)
    weights = WeightSet(model)
    for parameter in weights.parameters:
        parameter.data += 0.1
    with weights.active(), torch.no_grad():
        head.module.eval()
        truth = head.logits(states)
        head.module.train()
        detached = head.detached()
    torch.testing.assert_close(detached.logits(states), truth)
    head.module.eval()
    assert (head.logits(states) - truth).abs().max() > 1e-3
    assert not any(p.requires_grad for p in detached.module.parameters())
    held = {p.data_ptr() for p in [*weights.parameters, *model.parameters()]}
    assert {p.data_ptr() for p in detached.module.parameters()} <= held


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("tokens", [0, 1, 77, 512, 10_240, 10**9])
def test_block_size(device_type, tokens):
    size, elements = vocab_block_size(tokens, device_type), 2**21 if device_type == "cpu" else 2**26
    assert size % 256 == 0
    assert size >= 256
    assert size == 256 or size * tokens <= elements
    assert (size + 256) * max(1, tokens) > elements


@pytest.mark.parametrize(
    ("vocabulary", "expected"), [(1000, [256, 256, 256, 232]), (256, [256]), (257, [256, 1]), (100, [100]), (1, [1])]
)
def test_head_logps_reads_blocks_of_the_stated_size(monkeypatch, vocabulary, expected):
    monkeypatch.setattr("tutelage.models.head._CPU_ELEMENTS", 10_240 * 3)
    widths = []

    class Widths(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default:
                widths.append(result.shape[1])
            return result

    with Widths(), torch.no_grad():
        head, hidden, targets = (
            torch.nn.Linear(4, vocabulary, bias=False),
            torch.randn(64, 4),
            torch.arange(64) % vocabulary,
        )
        found = head_logps(LMHead(head, 1.0, None), hidden, targets)
        read = widths[:]
        expected_logps = head(hidden).log_softmax(-1)[range(64), targets]
    assert read == expected
    torch.testing.assert_close(found, expected_logps)
