"""What the machine asks for and tells: the faster memory layout, time spent, memory that a training step holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["StepMemory", "channels_last", "clock"]


def clock(device: torch.device) -> Callable[[], float]:
    """What times work, in seconds: where one thread of a CPU does it (as in a sweep), the processor time of this process, so
    that other work on the machine does not count; elsewhere the time on the wall.

    >>> now = clock(torch.device("cpu"))
    >>> now() <= now()
    True
    """
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def channels_last(x: Tensor) -> Tensor:
    """A batch of images or volumes laid out with its channels innermost where that is faster: on a CPU, where a training step
    of a convolutional network takes 0.6 to 1 times the time. Other tensors, images of one channel (whose first convolution is
    the slower for it), and all values are as they were.

    >>> channels_last(torch.zeros(2, 3, 4, 4)).stride()
    (48, 1, 12, 3)
    """
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if layout is None or x.device.type != "cpu" or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=layout)


class StepMemory:
    """The most memory that one step holds at a time, in bytes: the peak of the allocator on a GPU; on a CPU, where there is no
    such counter, the model's parameters (three times where trained: Adam keeps two averages), the batch, and what is alive at
    most of the tensors that forward and backward make. What an operator needs only within itself is not seen."""

    def __init__(self, parameters: Iterable[Tensor], device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        held = [(p.untyped_storage(), p.requires_grad) for p in parameters]
        self.fixed = sum(storage.nbytes() * (3 if trained else 1) for storage, trained in held)
        self.peak = 0

    @contextmanager
    def watch(self, batch: Sequence[Tensor]) -> Iterator[None]:
        """Notes what a step that runs inside holds; ``batch``: what it is given. After the first one, nothing is done."""
        if self.peak or self.cuda:
            yield
            return
        given = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in batch}
        alive = _Alive()
        with alive:
            yield
        self.peak = self.fixed + sum(given.values()) + alive.peak

    def bytes(self, device: torch.device) -> int:
        """The most that was seen."""
        return torch.cuda.max_memory_allocated(device) if self.cuda else self.peak


class _Alive(TorchDispatchMode):
    """The storages that operators make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.add.Tensor and not torch.is_grad_enabled():
            # autograd sums gradients into the first one's storage, though not while a mode like this one watches
            self.sizes.pop(StorageWeakRef(args[0].untyped_storage()), None)
        given = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                storage = result.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference not in given:  # a view, or written in place: nothing new
                    self.sizes[reference] = storage.nbytes()
        self.sizes = {reference: size for reference, size in self.sizes.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self.sizes.values()))
        return results
