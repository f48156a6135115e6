"""The parts that trainers are made of: what each sees, and what a user's settings must not do to them."""

import inspect
import json
import math

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from rft_runs import make, over_samples, plant, run
from training_runs import SGD, history
from tutelage.algorithms.registry import NAMES, find
from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role
from tutelage.sampling.base import Sample
from tutelage.scoring.logps import cached_token_logps, completion_token_logps
from tutelage.testing.models import tiny_model
from tutelage.training.manifest import Manifest
from tutelage.training.objective import Step

# --- signatures and settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_of_a_trainer_is_spelled_out(name):
    parameters = inspect.signature(find(name).trainer).parameters.values()
    assert not {p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    assert {"model", "args", "train_dataset", "eval_dataset", "peft_config", "callbacks"} <= {
        p.name for p in parameters
    }
    assert ("sampler" in {p.name for p in parameters}) == (name != "sft")
    documented = find(name).trainer.__mro__
    assert [cls.__name__ for cls in documented if cls.__module__.startswith("tutelage.")][-1] == "DemonstrationTrainer"


def test_the_users_config_stays_as_it_is(training):
    """The rate that is chosen for an adapter must not be the next run's, which trains all parameters."""
    config = find("sft").config(output_dir=str(training.folder), use_cpu=True, bf16=False, report_to=[])
    rates = []
    for peft_config in (training.lora(), None):
        trainer = find("sft").trainer(
            training.model(), config, training.rows(), processing_class=training.tokenizer, peft_config=peft_config
        )
        rates.append(trainer.args.learning_rate)
        assert config.learning_rate is None
    assert rates == [2e-4, 2e-5]


# --- evaluation ------------------------------------------------------------------------------------------------------

TALKS = [
    {
        "messages": [
            {"role": role, "content": f"{i} {turn} {role}"} for turn in range(2) for role in ("user", "assistant")
        ]
    }
    for i in range(6)
]


@pytest.mark.parametrize("adapter", [False, True])
def test_other_held_out_rows_are_read_by_the_same_settings(training, adapter):
    """Turns, the number of rows, the source's name, and the zero of the implicit reward."""
    options = {"peft_config": training.lora() if adapter else None, "eval_dataset": Dataset.from_list(TALKS)}
    settings = {"stages_per_epoch": 2, "turns": "all", "eval_rows": 2, "reference": "initial", "learning_rate": 1e-2}
    trainer = training.trainer("irft", data=Dataset.from_list(TALKS), options=options, **settings)
    trainer.train()
    given = trainer.evaluate()
    again = trainer.evaluate(Dataset.from_list(TALKS))
    assert again["eval_demonstration_logp"] == pytest.approx(given["eval_demonstration_logp"])
    assert again["eval_demonstration_reward"] == pytest.approx(given["eval_demonstration_reward"], abs=1e-4)
    assert abs(given["eval_demonstration_reward"]) > 1e-2, "the policy has moved"
    other = trainer.evaluate(Dataset.from_list([{"messages": t["messages"][:2]} for t in TALKS[3:]]))
    assert "eval_demonstration_reward" in other


# --- the sampler's log-probs -----------------------------------------------------------------------------------------


def tokens_scored(trainer):
    """How many completion tokens the trainer scores without gradient, and a run."""
    scored = []
    of = trainer.scorer.token_logps
    trainer.scorer.token_logps = lambda groups: scored.extend(groups) or of(groups)
    trainer.train()
    return sum(len(c.token_ids) for group in scored for c in group.completions)


def test_the_samplers_log_probs_save_a_pass_over_the_samples(training):
    settings = {"stages_per_epoch": 2, "num_samples": 3}
    trainer = training.trainer("irft", name="saves", **settings)
    few = tokens_scored(trainer)
    gaps = history(trainer, "samples/logp_gap")
    assert len(gaps) == 2
    assert max(gaps) < 1e-4, "float32: the same weights, in other batches"
    own = training.trainer("irft", name="own", sampler_logps_tolerance=0.0, **settings)
    many = tokens_scored(own)
    assert history(own, "samples/logp_gap") == []
    samples = [c for stage in range(2) for g in own.stages.store.groups(stage) for c in g.samples]
    demonstrations = [c for stage in range(2) for g in own.stages.store.groups(stage) for c in g.demonstrations]
    assert many == sum(len(c.token_ids) for c in (*samples, *demonstrations))
    # The gap is measured on the samples of eight groups; of the others the demonstrations alone are scored.
    measured = sum(len(c.token_ids) for s in range(2) for g in trainer.stages.store.groups(s)[:8] for c in g.samples)
    assert few == sum(len(c.token_ids) for c in demonstrations) + measured
    for stage in range(2):
        found, truth = (
            torch.tensor([g.sums("reference_logps") for g in t.stages.store.groups(stage)]) for t in (trainer, own)
        )
        torch.testing.assert_close(found, truth, atol=1e-3, rtol=0)


class Liar:
    """A sampler that holds other weights: its log-probs are not the policy's."""

    def take_weights(self, policy):
        self.policy = policy

    def sample(self, prompts, params, *, num_samples=1, rows=None, stage=0, on_finished=None):
        return [[Sample((9, 10 + row, 2), (-0.5, -0.5, -0.5), True)] * num_samples for row in rows]


def test_a_sampler_with_other_weights_is_not_believed(training):
    trainer = training.trainer("irft", options={"sampler": Liar()}, max_steps=1)
    start = training.model()
    trainer.train()
    assert trainer.stages.rollout.sampler.policy is trainer.policy, "it was handed the weights"
    assert history(trainer, "samples/logp_gap")[0] > 1
    groups = trainer.stages.store.groups(0)
    truth = [torch.tensor(c) for logps in cached_token_logps(start, groups) for c in logps]
    found = [torch.tensor(c.token_values["reference_logps"]) for g in groups for c in g.completions]
    torch.testing.assert_close(torch.cat(found), torch.cat(truth), atol=1e-4, rtol=0)


def test_samples_at_another_temperature_are_scored_by_the_trainer(training):
    trainer = training.trainer("irft", temperature=0.5, max_steps=1)
    trainer.train()
    assert history(trainer, "samples/logp_gap") == [], "the sampler's log-probs are of another distribution"
    for group in trainer.stages.store.groups(0):
        for sample in group.samples:
            assert sum(sample.token_values["sampler_logps"]) != pytest.approx(
                sum(sample.token_values["reference_logps"]), abs=1e-3
            )


# --- RFT -------------------------------------------------------------------------------------------------------------


def test_the_kl_is_that_of_the_policy_however_the_stages_sample(training):
    """Validation rows are drawn from the policy itself: at the start the same answers at any temperature."""
    cold, warm = (run(training, name=str(t), temperature=t) for t in (0.3, 1.0))
    first = [trainer.stages.store.groups(0, "validation") for trainer in (cold, warm)]
    assert first[0] == first[1]
    assert cold.stages.store.groups(0) != warm.stages.store.groups(0)
    for trainer in (cold, warm):
        for stage in trainer.stages.phase.candidates.by_stage:
            logps = [
                (sum(c.token_values["sampler_logps"]), sum(c.token_values["old_logps"]))
                for group in trainer.stages.store.groups(stage, "validation")
                for c in group.samples
            ]
            assert all(a == pytest.approx(b, abs=1e-2) for a, b in logps)
    planted = plant(make(training, name="planted", temperature=0.3), over_samples)
    planted.train()
    assert history(planted, "policy/phase") == [1, 1]
    assert history(planted, "policy/kl") == [], "the mean log-ratio of other samples is no KL"


def test_tokens_per_second_count_the_policys_training(training):
    """The reward phase trains too, before the first step of its stage; its tokens are not in the policy's seconds."""
    trainer = plant(make(training), over_samples)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "tokens_per_second" in row]
    counted = sum(row["tokens_per_second"] * row["time/training"] for row in rows)
    assert counted == pytest.approx(trainer.costs.policy_tokens, rel=1e-3)
    assert trainer.costs.reward_tokens > 0
    assert trainer.costs.trained_tokens == trainer.costs.policy_tokens + trainer.costs.reward_tokens


