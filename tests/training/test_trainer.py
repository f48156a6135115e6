"""Training against an independent loop, and what must hold of every run."""

import copy
import math
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from peft import get_peft_model
from transformers import TrainerCallback

from training_runs import SGD, Snapshots, assert_same_weights, distance, history
from tutelage.data.tokenized import group_from_row
from tutelage.errors import NonFiniteLossError, UserError
from tutelage.models.loading import load_model, load_tokenizer
from tutelage.results import EvaluationRecord, Interval, RunRecord
from tutelage.sampling.base import Sample
from tutelage.scoring.logps import cached_logps
from tutelage.testing.tokenizers import tiny_tokenizer

IN_ORDER = {"train_sampling_strategy": "sequential"}


def own_logp(model, prompt_ids, token_ids):
    """What a reader would write: the model's own logits of one sequence."""
    ids = torch.tensor([[*prompt_ids, *token_ids]])
    logps = F.log_softmax(model(input_ids=ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    return logps[len(prompt_ids) - 1 :].sum()


class Scripted:
    """A sampler whose answers are given: for each prompt ``num_samples`` times ``answer(row, demonstration)``."""

    def __init__(self, answer):
        self.answer, self.demonstrations = answer, {}

    def take_weights(self, policy):
        pass

    def sample(self, prompts, params, *, num_samples=1, rows=None, stage=0, on_finished=None):
        answers = [self.answer(row, self.demonstrations[row]) for row in rows]
        return [[Sample(ids, (0.0,) * len(ids), True)] * num_samples for ids in answers]


def scripted(training, algorithm, answer, **arguments):
    """A trainer with that sampler; copies of the demonstration are what the script can return."""
    sampler = Scripted(answer)
    trainer = training.trainer(algorithm, options={"sampler": sampler}, **arguments)
    sampler.demonstrations = {row["row"]: tuple(row["demonstration_ids"]) for row in trainer.train_dataset}
    return trainer


# --- the algorithm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("irft", {"stages_per_epoch": 3, "num_samples": 2, "beta": [0.5, 1.0, 2.0]}),
        ("spin", {"loss_kind": "hinge", "num_train_epochs": 2}),
        (
            "irft",
            {
                "sft_weight": 0.3,
                "num_samples": 2,
                "loss_kind": "linear",
                "reference": "initial",
                "stages_per_epoch": 2,
            },
        ),
    ],
)
def test_training_equals_a_loop_written_out(training, algorithm, settings):
    """A frozen copy as the reference, one sequence at a time; only the samples come from the run's files."""
    trainer = training.trainer(algorithm, data=training.rows(24), **IN_ORDER, **SGD, **settings)
    model = training.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    initial = copy.deepcopy(model)
    trainer.train()
    stages = settings.get("stages_per_epoch", 1)
    for stage in range(stages * settings.get("num_train_epochs", 1)):
        frozen = initial if settings.get("reference") == "initial" else copy.deepcopy(model)
        beta = settings.get("beta", [0.1])
        beta = beta[stage % len(beta)]
        groups = trainer.stages.store.groups(stage)
        assert len(groups) == 24 // stages
        for start in range(0, len(groups), 4):
            losses, sft, tokens = [], 0.0, 0
            for group in groups[start : start + 4]:
                demonstration, *samples = (completion.token_ids for completion in group.completions)

                def gain(ids, group=group, frozen=frozen):
                    with torch.no_grad():
                        reference = own_logp(frozen, group.prompt_ids, ids)
                    return own_logp(model, group.prompt_ids, ids) - reference

                for sample in samples:
                    z = beta * (gain(demonstration) - gain(sample))
                    kind = settings.get("loss_kind", "logistic")
                    losses.append({"logistic": -F.logsigmoid(z), "hinge": torch.relu(1 - z), "linear": -z}[kind])
                sft = sft - own_logp(model, group.prompt_ids, demonstration)
                tokens += len(demonstration)
            loss = torch.stack(losses).mean() + settings.get("sft_weight", 0.0) * sft / tokens
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert distance(trainer.model, initial) > 1e-4
    assert_same_weights(trainer.model, model, 1e-5)


