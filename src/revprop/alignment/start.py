"""The first step from a start that is the same for the whole batch: the encoder's pass over it computed once.

``r = r0 + eta J(r0)^T (z - E(r0))`` is linear in z, and J is the same for every example. So one row goes forward instead of n,
and where there are more examples than latent variables, as many rows go back as there are latent variables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

__all__ = ["first_step", "jacobian", "mixing"]


def mixing(module: nn.Module) -> str:
    """The first part of a module that looks at other examples of a batch or draws at random as it stands; "" where none is.

    Known by type: batch norm in training mode or without running statistics, dropout in training mode.

    >>> mixing(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    "'1', BatchNorm1d"
    >>> mixing(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval())
    ''
    """
    for name, part in module.named_modules():
        instance = type(part).__name__.startswith(("InstanceNorm", "LazyInstanceNorm"))  # each example by itself
        batch = isinstance(part, _NormBase) and not instance and (part.training or part.running_mean is None)
        if batch or (isinstance(part, _DropoutNd | nn.RReLU) and part.training):
            return f"{name!r}, {type(part).__name__}"
    return ""


def first_step(
    module: Callable[[Tensor], Tensor], start: Tensor, z: Tensor, weights: Tensor | None, found: Tensor | None = None
) -> Tensor:
    """``J(r0)^T W (z - E(r0))`` for every z, with one pass over r0.

    Args:
        module: E, which takes each example by itself. start: r0, (1, ...). z: (n, ...). weights: the diagonal of W, of z's shape
            but for n; ones where not given. found: E(r0), (1, ...), where it has been computed with the rest of a batch already.

    Returns:
        (n, ...) in the shape of r0; differentiable in the module's parameters, z and ``found``.

    Raises:
        ValueError: z of another shape than E(r0).
    """
    with _Gates():
        own, pull, *_ = torch.func.vjp(module, start)
    if z.shape[1:] != own.shape[1:]:
        expected = ", ".join(map(str, own.shape[1:]))
        raise ValueError(f"z: expected codes of shape (n, {expected}), given {tuple(z.shape)}")
    error = z - (own if found is None else found)
    error = error if weights is None else error * weights
    n, latents = len(z), own.numel()
    if not 0 < n <= latents:
        rows = _rows(pull, own)
        return (error.reshape(n, latents) @ rows.flatten(1)).view(n, *start.shape[1:])
    return torch.func.vmap(pull)(error.unsqueeze(1))[0].squeeze(1)


def jacobian(module: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """E(r0), (1, ...), and the rows of its Jacobian, (latent variables, ...) in the shape of r0."""
    own, pull, *_ = torch.func.vjp(module, start)
    return own, _rows(pull, own)


def _rows(pull: Callable[..., Any], like: Tensor) -> Tensor:
    basis = torch.eye(like.numel(), dtype=like.dtype, device=like.device).view(-1, *like.shape)
    return torch.func.vmap(pull)(basis)[0].squeeze(1)


def _gate(slope: Callable[[tuple[Any, ...], dict[str, Any]], float]) -> Callable[..., Tensor]:
    def multiply(*args: Any, **kwargs: Any) -> Tensor:
        z = args[0] if args else kwargs["input"]
        recorded = z.detach()
        return z * torch.ones_like(recorded).masked_fill(recorded <= 0, slope(args, kwargs))

    return multiply


def _slope(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    return args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)


class _Gates(TorchFunctionMode):
    """ReLU and leaky ReLU as products with their slopes. Value and derivative are the same; but autograd, which would carry a
    second derivative of zeros through the whole pass over r0, sees constants."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return GATES.get(func, func)(*args, **(kwargs or {}))


GATES: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _gate(lambda args, kwargs: 0.0)),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _gate(_slope)),
}
