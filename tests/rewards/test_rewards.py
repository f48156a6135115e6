"""Explicit rewards score alike in every layout, on disk and in other programs, and learn without touching the policy."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import RLOOConfig, RLOOTrainer

from tutelage.data import Tokenization
from tutelage.errors import NonFiniteLossError, UserError
from tutelage.groups import Completion, Group, Role, pair_indices
from tutelage.losses import reward_loss
from tutelage.models.loading import base_causal_lm
from tutelage.models.modes import without_dropout
from tutelage.models.weights import WeightSet, load_weights, save_weights
from tutelage.rewards import ExplicitReward, ImplicitReward
from tutelage.rewards.comparisons import contrast, policy_rewards, reward_scale
from tutelage.rewards.fitting import RewardFitter, RewardObjective
from tutelage.scoring.logps import cached_logps
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer

ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt_neox"]
TOKENIZER = tiny_tokenizer("gemma3")  # has a pad token, of id 0 in the models' configs


# --- models, rewards and groups -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a tiny language model, which adapters can name."""
    folders = {}

    def of(architecture="llama", **config):
        key = (architecture, *sorted(config.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(architecture)
            tiny_model(architecture, **config).save_pretrained(folders[key])
            TOKENIZER.save_pretrained(folders[key])
        return folders[key]

    return of


def adapted(folder, *, dtype=torch.float32, seed=0, **lora):
    """A policy: the base with an adapter that already does something."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM", **lora}
    return get_peft_model(model, LoraConfig(**options)).eval()


def learned(model, *, shared=True, seed=1, **options):
    """A reward that has moved away from where it started."""
    reward = ExplicitReward.fresh(model, shared=shared, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in reward.parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return reward


FIRST = (Role.DEMONSTRATION, Role.SAMPLE)


def random_groups():
    """Groups of random tokens; no padding token among them."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length):
        return tuple(torch.randint(3, 97, (length,), generator=generator).tolist())

    return [
        Group(
            tokens(prompt),
            tuple(Completion(tokens(n), FIRST[min(i, 1)], finished=False) for i, n in enumerate(lengths)),
        )
        for prompt, lengths in ((9, (5, 3, 7)), (3, (4, 1)), (12, (2,)))
    ]


GROUPS = random_groups()
ROWS = [group.prompt_ids + completion.token_ids for group in GROUPS for completion in group.completions]


def plain_scores(folder, *, batched, dtype=torch.float32):
    """Scores of ROWS by what transformers alone makes of the folder, one row at a time or padded at the right."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype).eval()
    with torch.no_grad():
        if not batched:
            return torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0].float() for row in ROWS])
        width = max(map(len, ROWS))
        input_ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in ROWS])
        return model(input_ids=input_ids, attention_mask=(input_ids != 0).long()).logits[:, 0].float()


def values(parameters):
    return [parameter.detach().clone() for parameter in parameters]


def assert_same(found, expected):
    """Bit for bit."""
    assert len(found) == len(expected) > 0
    assert all(map(torch.equal, found, expected))


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tree_equals_padded_equals_head_times_last_hidden_state(architecture, base):
    """Values, and gradients, which land on the reward's own weights."""
    policy = adapted(base(architecture))
    reward = learned(policy)
    weights = torch.linspace(-1, 1, len(ROWS))
    gradients = {}
    with reward.active():
        body = base_causal_lm(policy).base_model
        truth = torch.stack(
            [body(torch.tensor([row])).last_hidden_state[0, -1] @ reward.head.weight[0] for row in ROWS]
        )
        (truth * weights).sum().backward()
    gradients["truth"] = [parameter.grad.clone() for parameter in reward.parameters]
    assert truth.std() > 0.1
    for layout in ("shared_prefix", "padded"):
        reward.layout = layout
        torch.testing.assert_close(reward.score(GROUPS), truth.detach(), atol=1e-5, rtol=1e-5)
        for parameter in reward.parameters:
            parameter.grad = None
        with reward.active():
            (reward.rewards(GROUPS) * weights).sum().backward()
        for parameter, gradient in zip(reward.parameters, gradients["truth"], strict=True):
            scale = max(1.0, gradient.abs().max().item())
            torch.testing.assert_close(parameter.grad / scale, gradient / scale, atol=5e-5, rtol=0)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_scores_come_one_tuple_a_group_without_dropout(base):
    policy = adapted(base(), lora_dropout=0.5).train()
    reward = learned(policy, batch_size=2)
    scores = reward.scores(GROUPS)
    assert [len(score) for score in scores] == [3, 2, 1]
    assert policy.training
    with torch.no_grad(), reward.active():
        noisy = reward.rewards(GROUPS)
        policy.eval()
        quiet = reward.rewards(GROUPS)
    assert (noisy - quiet).abs().max() > 1e-2
    torch.testing.assert_close(
        torch.tensor([value for group in scores for value in group]), quiet, atol=1e-5, rtol=1e-5
    )


def test_a_fresh_reward_starts_from_the_policy_and_is_zero(base):
    policy = adapted(base())
    reward = ExplicitReward.fresh(policy, shared=True)
    assert_same(reward.parameters[:-1], [p for p in policy.parameters() if p.requires_grad])
    assert (reward.score(UNEVEN) == 0).all()


# --- on disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "config"),
    [*((architecture, {}) for architecture in ARCHITECTURES), ("llama", {"tie_word_embeddings": True})],
)
def test_an_exported_adapter_is_a_plain_sequence_classifier(architecture, config, base, tmp_path):
    policy = adapted(base(architecture, **config))
    reward = learned(policy)
    expected = reward.score(GROUPS)
    policys_own = ExplicitReward(policy, reward.head).score(GROUPS)
    assert (expected - policys_own).abs().max() > 1e-2, "the policy's weights in the reward's place would show"
    reward.save_pretrained(tmp_path, TOKENIZER, stages=3)
    assert torch.equal(ExplicitReward(policy, reward.head).score(GROUPS), policys_own), "the policy is as it was"
    for batched in (False, True):
        torch.testing.assert_close(plain_scores(tmp_path, batched=batched), expected, atol=1e-5, rtol=1e-5)
    ours = ExplicitReward.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(ours.score(GROUPS), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("llama", {}), ("qwen3", {"tie_word_embeddings": True}), ("gemma3", {}), ("gpt_neox", {})],
)
@pytest.mark.parametrize("shared", [True, False])
def test_an_exported_full_model_is_a_plain_sequence_classifier(architecture, config, shared, base, tmp_path):
    """All weights are trained, tied embeddings among them: as a set beside the policy's, or as the reward's own model."""
    model = AutoModelForCausalLM.from_pretrained(base(architecture, **config), dtype=torch.float32)
    before = values(model.parameters())
    reward = learned(model, shared=shared)
    expected = reward.score(GROUPS)
    reward.save_pretrained(tmp_path, TOKENIZER)
    for batched in (False, True):
        torch.testing.assert_close(plain_scores(tmp_path, batched=batched), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ExplicitReward.from_pretrained(tmp_path).score(GROUPS), expected, atol=1e-5, rtol=1e-5)
    if shared:
        assert_same(values(model.parameters()), before)


