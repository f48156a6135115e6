"""RFT on tiny models: a task whose right answer is known."""

import pytest
import torch
from datasets import Dataset
from test_rft_choice import chosen

from rft_runs import QUESTIONS, WORDS, run
from training_runs import history
from tutelage.data import Tokenization
from tutelage.groups import Group, Role
from tutelage.models.loading import load_model
from tutelage.scoring.logps import cached_logps


def chances(model, training, words):
    tokenization = Tokenization(training.tokenizer, max_completion_length=8)
    groups = [
        Group(
            tokenization.prompt_ids(question),
            tuple(tokenization.completion(question, word, Role.SAMPLE) for word in words),
        )
        for question in QUESTIONS
    ]
    return torch.tensor(cached_logps(model, groups)).exp().mean(0).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_answer_is_learned(training, guesser, marks, seed):
    """Demonstrations always give the first word; the reward finds it, and the policy follows."""
    before = chances(load_model(guesser), training, WORDS)
    assert all(0.1 < chance < 0.5 for chance in before)
    rows = [{"prompt": question, "completion": WORDS[0]} for question in QUESTIONS]
    trainer = run(
        training,
        model=load_model(guesser),
        adapter=True,
        data=Dataset.from_list(rows),
        seed=seed,
        verifier=marks,
        num_train_epochs=3,
        num_samples=4,
        validation_rows=8,
        reward_warmup_stages=1,
        learning_rate=5e-3,
        truncated_samples="floor",
        reward_epochs=4,
        beta=0.1,
    )
    after = chances(trainer.policy, training, WORDS)
    assert after[0] > before[0] + 0.2
    verifier_scores = {entry.stage: entry.verifier_score for entry in trainer.stages.phase.selection}
    assert verifier_scores[chosen(trainer)] > verifier_scores[0] + 0.1
    assert history(trainer, "validation/verifier_score")[0] == pytest.approx(verifier_scores[0])
    assert history(trainer, "validation/verifier_gap")[-1] > 0
    assert trainer.record(name="x").selection == trainer.stages.phase.selection
