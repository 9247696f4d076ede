"""The audit's figures against their dense definitions, and their nulls against plain simulation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_safety.audit import metrics
from peft_safety.audit.metrics import DIRECTIONS, compare, decompose, random_metric, weight_span


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """`W (m, n)`, `lora_A (r, n)`, `lora_B (m, r)` in fp64 with decaying spectra, and a scaling; r may exceed m or n,
    as a residual's does.
    """
    m, n, r = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(1, 12))
    seed = draw(st.integers(0, 2**31))
    w = randn(m, n, seed=seed) * torch.logspace(0, -1, n, dtype=torch.float64)
    return w, randn(r, n, seed=seed + 1), randn(m, r, seed=seed + 2), draw(st.floats(0.1, 4.0))


@given(problems())
@settings(max_examples=60, deadline=None)
def test_the_decomposition_is_the_svd_of_the_dense_update(problem):
    _, a, b, s = problem
    dense = s * b @ a
    update = decompose(a, b, s)
    assert update.rank == min(a.shape[0], *dense.shape)
    torch.testing.assert_close((update.left * update.values) @ update.right.mT, dense, rtol=0, atol=1e-11)
    torch.testing.assert_close(update.values, torch.linalg.svdvals(dense)[: update.rank], rtol=1e-9, atol=1e-12)
    assert update.norm == pytest.approx(float(dense.norm()), rel=1e-12)
    shares = torch.linalg.svdvals(dense)[: update.rank]
    shares = shares / shares.sum()
    assert update.effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-9)
    assert 1 - 1e-12 <= update.effective_rank <= update.rank + 1e-9


@given(problems(), st.integers(1, 30))
@settings(max_examples=80, deadline=None)
def test_the_overlaps_equal_their_dense_definitions(problem, k):
    w, a, b, s = problem
    delta = s * b @ a
    update, span, exact = decompose(a, b, s), weight_span(w, k), torch.linalg.svd(w, full_matrices=False)
    du, _, dvh = torch.linalg.svd(delta, full_matrices=False)
    kept, q, p = min(k, *w.shape), min(DIRECTIONS, update.rank), min(DIRECTIONS, *w.shape)
    for side, vectors, weight_vectors, inside in (
        (compare(update.right, update.values, span.right, k), dvh.mT, exact.Vh.mT, delta @ exact.Vh[:kept].mT),
        (compare(update.left, update.values, span.left, k), du, exact.U, exact.U[:, :kept].mT @ delta),
    ):
        d = vectors.shape[0]
        product = vectors[:, :q].mT @ weight_vectors[:, :p]
        assert (side.directions, side.weight_directions, side.k) == (q, p, kept)
        assert side.metric == pytest.approx(float(product.abs().max()), abs=1e-7)
        angles = torch.rad2deg(torch.acos(torch.linalg.svdvals(product).clamp(max=1)))
        torch.testing.assert_close(torch.tensor(side.angles, dtype=torch.float64), angles, rtol=0, atol=1e-4)
        assert side.angle == min(side.angles)
        assert list(side.angles) == sorted(side.angles)
        assert side.energy == pytest.approx(float(inside.square().sum() / delta.square().sum()), rel=1e-7, abs=1e-9)
        assert side.energy_null == kept / d
        assert 0 <= side.metric <= 1 + 1e-12
        assert 0 <= side.energy <= 1 + 1e-12
    assert span.norm == pytest.approx(float(w.norm()), rel=1e-12)


@given(problems(), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_left_and_right_change_places_under_transposition(problem, k):
    w, a, b, s = problem
    update, turned = decompose(a, b, s), decompose(b.mT, a.mT, s)
    span, turned_span = weight_span(w, k), weight_span(w.mT, k)
    assert turned.effective_rank == pytest.approx(update.effective_rank, rel=1e-9)
    left, right = (
        compare(update.left, update.values, span.left, k),
        compare(turned.right, turned.values, turned_span.right, k),
    )
    assert left.metric == pytest.approx(right.metric, abs=1e-7)
    assert left.energy == pytest.approx(right.energy, abs=1e-9)
    assert (left.null, left.null_std, left.k) == (right.null, right.null_std, right.k)


@given(problems(), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_overlap_of_two_updates_is_the_cosine_of_the_dense_ones(problem, seed):
    _, a, b, s = problem
    other_a, other_b = randn(3, a.shape[1], seed=seed), randn(b.shape[0], 3, seed=seed + 1)
    first, second = decompose(a, b, s), decompose(other_a, other_b)
    one, two = b @ a, other_b @ other_a
    assert first.overlap(second) == pytest.approx(abs(float((one * two).sum() / (one.norm() * two.norm()))), abs=1e-10)
    assert first.overlap(first) == pytest.approx(1.0, abs=1e-12)
    assert first.overlap(second) == pytest.approx(second.overlap(first), abs=1e-12)


def test_an_update_made_of_the_weights_own_directions_and_one_outside():
    w = randn(40, 30, seed=0)
    exact = torch.linalg.svd(w)
    inside = decompose(exact.Vh[:4], exact.U[:, :4] * torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    span = weight_span(w, 8)
    for found in (
        compare(inside.right, inside.values, span.right, 8),
        compare(inside.left, inside.values, span.left, 8),
    ):
        assert found.metric == pytest.approx(1.0, abs=1e-7)
        assert found.energy == pytest.approx(1.0, abs=1e-9)
        assert found.angle < 0.01
        assert found.z > 3
    outside = decompose(exact.Vh[20:24], exact.U[:, 20:24])
    found = compare(outside.right, outside.values, span.right, 8)
    assert found.metric < 1e-6
    assert found.energy < 1e-12
    assert found.z < -2
    assert outside.effective_rank == pytest.approx(4.0, rel=1e-9)
    assert decompose(randn(1, 30, seed=1), randn(40, 1, seed=2)).effective_rank == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("n", "published"), [(4096, 0.041), (1024, 0.081)])
def test_the_null_of_eight_directions_is_the_known_one(n, published):
    mean, std = random_metric(n, 8, 8)
    assert mean == pytest.approx(published, abs=0.001)
    assert std * n**0.5 == pytest.approx(
        random_metric(65536, 8, 8)[1] * 256, rel=0.1
    )  # entries of a random frame scale with 1 / sqrt(n)


@pytest.mark.parametrize(
    ("d", "p", "q"), [(24, 8, 4), (24, 3, 5), (10, 8, 8), (8, 8, 8), (64, 1, 1), (9, 8, 2), (3, 2, 3)]
)
def test_the_null_agrees_with_whole_random_frames(d, p, q):
    generator = torch.Generator().manual_seed(5)
    frames = [
        torch.linalg.qr(torch.randn(4000, d, size, generator=generator, dtype=torch.float64)).Q for size in (q, p)
    ]
    drawn = (frames[0].mT @ frames[1]).abs().amax(dim=(1, 2))
    mean, std = random_metric(d, p, q)
    assert mean == pytest.approx(float(drawn.mean()), abs=5 * float(drawn.std()) * (2 / 4000) ** 0.5 + 1e-12)
    assert std == pytest.approx(float(drawn.std()), rel=0.08, abs=1e-12)


def test_random_updates_sit_at_their_null():
    w = randn(60, 48, seed=3)
    span = weight_span(w, 8)
    found = []
    for seed in range(200):
        update = decompose(randn(8, 48, seed=100 + seed), randn(60, 8, seed=1000 + seed))
        found.append(compare(update.right, update.values, span.right, 8))
    z = torch.tensor([row.z for row in found])
    assert abs(float(z.mean())) < 0.3
    assert 0.8 < float(z.std()) < 1.2
    assert sum(row.energy_ratio for row in found) / len(found) == pytest.approx(1.0, abs=0.05)


def test_a_null_that_cannot_vary_has_no_z_score():
    update, span = decompose(randn(1, 1, seed=0), randn(5, 1, seed=1)), weight_span(randn(5, 1, seed=2), 4)
    found = compare(update.right, update.values, span.right, 4)
    assert found.metric == pytest.approx(1.0)
    assert math.isnan(found.z)
    assert not math.isnan(compare(update.left, update.values, span.left, 4).z)


@pytest.mark.parametrize("b", [torch.zeros(9, 3), torch.cat([randn(9, 3, seed=0), -randn(9, 3, seed=0)], dim=1)])
def test_a_zero_update_has_no_figures(b):
    a = randn(3, 7, seed=1)
    update = decompose(torch.cat([a, a]) if b.shape[1] == 6 else a, b)
    assert (update.rank, update.norm) == (0, 0.0)
    assert math.isnan(update.effective_rank)
    assert math.isnan(update.overlap(decompose(a, randn(9, 3, seed=2))))
    found = compare(update.right, update.values, weight_span(randn(9, 7, seed=3), 4).right, 4)
    assert found.directions == 0
    assert found.angles == ()
    assert all(
        math.isnan(value)
        for value in (found.metric, found.null, found.z, found.angle, found.energy, found.energy_ratio)
    )


def test_a_weight_of_low_rank_offers_only_the_directions_it_has():
    update = decompose(randn(3, 20, seed=0), randn(16, 3, seed=1))
    span = weight_span((randn(16, 2, seed=2) @ randn(2, 20, seed=3)).float(), 8)
    found = compare(update.right, update.values, span.right, 8)
    assert (found.k, found.weight_directions) == (2, 2)
    assert found.energy_null == 2 / 20
    nothing = compare(update.right, update.values, weight_span(torch.zeros(16, 20), 8).right, 8)
    assert nothing.k == 0
    assert math.isnan(nothing.energy_ratio)


def test_the_null_is_drawn_once_and_the_same_for_a_seed():
    assert random_metric(50, 8, 8) is random_metric(50, 8, 8)
    first = random_metric(50, 8, 8)
    random_metric.cache_clear()
    torch.manual_seed(1)
    assert metrics.random_metric(50, 8, 8) == first
