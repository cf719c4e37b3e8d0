"""An exported program put in order: the user's names again, operators in one spelling, and what no reverse could follow refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from revprop.errors import ExportError
from revprop.export import canonicalise
from revprop.failures import find_line, of_node
from revprop.outputs import Call, named

__all__ = ["Program", "program_of"]


@dataclass(frozen=True)
class Program:
    """The parts of a graph: inputs in the arguments' order, parameters and buffers by name, traced tensors, and the output."""

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    constants: dict[fx.Node, str]
    tensors: dict[str, Tensor]
    output: fx.Node


def program_of(call: Call, exported: torch.export.ExportedProgram) -> Program:
    """The program of a call, with names and module paths as the model has them.

    Raises:
        ExportError: forward writes to tensors or draws random numbers, or the output has no batch in front.
    """
    model, signature, graph = call.model, exported.graph_signature, exported.graph
    known = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    inputs = tuple(placeholders[name] for name in signature.user_inputs if isinstance(name, str))
    for name, node in zip(call.arguments.names, inputs, strict=True):
        node.meta["argument"] = name
    _name_modules(graph)
    _refuse_writes(call, signature, {n.name: n for n in graph.nodes})
    owned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    owned |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    tensors = {_within(name): value for name, value in exported.constants.items() if isinstance(value, Tensor)}
    # a shared parameter goes by the name that model.named_parameters() gives it
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    shared = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    names = {node: _within(known[name]) for name, node in placeholders.items() if name in known}
    for node in list(graph.nodes):
        canonicalise(graph, node)
    end = next(n for n in graph.nodes if n.op == "output")
    results = end.args[0]
    parts = results[1:] or results
    wanted = _ancestors(results[0])
    _refuse_nested(wanted)
    if not any(node in inputs for node in wanted):
        raise ExportError("the model's output does not depend on the input: there is nothing to run backwards")
    paths = call.chosen.paths or ()
    for path, part in zip(paths, parts, strict=True):
        _refuse_moved_batch(f"output={named(path)}" if len(paths) > 1 else "the model's output", part, inputs[0])
    results[0].meta["outputs"] = tuple(
        (path, tuple(int(d) for d in part.meta["val"].shape[1:])) for path, part in zip(paths, parts, strict=True)
    )
    end.args = ((results[0],),)
    graph.eliminate_dead_code()
    graph.lint()
    _refuse_random(wanted)
    _refuse_numbers(wanted, set(inputs))
    _count_calls(graph, wanted)
    return Program(
        graph,
        inputs,
        {node: shared.get(name, name) for node, name in names.items()},
        {name: value for name, value in tensors.items() if name not in owned},
        results[0],
    )


def _within(name: str) -> str:
    """A name or path in the model, of one in the call of it."""
    return name.removeprefix("model").removeprefix(".") if name == "model" or name.startswith("model.") else name


def _name_modules(graph: fx.Graph) -> None:
    """Module paths as the model has them; the model itself, and torch's entries for code of no module, are left out."""
    for node in graph.nodes:
        stack = (node.meta.get("nn_module_stack") or {}).items()
        node.meta["nn_module_stack"] = {
            key: (_within(path), kind)
            for key, (path, kind) in stack
            if _within(path) and not path.startswith("_empty_nn_module_stack")
        }


def _count_calls(graph: fx.Graph, wanted: list[fx.Node]) -> None:
    """Calls of a module are counted from the first that the output depends on: path@0, path@1, ..."""

    def calls(node: fx.Node) -> Iterator[tuple[str, int, Any]]:
        for key, (path, kind) in node.meta["nn_module_stack"].items():
            number = key.rpartition("@")[2] if "@" in key else ""
            yield path, int(number) if number.isdigit() else 0, kind

    there: dict[str, set[int]] = {}
    for node in wanted:
        for path, number, _ in calls(node):
            there.setdefault(path, set()).add(number)
    for node in graph.nodes:
        node.meta["nn_module_stack"] = {
            f"{path}@{sum(n < number for n in there.get(path, ()))}": (path, kind) for path, number, kind in calls(node)
        }


