"""The tabular example runs, and its one sentence is what its numbers say."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "one_state_three_actions.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("one_state_three_actions", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def policies(example):
    return example.main()


def logp(policy: list[float]) -> float:
    return 0.6 * math.log(policy[0]) + 0.4 * math.log(policy[1])


def test_every_row_is_a_distribution(policies):
    for policy in policies.values():
        assert sum(policy) == pytest.approx(1)


def test_sft_reaches_the_demonstrations_and_forgets_the_rest(policies):
    assert policies["SFT"][:2] == pytest.approx([0.6, 0.4], abs=0.01)
    assert policies["SFT"][2] < 0.01


def test_spin_overshoots_and_more_stages_repair_it(policies):
    spin, few, many = (policies[name] for name in ("SPIN, T = 1", "IRFT, T = 20", "IRFT, T = 50"))
    assert max(spin) > 0.99
    assert logp(spin) < logp(policies["π_0, the start"]) < logp(few) < logp(many)


def test_a_stage_a_step_is_sft(policies):
    assert policies["IRFT, T = 200"] == pytest.approx(policies["SFT"], abs=1e-12)


def test_converged_stage_has_the_closed_form(example, monkeypatch):
    # Where nothing is unseen, a stage run to its end gives π ∝ π_t (D/π_t)^(1/β): here β = 0.5, so D²/π_t.
    monkeypatch.setattr(example, "BETA", 0.5)
    monkeypatch.setattr(example, "STEPS", 3000)
    monkeypatch.setattr(example, "DEMONSTRATED", example.DEMONSTRATED.new_tensor([0.5, 0.3, 0.2]))
    expected = example.DEMONSTRATED**2 / example.START
    policy = example.irft(example.START.log(), stages=1).exp()
    assert policy.tolist() == pytest.approx((expected / expected.sum()).tolist(), abs=1e-6)


def test_only_a_bounded_reward_keeps_the_unseen_action(policies):
    bounded = policies.pop("inverse RL, |r| ≤ β")
    # The reward moves log(π(a) / π(c)) by at most 2 bound / β = 2 from where π_0 had it.
    assert bounded[2] / bounded[0] >= 0.3 / 0.2 * math.exp(-2) - 1e-9
    trained = [policy for name, policy in policies.items() if name.startswith(("SFT", "SPIN", "IRFT"))]
    assert all(policy[2] < 0.01 < bounded[2] for policy in trained)
