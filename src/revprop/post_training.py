"""Post-training: one module trained towards its wanted features, everything else frozen (FR-PT sections 3.0 and 4.1)."""

from __future__ import annotations

import copy
import hashlib
import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revprop.closed_form import ClosedForm, Sweep, refits, solve, write
from revprop.errors import near_matches, require_finite
from revprop.graph import Graph, Segment
from revprop.hardware import channels_last, clock
from revprop.inputs import Example
from revprop.prefix import Loader, Plan, batches_of, prepare, sample, wanted_features
from revprop.reverse import as_graph
from revprop.settings import Settings
from revprop.tasks import Task, stated
from revprop.training import Epoch, Training, fit

__all__ = ["PostTraining", "module_parameters", "post_train"]

METHODS = ("fr", "bp", "solve")


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
    task: Task | None = None,
    method: Literal["fr", "bp", "solve"] = "fr",
    alpha: float = 0.1,
    epochs: int = 10,
    validation: Loader | None = None,
    embedding: Literal["nearest", "maximum", "one_hot"] = "nearest",
    rules: Literal["nearest", "paper"] = "nearest",
    strategy: Literal["global", "greedy"] = "global",
    damping: float = 0.01,
    solver: Literal["fft", "exact"] = "fft",
    margin: float = 0.0,
    blocks: str | Sequence[str] = (),
    refine: int = 0,
    attention: Literal["values", "all"] = "values",
    rescale: bool = False,
    refresh: int | None = None,
    closed_form: ClosedForm = ClosedForm(),
    selection: Loader | None = None,
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
    Tasks other than classification have their own loss in place of the cross entropy.
    ``method="bp"``: cross entropy alone, the baseline, in the same code path.
    ``method="solve"``: no gradients of weights; the linear layers and convolutions are refitted in turn by damped least squares
    towards their wanted pre-activations (:mod:`revprop.closed_form`). Seconds where the others take minutes.

    The traced network is the eval-mode one: normalisation statistics stay frozen and dropout is off. Features of the frozen
    prefix are computed once; with ``alpha=1`` nothing behind ``stop`` runs.

    Args:
        model: a module, or the graph of :func:`revprop.trace`.
        loader: batches of (inputs, labels), gone through once in its own order; or the two tensors.
        start, stop: layer names; start="input" for none frozen in front.
        task: what the labels are, as for :func:`revprop.reconstruct`; it brings the loss and the accuracy.
        validation: measured before training and after each epoch, and used for nothing else.
        embedding, rules, strategy, damping, solver, margin, blocks, refine, attention: as for :func:`revprop.reconstruct`.
        rescale: whether the distance is divided by the wanted features' variance, so that an alpha means the same on every layer.
        refresh: after so many epochs the wanted features are computed anew from the network as it is then; None: never.
        closed_form: what "solve" goes by. selection: data unseen by the model, by which "solve" chooses among several margins
            and dampings, and the sweep to stop at. Data the model was trained on misleads: it speaks for no change.
        seed: of the shuffling. checkpoint: a folder; an interrupted run started again continues to the same numbers ("solve"
            keeps none).
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
    kept = Path(checkpoint) if checkpoint else None
    if refresh is not None and (refresh < 1 or (refresh > 1 and kept is not None)):
        raise ValueError(
            f"refresh: expected a number of epochs >= 1, and 1 where a checkpoint is kept, since targets of earlier epochs "
            f"are not; given {refresh}"
        )
    settings = Settings(
        *(embedding, rules, strategy, damping, solver, margin), blocks=blocks, refine=refine, attention=attention
    )
    training = Training(epochs, batch_size, learning_rate, seed, device, checkpoint=kept, progress=progress)
    batches, first = _first(
        batches_of(sample(loader, closed_form.samples if method == "solve" else None, seed), batch_size)
    )
    known = stated(task, first[1])
    source = as_graph(model, first[0])
    names = module_parameters(source, start, stop)
    for name, value in source.model.named_parameters():
        require_finite(value.detach(), f"parameter {name!r}")
    trained = copy.deepcopy(source.model)
    place = training.fabric().device
    trained.to(place)
    graph = source.on(trained)
    weight = alpha if method == "fr" else 0.0
    plan = Plan.of(graph, stop, names, classify=weight < 1)
    whole = Plan.of(graph, stop, names, classify=True)
    now = clock(place)
    with tempfile.TemporaryDirectory(prefix="revprop-") as name:
        folder = Path(name)
        began = now()
        wanted = settings if weight else None
        renew = refresh is not None and wanted is not None
        columns = prepare(graph, plan, batches, stop, wanted, folder, memory_budget, place, known, keep_inputs=renew)
        target_seconds = now() - began
        count = len(plan.crossing) + (1 if wanted is None else 2)
        data, inputs = columns[:count], columns[count:]

        def measure(part: str, loader: Loader | None) -> Callable[[], float] | None:
            if loader is None:
                return None
            found = batches_of(loader, batch_size)
            checked = prepare(graph, whole, found, stop, None, folder / part, memory_budget, place, known)
            if not checked:
                raise ValueError(f"{part}: expected batches of (inputs, labels); it gave none")
            return _accuracy(whole.run, checked, place, known)

        evaluate = measure("validation", validation)
        flags = {name: p.requires_grad for name, p in trained.named_parameters()}
        try:
            for name, parameter in trained.named_parameters():
                parameter.requires_grad_(method != "solve" and name in names)
            if method == "solve":
                layers = refits(graph, names, plan.crossing)
                names = tuple(n for layer in layers for n in (layer.weight, layer.bias) if n)
                score = measure("selection", selection)
                began = now()
                sweeps, memory = solve(graph, layers, data, closed_form, score, embedding, seed, batch_size, known)
                history = _sweeps_as_epochs(graph, sweeps, evaluate, now() - began)
            else:
                identity = {
                    "model": _fingerprint(source.model),
                    "start": start,
                    "stop": stop,
                    "method": method,
                    "alpha": weight,
                    "samples": len(data[0]),
                    **({k: str(v) for k, v in vars(settings).items()} if weight else {}),
                    **({"rescale": rescale} if weight and rescale else {}),
                    **({"refresh": refresh} if renew else {}),
                    **({"task": str(task)} if task is not None else {}),
                }

                def before_epoch(epoch: int) -> None:
                    if refresh is not None and epoch > 1 and (epoch - 1) % refresh == 0:
                        _renew(graph, data, inputs, stop, settings, batch_size, place, known)

                scale = _scale(data[-1], embedding) if rescale and weight else 1.0
                loss = _loss(len(plan.crossing), weight, embedding, scale, known)
                fitted = fit(
                    _Trained(graph, plan, names),
                    data,
                    loss,
                    training,
                    evaluate,
                    identity,
                    f"{method} {start} -> {stop}",
                    before_epoch if renew else None,
                )
                history, memory = fitted.history, fitted.memory
        finally:
            for name, parameter in trained.named_parameters():
                parameter.requires_grad_(flags[name])
                parameter.grad = None
    size = sum(graph.tensor(name).numel() for name in names)
    seconds = sum(epoch.seconds for epoch in history)  # those of an interrupted run before this one, too
    return PostTraining(trained, history, names, size, target_seconds, seconds, memory)


