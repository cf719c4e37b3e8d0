"""Tracing: names, spellings, batch sizes, live parameters, an untouched model, and failures that are explained."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revprop
from revprop.errors import ExportError, NonFiniteError
from revprop.graph import Graph, trace
from revprop.networks import NETWORKS

aten = torch.ops.aten


class Lambda(nn.Module):
    """A function as a module, with a convolution and a linear map to use."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(3, 3), nn.Tanh()
        self.block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.act(self.linear(x)))
        return self.block(self.act(self.linear(x)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) - torch.tanh(self.right(b))


class Regularised(nn.Module):
    """Batch norm and dropout, which behave differently in training; and a hook of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)
        self.act, self.pool, self.head = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.pool(self.act(self.norm(self.conv(x))))).flatten(1))


def targets(graph: Graph) -> list[Any]:
    return [node.target for node in graph.nodes]


# -- names -----------------------------------------------------------------------------------------------------------


def test_layers_are_module_paths_in_forward_order() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    assert trace(net, torch.zeros(1, 3)).layers == ("input", "0", "1.0", "1.1", "1", "output")
    assert trace(NETWORKS["digits"](), torch.zeros(1, 1, 8, 8)).layers == (
        *("input", "conv1.0", "conv1.1", "conv1.2", "conv1", "conv2.0", "conv2.1", "conv2"),
        *("fc1.0", "fc1.1", "fc1", "fc2.0", "fc2", "output"),
    )


def test_features_of_a_layer_are_its_modules_output() -> None:
    net = NETWORKS["resnet20"](seed=0).eval()
    x = torch.randn(2, 3, 32, 32)
    graph = trace(net, x)
    seen: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if name:
            module.register_forward_hook(lambda _m, _x, out, name=name: seen.__setitem__(name, out))
    with torch.no_grad():
        net(x)
    recorded = graph.record(x)
    named = [layer for layer in graph.layers if layer not in ("input", "output")]
    assert {*named} == {name for name in seen if "downsample" not in name or "layer2.0" in name or "layer3.0" in name}
    for layer in named:
        torch.testing.assert_close(recorded[graph.node(layer)], seen[layer], rtol=1e-5, atol=1e-6)


def test_further_calls_of_a_module_are_numbered() -> None:
    layers = trace(Reused(), torch.zeros(1, 3)).layers
    once = ("linear", "act", "block.0", "block.1", "block")
    assert layers == ("input", *once, *(f"{name}@1" for name in once), "output")


def test_several_inputs_have_names_of_their_own() -> None:
    net = TwoInputs()
    a, b = torch.randn(5, 3), torch.randn(5, 2)
    graph = trace(net, (a[:1], b[:1]))
    assert graph.layers == ("input:a", "input:b", "left", "right", "output")
    torch.testing.assert_close(graph((a, b)), net(a, b), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"traced with 2 input tensors \('a', 'b'\); 1 were given"):
        graph(a)


def test_an_unknown_layer_gets_the_near_matches() -> None:
    graph = trace(NETWORKS["digits"](), torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="unknown layer 'conv9'; did you mean 'conv2' or 'conv1'"):
        graph.node("conv9")


def test_values_that_merge_or_move_the_batch_are_no_layers() -> None:
    net = Lambda(lambda m, x: m.linear(x.reshape(-1, 3)).reshape(x.shape[0], 6))
    x = torch.randn(4, 2, 3)
    graph = trace(net, x)
    assert graph.layers == ("input", "output")
    torch.testing.assert_close(graph(x), net(x))
    assert trace(Lambda(lambda m, x: m.linear(x.permute(1, 0, 2)).permute(1, 0, 2)), x).layers == ("input", "output")


# -- spellings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "relu",
    [
        lambda x: F.relu(x),
        lambda x: F.relu(x, inplace=True),
        lambda x: x.relu(),
        lambda x: x.relu_(),
        lambda x: torch.relu(x),
        nn.ReLU(),
        nn.ReLU(inplace=True),
    ],
)
def test_all_spellings_of_relu_are_one_operator(relu: Callable[[Tensor], Tensor]) -> None:
    graph = trace(Lambda(lambda m, x: relu(m.linear(x))), torch.zeros(1, 3))
    assert targets(graph) == [aten.linear.default, aten.relu.default]


SPELLINGS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "arithmetic": (lambda m, x: (2 * x - x / 3 + 1) * torch.tensor([1.0, 2.0, 3.0]), (3,)),
    "residual": (lambda m, x: m.linear(x) + x, (3,)),
    "in-place residual": (lambda m, x: m.linear(x).add_(x).mul_(2), (3,)),
    "concatenation": (lambda m, x: torch.cat([x, m.linear(x)], dim=1), (3,)),
    "stacked": (lambda m, x: torch.stack([x, m.linear(x)], 1), (3,)),
    "split": (lambda m, x: torch.cat(m.conv(x).split(3, 1)[::-1], 1), (2, 4, 4)),
    "split by sizes": (lambda m, x: m.conv(x).split([1, 3], dim=1)[1], (2, 4, 4)),
    "chunk": (lambda m, x: (lambda a, b: a * b)(*m.conv(x).chunk(2, 1)), (2, 4, 4)),
    "unbind": (lambda m, x: sum(m.conv(x).unbind(1)), (2, 4, 4)),
    "indexing": (lambda m, x: m.conv(x)[:, 1::2, ..., None, -1], (2, 4, 4)),
    "view by size": (lambda m, x: m.conv(x).view(x.size(0), -1), (2, 4, 4)),
    "reshape": (lambda m, x: m.conv(x).reshape(-1, 64), (2, 4, 4)),
    "flatten": (lambda m, x: torch.flatten(m.conv(x), 1), (2, 4, 4)),
    "merged batch": (lambda m, x: m.linear(x.view(-1, 3)).view(-1, 2, 3).mean(1), (2, 3)),
    "mean over the image": (lambda m, x: m.conv(x).mean([2, 3]), (2, 4, 4)),
    "squeezed": (lambda m, x: F.adaptive_avg_pool2d(m.conv(x), 1).squeeze(-1).squeeze(-1), (2, 4, 4)),
    "tensor of the batch size": (lambda m, x: torch.cat([x, torch.zeros(x.shape[0], 2)], 1), (3,)),
    "tensor like the input": (lambda m, x: x + torch.ones_like(x) * x.new_full((3,), 2.0), (3,)),
    "positions": (lambda m, x: x + torch.arange(3) / 3, (3,)),
    "expanded parameter": (lambda m, x: torch.cat([m.linear.bias.expand(x.shape[0], -1), x], 1), (3,)),
    "constant arithmetic": (lambda m, x: F.linear(x, m.linear.weight / m.linear.weight.norm()), (3,)),
    "without gradients inside": (lambda m, x: x + _without_gradients(m, x), (3,)),
    "a tensor in a tuple": (lambda m, x: (m.linear(x),)[0], (3,)),
    "a number from a tensor": (lambda m, x: m.linear(x) * m.linear.weight.max().item(), (3,)),
    "the input itself": (lambda m, x: x, (3,)),
}


def _without_gradients(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return module.linear(x)


@pytest.mark.parametrize("name", SPELLINGS)
def test_traced_networks_compute_what_the_model_computes_for_every_batch_size(name: str) -> None:
    function, shape = SPELLINGS[name]
    net = Lambda(function).eval()
    graph = trace(net, torch.randn(2, *shape))
    for n in (0, 1, 7):
        if n or name not in ("view by size", "reshape", "merged batch"):  # eager view(0, -1) has no answer
            x = torch.randn(n, *shape)
            torch.testing.assert_close(graph(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_the_batch_size_of_the_example_does_not_matter(n: int) -> None:
    net = NETWORKS["digits"](seed=0)
    graph = trace(net, torch.randn(n, 1, 8, 8))
    for m in (0, 1, 2, 3):
        x = torch.randn(m, 1, 8, 8)
        assert graph(x).shape == (m, 10)
        if m:
            torch.testing.assert_close(graph(x), net(x), rtol=0, atol=0)


def test_split_and_unbind_become_slices() -> None:
    net = Lambda(lambda m, x: x.split(1, 1)[0] + x.chunk(3, 1)[1] + x.unbind(1)[2].unsqueeze(1))
    assert {aten.slice.Tensor, aten.select.int} <= set(targets(trace(net, torch.zeros(1, 3))))


# -- live parameters -------------------------------------------------------------------------------------------------


def edit_by_optimiser(net: nn.Module) -> None:
    net(torch.ones(2, 4)).sum().backward()
    torch.optim.SGD(net.parameters(), 0.5).step()


def edit_by_loading(net: nn.Module) -> None:
    net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})


def edit_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data.mul_(2)  # changes no version counter


def edit_by_new_parameter(net: nn.Module) -> None:
    net[2].weight = nn.Parameter(net[2].weight.detach() * 3)  # type: ignore[index,union-attr]


@pytest.mark.parametrize("edit", [edit_by_optimiser, edit_by_loading, edit_data, edit_by_new_parameter])
def test_parameters_are_read_live_forwards_and_backwards(edit: Callable[[nn.Module], None]) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, target = torch.randn(6, 4), torch.randn(6, 3)
    graph = trace(net, x)
    options = {"target": target, "strategy": "greedy", "to": "input"}
    before = revprop.reconstruct(graph, x, **options)["input"]
    edit(net)
    torch.testing.assert_close(graph(x), net(x), rtol=0, atol=0)
    after = revprop.reconstruct(graph, x, **options)["input"]
    torch.testing.assert_close(after, revprop.reconstruct(net, x, **options)["input"], rtol=0, atol=0)
    assert not torch.equal(before, after)


def test_shared_parameters_are_one() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    x = torch.randn(2, 3)
    graph = trace(net, x)
    with torch.no_grad():
        net[0].weight.mul_(2)
    torch.testing.assert_close(graph(x), net(x), rtol=0, atol=0)
    assert graph.parameters_of(graph.nodes[:1]) == ("0.bias", "0.weight")
    assert graph.parameters_of(graph.nodes[2:]) == ("0.weight", "2.bias")


class StandardisedConvolution(nn.Module):
    """Weights normalised by an operator with several results, as networks without norms of activations have them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(4, 2, 3, 3)), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.view(1, 4, -1), None, None, self.gain, training=True, momentum=0.0)
        return F.relu(F.conv2d(x, weight.view_as(self.weight)))