def test_where_eos_pads_an_exported_full_model_reads_it_or_refuses(tmp_path):
    """transformers reads the last token that is no pad token; were that EOS, it would read the one before the end."""
    tokenizer = tiny_tokenizer("plain")
    eos = tokenizer.eos_token_id
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=None)
    reward = learned(model, shared=False, pad_token_id=eos)
    reward.save_pretrained(tmp_path, tokenizer)
    finished = [Completion((5, 6, eos), Role.SAMPLE, True), Completion((7, eos), Role.SAMPLE, True)]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    with torch.no_grad():
        scores = torch.cat([plain(torch.tensor([[8, 9, *answer.token_ids]])).logits[:, 0] for answer in finished])
        torch.testing.assert_close(scores, reward.score([Group((8, 9), tuple(finished))]), atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="no padding token"):
            plain(torch.tensor([[8, 9, 5, 6, eos], [8, 9, 7, eos, eos]]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exported_rewards_score_alike_in_bfloat16(architecture, base, tmp_path):
    """Rows of the same shape, that is: padding alone moves a bfloat16 score by up to 0.03 here, in any program."""
    learned(adapted(base(architecture))).save_pretrained(tmp_path, TOKENIZER)
    ours = ExplicitReward.from_pretrained(tmp_path, dtype=torch.bfloat16)
    together = ours.score(GROUPS)
    torch.testing.assert_close(together, plain_scores(tmp_path, batched=True, dtype=torch.bfloat16), atol=1e-3, rtol=0)
    alone = torch.cat([ours.score([group.select([i])]) for group in GROUPS for i in range(len(group.completions))])
    one_by_one = plain_scores(tmp_path, batched=False, dtype=torch.bfloat16)
    torch.testing.assert_close(alone, one_by_one, atol=1e-3, rtol=0)
    exact = plain_scores(tmp_path, batched=True)
    assert 0 < (together - exact).abs().max() < 0.1


def test_from_pretrained_refuses_what_holds_no_reward(base, tmp_path):
    with pytest.raises(UserError, match="not a reward model: it has no reward head"):
        ExplicitReward.from_pretrained(base())
    policy = adapted(base())
    policy.save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match=r"policy, field 'reward'.*not a reward model: it has no reward head"):
        ExplicitReward.from_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match="no such folder"):
        ExplicitReward.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty.*cannot be loaded"):
        ExplicitReward.from_pretrained(tmp_path / "empty")


