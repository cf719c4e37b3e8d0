"""The command line: every command, a user's own network, weights and data, and what wrong input gets."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from revprop import cli, post_train
from revprop.datasets import load_data
from revprop.networks import NETWORKS
from revprop.runs import RunStore

COMMANDS = ["demo", "check", "diagnose", "explain", "align", "post-train", "reproduce", "study", "report"]
DIGITS = ["--network", "digits", "--data", "digits", "--baseline-epochs", "2", "--device", "cpu"]

OWN_MODULE = """
import torch
from torch import nn


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))


def two_classes():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))


class Refused(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 3)

    def forward(self, x):
        return self.head(x.flatten(1) - x.flatten(1).cumsum(0))


class Branching(Refused):
    def forward(self, x):
        return self.head(x.flatten(1)) if x.sum() > 0 else self.head(-x.flatten(1))
"""


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command runs in an empty folder, and what it puts on the search path is taken off again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("REVPROP_DATA", raising=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs one command: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main(list(arguments))
        except SystemExit as stop:  # how an argument parser ends
            code = int(stop.code or 0)
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


@pytest.fixture
def own(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A user's folder: a module with networks, weights in several forms, and 8x8 images in two forms.

    Returns the name of the module, which is another in every test, since modules are kept once imported.
    """
    module = f"own_{abs(hash(request.node.name))}"
    (tmp_path / f"{module}.py").write_text(OWN_MODULE)
    draw = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 12), ("test", 6)):
        labels = np.arange(3 * count) % 3
        images = draw.integers(0, 100, (3 * count, 8, 8, 3), dtype=np.uint8) + (
            50 * labels[:, None, None, None]
        ).astype(np.uint8)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = tmp_path / "images" / part / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:03}.png")
        arrays |= {f"x_{part}": images, f"y_{part}": labels}
    np.savez(tmp_path / "data.npz", **arrays)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "data.npz").read_bytes()[:1500])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pt")
    torch.save(model, tmp_path / "pickle.pt")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:300])
    return module


# -- the commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run: Any, command: str) -> None:
    code, out, err = run(command, "--help")
    assert code == 0
    assert err == ""
    assert out.startswith(f"usage: revprop {command} [-h]")
    expected = {
        "demo": "--out",
        "check": "--shape",
        "report": "--markdown",
        "reproduce": "fr-pt/table1",
        "align": "interpolate",
    }
    assert expected.get(command, "--network") in out
    assert "--help" in out


def test_help_lists_all_commands(run: Any) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(re.search(rf"{command}\s+[A-Z]", out) for command in COMMANDS)


