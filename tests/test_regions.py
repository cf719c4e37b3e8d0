"""Functions that are written out entry by entry are stepped through as one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revprop
from revprop.gauss_newton import search_entries
from revprop.modes import NearestPreimage
from revprop.reverse import factors_behind, walk

F64 = torch.float64


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def written_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("function", [F.softsign, F.tanhshrink, F.softshrink, written_gelu], ids=lambda f: f.__name__)
def test_a_function_that_is_written_out_reaches_its_targets(function: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = (1.5 * torch.randn(6, 5, generator=generator, dtype=F64) for _ in range(2))
    graph = revprop.trace(Function(function), x)
    recorded = graph.record(x)
    (start,) = graph.inputs
    steps = factors_behind(graph, NearestPreimage(0.0), [start])
    assert steps[0].name == "block"
    change = walk(graph, NearestPreimage(0.0), recorded, function(other) - recorded[graph.output], [start])[start]
    torch.testing.assert_close(function(x + change), function(other), rtol=0, atol=1e-9)
    kept = walk(graph, NearestPreimage(0.0), recorded, torch.zeros_like(x), [start])[start]
    assert not bool(kept.any())


def test_entries_take_the_nearest_of_two_preimages() -> None:
    x = torch.tensor([0.5, -0.5, 3.0], dtype=F64)
    change = search_entries(lambda z: z * z, x, torch.tensor([1.0, 1.0, 9.0], dtype=F64))
    torch.testing.assert_close(x + change, torch.tensor([1.0, -1.0, 3.0], dtype=F64))


def test_a_residual_addition_is_no_such_function() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.linear(x))

    graph = revprop.trace(Residual(), torch.zeros(1, 3))
    names = [step.name for step in factors_behind(graph, NearestPreimage(), graph.inputs)]
    assert names == ["add.Tensor", "tanh.default", "linear.default"]
