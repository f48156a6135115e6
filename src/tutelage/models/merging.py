"""LoRA merged into the layers for a while: decoding then has no products of adapters, and the same bits come back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tutelage.models.memory import is_out_of_memory
from tutelage.models.modes import exact_float32
from tutelage.models.paths import first_line
from tutelage.models.precision import MEMORY_SHARE, available_memory

__all__ = ["MergedAdapters"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(slots=True)
class MergedAdapters:
    """The layers of a model whose active adapters can be merged into the weights below them.

    The weights below are never written to. Merging gives a parameter a tensor of its own for as long as ``merged`` lasts, and
    afterwards the tensor that it had: the same bits, whatever the precision.

    Attributes:
        layers: those that can be.
        left: why others with an adapter cannot, with the number of them. They compute as ever, merged ones beside them.
    """

    layers: list[lora.LoraLayer]
    left: Counter[str]
    _swaps: list[tuple[nn.Parameter, Tensor, Tensor]] = field(default_factory=list)
    _merged: list[tuple[lora.LoraLayer, list[str]]] = field(default_factory=list)

    @staticmethod
    def of(model: nn.Module) -> MergedAdapters:
        """What can be merged in a model as it is now: with the adapters that are active, and none that are disabled.

        Left as they are: quantized weights and weights on no device; weights that another layer uses too, such as an embedding
        that is tied to the head; adapters other than LoRA, and LoRA on other layers than linear ones and embeddings.
        """
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        found = MergedAdapters([], Counter())
        for layer in model.modules():
            if not isinstance(layer, BaseTunerLayer) or layer.disable_adapters or layer.merged:
                continue
            if problem := _problem(layer, uses):
                found.left[problem] += 1
            elif isinstance(layer, lora.LoraLayer) and set(layer.active_adapters) & _adapters(layer):
                found.layers.append(layer)
        return found

    def bytes_needed(self) -> Counter[torch.device]:
        """What merging takes on each device: a copy of the weights below, and once, meanwhile, two float32 updates of a layer."""
        needed: Counter[torch.device] = Counter()
        update: dict[torch.device, int] = {}
        for weight in _weights_of(self.layers):
            needed[weight.device] += weight.numel() * weight.element_size()
            update[weight.device] = max(update.get(weight.device, 0), 8 * weight.numel())
        return needed + Counter(update)

    def fits(self) -> bool:
        """Whether that is no more than ``MEMORY_SHARE`` of what is free."""
        return all(size <= MEMORY_SHARE * available_memory(device) for device, size in self.bytes_needed().items())

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Context in which the layers compute with merged weights. What comes back is what was there, whatever is raised.

        A layer that peft cannot merge is counted in ``left`` from then on.
        """
        try:
            self._merge()
            yield
        finally:
            try:
                self.put_back()
            except BaseException:  # a second Ctrl-C
                self.put_back()
                raise

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within ``merged``, a context in which the model is as it was before."""
        self._restore()
        try:
            yield
        finally:
            for parameter, _, merged in self._swaps:
                parameter.data = merged
            for layer, names in self._merged:
                layer.merged_adapters[:] = names

    def put_back(self) -> None:
        """End merging now, and free the copies; ``merged`` has nothing left to do then."""
        self._restore()
        self._swaps.clear()
        self._merged.clear()

    def _merge(self) -> None:
        torch.clear_autocast_cache()
        mergeable, self.layers = self.layers, []
        devices = {weight.device.type for weight in _weights_of(mergeable)}
        with torch.no_grad(), exact_float32(), ExitStack() as stack:
            for device in devices:  # a product of the update would be rounded under autocast
                stack.enter_context(torch.autocast(device, enabled=False))
            for layer in mergeable:
                start = len(self._swaps)
                try:
                    for parameter in _weights_of([layer]):
                        original = parameter.data
                        copied = original.clone()
                        self._swaps.append((parameter, original, copied))
                        parameter.data = copied
                    self._merged.append((layer, []))
                    layer.merge()
                except Exception as error:  # kinds of LoRA that depend on their input raise errors of any class
                    if is_out_of_memory(error):
                        self.put_back()
                        self.layers, self.left = [], Counter({"memory ran out": len(mergeable)})
                        return
                    self._undo(layer, start)
                    self.left[f"peft does not merge them ({type(error).__name__}: {first_line(error)[:100]})"] += 1
                    continue
                # Some kinds give the parameter a new tensor instead of writing into the copy.
                self._swaps[start:] = [(p, original, p.data) for p, original, _ in self._swaps[start:]]
                self._merged[-1] = layer, list(layer.merged_adapters)
                self.layers.append(layer)

    def _undo(self, layer: lora.LoraLayer, start: int) -> None:
        layer.merged_adapters.clear()
        for parameter, original, _ in self._swaps[start:]:
            parameter.data = original
        del self._swaps[start:]
        self._merged[:] = [pair for pair in self._merged if pair[0] is not layer]

    def _restore(self) -> None:
        torch.clear_autocast_cache()  # autocast knows a weight by its identity, not by its values
        for layer, _ in self._merged:
            layer.merged_adapters.clear()
        for parameter, original, _ in self._swaps:
            parameter.data = original


def _weights_of(layers: Iterable[lora.LoraLayer]) -> Iterator[nn.Parameter]:
    """Parameters that merging changes: two adapters may lie on one module, each on a parameter of its own."""
    for layer in layers:
        if isinstance(layer, lora.ParamWrapper):
            yield layer.get_param()
        else:
            yield from layer.get_base_layer().parameters(recurse=False)


def _problem(layer: BaseTunerLayer, uses: Counter[int]) -> str | None:
    if not isinstance(layer, (lora.Linear, lora.Embedding, lora.ParamWrapper)):
        return f"adapters of the kind {type(layer).__name__}"
    below = list(_weights_of([layer]))
    # Quantized weights are of other types, or are buffers; those that are somewhere else are on the device "meta".
    if not below or any(type(p.data) is not Tensor or p.dtype not in _FLOATS or p.is_meta for p in below):
        return "their weights are quantized or not on a device"
    if any(uses[id(p)] > 1 for p in below):
        return "another layer uses their weights too"
    return None


def _adapters(layer: lora.LoraLayer) -> set[str]:
    return {*layer.lora_A, *layer.lora_embedding_A}
