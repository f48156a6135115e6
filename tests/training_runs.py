"""What the tests of training share: a tiny tokenizer, tiny policies, sums to learn, and runs made of them."""

import copy

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from tutelage.algorithms.registry import find
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer

SETTINGS = {
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_completion_length": 8,
}


SGD = {"optim": "sgd", "learning_rate": 0.05}  # Adam divides by its noise where a gradient vanishes


class Training:
    """Makes policies, data and trainers; what they write goes into one folder."""

    def __init__(self, folder):
        self.folder = folder
        self.tokenizer = tiny_tokenizer("zephyr")

    def model(self, architecture="llama", **config):
        """The same random policy at each call."""
        return tiny_model(architecture, **{"vocab_size": len(self.tokenizer), "num_hidden_layers": 2, **config})

    def lora(self, **config):
        """An adapter's config."""
        return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config})

    def rows(self, count=16):
        """Sums, with answers of different lengths."""
        return Dataset.from_list(
            [
                {"prompt": f"What is {i} + {i}?", "completion": ["", " The answer is"][i % 2] + f" {2 * i}"}
                for i in range(count)
            ]
        )

    def trainer(self, algorithm, *, model=None, data=None, name="run", options=None, **settings):
        """A trainer with ``settings`` in its config and ``options`` for its constructor."""
        found = find(algorithm)
        return found.trainer(
            self.model() if model is None else model,
            found.config(output_dir=str(self.folder / name), **{**SETTINGS, **settings}),
            self.rows() if data is None else data,
            processing_class=self.tokenizer,
            **(options or {}),
        )

    def run(self, algorithm, **arguments):
        """A trainer that has trained."""
        trainer = self.trainer(algorithm, **arguments)
        trainer.train()
        return trainer


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(found, expected, tolerance=0.0):
    found, expected = (weights(x) if isinstance(x, torch.nn.Module) else x for x in (found, expected))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def distance(model, other):
    """The largest change of any weight."""
    return max((a - b).abs().max().item() for a, b in zip(model.parameters(), other.parameters(), strict=True))


def history(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


class Snapshots(TrainerCallback):
    """Copies of the model before training and after each step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.models = [copy.deepcopy(model)]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.models.append(copy.deepcopy(model))
