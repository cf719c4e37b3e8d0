"""Small networks on sequences, sets, graphs and plain vectors, one per idea: what a user might write by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from architecture import Architecture, mask, numbers, tokens
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class EveryActivation(nn.Module):
    """A perceptron whose layers use each of torch's activations in turn."""

    KINDS = (
        *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Tanh),
        *(nn.Sigmoid, nn.LogSigmoid, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.ReLU6, nn.Tanhshrink),
        *(nn.Softshrink, nn.Hardshrink, nn.RReLU),
    )

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for kind in self.KINDS:
            layers += [nn.Linear(width, width), kind(), nn.BatchNorm1d(width)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class GatedMLP(nn.Module):
    """Gated linear units: half of a layer switches the other half; SwiGLU behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.value = nn.Linear(16, 48), nn.Linear(24, 32), nn.Linear(24, 32)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.first(x))
        return self.head(self.norm(F.silu(self.gate(x)) * self.value(x)))


class Highway(nn.Module):
    """Layers that are carried past in part, by a gate."""

    def __init__(self, width: int = 24, depth: int = 3) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, width), nn.Linear(width, 5)
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for body, gate in zip(self.body, self.gates, strict=True):
            open_ = gate(x).sigmoid()
            x = open_ * body(x).relu() + (1 - open_) * x
        return self.head(x)


class Maxout(nn.Module):
    """The largest of several linear layers, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 72), nn.Linear(24, 72), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).unflatten(1, (24, 3)).amax(2)
        return self.head(self.second(x).unflatten(1, (24, 3)).max(2).values)


class Recurrent(nn.Module):
    """Every step embedded, a recurrent layer, and a classifier on its last or mean state."""

    def __init__(self, kind: type[nn.RNNBase], mean: bool = False, **options: object) -> None:
        super().__init__()
        self.mean = mean
        self.embed = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.recurrent = kind(8, 12, batch_first=True, **options)
        self.head = nn.Linear(24 if options.get("bidirectional") else 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        states = self.recurrent(self.embed(x))[0]
        return self.head(states.mean(1) if self.mean else states[:, -1])


class CellLoop(nn.Module):
    """Recurrent cells called in a loop; the states are the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.gated, self.head = nn.RNNCell(6, 12), nn.LSTMCell(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = memory = hidden = x.new_zeros(x.shape[0], 12)
        for step in x.unbind(1):
            state = self.plain(step, state)
            hidden, memory = self.gated(state, (hidden, memory))
        return self.head(hidden)


class Temporal(nn.Module):
    """Causal dilated 1-d convolutions with weight norm and residuals."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, width, 1)
        self.layers = nn.ModuleList(weight_norm(nn.Conv1d(width, width, 3, dilation=2**i)) for i in range(3))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            x = x + F.relu(layer(F.pad(x, (2 * 2**i, 0))))
        return self.head(x[:, :, -1])


class WaveGate(nn.Module):
    """Gated dilated convolutions with skips, as in WaveNet."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv1d(2, width, 1), nn.Conv1d(width, 2, 1)
        self.layers = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i, padding=2**i) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-1]
        x = self.stem(x)
        total = torch.zeros_like(x)
        for layer, skip in zip(self.layers, self.skips, strict=True):
            filtered, gate = layer(x)[..., :length].chunk(2, 1)
            x = x + torch.tanh(filtered) * torch.sigmoid(gate)
            total = total + skip(x)
        return self.head(total.relu())


class Encoder(nn.Module):
    """torch's transformer encoder on a sequence of vectors."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class CrossAttention(nn.Module):
    """torch's transformer decoder: one sequence attends to another."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(width, 2, 32, batch_first=True, norm_first=True)
        self.decoder, self.head = nn.TransformerDecoder(layer, 2), nn.Linear(width, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.head(self.decoder(x, memory)[:, 0])


class CausalBlock(nn.Module):
    """Attention to what came before, then a feed-forward layer; norms in front."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(self.norm2(x))


class CausalModel(nn.Module):
    """A GPT on embedded inputs: the next token's logits at every position."""

    def __init__(self, width: int = 16, vocabulary: int = 12) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 8, width))
        self.blocks = nn.Sequential(CausalBlock(width, 2), CausalBlock(width, 2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x + self.position)))


class MaskedModel(nn.Module):
    """A BERT: token indices and a padding mask, classified by the first token."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(32, width), nn.Embedding(8, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm1, self.norm2, self.head = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, 5)
        self.feed = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, ids: Tensor, kept: Tensor) -> Tensor:
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1]))
        x = self.norm1(x + self.attention(x, x, x, key_padding_mask=kept == 0)[0])
        return self.head(self.norm2(x + self.feed(x))[:, 0])


class BagOfWords(nn.Module):
    """The mean of the words' vectors, joined with plain features: wide and deep."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.wide = nn.Embedding(32, 12), nn.Linear(6, 5)
        self.deep = nn.Sequential(nn.Linear(18, 24), nn.ReLU(), nn.Linear(24, 5))

    def forward(self, ids: Tensor, features: Tensor) -> Tensor:
        return self.deep(torch.cat([self.words(ids).mean(1), features], 1)) + self.wide(features)