def test_irft_with_one_stage_is_spin_bit_for_bit(training):
    spin = training.run("spin", name="spin", num_train_epochs=2)
    irft = training.run("irft", name="irft", num_train_epochs=2, stages_per_epoch=1)
    assert_same_weights(irft.model, spin.model)
    more = training.run("irft", name="more", num_train_epochs=2, stages_per_epoch=2)
    assert distance(more.model, spin.model) > 1e-5


@pytest.mark.parametrize("algorithm", ["sft", "irft"])
def test_batch_one_accumulated_eight_times_is_batch_eight(training, algorithm):
    stages = {"stages_per_epoch": 3} if algorithm == "irft" else {}
    settings = {"data": training.rows(24), "num_train_epochs": 2, **stages, **SGD}
    one = training.run(algorithm, name="1", per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings)
    eight = training.run(algorithm, name="8", per_device_train_batch_size=8, **settings)
    assert one.state.global_step == eight.state.global_step == 6
    assert distance(one.model, training.model()) > 1e-3
    assert_same_weights(one.model, eight.model, 1e-6)
    assert history(one, "loss") == pytest.approx(history(eight, "loss"), abs=1e-5)


def test_an_incomplete_last_step_is_averaged_over_what_it_has(training):
    """22 rows: steps of 8, 8 and 6, which accumulation sees as 5 micro-batches and a remainder."""
    settings = {"data": training.rows(22), "stages_per_epoch": 2, **SGD}
    small = training.run("irft", name="2", per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    large = training.run("irft", name="8", per_device_train_batch_size=8, **settings)
    assert_same_weights(small.model, large.model, 1e-6)
    assert sum(len(small.stages.store.groups(stage)) for stage in range(2)) == 22


def test_gradient_checkpointing_changes_no_gradient(training):
    for config in (None, training.lora()):
        models = []
        for on in (False, True):
            settings = {"activation_checkpointing": on, "stages_per_epoch": 2, **SGD}
            options = {"peft_config": config}
            models.append(training.run("irft", name=f"{config is None}-{on}", options=options, **settings).model)
        assert [model.is_activation_checkpointing for model in models] == [False, True]
        assert_same_weights(models[0], models[1], 1e-6)


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_both_layouts_train_the_same(training, layout):
    fixed = training.run("irft", name=layout, layout=layout, num_samples=2, **SGD)
    assert fixed.layout == layout
    assert_same_weights(fixed.model, training.run("irft", name="auto", num_samples=2, **SGD).model, 1e-6)


def test_a_seed_decides_a_run_adapters_included(training):
    def run(name, seed=42):
        return training.run("irft", name=name, seed=seed, options={"peft_config": training.lora(lora_dropout=0.1)})

    first = run("first").model
    torch.rand(7)  # what a program does before must not matter
    assert_same_weights(run("second").model, first)
    assert distance(run("third", seed=43).model, first) > 1e-3


# --- the reference ---------------------------------------------------------------------------------------------------


def recorded_logps(trainer, stage):
    return torch.tensor([group.sums("reference_logps") for group in trainer.stages.store.groups(stage)])


def continued_adapter(training):
    """An adapter that an earlier run trained, as its folder loads."""
    base = training.model()
    base.save_pretrained(training.folder / "base")
    model = load_model(str(training.folder / "base"))
    earlier = training.run("sft", model=model, name="earlier", options={"peft_config": training.lora()})
    earlier.save_model()
    return load_model(earlier.args.output_dir)


@pytest.mark.parametrize("policy", ["full", "fresh adapter", "continued adapter"])
@pytest.mark.parametrize("reference", ["stage", "initial"])
def test_recorded_reference_logps_equal_a_frozen_copys(training, policy, reference):
    model = continued_adapter(training) if policy == "continued adapter" else training.model()
    snapshots = Snapshots()
    options = {"callbacks": [snapshots], "peft_config": training.lora() if policy == "fresh adapter" else None}
    trainer = training.run(
        "irft", model=model, reference=reference, stages_per_epoch=2, learning_rate=1e-2, options=options
    )
    assert trainer.stages.schedule.bounds(1) == (2, 4)
    assert distance(snapshots.models[0], snapshots.models[2]) > 1e-2
    for stage, step in ((0, 0), (1, 0 if reference == "initial" else 2)):
        truth = torch.tensor(cached_logps(snapshots.models[step], trainer.stages.store.groups(stage)))
        torch.testing.assert_close(recorded_logps(trainer, stage), truth, atol=1e-4, rtol=0)
    other = torch.tensor(
        cached_logps(snapshots.models[2 if reference == "initial" else 0], trainer.stages.store.groups(1))
    )
    assert (recorded_logps(trainer, 1) - other).abs().mean() > 0.1, "the copies can be told apart"


def test_adapter_and_full_training_start_from_the_same_reference(training):
    full = training.run("irft", name="full", max_steps=1)
    adapter = training.run("irft", name="adapter", max_steps=1, options={"peft_config": training.lora()})
    assert [g.completions for g in full.stages.store.groups(0)] == [
        g.completions for g in adapter.stages.store.groups(0)
    ]
    torch.testing.assert_close(recorded_logps(full, 0), recorded_logps(adapter, 0), atol=1e-4, rtol=0)


def test_a_stage_starts_at_margin_zero_and_leaves_it(training):
    options = {"peft_config": training.lora()}
    trainer = training.run("irft", stages_per_epoch=2, num_train_epochs=2, learning_rate=5e-3, options=options)
    margins = history(trainer, "rewards/margin")
    assert len(margins) == 8
    assert max(abs(margin) for margin in margins[::2]) < 1e-5
    assert min(abs(margin) for margin in margins[1::2]) > 1e-3
    assert history(trainer, "loss")[::2] == pytest.approx([math.log(2)] * 4, abs=1e-5)


# --- samples ---------------------------------------------------------------------------------------------------------


def test_cut_samples_have_no_end_of_turn_and_demonstrations_are_cut_alike(training, sft_folder):
    trainer = training.run("irft", model=load_model(sft_folder), max_completion_length=4, learning_rate=1e-6)
    end = training.tokenizer.eos_token_id
    completions = [c for stage in range(4) for group in trainer.stages.store.groups(stage) for c in group.completions]
    for completion in completions:
        assert len(completion.token_ids) <= 4
        assert completion.finished == (completion.token_ids[-1] == end)
        assert end not in completion.token_ids[:-1]
        assert completion.finished or len(completion.token_ids) == 4
    assert {(completion.role.value, completion.finished) for completion in completions} == {
        (kind, finished) for kind in ("demonstration", "sample") for finished in (True, False)
    }
    cut = [not c.finished for group in trainer.stages.store.groups(0) for c in group.completions[1:]]
    assert history(trainer, "samples/truncated_fraction")[0] == pytest.approx(sum(cut) / len(cut))


def test_copies_of_the_demonstration_are_dropped_and_counted(training):
    """Rows 0 to 3 draw their own demonstration; without them the run is the same as if they were not there."""
    trainer = scripted(
        training, "irft", lambda row, ids: ids if row < 4 else (9, row + 3, 2), stages_per_epoch=1, **IN_ORDER, **SGD
    )
    trainer.train()
    assert history(trainer, "pairs/dropped") == [4]
    assert history(trainer, "loss")[0] == 0
    assert history(trainer, "grad_norm")[0] == 0
    assert trainer.state.global_step == 4

    rest = scripted(
        training,
        "irft",
        lambda row, ids: (9, row + 4 + 3, 2),
        data=training.rows().select(range(4, 16)),
        name="rest",
        stages_per_epoch=1,
        **IN_ORDER,
        **SGD,
    )
    rest.train()
    assert history(rest, "pairs/dropped") == [0]
    assert_same_weights(trainer.model, rest.model, 1e-6)


def test_when_every_pair_is_dropped_training_goes_on_and_changes_nothing(training):
    trainer = scripted(training, "irft", lambda row, ids: ids, gradient_accumulation_steps=2, stages_per_epoch=2)
    trainer.train()
    assert trainer.state.global_step == 2
    assert history(trainer, "loss") == [0, 0]
    assert sum(history(trainer, "pairs/dropped")) == 16
    assert_same_weights(trainer.model, training.model())


def test_the_sft_term_learns_from_a_demonstration_whose_sample_was_dropped(training):
    trainer = scripted(training, "irft", lambda row, ids: ids, sft_weight=1.0, **SGD)
    trainer.train()
    assert sum(history(trainer, "pairs/dropped")) == 16
    assert distance(trainer.model, training.model()) > 1e-3
    assert_same_weights(trainer.model, training.run("sft", name="sft", **SGD).model, 1e-6)


def test_three_samples_make_three_pairs(training):
    trainer = training.trainer("irft", num_samples=3)
    counted = []
    counts = trainer.objective.counts
    trainer.objective.counts = lambda groups: counted.append(counts(groups)) or counted[-1]
    trainer.train()
    assert [step["pairs"] for step in counted] == [12] * 4
    assert all(len(group.completions) == 4 for group in trainer.stages.store.groups(0))
    assert len({c.token_ids for group in trainer.stages.store.groups(0) for c in group.completions[1:]}) > 6


@pytest.mark.parametrize("reference", ["stage", "initial"])
def test_replay_trains_on_earlier_samples_under_this_stages_reference(training, reference):
    snapshots = Snapshots()
    trainer = training.trainer(
        "irft",
        options={"callbacks": [snapshots]},
        replay_stages=1,
        stages_per_epoch=3,
        reference=reference,
        data=training.rows(24),
        learning_rate=1e-2,
    )
    trained = []
    loss = trainer.objective.loss
    trainer.objective.loss = lambda tokens, step: trained.append(tokens.groups) or loss(tokens, step)
    trainer.train()
    assert [len(groups) for groups in trained] == [4, 4, 8, 8, 8, 8]
    for stage in (1, 2):
        earlier = {group.row: group for group in trainer.stages.store.groups(stage - 1)}
        own = {group.row: group for group in trainer.stages.store.groups(stage)}
        steps = trained[2 * stage : 2 * stage + 2]
        replayed = {group.row: group for groups in steps for group in groups if group.row in earlier}
        assert sum(len(groups) for groups in steps) == len(own) + len(replayed) == 16
        assert {row: g.completions for row, g in replayed.items()} == {
            row: g.completions for row, g in earlier.items()
        }
        truth = cached_logps(snapshots.models[0 if reference == "initial" else 2 * stage], list(replayed.values()))
        found = [group.sums("reference_logps") for group in replayed.values()]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(truth), atol=1e-4, rtol=0)


