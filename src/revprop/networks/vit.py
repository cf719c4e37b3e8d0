"""A small vision transformer (Dosovitskiy et al., 2021): patches, class token, pre-norm encoder blocks, linear map.

Every layer is a module of its own, so that each has a name that a user can point at; attention itself is PyTorch's
``scaled_dot_product_attention``.
"""

import torch
from torch import Tensor, nn

from revprop.networks.fr_pt import seed_parameters

__all__ = ["EncoderBlock", "SelfAttention", "VisionTransformer", "vit_mnist"]


class SelfAttention(nn.Module):
    """Multi-head self-attention: ``proj(softmax(q k' / sqrt(width / heads)) v)``, with q, k, v from one linear map.

    Args:
        width: of a token.
        heads: number of heads; each has width / heads components.

    Raises:
        ValueError: ``width`` is no multiple of ``heads``.

    Example:
        >>> SelfAttention(8, 2)(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"expected a width that is a multiple of the number of heads, got {width} and {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (n, tokens, width) to the same shape."""
        n, count, width = tokens.shape
        parts = self.qkv(tokens).reshape(n, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, count, width))
        return out


class EncoderBlock(nn.Module):
    """A pre-norm encoder block: ``y = x + attn(norm1(x))``, then ``y + fc2(gelu(fc1(norm2(y))))``.

    Args:
        width: of a token.
        heads: of the attention.
        hidden: units of the two-layer map behind it.

    Example:
        >>> EncoderBlock(8, 2, 16)(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (n, tokens, width) to the same shape."""
        tokens = tokens + self.attn(self.norm1(tokens))
        out: Tensor = tokens + self.fc2(self.act(self.fc1(self.norm2(tokens))))
        return out


class VisionTransformer(nn.Module):
    """A vision transformer for square images; the class token's features give the logits.

    Args:
        channels: of an image.
        size: its height and width in pixels.
        patch: height and width of a patch.
        width: of a token.
        depth: number of encoder blocks.
        heads: of each attention.
        classes: number of logits.

    Raises:
        ValueError: ``size`` is no multiple of ``patch``, ``width`` none of ``heads``, or there is no block.

    Example:
        >>> VisionTransformer(3, 8, 4, 8, 1, 2, 5)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(self, channels: int, size: int, patch: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        if patch < 1 or size % patch:
            raise ValueError(f"expected an image size that is a multiple of the patch size, got {size} and {patch}")
        if depth < 1:
            raise ValueError(f"expected at least one block, got depth={depth}")
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads, 2 * width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        for embedding in (self.class_token, self.positions):
            nn.init.trunc_normal_(embedding, std=0.02)  # as usual for these networks

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits, (n, classes), of images, (n, channels, size, size)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


def vit_mnist(classes: int = 10, *, seed: int | None = None) -> VisionTransformer:
    """Build a vision transformer for images (n, 1, 28, 28): 7x7 patches, width 48, 4 blocks of 4 heads.

    Args:
        classes: number of logits.
        seed: seed of the initial parameters; None draws from the global generator.

    Returns:
        the network, untrained, in training mode.

    Example:
        >>> sum(p.numel() for p in vit_mnist(seed=0).parameters())
        79690
    """
    with seed_parameters(seed):
        return VisionTransformer(1, 28, 7, 48, 4, 4, classes)
