"""The networks of the papers and a few well-known ones, found by name; and trained weights, checked before use."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from revprop.errors import NonFiniteError, near_matches
from revprop.networks import adjoint_back_map, fr_pt, racecar, resnet, tutorial, vgg, vit
from revprop.networks.fr_pt import ConvNet

__all__ = ["NETWORKS", "ConvNet", "load_network", "load_weights"]

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "digits": fr_pt.digits,
    "mnist": fr_pt.mnist,
    "cifar10": fr_pt.cifar10,
    "cifar10-reversed": fr_pt.cifar10_reversed,
    "cifar100": fr_pt.cifar100,
    "tiny-imagenet": fr_pt.tiny_imagenet,
    "imagenette": fr_pt.imagenette,
    "imagewoof": fr_pt.imagewoof,
    "resnet20": resnet.resnet20,
    "resnet32": resnet.resnet32,
    "resnet18": resnet.resnet18,
    "cifar10-simple-cnn": tutorial.cifar10_simple_cnn,
    "mnist-lenet": tutorial.mnist_lenet,
    "vit-mnist": vit.vit_mnist,
    "vgg7": adjoint_back_map.vgg7,
    "resnet20-wide": adjoint_back_map.resnet20_wide,
    "resnet20-fixup": adjoint_back_map.resnet20_fixup,
    "racecar-bits": racecar.bits,
    "racecar-mnist": racecar.mnist,
    "racecar-cifar": racecar.cifar,
    "racecar-cifar-narrow": racecar.cifar_narrow,
    "vgg-small": vgg.vgg_small,
}
"""Every network of this package by name: factories that take the keywords ``classes`` and ``seed``."""


def load_network(spec: str) -> nn.Module:
    """Build the network that a name or a ``package.module:factory`` stands for.

    Args:
        spec: a name in ``NETWORKS``, or a module's dotted path, a colon, and the name of a function or class in it that
            builds an ``nn.Module`` when called without arguments.

    Returns:
        the network, as its factory built it.

    Raises:
        ValueError: the name is unknown (near matches are given), the spec is malformed, the module lacks the factory,
            the factory needs arguments, or what it built is no ``nn.Module``.
        ImportError: the module cannot be imported.

    Example:
        >>> type(load_network("digits")).__name__
        'ConvNet'
        >>> type(load_network("revprop.networks.resnet:resnet20")).__name__
        'CifarResNet'
    """
    if ":" not in spec:
        if spec in NETWORKS:
            return NETWORKS[spec]()
        raise ValueError(
            f"{near_matches(spec, NETWORKS, 'network')} (For a network of your own write package.module:factory.)"
        )
    module_name, _, factory_name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), factory_name]):
        raise ValueError(f"expected package.module:factory, such as my_package.models:build, got {spec!r}")
    module = _import_module(module_name)
    if not hasattr(module, factory_name):
        public = [name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_")]
        raise ValueError(f"in module {module_name!r}: {near_matches(factory_name, public, 'factory')}")
    return _call_factory(spec, getattr(module, factory_name))


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ImportError(f"module {name!r} was found, but importing it failed: {error}") from error
        raise ImportError(
            f"no module named {error.name!r}: install its package, or put the folder that holds it on PYTHONPATH"
        ) from error
    except ImportError as error:
        raise ImportError(f"module {name!r} was found, but importing it failed: {error}") from error


def _call_factory(spec: str, factory: Any) -> nn.Module:
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ValueError(
            f"expected {spec!r} to be a function or class that builds a network, got a {type(factory).__name__}"
        )
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some built-in callables have none: then the call itself must tell
        signature = inspect.Signature()
    try:
        signature.bind()
    except TypeError as error:
        raise ValueError(
            f"{spec!r} cannot be called without arguments ({error}): "
            "write a function that calls it with yours, and name that"
        ) from error
    network = factory()
    if not isinstance(network, nn.Module):
        raise ValueError(f"expected {spec!r} to build a torch.nn.Module, got a {type(network).__name__}")
    return network


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy trained weights from a file into ``model`` after checking them all: either every tensor is copied or none.

    The file is safetensors, or a PyTorch checkpoint that weights-only loading accepts: a state dict, or a dictionary
    that holds one under ``state_dict``, ``model_state_dict`` or ``model``. The prefix ``module.`` of data-parallel
    training is taken off; values are converted to the model's precision; batch norm's batch counters may be missing.

    Args:
        model: the network to fill, in place; on any device.
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is corrupt; it is a pickle that weights-only loading refuses; it does not fit the model
            (all missing, unexpected and differently shaped tensors are listed).
        NonFiniteError: a tensor holds NaN or infinity, as stored or in the model's precision.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> trained, model = NETWORKS["digits"](seed=0), NETWORKS["digits"](seed=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(trained.state_dict(), f"{folder}/digits.safetensors")
        ...     load_weights(model, f"{folder}/digits.safetensors")
        >>> all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters()))
        True
    """
    path = Path(path)
    own = model.state_dict()
    given = _read_tensors(path)
    if all(name.startswith("module.") for name in given) and not any(name.startswith("module.") for name in own):
        given = {name.removeprefix("module."): tensor for name, tensor in given.items()}
    for name in own:
        # The counter of training steps that older files lack and evaluation never reads.
        if name.endswith("num_batches_tracked"):
            given.setdefault(name, own[name])
    problems = {
        "missing from the file": [name for name in own if name not in given],
        "unexpected in the file": [name for name in given if name not in own],
        "of another shape or type": [
            f"{name} (model {_describe(own[name])}, file {_describe(given[name])})"
            for name in own
            if name in given and _describe(own[name]) != _describe(given[name])
        ],
    }
    if any(problems.values()):
        lines = [f"\n  {what}: {_shorten(names)}" for what, names in problems.items() if names]
        raise ValueError(f"the weights in {path} do not fit the {type(model).__name__} given:{''.join(lines)}")
    converted = {name: tensor.to(own[name].dtype) for name, tensor in given.items()}
    spoilt = [name for name, tensor in converted.items() if not bool(tensor.isfinite().all())]
    if spoilt:
        raise NonFiniteError(
            f"NaN or infinity in {_shorten(spoilt)} of {path}: expected finite weights; nothing was loaded"
        )
    model.load_state_dict(converted)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors" or head[8:] == b"{":  # 8 bytes of header length, then the header in JSON
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file ({error}): get it again") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader raises a dozen unrelated types for damaged or foreign files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{path} is refused by weights-only loading ({reason}). Either the file is damaged, or it pickles Python "
            "objects beside tensors, which can run any code when loaded. If you trust its source, load it once "
            "yourself with torch.load(..., weights_only=False) and keep only the tensors: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"expected {path} to hold a state dict (tensors by name), got a {type(content).__name__}")
    strangers = [
        f"{name} (a {type(value).__name__})" for name, value in content.items() if not isinstance(value, Tensor)
    ]
    if strangers:
        raise ValueError(f"expected only tensors in the state dict of {path}, got {_shorten(strangers)}")
    return dict(content)


def _describe(tensor: Tensor) -> str:
    # Precisions convert into one another; integers where the model has real numbers are another thing (quantised).
    kind = "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"
    return f"{kind} {'x'.join(map(str, tensor.shape)) or 'scalar'}"


def _shorten(names: list[str], most: int = 10) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
