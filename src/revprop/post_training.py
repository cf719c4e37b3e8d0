"""Post-training: one module trained towards its wanted features, everything else frozen (FR-PT sections 3.0 and 4.1)."""

from __future__ import annotations

import copy
import hashlib
import itertools
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from revprop.embedding import check_labels
from revprop.errors import near_matches, require_finite
from revprop.graph import Graph, Segment
from revprop.hardware import channels_last, clock
from revprop.reconstruction import Settings, reconstruct
from revprop.reverse import as_graph
from revprop.training import Epoch, Training, fit

__all__ = ["PostTraining", "module_parameters", "post_train"]

METHODS = ("fr", "bp")
Loader = Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PostTraining:
    """What :func:`post_train` returns.

    Attributes:
        model: a trained copy; the model given is as it was.
        history: one entry per epoch, the state before training first; accuracies where validation data was given.
        trained: names of the trained parameters; parameters: how many numbers they hold.
        target_seconds: time spent on features of the frozen prefix and on wanted features. seconds: on the epochs.
        peak_memory: bytes one training step keeps alive (on a GPU: the allocator's peak); 0 where no epoch was run.
    """

    model: nn.Module = field(repr=False)
    history: list[Epoch]
    trained: tuple[str, ...]
    parameters: int
    target_seconds: float
    seconds: float
    peak_memory: int


def post_train(
    model: nn.Module | Graph,
    loader: Loader,
    start: str,
    stop: str,
    *,
    method: Literal["fr", "bp"] = "fr",
    alpha: float = 0.1,
    epochs: int = 10,
    validation: Loader | None = None,
    embedding: Literal["nearest", "maximum", "one_hot"] = "nearest",
    rules: Literal["nearest", "paper"] = "nearest",
    strategy: Literal["global", "greedy"] = "global",
    damping: float = 0.01,
    solver: Literal["fft", "exact"] = "fft",
    margin: float = 0.0,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: str = "auto",
    checkpoint: Path | str | None = None,
    memory_budget: int = 4 * 2**30,
    progress: bool = False,
) -> PostTraining:
    """Trains the modules after ``start`` up to ``stop`` of a copy of the model, everything else frozen.

    ``method="fr"``: loss ``(1 - alpha) cross entropy + alpha |a_stop - a*_stop|`` with wanted features a* reconstructed once from
    the labels; the distance is the mean squared error, or the mean absolute error with the maximum embedding (FR-PT Eq. 1-3).
    ``method="bp"``: cross entropy alone, the baseline, in the same code path.

    The traced network is the eval-mode one: normalisation statistics stay frozen and dropout is off. Features of the frozen
    prefix are computed once; with ``alpha=1`` nothing behind ``stop`` runs.

    Args:
        model: a module, or the graph of :func:`revprop.trace`.
        loader: batches of (inputs, labels), gone through once in its own order; or the two tensors.
        start, stop: layer names; start="input" for none frozen in front.
        validation: measured before training and after each epoch.
        embedding, rules, strategy, damping, solver, margin: as for :func:`revprop.reconstruct`.
        seed: of the shuffling. checkpoint: a folder; an interrupted run started again continues to the same numbers.
        memory_budget: bytes of features kept in memory; beyond it they are memory-mapped from a temporary file.

    Returns:
        A :class:`PostTraining`: ``result.model``, ``result.history``.

    Raises:
        ValueError: an unknown layer or option, nothing to train between the two, a parameter shared with a frozen part.
        TrainingDivergedError: the loss stopped being finite. And all that :func:`revprop.reconstruct` raises.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> x, y = torch.randn(64, 4), torch.randint(0, 3, (64,))
    >>> result = post_train(net, (x, y), start="input", stop="1", epochs=1, device="cpu")
    >>> result.trained
    ('0.weight', '0.bias')
    """
    if method not in METHODS:
        raise ValueError(near_matches(method, METHODS, "method"))
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected the share of the reconstruction loss, 0 to 1; given {alpha}")
    settings = Settings(embedding, rules, strategy, damping, solver, margin)
    training = Training(
        epochs,
        batch_size,
        learning_rate,
        seed,
        device,
        checkpoint=Path(checkpoint) if checkpoint else None,
        progress=progress,
    )
    batches = iter(_batches(loader, batch_size))
    first = next(batches, None)
    if first is None:
        raise ValueError("loader: expected batches of (inputs, labels); it gave none")
    if not isinstance(first, tuple | list) or len(first) != 2:
        raise ValueError(
            f"loader: expected batches of (inputs, labels), or a tuple of the two tensors; its first item is a "
            f"{type(first).__name__}" + (f" of {len(first)}" if isinstance(first, tuple | list) else "")
        )
    if isinstance(first[1], int) or (isinstance(first[1], Tensor) and first[1].dim() == 0):
        raise ValueError(
            "loader: expected batches, but its items are single samples: torch.utils.data.DataLoader makes batches of them"
        )
    source = as_graph(model, first[0])
    names = module_parameters(source, start, stop)
    for name, value in source.model.named_parameters():
        require_finite(value.detach(), f"parameter {name!r}")
    trained = copy.deepcopy(source.model)
    place = training.fabric().device
    trained.to(place)
    graph = source.on(trained)
    weight = alpha if method == "fr" else 0.0
    plan = _Plan.of(graph, stop, names, classify=weight < 1)
    now = clock(place)
    began = now()
    with tempfile.TemporaryDirectory(prefix="revprop-") as folder:
        data = _prepare(
            graph,
            plan,
            itertools.chain([first], batches),
            stop,
            settings if weight else None,
            Path(folder),
            memory_budget,
            place,
        )
        checked = (
            None
            if validation is None
            else _prepare(
                graph,
                _Plan.of(graph, stop, names, True),
                _batches(validation, batch_size),
                stop,
                None,
                Path(folder) / "validation",
                memory_budget,
                place,
            )
        )
        target_seconds = now() - began
        flags = {name: p.requires_grad for name, p in trained.named_parameters()}
        try:
            for name, parameter in trained.named_parameters():
                parameter.requires_grad_(name in names)
            module = _Trained(graph, plan, names)
            identity = {
                "model": _fingerprint(source.model),
                "start": start,
                "stop": stop,
                "method": method,
                "alpha": weight,
                "samples": len(data[0]),
                **({k: str(v) for k, v in vars(settings).items()} if weight else {}),
            }
            evaluate = None if checked is None else _accuracy(graph, stop, names, checked, place)
            fitted = fit(
                module,
                data,
                _loss(plan, weight, embedding),
                training,
                evaluate,
                identity,
                f"{method} {start} -> {stop}",
            )
        finally:
            for name, parameter in trained.named_parameters():
                parameter.requires_grad_(flags[name])
                parameter.grad = None
    count = sum(graph.tensor(name).numel() for name in names)
    seconds = sum(epoch.seconds for epoch in fitted.history)  # those of an interrupted run before this one, too
    return PostTraining(trained, fitted.history, names, count, target_seconds, seconds, fitted.memory)


