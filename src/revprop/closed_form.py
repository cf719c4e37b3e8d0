"""Closed-form post-training: layers refitted by damped least squares towards their wanted pre-activations.

For an operator ``z = W u + b`` (``u`` its columns) whose wanted pre-activations are ``z* = z + d``, the change of [W b] is

    D = argmin sum |D [u; 1] - d|^2 + mu |D|^2 = R (G + mu I)^-1,   G = sum [u; 1] [u; 1]^T,   R = sum d [u; 1]^T,

with mu relative to the mean diagonal of G. G and R are streamed over the data: no gradient of any weight is taken. The
wanted change d is the global strategy's, linearised once: the smallest change of z for which the network behind it,
``J = d outputs / d z``, gives the wanted change of the outputs, ``d = J^T (J J^T)^-1 (wanted - outputs)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real

import torch
from torch import Tensor, fx

from revprop.columns import Columns, columns_of
from revprop.errors import require_finite
from revprop.graph import Graph, Segment
from revprop.hardware import StepMemory, clock
from revprop.krylov import least_squares
from revprop.rules.registry import Linear, Refusal, bind, closed
from revprop.tasks import Classification, Task, by_sample

__all__ = ["ClosedForm", "Refit", "refits", "smallest_change", "solve", "write"]

DENSE_OUTPUTS = 64  # networks with more outputs than this are inverted without the rows of the Jacobian
STEPS = (1.0, 0.5, 0.25, 0.125, 0.0625)  # shares of a refit that are tried
RIDGE = 1e-3  # added to J J^T, relative to its largest diagonal entry

Wanted = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ClosedForm:
    """Settings of closed-form post-training. Several margins or dampings are tried one by one, and unseen data chooses.

    Attributes:
        margins: by how much a label is to hold (win, in logits). dampings: mu, relative to the mean diagonal of G.
        sweeps: so many rounds over the layers. per_sweep: each round on so many samples, the next ones in a shuffled order.
        samples: so many of the training samples are used at all; None for all.
    """

    margins: tuple[float, ...] = (5.0,)
    dampings: tuple[float, ...] = (1.0,)
    sweeps: int = 12
    per_sweep: int = 5000
    samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("margins", "dampings"):
            values = getattr(self, name)
            if not isinstance(values, tuple | list) or not values or not all(_fits(v, Real, 0) for v in values):
                raise ValueError(f"{name}: expected one or more numbers in a tuple, none below 0; given {values!r}")
        for name in ("sweeps", "per_sweep", "samples"):
            value = getattr(self, name)
            if not _fits(value, Integral, 1) and not (name == "samples" and value is None):
                raise ValueError(f"{name}: expected a whole number, at least 1; given {value!r}")


def _fits(value: object, kind: type, least: int) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value < math.inf  # type: ignore[operator]


@dataclass(frozen=True)
class Sweep:
    """The state after a sweep: the parameters by name, and what led there. ``score``: the accuracy on unseen data, or None.

    ``residual``: mean squared change of the pre-activations that was wanted, over the layers, before their refit.
    """

    parameters: dict[str, Tensor]
    score: float | None = None
    residual: float | None = None
    margin: float = 0.0
    damping: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Refit:
    """One operator to be refitted, with the parts of the network in front of it and behind it.

    Attributes:
        node: the operator. columns: its columns. weight, bias: names of its parameters (bias None: it has none to train).
        front: the frozen values -> (its input, its output, the values that by-pass it).
        behind: (its output, the values that by-pass it) -> the network's output.
    """

    node: fx.Node
    columns: Columns
    weight: str
    bias: str | None
    front: Segment
    behind: Segment

    def normal_equations(
        self, batches: Iterable[tuple[Tensor, ...]], wanted: Wanted, memory: StepMemory | None = None
    ) -> tuple[Tensor, Tensor, float]:
        """G (groups, features + 1, features + 1) and R (groups, outputs, features + 1), streamed over batches of
        (*frozen values, labels), and the mean square of the wanted change; without a bias to train, columns end in 0."""
        gram: Tensor | None = None
        product: Tensor | None = None
        squares = count = 0.0
        for *values, labels in batches:
            with memory.watch(values) if memory is not None else nullcontext():
                with torch.no_grad():
                    a, z, *held = self.front(*values)
                change = smallest_change(
                    lambda v, *h: self.behind(v, *h)[0],
                    z,
                    tuple(held),
                    lambda o, y=labels: wanted(o, y),  # type: ignore[misc]
                )
                with torch.no_grad():
                    squares, count = squares + float(change.square().sum()), count + change.numel()
                    u, d = self.columns.of(a), self.columns.rows(change)
                    u = torch.cat([u, u.new_full((*u.shape[:2], 1), float(self.bias is not None))], 2)
                    g, r = u.mT @ u, d.mT @ u
                    gram = g if gram is None else gram + g
                    product = r if product is None else product + r
        if gram is None or product is None:
            raise ValueError("batches: expected at least one")
        return gram, product, squares / max(count, 1.0)

    def distance(self, batches: Iterable[tuple[Tensor, ...]], wanted: Wanted) -> float:
        """How far the outputs are from the wanted ones: the sum of squares."""
        total = 0.0
        with torch.no_grad():
            for *values, labels in batches:
                outputs = self.behind(*self.front(*values)[1:])[0]
                total += float((wanted(outputs, labels) - outputs).square().sum())
        return total

    def change(self, gram: Tensor, product: Tensor, damping: float) -> tuple[Tensor, Tensor | None]:
        """The change of the weight and of the bias by the damped normal equations; where the damping is below what G's own
        rounding amounts to, by its pseudo-inverse."""
        require_finite(gram, f"normal equations of {self.weight!r}")
        size = gram.shape[-1]
        rounding = size * torch.finfo(gram.dtype).eps
        gram, product = gram.double(), product.double()
        if damping < rounding:
            matrix = product @ torch.linalg.pinv(gram, rtol=rounding, hermitian=True)
        else:
            mean = torch.diagonal(gram, dim1=1, dim2=2).mean(1)
            mean = torch.where(mean > 0, mean, 1.0)  # nothing but zeros: no change
            eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
            matrix = torch.linalg.solve(gram + (damping * mean)[:, None, None] * eye, product.mT).mT
        weight = self.columns.weight(matrix[..., :-1].contiguous())
        return weight, matrix[..., -1].flatten() if self.bias is not None else None


def smallest_change(
    behind: Callable[..., Tensor], z: Tensor, held: tuple[Tensor, ...], wanted: Callable[[Tensor], Tensor]
) -> Tensor:
    """The smallest change of ``z`` that changes the outputs of the network behind it as wanted, to first order.

    Args:
        behind: (z, *held) -> outputs, sample by sample independent, differentiable. z: (n, ...).
        wanted: outputs -> the wanted outputs.

    Returns:
        ``J^T (J J^T + ridge)^-1 (wanted - outputs)``, of the shape of ``z``.

    >>> half = lambda z: 0.5 * z
    >>> smallest_change(half, torch.tensor([[2.0]]), (), lambda outputs: outputs + 1).round(decimals=2)
    tensor([[2.]])
    """
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        outputs = behind(z, *held)
    missing = by_sample(wanted(outputs.detach()) - outputs.detach())
    if outputs is z:
        return missing.view(z.shape)
    width = missing.shape[1]
    if width > DENSE_OUTPUTS:
        return _iteratively(outputs, z, missing.view(outputs.shape))
    rows = [
        torch.autograd.grad(outputs, z, unit.view(outputs.shape[1:]).expand_as(outputs), retain_graph=i < width - 1)[
            0
        ].flatten(1)
        for i, unit in enumerate(torch.eye(width, dtype=z.dtype, device=z.device))
    ]
    jacobian = torch.stack(rows, 1)
    gram = jacobian @ jacobian.mT
    diagonal = torch.diagonal(gram, dim1=1, dim2=2)
    diagonal += (RIDGE * diagonal.amax(1, keepdim=True)).clamp_min(torch.finfo(z.dtype).tiny ** 0.5)
    factor = torch.linalg.cholesky_ex(gram).L
    dual = torch.cholesky_solve(missing.unsqueeze(-1), factor)
    return (jacobian.mT @ dual).view(z.shape)


def _iteratively(outputs: Tensor, z: Tensor, missing: Tensor) -> Tensor:
    """The same for many outputs, by conjugate gradients on the normal equations."""
    probe = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, z, probe, create_graph=True)[0]
    return least_squares(
        lambda v: torch.autograd.grad(pulled, probe, v, retain_graph=True)[0],
        lambda y: torch.autograd.grad(outputs, z, y, retain_graph=True)[0],
        missing,
        tolerance=1e-2,
        limit=100,
    )


def refits(graph: Graph, names: Sequence[str], frozen: Sequence[fx.Node]) -> tuple[Refit, ...]:
    """The operators whose weight is among ``names``, in forward order.

    Args:
        names: of trainable parameters. frozen: the nodes whose values are known and do not change.

    Raises:
        ValueError: none of the parameters is the weight of a linear layer or a convolution, or one is used twice, or the
            samples are not the first dimension where it is used.
    """
    found: list[Refit] = []
    for node in graph.nodes:
        arguments = {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)}
        weight, bias = (graph.constants.get(arguments.get(key)) for key in ("weight", "bias"))  # type: ignore[arg-type]
        columns = _columns(graph, node) if weight in names else None
        if columns is None or weight is None:
            continue
        if not graph.per_sample(node):
            raise ValueError(
                f"{weight} is used where the samples are not the first dimension, but merged with others or moved; closed form "
                'goes sample by sample: choose start and stop around it, or use method="fr" or "bp"'
            )
        changed = graph.descendants([node])
        needed = [n for n in graph.nodes if n in changed and n is not node]
        held = tuple(
            dict.fromkeys(a for n in needed for a in n.all_input_nodes if a in graph.active and a not in changed)
        )
        source = next(a for a in node.all_input_nodes if a in graph.active)
        found.append(
            Refit(
                node,
                columns,
                weight,
                bias if bias in names else None,
                graph.segment(frozen, (source, node, *held)),
                graph.segment((node, *held), (graph.output,)),
            )
        )
    if not found:
        raise ValueError(
            f"nothing to refit in closed form among {', '.join(names)}: a linear layer's or a convolution's weight is "
            'needed; use method="fr" or method="bp"'
        )
    for name in (n for layer in found for n in (layer.weight, layer.bias) if n):
        if sum(name in graph.parameters_of([n]) for n in graph.nodes) > 1:
            raise ValueError(f'{name} is used more than once: closed form refits one use; use method="fr" or "bp"')
    return tuple(found)


def _columns(graph: Graph, node: fx.Node) -> Columns | None:
    try:
        fact = closed(bind(graph, node))
    except Refusal:
        return None
    return columns_of(fact.map) if isinstance(fact, Linear) else None


def solve(
    graph: Graph,
    layers: Sequence[Refit],
    data: tuple[Tensor, ...],
    options: ClosedForm = ClosedForm(),
    score: Callable[[], float] | None = None,
    embedding: str = "nearest",
    seed: int = 0,
    batch_size: int = 256,
    task: Task = Classification(),
) -> tuple[list[Sweep], int]:
    """Refits the layers in turn, in place, sweep by sweep, for each margin and damping; leaves the best state in the model.

    Args:
        layers: from :func:`refits`. data: the frozen values and, last, the labels of the task.
        score: the accuracy of the model as it is on unseen data; None: the first margin and damping, all sweeps.

    Returns:
        The sweeps of the best margin and damping up to the best one, the state before any first; and the bytes that one
        batch keeps alive.

    Raises:
        ValueError: several margins or dampings to choose from and no score.
    """
    tried = list(itertools.product(options.margins, options.dampings))
    if score is None and len(tried) > 1:
        raise ValueError(
            f"{len(tried)} pairs of margin and damping, and no unseen data to choose by: give selection=<loader>, or one of each"
        )
    order = torch.randperm(len(data[-1]), generator=torch.Generator().manual_seed(seed))[: options.samples]
    names = [name for layer in layers for name in (layer.weight, layer.bias) if name]
    device = graph.tensor(names[0]).device
    memory, now = StepMemory([graph.tensor(name).detach() for name in names], device), clock(device)
    begin = Sweep({name: graph.tensor(name).detach().clone() for name in names}, score() if score else None)
    best = [begin]
    for margin, damping in tried:
        write(graph, begin.parameters)
        trail = [begin]
        for k in range(options.sweeps):
            began = now()
            rows = order.roll(-k * options.per_sweep)[: options.per_sweep]
            drawn = tuple(t.index_select(0, rows.to(t.device)).to(device) for t in data)
            residuals = [
                _refit(
                    graph,
                    layer,
                    list(zip(*(t.split(batch_size) for t in drawn), strict=True)),
                    partial(_embed, task=task, embedding=embedding, margin=margin),
                    damping,
                    memory,
                    # there the least-squares problem is that of the outputs themselves, and what is wanted is a convex set
                    layer.node is graph.output and embedding in ("nearest", "one_hot"),
                )
                for layer in layers
            ]
            seconds = now() - began
            state = {name: graph.tensor(name).detach().clone() for name in names}
            mean = sum(residuals) / len(residuals)
            trail.append(Sweep(state, score() if score else None, mean, margin, damping, seconds))
        if score is None:
            return trail, memory.bytes(device)
        last = max(range(len(trail)), key=lambda i: trail[i].score or 0.0)
        if (trail[last].score or 0.0) > (best[-1].score or 0.0):
            best = trail[: last + 1]
    write(graph, best[-1].parameters)
    return best, memory.bytes(device)


def _refit(
    graph: Graph,
    layer: Refit,
    batches: list[tuple[Tensor, ...]],
    wanted: Wanted,
    damping: float,
    memory: StepMemory,
    never_worse: bool,
) -> float:
    """Refits one layer; where that takes the outputs further from the wanted ones the change is halved, at last left out."""
    gram, product, residual = layer.normal_equations(batches, wanted, memory)
    weight, bias = layer.change(gram, product, damping)
    change = {layer.weight: weight} | ({layer.bias: bias} if layer.bias is not None and bias is not None else {})
    old = {name: graph.tensor(name).detach().clone() for name in change}
    before = None if never_worse else layer.distance(batches, wanted)
    for step in STEPS:
        new = {name: old[name] + step * value.to(old[name].dtype) for name, value in change.items()}
        for name, value in new.items():
            require_finite(value, f"refitted {name!r}")
        write(graph, new)
        if before is None or layer.distance(batches, wanted) <= before:
            return residual
    write(graph, old)
    return residual


def _embed(outputs: Tensor, labels: Tensor, task: Task, embedding: str, margin: float) -> Tensor:
    require_finite(outputs, "the network's output on this input")
    return task.embed(outputs, labels, embedding, margin)


def write(graph: Graph, parameters: Mapping[str, Tensor]) -> None:
    """Copies values into the model's parameters of those names."""
    with torch.no_grad():
        for name, value in parameters.items():
            graph.tensor(name).copy_(value)
