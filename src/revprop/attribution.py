"""Hypersurfaces as an attribution method in the shape that captum's users know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from revprop.adjoint import Hypersurface, hypersurface
from revprop.graph import Example, Graph
from revprop.reverse import as_graph

__all__ = ["Contributions"]


class Contributions:
    """``x * h`` as an attribution method in the shape that captum's users know: ``attribute(inputs, target)``.

    Args:
        model: a module. example: inputs to trace it with; the first ones that are explained where not given.
        layer: explain units of this layer instead of the output's. multiply_by_inputs: False for h itself.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> method = Contributions(net)
    >>> images = torch.randn(5, 1, 4, 4)
    >>> attributions, delta = method.attribute(images, target=2, return_convergence_delta=True)
    >>> attributions.shape, bool(delta.abs().max() < 1e-5)
    (torch.Size([5, 1, 4, 4]), True)
    """

    def __init__(
        self,
        model: nn.Module | Graph,
        example: Example | None = None,
        layer: str = "output",
        multiply_by_inputs: bool = True,
    ) -> None:
        self.model, self.layer, self.multiply_by_inputs = model, layer, multiply_by_inputs
        self._graph = as_graph(model, example) if example is not None else None

    def attribute(
        self,
        inputs: Example,
        target: int | Sequence[int] | Tensor | None = None,
        return_convergence_delta: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The attributions of the input's entries, (n, *input shape).

        Args:
            target: a unit for all samples (a class, or an index in the layer's shape), or one class per sample; None where the
                layer has one unit.
            return_convergence_delta: also what is missing for the sum of all contributions, the biases' too, to be the unit.
        """
        if self._graph is None:
            self._graph = as_graph(self.model, inputs)
        graph = self._graph
        values = graph.check_input(inputs)
        count = len(values[0])
        if (isinstance(target, Tensor) and target.dim() == 1) or (isinstance(target, list) and len(target) == count):
            classes = torch.as_tensor(target).tolist()
            if len(classes) != count:
                raise ValueError(f"target: expected one class for each of {count} samples; given {len(classes)}")
            wanted = sorted(set(classes))
            found: dict[int, tuple[list[int], Hypersurface]] = {}
            for k in wanted:
                rows = [i for i, c in enumerate(classes) if c == k]
                found[k] = rows, hypersurface(graph, tuple(v[rows] for v in values), self.layer, int(k))
            order = torch.tensor([i for k in wanted for i in found[k][0]]).argsort()
            parts = [self._of(found[k][1]) for k in wanted]
            attributions, delta = (torch.cat(p)[order] for p in zip(*parts, strict=True))
        else:
            unit = 0 if target is None else int(target) if isinstance(target, Tensor) else target
            attributions, delta = self._of(hypersurface(graph, values, self.layer, unit))
        return (attributions, delta) if return_convergence_delta else attributions

    def _of(self, found: Hypersurface) -> tuple[Tensor, Tensor]:
        image = found.contributions if self.multiply_by_inputs else found.image
        if image is None:
            raise ValueError(
                "the input holds indices, no floating point numbers: explain from an embedding's output on"
            )
        return image, found.reconstructed - found.value
