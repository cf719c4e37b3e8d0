"""What can be traced: inputs and outputs as people have them, and failures with their reason, line and rewrite."""

import copy
import logging
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import revprop
from revprop.errors import ExportError
from revprop.graph import trace
from revprop.reverse import as_graph

SOURCE = Path(__file__).read_text(encoding="utf-8").splitlines()


def line_of(marker: str) -> int:
    """The line of this file that ends in ``# <- marker``."""
    (found,) = [i for i, line in enumerate(SOURCE, 1) if line.endswith(f"# <- {marker}")]
    return found


class Net(nn.Module):
    """What the small networks here have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)


def assert_traced(net: nn.Module, example: Any, output: Any = None) -> None:
    """The traced network computes what the model computes, for other batch sizes than the example's."""
    graph = trace(net, example, output=output)
    net.eval()
    for n in (1, 2, 5):
        x = example.repeat(3, *[1] * (example.dim() - 1))[:n] + torch.randn(n, *example.shape[1:])
        torch.testing.assert_close(graph(x), net(x), rtol=1e-5, atol=1e-6)


# -- inputs ----------------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """A classifier of token indices with a mask, as language models take them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(11, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        x = torch.tanh(self.hidden(self.embedding(input_ids)))
        if attention_mask is not None:
            x = x.masked_fill(~attention_mask.bool()[:, :, None], 0.0)
        return self.head(x.sum(1)) * (1.0 if scale is None else scale)


def tokens(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(0, 11, (n, 4), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.rand(n, 4, generator=generator) < 0.7).long()}


def test_keyword_inputs_are_named_by_their_arguments_in_any_order() -> None:
    net = Tokens()
    graph = trace(net, tokens(1))
    assert graph.input_names == ("input_ids", "attention_mask")
    assert graph.layers[:3] == ("input:input_ids", "input:attention_mask", "embedding")
    for n in (0, 1, 2, 7):
        x = tokens(n)
        torch.testing.assert_close(graph(x), net(**x), rtol=0, atol=0)
        turned = dict(reversed(x.items()))
        torch.testing.assert_close(graph(turned), net(**x), rtol=0, atol=0)
        torch.testing.assert_close(graph(tuple(x.values())), net(**x), rtol=0, atol=0)
    recorded = graph.record(dict(reversed(tokens(5).items())))
    torch.testing.assert_close(recorded[graph.node("embedding")], net.embedding(tokens(5)["input_ids"]))


def test_positional_inputs_are_taken_by_name_too() -> None:
    net = Tokens()
    x = tokens(3)
    graph = trace(net, tuple(x.values()))
    assert graph.layers[:2] == ("input:input_ids", "input:attention_mask")
    torch.testing.assert_close(graph(x), net(**x), rtol=0, atol=0)
    alone = trace(net, {"input_ids": x["input_ids"]})
    assert alone.layers[0] == "input"
    torch.testing.assert_close(alone(x["input_ids"]), net(x["input_ids"]), rtol=0, atol=0)


def test_arguments_between_may_be_left_out_and_numbers_of_args_are_counted() -> None:
    class Many(Net):
        def forward(self, *parts: Tensor, offset: Tensor) -> Tensor:
            return self.linear(sum(parts)) + offset

    net, x = Tokens(), {"scale": torch.rand(2, 1), "input_ids": tokens(2)["input_ids"]}
    torch.testing.assert_close(trace(net, x)(x), net(**x), rtol=0, atol=0)
    with pytest.raises(
        ValueError, match=r"Many.forward.* cannot be called with it: missing a required argument: 'offset'"
    ):
        trace(Many(), (torch.rand(2, 3), torch.rand(2, 3)))

    class Sum(Net):
        def forward(self, *parts: Tensor) -> Tensor:
            return self.linear(torch.stack(parts).sum(0))

    assert trace(Sum(), (torch.rand(2, 3), torch.rand(2, 3))).layers[:2] == ("input:parts_0", "input:parts_1")


