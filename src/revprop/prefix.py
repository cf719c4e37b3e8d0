"""What post-training needs of the frozen parts, computed once: features of the frozen prefix, wanted features, labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeGuard, cast

import torch
from torch import Tensor, fx

from revprop.errors import require_finite
from revprop.graph import Graph, Segment
from revprop.hardware import channels_last
from revprop.inputs import Example, count, in_order, rows
from revprop.reconstruction import reconstruct
from revprop.settings import Settings
from revprop.tasks import Task

__all__ = ["Loader", "Plan", "batches_of", "prepare", "sample", "wanted_features"]

Loader = Iterable[tuple[Example, Tensor]] | tuple[Example, Tensor]


@dataclass(frozen=True)
class Plan:
    """Which frozen values training needs (computed once) and the part of the network that runs at every step."""

    crossing: tuple[fx.Node, ...]
    prefix: Segment
    run: Segment

    @staticmethod
    def of(graph: Graph, stop: str, names: Sequence[str], classify: bool) -> Plan:
        reads = {n for n in graph.nodes if set(graph.parameters_of([n])) & set(names)}
        changed = graph.descendants(reads) if reads else set()
        outputs = (graph.node(stop), graph.output) if classify else (graph.node(stop),)
        upto = graph.ancestors(outputs)
        run = {n for n in graph.nodes if n in changed and n in upto}
        # from the back: what is kept is kept by sample, so a value that merges or moves the samples is computed at every step
        for node in reversed(graph.nodes):
            if node not in run and not graph.per_sample(node) and any(user in run for user in node.users):
                run.add(node)
        crossing = tuple(
            dict.fromkeys(
                a for n in graph.nodes if n in run for a in n.all_input_nodes if a in graph.active and a not in run
            )
        )
        return Plan(crossing, graph.segment(graph.inputs, crossing), graph.segment(crossing, outputs))


def prepare(
    graph: Graph,
    plan: Plan,
    batches: Iterable[tuple[Example, Tensor]],
    stop: str,
    settings: Settings | None,
    folder: Path,
    budget: int,
    place: torch.device,
    task: Task,
    keep_inputs: bool = False,
) -> tuple[Tensor, ...]:
    """One pass over the data: the frozen values training reads, the labels, with ``settings`` the wanted features, and with
    ``keep_inputs`` the inputs; on the training device while they fit the budget, then memory-mapped."""
    folder.mkdir(parents=True, exist_ok=True)
    columns: list[_Column] = []
    for x, labels in batches:
        values = graph.check_input(tuple(channels_last(v.to(place)) for v in in_order(x, graph.input_names)))
        with torch.no_grad():
            row = [*plan.prefix(*values), labels.to(place)]
        if settings is not None:
            row.append(wanted_features(graph, values, labels.to(place), stop, settings, task))
        else:
            task.check(torch.empty(len(values[0]), *graph.shape(graph.output), device="meta"), labels)
        row += values if keep_inputs else ()
        columns = columns or [_Column(folder / f"{i}.bin", budget // len(row)) for i in range(len(row))]
        for column, value in zip(columns, row, strict=True):
            column.append(value.detach())
    return tuple(column.finish() for column in columns)


def wanted_features(
    graph: Graph, values: tuple[Tensor, ...], labels: Tensor, stop: str, settings: Settings, task: Task
) -> Tensor:
    """The wanted features of one layer for some inputs, checked to be finite."""
    chosen = {k: v for k, v in vars(settings).items() if k != "tolerance"}
    wanted = reconstruct(graph, values, labels, task, to=stop, **chosen)[stop]
    require_finite(wanted, f"wanted features of {stop!r}")
    return wanted


class _Column:
    """A growing tensor: in memory up to its budget, then in a file mapped back into memory."""

    def __init__(self, path: Path, budget: int) -> None:
        self.path, self.budget, self.size = path, budget, 0
        self.parts: list[Tensor] = []
        self.file: IO[bytes] | None = None

    def append(self, value: Tensor) -> None:
        self.size += value.numel() * value.element_size()
        self.dtype, self.shape = value.dtype, value.shape[1:]
        self.parts.append(value)
        if self.size > self.budget:
            self.file = self.file or self.path.open("wb")
            for part in self.parts:
                self.file.write(part.contiguous().cpu().numpy().tobytes())
            self.parts = []

    def finish(self) -> Tensor:
        if self.file is None:
            return torch.cat(self.parts)
        self.file.close()
        count = self.size // torch.empty((), dtype=self.dtype).element_size()
        return torch.from_file(str(self.path), shared=False, size=count, dtype=self.dtype).view(-1, *self.shape)


def batches_of(loader: Loader, batch_size: int) -> Iterable[tuple[Example, Tensor]]:
    """The loader's batches; of inputs and labels, in their order.

    Raises:
        ValueError: inputs and labels of different lengths.

    >>> [len(y) for _, y in batches_of((torch.zeros(300, 2), torch.zeros(300)), 256)]
    [256, 44]
    """
    if not _is_pair(loader):
        return cast(Iterable[tuple[Example, Tensor]], loader)
    x, y = loader
    if count(x) != len(y):
        raise ValueError(f"expected inputs and labels of one length, given {count(x)} and {len(y)}")
    size = max(batch_size, 256)
    return [(rows(x, slice(i, i + size)), y[i : i + size]) for i in range(0, len(y), size)]


def sample(loader: Loader, size: int | None, seed: int) -> Loader:
    """So many of the samples, drawn by the seed, where the loader is inputs and labels; any other loader as it is.

    >>> len(sample((torch.zeros(300, 2), torch.zeros(300)), 20, seed=0)[1])
    20
    """
    if size is None or not _is_pair(loader):
        return loader
    x, y = loader
    if count(x) != len(y):
        return loader  # to be refused by batches_of
    index = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:size]
    return rows(x, index), y[index.to(y.device)]


def _is_pair(loader: Loader) -> TypeGuard[tuple[Example, Tensor]]:
    """Inputs and labels themselves, no batches of them."""
    return isinstance(loader, tuple) and len(loader) == 2 and isinstance(loader[1], Tensor)