def test_weights_computed_by_operators_with_several_results_are_constants() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(StandardisedConvolution(), nn.Flatten(), nn.Linear(64, 3)).double()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    assert {kind for operator, *_, kind, _ in revprop.check(net, x).rows if "conv" in operator} == {"closed form"}
    found = revprop.reconstruct(net, x, target=net(x).detach(), to="input", strategy="greedy")
    assert torch.equal(found["input"], x)


def test_a_segment_takes_parameters_given_by_name() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    graph = trace(net, torch.zeros(1, 3))
    features = torch.randn(5, 4)
    suffix, held = graph.behind("0")
    assert held == ()
    weight = torch.randn(2, 4)
    torch.testing.assert_close(suffix(features)[0], net[1](features))
    torch.testing.assert_close(
        suffix(features, parameters={"1.weight": weight})[0], F.linear(features, weight, net[1].bias)
    )


def test_what_by_passes_a_layer_is_held() -> None:
    net = Lambda(lambda m, x: m.linear(x).tanh() + 2 * x)
    x = torch.randn(5, 3)
    graph = trace(net, x)
    suffix, held = graph.behind("linear")
    recorded = graph.record(x)
    features = torch.randn(5, 3)
    assert [recorded[node].shape for node in held] == [(5, 3)]
    torch.testing.assert_close(suffix(features, *(recorded[node] for node in held))[0], features.tanh() + 2 * x)


