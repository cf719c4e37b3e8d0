"""Small networks on images and volumes, one per idea: what a user might write by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from architecture import Architecture, numbers
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int = 3, **options: int) -> nn.Sequential:
    """A convolution that keeps the size, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class EveryPooling(nn.Module):
    """Max, average, ceil-mode, overlapping, Lp, adaptive average and adaptive max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(3, 8), conv(8, 12), conv(12, 16)
        self.overlapping = nn.MaxPool2d(3, 2, 1)
        self.average = nn.AvgPool2d(2, ceil_mode=True)
        self.power = nn.LPPool2d(2, 2)
        self.head = nn.Linear(16 * 5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.average(self.second(self.overlapping(self.first(x))))
        x = self.power(self.third(x)) + F.max_pool2d(x.repeat(1, 2, 1, 1)[:, :16], 2)
        return self.head(torch.cat([F.adaptive_avg_pool2d(x, 2).flatten(1), F.adaptive_max_pool2d(x, 1).flatten(1)], 1))


class UNet(nn.Module):
    """Two levels, skips by concatenation, transposed convolutions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = conv(3, width), conv(width, 2 * width), conv(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge2, self.merge1 = conv(4 * width, 2 * width), conv(2 * width, width)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.bottom(F.max_pool2d(second, 2))
        x = self.merge2(torch.cat([self.up2(x), second], 1))
        return self.head(self.merge1(torch.cat([self.up1(x), first], 1)))


class DiffusionUNet(nn.Module):
    """Group norm, SiLU, a time given to every level, self-attention at the bottom."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.stem, self.down = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, 2 * width)
        self.qkv, self.project = nn.Conv2d(2 * width, 6 * width, 1), nn.Conv2d(2 * width, 2 * width, 1)
        self.up = nn.Conv2d(3 * width, width, 3, padding=1)
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angles = time * torch.arange(1, 5, dtype=x.dtype)
        code = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        first = F.silu(self.norm1(self.stem(x)))
        x = F.silu(self.norm2(self.down(first)) + code[:, :, None, None])
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        mixed = v @ (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1).transpose(1, 2)
        x = x + self.project(mixed.view_as(x))
        return self.head(F.silu(self.up(torch.cat([F.interpolate(x, scale_factor=2.0), first], 1))))


class DenseBlock(nn.Module):
    """Every layer reads all layers before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 3, padding=1)) for i in range(4)
        )
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return self.head(F.avg_pool2d(torch.cat(found, 1), 4).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Channels rescaled by a gate computed from their means."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.body = conv(3, width), conv(width, width)
        self.gate = nn.Sequential(nn.Conv2d(width, 4, 1), nn.ReLU(), nn.Conv2d(4, width, 1), nn.Sigmoid())
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        body = self.body(x)
        return self.head((x + body * self.gate(F.adaptive_avg_pool2d(body, 1))).mean((2, 3)))


class FeaturePyramid(nn.Module):
    """Three scales merged from the top down by nearest and bilinear up-sampling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(3, 8, stride=2), conv(8, 12, stride=2), conv(12, 16, stride=2)
        self.lateral1, self.lateral2, self.lateral3 = nn.Conv2d(8, 8, 1), nn.Conv2d(12, 8, 1), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(first)
        top = self.lateral3(self.third(second))
        middle = self.lateral2(second) + F.interpolate(top, scale_factor=2, mode="nearest")
        low = self.lateral1(first) + F.interpolate(middle, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(torch.cat([level.amax((2, 3)) for level in (low, middle, top)], 1))


class MixerBlock(nn.Module):
    """Mixes patches, then channels."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.patches = nn.Sequential(nn.Linear(patches, 2 * patches), nn.GELU(), nn.Linear(2 * patches, patches))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer of two blocks."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(16, width), MixerBlock(16, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


class Autoencoder(nn.Module):
    """Strided convolutions down to a code, transposed ones up again."""

    def __init__(self, code: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten()
        )
        self.bottleneck = nn.Linear(256, code)
        self.decoder = nn.Sequential(
            nn.Linear(code, 256),
            nn.ReLU(),
            nn.Unflatten(1, (16, 4, 4)),
            nn.ConvTranspose2d(16, 8, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 3, 4, 2, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.bottleneck(self.encoder(x)))


class Siamese(nn.Module):
    """Two images through one encoder; same or different."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            conv(3, 8), nn.MaxPool2d(2), conv(8, 12), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, 16)
        )
        self.head = nn.Linear(32, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.encoder(left), self.encoder(right)
        return self.head(torch.cat([(a - b).abs(), a * b], 1))


class TwoHeads(nn.Module):
    """A class and a box from one trunk, returned as a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(conv(3, 8), nn.MaxPool2d(2), conv(8, 16), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.label, self.box = nn.Linear(64, 10), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x)
        return {"label": self.label(x), "box": self.box(x).sigmoid()}


class FiLM(nn.Module):
    """An image's features scaled and shifted by a second input."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem, self.body = conv(3, width), conv(width, width)
        self.condition = nn.Linear(6, 2 * width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, 1)
        x = F.max_pool2d(self.stem(x), 2)
        return self.head(F.relu(self.body(x) * (1 + scale) + shift).mean((2, 3)))


class SuperResolution(nn.Module):
    """A residual added to the up-sampled input, sizes changed by pixel shuffling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 48, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        body = F.pixel_shuffle(self.second(F.gelu(self.first(F.pixel_unshuffle(x, 2)))), 4)
        return body + F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)


class StyleTransfer(nn.Module):
    """Reflection padding, instance norm, a residual block, nearest up-sampling."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 8, 3, 2), nn.InstanceNorm2d(8, affine=True))
        self.body = nn.Sequential(
            nn.ReplicationPad2d(1), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
        )
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 3, padding=1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x).relu()
        return self.up(x + self.body(x))


class SpatialTransformer(nn.Module):
    """A network that chooses where to look: its input is resampled on a grid it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.locate = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(256, 6))
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ELU(), nn.Flatten(), nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        straight = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=x.dtype)
        theta = (straight + 0.1 * self.locate(x).tanh()).view(-1, 2, 3)
        return self.body(F.grid_sample(x, F.affine_grid(theta, list(x.shape), False), align_corners=False))


