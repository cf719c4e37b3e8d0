"""Post-training: exactly what was asked for is trained, by exactly the loss that was asked for."""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from training_cases import Residual, changed, digits, digits_network, residual_data, state_of

import revprop
from revprop import NonFiniteError, TrainingDivergedError, post_train, reconstruct
from revprop.graph import Graph, trace
from revprop.post_training import module_parameters

BLOCKS = ["input", "conv1", "conv2", "fc1", "fc2"]
PAIRS = [(start, stop) for i, start in enumerate(BLOCKS) for stop in BLOCKS[i + 1 :]]
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 64, "learning_rate": 0.003, "device": "cpu"}

# start, stop, trained prefixes: what lies between them in the residual network, skip connections considered
RESIDUAL_PAIRS = [
    ("input", "stem", ("stem.",)),
    ("stem", "block1", ("block1.",)),
    ("block1", "output", ("block2.", "head.")),
    ("input", "output", ("stem.", "block1.", "block2.", "head.")),
    ("block1.conv1", "block1", ("block1.bn1.", "block1.conv2.", "block1.bn2.", "block1.down.")),
    ("block1.bn1", "block1.conv2", ("block1.conv2.",)),
    ("stem", "block1.down", ("block1.down.",)),
    ("block1", "block2.bn2", ("block2.conv1.", "block2.bn1.", "block2.conv2.", "block2.bn2.")),
]


@pytest.fixture(scope="module")
def digits_graph() -> Graph:
    return trace(digits_network(), digits().train[0][:2])


@pytest.fixture(scope="module")
def residual_graph() -> Graph:
    """Double precision, so that a reference written otherwise can be compared step for step."""
    return trace(Residual().double().eval(), residual_data(dtype=torch.float64)[0])


# -- what is trained ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bp", "fr"])
@pytest.mark.parametrize(("start", "stop"), PAIRS)
def test_every_pair_of_the_digits_network(digits_graph: Graph, start: str, stop: str, method: Any) -> None:
    before = state_of(digits_graph.model)
    result = post_train(digits_graph, digits().train, start, stop, method=method, alpha=0.5, **QUICK)
    between = BLOCKS[BLOCKS.index(start) + 1 : BLOCKS.index(stop) + 1]
    expected = {name for name in before if name.partition(".")[0] in between}
    assert changed(before, state_of(result.model)) == expected == set(result.trained)
    assert result.parameters == sum(before[name].numel() for name in expected)
    assert changed(before, state_of(digits_graph.model)) == set()


@pytest.mark.parametrize("method", ["bp", "fr"])
@pytest.mark.parametrize(("start", "stop", "prefixes"), RESIDUAL_PAIRS)
def test_pairs_of_a_residual_network(
    residual_graph: Graph, start: str, stop: str, prefixes: tuple[str, ...], method: Any
) -> None:
    """Also: running statistics stay as they are, which buffers among what changed would show."""
    before = state_of(residual_graph.model)
    data = residual_data(dtype=torch.float64)
    result = post_train(residual_graph, data, start, stop, method=method, alpha=0.5, **QUICK)
    parameters = {name for name, _ in residual_graph.model.named_parameters() if name.startswith(prefixes)}
    assert changed(before, state_of(result.model)) == parameters == set(result.trained)


def test_a_parametrised_weight_is_trained_through_its_parametrisation() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(40, 5), torch.randint(0, 3, (40,))
    result = post_train(model, (x, y), "input", "1", **QUICK)
    expected = {"0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"}
    assert set(result.trained) == expected == changed(state_of(model), state_of(result.model))


