"""docs/new-algorithm.md, followed word by word."""

import re
from pathlib import Path

import pytest
import torch

from training_runs import SETTINGS, SGD, assert_same_weights, distance, history
from tutelage.algorithms.registry import NAMES, find
from tutelage.errors import UserError
from tutelage.losses import dft_loss

PAGE = Path(__file__).resolve().parents[2] / "docs" / "new-algorithm.md"


@pytest.fixture(scope="module")
def page():
    """What the page's code blocks define."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    module = {"__name__": "dft"}
    exec(compile("\n".join(blocks), str(PAGE), "exec"), module)
    return module


def test_the_algorithm_of_the_page_trains(training, page):
    settings = {**SETTINGS, **SGD, "train_sampling_strategy": "sequential"}
    args = page["DFTConfig"](output_dir=str(training.folder / "page"), **settings)
    trainer = page["DFTTrainer"](training.model(), args, training.rows(), processing_class=training.tokenizer)
    trainer.train()
    option = training.run("sft", name="option", loss_kind="dft", train_sampling_strategy="sequential", **SGD)
    assert distance(trainer.model, training.model()) > 1e-4
    assert_same_weights(trainer.model, option.model)
    assert history(trainer, "loss") == history(option, "loss")
    assert trainer.record(name="x").algorithm == "dft"


def test_the_loss_of_the_page_is_the_projects(page):
    logps = -torch.rand(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(page["dft_loss"](logps), dft_loss(logps))


def test_dft_trains_as_a_loop_written_out(training):
    """From the model's own logits, one row at a time: −Σ p log p / tokens, the first p without gradient."""
    trainer = training.trainer("sft", loss_kind="dft", train_sampling_strategy="sequential", max_steps=2, **SGD)
    model, rows = training.model(), list(trainer.train_dataset)
    optimizer = torch.optim.SGD(model.parameters(), lr=SGD["learning_rate"])
    trainer.train()
    for start in (0, 4):
        total, tokens = 0.0, 0
        for row in rows[start : start + 4]:
            ids = torch.tensor([[*row["prompt_ids"], *row["demonstration_ids"]]])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            logps = logps[len(row["prompt_ids"]) - 1 :]
            total, tokens = total - (logps.exp().detach() * logps).sum(), tokens + len(logps)
        optimizer.zero_grad()
        (total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert distance(model, training.model()) > 1e-4
    assert_same_weights(trainer.model, model, 1e-6)


def test_a_loss_kind_that_is_none(tmp_path):
    with pytest.raises(UserError, match="'loss_kind': must be one of nll, dft, asft, psft, iw, not 'ipo'"):
        find("sft").config(output_dir=str(tmp_path), loss_kind="ipo", **SETTINGS)


def test_each_name_has_its_page():
    docs = PAGE.parent
    for name in NAMES:
        found = find(name)
        assert found.info.name == name
        assert (docs / found.info.page).exists()
    with pytest.raises(UserError, match="no algorithm 'gail'"):
        find("gail")
