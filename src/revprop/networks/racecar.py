"""The networks of the racecar paper, from the tables of its appendix: Tables 7 (bits), 9 (MNIST), 11 (CIFAR) and 16 (VGG19).

Every convolution is 3x3 with stride 1 and padding 1, which the tables do not say: Table 9's 38,645 weights are met with it
alone (two pools leave 7x7 of 28x28 pixels, and FC(10) has 49 * 10 + 10). Table 7's 294 are met as printed. Tables 11 and 16
print no count; the text's "ca. 143 million" for VGG19 is met (143,667,240). Activations and batch norms are where the tables
print them: behind the last layer, too, of all but the MNIST network.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from revprop.networks.fr_pt import seed_parameters

__all__ = ["RacecarNet", "bits", "cifar", "cifar_narrow", "mnist", "vgg19"]

CIFAR_CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG19_CHANNELS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


class RacecarNet(nn.Module):
    """A chain of blocks ``conv1``, ``conv2``, ..., ``fc1``, ``fc2``, ..., each an ``nn.Sequential``.

    Example:
        >>> net = bits(seed=0)
        >>> [name for name, _ in net.named_children()], sum(p.numel() for p in net.parameters())
        (['fc1', 'fc2', 'fc3', 'fc4', 'fc5', 'fc6'], 294)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs, (n, ...), to outputs, (n, classes)."""
        for name, block in self.named_children():
            x = block(x.flatten(1) if name == "fc1" else x)
        return x


def bits(*, classes: int = 2, seed: int | None = None) -> RacecarNet:
    """Build the network of the 12-bit task (Table 7): (n, 12) -> 10, 7, 5, 4, 3, ``classes``; tanh behind every layer.

    Args:
        classes: number of outputs; each lies in (-1, 1).
        seed: draws the parameters; None: from torch's generator.

    Returns:
        the network; 294 parameters for two classes.

    Example:
        >>> import torch
        >>> bits(seed=0)(torch.zeros(3, 12)).shape
        torch.Size([3, 2])
    """
    net = RacecarNet()
    sizes = [12, 10, 7, 5, 4, 3, classes]
    with seed_parameters(seed):
        for i in range(1, len(sizes)):
            net.add_module(f"fc{i}", nn.Sequential(nn.Linear(sizes[i - 1], sizes[i]), nn.Tanh()))
    return net


def mnist(*, classes: int = 10, seed: int | None = None) -> RacecarNet:
    """Build the MNIST network (Table 9): (n, 1, 28, 28) -> 64, 64 and 1 channels, ReLU, pools behind the first two, FC.

    Parameters begin as TensorFlow's do (Glorot and Bengio, 2010, uniform; biases 0): all digits go through one channel and its
    ReLU, which by torch's own rule is dead, or soon will be, for every fifth seed.

    Args:
        classes, seed: as for :func:`bits`.

    Returns:
        the network: blocks conv1, conv2, conv3, fc1; 38,645 parameters for ten classes.

    Example:
        >>> sum(p.numel() for p in mnist(seed=0).parameters())
        38645
    """
    net = RacecarNet()
    with seed_parameters(seed):
        _add_convolutions(net, 1, ((64,), (64,), (1,)), norm=False, last_pool=False)
        net.add_module("fc1", nn.Sequential(nn.Linear(49, classes)))
        for parameter in net.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
    return net


def cifar(*, classes: int = 10, seed: int | None = None, width: int = 64) -> RacecarNet:
    """Build the CIFAR network (Table 11): thirteen convolutions with batch norm, four pools, three fully connected layers.

    The table prints batch norm and ReLU behind the last layer as well, so that no output is negative.

    Args:
        classes, seed: as for :func:`bits`. width: channels of the first convolution, 64 in the paper; all others, and the
            4,096 of the hidden fully connected layers, in proportion.

    Returns:
        the network of images (n, 3, 32, 32): blocks conv1 to conv13, fc1 to fc3; 39,954,526 parameters for ten classes.

    Raises:
        ValueError: a width below 1.

    Example:
        >>> sum(p.numel() for p in cifar(seed=0, width=8).parameters())
        633062
    """
    if width < 1:
        raise ValueError(f"width: expected at least 1 channel, given {width}")
    net = RacecarNet()
    with seed_parameters(seed):
        channels = [[count * width // 64 for count in stage] for stage in CIFAR_CHANNELS]
        _add_convolutions(net, 3, channels, norm=True, last_pool=False)
        sizes = [4 * channels[-1][-1], 64 * width, 64 * width, classes]
        for i in range(1, 4):
            layers = [nn.Linear(sizes[i - 1], sizes[i]), nn.BatchNorm1d(sizes[i]), nn.ReLU()]
            net.add_module(f"fc{i}", nn.Sequential(*layers))
    return net


def cifar_narrow(*, classes: int = 10, seed: int | None = None) -> RacecarNet:
    """Build :func:`cifar` with a quarter of its channels: 16 in the first convolution.

    Example:
        >>> cifar_narrow(seed=0).conv13[0].out_channels
        128
    """
    return cifar(classes=classes, seed=seed, width=16)


def vgg19(*, classes: int = 1000, seed: int | None = None) -> RacecarNet:
    """Build VGG19 (Table 16): sixteen convolutions, five pools, three fully connected layers, ReLU behind each of them.

    Not listed by name, as no part of a loop over all networks: 0.6 GB. ``revprop.networks.racecar:vgg19`` names it.

    Args:
        classes, seed: as for :func:`bits`.

    Returns:
        the network of images (n, 3, 224, 224): blocks conv1 to conv16, fc1 to fc3; 143,667,240 parameters for 1,000 classes.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     sum(p.numel() for p in vgg19().parameters())
        143667240
    """
    net = RacecarNet()
    with seed_parameters(seed):
        _add_convolutions(net, 3, VGG19_CHANNELS, norm=False, last_pool=True)
        sizes = [512 * 7 * 7, 4096, 4096, classes]
        for i in range(1, 4):
            net.add_module(f"fc{i}", nn.Sequential(nn.Linear(sizes[i - 1], sizes[i]), nn.ReLU()))
    return net


def _add_convolutions(
    net: RacecarNet, in_channels: int, stages: Sequence[Sequence[int]], norm: bool, last_pool: bool
) -> None:
    """Stages of convolutions, a pool behind each; behind the last one where ``last_pool`` says so."""
    number = 0
    for stage, widths in enumerate(stages, start=1):
        for place, out_channels in enumerate(widths, start=1):
            number += 1
            block: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, 3, padding=1)]
            block += [nn.BatchNorm2d(out_channels), nn.ReLU()] if norm else [nn.ReLU()]
            if place == len(widths) and (stage < len(stages) or last_pool):
                block.append(nn.MaxPool2d(2))
            net.add_module(f"conv{number}", nn.Sequential(*block))
            in_channels = out_channels
