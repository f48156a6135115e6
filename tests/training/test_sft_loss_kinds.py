"""SFT with another loss than the likelihood: as a loop written out, in any micro-batches, killed and resumed."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from training_runs import SETTINGS, SGD, Training, assert_same_weights, distance, history
from tutelage.algorithms.registry import find
from tutelage.algorithms.sft_losses import LOSS_KINDS
from tutelage.cli import main
from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role
from tutelage.report.runs import is_method
from tutelage.results import load_results
from tutelage.scoring.divergence import teacher_states
from tutelage.scoring.logps import completion_token_logps
from tutelage.training.earlier import OLD_LOGPS
from tutelage.training.objective import Step

RIVALS = {
    "asft": {"anchor_weight": 2.0},
    "asft, reverse": {"anchor_weight": 2.0, "anchor_kl": "reverse"},
    "psft": {"old_policy_steps": 2, "clip_range": 0.05},
    "iw": {"weight_temperature": 0.7},
}
IN_ORDER = {"train_sampling_strategy": "sequential"}


@pytest.fixture(params=RIVALS)
def settings(request):
    return {"loss_kind": request.param.split(",")[0], **RIVALS[request.param]}


def sgd(settings):
    """Of ASFT larger steps: where a policy guesses, probabilities are small, and so are the gradients of −p and of the KL."""
    return {**SGD, "learning_rate": 0.1} if settings["loss_kind"] == "asft" else SGD


# --- against plain torch -------------------------------------------------------------------------------------------------


def log_probs(model, row):
    """[T, V] at the tokens of the demonstration, and which these are."""
    ids = torch.tensor([[*row["prompt_ids"], *row["demonstration_ids"]]])
    return model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1), row["demonstration_ids"]


def written_loss(settings, policy, tokens, start, old):
    """The sum over a demonstration's tokens, from [T, V] log-probs of policy, start and old policy."""
    logps, start_logps, old_logps = (each[range(len(tokens)), tokens] for each in (policy, start, old))
    if settings["loss_kind"] == "asft":
        kl = (
            (policy.exp() * (policy - start)).sum()
            if settings.get("anchor_kl") == "reverse"
            else (start.exp() * (start - policy)).sum()
        )
        return -(logps.exp().detach() * logps).sum() + settings["anchor_weight"] * kl
    if settings["loss_kind"] == "psft":
        ratio, e = (logps - old_logps).exp(), settings["clip_range"]
        return -torch.minimum(ratio, ratio.clamp(1 - e, 1 + e)).sum()
    weight = (settings["weight_temperature"] * (logps - start_logps).mean()).exp().item()
    return -weight * logps.sum()


def test_each_trains_as_a_loop_written_out(training, settings):
    """One row at a time, from the models' own logits; the old policy of PSFT is copied every second step."""
    trainer = training.trainer("sft", data=training.rows(16), **settings, **IN_ORDER, **sgd(settings))
    model, start, rows = training.model(), training.model(), list(trainer.train_dataset)
    optimizer = torch.optim.SGD(model.parameters(), lr=sgd(settings)["learning_rate"])
    trainer.train()
    old, losses = training.model(), []
    for step in range(4):
        if step % 2 == 0:
            old.load_state_dict(model.state_dict())
        total, count = torch.zeros(()), 0
        for row in rows[4 * step : 4 * step + 4]:
            policy, tokens = log_probs(model, row)
            with torch.no_grad():
                others = [log_probs(each, row)[0] for each in (start, old)]
            total = total + written_loss(settings, policy, tokens, *others)
            count += len(tokens)
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append((total / count).item())
    assert history(trainer, "loss") == pytest.approx(losses, rel=1e-3, abs=1e-5)
    assert distance(model, training.model()) > 1e-3
    assert_same_weights(trainer.model, model, 1e-4)
    if settings["loss_kind"] == "asft":
        assert history(trainer, "tokens/divergence_from_start")[-1] > 1e-3, "the anchor counts"


def test_where_they_are_sft_or_dft(training):
    """Without anchor ASFT is DFT; PSFT whose old policy is new at each step, and weights of exponent 0, are SFT."""

    def trained(name, **settings):
        return training.run("sft", name=name, **settings, **IN_ORDER, **SGD).model

    nll, dft = trained("nll"), trained("dft", loss_kind="dft")
    assert distance(nll, dft) > 1e-3
    assert_same_weights(trained("0", loss_kind="asft", anchor_weight=0.0), dft, 1e-6)
    assert_same_weights(trained("1", loss_kind="psft", old_policy_steps=1), nll, 1e-6)
    assert_same_weights(trained("2", loss_kind="iw", weight_temperature=0.0), nll, 1e-6)