# -- the model is untouched ------------------------------------------------------------------------------------------


def snapshot(net: nn.Module) -> dict[str, Any]:
    """Everything a call could leave behind: flags, attributes, hooks, tensors with their versions and gradients."""
    state: dict[str, Any] = {"seed": torch.get_rng_state().tolist(), "gradients": torch.is_grad_enabled()}
    for name, module in net.named_modules():
        state[f"{name}: flags"] = module.training
        state[f"{name}: attributes"] = sorted(module.__dict__)
        hooks = {key: list(value) for key, value in module.__dict__.items() if "hook" in key and value is not None}
        state[f"{name}: hooks"] = hooks
        state[f"{name}: children"] = [id(child) for child in module.children()]
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        grad = tensor.grad
        state[f"{name}: tensor"] = (id(tensor), tensor._version, tensor.requires_grad, tensor.tolist())
        state[f"{name}: gradient"] = None if grad is None else (id(grad), grad.tolist())
    return state


@pytest.mark.parametrize(
    "call",
    [
        lambda net, x, y: trace(net, x),
        lambda net, x, y: trace(net, x)(x),
        lambda net, x, y: revprop.check(net, x),
        lambda net, x, y: revprop.reconstruct(net, x, y),
        lambda net, x, y: revprop.reconstruct(net, x, y, strategy="greedy"),
        lambda net, x, y: [*revprop.reconstruct(net, x, y, strategy="greedy", rules="paper").certificates.values()],
        lambda net, x, y: [*revprop.reconstruct(net, x, target=torch.ones(len(x), 3)).certificates.values()],
    ],
    ids=["trace", "call", "check", "global", "greedy", "paper", "target"],
)
def test_the_model_is_left_as_it_was(call: Callable[[nn.Module, Tensor, Tensor], Any]) -> None:
    net = Regularised().train()
    net.norm.eval()
    net.head.bias.requires_grad_(False)
    net.conv.register_forward_hook(lambda module, args, out: None)
    x, y = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    net(x).sum().backward()
    given = (x.clone(), y.clone())
    before = snapshot(net)
    call(net, x, y)
    assert snapshot(net) == before
    assert torch.equal(x, given[0])
    assert torch.equal(y, given[1])
    assert not x.requires_grad
    assert x.grad is None