class GraphConvolution(nn.Module):
    """Messages along the edges of one fixed graph."""

    def __init__(self, nodes: int = 12) -> None:
        super().__init__()
        ring = torch.eye(nodes) + torch.eye(nodes).roll(1, 0) + torch.eye(nodes).roll(-1, 0)
        self.register_buffer("adjacency", ring / 3)
        self.first, self.second, self.head = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.adjacency @ self.first(x)).relu()
        x = (torch.einsum("ij,njc->nic", self.adjacency, self.second(x))).relu()
        return self.head(x.amax(1))


class DeepSets(nn.Module):
    """Sums and maxima over a set."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.all = nn.Sequential(nn.Linear(4, 16), nn.ELU()), nn.Sequential(nn.Linear(32, 16), nn.ELU())
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.each(x)
        return self.head(self.all(torch.cat([x.sum(1), x.max(1).values], 1)))


class Recursive(nn.Module):
    """One layer applied four times, as the steps of an ordinary differential equation."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.step, self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh()), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + 0.25 * self.step(x)
        return self.head(x)


class HyperNetwork(nn.Module):
    """A layer whose weights another network computes, and a bilinear form of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.bilinear, self.head = nn.Linear(6, 8 * 12), nn.Bilinear(8, 6, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        made = self.weights(condition).view(-1, 8, 12)
        hidden = torch.bmm(made, x.unsqueeze(2)).squeeze(2).tanh()
        return self.head(self.bilinear(hidden, condition))


class Experts(nn.Module):
    """Several networks weighed by a softmax gate."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(16, experts)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU()) for _ in range(experts))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.stack([expert(x) for expert in self.experts], 1)
        return self.head((self.gate(x).softmax(1).unsqueeze(2) * found).sum(1))


class Prototypes(nn.Module):
    """Classes by their distance from learned points, in a normalised space."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 12))
        self.points = nn.Parameter(torch.randn(5, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.body(x), dim=1)
        return -(x.unsqueeze(1) - F.normalize(self.points, dim=1)).square().sum(2)


class StateSpace(nn.Module):
    """A diagonal linear recurrence over time, written as a loop, between gates."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Linear(4, width), nn.Linear(4, width), nn.Linear(width, 5)
        self.decay = nn.Parameter(torch.linspace(-2, 2, width))

    def forward(self, x: Tensor) -> Tensor:
        driven, decay = self.stem(x), self.decay.sigmoid()
        state, found = torch.zeros_like(driven[:, 0]), []
        for step in driven.unbind(1):
            state = decay * state + step
            found.append(state)
        return self.head((torch.stack(found, 1) * F.silu(self.gate(x))).mean(1))


class Vectors(nn.Sequential):
    """A plain perceptron."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.Tanh(), nn.Dropout(), nn.Linear(24, 5))


VECTOR, SEQUENCE = numbers(16), numbers(8, 6)


def _one(name: str, family: str, build: object, *inputs: object, classes: bool = True) -> Architecture:
    return Architecture(name, family, "written here", build, inputs or (VECTOR,), classes)  # type: ignore[arg-type]


SEQUENCES = (
    _one("MLP", "MLP", Vectors),
    _one("MLP with every activation", "MLP", EveryActivation, numbers(24)),
    _one("gated MLP (GLU, SwiGLU)", "gated MLP", GatedMLP),
    _one("highway network", "gated MLP", Highway),
    _one("maxout network", "MLP", Maxout),
    _one("weight-shared recursive network", "recursive", Recursive),
    _one("hypernetwork and bilinear form (two vectors)", "hypernetwork", HyperNetwork, numbers(12), numbers(6)),
    _one("mixture of experts", "mixture of experts", Experts),
    _one("prototype network", "metric learning", Prototypes),
    _one("LSTM classifier", "LSTM", lambda: Recurrent(nn.LSTM), SEQUENCE),
    _one(
        "LSTM, two layers, both directions",
        "LSTM",
        lambda: Recurrent(nn.LSTM, True, num_layers=2, bidirectional=True),
        SEQUENCE,
    ),
    _one("GRU classifier", "GRU", lambda: Recurrent(nn.GRU, num_layers=2), SEQUENCE),
    _one("Elman RNN", "RNN", lambda: Recurrent(nn.RNN, True), SEQUENCE),
    _one("RNN and LSTM cells in a loop", "RNN", CellLoop, SEQUENCE),
    _one("state-space recurrence", "state space", StateSpace, numbers(8, 4)),
    _one("temporal convolutions", "1-d CNN", Temporal, numbers(4, 24)),
    _one("WaveNet gates", "1-d CNN", WaveGate, numbers(2, 16), classes=False),
    _one("transformer encoder", "transformer", Encoder, numbers(8, 16)),
    _one(
        "transformer decoder, cross-attention (two sequences)",
        "transformer",
        CrossAttention,
        numbers(6, 16),
        numbers(8, 16),
    ),
    _one("causal language model", "GPT", CausalModel, numbers(8, 16), classes=False),
    _one("masked language model (tokens and mask)", "BERT", MaskedModel, tokens(8, 32), mask(8)),
    _one("bag of words, wide and deep (tokens and vector)", "text classifier", BagOfWords, tokens(8, 32), numbers(6)),
    _one("graph convolution", "graph network", GraphConvolution, numbers(12, 6)),
    _one("deep sets", "set network", DeepSets, numbers(8, 4)),
)