def test_start_from_continues_a_reward_beside_another_policy(base, tmp_path):
    reward = learned(adapted(base()))
    reward.save_pretrained(tmp_path, TOKENIZER)
    policy = adapted(base(), seed=5)
    before = values(policy.parameters())
    continued = ExplicitReward.fresh(policy, shared=True)
    assert (continued.score(GROUPS) - reward.score(GROUPS)).abs().max() > 1e-2
    continued.start_from(tmp_path)
    torch.testing.assert_close(continued.score(GROUPS), reward.score(GROUPS), atol=1e-5, rtol=1e-5)
    assert_same(values(policy.parameters()), before)


@pytest.mark.parametrize(
    ("base_seed", "lora", "problem"),
    [
        (1, {}, "base differs"),
        (0, {"r": 2}, "another shape.*--lora_r"),
        (0, {"target_modules": ["q_proj"]}, "another shape.*--lora_target_modules"),
    ],
)
def test_start_from_refuses_another_base_and_another_shape(base_seed, lora, problem, base, tmp_path):
    learned(adapted(base())).save_pretrained(tmp_path / "reward", TOKENIZER)
    policy = adapted(base(seed=base_seed), **lora)
    before = values(policy.parameters())
    reward = ExplicitReward.fresh(policy, shared=True)
    with pytest.raises(UserError, match=f"reward, field 'init_reward_from'.*{problem}"):
        reward.start_from(tmp_path / "reward")
    assert_same(values(policy.parameters()), before)


def test_start_from_needs_an_adapter_on_both_sides(base, tmp_path):
    learned(adapted(base())).save_pretrained(tmp_path / "reward", TOKENIZER)
    with pytest.raises(UserError, match=r"reward, field.*needs a model with an adapter"):
        ExplicitReward.fresh(tiny_model(), shared=True).start_from(tmp_path / "reward")
    with pytest.raises(UserError, match=r"nothing, field.*no reward is there"):
        ExplicitReward.fresh(adapted(base()), shared=True).start_from(tmp_path / "nothing")


@pytest.mark.parametrize("shared", [True, False])
def test_a_whole_reward_goes_on_from_a_whole_one(shared, tmp_path):
    earlier = learned(tiny_model(), shared=False)
    earlier.save_pretrained(tmp_path / "reward", TOKENIZER)
    policy = tiny_model(seed=3)
    before = values(policy.parameters())
    later = ExplicitReward.fresh(policy, shared=shared)
    assert not torch.allclose(later.score(GROUPS), earlier.score(GROUPS), atol=1e-3)
    later.start_from(tmp_path)  # the run's folder
    assert_close(later.score(GROUPS), earlier.score(GROUPS))
    if shared:  # the policy beside it has not moved
        assert_same(values(policy.parameters()), before)


