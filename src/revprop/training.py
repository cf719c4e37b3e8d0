"""The one training loop: post-training and the training of baselines run on it, on lightning-fabric.

Fabric places the model and its gradients (CPU, GPU, precision); the loop shuffles by its own seeded generator, checks every
loss, and writes a checkpoint after each epoch from which an interrupted run continues to identical numbers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from revprop.hardware import StepMemory, channels_last, clock
from revprop.recipe import Recipe, set_apart
from revprop.tasks import Classification, Task, stated

__all__ = ["Epoch", "Fitted", "Training", "TrainingDivergedError", "accuracy_of", "fit", "train_baseline"]


class TrainingDivergedError(RuntimeError):
    """The loss became NaN or infinite; says at which step, and where the last good checkpoint is."""


@dataclass(frozen=True)
class Epoch:
    """One line of a training's history. Epoch 0 is the state before training. ``losses``: means over the epoch's samples.
    ``accuracy``: None where it was not measured. ``seconds``: by :func:`clock`. ``observed``: what was asked for beside."""

    epoch: int
    losses: dict[str, float]
    accuracy: float | None
    seconds: float
    observed: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fitted:
    """What :func:`fit` returns: the history, and the memory of a training step in bytes (0 where no step was taken)."""

    history: list[Epoch]
    memory: int


@dataclass(frozen=True)
class Training:
    """How to train: the options of the loop.

    Attributes:
        epochs, batch_size, learning_rate: Adam's, the papers' 0.001 and 256. recipe: optimizer and schedule where others.
        seed: of the one generator that shuffles, and of what a module draws in training (dropout); torch's own is left alone.
        device: "auto", "cpu", "cuda", "cuda:1", ... precision: as fabric names it.
        checkpoint: a folder for the state after each epoch, or None; an earlier run's state there is continued.
        progress: whether to draw a progress bar on standard error, where that is a terminal.
        passes: so many times through the data make an epoch: of a set so small that what is done once an epoch would count.
        measure_every: the accuracy is measured before training, after every so many epochs, and at the end.
    """

    epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 1e-3
    seed: int = 0
    device: str = "auto"
    precision: str = "32-true"
    checkpoint: Path | None = None
    progress: bool = False
    recipe: Recipe = Recipe()
    passes: int = 1
    measure_every: int = 1

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch_size", 1), ("passes", 1), ("measure_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, given {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a positive number, given {self.learning_rate}")

    def fabric(self) -> Fabric:
        """The fabric that places the work."""
        kind, _, index = str(self.device).partition(":")  # torch's own way to name one of several
        devices = [int(index)] if index.isdigit() and kind != "cpu" else 1
        return Fabric(accelerator=kind, devices=devices, precision=self.precision)  # type: ignore[arg-type]


Loss = Callable[[nn.Module, tuple[Tensor, ...]], dict[str, Tensor]]


def fit(
    module: nn.Module,
    data: Sequence[Tensor],
    loss: Loss,
    training: Training,
    evaluate: Callable[[], float] | None = None,
    identity: Mapping[str, Any] | None = None,
    description: str = "training",
    before_epoch: Callable[[int], None] | None = None,
    observe: Callable[[int], Mapping[str, float]] | None = None,
    parts: Mapping[str, Sequence[Tensor]] | None = None,
    rates: Mapping[str, float] | None = None,
) -> Fitted:
    """Trains the parameters of ``module`` that require gradients on shuffled batches of ``data``, by Adam or as the recipe says.

    Args:
        module: what is trained, in place.
        data: tensors of one length; ``loss(module, batch)`` gets the same rows of each and returns named scalars, of which
            "loss" is minimised.
        evaluate: an accuracy in [0, 1], measured before training and after each epoch.
        identity: what the checkpoint belongs to; a checkpoint of something else is refused.
        before_epoch: called with the number of each epoch as it begins; its time counts as the epoch's.
        observe: called with the number of each epoch done, 0 first; what it returns is kept with the epoch.
        parts: parameters that minimise losses of their own, by the loss's name, in place of "loss", which is then only checked
            and recorded: a generator against a discriminator. All are stepped at once, after the last part's gradient. rates:
            learning rates of parts, where they are others than the training's.

    Returns:
        A :class:`Fitted`: the history, one :class:`Epoch` per epoch, the state before training first; and a step's memory.

    Raises:
        TrainingDivergedError: at the first loss that is not finite. ValueError: a checkpoint of other settings.

    >>> line = nn.Linear(1, 1)
    >>> x = torch.linspace(-1, 1, 64)[:, None]
    >>> fitted = fit(line, (x, 2 * x), lambda m, b: {"loss": (m(b[0]) - b[1]).square().mean()}, Training(epochs=2, device="cpu"))
    >>> [e.epoch for e in fitted.history]
    [0, 1, 2]
    """
    fabric = training.fabric()
    device = fabric.device
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = training.recipe.optimizer_of(trained, training.learning_rate)
    for name, rate in (rates or {}).items():
        set_apart(optimizer, (parts or {})[name], rate)
    wrapped, optimizer = fabric.setup(module, optimizer)
    generator = torch.Generator().manual_seed(training.seed)
    state = _Checkpoint(training, module, optimizer, generator, dict(identity or {}))
    history = state.resume()
    memory, now = StepMemory(module.parameters(), device), clock(device)
    n = len(data[0])
    steps = training.passes * -(-n // training.batch_size)
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not (training.progress and console.is_terminal),
        transient=True,
    ) as bar:
        task = bar.add_task(description, total=training.epochs, completed=max(len(history) - 1, 0), note="")
        if not history:
            history.append(Epoch(0, {}, evaluate() if evaluate else None, 0.0, dict(observe(0)) if observe else {}))
        for epoch in range(len(history), training.epochs + 1):
            began = now()
            if before_epoch is not None:
                before_epoch(epoch)
            batches = (
                rows
                for _ in range(training.passes if n else 0)
                for rows in torch.randperm(n, generator=generator).split(training.batch_size)
            )
            sums: dict[str, Tensor] = {}
            step = 0
            with _seeded(1_000_003 * training.seed + epoch, device):
                for step, rows in enumerate(batches, start=1):
                    batch = tuple(channels_last(t.index_select(0, rows.to(t.device)).to(device)) for t in data)
                    with memory.watch(batch):
                        losses = loss(wrapped, batch)
                        value = float(losses["loss"].detach())
                        if not math.isfinite(value):
                            raise state.diverged(f"the loss is {value}", step, epoch, _terms(losses))
                        for parameter in trained:
                            parameter.grad = None
                        if parts is None:
                            fabric.backward(losses["loss"])
                        for left, (name, own) in enumerate((parts or {}).items(), start=1 - len(parts or {})):
                            fabric.backward(losses[name], inputs=list(own), retain_graph=left < 0)
                    done = epoch - 1 + (step - 0.5) / steps
                    for group in optimizer.param_groups:
                        rate = group.get("rate", training.learning_rate)
                        group["lr"] = training.recipe.rate(rate, done, training.epochs)
                    optimizer.step()
                    for name, part in losses.items():
                        share = part.detach() * len(rows)  # stays on the device: only the loss itself is waited for
                        sums[name] = sums[name] + share if name in sums else share
            # a finite loss can have an infinite gradient: what that leaves behind must not replace the last good state
            if not all(bool(p.detach().isfinite().all()) for p in trained):
                raise state.diverged("a trained parameter is NaN or infinite", step, epoch)
            seconds = now() - began
            due = epoch % training.measure_every == 0 or epoch == training.epochs
            accuracy = evaluate() if evaluate and due else None
            means = {k: float(v) / max(n * training.passes, 1) for k, v in sums.items()}
            history.append(Epoch(epoch, means, accuracy, seconds, dict(observe(epoch)) if observe else {}))
            state.save(history)
            bar.update(task, advance=1, note="" if accuracy is None else f"{100 * accuracy:.2f} %")
    return Fitted(history, memory.bytes(device))


def _terms(losses: Mapping[str, Tensor]) -> str:
    """The terms of a loss, where it has some."""
    named = [f"{name} {float(part.detach()):.4g}" for name, part in losses.items() if name != "loss"]
    return f". The terms were: {', '.join(named)}" if named else ""


@dataclass
class _Checkpoint:
    """State after an epoch: ``state-<epoch>.safetensors`` beside ``state.json``, which names it and is replaced last."""

    training: Training
    module: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    identity: dict[str, Any]
    last: str = field(default="")

    def _settings(self) -> dict[str, Any]:
        chosen = {
            k: v for k, v in asdict(self.training).items() if k in ("batch_size", "learning_rate", "seed", "precision")
        }
        chosen |= {"passes": self.training.passes} if self.training.passes != 1 else {}
        return json.loads(json.dumps({**self.identity, **chosen}))

    def diverged(self, what: str, step: int, epoch: int, terms: str = "") -> TrainingDivergedError:
        kept = f"the last good state is {self.last}" if self.last else "no checkpoint was kept"
        return TrainingDivergedError(
            f"{what} at step {step} of epoch {epoch}; {kept}. Lower the learning rate "
            f"({self.training.learning_rate}), or look for extreme values in the targets{terms}"
        )

    def save(self, history: list[Epoch]) -> None:
        folder = self.training.checkpoint
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"parameter.{name}": p.detach().cpu().contiguous()
            for name, p in self.module.named_parameters()
            if p.requires_grad
        }
        tensors |= {f"buffer.{name}": b.detach().cpu().contiguous() for name, b in self.module.named_buffers()}
        for i, parameter in enumerate(p for p in self.module.parameters() if p.requires_grad):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{i}.{name}"] = value.detach().cpu().contiguous()
        tensors["generator"] = self.generator.get_state()
        name = f"state-{history[-1].epoch:04d}.safetensors"
        save_file(tensors, folder / f".{name}.part")
        os.replace(folder / f".{name}.part", folder / name)
        text = json.dumps(
            {"state": name, "settings": self._settings(), "history": [asdict(e) for e in history]}, indent=1
        )
        (folder / ".state.json.part").write_text(text)
        os.replace(folder / ".state.json.part", folder / "state.json")
        # what came before, and what a killed run left half-written (safetensors writes to .tmp... first)
        for old in (*folder.glob("state-*.safetensors"), *folder.glob(".tmp*")):
            if old.name != name:
                old.unlink()
        self.last = str(folder / name)

    def resume(self) -> list[Epoch]:
        folder = self.training.checkpoint
        if folder is None or not (folder / "state.json").exists():
            return []
        try:
            stored = json.loads((folder / "state.json").read_text())
        except ValueError as error:
            raise ValueError(f"{folder / 'state.json'} is damaged ({error}); delete {folder} to start anew") from error
        if stored["settings"] != self._settings():
            differ = sorted(
                k
                for k in {*stored["settings"], *self._settings()}
                if stored["settings"].get(k) != self._settings().get(k)
            )
            raise ValueError(
                f"{folder} holds the checkpoint of other settings ({', '.join(differ)} differ); "
                "choose another folder, or delete it to start anew"
            )
        try:
            opened = safe_open(folder / stored["state"], framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder / stored['state']} is no whole checkpoint ({error}); delete {folder} to start anew"
            ) from error
        with opened as file, torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(file.get_tensor(f"parameter.{name}"))
            for name, buffer in self.module.named_buffers():
                buffer.copy_(file.get_tensor(f"buffer.{name}"))
            for i, parameter in enumerate(p for p in self.module.parameters() if p.requires_grad):
                found = [k for k in file.keys() if k.startswith(f"optimizer.{i}.")]  # noqa: SIM118 (no mapping)
                # the kernel that steps all parameters at once has Adam's step count on the device, torch's other ways on the CPU
                on_device = {k for k in found if not k.endswith(".step") or self.optimizer.param_groups[0].get("fused")}
                self.optimizer.state[parameter] = {
                    k.rpartition(".")[2]: file.get_tensor(k).to(parameter.device if k in on_device else "cpu")
                    for k in found
                }
            self.generator.set_state(file.get_tensor("generator"))
        self.last = str(folder / stored["state"])
        history = [Epoch(**e) for e in stored["history"]]
        if len(history) - 1 > self.training.epochs:
            raise ValueError(
                f"{folder} has trained {len(history) - 1} epochs already, more than the {self.training.epochs} asked for"
            )
        return history


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What is drawn inside (dropout) comes from the seed; the random state outside is as it was."""
    cuda = [device] if device.type == "cuda" else []
    # torch.manual_seed would also seed other accelerators, which this fork does not put back
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed % 2**63)
        for place in cuda:
            with torch.cuda.device(place):
                torch.cuda.manual_seed(seed % 2**63)
        yield


