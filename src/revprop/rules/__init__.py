"""Facts about operators: one file per family, all registered in one place."""

from revprop.rules import activation, conv, linear, merge, norm, pool, shape
from revprop.rules.registry import Call, Fact, Linear, Pointwise, Refusal, Selection, describe, registered, rule

__all__ = [
    "Call",
    "Fact",
    "Linear",
    "Pointwise",
    "Refusal",
    "Selection",
    "activation",
    "conv",
    "describe",
    "linear",
    "merge",
    "norm",
    "pool",
    "registered",
    "rule",
    "shape",
]
