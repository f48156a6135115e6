"""What the tests of this folder share."""

import copy

import torch
from benchmarks.gpu_run import random_llama
from benchmarks.workloads import adapter

from tutelage.models.loading import add_adapter


def random_policies(setting):
    """A bfloat16 model with adapters whose weights are wide enough that every mistake shows, and the same in float32."""
    fields = setting.sizes.checked
    wide = 1.5 * fields["hidden_size"] ** -0.5
    model = random_llama(setting.device, fields, torch.bfloat16, initializer_range=wide)
    config = adapter()
    config.init_lora_weights = False  # B = 0 would leave A without a gradient
    model = add_adapter(model, config).train()
    return {"bfloat16": model, "float32": copy.deepcopy(model).float()}


def relative_error(found, truth):
    """‖found − truth‖ / ‖truth‖."""
    return ((found.float() - truth).norm() / truth.norm()).item()


def mixed(setting, precision):
    """Autocast as in training, for bfloat16 alone."""
    return torch.autocast(setting.device.type, torch.bfloat16, enabled=precision == "bfloat16")
