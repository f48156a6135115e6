"""RFT on tiny models: what is exported."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from rft_runs import QUICK, over_samples, phases, plant, saved
from training_runs import Training
from tutelage.cli import main
from tutelage.groups import Group, Role
from tutelage.models.loading import base_causal_lm, load_model, load_tokenizer
from tutelage.scoring.logps import cached_logps

SETUPS = ["adapter", "full", "full, tied", "adapter, tied", "separate, adapter", "separate, full"]


@pytest.fixture(scope="module", params=SETUPS)
def exported(request, tmp_path_factory):
    """A run that is over and has written its policy and its reward."""
    training = Training(tmp_path_factory.mktemp("exported"))
    architecture = {"architecture": "gemma3", "num_hidden_layers": 3} if "tied" in request.param else {}
    policy = saved(training, model=training.model(pad_token_id=None, **architecture))
    settings = {}
    if "separate" in request.param:
        small = training.model("gpt_neox", hidden_size=16, num_hidden_layers=1, pad_token_id=None)
        settings["reward_model_name_or_path"] = saved(training, "small", small)
    options = {"peft_config": training.lora() if "adapter" in request.param else None}
    trainer = training.trainer(
        "rft",
        model=load_model(policy),
        data=training.rows(20),
        options=options,
        max_completion_length=6,
        **{**QUICK, "num_train_epochs": 2, **settings},
    )
    plant(trainer, over_samples)  # so that the policy moves
    trainer.train()
    del trainer.reward.scores
    trainer.export(training.folder / "out")
    assert phases(trainer) == [1] * 4
    return trainer, training.folder / "out"


def test_the_exported_policy_is_the_trainers(exported):
    trainer, folder = exported
    policy = load_model(str(folder), dtype=torch.float32)
    groups = trainer.stages.store.groups(0)
    found, expected = (torch.tensor(cached_logps(model, groups)) for model in (policy, trainer.policy))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert len(load_tokenizer(str(folder))) == len(trainer.tokenization.tokenizer)
    base, theirs = base_causal_lm(policy), base_causal_lm(trainer.policy)
    tied = theirs.config.tie_word_embeddings
    assert (base.get_input_embeddings().weight.data_ptr() == base.get_output_embeddings().weight.data_ptr()) == tied


def test_a_merged_policy_is_the_same_one(exported, tmp_path):
    """Merged into its base, saved and loaded without peft; embeddings that were tied still are."""
    trainer, folder = exported
    policy = load_model(str(folder / "policy"))
    whole = policy.merge_and_unload() if isinstance(policy, PeftModel) else policy
    whole.save_pretrained(tmp_path / "merged")
    merged = load_model(str(tmp_path / "merged"))
    assert not isinstance(merged, PeftModel)
    groups = trainer.stages.phase.candidates.rows.groups
    found, expected = (torch.tensor(cached_logps(model, groups)) for model in (merged, trainer.policy))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    tied = merged.config.tie_word_embeddings
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied


def test_each_exported_adapter_names_its_base(exported):
    trainer, folder = exported
    for part in ("policy", "reward"):
        config = folder / part / "adapter_config.json"
        if config.exists():
            of = trainer.policy if part == "policy" else trainer.reward.model
            name = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
            assert name == base_causal_lm(of).name_or_path
    shared = trainer.reward.model is trainer.policy
    assert shared == (base_causal_lm(trainer.reward.model).name_or_path == base_causal_lm(trainer.policy).name_or_path)


def test_the_same_completion_gets_one_reward_everywhere(exported, tmp_path, capsys):
    """While fitting, from the trainer, from `tutelage score` and from transformers alone."""
    trainer, folder = exported
    rows = [{"prompt": f"What is {i} + {i}?", "completion": f" The answer is the number {2 * i}"} for i in range(4)]
    rows += [{"prompt": "Yes?", "completion": " No"}]
    data, output = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["score", "--reward", str(folder), "--dataset_name", str(data), "--output", str(output)]) == 0, (
        capsys.readouterr().err
    )
    scored = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    found = torch.tensor([line["completions"][0]["reward"] for line in scored])
    groups = [
        Group(
            trainer.tokenization.prompt_ids(row["prompt"]),
            (trainer.tokenization.completion(row["prompt"], row["completion"], Role.DEMONSTRATION),),
        )
        for row in rows
    ]
    assert {group.completions[0].finished for group in groups} == {True, False}
    expected = trainer.reward.score(groups)
    trainer.reward.model.eval()
    with torch.no_grad(), trainer.reward.active():
        fitted = trainer.reward.rewards(groups)
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        alone = torch.cat(
            [plain.eval()(torch.tensor([[*g.prompt_ids, *g.completions[0].token_ids]])).logits[:, 0] for g in groups]
        )
    assert expected.std() > 1e-2
    for other in (found, fitted, alone):
        torch.testing.assert_close(other, expected, atol=1e-5, rtol=1e-5)
