"""Where transformers has no model for sequence classification that computes a reward, our own loader does; it is known before."""

import json

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tutelage.data import Tokenization
from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role
from tutelage.models.loading import load_model
from tutelage.rewards import ExplicitReward
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer("zephyr")

SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}

GROUPS = [
    Group((5, 6, 7), (Completion((8, 9, 10), Role.SAMPLE, True), Completion((11, 12), Role.SAMPLE, True))),
    Group((5, 9, 7, 3), (Completion((8,), Role.SAMPLE, True),)),
]

ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True),
    "rslora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=True),
    "saved modules": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", modules_to_save=["norm"]),
    "vera": VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


def base(folder, architecture="llama"):
    """A saved model, loaded again, so that an adapter can name it."""
    torch.manual_seed(0)
    sizes = SIZES | (EXPERTS if architecture == "olmoe" else {})
    AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes)).save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    return load_model(str(folder / "base"))


def learned(model):
    """A reward with random weights, of which every one matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
        reward = ExplicitReward.fresh(model.eval(), shared=False, layout="padded")
        reward.head.weight.normal_()
    return reward


def plain_scores(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    rows = [[*group.prompt_ids, *c.token_ids] for group in GROUPS for c in group.completions]
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "vera"])
def test_transformers_gives_an_adapters_rewards(kind, tmp_path):
    reward = learned(get_peft_model(base(tmp_path), ADAPTERS[kind]))
    assert reward.why_no_classifier is None
    reward.save_pretrained(tmp_path / "reward", TOKENIZER)
    truth = reward.score(GROUPS)
    assert truth.std() > 0.1
    torch.testing.assert_close(plain_scores(tmp_path / "reward"), truth, atol=1e-3, rtol=0)
    found = ExplicitReward.from_pretrained(tmp_path / "reward").score(GROUPS)
    torch.testing.assert_close(found, truth, atol=1e-3, rtol=0)
    assert json.loads((tmp_path / "reward" / "reward.json").read_text(encoding="utf-8"))["loaded_by"] == "transformers"


OWN = [("cohere", None), ("granite", None), ("olmoe", None), ("bert", None), ("cohere", "dora"), ("granite", "lora"), ("llama", "vera")]  # fmt: skip


@pytest.mark.parametrize(("architecture", "adapter"), OWN)
def test_our_own_loader_reads_the_others(architecture, adapter, tmp_path):
    model = base(tmp_path, architecture)
    reward = learned(get_peft_model(model, ADAPTERS[adapter]) if adapter else model)
    why = reward.why_no_classifier
    assert "VERA" in why if adapter == "vera" else architecture in why
    reward.save_pretrained(tmp_path / "reward", TOKENIZER, max_prompt_length=7)
    facts = json.loads((tmp_path / "reward" / "reward.json").read_text(encoding="utf-8"))
    assert (facts["loaded_by"], facts["why"], facts["max_prompt_length"]) == ("tutelage", why, 7)
    again = ExplicitReward.from_pretrained(tmp_path / "reward")
    torch.testing.assert_close(again.score(GROUPS), reward.score(GROUPS), atol=1e-4, rtol=0)
    if adapter:
        with pytest.raises(Exception, match=r"."):  # not as if it were a reward with a head at random
            plain_scores(tmp_path / "reward")


def test_a_run_goes_on_from_either_kind(tmp_path):
    """DoRA's names differ on disk; a head may lie beside the adapter."""
    for architecture, adapter in (("llama", "dora"), ("cohere", "dora"), ("cohere", "lora")):
        folder = tmp_path / f"{architecture}-{adapter}"
        reward = learned(get_peft_model(base(folder, architecture), ADAPTERS[adapter]))
        reward.save_pretrained(folder / "reward", TOKENIZER)
        fresh = get_peft_model(load_model(str(folder / "base")), ADAPTERS[adapter])
        other = ExplicitReward.fresh(fresh.eval(), shared=True, layout="padded")
        other.start_from(folder / "reward")
        torch.testing.assert_close(other.score(GROUPS), reward.score(GROUPS), atol=1e-4, rtol=0)


def test_trl_takes_it_as_a_function(tmp_path):
    reward = learned(base(tmp_path, "granite"))
    reward.save_pretrained(tmp_path / "reward", TOKENIZER)
    tokenization = Tokenization(TOKENIZER)
    function = ExplicitReward.from_pretrained(tmp_path / "reward").as_reward_func(tokenization)
    prompts, ids = ["What is 1 + 1?", "Yes?"], [[8, 9, 2], [10]]
    groups = [
        Group(tokenization.prompt_ids(prompt), (Completion(tuple(tokens), Role.SAMPLE, True),))
        for prompt, tokens in zip(prompts, ids, strict=True)
    ]
    found = function(prompts=prompts, completions=["a", "b"], completion_ids=ids, trainer_state=None)
    assert found == pytest.approx(reward.score(groups).tolist(), abs=1e-4)
    assert function.__name__


def test_finding_out_leaves_the_model_as_it_was(tmp_path):
    model = get_peft_model(tiny_model(), ADAPTERS["lora"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    assert ExplicitReward.fresh(model, shared=True).why_no_classifier is None
    assert model.training
    assert {name: value.equal(before[name]) for name, value in model.state_dict().items()} == dict.fromkeys(
        before, True
    )
    assert model.active_peft_config.task_type == "CAUSAL_LM"
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters())


def test_an_adapter_without_its_base_is_one_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learned(get_peft_model(base(tmp_path), ADAPTERS["lora"])).save_pretrained(tmp_path / "reward", TOKENIZER)
    path = tmp_path / "reward" / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name, said in (("../base", "no such folder"), ("models/base", "no such folder"), (None, "does not name")):
        path.write_text(json.dumps({**config, "base_model_name_or_path": name}), encoding="utf-8")
        with pytest.raises(UserError, match=said):
            ExplicitReward.from_pretrained(tmp_path / "reward")
