"""What a network returns, taken apart: which tensors there are, and the one (or several) to be run backwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revprop.errors import ExportError, near_matches
from revprop.inputs import Arguments

__all__ = ["Call", "Choice", "Path", "named", "paths_of"]

Path = tuple[int | str, ...]
Choice = int | str | Path | Sequence[int | str | Path] | None
SHOWN = 20  # outputs listed in an error


def paths_of(choice: Choice) -> tuple[Path, ...] | None:
    """The paths that ``output=`` names: an index, a name or a path is one; a list is several; None is none.

    >>> paths_of("logits"), paths_of((0, 1)), paths_of(["logits", (0, 1)])
    ((('logits',),), ((0, 1),), (('logits',), (0, 1)))
    """
    if choice is None:
        return None
    several = choice if isinstance(choice, list) else [choice]
    paths = tuple(tuple(one) if isinstance(one, tuple) else (one,) for one in several)
    if not paths or not all(path and all(isinstance(key, int | str) for key in path) for path in paths):
        raise ValueError(
            f"output: expected an index, a name, a path such as ('logits',) or (0, 1), or a list of these; given {choice!r}"
        )
    return paths


def named(path: Path) -> str:
    """A path as ``output=`` takes it.

    >>> named(("logits",)), named((0, 1))
    ("'logits'", '(0, 1)')
    """
    return repr(path[0]) if len(path) == 1 else repr(path)


class Call(nn.Module):
    """A model called as the example says, returning the chosen tensors alone.

    Of several tensors the first result is the one that is run backwards, (n, total): they flattened and concatenated along
    dimension 1; they themselves follow.
    """

    def __init__(self, model: nn.Module, arguments: Arguments, paths: tuple[Path, ...] | None) -> None:
        super().__init__()
        self.training = False
        self.model = model
        self.arguments = arguments
        self.chosen = _Chosen(paths)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.arguments.call(values)
        result = self.model(*args, **kwargs)
        if not torch.compiler.is_dynamo_compiling():  # which follows no more than the steps that a first call has found
            self.chosen.find(_leaves(result, str(values[0].shape[0])), type(self.model).__name__)
        chosen = tuple(_follow(result, steps) for steps in self.chosen.steps)
        return chosen if len(chosen) == 1 else (torch.cat([_flat(value) for value in chosen], 1), *chosen)


@dataclasses.dataclass
class _Chosen:
    """The paths chosen, and the steps that lead there; filled in at each call, for export restores plain attributes."""

    paths: tuple[Path, ...] | None
    steps: tuple[tuple[_Step, ...], ...] = ()

    def find(self, outputs: _Outputs, model: str) -> None:
        if self.paths is None:
            self.paths = (outputs.only(model),)
        found = [outputs.at(path) for path in self.paths]
        self.steps = tuple(steps for _, steps in found)
        for path, (value, _) in zip(self.paths, found, strict=True):
            shape = outputs.shape(value)
            if len(found) > 1 and not shape.startswith("(n"):
                raise ExportError(
                    f"output={named(path)}: only outputs with the batch first can be concatenated, one row per sample; its shape "
                    f"is {shape}"
                )


_Step = tuple[bool, int | str]  # whether an item (or an attribute), and its key


def _follow(value: Any, steps: tuple[_Step, ...]) -> Any:
    for item, key in steps:
        value = value[key] if item else getattr(value, str(key))
    return value


def _flat(value: Tensor) -> Tensor:
    return value.flatten(1) if value.dim() > 2 else value[:, None] if value.dim() == 1 else value


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """What a model returned: the value, and every tensor in it by its path."""

    value: Any
    tensors: tuple[tuple[Path, Tensor], ...]
    batch: str

    def only(self, model: str) -> Path:
        """The path of the one floating point tensor; single numbers (losses) do not count.

        Raises:
            ExportError: there are none, or several.
        """
        floating = [path for path, tensor in self.tensors if tensor.is_floating_point() and tensor.dim()]
        if len(floating) == 1:
            return floating[0]
        if floating:
            raise ExportError(
                f"{model} returns {len(floating)} tensors that could be run backwards; choose with output=, e.g. "
                f"revprop.trace(model, example, output={named(floating[0])}), and pass the graph on, or "
                f"output=[{', '.join(named(path) for path in floating[:2])}] for several at once:\n{self}"
            )
        if self.tensors:
            raise ExportError(
                f"{model} returns no floating point tensor: nothing of it can move:\n{self}\n"
                "Return what the indices or flags are computed from (logits, scores)"
            )
        raise ExportError(
            f"{model} returns {_what(self.value)} in eval mode; expected a tensor, or a tuple, list, dict or object that "
            "holds tensors: let forward return the tensor to be run backwards"
        )

    def at(self, path: Path) -> tuple[Tensor, tuple[_Step, ...]]:
        """The tensor at a path, and the steps that lead there.

        Raises:
            ExportError: there is nothing, or no floating point tensor.
        """
        value, steps = self.value, []
        for depth, key in enumerate(path):
            if isinstance(value, Tensor) and path == (0,):
                break  # the one tensor, as if it came in a tuple
            entries = _entries(value)
            keys = [k for k, v in entries if v is not None]
            position = key if isinstance(key, int) and key not in dict(entries) else None
            if position is not None and -len(keys) <= position < len(keys):
                key = keys[position]  # an index counts what is there
            if key not in keys:
                where = f"output={named(path)}" + (f", in {named(path[:depth])}" if depth else "")
                missing = near_matches(str(key), [str(k) for k in keys], "output") if keys else f"no output {key!r}"
                missing = f"{key!r} is None in this call" if key in dict(entries) else missing
                raise ExportError(f"{where}: {missing}; there is:\n{self}")
            steps.append((isinstance(value, Mapping | list | tuple) and not hasattr(value, "_fields"), key))
            value = dict(entries)[key]
        if not isinstance(value, Tensor):
            raise ExportError(f"output={named(path)} is {_what(value)}; choose one tensor:\n{self}")
        if not value.is_floating_point():
            raise ExportError(
                f"output={named(path)} holds {value.dtype}: nothing of it can move; choose a floating point tensor:\n{self}"
            )
        return value, tuple(steps)

    def shape(self, tensor: Tensor) -> str:
        """A shape with n for the batch."""
        sizes = [
            "n" if str(d) == self.batch and (i == 0 or isinstance(d, torch.SymInt)) else str(d)
            for i, d in enumerate(tensor.shape)
        ]
        return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"

    def __str__(self) -> str:
        lines = [
            f"  output={named(path)}: {self.shape(tensor)} {str(tensor.dtype).removeprefix('torch.')}"
            for path, tensor in self.tensors[:SHOWN]
        ]
        more = len(self.tensors) - SHOWN
        return "\n".join([*lines, *([f"  and {more} more"] if more > 0 else [])])


def _leaves(value: Any, batch: str) -> _Outputs:
    return _Outputs(value, tuple(_walk(value, (), set())), batch)


def _walk(value: Any, path: Path, seen: set[int]) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(value, Tensor):
        yield path or (0,), value
        return
    if id(value) in seen:  # objects may refer to each other
        return
    for key, entry in _entries(value):
        yield from _walk(entry, (*path, key), seen | {id(value)})


def _entries(value: Any) -> list[tuple[int | str, Any]]:
    """What a structure holds, by key: items, fields or attributes."""
    if isinstance(value, Mapping):
        return [(key, entry) for key, entry in value.items() if isinstance(key, int | str)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, Tensor | str | bytes | nn.Module | type) or callable(value):
        return []
    return [(key, entry) for key, entry in getattr(value, "__dict__", {}).items() if not key.startswith("_")]


def _what(value: Any) -> str:
    if value is None:
        return "nothing (None)"
    kind = type(value).__name__
    held = [entry for _, entry in _entries(value) if entry is not None]
    return f"a {kind} of {len(held)}" if held else f"a {kind} without a tensor"
