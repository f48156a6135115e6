"""The probe compares layouts in float32, whatever the user allows for speed, and leaves that setting as it was."""

import pytest
import torch

from tutelage.models.modes import exact_float32
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
