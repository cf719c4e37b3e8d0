"""``revprop racecar``: a network trained so that its own weights, used backwards, give its input back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from revprop.command_model import Model, console
from revprop.experiments import regularised
from revprop.experiments.baseline import build_network
from revprop.experiments.racecar_measures import in_bytes
from revprop.experiments.regularised import Regularised
from revprop.networks import load_weights
from revprop.report import Section, regenerated_inputs, write_page

__all__ = ["Regularise"]


@dataclass(frozen=True)
class Regularise:
    """Train a network so that its own weights, used backwards, give its input back: features that serve other tasks, too."""

    model: tyro.conf.OmitArgPrefixes[Model]
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight: float = 1e-5
    """Of the penalty; 0 trains without it, for comparison."""
    layers: tuple[str, ...] = ()
    """A number s for the first s learned layers, or names of layers or modules; all where not given."""
    reduction: Literal["sum", "mean"] = "sum"
    """sum: half the sum of squares over batch and entries, as published; mean: the mean of squares."""
    share: float = 1.0
    """The share of each batch that is constrained, drawn anew each time."""
    input_activation: Literal["none", "first"] = "none"
    """What the reverse pass ends with: first, that of the first layer as in the paper, for inputs that it can give."""

    def run(self) -> None:
        data = self.model.inputs(self.model.split())
        model = build_network(self.model.network, self.model.seed, len(data.classes))
        if self.model.weights is not None:
            load_weights(model, self.model.weights)
        one = len(self.layers) == 1 and self.layers[0].isdigit()
        settings = Regularised(
            self.epochs,
            self.batch_size,
            self.learning_rate,
            self.weight,
            int(self.layers[0]) if one else self.layers or None,
            self.reduction,
            self.share,
            self.input_activation == "none",
            self.model.seed,
        )
        about = {
            "network": self.model.network,
            "data": self.model.data_name,
            "weights": self.model.weights_name,
        }
        row = regularised.run(model, data, settings, about, self.model.out, self.model.device, progress=True)
        page = self.model.out / f"racecar-{self.model.network.replace(':', '-')}-{self.weight:g}.html"
        shown = in_bytes(**row["pictures"])
        words = (
            f"{100 * row['accuracy']:.2f} % of the test labels are right; the reverse pass gives the input back up to "
            f"{row['error']:.2f}"
        )
        figure = regenerated_inputs(
            {f"weight {self.weight:g}": {**row, "pictures": shown}}, "Given back by the reverse pass"
        )
        lead = f"{self.model.network} on {self.model.data_name}, {self.epochs} epochs with a penalty of weight {self.weight:g} on "
        write_page(
            page,
            "Racecar training",
            f"{lead}{', '.join(row['layers'])}. {words}.",
            [Section("Inputs", figures=[figure])],
        )
        for line in (
            f"constrained: {', '.join(row['layers'])}",
            *([f"run back by recorded values: {', '.join(row['held'])}"] if row["held"] else []),
            f"{words} (|I' - I| / |I|)",
            f"weights: {row['weights']}",
            f"page: {page}",
        ):
            console.print(line, markup=False, highlight=False)
