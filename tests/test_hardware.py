"""Time, memory and memory layouts: simple facts about each, and that the layout of an input changes nothing."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import changed, state_of

from revprop import diagnose, post_train, reconstruct
from revprop.closed_form import ClosedForm
from revprop.graph import trace
from revprop.hardware import StepMemory, channels_last, clock

CPU = torch.device("cpu")

# -- time -------------------------------------------------------------------------------------------


def test_on_one_thread_time_is_this_process_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    now = clock(CPU)
    began = now()
    time.sleep(0.2)  # as if other work had the machine
    assert now() - began < 0.15
    began, wall = now(), time.perf_counter()
    while now() - began < 0.01:
        assert time.perf_counter() - wall < 60, "work does not count"


@pytest.mark.parametrize(("device", "threads"), [("cpu", 2), ("cuda", 1), ("cuda", 2)])
def test_elsewhere_time_is_on_the_wall(device: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    now = clock(torch.device(device))
    began = now()
    time.sleep(0.05)
    assert now() - began >= 0.05


# -- layouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 5, 6), (0, 3, 4, 5), (1, 2, 1, 1)], ids=str)
def test_images_and_volumes_get_their_channels_innermost(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    y = channels_last(x)
    assert torch.equal(x, y)
    assert y.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (2, 1, 4, 5), (2, 1, 2, 1, 2, 1)], ids=str)
def test_other_tensors_are_as_they_were(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert channels_last(x) is x


def test_elsewhere_than_on_a_cpu_nothing_is_moved() -> None:
    x = torch.empty(2, 3, 4, 5, device="meta")
    assert channels_last(x) is x


class Viewed(nn.Module):
    """(n, 4, 6, 6) -> (n, 3), shuffling channels between and flattening by view, which minds the layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 6, 3)
        self.fc1, self.fc2 = nn.Linear(6 * 16, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.conv1(x))
        a = a.view(a.size(0), 2, 4, 6, 6).transpose(1, 2).contiguous().view(a.size(0), 8, 6, 6)
        b = torch.relu(self.conv2(a))
        return self.fc2(torch.tanh(self.fc1(b.view(b.size(0), -1))))


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(40, 4, 6, 6, generator=generator), torch.randint(0, 3, (40,), generator=generator)


def lying_otherwise(x: Tensor) -> list[Tensor]:
    """The same values: channels innermost, and a slice of something larger."""
    larger = torch.zeros(len(x), 9, 6, 12)
    larger[:, ::2, :, 1::2][:, :4] = x
    return [x.contiguous(memory_format=torch.channels_last), larger[:, ::2, :, 1::2][:, :4]]


