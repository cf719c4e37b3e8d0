"""The errors a user can meet, each saying what was expected, what was given and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["ExportError", "NonFiniteError", "UnsupportedOperatorError", "near_matches", "require_finite"]


class ExportError(ValueError):
    """A model that ``torch.export`` cannot trace: what stops it, where, and the usual rewrite."""


class UnsupportedOperatorError(NotImplementedError):
    """Operators without a rule, all of them at once, found before any computation.

    ``operators`` holds one ``(operator, module path, shape, remedy)`` per uncovered call.
    """

    def __init__(self, operators: Sequence[tuple[str, str, str, str]]) -> None:
        self.operators = tuple(operators)
        lines = [
            f"  {op} in {path or 'the model itself'}, output {shape}: {remedy}" for op, path, shape, remedy in operators
        ]
        plural = "operator has" if len(lines) == 1 else "operators have"
        super().__init__(
            f"{len(lines)} {plural} no reverse rule for the greedy strategy:\n"
            + "\n".join(lines)
            + '\nUse strategy="global", which needs no rules, or reconstruct only layers behind these operators (to=...).'
        )


class NonFiniteError(ValueError):
    """A tensor that holds NaN or infinity where a number is needed."""


def near_matches(name: str, known: Iterable[str], what: str) -> str:
    """Words an error about an unknown name: the near matches first, else all that is known.

    >>> near_matches("conv9", ["conv1", "fc1"], "layer")
    "unknown layer 'conv9'; did you mean 'conv1'?"
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"unknown {what} {name!r}; did you mean {' or '.join(repr(c) for c in close)}?"
    shown = ", ".join(repr(n) for n in names[:20]) + (", ..." if len(names) > 20 else "")
    return f"unknown {what} {name!r}; known: {shown}"


def require_finite(tensor: Tensor, name: str) -> None:
    """Refuses NaN and infinity at the door, naming the tensor and how many values are bad.

    Raises:
        NonFiniteError: where any value is not finite.

    >>> require_finite(torch.ones(3), "x")
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"{name} holds {bad} of {tensor.numel()} values that are NaN or infinite; "
            "find where they come from (torch.isfinite) before running the network backwards"
        )