def test_keyword_inputs_go_through_every_verb() -> None:
    net, x, y = Tokens(), tokens(40), torch.arange(40) % 3
    assert revprop.check(net, {"input_ids": x["input_ids"]}).rows[0][0] == "embedding.default"
    rec = revprop.reconstruct(net, x, y, to="hidden", batch_size=16)
    assert rec["hidden"].shape == (40, 4, 5)
    assert bool(rec.certificates["hidden"].reached.all())
    whole = revprop.diagnose(net, (x, y), layers=["hidden"])
    batches = [({k: v[i : i + 20] for k, v in x.items()}, y[i : i + 20]) for i in (0, 20)]
    apart = revprop.diagnose(net, batches, layers=["hidden"])
    torch.testing.assert_close(whole.layers[0].deviation, rec.deviation["hidden"])
    torch.testing.assert_close(apart.layers[0].deviation, rec.deviation["hidden"])
    assert [d.layer for d in revprop.diagnose(net, (x, y), layers=["head"]).layers] == ["head"]
    for method in ("bp", "fr", "solve"):
        of_pair = revprop.post_train(net, (x, y), "input", "head", method=method, epochs=1, device="cpu", seed=1)
        of_tuple = revprop.post_train(
            trace(net, x), (tuple(x.values()), y), "input", "head", method=method, epochs=1, device="cpu", seed=1
        )
        assert of_pair.history[-1].losses == of_tuple.history[-1].losses
        assert "head.weight" in of_pair.trained


def test_only_modules_are_traced() -> None:
    with pytest.raises(ValueError, match=r"model: expected a torch.nn.Module; given function"):
        trace(lambda x: x, torch.zeros(1, 3))  # type: ignore[arg-type]


def test_inputs_that_do_not_fit_are_refused_by_name() -> None:
    graph, x = trace(Tokens(), tokens(2)), tokens(4)
    cases: list[tuple[Any, str]] = [
        (
            {"input_ids": x["input_ids"]},
            "missing 'attention_mask': the model was traced with the inputs 'input_ids', 'atte",
        ),
        ({**x, "attention": x["input_ids"]}, "unknown input 'attention'; did you mean 'attention_mask'"),
        ((x["input_ids"],), r"traced with 2 input tensors \('input_ids', 'attention_mask'\); 1 were given"),
        ({**x, "attention_mask": None}, "input 'attention_mask': expected a tensor; given NoneType"),
        (
            {**x, "attention_mask": x["attention_mask"][:, :3]},
            r"'attention_mask' was traced as \(n, 4\); given: \(4, 3\)",
        ),
        (
            {**x, "input_ids": x["input_ids"].float()},
            "input 'input_ids' was traced as torch.int64; given: torch.float32",
        ),
        ({**x, "attention_mask": x["attention_mask"][:3]}, "inputs of one batch size; given: 4, 3"),
    ]
    for given, message in cases:
        for take in (graph, graph.record, graph.check_input):
            with pytest.raises(ValueError, match=message):
                take(given)
        with pytest.raises(ValueError, match=message):
            revprop.reconstruct(graph, given, torch.tensor([0, 1, 2, 0]))


def test_examples_that_forward_does_not_take_are_refused() -> None:
    x = tokens(2)
    cases: list[tuple[Any, str]] = [
        (
            {"ids": x["input_ids"]},
            r"Tokens.forward.* cannot be called with it: .*\(unknown argument 'ids'; did you mean 'input_",
        ),
        ({"attention_mask": x["attention_mask"]}, "missing a required argument: 'input_ids'.* as a dict by name"),
        ((x["input_ids"],) * 4, "too many positional arguments"),
        ({**x, "scale": None}, r"example\['scale'\] is NoneType. What is no tensor with a batch .* leave it out"),
        ((x["input_ids"], True), r"example\[1\] is bool"),
        ({**x, "scale": torch.tensor(2.0)}, r"example\['scale'\] is a tensor of shape \(\)"),
        (
            {**x, "scale": torch.ones(1, 1)},
            r"one batch size; given: .*'scale': 1. What is the same for all samples is no input",
        ),
        ({}, "example: expected a tensor"),
    ]
    for example, message in cases:
        with pytest.raises(ValueError, match=message):
            trace(Tokens(), example)


# -- outputs ---------------------------------------------------------------------------------------------------------


@dataclass
class ModelOutput:
    """Looks like those of language models: fields that may be None."""

    logits: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None


@dataclass
class Registered(ModelOutput):
    """The same, known to torch's pytrees."""


torch.utils._pytree.register_dataclass(Registered)  # as libraries of models do


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Cache:
    """An object of no kind that torch knows."""

    def __init__(self, keys: Tensor) -> None:
        self.layers = [{"keys": keys}]
        self._private = keys


class Returning(nn.Module):
    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.pack, self.a, self.b = pack, nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.a(x), self.b(x))


