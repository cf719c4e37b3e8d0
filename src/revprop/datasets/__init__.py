"""Labelled images: the digits that come with scikit-learn, and the standard forms of image data on disk.

Every loader returns a :class:`Split` or fails with an error that names the file and what was expected in it; nothing is
returned half-loaded, nothing is unpacked to disk, and no pickle runs code.
"""

from __future__ import annotations

import importlib
import os
import zipfile
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from revprop.datasets.array_files import IDX_NAMES, load_idx_folder, load_npz, read_idx
from revprop.datasets.celeba import ATTRIBUTES, load_celeba
from revprop.datasets.cifar_files import CIFAR, load_cifar
from revprop.datasets.files import walk_files
from revprop.datasets.image_folder import PARTS, SUFFIXES, load_image_folder
from revprop.datasets.images import ImageData, Split
from revprop.datasets.made import MADE, load_made
from revprop.datasets.motion_blur import load_n_mnist, motion_blurred
from revprop.datasets.spherical import load_spherical, made_spherical
from revprop.datasets.stl10_files import STL10_NAMES, load_stl10
from revprop.datasets.tiny_imagenet import load_tiny_imagenet
from revprop.errors import near_matches

__all__ = [
    "ImageData",
    "Split",
    "data_root",
    "find_data",
    "keeps_cache",
    "load_celeba",
    "load_cifar",
    "load_data",
    "load_digits",
    "load_idx_folder",
    "load_image_folder",
    "load_made",
    "load_n_mnist",
    "load_npz",
    "load_spherical",
    "load_stl10",
    "load_tiny_imagenet",
    "made_spherical",
    "motion_blurred",
    "read_idx",
]


def load_digits(test_share: float = 0.25, seed: int = 0) -> Split:
    """Load scikit-learn's 1,797 grey 8x8 digits, split at random with each class in proportion. Needs no file.

    The values 0 to 16 are kept as 0, 15, ..., 240: exactly proportional, so standardised images do not change.

    Args:
        test_share: share of the images that go to the test part, between 0 and 1.
        seed: seed of the split.

    Returns:
        images of 1x8x8, each part in the original order; classes "0" to "9".

    Raises:
        ValueError: ``test_share`` is not between 0 and 1, or so near that a part lacks a class.

    >>> len(load_digits(test_share=0.5).train)
    898
    """
    if not 0 < test_share < 1:
        raise ValueError(f"expected a test share between 0 and 1, got {test_share}")
    source = importlib.import_module("sklearn.datasets").load_digits()
    split = importlib.import_module("sklearn.model_selection").train_test_split
    labels = torch.from_numpy(source.target.astype(np.int64))
    images = torch.from_numpy((source.images * 15).astype(np.uint8)).unsqueeze(1)
    everything = ImageData("digits", images, labels, tuple(map(str, range(10))))
    train, test = split(np.arange(len(labels)), test_size=test_share, random_state=seed, stratify=source.target)
    return Split(everything.subset(np.sort(train).tolist()), everything.subset(np.sort(test).tolist()))


_CIFAR10_FILES = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar-10-batches-bin", "cifar-10-binary.tar.gz")


_CIFAR100_FILES = ("cifar-100-python", "cifar-100-python.tar.gz", "cifar-100-binary", "cifar-100-binary.tar.gz")


_PLACES: dict[str, tuple[str, ...]] = {
    "mnist": ("mnist", "MNIST/raw"),
    "cifar10": tuple(place for name in _CIFAR10_FILES for place in (name, f"cifar10/{name}")),
    "cifar100": tuple(place for name in _CIFAR100_FILES for place in (name, f"cifar100/{name}")),
    "cifar10-jpeg": ("cifar10/cifar10_jpeg.tar.gz",),
    "cifar10-lossless": ("cifar10/cifar10_lossless_subset.npz",),
    **{
        name: tuple(f"{folder}stl10_binary{end}" for folder in ("", "stl10/", "images/") for end in ("", ".tar.gz"))
        for name in ("stl10", "stl10-unlabelled")
    },
    "celeba64": ("images/celeba64.tar.gz", "images/celeba64", "celeba64"),
    "celeba": ("celeba", "images/celeba"),
    "tinyimagenet10": ("images/tinyimagenet10.tar.gz",),
    "tiny-imagenet": tuple(
        f"{folder}{name}" for name in ("tiny-imagenet-200", "tiny-imagenet-200.tar.gz") for folder in ("", "images/")
    ),
    **{
        name: tuple(
            f"{folder}{name}{form}{end}"
            for form in ("2", "2-320", "2-160", "")
            for end in ("", ".tgz", ".tar.gz")
            for folder in ("", "images/")
        )
        for name in ("imagenette", "imagewoof")
    },
}

