"""Every causal language model of transformers: both layouts and the sampler give the plain model's numbers, or it is refused.

All of them take less than a minute of one core. ``pytest -rs tests/compatibility`` lists what is skipped and why.
"""

import re

import pytest

from compatibility.architectures import ARCHITECTURES, REFUSED, SKIPPED, VOCABULARY, tiny
from compatibility.checks import compare


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_architecture_gives_the_plain_models_numbers(model_type):
    if model_type in SKIPPED:
        pytest.skip(f"{model_type}: {SKIPPED[model_type]}")
    found = compare(tiny(model_type), VOCABULARY)
    assert found.logps < 1e-4
    assert found.wrong_tokens == 0
    expected = REFUSED.get(model_type)
    if expected is None:
        assert not found.refusals, "refused: mend it, or say so in REFUSED"
        assert found.layout
        assert found.sampled
    else:
        assert found.refusals, "no longer refused: take it out of REFUSED"
        assert all(re.search(f"{expected}|cannot be sampled from", refusal) for refusal in found.refusals)
        assert any(re.search(expected, refusal) for refusal in found.refusals)


def test_most_of_the_library_is_tried():
    tried = set(ARCHITECTURES) - set(SKIPPED)
    assert len(tried) >= 150
    assert len(tried - set(REFUSED)) >= 130


def test_those_without_a_cache_are_scored_all_the_same():
    assert compare(tiny("mamba2"), VOCABULARY).layout == "padded"