def test_a_stream_trains_as_the_rows_do(training):
    settings = {"max_steps": 4, "stages_per_epoch": 2}
    rows = training.run("irft", name="rows", **settings, **IN_ORDER)
    stream = training.run("irft", name="stream", data=training.rows().to_iterable_dataset(), **settings)
    assert stream.state.global_step == 4
    assert_same_weights(stream.model, rows.model)
    sft = training.run("sft", data=training.rows().to_iterable_dataset(), max_steps=3)
    assert sft.state.global_step == 3


def test_a_stream_that_is_too_short_is_an_error(training):
    trainer = training.trainer("irft", data=training.rows(12).to_iterable_dataset(), max_steps=4, stages_per_epoch=2)
    with pytest.raises(UserError, match=r"end after 3 of 4 optimizer steps.*repeat"):
        trainer.train()


# --- what is watched -------------------------------------------------------------------------------------------------


class Seen(TrainerCallback):
    """The names in each line of the log."""

    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(logs.keys())


def test_everything_watched_is_logged(training):
    seen = Seen()
    trainer = training.run("irft", num_samples=2, options={"callbacks": [seen]})
    step = {"loss", "grad_norm", "learning_rate", "tokens_per_second"}
    step |= {"time/sampling", "time/reference", "time/training"}
    step |= {f"logps/{kind}" for kind in ("demonstrations", "samples")}
    step |= {f"rewards/{what}" for what in ("demonstrations", "samples", "margin", "accuracy")}
    stage = {"pairs/dropped", "samples/truncated_fraction", "samples/distinct_1", "samples/distinct_2"}
    stage |= {"length/demonstrations", "length/samples"}
    assert sum(step <= line for line in seen.lines) == 4
    assert sum(stage <= line for line in seen.lines) == 4
    assert all("stage" in line for line in seen.lines)
    assert history(trainer, "stage")[-1] == 3
    groups = trainer.stages.store.groups(0)
    samples = [c.token_ids for group in groups for c in group.completions[1:]]
    bigrams = [ids[i : i + 2] for ids in samples for i in range(len(ids) - 1)]
    assert history(trainer, "samples/distinct_2")[0] == pytest.approx(len(set(bigrams)) / len(bigrams))
    assert history(trainer, "length/samples")[0] == pytest.approx(sum(map(len, samples)) / len(samples))
    first = recorded_logps(trainer, 0).mean(0)
    assert history(trainer, "logps/demonstrations")[0] == pytest.approx(first[0].item(), abs=1e-3)
    assert history(trainer, "logps/samples")[0] == pytest.approx(first[1:].mean().item(), abs=1e-3)
    everything = [g for stage in range(4) for g in trainer.stages.store.groups(stage)]
    assert trainer.costs.sampled_tokens == sum(len(c.token_ids) for g in everything for c in g.completions[1:])
    assert trainer.costs.trained_tokens == sum(len(c.token_ids) for g in everything for c in g.completions)


