from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_safety.errors import DataError
from peft_safety.evaluation.metrics import Mean, Paired, Rate, figure_from_json, wilson_interval

counts = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts)
def test_wilson_contains_the_rate_and_stays_in_the_unit_interval(count):
    k, n = count
    low, high = wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high


@given(counts)
def test_wilson_is_symmetric(count):
    k, n = count
    low, high = wilson_interval(k, n)
    mirrored = wilson_interval(n - k, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(counts.filter(lambda count: count[0] < count[1]))
def test_wilson_rises_with_k(count):
    k, n = count
    (low, high), (next_low, next_high) = wilson_interval(k, n), wilson_interval(k + 1, n)
    assert next_low > low
    assert next_high > high


@given(counts)
def test_wilson_narrows_with_n(count):
    k, n = count
    few, many = wilson_interval(k, n), wilson_interval(10 * k, 10 * n)
    assert many[1] - many[0] < few[1] - few[0]


def test_wilson_known_values():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81/263, 15/148, 0/20, 1/29
    for k, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(k, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_impossible_counts_are_refused(k, n):
    with pytest.raises(DataError, match="at least one item"):
        Rate(k, n)


def test_rate_of_outcomes():
    assert Rate.of(iter([True, False, True])) == Rate(2, 3)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20))
def test_mean_interval_contains_the_mean(values):
    mean = Mean.of(values)
    assert min(values) - 1e-9 <= mean.value <= max(values) + 1e-9
    assert mean.interval[0] <= mean.value <= mean.interval[1]


def test_one_value_tells_nothing_about_its_spread():
    mean = Mean.of([2.0])
    assert mean.interval == (-math.inf, math.inf)
    assert mean.to_json()["low"] is None


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_undefined_means_are_refused(values):
    with pytest.raises(DataError):
        Mean.of(values)


@pytest.mark.parametrize("figure", [Rate(3, 7), Mean.of([1.0, 2.0, 4.0]), Mean.of([1.5])])
def test_json_round_trip(figure):
    back = figure_from_json(json.loads(json.dumps(figure.to_json(), allow_nan=False)))
    assert type(back) is type(figure)
    assert back.to_json() == pytest.approx(figure.to_json())


def test_neither_rate_nor_mean():
    with pytest.raises(DataError, match="neither a rate"):
        figure_from_json({"value": 1.0})


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_sign_test(b, c):
    chances = [math.comb(b + c, k) / 2 ** (b + c) for k in range(b + c + 1)]
    as_uneven = sum(chance for chance in chances if chance <= chances[b] * (1 + 1e-12))
    assert Paired(b, c, b + c).p_value == pytest.approx(as_uneven, rel=1e-9)
    assert Paired(b, c, b + c).p_value == Paired(c, b, b + c).p_value


def test_a_paired_comparison_counts_what_differs():
    found = Paired.of([True, True, False, False, True, True], [True, False, True, False, False, False])
    assert (found.only_first, found.only_second, found.n) == (3, 1, 6)
    assert found.difference == pytest.approx(1 / 3)
    assert found.p_value == pytest.approx(2 * (1 + 4) / 16)
    with pytest.raises(DataError, match="are no pairs"):
        Paired.of([True], [])
    with pytest.raises(DataError, match="not negative"):
        Paired(-1, 2, 2)
