"""A network's inputs as people have them: one tensor, a tuple of tensors, or a dict of tensors by argument name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from revprop.errors import near_matches

__all__ = ["Arguments", "Example", "arguments_of", "count", "in_order", "rows"]

Example = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
EXPECTED = (
    "example: expected a tensor (n, ...), a tuple of such tensors, or a dict of them by argument name, batch first"
)


@dataclass(frozen=True)
class Arguments:
    """A call of ``forward``: the argument names, the tensors in that order, and how many are passed by position."""

    names: tuple[str, ...]
    values: tuple[Tensor, ...]
    positional: int

    def call(self, values: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Other values for the same call: what to pass by position and what by name."""
        return tuple(values[: self.positional]), dict(
            zip(self.names[self.positional :], values[self.positional :], strict=True)
        )

    def samples(self, number: int) -> Arguments:
        """The same call with so many samples of the example, repeated where it has fewer."""
        return replace(self, values=tuple(_samples(v.detach(), number) for v in self.values))

    def unbatched(self) -> Arguments:
        """The same call for an example that lacks its batch dimension: as one sample of two."""
        return replace(self, values=tuple(_samples(v.detach()[None], 2) for v in self.values))


def arguments_of(model: nn.Module, example: Example) -> Arguments:
    """The call of ``model.forward`` that an example stands for.

    Raises:
        ValueError: no tensors, no batch, several batch sizes, or arguments that ``forward`` does not take.

    >>> arguments_of(nn.Linear(3, 2), torch.zeros(1, 3)).names
    ('input',)
    """
    by_name = isinstance(example, Mapping)
    given: dict[Any, Any] = dict(example) if isinstance(example, Mapping) else dict(enumerate(_sequence(example)))
    if not given:
        raise ValueError(EXPECTED)
    for key, value in given.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            at = f"[{key!r}]" if by_name or len(given) > 1 else ""
            raise ValueError(
                f"{EXPECTED}; example{at} is {what}. What is no tensor with a batch (flags, None, numbers) is fixed beforehand: "
                "leave it out where it has a default, or wrap the model in a module that passes it"
            )
    sizes = {key: len(value) for key, value in given.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"example: expected inputs of one batch size; given: {', '.join(f'{k!r}: {n}' for k, n in sizes.items())}. "
            "What is the same for all samples is no input: make it a buffer, or expand it to the batch"
        )
    values = tuple(given.values())
    names = tuple(given) if by_name else _names(model, values)
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # compiled code has none
        return Arguments(names, values, 0 if by_name else len(values))
    try:
        signature.bind(**given) if by_name else signature.bind(*values)
    except TypeError as error:
        known = [name for name, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        unknown = [name for name in names if name not in known] if by_name else []
        hint = f" ({near_matches(unknown[0], known, 'argument')})" if unknown and known else ""
        raise ValueError(
            f"example: {type(model).__name__}.forward{signature} cannot be called with it: {error}{hint}. Give the arguments as a "
            "tuple in their order, or as a dict by name"
        ) from error
    return Arguments(names, values, 0 if by_name else len(values))


def in_order(x: Example, names: Sequence[str]) -> tuple[Tensor, ...]:
    """The tensors of an input, in the order of these argument names.

    Raises:
        ValueError: another number of tensors; missing or unknown names, with the near matches; something that is no tensor.

    >>> [len(v) for v in in_order({"b": torch.zeros(2), "a": torch.zeros(3)}, ["a", "b"])]
    [3, 2]
    """
    if isinstance(x, Mapping):
        unknown = [str(key) for key in x if key not in names]
        if unknown:
            raise ValueError(f"{near_matches(unknown[0], names, 'input')}; the model was traced with {_list(names)}")
        missing = [name for name in names if name not in x]
        if missing:
            raise ValueError(f"missing {_list(missing)}: the model was traced with the inputs {_list(names)}")
        values = tuple(x[name] for name in names)
    else:
        values = _sequence(x)
        if len(values) != len(names):
            raise ValueError(
                f"the model was traced with {len(names)} input tensors ({_list(names)}); {len(values)} were given"
            )
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor):
            raise ValueError(f"input {name!r}: expected a tensor; given {type(value).__name__}")
    return values


def count(x: Example) -> int:
    """How many samples an input holds.

    Raises:
        ValueError: something that is no tensor, or tensors of several lengths.

    >>> count({"ids": torch.zeros(5, 3), "mask": torch.zeros(5, 3)})
    5
    """
    values = tuple(x.values()) if isinstance(x, Mapping) else _sequence(x)
    if not values or not all(isinstance(value, Tensor) and value.dim() for value in values):
        raise ValueError("expected inputs as a tensor, a tuple of tensors or a dict of them, the samples first")
    lengths = {len(value) for value in values}
    if len(lengths) > 1:
        raise ValueError(f"expected inputs of one batch size; given: {', '.join(str(len(v)) for v in values)}")
    return lengths.pop()


def rows(x: Example, index: slice | Tensor) -> Example:
    """Some samples of an input, in the form that it has.

    >>> rows((torch.arange(4), torch.ones(4, 2)), slice(1, 3))[0]
    tensor([1, 2])
    """
    if isinstance(x, Mapping):
        return {name: _rows(value, index) for name, value in x.items()}
    return tuple(_rows(value, index) for value in x) if isinstance(x, tuple | list) else _rows(x, index)


def _rows(value: Tensor, index: slice | Tensor) -> Tensor:
    return value[index.to(value.device) if isinstance(index, Tensor) else index]


def _sequence(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, tuple | list) else (x,)


def _samples(value: Tensor, number: int) -> Tensor:
    if not len(value):
        return value.new_zeros(number, *value.shape[1:])
    whole = value if len(value) >= number else torch.cat([value] * -(-number // len(value)))
    return whole[:number].clone()


def _names(model: nn.Module, values: Sequence[Tensor]) -> tuple[str, ...]:
    """The arguments' names as ``forward`` gives them; several of one ``*args`` are numbered."""
    numbered = tuple(f"input_{i}" for i in range(len(values)))
    try:
        bound = inspect.signature(model.forward).bind(*values)
    except (TypeError, ValueError):
        return numbered
    found: list[str] = []
    for name, value in bound.arguments.items():
        found += [f"{name}_{i}" for i in range(len(value))] if isinstance(value, tuple) else [name]
    return tuple(found) if len(found) == len(values) else numbered


def _list(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
