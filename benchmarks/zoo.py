"""Every architecture of the coverage page: written here, and small ones of timm, torchvision and transformers.

All have random weights and are built from their definitions: nothing is downloaded. Widths, depths and images are small, so
that each takes seconds on one core in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from architecture import Architecture, numbers
from handwritten_images import IMAGES
from handwritten_sequences import SEQUENCES
from libraries import timm, torchvision
from torch import nn
from zoo_transformers import TRANSFORMERS


def _timm(family: str, name: str, size: int = 32, note: str = "", **options: Any) -> Architecture:
    def build() -> nn.Module:
        return timm().create_model(name, pretrained=False, num_classes=10, **options)

    return Architecture(f"{name}{note}", family, "timm", build, (numbers(3, size, size),))


def _timm_class(family: str, name: str, build: Callable[[Any], nn.Module], size: int = 32) -> Architecture:
    return Architecture(name, family, "timm", lambda: build(timm().models), (numbers(3, size, size),))


VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 4}
SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
NARROW = {"channels": (16, 32, 64, 128)}
META = {"depths": (1, 1, 2, 1), "dims": (16, 32, 64, 64), "num_classes": 10}
MIXER = {"num_classes": 10, "img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 48}
DAVIT = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 4, 8)}
SEQUENCER = {"img_size": 32, "layers": [1] * 4, "embed_dims": (16, 32, 32, 32), "hidden_sizes": (4, 8, 8, 8)}

TIMM = (
    _timm("ResNet", "resnet18", note=", quarter width", **NARROW),
    _timm("ResNet", "resnet50", note=", quarter width", **NARROW),
    _timm("ResNet", "resnetv2_50", note=", eighth width", channels=(32, 64, 128, 256)),
    _timm("squeeze-excite", "legacy_seresnet18"),
    _timm("squeeze-excite", "skresnet18"),
    _timm("DenseNet", "densenet121", note=", narrow", growth_rate=8, block_config=(2, 4, 4, 2)),
    _timm("DLA", "dla46_c"),
    _timm("VoVNet", "ese_vovnet19b_slim_dw"),
    _timm("MobileNet", "mobilenetv2_035"),
    _timm("MobileNet", "mobilenetv3_small_050"),
    _timm("MobileNet", "mobilenetv4_conv_small_035"),
    _timm("EfficientNet", "efficientnet_b0"),
    _timm("EfficientNet", "tinynet_e"),
    _timm("MNASNet", "mnasnet_small"),
    _timm("LCNet", "lcnet_050"),
    _timm("GhostNet", "ghostnet_050"),
    _timm("RegNet", "regnetx_002"),
    _timm("RegNet", "regnety_002"),
    _timm("NF-Net", "nf_regnet_b0"),
    _timm("RepVGG", "repvgg_a0"),
    _timm_class("ConvNeXt", "ConvNeXt, narrow", lambda m: m.convnext.ConvNeXt(**META)),
    _timm_class(
        "ConvNeXt", "ConvNeXt V2, narrow", lambda m: m.convnext.ConvNeXt(**META, use_grn=True, ls_init_value=None)
    ),
    _timm("Inception", "inception_next_atto"),
    _timm("StarNet", "starnet_s050"),
    _timm_class("MambaOut", "MambaOut, narrow", lambda m: m.mambaout.MambaOut(**META)),
    _timm_class("MLP-Mixer", "MLP-Mixer, 2 blocks", lambda m: m.mlp_mixer.MlpMixer(**MIXER)),
    _timm_class("gMLP", "gMLP, 2 blocks", lambda m: _gmlp(m.mlp_mixer)),
    _timm_class("ResMLP", "ResMLP, 2 blocks", lambda m: _resmlp(m.mlp_mixer)),
    _timm_class("ConvMixer", "ConvMixer, 4 blocks", lambda m: m.convmixer.ConvMixer(48, 4, 5, 4, num_classes=10)),
    _timm_class("MetaFormer", "PoolFormer, narrow", lambda m: _metaformer(m.metaformer, *4 * ["Pooling"])),
    _timm_class("MetaFormer", "ConvFormer, narrow", lambda m: _metaformer(m.metaformer, *4 * ["SepConv"])),
    _timm_class(
        "MetaFormer", "CAFormer, narrow", lambda m: _metaformer(m.metaformer, *2 * ["SepConv"], *2 * ["Attention"])
    ),
    _timm("ViT", "vit_tiny_patch16_224", note=", 2 blocks", **VIT),
    _timm("DeiT", "deit_tiny_distilled_patch16_224", note=", 2 blocks", **VIT),
    _timm("DeiT", "deit3_small_patch16_224", note=", 2 blocks", **VIT),
    _timm("BEiT", "beit_base_patch16_224", note=", 2 blocks", **VIT),
    _timm("EVA", "eva02_tiny_patch14_224", note=", 2 blocks", **VIT),
    _timm("CaiT", "cait_xxs24_224", note=", 2 blocks", **VIT),
    _timm("XCiT", "xcit_nano_12_p16_224", note=", 2 blocks", **VIT),
    _timm("Swin", "swin_tiny_patch4_window7_224", note=", 2 stages", **SWIN),
    _timm("Swin", "swinv2_tiny_window8_256", note=", 2 stages", **SWIN),
    _timm("PVT", "pvt_v2_b0", 64, ", shallow", depths=(1, 1, 1, 1)),
    _timm("ConViT", "convit_tiny", note=", 4 blocks", img_size=32, patch_size=8, depth=4, local_up_to_layer=2),
    _timm("EdgeNeXt", "edgenext_xx_small", 64),
    _timm("MobileViT", "mobilevit_xxs", 64),
    _timm("MobileViT", "mobilevitv2_050", 64),
    _timm("LeViT", "levit_128s", 64, img_size=64),
    _timm("DaViT", "davit_tiny", 64, ", shallow", **DAVIT),
    _timm("LSTM", "sequencer2d_s", 32, ", shallow", **SEQUENCER),
)


def _gmlp(module: Any) -> nn.Module:
    return module.MlpMixer(
        **MIXER, mlp_ratio=6, block_layer=module.SpatialGatingBlock, mlp_layer=sys.modules["timm.layers"].GatedMlp
    )


def _resmlp(module: Any) -> nn.Module:
    return module.MlpMixer(**MIXER, mlp_ratio=4, block_layer=module.ResBlock, norm_layer=module.Affine)


def _metaformer(module: Any, *mixers: str) -> nn.Module:
    """One token mixer per stage; attention keeps channels last, and its norms with it."""
    norms = [module.LayerNormNoBias if mixer == "Attention" else module.LayerNorm2dNoBias for mixer in mixers]
    return module.MetaFormer(**META, token_mixers=[getattr(module, mixer) for mixer in mixers], norm_layers=norms)


def _vision(
    family: str,
    name: str,
    build: Callable[[Any], nn.Module],
    shape: tuple[int, ...] = (3, 32, 32),
    classes: bool = True,
    output: str | None = None,
) -> Architecture:
    make = lambda: build(torchvision().models)  # noqa: E731
    return Architecture(name, family, "torchvision", make, (numbers(*shape),), classes, output)


def _named(family: str, name: str, size: int = 32, **options: Any) -> Architecture:
    return _vision(family, name, lambda m: m.get_model(name, weights=None, num_classes=10, **options), (3, size, size))


def _vgg(module: Any) -> nn.Module:
    """VGG's features at a sixteenth of the width; its classifier has fixed sizes and is replaced."""
    layers = module.vgg.make_layers([4, "M", 8, "M", 16, 16, "M", 32, 32, "M", 32, 32, "M"], batch_norm=True)
    network = module.VGG(layers, num_classes=10)
    network.avgpool, network.classifier = nn.Identity(), nn.Linear(32, 10)
    return network


