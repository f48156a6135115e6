"""The example on extrapolation in the lab: its random directions and its tables."""

from io import StringIO

import pytest
import torch
from examples.extrapolation_in_the_lab import ALPHAS, SHOWN, TRAINED, random_direction, shown
from rich.console import Console


def test_a_random_direction_has_the_norm_of_the_way_in_each_tensor():
    start = {"a": torch.zeros(30, 20), "b": torch.ones(50), "same": torch.ones(4)}
    aligned = {"a": torch.full((30, 20), 0.1), "b": 3 * torch.ones(50), "same": torch.ones(4)}
    found = random_direction(aligned, start, seed=1)
    for name, value in found.items():
        assert value.norm().item() == pytest.approx((aligned[name] - start[name]).norm().item(), rel=1e-5)
    assert found["same"].abs().max() == 0
    cosine = torch.nn.functional.cosine_similarity(found["a"].flatten(), aligned["a"].flatten(), dim=0)
    assert abs(cosine) < 0.15
    assert not torch.equal(found["a"], random_direction(aligned, start, seed=2)["a"])


def test_alpha_is_chosen_on_validation_rows_and_told_on_test_rows():
    lines = []
    for seed in (1, 2):
        lines.append(
            {"seed": seed, "policy": "start", "direction": "", "alpha": None, "test": dict.fromkeys(SHOWN, 0.1)}
        )
        for policy in TRAINED:
            for way in ("trained", "random"):
                for alpha in ALPHAS:
                    validation, test = (1.0, 0.625) if alpha == 4 else (0.5, 0.5)
                    rows = {"validation": dict.fromkeys(SHOWN, validation), "test": dict.fromkeys(SHOWN, test)}
                    lines.append({"seed": seed, "policy": policy, "direction": way, "alpha": alpha, **rows})
    console = Console(width=160, record=True, quiet=False, file=StringIO())
    for table in shown(lines, "arrange"):
        console.print(table)
    text = console.export_text()
    assert text.count("4 4") == 4
    assert text.count("0.125 ± 0.000") == 8
    assert text.count("2 of 2") == 4