class Reused(nn.Module):
    """One linear map used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


def test_a_parameter_shared_with_a_frozen_part_is_refused() -> None:
    torch.manual_seed(0)
    model, data = Reused(), (torch.randn(40, 4), torch.randint(0, 3, (40,)))
    for start, stop in (("input", "twice"), ("twice", "twice@1"), ("twice", "head")):
        with pytest.raises(ValueError, match=r"twice\.weight is shared between the modules to train and a frozen part"):
            post_train(model, data, start, stop, **QUICK)
    result = post_train(model, data, "input", "twice@1", **QUICK)  # both of its uses are trained together
    assert changed(state_of(model), state_of(result.model)) == {"twice.weight", "twice.bias"}
    reference, _ = train_plainly(model, result.trained, data, classification, **QUICK)
    torch.testing.assert_close(state_of(result.model), reference, rtol=1e-4, atol=1e-6)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a call could leave changed, but the values."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "modules": [
            (name, id(m), m.training, sorted(m.__dict__), [list(getattr(m, h).items()) for h in hooks])
            for name, m in model.named_modules()
        ],
        "parameters": [
            (name, id(p), p.data_ptr(), p._version, p.requires_grad, id(p.grad), list(p._backward_hooks or {}))
            for name, p in model.named_parameters()
        ],
        "buffers": [(name, id(b), b.data_ptr(), b._version) for name, b in model.named_buffers()],
        "gradients": [None if p.grad is None else p.grad.clone().tolist() for p in model.parameters()],
    }


def used_model() -> Residual:
    """In the middle of its life: some flags, gradients and hooks set."""
    model = Residual()
    model.train()
    model.block2.eval()
    model(residual_data()[0]).sum().backward()
    model.stem.weight.grad = None
    model.block1.conv1.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    model.block1.register_forward_hook(lambda module, inputs, output: None)
    model.head.weight.register_hook(lambda gradient: gradient)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"method": "bp", "validated": True},
        {"method": "fr", "strategy": "global", "alpha": 1.0},
        {"method": "fr", "strategy": "greedy", "start": "input"},
    ],
    ids=str,
)
def test_the_model_given_is_left_as_it_was(options: dict[str, Any]) -> None:
    model = used_model()
    values, before = state_of(model), snapshot(model)
    validation = residual_data(20) if options.pop("validated", False) else None
    result = post_train(
        model, residual_data(), **{"start": "stem", "stop": "block1", **QUICK, **options}, validation=validation
    )
    assert changed(values, state_of(model)) == set()
    assert snapshot(model) == before
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in result.model.named_parameters()} == flags
    assert all(p.grad is None for p in result.model.parameters())
    assert [m.training for m in result.model.modules()] == [m.training for m in model.modules()]
    assert "block1.conv1.weight" in result.trained  # what is asked for is trained, whatever its flag


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"learning_rate": 1e30}, TrainingDivergedError),
        ({"stop": "nowhere"}, ValueError),
        ({"validation": [(torch.zeros(1, 2, 6, 6), torch.tensor([9]))]}, ValueError),
    ],
    ids=["diverges", "unknown layer", "bad validation"],
)
def test_the_model_given_is_left_as_it_was_by_what_fails(options: dict[str, Any], error: type[Exception]) -> None:
    model = used_model()
    values, before = state_of(model), snapshot(model)
    with pytest.raises(error):
        post_train(model, residual_data(), **{"start": "stem", "stop": "block1", **QUICK, **options})
    assert changed(values, state_of(model)) == set()
    assert snapshot(model) == before


def test_training_mode_and_random_state_play_no_part() -> None:
    training, evaluating = used_model(), used_model().eval()
    evaluating.load_state_dict(training.state_dict())
    random = torch.get_rng_state()
    results = [post_train(m, residual_data(), "stem", "block1", **QUICK) for m in (training, evaluating)]
    assert changed(*(state_of(r.model) for r in results)) == set()
    assert torch.equal(torch.get_rng_state(), random)


# -- by which loss --------------------------------------------------------------------------------


Parts = Callable[[Tensor, Tensor, Tensor, Tensor], dict[str, Tensor]]


def classification(logits: Tensor, labels: Tensor, features: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    loss = F.cross_entropy(logits, labels)
    return {"loss": loss, "classification": loss}


def mixture(alpha: float, distance: Callable[..., Tensor]) -> Parts:
    def parts(logits: Tensor, labels: Tensor, features: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        classifying, reconstructing = F.cross_entropy(logits, labels), distance(features, wanted)
        return {
            "loss": (1 - alpha) * classifying + alpha * reconstructing,
            "classification": classifying,
            "reconstruction": reconstructing,
        }

    return parts


def train_plainly(
    model: nn.Module,
    names: Iterable[str],
    data: tuple[Tensor, Tensor],
    loss: Parts,
    stop: str = "output",
    wanted: Tensor | None = None,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    **_: Any,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The reference: the whole model in eval mode, the features by a hook, torch's Adam on the named parameters."""
    model, names = copy.deepcopy(model).eval(), set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    caught: list[Tensor] = []
    module = model if stop == "output" else model.get_submodule(stop)
    module.register_forward_hook(lambda module, inputs, output: caught.append(output))
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    generator, history = torch.Generator().manual_seed(0), []
    n = len(data[0])
    for _epoch in range(epochs):
        sums: Counter[str] = Counter()
        for rows in torch.randperm(n, generator=generator).split(batch_size):
            logits = model(data[0][rows])
            parts = loss(logits, data[1][rows], caught.pop(), logits if wanted is None else wanted[rows])
            adam.zero_grad()
            parts["loss"].backward()
            adam.step()
            sums.update({key: value.item() * len(rows) for key, value in parts.items()})  # type: ignore[arg-type]
        history.append({key: value / n for key, value in sums.items()})
    return state_of(model), history