def _refuse_writes(call: Call, signature: Any, nodes: dict[str, fx.Node]) -> None:
    kinds = torch.export.graph_signature.OutputKind
    arguments = dict(zip(signature.user_inputs, call.arguments.names, strict=True))
    written = {
        arguments.get(spec.target, _within(str(spec.target))): nodes[spec.arg.name]
        for spec in signature.output_specs
        if spec.kind not in (kinds.USER_OUTPUT, kinds.LOSS_OUTPUT)
    }
    if written:
        place = of_node(next(iter(written.values())))
        if not place.file:
            place = find_line(call.model, "|".join(rf"\b{re.escape(name.rpartition('.')[2])}\b" for name in written))
        raise ExportError(
            f"the model writes to {', '.join(map(repr, written))} during forward in eval mode{place}; a reversed network "
            "must not change state: compute a new tensor instead, and keep statistics where self.training is true"
        )


def _refuse_moved_batch(what: str, node: fx.Node, first: fx.Node) -> None:
    """The output is one row per sample: its first dimension is the batch, and the others are numbers."""
    sizes, batch = node.meta["val"].shape, str(first.meta["val"].shape[0])
    shown = f"({', '.join(str(d).replace(batch, 'n') for d in sizes)}{',' if len(sizes) == 1 else ''})"
    if not sizes:
        raise ExportError(
            f"{what} is one number, {shown}, with no batch dimension{of_node(node)}: return a value per sample, not a loss or "
            "a mean over the batch"
        )
    if any(re.search(r"\bu\d+\b", str(d)) for d in sizes):
        raise ExportError(
            f"the shape of {what} depends on the values of tensors{of_node(node)}: keep all samples and positions "
            "(torch.where, a product with the mask) instead of selecting some (x[mask], nonzero, unique)"
        )
    if str(sizes[0]) != batch and any(str(d) == batch for d in sizes):
        raise ExportError(
            f"the batch is not the first dimension of {what}, {shown}: permute it there at the end of forward"
        )
    if any(isinstance(d, torch.SymInt) for d in sizes[1:]):
        raise ExportError(
            f"{what} compares the samples of a batch with each other, its shape is {shown}{of_node(node)}: return what is "
            "compared, one row per sample"
        )
    if str(sizes[0]) != batch:
        raise ExportError(
            f"the first dimension of {what} is not the batch, its shape is {shown}{of_node(node)}: return one row per sample"
        )


def _ancestors(node: fx.Node) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        one = stack.pop()
        if one not in found:
            found[one] = None
            stack.extend(one.all_input_nodes)
    return list(found)


def _refuse_nested(nodes: list[fx.Node]) -> None:
    """Operators that hold a program of their own: torch.cond, while_loop, scan, flex_attention."""
    for node in nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise ExportError(
                f"torch.{node.target.name()} holds a program of its own{of_node(node)}, which no reverse looks into: write "
                "torch.where(condition, a, b) instead of torch.cond, and loops that unroll"
            )


def _refuse_random(nodes: list[fx.Node]) -> None:
    for node in nodes:
        if _draws(node):
            raise ExportError(
                f"the model draws random numbers in eval mode ({str(node.target).removeprefix('aten.')}){of_node(node)}: no "
                "two runs agree. Guard it with `if self.training:`, use nn.Dropout instead of F.dropout(x), or make the "
                "random tensor an input"
            )


def _refuse_numbers(nodes: list[fx.Node], inputs: set[fx.Node]) -> None:
    """Python numbers made of values that depend on the input: no change of these values can be followed."""
    for node in nodes:
        if node.target in _NUMBERS and inputs & set(_ancestors(node)):
            raise ExportError(
                f"a Python number is made from the value of a tensor{of_node(node)}: keep it a tensor, multiply by the tensor "
                "itself, index by torch.gather or a one-hot mask"
            )


_NUMBERS = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


def _draws(node: fx.Node) -> bool:
    """Whether an operator draws random numbers as it is called here; attention and recurrent layers may not."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = {**{a.name: v for a, v in zip(target._schema.arguments, node.args, strict=False)}, **node.kwargs}
    for argument in target._schema.arguments:
        if argument.name in ("dropout_p", "train", "training"):
            return bool(given.get(argument.name, argument.default_value))
    return True
