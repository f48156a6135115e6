"""Every argument inherited from transformers is honored or refused by name."""

import copy
from dataclasses import fields, replace

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from tutelage.algorithms import IRFTConfig, RFTConfig, SFTConfig
from tutelage.errors import UserError
from tutelage.training.arguments import ARGUMENTS, Refused

SGD = {"optim": "sgd", "learning_rate": 0.05}

# A value of each refused argument that a user may well give; a list where there are several kinds.
BAD = {
    "torch_compile": [True],
    "torch_compile_backend": ["inductor"],
    "torch_compile_mode": ["default"],
    "use_liger_kernel": [True],
    "liger_kernel_config": [{"rope": True}],
    "use_cache": [True],
    "neftune_noise_alpha": [5.0],
    "auto_find_batch_size": [True],
    "label_smoothing_factor": [0.1],
    "label_names": [["labels"]],
    "include_num_input_tokens_seen": ["all", "non_padding", True],
    "optim": ["galore_adamw_layerwise", "apollo_adamw_layerwise"],
    "optim_target_modules": [["q_proj"]],
    "prediction_loss_only": [True],
    "eval_do_concat_batches": [False],
    "eval_use_gather_object": [True],
    "eval_accumulation_steps": [4],
    "include_for_metrics": [["loss"]],
    "batch_eval_metrics": [True],
    "bf16_full_eval": [True],
    "fp16_full_eval": [True],
    "save_strategy": ["best"],
    "load_best_model_at_end": [True],
    "enable_jit_checkpoint": [True],
    "ignore_data_skip": [True],
    "hub_always_push": [True],
    "debug": ["tpu_metrics_debug"],
    "dataloader_in_order": [False],
    "remove_unused_columns": [True],
    "train_sampling_strategy": ["group_by_length", "batch_rebalance"],
    "length_column_name": ["tokens"],
    "accelerator_config": [{"dispatch_batches": True}, '{"dispatch_batches": true}'],
    "parallelism_config": [{"tp_size": 2}],
    "fsdp": [True, "full_shard"],
    "fsdp_config": [{"version": 2}],
    "deepspeed": ["zero3.json", {"zero_optimization": {"stage": 3}}],
    "do_predict": [True],
    "resume_from_checkpoint": ["runs/x/checkpoint-10"],
}


def test_every_field_of_the_installed_transformers_has_its_entry():
    """A new version may bring a field: find out whether it is honored, and say so in ARGUMENTS."""
    assert set(ARGUMENTS) == {entry.name for entry in fields(TrainingArguments)}


def test_there_is_a_bad_value_for_each_refused_argument():
    assert set(BAD) == {name for name, entry in ARGUMENTS.items() if isinstance(entry, Refused)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_refused_by_name(name, value, tmp_path):
    with pytest.raises(UserError) as error:
        RFTConfig(output_dir=str(tmp_path), **{name: value})
    assert error.value.field == name
    assert error.value.problem
    assert error.value.remedy


def test_defaults_and_copies_of_a_config_pass(tmp_path):
    for config in (SFTConfig, IRFTConfig, RFTConfig):
        args = config(output_dir=str(tmp_path))
        assert replace(args, seed=7).seed == 7, "what transformers made of the defaults passes too"


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (SFTConfig, {"neftune_noise_alpha": 5.0}),
        (SFTConfig, {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}),
        (IRFTConfig, {"save_strategy": "best", "metric_for_best_model": "eval_loss", "eval_strategy": "epoch"}),
        (IRFTConfig, {"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}),
        (IRFTConfig, {"accelerator_config": {"use_seedable_sampler": False}}),
        (IRFTConfig, {"train_sampling_strategy": "sequential", "debug": "underflow_overflow"}),
    ],
)
def test_what_depends_on_other_arguments_is_accepted_where_it_works(config, settings, tmp_path):
    made = config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
    assert all(hasattr(made, name) for name in settings)


# --- honored ones have their effect ------------------------------------------------------------------------------------


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def state(trainer):
    return {name: value.detach().clone() for name, value in trainer.policy.named_parameters()}


def same(one, other):
    one, other = state(one), state(other)
    return all(torch.equal(value, other[name]) for name, value in one.items())


def evaluations(trainer):
    return [row["step"] for row in trainer.state.log_history if "eval_loss" in row]


def test_drop_last_leaves_out_the_incomplete_batch(training):
    rows = training.rows(18)
    assert training.run("sft", name="all", data=rows).state.global_step == 5
    assert training.run("sft", name="whole", data=rows, dataloader_drop_last=True).state.global_step == 4


def test_workers_change_nothing_but_time(training):
    plain = training.run("irft", name="plain", stages_per_epoch=2, **SGD)
    settings = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}
    assert same(plain, training.run("irft", name="workers", stages_per_epoch=2, **SGD, **settings))


