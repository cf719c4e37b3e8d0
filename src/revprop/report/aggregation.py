"""Finished runs and diagnoses, averaged over seeds and samples: what tables and figures show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from revprop.closed_form import ClosedForm

Row = Mapping[str, Any]

METHOD_NAMES = {"fr": "FR", "bp": "BP", "solve": "Closed form"}
NEEDED_IN_A_RUN = ("settings", "l_start", "l_stop", "parameters", "baseline_accuracy", "history")
NO_RUNS = "there is no finished post-training run to report: run some first, and check that this is their folder"

# between the methods of a run that trains by one and then goes on by another
THEN = "+"
# settings that say which run it is, not how it was run
WHICH_RUN = ("seed", "start", "stop")
# settings whose values say what they are
SPEAKING = ("embedding", "rules", "solver", "strategy")


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in their seed alone: one line of a table, one curve of a figure.

    Args:
        method: "fr", "bp", or another method's name; "solve+fr" for one after the other.
        l_start: the number of the last frozen layer in front (0: none).
        l_stop: the number of the last trained layer.
        variant: where runs of the same method have other settings too: which ones these have.
        runs: their rows.

    Example:
        >>> RunGroup("fr", 0, 3, "alpha=0.5", ()).label
        'FR (0, 3), alpha=0.5'
    """

    method: str
    l_start: int
    l_stop: int
    variant: str
    runs: tuple[Row, ...]

    @property
    def method_label(self) -> str:
        """The method, and the variant if there is one, to be read."""
        return ", ".join(part for part in (method_name(self.method), self.variant) if part)

    @property
    def label(self) -> str:
        """The method, the layers as (lS, lR), and the variant if there is one, to be read."""
        label = f"{method_name(self.method)} ({self.l_start}, {self.l_stop})"
        return f"{label}, {self.variant}" if self.variant else label

    @property
    def layers(self) -> tuple[int, int]:
        """The layers, (lS, lR)."""
        return self.l_start, self.l_stop

    def epochs(self) -> list[int]:
        """The epochs that any of the runs reports an accuracy for, in order; of the closed form, its sweeps."""
        return sorted(
            {int(entry["epoch"]) for run in self.runs for entry in run["history"] if entry.get("accuracy") is not None}
        )

    def accuracies(self, epoch: int) -> list[float]:
        """Collect the test accuracy in percent after an epoch, one value per run that got so far.

        Args:
            epoch: the number of epochs trained.

        Returns:
            Percent, in the order of the runs.

        Raises:
            ValueError: an accuracy is no share between 0 and 1.

        Example:
            >>> RunGroup("fr", 0, 1, "", ({"history": [{"epoch": 5, "accuracy": 0.75}]},)).accuracies(5)
            [75.0]
        """
        return [accuracy for run in self.runs if (accuracy := self._accuracy(run, epoch)) is not None]

    def by_seed(self, epoch: int | None) -> dict[int, float]:
        """Collect the test accuracy in percent after an epoch, or of the baseline, by seed.

        Args:
            epoch: the number of epochs trained; None for the baseline's accuracy.

        Returns:
            Percent by seed, for the runs that got so far.

        Raises:
            ValueError: an accuracy is no share between 0 and 1.

        Example:
            >>> run = {"settings": {"seed": 3}, "baseline_accuracy": 0.5, "history": [{"epoch": 5, "accuracy": 0.75}]}
            >>> group = RunGroup("fr", 0, 1, "", (run,))
            >>> group.by_seed(5), group.by_seed(6), group.by_seed(None)
            ({3: 75.0}, {}, {3: 50.0})
        """
        found = {}
        for run in self.runs:
            accuracy = 100.0 * run["baseline_accuracy"] if epoch is None else self._accuracy(run, epoch)
            if accuracy is not None:
                found[int(run["settings"].get("seed", 0))] = accuracy
        return found

    def seconds(self, epoch: int | None = None) -> list[float]:
        """Add up the seconds of each run: the wanted features, and the epochs up to the one given.

        Args:
            epoch: the last epoch to count; None for all.

        Returns:
            Seconds, in the order of the runs; runs that do not tell are left out.

        Example:
            >>> run = {"target_seconds": 2.0, "seconds": 4.0, "history": [{"epoch": e, "seconds": 1.0} for e in (1, 2)]}
            >>> RunGroup("fr", 0, 1, "", (run,)).seconds(), RunGroup("fr", 0, 1, "", (run,)).seconds(1)
            ([6.0], [3.0])
        """
        found = []
        for run in self.runs:
            if run.get("seconds") is not None:
                spent = (
                    run["seconds"]
                    if epoch is None
                    else sum(entry.get("seconds") or 0.0 for entry in run["history"] if entry["epoch"] <= epoch)
                )
                before = run.get("first") or {}  # another training that this one goes on from
                parts = (spent, run.get("target_seconds"), before.get("seconds"), before.get("target_seconds"))
                found.append(float(sum(part or 0.0 for part in parts)))
        return found

    def peak_memory(self) -> dict[int, float]:
        """The peak memory of each run in MB (of 10^6 bytes) by seed, for the runs that tell it."""
        return {
            int(run["settings"].get("seed", 0)): max(
                run["peak_memory_bytes"], (run.get("first") or {}).get("peak_memory_bytes") or 0
            )
            / 1e6
            for run in self.runs
            if run.get("peak_memory_bytes")
        }

    def _accuracy(self, run: Row, epoch: int) -> float | None:
        for entry in run["history"]:
            if entry["epoch"] == epoch and entry.get("accuracy") is not None:
                if not 0 <= entry["accuracy"] <= 1:
                    raise ValueError(
                        f"{self.label} has accuracy {entry['accuracy']} at epoch {epoch}: a share in [0, 1] was expected"
                    )
                return 100.0 * float(entry["accuracy"])
        return None


