"""Columns: an operator is the product of its weight with its columns, whatever its sizes, and its weight's gradient is too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from revprop.columns import Columns, columns_of
from revprop.convolution import Convolution
from revprop.graph import trace
from revprop.linear_map import Dense, Diagonal
from revprop.rules.registry import Linear, bind, describe

F64 = torch.float64
CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
CONV_MODULE: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class Setting:
    """A convolution: its map, its input's shape, and torch's own function of (input, weight)."""

    map: Convolution
    input: tuple[int, ...]
    function: Callable[[Tensor, Tensor], Tensor]


@st.composite
def settings(draw: st.DrawFn) -> Setting:
    dims = draw(st.integers(1, 3))
    each = range(dims)
    kernel = tuple(draw(st.integers(1, 3)) for _ in each)
    stride = tuple(draw(st.integers(1, 3)) for _ in each)
    dilation = tuple(draw(st.integers(1, 2)) for _ in each)
    groups = draw(st.integers(1, 3))
    c, k = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    reach = [d * (n - 1) + 1 for d, n in zip(dilation, kernel, strict=True)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(k, c // groups, *kernel, generator=generator, dtype=F64)
    narrow = tuple(draw(st.integers(1, (6, 3, 2)[dims - 1])) for _ in each)
    if draw(st.booleans()):  # transposed: from (k, *narrow) to (c, *wide)
        over = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        full = [(o - 1) * s + r + e for o, s, r, e in zip(narrow, stride, reach, over, strict=True)]
        same = tuple(draw(st.integers(0, min(2, (f - 1) // 2))) for f in full)
        wide = tuple(f - 2 * p for f, p in zip(full, same, strict=True))
        pairs = tuple((p, p) for p in same)
        return Setting(
            Convolution(weight, (c, *wide), (k, *narrow), stride, pairs, dilation, groups, True),
            (k, *narrow),
            lambda a, w: CONV_TRANSPOSE[dims](a, w, None, stride, same, over, groups, dilation),
        )
    padded = [(o - 1) * s + r + draw(st.integers(0, s - 1)) for o, s, r in zip(narrow, stride, reach, strict=True)]
    padding = tuple((draw(st.integers(0, min(2, (p - 1) // 2))), draw(st.integers(0, (p - 1) // 2))) for p in padded)
    wide = tuple(p - lo - hi for p, (lo, hi) in zip(padded, padding, strict=True))
    order = [p for pair in reversed(padding) for p in pair]
    return Setting(
        Convolution(weight, (c, *wide), (k, *narrow), stride, padding, dilation, groups),
        (c, *wide),
        lambda a, w: CONV[dims](F.pad(a, order), w, None, stride, 0, dilation, groups),
    )


def matrix_of(columns: Columns, weight: Tensor) -> Tensor:
    """The weight as (groups, outputs, features), written entry by entry."""
    matrix = torch.zeros(columns.groups, columns.outputs, columns.features, dtype=weight.dtype)
    transposed = isinstance(columns.map, Convolution) and columns.map.transposed
    width = math.prod(weight.shape[2:])
    flat = weight.reshape(*weight.shape[:2], width)
    inputs = columns.features // width
    for g in range(columns.groups):
        for o in range(columns.outputs):
            for i in range(inputs):
                row = flat[g * inputs + i, o] if transposed else flat[g * columns.outputs + o, i]
                matrix[g, o, i * width : (i + 1) * width] = row
    return matrix


@given(settings(), st.integers(0, 3))
def test_the_columns_times_the_weight_are_the_outputs(setting: Setting, n: int) -> None:
    columns = columns_of(setting.map)
    assert columns is not None
    weight = setting.map.weight
    a = torch.randn(n, *setting.input, dtype=F64)
    z = setting.function(a, weight) if n else setting.map.apply(a)
    matrix = matrix_of(columns, weight)
    u = columns.of(a)
    assert u.shape == (columns.groups, n * columns.positions, columns.features)
    torch.testing.assert_close(u @ matrix.mT, columns.rows(z), rtol=1e-11, atol=1e-11)
    assert torch.equal(columns.weight(matrix), weight)


@given(settings())
def test_the_weights_gradient_is_the_rows_times_the_columns(setting: Setting) -> None:
    """So the columns are right, in every position, without a word on how the weight is laid out."""
    columns = columns_of(setting.map)
    assert columns is not None
    weight = setting.map.weight.clone().requires_grad_()
    a = torch.randn(2, *setting.input, dtype=F64)
    z = setting.function(a, weight)
    toward = torch.randn_like(z)
    expected = torch.autograd.grad(z, weight, toward)[0]
    found = columns.weight(columns.rows(toward).mT @ columns.of(a))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("leading", [(), (4,), (3, 2), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_leading_dimensions_of_a_dense_map_count_as_samples(leading: tuple[int, ...], n: int) -> None:
    weight = torch.randn(4, 5, dtype=F64)
    columns = columns_of(Dense(weight))
    assert columns is not None
    assert (columns.groups, columns.outputs, columns.features, columns.positions) == (1, 4, 5, 1)
    a = torch.randn(n, *leading, 5, dtype=F64)
    u = columns.of(a)
    assert u.shape == (1, n * math.prod(leading), 5)
    torch.testing.assert_close(u @ weight.mT, columns.rows(F.linear(a, weight)), rtol=1e-12, atol=1e-12)
    assert torch.equal(columns.weight(weight[None]), weight)


def only(module: nn.Module, shape: tuple[int, ...]) -> Columns:
    """The columns of a traced module's only operator, as the rules describe it."""
    graph = trace(module, torch.zeros(2, *shape, dtype=F64))
    fact = describe(bind(graph, graph.output))
    assert isinstance(fact, Linear)
    columns = columns_of(fact.map)
    assert columns is not None
    return columns


