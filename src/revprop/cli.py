"""The command line: parses, calls, prints. ``revprop --help`` lists the commands."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from safetensors import SafetensorError

from revprop import reverse
from revprop.align_command import Align
from revprop.closed_form import ClosedForm
from revprop.command_model import Model, console
from revprop.experiments import demo, diagnosis_run, post_training_grid
from revprop.experiments.baseline import Baseline, build_network
from revprop.experiments.catalogue import CATALOGUE, settings_of, study
from revprop.experiments.post_training_grid import Way
from revprop.explain_command import Explain
from revprop.graph import Graph, trace
from revprop.networks import load_weights
from revprop.racecar_command import Regularise
from revprop.report import (
    diagnosis_table,
    reconstruction_table,
    study_tables,
    write_figures,
    write_markdown,
    write_report,
)
from revprop.runs import RunStore
from revprop.settings import Settings

__all__ = ["main"]


@dataclass(frozen=True)
class Demo:
    """Train a small network on handwritten digits, diagnose it, post-train every module, write a report."""

    out: Path = Path("out/demo")
    """Folder for results; running again continues."""
    seed: int = 0
    device: str = "cpu"

    def run(self) -> None:
        rows = demo.run(
            demo.Demo(Baseline("digits", "digits", 40, 64, seed=self.seed)), self.out, self.device, console.print
        )
        console.print(diagnosis_table([{**layer, "active": rows[0]["wrong"]} for layer in rows[0]["layers"]]).to_rich())
        for table in study_tables(rows):
            console.print(table.to_rich())
        console.print(f"report: {write_report(self.out, title='revprop demo: handwritten digits')}")


@dataclass(frozen=True)
class Check:
    """Which operators of a network can be reversed in closed form."""

    network: Annotated[str, tyro.conf.Positional] = "resnet20"
    """A name, or package.module:factory."""
    weights: Path | None = None
    """A safetensors file or weights-only checkpoint."""
    shape: tuple[int, ...] | None = None
    """One input's shape without the batch, e.g. 3 32 32; the built-in networks know theirs."""
    seed: int = 0

    def run(self) -> None:
        model = build_network(self.network, self.seed).eval()
        if self.weights:
            load_weights(model, self.weights)
        shape = self.shape or SHAPES.get(self.network)
        if shape is None:
            raise ValueError(f"the input shape of {self.network!r} is not known: give --shape, e.g. --shape 3 32 32")
        generator = torch.Generator().manual_seed(self.seed)
        graph = trace(model, torch.zeros(2, *shape))
        coverage = reverse.check(graph)
        console.print(str(coverage), highlight=False)
        if coverage.covered:
            x = torch.randn(2, *shape, generator=generator)
            console.print(
                f"reversing its own output returns its own features: largest deviation {_own_deviation(graph, x):.1e}"
            )