def module_parameters(graph: Graph, start: str, stop: str) -> tuple[str, ...]:
    """Names of the parameters of the modules after ``start`` up to ``stop``.

    Raises:
        ValueError: where ``start`` is not in front of ``stop``, nothing is there to train, or a parameter is shared.

    >>> from revprop.graph import trace
    >>> module_parameters(trace(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.zeros(1, 2)), "0", "1")
    ('1.weight', '1.bias')
    """
    first, last = graph.node(start), graph.node(stop)
    before, upto = graph.ancestors([first]), graph.ancestors([last])
    if first is last or first not in upto:
        raise ValueError(
            f"start={start!r} is not in front of stop={stop!r}; in forward order: {', '.join(graph.layers)}"
        )
    inside = [n for n in graph.nodes if n in upto and n not in before]
    names = graph.parameters_of(inside)
    if not names:
        raise ValueError(f"no parameters between {start!r} and {stop!r}: nothing to train")
    shared = set(names) & set(graph.parameters_of([n for n in graph.nodes if n not in set(inside)]))
    if shared:
        raise ValueError(
            f"{', '.join(sorted(shared))} is shared between the modules to train and a frozen part; choose start and "
            "stop so that all its uses lie between them, or give each use its own parameter"
        )
    return names


@dataclass(frozen=True)
class _Plan:
    """Which frozen values training needs (computed once) and the part of the network that runs at every step."""

    crossing: tuple[fx.Node, ...]
    prefix: Segment
    run: Segment

    @staticmethod
    def of(graph: Graph, stop: str, names: Sequence[str], classify: bool) -> _Plan:
        reads = {n for n in graph.nodes if set(graph.parameters_of([n])) & set(names)}
        changed = graph.descendants(reads) if reads else set()
        outputs = (graph.node(stop), graph.output) if classify else (graph.node(stop),)
        needed = [n for n in graph.nodes if n in changed and n in graph.ancestors(outputs)]
        crossing = tuple(
            dict.fromkeys(a for n in needed for a in n.all_input_nodes if a in graph.active and a not in changed)
        )
        return _Plan(crossing, graph.segment(graph.inputs, crossing), graph.segment(crossing, outputs))


