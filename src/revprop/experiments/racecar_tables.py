"""The settings of the racecar paper's Tables 1 to 5 and Figures 2 to 6 at three scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from revprop.datasets import data_root
from revprop.errors import near_matches
from revprop.experiments.racecar_data import SPHERICAL, find_task
from revprop.experiments.racecar_study import PHASES, PhaseOneWay, RacecarStudy, Schedule
from revprop.recipe import Recipe

__all__ = ["WAYS", "figure", "table"]

WAYS = ("std", "ort", "rr1", "rr", "rr-share")
"""Ways of phase I by name: plain; with SRIP; with the reverse pass of which only the input counts; with all of it; on a share."""

ORTHOGONALITY = 0.01  # the weight of SRIP, which the paper does not tell
SHARE = 0.25
BITS_WEIGHT = 1e-3  # a tenth of what is printed: see _bits

TABLES = {
    1: ("bits", ("A", "AA"), ("std", "ort", "rr1", "rr")),
    2: ("bits", ("AB", "B"), ("std", "ort", "rr1", "rr")),
    3: ("mnist", ("A", "AA"), ("std", "ort", "rr", "rr-share")),
    4: ("mnist", ("AB", "B"), ("std", "ort", "rr", "rr-share")),
    5: ("cifar", PHASES, ("std", "rr")),
}
"""By number: the experiment, the phases that the table shows, and the ways where none are asked for."""

FIGURES = {2: (1, ("A",)), 3: (1, ("AA",)), 4: (2, ("AB", "B")), 5: (3, ("A",)), 6: (3, ("AA", "AB", "B"))}
"""By number: the table whose ways it shows, and the phases."""

SEEDS = {"paper": 5, "reduced": 5, "smoke": 1}
FEWER_CIFAR_SEEDS = 3


def table(number: int, scale: str, seeds: int | None = None, ways: Sequence[str] | None = None) -> RacecarStudy:
    """The settings of one of Tables 1 to 5 at a scale: "smoke", "reduced" or "paper".

    Args:
        seeds: so many runs instead. ways: names in ``WAYS``.

    Raises:
        ValueError: an unknown scale or way, or fewer than one seed.
        FileNotFoundError: neither a task's data nor its stand-in is there.

    >>> study = table(3, "smoke")
    >>> study.network, study.source, study.target, study.phases
    ('racecar-mnist', 'made:mnist', 'made:mnist, motion blur', ('A', 'AA'))
    """
    from revprop.experiments.catalogue import check_scale  # here: the catalogue lists this module

    check_scale(scale, seeds)
    experiment, phases, usual = TABLES[number]
    chosen = tuple(ways or usual)
    for way in chosen:
        if way not in WAYS:
            raise ValueError(near_matches(way, WAYS, "way"))
    # plain training first: it is what trains task B from scratch
    chosen = tuple(way for way in WAYS if way in {"std", *chosen})
    study = {"bits": _bits, "mnist": _mnist, "cifar": _cifar}[experiment](scale, chosen)
    count = FEWER_CIFAR_SEEDS if (experiment, scale) == ("cifar", "reduced") else SEEDS[scale]
    return replace(study, phases=phases, seeds=tuple(range(seeds or count)))


def figure(number: int, scale: str, seeds: int | None = None, ways: Sequence[str] | None = None) -> RacecarStudy:
    """The settings of one of Figures 2 to 6: rows of Tables 1 to 4. Args, raises: as for :func:`table`.

    >>> figure(4, "smoke").phases
    ('AB', 'B')
    """
    number_of_table, phases = FIGURES[number]
    return replace(table(number_of_table, scale, seeds, ways), phases=phases)


def _ways(chosen: Sequence[str], layers: int, weight: float) -> tuple[PhaseOneWay, ...]:
    known = {
        "std": PhaseOneWay("Std"),
        "ort": PhaseOneWay("Ort", orthogonality=ORTHOGONALITY),
        "rr1": PhaseOneWay("RR1", layers, (weight, *(0.0,) * (layers - 1))),
        "rr": PhaseOneWay("RR", layers, weight),
        "rr-share": PhaseOneWay(f"RR, share {SHARE:g}", layers, weight, SHARE),
    }
    return tuple(known[way] for way in chosen)


def _bits(scale: str, ways: Sequence[str]) -> RacecarStudy:
    """The 12-bit task. As printed, the penalty (weight 0.01, half the sum over 512 patterns) outweighs the task; with a tenth,
    phase I gets near the paper's accuracy. The reduced scale takes four times the learning rate in a tenth of the epochs: what
    phase II needs to leave where phase I ends.
    """
    epochs, passes, rate = {"paper": (200, 100, 4e-4), "reduced": (20, 100, 1.5e-3), "smoke": (4, 5, 1.5e-3)}[scale]
    schedule = Schedule(epochs, rate)
    words = f"penalty weight {BITS_WEIGHT:g}"
    if scale != "paper":
        words += f", {epochs * passes:,} epochs, learning rate {rate:g}" + (", a made rule" if scale == "smoke" else "")
    name = f"made:{SPHERICAL}" if scale == "smoke" else _at_hand((SPHERICAL, ""))[0]
    return RacecarStudy(
        "bits",
        "racecar-bits",
        name,
        f"{name}, labels inverted",
        6,
        _ways(ways, 6, BITS_WEIGHT),
        (schedule, schedule, schedule, replace(schedule, epochs=2 * epochs)),
        batch_size=512,
        passes=passes,
        planes=True,
        reduced=words,
    )


def _mnist(scale: str, ways: Sequence[str]) -> RacecarStudy:
    """MNIST, then the same with motion blur. The penalty is a sum over the batch: in smaller ones, its weight is the larger."""
    source, target, words = "made:mnist", "made:mnist, motion blur", "made images of the right shape, 3 epochs"
    if scale != "smoke":
        source, _ = _at_hand(("mnist", ""))
        target, words = _at_hand(("n-mnist", ""), ("mnist, motion blur", "motion-blurred MNIST stands in for n-MNIST"))
    counts, rates = (100, 400, 700, 700), (1e-3, 1e-4, 1e-4, 1e-4)
    batch, samples = {"smoke": 32, "reduced": 16, "paper": 64}[scale], 55_000
    if scale == "reduced":
        counts, rates, samples = (10, 8, 14, 14), (1e-3, 5e-4, 5e-4, 5e-4), 3_000
        fewer = (
            f"{samples:,} training images in batches of {batch}, {', '.join(map(str, counts))} epochs (A, AA, AB, B)"
        )
        fewer += ", learning rate 5e-4 in phase II"
        words = ", ".join(part for part in (words, fewer) if part)
    if scale == "smoke":
        counts, rates, samples = (3, 3, 3, 3), (1e-3, 1e-3, 1e-3, 1e-3), 128
    return RacecarStudy(
        "mnist",
        "racecar-mnist",
        source,
        target,
        3,
        _ways(ways, 3, 1e-5 * 64 / batch),
        tuple(Schedule(count, rate) for count, rate in zip(counts, rates, strict=True)),
        batch_size=batch,
        samples=samples,
        test_samples={"smoke": 100, "reduced": 5_000, "paper": None}[scale],
        measure_every=20 if scale == "paper" else max(counts),
        pictures=8,
        reduced=words,
    )


def _cifar(scale: str, ways: Sequence[str]) -> RacecarStudy:
    """CIFAR-10, then CIFAR-100 or what stands in for it."""
    source, target, words = "made:cifar10", "made:cifar100", "made images of the right shape, 16 channels, 1 epoch"
    if scale != "smoke":
        source, first = _at_hand(("cifar10", ""), ("cifar10-jpeg", "JPEG images of CIFAR-10"))
        stand_in = "ten classes of Tiny ImageNet at 32x32 pixels stand in for CIFAR-100"
        target, second = _at_hand(("cifar100", ""), ("tinyimagenet10, halved", stand_in))
        words = ", ".join(part for part in (first, second) if part)
    if scale == "paper":
        # the optimizer is not told; with these rates, gradient descent
        phase = Schedule(180, 0.1, Recipe("sgd", ((80, 0.1), (40, 0.01), (60, 0.001))))
        transfer = Schedule(50, 0.1, Recipe("sgd"))
        schedules: tuple[Schedule, ...] = (phase, phase, transfer, transfer)
        samples, network = None, "racecar-cifar"
    else:
        counts = (1, 1, 1, 1) if scale == "smoke" else (8, 8, 8, 8)
        schedules = tuple(Schedule(count, 2e-3, Recipe(one_cycle=True)) for count in counts)
        samples, network = (64 if scale == "smoke" else 4_000), "racecar-cifar-narrow"
        if scale == "reduced":
            fewer = f"a quarter of the channels, {samples:,} training images, {counts[0]} epochs of Adam in each phase"
            words = ", ".join(part for part in (words, fewer) if part)
    return RacecarStudy(
        "cifar",
        network,
        source,
        target,
        13,
        _ways(ways, 13, 1e-7),
        schedules,
        batch_size=32 if scale == "smoke" else 200 if scale == "paper" else 100,
        samples=samples,
        test_samples={"smoke": 64, "reduced": 4_000, "paper": None}[scale],
        new_head="fc3",
        measure_every=max(schedule.epochs for schedule in schedules) if scale != "paper" else 10,
        pictures=6,
        reduced=words,
    )


def _at_hand(*choices: tuple[str, str]) -> tuple[str, str]:
    """The first of some tasks whose data is there, and the words for it."""
    for name, words in choices:
        if find_task(name.partition(", ")[0]) is not None:
            return name, words
    names = " nor ".join(repr(name) for name, _ in choices)
    raise FileNotFoundError(
        f"no data for {names} in {data_root()}: set REVPROP_DATA to the folder that holds it (docs/data.md says in which form); "
        "--scale smoke needs none"
    )
