"""Walks that reverse blocks as one map, and sweeps that walk back what is still missing; recurrent nets and transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import revprop
from revprop.networks import NETWORKS

F64 = torch.float64
Example = Any


class Block(nn.Module):
    """x + f(x), with a block of its own kind within."""

    def __init__(self, width: int, inner: bool = False) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.inner = Block(width) if inner else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.inner(self.f(x))


def residual(inner: bool = False) -> nn.Sequential:
    """Stem, block, and a head that loses nothing."""
    net = nn.Sequential(nn.Linear(4, 6), Block(6, inner), nn.Linear(6, 6)).double().eval()
    with torch.no_grad():
        net[2].weight.add_(torch.eye(6, dtype=F64))
    return net


def norm(x: Tensor) -> Tensor:
    return x.detach().flatten(1).norm(dim=1)


# -- blocks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [False, True], ids=["", "nested"])
def test_a_block_as_one_map_reaches_what_a_walk_through_it_misses(inner: bool) -> None:
    net, x = residual(inner), torch.randn(7, 4, dtype=F64)
    features = net[0](x).detach()
    target = net[1:](features + 0.3 * torch.randn_like(features)).detach()
    options = {"target": target, "to": "0", "strategy": "greedy", "damping": 0.0}
    plain = revprop.reconstruct(net, x, **options)
    rec = revprop.reconstruct(net, x, blocks="1", **options)
    torch.testing.assert_close(net[1:](rec["0"]), target, rtol=1e-6, atol=1e-6)
    assert bool((norm(net[1:](plain["0"]) - target) > 1e-3).all())
    assert ("block", "Gauss-Newton") in [(part.operator, part.solver) for part in rec.certificates["0"].maps]
    if inner:
        both = revprop.reconstruct(net, x, blocks=["1.inner", "1"], **options)
        assert torch.equal(both["0"], rec["0"])  # of nested blocks the outer
        own = revprop.reconstruct(net, x, blocks="1.inner", **{**options, "to": "1.f"})
        assert bool(own.certificates["1.f"].reached.all())


def test_what_lies_behind_a_layer_in_a_block_is_one_map() -> None:
    """The shortcut by-passes the layer and is held."""
    net, x = residual(inner=True), torch.randn(5, 4, dtype=F64)
    graph = revprop.trace(net, x)
    (rest, held), recorded = graph.behind("1.f.1"), graph.record(x)
    features = recorded[graph.node("1.f.1")]
    aside = [recorded[node] for node in held]
    (target,) = rest(features + 0.1 * torch.randn_like(features), *aside)
    rec = revprop.reconstruct(graph, x, target=target.detach(), to="1.f.1", strategy="greedy", damping=0.0, blocks="1")
    torch.testing.assert_close(rest(rec["1.f.1"], *aside)[0], target, rtol=1e-6, atol=1e-6)
    assert [part.operator for part in rec.certificates["1.f.1"].maps].count("block") == 1


def test_a_block_is_a_fixed_point() -> None:
    net, x = residual(inner=True), torch.randn(5, 4, dtype=F64)
    rec = revprop.reconstruct(net, x, target=net(x).detach(), strategy="greedy", blocks=["1"], refine=3)
    for layer in rec:
        assert torch.equal(rec[layer], rec.recorded[layer])


# -- values that fan out into parts ------------------------------------------------------------------------------------


class Parts(nn.Module):
    """A value that is taken apart and joined again; with ``again``, its first half is read once more."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.again, self.stem = again, nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        a, b = h.chunk(2, 1)
        return torch.cat([h[:, :3], b, a] if self.again else [b, a], 1)


def test_parts_that_are_joined_again_lose_nothing() -> None:
    """Each part asks for its own entries only, so nothing is averaged with "no change"."""
    net, x, change = Parts().double().eval(), torch.randn(3, 4, dtype=F64), torch.randn(3, 6, dtype=F64)
    rec = revprop.reconstruct(net, x, target=net(x).detach() + change, to="stem", strategy="greedy", damping=0.0)
    torch.testing.assert_close(rec["stem"] - rec.recorded["stem"], change.roll(3, 1))


def test_entries_that_are_read_twice_get_the_mean() -> None:
    """The least-squares answer of a fan-out, entry by entry."""
    net, x, change = Parts(again=True).double().eval(), torch.randn(3, 4, dtype=F64), torch.randn(3, 9, dtype=F64)
    rec = revprop.reconstruct(net, x, target=net(x).detach() + change, to="stem", strategy="greedy", damping=0.0)
    first, second, third = change.split(3, 1)
    expected = torch.cat([(first + third) / 2, second], 1)
    torch.testing.assert_close(rec["stem"] - rec.recorded["stem"], expected)


# -- sweeps --------------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Two residual blocks with ReLUs and a head; with twice the usual weights other labels are near."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.a = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.b = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        for parameter in self.parameters():
            parameter.data.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.a(x)).relu()
        x = (x + self.b(x)).relu()
        return self.head(x)


LAYERS = ["input", "stem", "a", "b.1"]


