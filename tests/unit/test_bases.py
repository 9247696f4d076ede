"""Bases from moments and weights: what they guarantee on the data behind them, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_safety.calibration import bases
from peft_safety.calibration.bases import Size, contrastive_basis, input_basis, output_basis
from peft_safety.core import projection
from peft_safety.core.projection import orthonormality_error, principal_cosines, project_out, union
from peft_safety.errors import CalibrationError, ConfigError

seeds = st.integers(0, 2**31)


def data(seed, d, tokens, decay=1.0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(d, tokens, generator=g).T * torch.arange(1, d + 1).float() ** -decay).T


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(3, 40), st.integers(1, 8), st.floats(0, 2))
def test_the_update_outside_the_top_k_has_at_most_the_next_eigenvalue_of_energy(seed, n, k, decay):
    k = min(k, n - 1)
    x = data(seed, n, 3 * n, decay)
    q, _ = input_basis(x @ x.T, Size(rank=k), "layer")
    g = torch.Generator().manual_seed(seed + 1)
    a, b = torch.randn(4, n, generator=g), torch.randn(6, 4, generator=g)
    dw = (b @ project_out(q, a, "in")).double()
    values = torch.linalg.eigvalsh(x.double() @ x.double().T / x.shape[1]).flip(0)
    energy = (dw @ x.double()).square().sum() / x.shape[1]
    assert energy <= (values[k] * (1 + 1e-3) + 1e-5 * values[0]) * dw.square().sum()


@pytest.mark.parametrize("n", [64, 1100])
def test_iterated_and_dense_decompositions_agree(n, monkeypatch):
    x = data(0, n, 400)
    s = x @ x.T
    monkeypatch.setattr(bases, "DENSE_LIMIT", n)
    dense, exact = input_basis(s, Size(rank=8), "layer")
    monkeypatch.setattr(bases, "DENSE_LIMIT", 1)
    found, spectrum = input_basis(s, Size(rank=8), "layer")
    torch.testing.assert_close(found @ found.T, dense @ dense.T, atol=1e-4, rtol=0)
    torch.testing.assert_close(spectrum, exact, rtol=1e-4, atol=0)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0.05, 0.999), st.floats(0.2, 2))
def test_energy_takes_the_fewest_directions_that_hold_it(seed, energy, decay):
    x = data(seed, 24, 100, decay)
    w = data(seed + 1, 16, 24, 0.5)
    for found, (u, s) in (
        (torch.linalg.svdvals(x).square(), input_basis(x @ x.T, Size(energy=energy), "layer")),
        (torch.linalg.svdvals(w @ x).square(), output_basis(w, x @ x.T, Size(energy=energy), "layer")),
        (torch.linalg.svdvals(w).square(), output_basis(w, None, Size(energy=energy), "layer")),
    ):
        shares = found.cumsum(0) / found.sum()
        k = u.shape[1]
        assert shares[k - 1] >= energy - 1e-4
        assert k == 1 or shares[k - 2] <= energy + 1e-4
        assert orthonormality_error(u) < 1e-5
        torch.testing.assert_close(s.square(), found[:k], rtol=1e-2, atol=1e-5 * float(found[0]))


@pytest.mark.parametrize("limit", [4, 50])
def test_an_energy_takes_no_more_than_its_cap(limit, monkeypatch):
    """4 binds, 50 does not; a share of 0.04 or 0.5 means the same of 100 features."""
    w, x = data(1, 100, 100, 0.0), data(0, 100, 400, 0.5)
    for dense in (bases.DENSE_LIMIT, 16):
        monkeypatch.setattr(bases, "DENSE_LIMIT", dense)
        for take in (
            lambda size: input_basis(x @ x.T, size, "layer")[0],
            lambda size: output_basis(w, x @ x.T, size, "layer")[0],
            lambda size: contrastive_basis(x @ x.T, torch.eye(100), size, "layer")[0],
        ):
            free = take(Size(energy=0.6))
            assert 4 < free.shape[1] < 50
            for size in (Size(rank=limit, energy=0.6), Size(share=limit / 100, energy=0.6)):
                found = take(size)
                assert found.shape[1] == min(limit, free.shape[1])
                assert float(principal_cosines(found, free).min()) > 1 - 1e-4
    assert take(Size(rank=1000, energy=1.0)).shape[1] == 99, "a cap leaves something to train"


def test_many_directions_are_found_by_growing(monkeypatch):
    w = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    u, _ = output_basis(w, None, Size(energy=0.9), "layer")
    exact = torch.linalg.svdvals(w).square()
    k = int((exact.cumsum(0) < 0.9 * exact.sum()).sum()) + 1
    assert abs(u.shape[1] - k) <= 3, "a flat spectrum: randomized values are a little low"


@settings(max_examples=25, deadline=None)
@given(seeds)
def test_a_contrastive_basis_prefers_what_only_the_first_data_use(seed):
    g = torch.Generator().manual_seed(seed)
    d = 20
    only, both = torch.linalg.qr(torch.randn(d, 6, generator=g)).Q.split(3, dim=1)
    noise = 0.05 * torch.randn(d, 400, generator=g)
    x = only @ torch.randn(3, 400, generator=g) + 3 * both @ torch.randn(3, 400, generator=g) + noise
    y = 3 * both @ torch.randn(3, 400, generator=g) + 0.05 * torch.randn(d, 400, generator=g)
    q, mu = contrastive_basis(x @ x.T, y @ y.T, Size(rank=3), "layer")
    plain, _ = input_basis(x @ x.T, Size(rank=3), "layer")
    assert (q.T @ only).square().sum() > 2.5
    assert (plain.T @ only).square().sum() < 0.5, "the plain basis takes the strong directions, which both use"
    assert bool((mu[:-1] >= mu[1:]).all())


def test_a_contrastive_basis_solves_the_generalized_eigenproblem():
    x, y = data(1, 12, 60), data(2, 12, 60, 0.3)
    s, t = (x @ x.T).double(), (y @ y.T).double()
    q, mu = contrastive_basis(s, t, Size(rank=4), "layer")
    trace = s.diagonal().sum()
    t = t * (trace / t.diagonal().sum()) + bases.RIDGE * trace / 12 * torch.eye(12, dtype=torch.float64)
    values, vectors = torch.linalg.eig(torch.linalg.solve(t, s))
    order = values.real.argsort(descending=True)[:4]
    expected = torch.linalg.qr(vectors.real[:, order]).Q
    torch.testing.assert_close((q @ q.T).double(), expected @ expected.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(mu.double().square(), values.real[order], rtol=1e-4, atol=0)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 5), st.integers(1, 5))
def test_a_union_spans_both_keeps_the_first_and_grows_only_once(seed, k, extra):
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(16, k, generator=g)).Q
    x = torch.randn(16, extra, generator=g) @ torch.randn(extra, extra + 2, generator=g)
    both = union(u, x)
    assert torch.equal(both[:, :k], u)
    assert both.shape[1] == k + extra, "dependent columns add nothing"
    assert orthonormality_error(both) < 1e-5
    assert float(project_out(both.double(), x.double()).norm() / x.norm()) < 1e-6
    assert union(both, x).shape == both.shape
    assert union(u, 0 * x).shape == u.shape


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (dict(), "none"),
        (dict(rank=2, share=0.5), "rank"),
        (dict(energy=0.0), "energy=0.0"),
        (dict(energy=1.5), "energy=1.5"),
        (dict(energy=True), "energy=True"),
        (dict(energy=math.nan), "energy=nan"),
        (dict(share=1.0), "rank=1.0"),
        (dict(rank="8"), "rank='8'"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(size, said):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        Size(**size)


@pytest.mark.parametrize("rank", [0, 12, 13])
def test_a_rank_that_leaves_nothing_or_is_nothing_is_refused_by_name_and_shape(rank):
    with pytest.raises(ConfigError, match=rf"layer: rank={rank} of 12 input features .*12 x 12"):
        input_basis(torch.eye(12), Size(rank=rank), "layer")


@pytest.mark.parametrize("bad", [torch.zeros(8, 8), torch.full((8, 8), math.nan), torch.eye(8) * math.inf])
def test_moments_that_are_zero_or_not_finite_are_refused(bad):
    good = torch.eye(8)
    for call in (
        lambda: input_basis(bad, Size(rank=2), "layer"),
        lambda: output_basis(torch.ones(4, 8), bad, Size(rank=2), "layer"),
        lambda: contrastive_basis(bad, good, Size(rank=2), "layer"),
        lambda: contrastive_basis(good, bad, Size(rank=2), "layer"),
    ):
        with pytest.raises(CalibrationError, match=r"layer: the second moment \(8, 8\)"):
            call()
    with pytest.raises(CalibrationError, match=r"layer: the weight \(8, 8\)"):
        output_basis(bad, None, Size(rank=2), "layer")


def test_a_rank_deficient_moment_gives_the_directions_that_it_has():
    x = data(0, 12, 3)
    q, s = input_basis(x @ x.T, Size(rank=6), "layer")
    assert q.shape[1] == s.numel() == 3, "the caller compares this with what it asked for"
    q, mu = contrastive_basis(x @ x.T, torch.eye(12), Size(rank=6), "layer")
    assert q.shape[1] == mu.numel() == 3


def test_vectors_of_an_inexact_svd_become_orthonormal_and_keep_their_span(monkeypatch):
    """A GPU's fp32 SVD is off by 1e-4, ten times what a subspace allows."""
    exact = projection.top_left_singular

    def inexact(*args, **options):
        u, s = exact(*args, **options)
        return u + 1e-4 * torch.randn(u.shape, generator=torch.Generator().manual_seed(1)) / u.shape[0] ** 0.5, s

    monkeypatch.setattr(projection, "top_left_singular", inexact)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    u, _ = output_basis(weight, None, Size(rank=40), "layer")
    expected, _ = exact(weight, None, 40, iterations=bases.WEIGHT_ITERATIONS)
    assert orthonormality_error(u) < 1e-6
    assert principal_cosines(u, expected).min() > 1 - 1e-6
    assert (u * expected).sum(0).min() > 0.99, "signs and order stay"
