"""The one-file reference of IRFT: its numbers are the engine's, and its sampler draws from the policy."""

from __future__ import annotations

import ast
import importlib.util
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tutelage.sampling import SamplingParams, TransformersSampler
from tutelage.testing.models import tiny_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "irft_in_one_file.py"
SETTINGS = {"beta": 0.5, "batch_size": 4}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("irft_in_one_file", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_it_is_one_short_file_of_torch_and_transformers():
    text = EXAMPLE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    imported = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else name.name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in node.names
    }
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}


class Recorded(TransformersSampler):
    """Remembers what it draws, by stage and prompt."""

    def __init__(self, model):
        super().__init__(model)
        self.samples = {}

    def sample(self, prompts, params, *, stage=0, **options):
        drawn = super().sample(prompts, params, stage=stage, **options)
        for prompt, samples in zip(prompts, drawn, strict=True):
            self.samples[stage, tuple(prompt)] = [list(sample.token_ids) for sample in samples]
        return drawn


@pytest.mark.parametrize(("stages", "num_samples"), [(1, 1), (3, 2)], ids=["spin", "irft"])
def test_its_numbers_are_the_engines(example, training, stages, num_samples):
    """Tokens, and of each step loss, margin and weights. SGD: Adam divides by its noise where a gradient vanishes."""
    rows = training.rows(24)
    demonstrations = [example.encode(training.tokenizer, row["prompt"], row["completion"]) for row in rows]
    policy = training.model()
    sampler = Recorded(policy)
    trainer = training.run(
        "irft",
        model=policy,
        options={"sampler": sampler},
        data=rows,
        optim="sgd",
        learning_rate=0.05,
        train_sampling_strategy="sequential",
        max_completion_length=12,
        stages_per_epoch=stages,
        num_samples=num_samples,
        beta=[SETTINGS["beta"]],
    )
    assert [list(row.prompt) for row in demonstrations] == list(trainer.train_dataset["prompt_ids"])
    assert [list(row.completion) for row in demonstrations] == list(trainer.train_dataset["demonstration_ids"])

    assert {len(drawn) for drawn in sampler.samples.values()} == {num_samples}
    model = training.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def draw(stage, prompt):
        return sampler.samples[stage, tuple(prompt)]

    steps = list(example.irft(model, demonstrations, optimizer, draw, stages=stages, **SETTINGS))

    logged = [line for line in trainer.state.log_history if "rewards/margin" in line]
    assert [step.loss for step in steps] == pytest.approx([line["loss"] for line in logged], abs=1e-4)
    assert [step.margin for step in steps] == pytest.approx([line["rewards/margin"] for line in logged], abs=1e-4)
    moved = 0.0
    for expected, found, initial in zip(
        trainer.model.parameters(), model.parameters(), training.model().parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        moved = max(moved, (found - initial).abs().max().item())
    assert moved > 1e-3


def test_a_stage_begins_without_a_margin_and_gains_one(example, capsys):
    steps = example.main(["--stages", "2", "--max_tokens", "4"])
    for stage in range(2):
        first, *_, last = [step for step in steps if step.stage == stage]
        assert first.loss == pytest.approx(math.log(2), abs=1e-5)
        assert first.margin == pytest.approx(0, abs=1e-5)
        assert last.margin > 0.005
        assert last.loss < first.loss
    assert capsys.readouterr().out.count("stage ") == 2


# --- its sampler -----------------------------------------------------------------------------------------------------

PROMPT, EOS, TOKENS, DRAWS = [5, 3, 8], 2, 2, 4000


def exact_distribution(example, model):
    """The probability of every completion of at most two tokens."""
    vocabulary = range(model.config.vocab_size)
    whole = [[EOS], *([first, second] for first in vocabulary if first != EOS for second in vocabulary)]
    with torch.no_grad():
        return {tuple(ids): example.logp(model, PROMPT, ids).exp().item() for ids in whole}


def standard_deviations_off(counts, distribution):
    """How far Pearson's χ² lies from its mean, in standard deviations; rare completions are counted as one."""
    draws = sum(counts.values())
    common = [ids for ids, probability in distribution.items() if draws * probability >= 5]
    cells = [(counts[ids], draws * distribution[ids]) for ids in common]
    rest = draws - sum(expected for _, expected in cells)
    if rest >= 5:
        cells.append((draws - sum(found for found, _ in cells), rest))
    statistic = sum((found - expected) ** 2 / expected for found, expected in cells)
    freedom = len(cells) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.fixture(scope="module")
def policy():
    return tiny_model(vocab_size=11)


@pytest.fixture(scope="module")
def distribution(example, policy):
    found = exact_distribution(example, policy)
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    return found


def test_its_samples_have_the_policys_distribution(example, policy, distribution):
    torch.manual_seed(0)
    drawn = example.sample(policy, PROMPT, num_samples=DRAWS, max_tokens=TOKENS, eos_id=EOS)
    assert set(map(tuple, drawn)) <= distribution.keys()  # nothing after the end, nothing cut before it
    assert abs(standard_deviations_off(Counter(map(tuple, drawn)), distribution)) < 4


def test_so_have_the_engines(policy, distribution):
    params = SamplingParams(max_completion_length=TOKENS, stop_ids=frozenset({EOS}))
    (drawn,) = TransformersSampler(policy, batch_size=500).sample([PROMPT], params, num_samples=DRAWS)
    counts = Counter(tuple(sample.token_ids) for sample in drawn)
    assert abs(standard_deviations_off(counts, distribution)) < 4


def test_another_temperature_would_show(example, policy, distribution, monkeypatch):
    monkeypatch.setattr(torch, "multinomial", lambda p, n, draw=torch.multinomial: draw(p**1.25, n))
    torch.manual_seed(0)
    drawn = example.sample(policy, PROMPT, num_samples=DRAWS, max_tokens=TOKENS, eos_id=EOS)
    assert abs(standard_deviations_off(Counter(map(tuple, drawn)), distribution)) > 10