def test_demo(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("demo", "--out", "results")
    assert (code, err) == (0, "")
    accuracy = re.search(r"^baseline: (\d+\.\d\d) % of 450 test digits right$", out, re.MULTILINE)
    assert accuracy is not None
    assert float(accuracy[1]) > 92
    assert "Where the features depart from the wanted ones" in out
    assert "Post-training digits on digits: test accuracy" in out
    for method in ("BP", "FR"):
        for stop in range(1, 5):
            assert all(re.search(rf"│ {method} \({start}, {stop}\) ", out) for start in range(stop))
    assert out.strip().endswith("report: results/report.html")
    assert (tmp_path / "results" / "report.html").stat().st_size > 100_000
    best = max(row["history"][-1]["accuracy"] for row in RunStore(Path("results/rows")).rows() if "history" in row)
    assert 100 * best > float(accuracy[1])  # post-training repairs something
    before = {path: path.stat().st_mtime_ns for path in Path("results").rglob("*.json")}
    for name in ("revprop.training.fit", "revprop.post_training.fit"):
        monkeypatch.setattr(name, None)  # the second time nothing is trained
    code, again, _ = run("demo", "--out", "results")
    shown = [line for line in out.splitlines() if not re.match(r"\d+(/| of )\d+ ", line)]  # all but the progress
    assert (code, again.splitlines()) == (0, shown)
    assert {path: path.stat().st_mtime_ns for path in Path("results").rglob("*.json")} == before


@pytest.mark.parametrize("network", ["digits", "mnist-lenet", "resnet20"])
def test_check(run: Any, network: str) -> None:
    code, out, err = run("check", network)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["operator", "module", "output", "reverse"]
    counted = re.fullmatch(r"(\d+) of (\d+) operators covered: everything is covered", lines[-2])
    assert counted is not None
    assert counted[1] == counted[2] == str(len(lines) - 3)
    deviation = re.fullmatch(r"reversing its own output returns its own features: largest deviation (\S+)", lines[-1])
    assert deviation is not None
    assert float(deviation[1]) < 1e-4


def test_check_of_a_network_of_ones_own(run: Any, own: str) -> None:
    code, out, _ = run("check", f"{own}:small", "--shape", "3", "8", "8", "--weights", "weights.safetensors")
    assert code == 0
    assert "4 of 4 operators covered" in out
    code, out, _ = run("check", f"{own}:Refused", "--shape", "3", "8", "8")
    assert code == 0
    assert re.search(r'cumsum.default +- +\(n, 192\) +no rule: .*strategy="global"', out)
    assert re.search("[0-9] of [0-9] operators covered: strategy", out)
    assert "largest deviation" not in out


def test_diagnose_digits(run: Any) -> None:
    code, out, err = run("diagnose", *DIGITS, "--samples", "50", "--out", "o")
    assert (code, err) == (0, "")
    (row,) = RunStore(Path("o/rows")).rows()
    assert out.startswith(f"{100 * row['accuracy']:.2f} % of 50 test samples are right\n")
    for layer in row["layers"]:
        assert re.search(rf"│ +{layer['layer']} +│.*│ +{100 * np.mean(layer['reached']):.1f} │", out)
    assert run("diagnose", *DIGITS, "--samples", "50", "--out", "o") == (0, out, "")
    assert len(RunStore(Path("o/rows")).rows()) == 1
    options = ("--layers", "input", "conv1.0", "--strategy", "greedy", "--rules", "paper")
    code, out, _ = run("diagnose", *DIGITS, "--samples", "50", "--out", "o", *options)
    assert code == 0
    assert re.findall(r"│ +(input|conv1\.0|fc1) +│", out) == ["input", "conv1.0"]


def test_what_changes_the_results_changes_the_row(run: Any, own: str) -> None:
    """Other scaling, other weights under the same name: nothing stored is taken for another's."""
    same = (
        "diagnose",
        "--network",
        f"{own}:small",
        "--data",
        "data.npz",
        "--weights",
        "weights.safetensors",
        "--out",
        "o",
    )
    scaled = ("--mean", "0.4", "0.4", "0.4", "--std", "0.2", "0.2", "0.2")
    assert run(*same)[0] == run(*same, *scaled)[0] == run(*same, *scaled)[0] == 0
    assert len(RunStore(Path("o/rows")).rows()) == 2
    save_file({k: -v for k, v in load_file("weights.safetensors").items()}, "weights.safetensors")
    assert run(*same)[0] == 0
    found = [
        (row["settings"]["data"], np.mean(row["layers"][0]["deviation"])) for row in RunStore(Path("o/rows")).rows()
    ]
    assert [data for data, _ in found] == [
        "data.npz",
        "data.npz, mean (0.4, 0.4, 0.4), std (0.2, 0.2, 0.2)",
        "data.npz",
    ]
    assert len({value for _, value in found}) == 3
    baseline = [*same[:5], "--baseline-epochs", "1", "--out", "b"]
    assert run(*baseline)[0] == run(*baseline, *scaled)[0] == 0
    assert len(RunStore(Path("b/baselines")).rows()) == 2


def test_post_train_with_all_of_ones_own(run: Any, own: str) -> None:
    """A network, weights and an image folder: the same numbers as by the library, and weights that can be loaded."""
    common = (
        "--network",
        f"{own}:small",
        "--data",
        "images",
        "--weights",
        "weights.pt",
        "--device",
        "cpu",
        "--out",
        "o",
    )
    code, out, err = run("post-train", *common, "--start", "input", "--stop", "0", "--epochs", "2", "--alpha", "0.5")
    assert (code, err) == (0, "")
    assert f"Post-training {own}:small on images: test accuracy" in out
    rows = {row["settings"]["method"]: row for row in RunStore(Path("o/rows")).rows()}
    assert set(rows) == {"bp", "fr"}
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))
    model.load_state_dict(load_file("weights.safetensors"))
    data = load_data("images")
    for method, row in rows.items():
        direct = post_train(
            model,
            data.train.tensors(),
            "input",
            "0",
            method=method,
            alpha=0.5,
            epochs=2,  # type: ignore[arg-type]
            validation=data.test.tensors(),
            device="cpu",
        )
        assert [e["accuracy"] for e in row["history"]] == [e.accuracy for e in direct.history]
        assert [e["loss"] for e in row["history"][1:]] == [e.losses["loss"] for e in direct.history[1:]]
        assert row["weights"] in out
        stored = load_file(row["weights"])
        assert all(torch.equal(stored[name], value) for name, value in direct.model.state_dict().items())
    code, out, _ = run("report", "o")
    assert code == 0
    assert out == "report: o/report.html (2 finished runs)\n"


