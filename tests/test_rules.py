"""The invariants over every operator that has a rule: fixed point, consistency, minimality, adjoint.

References are dense and slow: whole matrices with ``torch.linalg.lstsq``, grids, enumeration. They use nothing
of the code under test.
"""

import math
from functools import cache

import pytest
import torch
from cases import CASES, REFUSALS, Case, RefusedCall
from torch import Tensor, nn

from revprop.errors import UnsupportedOperatorError
from revprop.graph import Graph, trace
from revprop.modes import Adjoint, Mode, NearestPreimage, PaperReconstruction
from revprop.networks import NETWORKS
from revprop.reverse import check, factors_behind, walk
from revprop.rules import Linear, bind, describe, registered, rule

aten = torch.ops.aten
EXACT = NearestPreimage(damping=0.0, solver="exact")
MODES = [NearestPreimage(damping, solver) for damping in (0.0, 0.01) for solver in ("fft", "exact")]
MARGIN = 1e-3  # of an open range, as documented


def of_kind(*kinds: str) -> list[Case]:
    return [case for case in CASES if case.kind in kinds]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


class _Cut(nn.Module):
    """One activation, cut out of one long row for each sample."""

    def __init__(self, start: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.start, self.shape = start, shape

    def forward(self, row: Tensor) -> Tensor:
        part = row[:, self.start : self.start + math.prod(self.shape)]
        return part.reshape(row.shape[0], *self.shape).clone()


class _Together(nn.Module):
    """All cases side by side: one export, which takes most of the time, instead of one for each."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.cases = nn.ModuleList(case.module(dtype) for case in CASES)
        self.inputs = nn.ModuleList()
        self.parts: list[list[int]] = []
        self.width = 0
        for case in CASES:
            self.parts.append([])
            for shape in case.shapes:
                self.parts[-1].append(len(self.inputs))
                self.inputs.append(_Cut(self.width, shape))
                self.width += math.prod(shape)

    def forward(self, row: Tensor) -> Tensor:
        outputs = [
            module(*(self.inputs[i](row) for i in part)) for module, part in zip(self.cases, self.parts, strict=True)
        ]
        return torch.cat([output.reshape(row.shape[0], -1) for output in outputs], 1)


@cache
def together(dtype: torch.dtype) -> Graph:
    net = _Together(dtype)
    return trace(net, torch.zeros(2, net.width, dtype=dtype))


@cache
def traced(case: Case | RefusedCall, dtype: torch.dtype = torch.float64) -> Graph:
    """The graph of one case: a part of the graph of them all."""
    if isinstance(case, RefusedCall):
        return trace(case.module(dtype), case.inputs(2, dtype))
    whole, i = together(dtype), CASES.index(case)
    inputs = [whole.node(f"inputs.{part}") for part in whole.model.parts[i]]  # type: ignore[union-attr]
    graph = Graph(whole.model, whole.fx_graph, inputs, whole.constants, whole._tensors, whole.node(f"cases.{i}"))
    graph.nodes = tuple(node for node in graph.nodes if node not in inputs)
    return graph


def corrections(graph: Graph, mode: Mode, inputs: tuple[Tensor, ...], change: Tensor) -> tuple[Tensor, ...]:
    found = walk(graph, mode, graph.record(inputs), change, graph.inputs)
    return tuple(found[node] for node in graph.inputs)


def reverse(graph: Graph, mode: Mode, inputs: tuple[Tensor, ...], wanted: Tensor) -> tuple[Tensor, ...]:
    change = wanted - graph(inputs).detach()
    return tuple(x + d for x, d in zip(inputs, corrections(graph, mode, inputs, change), strict=True))


def dense(case: Case) -> Tensor:
    """The operator's matrix for one sample, (outputs, inputs of all activations), column by column."""
    module = case.module()
    total = sum(math.prod(shape) for shape in case.shapes)
    unit = torch.eye(total, dtype=torch.float64).split([math.prod(shape) for shape in case.shapes], 1)
    unit = tuple(part.reshape(total, *shape) for part, shape in zip(unit, case.shapes, strict=True))
    return (module(*unit) - module(*(torch.zeros_like(part) for part in unit))).reshape(total, -1).T


def flat(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts], 1)


