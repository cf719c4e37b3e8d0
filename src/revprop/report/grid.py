"""The runs of one study, sorted: layers by ways of training them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from revprop.report.aggregation import THEN, Row, RunGroup, group_runs, run_options
from revprop.report.comparison import Paired, compare, correct
from revprop.report.published import PUBLISHED, PUBLISHED_EPOCHS, PublishedTable

Layers = tuple[int, int]

# What runs must share to stand in one table; everything else is a way of training.
STUDY = (
    *("network", "data", "study", "reduced", "samples", "holdout", "classes"),
    *("baseline_epochs", "baseline_learning_rate", "weights", "mean", "std", "damage"),
)


@dataclass(frozen=True)
class Way:
    """One way of training, whatever the layers: a method and its options.

    Args:
        method: "bp", "fr", "solve", or another method's name.
        label: the method and, where it was run with several settings, what these are.
        cells: the runs by layers (lS, lR), in the order of the paper's tables.
    """

    method: str
    label: str
    cells: Mapping[Layers, RunGroup]

    @property
    def groups(self) -> list[RunGroup]:
        """The runs of every cell."""
        return list(self.cells.values())

    @property
    def by_epochs(self) -> bool:
        """Whether it is trained by epochs, so that epochs of several ways compare; the closed form counts sweeps."""
        return self.method.split(THEN)[-1] in ("bp", "fr")

    @property
    def last(self) -> int:
        """The last epoch, or sweep, that any of the runs reports an accuracy for; 0 where none does."""
        return max((group.epochs()[-1] for group in self.groups if group.epochs()), default=0)


@dataclass(frozen=True)
class Grid:
    """The post-training runs of one network on one data set, from one baseline per seed.

    Args:
        rows: the runs.
        ways: the ways of training, BP first.
    """

    rows: tuple[Row, ...]
    ways: tuple[Way, ...]

    @staticmethod
    def of(rows: Sequence[Row]) -> Grid:
        """Sort post-training runs by way and layers.

        Args:
            rows: finished post-training runs, all of one network on one data set.

        Returns:
            The grid.

        Raises:
            ValueError: as :func:`group_runs` does.

        Example:
            >>> runs = [
            ...     {"settings": {"method": method, "seed": 0}, "l_start": 0, "l_stop": stop, "parameters": 52,
            ...      "baseline_accuracy": 0.9, "history": []}
            ...     for method in ("solve", "fr", "bp") for stop in (2, 1)
            ... ]
            >>> [(way.label, list(way.cells)) for way in Grid.of(runs).ways]
            [('BP', [(0, 1), (0, 2)]), ('FR', [(0, 1), (0, 2)]), ('Closed form', [(0, 1), (0, 2)])]
        """
        cells: dict[tuple[str, str], dict[Layers, RunGroup]] = {}
        for group in group_runs(rows):
            cells.setdefault((group.method, group.method_label), {})[group.layers] = group
        order = {"bp": 0, "fr": 1, "solve": 2}
        ways = [Way(method, label, found) for (method, label), found in cells.items()]
        return Grid(tuple(rows), tuple(sorted(ways, key=lambda way: order.get(way.method, 3))))

    @property
    def bp(self) -> Way | None:
        """The BP that the others are compared with: of several, the one with the most runs."""
        return max(self._of("bp"), key=lambda way: sum(len(group.runs) for group in way.groups), default=None)

    @property
    def fr(self) -> list[Way]:
        """The ways of training by FR."""
        return self._of("fr")

    @property
    def others(self) -> list[Way]:
        """Every way but BP."""
        return [way for way in self.ways if way.method != "bp"]

    @property
    def groups_by_epochs(self) -> list[RunGroup]:
        """The runs of BP and FR, in the order of the paper's tables: by lR, then lS, then BP before FR."""
        groups = [group for way in self.ways if way.by_epochs for group in way.groups]
        return sorted(groups, key=lambda group: (group.l_stop, group.l_start))

    @property
    def name(self) -> str:
        """The network and the data set, and whether accuracies are of held-out training images, not of the test set."""
        settings = self.rows[0]["settings"]
        name = " on ".join(str(settings[key]) for key in ("network", "data") if settings.get(key))
        return f"{name}, held-out training images" if settings.get("holdout") else name

    @property
    def epochs(self) -> tuple[int, ...]:
        """The published epochs as far as the runs went, and the last one: what to tabulate of BP and FR."""
        last = max((way.last for way in self.ways if way.by_epochs), default=0)
        return tuple(sorted({epoch for epoch in PUBLISHED_EPOCHS if epoch <= last} | ({last} if last else set())))

    @property
    def published(self) -> PublishedTable | None:
        """The published table of the same network, whatever data ours was trained on."""
        return PUBLISHED.get(str(self.rows[0]["settings"].get("network")))

    @property
    def comparable(self) -> bool:
        """Whether our accuracies may stand beside the published ones: the same network on the same, whole data."""
        settings = self.rows[0]["settings"]
        whole = not any(settings.get(key) for key in ("samples", "holdout", "classes"))
        return self.published is not None and settings.get("data") == settings.get("network") and whole

    def against_bp(self, way: Way, epoch: int | None = None) -> dict[Layers, Paired]:
        """Compare one way with BP in every cell that both have, paired over seeds.

        Args:
            way: the other way.
            epoch: after how many epochs; None for the last of each, epochs here and sweeps there.

        Returns:
            The difference, the way minus BP, by layers; p-values corrected for the number of these cells.

        Example:
            >>> runs = [
            ...     {"settings": {"method": method, "seed": seed}, "l_start": 0, "l_stop": 1, "parameters": 52,
            ...      "baseline_accuracy": 0.5, "history": [{"epoch": 1, "accuracy": accuracy + seed / 8}]}
            ...     for method, accuracy in (("fr", 0.625), ("bp", 0.5)) for seed in (0, 1)
            ... ]
            >>> grid = Grid.of(runs)
            >>> grid.against_bp(grid.fr[0], 1)[0, 1].mean
            12.5
        """
        if self.bp is None:
            return {}
        shared = [layers for layers in way.cells if layers in self.bp.cells]
        pairs = [
            compare(
                way.cells[layers].by_seed(way.last if epoch is None else epoch),
                self.bp.cells[layers].by_seed(self.bp.last if epoch is None else epoch),
            )
            for layers in shared
        ]
        return dict(zip(shared, correct(pairs), strict=True))

    def _of(self, method: str) -> list[Way]:
        return [way for way in self.ways if way.method == method]


