"""Facts about operators: one file per family, all registered in one place."""

from revprop.rules import activation, conv, linear, merge, norm, pool, product, shape
from revprop.rules.registry import (
    Call,
    Fact,
    Linear,
    Nonlinear,
    Pointwise,
    Refusal,
    Selection,
    bind,
    closed,
    describe,
    registered,
    rule,
    searched,
    whole,
)

__all__ = [
    "Call",
    "Fact",
    "Linear",
    "Nonlinear",
    "Pointwise",
    "Refusal",
    "Selection",
    "activation",
    "bind",
    "closed",
    "conv",
    "describe",
    "linear",
    "merge",
    "norm",
    "pool",
    "product",
    "registered",
    "rule",
    "searched",
    "shape",
    "whole",
]
