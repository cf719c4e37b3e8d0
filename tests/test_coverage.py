"""The coverage page: its architectures build and trace, its rows tell the truth, and the page says what rows say."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from architecture import Architecture, numbers
from coverage_page import page
from coverage_row import chosen, fingerprint, measure, plain, run_from, third_of_the_way, traced
from handwritten_images import IMAGES
from handwritten_sequences import SEQUENCES
from torch import Tensor, nn
from zoo import ARCHITECTURES, TIMM, TORCHVISION
from zoo_transformers import TRANSFORMERS

from revprop.runs import RunStore

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = {a.name: a for a in (*IMAGES, *SEQUENCES)}
QUICK = {
    *("MLP", "squeeze-excite block", "two heads, class reversed", "Siamese network (two images)", "3-d convolutions"),
    *("gated MLP (GLU, SwiGLU)", "LSTM classifier", "bag of words, wide and deep (tokens and vector)", "deep sets"),
}


@pytest.fixture(scope="module")
def command() -> ModuleType:
    """benchmarks/coverage.py, under a name that no package has."""
    specification = importlib.util.spec_from_file_location("coverage_command", ROOT / "benchmarks" / "coverage.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_zoo_has_every_family_asked_for_and_unique_names() -> None:
    assert len(ARCHITECTURES) == sum(map(len, (IMAGES, SEQUENCES, TIMM, TORCHVISION, TRANSFORMERS)))
    assert len(WRITTEN) >= 20
    assert len(ARCHITECTURES) - len(WRITTEN) >= 40
    asked = (
        *("ResNet", "DenseNet", "MobileNet", "EfficientNet", "ConvNeXt", "RegNet", "VGG", "Inception", "ShuffleNet"),
        *("SqueezeNet", "MNASNet", "U-Net", "MLP-Mixer", "gMLP", "ResMLP", "ViT", "DeiT", "Swin", "MetaFormer", "CaiT"),
        *("XCiT", "GPT", "LLaMA", "BERT", "T5", "LSTM", "GRU", "MLP", "Siamese", "several outputs"),
    )
    assert set(asked) <= {a.family for a in ARCHITECTURES.values()}


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=() if a.name in QUICK else pytest.mark.slow, id=a.name) for a in WRITTEN.values()],
)
def test_what_is_written_here_builds_the_same_twice_and_traces(architecture: Architecture) -> None:
    model, again = architecture.model(), architecture.model()
    assert fingerprint(model) == fingerprint(again)
    x = architecture.example(2, seed=5)

    with torch.no_grad():
        expected = chosen(model(*x), architecture)
    assert expected.dtype == torch.float64
    assert expected.isfinite().all()
    assert not torch.allclose(expected[0], expected[1])
    graph = traced(model, architecture, seed=0)
    torch.testing.assert_close(graph(x), expected, rtol=1e-12, atol=1e-12)
    assert graph.node(third_of_the_way(graph)).meta["val"].is_floating_point()


def test_the_row_of_a_covered_network() -> None:
    row = measure(WRITTEN["MLP"])
    assert row["problems"] == []
    assert row["failed"] is None
    assert row["traced"]
    assert row["inputs"] == [["float64", 16]]
    assert row["parameters"] == 16 * 32 + 32 + 32 * 24 + 24 + 24 * 5 + 5
    assert row["kinds"] == {"closed form": row["operators"]}
    assert row["greedy_layers"] == row["floating_layers"] == row["layers"]
    assert row["fixed_point"] <= 1e-9
    assert row["forward_error"] <= 1e-12
    assert row["untouched"]
    assert row["greedy"]["residual"] < 1
    assert row["global"]["reached"] == 1
    for strategy in ("greedy", "refined", "global"):
        assert row[strategy]["certificate_error"] <= 1e-9
        assert 0 < row[strategy]["deviation"] < 10
        assert row[strategy]["seconds"] > 0


@pytest.mark.parametrize("name", sorted(QUICK - {"MLP"}))
def test_rows_of_quick_ones_hold_what_the_library_promises(name: str) -> None:
    row = measure(WRITTEN[name])
    assert row["problems"] == []
    assert sum(row["kinds"].values()) == row["operators"]
    assert row["fixed_point"] <= 1e-9
    assert row["untouched"]
    assert row["global"]["reached"] == 1
    for strategy in ("greedy", "refined", "global"):
        assert row[strategy] is None or row[strategy]["certificate_error"] <= 1e-9


def test_a_certificate_is_recomputed_through_the_model_at_every_layer() -> None:
    for name in ("weight-shared recursive network", "two heads, box reversed"):
        architecture = WRITTEN[name]
        model, x = architecture.model(), architecture.example(2, seed=1)

        graph = traced(model, architecture, seed=0)
        recorded = graph.record(x)
        checked = 0
        for layer in graph.layers:
            features = recorded[graph.node(layer)]
            moved = features + 0.1
            outputs = run_from(model, architecture, x, layer, features, moved)
            if outputs is None:
                continue
            suffix, by_pass = graph.behind(layer)
            expected = suffix(moved, *(recorded[node] for node in by_pass))[0]
            torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
            assert not torch.allclose(outputs, chosen(model(*x), architecture))
            checked += 1
        assert checked >= 8
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[0].weight.data.mul_(1 + 1e-12),
        lambda model: model.register_buffer("extra", torch.zeros(1)),
        lambda model: model[0].eval(),
        lambda model: model[0].register_forward_hook(lambda *_: None),
        lambda model: model[0].weight.requires_grad_(False),
        lambda model: model(torch.ones(1, 16, dtype=torch.float64)).sum().backward(),
        lambda model: setattr(model[2], "note", 1),
    ],
)
def test_every_change_of_a_model_is_noticed(change: Callable[[Any], object]) -> None:
    model = WRITTEN["MLP"].model().train()
    before = fingerprint(model)
    assert fingerprint(model) == before
    change(model)
    assert fingerprint(model) != before


class Decides(nn.Module):
    """Control flow that depends on values: it cannot be exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x - 1


