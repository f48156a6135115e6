"""What a GPU is not to wait for, and what sampling leaves as it was."""

from contextlib import contextmanager

import pytest
import torch
from benchmarks.gpu import contrast, references_off
from benchmarks.gpu_run import random_groups
from gpu_helpers import mixed, random_policies
from peft.tuners.lora import LoraLayer

from tutelage.sampling import SamplingParams, TransformersSampler
from tutelage.scoring.logps import completion_logps


@contextmanager
def no_waiting(setting):
    """Within, whatever waits for the GPU is an error; tests/training/test_waiting.py finds the same without one."""
    if setting.device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_forward_and_backward_pass_waits_for_nothing(setting):
    model = random_policies(setting)["bfloat16"]
    groups = random_groups(setting.sizes.check, setting.sizes.checked["vocab_size"], ragged=True)
    references = references_off([[-50.0] * len(group.completions) for group in groups])

    def step():
        with mixed(setting, "bfloat16"):
            loss = contrast(completion_logps(model, groups, layout="shared_prefix"), groups, references)
        loss.backward()

    step()  # finds kernels and memory
    with no_waiting(setting):
        step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_sampling_leaves_the_same_bits(setting, precision):
    model = random_policies(setting)[precision]
    groups = random_groups(setting.sizes.check, setting.sizes.checked["vocab_size"])
    prompts = [group.prompt_ids for group in groups] * 2  # enough of them to find out whether merging serves
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    seen = []

    def note(*_):
        seen.append(any(module.merged for module in model.modules() if isinstance(module, LoraLayer)))

    with mixed(setting, precision):
        TransformersSampler(model).sample(prompts, SamplingParams(max_completion_length=8), on_finished=note)
    assert any(seen) or precision == "bfloat16"
    assert not any(module.merged for module in model.modules() if isinstance(module, LoraLayer))
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])
