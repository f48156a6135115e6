"""Operations are counted where tokens pass through a model, and only those that training takes."""

import copy

import pytest
import torch

from rft_runs import run
from tutelage.data.tokenized import group_from_row
from tutelage.training.flops import counted, parameters_per_token
from tutelage.training.metrics import Costs


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_that_a_token_meets(training, tied):
    """The embedding, which is looked up, is left out; the head is in once."""
    model = training.model(tie_word_embeddings=tied)
    every = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    assert parameters_per_token(model) == (every if tied else every - embedding)


def test_two_forward_and_six_with_a_backward_pass(training):
    model, found = training.model(), []

    def count(operations, *, trains):
        found.append((operations, trains))

    tokens, n = torch.ones(2, 5, dtype=torch.long), parameters_per_token(model)
    with counted(model, count):
        model(input_ids=tokens)
        with torch.no_grad():
            model(inputs_embeds=model.get_input_embeddings()(tokens))
        copy.deepcopy(model)(input_ids=tokens)
    model(input_ids=tokens)
    assert found == [(6 * n * 10, True), (2 * n * 10, False)], "neither a copy nor what comes after is counted"


def test_a_kind_of_work_is_what_is_timed():
    costs = Costs()
    costs.count_flops(1, trains=True)
    costs.count_flops(2, trains=False)
    with costs.timed("validation"):
        costs.count_flops(4, trains=False)
        with costs.timed("sampling"):
            costs.count_flops(8, trains=False)
    with costs.timed("evaluation"):
        costs.count_flops(16, trains=False)
        with costs.timed("sampling"):
            costs.count_flops(32, trains=False)
    assert costs.flops == {"training": 1, "other": 2, "validation": 4, "sampling": 8}


def test_what_a_checkpoint_keeps():
    costs, again, unknown = Costs(), Costs(), Costs()
    costs.count_flops(3, trains=True)
    again.load_state_dict(costs.state_dict())
    again.count_flops(1, trains=True)
    assert again.flops == {"training": 4}
    unknown.load_state_dict({"seconds": {}, "tokens": [1, 2, 3]})  # of an earlier version
    unknown.count_flops(1, trains=True)
    assert unknown.flops is None
    assert unknown.state_dict()["flops"] is None


def test_sft(training):
    """Rows of one length have no padding, so the operations follow from the data. The evaluation counts for nothing."""
    data = training.rows(8).map(lambda row: {"completion": " 7"})
    data = data.map(lambda row: {"prompt": "What is 3 + 4?"})
    trainer = training.run("sft", data=data, options={"eval_dataset": data}, eval_strategy="epoch")
    tokens = sum(len(group_from_row(row)) for row in trainer.train_dataset)
    record = trainer.record(name="x")
    # The last token of a row predicts nothing, and may be left out of the pass.
    most = 6 * parameters_per_token(trainer.policy) * tokens
    assert record.flops.keys() == {"training", "total"}
    assert most * (1 - 8 / tokens) <= record.flops["training"] <= most
    assert record.flops["total"] == record.flops["training"]


@pytest.mark.parametrize("own_reward", [False, True])
def test_rft(training, sft_folder, own_reward):
    """A reward with a body of its own is counted as one that shares the policy's is."""
    settings = {"reward_model_name_or_path": sft_folder} if own_reward else {}
    trainer = run(training, data=training.rows(16), **settings)
    flops = trainer.record(name="x").flops
    assert {"sampling", "reference", "reward", "validation", "total"} <= flops.keys()
    assert flops["total"] == pytest.approx(sum(value for kind, value in flops.items() if kind != "total"))
    fit = 6 * parameters_per_token(trainer.policy) * trainer.costs.reward_tokens
    assert fit <= flops["reward"] <= 20 * fit, "completions, their prompts, and scoring"
