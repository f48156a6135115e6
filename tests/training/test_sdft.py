"""SDFT: a run is a loop written out with full logits; its teacher is whose it should be, also after a kill."""

import copy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from test_resume import KillAt, Killed

from training_runs import SETTINGS, SGD, Snapshots, assert_same_weights, distance, history, weights
from tutelage.algorithms.registry import find
from tutelage.data.demonstrations import read_row
from tutelage.data.teacher_prompt import DEFAULT_TEMPLATE, TeacherPrompt
from tutelage.data.tokenized import group_from_row, tokenize_dataset
from tutelage.errors import UserError
from tutelage.models.loading import load_model
from tutelage.models.modes import evaluation_mode

ORDER = {"train_sampling_strategy": "sequential"}
TALKS = [
    {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": f"What is {i} + {i}?"},
            {"role": "assistant", "content": f"It is {2 * i}"},
        ]
    }
    for i in range(8)
]


def ending(training):
    """A random model whose samples end at times: the logit of the end of a turn varies more than others."""
    model = training.model()
    model.get_output_embeddings().weight.data[training.tokenizer.eos_token_id] *= 8
    return model


def divergence_of(logits, teacher_logits, kind):
    p, q = logits.softmax(1), teacher_logits.softmax(1)
    m = 0.3 * q + 0.7 * p
    terms = {
        "forward_kl": q * (q / p).log(),
        "reverse_kl": p * (p / q).log(),
        "jensen_shannon": 0.3 * q * (q / m).log() + 0.7 * p * (p / m).log(),
    }
    return terms[kind].sum(1)


def logits_at(model, prompt_ids, token_ids):
    """[N, V] from the model's own forward: what predicts each token of a completion."""
    ids = torch.tensor([[*prompt_ids, *token_ids]])
    return model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]