# -- the list of cases -----------------------------------------------------------------------------------------------


def test_every_registered_operator_has_a_case_and_every_case_its_operator() -> None:
    found = set()
    for case in [*CASES, *REFUSALS]:
        targets = {node.target for node in traced(case).nodes}
        assert case.operator in targets, f"{case.name}: traced as {targets}"
        assert isinstance(case, RefusedCall) or not case.alone or len(traced(case).nodes) == 1
        found |= targets
    assert set(registered()) - found == set()


def test_an_operator_is_registered_once() -> None:
    with pytest.raises(ValueError, match=r"aten.relu.default has a rule already: relu"):
        rule(aten.relu.default)(lambda call: None)


@each(CASES)
def test_cases_are_covered_and_run_as_the_module(case: Case) -> None:
    graph = traced(case)
    assert check(graph).covered
    shape = case.module()(*case.inputs(5)).shape[1:]
    # torch returns empty batches unshuffled, and neither pools them without channels nor normalises their instances
    for n in (1, 5) if any(word in case.name for word in ("pixel", "without", "instance_norm")) else (0, 1, 5):
        inputs = case.inputs(n)
        # squeeze() in a module takes a batch of one away; a traced one does not
        torch.testing.assert_close(graph(inputs), case.module()(*inputs).reshape(n, *shape), rtol=0, atol=0)


@pytest.mark.parametrize("case", REFUSALS, ids=[case.name for case in REFUSALS])
def test_what_no_rule_covers_is_refused_with_a_remedy(case: RefusedCall) -> None:
    graph = traced(case)
    with pytest.raises(UnsupportedOperatorError) as caught:
        factors_behind(graph, EXACT, graph.inputs)
    name = str(case.operator).removeprefix("aten.")
    assert any(operator == name and case.remedy in remedy for operator, _, _, remedy in caught.value.operators), str(
        caught.value
    )


# -- 1. fixed point --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: f"{mode.damping}-{mode.solver}")
@each(CASES)
def test_own_output_returns_own_input(case: Case, mode: NearestPreimage) -> None:
    inputs = case.inputs(3)
    for found, own in zip(reverse(traced(case), mode, inputs, case.module()(*inputs)), inputs, strict=True):
        torch.testing.assert_close(found, own, rtol=0, atol=1e-9)


@each(CASES)
def test_own_output_returns_own_input_in_single_precision(case: Case) -> None:
    inputs = case.inputs(3, torch.float32)
    graph = traced(case, torch.float32)
    for mode in MODES:
        for found, own in zip(reverse(graph, mode, inputs, case.module(torch.float32)(*inputs)), inputs, strict=True):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, own, rtol=0, atol=1e-4)


@each(CASES)
def test_samples_are_reversed_one_by_one_and_a_batch_may_be_empty(case: Case) -> None:
    graph, module = traced(case), case.module()
    inputs, others = case.inputs(3), case.inputs(3, seed=1)
    mode = NearestPreimage(0.01, "fft")
    whole = reverse(graph, mode, inputs, module(*others))
    one = tuple(a[1:2] for a in inputs)
    for single, batch in zip(reverse(graph, mode, one, module(*(a[1:2] for a in others))), whole, strict=True):
        torch.testing.assert_close(single, batch[1:2], rtol=1e-9, atol=1e-9)
    none = case.inputs(0)
    if "without channels" in case.name or "instance_norm" in case.name:  # torch takes no empty batch of these
        return
    for empty, own in zip(reverse(graph, mode, none, module(*none)), none, strict=True):
        assert empty.shape == own.shape


# -- 2. consistency --------------------------------------------------------------------------------------------------