TORCHVISION = (
    _vision("VGG", "vgg11_bn, sixteenth width", _vgg),
    _named("ResNet", "resnet18"),
    _vision("DenseNet", "densenet, narrow", lambda m: m.DenseNet(8, (2, 4, 4, 2), 16, num_classes=10)),
    _named("Inception", "googlenet", 64, aux_logits=False, init_weights=True),
    _named("Inception", "inception_v3", 75, aux_logits=False, init_weights=True),
    _named("SqueezeNet", "squeezenet1_1", 64),
    _named("ShuffleNet", "shufflenet_v2_x0_5"),
    _named("MNASNet", "mnasnet0_5"),
    _named("MobileNet", "mobilenet_v3_small"),
    _named("RegNet", "regnet_y_400mf"),
    _vision("Swin", "swin, 2 stages", lambda m: m.SwinTransformer([2, 2], 24, [2, 2], [2, 4], [4, 4], num_classes=10)),
    _vision("ViT", "vit, 2 blocks", lambda m: m.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)),
    _vision("MaxViT", "maxvit", lambda m: m.MaxVit((32, 32), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=10)),
    _vision(
        "segmentation",
        "lraspp_mobilenet_v3_large",
        lambda m: m.get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=4),
        classes=False,
        output="out",
    ),
    _vision("3-d CNN", "mc3_18 (video)", lambda m: m.video.mc3_18(num_classes=10), (3, 2, 16, 16)),
)

ARCHITECTURES = {a.name: a for group in (IMAGES, SEQUENCES, TIMM, TORCHVISION, TRANSFORMERS) for a in group}
