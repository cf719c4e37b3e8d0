"""The diagnosis against numbers recomputed from reconstructions, the rest of the network run by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import Residual, changed, digits, digits_network, residual_data, state_of

from revprop import NonFiniteError, diagnose, reconstruct, trace
from revprop.diagnosis import Diagnosis, blocks
from revprop.graph import Graph
from revprop.settings import Settings

BLOCKS = ("conv1", "conv2", "fc1", "fc2")
WAYS = [
    Settings(),
    Settings(margin=0.5),
    Settings(strategy="greedy"),
    Settings(strategy="greedy", rules="paper", embedding="one_hot"),
]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(digits_network(), digits().test[0][:2])


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def forward_from(model: nn.Module, layer: str, features: Tensor) -> Tensor:
    """Runs what is behind a block of the digits network."""
    for name, block in list(model.named_children())[BLOCKS.index(layer) + 1 :]:
        features = block(features.flatten(1) if name == "fc1" else features)
    return features


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_values_recomputed(graph: Graph, way: Settings) -> None:
    x, y = digits().test
    report = diagnose(graph, batches(x, y, 50), settings=way)
    assert tuple(d.layer for d in report.layers) == BLOCKS
    rec = reconstruct(graph, x, y, to=BLOCKS, **vars(way))
    with torch.no_grad():
        assert torch.equal(report.wrong, graph.model(x).argmax(1) != y)
        for found in report.layers:
            wanted, recorded = rec[found.layer], rec.recorded[found.layer]
            size = (wanted - recorded).flatten(1).norm(dim=1) / recorded.flatten(1).norm(dim=1)
            torch.testing.assert_close(found.deviation, size, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(found.maps.float(), (wanted - recorded).abs().mean(0), rtol=1e-3, atol=1e-5)
            assert found.maps.shape == recorded.shape[1:]
            logits = forward_from(graph.model, found.layer, wanted)
            own = logits.gather(1, y[:, None]).squeeze(1)
            slack = 1e-4 * logits.abs().amax(1).clamp_min(1.0)  # a tie is reached, as far as single precision tells
            assert torch.equal(found.reached, own >= logits.amax(1) - slack)
            assert (found.steps is None) == (way.strategy == "greedy")
            if found.steps is not None:
                assert torch.equal(
                    found.steps,
                    torch.cat(
                        [
                            reconstruct(graph, a, b, to=found.layer, **vars(way)).certificates[found.layer].steps
                            for a, b in batches(x, y, 50)
                        ]
                    ),
                )


def test_a_network_that_is_right_deviates_nowhere_and_is_reached_where_it_is_wrong(graph: Graph) -> None:
    report = diagnose(graph, batches(*digits().test, 120))
    assert report.wrong.any()
    assert not report.wrong.all()
    for found in report.layers:
        assert bool((found.deviation[~report.wrong] == 0).all())
        assert bool((found.deviation[report.wrong] > 0).all())
        assert bool(found.reached.all())
        assert found.steps is not None
        steps_taken = (
            torch.zeros_like(report.wrong) if found.layer == "fc2" else report.wrong
        )  # the output: closed form
        assert torch.equal(found.steps > 0, steps_taken)


@pytest.mark.parametrize("size", [1, 7, 120])
def test_batches_make_no_difference(graph: Graph, size: int) -> None:
    x, y = digits().test[0][:30], digits().test[1][:30]
    whole, parts = diagnose(graph, [(x, y)]), diagnose(graph, iter(batches(x, y, size)))
    assert torch.equal(whole.wrong, parts.wrong)
    for a, b in zip(whole.layers, parts.layers, strict=True):
        torch.testing.assert_close(a.deviation, b.deviation, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(a.maps, b.maps, rtol=1e-3, atol=1e-5)
        assert torch.equal(a.reached, b.reached)


def test_chosen_layers_of_a_module_that_is_left_as_it_was() -> None:
    model, data = Residual().train(), residual_data(20)
    before = state_of(model)
    report = diagnose(model, [data], layers=["block1.bn1", "block2", "input"])
    assert [d.layer for d in report.layers] == ["block1.bn1", "block2", "input"]
    assert [tuple(d.maps.shape) for d in report.layers] == [(6, 4, 4), (6, 4, 4), (2, 6, 6)]
    assert model.training
    assert changed(before, state_of(model)) == set()
    assert report.accuracy == pytest.approx(float((model.eval()(data[0]).argmax(1) == data[1]).double().mean()))


def test_rows_and_text(graph: Graph) -> None:
    report = diagnose(graph, batches(*digits().test, 60))
    rows = report.rows()
    assert [row["layer"] for row in rows] == list(BLOCKS)
    for row, found in zip(rows, report.layers, strict=True):
        assert row == {
            "layer": found.layer,
            "deviation": found.deviation,
            "reached": found.reached,
            "active": report.wrong,
        }
    wrong = int(report.wrong.sum())
    assert report.accuracy == pytest.approx(1 - wrong / 120)
    lines = str(report).splitlines()
    assert lines[0] == f"accuracy {100 * (1 - wrong / 120):.2f} % of 120 samples"
    assert lines[1].split() == ["layer", "deviation", "of", "wrong", "ones", "reached"]
    for line, found in zip(lines[2:], report.layers, strict=True):
        mean, of_wrong = float(found.deviation.mean()), float(found.deviation[report.wrong].mean())
        assert line.split() == [found.layer, f"{mean:.4f}", f"{of_wrong:.4f}", "100.00", "%"]
    assert len({len(line) for line in lines[2:]}) == 1


def test_text_where_nothing_is_wrong_or_asked_for(graph: Graph) -> None:
    x = digits().test[0][:20]
    with torch.no_grad():
        right = diagnose(graph, [(x, graph(x).argmax(1))], layers=["fc1"])
    assert str(right).splitlines()[2].split() == ["fc1", "0.0000", "0.0000", "100.00", "%"]
    nothing = diagnose(graph, [(x, digits().test[1][:20])], layers=[])
    assert nothing.layers == ()
    assert str(nothing).startswith("accuracy ")
    assert Diagnosis((), torch.zeros(0, dtype=torch.bool)).accuracy == 0.0


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Residual(), ("stem", "block1", "block2", "dropout", "head")),
        (nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh())), ("0.0", "0.1", "0")),  # one block: all layers
    ],
)
def test_blocks(model: nn.Module, expected: tuple[str, ...]) -> None:
    example = torch.zeros(1, 2, 6, 6) if isinstance(model, Residual) else torch.zeros(1, 3)
    found = blocks(trace(model, example))
    assert set(found) == set(expected)
    assert len(found) == len(expected)


REFUSED: list[tuple[Sequence[Any], dict[str, Any], type[Exception], str]] = [
    ([], {}, ValueError, r"batches: expected \(inputs, labels\) pairs; there was none"),
    ([(torch.zeros(2, 1, 8, 8), torch.tensor([0, 10]))], {}, ValueError, "labels: expected 0 to 9 for 10 outputs"),
    ([(torch.full((2, 1, 8, 8), math.nan), torch.tensor([0, 1]))], {}, NonFiniteError, "holds 128 of 128 values"),
    (
        [(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))],
        {"layers": ["conv3"]},
        ValueError,
        "unknown layer 'conv3'; did you",
    ),
]


@pytest.mark.parametrize(("pairs", "options", "error", "message"), REFUSED, ids=["none", "labels", "nan", "layer"])
def test_bad_input(graph: Graph, pairs: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        diagnose(graph, pairs, **options)
