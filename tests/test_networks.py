"""The papers' networks against the papers' parameter counts; published weights against their measured accuracy."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from revprop.datasets import ImageData, load_idx_folder, load_npz
from revprop.folding import fold
from revprop.graph import trace
from revprop.networks import NETWORKS, ConvNet, load_network, load_weights, racecar
from revprop.networks.adjoint_back_map import FixupBlock, FixupResNet20, PooledShortcut
from revprop.networks.resnet import CifarResNet, ZeroPadShortcut, resnet18
from revprop.networks.vit import EncoderBlock, SelfAttention, VisionTransformer
from revprop.reverse import check

DATA = Path(os.environ.get("REVPROP_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Table of the paper's "#paras" columns; the reversed network and the digits network counted by hand.
FR_PT = {
    "mnist": (1, 28, [52, 204, 2570]),
    "cifar10": (3, 32, [380, 460, 1365, 30848, 1290]),
    "cifar10-reversed": (3, 32, [1140, 1360, 455, 10368, 1290]),
    "cifar100": (3, 32, [760, 1365, 2720, 82176, 25700]),
    "tiny-imagenet": (3, 64, [760, 2275, 7910, 14220, 369152, 102600]),
    "imagenette": (3, 224, [18760, 43365, 36320, 12525, 6780, 61568, 1290]),
    "imagewoof": (3, 224, [18760, 43365, 36320, 12525, 6780, 61568, 1290]),
    "digits": (1, 8, [40, 136, 1056, 330]),
}
CLASSES = {"cifar100": 100, "tiny-imagenet": 200}


@pytest.mark.parametrize("name", FR_PT)
def test_fr_pt_networks(name: str) -> None:
    channels, size, counts = FR_PT[name]
    net = NETWORKS[name](seed=0)
    assert [count(block) for _, block in net.named_children()] == counts
    convolutions = sum(key.startswith("conv") for key, _ in net.named_children())
    linear = len(counts) - convolutions
    expected = [f"conv{i + 1}" for i in range(convolutions)] + [f"fc{i + 1}" for i in range(linear)]
    assert [key for key, _ in net.named_children()] == expected
    kinds = [[type(module).__name__ for module in block] for _, block in net.named_children()]  # type: ignore[attr-defined]
    assert kinds == (
        [["Conv2d", "Tanh", "MaxPool2d"]] * (convolutions - 1)
        + [["Conv2d", "Tanh"]]
        + [["Linear", "Tanh"]] * (linear - 1)
        + [["Linear"]]
    )
    with torch.no_grad():
        logits = net(torch.rand(2, channels, size, size))
    assert logits.shape == (2, CLASSES.get(name, 10))
    assert bool(logits.isfinite().all())


def test_conv_net_computes_its_blocks_in_order() -> None:
    net = NETWORKS["mnist"](seed=0).double()
    images = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    state = net.state_dict()
    features = torch.conv2d(images, state["conv1.0.weight"], state["conv1.0.bias"]).tanh()
    features = torch.max_pool2d(features, 2)
    features = torch.conv2d(features, state["conv2.0.weight"], state["conv2.0.bias"]).tanh()
    expected = features.reshape(3, 256) @ state["fc1.0.weight"].T + state["fc1.0.bias"]
    torch.testing.assert_close(net(images), expected)


def test_conv_net_errors() -> None:
    with pytest.raises(ValueError, match=r"an image of 8x8 pixels leaves nothing after conv2 \(kernel 5\)"):
        ConvNet(1, 8, [(2, 5), (2, 5)], [10])
    with pytest.raises(ValueError, match="at least one convolution and one linear map"):
        ConvNet(1, 8, [(2, 3)], [])


@pytest.mark.parametrize("name", NETWORKS)
def test_seed_and_classes(name: str) -> None:
    before = torch.get_rng_state()
    first, again, other = NETWORKS[name](seed=3), NETWORKS[name](seed=3), NETWORKS[name](seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert first.training
    NETWORKS[name]()
    assert not torch.equal(torch.get_rng_state(), before)  # without a seed: from the global generator
    assert [*NETWORKS[name](classes=7, seed=0).parameters()][-1].shape[0] == 7  # some last layers have no bias


# --- Residual networks -----------------------------------------------------------------------------------------------


# Tables D.1, D.3, D.4 of AdjointBackMapV2: channels in, channels out and height of every convolution behind the first
STAGES = {
    "vgg7": [(32, 32, 32), (32, 64, 16), (64, 64, 16), (64, 96, 8), (96, 96, 8)],
    "resnet20-wide": [
        *[(32, 32, 32)] * 6,
        *[(32, 64, 16), *[(64, 64, 16)] * 5],
        *[(64, 96, 8), *[(96, 96, 8)] * 5],
    ],
}
STAGES["resnet20-fixup"] = STAGES["resnet20-wide"]
BIASES = {"vgg7": 384, "resnet20-wide": 7 * 32 + 6 * 64 + 6 * 96, "resnet20-fixup": 37}  # of the folded network


@pytest.mark.parametrize("name", STAGES)
def test_adjoint_back_map_networks(name: str) -> None:
    net = NETWORKS[name](seed=0).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.01)  # what is folded has a bias only where there is something to add
    x = torch.rand(2, 3, 32, 32)
    folded = fold(net, x)
    convolutions = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert [tuple(m.weight.shape) for m in convolutions[1:]] == [(k, c, 3, 3) for c, k, _ in STAGES[name]]
    graph = trace(folded, x)
    names = [path for path, m in folded.named_modules() if isinstance(m, nn.Conv2d)]
    assert [graph.shape(graph.node(path)) for path in names[1:]] == [(k, size, size) for _, k, size in STAGES[name]]
    kernels = 9 * (3 * 32 + sum(c * k for c, k, _ in STAGES[name])) + 960
    multipliers = 9 if name == "resnet20-fixup" else 0
    assert count(folded) == kernels + BIASES[name] + multipliers
    assert count(net) == count(folded) + (0 if name == "resnet20-fixup" else BIASES[name])  # a scale for each bias
    pools = [(m.kernel_size, m.stride) for m in net.modules() if isinstance(m, nn.AvgPool2d)]
    assert pools == ([(3, 2)] * 2 if name == "vgg7" else [(1, 2)] * 2)


@pytest.mark.parametrize("name", STAGES)
def test_folding_the_adjoint_back_map_networks_changes_no_output(name: str) -> None:
    net = NETWORKS[name](seed=0)
    torch.manual_seed(1)
    with torch.no_grad():  # as if trained: nothing at its initial value
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        net(torch.rand(8, 3, 32, 32))  # running statistics
    x = torch.rand(4, 3, 32, 32)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        own = net.eval().to(dtype)
        folded = fold(own, x.to(dtype))
        with torch.no_grad():
            expected, found = own(x.to(dtype)), folded(x.to(dtype))
        assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        assert all(p.item() == 1.0 for path, p in folded.named_parameters() if path.endswith("scale"))


def test_pooled_shortcut() -> None:
    x = torch.rand(2, 4, 6, 6)
    found = PooledShortcut(4, 10)(x)
    torch.testing.assert_close(found[:, 3:7], x[:, :, ::2, ::2], rtol=0, atol=0)
    assert float(found[:, :3].abs().sum() + found[:, 7:].abs().sum()) == 0
    with pytest.raises(ValueError, match="even number of channels"):
        PooledShortcut(4, 7)


def test_fixup_initialisation() -> None:
    net = FixupResNet20(10)
    blocks = [m for m in net.modules() if isinstance(m, FixupBlock)]
    assert len(blocks) == 9
    for block in blocks:
        deviation = math.sqrt(2 / (9 * block.conv1.out_channels)) / 3  # He's, times 9 ** (-1 / 2)
        assert float(block.conv1.weight.std()) == pytest.approx(deviation, rel=0.05)
        assert float(block.conv2.weight.abs().max()) == 0
    assert float(net.fc.weight.abs().max()) == 0
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    nn.functional.cross_entropy(net(images), labels).backward()
    assert float(net.fc.weight.grad.abs().max()) > 0  # it can learn from there


def test_resnet18_has_the_usual_names() -> None:
    expected = {"conv1.weight", "fc.weight", "fc.bias"}
    norms = {"bn1"}
    for stage in range(1, 5):
        for block in range(2):
            expected |= {f"layer{stage}.{block}.conv{i}.weight" for i in (1, 2)}
            norms |= {f"layer{stage}.{block}.bn{i}" for i in (1, 2)}
        if stage > 1:
            expected |= {f"layer{stage}.0.downsample.0.weight"}
            norms |= {f"layer{stage}.0.downsample.1"}
    fields = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected |= {f"{norm}.{field}" for norm in norms for field in fields}
    net = resnet18(seed=0).eval()
    state = net.state_dict()
    assert set(state) == expected
    assert count(net) == 11_689_512
    assert state["layer3.0.downsample.0.weight"].shape == (256, 128, 1, 1)
    sizes = {}
    for name, module in net.named_children():
        module.register_forward_hook(lambda _, __, out, name=name: sizes.update({name: tuple(out.shape[1:])}))
    with torch.no_grad():
        net(torch.rand(1, 3, 224, 224))
    assert [sizes[f"layer{i}"] for i in range(1, 5)] == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
    assert (sizes["maxpool"], sizes["fc"]) == ((64, 56, 56), (1000,))


def test_option_a_shortcut_and_depth() -> None:
    features = torch.arange(2.0 * 3 * 3).reshape(1, 2, 3, 3)
    out = ZeroPadShortcut(2, 6)(features)
    assert out.shape == (1, 6, 2, 2)
    assert torch.equal(out[:, 2:4], features[:, :, ::2, ::2])
    assert not out[:, :2].any()
    assert not out[:, 4:].any()
    for channels in ((4, 2), (2, 5)):
        with pytest.raises(ValueError, match="even number of channels to add"):
            ZeroPadShortcut(*channels)
    for depth in (2, 18):
        with pytest.raises(ValueError, match=f"depth of 6 m .* got {depth}"):
            CifarResNet(depth, 10)


# --- Vision transformer ----------------------------------------------------------------------------------------------


def test_attention_is_the_softmax_of_scaled_products() -> None:
    attention = SelfAttention(6, 2).double()
    tokens = torch.randn(3, 5, 6, dtype=torch.float64)
    q, k, v = attention.qkv(tokens).split(6, dim=-1)
    heads = []
    for i in (slice(0, 3), slice(3, 6)):
        weights = torch.softmax(q[..., i] @ k[..., i].transpose(1, 2) / 3**0.5, dim=-1)
        heads.append(weights @ v[..., i])
    torch.testing.assert_close(attention(tokens), attention.proj(torch.cat(heads, dim=-1)))


def test_encoder_block_without_its_branches_is_the_identity() -> None:
    block = EncoderBlock(6, 2, 12)
    for layer in (block.attn.proj, block.fc2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    tokens = torch.randn(2, 5, 6)
    assert torch.equal(block(tokens), tokens)


def test_vit_reads_patches_in_place() -> None:
    net = NETWORKS["vit-mnist"](seed=0).eval()
    assert isinstance(net, VisionTransformer)
    # 7x7 patches to width 48, 16 + 1 tokens, 4 blocks (norms, attention, 48 -> 96 -> 48), norm and linear map
    blocks = 4 * (2 * 96 + 49 * 144 + 49 * 48 + 49 * 96 + 97 * 48)
    assert count(net) == 50 * 48 + 18 * 48 + blocks + 96 + 49 * 10
    images = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        logits, tokens = net(images), net.patches(images).flatten(2).transpose(1, 2)
        assert logits.shape == (2, 10)
        swapped = images.clone()  # the first two patches change places, and so do their positions
        swapped[..., :7, :7], swapped[..., :7, 7:14] = images[..., :7, 7:14], images[..., :7, :7]
        assert not torch.allclose(net(swapped), logits)
        net.positions[:, [1, 2]] = net.positions[:, [2, 1]]
        torch.testing.assert_close(net(swapped), logits)
    assert tokens.shape == (2, 16, 48)


def test_vit_blocks_are_layers_and_all_of_it_is_covered() -> None:
    graph = trace(NETWORKS["vit-mnist"](seed=0).eval(), torch.rand(2, 1, 28, 28))
    blocks = [f"blocks.{i}" for i in range(4)]
    assert [name for name in graph.layers if name in blocks] == blocks
    assert {"patches", "blocks.1.attn.qkv", "blocks.1.attn", "blocks.1.act", "norm", "head"} <= set(graph.layers)
    assert check(graph).covered


def test_vit_errors() -> None:
    for wrong, message in (
        ((1, 28, 5, 48, 4, 4, 10), "multiple of the patch size, got 28 and 5"),
        ((1, 28, 7, 50, 4, 4, 10), "multiple of the number of heads, got 50 and 4"),
        ((1, 28, 7, 48, 0, 4, 10), "at least one block, got depth=0"),
    ):
        with pytest.raises(ValueError, match=message):
            VisionTransformer(*wrong)


# --- Published weights -----------------------------------------------------------------------------------------------


def lossless_cifar10() -> ImageData:
    return load_npz(DATA / "cifar10" / "cifar10_lossless_subset.npz").test


def mnist_test() -> ImageData:
    return load_idx_folder(DATA / "mnist").test


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PUBLISHED: dict[str, tuple[str, Callable[[], ImageData], tuple[tuple[float, ...], tuple[float, ...]], int]] = {
    "cifar10_resnet20": ("resnet20", lossless_cifar10, IMAGENET, 915),
    "cifar10_resnet32": ("resnet32", lossless_cifar10, IMAGENET, 928),
    "cifar10_simple_cnn": ("cifar10-simple-cnn", lossless_cifar10, ((0.5,) * 3, (0.5,) * 3), 590),
    "mnist_lenet": ("mnist-lenet", mnist_test, ((0.0,), (1.0,)), 9761),
}


@pytest.mark.parametrize("checkpoint", PUBLISHED)
def test_published_weights_reach_their_accuracy(checkpoint: str) -> None:
    name, load_test, (mean, std), expected = PUBLISHED[checkpoint]
    path = DATA / "checkpoints" / f"{checkpoint}.safetensors"
    if not path.exists():
        pytest.skip(f"no {path.name} in the data folder: set REVPROP_DATA")
    data, net = load_test(), NETWORKS[name](seed=0).eval()
    load_weights(net, path)
    with torch.no_grad():
        guesses = torch.cat([net(images).argmax(1) for images in torch.split(data.scaled(mean, std), 500)])
    # One image either way, for the order of sums differs between machines.
    assert abs(int((guesses == data.labels).sum()) - expected) <= 1


# --- load_network ----------------------------------------------------------------------------------------------------

MODULE = """
import torch
class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 2)
def build(): return Net()
def build_wide(width): return Net()
def build_number(): return 3
instance = Net()
constant = 5
"""


def test_load_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(MODULE)
    (tmp_path / "broken_models.py").write_text("import module_that_is_absent")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(load_network("mnist"), ConvNet)
    assert type(load_network("my_models:Net")).__name__ == "Net"
    assert type(load_network("my_models:build")).__name__ == "Net"
    for spec, message in {
        "minst": r"unknown network 'minst'; did you mean 'mnist'.*package\.module:factory",
        "my_models:": r"expected package\.module:factory",
        "my-models:build": r"expected package\.module:factory",
        "my_models:biuld": "in module 'my_models': unknown factory 'biuld'; did you mean 'build'",
        "my_models:build_wide": r"cannot be called without arguments \(missing a required argument: 'width'\)",
        "my_models:build_number": r"to build a torch\.nn\.Module, got a int",
        "my_models:instance": "function or class that builds a network, got a Net",
        "my_models:constant": "function or class that builds a network, got a int",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_network(spec)
    with pytest.raises(ImportError, match=r"no module named 'absent_package': .*PYTHONPATH"):
        load_network("absent_package.models:build")
    with pytest.raises(
        ImportError, match=r"'broken_models' was found, but importing it failed: .*module_that_is_absent"
    ):
        load_network("broken_models:build")
    sys.modules.pop("my_models")


# --- load_weights ----------------------------------------------------------------------------------------------------


def test_load_weights_forms(tmp_path: Path) -> None:
    trained = NETWORKS["resnet20"](seed=1)
    state = trained.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "parallel.pth")
    save_file({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "no_counters.safetensors")
    save_file({k: v.double() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "double.bin")
    for path in sorted(tmp_path.iterdir()):
        net = NETWORKS["resnet20"](seed=2)
        load_weights(net, path)
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items()), path.name


def spoil(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    changed = {**state, **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in changed.items() if value is not None}


def test_load_weights_refuses_and_loads_nothing(tmp_path: Path) -> None:
    net, state = NETWORKS["digits"](seed=0), NETWORKS["digits"](seed=1).state_dict()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    nan = torch.full((10,), torch.nan)
    cases: dict[str, tuple[object, str]] = {
        "missing": (spoil(state, conv1__0__bias=None), r"do not fit the ConvNet.*\n  missing .*: conv1\.0\.bias$"),
        "unexpected": (spoil(state, fc3__0__bias=nan), r"\n  unexpected in the file: fc3\.0\.bias$"),
        "shape": (
            spoil(state, fc1__0__bias=torch.zeros(31), extra=nan),
            r"(?s)unexpected in the file: extra\n.*fc1\.0\.bias \(model float 32, file float 31\)",
        ),
        "quantised": (spoil(state, fc1__0__bias=torch.zeros(32, dtype=torch.int8)), "model float 32, file integer 32"),
        "nan": (spoil(state, fc2__0__bias=nan), r"NaN or infinity in fc2\.0\.bias of .*nothing was loaded"),
        "overflow": (
            spoil(state, fc2__0__bias=torch.full((10,), 1e300, dtype=torch.float64)),
            r"NaN or infinity in fc2\.0\.bias",
        ),
        "module": (net, "refused by weights-only loading .*torch.load.*save_file"),
        "list": ([1, 2], "expected .*list.pt to hold a state dict .*, got a list"),
        "epoch": ({**state, "epoch": 3}, r"expected only tensors in the state dict of .*, got epoch \(a int\)"),
        "other": (NETWORKS["mnist-lenet"](seed=0).state_dict(), r"missing from the file: .*unexpected"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=message if message.startswith("(?s)") else f"(?s){message}"):
            load_weights(net, tmp_path / f"{name}.pt")
    whole = (tmp_path / "nan.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.pt is refused .*damaged"):
        load_weights(net, tmp_path / "cut.pt")
    save_file(state, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"cut\.safetensors is no whole safetensors file"):
        load_weights(net, tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no weights file .*absent\.pt"):
        load_weights(net, tmp_path / "absent.pt")
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


# -- the networks of the racecar paper --------------------------------------------------------------

RACECAR = {  # Tables 7, 9 and 11: parameters block by block; batch norm has two for each channel
    "racecar-bits": ((12,), [130, 77, 40, 24, 15, 8], 2),
    "racecar-mnist": ((1, 28, 28), [640, 36928, 577, 500], 10),
    "racecar-cifar-narrow": (
        (3, 32, 32),
        [
            *(9 * c * k + 3 * k for c, k in [(3, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64), (64, 64)]),
            *(9 * c * 128 + 3 * 128 for c in (64, 128, 128, 128, 128, 128)),
            *(c * k + 3 * k for c, k in [(512, 1024), (1024, 1024), (1024, 10)]),
        ],
        10,
    ),
}


@pytest.mark.parametrize("name", RACECAR)
def test_racecar_networks(name: str) -> None:
    shape, counts, classes = RACECAR[name]
    net = NETWORKS[name](seed=0)
    assert [count(block) for block in net.children()] == counts
    assert sum(counts) == {"racecar-bits": 294, "racecar-mnist": 38645}.get(name, sum(counts))
    with torch.no_grad():
        assert net(torch.rand(2, *shape)).shape == (2, classes)


def test_the_racecar_mnist_network_is_table_9() -> None:
    net = NETWORKS["racecar-mnist"](seed=0).double()
    x = torch.rand(3, 1, 28, 28, dtype=torch.float64)
    w = net.state_dict()
    a = torch.max_pool2d(torch.conv2d(x, w["conv1.0.weight"], w["conv1.0.bias"], padding=1).relu(), 2)
    a = torch.max_pool2d(torch.conv2d(a, w["conv2.0.weight"], w["conv2.0.bias"], padding=1).relu(), 2)
    a = torch.conv2d(a, w["conv3.0.weight"], w["conv3.0.bias"], padding=1).relu()
    expected = a.reshape(3, 49) @ w["fc1.0.weight"].T + w["fc1.0.bias"]
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)


def test_the_order_of_table_11_and_table_16() -> None:
    kinds = [[type(part).__name__ for part in block] for block in racecar.cifar(seed=0, width=4).children()]  # type: ignore[attr-defined]
    plain, pooled = ["Conv2d", "BatchNorm2d", "ReLU"], ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]
    convolutions = [pooled if i in (2, 4, 7, 10) else plain for i in range(1, 14)]
    assert kinds == [*convolutions, *[["Linear", "BatchNorm1d", "ReLU"]] * 3]
    with torch.device("meta"):
        vgg = racecar.vgg19()
        assert vgg(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert [name for name, block in vgg.named_children() if isinstance(block[-1], nn.MaxPool2d)] == [  # type: ignore[index]
        f"conv{i}" for i in (2, 4, 8, 12, 16)
    ]
    with pytest.raises(ValueError, match="width"):
        racecar.cifar(width=0)
