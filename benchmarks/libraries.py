"""The libraries whose networks the coverage page is about; imported when a network of theirs is built."""

from __future__ import annotations

import sys
from typing import Any

import torch

_KEPT: list[torch.library.Library] = []  # a library is undone when it is collected


def torchvision() -> Any:
    """torchvision, also beside a build of torch that its compiled operators were not made for."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        import torchvision
    return torchvision


def timm() -> Any:
    """timm, which needs torchvision."""
    torchvision()
    import timm

    return timm


def transformers() -> Any:
    """transformers, which looks at torchvision."""
    torchvision()
    import transformers

    return transformers