def written_out(
    trainer, model, teacher, prompts, *, kind="forward_kl", average="tokens", after_step=lambda model: None
):
    """The steps of a run on the samples that it recorded, one completion at a time, on full logits.

    Args:
        prompts: of each row, what the teacher sees.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=SGD["learning_rate"])
    losses = []
    for stage in (0, 1):
        groups = trainer.stages.store.sampled(stage)
        for start in range(0, len(groups), 4):
            values = []
            for group in groups[start : start + 4]:
                for sample in group.samples:
                    with torch.no_grad():
                        teacher_logits = logits_at(teacher, prompts[group.row], sample.token_ids)
                    logits = logits_at(model, group.prompt_ids, sample.token_ids)
                    values.append(divergence_of(logits, teacher_logits, kind))
            loss = torch.cat(values).mean() if average == "tokens" else torch.stack([v.mean() for v in values]).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            after_step(model)
            losses.append(loss.item())
    return losses


def teacher_prompts(training, rows, trainer):
    """Of plain rows, without the code that is tested."""
    found = []
    for row in rows:
        text = DEFAULT_TEMPLATE.replace("{demonstration}", row["completion"]).replace("{prompt}", row["prompt"])
        found.append(trainer.tokenization.prompt_ids(text))
    return found


@pytest.mark.parametrize(
    ("kind", "average", "layout"),
    [
        ("forward_kl", "tokens", "shared_prefix"),
        ("reverse_kl", "samples", "padded"),
        ("jensen_shannon", "samples", "shared_prefix"),
    ],
)
def test_a_run_is_a_loop_written_out(training, kind, average, layout):
    settings = {"divergence": kind, "mixture": 0.3, "average": average, "layout": layout, "stages_per_epoch": 2}
    trainer = training.run("sdft", model=ending(training), num_samples=2, **settings, **SGD, **ORDER)
    model, teacher = ending(training), ending(training)
    samples = [s for stage in (0, 1) for group in trainer.stages.store.sampled(stage) for s in group.samples]
    assert {sample.finished for sample in samples} == {True, False}, "both kinds are trained on"
    prompts = teacher_prompts(training, training.rows(), trainer)
    losses = written_out(trainer, model, teacher, prompts, kind=kind, average=average)
    assert distance(model, teacher) > 1e-4
    assert_same_weights(trainer.model, model, 1e-6)
    assert history(trainer, "loss") == pytest.approx(losses, abs=1e-5)
    if average == "tokens":
        assert history(trainer, "teacher/divergence") == pytest.approx(losses, abs=1e-5)
    assert history(trainer, "teacher/divergence_per_sample")[0] > losses[0]


@pytest.mark.filterwarnings("ignore:.*experimental.*")
@pytest.mark.parametrize(("kind", "alpha"), [("forward_kl", 0.0), ("jensen_shannon", 0.3)])
def test_steps_are_those_of_trl(training, kind, alpha):
    """Of its own trainer on the same samples, where its settings say the same: all logits, and the mean over samples."""
    peer = pytest.importorskip("trl.experimental.sdft")
    template = "{demonstration} is good. {prompt}"
    same = {**SGD, "max_steps": 2}
    trainer = training.run(
        "sdft",
        model=ending(training),
        divergence=kind,
        mixture=alpha or 0.5,
        average="samples",
        teacher_prompt=template,
        stages_per_epoch=1,
        **{**same, **ORDER},
    )
    groups = trainer.stages.store.sampled(0)
    assert len({len(group.samples[0].token_ids) for group in groups}) > 1

    class Given(peer.SDFTTrainer):
        def _generate(self, prompt_ids):
            known = {group.prompt_ids: list(group.samples[0].token_ids) for group in groups}
            return prompt_ids, [known[tuple(ids)] for ids in prompt_ids]

    ending(training).save_pretrained(training.folder / "start")  # it loads its teacher from there
    theirs = Given(
        load_model(str(training.folder / "start")),
        args=peer.SDFTConfig(
            output_dir=str(training.folder / "peer"),
            distillation_mode="full_logits",
            distillation_alpha=alpha,
            teacher_model_kind="base",
            teacher_prompt_template=template.replace("demonstration", "privileged_context"),
            num_generations=1,
            shuffle_dataset=False,
            per_device_train_batch_size=4,
            max_completion_length=8,
            **same,
            **{name: SETTINGS[name] for name in ("bf16", "use_cpu", "report_to", "disable_tqdm", "logging_steps")},
            save_strategy="no",
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
        ),
        train_dataset=training.rows().rename_column("completion", "privileged_context"),
        processing_class=training.tokenizer,
    )
    theirs.train()
    assert history(trainer, "loss") == pytest.approx(history(theirs, "loss"), rel=1e-5)
    assert distance(trainer.model, ending(training)) > 1e-3
    assert_same_weights(trainer.model, theirs.model, 1e-5)


# --- whose weights the teacher has ------------------------------------------------------------------------------------


def seen(trainer):
    """The weights that the policy has in the teacher's pass, on the logits that they give."""
    ids = torch.tensor([[5, 9, 11, 3]])
    with torch.no_grad(), evaluation_mode(trainer.policy), trainer.measure.teacher.active():
        return trainer.policy(input_ids=ids).logits


@pytest.mark.parametrize("policy", ["full", "new adapter", "known adapter", "new adapter and biases of the base"])
def test_a_static_teacher_is_the_start(training, policy):
    model = training.model("opt" if "biases" in policy else "llama")
    options = {"peft_config": training.lora(bias="all" if "biases" in policy else "none")} if "new" in policy else {}
    if policy == "known adapter":
        model = get_peft_model(model, training.lora())
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.1
    settings = {"learning_rate": 1e-2, "stages_per_epoch": 1, "max_prompt_length": 60}
    trainer = training.trainer("sdft", model=model, options=options, **settings)
    before = weights(trainer.policy)
    start = seen(trainer)
    trainer.train()
    torch.testing.assert_close(seen(trainer), start, rtol=0, atol=1e-6)
    after = weights(trainer.policy)
    with torch.no_grad():
        moved = trainer.policy(input_ids=torch.tensor([[5, 9, 11, 3]])).logits
    assert (moved - start).abs().max() > 1e-2
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    # What is held beside the policy: nothing where the base is the start.
    assert (trainer.start.weights is None) == (policy == "new adapter")


