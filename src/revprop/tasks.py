"""Tasks: what outputs and labels have to do with each other, stated once and used by every verb.

A task says which outputs hold for given labels: a set of linear constraints, sample by sample. The nearest embedding is the
Euclidean projection onto that set, and the global strategy searches for features whose outputs lie in it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from revprop.embedding import EMBEDDINGS, Embedding, check_labels
from revprop.errors import near_matches, require_finite

__all__ = ["Classification", "MultiLabel", "Regression", "Task", "by_sample", "infer"]


class Task(ABC):
    """What labels ask of outputs. Only :meth:`check` looks whether labels fit; everything else takes labels that do.

    Attributes:
        name: what its loss is called in a history.
    """

    name: ClassVar[str]

    @abstractmethod
    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """Refuses labels that do not fit, naming the expected and the given; of ``outputs`` only the shape is looked at.

        Raises:
            ValueError: labels of the wrong type, shape or range. NonFiniteError: NaN or infinity in them.
        """

    @abstractmethod
    def embed(
        self, outputs: Tensor, labels: Tensor, embedding: str = "nearest", margin: float | Tensor = 0.0
    ) -> Tensor:
        """The wanted outputs, of the outputs' shape. "nearest" is the Euclidean projection onto the outputs that hold by the
        margin, differentiable in the outputs; "maximum" and "one_hot" as the task says. ``margin``: a number, or (n,)."""

    @abstractmethod
    def missing(self, outputs: Tensor, labels: Tensor, margin: float = 0.0) -> Tensor:
        """(n, groups, k): by how much each linear constraint misses, differentiable in the outputs; -inf: no constraint.
        Constraints of one group share outputs (the classes of one position), those of different groups do not."""

    @abstractmethod
    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss to train by, a scalar: the mean over what counts; 0 where nothing does."""

    @abstractmethod
    def right(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) and (n,): how many of each sample's labels are right, and how many count. Accuracy is the ratio of their sums."""

    def miss(self, outputs: Tensor, labels: Tensor, margin: float = 0.0) -> Tensor:
        """(n,): how far each sample is from holding by the margin, in the outputs' units; not above 0 where it holds."""
        missing = self.missing(outputs, labels, margin).flatten(1)
        return missing.amax(1) if missing.shape[1] else missing.new_full((len(missing),), -math.inf)

    def room(self, margin: float = 0.0) -> float:
        """How far inside the set of outputs that hold by the margin one can get; 0: the set is a point."""
        return math.inf