class LocallyConnected(nn.Module):
    """Own weights at every position: patches cut out and put back."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(16, 8, 48))
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 4, stride=4).transpose(1, 2)
        return self.head(torch.einsum("plc,npc->npl", self.weight, patches).relu().flatten(1))


class FourierLayer(nn.Module):
    """A Fourier neural operator: learned factors on the lowest frequencies."""

    def __init__(self, width: int = 6, modes: int = 4) -> None:
        super().__init__()
        self.modes = modes
        self.lift, self.side, self.head = nn.Conv2d(1, width, 1), nn.Conv2d(width, width, 1), nn.Conv2d(width, 1, 1)
        self.weight = nn.Parameter(torch.randn(width, width, modes, modes, 2) / width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        low = torch.fft.rfft2(x)[:, :, : self.modes, : self.modes]
        low = torch.einsum("ncij,ckij->nkij", low, torch.view_as_complex(self.weight))
        spread = F.pad(low, (0, x.shape[3] // 2 + 1 - self.modes, 0, x.shape[2] - self.modes))
        return self.head(F.gelu(torch.fft.irfft2(spread, s=x.shape[2:]) + self.side(x)))


class Volume(nn.Module):
    """Convolutions, batch norm and pooling in three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(1, 6, 3, padding=1),
            nn.BatchNorm3d(6),
            nn.ReLU(),
            nn.MaxPool3d(2),
            nn.Conv3d(6, 10, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool3d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(80, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class PatchTransformer(nn.Module):
    """A vision transformer written out: class token, position code, attention by softmax of a product."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 17, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.project((weights @ v).transpose(1, 2).flatten(2))
        return self.head((x + self.feed(self.norm2(x)))[:, 0])


IMAGE = numbers(3, 16, 16)


def _one(name: str, family: str, build: type[nn.Module], inputs: tuple = (IMAGE,), **options: object) -> Architecture:
    return Architecture(name, family, "written here", build, inputs, **options)  # type: ignore[arg-type]


IMAGES = (
    _one("CNN with every pooling", "CNN", EveryPooling, (numbers(3, 32, 32),)),
    _one("dense block", "DenseNet", DenseBlock),
    _one("squeeze-excite block", "squeeze-excite", SqueezeExcite),
    _one("feature pyramid", "CNN", FeaturePyramid, (numbers(3, 32, 32),)),
    _one("U-Net", "U-Net", UNet, classes=False),
    _one("diffusion U-Net (image and time)", "U-Net", DiffusionUNet, (numbers(3, 8, 8), numbers(1)), classes=False),
    _one("convolutional autoencoder", "autoencoder", Autoencoder, classes=False),
    _one("pixel-shuffle super-resolution", "super-resolution", SuperResolution, classes=False),
    _one("style transfer (instance norm)", "style transfer", StyleTransfer, classes=False),
    _one("MLP-Mixer", "MLP-Mixer", Mixer),
    _one("patch transformer", "ViT", PatchTransformer),
    _one("Siamese network (two images)", "Siamese", Siamese, (IMAGE, IMAGE)),
    _one("two heads, class reversed", "several outputs", TwoHeads, output="label"),
    _one("two heads, box reversed", "several outputs", TwoHeads, output="box", classes=False),
    _one("FiLM conditioning (image and vector)", "FiLM", FiLM, (IMAGE, numbers(6))),
    _one("spatial transformer", "spatial transformer", SpatialTransformer),
    _one("locally connected layer", "CNN", LocallyConnected),
    _one("Fourier neural operator", "neural operator", FourierLayer, (numbers(1, 16, 16),), classes=False),
    _one("3-d convolutions", "3-d CNN", Volume, (numbers(1, 8, 8, 8),)),
)