def test_evaluation_during_training(training, monkeypatch):
    module = training.folder / "marks"
    module.mkdir()
    (module / "tutelage_test_marks.py").write_text(
        textwrap.dedent("""
            seen = []

            def short(text, row):
                seen.append((text, row["limit"]))
                return len(text) < row["limit"]
        """)
    )
    monkeypatch.syspath_prepend(module)
    held_out = Dataset.from_list(
        [
            {"prompt": f"Is {i}?", "chosen": f" It is {i}.", "rejected": " No", "limit": 1000 * (i < 2)}
            for i in range(4)
        ]
    )
    trainer = training.run(
        "irft",
        eval_strategy="steps",
        eval_steps=2,
        stages_per_epoch=2,
        verifier="tutelage_test_marks:short",
        options={"eval_dataset": held_out},
    )
    lines = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in lines] == [2, 4]
    start, end = training.model(), trainer.model
    groups, pairs = trainer.evaluation_set.groups, trainer.evaluation_set.pairs
    before, after = (torch.tensor(cached_logps(model, groups))[:, 0] for model in (start, end))
    assert lines[1]["eval_demonstration_logp"] == pytest.approx(after.mean().item(), abs=1e-4)
    assert lines[1]["eval_demonstration_reward"] == pytest.approx(0.1 * (after - before).mean().item(), abs=1e-4)
    gaps = torch.tensor(cached_logps(end, pairs)) - torch.tensor(cached_logps(start, pairs))
    accuracy = (gaps[:, 0] > gaps[:, 1]).float().mean().item()
    assert lines[1]["eval_preference_accuracy"] == accuracy
    assert lines[1]["eval_accuracy_sampled"] == 0.5
    assert "eval_preference_logp_accuracy" in lines[1]
    import tutelage_test_marks

    assert len(tutelage_test_marks.seen) == 1 + 8  # once on a demonstration, to fail before training if it fails
    assert history(trainer, "time/evaluation")