@each(CASES)
def test_an_output_that_has_a_preimage_is_reached(case: Case) -> None:
    module, inputs = case.module(), case.inputs(4)
    # within 2, every open range is left by more than the margin
    wanted = module(*(a.clamp(-2, 2) for a in case.inputs(4, seed=1)))
    found = reverse(traced(case), EXACT, inputs, wanted)
    torch.testing.assert_close(module(*found), wanted, rtol=1e-8, atol=1e-8)


# -- 3. minimality ---------------------------------------------------------------------------------------------------


@each(of_kind("linear"))
def test_linear_corrections_are_the_least_squares_solutions_of_smallest_norm(case: Case) -> None:
    inputs, matrix = case.inputs(3), dense(case)
    change = torch.randn_like(case.module()(*inputs))
    expected = torch.linalg.lstsq(matrix, change.flatten(1).T, driver="gelsd").solution.T
    torch.testing.assert_close(flat(corrections(traced(case), EXACT, inputs, change)), expected, rtol=1e-8, atol=1e-8)


LEARNED = {
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
    aten.batch_norm.default,
    aten.mul.Tensor,
    *(case.operator for case in CASES if "conv" in case.name),
}


@each([case for case in of_kind("linear") if case.alone])
def test_damped_corrections_solve_the_regularised_normal_equations(case: Case) -> None:
    graph, inputs, matrix = traced(case), case.inputs(3), dense(case)
    fact = describe(bind(graph, graph.nodes[0]))
    assert isinstance(fact, Linear)
    mu = fact.map.factor(0.01, "exact").damping
    full = 0.01 * float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    assert mu == pytest.approx(full, rel=1e-9) or (mu == 0.0 and case.operator not in LEARNED)
    change = torch.randn_like(case.module()(*inputs))
    right = matrix.T @ change.flatten(1).T
    if mu > 0:
        expected = torch.linalg.solve(matrix.T @ matrix + mu * torch.eye(matrix.shape[1], dtype=matrix.dtype), right).T
    else:
        expected = (torch.linalg.pinv(matrix) @ change.flatten(1).T).T
    found = flat(corrections(graph, NearestPreimage(0.01, "exact"), inputs, change))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@each([case for case in of_kind("linear") if case.alone])
def test_ranks_are_those_of_the_matrix(case: Case) -> None:
    step, matrix = factors_behind(traced(case), EXACT, traced(case).inputs)[0], dense(case)
    assert step.state is not None
    if step.state.size is not None:
        rows, columns = step.state.size
        copies = matrix.shape[0] // rows  # of a map on the last dimension, or on every channel
        assert (rows * copies, columns * copies) == matrix.shape
        assert step.state.rank == torch.linalg.matrix_rank(matrix) / copies


def distance_on_a_grid(module: nn.Module, z: Tensor, value: Tensor, reach: float = 12.0, step: float = 1e-3) -> Tensor:
    """The distance from z to the nearest zero of ``module - value``, or up to ``step`` more: sign changes on a grid, without
    those at a jump or a pole."""
    offsets = torch.arange(-round(reach / step), round(reach / step) + 1, dtype=z.dtype) * step
    found = torch.empty_like(z)
    for i in range(len(z)):
        miss = module(z[i] + offsets.view(-1, *[1] * (z.dim() - 1))) - value[i]
        crossed = (miss[:-1] * miss[1:] <= 0) & ((miss[1:] - miss[:-1]).abs() < 0.25)
        farther = torch.maximum(offsets[:-1].abs(), offsets[1:].abs()).view(-1, *[1] * (z.dim() - 1))
        found[i] = torch.where(crossed, farther, torch.inf).amin(0)
    return found


