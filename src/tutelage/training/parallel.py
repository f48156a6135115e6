"""Several processes that train one policy: what each does, and how all of them come to know the same.

Every process goes over the same rows in the same order and knows the whole of each optimizer step; it runs its share of the
forward and backward passes. So what is averaged over is known without a reduction, and the numbers are those of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn

from tutelage.errors import UserError

__all__ = ["ALONE", "Processes", "call_within", "takes_calls", "zero_of"]

T = TypeVar("T")


class Processes:
    """The processes of a run, seen from one of them. All of them make the same calls in the same order.

    Args:
        index: of this one, from 0.
        count: of all.
    """

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's share of what all of them know: every ``count``-th."""
        return list(items[self.index :: self.count])

    def whole(self, share: Sequence[T]) -> list[T]:
        """The items again, in order, from the shares of all processes."""
        if self.count == 1:
            return list(share)
        shares = self.gathered(list(share))
        found: list[Any] = [None] * sum(map(len, shares))
        for index, each in enumerate(shares):
            found[index :: self.count] = each
        return found

    def gathered(self, mine: T) -> list[T]:
        """What each process has, in their order."""
        if self.count == 1:
            return [mine]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, mine)
        return found

    def any(self, mine: bool) -> bool:
        """Whether it is so in any process."""
        return any(self.gathered(mine))

    def summed(self, mine: Mapping[str, float]) -> dict[str, float]:
        """Sums over processes, by name; a name that a process lacks counts 0 there."""
        found: dict[str, float] = {}
        for each in self.gathered(dict(mine)):
            for name, value in each.items():
                found[name] = found.get(name, 0.0) + value
        return found

    def wait(self) -> None:
        """Until all are here."""
        self.gathered(None)

    def on_main(self, call: Callable[[], T]) -> T:
        """What the first process finds, in all of them; the others wait.

        It begins when all are here: what one of them still reads, the first does not change meanwhile.

        Raises:
            UserError: the first process's, in all of them.
        """
        if self.count == 1:
            return call()
        self.wait()
        value: Any = None
        error: BaseException | None = None
        if self.is_main:
            try:
                value = call()
            except BaseException as caught:
                error = caught
        found = [(value, error if isinstance(error, UserError) else error and RuntimeError(str(error)))]
        dist.broadcast_object_list(found, src=0)
        if self.is_main and error is not None:
            raise error
        value, error = found[0]
        if error is not None:
            raise error
        return cast(T, value)


ALONE = Processes()
"""One process."""


# --- the forward of a wrapped model ------------------------------------------------------------------------------------


def takes_calls(model: nn.Module) -> None:
    """Let the model's forward run what it is given, so that a launcher's wrapper is around that too.

    DDP and FSDP do their work before and after the forward of what they wrap, and the passes here run its parts: the body,
    and the head on some positions.
    """
    forward = model.forward

    @wraps(forward)
    def dispatch(*args: Any, tutelage_call: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) if tutelage_call is None else tutelage_call()

    model.forward = dispatch  # type: ignore[method-assign]


def call_within(model: nn.Module, call: Callable[[], Tensor]) -> Tensor:
    """What ``call`` gives, computed within the forward of a model that ``takes_calls``, whatever is wrapped around it."""
    return model(tutelage_call=call)


def zero_of(model: nn.Module) -> Tensor:
    """A loss of 0 that depends on every trained weight: for a process that has no row of a micro-batch."""
    return cast(Tensor, sum(p.sum() * 0.0 for p in model.parameters() if p.requires_grad))
