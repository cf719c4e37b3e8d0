"""A traced network run as its model runs now: live parameters, and batch norm by the batch where its module is in train mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from revprop.affine import given
from revprop.errors import ExportError
from revprop.graph import Graph
from revprop.inputs import arguments_of
from revprop.outputs import Call
from revprop.rules import bind

__all__ = [
    "BATCH_NORMS",
    "Operation",
    "differs_from_model",
    "operation",
    "operations",
    "outside_inference",
    "run_operations",
]

aten = torch.ops.aten
BATCH_NORMS = frozenset({aten.batch_norm.default, aten.instance_norm.default})


@dataclass(frozen=True)
class Operation:
    """One operator as a function of the values of others.

    Attributes:
        name: of its value. sources: the names of the values it takes, in order.
        run: (keep, the values) -> its value; keep: whether running statistics are updated, as the model's own pass does it.
    """

    name: str
    sources: tuple[str, ...]
    run: Callable[..., Tensor]


def operations(graph: Graph, wanted: Iterable[fx.Node]) -> tuple[Operation, ...]:
    """The operators that compute some values from the inputs, in order; one with several results is part of each of these."""
    needed = graph.ancestors(wanted)
    return tuple(
        operation(graph, node)
        for node in sorted(graph.recorded, key=graph.order.__getitem__)
        if node in needed and isinstance(node.meta.get("val"), Tensor)
    )


def operation(graph: Graph, node: fx.Node) -> Operation:
    """One operator of a graph."""
    call = bind(graph, node, graph.active)
    if node.target in BATCH_NORMS:
        return Operation(node.name, tuple(n.name for n in call.values), _batch_norm(graph, node))
    sources = (
        call.values if node in graph.active else graph.inputs
    )  # a constant of the batch's size is told it by the inputs
    segment = graph.segment(sources, (node,))
    return Operation(
        node.name,
        tuple(n.name for n in sources),
        lambda keep, *values: segment(*values)[0],
    )


def run_operations(found: Sequence[Operation], values: Mapping[str, Tensor], keep: bool = False) -> dict[str, Tensor]:
    """The values of some operators, given those they start from, by name."""
    known = dict(values)
    for step in found:
        known[step.name] = step.run(keep, *[known[name] for name in step.sources])
    return known


def _batch_norm(graph: Graph, node: fx.Node) -> Callable[..., Tensor]:
    """By the running statistics in eval mode, by the batch's in train mode: what the module that called it is in now."""
    arguments = given(node)
    module = graph.model.get_submodule(graph.path(node).partition("@")[0])
    names = {
        name: graph.constants[value]
        for name, value in arguments.items()
        if isinstance(value, fx.Node) and value in graph.constants
    }
    segment = graph.segment(bind(graph, node, graph.active).values, (node,))
    update = _torch_forward(module)
    eps, momentum = float(arguments["eps"]), float(arguments["momentum"])

    def run(keep: bool, x: Tensor, *held: Tensor) -> Tensor:
        if not module.training:
            return segment(x, *held)[0]
        if keep and update is not None:
            return update(x)
        read = {name: graph.tensor(names[name]) for name in names}
        mean, variance = (read.get("running_mean"), read.get("running_var")) if keep else (None, None)
        if node.target is aten.instance_norm.default:
            return F.instance_norm(x, mean, variance, read.get("weight"), read.get("bias"), True, momentum, eps)
        return F.batch_norm(x, mean, variance, read.get("weight"), read.get("bias"), True, momentum, eps)

    return run


def _torch_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """torch's own normalisation by the batch, which updates running statistics; None where the module is none of torch's.

    A class derived from one of torch's may do more in its forward, such as an activation: that is another operator.
    """
    bases = (nn.SyncBatchNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    base: Any = next((base for base in bases if isinstance(module, base)), None)
    if base is None or type(module).forward is base.forward:
        return None if base is None else module
    return partial(base.forward, module)


def differs_from_model(graph: Graph, inputs: Sequence[Tensor]) -> str | None:
    """How the model, in the mode that it is in now, differs from its traced operators on these inputs; None where it does not.

    Of the model's state nothing is changed: it runs on copies of its buffers.
    """
    model, paths = graph.model, tuple(path for path, _ in graph.outputs)
    named = dict(zip(graph.input_names, inputs, strict=True))
    known = inspect.signature(model.forward).parameters
    call = Call(
        model,
        arguments_of(model, named if named.keys() <= known.keys() else tuple(inputs)),
        None if paths == ((0,),) else paths,
    )
    buffers = {f"model.{name}": buffer.clone() for name, buffer in model.named_buffers()}
    values = dict(zip((node.name for node in graph.inputs), inputs, strict=True))
    norms = {name for name, module in model.named_modules() if _torch_forward(module) is not None}
    with torch.no_grad():
        found = run_operations(operations(graph, [graph.output]), values)[graph.output.name]
        try:
            own = torch.func.functional_call(call, buffers, tuple(inputs))[0]
        except ExportError:
            return "the model returns something else than the one tensor that was traced, or than in eval mode"
    scale = float(own.abs().max()) if own.numel() else 1.0
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[0] not in norms and not torch.equal(buffer, buffers[f"model.{name}"]):
            return f"the model writes to its buffer {name}, which the operators that were traced in eval mode do not"
    near = max(1e-3, 8 * torch.finfo(found.dtype).eps)
    if own.shape == found.shape and torch.allclose(own.to(found), found, rtol=near, atol=near * scale):
        return None
    return (
        "the model computes something else than the operators that were traced in eval mode (dropout, stochastic depth)"
    )


def outside_inference(run: Callable[[Any], Any], x: Any) -> Any:
    """Runs a function outside of torch.inference_mode, without gradients: tangents are taken by autograd, which is off in it."""
    with torch.inference_mode(False), torch.no_grad():
        return run(tree_map_only(Tensor, torch.clone, x))