def group_runs(rows: Sequence[Row]) -> list[RunGroup]:
    """Sort post-training runs into groups that differ in the seed alone, in the order of the paper's tables.

    Args:
        rows: finished post-training runs, all of one network on one data set.

    Returns:
        The groups, by l_stop, then l_start, then BP before FR. Where a method was run with several settings, all its
        groups name those that vary, in every cell alike.

    Raises:
        ValueError: there is no run; a row is no post-training run; runs of several networks or data sets are mixed.

    Example:
        >>> runs = [
        ...     {"settings": {"method": method, "seed": seed}, "l_start": 0, "l_stop": 1, "parameters": 52,
        ...      "baseline_accuracy": 0.9, "history": []}
        ...     for method in ("fr", "bp") for seed in (0, 1, 2)
        ... ]
        >>> [(group.label, len(group.runs)) for group in group_runs(runs)]
        [('BP (0, 1)', 3), ('FR (0, 1)', 3)]
    """
    if not rows:
        raise ValueError(NO_RUNS)
    for number, row in enumerate(rows):
        missing = [key for key in NEEDED_IN_A_RUN if key not in row]
        missing += [] if "settings" in missing or "method" in row["settings"] else ["settings.method"]
        if missing:
            raise ValueError(f"row {number} is no post-training run: it has no {', '.join(missing)}")
    for key in ("data", "network"):
        found = sorted({str(row["settings"].get(key)) for row in rows})
        if len(found) > 1:
            raise ValueError(f"runs of several settings.{key} cannot be compared in one place: {', '.join(found)}")

    # Averaging runs over anything but seeds would present a mixture as a result.
    members: dict[tuple[int, int, str, str], list[Row]] = {}
    options: dict[str, dict[str, Mapping[str, Any]]] = {}  # by method and canonical text
    for row in rows:
        given = run_options(row["settings"])
        text = json.dumps(given, sort_keys=True, default=str)
        options.setdefault(given["method"], {})[text] = given
        members.setdefault((row["l_stop"], row["l_start"], given["method"], text), []).append(row)
    variants = {}
    for method, same in options.items():
        names = sorted({key for one in same.values() for key in one})
        varying = [name for name in names if len({json.dumps(s.get(name), default=str) for s in same.values()}) > 1]
        for text, one in same.items():
            variants[method, text] = describe_options({name: one.get(name) for name in varying})
    groups = []
    for (l_stop, l_start, method, text), runs in sorted(members.items(), key=lambda item: item[0][:3]):
        groups.append(RunGroup(method, l_start, l_stop, variants[method, text], tuple(runs)))
    return groups


def run_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give what a run was made with, whichever run it is: without its seed and layers, and options that are None.

    Args:
        settings: those of its row. Under `first` may be those of a training that it goes on from.

    Returns:
        Values by name; `method` names all trainings in turn, and options of the first ones begin with "first".

    Example:
        >>> run_options({"method": "fr", "alpha": 0.1, "seed": 3, "first": {"method": "solve", "margin": 6}})
        {'method': 'solve+fr', 'alpha': 0.1, 'first margin': 6}
    """
    found = {
        key: value
        for key, value in (dict(settings) | _closed_form(settings.get("closed_form"))).items()
        if key not in (*WHICH_RUN, "first", "closed_form") and value is not None
    }
    if settings.get("first"):
        before = run_options(settings["first"])
        found["method"] = f"{before.pop('method')}{THEN}{found['method']}"
        found |= {f"first {key}": value for key, value in before.items()}
    return found


def _closed_form(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of the closed form by themselves: the one margin and damping, and of the others those not as usual."""
    if given is None:
        return {}
    usual = asdict(ClosedForm())
    found = {key: value for key, value in given.items() if key in usual and value != usual[key]}
    for name, values in (("margin", given["margins"]), ("damping", given["dampings"])):
        found.pop(f"{name}s", None)
        found[name] = values[0] if len(values) == 1 else values
    return found


