"""Threads, rounding, and the fixtures that all tests share."""

import gc
import os

import pytest
import torch

from training_runs import Training

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


def pytest_collection_finish():
    """Each run begins with a garbage collection (accelerate's): let it not look through every library again."""
    gc.collect()
    gc.freeze()


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
