"""The fingerprint of weights: equal names mean equal weights."""

import pytest
import torch
from torch import nn

from tutelage.models import weights
from tutelage.models.weights import fingerprint


def named(*tensors, trained=True):
    return [(str(index), nn.Parameter(tensor, requires_grad=trained)) for index, tensor in enumerate(tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("trained", [True, False])
def test_any_one_number_changes_the_name(dtype, trained):
    """Of 1,000, each at its turn: a few places that are looked at would miss most."""
    tensor = torch.randn(10, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    names = {fingerprint(named(tensor, trained=trained))}
    for place in range(1000):
        changed = tensor.clone()
        changed.view(-1)[place] += 0.125
        names.add(fingerprint(named(changed, trained=trained)))
    assert len(names) == 1001


def test_a_trained_weight_is_read_anew_each_time():
    """Where it is changed past autograd, and where tensors change hands, too."""
    ((name, parameter),) = named(torch.zeros(1000))
    names = [fingerprint([(name, parameter)])]
    parameter.data[501] = 1e-7  # between the places that a look at a few would read
    names.append(fingerprint([(name, parameter)]))
    parameter.data = torch.ones(1000)
    names.append(fingerprint([(name, parameter)]))
    assert len(set(names)) == 3


def test_a_frozen_weight_is_hashed_once_and_again_when_it_is_another(monkeypatch):
    hashed = []
    full = weights._hash
    monkeypatch.setattr(weights, "_hash", lambda parameter: hashed.append(parameter) or full(parameter))
    frozen = named(torch.randn(1000), trained=False)
    trained = named(torch.randn(10))
    names = [fingerprint([*frozen, *trained]) for _ in range(3)]
    assert len(set(names)) == 1
    assert sum(parameter is frozen[0][1] for parameter in hashed) == 1
    assert sum(parameter is trained[0][1] for parameter in hashed) == 3
    frozen[0][1].data += 0.01
    assert fingerprint([*frozen, *trained]) != names[0]
    assert sum(parameter is frozen[0][1] for parameter in hashed) == 2


def test_names_types_and_shapes_count():
    zeros = torch.zeros(4, 6)
    names = [
        fingerprint(named(zeros)),
        fingerprint([("other", nn.Parameter(zeros))]),
        fingerprint(named(zeros.view(6, 4))),
        fingerprint(named(zeros.double())),
        fingerprint(named(torch.zeros(4, 5))),
        fingerprint(named(zeros, zeros)),
    ]
    assert len(set(names)) == 6


def test_how_a_tensor_lies_in_memory_does_not_count(monkeypatch):
    tensor = torch.randn(30, 7)
    name = fingerprint(named(tensor))
    assert fingerprint(named(tensor.T.contiguous().T)) == name
    monkeypatch.setattr(weights, "_CHUNK", 13)
    assert fingerprint(named(tensor)) == name
