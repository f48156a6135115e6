"""Finds what makes the host wait for a device, without one: tensors on "meta" stand for those of a device.

Reading a value of theirs fails, as does whatever has a size that depends on values. What copies from the host wait for is seen by
modes of torch: a copy that is not ``non_blocking``, a tensor that is made of numbers on the device, an index that still lies on the
host. Each waits until the device has done all that it was given before.
"""

import traceback
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ATEN = torch.ops.aten


def is_on(device, tensor):
    return isinstance(tensor, torch.Tensor) and tensor.device.type == device


class Copies(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket is ATEN._to_copy:
            goes = torch.device(kwargs.get("device") or args[0].device).type == "meta" and is_on("cpu", args[0])
            waits = goes and not kwargs.get("non_blocking")
        elif func.overloadpacket is ATEN.copy_:
            goes = is_on("meta", args[0]) and is_on("cpu", args[1])
            waits = goes and not (args[2:] and args[2]) and not kwargs.get("non_blocking")
        elif func.overloadpacket in (ATEN.index, ATEN.index_put_, ATEN.index_put):
            waits = is_on("meta", args[0]) and any(is_on("cpu", leaf) for leaf in tree_leaves(args[1]))
        else:
            waits = False
        if waits:
            note(self.found, func)
        return func(*args, **kwargs)


class Numbers(TorchFunctionMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "meta"
        listed = func is torch.Tensor.__getitem__ and is_on("meta", args[0]) and isinstance(args[1], list)
        if made or listed:
            note(self.found, func)
        return func(*args, **kwargs)


def note(found, func):
    ours = [frame for frame in traceback.extract_stack() if "/tutelage/" in frame.filename]
    found.append(f"{func} at {ours[-1].filename}:{ours[-1].lineno}" if ours else f"{func}")


@contextmanager
def waits():
    """Within, a list of what waits, by the line of ours that does it; what reads a value raises."""
    found = []
    is_enabled, autocast = torch.is_autocast_enabled, torch.autocast

    def known(device_type=None):
        return False if device_type == "meta" else is_enabled(device_type) if device_type else is_enabled()

    def entered(device_type, *args, **kwargs):
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        # There is no autocast for "meta".
        patch.setattr(torch, "is_autocast_enabled", known)
        patch.setattr(torch, "autocast", entered)
        stack.enter_context(Copies(found))
        stack.enter_context(Numbers(found))
        yield found


class Reads(TorchFunctionMode):
    """Lists the reads of values of tensors on any device, by the function that reads; torch's own are left out."""

    KINDS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in {getattr(torch.Tensor, name) for name in self.KINDS}:
            caller = [frame for frame in traceback.extract_stack() if frame.filename != __file__][-1]
            if "/torch/" not in caller.filename:  # an optimizer reads its count of steps, which lies on the host
                self.found.append(caller.name)
        return func(*args, **(kwargs or {}))