@pytest.mark.parametrize(("start", "stop", "prefixes"), RESIDUAL_PAIRS)
def test_bp_is_plain_training_of_the_module(
    residual_graph: Graph, start: str, stop: str, prefixes: tuple[str, ...]
) -> None:
    data = residual_data(dtype=torch.float64)
    result = post_train(residual_graph, data, start, stop, method="bp", **{**QUICK, "epochs": 4, "batch_size": 16})
    settings = {**QUICK, "epochs": 4, "batch_size": 16}
    state, history = train_plainly(residual_graph.model, result.trained, data, classification, **settings)
    torch.testing.assert_close(state_of(result.model), state, rtol=1e-9, atol=1e-11)
    for epoch, expected in zip(result.history[1:], history, strict=True):
        assert epoch.losses == pytest.approx(expected, rel=1e-10)


WAYS = [
    ("stem", "block1", F.mse_loss, {"strategy": "global"}),
    ("stem", "block1", F.l1_loss, {"strategy": "global", "embedding": "maximum"}),
    ("block1", "block2", F.mse_loss, {"strategy": "global", "embedding": "one_hot"}),
    ("block1.conv1", "block1", F.mse_loss, {"strategy": "greedy", "damping": 0.1, "margin": 0.5}),
    ("block2", "output", F.mse_loss, {"strategy": "greedy", "rules": "nearest", "margin": 1.0}),
    ("block2", "output", F.l1_loss, {"strategy": "greedy", "embedding": "maximum", "margin": 0.5}),
]


@pytest.mark.parametrize(("start", "stop", "distance", "way"), WAYS)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_fr_is_plain_training_towards_the_wanted_features(
    residual_graph: Graph, start: str, stop: str, way: dict[str, Any], distance: Callable[..., Tensor], alpha: float
) -> None:
    data = residual_data(dtype=torch.float64)
    result = post_train(residual_graph, data, start, stop, method="fr", alpha=alpha, **QUICK, **way)
    wanted = reconstruct(residual_graph, data[0], data[1], to=stop, **way)[stop]
    state, history = train_plainly(
        residual_graph.model, result.trained, data, mixture(alpha, distance), stop, wanted, **QUICK
    )
    # the last of several convolutions before a sum is only so well determined: Adam divides by small gradients
    torch.testing.assert_close(state_of(result.model), state, rtol=1e-7, atol=1e-9)
    for epoch, expected in zip(result.history[1:], history, strict=True):
        assert set(epoch.losses) == {"loss", "reconstruction"} | ({"classification"} if alpha < 1 else set())
        assert epoch.losses == pytest.approx({key: expected[key] for key in epoch.losses}, rel=1e-8)


