"""What the tests of training share: a tiny tokenizer, tiny policies, sums to learn, and runs made of them."""

import gc

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

torch.set_num_threads(1)  # tiny tensors: threads cost more than they bring, most of all on a busy machine

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