@pytest.mark.parametrize("reference", ["stage", "initial"])
def test_mixed_precision_reaches_training_sampling_and_reference(training, reference):
    trainer = training.trainer("irft", bf16=True, stages_per_epoch=2, reference=reference, learning_rate=1e-2)
    start = copy.deepcopy(trainer.model)
    # The probe of sampling computes in float32; from now on it is known.
    trainer.stages.rollout.draw([group_from_row(row) for row in trainer.train_dataset], stage=0)
    precisions = set()
    trainer.model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, args, output: precisions.add((module.training, output.dtype))
    )
    trainer.train()
    assert precisions == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    if reference == "initial":  # autocast keeps casts of weights, and those of the policy are not those of π_0
        with torch.autocast("cpu", torch.bfloat16):
            truth = torch.tensor(cached_logps(start, trainer.stages.store.groups(1)))
        torch.testing.assert_close(recorded_logps(trainer, 1), truth, atol=0.05, rtol=0.01)


def test_evaluating_changes_no_training(training):
    plain = training.run("irft", name="plain", stages_per_epoch=2)
    evaluated = training.run(
        "irft",
        name="evaluated",
        stages_per_epoch=2,
        eval_strategy="steps",
        eval_steps=1,
        options={"eval_dataset": training.rows(4)},
    )
    assert_same_weights(plain.model, evaluated.model)