def goals(net: nn.Module, x: Tensor, what: str) -> dict[str, Any]:
    if what == "labels":
        return {"labels": (net(x).argmax(1) + torch.arange(len(x)) % 3) % 3, "margin": 0.1}
    return {"target": net(x).detach() + 0.2 * torch.randn(len(x), 3, dtype=F64)}


@pytest.mark.parametrize("what", ["labels", "target"])
def test_sweeps_get_nearer_and_say_how_far_they_came(what: str) -> None:
    net, x = Deep(2.0 if what == "labels" else 1.0).double().eval(), torch.randn(12, 4, dtype=F64)
    goal = goals(net, x, what)
    once = revprop.reconstruct(net, x, to=LAYERS, strategy="greedy", **goal)
    rec = revprop.reconstruct(net, x, to=LAYERS, strategy="greedy", refine=20, **goal)
    counts = []
    for layer in LAYERS:
        certificate, plain = rec.certificates[layer], once.certificates[layer]
        assert plain.before is None
        assert plain.steps is None
        assert certificate.before is not None
        torch.testing.assert_close(certificate.before.residual, plain.residual)
        assert torch.equal(certificate.before.reached, plain.reached)
        assert certificate.before.steps is None
        # labels: once they hold by half of what a tie allows, nothing more is asked for
        slack = 1e-3 if what == "labels" else 1e-9
        assert bool((certificate.residual <= plain.residual + slack).all())
        assert bool((certificate.reached | ~plain.reached).all())
        assert certificate.steps is not None
        assert 0 <= int(certificate.steps.min()) <= int(certificate.steps.max()) <= 20
        assert float(certificate.residual.mean()) < 0.6 * float(plain.residual.mean())
        assert "before refinement" in str(certificate)
        counts.append((int(plain.reached.sum()), int(certificate.reached.sum())))
    assert sum(after for _, after in counts) > sum(before for before, _ in counts)
    if what == "labels":
        assert counts[0][1] == counts[1][1] == len(x)  # input and stem: nothing by-passes them


def test_sweeps_stop_where_nothing_is_missing() -> None:
    net, x = Deep().double().eval(), torch.randn(6, 4, dtype=F64)
    labels = net(x).argmax(1)
    labels[1] = (labels[1] + 1) % 3
    rec = revprop.reconstruct(net, x, labels, to="stem", strategy="greedy", refine=5)
    steps = rec.certificates["stem"].steps
    assert steps is not None
    assert (steps > 0).tolist() == [False, True, False, False, False, False]
    right = steps == 0
    assert torch.equal(rec["stem"][right], rec.recorded["stem"][right])


def test_a_sample_does_not_depend_on_its_batch() -> None:
    net, x = Deep().double().eval(), torch.randn(6, 4, dtype=F64)
    goal = goals(net, x, "target")["target"]
    options = {"to": LAYERS, "strategy": "greedy", "refine": 4}
    together = revprop.reconstruct(net, x, target=goal, **options)
    apart = revprop.reconstruct(net, x, target=goal, batch_size=1, **options)
    for layer in LAYERS:
        torch.testing.assert_close(together[layer], apart[layer], rtol=1e-7, atol=1e-7)
        assert torch.equal(together.certificates[layer].steps, apart.certificates[layer].steps)


def test_no_sweeps_is_the_one_walk() -> None:
    net, x = Deep().double().eval(), torch.randn(4, 4, dtype=F64)
    goal = goals(net, x, "target")
    default = revprop.reconstruct(net, x, strategy="greedy", **goal)
    none = revprop.reconstruct(net, x, strategy="greedy", refine=0, **goal)
    for layer in default:
        assert torch.equal(default[layer], none[layer])
        assert none.certificates[layer].before is None


def test_an_empty_batch_is_refined_to_an_empty_one() -> None:
    net = Deep().double().eval()
    empty = torch.zeros(0, 4, dtype=F64)
    rec = revprop.reconstruct(
        revprop.trace(net, torch.zeros(2, 4, dtype=F64)),
        empty,
        torch.zeros(0, dtype=torch.long),
        to="stem",
        strategy="greedy",
        refine=2,
    )
    assert rec["stem"].shape == (0, 8)
    assert rec.certificates["stem"].reached.shape == (0,)


def test_options_that_do_not_fit() -> None:
    net, x, y = residual(), torch.randn(2, 4, dtype=F64), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"refine: expected a number of sweeps >= 0; given -1"):
        revprop.reconstruct(net, x, y, strategy="greedy", refine=-1)
    for options in ({"blocks": "1"}, {"refine": 2}):
        with pytest.raises(ValueError, match='pass strategy="greedy"'):
            revprop.reconstruct(net, x, y, strategy="global", **options)
    with pytest.raises(ValueError, match=r"'1\.g'.*did you mean '1\.f'"):
        revprop.reconstruct(net, x, y, strategy="greedy", blocks="1.g")
    with pytest.raises(ValueError, match="did you mean 'values'"):
        revprop.reconstruct(net, x, y, strategy="greedy", attention="value")


# -- recurrent nets and transformers ---------------------------------------------------------------------------------


