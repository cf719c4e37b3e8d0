"""Windows of a pooling against their definition, and the nearest preimage of max-pooling against all assignments."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from revprop.windows import SlidingWindows, Spans, Windows

F64 = torch.float64
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


@dataclass(frozen=True)
class Pool:
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        pool = MAX_POOL[len(self.size)]
        return pool(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil)

    @property
    def out(self) -> tuple[int, ...]:
        return tuple(self(torch.zeros(1, 1, *self.size)).shape[2:])

    def windows(self) -> Windows:
        return SlidingWindows(self.size, self.out, self.kernel, self.stride, self.padding, self.dilation, self.ceil)

    def members(self) -> list[list[int]]:
        """The flat positions inside the image that each window looks at, by definition."""
        found = []
        for corner in itertools.product(*(range(o) for o in self.out)):
            inside = []
            for offset in itertools.product(*(range(k) for k in self.kernel)):
                at = [
                    c * s - p + o * d
                    for c, s, p, o, d in zip(corner, self.stride, self.padding, offset, self.dilation, strict=True)
                ]
                if all(0 <= a < n for a, n in zip(at, self.size, strict=True)):
                    inside.append(sum(a * math.prod(self.size[i + 1 :]) for i, a in enumerate(at)))
            found.append(inside)
        return found


@dataclass(frozen=True)
class Uneven:
    """Windows from a start up to a stop in each dimension."""

    size: tuple[int, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]

    def __call__(self, x: Tensor) -> Tensor:
        largest = [
            x[(..., *(slice(*span) for span in window))].amax(tuple(range(2, x.dim())))
            for window in itertools.product(*self.spans)
        ]
        return torch.stack(largest, -1).view(*x.shape[:2], *self.out)

    @property
    def out(self) -> tuple[int, ...]:
        return tuple(len(one) for one in self.spans)

    def windows(self) -> Windows:
        return Spans(self.size, self.spans)

    def members(self) -> list[list[int]]:
        positions = torch.arange(math.prod(self.size)).view(self.size)
        return [
            positions[tuple(slice(*span) for span in window)].flatten().tolist()
            for window in itertools.product(*self.spans)
        ]


@st.composite
def spans(draw: st.DrawFn) -> Uneven:
    dims = draw(st.integers(1, 2))
    size = tuple(draw(st.integers(1, 7 if dims == 1 else 3)) for _ in range(dims))
    return Uneven(
        size,
        tuple(
            tuple(
                (start := draw(st.integers(0, n - 1)), draw(st.integers(start + 1, n)))
                for _ in range(draw(st.integers(1, 5 if dims == 1 else 3)))
            )
            for n in size
        ),
    )


@st.composite
def sliding(draw: st.DrawFn) -> Pool:
    dims = draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 3 if dims == 1 else 2)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in kernel)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    smallest = [max(d * (k - 1) + 1 - 2 * p, 1) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    size = tuple(draw(st.integers(n, max(n, 7 if dims == 1 else 3))) for n in smallest)
    stride = tuple(draw(st.integers(1, 3)) for _ in kernel)
    pool = Pool(size, kernel, stride, padding, dilation, draw(st.booleans()))
    assume(all(pool.members()))  # torch pools windows that see nothing but padding to -inf
    return pool


def pools() -> st.SearchStrategy[Pool | Uneven]:
    return st.one_of(sliding(), spans())


def image(pool: Pool | Uneven, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, *pool.size, generator=generator, dtype=F64)


def nearest_assignment(x: list[float], target: list[float], members: list[list[int]]) -> float:
    """The distance to the nearest image with these maxima, over every choice of which entry attains which maximum."""
    cap = [
        min((t for t, inside in zip(target, members, strict=True) if i in inside), default=math.inf)
        for i in range(len(x))
    ]
    best = math.inf
    for choice in itertools.product(*members):
        if all(cap[i] == t for i, t in zip(choice, target, strict=True)):
            raised = set(choice)
            moved = [(cap[i] if i in raised else min(a, cap[i])) - a for i, a in enumerate(x)]
            best = min(best, math.hypot(*moved))
    return best


def overlapping_targets_differ(target: list[float], members: list[list[int]]) -> bool:
    pairs = itertools.combinations(zip(target, members, strict=True), 2)
    return all(t != u or not set(a) & set(b) for (t, a), (u, b) in pairs)


@given(pools())
def test_windows_look_where_the_definition_says(pool: Pool | Uneven) -> None:
    windows, members = pool.windows(), pool.members()
    found = [sorted(i for i in row if i < windows.positions) for row in windows.index.tolist()]
    assert found == [sorted(inside) for inside in members]
    counts = [sum(i in inside for inside in members) for i in range(windows.positions)]
    assert windows.counts.tolist() == counts
    assert windows.disjoint == (max(counts) <= 1)


@given(pools(), st.integers(0, 100))
def test_argmax_is_where_the_maximum_is(pool: Pool | Uneven, seed: int) -> None:
    x = image(pool, seed)
    at = pool.windows().argmax(x)
    torch.testing.assert_close(x.flatten(2).gather(2, at), pool(x).flatten(2), rtol=0, atol=0)
    assert all(i in inside for row in at.flatten(0, 1).tolist() for i, inside in zip(row, pool.members(), strict=True))


@given(pools(), st.integers(0, 100))
def test_spread_gives_each_position_the_mean_of_its_windows(pool: Pool | Uneven, seed: int) -> None:
    members = pool.members()
    z = torch.randn(2, 3, *pool.out, generator=torch.Generator().manual_seed(seed), dtype=F64)
    expected = torch.full((2, 3, math.prod(pool.size)), -7.0, dtype=F64)
    for i in range(expected.shape[2]):
        of = [j for j, inside in enumerate(members) if i in inside]
        if of:
            expected[..., i] = z.flatten(2)[..., of].mean(-1)
    torch.testing.assert_close(pool.windows().spread(z, -7.0), expected.view(2, 3, *pool.size))


@given(pools(), st.integers(0, 100))
def test_maxima_that_some_image_has_are_reached_by_the_nearest_such_image(pool: Pool | Uneven, seed: int) -> None:
    x, members = image(pool, seed), pool.members()
    target = pool(image(pool, seed + 1000))
    correction = pool.windows().nearest(x, target)
    torch.testing.assert_close(pool(x + correction), target)
    if math.prod(len(inside) for inside in members) > 3000:
        return
    for values, wanted, moved in zip(x.view(4, -1), target.reshape(4, -1), correction.view(4, -1), strict=True):
        if overlapping_targets_differ(wanted.tolist(), members):
            expected = nearest_assignment(values.tolist(), wanted.tolist(), members)
            assert float(moved.norm()) == pytest.approx(expected, abs=1e-9)


@given(pools(), st.integers(0, 100))
def test_maxima_that_no_image_has_are_approached_as_far_as_their_neighbours_allow(
    pool: Pool | Uneven, seed: int
) -> None:
    x, members = image(pool, seed), pool.members()
    target = torch.randn(2, 2, *pool.out, generator=torch.Generator().manual_seed(seed + 1), dtype=F64)
    found = pool(x + pool.windows().nearest(x, target)).flatten(2)
    wanted = target.flatten(2)
    for j, inside in enumerate(members):
        caps = [wanted[..., [k for k, other in enumerate(members) if i in other]].amin(-1) for i in inside]
        torch.testing.assert_close(found[..., j], torch.stack(caps).amax(0))


@given(pools(), st.integers(0, 100))
def test_own_maxima_ask_for_no_correction(pool: Pool | Uneven, seed: int) -> None:
    x = image(pool, seed)
    assert not pool.windows().nearest(x, pool(x)).any()
    x = x.round()  # ties
    assert not pool.windows().nearest(x, pool(x)).any()
    empty = x[:0]
    assert pool.windows().nearest(empty, pool(empty)).shape == empty.shape


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_adaptive_windows_are_those_of_adaptive_pooling(h: int, w: int, rows: int, columns: int) -> None:
    x = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(h * 10 + w), dtype=F64)
    windows = Spans.adaptive((h, w), (rows, columns))
    expected, at = F.adaptive_max_pool2d(x, (rows, columns), return_indices=True)
    torch.testing.assert_close(windows.argmax(x), at.flatten(2))
    assert windows.out == tuple(expected.shape[2:])


def test_values_of_a_window_above_its_target_are_cut_and_the_largest_below_it_is_raised() -> None:
    pool = Pool((4,), (2,), (2,), (0,), (1,))
    x = torch.tensor([[[3.0, 5.0, 1.0, 2.0]]])
    torch.testing.assert_close(
        x + pool.windows().nearest(x, torch.tensor([[[4.0, 6.0]]])), torch.tensor([[[3.0, 4.0, 1.0, 6.0]]])
    )


def test_overlapping_windows_by_hand() -> None:
    pool = Pool((3,), (2,), (1,), (0,), (1,))
    x = torch.tensor([[[1.0, 5.0, 2.0]]])
    # the middle lies in both windows, so it may be 3 at most: the right one needs its last entry for the 4
    torch.testing.assert_close(
        x + pool.windows().nearest(x, torch.tensor([[[3.0, 4.0]]])), torch.tensor([[[1.0, 3.0, 4.0]]])
    )
