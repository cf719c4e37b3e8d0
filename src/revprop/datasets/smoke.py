"""Simulated smoke: buoyant plumes, and smoke blown past an obstacle, by PhiFlow; and drifting blobs that need no library.

``python -m revprop.datasets.smoke --kind plume`` writes simulations once, :func:`load_smoke` reads them. Only writing needs
PhiFlow (``pip install 'revprop[smoke]'``), which solves the incompressible Euler equations on a staggered grid: MacCormack
advection, buoyancy proportional to the density, pressure by conjugate gradients.
"""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from revprop.errors import near_matches

__all__ = ["GROUP", "KINDS", "SIZE", "load_smoke", "made_smoke", "simulate", "smoke_files", "write_smoke"]

KINDS = ("plume", "obstacle")
GROUP = 8  # simulations that run at once, and lie in one file: a step of eight takes hardly longer than one of one
SIZE = 64  # cells across, and pixels
BEFORE, EVERY = 10, 2  # steps before the first frame is kept, and from frame to frame
Densities = npt.NDArray[np.uint8]


class _Drawn(NamedTuple):
    """What is random about one simulation. Lengths in cells, time in steps; y points upwards."""

    x: float
    y: float
    radius: float
    across: float  # velocity in the inflow region
    upwards: float
    buoyancy: float
    obstacle_x: float
    obstacle_y: float
    obstacle_radius: float
    cold: float  # of the light: 0 is a warm one


def _draw(kind: str, number: int) -> _Drawn:
    uniform = np.random.default_rng([KINDS.index(kind), number]).uniform
    radius = uniform(3, 6)
    if kind == "plume":
        inflow = (uniform(18, 46), uniform(7, 12), radius, uniform(-0.6, 0.6), uniform(0.3, 2.0), uniform(0.06, 0.25))
    else:
        inflow = (uniform(5, 8), uniform(16, 48), radius, uniform(1.2, 2.4), uniform(-0.5, 0.5), uniform(0.0, 0.06))
    return _Drawn(*inflow, uniform(24, 38), uniform(20, 44), uniform(4, 8), uniform(0, 1))


def simulate(
    kind: str, group: int, frames: int, size: int = SIZE, report: Callable[[str], None] = lambda line: None
) -> Densities:
    """Simulates eight smokes at once, each with its own inflow region, inflow velocity and buoyancy. Needs PhiFlow.

    Args:
        kind: "plume": inflow near the floor, buoyant, open above. "obstacle": inflow at the left, hardly buoyant, past a disc,
            open at the right; all other sides are walls.
        group: which eight: simulations ``8 * group`` to ``8 * group + 7``. frames: so many of each, every second step.
        size: cells in each direction; what is random is in units of 64 to the side.
        report: gets a line every 20 steps.

    Returns:
        densities, (8, frames, size, size): 0 is none, 255 that of the inflow; the first row is the top.

    Raises:
        ValueError: an unknown kind. ImportError: PhiFlow is not there.
    """
    _check(kind)
    try:
        flow = importlib.import_module("phi.flow")
    except ImportError as error:
        raise ImportError("simulating smoke needs PhiFlow: pip install 'revprop[smoke]'") from error
    math, extrapolation = flow.math, flow.extrapolation
    drawn = [_draw(kind, GROUP * group + i) for i in range(GROUP)]
    scale = size / SIZE
    lengths = {name: scale for name in ("x", "y", "radius", "obstacle_x", "obstacle_y", "obstacle_radius")}

    def each(name: str) -> Any:
        return math.wrap([lengths.get(name, 1.0) * getattr(d, name) for d in drawn], math.batch("simulation"))

    def vector(x: Any, y: Any) -> Any:
        return math.stack({"x": x, "y": y}, math.channel("vector"))

    walls, obstacles = extrapolation.combine_sides(x=0, y=(0, extrapolation.BOUNDARY)), []
    if kind == "obstacle":
        walls = extrapolation.combine_sides(x=(0, extrapolation.BOUNDARY), y=0)
        disc = flow.Sphere(x=each("obstacle_x"), y=each("obstacle_y"), radius=each("obstacle_radius"))
        obstacles = [flow.Obstacle(disc)]
    grid = {"x": size, "y": size, "bounds": flow.Box(x=size, y=size)}
    smoke = flow.CenteredGrid(0, extrapolation.BOUNDARY, **grid)
    velocity = flow.StaggeredGrid(0, walls, **grid)
    region = flow.Sphere(x=each("x"), y=each("y"), radius=each("radius"))
    inflow = flow.resample(region, to=smoke, soft=True)
    at_faces = flow.resample(inflow, to=velocity)
    blown, lift = vector(each("across"), each("upwards")), vector(0 * each("buoyancy"), each("buoyancy"))
    pressure, kept = None, []
    steps = BEFORE + EVERY * frames
    for step in range(1, steps + 1):
        smoke = flow.advect.mac_cormack(smoke, velocity, 1.0)
        smoke = smoke.with_values(math.maximum(smoke.values, inflow.values))
        velocity = flow.advect.mac_cormack(velocity, velocity, 1.0) + flow.resample(smoke * lift, to=velocity)
        velocity = velocity * (1 - at_faces) + at_faces * blown
        solve = flow.Solve("CG", 1e-3, 1e-3, x0=pressure, max_iterations=2000)
        velocity, pressure = flow.fluid.make_incompressible(velocity, obstacles, solve)
        if step > BEFORE and (step - BEFORE) % EVERY == 0:
            density = smoke.values.numpy("simulation,y,x")[:, ::-1].clip(0, 1)
            kept.append(np.round(255 * density).astype(np.uint8))
        if step % 20 == 0:
            report(f"{kind}, simulations {GROUP * group} to {GROUP * group + GROUP - 1}: step {step} of {steps}")
    return np.stack(kept, axis=1)


