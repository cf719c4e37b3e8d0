"""What the tests of explain share: small networks with seeded parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """A module whose forward is a function of itself and its input."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = forward

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(self, *values)


def seeded(network: Callable[[], nn.Module]) -> nn.Module:
    """In float64 and eval mode, with statistics and biases that are not what they start as."""
    torch.manual_seed(0)
    net = network().double().eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for parameter in net.parameters():
        if parameter.dim() < 2:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return net
