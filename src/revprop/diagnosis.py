"""``diagnose``: which layers' features are how far from what the labels ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from revprop.graph import Graph
from revprop.inputs import Example
from revprop.prefix import batches_of
from revprop.reconstruction import reconstruct
from revprop.reverse import as_graph
from revprop.settings import Settings
from revprop.tasks import Task, stated

__all__ = ["Diagnosis", "LayerDiagnosis", "blocks", "diagnose"]


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer's distance from what the labels ask for, over all samples seen.

    Attributes:
        layer: its name. deviation: (n,) |wanted - recorded| / |recorded|. reached: (n,) whether the wanted features, run
            forward again, give the label (all that a sample has). maps: (features...) mean |recorded - wanted| per entry, as
            in FR-PT Fig. 4.
        steps: (n,) linearisations of the global strategy; None for greedy.
    """

    layer: str
    deviation: Tensor
    reached: Tensor
    maps: Tensor
    steps: Tensor | None


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` returns: ``layers`` in forward order, and ``wrong`` (n,) where the network misses a label.

    Attributes:
        counts: (n, 2) how many of a sample's labels the network gets right, and how many count; None: one per sample.
    """

    layers: tuple[LayerDiagnosis, ...]
    wrong: Tensor
    counts: Tensor | None = None

    @property
    def accuracy(self) -> float:
        """The share of labels the network gets right."""
        if self.counts is not None and not self._one_each:
            right, counted = self.counts.sum(0).tolist()
            return right / counted if counted else 0.0
        return 1 - float(self.wrong.double().mean()) if len(self.wrong) else 0.0

    @property
    def _one_each(self) -> bool:
        return self.counts is None or bool((self.counts[:, 1] == 1).all())

    def rows(self) -> list[dict[str, object]]:
        """For tables: per layer its deviations, whether reached, and which samples were wrong."""
        return [
            {"layer": d.layer, "deviation": d.deviation, "reached": d.reached, "active": self.wrong}
            for d in self.layers
        ]

    def __str__(self) -> str:
        labels = "" if self.counts is None or self._one_each else f"{int(self.counts[:, 1].sum())} labels of "
        width = max([5, *(len(d.layer) for d in self.layers)])
        lines = [
            f"accuracy {100 * self.accuracy:.2f} % of {labels}{len(self.wrong)} samples",
            f"{'layer':<{width}}  deviation  of wrong ones  reached",
        ]
        for d in self.layers:
            wrong = float(d.deviation[self.wrong].mean()) if bool(self.wrong.any()) else 0.0
            reached = 100 * float(d.reached.double().mean())
            lines.append(f"{d.layer:<{width}}  {float(d.deviation.mean()):9.4f}  {wrong:13.4f}  {reached:6.2f} %")
        return "\n".join(lines)


def blocks(graph: Graph) -> tuple[str, ...]:
    """The layers that are direct children of the model (its blocks), or all layers where it has fewer than two.

    >>> from revprop.graph import trace
    >>> blocks(trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.zeros(1, 2)))
    ('0', '1')
    """
    inner = tuple(name for name in graph.layers if name != "output" and graph.node(name) not in graph.inputs)
    children = tuple(name for name in inner if "." not in name)
    return children if len(children) >= 2 else inner


def diagnose(
    model: nn.Module | Graph,
    batches: Iterable[tuple[Example, Tensor]] | tuple[Example, Tensor],
    layers: Sequence[str] | None = None,
    settings: Settings = Settings(),
    task: Task | None = None,
) -> Diagnosis:
    """How far each layer's features are from the nearest ones that give the label.

    Args:
        model: a module, or the graph of :func:`revprop.trace`.
        batches: (inputs, labels) pairs, gone through once; or the two tensors.
        layers: names; the model's blocks where not given.
        settings: how to reconstruct. task: what the labels are, as for :func:`revprop.reconstruct`.

    Returns:
        A :class:`Diagnosis`; ``str()`` prints a table.

    Raises:
        ValueError: no batches; and all that :func:`revprop.reconstruct` raises.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> report = diagnose(net, [(torch.randn(6, 4), torch.randint(0, 3, (6,)))])
    >>> [d.layer for d in report.layers]
    ['0', '1', '2']
    """
    graph, collected, counts = None, {}, []  # type: ignore[var-annotated]
    options = dict(vars(settings))
    for x, labels in batches_of(batches, 256):
        graph = as_graph(model, x) if graph is None else graph
        chosen = tuple(layers) if layers is not None else blocks(graph)
        known = stated(task, labels)
        result = reconstruct(graph, x, labels, known, to=chosen, **options)
        counts.append(torch.stack(known.right(result.output, labels), 1))
        for layer in chosen:
            certificate = result.certificates[layer]
            absolute = (result.recorded[layer] - result[layer]).abs().sum(0, dtype=torch.float64)
            collected.setdefault(layer, []).append(
                (certificate.deviation, certificate.reached, absolute, certificate.steps)
            )
    if graph is None:
        raise ValueError("batches: expected (inputs, labels) pairs; there was none")
    all_counts = torch.cat(counts)
    wrong = all_counts[:, 0] < all_counts[:, 1]
    found = []
    for layer, parts in collected.items():
        deviations, reached, differences, steps = (list(column) for column in zip(*parts, strict=True))
        taken = None if steps[0] is None else torch.cat(steps)
        maps = torch.stack(differences).sum(0) / max(len(wrong), 1)
        found.append(LayerDiagnosis(layer, torch.cat(deviations), torch.cat(reached), maps, taken))
    return Diagnosis(tuple(found), wrong, all_counts)
