"""Loaders of the training rows: the same rows in the same order, whatever the number of processes."""

from __future__ import annotations

from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader

__all__ = ["alone", "rebuilt", "unshared"]

_KEPT = (
    "collate_fn",
    "num_workers",
    "pin_memory",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


def rebuilt(loader: DataLoader, dataset: Any, **batches: Any) -> DataLoader:
    """A loader with the settings of another one, over other batches.

    Args:
        batches: ``batch_size`` or ``batch_sampler``.
    """
    return DataLoader(dataset, **batches, **{name: getattr(loader, name) for name in _KEPT})


def unshared(loader: DataLoader, dataset: Any, batch_size: int, *, seed: int | None) -> DataLoader:
    """A loader that gives every process the batches of all of them, in the order of one process.

    Args:
        loader: as transformers' trainer makes it: each process gets every ``count``-th batch.
        dataset: the rows.
        batch_size: rows of a batch of all processes.
        seed: of the order (``data_seed``).
    """
    inner: Any = loader.batch_sampler
    if inner is None or not hasattr(dataset, "__len__"):
        return alone(rebuilt(loader, dataset, batch_size=batch_size), seed=seed)
    while hasattr(inner, "batch_sampler"):
        inner = inner.batch_sampler
    batches = BatchSampler(inner.sampler, batch_size, inner.drop_last)
    return alone(rebuilt(loader, dataset, batch_sampler=batches), seed=seed)


def alone(loader: DataLoader, *, seed: int | None) -> DataLoader:
    """A loader as accelerate prepares it for one process."""
    return prepare_data_loader(
        loader, num_processes=1, process_index=0, use_seedable_sampler=True, data_seed=seed, dispatch_batches=False
    )