def _first(
    batches: Iterable[tuple[Example, Tensor]],
) -> tuple[Iterable[tuple[Example, Tensor]], tuple[Example, Tensor]]:
    """The batches again and the first of them, which is checked."""
    rest = iter(batches)
    first = next(rest, None)
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
    return itertools.chain([first], rest), first


def module_parameters(graph: Graph, start: str, stop: str) -> tuple[str, ...]:
    """Names of the parameters of the modules after ``start`` up to ``stop``.

    Raises:
        ValueError: where ``start`` is not in front of ``stop``, nothing is there to train, or a parameter is shared.

    >>> from revprop.graph import trace
    >>> module_parameters(trace(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.zeros(1, 2)), "0", "1")
    ('1.weight', '1.bias')
    """
    firsts = graph.inputs if start == "input" else (graph.node(start),)  # "input" is all of several
    last = graph.node(stop)
    before, upto = graph.ancestors(firsts), graph.ancestors([last])
    if last in firsts or not any(first in upto for first in firsts):
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


class _Trained(nn.Module):
    """The trained parameters as a module whose call runs the part of the network from the frozen values on."""

    def __init__(self, graph: Graph, plan: Plan, names: Sequence[str]) -> None:
        super().__init__()
        self._names, self._run = tuple(names), plan.run
        for i, name in enumerate(names):
            parameter = graph.tensor(name)
            assert isinstance(parameter, nn.Parameter)
            self.register_parameter(f"p{i}", parameter)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return self._run(*values, parameters={name: getattr(self, f"p{i}") for i, name in enumerate(self._names)})