@pytest.mark.parametrize(
    ("pack", "output", "layer"),
    [
        (lambda a, b: (a, b), 0, "a"),
        (lambda a, b: [a, b], -1, "b"),
        (lambda a, b: {"x": a, "y": b}, "y", "b"),
        (lambda a, b: {0: a, 1: b}, 1, "b"),
        (lambda a, b: Pair(a, b), "second", "b"),
        (lambda a, b: Pair(a, b), 1, "b"),
        (lambda a, b: ModelOutput(a, (b, b)), "logits", "a"),
        (lambda a, b: ModelOutput(a, (a, b)), ("hidden", 1), "b"),
        (lambda a, b: ModelOutput(None, (a, b)), (0, 1), "b"),
        (lambda a, b: Registered(a, (a, b)), ("hidden", 1), "b"),
        (lambda a, b: (a, Cache(b)), (1, "layers", 0, "keys"), "b"),
        (lambda a, b: (a, {"deep": [b, (a, None)]}), (1, "deep", 1, 0), "a"),
        (lambda a, b: a, 0, "a"),
    ],
)
def test_one_of_several_outputs_is_chosen_by_index_name_or_path(
    pack: Callable[[Tensor, Tensor], Any], output: Any, layer: str
) -> None:
    net, x = Returning(pack), torch.randn(5, 3)
    graph = trace(net, x[:1], output=output)
    assert graph.layers == ("input", layer, "output") or graph.layers == ("input", "output")
    torch.testing.assert_close(graph(x), getattr(net, layer)(x), rtol=0, atol=0)
    assert graph.split_output(graph(x))[0].shape == graph(x).shape


@pytest.mark.parametrize(
    "pack",
    [
        lambda a, b: (a,),
        lambda a, b: [None, {"x": a, "y": None}],
        lambda a, b: ModelOutput(a),
        lambda a, b: Registered(a),
        lambda a, b: (a, b.argmax(1)),
        lambda a, b: {"loss": b.mean(), "logits": a},
        lambda a, b: Cache(a),
    ],
)
def test_the_only_floating_point_tensor_needs_no_choice(pack: Callable[[Tensor, Tensor], Any]) -> None:
    net, x = Returning(pack), torch.randn(5, 3)
    torch.testing.assert_close(trace(net, x)(x), net.a(x), rtol=0, atol=0)


