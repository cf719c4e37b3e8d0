"""Racecar's penalty on what networks are built of: every layer, mode, precision and order of samples, and how models are used."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from revprop import Racecar, mirror, trace

DOUBLE = torch.float64


class Of(nn.Module):
    """A network whose forward is a function of its layers and inputs."""

    def __init__(self, forward: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.m, self.run = nn.ModuleList(layers), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.m, x)


def conv(inputs: int, outputs: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)  # type: ignore[arg-type]


def between(*layers: nn.Module, channels: int = 3) -> nn.Sequential:
    return nn.Sequential(conv(1, 3), nn.ReLU(), *layers, conv(channels, 2))


def time_first(m: nn.ModuleList, x: Tensor) -> Tensor:
    hidden = m[0](x).tanh().transpose(0, 1).reshape(-1, 4)
    return m[2](m[1](hidden).tanh().view(6, -1, 3).transpose(0, 1))


def joined(m: nn.ModuleList, x: Tensor) -> Tensor:
    return m[2](torch.cat([F.interpolate(m[1](F.max_pool2d(m[0](x), 2)).relu(), size=x.shape[2:]), x], 1))


IMAGE = (1, 7, 7)
NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "windows that do not cover": (between(nn.MaxPool2d(2), conv(3, 3), nn.AvgPool2d(2, ceil_mode=True)), IMAGE),
    "overlapping windows": (between(nn.MaxPool2d(3, 2), nn.AvgPool2d(3, 2, 1, count_include_pad=False)), IMAGE),
    "a norm in every window": (between(nn.LPPool2d(2, 2)), IMAGE),
    "global mean": (nn.Sequential(*between(nn.AdaptiveAvgPool2d(1)), nn.Flatten(), nn.Linear(2, 2)), IMAGE),
    "global largest": (Of(lambda m, x: m[1](m[0](x).relu().amax((2, 3))), conv(1, 3), nn.Linear(3, 2)), IMAGE),
    "enlarged": (between(nn.Upsample(size=(9, 11)), conv(3, 3), nn.Upsample(size=(12, 13), mode="bilinear")), IMAGE),
    "by fractions": (between(nn.Upsample(scale_factor=2.1), nn.AdaptiveAvgPool2d(9)), (1, 4, 4)),
    "shuffled and padded": (
        nn.Sequential(
            *(conv(1, 8, padding_mode="reflect"), nn.ReLU(), nn.PixelShuffle(2)),
            *(
                conv(2, 2, padding_mode="circular"),
                nn.PixelUnshuffle(2),
                nn.Tanh(),
                nn.PixelShuffle(2),
                nn.MaxPool2d(2),
            ),
            conv(2, 2, padding_mode="replicate"),
        ),
        (1, 4, 4),
    ),
    "in place": (between(nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2), conv(3, 3), nn.PReLU(3)), IMAGE),
    "strides": (nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(3, 2, 3, 2, 1, 1)), IMAGE),
    "rows of features": (nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4), nn.LayerNorm(4)), (7, 5)),
    "a signal": (nn.Sequential(nn.Conv1d(2, 4, 5, 2), nn.BatchNorm1d(4), nn.ELU(), nn.Conv1d(4, 3, 3)), (2, 20)),
    "a volume": (
        nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.MaxPool3d(2), nn.Conv3d(2, 2, 1)),
        (1, 4, 4, 4),
    ),
    "cumulative statistics": (nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, momentum=None), nn.Linear(6, 3)), (5,)),
    "no statistics": (
        nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)),
        (5,),
    ),
    "instances": (between(nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.ReLU()), IMAGE),
    "tied weights": (Of(lambda m, x: F.linear(m[0](m[0](x).tanh()).tanh(), m[0].weight.T), nn.Linear(5, 5)), (5,)),
    "time first": (Of(time_first, nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2)), (6, 5)),
    "joined": (Of(joined, conv(1, 3), conv(3, 3), conv(4, 2)), IMAGE),
    "one of two": (Of(lambda m, x: m[1](torch.maximum(*m[0](x).chunk(2, 1))), nn.Linear(5, 8), nn.Linear(4, 3)), (5,)),
    "a product of two": (Of(lambda m, x: m[1](m[0](x, x).softmax(1)), nn.Bilinear(5, 5, 4), nn.Linear(4, 3)), (5,)),
    "recurrent": (
        Of(lambda m, x: m[1](m[0](x.transpose(0, 1))[0].transpose(0, 1)), nn.LSTM(5, 4), nn.Linear(4, 3)),
        (6, 5),
    ),
}


def slope(penalty: Racecar, x: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative along one direction of all parameters: by gradients, and by differences."""
    parameters = list(penalty.graph.model.parameters())
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    gradients = torch.autograd.grad(penalty(x), parameters, allow_unused=True)
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6, 1e-6):
            for p, d in zip(parameters, direction, strict=True):
                p += step * d
            values.append(penalty(x))
    own = torch.stack([(g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None]).sum()
    return own, (values[0] - values[1]) / 2e-6


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_run_back_and_differentiated_in_both_modes(name: str) -> None:
    torch.manual_seed(0)
    model, shape = copy.deepcopy(NETWORKS[name][0]).double(), NETWORKS[name][1]
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = torch.rand(4, *shape, dtype=DOUBLE)
    penalty = Racecar(model, x[:1], weight=1.0)
    assert not penalty.left_out
    for training in (True, False):
        model.train(training)
        own, differences = slope(penalty, x)
        torch.testing.assert_close(own, differences, rtol=1e-4, atol=1e-5)
        twin = copy.deepcopy(model)
        apart = penalty(x).detach()
        assert apart > 0
        output, value = penalty.with_output(x)
        torch.testing.assert_close(output, twin(x))
        torch.testing.assert_close(value, apart)
        for (key, state), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(state, other, msg=key)
        back, recorded = penalty.regenerate(x), penalty.recorded(x)
        assert {key: v.shape for key, v in back.items()} == {key: v.shape for key, v in recorded.items()}
        terms = [0.5 * (recorded[key] - back[key]).square().sum() for key in penalty.layers]
        torch.testing.assert_close(apart, torch.stack(terms).sum())
    penalty(x[:1]).backward()
    with torch.inference_mode():  # tangents are taken by autograd, which is off here
        torch.testing.assert_close(penalty(x), apart)
        torch.testing.assert_close(penalty.with_output(x)[1], apart)
        assert penalty.regenerate(x).keys() == back.keys()
    if name not in ("no statistics", "instances"):
        shared = [Racecar(penalty.graph, weight=1.0, share=0.5, seed=3) for _ in range(2)]
        torch.testing.assert_close(shared[0](x), shared[1].with_output(x)[1])


@pytest.mark.parametrize("name", ["enlarged", "shuffled and padded", "rows of features"])
def test_the_penalty_follows_its_model_to_another_precision(name: str) -> None:
    model, shape = copy.deepcopy(NETWORKS[name][0]).eval(), NETWORKS[name][1]
    x = torch.rand(4, *shape)
    penalty = Racecar(model, x[:1], weight=1.0)
    single = penalty(x)
    model.double()
    double = penalty(x.double())
    assert double.dtype == DOUBLE
    torch.testing.assert_close(double, Racecar(model, x[:1].double(), weight=1.0)(x.double()))
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-5)
    model.bfloat16()
    low = penalty(x.bfloat16())
    low.backward()
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, single, rtol=0.1, atol=0.05)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = penalty(x)
    mixed.backward()
    torch.testing.assert_close(mixed, single, rtol=0.1, atol=0.05)


