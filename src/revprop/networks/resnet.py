"""Residual networks (He, Zhang, Ren, Sun, 2015): the CIFAR kind with option-A shortcuts, and ResNet-18 for ImageNet.

The parameters carry the names under which trained weights are usually published, so those files load as they are. Every
activation is a module of its own, never in place: each has a name that a user can point at.
"""

from torch import Tensor, nn

from revprop.networks.fr_pt import seed_parameters

__all__ = ["BasicBlock", "CifarResNet", "ImageNetResNet", "ZeroPadShortcut", "resnet18", "resnet20", "resnet32"]


class ZeroPadShortcut(nn.Module):
    """The option-A shortcut, without parameters: keep every second row and column, pad the channels with zeros.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out; the zeros are shared equally between front and back.

    Raises:
        ValueError: the channels to add are negative or an odd number.

    Example:
        >>> import torch
        >>> ZeroPadShortcut(2, 4)(torch.ones(1, 2, 4, 4)).sum(dim=(2, 3))
        tensor([[0., 4., 4., 0.]])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        added = out_channels - in_channels
        if added < 0 or added % 2:
            raise ValueError(f"expected an even number of channels to add, got {in_channels} -> {out_channels}")
        self.added = added

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, c, h, w) to (n, c + added, ceil(h / 2), ceil(w / 2))."""
        return nn.functional.pad(features[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, a shortcut around them, ReLU: ``relu(bn2(conv2(...)) + downsample(x))``.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
        stride: stride of the first convolution.
        downsample: the shortcut; ``nn.Identity()`` where the shapes agree.

    Example:
        >>> import torch
        >>> BasicBlock(2, 2, 1, nn.Identity())(torch.zeros(1, 2, 4, 4)).shape
        torch.Size([1, 2, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, downsample: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = downsample
        self.relu2 = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, out_channels, ceil(h / stride), ceil(w / stride))."""
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(features)))))
        out: Tensor = self.relu2(branch + self.downsample(features))
        return out


class CifarResNet(nn.Module):
    """The CIFAR residual network of depth 6 m + 2: stem, three stages of m blocks (16, 32, 64 channels), linear map.

    Args:
        depth: number of layers with weights: 20, 32, 44, 56, ...
        classes: number of logits.

    Raises:
        ValueError: ``depth`` is not 6 m + 2 for a whole m >= 1.

    Example:
        >>> import torch
        >>> CifarResNet(8, 10)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"expected a depth of 6 m + 2 (8, 14, 20, 32, ...), got {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stack(16, 16, blocks)
        self.layer2 = self._stack(16, 32, blocks)
        self.layer3 = self._stack(32, 64, blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)
        _initialise(self)

    @staticmethod
    def _stack(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, 1, nn.Identity())
        if in_channels != out_channels:
            first = BasicBlock(in_channels, out_channels, 2, ZeroPadShortcut(in_channels, out_channels))
        return nn.Sequential(first, *_repeat_block(out_channels, blocks - 1))

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, (n, classes), of images, (n, 3, 32, 32)."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.linear(self.avgpool(features).flatten(1))
        return logits


class ImageNetResNet(nn.Module):
    """The ImageNet residual network of basic blocks: 7x7 stem, max-pool, four stages (64 to 512 channels), linear map.

    Args:
        blocks: number of blocks in each of the four stages; (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) is ResNet-34.
        classes: number of logits.

    Example:
        >>> import torch
        >>> ImageNetResNet((1, 1, 1, 1), 5)(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 5])
    """

    def __init__(self, blocks: tuple[int, int, int, int], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = self._stack(64, 64, blocks[0])
        self.layer2 = self._stack(64, 128, blocks[1])
        self.layer3 = self._stack(128, 256, blocks[2])
        self.layer4 = self._stack(256, 512, blocks[3])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, classes)
        _initialise(self)

    @staticmethod
    def _stack(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, 1, nn.Identity())
        if in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, 2, bias=False)
            shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))
            first = BasicBlock(in_channels, out_channels, 2, shortcut)
        return nn.Sequential(first, *_repeat_block(out_channels, blocks - 1))

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, (n, classes), of images, (n, 3, h, w); the usual size is 224x224 pixels."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = self.layer4(self.layer3(self.layer2(self.layer1(features))))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


def _repeat_block(channels: int, times: int) -> list[BasicBlock]:
    return [BasicBlock(channels, channels, 1, nn.Identity()) for _ in range(times)]


def _initialise(model: nn.Module) -> None:
    # He initialisation over the outputs, as residual networks usually start from; the rest keeps PyTorch's defaults.
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet20(classes: int = 10, *, seed: int | None = None) -> CifarResNet:
    """Build ResNet-20 for images (n, 3, 32, 32), option-A shortcuts.

    The published CIFAR-10 weights expect images in [0, 1], then mean (0.485, 0.456, 0.406) and standard deviation
    (0.229, 0.224, 0.225).

    Args:
        classes: number of logits.
        seed: seed of the initial parameters; None draws from the global generator.

    Returns:
        the network, untrained, in training mode.

    Example:
        >>> sum(p.numel() for p in resnet20(seed=0).parameters())
        269722
    """
    with seed_parameters(seed):
        return CifarResNet(20, classes)


def resnet32(classes: int = 10, *, seed: int | None = None) -> CifarResNet:
    """Build ResNet-32 for images (n, 3, 32, 32), option-A shortcuts.

    Args and returns: as ``resnet20``.

    Example:
        >>> sum(p.numel() for p in resnet32(seed=0).parameters())
        464154
    """
    with seed_parameters(seed):
        return CifarResNet(32, classes)


def resnet18(classes: int = 1000, *, seed: int | None = None) -> ImageNetResNet:
    """Build ResNet-18 for images (n, 3, 224, 224); its parameters have the names of torchvision's.

    Args and returns: as ``resnet20``.

    Example:
        >>> sum(p.numel() for p in resnet18(seed=0).parameters())
        11689512
    """
    with seed_parameters(seed):
        return ImageNetResNet((2, 2, 2, 2), classes)