def test_a_whole_reward_of_another_shape_or_for_an_adapter_is_refused(base, tmp_path):
    learned(tiny_model(), shared=False).save_pretrained(tmp_path / "reward", TOKENIZER)
    with pytest.raises(UserError, match=r"reward, field 'init_reward_from'.*other layers"):
        ExplicitReward.fresh(tiny_model(num_hidden_layers=1), shared=True).start_from(tmp_path / "reward")
    with pytest.raises(UserError, match=r"reward, field 'init_reward_from'.*reward is an adapter.*--use_peft"):
        ExplicitReward.fresh(adapted(base()), shared=True).start_from(tmp_path / "reward")
    tiny_model().save_pretrained(tmp_path / "no-reward")
    with pytest.raises(UserError, match=r"no-reward, field 'init_reward_from'.*no reward head"):
        ExplicitReward.fresh(tiny_model(), shared=True).start_from(tmp_path / "no-reward")


def test_an_exported_reward_scores_the_same_tokens_alike_in_trl(training):
    """RLOO with a conversational prompt: TRL renders prompt and answer with the chat template and tokenizes the text.

    With llama3's template these are our tokens, end of turn at the end; our reward scores what TRL's model was fed.
    """
    tokenizer = tiny_tokenizer("llama3")
    folder, export = training.folder / "base", training.folder / "reward"
    tiny_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    learned(adapted(folder)).save_pretrained(export, tokenizer)
    messages = [{"role": "user", "content": "How many apples are there?"}]
    trainer = RLOOTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=str(export),
        args=RLOOConfig(
            output_dir=str(training.folder / "rloo"),
            max_steps=1,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            bf16=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"prompt": messages}] * 4),
        processing_class=tokenizer,
    )
    fed = {}
    trainer.reward_funcs[0].register_forward_hook(
        lambda model, args, kwargs, output: fed.update(kwargs, scores=output.logits[:, 0].clone()), with_kwargs=True
    )
    trainer.train()

    rows = [
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(fed["input_ids"], fed["attention_mask"], strict=True)
    ]
    prompt = Tokenization(tokenizer).prompt_ids(messages)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert len(set(rows)) > 1
    assert all(row[: len(prompt)] == prompt and row[-1] == end_of_turn for row in rows)
    completions = tuple(Completion(row[len(prompt) :], Role.SAMPLE, finished=True) for row in rows)
    ours = ExplicitReward.from_pretrained(export).score([Group(prompt, completions)])
    torch.testing.assert_close(ours, fed["scores"], atol=1e-5, rtol=1e-5)
    [logged] = [
        value
        for name, value in trainer.state.log_history[0].items()
        if name.startswith("rewards/") and name.endswith("/mean")
    ]
    assert logged == pytest.approx(ours.mean().item(), abs=1e-5)


# --- the reward phase -----------------------------------------------------------------------------------------------

PLANTED = 3


