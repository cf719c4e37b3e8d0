"""Words of errors: near matches, and how many values are bad."""

import pytest
import torch

from revprop.errors import NonFiniteError, UnsupportedOperatorError, near_matches, require_finite


def test_near_matches_come_first_else_what_is_known() -> None:
    assert near_matches("fc", ["conv1", "fc1", "fc2"], "layer") == "unknown layer 'fc'; did you mean 'fc2' or 'fc1'?"
    assert near_matches("x", ["conv1", "fc1"], "layer") == "unknown layer 'x'; known: 'conv1', 'fc1'"
    many = near_matches("x", [f"layer{i}" for i in range(30)], "layer")
    assert many.endswith("'layer19', ...")
    assert "layer20" not in many


def test_bad_values_are_counted_and_named() -> None:
    require_finite(torch.tensor([1, 2]), "labels")
    require_finite(torch.zeros(0), "nothing")
    with pytest.raises(NonFiniteError, match="weights holds 2 of 3 values that are NaN or infinite"):
        require_finite(torch.tensor([1.0, torch.nan, -torch.inf]), "weights")


def test_uncovered_operators_are_listed_with_what_to_do() -> None:
    one = UnsupportedOperatorError([("softmax.int", "head", "(n, 3)", "no rule yet")])
    assert str(one).splitlines() == [
        "1 operator has no reverse rule for the greedy strategy:",
        "  softmax.int in head, output (n, 3): no rule yet",
        'Use strategy="global", which needs no rules, or reconstruct only layers behind these operators (to=...).',
    ]
    assert isinstance(one, NotImplementedError)
    two = UnsupportedOperatorError([*one.operators, ("mul.Tensor", "", "(n, 3)", "a product")])
    assert str(two).startswith("2 operators have no reverse rule")
    assert "mul.Tensor in the model itself, output (n, 3): a product" in str(two)
