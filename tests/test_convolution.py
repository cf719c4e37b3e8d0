"""Convolutions against explicit matrices: the unrolled one for exact solutions, the circular one for the FFT's."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import revprop.convolution
from revprop.convolution import Convolution, unroll

F64 = torch.float64
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
DAMPINGS = st.sampled_from([0.0, 0.01, 0.5])


@dataclass(frozen=True)
class Setting:
    """A convolution from the wide to the narrow side, or (transposed) its adjoint from narrow to wide."""

    weight: Tensor
    wide: tuple[int, ...]
    narrow: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool

    def map(self) -> Convolution:
        return Convolution(
            self.weight,
            self.wide,
            self.narrow,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.transposed,
        )

    @property
    def input(self) -> tuple[int, ...]:
        return self.narrow if self.transposed else self.wide

    @property
    def output(self) -> tuple[int, ...]:
        return self.wide if self.transposed else self.narrow

    def matrix(self) -> Tensor:
        """The map's own matrix: torch's convolution of every unit image."""
        size = math.prod(self.wide)
        images = F.pad(torch.eye(size, dtype=F64).view(size, *self.wide), torch_order(self.padding))
        down = CONV[len(self.stride)](images, self.weight, None, self.stride, 0, self.dilation, self.groups)
        assert down.shape[1:] == self.narrow
        return down.flatten(1) if self.transposed else down.flatten(1).T

    def circular(self) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
        """The matrix of the periodic convolution on the padded image (enlarged to whole strides), wide to narrow, and
        the sizes of its two sides."""
        period = tuple(
            math.ceil((n + lo + hi) / s) * s
            for n, (lo, hi), s in zip(self.wide[1:], self.padding, self.stride, strict=True)
        )
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        size = self.wide[0] * math.prod(period)
        images = torch.eye(size, dtype=F64).view(size, self.wide[0], *period)
        images = F.pad(images, torch_order([(0, r) for r in reach]), mode="circular")
        down = CONV[len(self.stride)](images, self.weight, None, self.stride, 0, self.dilation, self.groups)
        coarse = tuple(p // s for p, s in zip(period, self.stride, strict=True))
        assert down.shape[2:] == coarse
        return down.flatten(1).T, (self.wide[0], *period), (self.narrow[0], *coarse)

    def circular_solution(self, r: Tensor, mu: float) -> Tensor:
        """What the published approximation is: the residual embedded in the circular output, solved, cut out."""
        matrix, fine, coarse = self.circular()
        image = (..., *(slice(lo, lo + n) for (lo, _), n in zip(self.padding, self.wide[1:], strict=True)))
        front = (..., *(slice(0, n) for n in self.narrow[1:]))
        if self.transposed:
            matrix, fine, coarse, image, front = matrix.T, coarse, fine, front, image
        embedded = r.new_zeros(len(r), *coarse)
        embedded[front] = r
        return solution(matrix, embedded.flatten(1), mu).view(len(r), *fine)[image]


def torch_order(padding: object) -> list[int]:
    """Padding per dimension as F.pad wants it: the last dimension first."""
    return [p for pair in reversed(list(padding)) for p in pair]  # type: ignore[call-overload]


def solution(matrix: Tensor, r: Tensor, mu: float) -> Tensor:
    if mu == 0:
        return r @ torch.linalg.pinv(matrix).T
    return torch.linalg.solve(matrix.T @ matrix + mu * torch.eye(matrix.shape[1], dtype=F64), matrix.T @ r.T).T


def squared_norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2)) ** 2


@st.composite
def settings(draw: st.DrawFn) -> Setting:
    dims = draw(st.integers(1, 3))
    each = range(dims)
    kernel = [draw(st.integers(1, 3)) for _ in each]
    stride = tuple(draw(st.integers(1, 3)) for _ in each)
    dilation = tuple(draw(st.integers(1, 2)) for _ in each)
    narrow = [draw(st.integers(1, (6, 3, 2)[dims - 1])) for _ in each]
    padded = [
        (o - 1) * s + d * (k - 1) + 1 + draw(st.integers(0, s - 1))  # what the last stride leaves over
        for o, s, d, k in zip(narrow, stride, dilation, kernel, strict=True)
    ]
    padding = tuple(
        (draw(st.integers(0, min(2, (p - 1) // 2))), draw(st.integers(0, min(2, (p - 1) // 2)))) for p in padded
    )
    groups = draw(st.integers(1, 2))
    c, k = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(k, c // groups, *kernel, generator=generator, dtype=F64)
    if draw(st.booleans()):  # the last channel repeats the first: rank-deficient where it had full rank
        weight[-1] = weight[0]
    wide = (c, *(p - lo - hi for p, (lo, hi) in zip(padded, padding, strict=True)))
    return Setting(weight, wide, (k, *narrow), stride, padding, dilation, groups, draw(st.booleans()))


@given(settings())
def test_apply_and_adjoint_are_the_matrix_and_its_transpose(setting: Setting) -> None:
    map_, matrix = setting.map(), setting.matrix()
    assert map_.size == matrix.shape
    a, z = torch.randn(2, *setting.input, dtype=F64), torch.randn(2, *setting.output, dtype=F64)
    torch.testing.assert_close(map_.apply(a), (a.flatten(1) @ matrix.T).view_as(z), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(map_.adjoint(z), (z.flatten(1) @ matrix).view_as(a), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(unroll(map_).weight, matrix)


@given(settings(), DAMPINGS)
def test_exact_dense_solutions(setting: Setting, damping: float) -> None:
    matrix = setting.matrix()
    factor = setting.map().factor(damping, "exact")
    assert factor.solver == "dense"
    assert factor.size == matrix.shape
    assert factor.damping == pytest.approx(damping * squared_norm(matrix), rel=1e-9)
    assert factor.rank in (None, int(torch.linalg.matrix_rank(matrix)))
    assert damping or factor.rank is not None
    r = torch.randn(3, *setting.output, dtype=F64)
    expected = solution(matrix, r.flatten(1), factor.damping).view(3, *setting.input)
    torch.testing.assert_close(factor.solve(r), expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max() + 1))
    assert factor.solve(r[:0]).shape == (0, *setting.input)


@given(settings(), DAMPINGS)
def test_conjugate_gradients_where_the_dense_matrix_would_be_too_large(setting: Setting, damping: float) -> None:
    matrix = setting.matrix()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(revprop.convolution, "DENSE_SIDE", 0)
        factor = setting.map().factor(damping, "exact")
    pointwise = math.prod(setting.weight.shape[2:]) == 1 and not any(map(any, setting.padding))
    assert factor.solver == ("dense" if pointwise else "conjugate gradients")
    # the power method comes from below
    assert 0.9 * damping * squared_norm(matrix) <= factor.damping <= (1 + 1e-9) * damping * squared_norm(matrix)
    r = torch.randn(3, *setting.output, dtype=F64)
    r[1] = 0.0
    expected = solution(matrix, r.flatten(1), factor.damping).view(3, *setting.input)
    found = factor.solve(r)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max() + 1))
    assert not found[1].any()
    assert factor.solve(r[:0]).shape == (0, *setting.input)


@given(settings(), DAMPINGS)
def test_fft_solutions_are_those_of_the_circular_matrix(setting: Setting, damping: float) -> None:
    factor = setting.map().factor(damping, "fft")
    r = torch.randn(3, *setting.output, dtype=F64)
    if factor.solver == "fft":
        expected = setting.circular_solution(r, factor.damping)
        full = squared_norm(setting.circular()[0])
    else:  # 1x1 without padding: exact for nothing
        assert math.prod(setting.weight.shape[2:]) == 1
        expected = solution(setting.matrix(), r.flatten(1), factor.damping).view(3, *setting.input)
        full = squared_norm(setting.matrix())
    assert factor.damping == pytest.approx(damping * full, rel=1e-9)
    torch.testing.assert_close(factor.solve(r), expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max() + 1))
    assert factor.solve(r[:0]).shape == (0, *setting.input)


WEIGHT = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
PLAIN = Setting(WEIGHT, (3, 6, 6), (4, 4, 4), (1, 1), ((0, 0), (0, 0)), (1, 1), 1, False)


@pytest.mark.parametrize("solver", ["fft", "exact"])
def test_a_convolution_that_contracts_is_solved_without_residual(solver: str) -> None:
    weight = torch.randn(2, 4, 3, 3, dtype=F64)
    map_ = Convolution(weight, (4, 7, 8), (2, 5, 6), (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    r = torch.randn(2, 2, 5, 6, dtype=F64)
    torch.testing.assert_close(map_.apply(map_.factor(0.0, solver).solve(r)), r, rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", ["fft", "exact"])
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("stride", [1, 2])
def test_zero_weights_ask_for_no_correction(stride: int, damping: float, solver: str) -> None:
    narrow = (8, 4, 4) if stride == 1 else (8, 2, 2)
    map_ = Convolution(torch.zeros(8, 8, 3, 3), (8, 6, 6), narrow, (stride,) * 2, ((0, 0),) * 2, (1, 1), 1)
    factor = map_.factor(damping, solver)
    assert (factor.rank, factor.damping) == (0, 0.0)
    torch.testing.assert_close(factor.solve(torch.randn(2, *narrow)), torch.zeros(2, 8, 6, 6))


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_single_precision_follows_double_precision(damping: float) -> None:
    r = torch.randn(2, *PLAIN.output)
    single = Convolution(PLAIN.weight.float(), PLAIN.wide, PLAIN.narrow, PLAIN.stride, PLAIN.padding, PLAIN.dilation, 1)
    for solver in ("fft", "exact"):
        expected = PLAIN.map().factor(damping, solver).solve(r.double())
        found = single.factor(damping, solver).solve(r)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_the_weights_given_are_not_tracked() -> None:
    weight = torch.randn(2, 1, 3, requires_grad=True)
    map_ = Convolution(weight, (1, 5), (2, 3), (1,), ((0, 0),), (1,), 1)
    assert not map_.factor(0.01, "fft").solve(torch.randn(1, 2, 3)).requires_grad
