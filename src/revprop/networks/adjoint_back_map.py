"""The networks of the AdjointBackMapV2 paper: its Tables D.1 (VGG7), D.3 (ResNet20) and D.4 (ResNet20-Fixup).

The tables list an activation behind the fully connected layer, too. It is left out here: it is behind every value that is
explained, and with Fixup's last layer, which begins at 0, it would keep every gradient at 0. That layer has no bias, as there.
"""

import itertools
import math

import torch
from torch import Tensor, nn

from revprop.networks.fr_pt import seed_parameters

__all__ = [
    "FixupBlock",
    "FixupResNet20",
    "PooledShortcut",
    "Vgg7",
    "WideBlock",
    "WideResNet20",
    "resnet20_fixup",
    "resnet20_wide",
    "vgg7",
]

WIDTHS = (32, 64, 96)
BLOCKS = 3  # of each width
LEAKINESS = 0.1  # that of the implementation that the paper refers to


class Vgg7(nn.Module):
    """Six 3x3 convolutions with batch norm and ReLU, average pools of 3x3 with stride 2 behind the second and the fourth.

    Args:
        classes: number of logits.

    Example:
        >>> Vgg7(10)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        channels = [3, *(width for width in WIDTHS for _ in range(2))]
        for i, (into, out) in enumerate(itertools.pairwise(channels)):
            self.add_module(f"conv{i}", nn.Conv2d(into, out, 3, padding=1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(out))
            self.add_module(f"relu{i}", nn.ReLU())
            if i in (1, 3):  # what lies outside of the image does not count
                self.add_module(f"pool{i}", nn.AvgPool2d(3, 2, padding=1, count_include_pad=False))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(WIDTHS[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, (n, classes), of images, (n, 3, 32, 32)."""
        features = images
        for module in self.children():
            features = module(features)
        return features


class PooledShortcut(nn.Module):
    """A shortcut without parameters: average pool of 1x1 with stride 2, and zero channels, half of them in front.

    Args:
        in_channels, out_channels: channels that come in and go out.

    Raises:
        ValueError: the channels to add are negative or an odd number.

    Example:
        >>> PooledShortcut(2, 4)(torch.ones(1, 2, 4, 4)).sum(dim=(2, 3))
        tensor([[0., 4., 4., 0.]])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        added = out_channels - in_channels
        if added < 0 or added % 2:
            raise ValueError(f"expected an even number of channels to add, got {in_channels} -> {out_channels}")
        self.added = added
        self.pool = nn.AvgPool2d(1, 2)

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, c, h, w) to (n, c + added, ceil(h / 2), ceil(w / 2))."""
        half = self.added // 2
        return nn.functional.pad(self.pool(features), (0, 0, 0, 0, half, half))