@pytest.mark.parametrize(
    ("embedding", "distance"), [("nearest", F.mse_loss), ("maximum", F.l1_loss), ("one_hot", F.mse_loss)]
)
@pytest.mark.parametrize("rules", ["nearest", "paper"])
def test_the_first_reconstruction_loss_computed_directly(
    digits_graph: Graph, embedding: Any, distance: Any, rules: Any
) -> None:
    data, way = digits().train, {"strategy": "greedy", "embedding": embedding, "rules": rules}
    rec = reconstruct(digits_graph, *data, to="fc1", **way)
    result = post_train(
        digits_graph, data, "conv2", "fc1", alpha=0.7, **{**QUICK, "learning_rate": 1e-12, "epochs": 1}, **way
    )
    expected = float(distance(rec.recorded["fc1"], rec["fc1"]))
    assert expected > 1e-3
    assert result.history[1].losses["reconstruction"] == pytest.approx(expected, rel=1e-5)


def test_alpha_0_is_bp(digits_graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revprop.prefix.reconstruct", None)  # wanted features are not even computed
    data = digits()
    bp, fr = (
        post_train(digits_graph, data.train, "conv1", "fc1", method=method, alpha=0.0, validation=data.test, **QUICK)
        for method in ("bp", "fr")
    )
    assert changed(state_of(bp.model), state_of(fr.model)) == set()
    assert [(e.losses, e.accuracy) for e in bp.history] == [(e.losses, e.accuracy) for e in fr.history]


@pytest.mark.parametrize(("start", "stop"), PAIRS)
def test_alpha_1_approaches_the_wanted_features(digits_graph: Graph, start: str, stop: str) -> None:
    x, y = digits().train
    settings = {**QUICK, "epochs": 40, "batch_size": 300}
    wanted = reconstruct(digits_graph, x, y, to=stop, margin=1.0)[stop]
    result = post_train(digits_graph, (x, y), start, stop, alpha=1.0, margin=1.0, **settings)
    node = digits_graph.node(stop)
    before, after = (
        float((g.record(x)[node] - wanted).square().mean()) for g in (digits_graph, digits_graph.on(result.model))
    )
    # a convolution's few weights cannot follow what each sample asks for; a linear map's many can
    assert after < (0.995 if stop.startswith("conv") else 0.9) * before
    assert result.history[-1].losses["reconstruction"] == pytest.approx(after, rel=0.02)


def test_accuracies(digits_graph: Graph) -> None:
    x, y = digits().test
    result = post_train(
        digits_graph,
        digits().train,
        "conv1",
        "fc1",
        epochs=10,
        batch_size=32,
        learning_rate=0.003,
        validation=(x, y),
        device="cpu",
    )

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return int((model(x).argmax(1) == y).sum()) / len(y)

    assert [e.epoch for e in result.history] == list(range(11))
    assert result.history[0].accuracy == accuracy(digits_graph.model)
    assert result.history[-1].accuracy == accuracy(result.model)
    assert result.history[-1].accuracy > result.history[0].accuracy  # what post-training is for
    assert [e.accuracy for e in post_train(digits_graph, (x, y), "fc1", "fc2", **QUICK).history] == [None] * 3


def test_a_shallower_module_needs_less_memory(digits_graph: Graph) -> None:
    sizes = [post_train(digits_graph, digits().train, start, "fc2", **QUICK).peak_memory for start in BLOCKS[:-1]]
    assert all(a > b > 0 for a, b in itertools.pairwise(sizes))


# -- what runs ------------------------------------------------------------------------------------


class Marked(nn.Module):
    """Three linear maps, each with an activation that occurs nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Linear(5, 6), nn.Linear(6, 4)
        self.middle = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return torch.atan(self.back(self.middle(torch.sin(self.front(x)))))


class SamplesThrough(TorchDispatchMode):
    """Counts the samples that go through each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].dim():
            self.samples[str(func.overloadpacket).removeprefix("aten.")] += len(args[0])
        return func(*args, **(kwargs or {}))