def planted_groups(count=96, *, samples=2, seed=0, kinds=(Role.DEMONSTRATION, Role.SAMPLE)):
    """Demonstrations hold a token that samples don't, anywhere but at the end."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(PLANTED + 1, 97, (length,), generator=generator).tolist()

    groups = []
    for index in range(count):
        first = tokens(4)
        first[index % 3] = PLANTED
        others = (Completion(tuple(tokens(4)), kinds[1], True) for _ in range(samples))
        groups.append(Group(tuple(tokens(2 + index % 3)), (Completion(tuple(first), kinds[0], True), *others)))
    return groups


def accuracy(reward, groups):
    """How often the first completion is above another."""
    first, others = pair_indices(groups)
    scores = reward.score(groups)
    return (scores[first] > scores[others]).float().mean().item()


def fitter(reward, *, objective=None, optimizer=torch.optim.AdamW, lr=1e-2, batch_size=8, **options):
    objective = objective or RewardObjective()
    return RewardFitter(reward, objective, optimizer(reward.parameters, lr=lr), batch_size=batch_size, **options)


def fresh(base):
    """A reward beside a policy that has not moved yet; its random head tells completions apart from the first step on."""
    model = base(num_hidden_layers=2, initializer_range=0.1)
    reward = ExplicitReward.fresh(adapted(model, r=8, init_lora_weights=True), shared=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        reward.head.weight.copy_(torch.randn(reward.head.weight.shape, generator=generator) / 33**0.5)
    return reward


@pytest.mark.parametrize("kind", ["logistic", "linear"])
def test_a_reward_learns_what_tells_demonstrations_from_samples(kind, base):
    reward, unseen = fresh(base), planted_groups(seed=1)
    assert accuracy(reward, unseen) < 0.8
    facts = fitter(reward, objective=RewardObjective(kind=kind), saturation=None).fit(
        planted_groups(), phase=0, epochs=5
    )
    assert accuracy(reward, unseen) >= 0.95
    assert facts["steps"] == 60
    assert facts["saturated"] == 0
    assert 0.8 < facts["accuracy"] < 1, "a mean over the phase, from its first step on"
    assert facts["demonstrations"] > facts["samples"] + 0.5


def test_a_phase_stops_once_its_reward_is_saturated_and_says_so(base):
    reward = fresh(base)
    fitting = fitter(reward, saturation=0.97)
    steps = []
    facts = fitting.fit(
        planted_groups(), phase=0, epochs=5, on_step=lambda done, seen: steps.append((done, seen["accuracy"]))
    )
    assert facts["saturated"] == 1
    assert facts["steps"] == len(steps) < 60
    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    # The last four steps are what its accuracy is judged by, and no four before were enough.
    means = [sum(accuracy for _, accuracy in steps[end - 4 : end]) / 4 for end in range(4, len(steps) + 1)]
    assert means[-1] >= 0.97
    assert max(means[:-1]) < 0.97
    again = fitting.fit(planted_groups(), phase=1, epochs=5)
    assert 4 <= again["steps"] < facts["steps"], "a phase judges by its own steps alone"
    assert again["saturated"] == 1


def test_neither_the_base_nor_the_policy_notices_the_reward_phase(base):
    reward = fresh(base)
    policy = reward.model
    for index, parameter in enumerate(p for p in policy.parameters() if p.requires_grad):
        parameter.grad = torch.full_like(parameter, index)  # as in the middle of accumulating
    before, logps = values(policy.parameters()), cached_logps(policy, GROUPS)
    scores = reward.score(GROUPS)
    fitter(reward).fit(planted_groups(), phase=0, steps=5)
    assert (reward.score(GROUPS) - scores).abs().max() > 0.1, "the reward has learned"
    assert_same(values(policy.parameters()), before)
    assert cached_logps(policy, GROUPS) == logps
    gradients = [parameter.grad for parameter in policy.parameters()]
    assert [g.unique().tolist() for g in gradients if g is not None] == [
        [i] for i in range(len(reward.parameters) - 1)
    ]


def test_a_resumed_phase_equals_an_uninterrupted_one(base, tmp_path):
    """Two phases with preferences; in between everything is written, and read by objects made anew."""
    groups = [planted_groups(10, seed=seed) for seed in (0, 1)]
    preferences = planted_groups(7, samples=1, seed=2, kinds=(Role.PREFERRED, Role.REJECTED))

    def made():
        reward = fresh(base)
        return reward, fitter(reward, batch_size=5, preferences=preferences, saturation=None, seed=3)

    reward, fitting = made()
    facts = [fitting.fit(groups[phase], phase=phase, epochs=2) for phase in (0, 1)]

    first, fitting = made()
    assert fitting.fit(groups[0], phase=0, epochs=2) == facts[0]
    save_weights(first.parameters, tmp_path / "reward.safetensors")
    torch.save(fitting.state_dict(), tmp_path / "optimizer.pt")
    resumed, fitting = made()
    load_weights(resumed.parameters, tmp_path / "reward.safetensors")
    assert_same(values(resumed.parameters), values(first.parameters))
    fitting.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert fitting.fit(groups[1], phase=1, epochs=2) == facts[1]
    assert_same(values(resumed.parameters), values(reward.parameters))
    assert fitting.steps_done == 8
    # Four completion tokens each: twice ten groups of three in two phases, and five pairs in each of eight steps.
    assert fitting.tokens_done == 4 * (2 * 2 * 10 * 3 + 8 * 5 * 2)

    forgetful, fitting = made()
    load_weights(forgetful.parameters, tmp_path / "reward.safetensors")
    fitting.fit(groups[1], phase=1, epochs=2)
    assert not torch.equal(forgetful.head.weight, reward.head.weight), "the state of the optimizer matters"


def test_phases_differ_in_the_order_of_their_groups(base):
    groups, orders = planted_groups(8), []
    for phase in (0, 0, 1):
        reward = fresh(base)
        seen = recorded(reward)
        fitter(reward, batch_size=2, saturation=None).fit(groups, phase=phase, epochs=2)
        order = [frozenset(map(groups.index, batch)) for batch in seen]
        assert [sorted(i for pair in half for i in pair) for half in (order[:4], order[4:])] == [list(range(8))] * 2
        assert order[:4] != order[4:], "each pass has its own order"
        orders.append(order)
    assert orders[0] == orders[1] != orders[2]


def recorded(reward):
    """The batches that the reward meets from now on."""
    seen, score = [], reward.rewards
    reward.rewards = lambda groups: seen.append(list(groups)) or score(groups)
    return seen


def movement(base, groups, *, objective=None, preferences=(), max_grad_norm=0.0, steps=1, **options):
    """How far plain gradient descent with a step size of one moves each parameter, and what the phase saw."""
    reward = fresh(base)
    before = values(reward.parameters)
    fitting = fitter(
        reward,
        objective=objective,
        optimizer=torch.optim.SGD,
        lr=1.0,
        batch_size=max(len(groups), len(preferences)),
        preferences=preferences,
        max_grad_norm=max_grad_norm,
        **options,
    )
    facts = fitting.fit(groups, phase=0, steps=steps)
    return [after.detach() - start for after, start in zip(reward.parameters, before, strict=True)], facts


def assert_close(found, expected):
    assert max(tensor.abs().max() for tensor in expected) > 1e-2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


UNEVEN = [*planted_groups(3, samples=1), *planted_groups(2, samples=3, seed=1), *planted_groups(2, seed=2)]


def test_groups_count_alike_however_many_samples_they_have(base):
    """The gradient of the mean over groups of the mean over a group's pairs, written out."""
    reward = fresh(base)
    with reward.active():
        losses = []
        for group in UNEVEN:
            first, *others = reward.rewards([group])
            losses.append(torch.stack([reward_loss(first, other) for other in others]).mean())
        torch.stack(losses).mean().backward()
    moved, facts = movement(base, UNEVEN)
    assert_close(moved, [-parameter.grad for parameter in reward.parameters])
    first, others = pair_indices(UNEVEN)
    scores = fresh(base).score(UNEVEN)
    assert facts["demonstrations"] == pytest.approx(scores[first].mean().item(), abs=1e-5)
    assert facts["samples"] == pytest.approx(scores[others].mean().item(), abs=1e-5)
    assert facts["loss"] == pytest.approx(reward_loss(scores[first], scores[others]).mean().item(), abs=1e-5)
    assert facts["accuracy"] == pytest.approx((scores[first] > scores[others]).float().mean().item(), abs=1e-6)


