"""From labels to wanted outputs: the embedding of a class label in logit space (FR-PT section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from revprop.errors import near_matches, require_finite

__all__ = ["EMBEDDINGS", "Embedding", "check_labels", "embed_labels", "shortfall"]


def embed_labels(logits: Tensor, labels: Tensor, embedding: str = "nearest", margin: float = 0.0) -> Tensor:
    """The wanted logits for given labels.

    - "nearest" (Algorithm 1): the Euclidean projection of the logits onto {a : a_y >= a_i + margin for all i}. With d_i = a_i +
      margin - a_y sorted decreasingly and prefix sums c_s, the active number k is the largest s with c_s < (s+1) d_s; the
      active logits fall to ``a_y + c_k / (k+1) - margin`` and a_y rises to ``a_y + c_k / (k+1)``. Right answers stay as they are.
    - "maximum" (Eq. 22, the L1 solution): a_y rises to the largest other logit plus margin.
    - "one_hot": 1 for the label, 0 elsewhere.

    Args:
        logits: (n, classes). labels: (n,) int64. margin: by how much the label is to win, in logits.

    Returns:
        (n, classes), the type of ``logits``.

    Raises:
        ValueError: labels of the wrong length, type or range; an unknown embedding. NonFiniteError: NaN in the logits.

    >>> embed_labels(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([1]))
    tensor([[2., 2., 0.]])
    """
    check_labels(logits, labels)
    require_finite(logits, "logits")
    if embedding not in EMBEDDINGS:
        raise ValueError(near_matches(embedding, EMBEDDINGS, "embedding"))
    return EMBEDDINGS[embedding](logits, labels, margin)


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Refuses labels that do not fit the outputs, naming the expected and the given.

    >>> check_labels(torch.zeros(2, 3), torch.tensor([0, 2]))
    """
    if logits.dim() != 2:
        raise ValueError(
            f"labels need outputs of shape (n, classes); the network's are {tuple(logits.shape)}: "
            "give target=<wanted output> instead"
        )
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels: expected a tensor (n,) of int64 class indices, given a {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 class indices, given {labels.dtype}; convert with labels.long()")
    if tuple(labels.shape) != (logits.shape[0],):
        raise ValueError(f"labels: expected shape ({logits.shape[0]},), one per sample; given {tuple(labels.shape)}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"labels: expected 0 to {logits.shape[1] - 1} for {logits.shape[1]} outputs; "
            f"given {int(labels.min())} to {int(labels.max())}"
        )


def shortfall(logits: Tensor, labels: Tensor, margin: float = 0.0) -> Tensor:
    """By how much each label misses winning: ``max_i a_i + margin - a_y`` over the other classes, not above 0 where it wins.

    >>> shortfall(torch.tensor([[3.0, 1.0], [0.0, 2.0]]), torch.tensor([1, 1]))
    tensor([ 2., -2.])
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    if logits.shape[1] == 1:
        return torch.full_like(own, -torch.inf)
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) + margin - own


def _nearest(logits: Tensor, labels: Tensor, margin: float | Tensor) -> Tensor:
    label = labels[:, None]
    own = logits.gather(1, label)
    # the label's own entry takes no part in the sort: -inf is never active
    above = (logits + margin - own).scatter(1, label, -torch.inf)
    d = above.sort(dim=1, descending=True).values
    count = torch.arange(1, logits.shape[1] + 1, device=logits.device, dtype=logits.dtype)
    positive = d > 0
    sums = torch.where(positive, d, 0.0).cumsum(1)
    k = (positive & (sums < (count + 1) * d)).sum(1, keepdim=True)
    total = sums.gather(1, (k - 1).clamp_min(0))
    rise = torch.where(k > 0, total / (k + 1), 0.0)
    lowered = torch.minimum(logits, own + rise - margin)
    return torch.where(k > 0, lowered.scatter(1, label, own + rise), logits)


def _maximum(logits: Tensor, labels: Tensor, margin: float | Tensor) -> Tensor:
    label = labels[:, None]
    if logits.shape[1] == 1:
        return logits.clone()
    others = logits.scatter(1, label, -torch.inf).amax(1, keepdim=True) + margin
    return logits.scatter(1, label, torch.maximum(logits.gather(1, label), others))


def _one_hot(logits: Tensor, labels: Tensor, margin: float | Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter(1, labels[:, None], 1.0)


Embedding = Callable[[Tensor, Tensor, float | Tensor], Tensor]  # the margin: a number, or (n, 1)
EMBEDDINGS: dict[str, Embedding] = {
    "nearest": _nearest,
    "maximum": _maximum,
    "one_hot": _one_hot,
}