def test_what_cannot_be_built_or_traced_says_so_in_its_row() -> None:
    def broken() -> nn.Module:
        raise OSError("no such definition")

    row = measure(Architecture("broken", "none", "written here", broken, (numbers(3),)))
    assert row["problems"] == ["building the network: OSError: no such definition"]
    row = measure(Architecture("decides", "none", "written here", Decides, (numbers(3),)))
    assert row["traced"] is False
    assert "value of a tensor" in row["export_error"]
    assert row["untouched"]
    assert row["problems"] == []


def test_messages_keep_no_folder_of_the_machine() -> None:
    assert plain("at /home/me/x/.venv/lib/python3.11/site-packages/timm/layers/a.py, line 3:\n `x`") == (
        "at timm/layers/a.py, line 3: `x`"
    )
    assert plain("no such file: /home/me/things/net.py") == "no such file: net.py"
    assert plain("a / b and c/d stay") == "a / b and c/d stay"


def test_a_hang_or_a_crash_costs_one_row(command: ModuleType) -> None:
    row = command.run_apart(WRITTEN["MLP"], limit=0.2, gib=6)
    assert row["failed"] == "importing: stopped after 0.2 seconds"
    row = command.run_apart(dataclasses.replace(WRITTEN["MLP"], name="unheard of"), limit=100, gib=6)
    assert row["failed"] == "importing: its process ended with code 1: KeyError: 'unheard of'"


@pytest.mark.slow
def test_the_command_writes_the_page_and_keeps_finished_rows(command: ModuleType, tmp_path: Path) -> None:
    arguments = ["--only", "MLP", "deep sets", "--rows", str(tmp_path / "rows"), "--out", str(tmp_path / "page.md")]
    command.main(arguments)
    first, rows = (tmp_path / "page.md").read_text(encoding="utf-8"), RunStore(tmp_path / "rows").rows()
    assert [row["settings"]["architecture"] for row in rows] == ["MLP", "deep sets"]
    assert "| MLP | MLP | 16 | 1,461 |" in first
    command.main(arguments)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == first
    assert RunStore(tmp_path / "rows").rows() == rows
    command.main([*arguments, "--again"])
    again = RunStore(tmp_path / "rows").rows()
    assert len(again) == 2
    assert all(row["finished"] > rows[-1]["finished"] for row in again)


def quality(residual: float, reached: float, error: float | None) -> dict[str, Any]:
    return {
        "residual": residual,
        "reached": reached,
        "deviation": 0.125,
        "seconds": 2.5,
        "finite": True,
        "certificate_error": error,
    }


