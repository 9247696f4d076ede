"""The linear layer with an adapter: against dense fp64, its derivatives, what it keeps, odd inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_safety import ops
from peft_safety.errors import OperationError
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


def fused(x: Tensor, c: Case, scale: float, a: Tensor | None = None, bp: Tensor | None = None) -> Tensor:
    return ops.nf4_lora(x, c.q, ops.lora_z(x, c.a if a is None else a), c.bp if bp is None else bp, scale)


@pytest.mark.parametrize("factors", ["fp32", "as x"])
@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_dense_fp64(dtype: torch.dtype, rows: int, factors: str) -> None:
    c = case(48, 128, 5, nested=True)
    x = torch.randn(rows, 128).to(dtype)
    kind = torch.float32 if factors == "fp32" else dtype
    assert ops.lora_z(x, c.a.to(kind)).dtype == kind
    y = fused(x, c, 0.7, c.a.to(kind), c.bp.to(kind))
    assert y.dtype == dtype
    close(y, dense(c, x.double(), 0.7), dtype)


@pytest.mark.parametrize("split", [False, True], ids=["one-input", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_against_autograd_of_the_dense_formula(dtype: torch.dtype, split: bool) -> None:
    c = case(40, 128, 4)
    x = torch.randn(2, 3, 128).to(dtype).requires_grad_()
    xa = (x.detach() * 1.25).requires_grad_() if split else None
    a, bp = c.a.clone().requires_grad_(), c.bp.clone().requires_grad_()
    dy = torch.randn(2, 3, 40).to(dtype)
    y = ops.nf4_lora(x, c.q, ops.lora_z(x if xa is None else xa, a), bp, 0.5)
    inputs = [t for t in (x, xa, a, bp) if t is not None]
    found = torch.autograd.grad(y, inputs, dy)
    twins = [t.detach().double().requires_grad_() for t in inputs]
    tx, ta, tb = twins[0], twins[-2], twins[-1]
    formula = tx @ c.dense.mT + 0.5 * ((twins[1] if split else tx) @ ta.mT) @ tb.mT
    wanted = torch.autograd.grad(formula, twins, dy.double())
    for got, want, leaf in zip(found, wanted, inputs, strict=True):
        assert got.dtype == leaf.dtype
        close(got, want, dtype, slack=16.0)


def test_derivatives_in_fp64() -> None:
    """The operations themselves take fp64, which the public functions refuse: no kernel has it."""
    c = case(6, 32, 2, blocksize=32, nested=True)
    calls: Any = torch.ops.peft_safety
    leaves = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((3, 32), (2, 32), (6, 2))]
    assert torch.autograd.gradcheck(
        lambda x, a, bp: calls.nf4_lora(x, *c.q, calls.lora_z(x, a), bp, 0.7), leaves, fast_mode=True
    )


@pytest.mark.parametrize("share", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_effective_update_is_whole_and_blind(dtype: torch.dtype, share: float) -> None:
    """What 16-bit outputs say of the update, by least squares over many tokens: its length, and its part in the span
    that A does not see. A weight `W + dW` rounded to these 16 bits is far from both.
    """
    n, k, r, blind, tokens = 48, 64, 4, 8, 60_000
    c = case(n, k, r)
    span = torch.linalg.qr(torch.randn(k, blind, dtype=torch.float64)).Q
    a = c.a.double()
    a = (a - (a @ span) @ span.mT).float()
    update = c.bp.double() @ a.double()
    scale = share * float(c.dense.norm() / update.norm())
    x = torch.randn(tokens, k).to(dtype)
    base = torch.zeros_like(c.bp)

    def effective(y: Tensor, y0: Tensor) -> Tensor:
        return torch.linalg.lstsq(x.double(), y.double() - y0.double()).solution.mT

    found = effective(fused(x, c, scale, a), fused(x, c, scale, a, base)) - scale * update
    weight = ops.nf4_dequant(c.q, dtype)
    merged = (weight.double() + scale * update).to(dtype)
    rounded = effective(x @ merged.mT, x @ weight.mT) - scale * update
    size = scale * float(update.norm())
    noise = EPS[dtype] * float(c.dense.norm()) * (k / tokens) ** 0.5  # of two rounded outputs, which averages out
    assert float(found.norm()) <= noise + 1e-3 * size
    assert float((found @ span).norm()) <= noise
    if share <= 1e-2:  # larger ones drown the rounding of W
        assert float(rounded.norm()) >= 5 * float(found.norm())
    seen = ops.lora_z(torch.eye(k, dtype=dtype), a).double()  # A as the inputs of this dtype meet it
    assert float((span.mT @ seen).norm()) <= 1e-6 * float(a.norm())


def test_an_fp32_factor_is_not_rounded_to_the_inputs() -> None:
    c = case(48, 128, 5)
    x = torch.randn(100, 128).bfloat16()
    close(ops.lora_z(x, c.a), x.double() @ c.a.double().mT, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_adapter_is_rounded_once_at_the_end(dtype: torch.dtype) -> None:
    """Also where its terms cancel, so that rounded factors would show."""
    c = case(48, 64, 5)
    z, x = torch.randn(100, 5), torch.zeros(100, 64, dtype=dtype)
    wanted = 0.7 * z.double() @ c.bp.double().mT
    terms = 0.7 * z.double().abs() @ c.bp.double().abs().mT
    error = (ops.nf4_lora(x, c.q, z, c.bp, 0.7).double() - wanted).abs()
    assert bool((error <= 0.5 * EPS[dtype] * wanted.abs() + 1e-6 * terms).all())


@pytest.mark.parametrize("trained", [False, True], ids=["frozen A", "trained A"])
def test_what_is_kept_for_the_backward_pass(trained: bool) -> None:
    c = case(32, 64, 4)
    kept: list[Tensor] = []
    x, bp = torch.randn(100, 64, requires_grad=True), c.bp.clone().requires_grad_()
    a = c.a.clone().requires_grad_(trained)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = fused(x, c, 1.0, a, bp)
    held = {t.data_ptr() for t in kept} - {t.data_ptr() for t in (*c.q[:5], a, bp) if isinstance(t, Tensor)}
    shapes = sorted(tuple(t.shape) for t in kept if t.data_ptr() in held)
    assert shapes == ([(100, 4), (100, 64)] if trained else [(100, 4)])
    y.sum().backward()
    assert (a.grad is not None) == trained


def test_only_what_is_wanted_is_computed_and_nothing_reaches_the_weight() -> None:
    c = case(32, 64, 4)
    x = torch.randn(100, 64, requires_grad=True)
    a = c.a.clone().requires_grad_()
    gx, ga = torch.autograd.grad(fused(x, c, 1.0, a).sum(), (x, a))
    assert gx.shape == x.shape
    assert ga.shape == a.shape
    assert not c.q.absmax.requires_grad
    (only,) = torch.autograd.grad(fused(x.detach(), c, 1.0, a).sum(), (a,))
    assert torch.equal(only, ga)


def test_strides_leading_dimensions_and_no_rows() -> None:
    c = case(32, 64, 4)
    wide = torch.randn(64, 3, 4, dtype=torch.float32)
    x = wide.permute(1, 2, 0)
    assert not x.is_contiguous()
    close(fused(x, c, 1.0), dense(c, x.double(), 1.0), torch.float32)
    one = fused(x[0, 0], c, 1.0)
    close(one, dense(c, x[0, 0].double(), 1.0), torch.float32)
    empty = torch.randn(0, 64, requires_grad=True)
    a, bp = c.a.clone().requires_grad_(), c.bp.clone().requires_grad_()
    y = fused(empty, c, 1.0, a, bp)
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
)
@settings(max_examples=40, deadline=None)
def test_shapes(n: int, blocks: int, r: int, rows: int, blocksize: int, nested: bool) -> None:
    c = case(n, blocks * blocksize, r, blocksize=blocksize, nested=nested)
    x = torch.randn(rows, c.q.k)
    terms = x.double().abs() @ (c.dense.abs() + 0.3 * (c.bp.double().abs() @ c.a.double().abs())).mT
    close(fused(x, c, -0.3), dense(c, x.double(), -0.3), torch.float32, slack=2.0, size=terms)


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_does_not_reach_inside(trained: bool) -> None:
    c = case(32, 64, 4)
    found = []
    for enabled in (False, True):
        x, a = torch.ones(100, 64).requires_grad_(), c.a.clone().requires_grad_(trained)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = fused(x, c, 1.0, a)
            y.sum().backward()
        found.append([t for t in (y, x.grad, a.grad) if t is not None])
    for plain, automatic in zip(*found, strict=True):
        assert torch.equal(plain, automatic)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(3, 63)}, r"x \(3, 63\)"),
        ({"x": torch.zeros(3, 64, dtype=torch.float64)}, "float64 is no compute dtype"),
        ({"z": torch.zeros(2, 4)}, r"z \(2, 4\)"),
        ({"bp": torch.zeros(31, 4)}, r"B \(31, 4\)"),
        ({"bp": torch.zeros(32, 5)}, r"B \(32, 5\)"),
    ],
)
def test_operands_that_do_not_fit(change: dict[str, Tensor], said: str) -> None:
    c = case(32, 64, 4)
    given_ = {"x": torch.zeros(3, 64), "q": c.q, "z": torch.zeros(3, 4), "bp": c.bp, "scale": 1.0, **change}
    with pytest.raises(OperationError, match=said):
        ops.nf4_lora(**given_)  # type: ignore[arg-type]
    with pytest.raises(OperationError, match=r"A \(4, 65\)"):
        ops.lora_z(torch.zeros(3, 64), torch.zeros(4, 65))


@pytest.mark.parametrize("trained", [False, True])
def test_compiles_without_a_graph_break(trained: bool) -> None:
    c = case(32, 64, 4)

    def step(x: Tensor, a: Tensor, bp: Tensor) -> Tensor:
        return torch.relu(fused(x, c, 0.5, a, bp))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (3, 100):
        leaves = [torch.randn(rows, 64, requires_grad=True), c.a.clone().requires_grad_(trained)]
        leaves.append(c.bp.clone().requires_grad_())
        found, wanted = compiled(*leaves), step(*leaves)
        torch.testing.assert_close(found, wanted)
        into = [leaf for leaf in leaves if leaf.requires_grad]
        for got, want in zip(
            torch.autograd.grad(found.sum(), into), torch.autograd.grad(wanted.sum(), into), strict=True
        ):
            torch.testing.assert_close(got, want)
