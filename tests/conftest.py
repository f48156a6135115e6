"""What the tests of training share: a tiny tokenizer, tiny policies, sums to learn, and runs made of them."""

import gc
import os

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tutelage.algorithms import (
    IRFTConfig,
    IRFTTrainer,
    RFTConfig,
    RFTTrainer,
    SFTConfig,
    SFTTrainer,
    SPINConfig,
    SPINTrainer,
)
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer

# Tiny tensors: threads cost more than they bring, most of all on a busy machine.
torch.set_num_threads(int(os.environ.get("TUTELAGE_TEST_THREADS", "1")))


def _round_otherwise(seed):
    """Have linear layers round as another processor might: each output off by up to one part in 2^23, in a way that its shape decides.

    Repeating a computation gives the same bits; the same rows in a batch of another shape do not.
    """
    linear = torch.nn.functional.linear

    def rounded(input, weight, bias=None):
        output = linear(input, weight, bias)
        if output.dtype != torch.float32 or output.device.type != "cpu":
            return output
        generator = torch.Generator().manual_seed(hash((seed, *output.shape, *weight.shape)) % 2**63)
        return output * (1 + 2.0**-23 * (2 * torch.rand(output.shape, generator=generator) - 1))

    torch.nn.functional.linear = rounded


if "TUTELAGE_TEST_ROUNDING" in os.environ:
    _round_otherwise(int(os.environ["TUTELAGE_TEST_ROUNDING"]))

ALGORITHMS = {
    "sft": (SFTConfig, SFTTrainer),
    "spin": (SPINConfig, SPINTrainer),
    "irft": (IRFTConfig, IRFTTrainer),
    "rft": (RFTConfig, RFTTrainer),
}
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


def pytest_collection_finish():
    """Each run begins with a garbage collection (accelerate's): let it not look through every library again."""
    gc.collect()
    gc.freeze()


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
        config, trainer = ALGORITHMS[algorithm]
        return trainer(
            self.model() if model is None else model,
            config(output_dir=str(self.folder / name), **{**SETTINGS, **settings}),
            self.rows() if data is None else data,
            processing_class=self.tokenizer,
            **(options or {}),
        )

    def run(self, algorithm, **arguments):
        """A trainer that has trained."""
        trainer = self.trainer(algorithm, **arguments)
        trainer.train()
        return trainer


@pytest.fixture
def training(tmp_path):
    """Policies, data and trainers in a temporary folder."""
    return Training(tmp_path)


@pytest.fixture(scope="session")
def sft_folder(tmp_path_factory):
    """A model that SFT taught to answer and to end, saved with its tokenizer; nothing may write into it."""
    training = Training(tmp_path_factory.mktemp("sft"))
    trainer = training.run("sft", num_train_epochs=15, learning_rate=1e-2, logging_steps=1000)
    trainer.save_model()
    return trainer.args.output_dir
