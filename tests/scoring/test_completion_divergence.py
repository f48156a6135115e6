"""Divergences at completion tokens are those of each sequence alone under the full logits of student and teacher."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role
from tutelage.models.weights import WeightSet
from tutelage.scoring.divergence import completion_divergence
from tutelage.testing.models import tiny_model

KINDS = ["forward_kl", "reverse_kl", "jensen_shannon"]
TREE_ARCHITECTURES = ["llama", "qwen3", "mistral", "gemma3", "gpt_neox", "opt"]


def two_views(prompts=(9, 3, 12), seen=(14, 3, 5), lengths=((5, 3, 7), (4, 1), (2,))):
    """Groups as the student sees them, and as the teacher does: other prompts, of other lengths."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length):
        return tuple(torch.randint(3, 97, (length,), generator=generator).tolist())

    groups = [
        Group(tokens(prompt), tuple(Completion(tokens(n), Role.SAMPLE, finished=False) for n in completions))
        for prompt, completions in zip(prompts, lengths, strict=True)
    ]
    return groups, [replace(group, prompt_ids=tokens(length)) for group, length in zip(groups, seen, strict=True)]


def logps_one_by_one(model, groups):
    """[N, V] from the model's own forward on each sequence alone."""
    logps = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt_ids + completion.token_ids])
            logps.append(model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1].double().log_softmax(1))
    return torch.cat(logps)


def divergence_of(log_p, log_q, kind, mixture=0.5):
    p, q = log_p.exp(), log_q.exp()
    log_m = (mixture * q + (1 - mixture) * p).log()
    terms = {
        "forward_kl": q * (log_q - log_p),
        "reverse_kl": p * (log_p - log_q),
        "jensen_shannon": mixture * q * (log_q - log_m) + (1 - mixture) * p * (log_p - log_m),
    }
    return terms[kind].sum(1)


def gradients(model, divergence):
    model.zero_grad()
    (divergence * torch.linspace(-1, 1, len(divergence))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, truth):
    assert found.keys() == truth.keys()
    assert found
    for name, gradient in truth.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(found[name] / scale, gradient / scale, atol=2e-5, rtol=0)


@pytest.mark.parametrize("architecture", TREE_ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_both_layouts_equal_one_by_one(architecture, kind):
    model = tiny_model(architecture)
    groups, teacher_groups = two_views()
    log_q = logps_one_by_one(model, teacher_groups).detach()
    truth = divergence_of(logps_one_by_one(model, groups), log_q, kind, 0.3)
    truth_gradients = gradients(model, truth)
    for layout in ("shared_prefix", "padded", "auto"):
        found = completion_divergence(
            model, groups, teacher_groups, kind=kind, mixture=0.3, layout=layout, block_size=16
        )
        torch.testing.assert_close(found.double(), truth, atol=3e-5, rtol=1e-5)
        assert_same_gradients(gradients(model, found), truth_gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_as_the_teacher(kind):
    """Of another architecture, size and head, with the same tokens; it learns nothing and keeps its mode."""
    model, teacher = tiny_model("gemma3", final_logit_softcapping=5.0), tiny_model("opt", seed=3).train()
    groups, _ = two_views()
    found = completion_divergence(model, groups, groups, kind=kind, teacher=teacher)
    found_gradients = gradients(model, found)
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    log_q = logps_one_by_one(teacher.eval(), groups).detach()
    truth = divergence_of(logps_one_by_one(model, groups), log_q, kind)
    torch.testing.assert_close(found.double(), truth, atol=3e-5, rtol=1e-5)
    assert_same_gradients(found_gradients, gradients(model, truth))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_of_the_same_model_as_the_teacher(kind, tied):
    """The whole model is trained, head included: the teacher's head is that of its own weights."""
    model = tiny_model("llama", tie_word_embeddings=tied)
    weights = WeightSet(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in weights.parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    groups, teacher_groups = two_views()
    with weights.active(), torch.no_grad():
        log_q = logps_one_by_one(model, teacher_groups)
    truth = divergence_of(logps_one_by_one(model, groups), log_q, kind)
    truth_gradients = gradients(model, truth)
    found = completion_divergence(model, groups, teacher_groups, kind=kind, teacher_context=weights.active)
    torch.testing.assert_close(found.double(), truth, atol=3e-5, rtol=1e-5)
    assert_same_gradients(gradients(model, found), truth_gradients)
    assert all(p.grad is None for p in weights.parameters)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_without_its_adapter_as_the_teacher(kind, targets):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=targets, init_lora_weights=False))
    groups, teacher_groups = two_views()
    log_q = logps_one_by_one(tiny_model(), teacher_groups).detach()
    truth = divergence_of(logps_one_by_one(model, groups), log_q, kind)
    truth_gradients = gradients(model, truth)
    found = completion_divergence(model, groups, teacher_groups, kind=kind, teacher_context=model.disable_adapter)
    torch.testing.assert_close(found.double(), truth, atol=3e-5, rtol=1e-5)
    assert_same_gradients(gradients(model, found), truth_gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_prompt_and_weights_give_zero(kind):
    """Also with dropout on the student's adapter at rest: there the teacher and the student are one."""
    model, (groups, _) = tiny_model("qwen3"), two_views()
    found = completion_divergence(model, groups, groups, kind=kind)
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-6, rtol=0)


def test_the_teacher_drops_nothing():
    model, (groups, teacher_groups) = tiny_model("gpt_neox", hidden_dropout=0.5), two_views()
    log_q, log_p = (logps_one_by_one(model, view).detach() for view in (teacher_groups, groups))
    model.train()
    torch.manual_seed(0)
    student_drops = completion_divergence(model, groups, teacher_groups, kind="forward_kl")
    assert model.training
    assert (student_drops.double() - divergence_of(log_p, log_q, "forward_kl")).abs().max() > 1e-2
    # With a student that drops nothing, a teacher in training mode gives the numbers of one in evaluation mode.
    student = tiny_model("gpt_neox", hidden_dropout=0.5)
    found = completion_divergence(student, groups, teacher_groups, kind="forward_kl", teacher=model)
    torch.testing.assert_close(found.double(), divergence_of(log_p, log_q, "forward_kl"), atol=3e-5, rtol=1e-5)


def test_views_that_do_not_match_are_an_error():
    model, (groups, teacher_groups) = tiny_model(), two_views()
    with pytest.raises(ValueError, match="3 groups of the student, 2 of the teacher"):
        completion_divergence(model, groups, teacher_groups[:2], kind="forward_kl")
    with pytest.raises(ValueError, match="group 0"):
        completion_divergence(model, groups, teacher_groups[::-1], kind="forward_kl")
    swapped = [teacher_groups[0].select([1, 0, 2]), *teacher_groups[1:]]
    with pytest.raises(ValueError, match="group 0"):
        completion_divergence(model, groups, swapped, kind="forward_kl")


def test_vocabularies_that_do_not_match_are_an_error():
    groups, teacher_groups = two_views()
    with pytest.raises(UserError, match="97 tokens, the teacher's 128"):
        completion_divergence(
            tiny_model(), groups, teacher_groups, kind="forward_kl", teacher=tiny_model(vocab_size=128)
        )