class Sequences(nn.Module):
    """Sequences (n, time, features) or tokens (n, time) -> a label."""

    def __init__(self, core: nn.Module, width: int, tokens: bool = False, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4) if tokens else nn.Linear(4, 4)
        self.core, self.batch_first = core, batch_first
        self.hidden, self.act, self.head = nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h if self.batch_first else h.transpose(0, 1)
        h = self.core(h)
        h = h[0] if isinstance(h, tuple) else h
        h = h if self.batch_first else h.transpose(0, 1)
        return self.head(self.act(self.hidden(h[:, -1])))


class Padded(nn.Module):
    """A transformer whose padding is masked; the mean of what is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.core = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.hidden, self.act, self.head = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)

    def forward(self, ids: Tensor, seen: Tensor) -> Tensor:
        h = self.core(self.embed(ids), src_key_padding_mask=~seen)
        h = (h * seen[:, :, None]).sum(1) / seen.sum(1, keepdim=True)
        return self.head(self.act(self.hidden(h)))


def vectors() -> Tensor:
    return torch.randn(6, 4, 4)


def tokens() -> Tensor:
    return torch.randint(0, 11, (6, 4))


def padded() -> tuple[Tensor, Tensor]:
    return tokens(), torch.arange(4) < torch.tensor([4, 3, 2, 4, 2, 1])[:, None]


SEQUENCES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Example]]] = {
    "lstm": (lambda: Sequences(nn.LSTM(4, 5, batch_first=True), 5), vectors),
    "gru": (lambda: Sequences(nn.GRU(4, 5, batch_first=True), 5), vectors),
    "rnn of tokens": (lambda: Sequences(nn.RNN(4, 5, batch_first=True), 5, tokens=True), tokens),
    "lstm, time first": (lambda: Sequences(nn.LSTM(4, 5), 5, batch_first=False), vectors),
    "encoder": (lambda: Sequences(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 4), vectors),
    "encoder, time first": (lambda: Sequences(nn.TransformerEncoderLayer(4, 2, 8), 4, batch_first=False), vectors),
    "encoder of tokens": (
        lambda: Sequences(nn.TransformerEncoderLayer(4, 2, 8, norm_first=True, batch_first=True), 4, tokens=True),
        tokens,
    ),
    "encoder with padding": (Padded, padded),
}


def sequences(name: str) -> tuple[revprop.Graph, Example]:
    build, made = SEQUENCES[name]
    net, x = build().eval(), made()
    with torch.no_grad():  # as in a trained network, other labels are then near
        for parameter in net.parameters():
            parameter.mul_(2.0 if parameter.dim() == 2 else 1.0)
    return revprop.trace(net, x), x


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence_networks_are_covered_and_fixed_points(name: str) -> None:
    graph, x = sequences(name)
    coverage = revprop.check(graph)
    assert coverage.covered
    stops = [row for row in coverage.rows if row[3] == "stops here"]
    assert len(stops) == ("token" in name or "padding" in name)
    rec = revprop.reconstruct(graph, x, target=graph(x).detach(), strategy="greedy", refine=2)
    assert {"embed", "hidden", "act", "output"} <= set(rec)
    for layer in rec:
        assert torch.equal(rec[layer], rec.recorded[layer])


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence_networks_can_be_given_another_label(name: str) -> None:
    graph, x = sequences(name)
    labels = (graph(x).argmax(1) + 1) % 3
    rec = revprop.reconstruct(graph, x, labels, to=["embed", "act"], strategy="greedy", refine=3, margin=0.1)
    assert bool(rec.certificates["act"].reached.all())
    embed = rec.certificates["embed"]
    assert embed.before is not None
    assert bool((embed.reached | ~embed.before.reached).all())
    assert float(embed.residual.mean()) < float(embed.before.residual.mean())


# -- a trained network ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sweeps_through_a_trained_residual_network(data_root: Path) -> None:
    """True labels at every block's output."""
    weights = data_root / "checkpoints/cifar10_resnet20.safetensors"
    images = data_root / "cifar10/cifar10_lossless_subset.npz"
    if not (weights.is_file() and images.is_file()):
        pytest.skip(f"no {weights.name} or {images.name} in {data_root}")
    net = NETWORKS["resnet20"]()
    net.load_state_dict(load_file(weights))
    data = np.load(images)
    x = torch.tensor(data["x_test"][:200]).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    labels = torch.tensor(data["y_test"][:200]).long()
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    rec = revprop.reconstruct(net, x, labels, to=blocks, strategy="greedy", refine=16, margin=0.1, damping=0.1)
    before, after = [], []
    for block in blocks:
        certificate = rec.certificates[block]
        assert certificate.before is not None
        before.append(float(certificate.before.reached.double().mean()))
        after.append(float(certificate.reached.double().mean()))
        assert bool((certificate.reached | ~certificate.before.reached).all())
    assert min(after) >= 0.95, dict(zip(blocks, after, strict=True))
    assert min(before) >= 0.9
    assert sum(after) / len(after) >= sum(before) / len(before) + 0.02