@each(of_kind("pointwise"))
def test_activations_return_the_nearest_preimage(case: Case) -> None:
    module, (z,) = case.module(), case.inputs(3)
    wanted = module(case.inputs(3, seed=1)[0].clamp(-2, 2))
    for k, (end, approached) in enumerate(((case.low, case.open_low), (case.high, case.open_high))):
        if abs(end) < torch.inf and not approached:  # ends that are taken are targets, too
            wanted.view(-1)[k::3] = end
    (found,) = reverse(traced(case), EXACT, (z,), wanted)
    torch.testing.assert_close(module(found), wanted, rtol=1e-9, atol=1e-9)
    assert bool(((found - z).abs() <= distance_on_a_grid(module, z, wanted) + 1e-9).all())


@each(of_kind("pointwise"))
def test_targets_outside_the_range_go_to_its_end_or_to_the_margin_inside_it(case: Case) -> None:
    module, (z,) = case.module(), case.inputs(3)
    z = z.clamp(-2, 2)  # recorded values lie inside the margin
    width = case.high - case.low if case.high - case.low < torch.inf else 1.0
    for end, approached, inwards in ((case.low, case.open_low, 1), (case.high, case.open_high, -1)):
        if abs(end) < torch.inf:
            (found,) = reverse(traced(case), EXACT, (z,), torch.full_like(z, end - 2.0 * inwards))
            expected = end + inwards * MARGIN * width if approached else end
            torch.testing.assert_close(module(found), torch.full_like(z, expected), rtol=0, atol=1e-9)
            if not approached:  # of all that reach the end, the nearest
                assert bool(((found - z).abs() <= distance_on_a_grid(module, z, torch.full_like(z, end)) + 1e-9).all())


def test_a_recorded_value_beyond_the_margin_may_stay_there() -> None:
    case = next(c for c in CASES if c.operator is aten.tanh.default)
    z = torch.full((1, 3, 4), 5.0, dtype=torch.float64)
    wanted = torch.tanh(z)
    wanted[0, 0] = 0.5
    wanted[0, 1] = torch.tanh(torch.tensor(4.5, dtype=torch.float64))
    (found,) = reverse(traced(case), EXACT, (z,), wanted)
    torch.testing.assert_close(found[0, 2], z[0, 2], rtol=0, atol=0)
    torch.testing.assert_close(found[0, 0], torch.full((4,), 0.5, dtype=torch.float64).atanh())
    torch.testing.assert_close(found[0, 1], torch.full((4,), 4.5, dtype=torch.float64))


def test_channels_whose_slope_is_zero_or_negative_take_the_nearest_best_branch() -> None:
    slope = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)
    module = nn.PReLU(3).double().eval()
    with torch.no_grad():
        module.weight.copy_(slope)
    graph = trace(module, torch.zeros(1, 3, dtype=torch.float64))
    z = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    wanted = torch.tensor([[1.0, 0.0, -2.0], [-3.0, -3.0, -3.0], [0.25, 0.0, 0.25]], dtype=torch.float64)
    expected = torch.tensor([[-2.0, -1.0, -4.0], [0.0, 0.0, -6.0], [0.25, 0.0, 0.25]], dtype=torch.float64)
    (found,) = reverse(graph, EXACT, (z,), wanted)
    torch.testing.assert_close(found, expected)
    (found,) = reverse(graph, EXACT, (-z,), torch.full_like(z, -1.0))  # the flat channel gives nothing below 0
    torch.testing.assert_close(found[:, 1], torch.tensor([0.0, -1.0, -2.0], dtype=torch.float64))


def jacobian(module: nn.Module, x: Tensor) -> Tensor:
    """Of one sample (1, ...): (outputs, inputs)."""
    return torch.autograd.functional.jacobian(module, x).reshape(-1, x.numel())  # type: ignore[no-untyped-call]