def samples_through(graph: Graph, **options: Any) -> Counter[str]:
    data = torch.linspace(-2, 2, 250).sin().view(50, 5), torch.arange(50) % 4
    with SamplesThrough() as mode:
        post_train(graph, data, "front", "middle", **{**QUICK, "batch_size": 20, **options})
    return mode.samples


@pytest.fixture(scope="module")
def marked() -> Graph:
    torch.manual_seed(3)
    return trace(Marked(), torch.zeros(2, 5))


def test_the_frozen_prefix_runs_once_per_sample(marked: Graph) -> None:
    held_out = torch.randn(30, 5), torch.arange(30) % 4
    assert [samples_through(marked, method="bp", epochs=e)["sin"] for e in (0, 1, 4)] == [50, 50, 50]
    assert samples_through(marked, method="bp", epochs=3, validation=held_out)["sin"] == 50 + 30
    fr = [samples_through(marked, method="fr", epochs=e)["sin"] for e in (0, 1, 4)]
    assert fr == [100, 100, 100]  # once for the values training reads, once in reconstruct


@pytest.mark.parametrize(("alpha", "behind"), [(1.0, 0), (0.9, 50)])
def test_with_alpha_1_nothing_behind_stop_runs(marked: Graph, alpha: float, behind: int) -> None:
    first, second = (samples_through(marked, method="fr", alpha=alpha, epochs=e) for e in (1, 3))
    assert second["tanh"] - first["tanh"] == 2 * 50
    assert second["atan"] - first["atan"] == 2 * behind


@pytest.mark.parametrize("budget", [0, 30_000])
def test_memory_mapped_features_give_the_same_numbers(
    digits_graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """A budget of nothing, and one that is used up on the way, where some batches wait in memory."""
    mapped, real = [], torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: mapped.append(a[0]) or real(*a, **k))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = digits()
    batches = list(zip(data.train[0].split(32), data.train[1].split(32), strict=True))
    common = {
        "alpha": 0.5,
        "validation": list(zip(data.test[0].split(32), data.test[1].split(32), strict=True)),
        **QUICK,
    }
    plain = post_train(digits_graph, batches, "conv1", "fc1", **common)
    assert mapped == []
    small = post_train(digits_graph, batches, "conv1", "fc1", memory_budget=budget, **common)
    assert len(mapped) == (5 if budget == 0 else 3)  # all; or those that are no labels
    assert changed(state_of(plain.model), state_of(small.model)) == set()
    assert [(e.losses, e.accuracy) for e in plain.history] == [(e.losses, e.accuracy) for e in small.history]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", [{"strategy": "global"}, {"strategy": "greedy", "rules": "paper"}], ids=str)
