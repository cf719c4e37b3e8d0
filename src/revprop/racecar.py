"""Racecar training: a network regularised by its own reverse pass, so that its features keep the input."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from revprop.affine import order
from revprop.errors import near_matches
from revprop.graph import Example, Graph, trace
from revprop.inputs import in_order
from revprop.live_run import differs_from_model, operations, outside_inference, run_operations
from revprop.mirror import MirrorPass
from revprop.mirror_steps import ACTIVATIONS, NORMS, is_learned, is_pointwise, weight_of
from revprop.samples import Samples

__all__ = ["Racecar"]

Activation = Callable[[Tensor], Tensor]
Weight = float | Sequence[float] | Mapping[str, float]


class Racecar:
    """The penalty of racecar training (Eq. 1): ``sum_m lambda_m |L_m - L'_m|^2``.

    ``L_m`` is the input of learned layer m in the pass forward. ``L'_m`` is what the reverse pass gives for it: from the output
    of the last constrained layer, behind its activation, back layer by layer with the same weights: ``A^T (z - b)``, then the
    batch norm and activation of the layer in front; copies for pooling, pooling for up-sampling
    (:mod:`revprop.mirror` says what every operator does).

    ``loss = task(model(x), y) + penalty(x)`` is all there is to it, in any training loop: the model keeps its class, parameters
    and state dict; the penalty holds no parameters, reads those of the model as they are, and is differentiable. It runs the
    constrained part of the network again; :meth:`with_output` runs it once for both.

    Modules in train mode are taken to be so: batch norm normalises both passes by their batch (running statistics are the
    business of ``model(x)``). Dropout is left out.

    With DistributedDataParallel use ``ddp(x)`` for the task and this penalty, built on the module itself, beside it in one
    backward; gradients are averaged over processes, so ``reduction="mean"`` gives what one process with the whole batch gives.

    Args:
        model: any module that :func:`revprop.trace` traces, or its graph. example: an input to trace it with.
        layers: None for all learned layers (convolutions and fully connected ones); a number s for the first s of them, counted
            from the input: RR^s; or names, of layers or of modules that hold some. The paper constrains the convolutions of
            networks that have some, and not the fully connected layers behind.
        weight: lambda, one for all, or one for each constrained layer in forward order, or by their names.
        reduction: "sum": half the sum of squares over batch and entries, as in the authors' published example (1e-5 on MNIST,
            1e-10 on VGG19); "mean": the mean of squares.
        share: the share of each batch that is constrained, drawn anew at each call (at least one sample): an unbiased estimate
            of the whole batch's penalty, at this share of its cost (batch norm in train mode apart, which sees that share).
        seed: of the draw.
        input_activation: what the reverse pass ends with: "first" for the activation of the first layer, as in the paper's
            tables (inputs that it cannot give, such as negative ones for ReLU, need another); None; or a function.

    Attributes:
        layers: names of the constrained layers. held: operators run back by the recorded values of what they depend on (gates,
            attention). graph: the traced network. left_out: layers that nothing comes back for.

    Raises:
        ValueError: an unknown layer, with the near matches; one that nothing comes back for; weights that do not fit; a share
            outside (0, 1]. ExportError: as :func:`revprop.trace`.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh())
    >>> penalty = Racecar(net, torch.zeros(1, 4), weight=0.01)
    >>> penalty.layers
    ('0', '2')
    >>> x = torch.rand(8, 4)
    >>> loss = net(x).square().mean() + penalty(x)
    >>> loss.backward()
    >>> net[0].weight.grad.shape, penalty.regenerate(x)["input"].shape
    (torch.Size([6, 4]), torch.Size([8, 4]))
    """

    def __init__(
        self,
        model: nn.Module | Graph,
        example: Example | None = None,
        *,
        weight: Weight,
        layers: int | Sequence[str] | None = None,
        reduction: Literal["sum", "mean"] = "sum",
        share: float = 1.0,
        seed: int = 0,
        input_activation: Literal["first"] | Activation | None = "first",
    ) -> None:
        if not isinstance(model, Graph) and example is None:
            raise ValueError("example: a model is traced with an example input: give one")
        self.graph = model if isinstance(model, Graph) else trace(model, example)  # type: ignore[arg-type]
        if reduction not in ("sum", "mean"):
            raise ValueError(near_matches(reduction, ("sum", "mean"), "reduction"))
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share: expected a share of each batch in (0, 1], given {share}")
        self.reduction, self.share = reduction, share
        self._options: dict[str, Any] = {"layers": layers, "weight": weight, "reduction": reduction, "share": share}
        self._options |= {"input_activation": input_activation}
        self._generator = torch.Generator().manual_seed(seed)
        found = learned_layers(self.graph)
        chosen = _chosen(self.graph, found, layers)
        self._last = _first_activation(self.graph) if input_activation == "first" else input_activation
        self._start = _behind(self.graph, found[chosen[-1]])
        self._passes: dict[tuple[torch.device, torch.dtype], MirrorPass] = {}
        sources = {name: _source(self.graph, found[name]) for name in chosen}
        given_back = self._given_back()
        lost = [name for name in chosen if sources[name].name not in given_back]
        if lost and layers is not None and not isinstance(layers, int):
            raise ValueError(
                f"layers: nothing comes back for {', '.join(lost)}: the reverse pass starts behind {chosen[-1]}, which does not "
                "depend on them, or only as a gate; leave them out"
            )
        self.layers = tuple(name for name in chosen if name not in lost)
        self.left_out = tuple(lost)
        self._sources = {name: sources[name] for name in self.layers}
        self._given = given_back
        self._weights = _weights(weight, self.layers)
        constrained = [*self._sources.values(), self._start]
        read = self._pass().recorded
        reading = [n for n in (*self.graph.inputs, *self.graph.recorded) if n.name in read]
        self._needed = tuple(dict.fromkeys([*constrained, *reading]))
        self._front = operations(self.graph, self._needed)
        self._whole = operations(self.graph, [*self._needed, self.graph.output])
        self._verified: set[tuple[bool, ...]] = set()

    # -- the penalty -----------------------------------------------------------------------------------------------------

    def __call__(self, x: Example) -> Tensor:
        """The penalty of a batch, a number; differentiable.

        Args:
            x: a batch of the model's inputs (n, ...), as the model takes them.

        Raises:
            ValueError: inputs of another shape than were traced.
        """
        if torch.is_inference_mode_enabled():
            return outside_inference(self, x)
        inputs = self._inputs(x)
        n = len(next(iter(inputs.values())))
        chosen = self._draw(n)
        if chosen is None:
            return self._distance(run_operations(self._front, inputs))
        some = {name: value[chosen.to(value.device)] for name, value in inputs.items()}
        return self._distance(run_operations(self._front, some), n / len(chosen))

    def with_output(self, x: Example) -> tuple[Tensor, Tensor]:
        """The model's output and the penalty, from one pass forward: ``loss = task(output, y) + penalty``.

        Running statistics of batch norm are updated as the model does it. For models without randomness: dropout in train mode
        is refused, use ``model(x)`` and the penalty beside it.

        Returns:
            the output (n, ...), the penalty.

        Raises:
            ValueError: the model in train mode computes something else than what was traced, such as dropout.
        """
        if torch.is_inference_mode_enabled():
            return outside_inference(self.with_output, x)
        inputs = self._inputs(x)
        self._verify(inputs)
        values = run_operations(self._whole, inputs, keep=True)
        output = values[self.graph.output.name]
        chosen = self._draw(len(output))
        if chosen is None:
            return output, self._distance(values)
        return output, self._distance(self._some(values, chosen), len(output) / len(chosen))

    @torch.no_grad()
    def regenerate(self, x: Example) -> dict[str, Tensor]:
        """What the reverse pass gives back, of a whole batch: constrained layer -> ``L'_m``, and "input" -> ``I'``.

        Of several inputs each is "input:" and its argument's name. Nothing comes back for indices and flags, and for inputs that
        the constrained layers do not depend on. The recorded values that these are compared with: :meth:`recorded`.
        """
        if torch.is_inference_mode_enabled():
            return outside_inference(self.regenerate, x)
        values = run_operations(self._front, self._inputs(x))
        back = self._pass()(values[self._start.name], values)
        return {name: back[node.name] for name, node in self._named().items()}

    @torch.no_grad()
    def recorded(self, x: Example) -> dict[str, Tensor]:
        """The inputs of the constrained layers in the pass forward: layer -> ``L_m``, and "input" -> the batch; named as
        :meth:`regenerate` does."""
        values = run_operations(self._front, self._inputs(x))
        return {name: values[node.name] for name, node in self._named().items()}

    @property
    def held(self) -> tuple[str, ...]:
        return tuple(self._pass().held)

    # -- inside ----------------------------------------------------------------------------------------------------------

    def _place(self) -> tuple[torch.device, torch.dtype]:
        like = next(self.graph.model.parameters(), torch.zeros(()))
        return like.device, like.dtype

    def _pass(self) -> MirrorPass:
        """The reverse pass, for where the model's parameters are now: constant maps lie there, too."""
        place = self._place()
        if place not in self._passes:
            self._passes[place] = MirrorPass(self.graph, self._start, self._last)
        return self._passes[place]

    def _given_back(self) -> set[str]:
        """The names of the values that something comes back for: seen on two made samples."""
        reverse = self._pass()
        reading = [n for n in self.graph.recorded if n.name in reverse.recorded]
        inputs = {n.name: _made(n) for n in self.graph.inputs}
        inputs = {name: value.to(self._place()[0]) for name, value in inputs.items()}
        with torch.no_grad():
            values = run_operations(operations(self.graph, [self._start, *reading]), inputs)
            return set(reverse(values[self._start.name], values))

    def _named(self) -> dict[str, fx.Node]:
        """The values that are regenerated, by the names that users see: inputs first."""
        graph = self.graph
        names = ["input"] if len(graph.inputs) == 1 else [f"input:{name}" for name in graph.input_names]
        first = {name: node for name, node in zip(names, graph.inputs, strict=True) if node.name in self._given}
        return {**first, **self._sources}

    def _inputs(self, x: Example) -> dict[str, Tensor]:
        values = in_order(x, self.graph.input_names)
        for name, node, value in zip(self.graph.input_names, self.graph.inputs, values, strict=True):
            if tuple(value.shape[1:]) != self.graph.shape(node):
                expected = ", ".join(map(str, self.graph.shape(node)))
                raise ValueError(f"input {name!r} was traced as (n, {expected}); given: {tuple(value.shape)}")
        return {node.name: value for node, value in zip(self.graph.inputs, values, strict=True)}

    def _draw(self, n: int) -> Tensor | None:
        if self.share == 1.0 or not n:
            return None
        return torch.randperm(n, generator=self._generator)[: max(1, round(self.share * n))]

    def _some(self, values: Mapping[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
        """The values that are needed, of some of the samples."""
        found = {}
        for node in self._needed:
            value, samples = values[node.name], Samples.of(node.meta["val"])
            found[node.name] = value
            if samples is not None:  # where the batch is merged with other dimensions it may lie behind some
                outer, inner = order(self.graph, node)
                apart = value.movedim(samples.axis, 0).unflatten(0, (outer, samples.count(value), inner))
                taken = apart.index_select(1, chosen.to(value.device))
                found[node.name] = taken.flatten(0, 2).movedim(0, samples.axis)
        return found

    def _distance(self, values: Mapping[str, Tensor], times: float = 1.0) -> Tensor:
        """The penalty by recorded values; times: how many samples each of them stands for."""
        start = values[self._start.name]
        if not start.numel():  # no samples: 0, that can be differentiated
            return start.float().sum()
        back = self._pass()(start, values)
        terms = []
        for name, node in self._sources.items():
            own, other = values[node.name], back[node.name]
            if {own.dtype, other.dtype} != {torch.float64}:  # sums of squares leave the range of half precision
                own, other = own.float(), other.float()
            if self.reduction == "mean":
                terms.append(self._weights[name] * F.mse_loss(other, own))
            else:
                terms.append(0.5 * times * self._weights[name] * F.mse_loss(other, own, reduction="sum"))
        return torch.stack(terms).sum()

    def _verify(self, inputs: Mapping[str, Tensor]) -> None:
        """Refuses a model that in train mode does what its traced operators do not; looked at once for each choice of modes."""
        modes = tuple(module.training for module in self.graph.model.modules())
        if not any(modes) or modes in self._verified:
            return
        different = differs_from_model(self.graph, [value[:4].detach() for value in inputs.values()])
        if different is not None:
            raise ValueError(f"with_output: in train mode {different}: call model(x) and penalty(x), or model.eval()")
        self._verified.add(modes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Racecar:
        """The penalty of a copy of the model: of the one that is copied with it, where a module holds both."""
        twin = Racecar(self.graph.on(copy.deepcopy(self.graph.model, memo)), **self._options)
        twin._generator.set_state(self._generator.get_state())
        return twin

    def __reduce__(self) -> Any:
        raise TypeError("Racecar: a penalty is not pickled; pickle the model, and build the penalty where it is loaded")

    def __repr__(self) -> str:
        return f"Racecar({type(self.graph.model).__name__}, {len(self.layers)} layers, {self.reduction}, share {self.share})"


def learned_layers(graph: Graph) -> dict[str, fx.Node]:
    """Every call of a learned layer by its module's name (with ``@k`` for a repeated call), in forward order.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    >>> list(learned_layers(trace(net, torch.zeros(1, 1, 4, 4))))
    ['0', '3']
    """
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node in graph.movable and is_learned(graph, node):
            weight = weight_of(graph, node)
            owner = graph.constants[weight].rpartition(".")[0] if weight in graph.constants else ""
            name = graph.path(node) or owner or node.name
            found[name if name not in found else f"{name}:{node.name}"] = node
    return found


def _chosen(graph: Graph, found: Mapping[str, fx.Node], layers: int | Sequence[str] | None) -> list[str]:
    """The names of the layers asked for, in forward order."""
    if not found:
        raise ValueError("the network has no convolution and no fully connected layer: there is nothing to constrain")
    if layers is None:
        return list(found)
    if isinstance(layers, int):
        if not 1 <= layers <= len(found):
            raise ValueError(f"layers: expected a number from 1 to {len(found)} (the learned layers), given {layers}")
        return list(found)[:layers]
    if isinstance(layers, str) or not layers:
        raise ValueError(f"layers: expected a number or a list of names, given {layers!r}")
    wanted = set()
    for asked in layers:
        inside = [name for name in found if name == asked or name.startswith((f"{asked}.", f"{asked}@", f"{asked}:"))]
        if not inside:
            raise ValueError(near_matches(asked, list(found), "layer with weights"))
        wanted.update(inside)
    return [name for name in found if name in wanted]


def _weights(weight: Weight, layers: Sequence[str]) -> dict[str, float]:
    if isinstance(weight, Mapping):
        unknown = [name for name in weight if name not in layers]
        if unknown:
            raise ValueError(near_matches(unknown[0], layers, "constrained layer"))
        missing = [name for name in layers if name not in weight]
        if missing:
            raise ValueError(f"weight: none given for {', '.join(missing)}")
        return {name: float(weight[name]) for name in layers}
    if isinstance(weight, Sequence):
        if len(weight) != len(layers):
            raise ValueError(
                f"weight: expected {len(layers)}, one for each of {', '.join(layers)}; given {len(weight)}"
            )
        return dict(zip(layers, map(float, weight), strict=True))
    return dict.fromkeys(layers, float(weight))


def _source(graph: Graph, node: fx.Node) -> fx.Node:
    """What a learned layer takes."""
    return next(a for a in node.all_input_nodes if a in graph.movable)


def _follows(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The normalisation or activation that takes a value, where nothing else does."""
    users = [user for user in node.users if user in graph.active]
    if len(users) != 1 or node is graph.output:
        return None
    alone = [a for a in users[0].all_input_nodes if a in graph.active] == [node]
    fits = users[0].target in NORMS | ACTIVATIONS or is_pointwise(graph, users[0])
    return users[0] if alone and fits and not is_learned(graph, users[0]) else None


def _behind(graph: Graph, node: fx.Node) -> fx.Node:
    """A layer's own output: behind its normalisation and activation."""
    following = _follows(graph, node)
    while following is not None:
        node, following = following, _follows(graph, following)
    return node


def _first_activation(graph: Graph) -> Activation | None:
    """The activations behind the first learned layer, as a function; normalisations have no parameters for an input."""
    node: fx.Node | None = next(iter(learned_layers(graph).values()), None)
    steps: list[Callable[..., tuple[Tensor, ...]]] = []
    while node is not None:
        node = _follows(graph, node)
        if node is not None and node.target not in NORMS and len(_tensors(node)) == 1:
            steps.append(graph.segment((_source(graph, node),), (node,)))
    if not steps:
        return None

    def last(value: Tensor) -> Tensor:
        for step in steps:
            (value,) = step(value)
        return value

    return last


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]


def _made(node: fx.Node) -> Tensor:
    """Two samples of an input: small numbers, or the first index."""
    value = node.meta["val"]
    shape = (2, *(int(size) for size in value.shape[1:]))
    if not value.is_floating_point():
        return torch.zeros(shape, dtype=value.dtype)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(value.dtype)
