"""The sampler draws from the model's own distribution, reproducibly, and reports true log-probs."""

import platform

import numpy as np
import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from tutelage.errors import NonFiniteLossError, UserError
from tutelage.groups import Group
from tutelage.models.memory import keep_freed_memory
from tutelage.sampling import SamplingParams, TransformersSampler
from tutelage.sampling.base import uniforms
from tutelage.sampling.transformers import draw_tokens
from tutelage.scoring.logps import completion_logps
from tutelage.testing.models import tiny_model

PARAMS = SamplingParams(max_completion_length=12, stop_ids=frozenset({2}))


def random_prompts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 15, (count,), generator=generator).tolist()
    return [tuple(torch.randint(3, 97, (length,), generator=generator).tolist()) for length in lengths]


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox", "opt", "mistral"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_equal_a_fresh_forward(architecture, temperature):
    model = tiny_model(architecture, initializer_range=0.2)
    prompts = random_prompts(9)
    params = SamplingParams(max_completion_length=12, stop_ids=frozenset(range(40, 50)), temperature=temperature)
    samples = TransformersSampler(model, batch_size=6).sample(prompts, params, num_samples=3)
    assert {sample.finished for drawn in samples for sample in drawn} == {True, False}
    if temperature == 1:
        groups = [Group(p, tuple(s.completion for s in drawn)) for p, drawn in zip(prompts, samples, strict=True)]
        reported = torch.tensor([sum(s.token_logps) for drawn in samples for s in drawn])
        torch.testing.assert_close(reported, completion_logps(model, groups), atol=1e-4, rtol=1e-5)
    else:
        sample = samples[0][0]
        ids = torch.tensor([prompts[0] + sample.token_ids])
        logps = torch.log_softmax(model(ids).logits[0, len(prompts[0]) - 1 : -1] / temperature, -1)
        expected = logps.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.token_logps), expected, atol=1e-5, rtol=1e-5)


def assert_same_but_for_rounding(found, expected):
    """The same samples; one row may differ, where a random number falls on the edge between two tokens.

    Batches of other shapes round differently, by some 1e-7 of a probability, so about one draw in a million may change. What
    depends on the batch by mistake changes nearly every row.
    """
    assert len(found) == len(expected)
    assert sum(one != other for one, other in zip(found, expected, strict=True)) <= 1


def test_batch_size_and_neighbours_change_no_sample():
    model, prompts = tiny_model("qwen3"), random_prompts(64)
    drawn = {
        size: TransformersSampler(model, batch_size=size).sample(prompts, PARAMS, num_samples=2) for size in (1, 7, 64)
    }
    tokens = {size: [[s.token_ids for s in row] for row in samples] for size, samples in drawn.items()}
    for size in (1, 7):
        assert_same_but_for_rounding(tokens[size], tokens[64])
    alone = [
        TransformersSampler(model).sample([prompts[row]], PARAMS, num_samples=2, rows=[row])[0]
        for row in range(40, 60)
    ]
    assert_same_but_for_rounding([[s.token_ids for s in drawn] for drawn in alone], tokens[64][40:60])
    assert len({row[0] for row in tokens[64]}) > 32, "different rows draw different samples"
    assert sum(row[0] != row[1] for row in tokens[64]) > 32, "different draws of a prompt differ"


def test_prompts_that_run_a_few_at_a_time_change_no_sample(monkeypatch):
    model, prompts = tiny_model("gemma3"), random_prompts(9)
    together = TransformersSampler(model).sample(prompts, PARAMS, num_samples=2)
    monkeypatch.setattr("tutelage.sampling.decoding._CPU_PREFILL_TOKENS", 30)  # two or three prompts
    apart = TransformersSampler(model).sample(prompts, PARAMS, num_samples=2)
    assert_same_but_for_rounding(*([[s.token_ids for s in drawn] for drawn in run] for run in (apart, together)))


def test_freed_memory_is_kept_where_the_c_library_can():
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_seed_and_stage_change_the_samples():
    model, prompts = tiny_model(), random_prompts(8)
    sampler = TransformersSampler(model)
    first = sampler.sample(prompts, PARAMS)
    assert first == sampler.sample(prompts, PARAMS)
    assert first != sampler.sample(prompts, PARAMS, stage=1)
    assert first != sampler.sample(prompts, SamplingParams(12, frozenset({2}), seed=1))


def test_ends_at_a_stop_token_or_at_the_limit():
    model, prompts = tiny_model(initializer_range=0.05), random_prompts(50)
    stop = frozenset(range(2, 20))
    params = SamplingParams(max_completion_length=6, stop_ids=stop)
    samples = [drawn[0] for drawn in TransformersSampler(model).sample(prompts, params)]
    for sample in samples:
        assert not stop.intersection(sample.token_ids[:-1])
        assert sample.finished == (sample.token_ids[-1] in stop)
        assert sample.finished or len(sample.token_ids) == 6
        assert len(sample.token_logps) == len(sample.token_ids)
    assert 0 < sum(sample.finished for sample in samples) < 50


def test_finished_rows_leave_the_batch():
    model, prompts = tiny_model(initializer_range=0.05), random_prompts(64)
    params = SamplingParams(max_completion_length=40, stop_ids=frozenset(range(2, 20)))
    sampler, rows = TransformersSampler(model, batch_size=64), []
    sampler.sample(prompts[:1], params)  # probes the model
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    sampler.sample(prompts, params)
    hook.remove()
    assert rows[0] == 64
    assert rows[-1] < 16
    assert rows == sorted(rows, reverse=True)


