"""Convolutions and transposed convolutions of 1 to 3 dimensions."""

from __future__ import annotations

import torch

from revprop.convolution import Convolution
from revprop.rules.registry import Call, Fact, Linear, as_tuple, rule

aten = torch.ops.aten


@rule(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
def conv(call: Call) -> Fact:
    """``z = K * a + b`` (a cross-correlation, as in torch), zero padding."""
    node = call.only()
    weight = call.constant("weight")
    assert weight is not None
    dims = weight.dim() - 2
    stride, dilation = as_tuple(call["stride"], dims), as_tuple(call["dilation"], dims)
    given = call["padding"]
    if given == "same":  # torch pads the odd one behind
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = tuple((t // 2, t - t // 2) for t in total)
    else:
        padding = tuple((p, p) for p in as_tuple(0 if given == "valid" else given, dims))
    return Linear(Convolution(weight, call.graph.shape(node), call.shape, stride, padding, dilation, call["groups"]))


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(call: Call) -> Fact:
    """The adjoint of a convolution from the output's to the input's space, plus b."""
    node = call.only()
    weight = call.constant("weight")
    assert weight is not None
    dims = weight.dim() - 2
    # output padding adds positions behind that the described convolution does not see; the sizes say which
    padding = tuple((p, p) for p in as_tuple(call["padding"], dims))
    return Linear(
        Convolution(
            weight,
            call.shape,
            call.graph.shape(node),
            as_tuple(call["stride"], dims),
            padding,
            as_tuple(call["dilation"], dims),
            call["groups"],
            transposed=True,
        )
    )