def test_sums_of_squares_do_not_leave_half_precision() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8).half(), torch.full((64, 8), 40.0).half()
    penalty = Racecar(model, x[:1], weight=1.0)
    (name,) = penalty.layers
    own, back = penalty.recorded(x)[name], penalty.regenerate(x)[name]
    expected = 0.5 * (own.float() - back.float()).square().sum()
    assert expected > torch.finfo(torch.half).max
    torch.testing.assert_close(penalty(x).detach(), expected)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 2),
    st.sampled_from([1, 2]),
    st.integers(2, 4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_pooling_and_convolution_as_one_are_what_they_are_apart(
    dims: int, kernel: int, padding: int, groups: int, times: int, largest: bool, bias: bool, training: bool
) -> None:
    torch.manual_seed(0)
    kinds = (
        (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d),
        (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d),
        (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d, nn.AvgPool3d),
    )[dims - 1]
    layers = (
        kinds[0](2, 4, kernel, padding=padding, groups=groups, bias=bias),
        *(kinds[1](4), nn.ReLU(), (kinds[2] if largest else kinds[3])(times), kinds[0](4, 2, 1)),
    )
    model = nn.Sequential(*layers).double().train(training)
    sizes = [(1 + i % 2) * times + kernel - 1 - 2 * padding for i in range(dims)]  # convolved, windows tile it
    assume(min(sizes) > 0)
    x = torch.randn(2, 2, *sizes, dtype=DOUBLE)
    graph = trace(model, x[:1])
    together = Racecar(graph, weight=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirror, "_pooled", lambda *_: None)
        apart = Racecar(graph, weight=1.0)
    found, expected = together(x), apart(x)
    torch.testing.assert_close(found, expected)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b)


