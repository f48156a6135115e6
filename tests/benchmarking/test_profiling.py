"""What the benchmarks count with PyTorch's profiler, on work whose operators are known."""

import pytest
import torch
from benchmarks.profiling import launches_per_step, operators, operators_per_step, profiled, top

A = torch.ones(64, 64)


def work(length):
    """As a sampler: something once, and then the same for each token."""
    torch.linalg.inv(A + torch.eye(64))
    for _ in range(length):
        torch.mm(A, A)
        A.relu()


def test_operators_of_a_step_are_those_of_one_more():
    once = operators(profiled(lambda: (torch.mm(A, A), A.relu())))  # with what they call, such as clamp_min
    assert once >= 3
    assert operators_per_step(work) == once


def test_a_cpu_launches_nothing():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert launches_per_step(work) == 0


def test_the_top_is_what_takes_the_time():
    large = torch.ones(1024, 1024)

    def mostly_products():
        for _ in range(3):
            large @ large
        A.relu()

    events = profiled(mostly_products)
    assert operators(events) >= 6
    first, *others = top(events)
    assert first.name == "aten::mm"
    assert first.count == 3
    assert first.share > 0.5
    assert sum(entry.share for entry in [first, *others]) <= 1 + 1e-9
    assert len(top(events, count=2)) == 2
