"""``torch.export`` as the tracer uses it: eval mode, functional, semantic operators, the model left as it was."""

from __future__ import annotations

import copy
import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from revprop import failures
from revprop.errors import ExportError
from revprop.inputs import Arguments
from revprop.outputs import Call

__all__ = ["canonicalise", "export", "export_now", "run", "run_example", "verify"]

aten = torch.ops.aten
MANY = 256  # samples: a larger example is not run whole to explain an error


def export(call: Call, arguments: Arguments) -> torch.export.ExportedProgram:
    """Exports a call of a model in eval mode with a free batch size, decomposed no further than to functional operators.

    Args:
        call: the model and which of its outputs are wanted. arguments: the example, two samples of which are used.

    Raises:
        ExportError: what in the model stops the export, with its line and the usual rewrite.
    """
    model = call.model
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(value, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise ExportError(
                f"parameter {name!r} has no shape yet (a lazy module): run model(example) once, then trace"
            )
    values = arguments.samples(2).values  # export specialises on sizes 0 and 1
    try:
        return export_now(call, values)
    except ExportError:
        raise
    except Exception as error:  # whatever export raises is explained in the user's terms
        failed = error
    run_example(call, arguments, 2)
    if not failures.is_of_batch(failed):
        raise ExportError(failures.explain(model, failed)) from failed
    try:  # torch's other front end reads len(x) and math.sqrt(n) in the source, where Python itself makes numbers of them
        return export_now(call, values, strict=True)
    except Exception:  # the first failure is the one to be explained
        raise ExportError(_batch(call, values, failed)) from failed


def export_now(call: Call, values: tuple[Tensor, ...], strict: bool = False) -> torch.export.ExportedProgram:
    """Exports with a free batch size, or raises what torch raises."""
    batch = torch.export.Dim("batch", min=1)
    with _untouched(call.model), _quiet(), torch.no_grad():
        program = torch.export.export(call, values, dynamic_shapes=(tuple({0: batch} for _ in values),), strict=strict)
        return program.run_decompositions(decomp_table={})


def run(call: Call, values: tuple[Tensor, ...], times: int = 1, parameters: bool = True) -> list[tuple[Tensor, ...]]:
    """Runs the model itself in eval mode, and leaves it, the values and the random numbers as they were.

    Args:
        times: what one call writes, the next one reads; afterwards all is undone. parameters: whether forward may write to
            parameters, too, so that they have to be copied.
    """
    state = [*call.named_buffers(), *(call.named_parameters() if parameters else ())]
    copies = {name: value.detach().clone() for name, value in state}
    devices = {value.device for value in values if value.is_cuda}
    with _untouched(call.model), _quiet(), torch.no_grad(), torch.random.fork_rng(devices):
        return [
            torch.func.functional_call(call, copies, tuple(value.clone() for value in values)) for _ in range(times)
        ]


def verify(call: Call, arguments: Arguments, traced: Callable[[tuple[Tensor, ...]], Tensor]) -> None:
    """Whether a traced network gives what the model itself gives on three samples of the example (two were traced), twice.

    Raises:
        ExportError: the model does not run, or gives something else than was traced, or something else the second time.
    """
    first, second = (results[0] for results in run_example(call, arguments, 3, times=2, parameters=False))
    if first.is_meta:  # shapes without values: nothing to compare
        return
    with torch.no_grad():
        own = traced(arguments.samples(3).values)
    for other, about in ((second, failures.on_state), (own, failures.on_other_output)):
        if not _agree(first, other):
            raise ExportError(about(call.model))


def _agree(a: Tensor, b: Tensor) -> bool:
    """Up to rounding: kernels may differ, the network not."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    scale = float(a.nan_to_num(0, 0, 0).abs().max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-2, atol=1e-2 * scale, equal_nan=True)


def run_example(
    call: Call, arguments: Arguments, samples: int, times: int = 1, parameters: bool = True
) -> list[tuple[Tensor, ...]]:
    """Runs the model itself on so many samples of the example.

    Raises:
        ExportError: it fails: the line, whether the batch dimension is missing or the batch size fixed, and what to do.
    """

    def rows(values: tuple[Tensor, ...]) -> int | None:
        try:
            return len(run(call, values)[0][0])
        except Exception:  # any error of the user's code
            return None

    try:
        return run(call, arguments.samples(samples).values, times, parameters)
    except ExportError:
        raise
    except Exception as error:  # any error of the user's code
        shapes = ", ".join(
            f"{name}: {tuple(v.shape)}" for name, v in zip(arguments.names, arguments.values, strict=True)
        )
        whole = arguments.values if len(arguments.values[0]) <= MANY else ()
        alone, unbatched = bool(whole) and rows(whole) is not None, rows(arguments.unbatched().values) == 2
        text = failures.on_example(call.model, error, f"({shapes})", samples, unbatched, alone)
        raise ExportError(text) from error


def _batch(call: Call, values: tuple[Tensor, ...], error: Exception) -> str:
    """Why the batch size does not stay free: the export again, listening to what torch assumes of it where."""
    heard = _Listener(call.model)
    with heard.listening(), suppress(Exception):  # the one to be explained
        export_now(call, values)
    return failures.on_batch(call.model, error, heard.assumption, heard.place)


class _Listener(logging.Handler):
    """Listens to what torch assumes of symbolic sizes, and sees from which line of the user's code."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.assumption, self.place, self.settled = "", failures.Place(), False

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        assumed = re.match(r"eval (?!\[guard suppressed\])(.*?) \[guard added\]", text)
        if assumed and not self.settled:
            self.assumption = re.sub(r"\bs\d+\b", "n", assumed[1])
            self.place = failures.of_stack(self.model)
        self.settled |= text.startswith("set_replacement")  # the assumption before it fixes the size

    @contextmanager
    def listening(self) -> Iterator[None]:
        logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
        before = logger.handlers, logger.propagate
        logger.handlers, logger.propagate = [self], False
        logger.isEnabledFor = lambda level: level >= logging.INFO  # type: ignore[method-assign]  # while all others are quiet
        try:
            yield
        finally:
            del logger.isEnabledFor
            logger.handlers, logger.propagate = before


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
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module's flags, attributes, lists and dicts and every gradient are as they were."""
    modules = list(model.modules())
    flags = [m.training for m in modules]
    attributes = [dict(m.__dict__) for m in modules]
    held = [v for own in attributes for v in own.values() if isinstance(v, list | dict | set)]
    contents = [copy.copy(v) for v in held]
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, own, training in zip(modules, attributes, flags, strict=True):
            _refill(module.__dict__, own)
            module.training = training
        for container, content in zip(held, contents, strict=True):
            _refill(container, content)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        if len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
            container[:] = content
    elif isinstance(container, dict):
        if list(container) != list(content) or any(container[k] is not content[k] for k in content):
            container.clear()
            container.update(content)
    elif container != content:
        container.clear()
        container.update(content)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's own warnings and pages of logs back: what matters of them is said in :class:`ExportError`."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # torch prints the graph so far, and a print in forward would show symbols
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