class Encoder(nn.Module):
    """Of words and numbers: torch's attention holds the time in front of the batch, and the embedding ends the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.numbers = nn.Embedding(7, 8), nn.Linear(3, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor, kept: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(self.words(ids), src_key_padding_mask=kept == 0) + self.numbers(numbers)[:, None]
        return {"logits": self.head(hidden).mean(1), "losses": hidden.square().mean(2)}


def words() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    kept = torch.ones(6, 5, dtype=torch.long)
    kept[:, 3:] = torch.randint(2, (6, 2), generator=generator)
    numbers = torch.randn(6, 3, generator=generator, dtype=DOUBLE)
    return {"ids": torch.randint(7, (6, 5), generator=generator), "kept": kept, "numbers": numbers}


def test_words_attention_and_several_inputs_and_outputs() -> None:
    torch.manual_seed(0)
    model, x = Encoder().double().train(), words()
    graph = trace(model, {name: value[:2] for name, value in x.items()}, output="logits")
    penalty = Racecar(graph, weight=1.0, input_activation=None)
    assert "encoder.self_attn" in penalty.layers
    assert not penalty.left_out
    assert not any("embedding" in name or "softmax" in name for name in penalty.held)
    own, differences = slope(penalty, x)  # type: ignore[arg-type]
    torch.testing.assert_close(own, differences, rtol=1e-4, atol=1e-5)
    output, value = penalty.with_output(x)
    torch.testing.assert_close(output, model(**x)["logits"])
    torch.testing.assert_close(value, penalty(x))
    assert penalty.regenerate(x).keys() == penalty.recorded(x).keys() == {"input:numbers", *penalty.layers}
    shared = [Racecar(graph, weight=1.0, share=0.5, seed=3) for _ in range(2)]
    torch.testing.assert_close(shared[0](x), shared[1].with_output(x)[1])


def test_a_constant_is_subtracted_wherever_the_samples_lie() -> None:
    torch.manual_seed(0)
    shift = torch.randn(6, 1, 4, dtype=DOUBLE)
    model = Of(lambda m, x: m[1]((m[0](x).transpose(0, 1) + shift).transpose(0, 1)), nn.Linear(4, 4), nn.Linear(4, 4))
    model.double()
    x = torch.randn(3, 6, 4, dtype=DOUBLE)
    back = Racecar(model, x[:1], weight=1.0, input_activation=None).regenerate(x)["input"]
    first, last = model.m
    hidden = (model(x) - last.bias) @ last.weight - shift.transpose(0, 1)
    torch.testing.assert_close(back, (hidden - first.bias) @ first.weight)


class Activated(nn.BatchNorm2d):
    """A norm with its activation, as some libraries have it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