@pytest.mark.parametrize("adapter", ["new", "continued"])
def test_with_an_adapter_the_start_is_the_run_s(training, settings, adapter):
    """A new adapter changes nothing; one that was trained before does, and the start is the policy with it."""
    model, options = training.model(), {"peft_config": training.lora()}
    if adapter == "continued":
        model, options = get_peft_model(model, training.lora(init_lora_weights=False)), {}
    trainer = training.trainer("sft", model=model, options=options, learning_rate=0.01, **settings, **IN_ORDER)
    groups = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        before = completion_token_logps(trainer.policy, groups).sums()
    trainer.train()
    first = next(row for row in trainer.state.log_history if "loss" in row)
    if settings["loss_kind"] == "asft":
        assert first["tokens/divergence_from_start"] == pytest.approx(0.0, abs=1e-5)
        assert history(trainer, "tokens/divergence_from_start")[-1] > 1e-4
    elif settings["loss_kind"] == "psft":
        assert first["loss"] == pytest.approx(-1.0, abs=1e-5)
    else:
        assert first["demonstrations/weight"] == pytest.approx(1.0, abs=1e-5)
        known = [trainer.earlier._known[group.row, len(group.prompt_ids)] for group in groups]
        assert known == pytest.approx(before.tolist(), abs=1e-3)


def test_what_stands_beside_a_demonstration_counts_nothing(training, settings):
    trainer = training.trainer("sft", **settings)
    row = trainer.train_dataset[0]
    ids = tuple(row["demonstration_ids"])
    known = {"token_values": {"old_logps": (-5.0,) * len(ids)}, "values": {"start_logp": -20.0}}
    alone = Group(tuple(row["prompt_ids"]), (Completion(ids, Role.DEMONSTRATION, True, **known),))
    beside = Group(alone.prompt_ids, (Completion((9, 9), Role.SAMPLE, False), *alone.completions))
    losses = []
    for group in (alone, beside):
        start = teacher_states(training.model(initializer_range=0.5), [group], kind="forward_kl")
        tokens = completion_token_logps(trainer.policy, [group], teacher=start)
        step = Step(trainer.objective.counts([group]), -1, lambda name, values: None)
        losses.append(trainer.objective.loss(tokens, step).item())
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


# --- the engine ----------------------------------------------------------------------------------------------------------


def test_batch_one_accumulated_eight_times_is_batch_eight(training, settings):
    """22 rows: the last step of an epoch is not full."""
    common = {"data": training.rows(22), "num_train_epochs": 2, **settings, **sgd(settings)}
    one = training.run("sft", name="1", per_device_train_batch_size=1, gradient_accumulation_steps=8, **common)
    eight = training.run("sft", name="8", per_device_train_batch_size=8, **common)
    assert one.state.global_step == eight.state.global_step == 6
    assert distance(one.model, training.model()) > 1e-3
    assert_same_weights(one.model, eight.model, 1e-4)
    assert history(one, "loss") == pytest.approx(history(eight, "loss"), rel=1e-3, abs=1e-5)


class Killed(BaseException):
    """What no one catches."""


