"""Convolutions (1-3 dimensions, any stride, padding, dilation, groups, transposed) as linear maps.

Three ways to ``A+``:

- ``solver="fft"``: the published approximation (FR-PT section 3.2). The valid convolution is embedded in a circular one, whose
  wrap-around part keeps its forward value; per frequency (u, v) the correction is ``a* - a^ = IFFT(M(u,v)+ FFT(pad(r)))`` with
  ``M(u, v)`` a (channels out) x (channels in) complex matrix. Padding: embedded in the padded image. Stride s: s frequencies of
  the input alias onto one of the output, so ``M`` has s times the columns in each dimension.
- ``solver="exact"``, dense: the unrolled matrix, where it is small.
- ``solver="exact"``, conjugate gradients on ``A A^T + mu I`` or ``A^T A + mu I`` (the smaller one), matrix-free, where it is not;
  preconditioned by the circular map where that helps.

A 1x1 convolution without padding is a small dense map on the channels and always solved exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from revprop.krylov import conjugate_gradients, largest_square, least_squares
from revprop.linear_map import Dense, Factor, LinearMap, _largest_eigenvalue, batched_pinv

__all__ = ["Convolution"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
DENSE_SIDE = 1500  # the unrolled matrix is factored densely up to this many equations or unknowns per group ...
DENSE_ENTRIES = 2**25  # ... and this many entries over all groups


class Convolution(LinearMap):
    """The linear part of a convolution, or of a transposed one (then the adjoint of the convolution described).

    Args:
        weight: (k, c / groups, *kernel), the layout of ``torch.nn.functional.conv2d``. A transposed convolution's weight
            (c_in, c_out / groups, *kernel) is the weight of the convolution it is the adjoint of, so it is passed unchanged.
        wide: (c, *size), the side with the full resolution: the input of a convolution, the output of a transposed one.
        narrow: (k, *size), the other side.
        padding: per dimension (before, after).
        transposed: whether the map goes from narrow to wide.

    >>> blur = Convolution(torch.ones(1, 1, 3), (1, 5), (1, 3), (1,), ((0, 0),), (1,), 1)
    >>> blur.apply(torch.arange(5.0).view(1, 1, 5))
    tensor([[[3., 6., 9.]]])
    """

    def __init__(
        self,
        weight: Tensor,
        wide: Sequence[int],
        narrow: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[tuple[int, int]],
        dilation: Sequence[int],
        groups: int,
        transposed: bool = False,
    ) -> None:
        self.weight = weight.detach()
        self.dims = weight.dim() - 2
        self.wide, self.narrow = tuple(wide), tuple(narrow)
        self.stride, self.dilation, self.groups = tuple(stride), tuple(dilation), groups
        self.padding = tuple(padding)
        self.transposed = transposed
        self.padded = tuple(size + lo + hi for size, (lo, hi) in zip(self.wide[1:], self.padding, strict=True))
        # the circular domain: the padded image, enlarged to a multiple of the stride
        self.period = tuple(-(-size // s) * s for size, s in zip(self.padded, self.stride, strict=True))
        self.coarse = tuple(n // s for n, s in zip(self.period, self.stride, strict=True))

    # -- forward and adjoint ---------------------------------------------------------------------------------------------

    def apply(self, *a: Tensor) -> Tensor:
        return self._up(a[0]) if self.transposed else self._down(a[0])

    def adjoint(self, z: Tensor) -> Tensor:
        return self._down(z) if self.transposed else self._up(z)

    def _down(self, a: Tensor) -> Tensor:
        symmetric = all(lo == hi for lo, hi in self.padding)
        if not symmetric:
            a = F.pad(a, [p for pair in reversed(self.padding) for p in pair])
        padding = [lo for lo, _ in self.padding] if symmetric else 0
        return _CONV[self.dims](a, self.weight, None, self.stride, padding, self.dilation, self.groups)

    def _up(self, z: Tensor) -> Tensor:
        reach = [
            (o - 1) * s + d * (k - 1) + 1
            for o, s, d, k in zip(self.narrow[1:], self.stride, self.dilation, self.weight.shape[2:], strict=True)
        ]
        extra = [n - r for n, r in zip(self.padded, reach, strict=True)]
        if all(lo == hi for lo, hi in self.padding) and all(e < s for e, s in zip(extra, self.stride, strict=True)):
            padding = [lo for lo, _ in self.padding]
            return _CONV_TRANSPOSE[self.dims](
                z, self.weight, None, self.stride, padding, extra, self.groups, self.dilation
            )
        full = _CONV_TRANSPOSE[self.dims](z, self.weight, None, self.stride, 0, 0, self.groups, self.dilation)
        full = F.pad(full, [p for e in reversed(extra) for p in (0, e)])
        return full[_box(slice(lo, lo + n) for (lo, _), n in zip(self.padding, self.wide[1:], strict=True))]

    # -- factoring -------------------------------------------------------------------------------------------------------

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of the unrolled matrix."""
        wide, narrow = math.prod(self.wide), math.prod(self.narrow)
        return (wide, narrow) if self.transposed else (narrow, wide)

    def factor(self, damping: float = 0.0, solver: str = "fft") -> Factor:
        if 0 in self.size or not bool(self.weight.any()):
            return Factor(
                lambda r: r.new_zeros(r.shape[0], *(self.narrow if self.transposed else self.wide)),
                "dense",
                0.0,
                0,
                self.size,
            )
        if math.prod(self.weight.shape[2:]) == 1 and not any(p for pair in self.padding for p in pair):
            return self._factor_pointwise(damping)
        if solver == "fft":
            return self._factor_spectral(damping)
        rows, columns = self.size
        if min(rows, columns) // self.groups <= DENSE_SIDE and rows * columns // self.groups <= DENSE_ENTRIES:
            return self._factor_dense(damping)
        return self._factor_iterative(damping)

    def _factor_pointwise(self, damping: float) -> Factor:
        g, (k, c) = self.groups, (self.narrow[0], self.wide[0])
        weight = self.weight.reshape(g, k // g, c // g)
        inverse, mu, rank = batched_pinv(weight.mT if self.transposed else weight, damping)
        kept = _box(slice(0, (o - 1) * s + 1, s) for o, s in zip(self.narrow[1:], self.stride, strict=True))
        strided = any(s > 1 for s in self.stride)

        def solve(r: Tensor) -> Tensor:
            if self.transposed:
                r = r[kept]
            a = (
                (inverse @ r.reshape(r.shape[0], g, r.shape[1] // g, math.prod(r.shape[2:]))).reshape(
                    r.shape[0], -1, *r.shape[2:]
                )
                if r.shape[0]
                else r.new_zeros(0, k if self.transposed else c, *r.shape[2:])
            )
            if self.transposed or (not strided and a.shape[2:] == self.wide[1:]):
                return a
            full = a.new_zeros(a.shape[0], *self.wide)
            full[kept] = a
            return full

        positions = math.prod(self.narrow[1:])
        return Factor(solve, "dense", mu, None if rank is None else rank * positions, self.size)

    def _factor_dense(self, damping: float) -> Factor:
        g = self.groups
        wide, narrow = math.prod(self.wide), math.prod(self.narrow)
        # one identity per group, all groups at once: row i of every group's block
        eye = torch.eye(narrow // g, dtype=self.weight.dtype, device=self.weight.device)
        probe = eye.view(narrow // g, 1, narrow // g).expand(-1, g, -1).reshape(narrow // g, *self.narrow)
        blocks = self._up(probe).reshape(narrow // g, g, wide // g).transpose(0, 1)
        matrix = blocks.mT if self.transposed else blocks
        inverse, mu, rank = batched_pinv(matrix, damping)
        out = self.narrow if self.transposed else self.wide
        if g == 1:
            flat = inverse[0].mT.contiguous()
            return Factor(lambda r: (r.flatten(1) @ flat).view(r.shape[0], *out), "dense", mu, rank, self.size)
        return Factor(
            lambda r: (
                (inverse @ r.reshape(r.shape[0], g, -1, 1)).reshape(r.shape[0], *out)
                if r.shape[0]
                else r.new_zeros(0, *out)
            ),
            "dense",
            mu,
            rank,
            self.size,
        )

    def _factor_spectral(self, damping: float) -> Factor:
        if (
            damping
            and not self._real
            and not self.transposed
            and self.narrow[0] <= self.wide[0] * math.prod(self.stride)
        ):
            return self._factor_strided(damping)
        inverse, mu, _ = batched_pinv(self._spectrum(), damping)
        scale = math.prod(self.stride)
        # the rank over half the spectrum of the circular map says nothing exact about the map restricted to valid positions
        return Factor(
            self._apply_spectral(inverse), "fft", mu / scale if self.transposed else mu * scale, None, self.size
        )

    def _factor_strided(self, damping: float) -> Factor:
        """The same map for a strided convolution as ``A^T (A A^T + mu)^-1``: the inverse per output frequency, then one
        transposed convolution on the periodically continued result; an s^2-th of the numbers, and real transforms."""
        spectrum = self._spectrum()
        scale = math.prod(self.stride)
        gram = spectrum @ spectrum.mH * scale
        mu = damping * _largest_eigenvalue(gram)
        half = self.coarse[-1] // 2 + 1  # the result is real: half of the last dimension's frequencies say it all
        gram = gram.view(*self.coarse, *gram.shape[1:])[(..., slice(0, half), slice(None), slice(None), slice(None))]
        gram = gram.reshape(-1, *gram.shape[-3:])
        inverse = torch.linalg.inv(
            gram + mu * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        ).contiguous()
        dims = tuple(range(2, 2 + self.dims))
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        # narrow positions in front whose windows wrap around into the image
        extra = [-(-r // s) for r, s in zip(reach, self.stride, strict=True)]

        def solve(r: Tensor) -> Tensor:
            n = r.shape[0]
            if n == 0:
                return r.new_zeros(0, *self.wide)
            y = (
                torch.fft.rfftn(r, s=self.coarse, dim=dims)
                .reshape(n, self.groups, -1, inverse.shape[0])
                .permute(3, 1, 2, 0)
            )
            y = (inverse @ y).permute(3, 1, 2, 0).reshape(n, self.narrow[0], *self.coarse[:-1], half)
            y = torch.fft.irfftn(y, s=self.coarse, dim=dims)
            for dim, e in enumerate(extra, start=2):
                y = torch.cat([y.narrow(dim, y.shape[dim] - e, e), y], dim)
            a = _CONV_TRANSPOSE[self.dims](y, self.weight, None, self.stride, 0, 0, self.groups, self.dilation)
            start = [e * s + lo for e, s, (lo, _) in zip(extra, self.stride, self.padding, strict=True)]
            # positions behind the last window are in no equation
            short = [max(b + size - have, 0) for b, size, have in zip(start, self.wide[1:], a.shape[2:], strict=True)]
            if any(short):
                a = F.pad(a, [p for amount in reversed(short) for p in (0, amount)])
            return a[_box(slice(b, b + size) for b, size in zip(start, self.wide[1:], strict=True))]

        return Factor(solve, "fft", mu, None, self.size)

    @property
    def _real(self) -> bool:
        return all(s == 1 for s in self.stride)

    def _spectrum(self) -> Tensor:
        """The circular map per frequency: (frequencies, groups, rows, columns) of the map's own direction."""
        dims, g = tuple(range(2, 2 + self.dims)), self.groups
        kernel = self.weight
        if any(d > 1 for d in self.dilation):
            spread = kernel.new_zeros(
                *kernel.shape[:2], *((k - 1) * d + 1 for k, d in zip(kernel.shape[2:], self.dilation, strict=True))
            )
            spread[_box(slice(None, None, d) for d in self.dilation)] = kernel
            kernel = spread
        transform = torch.fft.rfftn if self._real else torch.fft.fftn
        h = transform(kernel, s=self.period, dim=dims).conj()
        k, cg = h.shape[:2]
        if self._real:
            matrices = h.reshape(g, k // g, cg, -1).permute(3, 0, 1, 2)
        else:
            split = [n for s, f in zip(self.stride, self.coarse, strict=True) for n in (s, f)]
            h = h.reshape(g, k // g, cg, *split) / math.prod(self.stride)
            alias, fine = [3 + 2 * i for i in range(self.dims)], [4 + 2 * i for i in range(self.dims)]
            matrices = h.permute(*fine, 0, 1, 2, *alias).reshape(math.prod(self.coarse), g, k // g, -1)
        # the transforms of both sides are unnormalised, so the adjoint carries the ratio of their lengths
        return (matrices.mH * math.prod(self.stride) if self.transposed else matrices).contiguous()

    def _apply_spectral(self, inverse: Tensor) -> Callable[[Tensor], Tensor]:
        """Multiplies a residual by the given matrices per frequency, from the output's side to the input's."""
        inverse = inverse.contiguous()

        def solve(r: Tensor) -> Tensor:
            if r.shape[0] == 0:
                return r.new_zeros(0, *(self.narrow if self.transposed else self.wide))
            spectrum = self._fine_spectrum(r) if self.transposed else self._coarse_spectrum(r)
            spectrum = inverse @ spectrum
            return self._coarse_signal(spectrum) if self.transposed else self._fine_signal(spectrum)

        return solve

    def _coarse_spectrum(self, z: Tensor) -> Tensor:
        """(n, k, *narrow) -> (frequencies, groups, k / groups, n)."""
        dims = tuple(range(2, 2 + self.dims))
        transform = torch.fft.rfftn if self._real else torch.fft.fftn
        spectrum = transform(z, s=self.coarse, dim=dims)
        return spectrum.reshape(z.shape[0], self.groups, z.shape[1] // self.groups, -1).permute(3, 1, 2, 0)

    def _coarse_signal(self, spectrum: Tensor) -> Tensor:
        n = spectrum.shape[-1]
        frequencies = (*self.coarse[:-1], self.coarse[-1] // 2 + 1) if self._real else self.coarse
        spectrum = spectrum.permute(3, 1, 2, 0).reshape(n, self.narrow[0], *frequencies)
        dims = tuple(range(2, 2 + self.dims))
        signal = (
            torch.fft.irfftn(spectrum, s=self.coarse, dim=dims)
            if self._real
            else torch.fft.ifftn(spectrum, dim=dims).real
        )
        return signal[_box(slice(0, o) for o in self.narrow[1:])]

    def _fine_spectrum(self, a: Tensor) -> Tensor:
        """(n, c, *wide) -> (frequencies, groups, c / groups * aliases, n)."""
        n, g, dims = a.shape[0], self.groups, tuple(range(2, 2 + self.dims))
        if any(p for pair in self.padding for p in pair):
            a = F.pad(a, [p for pair in reversed(self.padding) for p in pair])
        if self._real:
            spectrum = torch.fft.rfftn(a, s=self.period, dim=dims)
            return spectrum.reshape(n, g, self.wide[0] // g, -1).permute(3, 1, 2, 0)
        split = [m for s, f in zip(self.stride, self.coarse, strict=True) for m in (s, f)]
        spectrum = torch.fft.fftn(a, s=self.period, dim=dims).reshape(n, g, self.wide[0] // g, *split)
        alias, fine = [3 + 2 * i for i in range(self.dims)], [4 + 2 * i for i in range(self.dims)]
        return spectrum.permute(*fine, 1, 2, *alias, 0).reshape(math.prod(self.coarse), g, -1, n)

    def _fine_signal(self, spectrum: Tensor) -> Tensor:
        n, g, c = spectrum.shape[-1], self.groups, self.wide[0]
        dims = tuple(range(2, 2 + self.dims))
        if self._real:
            frequencies = (*self.period[:-1], self.period[-1] // 2 + 1)
            signal = torch.fft.irfftn(spectrum.permute(3, 1, 2, 0).reshape(n, c, *frequencies), s=self.period, dim=dims)
        else:
            spectrum = spectrum.reshape(*self.coarse, g, c // g, *self.stride, n)
            order = [2 * self.dims + 2, self.dims, self.dims + 1]
            for i in range(self.dims):
                order += [self.dims + 2 + i, i]  # alias m, then frequency k: u = m * coarse + k
            signal = torch.fft.ifftn(spectrum.permute(order).reshape(n, c, *self.period), dim=dims).real
        return signal[_box(slice(lo, lo + size) for (lo, _), size in zip(self.padding, self.wide[1:], strict=True))]

    def _factor_iterative(self, damping: float) -> Factor:
        rows, columns = self.size
        sigma2 = (
            largest_square(
                self.apply, self.adjoint, self.weight.new_zeros(1, *(self.narrow if self.transposed else self.wide))
            )
            if damping
            else 0.0
        )
        mu = damping * sigma2
        if mu == 0.0:
            return Factor(
                lambda r: least_squares(self.apply, self.adjoint, r), "conjugate gradients", 0.0, None, self.size
            )
        if rows > columns:
            return Factor(
                lambda r: conjugate_gradients(lambda x: self.adjoint(self.apply(x)) + mu * x, self.adjoint(r)),
                "conjugate gradients",
                mu,
                None,
                self.size,
            )
        spectrum = self._spectrum()
        gram = spectrum @ spectrum.mH * (1 / math.prod(self.stride) if self.transposed else math.prod(self.stride))
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        inverse = torch.linalg.inv(gram + mu * eye)

        def precondition(y: Tensor) -> Tensor:
            if self.transposed:
                return self._fine_signal(inverse @ self._fine_spectrum(y))
            return self._coarse_signal(inverse @ self._coarse_spectrum(y))

        def solve(r: Tensor) -> Tensor:
            return self.adjoint(conjugate_gradients(lambda y: self.apply(self.adjoint(y)) + mu * y, r, precondition))

        return Factor(solve, "conjugate gradients", mu, None, self.size)


def unroll(convolution: Convolution) -> Dense:
    """The convolution's unrolled matrix as a dense map on flattened features: a slow reference, small sizes only."""
    wide = math.prod(convolution.wide)
    eye = torch.eye(wide, dtype=convolution.weight.dtype).view(wide, *convolution.wide)
    matrix = convolution._down(eye).flatten(1).mT
    return Dense(matrix.mT if convolution.transposed else matrix)


def _box(slices: Iterable[slice]) -> tuple[Any, ...]:
    """An index that cuts the last dimensions."""
    return (..., *slices)