def test_greedy_equals_generate():
    model, prompts = tiny_model("gemma3"), random_prompts(5)
    params = SamplingParams(max_completion_length=10, stop_ids=frozenset({2}), temperature=0)
    samples = TransformersSampler(model).sample(prompts, params)
    for prompt, (sample,) in zip(prompts, samples, strict=True):
        ids = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=10, do_sample=False
        )
        expected = ids[0, len(prompt) :].tolist()
        if expected != list(sample.token_ids):  # only where two tokens are equally likely, but for rounding
            place = next(
                i for i, pair in enumerate(zip(expected, sample.token_ids, strict=False)) if len(set(pair)) > 1
            )
            logits = model(torch.tensor([[*prompt, *expected[:place]]])).logits[0, -1]
            assert abs(logits[expected[place]] - logits[sample.token_ids[place]]) < 1e-5


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return ((counts - expected) ** 2 / expected).sum()


def test_frequencies_match_the_models_distribution():
    """2,000 draws of two tokens against the exact distribution over pairs; 99.9% quantiles of chi-square."""
    model = tiny_model(vocab_size=6, initializer_range=0.5)
    prompt, draws = (3, 4, 5), 2000
    params = SamplingParams(max_completion_length=2)
    samples = TransformersSampler(model, batch_size=500).sample([prompt], params, num_samples=draws)[0]
    first = torch.softmax(model(torch.tensor([prompt])).logits[0, -1], -1)
    second = torch.softmax(model(torch.tensor([[*prompt, t] for t in range(6)])).logits[:, -1], -1)
    exact = (first[:, None] * second).flatten().detach().double().numpy()
    counts = np.zeros(36)
    for sample in samples:
        counts[sample.token_ids[0] * 6 + sample.token_ids[1]] += 1
    common = exact * draws >= 5  # chi-square needs expected counts of at least five: the rest is one cell
    exact, counts = np.append(exact[common], exact[~common].sum()), np.append(counts[common], counts[~common].sum())
    degrees = len(exact) - 1
    quantile = degrees * (1 - 2 / (9 * degrees) + 3.09 * np.sqrt(2 / (9 * degrees))) ** 3  # Wilson-Hilferty
    assert chi_square(counts, exact) < quantile
    shifted = np.roll(exact, 1)
    assert chi_square(counts, shifted) > quantile, "the test can tell another distribution"


def test_draws_invert_the_cumulative_distribution_over_many_blocks():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 5000, generator=generator)
    cumulative = torch.softmax(logits.double(), 1).cumsum(1)
    for u in (0.0, 0.1, 0.5, 0.999999):
        tokens, logps = draw_tokens(logits, np.full(4, u), params=SamplingParams())
        torch.testing.assert_close(logps, torch.log_softmax(logits, 1).gather(1, tokens[:, None])[:, 0])
        upper = cumulative.gather(1, tokens[:, None])[:, 0]
        assert (upper >= u - 1e-5).all()
        assert (upper - logps.double().exp() <= u + 1e-5).all()


def test_a_few_rows_at_a_time_and_all_at_once_draw_the_same(monkeypatch):
    """Against transformers' filters one after the other, over many blocks."""
    logits = 3 * torch.randn(7, 2000, generator=torch.Generator().manual_seed(0))
    numbers = np.linspace(0.05, 0.95, 7)
    params = SamplingParams(temperature=0.7, top_k=900, top_p=0.9)
    at_once = draw_tokens(logits, numbers, params=params)
    monkeypatch.setattr("tutelage.sampling.transformers._CPU_DRAW_ELEMENTS", 3 * 2000)  # 3, 3 and 1
    few = draw_tokens(logits, numbers, params=params)
    assert torch.equal(few[0], at_once[0])
    filtered = TopPLogitsWarper(0.9)(None, TopKLogitsWarper(900)(None, logits / 0.7))
    cumulative = filtered.double().softmax(1).cumsum(1)
    expected = torch.searchsorted(cumulative, torch.tensor(numbers)[:, None])
    assert few[0].tolist() == expected[:, 0].tolist()
    torch.testing.assert_close(few[1], filtered.log_softmax(1).gather(1, expected)[:, 0])


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.full((3, 2000), -torch.inf)
    logits[:, [5, 700, 1300]] = 0.0
    numbers = np.array([0.0, 0.5, np.nextafter(1, 0)])
    tokens, _ = draw_tokens(logits, numbers, params=SamplingParams())
    assert tokens.tolist() == [5, 700, 1300]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(temperature):
    logits = torch.zeros(3, 1000)
    logits[1, 7] = torch.nan
    with pytest.raises(NonFiniteLossError, match="not finite"):
        draw_tokens(logits, np.full(3, 0.5), params=SamplingParams(temperature=temperature))


@pytest.mark.parametrize(("params", "allowed"), [({"top_k": 2}, {0, 1}), ({"top_p": 0.6}, {0, 1}), ({}, {0, 1, 2, 3})])
def test_filters(params, allowed):
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().expand(400, 4)
    tokens, logps = draw_tokens(logits, (np.arange(400) + 0.5) / 400, params=SamplingParams(**params))
    assert set(tokens.tolist()) == allowed
    mass = sum((0.4, 0.3, 0.2, 0.1)[i] for i in allowed)
    assert logps[tokens == 0][0].exp().item() == pytest.approx(0.4 / mass, abs=1e-5)


def test_uniforms_are_uniform_and_uncorrelated():
    rows = np.arange(20_000)
    first = uniforms(0, 0, rows, np.zeros_like(rows), 0)
    second = uniforms(0, 0, rows, np.zeros_like(rows), 1)
    assert first.min() >= 0
    assert first.max() < 1
    assert abs(first.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.03


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(UserError, match="cannot be sampled from"):
        TransformersSampler(tiny_model("mamba"))
