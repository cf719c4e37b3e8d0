"""The numbers behind a report: the published ones, and the statistics of paired runs."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import make_run
from scipy import stats

from revprop.networks import NETWORKS
from revprop.report import PUBLISHED, Paired, RunGroup, best_setting, compare, compare_choices, correct, holm

# --- published numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", PUBLISHED)
def test_every_published_line_is_there_and_trains_what_the_network_has(network):
    sizes = {}
    for name, parameter in NETWORKS[network]().named_parameters():
        sizes[name.split(".")[0]] = sizes.get(name.split(".")[0], 0) + parameter.numel()
    sizes = list(sizes.values())
    table = PUBLISHED[network]
    layers = [(start, stop) for stop in range(1, len(sizes) + 1) for start in range(stop)]
    assert [(row.method, row.l_start, row.l_stop) for row in table.rows] == [
        (method, start, stop) for (start, stop), method in itertools.product(layers, ("bp", "fr"))
    ]
    for row in table.rows:
        assert row.parameters == sum(sizes[row.l_start : row.l_stop])
        # No cell is further than four points from the baseline, no spread nil or above one: a slip would be.
        assert all(abs(mean - table.baseline_accuracy) < 4 for mean in row.mean)
        assert all(0 < std < 1 for std in row.std)
    for bp, fr in zip(table.rows[::2], table.rows[1::2], strict=True):
        assert 1 < fr.memory_mb / bp.memory_mb < 1.3


def test_published_numbers_are_those_printed():
    def line(network, *key):
        row = PUBLISHED[network].row(*key)
        return row.memory_mb, row.mean, row.std

    assert line("mnist", "fr", 2, 3) == (5.41, (97.692, 97.742, 97.741), (0.047, 0.023, 0.034))
    assert line("cifar10", "bp", 1, 4) == (12.38, (62.451, 62.700, 62.682), (0.265, 0.184, 0.177))
    assert line("cifar100", "fr", 1, 5) == (23.29, (36.957, 37.116, 37.215), (0.092, 0.113, 0.155))
    assert line("tiny-imagenet", "bp", 4, 5) == (111.87, (26.779, 26.173, 25.539), (0.194, 0.159, 0.195))
    assert line("imagenette", "fr", 6, 7) == (1203.09, (51.409, 51.340, 51.126), (0.070, 0.135, 0.096))
    assert line("imagewoof", "fr", 4, 5) == (1060.81, (27.903, 27.544, 27.333), (0.353, 0.120, 0.215))
    baselines = [97.62, 62.55, 36.74, 24.99, 51.56, 27.23]
    assert [table.baseline_accuracy for table in PUBLISHED.values()] == baselines
    assert [table.alpha for table in PUBLISHED.values()] == [0.1, 0.1, 0.7, 0.7, 0.3, 0.1]
    assert [table.number for table in PUBLISHED.values()] == [1, 2, 3, 4, 5, 6]
    assert sum(len(table.rows) for table in PUBLISHED.values()) == 226
    assert PUBLISHED["mnist"].row("bp", 3, 4) is None


def test_published_margins_over_all_cells_and_epochs():
    margins = [table.margin() for table in PUBLISHED.values()]
    assert margins == pytest.approx([-0.122, 0.175, 0.057, -0.358, 0.035, 0.054])
    assert PUBLISHED["cifar10"].margin([10]) == pytest.approx(0.207)
    assert PUBLISHED["tiny-imagenet"].margin([5]) == pytest.approx(0.218)


# --- paired statistics ------------------------------------------------------------------------------------------------


def test_a_comparison_is_the_paired_t_test_over_shared_seeds():
    rng = np.random.default_rng(0)
    first = dict(enumerate(rng.normal(62, 0.5, 9)))
    second = {seed: value + rng.normal(0.1, 0.2) for seed, value in first.items() if seed > 1} | {40: 0.0}
    paired = compare(first, second)
    one, other = ([values[seed] for seed in range(2, 9)] for values in (first, second))
    test = stats.ttest_rel(one, other)
    assert paired.seeds == 7
    assert paired.mean == pytest.approx(statistics.fmean(one) - statistics.fmean(other))
    assert paired.p == pytest.approx(test.pvalue)
    assert paired.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert paired.wilcoxon == pytest.approx(stats.wilcoxon(one, other).pvalue)


def test_a_comparison_by_hand():
    # differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 2 sqrt(3); 4.302653 is the 97.5 % point of t with 2
    paired = compare({0: 61.0, 1: 62.0, 2: 63.0}, {0: 60.0, 1: 60.0, 2: 60.0})
    half = 4.302653 / math.sqrt(3)
    assert paired.interval == pytest.approx((2 - half, 2 + half), abs=1e-5)
    assert paired.p == pytest.approx(0.0741799, abs=1e-6)
    assert paired.wilcoxon == pytest.approx(2 / 2**3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([], Paired(0)),
        ([0.1], Paired(1, 0.1)),
        ([0.0, 0.0, 0.0], Paired(3, 0.0, None, 1.0, 1.0, 1.0)),
        ([0.25, 0.25, 0.25, 0.25], Paired(4, 0.25, None, 0.125, 0.125, 0.125)),
    ],
)
def test_comparisons_without_a_spread(differences, expected):
    second = {seed: 62.0 + seed / 7 for seed in range(len(differences))}  # equal differences, but for rounding
    paired = compare({seed: second[seed] + difference for seed, difference in enumerate(differences)}, second)
    assert paired.mean == (None if expected.mean is None else pytest.approx(expected.mean))
    assert (paired.seeds, paired.interval, paired.p, paired.wilcoxon, paired.corrected) == (
        *(expected.seeds, expected.interval, expected.p, expected.wilcoxon, expected.corrected),
    )


@pytest.mark.filterwarnings("error")
def test_ties_and_zeros_among_differences_do_not_disturb():
    paired = compare(dict(enumerate([1.0, 1.0, 0.0, 2.0, 1.0])), dict.fromkeys(range(5), 0.0))
    assert 0 < paired.wilcoxon <= 1
    assert paired.p == pytest.approx(stats.ttest_1samp([1, 1, 0, 2, 1], 0).pvalue)


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=7).filter(lambda values: len(set(values)) > 1))
def test_the_signed_rank_test_is_exact_with_ties(values):
    kept = np.array([value for value in values if value])
    ranks = stats.rankdata(abs(kept))
    sums = [sum(itertools.compress(ranks, signs)) for signs in itertools.product((0, 1), repeat=len(kept))]
    found = sum(ranks[kept > 0])
    tails = np.mean([one <= found for one in sums]), np.mean([one >= found for one in sums])
    assert compare(dict(enumerate(values)), dict.fromkeys(range(9), 0)).wilcoxon == pytest.approx(
        min(1, 2 * min(tails))
    )


def test_holm_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, and 0.04 raised to what came before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, None, 0.7]) == [1.0, None, 1.0]
    assert holm([]) == []
    assert [paired.corrected for paired in correct([Paired(3, 0.1, p=0.02), Paired(1, 0.1)])] == [0.02, None]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_rejects_as_its_definition_does(p_values):
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    rejected = set()
    for rank, place in enumerate(order):  # stop at the first that is not below its own level
        if p_values[place] * (len(order) - rank) >= 0.05:
            break
        rejected.add(place)
    corrected = holm(p_values)
    assert {place for place, p in enumerate(corrected) if p < 0.05} == rejected
    assert all(p <= q <= 1 for p, q in zip(p_values, corrected, strict=True))


def test_verdicts_need_the_corrected_p():
    assert Paired(5, 0.2, (0.1, 0.3), 0.01, corrected=0.01).verdict("FR", "BP") == "FR better"
    assert Paired(5, -0.2, (-0.3, -0.1), 0.01, corrected=0.01).verdict("FR", "BP") == "BP better"
    assert Paired(5, 0.2, (0.1, 0.3), 0.01, corrected=0.15).verdict("FR", "BP") == "no difference shown"
    assert Paired(1, 0.2).verdict("FR", "BP") == "not tested: 1 shared seed"
    assert Paired(0).verdict("FR", "BP") == "not tested: 0 shared seeds"


# --- the best of many -------------------------------------------------------------------------------------------------


def groups_of(*accuracies):
    return [
        RunGroup("fr", 0, stop, "", tuple(make_run(seed=s, accuracy=a, epochs=(1,)) for s, a in enumerate(values)))
        for stop, values in enumerate(accuracies, start=1)
    ]


def test_the_best_is_sought_among_those_with_the_most_seeds():
    best = best_setting(groups_of((0.7,), (0.6, 0.62), (0.61, 0.6)), [1])
    assert (best.group.layers, best.epoch, best.candidates) == ((0, 2), 1, 2)
    assert best.mean == pytest.approx(61)
    assert best_setting(groups_of((0.7,)), [5]) is None


def test_choices_are_measured_on_seeds_they_have_not_seen():
    first = groups_of((0.66, 0.60, 0.60), (0.61, 0.61, 0.61))  # the first is best through seed 0 alone
    second = groups_of((0.6, 0.6, 0.6))
    # without seed 0 the second is chosen (61), with it the first (60, 60)
    paired = compare_choices(first, second)
    assert paired.mean == pytest.approx((1 + 0 + 0) / 3)
    assert (paired.seeds, paired.interval, paired.p) == (3, None, None)
    assert compare_choices(groups_of((0.6,)), second).mean is None
    assert compare_choices([], second).mean is None
