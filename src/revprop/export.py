"""``torch.export`` as the tracer uses it: eval mode, functional, semantic operators; and its failures in plain words."""

from __future__ import annotations

import logging
import operator
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from revprop.errors import ExportError

__all__ = ["canonicalise", "export"]

aten = torch.ops.aten


def export(model: nn.Module, values: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Exports a model in eval mode with a free batch size, decomposed no further than to functional operators.

    The model's training flags and gradients are as before afterwards.

    Raises:
        ExportError: what in the model stops the export, with its line and the usual rewrite.
    """
    batch = torch.export.Dim("batch", min=1)
    with _eval_mode(model), _quiet(), torch.no_grad():
        try:
            program = torch.export.export(model, values, dynamic_shapes=tuple({0: batch} for _ in values), strict=False)
            return program.run_decompositions(decomp_table={})
        except Exception as error:  # whatever export raises is explained in the user's terms
            raise ExportError(_explain_export(model, error)) from error


def canonicalise(graph: fx.Graph, node: fx.Node) -> None:
    """Rewrites operators that return tuples into ones that return the tensor used, so that every value is a tensor; and squeeze."""
    if node.target is aten.squeeze.default:  # a batch of one stays a batch
        x = node.args[0]
        node.target, node.args = aten.squeeze.dims, (x, [i for i, d in enumerate(x.meta["val"].shape) if i and d == 1])  # type: ignore[union-attr]
    if node.op != "call_function" or node.target is not operator.getitem:
        return
    source, index = node.args
    assert isinstance(source, fx.Node)
    target, args = source.target, source.args
    new: tuple[Any, tuple[Any, ...]] | None = None
    if target is aten._native_batch_norm_legit_no_training.default and index == 0:
        x, weight, bias, mean, var, momentum, eps = args
        new = (aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, False))
    elif target in (aten.split.Tensor, aten.split_with_sizes.default) and isinstance(index, int):
        x, sizes = args[0], args[1]
        dim = args[2] if len(args) > 2 else source.kwargs.get("dim", 0)
        start = index * sizes if isinstance(sizes, int) else sum(sizes[:index])  # type: ignore[index,arg-type]
        stop = start + (sizes if isinstance(sizes, int) else sizes[index])  # type: ignore[operator,index]
        new = (aten.slice.Tensor, (x, dim, start, stop))
    elif target is aten.unbind.int:
        dim = args[1] if len(args) > 1 else source.kwargs.get("dim", 0)
        new = (aten.select.int, (args[0], dim, index))
    elif target in _POOL_WITH_INDICES and index == 0:
        new = (_POOL_WITH_INDICES[target], args)
    elif target in _ADAPTIVE_MAX_POOL and index == 0:
        pool, out = _ADAPTIVE_MAX_POOL[target], node.meta["val"].shape
        size = args[0].meta["val"].shape  # type: ignore[union-attr]
        dims = range(len(args[1]), 0, -1)  # type: ignore[arg-type]
        if all(size[-d] % out[-d] == 0 for d in dims):  # the windows tile the image: plain max-pooling
            kernel = [size[-d] // out[-d] for d in dims]
            new = (pool, (args[0], kernel, kernel))
    if new is None:
        return
    with graph.inserting_before(node):
        replacement = graph.call_function(new[0], new[1])
    replacement.meta = dict(node.meta)
    replacement.meta["nn_module_stack"] = source.meta.get("nn_module_stack", {})
    node.replace_all_uses_with(replacement)
    graph.erase_node(node)


_POOL_WITH_INDICES = {
    aten.max_pool1d_with_indices.default: aten.max_pool1d.default,
    aten.max_pool2d_with_indices.default: aten.max_pool2d.default,
    aten.max_pool3d_with_indices.default: aten.max_pool3d.default,
}
_ADAPTIVE_MAX_POOL = {
    aten.adaptive_max_pool1d.default: aten.max_pool1d.default,
    aten.adaptive_max_pool2d.default: aten.max_pool2d.default,
    aten.adaptive_max_pool3d.default: aten.max_pool3d.default,
}


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    flags = [(m, m.training) for m in model.modules()]
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's own warnings and pages of logs back: what matters of them is said in :class:`ExportError`."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _explain_export(model: nn.Module, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    library = torch.__path__[0]
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith(library) and "revprop" not in f.filename.replace("\\", "/").split("/")[-2:-1]
    ]
    where = f" at {frames[-1].filename}, line {frames[-1].lineno}: `{frames[-1].line}`" if frames else ""
    if "data-dependent" in text or "DataDependent" in text or "GuardOnDataDependent" in text:
        why, remedy = (
            "control flow depends on the values of tensors",
            "use torch.where or torch.cond, or move the decision out of forward",
        )
    elif "onstraint" in text and "batch" in text:
        why, remedy = (
            "the batch size is fixed inside forward",
            "write x.view(x.size(0), ...) or x.flatten(1) instead of a number",
        )
    elif isinstance(error, RuntimeError | TypeError | IndexError | ValueError) and frames:
        why, remedy = "forward fails on the example", "check the example's shape and type, and run model(example) first"
    else:
        why, remedy = "torch.export cannot follow this code", "keep to tensor operations inside forward"
    first = text.strip().splitlines()[0]
    return f"{type(model).__name__} cannot be exported: {why}{where}. Usual rewrite: {remedy}. (torch.export said: {first})"
