"""The probes compare in float32, whatever the user allows for speed and the model computes in, and leave that as it was."""

from types import MethodType

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32

from tutelage.models.modes import exact_float32
from tutelage.models.plain import agree, plain_logps, tolerance
from tutelage.sampling.decoding import MixedLengths
from tutelage.sampling.probe import probe_sampling
from tutelage.scoring.layout import probe_layout
from tutelage.testing.models import tiny_model

pytestmark = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9")


def settings():
    backends = torch.backends
    parts = (backends, backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    return [part.fp32_precision for part in parts]


@pytest.fixture
def precision():
    """Sets the switches, which follow the general one at first; after the test they are as torch sets them."""

    def allow(*, general=None, matmul=None):
        if general is not None:
            torch.backends.fp32_precision = general
        if matmul is not None:
            torch.backends.cuda.matmul.fp32_precision = matmul

    def reset():
        torch.backends.fp32_precision = "none"
        for part in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv):
            part.fp32_precision = "none"
        torch.backends.cudnn.conv.fp32_precision = "tf32"

    reset()
    yield allow
    reset()


@pytest.mark.parametrize(
    "allowed", [{}, {"general": "tf32"}, {"matmul": "tf32"}, {"general": "tf32", "matmul": "ieee"}]
)
def test_the_setting_is_given_back(precision, allowed):
    precision(**allowed)
    before = settings()
    with exact_float32():
        assert settings()[1:] == ["ieee"] * 4
    assert settings() == before
    with pytest.raises(ZeroDivisionError), exact_float32():
        raise ZeroDivisionError
    assert settings() == before


def test_what_followed_the_general_setting_goes_on_following_it(precision):
    precision(general="tf32")
    with exact_float32():
        pass
    precision(general="ieee")
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_the_older_way_to_allow_it_still_reads_the_same(precision):
    torch.set_float32_matmul_precision("high")
    try:
        with exact_float32():
            pass
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_probe_runs_without_tf32(precision):
    precision(general="tf32")
    model, seen = tiny_model(), set()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.add(torch.backends.cuda.matmul.fp32_precision))
    assert probe_layout(model).layout == "shared_prefix"
    assert seen == {"ieee"}
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


# --- 16 bits -----------------------------------------------------------------------------------------------------------


def peaked(model, factor=40.0):
    """Log-probs as far from 0 as long training makes them."""
    with torch.no_grad():
        model.model.norm.weight.mul_(factor)
    return model


def in_autocast(model):
    """As accelerate leaves a model that it prepared for mixed precision."""
    forward = torch.autocast("cpu", torch.bfloat16)(type(model).forward)
    model.forward = MethodType(convert_outputs_to_fp32(forward), model)
    return model


def patched(model):
    """A forward of the user's is the model's own too, and accelerate's goes around it."""
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    return model


@pytest.mark.parametrize("probe", [probe_layout, probe_sampling])
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("made", [lambda m: m.to(torch.bfloat16), lambda m: m.to(torch.float16), in_autocast, patched])
def test_rounding_of_16_bits_decides_nothing(probe, around, made):
    model, seen = made(tiny_model()), set()
    dtype = model.dtype
    model.model.layers[0].mlp.register_forward_hook(lambda *found: seen.add(found[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        probe(model)
        assert torch.is_autocast_enabled("cpu") is around
    assert seen == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_where_there_is_no_float32_rounding_is_told_from_a_wrong_mask_by_the_size_of_the_log_probs():
    """As with quantized weights: log-probs of 16 bits differ by more where they are far from 0."""
    right = peaked(tiny_model(initializer_range=0.2).to(torch.bfloat16))
    right.is_quantized = True
    truth = plain_logps(right, range(3, 40), range(40, 90))
    assert truth.std() > 3
    near, far = (
        truth + 0.03 * truth.std(),
        truth[torch.randperm(len(truth), generator=torch.Generator().manual_seed(0))],
    )
    assert agree(right, near, truth) < tolerance(right, truth) < agree(right, far, truth)
    assert probe_sampling(right).way is MixedLengths
    assert probe_layout(right).layout == "shared_prefix"