def default_way(ways: Sequence[Way]) -> Way:
    """Find the way that the others vary: an ablation changes one option at a time.

    Args:
        ways: at least one, of one method.

    Returns:
        The one whose options agree with those of the others most often; of several, the one in the most cells.

    Example:
        >>> def way(label, **options):
        ...     run = {"settings": {"method": "fr", **options}}
        ...     return Way("fr", label, {(0, 1): RunGroup("fr", 0, 1, "", (run,))})
        >>> default_way([way("a", margin=3), way("b"), way("c", rules="paper")]).label
        'b'
    """
    counts: Counter[tuple[str, str]] = Counter()
    names = {name for way in ways for name in options_of(way)}

    def pairs(way: Way) -> list[tuple[str, str]]:
        options = options_of(way)
        return [(name, json.dumps(options.get(name), default=str)) for name in names]

    for way in ways:
        counts.update(pairs(way))
    return max(ways, key=lambda way: (sum(counts[pair] for pair in pairs(way)), len(way.cells)))


def options_of(way: Way) -> dict[str, object]:
    """The options of a way: what its runs were made with but for what a whole study shares."""
    options = run_options(next(iter(way.cells.values())).runs[0]["settings"])
    return {key: value for key, value in options.items() if key not in ("kind", *STUDY)}


def split_by_study(rows: Sequence[Row]) -> list[list[Row]]:
    """Separate post-training runs that must not stand in one table.

    Args:
        rows: finished runs of any kind.

    Returns:
        The post-training runs, one list for each network, data set, and whatever else a study shares.

    Example:
        >>> runs = [{"settings": {"kind": kind, "data": data}} for kind in ("post-training", "other") for data in "ab"]
        >>> [[run["settings"]["data"] for run in study] for study in split_by_study(runs)]
        [['a'], ['b']]
    """
    studies: dict[str, list[Row]] = {}
    for row in rows:
        if row["settings"].get("kind") == "post-training":
            key = json.dumps([row["settings"].get(name) or None for name in STUDY], default=str)
            studies.setdefault(key, []).append(row)
    return list(studies.values())