def _scale(wanted: Tensor, embedding: str) -> float:
    """What the distance of the wanted features is divided by: their variance over the samples, or its root for an L1 distance."""
    variance = float(wanted.float().var(0, correction=0).mean())
    if variance < 1e-12:  # the same for all samples: nothing to go by
        return 1.0
    return variance**0.5 if embedding == "maximum" else variance


def _renew(
    graph: Graph,
    data: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    stop: str,
    settings: Settings,
    batch_size: int,
    place: torch.device,
    task: Task,
) -> None:
    """Overwrites the wanted features, the last column, by those for the network as it is now."""
    labels, wanted = data[-2], data[-1]
    size = max(batch_size, 256)
    for i in range(0, len(labels), size):
        values = tuple(channels_last(t[i : i + size].to(place)) for t in inputs)
        found = wanted_features(graph, values, labels[i : i + size].to(place), stop, settings, task)
        wanted[i : i + size] = found.to(wanted.device)


def _sweeps_as_epochs(
    graph: Graph, sweeps: list[Sweep], evaluate: Callable[[], float] | None, seconds: float
) -> list[Epoch]:
    """The sweeps of a closed-form post-training as a history; leaves the last one's parameters in the model. What of all the
    ``seconds`` went into choosing counts for the state before the first."""
    history = []
    choosing = max(seconds - sum(sweep.seconds for sweep in sweeps), 0.0)
    for number, sweep in enumerate(sweeps):
        write(graph, sweep.parameters)
        losses = {} if sweep.residual is None else {"loss": sweep.residual, "reconstruction": sweep.residual}
        history.append(
            Epoch(number, losses, evaluate() if evaluate else None, sweep.seconds + (0.0 if number else choosing))
        )
    return history


def _loss(count: int, weight: float, embedding: str, scale: float, task: Task):  # type: ignore[no-untyped-def]
    distance = F.l1_loss if embedding == "maximum" else F.mse_loss  # paired with the embedding, FR-PT 4.2

    def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        results = module(*batch[:count])
        parts: dict[str, Tensor] = {}
        if weight < 1:
            parts[task.name] = task.loss(results[1], batch[count])
        if weight > 0:
            parts["reconstruction"] = distance(results[0], batch[count + 1]) / scale
        if len(parts) == 1:
            return {"loss": next(iter(parts.values())), **parts}
        return {"loss": (1 - weight) * parts[task.name] + weight * parts["reconstruction"], **parts}

    return loss


def _accuracy(run: Segment, data: tuple[Tensor, ...], place: torch.device, task: Task) -> Callable[[], float]:
    def evaluate() -> float:
        batches = zip(*(t.split(256) for t in data), strict=True)
        right = total = 0
        with torch.no_grad():
            for *values, labels in batches:
                outputs = run(*(channels_last(v.to(place)) for v in values))[1]
                hits, counted = task.right(outputs, labels.to(place))
                right, total = right + int(hits.sum()), total + int(counted.sum())
        return right / max(total, 1)

    return evaluate


def _fingerprint(model: nn.Module) -> str:
    """Of the weights that post-training starts from: a checkpoint of another model's is not to be continued."""
    digest = hashlib.sha256()
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
