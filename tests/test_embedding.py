"""Wanted logits: the nearest embedding against every set of active constraints, and what labels that do not fit get."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from revprop.embedding import check_labels, embed_labels, shortfall
from revprop.errors import NonFiniteError

F64 = torch.float64


def projection(logits: Tensor, label: int, margin: float) -> Tensor:
    """The point of {a : a_y >= a_i + margin} nearest to one sample's logits: of every set of active constraints, solved
    as a system of equations (KKT), the feasible one that is nearest."""
    classes = len(logits)
    rows = torch.eye(classes, dtype=F64)[label] - torch.eye(classes, dtype=F64)
    others = [i for i in range(classes) if i != label]
    best = None
    for k in range(classes):
        for active in itertools.combinations(others, k):
            r = rows[list(active)]
            a = logits + r.T @ torch.linalg.solve(r @ r.T, margin - r @ logits)
            feasible = bool((rows[others] @ a >= margin - 1e-9).all())
            if feasible and (best is None or (a - logits).norm() < (best - logits).norm()):
                best = a
    assert best is not None
    return best


@given(st.integers(2, 6), st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 2.0]), st.booleans())
def test_nearest_is_the_euclidean_projection(classes: int, seed: int, margin: float, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, classes, generator=generator, dtype=F64) * 2
    logits = logits.round() if ties else logits
    labels = torch.randint(0, classes, (3,), generator=generator)
    found = embed_labels(logits, labels, "nearest", margin)
    expected = torch.stack([projection(a, int(y), margin) for a, y in zip(logits, labels, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert float(shortfall(found, labels, margin).amax()) <= 1e-12


def test_nearest_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [4.0, 1.0, 3.5], [4.0, 1.0, 3.5]])
    expected = torch.tensor([[2.0, 2.0, 0.0], [17 / 6, 17 / 6, 17 / 6], [4.0, 1.0, 3.5]])
    torch.testing.assert_close(embed_labels(logits, torch.tensor([1, 1, 0]), "nearest"), expected)
    torch.testing.assert_close(
        embed_labels(logits[:1], torch.tensor([0]), "nearest", margin=3.0), torch.tensor([[3.5, 0.5, 0.0]])
    )


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5]))
def test_right_answers_stay_as_they_are_and_a_second_time_changes_nothing(seed: int, margin: float) -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed), dtype=F64)
    labels = torch.arange(8) % 5
    found = embed_labels(logits, labels, "nearest", margin)
    right = shortfall(logits, labels, margin) <= 0
    torch.testing.assert_close(found[right], logits[right], rtol=0, atol=0)
    torch.testing.assert_close(embed_labels(found, labels, "nearest", margin), found, rtol=0, atol=1e-12)


def test_maximum_lifts_the_label_alone() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [1.0, 5.0, 0.0]])
    labels = torch.tensor([1, 1])
    torch.testing.assert_close(
        embed_labels(logits, labels, "maximum"), torch.tensor([[3.0, 3.0, 0.0], [1.0, 5.0, 0.0]])
    )
    torch.testing.assert_close(
        embed_labels(logits, labels, "maximum", 5.0), torch.tensor([[3.0, 8.0, 0.0], [1.0, 6.0, 0.0]])
    )


def test_one_hot() -> None:
    found = embed_labels(torch.randn(2, 3, dtype=F64), torch.tensor([2, 0]), "one_hot")
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], dtype=F64))


@pytest.mark.parametrize("embedding", ["nearest", "maximum", "one_hot"])
def test_one_class_and_no_samples(embedding: str) -> None:
    one = embed_labels(torch.tensor([[2.0], [1.0]]), torch.tensor([0, 0]), embedding, 1.0)
    torch.testing.assert_close(one, torch.ones(2, 1) if embedding == "one_hot" else torch.tensor([[2.0], [1.0]]))
    assert embed_labels(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), embedding).shape == (0, 4)


def test_shortfall_is_what_is_missing_to_win() -> None:
    logits = torch.tensor([[3.0, 1.0], [0.0, 2.0], [1.0, 1.0]])
    torch.testing.assert_close(shortfall(logits, torch.tensor([1, 1, 0]), 0.5), torch.tensor([2.5, -1.5, 0.5]))
    assert shortfall(torch.ones(1, 1), torch.tensor([0])).item() == -math.inf


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), r"labels: expected 0 to 2 for 3 outputs; given 0 to 3"),
        (torch.tensor([-1, 0]), r"labels: expected 0 to 2 for 3 outputs; given -1 to 0"),
        (torch.tensor([0, 1, 2]), r"labels: expected shape \(2,\), one per sample; given \(3,\)"),
        (torch.tensor([[0], [1]]), r"labels: expected shape \(2,\), one per sample; given \(2, 1\)"),
        (torch.tensor([0.0, 1.0]), r"labels: expected int64 class indices, given torch.float32; .*labels.long\(\)"),
        (torch.tensor([0, 1], dtype=torch.int32), r"expected int64 class indices, given torch.int32"),
        ([0, 1], r"labels: expected a tensor \(n,\) of int64 class indices, given a list"),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_both_sides_named(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_labels(torch.zeros(2, 3), labels)


def test_outputs_that_are_no_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(n, classes\); the network's are \(2, 3, 4\): give target="):
        embed_labels(torch.zeros(2, 3, 4), torch.tensor([0, 1]))


def test_unknown_embeddings_and_bad_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown embedding 'nearst'; did you mean 'nearest'"):
        embed_labels(torch.zeros(1, 2), torch.tensor([0]), "nearst")
    with pytest.raises(NonFiniteError, match="logits holds 1 of 2 values that are NaN or infinite"):
        embed_labels(torch.tensor([[0.0, torch.nan]]), torch.tensor([0]))