class KillAt(TrainerCallback):
    """Kills the run where a step begins."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


RESUMED = {"num_train_epochs": 2, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module", params=["asft", "psft", "iw"])
def whole(request, tmp_path_factory):
    """A run that nobody killed, with dropout and in a random order, and its settings: 12 steps."""
    settings = {"loss_kind": request.param, **RIVALS[request.param], **RESUMED}
    if settings["loss_kind"] == "psft":
        settings["old_policy_steps"] = 4  # windows of 4 and 2 steps in each epoch
    training = Training(tmp_path_factory.mktemp("whole"))
    trainer = training.trainer("sft", model=training.model(attention_dropout=0.1), data=training.rows(24), **settings)
    trainer.train()
    assert trainer.state.global_step == 12
    return trainer, settings


@pytest.mark.parametrize("step", [2, 6], ids=["inside a window", "between epochs"])
def test_killed_and_resumed_it_is_the_same(training, whole, step):
    expected, settings = whole

    def made(callbacks=()):
        model, options = training.model(attention_dropout=0.1), {"callbacks": list(callbacks)}
        return training.trainer("sft", model=model, data=training.rows(24), options=options, **settings)

    with pytest.raises(Killed):
        made([KillAt(step)]).train()
    resumed = made()
    point = resumed.resume_point()
    assert point is not None
    assert point.endswith(f"checkpoint-{step}")
    if settings["loss_kind"] == "psft":
        left = json.loads((training.folder / "run" / f"checkpoint-{step}" / OLD_LOGPS).read_text())
        assert len(left) == {2: 2, 6: 0}[step]
    resumed.train(resume_from_checkpoint=point)
    assert resumed.state.global_step == 12
    assert_same_weights(resumed.model, expected.model)
    assert history(resumed, "loss") == history(expected, "loss")


def test_steps_ahead_end_with_the_run(training):
    trainer = training.run("sft", loss_kind="psft", old_policy_steps=8, max_steps=3, data=training.rows(40), **SGD)
    assert trainer.state.global_step == 3
    assert trainer.costs.policy_tokens == sum(
        len(trainer.train_dataset[i]["demonstration_ids"]) for i in _rows_of(trainer, 12)
    )


def _rows_of(trainer, count):
    order = [group.row for batch in trainer.get_train_dataloader() for group in batch]
    return order[:count]


# --- settings and reports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"anchor_weight": 0.1}, "'anchor_weight': has no effect with --loss_kind nll.*--loss_kind asft"),
        ({"loss_kind": "iw", "clip_range": 0.2}, "'clip_range': has no effect with --loss_kind iw.*psft"),
        ({"loss_kind": "asft", "anchor_weight": -0.1}, "'anchor_weight': must be at least 0, not -0.1"),
        ({"loss_kind": "asft", "anchor_kl": "both"}, "'anchor_kl': must be one of forward, reverse, not 'both'"),
        ({"loss_kind": "psft", "clip_range": 0.0}, "'clip_range': must be above 0, not 0"),
        ({"loss_kind": "psft", "old_policy_steps": 0}, "'old_policy_steps': must be at least 1, not 0"),
        ({"loss_kind": "iw", "weight_limit": float("inf")}, "'weight_limit': must be a finite number"),
        ({"loss_kind": "iw", "weight_temperature": -1}, "'weight_temperature': must be at least 0, not -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, settings, problem):
    with pytest.raises(UserError, match=problem):
        find("sft").config(output_dir=str(tmp_path), **SETTINGS, **settings)


def test_the_settings_that_a_kind_reads_have_their_defaults_in_the_record(tmp_path):
    for kind, found in LOSS_KINDS.items():
        args = find("sft").config(output_dir=str(tmp_path), loss_kind=kind, **SETTINGS)
        for other in LOSS_KINDS.values():
            for name in other.settings:
                assert getattr(args, name) == found.settings.get(name)


def test_streams_are_refused_where_they_would_be_read_twice(training):
    with pytest.raises(UserError, match=r"'loss_kind': streamed data .* --loss_kind iw"):
        training.trainer("sft", loss_kind="iw", data=training.rows().to_iterable_dataset(), max_steps=2)
    stream = training.run(
        "sft", loss_kind="psft", data=training.rows().to_iterable_dataset(), max_steps=2, old_policy_steps=2, **SGD
    )
    assert stream.state.global_step == 2


@pytest.mark.parametrize("name", ["asft, reverse", "psft", "iw"])
def test_from_the_command_line(training, capsys, name):
    """A dry run tells of the passes, and leaves nothing; a run is no control."""
    settings = {"loss_kind": name.split(",")[0], **RIVALS[name]}
    training.model().save_pretrained(training.folder / "base")
    training.tokenizer.save_pretrained(training.folder / "base")
    lines = [json.dumps(row) + "\n" for row in training.rows(8)]
    (training.folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    out = training.folder / "out"
    command = ["sft", f"--model_name_or_path={training.folder / 'base'}", f"--output_dir={out}", "--bf16=False"]
    command += [f"--dataset_name={training.folder / 'data.jsonl'}", "--use_cpu", "--report_to=none"]
    command += ["--per_device_train_batch_size=4", "--num_train_epochs=1", "--learning_rate=1e-3"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    assert main([*command, "--dry_run"]) == 0
    assert not out.exists()
    assert "log-probs under an earlier policy" in " ".join(capsys.readouterr().out.split())
    assert main(command) == 0
    record = load_results(out)
    assert record.settings | settings == record.settings
    assert is_method(record)