def test_several_outputs_are_listed_with_how_to_choose() -> None:
    net = Returning(lambda a, b: ModelOutput(a, (a[:, :, None] * b[:, None], b.argmax(1)), b.mean()))
    with pytest.raises(ExportError) as caught:
        trace(net, torch.zeros(1, 3))
    assert str(caught.value).splitlines() == [
        "Returning returns 2 tensors that could be run backwards; choose with output=, e.g. revprop.trace(model, example, "
        "output='logits'), and pass the graph on, or output=['logits', ('hidden', 0)] for several at once:",
        "  output='logits': (n, 4) float32",
        "  output=('hidden', 0): (n, 4, 2) float32",
        "  output=('hidden', 1): (n,) int64",
        "  output='loss': () float32",
    ]
    many = Returning(lambda a, b: [a] * 25)
    with pytest.raises(ExportError, match=r"and 5 more$"):
        trace(many, torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("pack", "output", "message"),
    [
        (
            lambda a, b: ModelOutput(a, (b,)),
            "logit",
            r"output='logit': unknown output 'logit'; did you mean 'logits'\?; there",
        ),
        (
            lambda a, b: ModelOutput(a, (b,)),
            "loss",
            r"output='loss': 'loss' is None in this call; there is:\n  output='logits'",
        ),
        (lambda a, b: ModelOutput(a, (a, b)), "hidden", "output='hidden' is a tuple of 2; choose one tensor"),
        (
            lambda a, b: ModelOutput(a, (a, b)),
            ("hidden", 2),
            r"output=\('hidden', 2\), in 'hidden': unknown output '2'",
        ),
        (lambda a, b: (a, b.argmax(1)), 1, "output=1 holds torch.int64: nothing of it can move"),
        (lambda a, b: a, 1, "output=1: no output 1; there is:"),
        (lambda a, b: a.argmax(1), None, "returns no floating point tensor: nothing of it can move"),
        (lambda a, b: (a, b.T), [0, 1], r"output=1: only outputs with the batch first .* its shape is \(2, n\)"),
        (
            lambda a, b: (a, b.mean()),
            1,
            r"the model's output is one number, \(\), with no batch dimension at .*a value per sample",
        ),
        (lambda a, b: None, None, r"returns nothing \(None\) in eval mode; .*let forward return the tensor"),
        (lambda a, b: "text", None, "returns a str without a tensor in eval mode"),
        (lambda a, b: (), None, "returns a tuple without a tensor in eval mode"),
        (
            lambda a, b: a.mean(0),
            None,
            r"the first dimension of the model's output is not the batch, its shape is \(4,\)",
        ),
        (
            lambda a, b: a.as_strided((2, 4), (4, 1)),
            None,
            r"the first dimension of the model's output is not the batch.*\(2, 4\)",
        ),
        (lambda a, b: a.reshape(-1), None, r"not the batch, its shape is \(4\*n,\)"),
    ],
)
def test_outputs_that_cannot_be_run_backwards_are_refused(pack: Any, output: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        trace(Returning(pack), torch.randn(2, 3), output=output)


@pytest.mark.parametrize("output", [[], (), 1.5, [1.5], [()], {"a": 1}])
def test_what_is_no_choice_of_outputs_is_refused(output: Any) -> None:
    with pytest.raises(ValueError, match="output: expected an index, a name, a path such as"):
        trace(Returning(lambda a, b: (a, b)), torch.randn(2, 3), output=output)


@pytest.mark.parametrize("n", [0, 1, 6])
def test_several_outputs_at_once_are_concatenated_and_split_again(n: int) -> None:
    net = Returning(lambda a, b: {"a": a, "ab": a[:, :, None] * b[:, None], "row": b.sum(1)})
    graph = trace(net, torch.randn(2, 3), output=["ab", "a", "row"])
    assert graph.outputs == ((("ab",), (4, 2)), (("a",), (4,)), (("row",), ()))
    x = torch.randn(n, 3)
    output, own = graph(x), net(x)
    assert output.shape == (n, 13)
    torch.testing.assert_close(
        output, torch.cat([own["ab"].flatten(1), own["a"], own["row"][:, None]], 1), rtol=0, atol=0
    )
    for part, name in zip(graph.split_output(output), ("ab", "a", "row"), strict=True):
        torch.testing.assert_close(part, own[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"expected the output's shape \(n, 13\); given"):
        graph.split_output(output[:, 1:])
    assert graph.on(copy.deepcopy(net)).outputs == graph.outputs


def test_a_goal_on_several_outputs_is_reached_together() -> None:
    net = Returning(lambda a, b: (torch.tanh(a), b)).double()
    net.a, net.b = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()
    graph = trace(net, torch.zeros(1, 3).double(), output=[1, 0])
    x, want = torch.randn(4, 3).double(), torch.randn(4, 2).double().tanh()
    rec = revprop.reconstruct(graph, x, target=want, to="input", tolerance=1e-6)
    first, second = graph.split_output(want)
    torch.testing.assert_close(net.b(rec["input"]), first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.a(rec["input"]).tanh(), second, rtol=1e-4, atol=1e-4)


def test_modules_are_traced_with_the_output_wanted_and_graphs_have_theirs() -> None:
    net, x = Returning(lambda a, b: (a, b)), torch.randn(3, 3)
    assert [row[1] for row in revprop.check(net, x, output=1).rows] == ["b"]
    rec = revprop.reconstruct(net, x, torch.tensor([0, 1, 0]), to="b", output=1)
    assert bool(rec.certificates["b"].reached.all())
    graph = trace(net, x, output=1)
    for call in (lambda: as_graph(graph, x, 0), lambda: revprop.reconstruct(graph, x, torch.zeros(3).long(), output=0)):
        with pytest.raises(ValueError, match=r"output: a graph was traced with the output it has; .* revprop.trace"):
            call()
    with pytest.raises(ExportError, match="and pass the graph on"):
        revprop.diagnose(net, (x, torch.tensor([0, 1, 0])))


def test_calls_are_counted_from_the_first_that_the_output_depends_on() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"aside": self.linear(2 * x), "logits": self.linear(torch.tanh(self.linear(x)))}

    assert trace(Twice(), torch.zeros(1, 3), output="logits").layers == ("input", "linear", "linear@1", "output")
    assert trace(Twice(), torch.zeros(1, 3), output="aside").layers == ("input", "linear", "output")


# -- failures: the reason, the line, the rewrite -----------------------------------------------------------------------


@torch.library.custom_op("revprop_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.maximum(x.detach().numpy(), 0))  # <- function

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class BranchOnValues(Net):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # <- branch
            return self.linear(x)
        return -x


class LoopOnValues(Net):
    def forward(self, x: Tensor) -> Tensor:
        while x.norm() > 1:  # <- loop
            x = x / 2
        return self.linear(x)


class IntOfValue(Net):
    def forward(self, x: Tensor) -> Tensor:
        best = int(self.linear(x).sum(0).argmax())  # <- int
        return self.linear(x)[:, best : best + 1]


class FloatOfValue(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * float(x.mean())  # <- float


class ItemOfValue(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * x.max().item()  # <- item


class ListOfValues(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tensor(x.tolist()))  # <- tolist


class Asserting(Net):
    def forward(self, x: Tensor) -> Tensor:
        assert x.sum() > -1000  # <- assert
        return self.linear(x)


class AssertingUnlessExported(Net):
    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            assert x.sum() > -1000
        return self.linear(x)


class Raising(Net):
    def forward(self, x: Tensor) -> Tensor:
        if torch.isnan(x).any():  # <- raise
            raise ValueError("not a number")
        return self.linear(x)


class Numpy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.from_numpy(np.tanh(x.detach().numpy())))  # <- numpy


class NumpyFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        return Clamp.apply(self.linear(x))


class Selecting(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[x[:, 0] > 0]  # <- select


class NonZero(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[x.nonzero()[:, 0]]  # <- nonzero


class Writing(Net):
    def __init__(self, write: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.plain, self.hidden, self.calls, self.seen = torch.zeros(3), None, 0, []
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x)  # <- write
        return self.linear(x) + self.mean + self.plain + self.calls


class HiddenState(Net):
    def forward(self, x: Tensor) -> Tensor:
        before = getattr(self, "state", torch.zeros(3))
        self.state = torch.tanh(self.linear(x) + before)  # <- state
        return self.state


class DataWritten(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y.data[:, 0] = 0  # <- data
        return y


class Gradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            return x - torch.autograd.grad(self.linear(z).square().sum(), z)[0]  # <- gradient


class ViewOfTwo(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(2, 3))  # <- view


class ViewOfSixteen(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(16, -1))  # <- view of sixteen


class ViewOfAny(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(x.size(0), -1))


class LengthOfBatch(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.linear(x.view(len(x), -1)) / math.sqrt(x.shape[0])}


class LoopOfLength(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.linear(x[i]) for i in range(len(x))])  # <- len


class LoopOverBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.linear(row) for row in x])  # <- rows


class MappedOverBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.linear)(x)


class IntOfBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(int(x.shape[0] / 1.0), 3))  # <- int of batch


class WholeOfBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(x.shape[0] // 1, 3)) / x.shape[0] ** 0.5


class BranchOnBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.shape[0] <= 4 else x  # <- batch branch


class EvenBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.shape[0] % 2 == 0 else x  # <- even


class HalvesOfBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2)  # <- halves
        return self.linear(torch.cat([b, a]))


class OwnOperator(Net):
    def forward(self, x: Tensor) -> Tensor:
        return doubled(self.linear(x))  # <- operator


class Sparse(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(x.to_sparse(), self.linear.weight)  # <- sparse


class Conditional(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.linear, torch.neg, (x,))  # <- cond


class PerSample(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.sum(1, keepdim=True) > 0, self.linear(x), -x)


class Copying(Net):
    def forward(self, x: Tensor) -> Tensor:
        return copy.deepcopy(self.linear)(x)  # <- deepcopy


class Packing(Net):
    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((x.shape[0],), 2)
        packed = nn.utils.rnn.pack_padded_sequence(x[:, :, None].expand(-1, 3, 3), lengths, batch_first=True)
        return self.linear(nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0][:, 0])  # <- pack


class OtherDevice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.zeros(3, device="meta")  # <- device


class TrainingOnly(Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.linear(x)
        raise NotImplementedError("no inference yet")  # <- training


class SilentInEval(Net):
    def forward(self, x: Tensor) -> Tensor | None:
        return self.linear(x) if self.training else None


class Noise(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.randn_like(x)  # <- noise


class AlwaysDropout(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x))  # <- dropout


class PythonsNoise(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + random.random()


class OtherWhenExported(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2 if torch.compiler.is_exporting() else 1)


class WrongKey(Net):
    def forward(self, x: Tensor) -> Tensor:
        return {"a": self.linear(x)}["b"]  # <- key


@dataclass(frozen=True)
class Failure:
    """A network that cannot be traced: what its error says, at which marked line, and a network with the usual rewrite."""

    net: Callable[[], nn.Module]
    reason: str
    line: str = ""
    rewrite: str = ""
    rewritten: Callable[[], nn.Module] | None = None
    example: Tensor = field(default_factory=lambda: torch.linspace(0.1, 1, 6).view(2, 3))


def hooked() -> nn.Module:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        module.seen = output.detach().numpy().mean()  # <- hook

    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    net[0].register_forward_hook(hook)
    return net


def scripted() -> nn.Module:
    return nn.Sequential(torch.jit.script(nn.Linear(3, 3)), nn.ReLU())


def plain_in_place(self: Any, x: Tensor) -> None:
    self.plain.add_(1.0)


FAILURES = {
    "branch": Failure(
        BranchOnValues, "control flow depends on the values of tensors", "branch", r"torch\.where", PerSample
    ),
    "while": Failure(LoopOnValues, "control flow depends on the values of tensors", "loop", r"torch\.where"),
    "int": Failure(IntOfValue, "a Python number is made from the value of a tensor", "int", r"torch\.gather"),
    "float": Failure(FloatOfValue, "a Python number is made from the value", "float", "multiply by the tensor itself"),
    "item": Failure(ItemOfValue, "a Python number is made from the value", "item", "multiply by the tensor itself"),
    "tolist": Failure(ListOfValues, "the values of a tensor become Python numbers", "tolist", "keep them a tensor"),
    "assert": Failure(
        Asserting, "an assertion looks at the values of tensors", "assert", r"is_exporting\(\)", AssertingUnlessExported
    ),
    "raise": Failure(
        Raising, "a check raises an error depending on the values of tensors", "raise", r"is_exporting\(\)"
    ),
    "numpy": Failure(Numpy, "numpy computes outside of torch", "numpy", r"torch's function of the same name"),
    "numpy in a function": Failure(NumpyFunction, "numpy computes outside of torch", "function", "without .numpy"),
    "numpy in a hook": Failure(hooked, "numpy computes outside of torch", "hook"),
    "mask": Failure(
        Selecting, "the shape of the model's output depends on the values of tensors", "select", r"torch\.where"
    ),
    "nonzero": Failure(
        NonZero, "the shape of the model's output depends on the values of tensors", "nonzero", "keep all samples"
    ),
    "buffer": Failure(
        lambda: Writing(lambda m, x: m.mean.add_(1)), "the model writes to 'mean' during forward", "write", "new tensor"
    ),
    "parameter": Failure(
        lambda: Writing(lambda m, x: m.linear.weight.mul_(0.9)),
        "the model writes to 'linear.weight' during",
        "write",
        "new tensor",
    ),
    "input": Failure(
        lambda: Writing(lambda m, x: x.zero_()), "the model writes to 'x' during forward", "write", "new tensor"
    ),
    "new buffer": Failure(
        lambda: Writing(lambda m, x: setattr(m, "mean", m.mean + 1)),
        "a second call on the same input gives another output",
    ),
    "counter": Failure(
        lambda: Writing(lambda m, x: setattr(m, "calls", m.calls + 1)),
        "a second call on the same input gives another output",
    ),
    "state": Failure(
        HiddenState, "a second call on the same input gives another output", "state", "pass the state as an input"
    ),
    "tensor": Failure(
        lambda: Writing(plain_in_place), "forward writes to a tensor that is no buffer", "", "new tensor"
    ),
    "data": Failure(DataWritten, r"a tensor is written through \.data", "data", "compute a new tensor"),
    "gradient": Failure(Gradient, "gradients are computed inside forward", "gradient", "write the derivative out"),
    "view": Failure(ViewOfTwo, "the batch size is fixed inside forward", "view", r"x\.view\(x\.size\(0\)", ViewOfAny),
    "view of the example": Failure(
        ViewOfSixteen,
        r"the batch size is fixed inside forward: it runs on the example \(x: \(16, 3\)\), not on 2 samples of it",
        "view of sixteen",
        r"x\.view\(x\.size\(0\)",
        ViewOfAny,
        torch.ones(16, 3),
    ),
    "len": Failure(
        LoopOfLength,
        "the batch size is fixed inside forward",
        "len",
        "work on the whole batch at once",
        MappedOverBatch,
    ),
    "rows": Failure(LoopOverBatch, "the batch size is fixed inside forward", "rows", r"torch\.vmap", MappedOverBatch),
    "int of the batch": Failure(
        IntOfBatch, "the batch size is fixed inside forward", "int of batch", r"\+ - \* / // and \*\*", WholeOfBatch
    ),
    "branch on the batch": Failure(
        BranchOnBatch,
        "forward holds only for a batch size n with n <= 4",
        "batch branch",
        "the same for every batch size",
    ),
    "even": Failure(
        EvenBatch, r"forward holds only for a batch size n with Eq\(Mod\(n, 2\), 0\)", "even", "the same for every"
    ),
    "halves": Failure(
        HalvesOfBatch, "the batch size is fixed inside forward", "halves", "another dimension than the batch"
    ),
    "operator": Failure(
        OwnOperator, "an operator of the user's own has no rule for shapes", "operator", "register_fake"
    ),
    "sparse": Failure(Sparse, "an operator cannot be traced without values", "sparse", "dense tensors"),
    "cond": Failure(Conditional, "torch.cond holds a program of its own", "cond", r"torch\.where", PerSample),
    "deepcopy": Failure(Copying, "something reads a tensor's memory", "deepcopy", "copy in __init__"),
    "packing": Failure(Packing, "the length of a sequence is a value of a tensor", "pack", "mask what is padding"),
    "scripted": Failure(
        scripted, r"a part is compiled by torch.jit.*\(module '0'", "", "the Python module in its place"
    ),
    "scripted whole": Failure(
        lambda: torch.jit.script(nn.Linear(3, 3)), "compiled by torch.jit", "", "the Python module"
    ),
    "lazy": Failure(lambda: nn.LazyLinear(3), "parameter 'weight' has no shape yet", "", r"run model\(example\) once"),
    "device": Failure(OtherDevice, "tensors lie on different devices", "device", r"device=x\.device"),
    "training": Failure(
        TrainingOnly,
        "forward raises NotImplementedError itself, and the network is traced in eval mode",
        "training",
        "has to return",
    ),
    "silent": Failure(
        SilentInEval, r"SilentInEval returns nothing \(None\) in eval mode", "", "let forward return the tensor"
    ),
    "noise": Failure(
        Noise, r"the model draws random numbers in eval mode \(randn_like", "noise", "make the random tensor an input"
    ),
    "dropout": Failure(
        AlwaysDropout, r"draws random numbers in eval mode \(native_dropout", "dropout", r"nn\.Dropout", nn.Dropout
    ),
    "Python's noise": Failure(
        PythonsNoise, "a second call on the same input gives another output, so forward keeps state or draws"
    ),
    "other": Failure(
        OtherWhenExported, "what was traced gives another output than the model", "", "make it an input or a buffer"
    ),
    "key": Failure(WrongKey, r"forward fails on the example \(x: \(2, 3\)\).*\(The model said: KeyError: 'b'\)", "key"),
    "shape": Failure(
        lambda: nn.Sequential(nn.Linear(5, 2)),
        r"forward fails on the example \(input: \(2, 3\)\) \(module '0', Linear\)",
        "",
        "check its",
    ),
    "double": Failure(
        lambda: nn.Linear(3, 3),
        "the dtype of the example does not fit",
        "",
        r"example\.float\(\)",
        None,
        torch.zeros(2, 3).double(),
    ),
    "no indices": Failure(
        lambda: nn.Embedding(3, 3), "the dtype of the example does not fit", "", r"example\.long\(\)"
    ),
    "no batch": Failure(
        lambda: nn.Conv2d(3, 4, 3),
        r"the example \(input: \(3, 8, 8\)\) lacks its batch",
        "",
        r"example\[None\]",
        None,
        torch.zeros(3, 8, 8),
    ),
    "no batch for batch norm": Failure(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        "forward fails on the example",
        "",
        r"does run on example\[None\]: is the batch dimension missing",
        None,
        torch.zeros(3, 8, 8),
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_says_the_reason_the_line_and_the_rewrite(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    failure = FAILURES[name]
    net = failure.net()
    before = [copy.copy(module.__dict__) for module in net.modules()]
    values = [t.clone() for t in net.state_dict().values()] if name != "lazy" else []
    with pytest.raises(ExportError) as caught:
        trace(net, failure.example)
    text = str(caught.value)
    assert re.search(failure.reason, text, re.DOTALL), text
    assert re.search(failure.rewrite, text), text
    if failure.line:
        assert f" at {__file__}, line {line_of(failure.line)}: `" in text, text
    else:
        assert f"{Path(revprop.__file__).parent}" not in text
        assert f"{Path(torch.__file__).parent}" not in text
    for module, state in zip(net.modules(), before, strict=True):  # the model is as it was
        assert list(module.__dict__) == list(state)
        assert all(module.__dict__[key] is state[key] for key in state)
    assert name == "lazy" or all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), values, strict=True))
    assert capfd.readouterr() == ("", "")  # torch prints the graph so far; nobody asked


@pytest.mark.parametrize("name", [name for name, failure in FAILURES.items() if failure.rewritten])
def test_the_usual_rewrite_can_be_traced(name: str) -> None:
    assert_traced(FAILURES[name].rewritten(), FAILURES[name].example)  # type: ignore[misc]


def test_listening_to_torch_leaves_its_logs_as_they_were() -> None:
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = (logger.handlers, list(logger.handlers), logger.level, logger.propagate, logging.root.manager.disable)
    with pytest.raises(ExportError, match="the batch size is fixed"):
        trace(LoopOverBatch(), torch.zeros(2, 3))
    assert (
        logger.handlers,
        list(logger.handlers),
        logger.level,
        logger.propagate,
        logging.root.manager.disable,
    ) == before
    assert "isEnabledFor" not in vars(logger)


# -- what looks like a failure and is none ---------------------------------------------------------------------------


class Experts(Net):
    def forward(self, x: Tensor) -> Tensor:
        out, chosen = torch.zeros_like(x), x.argmax(1)
        for expert in range(3):
            out[chosen == expert] = self.linear(x[chosen == expert]) * (expert + 1)
        return out


class Recording(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.attention = torch.softmax(self.linear(x), 1)
        self.history = [*getattr(self, "history", []), self.attention]
        return self.attention


class StraightThrough(Net):
    def forward(self, x: Tensor) -> Tensor:
        return Sign.apply(self.linear(x))


class Printing(Net):
    def forward(self, x: Tensor) -> Tensor:
        print(x)
        return self.linear(x)


class Compiled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.compile(self.linear)(x)


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.linear, x, use_reentrant=False)


def parametrised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.ReLU())


def attention() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (3, 1)), nn.TransformerEncoderLayer(1, 1, 2, batch_first=True), nn.Flatten())