def _shortcut(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Identity() if in_channels == out_channels else PooledShortcut(in_channels, out_channels)


class WideBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut around them, leaky ReLU.

    Args:
        in_channels, out_channels: channels that come in and go out; where they differ, the first convolution has stride 2.

    Example:
        >>> WideBlock(2, 4)(torch.zeros(1, 2, 4, 4)).shape
        torch.Size([1, 4, 2, 2])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        stride = 1 if in_channels == out_channels else 2
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.LeakyReLU(LEAKINESS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels)
        self.relu2 = nn.LeakyReLU(LEAKINESS)

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, out_channels, ceil(h / stride), ceil(w / stride))."""
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(features)))))
        out: Tensor = self.relu2(branch + self.shortcut(features))
        return out


class FixupBlock(nn.Module):
    """Two 3x3 convolutions without norms (Zhang, Dauphin, Ma, 2019, Figure 1, right): scalars in front of and behind each,
    a multiplier behind the second, a shortcut around them, ReLU.

    Args:
        in_channels, out_channels: channels that come in and go out; where they differ, the first convolution has stride 2.

    Example:
        >>> [name for name, p in FixupBlock(2, 4).named_parameters() if p.numel() == 1]
        ['bias1a', 'bias1b', 'bias2a', 'scale', 'bias2b']
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        stride = 1 if in_channels == out_channels else 2
        self.bias1a = nn.Parameter(torch.zeros(1))
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bias1b = nn.Parameter(torch.zeros(1))
        self.relu1 = nn.ReLU()
        self.bias2a = nn.Parameter(torch.zeros(1))
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.bias2b = nn.Parameter(torch.zeros(1))
        self.shortcut = _shortcut(in_channels, out_channels)
        self.relu2 = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, out_channels, ceil(h / stride), ceil(w / stride))."""
        branch = self.relu1(self.conv1(features + self.bias1a) + self.bias1b)
        branch = self.conv2(branch + self.bias2a) * self.scale + self.bias2b
        out: Tensor = self.relu2(branch + self.shortcut(features))
        return out


def _stages(block: type[WideBlock] | type[FixupBlock]) -> list[nn.Sequential]:
    into = (WIDTHS[0], *WIDTHS)
    return [
        nn.Sequential(block(into[i], width), *(block(width, width) for _ in range(BLOCKS - 1)))
        for i, width in enumerate(WIDTHS)
    ]


class WideResNet20(nn.Module):
    """ResNet20 with 32, 64 and 96 channels: stem, three stages of three blocks, linear map; leaky ReLU.

    Args:
        classes: number of logits.

    Example:
        >>> WideResNet20(10)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(WIDTHS[0])
        self.relu0 = nn.LeakyReLU(LEAKINESS)
        self.layer1, self.layer2, self.layer3 = _stages(WideBlock)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTHS[-1], classes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, LEAKINESS, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, (n, classes), of images, (n, 3, 32, 32)."""
        features = self.relu0(self.bn0(self.conv0(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


class FixupResNet20(nn.Module):
    """The same without norms, with ReLU: 37 scalar biases and 9 multipliers, Fixup's initialisation.

    With L residual branches of m = 2 convolutions, the first of each begins at He's initialisation times ``L ** (-1 / (2 m - 2))``,
    the second and the last layer at 0, multipliers at 1, biases at 0 (Zhang, Dauphin, Ma, 2019, section 3).

    Args:
        classes: number of logits.

    Example:
        >>> FixupResNet20(10)(torch.ones(1, 3, 32, 32)).abs().max() == 0
        tensor(True)
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bias0 = nn.Parameter(torch.zeros(1))
        self.relu0 = nn.ReLU()
        self.layer1, self.layer2, self.layer3 = _stages(FixupBlock)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(WIDTHS[-1], classes, bias=False)
        branches = BLOCKS * len(WIDTHS)
        _he(self.conv0, 1.0)
        for module in self.modules():
            if isinstance(module, FixupBlock):
                _he(module.conv1, branches**-0.5)
                nn.init.zeros_(module.conv2.weight)
        nn.init.zeros_(self.fc.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, (n, classes), of images, (n, 3, 32, 32)."""
        features = self.relu0(self.conv0(images) + self.bias0)
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


def _he(convolution: nn.Conv2d, factor: float) -> None:
    """He's normal initialisation over the outputs, times a factor."""
    fan = convolution.out_channels * math.prod(convolution.kernel_size)
    nn.init.normal_(convolution.weight, 0.0, factor * math.sqrt(2 / fan))


def vgg7(classes: int = 10, *, seed: int | None = None) -> Vgg7:
    """Build VGG7 of Table D.1 for images (n, 3, 32, 32) with pixels in [0, 1].

    Args:
        classes: number of logits.
        seed: seed of the initial parameters; None draws from the global generator.

    Returns:
        the network, untrained, in training mode.

    Example:
        >>> sum(p.numel() for p in vgg7(seed=0).parameters())
        205344
    """
    with seed_parameters(seed):
        return Vgg7(classes)


def resnet20_wide(classes: int = 10, *, seed: int | None = None) -> WideResNet20:
    """Build ResNet20 of Table D.3 for images (n, 3, 32, 32) with pixels in [0, 1].

    Args and returns: as ``vgg7``.

    Example:
        >>> sum(p.numel() for p in resnet20_wide(seed=0).parameters())
        732256
    """
    with seed_parameters(seed):
        return WideResNet20(classes)


def resnet20_fixup(classes: int = 10, *, seed: int | None = None) -> FixupResNet20:
    """Build ResNet20-Fixup of Table D.4 for images (n, 3, 32, 32), scaled by the mean and standard deviation of the data.

    Args and returns: as ``vgg7``.

    Example:
        >>> sum(p.numel() for p in resnet20_fixup(seed=0).parameters() if p.numel() == 1)  # biases and multipliers
        46
    """
    with seed_parameters(seed):
        return FixupResNet20(classes)
