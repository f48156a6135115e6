"""The objectives against arithmetic written out, against transformers' SFT loss and TRL's DPO loss."""

import math

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from tutelage.data import Tokenization, preference_group_from_row, tokenize_dataset
from tutelage.groups import Completion, Group, Role
from tutelage.losses import implicit_reward, irft_loss, sft_loss
from tutelage.scoring.logps import cached_logps, completion_logps
from tutelage.testing.models import tiny_model

# Three pairs with β = 0.1 and margins 0.1 · [(π_y − t_y) − (π_ỹ − t_ỹ)]:
#   0.1 · [(−10 + 12) − (−20 + 18)] =  0.4
#   0.1 · [(−30 + 25) − (−15 + 20)] = −1.0
#   0.1 · [( −5 +  5) − ( −7 +  7)] =  0.0
POLICY = torch.tensor([-10.0, -30.0, -5.0])
POLICY_SAMPLES = torch.tensor([-20.0, -15.0, -7.0])
REFERENCE = torch.tensor([-12.0, -25.0, -5.0])
REFERENCE_SAMPLES = torch.tensor([-18.0, -20.0, -7.0])
EXPECTED = {
    "logistic": [math.log(1 + math.exp(-0.4)), math.log(1 + math.exp(1.0)), math.log(2)],
    "hinge": [0.6, 2.0, 1.0],
    "linear": [-0.4, 1.0, 0.0],
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_irft_loss_of_three_pairs(kind):
    losses = irft_loss(POLICY, POLICY_SAMPLES, REFERENCE, REFERENCE_SAMPLES, beta=0.1, kind=kind)
    torch.testing.assert_close(losses, torch.tensor(EXPECTED[kind]))


def test_implicit_reward_and_sft_loss():
    torch.testing.assert_close(
        implicit_reward(POLICY, REFERENCE, beta=0.1), torch.tensor([0.2, -0.5, 0.0]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(sft_loss(POLICY), torch.tensor([10.0, 30.0, 5.0]))


def test_the_gradient_raises_demonstrations_and_lowers_samples():
    """dh/dz of logistic is −σ(−z), of hinge −1 below its kink, of linear −1; dz/dπ_y = β and dz/dπ_ỹ = −β."""
    slopes = {"logistic": [1 / (1 + math.exp(z)) for z in (0.4, -1.0, 0.0)], "hinge": [1, 1, 1], "linear": [1, 1, 1]}
    for kind, slope in slopes.items():
        policy, samples = POLICY.clone().requires_grad_(), POLICY_SAMPLES.clone().requires_grad_()
        irft_loss(policy, samples, REFERENCE, REFERENCE_SAMPLES, beta=0.1, kind=kind).sum().backward()
        torch.testing.assert_close(policy.grad, -0.1 * torch.tensor(slope))
        torch.testing.assert_close(samples.grad, 0.1 * torch.tensor(slope))


@pytest.mark.parametrize("kind", EXPECTED)
def test_extreme_margins_stay_finite(kind):
    policy = torch.tensor([1e4, -1e4], requires_grad=True)
    zero = torch.zeros(2)
    losses = irft_loss(policy, zero, zero, zero, beta=1.0, kind=kind)
    losses.sum().backward()
    expected = {"logistic": [0.0, 1e4], "hinge": [0.0, 10_001.0], "linear": [-1e4, 1e4]}[kind]
    assert losses.tolist() == expected
    assert policy.grad.tolist() == ([-1.0, -1.0] if kind == "linear" else [0.0, -1.0])


def test_shapes_that_differ_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"policy_sample_logps.*\(2,\)"):
        irft_loss(POLICY, POLICY_SAMPLES[:2], REFERENCE, REFERENCE_SAMPLES, beta=0.1)
    with pytest.raises(ValueError, match="one value per pair"):
        implicit_reward(POLICY, REFERENCE[:, None], beta=0.1)
    with pytest.raises(ValueError, match="unknown loss kind 'ipo'"):
        irft_loss(POLICY, POLICY_SAMPLES, REFERENCE, REFERENCE_SAMPLES, beta=0.1, kind="ipo")


def test_sft_loss_equals_transformers():
    model = tiny_model()
    prompt, answers = (5, 6, 7, 8), [(9, 10, 2), (11, 12, 13, 14, 2)]
    groups = [Group(prompt, (Completion(answer, Role.DEMONSTRATION, finished=True),)) for answer in answers]
    ours = sft_loss(completion_logps(model, groups)).sum() / sum(map(len, answers))
    input_ids = torch.tensor([[*prompt, *answers[0], 0, 0], [*prompt, *answers[1]]])
    labels = input_ids.clone()
    labels[:, :4] = labels[0, 7:] = -100
    theirs = model(input_ids=input_ids, attention_mask=(input_ids != 0).long(), labels=labels).loss
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("theirs", "ours"), [("sigmoid", "logistic"), ("hinge", "hinge")])
def test_irft_loss_equals_the_dpo_loss_of_trl(theirs, ours, training):
    rows = [
        {"prompt": "What is the sum?", "chosen": " It is 12.", "rejected": " The answer is 34 and 56 more."},
        {"prompt": "Yes or no?", "chosen": " Yes, and no.", "rejected": " No"},
        {"prompt": "How many apples are there?", "chosen": " There are 12 apples.", "rejected": " 56"},
    ]
    policy, reference = training.model(), training.model(seed=1)
    config = DPOConfig(
        output_dir=str(training.folder),
        loss_type=theirs,
        beta=0.1,
        per_device_train_batch_size=3,
        max_length=None,
        bf16=False,
        use_cpu=True,
        report_to=[],
    )
    trainer = DPOTrainer(
        policy,
        reference,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=training.tokenizer,
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        their_loss = trainer.compute_loss(trainer.model.eval(), inputs)

    groups = groups_of(inputs)
    tokenized = tokenize_dataset(Dataset.from_list(rows), Tokenization(training.tokenizer))
    assert set(map(tokens, groups)) == {tokens(preference_group_from_row(row)) for row in tokenized}
    policy_logps = completion_logps(policy, groups)
    reference_logps = torch.tensor(cached_logps(reference, groups)).flatten()
    assert (policy_logps - reference_logps).abs().min() > 0.5, "reference and policy differ"
    our_losses = irft_loss(
        policy_logps[::2], policy_logps[1::2], reference_logps[::2], reference_logps[1::2], beta=0.1, kind=ours
    )
    torch.testing.assert_close(our_losses.mean(), their_loss, atol=1e-6, rtol=1e-6)


def groups_of(inputs):
    """The pairs of TRL's batch: chosen rows, then rejected rows, prompt and completion told apart by a mask."""
    pairs = len(inputs["input_ids"]) // 2
    sequences = [
        (tuple(ids[mask.bool() & ~completion.bool()].tolist()), tuple(ids[completion.bool()].tolist()))
        for ids, mask, completion in zip(
            inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], strict=True
        )
    ]
    groups = []
    for (prompt, chosen), (same_prompt, rejected) in zip(sequences[:pairs], sequences[pairs:], strict=True):
        assert prompt == same_prompt
        completions = (Completion(chosen, Role.PREFERRED, True), Completion(rejected, Role.REJECTED, True))
        groups.append(Group(prompt, completions))
    return groups


def tokens(group):
    return group.prompt_ids, *(completion.token_ids for completion in group.completions)