def test_report_of_several_folders(run: Any, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        assert run("diagnose", *DIGITS, "--samples", "20", "--out", folder)[0] == 0
    assert run("post-train", *DIGITS, "--epochs", "1", "--start", "fc1", "--method", "bp", "--out", "two")[0] == 0
    code, out, err = run("report", "one", "two", "--markdown", "pages/tables.md", "--figures", "figures")
    assert (code, err) == (0, "")
    for name, count in (("one", 1), ("two", 2)):
        assert f"report: {name}/report.html ({count} finished runs)" in out
        assert Path(name, "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    tables = Path("pages/tables.md").read_text(encoding="utf-8")
    assert "## Post-training digits on digits: test accuracy" in tables
    assert re.search(r"^\| BP \(3, 4\) \| 330 \|", tables, re.MULTILINE)
    # bars and maps of each diagnosis, curves of the post-training: none written over another
    figures = {path.relative_to("figures").parts[0] for path in Path("figures").rglob("*.svg")}
    assert figures == {"one", "two"}
    assert len(list(Path("figures").rglob("*.svg"))) == out.count(".svg") == 5


@pytest.mark.parametrize(("name", "workers"), [("fr-pt/table1", "2"), ("design/cifar10", "1")])
def test_reproduce(run: Any, name: str, workers: str) -> None:
    arguments = ("reproduce", name, "--scale", "smoke", "--out", "o", "--device", "cpu", "--workers", workers)
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert ("│ FR (2, 3)" in out) == (name == "fr-pt/table1")
    assert ("Reconstructed features of digits on digits" in out) == (name == "design/cifar10")
    paper, experiment = name.split("/")
    assert out.splitlines()[-1] == f"report: o/{paper}-smoke/{experiment}.html"
    assert Path(f"o/{paper}-smoke/{experiment}.html").exists()
    rows = RunStore(Path(f"o/{paper}-smoke/rows")).rows()
    assert len(rows) == (12 if name == "fr-pt/table1" else 4)
    if name == "fr-pt/table1":
        assert "made images of the right shape, 1 epoch" in out
        assert re.search(r"^13/13 seed 0: (BP|FR) \(\d, \d\) \d+\.\d\d % after 1 epochs, \d+\.\d s$", out, re.MULTILINE)
        assert run(*arguments)[0] == 0
        assert RunStore(Path(f"o/{paper}-smoke/rows")).rows() == rows


def test_every_built_in_network_has_a_known_input_shape() -> None:
    assert set(cli.SHAPES) == set(NETWORKS)


def test_a_study_of_ones_own(run: Any, own: str) -> None:
    """A network and an image folder of one's own: with a baseline trained here, and with weights."""
    common = ["--network", f"{own}:small", "--data", "images", "--device", "cpu", "--scale", "smoke", "--workers", "1"]
    code, out, err = run("study", *common, "--baseline-epochs", "2", "--out", "o")
    assert (code, err) == (0, "")
    rows = RunStore(Path("o/rows")).rows()
    assert len(RunStore(Path("o/baselines")).rows()) == 1
    assert {row["settings"]["method"] for row in rows} == {"bp", "fr"}
    assert {row["settings"].get("strategy", "global") for row in rows} == {"global"}
    assert {row["settings"]["reduced"] for row in rows} == {"at most 500 training images, 1 epoch"}
    # of the blocks 0 (convolution), 1 (ReLU), 2 (flatten), 3 (linear map)
    assert {(row["l_start"], row["l_stop"]) for row in rows} == {(0, 1), (0, 2), (0, 3), (0, 4), (1, 4), (2, 4), (3, 4)}
    assert "(1, 2) is left out: no parameters between '0' and '1': nothing to train" in out
    assert f"Post-training {own}:small on images" in out
    assert out.splitlines()[-1] == "report: o/report.html"
    scaled = ["--mean", "0.4", "0.4", "0.4", "--std", "0.2", "0.2", "0.2"]
    arguments = [
        *common,
        *scaled,
        "--weights",
        "weights.safetensors",
        "--cells",
        "input:0",
        "--ways",
        "bp",
        "--out",
        "w",
    ]
    code, out, err = run("study", *arguments, "--seeds", "2", "--epochs", "2", "--seed", "5")
    assert (code, err) == (0, "")
    rows = RunStore(Path("w/rows")).rows()
    assert [(row["settings"]["seed"], row["settings"]["start"], row["settings"]["stop"]) for row in rows] == [
        (5, "input", "0"),
        (6, "input", "0"),
    ]
    assert len(rows[0]["history"]) == 3
    split = load_data("images")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))
    model.load_state_dict(load_file("weights.safetensors"))
    with torch.no_grad():
        right = model(split.test.scaled((0.4,) * 3, (0.2,) * 3)).argmax(1) == split.test.labels
    assert rows[0]["baseline_accuracy"] == pytest.approx(float(right.double().mean()))


