"""Linear maps against their own matrices: pseudo-inverses by LAPACK, damping by the normal equations."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import revprop.linear_map
from revprop.linear_map import Dense, Diagonal, LinearMap, Separable, batched_pinv
from revprop.structural_map import Broadcast, Concatenate, Copy, Reduce, Sum

F64 = torch.float64
Shapes = tuple[tuple[int, ...], ...]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def low_rank(rows: int, columns: int, rank: int) -> Tensor:
    return rand(rows, rank, seed=1) @ rand(rank, columns, seed=2)


def matrix_of(map_: LinearMap, shapes: Shapes) -> Tensor:
    """The matrix, (outputs, inputs), from the images of the unit vectors."""
    sizes = [math.prod(shape) for shape in shapes]
    unit = torch.eye(sum(sizes), dtype=F64).split(sizes, 1)
    columns = map_.apply(*(part.reshape(-1, *shape) for part, shape in zip(unit, shapes, strict=True)))
    return columns.reshape(sum(sizes), -1).T


def reference(matrix: Tensor, r: Tensor, mu: float) -> Tensor:
    if mu == 0:
        return torch.linalg.lstsq(matrix, r.T, driver="gelsd").solution.T
    return torch.linalg.solve(matrix.T @ matrix + mu * torch.eye(matrix.shape[1], dtype=F64), matrix.T @ r.T).T


def flat(parts: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten(1) for part in (parts if isinstance(parts, tuple) else (parts,))], 1)


def assert_all_facts_agree(map_: LinearMap, shapes: Shapes, out: tuple[int, ...], damping: float) -> None:
    """Apply, adjoint and damped pseudo-inverse are those of one matrix, and damping is relative to its norm."""
    matrix, r = matrix_of(map_, shapes), rand(3, *out, seed=3)
    assert map_.apply(*(rand(3, *shape) for shape in shapes)).shape == (3, *out)
    torch.testing.assert_close(flat(map_.adjoint(r)), r.flatten(1) @ matrix, rtol=1e-10, atol=1e-10)
    factor = map_.factor(damping)
    norm = float(torch.linalg.matrix_norm(matrix, 2)) if matrix.numel() else 0.0
    assert factor.damping == pytest.approx(damping * norm**2, rel=1e-9) or factor.damping == 0.0
    expected = reference(matrix, r.flatten(1), factor.damping)
    torch.testing.assert_close(flat(factor.solve(r)), expected, rtol=1e-8, atol=1e-8)
    empty = factor.solve(rand(0, *out))
    assert [part.shape for part in (empty if isinstance(empty, tuple) else (empty,))] == [(0, *s) for s in shapes]


CHANNELS = torch.tensor([[2.0], [0.0], [-0.5]], dtype=F64)
MAPS: dict[str, tuple[Callable[[], LinearMap], Shapes, tuple[int, ...]]] = {
    "dense wide": (lambda: Dense(rand(2, 5)), ((5,),), (2,)),
    "dense tall": (lambda: Dense(rand(5, 2)), ((2,),), (5,)),
    "dense low rank": (lambda: Dense(low_rank(4, 5, 2)), ((5,),), (4,)),
    "dense zero": (lambda: Dense(torch.zeros(3, 4, dtype=F64)), ((4,),), (3,)),
    "dense one row": (lambda: Dense(rand(1, 4)), ((4,),), (1,)),
    "dense on a sequence": (lambda: Dense(rand(2, 3)), ((4, 3),), (4, 2)),
    "dense stacked": (lambda: Dense(rand(4, 2, 3)), ((4, 3),), (4, 2)),
    "diagonal": (lambda: Diagonal(CHANNELS), ((3, 4),), (3, 4)),
    "diagonal zero": (lambda: Diagonal(torch.zeros(3, dtype=F64)), ((3,),), (3,)),
    "reversed": (lambda: Copy(lambda a: a.flip(1), lambda z: z.flip(1)), ((3,),), (3,)),
    "copied twice": (
        lambda: Copy(lambda a: torch.cat([a, a[:, :1]], 1), _copied_back, torch.tensor([[2, 1, 1]])),
        ((3,),),
        (4,),
    ),
    "separable rows": (lambda: Separable({-2: rand(2, 4)}), ((3, 4, 2),), (3, 2, 2)),
    "separable low rank": (lambda: Separable({-2: low_rank(4, 4, 2), -1: rand(5, 3)}), ((2, 4, 3),), (2, 4, 5)),
    "separable outer axes": (lambda: Separable({-3: rand(2, 3), -1: rand(5, 2)}), ((3, 4, 2),), (2, 4, 5)),
    "broadcast": (lambda: Broadcast((3, 1), (2, 3, 4), rand(2, 1, 4)), ((3, 1),), (2, 3, 4)),
    "broadcast with zeros": (lambda: Broadcast((3, 1), (3, 4), CHANNELS), ((3, 1),), (3, 4)),
    "mean": (lambda: Reduce((3, 4, 2), (-1, -3), 1 / 6, False), ((3, 4, 2),), (4,)),
    "sum kept": (lambda: Reduce((3, 4), (-1,), 1.0, True), ((3, 4),), (3, 1)),
    "sum of equals": (lambda: Sum(((3, 4), (3, 4)), (3, 4), (1.0, 1.0)), ((3, 4), (3, 4)), (3, 4)),
    "difference": (lambda: Sum(((3,), (3,)), (3,), (1.0, -2.0)), ((3,), (3,)), (3,)),
    "one side counts": (lambda: Sum(((3,), (3,)), (3,), (0.0, 2.0)), ((3,), (3,)), (3,)),
    "no side counts": (lambda: Sum(((3,), (3, 1)), (3, 3), (0.0, 0.0)), ((3,), (3, 1)), (3, 3)),
    "sum, one broadcast": (lambda: Sum(((3, 4), (1, 4)), (3, 4), (1.0, -2.0)), ((3, 4), (1, 4)), (3, 4)),
    "sum, both broadcast": (lambda: Sum(((3, 1), (2, 1, 4)), (2, 3, 4), (0.5, 1.0)), ((3, 1), (2, 1, 4)), (2, 3, 4)),
    "concatenation": (lambda: Concatenate(-2, ((0, 2), (3, 1)), 5), ((2, 3), (1, 3)), (5, 3)),
}


def _copied_back(z: Tensor) -> Tensor:
    return torch.cat([z[:, :1] + z[:, 3:], z[:, 1:3]], 1)


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("name", MAPS)
def test_maps_agree_with_their_matrix(name: str, damping: float) -> None:
    make, shapes, out = MAPS[name]
    assert_all_facts_agree(make(), shapes, out, damping)


@pytest.mark.parametrize("name", ["dense low rank", "dense zero", "separable low rank", "dense one row"])
def test_ranks_are_those_of_the_matrix(name: str) -> None:
    make, shapes, _ = MAPS[name]
    factor, matrix = make().factor(), matrix_of(make(), shapes)
    assert factor.rank is not None
    channels = matrix.shape[0] // factor.size[0] if factor.size else 1
    assert factor.rank * channels == torch.linalg.matrix_rank(matrix)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 6), st.sampled_from([0.0, 1e-3, 0.3]))
def test_dense_maps_of_any_size_and_rank(rows: int, columns: int, rank: int, damping: float) -> None:
    weight = low_rank(rows, columns, min(rank, rows, columns))
    assert_all_facts_agree(Dense(weight), ((columns,),), (rows,), damping)
    assert Dense(weight).factor().rank == min(rank, rows, columns)


@given(st.data())
def test_sums_of_any_shapes_that_broadcast(data: st.DataObject) -> None:
    out = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    masks = [data.draw(st.lists(st.booleans(), min_size=len(out), max_size=len(out))) for _ in range(2)]
    shapes = tuple(tuple(1 if m else o for m, o in zip(mask, out, strict=True)) for mask in masks)
    full = tuple(max(a, b) for a, b in zip(*shapes, strict=True))
    scales = tuple(data.draw(st.sampled_from([1.0, -1.0, 0.5])) for _ in range(2))
    assert_all_facts_agree(Sum(shapes, full, scales), shapes, full, 0.0)


def test_damping_moves_from_the_exact_solution_to_none() -> None:
    map_, r = Dense(rand(3, 5)), rand(2, 3, seed=4)
    lengths = [float(map_.factor(damping).solve(r).norm()) for damping in (0.0, 0.01, 0.1, 1.0, 1e6)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 1e-5 * lengths[0]


# -- stacks of matrices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(6, 3, 5), (2, 3, 7, 6), (4, 1, 5), (4, 5, 1), (3, 6, 6), (8, 2, 2), (5, 4)])
def test_stacks_of_matrices_are_the_blocks_of_one_map(
    shape: tuple[int, ...], dtype: torch.dtype, damping: float
) -> None:
    matrices = torch.randn(*shape, dtype=dtype)
    blocks = matrices.view(-1, *shape[-2:])
    blocks[-1] *= 3
    if len(blocks) > 1:
        blocks[0] = 0
    whole = torch.block_diag(*blocks)
    inverse, mu, rank = batched_pinv(matrices, damping)
    assert mu == pytest.approx(damping * float(torch.linalg.matrix_norm(whole, 2)) ** 2, rel=1e-9)
    eye = torch.eye(whole.shape[1], dtype=dtype)
    expected = torch.linalg.solve(whole.mH @ whole + mu * eye, whole.mH) if damping else torch.linalg.pinv(whole)
    found = torch.block_diag(*inverse.reshape(-1, *inverse.shape[-2:]))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert rank in (None, int(torch.linalg.matrix_rank(whole)))
    assert rank is not None or damping > 0


def test_a_block_far_below_the_largest_one_is_not_inverted() -> None:
    matrices = torch.stack([torch.eye(2, dtype=F64), 1e-20 * torch.eye(2, dtype=F64)])
    inverse, _, rank = batched_pinv(matrices)
    torch.testing.assert_close(inverse, torch.stack([torch.eye(2, dtype=F64), torch.zeros(2, 2, dtype=F64)]))
    assert rank == 2


def test_blocks_that_are_all_zero_have_a_zero_inverse_whatever_the_damping() -> None:
    for shape in ((3, 6, 7), (3, 2, 2), (3, 1, 4)):
        inverse, mu, rank = batched_pinv(torch.zeros(shape), 0.1)
        assert (mu, rank) == (0.0, 0)
        torch.testing.assert_close(inverse, torch.zeros(shape).mT)


def test_no_matrices_at_all() -> None:
    inverse, mu, rank = batched_pinv(torch.zeros(0, 2, 3), 0.1)
    assert (inverse.shape, mu, rank) == ((0, 3, 2), 0.0, 0)


def test_the_largest_eigenvalue_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = torch.randn(50, 6, 8, dtype=torch.complex128)
    exact = float(torch.linalg.matrix_norm(matrices, 2).max()) ** 2
    assert batched_pinv(matrices, 1.0)[1] == pytest.approx(exact, rel=1e-9)
    monkeypatch.setattr(revprop.linear_map, "EXACT_EIGENVALUES", 0)
    assert batched_pinv(matrices, 1.0)[1] == pytest.approx(exact, rel=0.05)
