"""Fixtures of the planted task, on which RFT is tried as a whole."""

import textwrap

import pytest
from datasets import Dataset

from rft_runs import QUESTIONS, WORDS
from training_runs import Training


@pytest.fixture(scope="session")
def guesser(tmp_path_factory):
    """A model that answers each question with one of four words, about equally often."""
    training = Training(tmp_path_factory.mktemp("guesser"))
    rows = [{"prompt": question, "completion": word} for question in QUESTIONS for word in WORDS]
    trainer = training.run(
        "sft",
        data=Dataset.from_list(rows),
        num_train_epochs=6,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        logging_steps=1000,
    )
    trainer.export(training.folder / "guesser")
    return str(training.folder / "guesser")


@pytest.fixture
def marks(tmp_path, monkeypatch):
    """A verifier: whether the answer is the first word."""
    source = f"""
        def right(text, row):
            return float(text == {WORDS[0]!r})
    """
    (tmp_path / "tutelage_rft_marks.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    return "tutelage_rft_marks:right"
