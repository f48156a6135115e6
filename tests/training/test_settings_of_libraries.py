"""Settings that libraries read are tried before training, and what libraries say of them is one error that names the setting."""

import pytest

from tutelage.errors import UserError
from tutelage.launch import check_launch

BAD = {
    "text for a number": ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "1e-6"}}, "lr_scheduler_kwargs"),
    "text for a share": ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": "a"}}, "lr_scheduler_kwargs"),
    "a setting of another schedule": ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"min_lr": 0.1}}, "lr_scheduler_kwargs"),
    "text for a power": ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "2"}}, "lr_scheduler_kwargs"),
    "what is missing": ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type"),
    "a rate below 0": ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": -1.0}}, "lr_scheduler_kwargs"),
    "no package": ({"optim": "adamw_bnb_8bit"}, "optim"),
    "no package either": ({"optim": "lion_8bit"}, "optim"),
    "no argument of it": ({"optim": "adamw_torch", "optim_args": "betas"}, "optim"),
    "an argument of none": ({"optim": "adafactor", "optim_args": "relative_step=abc,scale_parameter=1=2"}, "optim"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "field"), BAD.values(), ids=BAD)
def test_what_a_library_refuses_names_the_setting(training, settings, field):
    with pytest.raises(UserError) as error:
        training.trainer("sft", **settings)
    assert error.value.field == field
    assert error.value.remedy


GOOD = {
    "min_lr": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
    "restarts": {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
    "wsd": {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
    "polynomial": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-7, "power": 2.0}},
    "adafactor": {"optim": "adafactor"},
    "rmsprop": {"optim": "rmsprop", "warmup_steps": 2, "lr_scheduler_type": "inverse_sqrt"},
}


@pytest.mark.parametrize("settings", GOOD.values(), ids=GOOD)
def test_what_works_in_transformers_works(training, settings):
    assert training.run("sft", **settings).state.global_step == 4


def test_an_optimizer_that_was_handed_in_is_not_made_again(training):
    model = training.model()
    import torch

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = training.trainer("sft", model=model, options={"optimizers": (optimizer, None)}, optim="adamw_bnb_8bit")
    assert trainer.optimizer is optimizer


SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "WORLD_SIZE": "2",
}


@pytest.mark.parametrize(
    ("devices", "environment", "problem"),
    [
        (2, {}, "2 devices in one process"),
        (1, {**SHARDED, "FSDP_VERSION": "1"}, "FSDP with fsdp_version '1'"),
        (1, {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, "FSDP with fsdp_version '1'"),
        (1, {**SHARDED, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "fsdp_auto_wrap_policy 'SIZE_BASED_WRAP'"),
        (1, {**SHARDED, "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type"),
        (1, {**SHARDED, "FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward"),
        (1, {**SHARDED, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading"),
        (1, {**SHARDED, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        (1, {**SHARDED, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "Use --gradient_checkpointing"),
        (1, {**SHARDED, "FSDP_IGNORED_MODULES": "lm_head"}, "fsdp_ignored_modules 'lm_head'"),
        (1, {**SHARDED, "WORLD_SIZE": "1"}, "FSDP shards a model over processes, and one was started"),
        (1, {**SHARDED, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
        (1, {"ACCELERATE_USE_DEEPSPEED": "true"}, "asked for DeepSpeed"),
        (
            1,
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "asked for several processes and started one",
        ),
    ],
)
def test_processes_that_are_not_there_are_no_processes(devices, environment, problem):
    with pytest.raises(UserError, match=problem):
        check_launch(devices, environment)


@pytest.mark.parametrize(
    "environment",
    [{}, SHARDED, {"WORLD_SIZE": "2", "MASTER_ADDR": "a"}, {"ACCELERATE_MIXED_PRECISION": "no"}, {"MASTER_ADDR": "x"}],
)
def test_what_a_launcher_started_is_fine(environment):
    assert check_launch(1, environment) is None