@each([case for case in of_kind("nonlinear") if len(case.shapes) == 1])  # several: tests/test_products.py
def test_nonlinear_corrections_are_the_smallest_ones_that_reach_the_target(case: Case) -> None:
    module, (x,), (other,) = case.module(), case.inputs(4), case.inputs(4, seed=1)
    wanted = module(other)
    (found,) = reverse(traced(case), EXACT, (x,), wanted)
    torch.testing.assert_close(module(found), wanted, rtol=1e-9, atol=1e-9)
    assert bool(((found - x).flatten(1).norm(dim=1) <= (other - x).flatten(1).norm(dim=1) + 1e-9).all())
    for n in range(4):  # stationary: at right angles to all directions in which the output does not change
        _, values, rows = torch.linalg.svd(jacobian(module, found[n : n + 1]))
        free = rows[int((values > 1e-9 * values.max().clamp_min(1e-3)).sum()) :]
        torch.testing.assert_close(
            free @ (found - x)[n].flatten(), torch.zeros(len(free), dtype=x.dtype), rtol=0, atol=1e-8
        )


@each(of_kind("nonlinear"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
def test_samples_that_are_to_stay_do_so_beside_others_that_are_not(case: Case, dtype: torch.dtype) -> None:
    inputs, graph = case.inputs(4, dtype), traced(case, dtype)
    wanted = case.module(dtype)(*inputs)
    wanted[0] = case.module(dtype)(*case.inputs(4, dtype, seed=1))[0]
    for found, x in zip(reverse(graph, EXACT, inputs, wanted), inputs, strict=True):
        torch.testing.assert_close(found[1:], x[1:], rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-4)


def memberships(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """(windows, positions): which positions each window of a max-pooling sees, by trying one after another."""
    positions = torch.zeros(shape).numel()
    lit = torch.full((positions, positions), -1000.0, dtype=torch.float64).fill_diagonal_(1.0).view(positions, *shape)
    return (module(lit) > 0).flatten(1).T


OVERLAP = ("overlapping", "padded", "dilated")  # these: tests/test_windows.py


@each([case for case in of_kind("selection") if not case.name.endswith(OVERLAP)])
def test_disjoint_windows_take_the_nearest_of_all_assignments(case: Case) -> None:
    module, (x,) = case.module(), case.inputs(3)
    looks_at = memberships(module, case.shapes[0])
    assert int(looks_at.sum(0).max()) <= 1
    wanted = module(case.inputs(3, seed=1)[0])
    (found,) = reverse(traced(case), EXACT, (x,), wanted)
    expected = x.flatten(1).clone()
    for n in range(3):
        for window, target in zip(looks_at, wanted[n].flatten(), strict=True):
            entries = window.nonzero().squeeze(1)
            tried = []
            for raised in entries:
                values = expected[n].clone()
                values[entries] = values[entries].clamp_max(target)
                values[raised] = target
                tried.append(values)
            expected[n] = min(tried, key=lambda values: float((values - x[n].flatten()).norm()))
    torch.testing.assert_close(found.flatten(1), expected)


# -- 4. adjoint ------------------------------------------------------------------------------------------------------


# autograd stops at detach, the function does not
@each([case for case in CASES if case.operator is not aten.detach.default])
def test_adjoint_mode_is_reverse_mode_differentiation(case: Case) -> None:
    inputs = tuple(a.requires_grad_() for a in case.inputs(3))
    output = case.module()(*inputs)
    v = torch.randn_like(output)
    expected = torch.autograd.grad(output, inputs, v)
    for found, own in zip(
        corrections(traced(case), Adjoint(), tuple(a.detach() for a in inputs), v), expected, strict=True
    ):
        torch.testing.assert_close(found, own, rtol=1e-10, atol=1e-10)


@each([case for case in of_kind("linear") if case.alone])
def test_linear_maps_apply_the_matrix_and_their_adjoint_is_its_transpose(case: Case) -> None:
    graph, inputs, matrix = traced(case), case.inputs(3), dense(case)
    fact = describe(bind(graph, graph.nodes[0]))
    assert isinstance(fact, Linear)
    applied = fact.map.apply(*inputs)
    torch.testing.assert_close(applied.flatten(1), flat(inputs) @ matrix.T)
    v = torch.randn_like(applied)
    back = fact.map.adjoint(v)
    parts = back if isinstance(back, tuple) else (back,)
    torch.testing.assert_close((applied * v).sum(), (flat(inputs) * flat(parts)).sum())


@pytest.mark.parametrize("name", ["digits", "mnist", "resnet20"])
def test_adjoint_mode_is_reverse_mode_differentiation_of_whole_networks(name: str) -> None:
    net = NETWORKS[name](seed=0).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    net.eval()
    shape = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "resnet20": (3, 32, 32)}[name]
    x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    output = net(x)
    v = torch.randn_like(output)
    (expected,) = torch.autograd.grad(output, x, v)
    (found,) = corrections(trace(net, x), Adjoint(), (x.detach(),), v)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# -- the published rules ---------------------------------------------------------------------------------------------


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize(
    ("name", "inverse"),
    [
        ("relu.default", lambda a: a),
        ("relu6.default", lambda a: a),
        ("leaky_relu.default", lambda a: torch.where(a > 0, a, a / 0.1)),
        ("tanh.default", lambda a: a.clamp(-0.998, 0.998).atanh()),
        ("sigmoid.default", lambda a: a.clamp(0.001, 0.999).logit()),
        ("sin.default", lambda a: (a / a.abs().amax((1, 2), keepdim=True).clamp_min(1)).asin()),
    ],
)
def test_paper_mode_inverts_activations_by_the_textbook(name: str, inverse: object) -> None:
    (z,), wanted = by_name(name).inputs(3), torch.randn(3, 3, 4, dtype=torch.float64) * 2
    (found,) = reverse(traced(by_name(name)), PaperReconstruction(), (z,), wanted)
    torch.testing.assert_close(found, inverse(wanted))  # type: ignore[operator]


@pytest.mark.parametrize(
    "name", ["max_pool2d.default-tiles", "avg_pool2d.default-tiles", "adaptive_avg_pool2d.default-even"]
)
def test_paper_mode_copies_pooled_values_to_their_windows(name: str) -> None:
    case = by_name(name)
    inputs = case.inputs(2)
    wanted = torch.randn_like(case.module()(*inputs))
    (found,) = reverse(traced(case), PaperReconstruction(), inputs, wanted)
    torch.testing.assert_close(found, wanted.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("name", ["adaptive_avg_pool1d.default-uneven", "adaptive_max_pool1d.default-overlapping"])
def test_paper_mode_takes_the_mean_of_overlapping_adaptive_windows(name: str) -> None:
    (x,), wanted = by_name(name).inputs(2), torch.randn(2, 2, 3, dtype=torch.float64)
    (found,) = reverse(traced(by_name(name)), PaperReconstruction(), (x,), wanted)
    middle = (wanted[..., 1:] + wanted[..., :-1]) / 2  # windows 0:2, 1:3 and 2:4
    torch.testing.assert_close(found, torch.cat([wanted[..., :1], middle, wanted[..., -1:]], -1))


def test_paper_mode_takes_the_mean_of_overlapping_windows_and_keeps_what_no_window_sees() -> None:
    (x,) = by_name("max_pool1d.default-overlapping").inputs(2)
    wanted = torch.randn(2, 2, 6, dtype=torch.float64)
    (found,) = reverse(traced(by_name("max_pool1d.default-overlapping")), PaperReconstruction(), (x,), wanted)
    torch.testing.assert_close(
        found, torch.cat([wanted[..., :1], (wanted[..., 1:] + wanted[..., :-1]) / 2, wanted[..., -1:]], -1)
    )
    (found,) = reverse(traced(by_name("max_pool1d.default-gaps")), PaperReconstruction(), (x,), wanted[..., :4])
    torch.testing.assert_close(found[..., ::2], wanted[..., :4])
    torch.testing.assert_close(found[..., 1::2], x[..., 1::2])