# -- wrong input ------------------------------------------------------------------------------------


OWN = ["--network", "{own}:small", "--out", "o"]
WRONG = {
    "network": (["check", "digts"], "unknown network 'digts'; did you mean 'digits'"),
    "factory": (["check", "{own}:smal"], "unknown factory 'smal'; did you mean 'small'"),
    "module": (["check", "no_such_package.nets:small"], "no module named 'no_such_package'"),
    "malformed": (["check", "{own}:"], "expected package.module:factory"),
    "no shape": (["check", "{own}:small"], "the input shape of .* is not known: give --shape"),
    "data name": (
        ["diagnose", "--network", "digits", "--data", "digts"],
        "unknown data set 'digts'; did you mean 'digits'",
    ),
    "data absent": (
        ["diagnose", "--network", "mnist", "--data", "mnist"],
        "no data for 'mnist': looked in .*REVPROP_DATA",
    ),
    "data path": (["diagnose", *OWN, "--data", "./nowhere"], "nowhere: no such file or folder"),
    "data cut": (["diagnose", *OWN, "--data", "cut.npz"], r"cut\.npz: the file is damaged"),
    "data no data": (
        ["diagnose", *OWN, "--data", "weights.safetensors"],
        r"weights\.safetensors: the file is damaged or of another kind",
    ),
    "data of another shape": (["diagnose", *OWN, "--data", "digits"], "expected input.* to have 3 channels, but got 1"),
    "labels": (
        ["diagnose", "--network", "{own}:two_classes", "--data", "data.npz"],
        "labels: expected 0 to 1 for 2 outputs",
    ),
    "weights absent": (["diagnose", *OWN, "--data", "data.npz", "--weights", "no.pt"], r"no weights file no\.pt"),
    "weights pickle": (
        ["diagnose", *OWN, "--data", "data.npz", "--weights", "pickle.pt"],
        "refused by weights-only loading",
    ),
    "weights cut": (
        ["check", "{own}:small", "--weights", "cut.safetensors"],
        r"cut\.safetensors is no whole safetensors file",
    ),
    "layer": (["diagnose", *DIGITS, "--layers", "conv9"], "unknown layer 'conv9'; did you mean 'conv"),
    "start": (["post-train", *DIGITS, "--start", "cnv1"], "unknown layer 'cnv1'; did you mean 'conv1'"),
    "order": (
        ["post-train", *DIGITS, "--start", "fc1", "--stop", "conv1"],
        "start='fc1' is not in front of stop='conv1'",
    ),
    "alpha": (["post-train", *DIGITS, "--alpha", "2"], "alpha: expected the share .* given 2"),
    "epochs": (["post-train", *DIGITS, "--epochs", "-1"], "epochs: expected at least 0, given -1"),
    "rules": (["diagnose", *DIGITS, "--rules", "paper"], 'rules="paper" is the published greedy walk'),
    "no data": (["reproduce", "fr-pt/table5"], "no data for 'imagenette' in .*--scale smoke needs none"),
    "cells": (["study", *DIGITS, "--cells", "fc1"], "cells: expected START:STOP, e.g. input:conv1, given fc1"),
    "no cell": (["study", *DIGITS, "--cells", "fc1:conv1"], r"cells: \[\('fc1', 'conv1'\)\] are not \(start, stop\)"),
    "samples": (["diagnose", *DIGITS, "--samples", "0"], "samples: expected at least 1, given 0"),
    "scaling": (["diagnose", *DIGITS, "--mean", "0.5"], "give --mean and --std together"),
    "channels": (
        ["diagnose", *DIGITS, "--mean", "0", "0", "--std", "1", "1"],
        "expected 1 means and standard deviations",
    ),
    "device": (["diagnose", *DIGITS[:-1], "cudaa", "--out", "new"], "invalid accelerator name: .*cudaa"),
    "nothing named": (["report"], "give the folder of some runs"),
    "nothing to report": (["report", "nowhere"], "no finished run in nowhere/rows"),
    "out is a file": (["diagnose", *DIGITS, "--out", "data.npz"], r"data\.npz"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gets_one_readable_line(run: Any, own: str, name: str) -> None:
    arguments, message = WRONG[name]
    code, out, err = run(*(argument.replace("{own}", own) for argument in arguments))
    assert code == 2
    assert out == ""
    assert re.fullmatch(f"revprop: .*{message}.*\n", err), err  # one line: the dot matches no line break


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "digits", "--sede", "3"], ["Unrecognized options: --sede", "Perhaps you meant", "--seed INT"]),
        (["chek"], ["chek", *COMMANDS]),
        ([], COMMANDS),
        (["post-train", *DIGITS, "--method", "rf"], ["invalid choice 'rf' for argument '--method'", "'fr', 'bp'"]),
        (["reproduce", "fr-pt/table9"], ["unknown experiment 'fr-pt/table9'", "'fr-pt/table6'"]),
        (["reproduce", "fr-pt/table1", "--scale", "papr"], ["invalid choice 'papr'", "'smoke', 'reduced', 'paper'"]),
        (["diagnose", "--network", "digits"], ["--data"]),
    ],
)
def test_wrong_options_get_what_is_possible(run: Any, arguments: list[str], words: list[str]) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    text = " ".join((out + err).split())
    assert all(word in text for word in words), text
    assert "Traceback" not in text