def test_micro_batches_change_nothing(base):
    preferences = planted_groups(5, samples=1, seed=4)
    whole, facts = movement(base, UNEVEN, preferences=preferences, steps=2, max_grad_norm=1.0)
    for size in (1, 3):
        parts, same = movement(
            base, UNEVEN, preferences=preferences, steps=2, max_grad_norm=1.0, micro_batch_size=size
        )
        assert_close(parts, whole)
        assert same == pytest.approx(facts, abs=1e-5)


def test_preferences_enter_the_gradient_with_their_weight(base):
    preferences = planted_groups(10, samples=1, seed=4, kinds=(Role.PREFERRED, Role.REJECTED))
    of_demonstrations, facts = movement(base, UNEVEN)
    of_preferences, same = movement(
        base, UNEVEN, objective=RewardObjective(demonstration_weight=0.0), preferences=preferences
    )
    alone, _ = movement(base, preferences)
    assert_close(of_preferences, alone)
    assert same == facts, "what is reported is of demonstrations and samples"
    both, _ = movement(
        base,
        UNEVEN,
        objective=RewardObjective(demonstration_weight=2.0, preference_weight=0.3),
        preferences=preferences,
    )
    assert_close(both, [2 * d + 0.3 * p for d, p in zip(of_demonstrations, of_preferences, strict=True)])


def test_every_preference_has_its_turn(base):
    """Also where the last batch of each pass is smaller than the others."""
    groups, preferences = planted_groups(6), planted_groups(8, samples=1, seed=4)
    reward = fresh(base)
    seen = recorded(reward)
    fitter(reward, batch_size=4, preferences=preferences, saturation=None).fit(groups, phase=0, epochs=2)
    met = [preferences.index(group) for batch in seen for group in batch if group in preferences]
    assert sorted(met) == sorted([*range(8), *range(8)]), "four a step, four steps"