def method_name(method: str) -> str:
    """Name a method, or one after the other, to be read.

    Args:
        method: as a :class:`RunGroup` has it.

    Returns:
        Its name.

    Example:
        >>> method_name("bp"), method_name("solve+fr"), method_name("mine")
        ('BP', 'Closed form, then FR', 'mine')
    """
    return ", then ".join(METHOD_NAMES.get(part, part) for part in method.split(THEN))


def describe_options(options: Mapping[str, Any]) -> str:
    """Name options and their values, to be read; a value that says what it is stands alone, None is left out.

    Args:
        options: values by name.

    Returns:
        The text.

    Example:
        >>> describe_options({"alpha": 0.5, "margin": None, "strategy": "greedy"})
        'alpha=0.5, greedy'
    """
    return ", ".join(
        _value(value) if name in SPEAKING else f"{name}={_value(value)}"
        for name, value in options.items()
        if value is not None
    )


@dataclass(frozen=True)
class LayerSummary:
    """What a diagnosis says of one layer, over its samples.

    Args:
        layer: the name of the layer.
        deviation: mean of |wanted - recorded| / |recorded| over all samples.
        deviation_wrong: the same over the samples that the network gets wrong; None where that is not known, or none.
        reached: share of samples whose wanted features, run forward, give the label; None where that is not known.
    """

    layer: str
    deviation: float
    deviation_wrong: float | None
    reached: float | None


def summarise_diagnosis(diagnosis: Sequence[Mapping[str, Any]]) -> list[LayerSummary]:
    """Average a diagnosis over its samples.

    Args:
        diagnosis: per layer, `layer` (its name), `deviation` (|wanted - recorded| / |recorded| per sample, or their
            mean), `reached` (per sample whether the wanted features, run forward, give the label; or their share) and,
            optional and per sample, `active` (true where the network is wrong, so that something was wanted of it).

    Returns:
        One summary per layer, in the order given.

    Raises:
        ValueError: there is no layer; a part is missing, or its length is not that of the others.

    Example:
        >>> fc1 = {"layer": "fc1", "deviation": [0.5, 0, 0, 0], "reached": 0.75, "active": [1, 0, 0, 0]}
        >>> summarise_diagnosis([fc1])
        [LayerSummary(layer='fc1', deviation=0.125, deviation_wrong=0.5, reached=0.75)]
    """
    if not diagnosis:
        raise ValueError("the diagnosis has no layer: there is nothing to report")
    summaries = []
    for number, entry in enumerate(diagnosis):
        missing = [key for key in ("layer", "deviation") if entry.get(key) is None]
        if missing:
            raise ValueError(f"entry {number} of the diagnosis has no {', '.join(missing)}")
        layer = str(entry["layer"])
        deviation = np.asarray(entry["deviation"], dtype=float)
        reached = None if entry.get("reached") is None else np.asarray(entry["reached"], dtype=float)
        active = None if entry.get("active") is None else np.asarray(entry["active"], dtype=bool)
        for name, values in (("deviation", deviation), ("reached", reached)):
            if values is not None and (values.ndim > 1 or values.size == 0):
                raise ValueError(
                    f"{name} of {layer} has shape {values.shape}: one value per sample, or one, was expected"
                )
        if active is not None and active.shape != deviation.shape:
            raise ValueError(
                f"active of {layer} has shape {active.shape}, its deviation {deviation.shape}: one per sample each"
            )
        wrong = None if active is None or not active.any() else float(deviation[active].mean())
        share = None if reached is None else float(reached.mean())
        summaries.append(LayerSummary(layer, float(deviation.mean()), wrong, share))
    return summaries


def three_digits(number: float) -> str:
    """Print a number that may be small or large with three significant digits, trailing zeros kept.

    Args:
        number: any number.

    Returns:
        Its text.

    Example:
        >>> three_digits(0.5), three_digits(0.012345), three_digits(1234.5)
        ('0.500', '0.0123', '1,234')
    """
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:#.3g}"


def _value(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, default=str)
