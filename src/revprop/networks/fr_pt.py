"""The networks of the feature-reconstruction post-training paper, recovered from its parameter counts.

Every convolution has stride 1 and no padding; tanh follows every layer but the last; a 2x2 max-pool follows every
convolution but the last. A block is one named child (``conv1``, ..., ``fc1``, ...): a layer is pointed at by that name.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = [
    "ConvNet",
    "cifar10",
    "cifar10_reversed",
    "cifar100",
    "digits",
    "imagenette",
    "imagewoof",
    "mnist",
    "seed_parameters",
    "tiny_imagenet",
]


@contextmanager
def seed_parameters(seed: int | None) -> Iterator[None]:
    """Make modules built inside the block draw their parameters from ``seed``, then put the global random state back.

    With a seed the modules are built on the CPU, whatever the default device: the same seed gives the same numbers on
    every machine.

    Args:
        seed: the seed, or None to draw from the global generator as usual.

    Returns:
        a context manager.

    Example:
        >>> with seed_parameters(0):
        ...     first = nn.Linear(2, 2)
        >>> with seed_parameters(0):
        ...     second = nn.Linear(2, 2)
        >>> torch.equal(first.weight, second.weight)
        True
    """
    if seed is None:
        yield
        return
    # torch.manual_seed would also seed the accelerators' generators, which this fork does not put back.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


class ConvNet(nn.Module):
    """A chain of convolution blocks ``conv1``, ``conv2``, ... and fully connected blocks ``fc1``, ``fc2``, ...

    ``conv{i}`` is convolution (stride 1, no padding), tanh and, but in the last one, a 2x2 max-pool; ``fc{i}`` is a
    linear map and, but in the last one, tanh. Each block is an ``nn.Sequential``; its output is the layer's features.

    Args:
        in_channels: channels of the input image.
        image_size: height and width of the (square) input image in pixels.
        conv: (output channels, kernel size in pixels) of each convolution, in forward order; at least one.
        fc: output sizes of the linear maps, the last one the number of classes; at least one.

    Raises:
        ValueError: ``conv`` or ``fc`` is empty, or the image is too small for the convolutions.

    Example:
        >>> net = ConvNet(1, 28, conv=[(2, 5), (4, 5)], fc=[10])
        >>> [name for name, _ in net.named_children()]
        ['conv1', 'conv2', 'fc1']
        >>> net(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 10])
    """

    def __init__(self, in_channels: int, image_size: int, conv: Sequence[tuple[int, int]], fc: Sequence[int]) -> None:
        super().__init__()
        if not conv or not fc:
            raise ValueError(f"expected at least one convolution and one linear map, got conv={conv!r} and fc={fc!r}")
        channels, size = in_channels, image_size
        for i, (out_channels, kernel) in enumerate(conv, start=1):
            block: list[nn.Module] = [nn.Conv2d(channels, out_channels, kernel), nn.Tanh()]
            channels, size = out_channels, size - kernel + 1
            if i < len(conv):
                block.append(nn.MaxPool2d(2))
                size //= 2
            if size < 1:
                raise ValueError(
                    f"an image of {image_size}x{image_size} pixels leaves nothing after conv{i} (kernel {kernel}): "
                    "give a larger image_size, smaller kernels or fewer convolutions"
                )
            self.add_module(f"conv{i}", nn.Sequential(*block))
        features = channels * size * size
        for i, out_features in enumerate(fc, start=1):
            linear = nn.Linear(features, out_features)
            self.add_module(f"fc{i}", nn.Sequential(linear, nn.Tanh()) if i < len(fc) else nn.Sequential(linear))
            features = out_features

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, (n, classes), of images, (n, in_channels, image_size, image_size)."""
        features = images
        for name, block in self.named_children():
            features = block(features.flatten(1) if name == "fc1" else features)
        return features


def _build(
    seed: int | None, in_channels: int, image_size: int, conv: Sequence[tuple[int, int]], fc: Sequence[int]
) -> ConvNet:
    with seed_parameters(seed):
        return ConvNet(in_channels, image_size, conv, fc)