def test_long_gradients_are_shortened(base):
    free, _ = movement(base, UNEVEN)
    length = torch.stack([tensor.norm() for tensor in free]).norm().item()
    short, _ = movement(base, UNEVEN, max_grad_norm=length / 4)
    assert_close(short, [tensor / 4 for tensor in free])
    assert_close(movement(base, UNEVEN, max_grad_norm=2 * length)[0], free)


def test_a_phase_without_groups_makes_no_step(base):
    facts = fitter(fresh(base)).fit([], phase=0, steps=3)
    assert facts["steps"] == facts["saturated"] == 0


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_before_a_weight_moves(what, base):
    reward = fresh(base)
    if what == "loss":
        with torch.no_grad():
            reward.head.weight[0, 0] = torch.inf
    else:
        reward.head.weight.register_hook(lambda gradient: gradient * torch.inf)
    before, policy = values(reward.parameters), values(reward.model.parameters())
    with pytest.raises(NonFiniteLossError, match=f"the {what} of the reward is .* in the reward phase of stage 2"):
        fitter(reward).fit(planted_groups(), phase=2)
    assert_same(values(reward.parameters), before)
    assert_same(values(reward.model.parameters()), policy)


# --- what is compared -----------------------------------------------------------------------------------------------


def completions(*answers):
    """(tokens, finished): the first a demonstration, the rest samples."""
    return tuple(
        Completion(ids, Role.SAMPLE if index else Role.DEMONSTRATION, finished)
        for index, (ids, finished) in enumerate(answers)
    )


def test_contrast_leaves_out_what_a_look_at_the_last_token_tells_apart():
    group = Group((1,), completions(((5, 2), True), ((6, 2), True), ((5, 2), True), ((7, 8), False)), row=4)
    for truncated_samples in ("floor", "drop"):
        assert contrast(group, truncated_samples) == [group.select([0, 1])]
    assert contrast(group, "score") == [group.select([0, 1, 3])]
    cut = Group((1,), completions(((5, 6), False), ((6, 2), True), ((7, 8), False)))
    assert contrast(cut, "floor") == [cut.select([0, 2])]
    assert contrast(cut, "score") == [cut]


def test_contrast_is_empty_where_nothing_is_left():
    equal = Group((1,), completions(((5, 2), True), ((5, 2), True)))
    assert contrast(equal, "score") == []
    all_cut = Group((1,), completions(((5, 2), True), ((7, 8), False)))
    assert contrast(all_cut, "floor") == []
    assert contrast(all_cut, "score") == [all_cut]


def test_contrast_keeps_what_is_known_about_the_completions():
    group = Group((1,), completions(((5, 2), True), ((5, 2), True), ((6, 2), True)))
    group = group.with_token_values("old_logps", [(-1.0, 0.0), (-2.0, 0.0), (-3.0, -0.5)]).with_values(
        "reward", [1, 2, 3]
    )
    (found,) = contrast(group, "floor")
    assert found.sums("old_logps") == (-1.0, -3.5)
    assert found.values("reward") == (1, 3)


def test_contrast_of_several_demonstrations_compares_like_with_like():
    """Two that finished and a truncated one: each against the samples that came to an end as it did."""
    roles = [Role.DEMONSTRATION, Role.SAMPLE, Role.DEMONSTRATION, Role.SAMPLE, Role.DEMONSTRATION]
    finished = [True, True, False, False, True]
    group = Group(
        (1,), tuple(Completion((5, i), role, end) for i, (role, end) in enumerate(zip(roles, finished, strict=True)))
    )
    assert contrast(group, "floor") == [group.select([0, 1, 4]), group.select([2, 3])]
    assert contrast(group, "score") == [group]
    assert group.pairs == [(0, 1), (0, 3), (2, 1), (2, 3), (4, 1), (4, 3)]