@pytest.mark.parametrize("accumulation", [1, 3])
def test_more_epochs_over_a_stage_train_on_the_same_rows(training, accumulation):
    """20 rows less 4 are 4 batches of 4: with 3 of them per step the last step has one."""
    stages = []
    for epochs in (1, 2):
        trainer = make(
            training,
            name=f"{epochs}",
            policy_epochs=epochs,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulation,
            stages_per_epoch=2,
            **SGD,
        )
        trainer.train()
        assert trainer.state.global_step == epochs * math.ceil(4 / accumulation)
        stages.append([sorted(g.row for g in trainer.stages.store.groups(stage)) for stage in range(2)])
    assert stages[0] == stages[1]
    assert sum(map(len, stages[0])) == 16


# --- replay ----------------------------------------------------------------------------------------------------------


def test_replay_leaves_no_group_out_where_stages_differ_in_length(training):
    """Seven steps in three stages: 2, 2 and 3 of them, so 8, 8 and 12 rows; and a stage shorter than the one before."""
    for stages, lengths in ((3, [8, 8, 12]), (4, [4, 8, 8, 8])):
        trainer = training.trainer(
            "irft", name=str(stages), data=training.rows(28), stages_per_epoch=stages, replay_stages=2, **SGD
        )
        trained = []
        loss = trainer.objective.loss
        trainer.objective.loss = lambda tokens, step, loss=loss, trained=trained: (
            trained.append((step.stage, tokens.groups)) or loss(tokens, step)
        )
        trainer.train()
        assert [len(trainer.stages.store.groups(stage)) for stage in range(stages)] == lengths
        for stage in range(stages):
            rows = [group.row for at, groups in trained if at == stage for group in groups]
            expected = [g.row for s in range(max(0, stage - 2), stage + 1) for g in trainer.stages.store.groups(s)]
            assert sorted(rows) == sorted(expected)


# --- a model without a cache -----------------------------------------------------------------------------------------


