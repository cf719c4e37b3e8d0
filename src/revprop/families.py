"""Operators by family, for what is the same for all of one: which argument is a bias, what is linear without a look at values."""

from __future__ import annotations

import operator

import torch

__all__ = [
    "BY_COLUMNS",
    "CARRIED",
    "CONSTANT_PADDINGS",
    "CONVOLUTIONS",
    "ENTRY_BY_ENTRY",
    "GATES",
    "PIECES",
    "PLAIN",
    "PRODUCTS",
    "QUOTIENTS",
    "TRANSPOSED",
]

aten = torch.ops.aten

TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
CONVOLUTIONS = {
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
    *TRANSPOSED,
}
BY_COLUMNS = {aten.linear.default, aten.addmm.default}
QUOTIENTS = {aten.div.Tensor, aten.true_divide.Tensor}
PRODUCTS = {aten.mul.Tensor, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.einsum.default}
# linear, or piecewise linear through the origin, whatever their constant arguments: known not to need a look
PLAIN = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.clone.default),
    *(aten.to.dtype, aten._to_copy.default),
    *(aten.alias.default, aten.contiguous.default, aten.permute.default, aten.transpose.int, aten.t.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.expand.default),
    *(aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.flip.default, aten.roll.default),
    *(aten.repeat.default, aten.tile.default, aten.unflatten.int, aten.movedim.int, aten.unfold.default),
    *(aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.im2col.default, aten.col2im.default),
    *(aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default),
    *(aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default, aten.cumsum.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default),
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default),
    *(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec),
    *(aten.relu.default, aten.leaky_relu.default, aten.prelu.default, aten.abs.default, aten.neg.default),
    *(aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim, aten.topk.default, aten.sort.default),
    *(aten.mul.Scalar, aten.div.Scalar, aten.dropout.default, aten.split.Tensor, aten.split_with_sizes.default),
    *(aten.chunk.default, aten.unbind.int, operator.getitem),
}
# piecewise linear with constant pieces: the tangent is exact
PIECES = {
    *(aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default),
    *(aten.clamp.Tensor, aten.hardsigmoid.default, aten.threshold.default, aten.hardshrink.default),
    *(aten.softshrink.default, aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    *(aten.constant_pad_nd.default, aten.pad.default, aten.maximum.default, aten.minimum.default),
}
GATES = {
    **dict.fromkeys((aten.sigmoid.default, aten.softmax.int, aten.hardsigmoid.default), 2),
    **dict.fromkeys((aten.tanh.default, aten.erf.default), 1),
}
CARRIED = {
    *PLAIN,
    *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar),
    *(aten.mul.Tensor, aten.div.Tensor),
}
"""What a gate may pass on its way: shapes, and arithmetic with constants."""
CONSTANT_PADDINGS = {aten.constant_pad_nd.default, aten.pad.default}
# every output by the entries at its own place alone, as broadcasting lays them
ENTRY_BY_ENTRY = {
    *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar),
    *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor, aten.neg.default),
    *(aten.maximum.default, aten.minimum.default, aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    *(aten.clone.default, aten.alias.default, aten.contiguous.default, aten.dropout.default),
    *(aten.to.dtype, aten._to_copy.default),
}