def made_up() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Four networks: covered, in part refused, not traced, crashed."""
    good = {
        **{"failed": None, "problems": [], "inputs": [["float64", 3, 8, 8]], "parameters": 1234, "traced": True},
        **{"operators": 3, "kinds": {"closed form": 2, "fallback": 1}, "untouched": True, "fixed_point": 3e-12},
        "not_closed": {"fallback: softmax.int": {"calls": 1, "remedies": [""]}},
        **{"layer": "stem", "by_passed": 0, "processor_seconds": 90, "greedy_layers": 4, "floating_layers": 4},
        **{"greedy": quality(0.25, 0.5, 1e-15), "global": quality(0.0, 1.0, 2e-3)},
    }
    refused = {
        **{"failed": None, "problems": [], "inputs": [["int64", 12], ["float64", 4]], "parameters": 99, "traced": True},
        **{"operators": 2, "kinds": {"closed form": 1, "no rule": 1}, "untouched": True, "fixed_point": 0.5},
        "not_closed": {"no rule: mul.Tensor": {"calls": 1, "remedies": ["a product of two activations"]}},
        **{
            "layer": "a",
            "by_passed": 2,
            "processor_seconds": 30,
            "greedy_layers": 1,
            "floating_layers": 4,
            "greedy": None,
            "global": quality(0.0, 1.0, None),
        },
    }
    untraced = {
        **{"failed": None, "problems": [], "inputs": [["float64", 4]], "parameters": 5, "traced": False},
        **{"export_error": "Net cannot be exported: because", "untouched": True},
    }
    crashed = {"failed": "tracing: stopped after 5 seconds", "problems": []}
    named = [("good", "timm", good), ("refused", "transformers", refused), ("untraced", "timm", untraced)]
    return [
        ({"architecture": name, "family": "CNN", "source": source, "batch": 2, "seed": 0}, row)
        for name, source, row in [*named, ("crashed", "written here", crashed)]
    ]


def test_the_page_says_what_rows_say_in_whatever_order(tmp_path: Path) -> None:
    rows = [RunStore(tmp_path).put(settings, row) for settings, row in made_up()]
    text = page(rows)
    assert page(rows[::-1]) == text
    assert page(RunStore(tmp_path).rows()) == text
    lines = text.splitlines()
    for line in (
        "| architectures | 4 |",
        "| traced | 2 of 4 (50 %) |",
        "| greedy strategy covers every operator | 1 of 4 (25 %) |",
        "| fixed point below 1e-9 | 1 of 4 (25 %) |",
        "| worst fixed point | 0.5 |",
        "| global: mean share reached | 100 % |",
        "| certificates recomputed by running the model itself | 2 |",
        "| of these, the same to 1e-9 | 1 of 2 (50 %) |",
        "| good | CNN | 3 x 8 x 8 | 1,234 | 3 | 2 / 1 / 0 / 0 | 3e-12 | `stem` | 0.25 / 50 % / 0.12 | 2.5 "
        "| \N{EN DASH} | \N{EN DASH} | 0 / 100 % / 0.12 | 2.5 |",
        "| processor minutes, all together | 2 |",
        "| `mul.Tensor` | 1 | 1 | a product of two activations |",
        "| `softmax.int` | 1 | 1 |  |",
        "- crashed (written here): **tracing: stopped after 5 seconds**.",
        "- good (timm): **global: certificate off by 0.002 of the first residual**.",
        "- refused (transformers): **fixed point 0.5**; greedy reaches 1 of 4 layers.",
        "- untraced (timm): not traced: Net cannot be exported: because.",
    ):
        assert line in lines, line
    assert "| `a` (by-passed) |" in text
    assert [line for line in lines if line.startswith("## ")][:4] == [
        *("## Summary", "## Written here", "## timm", "## transformers")
    ]
    assert lines.index("## Operators reversed by the fallback") < lines.index("## Operators refused, and why")


def test_the_page_in_the_docs_is_that_of_the_stored_rows(command: ModuleType) -> None:
    store = RunStore(ROOT / "docs" / "results" / "coverage" / "rows")
    rows = [row for a in ARCHITECTURES.values() if (row := store.get(command.settings_of(a))) is not None]
    text = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    assert text == page(rows), 'docs/coverage.md is not of these rows: run make coverage ARGS="--only none"'
    assert not re.search(r"/(?:home|root|tmp|usr|work)/", text)