def test_an_averaged_teacher_follows_by_its_rate(training):
    watch = Snapshots()
    settings = {"teacher": "average", "teacher_rate": 0.25, "stages_per_epoch": 2}
    trainer = training.run("sdft", options={"callbacks": [watch]}, **settings, **SGD, **ORDER)
    average = copy.deepcopy(watch.models[0])
    for model in watch.models[1:]:
        for mean, now in zip(average.parameters(), model.parameters(), strict=True):
            mean.data.copy_(0.75 * mean.data + 0.25 * now.data)
    with trainer.measure.teacher.active():
        assert_same_weights(trainer.policy, average, 1e-6)
    assert distance(average, trainer.policy) > 1e-4

    model, teacher = training.model(), training.model()

    def follow(student):
        for mean, now in zip(teacher.parameters(), student.parameters(), strict=True):
            mean.data.copy_(0.75 * mean.data + 0.25 * now.data)

    prompts = teacher_prompts(training, training.rows(), trainer)
    written_out(trainer, model, teacher, prompts, after_step=follow)
    assert_same_weights(trainer.policy, model, 1e-6)


def test_the_average_of_weights_in_16_bits_is_in_32(training):
    """A hundredth of a small step is below what bfloat16 can add."""
    model = training.model().to(torch.bfloat16)
    trainer = training.trainer("sdft", model=model, teacher="average", stages_per_epoch=1)
    teacher = trainer.measure.teacher
    weight = next(p for p in trainer.policy.parameters() if p.requires_grad)
    weight.data.fill_(1.0)
    teacher.average[0].data.fill_(1.0)
    weight.data += 2**-7  # one step of bfloat16 at 1
    for _ in range(60):
        teacher.update()
    expected = 1 + 2**-7 * (1 - 0.99**60)
    assert teacher.average[0].flatten()[0].item() == pytest.approx(expected, abs=1e-6)
    with teacher.active():
        assert weight.dtype == torch.bfloat16
        assert weight.flatten()[0].item() in (1.0, 1 + 2**-7)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_killed_run_goes_on_with_its_average(training, adapter):
    settings = {
        "teacher": "average",
        "teacher_rate": 0.3,
        "stages_per_epoch": 2,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 3,
        "learning_rate": 1e-2,
    }

    def make(name, *callbacks):
        options = {"callbacks": list(callbacks)}
        options |= {"peft_config": training.lora(lora_dropout=0.1)} if adapter else {}
        return training.trainer("sdft", name=name, options=options, **settings)

    whole = make("whole")
    whole.train()
    killed = make("run", KillAt("on_pre_optimizer_step", 3))
    with pytest.raises(Killed):
        killed.train()
    resumed = make("run")
    checkpoint = resumed.resume_point()
    assert checkpoint is not None
    assert checkpoint.endswith("checkpoint-3"), "inside a stage"
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_same_weights(resumed.policy, whole.policy)
    for ours, theirs in zip(resumed.measure.teacher.average, whole.measure.teacher.average, strict=True):
        assert torch.equal(ours, theirs)
    assert not all(
        torch.equal(mean, now)
        for mean, now in zip(
            whole.measure.teacher.average, (p for p in whole.policy.parameters() if p.requires_grad), strict=True
        )
    )
    assert history(resumed, "loss") == history(whole, "loss")


def test_a_damaged_average_is_passed_over(training, caplog):
    settings = {"teacher": "average", "save_strategy": "steps", "stages_per_epoch": 2}
    training.run("sdft", **settings)
    file = training.folder / "run" / "checkpoint-4" / "teacher.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert training.trainer("sdft", **settings).resume_point().endswith("checkpoint-2")
    assert "teacher.safetensors" in caplog.text


