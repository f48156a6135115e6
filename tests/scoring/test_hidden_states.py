"""Hidden states of chosen layers are those of the plain model on each sequence alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification

from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role, collate_padded, collate_shared_prefix
from tutelage.models.loading import base_causal_lm
from tutelage.scoring.hidden import completion_hidden_states, layers_at_depths, token_places
from tutelage.testing.models import tiny_model

TREE_ARCHITECTURES = ["llama", "qwen3", "mistral", "gemma3", "gpt_neox", "opt"]


def random_groups(prompts=(9, 3, 12), lengths=((5, 3, 7), (4, 1), (2,))):
    generator = torch.Generator().manual_seed(0)

    def tokens(length):
        return tuple(torch.randint(3, 97, (length,), generator=generator).tolist())

    return [
        Group(tokens(prompt), tuple(Completion(tokens(n), Role.SAMPLE, finished=False) for n in completions))
        for prompt, completions in zip(prompts, lengths, strict=True)
    ]


@torch.no_grad()
def one_by_one(model, groups, layer):
    """[N, H] from the model's own forward on each sequence alone: what a reader would write."""
    states = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt_ids + completion.token_ids])
            outputs = model(input_ids=ids, output_hidden_states=True)
            states.append(outputs.hidden_states[layer][0, len(group.prompt_ids) :])
    return torch.cat(states)


@pytest.mark.parametrize("layout", ["shared_prefix", "padded", "auto"])
@pytest.mark.parametrize("architecture", TREE_ARCHITECTURES)
def test_layers_are_those_of_the_plain_model(architecture, layout):
    model, groups = tiny_model(architecture), random_groups()
    found = completion_hidden_states(model, groups, layers=(2, 0, 1, 3), layout=layout)
    assert found.layers == (2, 0, 1, 3)
    assert found.states.shape == (4, 22, 32)
    for layer, states in zip(found.layers, found.states, strict=True):
        truth = one_by_one(model, groups, layer)
        torch.testing.assert_close(states, truth, atol=1e-5 * truth.abs().max().item(), rtol=1e-5)
    assert found.completion_ids.tolist() == [0] * 5 + [1] * 3 + [2] * 7 + [3] * 4 + [4] + [5] * 2
    assert found.num_completions == 6


@pytest.mark.parametrize("architecture", TREE_ARCHITECTURES)
def test_the_last_layer_is_the_output_of_the_body(architecture):
    model, groups = tiny_model(architecture), random_groups()
    ids = torch.tensor([groups[2].prompt_ids + groups[2].completions[0].token_ids])
    with torch.no_grad():
        truth = model.base_model(input_ids=ids).last_hidden_state[0, -2:]
    for layer in (-1, 3):
        found = completion_hidden_states(model, groups[2:], layers=[layer])
        assert found.layers == (3,)
        torch.testing.assert_close(found.states[0], truth, atol=1e-5, rtol=1e-5)


def test_a_recurrent_model():
    model, groups = tiny_model("mamba"), random_groups()
    found = completion_hidden_states(model, groups, layers=(0, 1, -1))
    assert found.layers == (0, 1, 2)
    for layer, states in zip(found.layers, found.states, strict=True):
        torch.testing.assert_close(states, one_by_one(model, groups, layer), atol=1e-4, rtol=1e-4)


def test_a_model_with_adapters_and_dropout():
    """Adapters count; dropout, gradients and the mode of the model do not change."""
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    )
    groups = random_groups()
    truth = one_by_one(model.eval(), groups, 2)
    plain = one_by_one(tiny_model("llama"), groups, 2)
    model.train()
    found = completion_hidden_states(model, groups, layers=[2])
    assert model.training
    assert not found.states.requires_grad
    torch.testing.assert_close(found.states[0], truth, atol=1e-5, rtol=1e-5)
    assert (truth - plain).abs().max() > 0.1


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_a_model_without_a_language_head(kind):
    causal, groups = tiny_model("llama"), random_groups()
    model = kind.from_config(causal.config).eval()
    model.base_model.load_state_dict(causal.base_model.state_dict())
    found = completion_hidden_states(model, groups, layers=[1, 3], layout="shared_prefix")
    for layer, states in zip(found.layers, found.states, strict=True):
        torch.testing.assert_close(states, one_by_one(causal, groups, layer), atol=1e-5, rtol=1e-5)


def test_means_per_completion():
    model, groups = tiny_model("qwen3"), random_groups()
    found = completion_hidden_states(model, groups, layers=[1, 2])
    for layer in (0, 1):
        parts = found.states[layer].split([5, 3, 7, 4, 1, 2])
        truth = torch.stack([part.mean(0) for part in parts])
        torch.testing.assert_close(found.means()[layer], truth)


@pytest.mark.parametrize("collate", [collate_shared_prefix, collate_padded])
def test_places_are_those_of_the_tokens(collate):
    batch = collate(random_groups(), 1)
    rows, columns = token_places(batch)
    assert torch.equal(batch.input_ids[rows, columns], batch.targets)
    # The places of two completions never meet, though their tokens may be the same.
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == len(batch.targets)
    assert (batch.branch_ids[rows, columns] >= 1).all()


def test_layers_at_depths():
    model = tiny_model("llama", num_hidden_layers=18)
    assert layers_at_depths(model, (0.25, 0.5, 0.75, 1.0)) == (5, 9, 14, 18)
    assert layers_at_depths(model, (0.0, 0.01)) == (0, 0)
    assert layers_at_depths(tiny_model("gpt_neox", num_hidden_layers=4), (0.25, 0.5, 0.75, 1)) == (1, 2, 3, 4)
    for depth in (-0.1, 1.1):
        with pytest.raises(ValueError, match="depths"):
            layers_at_depths(model, [depth])


@pytest.mark.parametrize("layers", [[], [4], [-5], [0, 1, 17]])
def test_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match="0 to 3"):
        completion_hidden_states(tiny_model(), random_groups(), layers=layers)


def test_an_architecture_that_gives_none():
    model = tiny_model()
    forward = model.base_model.forward

    def silent(*args, output_hidden_states=None, **kwargs):
        return forward(*args, **kwargs)

    base_causal_lm(model).base_model.forward = silent
    with pytest.raises(UserError, match="hidden states"):
        completion_hidden_states(model, random_groups(), layers=[1], layout="padded")
