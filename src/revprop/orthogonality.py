"""Orthogonality of the weights as a penalty: the spectral restricted isometry property, by power iteration.

The method that racecar training is compared with (Eq. 2 of its paper).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from revprop.errors import near_matches

__all__ = ["Orthogonality"]


class Orthogonality:
    """``weight * sum over learned layers of sigma(W^T W - I)``, sigma the spectral norm (SRIP: Bansal, Chen, Wang, 2018).

    It is 0 where every layer's matrix W has orthonormal columns or, where it has more columns than rows, orthonormal rows:
    ``W^T W - I`` and ``W W^T - I`` have the same spectral norm where W is square, and of the two only the smaller one can be 0.

    W is a linear layer's weight, (k, c). A convolution's kernels are its rows, as the SRIP paper reshapes them:
    (k, c, *kernel) -> (k, c * kernel), for any number of dimensions. This is not the map that the convolution is, for which see
    :func:`revprop.spectrum`. Of a grouped one W is block diagonal, a block of k / groups rows per group, and sigma is the
    largest of the blocks'. A transposed convolution is taken as the convolution it is the adjoint of:
    (c, k, *kernel) -> (c, k * kernel).

    sigma is estimated from below by power iteration, ``|M u| / |u|`` with ``u = M^(steps - 1) v`` and v normally distributed,
    drawn anew at each call; ``M = W^T W - I`` is never formed. With two steps the estimate is 0.7 to 0.9 of sigma for the
    initial weights of the networks here. It is differentiated as it is, through all steps, and computed in single precision at
    least, under autocast as well. (The code of the SRIP paper sums sigma^2; the equations of both papers have sigma.)

    Args:
        model: any module. It keeps its class, parameters and state dict; the weights are read at each call.
        weight: beta of Eq. 2.
        layers: module paths; of a module that is no learned layer, those within it. None: every ``nn.Linear`` and convolution,
            transposed or not. A tied weight counts once. Embeddings, recurrent layers and the packed projections of
            ``nn.MultiheadAttention`` are no such layers.
        steps: applications of M per call; 2 in the SRIP paper.
        seed: of the vectors v, which are the same on every device and in every process. Those of a call depend on it and on
            ``calls`` only, the number of calls before: set ``calls`` to continue an interrupted training.

    Attributes:
        layers: paths of the layers, as :func:`revprop.trace` names them.

    Raises:
        ValueError: an unknown path, no learned layer, no step, a weight that is negative or not finite.

    >>> net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh(), nn.Conv1d(1, 1, 2))
    >>> penalty = Orthogonality(net, weight=0.1, layers=["0"])
    >>> _ = net[0].weight.data.copy_(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))  # W W^T - I = diag(3, 0)
    >>> round(penalty().item(), 4)
    0.3
    >>> penalty().backward()
    >>> net[0].weight.grad  # of 0.1 |w|^2
    tensor([[0.0000, 0.4000, 0.0000],
            [0.0000, 0.0000, 0.0000]])
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float,
        layers: Sequence[str] | None = None,
        steps: int = 2,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module; given {type(model).__name__}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight: expected a finite number of at least 0; given {weight}")
        if steps < 1:
            raise ValueError(f"steps: expected at least 1 application of W^T W - I; given {steps}")
        self.model, self.weight, self.steps, self.seed = model, weight, steps, seed
        self.layers = _chosen(model, layers)
        self.calls = 0

    def __call__(self) -> Tensor:
        """The penalty, a number to add to the loss."""
        return self.weight * torch.stack(list(self.norms().values())).sum()

    def norms(self) -> dict[str, Tensor]:
        """The estimate of ``sigma(W^T W - I)`` by layer, without the weight. A call like any other: it draws new vectors."""
        matrices = {name: _matrix(self.model.get_submodule(name)) for name in self.layers}
        starts = self._starts([(len(matrix), matrix.shape[2]) for matrix in matrices.values()])
        return {
            name: _spectral_norm(matrix, v.to(matrix), self.steps)
            for (name, matrix), v in zip(matrices.items(), starts, strict=True)
        }

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _starts(self, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        entropy = np.random.SeedSequence((self.seed, self.calls)).generate_state(1)
        generator = torch.Generator().manual_seed(int(entropy[0]))
        self.calls += 1
        return [torch.randn(*shape, 1, generator=generator, dtype=torch.float64) for shape in shapes]


def _chosen(model: nn.Module, layers: Sequence[str] | None) -> tuple[str, ...]:
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        if _is_learned(module):
            found.setdefault(_identity(module), name)
    known = ", ".join(list(found.values())[:20]) + (", ..." if len(found) > 20 else "")
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer and no convolution: there is nothing to penalise")
    if layers is None:
        return tuple(found.values())
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted: set[int] = set()
    for layer in [layers] if isinstance(layers, str) else layers:
        if layer not in modules:
            raise ValueError(near_matches(layer, modules, "layer"))
        within = {_identity(module) for module in modules[layer].modules() if _is_learned(module)}
        if not within:
            raise ValueError(
                f"layer {layer!r} ({type(modules[layer]).__name__}) has no linear layer and no convolution in it; "
                f"learned layers: {known}"
            )
        wanted |= within
    if not wanted:
        raise ValueError(f"layers: expected at least one, or None for all; learned layers: {known}")
    return tuple(name for identity, name in found.items() if identity in wanted)


def _is_learned(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd)


def _identity(module: nn.Module) -> int:
    """The same for modules that share their weight; a parametrised weight is computed anew whenever it is read."""
    weight = module._parameters.get("weight")
    return id(module) if weight is None else id(weight)


def _matrix(module: nn.Module) -> Tensor:
    """A layer's W, or its transpose where that has fewer columns: (groups, rows, columns)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    groups = module.groups if isinstance(module, nn.modules.conv._ConvNd) else 1
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    matrix = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
    return matrix.mT if matrix.shape[1] < matrix.shape[2] else matrix


def _spectral_norm(matrix: Tensor, v: Tensor, steps: int) -> Tensor:
    """``|M u| / |u|``, M block diagonal with the blocks ``W^T W - I``. v: (groups, columns, 1)."""
    tiny = torch.finfo(matrix.dtype).tiny
    with torch.autocast(matrix.device.type, enabled=False):
        for _ in range(steps):
            # where W is orthogonal M u is 0, and 0 / tiny, not NaN
            u = v / torch.linalg.vector_norm(v).clamp_min(tiny)
            v = matrix.mT @ (matrix @ u) - u
        return torch.linalg.vector_norm(v)