# --- the engine -------------------------------------------------------------------------------------------------------


def test_micro_batches_change_nothing(training):
    settings = {"stages_per_epoch": 2, "num_samples": 2, **SGD}
    small = training.run("sdft", name="1", per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings)
    large = training.run("sdft", name="8", per_device_train_batch_size=8, **settings)
    assert distance(large.model, training.model()) > 1e-4
    assert_same_weights(small.model, large.model, 1e-6)


def test_each_step_is_on_policy_unless_a_stage_samples_once(training):
    often = training.run("sdft", name="often", stages_per_epoch=2, learning_rate=1e-2, **ORDER)
    folder = often.stages.store.folder
    assert len(list(folder.glob("**/samples.jsonl"))) == 4
    once = training.run("sdft", name="once", stages_per_epoch=2, samplings_per_stage=1, learning_rate=1e-2, **ORDER)
    assert len(list(once.stages.store.folder.glob("**/samples.jsonl"))) == 2
    policies = {often.stages.store.manifest(stage, draw)["policy"] for stage in (0, 1) for draw in (0, 1)}
    assert len(policies) == 4


def test_samples_are_not_scored_for_nothing(training):
    """The loss reads no reference; the log-probs of demonstrations are what a collapse is seen by."""
    trainer = training.run("sdft", max_steps=1, stages_per_epoch=1)
    for group in trainer.stages.store.sampled(0):
        assert "reference_logps" in group.demonstrations[0].token_values
        assert all("reference_logps" not in sample.token_values for sample in group.samples)
    assert "demonstrations/logp_per_token" in trainer.state.log_history[0]


def test_it_learns_what_its_prompt_told_it(training):
    """A model that copies what is in its prompt gives the answer without; one that does not, does not."""
    trainer = training.run(
        "sdft", learning_rate=3e-3, num_train_epochs=4, stages_per_epoch=1, max_completion_length=4, num_samples=4
    )
    found = history(trainer, "teacher/divergence")
    assert sum(found[-4:]) < 0.7 * sum(found[:4])


def test_the_record_says_what_was_distilled(training):
    trainer = training.run("sdft", max_steps=1, teacher="average", divergence="reverse_kl", stages_per_epoch=1)
    card = trainer.record(name="x").card
    assert "KL(student ‖ teacher)" in card
    assert "averaged over the steps" in card
    assert "start" not in card
    assert {curve.key for curve in trainer.record(name="x").curves} <= trainer.state.log_history[1].keys()


def test_streamed_rows(training):
    data = training.rows(8).to_iterable_dataset()
    stream = training.run("sdft", data=data, name="stream", max_steps=2, stages_per_epoch=1, **SGD, **ORDER)
    rows = training.run("sdft", data=training.rows(8), name="rows", stages_per_epoch=1, **SGD, **ORDER)
    assert_same_weights(stream.model, rows.model, 1e-6)


# --- the teacher's prompt ---------------------------------------------------------------------------------------------


def test_a_conversation_keeps_its_other_messages(training):
    trainer = training.trainer(
        "sdft", data=Dataset.from_list(TALKS), teacher_prompt="{demonstration}! {prompt}", stages_per_epoch=1
    )
    for number, (row, talk) in enumerate(zip(trainer.train_dataset, TALKS, strict=True)):
        messages = talk["messages"]
        expected = [messages[0], {"role": "user", "content": f"It is {2 * number}! What is {number} + {number}?"}]
        assert tuple(row["teacher_prompt_ids"]) == trainer.tokenization.prompt_ids(expected)
        assert tuple(row["prompt_ids"]) == trainer.tokenization.prompt_ids(messages[:2])


def test_the_end_of_a_turn_is_not_in_the_middle_of_the_teachers_prompt(training):
    """A row may spell the token out at the end of its answer."""
    end = training.tokenizer.eos_token
    rows = [{"prompt": "What is 1 + 1?", "completion": f" 2{end}"}]
    trainer = training.trainer("sdft", data=Dataset.from_list(rows), stages_per_epoch=1)
    assert training.tokenizer.eos_token_id not in trainer.train_dataset[0]["teacher_prompt_ids"]


