"""Singular values and vectors of the linear map that a layer is.

Racecar training asks of a layer that ``W^T W x = x`` on its data, so that its dominant right singular vectors span the data
(the journal version of the paper, "Reviving Autoencoder Pretraining"). Here W is the whole map, a convolution's at the traced
size of the image.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, lobpcg
from torch import Tensor, fx, nn

from revprop.convolution import Convolution
from revprop.errors import near_matches
from revprop.families import BY_COLUMNS, CONVOLUTIONS
from revprop.graph import Example, Graph
from revprop.krylov import largest_square
from revprop.linear_map import Dense, LinearMap
from revprop.reverse import as_graph
from revprop.rules import Linear, Refusal
from revprop.rules.registry import bind, closed

__all__ = ["Spectrum", "spectrum"]

Solver = Literal["auto", "dense", "iterative"]
SOLVERS = ("auto", "dense", "iterative")
LEARNED = {*BY_COLUMNS, *CONVOLUTIONS, torch.ops.aten.mm.default, torch.ops.aten.matmul.default}
DENSE_WORK = 2**30  # up to this rows * columns * the smaller of them "auto" factors the matrix: seconds on one core
DENSE_ENTRIES = 2**28  # of more than these entries, 2 GiB of them, none is factored
GUARDS = 2  # vectors beyond those asked for, so that the last of these converges, too


@dataclass(frozen=True)
class Spectrum:
    """What :func:`spectrum` returns: ``A v_i = s_i u_i``, the largest s first.

    Attributes:
        values: s, (k,). right: v, (k, *input shape). left: u, (k, *output shape). Of a matrix product the shapes are (c,) and
            (out,), wherever else it is applied. The sign is such that the largest entry of each v is positive.
        layer: whose. size: (rows, columns) of the matrix A. solver: "dense" or "iterative".
        residual: the largest of ``|A v - s u|`` and ``|A^T u - s v|``, relative to the largest s.
    """

    values: Tensor
    right: Tensor
    left: Tensor
    layer: str
    size: tuple[int, int]
    solver: str
    residual: float

    def shares(self, features: Tensor) -> Tensor:
        """How much of the layer's data lies along each right vector: ``sum_n <v_i, x_n>^2 / sum_n |x_n|^2``, (k,).

        Args:
            features: what the layer is given, (n, ..., *input shape). Take off their mean first where that is not meant.

        Raises:
            ValueError: features of another shape.
        """
        shape = tuple(self.right.shape[1:])
        if features.dim() <= len(shape) or tuple(features.shape[-len(shape) :]) != shape:
            expected = ", ".join(map(str, shape))
            raise ValueError(
                f"features: expected what layer {self.layer!r} is given, (n, {expected}); given {tuple(features.shape)}"
            )
        flat = features.reshape(-1, math.prod(shape)).to(self.right)
        total = flat.square().sum()
        along = (flat @ self.right.flatten(1).mT).square().sum(0)
        return along / total if bool(total > 0) else torch.zeros_like(self.values)

    def __str__(self) -> str:
        shown = ", ".join(f"{value:.4g}" for value in self.values[:8].tolist())
        rows, columns = self.size
        return (
            f"{self.layer}: {len(self.values)} of {min(self.size)} singular values of a {rows} x {columns} map "
            f"({self.solver}, residual {self.residual:.0e}): {shown}{', ...' if len(self.values) > 8 else ''}"
        )


def spectrum(
    model: nn.Module | Graph,
    example: Example | None,
    layer: str,
    k: int | None = 16,
    solver: Solver = "auto",
    seed: int = 0,
) -> Spectrum:
    """The largest singular values of a layer's linear map ``z = A a + b``, and their vectors.

    A is what the rules say the operator is (:mod:`revprop.rules`): a linear layer's weight; of a convolution the whole map from
    image to image, with its stride and padding, at the size of the example. It is not the matrix of kernels that
    :class:`revprop.Orthogonality` penalises.

    Args:
        model: a module, or the graph of :func:`revprop.trace`. example: an input (n, ...); None where a graph is given.
        layer: a name of ``graph.layers`` with one linear layer or convolution in it, or whose features are linear in one value,
            such as those of average pooling or of batch norm in eval mode.
        k: how many; all where there are fewer, or where None.
        solver: "dense" factors the matrix. "iterative" needs products with A and A^T only: a block method (LOBPCG, Knyazev, 2001)
            on the smaller of A^T A and A A^T, because the maps of convolutions repeat singular values, which a single Krylov
            sequence may miss. "auto": the matrix where that takes seconds, or where many values are asked for.
        seed: of the vectors that the iteration starts with.

    Returns:
        A :class:`Spectrum`, computed in double precision, in the model's type. Vectors of equal singular values are any
        orthonormal basis of their space.

    Raises:
        ValueError: an unknown layer, one that is no linear map or several, a k below 1, a matrix too large to be factored.

    >>> blur = nn.Sequential(nn.Conv1d(1, 1, 2, bias=False), nn.ReLU())
    >>> _ = blur[0].weight.data.fill_(1.0)
    >>> found = spectrum(blur, torch.zeros(1, 1, 4), "0")
    >>> found.values, found.right.shape, found.left.shape
    (tensor([1.8478, 1.4142, 0.7654]), torch.Size([3, 1, 4]), torch.Size([3, 1, 3]))
    >>> found.right[0]  # what it passes on most: the smoothest signal
    tensor([[0.2706, 0.6533, 0.6533, 0.2706]])
    """
    graph = as_graph(model, example)
    if solver not in SOLVERS:
        raise ValueError(near_matches(solver, SOLVERS, "solver"))
    operator = _Operator.of(graph, layer)
    most = min(operator.size)
    wanted = most if k is None else min(k, most)
    if wanted < 1:
        rows, columns = operator.size
        raise ValueError(f"k: expected at least 1 singular value, of a {rows} x {columns} map; given {k}")
    many = 5 * (wanted + GUARDS) > most  # too many for a block
    if solver == "auto":
        small = math.prod(operator.size) * most <= DENSE_WORK
        solver = "dense" if small or many else "iterative"
    if solver == "iterative" and many:
        raise ValueError(f'k: "iterative" finds up to {most // 5 - GUARDS} of {most} singular values; given {k}')
    with torch.no_grad():
        left, values, right = operator.factor(wanted) if solver == "dense" else operator.iterate(wanted, seed)
        residual = operator.residual(left, values, right)
    flip = torch.where(right.gather(1, right.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    to: dict[str, Any] = {"dtype": operator.dtype, "device": operator.device}
    return Spectrum(
        values.to(**to),
        (right * flip).view(-1, *operator.shape).to(**to),
        (left * flip).view(-1, *operator.out_shape).to(**to),
        layer,
        operator.size,
        solver,
        residual,
    )


@dataclass(frozen=True)
class _Operator:
    """A layer's map on flattened values in double precision: (n, columns) <-> (n, rows)."""

    map: LinearMap
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: torch.dtype
    inner: torch.dtype
    device: torch.device
    layer: str

    @classmethod
    def of(cls, graph: Graph, layer: str) -> _Operator:
        node, linear = _map_of(graph, layer)
        source, map = node.inputs[0], linear.map
        dtype = source.meta["val"].dtype
        shape, out_shape = graph.shape(source), graph.shape(node.node)
        if isinstance(map, Dense):
            out_shape, shape = ((size,) for size in map.weight.shape)
        inner = dtype
        if isinstance(map, Dense | Convolution):  # others in the precision of their constants
            map, inner = copy.copy(map), torch.float64
            map.weight = map.weight.double()
        kept = torch.promote_types(dtype, torch.float32)
        return cls(map, shape, out_shape, kept, inner, node.like(0.0).device, layer)

    @property
    def size(self) -> tuple[int, int]:
        return math.prod(self.out_shape), math.prod(self.shape)

    def apply(self, a: Tensor) -> Tensor:
        return self.map.apply(a.to(self.inner).view(-1, *self.shape)).reshape(len(a), -1).double()

    def adjoint(self, z: Tensor) -> Tensor:
        found = self.map.adjoint(z.to(self.inner).view(-1, *self.out_shape))
        assert isinstance(found, Tensor)
        return found.reshape(len(z), -1).double()

    def factor(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """By the matrix, column by column or row by row."""
        rows, columns = self.size
        if rows * columns > DENSE_ENTRIES:
            raise ValueError(
                f"layer {self.layer!r} is a {rows} x {columns} map, whose matrix takes {rows * columns / 2**27:.0f} GiB; ask "
                f'for fewer singular values, such as k=16, without solver="dense"'
            )
        given, image = (columns, self.apply) if columns <= rows else (rows, self.adjoint)
        matrix = torch.empty(given, max(rows, columns), dtype=torch.float64, device=self.device)
        for start in range(0, given, 256):
            units = torch.zeros(min(256, given - start), given, dtype=torch.float64, device=self.device)
            units[:, start : start + 256].fill_diagonal_(1.0)
            matrix[start : start + 256] = image(units)
        # a row per unit of the input is the matrix transposed
        a, s, bt = torch.linalg.svd(matrix, full_matrices=False)
        left, right = (bt, a.mT) if columns <= rows else (a.mT, bt)
        return left[:k], s[:k], right[:k]

    def iterate(self, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """By the leading eigenvectors of the smaller Gram matrix."""
        rows, columns = self.size
        wide = columns <= rows
        there, back = (self.apply, self.adjoint) if wide else (self.adjoint, self.apply)
        given = min(rows, columns)
        start = np.random.default_rng(seed).standard_normal((given, k + GUARDS))
        scale = largest_square(there, back, torch.zeros(1, given, dtype=torch.float64, device=self.device), 10)
        products = _products(lambda a: back(there(a)), self.device)
        gram = LinearOperator((given, given), matvec=products, matmat=products, dtype=np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # how far it came is the residual
            _, vectors = lobpcg(gram, start, tol=1e-8 * scale if scale > 0 else None, maxiter=500, largest=True)
        basis = torch.from_numpy(np.linalg.qr(vectors)[0].T.copy()).to(self.device)
        # of A restricted to that basis exactly: the other side is orthonormal, whatever the rank
        turn, s, other = torch.linalg.svd(there(basis), full_matrices=False)
        own = turn.mT @ basis
        left, right = (other, own) if wide else (own, other)
        return left[:k], s[:k], right[:k]

    def residual(self, left: Tensor, values: Tensor, right: Tensor) -> float:
        there = self.apply(right) - values[:, None] * left
        back = self.adjoint(left) - values[:, None] * right
        largest = float(torch.cat([there.norm(dim=1), back.norm(dim=1)]).max())
        return largest / (float(values[0]) or 1.0)


def _products(gram: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Any], Any]:
    """The product with a block of columns, for SciPy."""

    def product(block: Any) -> Any:
        columns = torch.from_numpy(np.ascontiguousarray(block.reshape(len(block), -1).T)).to(device)
        return gram(columns).mT.cpu().numpy()

    return product


def _map_of(graph: Graph, layer: str) -> tuple[Any, Linear]:
    """The one linear operator of a layer, with its facts.

    Raises:
        ValueError: there is none, or there are several.
    """
    own = graph.node(layer)
    inside = graph.inside(layer) or {own}
    learned: list[fx.Node] = [node for node in graph.nodes if node in inside and node.target in LEARNED]
    able = [name for name in graph.layers if graph.node(name).target in LEARNED]
    known = f"layers that are one: {', '.join(able[:20]) or 'none'}{', ...' if len(able) > 20 else ''}"
    if len(learned) > 1:
        raise ValueError(f"layer {layer!r} has {len(learned)} linear layers or convolutions, not one map; {known}")
    node = learned[0] if learned else own
    if node.op != "call_function":
        raise ValueError(f"layer {layer!r} is an input: no map leads to it; {known}")
    call = bind(graph, node)
    try:
        fact = closed(call)
    except Refusal as refusal:
        raise ValueError(f"layer {layer!r} ({node.target}) is no linear map that is known: {refusal}") from refusal
    if not isinstance(fact, Linear) or len(call.inputs) != 1:
        reason = "a map of several values" if isinstance(fact, Linear) else "not linear"
        raise ValueError(f"layer {layer!r} ({node.target}) is {reason}; {known}")
    if not isinstance(fact.map, Dense) and -1 in (*graph.shape(call.inputs[0]), *graph.shape(node)):
        raise ValueError(f"layer {layer!r} ({node.target}) has the batch in another dimension than the first; {known}")
    return call, fact