class _Trained(nn.Module):
    """The trained parameters as a module whose call runs the part of the network from the frozen values on."""

    def __init__(self, graph: Graph, plan: _Plan, names: Sequence[str]) -> None:
        super().__init__()
        self._names, self._run = tuple(names), plan.run
        for i, name in enumerate(names):
            parameter = graph.tensor(name)
            assert isinstance(parameter, nn.Parameter)
            self.register_parameter(f"p{i}", parameter)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return self._run(*values, parameters={name: getattr(self, f"p{i}") for i, name in enumerate(self._names)})


def _loss(plan: _Plan, weight: float, embedding: str):  # type: ignore[no-untyped-def]
    count = len(plan.crossing)
    distance = F.l1_loss if embedding == "maximum" else F.mse_loss  # paired with the embedding, FR-PT 4.2

    def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        results = module(*batch[:count])
        parts: dict[str, Tensor] = {}
        if weight < 1:
            parts["classification"] = F.cross_entropy(results[1], batch[count])
        if weight > 0:
            parts["reconstruction"] = distance(results[0], batch[count + 1])
        if len(parts) == 1:
            return {"loss": next(iter(parts.values())), **parts}
        return {"loss": (1 - weight) * parts["classification"] + weight * parts["reconstruction"], **parts}

    return loss


def _accuracy(graph: Graph, stop: str, names: Sequence[str], data: tuple[Tensor, ...], place: torch.device):  # type: ignore[no-untyped-def]
    run = _Plan.of(graph, stop, names, True).run

    def evaluate() -> float:
        batches = zip(*(t.split(256) for t in data), strict=True)
        right = 0
        with torch.no_grad():
            for *values, labels in batches:
                right += int(
                    (run(*(channels_last(v.to(place)) for v in values))[1].argmax(1) == labels.to(place)).sum()
                )
        return right / max(len(data[-1]), 1)

    return evaluate


def _prepare(
    graph: Graph,
    plan: _Plan,
    batches: Iterable[tuple[Tensor, Tensor]],
    stop: str,
    settings: Settings | None,
    folder: Path,
    budget: int,
    place: torch.device,
) -> tuple[Tensor, ...]:
    """One pass over the data: the frozen values training reads, the labels and the wanted features, on the training device
    while they fit the budget, then memory-mapped."""
    folder.mkdir(parents=True, exist_ok=True)
    columns: list[_Column] = []
    for x, labels in batches:
        values = graph.check_input(
            tuple(channels_last(v.to(place)) for v in (x if isinstance(x, tuple | list) else (x,)))
        )
        with torch.no_grad():
            row = [*plan.prefix(*values), labels.to(place)]
        if settings is not None:
            chosen = {k: v for k, v in vars(settings).items() if k != "tolerance"}
            wanted = reconstruct(graph, values, labels.to(place), to=stop, **chosen)[stop]
            require_finite(wanted, f"wanted features of {stop!r}")
            row.append(wanted)
        else:
            check_labels(torch.empty(len(values[0]), *graph.shape(graph.output), device="meta"), labels)
        columns = columns or [_Column(folder / f"{i}.bin", budget // len(row)) for i in range(len(row))]
        for column, value in zip(columns, row, strict=True):
            column.append(value.detach())
    return tuple(column.finish() for column in columns)


class _Column:
    """A growing tensor: in memory up to its budget, then in a file mapped back into memory."""

    def __init__(self, path: Path, budget: int) -> None:
        self.path, self.budget, self.size = path, budget, 0
        self.parts: list[Tensor] = []
        self.file: IO[bytes] | None = None

    def append(self, value: Tensor) -> None:
        self.size += value.numel() * value.element_size()
        self.dtype, self.shape = value.dtype, value.shape[1:]
        self.parts.append(value)
        if self.size > self.budget:
            self.file = self.file or self.path.open("wb")
            for part in self.parts:
                self.file.write(part.contiguous().cpu().numpy().tobytes())
            self.parts = []

    def finish(self) -> Tensor:
        if self.file is None:
            return torch.cat(self.parts)
        self.file.close()
        count = self.size // torch.empty((), dtype=self.dtype).element_size()
        return torch.from_file(str(self.path), shared=False, size=count, dtype=self.dtype).view(-1, *self.shape)


def _fingerprint(model: nn.Module) -> str:
    """Of the weights that post-training starts from: a checkpoint of another model's is not to be continued."""
    digest = hashlib.sha256()
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _batches(loader: Loader, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
    if isinstance(loader, tuple) and len(loader) == 2 and isinstance(loader[1], Tensor):
        x, y = loader
        if not isinstance(x, Tensor) or len(x) != len(y):
            raise ValueError(f"loader: expected inputs and labels of one length, given {len(x)} and {len(y)}")
        size = max(batch_size, 256)
        return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
    return loader