@pytest.mark.parametrize("traced", [0, 1, 2])
def test_the_layout_of_inputs_changes_nothing(traced: int) -> None:
    """Whatever layout the example had that the network was traced with."""
    model, (x, y) = Viewed().eval(), images()
    ways = [x, *lying_otherwise(x)]
    plain, graph = trace(model, x[:2]), trace(model, ways[traced][:2])
    exact: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
    for other in ways:
        torch.testing.assert_close(graph(other), model(x), **exact)
        some = {"to": ["input", "conv1", "fc1"]}
        for options in ({"strategy": "global"}, {"strategy": "greedy"}):
            wanted = reconstruct(plain, x, y, **some, **options)  # type: ignore[arg-type]
            found = reconstruct(graph, other, y, **some, **options)  # type: ignore[arg-type]
            for layer in found:
                torch.testing.assert_close(found[layer], wanted[layer], rtol=1e-3, atol=1e-3)
                assert torch.equal(found.certificates[layer].reached, wanted.certificates[layer].reached)
        for d, e in zip(
            diagnose(graph, (other, y), ["conv2"]).layers, diagnose(plain, (x, y), ["conv2"]).layers, strict=True
        ):
            torch.testing.assert_close(d.deviation, e.deviation, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("budget", [2**30, 0])
@pytest.mark.parametrize("method", ["bp", "fr", "solve"])
def test_the_layout_of_training_data_changes_nothing(method: Any, budget: int) -> None:
    model, (x, y) = Viewed().eval(), images()
    graph = trace(model, x[:2])
    options: dict[str, Any] = {
        "method": method,
        "alpha": 0.5,
        "epochs": 2,
        "batch_size": 16,
        "device": "cpu",
        "memory_budget": budget,
        "closed_form": ClosedForm((1.0,), (0.1,), sweeps=2),
    }
    expected = post_train(graph, (x, y), "conv1", "fc1", validation=(x, y), **options)
    for other in lying_otherwise(x):
        kept = other.stride()
        found = post_train(graph, (other, y), "conv1", "fc1", validation=(other, y), **options)
        assert other.stride() == kept
        torch.testing.assert_close(state_of(found.model), state_of(expected.model), rtol=1e-4, atol=1e-5)
        assert [e.accuracy for e in found.history] == [e.accuracy for e in expected.history]
    assert changed(state_of(model), state_of(graph.model)) == set()


# -- memory -----------------------------------------------------------------------------------------


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_first_step_is_what_counts() -> None:
    x, memory = torch.randn(64, 50), StepMemory([], CPU)
    assert memory.bytes(CPU) == 0
    for factor in (1, 100):
        with memory.watch((x, x)):  # one storage, given twice
            torch.zeros(factor * 1000)
        assert memory.bytes(CPU) == nbytes(x) + 4000


def test_chains_of_operators_hold_two_results_at_a_time() -> None:
    x, memory = torch.randn(64, 50), StepMemory([], CPU)
    with memory.watch((x,)):
        a = x
        for _ in range(9):
            a = a * 2
            a.view(-1).add_(1)  # a view, written in place: nothing new
    assert memory.bytes(CPU) == nbytes(x) + 2 * nbytes(x)


def test_a_step_holds_at_least_its_parameters_batch_and_saved_activations() -> None:
    first, second = nn.Linear(50, 40), nn.Linear(40, 30)
    model, x = nn.Sequential(first, nn.Tanh(), second, nn.Tanh()), torch.randn(64, 50)
    first.bias.requires_grad_(False)
    memory = StepMemory(model.parameters(), CPU)
    with memory.watch((x,)):
        loss = model(x).sum()
        loss.backward()
    trained = nbytes(*(p for p in model.parameters() if p.requires_grad))
    fixed = nbytes(first.bias) + 3 * trained
    saved = 64 * (40 + 30) * 4  # a tanh saves its result, which is the next layer's input
    assert fixed + nbytes(x) + saved <= memory.bytes(CPU) <= fixed + trained + nbytes(x) + 3 * saved
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_without_gradients_nothing_is_kept_for_them() -> None:
    model, x = nn.Sequential(*(nn.Linear(50, 50) for _ in range(6))), torch.randn(64, 50)
    memory = StepMemory(model.requires_grad_(False).parameters(), CPU)
    with torch.no_grad(), memory.watch((x,)):
        model(x)
    assert memory.bytes(CPU) == nbytes(x, *model.parameters()) + 2 * nbytes(x)


def test_a_step_that_fails_leaves_nothing_noted() -> None:
    memory = StepMemory([], CPU)
    with pytest.raises(ZeroDivisionError), memory.watch((torch.zeros(5),)):
        raise ZeroDivisionError
    assert memory.bytes(CPU) == 0


def test_watching_changes_no_number() -> None:
    model, (x, y) = Viewed(), images()
    gradients = []
    for watched in (False, True):
        model.zero_grad()
        with StepMemory(model.parameters(), CPU).watch((x,)) if watched else nullcontext():
            nn.functional.cross_entropy(model(x), y).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_larger_batch_holds_more() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    found = []
    for n in (4, 16):
        memory, x = StepMemory(model.parameters(), CPU), torch.randn(n, 3, 10, 10)
        with memory.watch((x,)):
            model(x).sum().backward()
        found.append(memory.bytes(CPU))
        assert found[-1] >= nbytes(x, torch.empty(n, 8, 8, 8), *model.parameters())
    assert found[1] > 2 * found[0]