@pytest.mark.parametrize(
    ("prompt", "demonstration", "expected"),
    [
        ("Why?", "So.", "<So.> Why? {x} Why?"),
        ("{demonstration}", "{prompt}", "<{prompt}> {demonstration} {x} {demonstration}"),
        ("\\1", r"\g<0>", r"<\g<0>> \1 {x} \1"),
    ],
)
def test_fields_are_replaced_once_and_other_braces_stay(prompt, demonstration, expected):
    assert TeacherPrompt("<{demonstration}> {prompt} {x} {prompt}", 9).of(prompt, demonstration) == expected


def test_a_prompt_that_is_too_long_for_the_teacher(training):
    rows = training.rows(8).to_list()
    rows[5]["completion"] = " so" * 40
    data = Dataset.from_list(rows)
    settings = {"max_prompt_length": 20, "stages_per_epoch": 1}
    with pytest.raises(
        UserError, match=r"row 6: the prompt that the teacher sees has \d+ tokens, the limit is 110"
    ) as e:
        training.trainer("sdft", data=data, max_teacher_prompt_length=110, **settings)
    assert "--max_teacher_prompt_length" in str(e.value)
    dropped = training.trainer("sdft", data=data, max_teacher_prompt_length=110, on_long_prompt="drop", **settings)
    assert [row["row"] for row in dropped.train_dataset] == [0, 1, 2, 3, 4, 6, 7]
    with pytest.raises(UserError, match=r"prompt of the teacher too long \(8\).*--max_teacher_prompt_length"):
        training.trainer("sdft", data=data, max_teacher_prompt_length=30, on_long_prompt="drop", **settings)
    by_default = find("sdft").config(output_dir="x", max_prompt_length=20, max_completion_length=8, use_cpu=True)
    assert by_default.teacher_prompt_limit == 20 + 8 + 128


def test_only_a_teacher_needs_the_column(training):
    tokenization = training.trainer("sft").tokenization
    plain = tokenize_dataset(training.rows(2), tokenization)
    assert "teacher_prompt_ids" not in plain.column_names
    seen = tokenize_dataset(training.rows(2), tokenization, seen_by_teacher=TeacherPrompt(DEFAULT_TEMPLATE, 99))
    groups = [group_from_row(row) for row in seen]
    assert all(group.teacher_prompt_ids for group in groups)
    assert [replace(group, teacher_prompt_ids=None) for group in groups] == [group_from_row(row) for row in plain]
    demonstration = read_row(training.rows(2)[0], number=1)[0]
    assert groups[0].teacher_prompt_ids == tokenization.prompt_ids(
        TeacherPrompt(DEFAULT_TEMPLATE, 99).of(demonstration.prompt, demonstration.completion)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_prompt": "Say {demonstration}."}, "'teacher_prompt': has no {prompt}"),
        ({"teacher_prompt": "{prompt} {demonstrations}"}, "'teacher_prompt': has no {demonstration}"),
        ({"divergence": "hellinger"}, "'divergence': must be one of forward_kl"),
        ({"divergence": "jensen_shannon", "mixture": 1.0}, "'mixture': must be above 0 and below 1"),
        ({"teacher_rate": 0.0}, "'teacher_rate': must be above 0"),
        ({"replay_stages": 1}, "'replay_stages': samples of earlier stages"),
        ({"reference": "initial"}, "'reference': must be one of stage"),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        find("sdft").config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_an_exported_policy_is_the_students(training):
    trainer = training.run("sdft", learning_rate=1e-2, stages_per_epoch=1, teacher="average")
    trainer.export(training.folder / "out")
    assert trainer.check_export(training.folder / "out")
    found = load_model(str(training.folder / "out"))
    assert_same_weights(found, trainer.policy)
