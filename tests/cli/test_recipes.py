"""The recipes mean what they say: each goes through the command line's own parser."""

import re
from pathlib import Path

import pytest
import yaml

from tutelage.algorithms.registry import find
from tutelage.cli.arguments import parse

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

# What our recipes say of every run.
COMMON = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "replay_stages": 0,
    "max_prompt_length": 512,
    "max_completion_length": 256,
    "on_long_prompt": "drop",
    "bf16": True,
    "seed": 42,
}
# What the official codes of IRFT and SPIN share.
CONTRAST = COMMON | {
    "optim": "rmsprop",
    "learning_rate": 5e-7,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.0,
    "beta": [0.1],
    "loss_kind": "logistic",
    "reference": "stage",
    "sft_weight": 0.0,
    "num_samples": 1,
}
# The official code of RFT.
RFT = COMMON | {
    "optim": "adamw_torch_fused",
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 1e-6,
    "beta": 0.05,
    "clip_range": 0.2,
    "num_samples": 4,
    "reward_loss": "logistic",
    "reward_learning_rate": 1e-6,
    "reward_batch_size": 16,
    "reward_epochs": 1,
    "reward_centering": 0.0,
    "reward_warmup_stages": 1,
}
PYTHIA, ZEPHYR = "EleutherAI/pythia-1.4b", "alignment-handbook/zephyr-7b-sft-full"
# Of each recipe: the command, what it shares with others, the model, stages, passes and prompts an optimizer step.
RECIPE = {
    "paper/irft-pythia-1.4b.yaml": ("irft", CONTRAST, PYTHIA, "float32", 5, 2, 8),
    "paper/irft-zephyr-7b-ultrachat.yaml": ("irft", CONTRAST, ZEPHYR, "bfloat16", 5, 1, 8),
    "paper/rft-pythia-1.4b.yaml": ("rft", RFT, PYTHIA, "float32", 5, 1, 16),
    "spin-zephyr-7b.yaml": ("spin", CONTRAST | {"replay_stages": 1}, ZEPHYR, "float32", 1, 2, 64),
}


def parsed(recipe, *args):
    command = RECIPE[recipe][0]
    return parse(command, find(command).config, ["--config", str(RECIPES / recipe), *args])


def test_every_recipe_is_known_here():
    assert {path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.yaml")} == set(RECIPE)


@pytest.mark.parametrize("recipe", RECIPE)
def test_values(recipe):
    command, shared, name, dtype, stages, epochs, prompts = RECIPE[recipe]
    data, model, training = parsed(recipe)
    assert type(training) is find(command).config
    assert {field: getattr(training, field) for field in shared} == shared
    assert (model.model_name_or_path, model.dtype) == (name, dtype)
    assert training.stages_per_epoch == stages
    assert training.num_train_epochs == epochs
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == prompts
    assert data.dataset_name == "UCLA-AGI/SPIN_iter0"
    assert data.dataset_train_split == "train"
    assert training.output_dir == f"runs/{Path(recipe).stem}"


@pytest.mark.parametrize("recipe", RECIPE)
def test_nothing_in_the_file_is_lost(recipe):
    """Each value of the YAML file arrives, and in the type of its field."""
    content = yaml.safe_load((RECIPES / recipe).read_text(encoding="utf-8"))
    found = {name: value for part in parsed(recipe) for name, value in vars(part).items()}
    for name, value in content.items():
        expected = [value] if isinstance(found[name], list) and not isinstance(value, list) else value
        assert found[name] == expected, name


@pytest.mark.parametrize("recipe", RECIPE)
def test_the_command_in_its_comment(recipe):
    """The first command that a recipe's comment shows is the one that takes it."""
    shown = re.search(r"tutelage (\w+) --config (\S+)", (RECIPES / recipe).read_text(encoding="utf-8"))
    assert shown is not None
    assert shown.groups() == (RECIPE[recipe][0], f"recipes/{recipe}")


def test_the_adapter_of_the_7b_recipe():
    _, model, _ = parsed("paper/irft-zephyr-7b-ultrachat.yaml")
    adapter = model.peft_config()
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (64, 16, 0.0)
    assert "lm_head" not in adapter.target_modules
    assert len(adapter.target_modules) == 7


@pytest.mark.parametrize(
    "recipe", ["paper/irft-pythia-1.4b.yaml", "paper/rft-pythia-1.4b.yaml", "spin-zephyr-7b.yaml"]
)
def test_full_parameters_elsewhere(recipe):
    _, model, _ = parsed(recipe)
    assert model.peft_config() is None


def test_later_spin_iterations_as_the_comment_says():
    args = ["--num_train_epochs", "1", "--learning_rate", "1.0e-7", "--beta", "5.0", "--output_dir", "runs/it3"]
    _, _, training = parsed("spin-zephyr-7b.yaml", *args)
    assert (training.num_train_epochs, training.learning_rate, training.beta) == (1, 1e-7, [5.0])
    assert training.output_dir == "runs/it3"
    assert training.optim == "rmsprop"
