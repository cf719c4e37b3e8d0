"""A small network on the plan of VGG, for images of any size: to look at features where training VGG19 itself is out of reach."""

from collections import OrderedDict

from torch import nn

from revprop.networks.fr_pt import seed_parameters

__all__ = ["vgg_small"]


def vgg_small(*, classes: int = 10, seed: int | None = None, width: int = 16) -> nn.Sequential:
    """Build eight 3x3 convolutions in four stages, ReLU behind each and a 2x2 max-pool between stages, without batch norm.

    The mean over all positions goes into one fully connected layer, so that images of any size of at least 8x8 pixels fit.
    Kernels begin normal with variance 2 / fan-in (He et al. 2015), without which such a depth hardly begins to learn.

    Args:
        classes: number of logits.
        seed: draws the parameters; None: from torch's generator.
        width: channels of the first stage; 2, 4 and 8 times as many in the next.

    Returns:
        the network of images (n, 3, h, w): blocks conv1 to conv8, then pool, flatten, fc.

    Raises:
        ValueError: a width below 1.

    Example:
        >>> import torch
        >>> net = vgg_small(seed=0)
        >>> net(torch.zeros(2, 3, 40, 24)).shape, sum(p.numel() for p in net.parameters())
        (torch.Size([2, 10]), 294810)
    """
    if width < 1:
        raise ValueError(f"width: expected at least 1 channel, given {width}")
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    with seed_parameters(seed):
        for number in range(1, 9):
            stage, second = divmod(number - 1, 2)
            convolution = nn.Conv2d(channels, width * 2**stage, 3, padding=1)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
            parts = [convolution, nn.ReLU(), *([nn.MaxPool2d(2)] if second and stage < 3 else [])]
            blocks[f"conv{number}"] = nn.Sequential(*parts)
            channels = convolution.out_channels
        blocks |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(channels, classes)}
    return nn.Sequential(blocks)