# --- from run to run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_the_output_of_a_run_starts_the_next(training, sft_folder, adapter):
    start = load_model(sft_folder)
    options = {"peft_config": training.lora() if adapter else None}
    sft = training.run("sft", model=start, name="sft", learning_rate=1e-2, options=options)
    sft.save_model()
    folder = sft.args.output_dir
    assert len(load_tokenizer(folder)) == len(training.tokenizer)
    irft = training.run("irft", model=folder, name="irft", max_steps=1)
    assert irft.model_name == folder
    truth = torch.tensor(cached_logps(sft.model, irft.stages.store.groups(0)))
    torch.testing.assert_close(recorded_logps(irft, 0), truth, atol=1e-5, rtol=0)
    before = torch.tensor(cached_logps(load_model(sft_folder), irft.stages.store.groups(0)))
    assert (truth - before).abs().mean() > 1e-3
    assert hasattr(irft.model, "peft_config") == adapter


class FakeHub:
    def __init__(self):
        self.uploaded = {}

    def create_repo(self, name, **kwargs):
        return type("Repo", (), {"repo_id": f"someone/{name}"})

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **kwargs):
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        left = list(filter_repo_objects(files, ignore_patterns=ignore_patterns))
        self.uploaded[repo_id] = ModelCard.load(f"{folder_path}/README.md"), left


DATA_OF_A_RUN = (
    "results.json",
    "report.html",
    "stages/stage-0000/draw-000/samples.jsonl",
    "stages/negatives/initial.jsonl",
    "retention-start/results.json",
    "controls/train.jsonl",
    "controls/self_training/results.json",
    "controls/self_training/report.html",
    "controls/self_training/stages/stage-0000/draw-000/samples.jsonl",
)