@pytest.mark.parametrize(
    ("truncated_samples", "finished", "expected"),
    [
        ("floor", [True, False, True], [1.0, 1.0, 2.0]),  # the cut one has 3.0, the worst that finished 1.0
        ("floor", [True, True, True], [1.0, 3.0, 2.0]),
        ("floor", [False, False, False], [None, None, None]),  # the reward has compared no cut answer with a whole one
        ("drop", [True, False, True], [1.0, None, 2.0]),
        ("score", [True, False, False], [1.0, 3.0, 2.0]),
    ],
)
def test_cut_samples_in_the_policy_phase(truncated_samples, finished, expected):
    samples = tuple(Completion((5, index), Role.SAMPLE, whole) for index, whole in enumerate(finished))
    demonstration = Completion((9,), Role.DEMONSTRATION, finished=True)
    group = Group((1,), (demonstration, *samples)).with_values("reward", (7.0, 1.0, 3.0, 2.0))
    assert policy_rewards(group, truncated_samples) == expected


def test_rewards_are_scaled_by_their_spread_within_a_prompt():
    near = [[100.0, 101.0], [-5.0, -5.5]]  # far apart between prompts, near within: variances 1/2 and 1/8
    copies = [[0.0, 4.0], [7.0, 7.0]]  # variances 8 and 0: two copies of one answer say nothing of the spread
    assert reward_scale(copies) == reward_scale(copies, down_only=True) == pytest.approx(8**0.5)
    assert reward_scale(near) == pytest.approx((5 / 16) ** 0.5)
    assert reward_scale(near, down_only=True) == 1.0, "noise is not amplified"
    assert reward_scale([[3.0]]) == reward_scale([[3.0, 3.0], [None, 1.0]]) == 1.0


def test_pair_indices_point_at_each_groups_first_and_others():
    assert pair_indices(GROUPS) == ([0, 0, 3], [1, 2, 4])


# --- the reward a policy implies ------------------------------------------------------------------------------------


def flat(groups):
    return torch.tensor([value for group in groups for value in group])


def test_the_implicit_reward_of_an_adapter_is_over_its_base(base):
    policy = adapted(base())
    now, then = (flat(cached_logps(model, GROUPS)) for model in (policy, AutoModelForCausalLM.from_pretrained(base())))
    expected = 0.3 * (now - then)
    assert expected.abs().min() > 1e-3
    for reference in (None, AutoModelForCausalLM.from_pretrained(base())):
        found = ImplicitReward(policy, reference, beta=0.3).score(GROUPS)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(flat(cached_logps(policy, GROUPS)), now, atol=0, rtol=0)


@pytest.mark.parametrize("whole", [False, True])
def test_the_implicit_reward_over_a_set_of_earlier_weights(whole, base):
    policy = tiny_model() if whole else adapted(base())
    before = flat(cached_logps(policy, GROUPS))
    start = WeightSet(policy)
    assert ImplicitReward(policy, start, beta=0.3).score(GROUPS).abs().max() == 0
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    now, moved = flat(cached_logps(policy, GROUPS)), values(policy.parameters())
    expected = 0.3 * (now - before)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(ImplicitReward(policy, start, beta=0.3).score(GROUPS), expected, atol=1e-5, rtol=1e-5)
    assert_same(values(policy.parameters()), moved)


def test_the_implicit_reward_needs_a_reference():
    with pytest.raises(UserError, match=r"field 'reference'.*started from.*--reference"):
        ImplicitReward(tiny_model())


def test_an_adapter_of_another_scale_is_refused(base, tmp_path):
    """Its weights have the same shapes, and would mean something else."""
    ExplicitReward.fresh(adapted(base(), lora_alpha=8), shared=True).save_pretrained(tmp_path, TOKENIZER)
    with pytest.raises(UserError, match="lora_alpha 8, the policy's 64"):
        ExplicitReward.fresh(adapted(base(), lora_alpha=64), shared=True).start_from(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "reward.json"])
def test_a_torn_reward_is_one_clear_error(name, base, tmp_path):
    reward = ExplicitReward.fresh(adapted(base()), shared=True)
    reward.save_pretrained(tmp_path, TOKENIZER)
    torn = tmp_path / name
    torn.write_bytes(torn.read_bytes()[:20])
    with pytest.raises(UserError, match="cannot be read"):
        reward.start_from(tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox"])
def test_without_dropout_nothing_is_dropped_in_training_mode(architecture):
    rates = {"opt": {"dropout": 0.3}, "llama": {"attention_dropout": 0.3}, "gpt_neox": {"hidden_dropout": 0.3}}
    model = tiny_model(architecture, **rates[architecture]).train()
    ids = torch.arange(5, 15)[None]
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    with without_dropout(model):
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