def recurrent() -> nn.Module:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.LSTM(1, 2, 2, batch_first=True, dropout=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.cells(x[:, :, None])[0][:, -1]

    return Recurrent()


def with_hooks() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    net.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    net[1].register_full_backward_hook(lambda module, before, after: None)
    return net


@pytest.mark.parametrize(
    "net",
    [Experts, Recording, StraightThrough, Compiled, Checkpointed, parametrised, attention, recurrent, with_hooks],
)
def test_these_can_be_traced(net: Callable[[], nn.Module]) -> None:
    assert_traced(net(), torch.randn(2, 3))


def test_a_model_without_values_can_be_traced() -> None:
    net = nn.Sequential(nn.Linear(3, 2, device="meta"), nn.ReLU())
    assert trace(net, torch.zeros(1, 3, device="meta")).layers == ("input", "0", "1", "output")


def test_what_forward_prints_is_not_shown_while_tracing(capfd: pytest.CaptureFixture[str]) -> None:
    trace(Printing(), torch.zeros(2, 3))
    assert capfd.readouterr() == ("", "")


def test_sizes_that_python_makes_numbers_of_stay_free() -> None:
    net, x = LengthOfBatch(), torch.randn(5, 3)
    graph = trace(net, x[:1])
    assert graph.layers == ("input", "linear", "output")
    for n in (1, 2, 5):
        torch.testing.assert_close(graph(x[:n]), net(x[:n])["logits"])
    assert bool(revprop.reconstruct(graph, x, torch.arange(5) % 3, to="linear").certificates["linear"].reached.all())


def test_what_forward_records_on_the_module_is_not_left_behind() -> None:
    net = Recording()
    net.history = held = [torch.zeros(1)]
    inside = list(held)
    trace(net, torch.randn(2, 3))
    assert "attention" not in vars(net)
    assert net.history is held
    assert held == inside

    class Appending(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []
            self.last: dict[str, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            self.last["x"] = x
            return self.linear(x)

    appending = Appending()
    trace(appending, torch.randn(2, 3))
    assert appending.seen == []
    assert appending.last == {}


def test_random_numbers_and_gradients_are_left_as_they_were() -> None:
    net, dropout = Noise(), nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    net(torch.randn(2, 3)).sum().backward()
    gradient = net.linear.weight.grad
    before = torch.get_rng_state()
    with pytest.raises(ExportError):
        trace(net, torch.zeros(2, 3))
    trace(dropout, torch.zeros(2, 3))
    assert torch.equal(torch.get_rng_state(), before)
    assert net.linear.weight.grad is gradient
