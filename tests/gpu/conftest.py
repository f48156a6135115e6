"""Each test runs twice: on a GPU at sizes that use it, skipped where there is none, and on the CPU at tiny sizes.

One command on a machine with a GPU: ``pytest tests/gpu``. The run on the CPU says that the tests themselves work.
"""

from typing import NamedTuple

import pytest
import torch
from benchmarks.gpu_run import FULL, TINY, Sizes

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; run pytest tests/gpu on one"
)


class Setting(NamedTuple):
    """Where a test runs and how much it works on."""

    device: torch.device
    sizes: Sizes


@pytest.fixture(params=[pytest.param("cuda", marks=needs_gpu), "cpu"])
def setting(request):
    """TF32 is off: in the reference it would hide what is to be found."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield Setting(torch.device(request.param), FULL if request.param == "cuda" else TINY)
    torch.set_float32_matmul_precision(before)
    if request.param == "cuda":
        torch.cuda.empty_cache()