def test_pushing_uploads_nothing_of_the_users_data(training, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr("tutelage.training.publishing.upload_folder", hub.upload_folder)
    trainer = training.trainer("sft", name="my-policy")
    trainer.save_model()
    for name in DATA_OF_A_RUN:
        path = Path(trainer.args.output_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}", encoding="utf-8")
    trainer.push_to_hub()
    ((_, files),) = hub.uploaded.values()
    assert not set(files) & set(DATA_OF_A_RUN)
    assert {"model.safetensors", "config.json", "README.md"} <= set(files)


@pytest.mark.parametrize("adapter", [False, True])
def test_pushing_uploads_the_runs_own_card(training, monkeypatch, adapter):
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr("tutelage.training.publishing.upload_folder", hub.upload_folder)
    options = {"peft_config": training.lora() if adapter else None, "source": "sums"}
    trainer = training.run("irft", name="my-policy", options=options)
    trainer.save_model()
    trainer.push_to_hub()
    ((card, files),) = hub.uploaded.values()
    assert ("adapter_model.safetensors" if adapter else "model.safetensors") in files
    assert not [file for file in files if "stages" in file or "checkpoint" in file], "the user's data stay here"
    assert card.data.library_name == ("peft" if adapter else "transformers")
    assert card.data.tags == ["tutelage", "irft"]
    assert "# my-policy" in card.text
    assert "4 stages" in card.text
    assert "on `sums`" in card.text
    assert "| beta | 0.1 |" in card.text
    assert "No held-out data" in card.text


def test_a_card_can_show_an_evaluation(training):
    trainer = training.trainer("sft")
    found = EvaluationRecord("d", None, [], {"accuracy_greedy": Interval(0.25, 0.1, 0.4, 12)})
    trainer.create_model_card(record=RunRecord("x", "sft", "m", "d", 0, evaluation=found))
    assert "| accuracy_greedy | 0.25 | 0.1 to 0.4 | 12 |" in (training.folder / "run" / "README.md").read_text()


# --- errors ----------------------------------------------------------------------------------------------------------


def test_more_stages_than_steps_is_an_error_before_any_work(training):
    with pytest.raises(UserError, match="5 stages do not fit into an epoch of 4 optimizer steps"):
        training.trainer("irft", stages_per_epoch=5)


class At(TrainerCallback):
    """Does something to the model after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


def poison(model):
    model.lm_head.weight.data[5] = torch.nan


def spoil_gradient(model):
    model.lm_head.weight.register_hook(lambda gradient: gradient * torch.inf)


@pytest.mark.parametrize(
    ("algorithm", "action", "what"),
    [
        ("sft", poison, r"the norm of the weights is nan at step 3;"),
        ("irft", poison, r"the norm of the weights is nan at step 3 of stage 0"),
        ("spin", poison, r"the norm of the weights is nan at step 3 of stage 0"),
        ("irft", spoil_gradient, r"the gradient is (nan|inf) at step 3 of stage 1"),
    ],
)
def test_nan_and_infinity_stop_training_and_the_last_checkpoint_stays(training, algorithm, action, what):
    stages = {"stages_per_epoch": 2} if algorithm == "irft" else {}
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_grad_norm": 0.0, **stages}
    callbacks = [At(2, action)]
    trainer = training.trainer(algorithm, options={"callbacks": callbacks}, **settings)
    # The callback runs before the checkpoint of its step is written, which poisoned weights are refused.
    with pytest.raises(NonFiniteLossError, match=what) as error:
        trainer.train()
    assert trainer.state.global_step == 2
    good = 1 if action is poison else 2
    assert f"The last good checkpoint is {trainer.args.output_dir}/checkpoint-{good}." in str(error.value)
    saved = load_model(f"{trainer.args.output_dir}/checkpoint-{good}")
    assert all(parameter.isfinite().all() for parameter in saved.parameters())
    if action is spoil_gradient:
        assert_same_weights(trainer.model, saved)
    resumed = training.trainer(algorithm, **settings)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-{good}")
    assert resumed.state.global_step == 4


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_loss_that_is_not_finite_moves_no_weight_whichever_micro_batch_it_is_of(training, micro_batch):
    snapshots = Snapshots()
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = training.trainer("sft", options={"callbacks": [snapshots]}, **settings)
    loss, calls = trainer.objective.loss, []

    def spoiled(tokens, step):
        calls.append(len(calls))
        return loss(tokens, step) + (torch.inf if calls[-1] == 2 + micro_batch else 0.0)

    trainer.objective = SimpleNamespace(
        uses_dropout=True, beta=trainer.objective.beta, counts=trainer.objective.counts, loss=spoiled
    )
    with pytest.raises(NonFiniteLossError, match="the loss is inf at step 2;"):
        trainer.train()
    assert_same_weights(trainer.model, snapshots.models[1])
    assert distance(snapshots.models[1], snapshots.models[0]) > 0


def test_a_clipped_infinite_gradient_is_found_too(training):
    trainer = training.trainer("sft", options={"callbacks": [At(1, spoil_gradient)]})
    with pytest.raises(NonFiniteLossError, match="the gradient is nan at step 2"):
        trainer.train()


def test_an_overflow_that_loss_scaling_meets_on_its_way_is_no_error(training):
    """With fp16 the first gradients overflow until the scale has come down; the scaler leaves those steps out."""
    trainer = training.trainer("sft", num_train_epochs=10, max_grad_norm=0.0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**80)
    trainer.train()
    assert trainer.state.global_step == 40
    assert trainer.accelerator.scaler.get_scale() < 2.0**80
    assert distance(trainer.model, training.model()) > 1e-3


def test_adapters_that_cannot_be(training):
    tied = training.model("gemma3", num_hidden_layers=3)
    with pytest.raises(UserError, match="shares the weights of embedding and head"):
        training.trainer(
            "sft", model=tied, options={"peft_config": training.lora(target_modules=["q_proj", "lm_head"])}
        )
    model = get_peft_model(training.model(), training.lora())
    with pytest.raises(UserError, match="already has an adapter"):
        training.trainer("sft", model=model, options={"peft_config": training.lora()})
    untied = training.lora(target_modules=["q_proj", "lm_head"])
    training.run("irft", max_steps=1, options={"peft_config": untied})


def test_a_tokenizer_larger_than_the_model(training):
    with pytest.raises(UserError, match=rf"the tokenizer has {len(tiny_tokenizer('zephyr'))} tokens.*embedding 97"):
        training.trainer("sft", model=training.model(vocab_size=97))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"beta": [0.1, 0.2]}, "2 values for 4 stages"),
        ({"beta": [0.0]}, "above 0"),
        ({"temperature": 0.0}, "greedy"),
        ({"reference": "final"}, "reference.*stage.*initial"),
        ({"num_samples": 0}, "at least 1"),
        ({"max_completion_length": 0}, "max_completion_length.*at least 1"),
    ],
)
def test_settings_that_make_no_sense(training, settings, problem):
    with pytest.raises(UserError, match=problem):
        training.trainer("irft", **settings)