def test_training_gets_the_frozen_features_and_the_reconstructed_ones(
    digits_graph: Graph, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = revprop.post_training.fit
    monkeypatch.setattr(
        "revprop.post_training.fit", lambda m, data, *a, **k: seen.append(data) or real(m, data, *a, **k)
    )
    x, y = digits().train
    post_train(digits_graph, (x, y), "conv1", "fc1", **QUICK, **way)
    features, labels, wanted = seen[0]
    # compared in parts as they were computed: 256 samples at once, then the rest
    parts = [
        reconstruct(digits_graph, a, b, to=["conv1", "fc1"], **way)
        for a, b in zip(x.split(256), y.split(256), strict=True)
    ]
    assert torch.equal(features, torch.cat([p.recorded["conv1"] for p in parts]))
    assert torch.equal(labels, y)
    assert torch.equal(wanted, torch.cat([p["fc1"] for p in parts]))


# -- what it takes --------------------------------------------------------------------------------


def one_shot(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(x.split(7), y.split(7), strict=True)


LOADERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "DataLoader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=16),
    "list": lambda x, y: list(zip(x.split(60), y.split(60), strict=True)),
    "two batches": lambda x, y: ((x[:9], y[:9]), (x[9:], y[9:])),
    "generator": one_shot,
    "lists as batches": lambda x, y: [[x, y]],
}


@pytest.mark.parametrize("kind", LOADERS)
def test_loaders_give_the_numbers_of_the_two_tensors(residual_graph: Graph, kind: str) -> None:
    data, held_out = residual_data(dtype=torch.float64), residual_data(30, torch.float64)
    settings = {"alpha": 0.5, "strategy": "greedy", **QUICK}
    expected = post_train(residual_graph, data, "stem", "block1", validation=held_out, **settings)
    loader, validation = LOADERS[kind](*data), LOADERS[kind](*held_out)
    result = post_train(residual_graph, loader, "stem", "block1", validation=validation, **settings)
    torch.testing.assert_close(state_of(result.model), state_of(expected.model), rtol=1e-7, atol=1e-9)
    assert [e.accuracy for e in result.history] == [e.accuracy for e in expected.history]
    assert [e.losses for e in result.history] == [pytest.approx(e.losses, rel=1e-8) for e in expected.history]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(x) + self.b(y)))


def test_a_model_of_two_inputs() -> None:
    torch.manual_seed(0)
    model, x, y, labels = TwoInputs().double(), *torch.randn(2, 40, 3).double(), torch.arange(40) % 3
    loader = [((x[:25], y[:25, :2]), labels[:25]), ((x[25:], y[25:, :2]), labels[25:])]
    result = post_train(model, loader, "a", "head", alpha=0.5, **QUICK)
    assert set(result.trained) == {"b.weight", "b.bias", "head.weight", "head.bias"}
    assert changed(state_of(model), state_of(result.model)) == set(result.trained)
    assert result.history[2].losses["loss"] < result.history[1].losses["loss"]


def test_the_seed_decides_the_numbers(digits_graph: Graph) -> None:
    def run(seed: int) -> dict[str, Tensor]:
        return state_of(post_train(digits_graph, digits().train, "conv1", "fc1", seed=seed, **QUICK).model)

    assert changed(run(1), run(1)) == set()
    assert changed(run(1), run(2)) == {"conv2.0.weight", "conv2.0.bias", "fc1.0.weight", "fc1.0.bias"}