@dataclass(frozen=True)
class Classification(Task):
    """One class for each position: each label's output is to win against all others of its position by the margin.

    Labels are int64 class indices. One per sample: labels (n,), outputs (n, classes). Dense: outputs (n, classes, d1, ...)
    and labels (n, d1, ...), as torch's cross entropy has it, or classes last, outputs (n, t, classes) and labels (n, t).
    Embeddings are those of :func:`revprop.embed_labels`, position by position; the loss is the mean cross entropy.

    Args:
        dim: the outputs' class dimension; told by the shapes where not given.
        ignore: dense: the label of positions that want nothing and do not count.

    Raises:
        ValueError: an impossible ``dim`` or ``ignore``.

    >>> pixels = torch.tensor([[[3.0, 0.0], [1.0, 2.0]]])  # (1, classes, width)
    >>> Classification(dim=1).embed(pixels, torch.tensor([[1, -100]]))
    tensor([[[2., 0.],
             [2., 2.]]])
    """

    dim: int | None = None
    ignore: int = -100
    name: ClassVar[str] = "classification"

    def __post_init__(self) -> None:
        if self.dim is not None and (not _whole(self.dim) or self.dim == 0):
            raise ValueError(f"dim: expected the outputs' class dimension, 1, -1 or another but 0; given {self.dim!r}")
        if not _whole(self.ignore):
            raise ValueError(f"ignore: expected the label of positions that do not count; given {self.ignore!r}")

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        _require_tensor(labels, "of int64 class indices")
        if outputs.dim() <= 2 or labels.dim() == 1:
            check_labels(outputs, labels)
            self._classes(outputs, labels)
            return
        if labels.dtype != torch.int64:
            raise ValueError(f"labels: expected int64 class indices, given {labels.dtype}; convert with labels.long()")
        classes = outputs.shape[self._classes(outputs, labels)]
        counted = labels[labels != self.ignore]
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
            raise ValueError(
                f"labels: expected 0 to {classes - 1} for {classes} classes, or {self.ignore} where a position does not "
                f"count; given {int(counted.min())} to {int(counted.max())}"
            )

    def embed(
        self, outputs: Tensor, labels: Tensor, embedding: str = "nearest", margin: float | Tensor = 0.0
    ) -> Tensor:
        logits, flat, counted, moved = self._positions(outputs, labels)
        if isinstance(margin, Tensor):
            margin = margin.repeat_interleave(labels.shape[1:].numel())[:, None]
        wanted = _known(embedding)(logits, flat, margin)
        if counted is None:
            return wanted
        wanted = torch.where(counted[:, None], wanted, logits)
        return wanted.view(moved.shape).movedim(-1, self._classes(outputs, labels)).contiguous()

    def missing(self, outputs: Tensor, labels: Tensor, margin: float = 0.0) -> Tensor:
        logits, flat, counted, _ = self._positions(outputs, labels)
        label = flat[:, None]
        missing = (logits + margin - logits.gather(1, label)).scatter(1, label, -torch.inf)
        if counted is not None:
            missing = missing.masked_fill(~counted[:, None], -torch.inf)
        return missing.view(len(outputs), labels.shape[1:].numel(), logits.shape[1])

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        logits, flat, counted, _ = self._positions(outputs, labels)
        if counted is None:
            return F.cross_entropy(outputs, labels)
        return (F.cross_entropy(logits, flat, reduction="none") * counted).sum() / counted.sum().clamp_min(1)

    def right(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, flat, counted, _ = self._positions(outputs, labels)
        right = logits.argmax(1) == flat
        counted = torch.ones_like(right) if counted is None else counted
        shape = (len(labels), labels.shape[1:].numel())
        return (right & counted).view(shape).sum(1), counted.view(shape).sum(1)

    def _classes(self, outputs: Tensor, labels: Tensor) -> int:
        """The outputs' class dimension, counted from the front."""
        shape, given = tuple(outputs.shape), tuple(labels.shape)
        last = len(shape) - 1
        if self.dim is not None and not -last <= self.dim <= last:
            raise ValueError(f"dim={self.dim}: the outputs {shape} have no such dimension behind the samples")
        tried = dict.fromkeys((1, last) if self.dim is None else (self.dim % len(shape),))
        expected = {d: shape[:d] + shape[d + 1 :] for d in tried}
        fits = [d for d in tried if expected[d] == given]
        if not fits:
            words = " or ".join(f"{labels} (classes in dimension {d})" for d, labels in expected.items())
            raise ValueError(f"labels: expected shape {words} for outputs {shape}; given {given}")
        if len(fits) > 1:
            raise ValueError(
                f"outputs {shape} and labels {given}: the classes can be in dimension 1 or last; say which: "
                "task=revprop.Classification(dim=1) or task=revprop.Classification(dim=-1)"
            )
        return fits[0]

    def _positions(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Logits (positions, classes); labels (positions,), 0 where they do not count; which count (None: all); and the
        outputs with their classes last."""
        if labels.dim() == 1:
            return outputs, labels, None, outputs
        moved = outputs.movedim(self._classes(outputs, labels), -1)
        flat = labels.flatten()
        counted = flat != self.ignore
        return moved.reshape(len(flat), moved.shape[-1]), torch.where(counted, flat, 0), counted, moved


class _Box(Task):
    """Each output is to lie between bounds of its own; the nearest such output is the clamped one."""

    @abstractmethod
    def bounds(self, outputs: Tensor, labels: Tensor, margin: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
        """The lowest and the highest that each output may be, of the outputs' shape; -inf and inf where it may be any."""

    def embed(
        self, outputs: Tensor, labels: Tensor, embedding: str = "nearest", margin: float | Tensor = 0.0
    ) -> Tensor:
        _known(embedding)
        if embedding == "one_hot":
            return labels.to(outputs)
        if isinstance(margin, Tensor):
            margin = margin.view(-1, *[1] * (outputs.dim() - 1))
        return outputs.clamp(*self.bounds(outputs, labels, margin))

    def missing(self, outputs: Tensor, labels: Tensor, margin: float = 0.0) -> Tensor:
        low, high = self.bounds(outputs, labels, margin)
        return torch.cat([by_sample(low - outputs), by_sample(outputs - high)], 1).unsqueeze(2)

    def _check_shape(self, outputs: Tensor, labels: Tensor, what: str) -> None:
        _require_tensor(labels, what)
        if labels.shape != outputs.shape:
            raise ValueError(
                f"labels: expected {what} of the outputs' shape {tuple(outputs.shape)}; given {tuple(labels.shape)}"
            )


@dataclass(frozen=True)
class MultiLabel(_Box):
    """Yes or no for each output: label 1 wants it at least the margin above the threshold, label 0 that much below.

    Labels are 0 and 1 (bool, integers or floating point) of the outputs' shape, as (n, classes). The nearest embedding clamps
    the outputs, "maximum" is the same, "one_hot" gives 1 and 0. The loss is the mean binary cross entropy with logits. A label
    is right where "above the threshold" is what it says; each counts.

    Args:
        threshold: in logits; 0 is a probability of one half.

    Raises:
        ValueError: a threshold that is not finite.

    >>> MultiLabel().embed(torch.tensor([[2.0, -1.0, 0.3]]), torch.tensor([[1, 1, 0]]), margin=0.5)
    tensor([[ 2.0000,  0.5000, -0.5000]])
    """

    threshold: float = 0.0
    name: ClassVar[str] = "multi-label"

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold: expected a finite number of logits; given {self.threshold}")

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        self._check_shape(outputs, labels, "0 or 1")
        other = (labels != 0) & (labels != 1)
        if bool(other.any()):
            raise ValueError(f"labels: expected 0 or 1 for each output; given {labels[other][0].item()}")

    def bounds(self, outputs: Tensor, labels: Tensor, margin: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
        yes, zeros = labels.bool(), torch.zeros_like(outputs)
        low = torch.where(yes, zeros + (self.threshold + margin), -torch.inf)
        return low, torch.where(yes, torch.inf, zeros + (self.threshold - margin))

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        total = F.binary_cross_entropy_with_logits(outputs, labels.to(outputs), reduction="sum")
        return total / max(labels.numel(), 1)

    def right(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        right = by_sample((outputs > self.threshold) == labels.bool())
        return right.sum(1), torch.ones_like(right).sum(1)


@dataclass(frozen=True)
class Regression(_Box):
    """A value for each output: every output is to be within the tolerance of its label.

    Labels are floating point, of the outputs' shape. The nearest embedding clamps the outputs into the interval, "maximum" is
    the same, "one_hot" gives the labels themselves. A margin is by how much an output is to be inside of the interval: with one
    of the tolerance or more the label itself is wanted. The loss is the mean squared error. An output is right where it is
    within the tolerance.

    Args:
        tolerance: the largest distance that will do, in the outputs' units; 0 asks for the labels exactly.

    Raises:
        ValueError: a tolerance that is negative or not finite.

    >>> Regression(tolerance=0.5).embed(torch.tensor([[2.0, 0.1]]), torch.tensor([[1.0, 0.0]]))
    tensor([[1.5000, 0.1000]])
    """

    tolerance: float = 0.0
    name: ClassVar[str] = "regression"

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance: expected a number >= 0, in the outputs' units; given {self.tolerance}")

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        self._check_shape(outputs, labels, "floating point values")
        if not labels.is_floating_point():
            raise ValueError(
                f"labels: expected floating point values, given {labels.dtype}; convert with labels.float()"
            )
        require_finite(labels, "labels")

    def bounds(self, outputs: Tensor, labels: Tensor, margin: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
        half = (torch.zeros_like(outputs) + (self.tolerance - margin)).clamp_min(0.0)
        return labels.to(outputs) - half, labels.to(outputs) + half

    def room(self, margin: float = 0.0) -> float:
        return max(self.tolerance - margin, 0.0)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(outputs, labels.to(outputs), reduction="sum") / max(labels.numel(), 1)

    def right(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        right = by_sample((outputs - labels.to(outputs)).abs() <= self.tolerance)
        return right.sum(1), torch.ones_like(right).sum(1)


def stated(task: Task | None, labels: Tensor) -> Task:
    """The task given, or that of labels that come without one.

    Raises:
        ValueError: something that is no task; and as :func:`infer`.

    >>> stated(None, torch.tensor([0, 2]))
    Classification(dim=None, ignore=-100)
    """
    if task is None:
        return infer(labels)
    if not isinstance(task, Task):
        raise ValueError(
            f"task: expected revprop.Classification(), revprop.MultiLabel() or revprop.Regression(); given {task!r}"
        )
    return task


def infer(labels: Tensor) -> Task:
    """The task of labels that come without one: class indices.

    Raises:
        ValueError: labels of any other type, naming the tasks.

    >>> infer(torch.tensor([0, 2]))
    Classification(dim=None, ignore=-100)
    """
    _require_tensor(labels, "(n,) of int64 class indices")
    if labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected int64 class indices, given {labels.dtype}; convert with labels.long(), or say what they are: "
            "task=revprop.MultiLabel() for 0 or 1 at each output, task=revprop.Regression() for wanted values"
        )
    return Classification()


def by_sample(x: Tensor) -> Tensor:
    """(n, entries): one row per sample, also where a sample is one number or there is none.

    >>> by_sample(torch.zeros(0, 2, 3)).shape, by_sample(torch.zeros(4)).shape
    (torch.Size([0, 6]), torch.Size([4, 1]))
    """
    return x.reshape(len(x), x.shape[1:].numel())


def _require_tensor(labels: Tensor, what: str) -> None:
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels: expected a tensor {what}, given a {type(labels).__name__}")


def _known(embedding: str) -> Embedding:
    if embedding not in EMBEDDINGS:
        raise ValueError(near_matches(embedding, EMBEDDINGS, "embedding"))
    return EMBEDDINGS[embedding]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