def test_a_recurrent_model_is_trained_and_evaluated_and_what_needs_samples_is_refused_first(training):
    model = tiny_model("mamba", vocab_size=len(training.tokenizer))
    options = {"eval_dataset": training.rows(4)}
    trainer = training.run("sft", model=model, options=options, max_steps=1)
    assert trainer.layout == "padded"
    assert trainer.evaluate()["eval_demonstration_logp"] < 0
    with pytest.raises(UserError, match="cannot be sampled from"):
        training.trainer("irft", name="irft", model=model)
    with pytest.raises(UserError, match="cannot be sampled from"):
        training.trainer("sft", name="verifier", model=model, options=options, verifier="operator:eq")


def test_roles_decide_and_not_places(training):
    """A loss sees the same pairs when the sample stands before its demonstration."""
    trainer = training.trainer("irft", num_samples=2, max_steps=1, **SGD)
    trainer.train()
    groups = trainer.stages.store.groups(0)
    turned = [group.select(reversed(range(len(group.completions)))) for group in groups]
    assert [g.completions[0].role for g in turned] == [Role.SAMPLE] * len(turned)

    def loss_of(groups):
        objective = trainer.objective
        step = Step(objective.counts(groups), 0, lambda name, values: None)
        return objective.loss(completion_token_logps(trainer.policy, groups), step).item()

    assert loss_of(turned) == pytest.approx(loss_of(groups), abs=1e-5)


# --- runs that an earlier version began -----------------------------------------------------------------------------


def test_an_sft_run_of_the_first_version_goes_on(training):
    """Its checkpoints hold two numbers of tokens: trained on, and sampled."""
    trainer = training.run("sft", save_strategy="steps", save_steps=2, save_total_limit=None)
    checkpoint = training.folder / "run" / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    costs = state["stateful_callbacks"]["tutelage_costs"]
    costs["tokens"] = [costs["tokens"][0], costs["tokens"][2]]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    Manifest(checkpoint).note("trainer_state.json")
    resumed = training.trainer("sft", name="run")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.costs.state_dict()["tokens"] == trainer.costs.state_dict()["tokens"]


def test_stages_of_the_first_version_are_refused_when_training_starts_and_not_before(training):
    """So that --overwrite_output_dir can replace them."""
    folder = training.folder / "run" / "stages" / "stage-0000"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"stage": 0, "policy": "p0", "complete": true}', encoding="utf-8")
    trainer = training.trainer("irft")
    with pytest.raises(UserError, match="another version"):
        trainer.train()
    assert folder.exists()
    (folder / "manifest.json").unlink()
    trainer.train()


def test_sft_learns_from_demonstrations_whatever_stands_beside_them(training):
    trainer = training.trainer("sft")
    row = trainer.train_dataset[0]
    demonstration = Completion(tuple(row["demonstration_ids"]), Role.DEMONSTRATION, True)
    alone = Group(tuple(row["prompt_ids"]), (demonstration,))
    beside = alone.add([Completion((9, 9), Role.SAMPLE, False)])
    losses = []
    for group in (alone, beside):
        step = Step(trainer.objective.counts([group]), -1, lambda name, values: None)
        losses.append(trainer.objective.loss(completion_token_logps(trainer.policy, [group]), step).item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_the_gap_of_a_resumed_stage_is_that_of_the_whole_one(training):
    """Killed after sampling, before a step: nothing is sampled again, and the log says the same of the samples."""

    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise Killed

    for temperature in (1.0, 0.5):
        settings = {"stages_per_epoch": 1, "temperature": temperature}
        whole = training.run("irft", name=f"whole-{temperature}", **settings)
        killed = training.trainer("irft", name=f"{temperature}", options={"callbacks": [Kill()]}, **settings)
        with pytest.raises(Killed):
            killed.train()
        resumed = training.run("irft", name=f"{temperature}", **settings)
        assert history(resumed, "samples/logp_gap") == history(whole, "samples/logp_gap")
        manifests = [
            json.loads((t.stages.store.path(0) / "manifest.json").read_text(encoding="utf-8"))
            for t in (whole, resumed)
        ]
        assert manifests[0].get("samples/logp_gap") == manifests[1].get("samples/logp_gap")


def test_entropy_is_logged_where_the_samples_are_the_policys(training):
    assert len(history(run(training, name="warm"), "policy/entropy")) == 2
    assert history(run(training, name="cold", temperature=0.5), "policy/entropy") == []


def test_training_twice_keeps_the_first_start_as_the_zero_of_rewards(training):
    trainer = training.trainer("sft", options={"eval_dataset": training.rows(4)}, learning_rate=1e-2)
    trainer.train()
    moved = trainer.evaluate()["eval_demonstration_reward"]
    trainer.train()
    assert abs(moved) > 1e-2
    assert trainer.evaluate()["eval_demonstration_reward"] == pytest.approx(
        trainer.evaluate()["eval_demonstration_logp"] - sum(map(sum, trainer.evaluation_set.reference[0])) / 4,
        abs=1e-4,
    )
    assert trainer.evaluate()["eval_demonstration_reward"] > moved
