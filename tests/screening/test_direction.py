"""The mathematics of a screen against other implementations of it."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from peft_safety.screening.direction import auc, discriminant, threshold_at

lda = pytest.importorskip("sklearn.discriminant_analysis").LinearDiscriminantAnalysis
SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=30)


def classes(seed: int, d: int, n: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    return [torch.randn(size, d, generator=g, dtype=torch.float64) @ mix + mean for size, mean in ((n, 1), (2 * n, 0))]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(2, 20), st.sampled_from([0.05, 0.1, 0.5, 1.0]))
def test_the_direction_is_that_of_sklearn(seed, d, n, shrinkage):
    """Also with fewer vectors than dimensions."""
    x, y = classes(seed, d, n)
    reference = lda(solver="lsqr", shrinkage=shrinkage)
    reference.fit(torch.cat([x, y]).numpy(), [1] * len(x) + [0] * len(y))
    expected = reference.coef_[0] / np.linalg.norm(reference.coef_[0])
    result = discriminant(x, y, shrinkage)
    assert float(result.norm()) == pytest.approx(1)
    assert float(result @ torch.from_numpy(expected)) == pytest.approx(1, abs=1e-6)


def test_the_difference_of_the_means():
    x, y = classes(0, 5, 8)
    difference = x.mean(0) - y.mean(0)
    torch.testing.assert_close(discriminant(x, y, 1.0), difference / difference.norm())


@pytest.mark.parametrize("shrinkage", [0.1, 1.0])
def test_equal_vectors_give_finite_numbers(shrinkage):
    one, other = torch.ones(4, 3), torch.zeros(4, 3)
    torch.testing.assert_close(discriminant(one, other, shrinkage), torch.full((3,), 3**-0.5, dtype=torch.float64))
    assert discriminant(one, one, shrinkage).isfinite().all()


@settings(deadline=None)
@given(arrays(float, st.integers(1, 20), elements=st.integers(-3, 3)), arrays(float, 7, elements=st.integers(-3, 3)))
def test_auc_counts_pairs(positive, negative):
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in positive for b in negative]
    assert auc(torch.from_numpy(positive), torch.from_numpy(negative)) == pytest.approx(np.mean(wins))


@settings(deadline=None)
@given(SCORES, SCORES)
def test_auc_of_the_classes_exchanged_is_the_rest(positive, negative):
    x, y = torch.tensor(positive), torch.tensor(negative)
    assert auc(x, y) + auc(y, x) == pytest.approx(1)


@settings(deadline=None)
@given(SCORES, st.floats(0, 0.999))
def test_the_threshold_is_the_lowest_that_keeps_to_the_rate(scores, rate):
    x = torch.tensor(scores)
    threshold = threshold_at(x, rate)
    assert int((x > threshold).sum()) <= rate * len(scores) + 1e-6
    lower = [score for score in scores if score < threshold]
    assume(lower)
    assert int((x > max(lower)).sum()) > rate * len(scores) - 1e-6


def test_rates_that_floats_miss():
    scores = torch.arange(100)
    assert int((scores > threshold_at(scores, 0.29)).sum()) == 29
