"""Two small ReLU networks of tutorials for which trained weights are passed around: one for CIFAR-10, one for MNIST.

The names of their parameters are those of the published files; both return logits.
"""

from torch import Tensor, nn

from revprop.networks.fr_pt import seed_parameters

__all__ = ["SimpleCnn", "cifar10_simple_cnn", "mnist_lenet"]


class SimpleCnn(nn.Module):
    """Two unpadded 5x5 convolutions, each with a 2x2 max-pool and ReLU, then linear maps with ReLU between them.

    ReLU and max-pool commute, so one class serves both the files trained with the one order and those with the other.

    Args:
        in_channels: channels of the input image.
        image_size: height and width of the (square) input image in pixels.
        conv: output channels of the two convolutions ``conv1``, ``conv2``.
        fc: output sizes of the linear maps ``fc1``, ``fc2``, ...; the last one is the number of classes.

    Raises:
        ValueError: the image is too small for the two convolutions.

    Example:
        >>> import torch
        >>> SimpleCnn(1, 28, (10, 20), (50, 10))(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, in_channels: int, image_size: int, conv: tuple[int, int], fc: tuple[int, ...]) -> None:
        super().__init__()
        size = ((image_size - 4) // 2 - 4) // 2
        if size < 1:
            raise ValueError(f"expected an image of at least 16x16 pixels, got {image_size}x{image_size}")
        self.conv1 = nn.Conv2d(in_channels, conv[0], 5)
        self.pool1 = nn.MaxPool2d(2)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(conv[0], conv[1], 5)
        self.pool2 = nn.MaxPool2d(2)
        self.relu2 = nn.ReLU()
        features = conv[1] * size * size
        for i, out_features in enumerate(fc, start=1):
            self.add_module(f"fc{i}", nn.Linear(features, out_features))
            if i < len(fc):
                self.add_module(f"relu{i + 2}", nn.ReLU())
            features = out_features

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, (n, classes), of images, (n, in_channels, image_size, image_size)."""
        features = images
        for name, block in self.named_children():
            features = block(features.flatten(1) if name == "fc1" else features)
        return features


def cifar10_simple_cnn(classes: int = 10, *, seed: int | None = None) -> SimpleCnn:
    """Build the CIFAR-10 tutorial network: images (n, 3, 32, 32), convolutions 6, 16; linear 120, 84, classes.

    The published weights expect images in [0, 1], then mean 0.5 and standard deviation 0.5.

    Args:
        classes: number of logits.
        seed: seed of the initial parameters; None draws from the global generator.

    Returns:
        the network, untrained, in training mode.

    Example:
        >>> sum(p.numel() for p in cifar10_simple_cnn(seed=0).parameters())
        62006
    """
    with seed_parameters(seed):
        return SimpleCnn(3, 32, (6, 16), (120, 84, classes))


def mnist_lenet(classes: int = 10, *, seed: int | None = None) -> SimpleCnn:
    """Build the MNIST tutorial network: images (n, 1, 28, 28) in [0, 1], convolutions 10, 20; linear 50, classes.

    Its dropout, which does nothing outside training, is left out.

    Args and returns: as ``cifar10_simple_cnn``.

    Example:
        >>> sum(p.numel() for p in mnist_lenet(seed=0).parameters())
        21840
    """
    with seed_parameters(seed):
        return SimpleCnn(1, 28, (10, 20), (50, classes))