def test_an_interrupted_run_continues_to_the_same_numbers(digits_graph: Graph, tmp_path: Path) -> None:
    def run(epochs: int, checkpoint: Path | str | None) -> revprop.PostTraining:
        return post_train(
            digits_graph,
            digits().train,
            "conv1",
            "fc1",
            alpha=0.5,
            validation=digits().test,
            checkpoint=checkpoint,
            **{**QUICK, "epochs": epochs},
        )

    whole, _, continued = run(5, None), run(2, tmp_path), run(5, str(tmp_path))
    assert changed(state_of(whole.model), state_of(continued.model)) == set()
    assert [(e.losses, e.accuracy) for e in continued.history] == [(e.losses, e.accuracy) for e in whole.history]
    assert continued.seconds == sum(e.seconds for e in continued.history)


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        ({"start": "conv2"}, "start"),
        ({"stop": "fc2"}, "stop"),
        ({"alpha": 0.6, "margin": 0.1}, "alpha, margin"),
        (
            {"method": "bp"},
            "alpha, attention, blocks, damping, embedding, margin, method, refine, rules, solver, strategy, tolerance",
        ),
        ({"samples": 299}, "samples"),
        ({"weights": 1e-3}, "model"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    digits_graph: Graph, tmp_path: Path, other: dict[str, Any], differing: str
) -> None:
    graph, (x, y) = digits_graph, digits().train
    settings = {"start": "conv1", "stop": "fc1", "alpha": 0.5, "checkpoint": tmp_path, **QUICK}
    post_train(graph, (x, y), **settings)
    options = {"samples": 300, "weights": 0.0, **other}
    n = options.pop("samples")
    if change := options.pop("weights"):
        graph = graph.on(digits_network())
        with torch.no_grad():
            graph.model.fc2[0].weight += change  # frozen, but the wanted features depend on it
    with pytest.raises(ValueError, match=rf"the checkpoint of other settings \({differing} differ\)"):
        post_train(graph, (x[:n], y[:n]), **{**settings, **options})


# -- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stop", "message"),
    [
        ("conv11", "fc1", r"unknown layer 'conv11'; did you mean .*'conv1'"),
        ("conv1", "fc", r"unknown layer 'fc'; did you mean 'fc2' or 'fc1'"),
        ("zzz", "fc1", r"unknown layer 'zzz'; known: 'input', 'conv1\.0', "),
        ("fc1", "conv1", r"start='fc1' is not in front of stop='conv1'; in forward order: input, conv1\.0"),
        ("fc1", "fc1", "start='fc1' is not in front of stop='fc1'"),
        ("fc1.0", "fc1", r"no parameters between 'fc1\.0' and 'fc1': nothing to train"),
    ],
)
def test_bad_layers(digits_graph: Graph, start: str, stop: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module_parameters(digits_graph, start, stop)
    with pytest.raises(ValueError, match=message):
        post_train(digits_graph, digits().train, start, stop, **QUICK)


def test_a_layer_of_another_branch_is_not_in_front(residual_graph: Graph) -> None:
    with pytest.raises(ValueError, match=r"start='block1\.down' is not in front of stop='block1\.bn2'"):
        module_parameters(residual_graph, "block1.down", "block1.bn2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rf"}, "unknown method 'rf'; did you mean 'fr'"),
        ({"method": "sgd"}, "unknown method 'sgd'; known: 'fr', 'bp', 'solve'"),
        ({"alpha": -0.1}, "alpha: expected the share of the reconstruction loss, 0 to 1; given -0.1"),
        ({"alpha": 1.5}, "alpha: .*; given 1.5"),
        ({"alpha": math.nan}, "alpha: .*; given nan"),
        ({"embedding": "nearst"}, "unknown embedding 'nearst'; did you mean 'nearest'"),
        ({"strategy": "globl"}, "unknown strategy 'globl'; did you mean 'global'"),
        ({"rules": "paper"}, 'rules="paper" is the published greedy walk: pass strategy="greedy" with it'),
        ({"damping": -1.0}, "damping: expected a number >= 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, given 0"),
        ({"epochs": -1}, "epochs: expected at least 0, given -1"),
    ],
)
def test_bad_options(digits_graph: Graph, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        post_train(digits_graph, digits().train, "conv1", "fc1", **{**QUICK, **options})


@pytest.mark.parametrize("loader", [[], iter(()), (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long))])
def test_an_empty_loader(digits_graph: Graph, loader: Any) -> None:
    with pytest.raises(ValueError, match=r"loader: expected batches of \(inputs, labels\); it gave none"):
        post_train(digits_graph, loader, "conv1", "fc1", **QUICK)