def test_tracing_in_training_mode_describes_the_network_in_eval_mode() -> None:
    net = Regularised()
    x = torch.randn(4, 1, 6, 6)
    net.train()(x)
    graph = trace(net.train(), x)
    torch.testing.assert_close(graph(x), copy.deepcopy(net).eval()(x))
    assert aten.batch_norm.default in targets(graph)


def test_a_failed_trace_leaves_the_model_as_it_was() -> None:
    net = nn.Sequential(Regularised(), Lambda(lambda m, x: x if x.sum() > 0 else -x)).train()
    before = snapshot(net)
    with pytest.raises(ExportError):
        trace(net, torch.ones(2, 1, 6, 6))
    assert snapshot(net) == before


def test_a_graph_is_freed_with_what_was_factored_for_it() -> None:
    net = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    graph = trace(net, torch.zeros(1, 1, 4, 4))
    revprop.reconstruct(graph, torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2]), strategy="greedy")
    alive = weakref.ref(graph)
    del graph
    gc.collect()
    assert alive() is None


# -- what cannot be traced -------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * 2


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            Lambda(lambda m, x: x if x.sum() > 0 else -x),
            r"control flow depends on the values of tensors at .*test_graph.py, line \d+: .*torch\.where",
        ),
        (Lambda(lambda m, x: x.view(2, 3) * 2), r"the batch size is fixed inside forward.*x.view\(x.size\(0\)"),
        (Lambda(lambda m, x: (x, 2 * x)), "returns 2 tensors that could be run backwards; choose with output="),
        (
            Lambda(lambda m, x: m.linear(x[:, :2])),
            r"forward fails on the example \(x: \(2, 3\)\) at .*line \d+: .*run model.eval\(\)\(example\)",
        ),
        (Lambda(lambda m, x: x.add_(1) * 2), "the model writes to 'x' during forward"),
        (Counting(), "the model writes to 'count' during forward in eval mode at .* compute a new tensor instead"),
        (Lambda(lambda m, x: torch.ones(3)), "output does not depend on the input"),
        (Lambda(lambda m, x: m.linear(x).T), "the batch is not the first dimension of the model's output"),
    ],
    ids=[
        "if",
        "batch size",
        "several outputs",
        "shapes",
        "writes to the input",
        "writes to a buffer",
        "constant",
        "moved batch",
    ],
)
def test_what_stops_the_export_is_explained(net: nn.Module, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        trace(net, torch.ones(2, 3))


@pytest.mark.parametrize("example", [None, "x", 3.0, (), torch.tensor(1.0), (torch.zeros(1, 3), 2)])
def test_examples_that_are_no_batches_are_refused(example: Any) -> None:
    with pytest.raises(ValueError, match="example: expected a tensor"):
        trace(nn.Linear(3, 3), example)


def test_inputs_that_do_not_fit_the_traced_network_are_refused() -> None:
    graph = trace(nn.Linear(3, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"input 'input' was traced as \(n, 3\); given: \(2, 4\)"):
        graph(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"input 'input' was traced as \(n, 3\); given: \(\)"):
        graph(torch.tensor(1.0))
    with pytest.raises(NonFiniteError, match="input 'input' holds 2 of 6 values that are NaN or infinite"):
        graph(torch.tensor([[1.0, torch.nan, 0.0], [torch.inf, 0.0, 0.0]]))
    both = trace(TwoInputs(), (torch.zeros(1, 3), torch.zeros(1, 2)))
    with pytest.raises(ValueError, match=r"inputs of one batch size; given: 2, 3"):
        both((torch.zeros(2, 3), torch.zeros(3, 2)))