def test_the_order_of_rows_has_a_seed_of_its_own(training):
    runs = [training.run("sft", name=str(seed), data_seed=seed, **SGD) for seed in (1, 2, 1)]
    assert losses(runs[0])[0] != losses(runs[1])[0]
    assert same(runs[0], runs[2])


def test_evaluations_begin_where_they_should(training):
    def at(name, **settings):
        options = {"eval_dataset": training.rows(4)}
        return evaluations(
            training.run("irft", name=name, options=options, eval_strategy="steps", eval_steps=1, **settings)
        )

    assert at("plain") == [1, 2, 3, 4]
    assert at("start", eval_on_start=True) == [0, 1, 2, 3, 4]
    assert at("delay", eval_delay=3) == [3, 4]


def test_noise_in_the_embeddings_reaches_sft(training):
    plain, noisy = (training.run("sft", name=str(alpha), neftune_noise_alpha=alpha, **SGD) for alpha in (None, 20.0))
    assert abs(losses(plain)[0] - losses(noisy)[0]) > 1e-3


def test_the_best_checkpoint_is_loaded_at_the_end(training):
    """A learning rate that ruins the model: the first evaluation is the best."""

    class Models(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.seen.append(copy.deepcopy(model))

    models = Models()
    options = {"eval_dataset": training.rows(4), "callbacks": [models]}
    settings = {"optim": "sgd", "learning_rate": 100.0, "max_grad_norm": 1.0}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = training.run("sft", options=options, load_best_model_at_end=True, **settings)
    found = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    best = models.seen[found.index(min(found))]
    last = models.seen[-1]
    own = state(trainer)
    assert all(torch.equal(own[name], value) for name, value in best.named_parameters())
    assert found.index(min(found)) < 3
    assert any(not torch.equal(own[name], value) for name, value in last.named_parameters())


def test_a_learning_rate_that_waits_for_the_evaluation(training):
    """With no patience at all and a loss that rises, the plateau scheduler lowers the rate."""
    options = {"eval_dataset": training.rows(4)}
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}}
    settings |= {"optim": "sgd", "learning_rate": 100.0, "eval_strategy": "steps", "eval_steps": 1}
    trainer = training.run("sft", options=options, **settings)
    assert trainer.optimizer.param_groups[0]["lr"] < 100.0


def test_checkpoints_of_the_model_alone(training):
    trainer = training.run("sft", save_strategy="steps", save_steps=2, save_only_model=True)
    folder = training.folder / "run" / "checkpoint-2"
    assert (folder / "model.safetensors").exists()
    assert not (folder / "optimizer.pt").exists()
    assert trainer.state.global_step == 4


def test_warm_up_as_a_share_of_the_steps(training):
    trainer = training.run("sft", warmup_steps=0.5, lr_scheduler_type="constant_with_warmup", learning_rate=1e-3)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, 1e-3])


def test_nan_found_by_debugging_names_the_layer(training):
    trainer = training.trainer("sft", debug="underflow_overflow")
    trainer.policy.model.layers[1].mlp.down_proj.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="inf/nan detected"):
        trainer.train()
