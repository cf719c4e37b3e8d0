"""One network trained with racecar's penalty on some data: what ``revprop racecar`` runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from revprop.experiments.baseline import Data, save_weights
from revprop.graph import trace
from revprop.racecar import Racecar
from revprop.runs import RunStore
from revprop.tasks import Classification
from revprop.training import Training, accuracy_of, fit

__all__ = ["Regularised", "run"]


@dataclass(frozen=True)
class Regularised:
    """How a network is trained with the penalty.

    Attributes:
        weight, layers, reduction, share: as :class:`revprop.Racecar` takes them; a weight of 0 trains without it.
        signed: whether the reverse pass ends without an activation, for inputs that the first layer's cannot give.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight: float = 1e-5
    layers: int | tuple[str, ...] | None = None
    reduction: str = "sum"
    share: float = 1.0
    signed: bool = True
    seed: int = 0

    def penalty(self, model: Any, example: Tensor | None = None, seed: int = 0) -> Racecar:
        """The penalty for a network or its graph."""
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        return Racecar(
            model,
            example,
            weight=self.weight,
            layers=layers,
            reduction=self.reduction,  # type: ignore[arg-type]
            share=self.share,
            seed=seed,
            input_activation=None if self.signed else "first",
        )


def run(
    model: nn.Module,
    data: Data,
    settings: Regularised,
    about: dict[str, Any],
    folder: Path,
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Trains a network, in place, or continues where an interrupted run stopped; its row and weights are kept in the folder.

    Args:
        about: what the row says of the network and the data. folder: ``rows``, and the weights beside them.

    Returns:
        The row: "accuracy", "error" (|I' - I| / |I| of the test inputs, by the reverse pass), "layers", "weights" (their file),
        "pictures" (eight test inputs and what came back of them).

    Raises:
        ValueError: as :class:`revprop.Racecar`. TrainingDivergedError: as :func:`revprop.training.fit`.
    """
    row_settings = {"kind": "racecar-run", **about, **asdict(settings)}
    store = RunStore(folder / "rows")
    weights = folder / "weights" / f"racecar-{store.key(row_settings)}.safetensors"
    training = Training(
        settings.epochs,
        settings.batch_size,
        settings.learning_rate,
        settings.seed,
        device,
        checkpoint=weights.with_suffix(""),
        progress=progress,
    )
    model.to(training.fabric().device)
    place = next(model.parameters()).device
    graph = trace(model, data.train[0][:2].to(place))
    penalty = settings.penalty(graph)
    apart = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())

    def begin(epoch: int) -> None:
        nonlocal penalty
        if settings.share < 1:  # draws are by the epoch: a run that is continued draws as one that was not
            penalty = settings.penalty(graph, seed=1_000_003 * settings.seed + epoch)

    def loss(module: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        module.train()
        if settings.weight == 0:
            return {"loss": nn.functional.cross_entropy(module(batch[0]), batch[1])}
        output, value = (module(batch[0]), penalty(batch[0])) if apart else penalty.with_output(batch[0])
        task = nn.functional.cross_entropy(output, batch[1])
        return {"loss": task + value, "task": task, "penalty": value}

    def evaluate() -> float:
        model.eval()
        parts = ((x.to(place), y.to(place)) for x, y in zip(*(part.split(256) for part in data.test), strict=True))
        return accuracy_of(model, parts, Classification())

    history = fit(model, data.train, loss, training, evaluate, row_settings, "racecar", begin).history
    model.eval()
    shown = data.test[0][:1000].to(place)
    back = penalty.regenerate(shown)["input"]
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_weights(model, weights)
    row = {
        "accuracy": history[-1].accuracy,
        "error": float((back - shown).norm() / shown.norm()),
        "layers": list(penalty.layers),
        "held": list(penalty.held),
        "seconds": sum(epoch.seconds for epoch in history),
        "weights": str(weights),
        "pictures": {"original": shown[:8].cpu(), "regenerated": back[:8].cpu()},
    }
    store.put(row_settings, {name: value for name, value in row.items() if name != "pictures"})
    return row