_SIZES = {"imagenette": 224, "imagewoof": 224, "stl10": 64, "stl10-unlabelled": 64, "celeba": 64}  # the papers'


_DOWNLOADS = {"mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}


def data_root() -> Path:
    """Tell where named data is looked for: the folder ``REVPROP_DATA`` names, else ``../shared/data``.

    Returns:
        the folder, which may not exist.

    >>> import unittest.mock
    >>> with unittest.mock.patch.dict(os.environ, REVPROP_DATA="images"):
    ...     data_root().name
    'images'
    """
    given = os.environ.get("REVPROP_DATA")
    return Path(given) if given else Path.cwd().parent / "shared" / "data"


def find_data(name: str) -> Path | None:
    """Tell where data of this name is, without reading it.

    Args:
        name: a name that :func:`load_data` knows and looks for under :func:`data_root`.

    Returns:
        the file or folder, or None where there is none.

    Raises:
        ValueError: no such name.

    >>> find_data("cifer10")
    Traceback (most recent call last):
    ValueError: unknown data set 'cifer10'; did you mean 'cifar10'...
    """
    if name not in _PLACES:
        raise ValueError(near_matches(name, _PLACES, "data set"))
    return next((data_root() / place for place in _PLACES[name] if (data_root() / place).exists()), None)


def load_data(
    spec: str | Path, size: int | None = None, *, cache: str | Path | None = None, download: bool = False
) -> Split:
    """Load labelled images by name, or from a file or folder whose form is recognised by its content.

    Args:
        spec: "digits", "mnist", "cifar10", "cifar100", "tiny-imagenet", "imagenette", "imagewoof" (these two at 224 pixels
            where ``size`` says nothing else), "stl10", "stl10-unlabelled", "celeba" (these at 64), "celeba64", "cifar10-jpeg",
            "cifar10-lossless" or "tinyimagenet10" (all but the first under :func:`data_root`); or a path: a folder or archive
            of IDX files, CIFAR batches, STL-10's binary files, CelebA or Tiny ImageNet as it comes, or images in class
            folders, or an ``.npz`` file. A name goes before a path: write ``./mnist`` for a
            folder of that name.
            "made:mnist", "made:imagenette", ...: made images of that data set's shape, see :func:`load_made`.
        size: as for :func:`load_image_folder`; images in class folders, STL-10 and CelebA only.
        cache: as for :func:`load_image_folder`; archives of images in class folders only.
        download: get "mnist", "cifar10" or "cifar100" through torchvision where they are not there yet.

    Returns:
        the split, named after the name, or after the file or folder.

    Raises:
        ValueError: an unknown name (near matches are given), a form that is not recognised, damaged data, or an option
            that does not apply.
        FileNotFoundError: a known name or a path without data.
        ImportError: ``download`` without torchvision.

    >>> load_data("digits").train
    ImageData('digits', 1347 images of 1x8x8, 10 classes)
    """
    if spec == "digits":
        _refuse_options("digits", size, cache)
        return load_digits()
    if isinstance(spec, str) and spec.startswith("made:"):
        _refuse_options(spec, size, cache)
        return load_made(spec.removeprefix("made:"))
    if not isinstance(spec, str) or spec not in _PLACES:
        path = Path(spec)
        if path.exists() or isinstance(spec, Path) or path.name != spec or path.suffix:
            return _load_path(path, size, cache)
        raise ValueError(
            f"{near_matches(spec, ['digits', *_PLACES, *(f'made:{name}' for name in MADE)], 'data set')} "
            "(Or give the path of a file or folder.)"
        )
    root, found = data_root(), find_data(spec)
    if found is None and download:
        _download(spec, root)
        found = find_data(spec)
    if found is None:
        remedy = "set REVPROP_DATA to the folder that holds it, or give its path"
        remedy += ", or download=True" if spec in _DOWNLOADS else ""
        raise FileNotFoundError(f"no data for {spec!r}: looked in {root} for {', '.join(_PLACES[spec])}: {remedy}")
    size = _SIZES.get(spec) if size is None else size
    if spec == "stl10-unlabelled":
        _refuse_options(spec, None, cache)
        return load_stl10(found, size, unlabelled=True)
    split = _load_path(found, size, cache)
    return Split(replace(split.train, name=spec), replace(split.test, name=spec))


def keeps_cache(spec: str | Path) -> bool:
    """Tell whether :func:`load_data` takes a ``cache`` for this: for an archive of images in class folders.

    Args:
        spec: as for :func:`load_data`.

    >>> keeps_cache("digits")
    False
    """
    path = find_data(spec) if isinstance(spec, str) and spec in _PLACES else Path(spec)
    return path is not None and path.is_file() and not zipfile.is_zipfile(path) and _form(path)[0] == "images"


def _form(path: Path) -> tuple[str, PurePosixPath]:
    """The form of a folder's or an archive's data, and the folder in it."""
    forms: set[tuple[str, PurePosixPath]] = set()
    for name, read in walk_files(path):
        forms |= set() if read is None else _recognise(name)
        if forms and path.is_file():  # an archive holds one data set, and reading on would unpack all of it
            break
    if len(forms) != 1:
        expected = (
            "IDX files, CIFAR batches, an .npz archive, STL-10, CelebA or Tiny ImageNet as it comes, or train/CLASS/FILE "
            "with test/CLASS/FILE or val/CLASS/FILE"
        )
        given = ", ".join(sorted(f"{form} in {path / folder}" for form, folder in forms)) or "none of them"
        raise ValueError(f"{path}: expected one of {expected}; found {given}")
    return forms.pop()


def _load_path(path: Path, size: int | None, cache: str | Path | None) -> Split:
    if path.is_file() and zipfile.is_zipfile(path):
        _refuse_options(str(path), size, cache)
        return load_npz(path)
    form, folder = _form(path)
    where = path / folder if path.is_dir() else path
    if form == "images":
        return load_image_folder(where, size, cache)
    if form in ("STL-10", "CelebA"):
        _refuse_options(str(path), None, cache)
        return (load_stl10 if form == "STL-10" else load_celeba)(where, size)
    if form == "Tiny ImageNet":
        _refuse_options(str(path), size, cache)
        return load_tiny_imagenet(where)
    _refuse_options(str(path), size, cache)
    if form == "IDX" and path.is_dir():
        return load_idx_folder(where)
    if form == "IDX":
        raise ValueError(f"{path}: expected IDX files in a folder, got them in an archive: unpack it")
    return load_cifar(where, 100 if form == "CIFAR-100" else 10)


def _recognise(name: PurePosixPath) -> set[tuple[str, PurePosixPath]]:
    """Tell of what form a file of this name is part, and in which folder: no answer, or one."""
    if any(step.startswith(".") for step in name.parts):
        return set()
    at = next((i for i, step in enumerate(name.parts[:2]) if step in PARTS), None)
    inner = () if at is None else name.parts[at + 1 : -1]
    if inner[-1:] == ("images",) and len(inner) <= 2 and name.suffix.lower() in SUFFIXES:
        return {("Tiny ImageNet", PurePosixPath(*name.parts[:at]))}
    if at is not None and len(name.parts) == at + 3 and name.suffix.lower() in SUFFIXES:
        return {("images", PurePosixPath(*name.parts[:at]))}
    if name.name in STL10_NAMES or name.name in ATTRIBUTES:
        return {("STL-10" if name.name in STL10_NAMES else "CelebA", name.parent)}
    if name.name.removesuffix(".gz") in IDX_NAMES:
        return {("IDX", name.parent)}
    variants = (v for v, (_, _, train, test, _, _) in CIFAR.items() if name.name.removesuffix(".bin") in (*train, test))
    return {(f"CIFAR-{variant}", name.parent) for variant in variants}


def _refuse_options(what: str, size: int | None, cache: str | Path | None) -> None:
    if size is not None or cache is not None:
        raise ValueError(f"{what}: size and cache apply to images in class folders only; leave them out")


def _download(name: str, root: Path) -> None:
    if name not in _DOWNLOADS:
        raise ValueError(f"{name!r} cannot be downloaded; {', '.join(map(repr, _DOWNLOADS))} can")
    try:
        torchvision = importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise ImportError("download=True needs torchvision: pip install 'revprop[download]'") from error
    getattr(torchvision, _DOWNLOADS[name])(str(root), download=True)