def test_a_norm_that_does_more_in_its_forward_does_it_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(1, 3), Activated(3), conv(3, 2)).double().train()
    twin, x = copy.deepcopy(model), torch.rand(4, 1, 5, 5, dtype=DOUBLE)
    output, _ = Racecar(model, x[:1], weight=1.0).with_output(x)
    torch.testing.assert_close(output, twin(x))
    for (name, state), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(state, other, msg=name)


class Unlike(nn.Module):
    """Something else in train mode."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = nn.Linear(4, 4), kind
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.training and self.kind == "writes":
            self.seen += 1
        out = self.inner(x)
        return (out, 2 * out) if self.training and self.kind == "returns" else out


@pytest.mark.parametrize("kind", ["writes", "returns"])
def test_what_is_otherwise_in_train_mode_is_refused_where_the_passes_are_one(kind: str) -> None:
    model, x = Unlike(kind).train(), torch.rand(3, 4)
    penalty = Racecar(model, x[:1], weight=1.0)
    with pytest.raises(ValueError, match=rf"in train mode the model {kind}.*call model\(x\) and penalty\(x\)"):
        penalty.with_output(x)
    assert not model.seen
    model.eval()
    torch.testing.assert_close(penalty.with_output(x)[0], model(x))


def test_a_part_that_drops_out_is_found_whenever_it_begins_to() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).eval(), torch.rand(8, 4)
    penalty = Racecar(model, x[:1], weight=1.0)
    penalty.with_output(x)
    model.train()
    model[1].eval()
    penalty.with_output(x)
    model.eval()
    model[1].train()  # the network itself is in eval mode
    with pytest.raises(ValueError, match="dropout"):
        penalty.with_output(x)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_no_samples_cost_nothing(reduction: str) -> None:
    model = nn.Sequential(conv(1, 3), nn.ReLU(), nn.MaxPool2d(2), conv(3, 2))
    x = torch.rand(0, 1, 4, 4)
    for share in (1.0, 0.25):
        penalty = Racecar(model, x.new_zeros(1, 1, 4, 4), weight=1.0, reduction=reduction, share=share)  # type: ignore[arg-type]
        output, value = penalty.with_output(x)
        assert output.shape == (0, 2, 2, 2)
        assert penalty(x).item() == value.item() == 0.0
        (output.sum() + value + penalty(x)).backward()


class Holder(nn.Module):
    """A network and its penalty, as training frameworks keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        self.penalty = Racecar(self.network, torch.zeros(1, 4), weight=[1.0, 2.0], share=0.5)


def test_a_model_is_copied_pickled_and_frozen_with_its_penalty() -> None:
    torch.manual_seed(0)
    holder, x = Holder(), torch.rand(6, 4)
    twin = copy.deepcopy(holder)
    with torch.no_grad():
        twin.network[0].weight += 1.0
    again = Racecar(twin.network, x[:1], weight=[1.0, 2.0], share=0.5)
    first = twin.penalty(x)
    torch.testing.assert_close(first, again(x))
    first.backward()
    assert twin.network[0].weight.grad is not None
    assert holder.network[0].weight.grad is None
    assert pickle.loads(pickle.dumps(holder.network))(x).shape == (6, 2)
    with pytest.raises(TypeError, match="pickle the model, and build the penalty"):
        torch.save(holder, io.BytesIO())
    holder.network[0].requires_grad_(False)
    holder.penalty(x).backward()
    assert holder.network[0].weight.grad is None
    assert holder.network[2].weight.grad is not None
