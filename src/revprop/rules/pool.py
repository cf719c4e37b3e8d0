"""Pooling and up-sampling: separable linear maps, and the selection of a largest entry."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from revprop.linear_map import Separable
from revprop.rules.registry import Call, Fact, Linear, Refusal, Selection, as_tuple, rule
from revprop.structural_map import Reduce
from revprop.windows import SlidingWindows, Spans, Windows

aten = torch.ops.aten


def _image(call: Call) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of the image before and after, refused where there is no channel dimension (torch then pools over the batch's)."""
    call.only()
    dims = int(re.findall(r"pool([123])d", str(call.operator))[0])
    if len(call.shape) != dims + 1:
        raise Refusal(
            f'it pools an image without channels: give it {dims + 2} dimensions (unsqueeze), or use strategy="global"'
        )
    return call.shape_of()[1:], call.shape[1:]


@rule(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def max_pool(call: Call) -> Fact:
    size, out = _image(call)
    dims = len(size)
    kernel = as_tuple(call["kernel_size"], dims)
    stride = as_tuple(call["stride"], dims) if call["stride"] else kernel
    return Selection(
        SlidingWindows(
            size,
            out,
            kernel,
            stride,
            as_tuple(call["padding"], dims),
            as_tuple(call["dilation"], dims),
            bool(call["ceil_mode"]),
        )
    )


@rule(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(call: Call) -> Fact:
    """One small matrix per dimension: row o holds 1 / (window size) over the window of output o."""
    size, out = _image(call)
    dims = len(size)
    kernel = as_tuple(call["kernel_size"], dims)
    stride = as_tuple(call["stride"], dims) if call["stride"] else kernel
    padding = as_tuple(call["padding"], dims)
    divisor = call.get("divisor_override")
    matrices = {}
    for d in range(dims):
        start = torch.arange(out[d]) * stride[d] - padding[d]
        stop = torch.minimum(start + kernel[d], torch.tensor(size[d] + padding[d]))
        inside_start, inside_stop = start.clamp_min(0), stop.clamp_max(size[d])
        share = (stop - start) if call["count_include_pad"] else (inside_stop - inside_start)
        if divisor:  # the whole divisor is charged to the first dimension
            share = torch.full_like(share, divisor if d == 0 else 1)
        position = torch.arange(size[d])
        inside = (position >= inside_start[:, None]) & (position < inside_stop[:, None])
        matrices[d - dims] = call.like(inside) / call.like(share)[:, None]
    return Linear(
        Separable(matrices), SlidingWindows(size, out, kernel, stride, padding, (1,) * dims, bool(call["ceil_mode"]))
    )


@rule(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)
def adaptive_avg_pool(call: Call) -> Fact:
    """Each output is the mean of its window, whether the windows divide the image evenly or not."""
    size, out = _image(call)
    matrices = {}
    for d, spans in enumerate(Spans.adaptive(size, out).spans):
        start, stop = call.like(spans).view(-1, 2, 1).unbind(1)
        position = call.like(torch.arange(size[d]))
        inside = (position >= start) & (position < stop)
        matrices[d - len(size)] = call.like(inside) / (stop - start)
    return Linear(Separable(matrices), _adaptive_windows(size, out))


@rule(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def adaptive_max_pool(call: Call) -> Fact:
    """Only found where its windows overlap: one whose windows tile the image is traced as plain max-pooling."""
    return Selection(_adaptive_windows(*_image(call)))


def _adaptive_windows(size: Sequence[int], out: Sequence[int]) -> Windows:
    if any(h % o for h, o in zip(size, out, strict=True)):
        return Spans.adaptive(size, out)
    kernel = tuple(h // o for h, o in zip(size, out, strict=True))
    return SlidingWindows(size, out, kernel, kernel, (0,) * len(kernel), (1,) * len(kernel))


@rule(aten.mean.dim, aten.sum.dim_IntList)
def reduce(call: Call) -> Fact:
    """Mean or sum over dimensions behind the batch (global average pooling among them)."""
    node = call.only()
    shape = call.graph.shape(node)
    rank = len(shape) + 1
    dims = tuple(d - rank if d >= 0 else d for d in call["dim"])
    count = math.prod(shape[d] for d in dims)
    scale = 1.0 / count if call.node.target is aten.mean.dim else 1.0
    return Linear(Reduce(shape, dims, scale, bool(call["keepdim"])))


@rule(
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
    aten.upsample_linear1d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_trilinear3d.vec,
    aten.upsample_bicubic2d.vec,
    aten._upsample_nearest_exact1d.vec,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact3d.vec,
    aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bicubic2d_aa.vec,
)
def upsample(call: Call) -> Fact:
    """Interpolation is the same small matrix along every line of a dimension: read it off the interpolated identity."""
    call.only()
    size, out = call.shape_of()[1:], call.shape[1:]
    factors = call.get("scale_factors")
    interpolate = _interpolation(call)
    matrices = {
        d - len(size): interpolate(size[d], out[d], factors[d] if factors else None).mT for d in range(len(size))
    }
    return Linear(Separable(matrices))


def _interpolation(call: Call) -> Callable[[int, int, float | None], Tensor]:
    name = str(call.node.target).removeprefix("aten.").removesuffix(".vec")
    modes = {"nearest_exact": "nearest-exact", "nearest": "nearest", "linear": "linear"}
    mode = next((mode for key, mode in modes.items() if key in name), "")
    corners = call.get("align_corners")

    def interpolate(h: int, out: int, factor: float | None) -> Tensor:
        eye = call.like(torch.eye(h)).view(h, 1, h)
        if "bicubic" in name or name.endswith("_aa"):  # for images only: one line is one, too
            return getattr(aten, name).default(eye.unsqueeze(-2), [1, out], corners, None, factor).view(h, out)
        if factor is not None:
            return F.interpolate(eye, scale_factor=factor, mode=mode, align_corners=corners).view(h, -1)[:, :out]
        return F.interpolate(eye, size=out, mode=mode, align_corners=corners).view(h, out)

    return interpolate
