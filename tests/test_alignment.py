"""Feature alignment: the shared start gives the plain numbers, and the appendix's mathematics holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import revprop
from revprop.alignment import clamp_weights, half_squares, orthogonal_weights
from revprop.convolution import Convolution
from revprop.errors import NonFiniteError
from revprop.linear_map import Dense

DOUBLE = torch.float64
SHAPE = (2, 6, 6)


def smooth(latent: int = 3) -> nn.Module:
    layers = [nn.Conv2d(2, 3, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 8), nn.Softplus(), nn.Linear(8, latent)]
    return nn.Sequential(*layers)


def gated(latent: int = 3) -> nn.Module:
    layers = [nn.Conv2d(2, 3, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 8), nn.LeakyReLU(inplace=True), nn.Linear(8, latent))


class Functional(nn.Module):
    """Activations called as functions, a residual addition, and an output that is no vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = x + torch.relu(self.conv(x))
        a = a * nn.functional.leaky_relu(self.conv(a), negative_slope=0.3).sigmoid()
        return self.mix(a).relu_()


class Normed(nn.Module):
    """Batch norm in eval mode and dropout that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.norm.running_mean = torch.randn(3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(nn.functional.leaky_relu(self.norm(self.conv(x)))).flatten(1)


def plain(
    module: nn.Module, x: Tensor, steps: int, step_size: float, output: Any, weights: Tensor | float = 1.0
) -> Tensor:
    """Algorithm 1 as it is written."""
    z = module(x)
    r = torch.zeros_like(x).requires_grad_()
    for _ in range(steps):
        distance = 0.5 * (weights * (module(r) - z).square()).sum()
        r = r - step_size * torch.autograd.grad(distance, r, create_graph=True)[0]
    return 0.5 * (x - output(r)).square().sum() / len(x)


@pytest.mark.parametrize("build", [smooth, gated, Functional, Normed])
@pytest.mark.parametrize(("n", "steps", "output"), [(2, 1, None), (7, 1, "sigmoid"), (2, 3, "tanh"), (7, 2, None)])
def test_the_shared_start_gives_the_plain_loss_and_gradients(build: Any, n: int, steps: int, output: Any) -> None:
    module = build().to(DOUBLE)
    x = torch.rand(n, *SHAPE, dtype=DOUBLE)
    encoder = revprop.FeatureAligned(module, SHAPE, steps, 0.7, output=output)
    assert encoder.shares_start()
    function = {None: lambda r: r, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[output]
    expected = plain(module, x, steps, 0.7, function)
    loss = encoder.alignment_loss(x)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    parameters = list(module.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    for found, right in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [2, 9])
def test_weights_of_the_codes_and_gradients_towards_z(n: int) -> None:
    module, weights = smooth().to(DOUBLE), torch.tensor([1.0, 0.01, 2.0], dtype=DOUBLE)
    x, z = torch.rand(n, *SHAPE, dtype=DOUBLE), torch.randn(n, 3, dtype=DOUBLE, requires_grad=True)
    encoder = revprop.FeatureAligned(module, SHAPE, weights=weights)
    torch.testing.assert_close(
        encoder.alignment_loss(x), plain(module, x, 1, 1.0, lambda r: r, weights), rtol=1e-12, atol=0
    )
    full = revprop.FeatureAligned(module, SHAPE, weights=weights, share_start=False)
    towards = [torch.autograd.grad(e.invert(z).square().sum(), z)[0] for e in (encoder, full)]
    torch.testing.assert_close(*towards, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert not encoder.invert(z).requires_grad
        assert not full.invert(z).requires_grad


def test_no_example_at_all() -> None:
    encoder = revprop.FeatureAligned(gated(), SHAPE)
    loss = encoder.alignment_loss(torch.zeros(0, *SHAPE))
    loss.backward()
    assert loss.item() == 0
    assert encoder.invert(torch.zeros(0, 3)).shape == (0, *SHAPE)


def test_one_step_from_zeros_is_affine() -> None:
    encoder = revprop.FeatureAligned(smooth().to(DOUBLE), SHAPE, step_size=0.5, output="sigmoid")
    matrix, offset = encoder.affine()
    z = torch.randn(4, 3, dtype=DOUBLE)
    expected = torch.sigmoid(offset + z @ matrix).view(4, *SHAPE)
    torch.testing.assert_close(encoder.invert(z), expected, rtol=1e-12, atol=1e-14)
    jacobian = torch.func.jacrev(encoder.module)(torch.zeros(1, *SHAPE, dtype=DOUBLE)).reshape(3, -1)
    torch.testing.assert_close(matrix, 0.5 * jacobian, rtol=1e-10, atol=1e-12)
    for other in (
        revprop.FeatureAligned(smooth(), SHAPE, steps=2),
        revprop.FeatureAligned(smooth(), SHAPE, init="normal"),
    ):
        with pytest.raises(ValueError, match="only one step from zeros"):
            other.affine()


def test_batch_norm_in_training_is_computed_in_full_and_said() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.BatchNorm1d(4), nn.Tanh()).to(DOUBLE)
    x = torch.rand(5, *SHAPE, dtype=DOUBLE)
    encoder = revprop.FeatureAligned(module, SHAPE)
    with pytest.warns(UserWarning, match="its part '2', BatchNorm1d looks at the whole batch"):
        loss = encoder.alignment_loss(x)
    torch.testing.assert_close(loss, plain(module, x, 1, 1.0, lambda r: r), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="BatchNorm1d"):
        encoder.affine()
    module.eval()
    assert encoder.shares_start()


@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_drawn_starts_are_seeded(init: Any) -> None:
    encoder = revprop.FeatureAligned(smooth(), SHAPE, init=init, seed=3)
    x = torch.rand(4, *SHAPE)
    z = encoder(x).detach()
    assert torch.equal(encoder.invert(z), encoder.invert(z))
    other = revprop.FeatureAligned(encoder.module, SHAPE, init=init, seed=4)
    assert not torch.equal(encoder.invert(z), other.invert(z))
    losses = [encoder.alignment_loss(x, torch.Generator().manual_seed(seed)).item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    # as written, from the same start
    r = {"normal": torch.randn, "uniform": torch.rand}[init](4, *SHAPE, generator=torch.Generator().manual_seed(0))
    slope = torch.autograd.grad(half_squares(encoder(r.requires_grad_()) - encoder(x)) * 4, r)[0]
    assert losses[0] == pytest.approx(half_squares(x - (r - slope)).item(), rel=1e-6)


def test_the_modules_state_is_left_alone() -> None:
    module = Normed()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    encoder = revprop.FeatureAligned(module, SHAPE)
    encoder.alignment_loss(torch.rand(3, *SHAPE))
    encoder.reconstruct(torch.rand(3, *SHAPE))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert not module.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "normall"}, "did you mean 'normal'"),
        ({"output": "sigmoids"}, "did you mean 'sigmoid'"),
        ({"steps": 0}, "steps: expected at least 1, given 0"),
        ({"step_size": -1.0}, "step_size: expected a positive number"),
        ({"input_shape": ()}, "input_shape: expected the sizes of one example"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        revprop.FeatureAligned(smooth(), **{"input_shape": SHAPE, **options})


def test_wrong_shapes_and_nan_are_refused() -> None:
    for share in (True, False):
        encoder = revprop.FeatureAligned(smooth(), SHAPE, share_start=share)
        with pytest.raises(ValueError, match=r"x: expected inputs of shape \(n, 2, 6, 6\), given \(3, 2, 5, 6\)"):
            encoder.alignment_loss(torch.zeros(3, 2, 5, 6))
        with pytest.raises(ValueError, match="z: expected codes of shape"):
            encoder.invert(torch.zeros(3, 4))
        with pytest.raises(NonFiniteError, match="z holds 1 of 9"):
            encoder.invert(torch.eye(3) + torch.tensor([math.nan, 0, 0]).diag())


# -- the appendix ----------------------------------------------------------------------------------------------------------


@given(
    w=st.floats(0.1, 1.99), code=st.floats(-3, 3), steps=st.integers(1, 60), init=st.sampled_from(["zeros", "normal"])
)
def test_one_weight_converges_as_equation_18_says(w: float, code: float, steps: int, init: Any) -> None:
    """r_T - z/w = (r_0 - z/w) (1 - w^2)^T: to z/w where w^2 < 2 (Equation 19), away from it where not."""
    layer = nn.Linear(1, 1, bias=False, dtype=DOUBLE)
    nn.init.constant_(layer.weight, w)
    encoder = revprop.FeatureAligned(layer, (1,), steps, init=init, seed=1)
    z = torch.tensor([[code]], dtype=DOUBLE)
    first = 0.0
    if init == "normal":
        first = torch.randn(1, 1, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).item()
    apart = encoder.invert(z).item() - code / w
    assert apart == pytest.approx((first - code / w) * (1 - w * w) ** steps, rel=1e-7, abs=1e-9)


def test_one_weight_beyond_the_bound_diverges_and_clamping_brings_it_back() -> None:
    layer = nn.Linear(1, 1, bias=False, dtype=DOUBLE)
    z = torch.ones(1, 1, dtype=DOUBLE)
    nn.init.constant_(layer.weight, 1.5)
    errors = [abs(revprop.FeatureAligned(layer, (1,), T).invert(z).item() - 1 / 1.5) for T in (5, 10, 20)]
    assert errors[0] < errors[1] < errors[2]
    clamp_weights(layer, 1.4)
    errors = [abs(revprop.FeatureAligned(layer, (1,), T).invert(z).item() - 1 / 1.4) for T in (5, 10, 400)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


def test_clamping_leaves_biases_and_gains() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    for parameter in module.parameters():
        nn.init.constant_(parameter, 5.0)
    clamp_weights(module)
    assert module[0].weight.unique().tolist() == pytest.approx([math.sqrt(2)])
    assert [p.unique().tolist() for p in (module[0].bias, module[1].weight, module[1].bias)] == [[5.0]] * 3
    with pytest.raises(ValueError, match="bound: expected a positive number, given 0"):
        clamp_weights(module, 0)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_steps_of_a_linear_encoder_converge_to_the_pseudo_inverse(shape: tuple[int, int]) -> None:
    """Landweber's iteration, against the core's linear map; the error shrinks as the smallest singular value says."""
    values = torch.linspace(0.5, 1.3, min(shape), dtype=DOUBLE)
    generator = torch.Generator().manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape, dtype=DOUBLE, generator=generator), full_matrices=False)
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=DOUBLE)
    layer.weight.data = u @ values.diag() @ vt
    layer.requires_grad_(False)
    z = torch.randn(6, shape[0], dtype=DOUBLE, generator=generator)
    inverse = Dense(layer.weight).factor(0.0).solve(z)
    errors = []
    for steps in (1, 10, 200):
        errors.append(float((revprop.FeatureAligned(layer, (shape[1],), steps).invert(z) - inverse).detach().norm()))
        assert errors[-1] <= float(inverse.norm()) * 0.75**steps + 1e-12  # 1 - 0.5^2
    assert errors[0] > errors[1] > errors[2]


def test_of_rank_deficient_weights_the_solution_of_smallest_norm() -> None:
    layer = nn.Linear(4, 3, bias=False, dtype=DOUBLE)
    layer.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 0.8, 0, 0], [0, 0.8, 0, 0]], dtype=DOUBLE)
    z = torch.randn(5, 3, dtype=DOUBLE)
    found = revprop.FeatureAligned(layer, (4,), 200).invert(z)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, Dense(layer.weight).factor(0.0).solve(z), rtol=0, atol=1e-10)


def test_steps_of_a_convolution_converge_to_its_pseudo_inverse() -> None:
    conv = nn.Conv2d(2, 3, 3, 2, 1, bias=False, dtype=DOUBLE)
    orthogonal_weights(conv, torch.Generator().manual_seed(0))
    x = torch.randn(3, 2, 6, 6, dtype=DOUBLE)
    matrix = torch.func.jacrev(lambda v: conv(v.view(1, 2, 6, 6)).flatten())(torch.zeros(72, dtype=DOUBLE))
    norm = float(torch.linalg.matrix_norm(matrix.detach(), 2))
    assert 1.4 < norm < 2  # kernels of orthonormal rows do not bound the convolution's norm by one: a shorter step
    wide, narrow = (2, 6, 6), (3, 3, 3)
    linear = Convolution(conv.weight, wide, narrow, (2, 2), ((1, 1), (1, 1)), (1, 1), 1)
    expected = linear.factor(0.0, "exact").solve(conv(x).detach())
    found = revprop.FeatureAligned(conv, wide, 3000, step_size=0.5).reconstruct(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_trained_linear_weights_invert_the_range_of_the_data() -> None:
    """Section 7.2: the loss is least where W^T W is the identity on what the data spans."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 3, dtype=DOUBLE, generator=generator)).Q
    x = torch.randn(200, 3, dtype=DOUBLE, generator=generator) @ basis.T
    layer = nn.Linear(8, 4, bias=False, dtype=DOUBLE)
    orthogonal_weights(layer, generator)
    encoder = revprop.FeatureAligned(layer, (8,))
    optimizer = torch.optim.LBFGS(encoder.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = encoder.alignment_loss(x)
        loss.backward()
        return loss

    before = float(torch.linalg.matrix_norm(basis.T @ layer.weight.T @ layer.weight @ basis - torch.eye(3)).detach())
    optimizer.step(step)
    gram = (layer.weight.T @ layer.weight).detach()
    assert before > 0.5
    torch.testing.assert_close(gram @ basis, basis, rtol=0, atol=1e-4)
    torch.testing.assert_close(encoder.reconstruct(x), x, rtol=0, atol=1e-3)
