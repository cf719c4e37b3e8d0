"""The paper's conversion: batch norm and scalar multipliers folded into the convolutions in front of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from revprop.affine import given
from revprop.families import BY_COLUMNS, CONVOLUTIONS, TRANSPOSED
from revprop.graph import Example, Graph, trace

__all__ = ["fold"]

aten = torch.ops.aten


def fold(model: nn.Module, example: Example) -> nn.Module:
    """A copy of a trained model with fewer operators and the same outputs in eval mode (AdjointBackMapV2 Eq. 7, Table D.4).

    ``w' = gamma w / sqrt(var + eps)``, ``b' = beta + gamma (b - mu) / sqrt(var + eps)`` for every batch norm (running
    statistics) right behind a convolution or fully connected layer, which becomes ``nn.Identity``; a multiplier of one number
    right behind one (Fixup) goes into its weights and becomes 1. What is called more than once, or used by others, too, stays.

    Args:
        model: a module; it is left as it is. example: inputs to trace it with.

    Raises:
        ValueError: as :func:`revprop.trace`. RuntimeError: the copy's outputs differ from the model's by more than 1e-4 of
            their largest.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> folded = fold(net, torch.zeros(1, 1, 5, 5))
    >>> folded[1]
    Identity()
    """
    graph = trace(model, example)
    made = copy.deepcopy(model).eval()
    for node in graph.nodes:
        if node.target in CONVOLUTIONS or node.target in BY_COLUMNS:
            _fold_behind(graph, made, node)
    inputs = graph.check_input(example)
    with torch.no_grad():
        own = graph(inputs)
        found = trace(made, inputs)(inputs)
    if not torch.allclose(own, found, rtol=1e-4, atol=1e-4 * float(own.abs().max()) if own.numel() else 0.0):
        raise RuntimeError("the folded copy gives other outputs than the model; please report this")
    return made


def _fold_behind(graph: Graph, made: nn.Module, node: fx.Node) -> None:
    """Folds what follows one convolution, as long as something can be."""
    names = {n: graph.constants.get(a) for n, a in given(node).items() if isinstance(a, fx.Node)}
    weight = names.get("weight")
    if weight is None or not _only(graph, node, weight):
        return
    path, _, leaf = weight.rpartition(".")
    module: Any = made.get_submodule(path)
    if leaf != "weight" or not hasattr(module, "bias"):
        return
    last = node
    while len(last.users) == 1:
        last = next(iter(last.users))
        step = _normalisation(graph, made, last) or _multiplier(graph, made, last)
        if step is None:
            return
        scale, shift = step
        dim = 1 if node.target in TRANSPOSED else 0
        if dim and module.weight.shape[1] != len(scale) and len(scale) > 1:  # grouped and transposed
            return
        shape = [-1 if i == dim else 1 for i in range(module.weight.dim())]
        with torch.no_grad():
            module.weight.mul_(scale.view(shape) if len(scale) > 1 else scale)
            if module.bias is not None:
                shift = shift + module.bias * scale
            if module.bias is not None or bool(shift.any()):
                out = graph.shape(node)[-1 if node.target is aten.linear.default else 0]
                module.bias = nn.Parameter(shift.expand(out).clone())


def _normalisation(graph: Graph, made: nn.Module, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """The scale and shift of a batch norm, which is taken out of the copy."""
    if node.target is not aten.batch_norm.default:
        return None
    arguments = given(node)
    mean = arguments.get("running_mean")
    name = graph.constants.get(mean) if isinstance(mean, fx.Node) else None
    if name is None or not _only(graph, node, name):
        return None
    path = name.rpartition(".")[0]
    norm = made.get_submodule(path)
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None or norm.running_var is None:
        return None
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean * scale
        shift = shift if norm.bias is None else shift + norm.bias
    made.set_submodule(path, nn.Identity())
    return scale.detach(), shift.detach()


def _multiplier(graph: Graph, made: nn.Module, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """The one number of a multiplier, which becomes 1 in the copy."""
    if node.target is not aten.mul.Tensor:
        return None
    owned = dict(made.named_parameters())
    constants = [a for a in node.all_input_nodes if a in graph.constants]
    name = graph.constants[constants[0]] if len(constants) == 1 else ""
    if name not in owned or not _only(graph, node, name):
        return None
    value = owned[name]
    if value.numel() != 1:
        return None
    scale = value.detach().clone().view(1)
    with torch.no_grad():
        value.fill_(1.0)
    return scale, torch.zeros_like(scale)


def _only(graph: Graph, node: fx.Node, name: str) -> bool:
    """Whether a parameter or buffer is read by this operator alone."""
    readers = {user for constant, found in graph.constants.items() if found == name for user in constant.users}
    return readers == {node}