def test_what_is_no_loader(digits_graph: Graph) -> None:
    x, y = digits().train
    for loader, message in (
        (TensorDataset(x, y), "its items are single samples: torch.utils.data.DataLoader makes batches"),
        ([x, y], "or a tuple of the two tensors; its first item is a Tensor"),
        (x, "its first item is a Tensor"),
        ([(x, y, y)], "its first item is a tuple of 3"),
    ):
        with pytest.raises(ValueError, match=f"loader: expected batches.*{message}"):
            post_train(digits_graph, loader, "conv1", "fc1", **QUICK)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["first batch", "second batch", "validation"])
@pytest.mark.parametrize(("method", "alpha"), [("bp", 0.1), ("fr", 0.1), ("fr", 0.0), ("fr", 1.0)])
def test_bad_labels_are_refused_wherever_they_are(digits_graph: Graph, where: str, method: Any, alpha: float) -> None:
    def run(spoil: Callable[[Tensor], Tensor]) -> None:
        (x, y), settings = digits().train, {"method": method, "alpha": alpha, **QUICK}
        good, bad = (x[:50], y[:50]), (x[:50], spoil(y[:50].clone()))
        train = {"first batch": [bad, good], "second batch": [good, bad], "validation": [good]}[where]
        post_train(
            digits_graph, train, "conv1", "fc1", validation=[good, bad] if where == "validation" else None, **settings
        )

    with pytest.raises(ValueError, match="labels: expected 0 to 9 for 10 outputs; given 0 to 10"):
        run(lambda y: y.index_fill(0, torch.tensor([3]), 10))
    with pytest.raises(ValueError, match="labels: expected 0 to 9 for 10 outputs; given -1 to 9"):
        run(lambda y: y.index_fill(0, torch.tensor([49]), -1))
    with pytest.raises(ValueError, match=r"labels: expected int64 class indices, given torch\.float32"):
        run(lambda y: y.float())
    with pytest.raises(ValueError, match=r"labels: expected shape \(50,\), one per sample; given \(49,\)"):
        run(lambda y: y[1:])


@pytest.mark.parametrize("method", ["bp", "fr"])
def test_nan_is_refused_at_the_door(digits_graph: Graph, method: Any) -> None:
    x, y = digits().train
    bad = x.clone()
    bad[270, 0, 3, 3] = math.nan
    for data, validation in (((bad, y), None), ([(x, y), (bad, y)], None), ((x, y), (bad, y))):
        with pytest.raises(NonFiniteError, match=r"input .* holds 1 of .* values that are NaN or infinite"):
            post_train(digits_graph, data, "conv1", "fc1", method=method, validation=validation, **QUICK)
    model = digits_network()
    with torch.no_grad():
        model.conv1[0].bias[1] = math.inf
    with pytest.raises(NonFiniteError, match=r"parameter 'conv1\.0\.bias' holds 1 of 4 values"):
        post_train(model, (x, y), "conv1", "fc1", method=method, **QUICK)


def test_wrong_shapes_and_lengths(digits_graph: Graph) -> None:
    x, y = digits().train
    with pytest.raises(ValueError, match="expected inputs and labels of one length, given 300 and 299"):
        post_train(digits_graph, (x, y[1:]), "conv1", "fc1", **QUICK)
    with pytest.raises(ValueError, match=r"was traced as \(n, 1, 8, 8\); given: \(256, 1, 8, 7\)"):
        post_train(digits_graph, (x[..., 1:], y), "conv1", "fc1", **QUICK)
    with pytest.raises(
        ValueError, match=r"labels need outputs of shape \(n, classes\); the network's are \(50, 8, 6, 6\)"
    ):
        post_train(nn.Conv2d(1, 8, 3), (x[:50], y[:50]), "input", "output", method="bp", **QUICK)


def test_a_run_that_diverges_says_where(digits_graph: Graph) -> None:
    with pytest.raises(TrainingDivergedError, match=r"at step \d of epoch \d; no checkpoint was kept"):
        post_train(digits_graph, digits().train, "fc1", "fc2", **{**QUICK, "learning_rate": 1e30})