@dataclass(frozen=True)
class Diagnose:
    """How far each layer's features are from the nearest ones that give the label."""

    model: tyro.conf.OmitArgPrefixes[Model]
    layers: tuple[str, ...] = ()
    """Layer names; the network's blocks where not given."""
    samples: int = 1000
    """So many of the test set."""
    strategy: Literal["global", "greedy"] = "global"
    rules: Literal["nearest", "paper"] = "nearest"
    damping: float = 0.01
    refine: int = 0
    """greedy: so many sweeps that walk back what is still missing."""

    def run(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples: expected at least 1, given {self.samples}")
        model, data, _ = self.model.load()
        graph = trace(model, data.test[0][:2])
        about = {
            "network": self.model.network,
            "data": self.model.data_name,
            "weights": self.model.weights_name,
            "samples": self.samples,
            "seed": self.model.seed,
            "epochs": self.model.baseline_epochs,
        }
        row = diagnosis_run.run(
            graph,
            (data.test[0][: self.samples], data.test[1][: self.samples]),
            about,
            self.model.out,
            self.layers or None,
            Settings(rules=self.rules, strategy=self.strategy, damping=self.damping, refine=self.refine),
        )
        console.print(f"{100 * row['accuracy']:.2f} % of {row['samples']} test samples are right")
        console.print(diagnosis_table([{**layer, "active": row["wrong"]} for layer in row["layers"]]).to_rich())


@dataclass(frozen=True)
class PostTrain:
    """Train the modules after --start up to --stop towards their wanted features, everything else frozen."""

    model: tyro.conf.OmitArgPrefixes[Model]
    start: str = "input"
    stop: str = "output"
    method: Literal["fr", "bp", "solve", "both"] = "both"
    """fr: towards wanted features; bp: by back-propagation; solve: in closed form; both: bp and fr."""
    alpha: float = 0.1
    """Share of the reconstruction loss."""
    epochs: int = 10
    learning_rate: float = 1e-3
    embedding: Literal["nearest", "maximum", "one_hot"] = "nearest"
    strategy: Literal["global", "greedy"] = "global"
    rules: Literal["nearest", "paper"] = "nearest"
    damping: float = 0.01
    solver: Literal["fft", "exact"] = "fft"
    margin: float = 0.0
    blocks: tuple[str, ...] = ()
    """greedy: layers reversed as one map each."""
    refine: int = 0
    """greedy: so many sweeps that walk back what is still missing."""
    rescale: bool = False
    """Divide the reconstruction loss by the variance of the wanted features."""
    refresh: int | None = None
    """Compute the wanted features anew after so many epochs."""
    closed_form: ClosedForm = ClosedForm()

    def run(self) -> None:
        from revprop.experiments.post_training_run import PostTrainingRun, run

        model, data, _ = self.model.load()
        rate = {"learning_rate": self.learning_rate}
        names = (
            "embedding",
            "strategy",
            "rules",
            "damping",
            "solver",
            "margin",
            "blocks",
            "refine",
            "rescale",
            "refresh",
        )
        ways = {
            "bp": Way("bp", rate),
            "fr": Way("fr", rate | {name: getattr(self, name) for name in names}),
            "solve": Way("solve", {"closed_form": self.closed_form, "embedding": self.embedding}),
        }
        about = (self.model.network, self.model.data_name, self.model.weights_name, self.model.baseline_epochs)
        rows = []
        for method in ("bp", "fr") if self.method == "both" else (self.method,):
            settings = PostTrainingRun(
                *about, self.start, self.stop, ways[method], self.alpha, self.epochs, self.model.seed
            )
            rows.append(run(settings, model, data, self.model.out, self.model.device))
        for table in study_tables(rows):
            console.print(table.to_rich())
        console.print(f"trained weights: {', '.join(row['weights'] for row in rows)}")


@dataclass(frozen=True)
class Reproduce:
    """Run a published experiment, or one of the project's own; the same command again continues."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=f"One of {', '.join(CATALOGUE)}.")]
    scale: Literal["smoke", "reduced", "paper"] = "reduced"
    """smoke: within a minute, without data; reduced: fewer runs, images and epochs; paper: as published."""
    seeds: int | None = None
    """So many runs of each cell; by scale where not given (paper: 10)."""
    data: str | None = None
    """Another data set for a table's network: a name, or a path."""
    ways: tuple[str, ...] | None = None
    """How a table post-trains: some of bp, fr-paper (as published), fr (towards the nearest features), solve."""
    network: str | None = None
    """racecar/figure10 to 13: another network, a name or package.module:factory."""
    weights: tuple[str, ...] | None = None
    """racecar/figure10 to 13: files of its trained weights, compared under their names."""
    workers: int | None = None
    """So many runs at once; where not given, one per GPU or else one per core."""
    engine: Literal["local", "ray"] = "local"
    """Where runs go: processes of this machine, or a Ray cluster."""
    out: Path = Path("out/reproduce")
    device: str = "auto"

    def run(self) -> None:
        others = {name: getattr(self, name) for name in ("data", "ways", "network", "weights")}
        settings = settings_of(self.name, self.scale, self.seeds, **others)
        # experiments of one paper share their baselines, and rows where they ask for the same
        paper, _, experiment = self.name.partition("/")
        folder = self.out / (paper if self.scale == "paper" else f"{paper}-{self.scale}")
        rows = CATALOGUE[self.name].run(
            settings, folder, device=self.device, report=_line, workers=self.workers, engine=self.engine
        )
        quality = self.name.startswith("design/")
        for table in [reconstruction_table(rows)] if quality else study_tables(rows):
            console.print(table.to_rich())
        page = write_report(folder, folder / f"{experiment}.html", self.name, rows)
        console.print(f"report: {page}")


@dataclass(frozen=True)
class Study:
    """Post-train every module of a network of your own by several ways, from the same baselines, and compare them."""

    model: tyro.conf.OmitArgPrefixes[Model]
    ways: tuple[str, ...] = ("bp", "fr")
    """Some of bp, fr-paper (as published), fr (towards the nearest features), solve (in closed form)."""
    cells: tuple[str, ...] = ()
    """Modules as START:STOP, e.g. input:conv1 conv1:fc1; every pair of the network's blocks where not given."""
    alpha: float = 0.1
    """Share of the reconstruction loss."""
    scale: Literal["smoke", "reduced", "paper"] = "reduced"
    """Runs, epochs and training images: 1, 1, 500; 3, 5, 5,000; or 10, 10, all."""
    epochs: int | None = None
    """So many epochs of post-training instead."""
    seeds: int | None = None
    """So many runs of each cell instead."""
    workers: int | None = None
    """So many runs at once; where not given, one per GPU or else one per core."""
    engine: Literal["local", "ray"] = "local"
    """Where runs go: processes of this machine, or a Ray cluster."""

    def run(self) -> None:
        wrong = [cell for cell in self.cells if cell.count(":") != 1]
        if wrong:
            raise ValueError(f"cells: expected START:STOP, e.g. input:conv1, given {', '.join(wrong)}")
        cells = [(start, stop) for start, _, stop in (cell.partition(":") for cell in self.cells)]
        model = self.model
        baseline = Baseline(
            model.network,
            model.data,
            model.baseline_epochs,
            weights=str(model.weights or ""),
            mean=model.mean,
            std=model.std,
        )
        grid = study(baseline, self.scale, self.seeds, self.epochs, self.alpha, self.ways, cells or None)
        grid = replace(grid, seeds=tuple(model.seed + seed for seed in grid.seeds))
        rows = post_training_grid.run(
            grid, model.out, device=model.device, report=_line, workers=self.workers, engine=self.engine
        )
        for table in study_tables(rows):
            console.print(table.to_rich())
        console.print(f"report: {write_report(model.out, title=f'{model.network} on {model.data}')}")


@dataclass(frozen=True)
class Report:
    """Write one self-contained page of everything a folder of runs holds."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs; each gets its own report.html."""
    markdown: Path | None = None
    """Write the tables of all of them to this Markdown file as well."""
    figures: Path | None = None
    """Write their figures to this folder as SVG files as well, in a folder each where there are several."""

    def run(self) -> None:
        if not self.folders:
            raise ValueError("give the folder of some runs, e.g. out/demo")
        for folder in self.folders:
            console.print(f"report: {write_report(folder)} ({len(RunStore(folder / 'rows').rows())} finished runs)")
            if self.figures:
                # figures are numbered by folder: one folder's must not replace another's
                place = self.figures if len(self.folders) == 1 else self.figures / folder.name
                console.print(f"figures: {', '.join(str(p) for p in write_figures(folder, place))}")
        if self.markdown:
            console.print(f"tables: {write_markdown(self.folders, self.markdown)}")


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
    | Annotated[Explain, tyro.conf.subcommand("explain")]
    | Annotated[Align, tyro.conf.subcommand("align")]
    | Annotated[PostTrain, tyro.conf.subcommand("post-train")]
    | Annotated[Regularise, tyro.conf.subcommand("racecar")]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    | Annotated[Study, tyro.conf.subcommand("study")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)

SHAPES = {
    "digits": (1, 8, 8),
    **dict.fromkeys(("mnist", "mnist-lenet", "vit-mnist", "racecar-mnist"), (1, 28, 28)),
    **dict.fromkeys(("cifar10", "cifar10-reversed", "cifar10-simple-cnn", "cifar100"), (3, 32, 32)),
    **dict.fromkeys(("resnet20", "resnet32", "vgg7", "resnet20-wide", "resnet20-fixup"), (3, 32, 32)),
    **dict.fromkeys(("racecar-cifar", "racecar-cifar-narrow"), (3, 32, 32)),
    "racecar-bits": (12,),
    **dict.fromkeys(("tiny-imagenet", "vgg-small"), (3, 64, 64)),
    "imagenette": (3, 224, 224),
    "imagewoof": (3, 224, 224),
    "resnet18": (3, 224, 224),
}


def _line(line: str) -> None:
    console.print(line, markup=False, highlight=False)


def _own_deviation(graph: Graph, x: torch.Tensor) -> float:
    from revprop.reconstruction import reconstruct

    with torch.no_grad():
        own = reconstruct(graph, x, target=graph(x), strategy="greedy")
    return max(float(value.max()) for value in own.deviation.values())


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 with one line on standard error where the input is at fault."""
    sys.path.insert(0, str(Path.cwd()))  # so that a user's own package.module:factory is found
    try:
        tyro.cli(Command, args=arguments, prog="revprop", description="Run trained neural networks backwards.").run()
    except (ValueError, KeyError, OSError, ImportError, NotImplementedError, RuntimeError, SafetensorError) as error:
        print(f"revprop: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("revprop: stopped; the same command continues from the last finished run", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