TRACED: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(5, 3), (5,)),
    (nn.Linear(5, 3), (4, 5)),
    (nn.Conv1d(2, 3, 4, padding="same"), (2, 7)),  # an even kernel: one more behind than in front
    (nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(3, 1), groups=2), (4, 6, 5)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), groups=2), (4, 7, 8)),
    (nn.Conv2d(3, 3, 3, groups=3, padding="valid"), (3, 4, 4)),
    (nn.Conv3d(2, 4, (1, 2, 3), padding=1, stride=2), (2, 3, 4, 5)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 5)),
    (nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 3), output_padding=(1, 2), dilation=(1, 2)), (2, 3, 4)),
    (nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 2), padding=(1, 0, 1)), (2, 3, 2, 3)),
]


@pytest.mark.parametrize(("module", "shape"), TRACED, ids=str)
def test_the_columns_of_a_traced_module_give_its_output(module: nn.Module, shape: tuple[int, ...]) -> None:
    module = module.double()
    columns, weight, bias = only(module, shape), module.get_parameter("weight"), module.get_parameter("bias")
    a = torch.randn(3, *shape, dtype=F64)
    z = columns.of(a) @ matrix_of(columns, weight).mT + bias.view(columns.groups, 1, -1)
    torch.testing.assert_close(z, columns.rows(module(a)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("module", "shape"), TRACED[3:5] + TRACED[8:9], ids=str)
def test_the_memory_layout_of_an_input_plays_no_part(module: nn.Module, shape: tuple[int, ...]) -> None:
    columns = only(module.double(), shape)
    a = torch.randn(3, *shape, dtype=F64)
    assert torch.equal(columns.of(a.contiguous(memory_format=torch.channels_last)), columns.of(a))
    z = module(a)
    assert torch.equal(columns.rows(z.contiguous(memory_format=torch.channels_last)), columns.rows(z.contiguous()))


def test_the_columns_of_a_sample_do_not_depend_on_the_others() -> None:
    columns = only(nn.Conv2d(2, 3, 3, padding=1).double(), (2, 4, 4))
    a = torch.randn(5, 2, 4, 4, dtype=F64)
    assert torch.equal(columns.of(a), torch.cat([columns.of(part) for part in a.split(2)], 1))


def test_other_maps_have_no_columns() -> None:
    assert columns_of(Diagonal(torch.ones(3))) is None