def test_weights_that_do_not_fit_are_all_listed(run: Any, own: str) -> None:
    code, _, err = run("check", f"{own}:two_classes", "--weights", "weights.safetensors", "--shape", "3", "8", "8")
    assert code == 2
    assert "missing from the file: 1.weight, 1.bias" in err
    assert "unexpected in the file: 0.bias, 0.weight, 3.bias, 3.weight" in err


def test_a_network_that_cannot_be_exported_is_explained(run: Any, own: str) -> None:
    code, _, err = run("check", f"{own}:Branching", "--shape", "3", "8", "8")
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("revprop: Branching cannot be exported: control flow depends on the values of tensors at ")
    line = OWN_MODULE.splitlines().index(
        "        return self.head(x.flatten(1)) if x.sum() > 0 else self.head(-x.flatten(1))"
    )
    assert f"{own}.py, line {line + 1}" in last
    assert "Usual rewrite: use torch.where" in last
    assert "Traceback" not in err


def test_an_operator_without_a_rule_is_refused_before_any_work(run: Any, own: str) -> None:
    arguments = (
        "diagnose",
        "--network",
        f"{own}:Refused",
        "--data",
        "data.npz",
        "--baseline-epochs",
        "1",
        "--out",
        "o",
        "--strategy",
        "greedy",
        "--layers",
    )
    code, out, err = run(*arguments, "input")
    assert (code, out) == (2, "")
    assert "cumsum" in err
    assert 'strategy="global"' in err
    assert RunStore(Path("o/rows")).rows() == []
    assert run(*arguments, "head")[0] == 0  # behind the operator it can be done


def test_a_full_disk_is_no_traceback(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("revprop.training.save_file", full)
    code, _, err = run("diagnose", *DIGITS, "--out", "o")
    assert code == 2
    assert re.fullmatch("revprop: .*No space left on device.*\n", err)


# -- interruption -----------------------------------------------------------------------------------


def test_ctrl_c(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.demo, "run", stop)
    assert run("demo", "--out", "o") == (
        130,
        "",
        "revprop: stopped; the same command continues from the last finished run\n",
    )


def test_the_signal_of_ctrl_c_leaves_what_the_same_command_continues(tmp_path: Path) -> None:
    """A process of its own, stopped while it trains its baseline."""
    # as a shell would: a process started in the background may have the signal ignored
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from revprop.cli import main; sys.exit(main())"
    )
    command = [
        sys.executable,
        "-c",
        program,
        "diagnose",
        *DIGITS[:-3],
        "3000",
        "--device",
        "cpu",
        "--samples",
        "30",
        "--out",
        "o",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while (
        not list(tmp_path.glob("o/baselines/*/state.json")) and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "revprop: stopped; the same command continues from the last finished run\n"
    (state,) = tmp_path.glob("o/baselines/*/state.json")
    assert json.loads(state.read_text())["history"][-1]["epoch"] >= 1
    assert RunStore(tmp_path / "o" / "rows").rows() == []
