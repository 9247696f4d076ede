"""The linear layer with an adapter: against dense fp64, its derivatives, its two paths, odd inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_safety import ops
from peft_safety.errors import OperationError
from peft_safety.ops.linear import SKINNY_ROWS
from tests.ops.helpers import EPS, Case, case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def dense(c: Case, x: Tensor, scale: float, x_adapter: Tensor | None = None) -> Tensor:
    """The formula, in fp64, from what the inputs hold."""
    return x @ c.dense.mT + scale * ((x if x_adapter is None else x_adapter) @ c.a.double().mT) @ c.bp.double().mT


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, slack: float = 8.0, size: Tensor | None = None) -> None:
    """Within a few roundings of the largest entry, or of the largest `size`: the few terms of a small result may
    cancel.
    """
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    largest = wanted if size is None else size
    bound = slack * EPS[dtype] * float(largest.abs().max().clamp(min=1e-30)) if wanted.numel() else 0.0
    assert wanted.numel() == 0 or float((found.double() - wanted).abs().max()) <= bound


@pytest.mark.parametrize("exact", [False, True], ids=["free", "exact"])
@pytest.mark.parametrize("rows", [1, 8, SKINNY_ROWS, SKINNY_ROWS + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_dense_fp64(dtype: torch.dtype, rows: int, exact: bool) -> None:
    c = case(48, 128, 5, nested=True)
    x = torch.randn(rows, 128).to(dtype)
    close(ops.nf4_lora(x, c.q, c.a, c.bp, 0.7, exact=exact), dense(c, x.double(), 0.7), dtype)


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("exact", [False, True], ids=["free", "exact"])
@pytest.mark.parametrize("split", [False, True], ids=["one-input", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_against_autograd_of_the_dense_formula(
    dtype: torch.dtype, split: bool, exact: bool, rows: int
) -> None:
    c = case(40, 128, 4)
    x = torch.randn(2, rows, 128).to(dtype).requires_grad_()
    xa = (x.detach() * 1.25).requires_grad_() if split else None
    a, bp = c.a.clone().requires_grad_(), c.bp.clone().requires_grad_()
    dy = torch.randn(2, rows, 40).to(dtype)
    y = ops.nf4_lora(x, c.q, a, bp, 0.5, exact=exact, x_adapter=xa)
    inputs = [t for t in (x, xa, a, bp) if t is not None]
    found = torch.autograd.grad(y, inputs, dy)
    twins = [t.detach().double().requires_grad_() for t in inputs]
    tx, ta, tb = twins[0], twins[-2], twins[-1]
    formula = tx @ c.dense.mT + 0.5 * ((twins[1] if split else tx) @ ta.mT) @ tb.mT
    wanted = torch.autograd.grad(formula, twins, dy.double())
    for got, want, leaf in zip(found, wanted, inputs, strict=True):
        assert got.dtype == leaf.dtype
        close(got, want, dtype, slack=16.0)


def test_only_what_is_wanted_is_computed_and_nothing_reaches_the_weight() -> None:
    c = case(32, 64, 4)
    x = torch.randn(100, 64, requires_grad=True)
    a = c.a.clone().requires_grad_()
    y = ops.nf4_lora(x, c.q, a, c.bp, 1.0)
    gx, ga = torch.autograd.grad(y.sum(), (x, a))
    assert gx.shape == x.shape
    assert ga.shape == a.shape
    assert not c.q.absmax.requires_grad
    frozen = ops.nf4_lora(x.detach(), c.q, a, c.bp, 1.0)
    (only,) = torch.autograd.grad(frozen.sum(), (a,))
    assert torch.equal(only, ga)


def test_the_two_paths_agree_to_rounding_and_the_choice_is_by_rows() -> None:
    c = case(64, 256, 8)
    few, many = torch.randn(SKINNY_ROWS, 256), torch.randn(SKINNY_ROWS + 1, 256)
    assert torch.equal(ops.nf4_lora(few, c.q, c.a, c.bp, 1.0), ops.nf4_lora(few, c.q, c.a, c.bp, 1.0, exact=True))
    merged = many @ ops.nf4_merged(c.q, c.a, c.bp, 1.0, torch.float32).mT
    assert torch.equal(ops.nf4_lora(many, c.q, c.a, c.bp, 1.0), merged)
    close(merged, dense(c, many.double(), 1.0), torch.float32)


@pytest.mark.parametrize("rows", [4, 70])
def test_strides_leading_dimensions_and_no_rows(rows: int) -> None:
    c = case(32, 64, 4)
    wide = torch.randn(64, 3, rows, dtype=torch.float32)
    x = wide.permute(1, 2, 0)
    assert not x.is_contiguous()
    close(ops.nf4_lora(x, c.q, c.a, c.bp, 1.0), dense(c, x.double(), 1.0), torch.float32)
    one = ops.nf4_lora(x[0, 0], c.q, c.a, c.bp, 1.0)
    close(one, dense(c, x[0, 0].double(), 1.0), torch.float32)
    empty = torch.randn(0, 64, requires_grad=True)
    a, bp = c.a.clone().requires_grad_(), c.bp.clone().requires_grad_()
    y = ops.nf4_lora(empty, c.q, a, bp, 1.0)
    assert y.shape == (0, 32)
    y.sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 64)
    assert a.grad is not None
    assert bp.grad is not None
    assert not a.grad.any()
    assert not bp.grad.any()


@given(
    n=st.integers(1, 40),
    blocks=st.integers(1, 4),
    r=st.integers(1, 9),
    rows=st.integers(0, 90),
    blocksize=st.sampled_from([32, 64, 128]),
    nested=st.booleans(),
    exact=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_shapes(n: int, blocks: int, r: int, rows: int, blocksize: int, nested: bool, exact: bool) -> None:
    c = case(n, blocks * blocksize, r, blocksize=blocksize, nested=nested)
    x = torch.randn(rows, c.q.k)
    terms = x.double().abs() @ (c.dense.abs() + 0.3 * (c.bp.double().abs() @ c.a.double().abs())).mT
    found, wanted = ops.nf4_lora(x, c.q, c.a, c.bp, -0.3, exact=exact), dense(c, x.double(), -0.3)
    close(found, wanted, torch.float32, slack=2.0, size=terms)


def test_merged_weight_and_its_derivative() -> None:
    c = case(24, 64, 3, nested=True)
    a, bp = c.a.clone().requires_grad_(), c.bp.clone().requires_grad_()
    merged = ops.nf4_merged(c.q, a, bp, 0.5, torch.float32)
    close(merged.detach(), c.dense + 0.5 * c.bp.double() @ c.a.double(), torch.float32, slack=2.0)
    weights = torch.randn(24, 64)
    da, db = torch.autograd.grad((merged * weights).sum(), (a, bp))
    close(da, 0.5 * c.bp.double().mT @ weights.double(), torch.float32)
    close(db, 0.5 * weights.double() @ c.a.double().mT, torch.float32)
    rounded = ops.nf4_merged(c.q, c.a, torch.zeros_like(c.bp), 0.5, torch.bfloat16)
    assert torch.equal(rounded, ops.nf4_dequant(c.q, torch.bfloat16))


def test_autocast_does_not_reach_inside() -> None:
    c = case(32, 64, 4)
    x = torch.randn(100, 64)
    plain = ops.nf4_lora(x, c.q, c.a, c.bp, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.nf4_lora(x, c.q, c.a, c.bp, 1.0), plain)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(3, 63)}, r"x \(3, 63\)"),
        ({"x": torch.zeros(3, 64, dtype=torch.float64)}, "float64 is no compute dtype"),
        ({"a": torch.zeros(4, 65)}, r"A \(4, 65\)"),
        ({"bp": torch.zeros(32, 5)}, r"B \(32, 5\)"),
        ({"x_adapter": torch.zeros(2, 64)}, r"x_adapter \(2, 64\)"),
    ],
)
def test_operands_that_do_not_fit(change: dict[str, Tensor], said: str) -> None:
    c = case(32, 64, 4)
    given_ = {"x": torch.zeros(3, 64), "q": c.q, "a": c.a, "bp": c.bp, "scale": 1.0, **change}
    with pytest.raises(OperationError, match=said):
        ops.nf4_lora(**given_)  # type: ignore[arg-type]


def test_compiles_without_a_graph_break() -> None:
    c = case(32, 64, 4)

    def step(x: Tensor, a: Tensor, bp: Tensor) -> Tensor:
        return torch.relu(ops.nf4_lora(x, c.q, a, ops.project_out(torch.eye(32)[:, :2], bp), 0.5))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (3, 100):
        x, a, bp = (
            torch.randn(rows, 64, requires_grad=True),
            c.a.clone().requires_grad_(),
            c.bp.clone().requires_grad_(),
        )
        found, wanted = compiled(x, a, bp), step(x, a, bp)
        torch.testing.assert_close(found, wanted)
        for got, want in zip(
            torch.autograd.grad(found.sum(), (x, a, bp)), torch.autograd.grad(wanted.sum(), (x, a, bp)), strict=True
        ):
            torch.testing.assert_close(got, want)
