"""The projection against its dense definition, as properties over shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_safety.core import projection

SIDES = projection.SIDES


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """A basis, `lora_A (r, n)`, `lora_B (m, r)` in fp64, and a side."""
    m, n = draw(st.integers(2, 24)), draw(st.integers(2, 24))
    r = draw(st.integers(1, min(m, n)))
    side = draw(st.sampled_from(SIDES))
    d = m if side == "out" else n
    k = draw(st.integers(1, d - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a, b, x = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((r, n), (m, r), (d, k)))
    return projection.orthonormalize(x), a, b, side


@given(problems())
@settings(max_examples=60, deadline=None)
def test_project_out_is_the_dense_projection_and_idempotent(problem):
    u, a, b, side = problem
    w = b if side == "out" else a
    c = u @ u.mT if side == "window" else torch.eye(u.shape[0], dtype=u.dtype) - u @ u.mT
    dense = c @ w if side == "out" else w @ c
    once = projection.project_out(u, w, side)
    torch.testing.assert_close(once, dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(projection.project_out(u, once, side), once, rtol=0, atol=1e-12)


@given(problems())
@settings(max_examples=40, deadline=None)
def test_leaks_equal_their_dense_definitions(problem):
    u, a, b, side = problem
    delta = b @ a
    part = {"out": lambda: u.mT @ delta, "in": lambda: delta @ u, "window": lambda: delta - delta @ u @ u.mT}[side]()
    assert projection.delta_leak(u, a, b, side) == pytest.approx(
        float(part.norm() / delta.norm()), rel=1e-9, abs=1e-12
    )
    w = b if side == "out" else a
    assert projection.leak(u, w, side) == pytest.approx(
        float(projection.coefficients(u, w, side).norm() / w.norm()), rel=1e-12
    )


@given(problems())
@settings(max_examples=40, deadline=None)
def test_the_backward_of_the_projection_is_the_projection(problem):
    u, a, b, side = problem
    w = (b if side == "out" else a).requires_grad_()
    g = torch.randn_like(w)
    (found,) = torch.autograd.grad(projection.project_out(u, w, side), w, g)
    torch.testing.assert_close(found, projection.project_out(u, g, side), rtol=0, atol=1e-12)


@given(problems(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=60, deadline=None)
def test_folding_removes_the_leak_and_folding_again_changes_no_bit(problem, dtype):
    u, a, b, side = problem
    w = (b if side == "out" else a).to(dtype)
    u = u.float()
    projection.fold_(u, w, side)
    assert projection.leak(u, w, side) <= projection.fold_tolerance(dtype)
    before = w.clone()
    assert not projection.fold_(u, w, side)
    assert torch.equal(w, before)


def test_a_window_that_is_the_whole_complement_constrains_as_the_null_space_does():
    generator = torch.Generator().manual_seed(0)
    whole = projection.orthonormalize(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    w = torch.randn(4, 40, generator=generator, dtype=torch.float64)
    expected = projection.project_out(whole[:, :25], w, "in")
    torch.testing.assert_close(projection.project_out(whole[:, 25:], w, "window"), expected, rtol=0, atol=1e-12)


def test_a_window_is_computed_in_fp64_where_low_precision_is_allowed(monkeypatch):
    """A second pass, which mends the other constraints, would round the result just as the first."""
    found, original = [], projection.project_out
    monkeypatch.setattr(projection, "project_out", lambda u, *rest: found.append(u.dtype) or original(u, *rest))
    u, w = projection.orthonormalize(torch.randn(32, 8)), torch.randn(4, 32)
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            assert projection.project_wide(u, w, "window").dtype == torch.float32
        finally:
            torch.set_float32_matmul_precision(before)
    assert found[0] == torch.float32
    assert set(found[1:]) == {torch.float64}


def test_folding_what_lies_in_the_span_entirely_leaves_nothing_behind():
    u = projection.orthonormalize(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    w = u @ torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    size = float(w.norm())
    projection.fold_(u, w, "out")
    assert float((u.mT @ w).norm()) <= 1e-6 * size


def test_a_zero_factor_does_not_leak_and_is_not_touched():
    u = projection.orthonormalize(torch.randn(8, 2))
    w = torch.zeros(8, 3)
    assert projection.leak(u, w) == 0.0
    assert not projection.fold_(u, w)
    assert projection.delta_leak(u, torch.zeros(3, 5), w) == 0.0


@pytest.mark.parametrize(
    ("m", "n", "tokens"), [(40, 24, 200), (24, 40, 200), (30, 30, 12), (150, 90, 200), (90, 150, 200)]
)
def test_top_left_singular_spans_the_exact_subspace(m, n, tokens):
    generator = torch.Generator().manual_seed(m)
    w = torch.randn(m, n, generator=generator, dtype=torch.float64)
    x = (
        torch.randn(n, tokens, generator=generator, dtype=torch.float64)
        * torch.logspace(0, -3, n, dtype=torch.float64)[:, None]
    )
    exact = torch.linalg.svd(w @ x)
    u, s = projection.top_left_singular(w, x @ x.mT, 6)
    torch.testing.assert_close(s, exact.S[:6], rtol=1e-6, atol=0)
    assert float(projection.principal_cosines(u, exact.U[:, :6]).min()) > 1 - 1e-8
    assert projection.orthonormality_error(u) < 1e-12


def test_top_left_singular_is_deterministic_for_a_seed():
    w, s = torch.randn(90, 80, generator=torch.Generator().manual_seed(3)), torch.eye(80)
    first, _ = projection.top_left_singular(w, s, 5, seed=7)
    torch.manual_seed(1)
    second, _ = projection.top_left_singular(w, s, 5, seed=7)
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (8, 200)])
def test_top_singular_reconstructs_as_well_as_the_exact_svd(shape):
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.logspace(
        0, -2, shape[1], dtype=torch.float64
    )
    u, s, v = projection.top_singular(w, 5)
    exact = torch.linalg.svdvals(w)
    assert float((w - (u * s) @ v.mT).norm()) == pytest.approx(float(exact[5:].norm()), rel=1e-6)


def test_principal_cosines_do_not_depend_on_the_choice_of_vectors():
    generator = torch.Generator().manual_seed(0)
    u, v = (projection.orthonormalize(torch.randn(20, 4, generator=generator)) for _ in range(2))
    rotation = projection.orthonormalize(torch.randn(4, 4, generator=generator))
    torch.testing.assert_close(
        projection.principal_cosines(u, v), projection.principal_cosines(u @ rotation, -v), atol=1e-6, rtol=0
    )
