"""Log-probs, gradients and the sampler against a plain implementation in float32, on one sequence at a time.

In float32 they must be the same but for the order of sums. In bfloat16 they may be off by twice as much as the plain
implementation in bfloat16 is, and a little for luck.
"""

from dataclasses import replace

import pytest
import torch
from benchmarks.gpu import contrast, plain_logps, references_off
from benchmarks.gpu_run import random_groups
from gpu_helpers import mixed, random_policies, relative_error

from tutelage.groups import Group
from tutelage.sampling import SamplingParams, TransformersSampler
from tutelage.scoring.logps import completion_logps

PRECISIONS = ["float32", "bfloat16"]
LAYOUTS = ["shared_prefix", "padded"]


def one_by_one(model, groups):
    """[C] the plain implementation on one row at a time, so that no padding takes part."""
    alone = [group.select([i]) for group in groups for i in range(len(group.completions))]
    return torch.cat([plain_logps(model, [group]) for group in alone])


def gradient(model, loss):
    """∂loss/∂(trained weights), as one float32 vector."""
    parts = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return torch.cat([part.float().flatten() for part in parts])


def per_token_error(found_C, truth_C, groups):
    """Root mean square over completions of the difference divided by the completion's length: nats per token."""
    lengths = torch.tensor([len(c.token_ids) for group in groups for c in group.completions]).to(truth_C)
    return ((found_C - truth_C) / lengths).square().mean().sqrt().item()


def log_prob_errors(setting, precision, logps_of):
    """Errors of log-probs and of gradients: (found, limit) each."""
    models = random_policies(setting)
    exact, model = models["float32"], models[precision]
    groups = random_groups(setting.sizes.check, setting.sizes.checked["vocab_size"], ragged=True)
    with torch.no_grad():
        truth_C = one_by_one(exact, groups)
    values = iter(truth_C.tolist())
    references = references_off([[next(values) for _ in group.completions] for group in groups])
    true_gradient = gradient(exact, contrast(one_by_one(exact, groups), groups, references))

    def errors(logps_of):
        with mixed(setting, precision):
            logps_C = logps_of(model, groups)
            loss = contrast(logps_C, groups, references)
        return (
            per_token_error(logps_C.detach(), truth_C, groups),
            relative_error(gradient(model, loss), true_gradient),
        )

    limits = (1e-4, 1e-3)
    if precision == "bfloat16":
        plain = errors(one_by_one)
        limits = (2 * plain[0] + 0.003, 2 * plain[1] + 0.01)
    return zip(errors(logps_of), limits, strict=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_and_gradients(setting, precision, layout):
    logps, gradients = log_prob_errors(
        setting, precision, lambda model, groups: completion_logps(model, groups, layout=layout)
    )
    assert logps[0] <= logps[1], "log-probs, nats per token"
    assert gradients[0] <= gradients[1], "gradient of the adapters, relative"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_a_hundredth_off_would_show(setting, precision, layout):
    logps, _ = log_prob_errors(
        setting, precision, lambda model, groups: 1.01 * completion_logps(model, groups, layout=layout)
    )
    assert logps[0] > logps[1]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_a_fifth_off_would_show(setting, precision, layout):
    def steeper(model, groups):
        logps_C = completion_logps(model, groups, layout=layout)
        return logps_C + 0.2 * (logps_C - logps_C.detach())

    logps, gradients = log_prob_errors(setting, precision, steeper)
    assert logps[0] <= logps[1]
    assert gradients[0] > gradients[1]


@torch.no_grad()
def sampler_errors(setting, precision, sampler_of):
    """How far the sampler's log-probs of what it drew are off the plain ones and off ours, and the limit."""
    models = random_policies(setting)
    model = models[precision]
    groups = random_groups(setting.sizes.check, setting.sizes.checked["vocab_size"], ragged=True)
    prompts = [group.prompt_ids for group in groups]
    params = SamplingParams(max_completion_length=setting.sizes.check.completion_tokens)
    with mixed(setting, precision):
        drawn = sampler_of(model).sample(prompts, params, num_samples=3)
        groups = [
            Group(prompt, tuple(sample.completion for sample in samples))
            for prompt, samples in zip(prompts, drawn, strict=True)
        ]
        ours_C, plain_C = completion_logps(model, groups, layout="shared_prefix"), one_by_one(model, groups)
    truth_C = one_by_one(models["float32"], groups)
    reported_C = torch.tensor([sum(sample.token_logps) for samples in drawn for sample in samples]).to(ours_C)
    limit = 1e-4 if precision == "float32" else 2 * per_token_error(plain_C, truth_C, groups) + 0.003
    return per_token_error(reported_C, truth_C, groups), per_token_error(reported_C, ours_C, groups), limit


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_sampler_reports_the_log_probs_of_what_it_drew(setting, precision):
    beside_plain, beside_ours, limit = sampler_errors(setting, precision, TransformersSampler)
    assert beside_plain <= limit
    assert beside_ours <= limit


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_wrong_first_log_prob_would_show(setting, precision):
    class Wrong(TransformersSampler):
        def sample(self, *args, **kwargs):
            drawn = super().sample(*args, **kwargs)
            return [[replace(s, token_logps=(0.0, *s.token_logps[1:])) for s in samples] for samples in drawn]

    beside_plain, beside_ours, limit = sampler_errors(setting, precision, Wrong)
    assert min(beside_plain, beside_ours) > limit