def mnist(*, classes: int = 10, seed: int | None = None) -> ConvNet:
    """Build the paper's MNIST network: images (n, 1, 28, 28), blocks conv1, conv2, fc1; 2,826 parameters.

    Args:
        classes: number of logits.
        seed: seed of the initial parameters; None draws from the global generator.

    Returns:
        the network, untrained, in training mode.

    Example:
        >>> mnist(seed=0)(torch.zeros(1, 1, 28, 28)).shape
        torch.Size([1, 10])
    """
    return _build(seed, 1, 28, [(2, 5), (4, 5)], [classes])


def cifar10(*, classes: int = 10, seed: int | None = None) -> ConvNet:
    """Build the paper's CIFAR-10 network: images (n, 3, 32, 32), blocks conv1 to conv3, fc1, fc2; 34,343 parameters.

    Args and returns: as ``mnist``.

    Example:
        >>> cifar10(seed=0)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    return _build(seed, 3, 32, [(5, 5), (10, 3), (15, 3)], [128, classes])


def cifar10_reversed(*, classes: int = 10, seed: int | None = None) -> ConvNet:
    """Build the CIFAR-10 network of the paper's figure 7(b): as ``cifar10``, with channels that shrink (15, 10, 5).

    Args and returns: as ``mnist``.

    Example:
        >>> cifar10_reversed(seed=0)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    return _build(seed, 3, 32, [(15, 5), (10, 3), (5, 3)], [128, classes])


def cifar100(*, classes: int = 100, seed: int | None = None) -> ConvNet:
    """Build the paper's CIFAR-100 network: images (n, 3, 32, 32), blocks conv1 to conv3, fc1, fc2; 112,721 parameters.

    Args and returns: as ``mnist``.

    Example:
        >>> cifar100(seed=0)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 100])
    """
    return _build(seed, 3, 32, [(10, 5), (15, 3), (20, 3)], [256, classes])


def tiny_imagenet(*, classes: int = 200, seed: int | None = None) -> ConvNet:
    """Build the paper's Tiny ImageNet network: images (n, 3, 64, 64), conv1 to conv4, fc1, fc2; 496,917 parameters.

    Args and returns: as ``mnist``.

    Example:
        >>> tiny_imagenet(classes=10, seed=0)(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """
    return _build(seed, 3, 64, [(10, 5), (25, 3), (35, 3), (45, 3)], [512, classes])


def imagenette(*, classes: int = 10, seed: int | None = None) -> ConvNet:
    """Build the paper's Imagenette network: images (n, 3, 224, 224), conv1 to conv5, fc1, fc2; 180,608 parameters.

    Args and returns: as ``mnist``.

    Example:
        >>> [name for name, _ in imagenette(seed=0).named_children()]
        ['conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'fc1', 'fc2']
    """
    return _build(seed, 3, 224, [(10, 25), (15, 17), (20, 11), (25, 5), (30, 3)], [128, classes])


def imagewoof(*, classes: int = 10, seed: int | None = None) -> ConvNet:
    """Build the paper's Imagewoof network: the architecture of ``imagenette``, on another data set.

    Args and returns: as ``mnist``.

    Example:
        >>> sum(p.numel() for p in imagewoof(seed=0).parameters())
        180608
    """
    return imagenette(classes=classes, seed=seed)


def digits(*, classes: int = 10, seed: int | None = None) -> ConvNet:
    """Build a network for scikit-learn's digits, in the paper's style and small enough for a demonstration of seconds.

    Not from the paper. Images (n, 1, 8, 8), blocks conv1 (4 @ 3x3), conv2 (8 @ 2x2), fc1 (32-32), fc2 (32-10).

    Args and returns: as ``mnist``.

    Example:
        >>> digits(seed=0)(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 10])
    """
    return _build(seed, 1, 8, [(4, 3), (8, 2)], [32, classes])