def smoke_files(kind: str, simulations: int, folder: Path) -> list[Path]:
    """Where the simulations of a kind lie: a file for every eight.

    >>> [path.name for path in smoke_files("plume", 20, Path("smoke"))]
    ['plume-000-007.npz', 'plume-008-015.npz', 'plume-016-023.npz']
    """
    _check(kind)
    first = range(0, simulations, GROUP)
    return [folder / f"{kind}-{start:03d}-{start + GROUP - 1:03d}.npz" for start in first]


def write_smoke(
    kind: str = "plume",
    simulations: int = 8,
    frames: int = 40,
    folder: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Writes simulations, those that are not there yet; each file appears when it is complete.

    Args:
        kind: "plume" or "obstacle". simulations: at least so many; always whole groups of eight. frames: of each.
        folder: where to; ``smoke`` in :func:`revprop.datasets.data_root` where not given.

    Returns:
        the files. A file of other frames than asked for is written anew if it has fewer.

    Raises:
        ValueError, ImportError: as :func:`simulate` does.
    """
    folder = _folder(folder)
    files = smoke_files(kind, simulations, folder)
    for group, path in enumerate(files):
        if path.exists() and _read(path).shape[1] >= frames:
            continue
        density = simulate(kind, group, frames, report=report)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{path.name}.{uuid.uuid4().hex}.part"
        try:
            with part.open("wb") as file:
                np.savez_compressed(file, density=density)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        report(f"{path}: {density.shape[1]} frames of {density.shape[0]} simulations")
    return files


def load_smoke(kind: str, simulations: int, frames: int, folder: Path | None = None) -> Tensor:
    """Loads simulations that :func:`write_smoke` wrote.

    Args:
        kind: "plume": the density. "obstacle": in colour, before a dark ground and the disc.
        simulations, frames: so many, from the first on. folder: as for :func:`write_smoke`.

    Returns:
        images in [0, 1], (simulations, frames, channels, 64, 64).

    Raises:
        FileNotFoundError: a file is not there; the message has the command that writes it. ValueError: fewer frames than asked
            for, or a file that is not one of these.
    """
    files = smoke_files(kind, simulations, _folder(folder))
    command = f"python -m revprop.datasets.smoke --kind {kind} --simulations {simulations} --frames {frames}"
    missing = [str(path) for path in files if not path.exists()]
    if missing:
        raise FileNotFoundError(
            f"no simulated smoke: {', '.join(missing)}. Set REVPROP_DATA to the folder that holds smoke/, or let {command} "
            "write it, which needs pip install 'revprop[smoke]'"
        )
    found = np.concatenate([_read(path) for path in files])[:simulations]
    if found.shape[1] < frames:
        raise ValueError(
            f"{files[0].parent}: expected {frames} frames, given {found.shape[1]}: let {command} write more"
        )
    density = torch.from_numpy(found[:, :frames]).float() / 255
    if kind == "plume":
        return density[:, :, None]
    return torch.stack([_in_colour(d, _draw(kind, i)) for i, d in enumerate(density)])


def _in_colour(density: Tensor, drawn: _Drawn) -> Tensor:
    """Smoke before a dark ground with a disc in it, lit in the colour that was drawn.

    The share of light that smoke of density d sends back is ``1 - exp(-3 d)``; the ground shows through the rest.

    Args:
        density: (frames, h, w), the first row the top.

    Returns:
        (frames, 3, h, w) in [0, 1].

    >>> pictures = _in_colour(torch.zeros(1, 64, 64), _draw("obstacle", 0))
    >>> pictures.shape, bool((pictures[:, :, 0, 0] == torch.tensor([0.05, 0.07, 0.1])).all())
    (torch.Size([1, 3, 64, 64]), True)
    """
    h, w = density.shape[1:]
    y, x = torch.meshgrid(h - 0.5 - torch.arange(h), torch.arange(w) + 0.5, indexing="ij")
    scale = w / SIZE
    from_disc = (x - scale * drawn.obstacle_x).hypot(y - scale * drawn.obstacle_y)
    disc = from_disc < scale * drawn.obstacle_radius
    ground = torch.where(
        disc, torch.tensor([0.35, 0.33, 0.3])[:, None, None], torch.tensor([0.05, 0.07, 0.1])[:, None, None]
    )
    light = torch.tensor([1.0 - 0.3 * drawn.cold, 0.85, 0.65 + 0.3 * drawn.cold])
    shade = 0.6 + 0.4 * y / h  # light comes from above
    seen = 1 - torch.exp(-3 * density[:, None])
    return seen * (light[:, None, None] * shade) + (1 - seen) * ground


def made_smoke(kind: str, simulations: int, frames: int, size: int = SIZE, seed: int = 0) -> Tensor:
    """Soft round blobs that rise and grow: of the shape of simulated smoke, for trying a program out without any.

    Args:
        kind: "plume": one channel. "obstacle": three, in other colours, drifting sideways. seed: of all that is random.

    Returns:
        images in [0, 1], (simulations, frames, channels, size, size).

    >>> made_smoke("plume", 2, 3, 32).shape, made_smoke("obstacle", 2, 3, 32).shape
    (torch.Size([2, 3, 1, 32, 32]), torch.Size([2, 3, 3, 32, 32]))
    """
    _check(kind)
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(simulations, 3, 1, generator=generator)  # three blobs each

    time = torch.arange(frames) / max(frames - 1, 1)
    moved = time * uniform(0.2, 0.6)
    along, across = uniform(0.1, 0.3) + moved, uniform(0.25, 0.75) + time * uniform(-0.1, 0.1)
    x, y = (across, 1 - along) if kind == "plume" else (along, across)
    width = uniform(0.06, 0.1) + 0.08 * moved
    at = (torch.arange(size) + 0.5) / size
    squares = (at - x[..., None]).square()[..., None, :] + (at - y[..., None]).square()[..., None]
    blobs = torch.exp(-0.5 * squares / width[..., None, None].square())  # simulation, blob, frame, h, w
    density = blobs.sum(1).clamp(max=1)[:, :, None]
    if kind == "plume":
        return density
    colour = 0.5 + 0.5 * torch.rand(simulations, 1, 3, 1, 1, generator=generator)
    return 0.05 + 0.95 * density * colour


def _read(path: Path) -> Densities:
    try:
        with np.load(path) as file:
            density = file["density"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} holds no simulated smoke ({error}): delete it and write it again") from error
    if density.dtype != np.uint8 or density.ndim != 4 or density.shape[0] != GROUP:
        raise ValueError(
            f"{path}: expected uint8 densities of {GROUP} simulations (simulation, frame, row, column), given {density.dtype} "
            f"of shape {density.shape}: delete it and write it again"
        )
    return density


def _folder(given: Path | None) -> Path:
    from revprop.datasets import data_root  # here: nothing else of the package is needed to make smoke

    return data_root() / "smoke" if given is None else given


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(near_matches(kind, KINDS, "kind of smoke"))


def main(kind: str = "plume", simulations: int = 8, frames: int = 40, folder: Path | None = None) -> None:
    """Simulate smoke by PhiFlow and write it down, for racecar/table6 and its figures.

    Args:
        kind: plume or obstacle. simulations: in groups of eight. frames: of each, every second step.
        folder: where to; smoke in the folder that REVPROP_DATA names where not given.
    """
    write_smoke(kind, simulations, frames, folder, print)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