def train_baseline(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor] | None,
    training: Training,
    identity: Mapping[str, Any] | None = None,
    task: Task | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
) -> list[Epoch]:
    """Trains a whole network, in place, by its task's loss: the baselines that post-training starts from.

    Args:
        model: (n, ...) -> (n, classes), or what the task has. train, test: inputs and labels.
        task: what the labels are; class indices, trained by cross entropy, where not given.
        augment: changes a batch of inputs at random, from torch's own generator.

    Returns:
        The history, with test accuracies where ``test`` is given.

    Raises:
        ValueError: labels that do not fit the model's outputs. And all that :func:`fit` raises.

    >>> x, y = torch.randn(64, 4), torch.randint(0, 3, (64,))
    >>> len(train_baseline(nn.Linear(4, 3), (x, y), (x, y), Training(epochs=1, device="cpu")))
    2
    """

    def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        module.train()
        found = known.loss(module(batch[0] if augment is None else augment(batch[0])), batch[1])
        penalty = training.recipe.penalty(module)
        return {"loss": found if penalty is None else found + penalty}

    def evaluate() -> float:
        assert test is not None
        model.eval()
        return accuracy_of(model, zip(test[0].split(256), test[1].split(256), strict=True), known)

    model.eval()
    place = next((p.device for p in model.parameters()), train[0].device)
    with torch.no_grad():
        outputs = model(train[0][:1].to(place))
    known = stated(task, train[1])
    for labels in (train[1], *([] if test is None else [test[1]])):
        known.check(torch.empty(len(labels), *outputs.shape[1:], device="meta"), labels)
    history = fit(model, train, loss, training, evaluate if test is not None else None, identity, "baseline").history
    model.eval()
    return history


def accuracy_of(
    function: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    task: Task = Classification(),
) -> float:
    """The share of labels that the outputs get right (classes: that are the largest output), in [0, 1].

    >>> accuracy_of(lambda x: x, [(torch.eye(2), torch.tensor([0, 0]))])
    0.5
    """
    right = total = 0
    device = next((p.device for p in function.parameters()), None) if isinstance(function, nn.Module) else None
    with torch.no_grad():
        for x, y in batches:
            outputs = function(channels_last(x.to(device) if device else x))
            hits, counted = task.right(outputs, y.to(outputs.device))
            right, total = right + int(hits.sum()), total + int(counted.sum())
    return right / max(total, 1)
