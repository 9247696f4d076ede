"""The streamed repair against the dense formulas, and selection exactly as asked."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_safety.core.plain_lora import Factors
from peft_safety.errors import CheckpointError, ConfigError
from peft_safety.methods.safe_lora import delta as streaming
from peft_safety.methods.safe_lora.config import RepairOptions
from peft_safety.methods.safe_lora.repair import ModuleRepair, repair, select
from tests.stored import TensorWeights

QUIET = {"progress": False, "dtype": torch.float64, "device": "cpu"}


def case(m, n, r, rank, seed):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, generator=g, dtype=torch.float64)
    v = (
        torch.randn(m, rank, generator=g, dtype=torch.float64)
        @ torch.randn(rank, n, generator=g, dtype=torch.float64)
        / 50
    )
    a, b = torch.randn(r, n, generator=g, dtype=torch.float64), torch.randn(m, r, generator=g, dtype=torch.float64)
    return TensorWeights("before", {"x": w}), TensorWeights("after", {"x": w + v}), Factors(a, b, 2.0), v


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 60),
    st.integers(2, 60),
    st.integers(1, 8),
    st.integers(1, 60),
    st.integers(0, 99),
    st.integers(1, 64),
)
def test_the_stream_gives_what_the_dense_formula_gives(m, n, r, rank, seed, block):
    r = min(r, m, n)
    if seed % 5 == 0:
        m = r  # out_features == r
    before, after, factors, _ = case(m, n, r, min(rank, m, n), seed)
    v = after.tensors["x"] - before.tensors["x"]
    dense = v @ v.mT / torch.linalg.matrix_norm(v)
    old, new = factors.b @ factors.a, dense @ factors.b @ factors.a
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "block_width", lambda rows: block)
        found, report = repair({"x": factors}, before, after, RepairOptions(select="all", **QUIET))
    row = report.modules[0]
    torch.testing.assert_close(found["x"], dense @ factors.b, rtol=1e-10, atol=1e-10 * float(factors.b.abs().max()))
    assert row.cos == pytest.approx(float((new * old).sum() / (new.norm() * old.norm())), abs=1e-10)
    assert -1e-12 <= row.cos <= 1 + 1e-12
    assert row.gain == pytest.approx(float(new.norm() / old.norm()), rel=1e-9)
    assert row.kept_norm == pytest.approx(2 * float(new.norm()), rel=1e-9)
    assert row.delta == pytest.approx(float(v.norm() / after.tensors["x"].norm()), rel=1e-9)


@pytest.mark.parametrize(("m", "n", "rank"), [(80, 50, 5), (50, 80, 40), (60, 60, 60)])
@pytest.mark.parametrize("projection", ["spectral", "topk", "soft"])
def test_the_other_projections(m, n, rank, projection):
    before, after, factors, v = case(m, n, 4, rank, 1)
    options = RepairOptions(
        select="all", projection=projection, penalty=3.0, rank=None if projection == "spectral" else 5, **QUIET
    )
    found, report = repair({"x": factors}, before, after, options)
    u, s, _ = torch.linalg.svd(v)
    p = u[:, :5] @ u[:, :5].mT
    expected = {"spectral": v @ v.mT / s[0] ** 2, "topk": p, "soft": p + (torch.eye(m, dtype=p.dtype) - p) / 4}[
        projection
    ] @ factors.b
    tolerance = 1e-6 if rank == 5 else 5e-2  # a flat spectrum is found to the accuracy of the iteration
    assert float((found["x"] - expected).norm() / expected.norm()) < tolerance
    assert report.modules[0].gain <= 1 + 1e-9
    assert report.modules[0].k == (None if projection == "spectral" else 5)


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
def test_energy_takes_as_few_directions_as_hold_it(energy):
    before, after, factors, v = case(90, 120, 4, 70, 2)
    _, report = repair(
        {"x": factors}, before, after, RepairOptions(select="all", projection="topk", energy=energy, **QUIET)
    )
    shares = torch.linalg.svdvals(v).square().cumsum(0) / v.square().sum()
    exact = int((shares < energy - 1e-9).sum()) + 1
    assert abs(report.modules[0].k - exact) <= 2


def rows(*cosines, deltas=None):
    return [
        ModuleRepair(f"m{i}", cos, False, 1.0, 1.0, (deltas or {}).get(i, 0.1), None) for i, cos in enumerate(cosines)
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(threshold=0.3), {"m1"}),
        (dict(select="number", num_modules=1), {"m1"}),
        (dict(select="number", num_modules=2), {"m0", "m1"}),
        (dict(select="number", num_modules=4), {"m0", "m1", "m2", "m3"}),
        (dict(select="all"), {"m0", "m1", "m2", "m3"}),
    ],
)
def test_selection_is_exactly_what_was_asked(options, expected):
    assert select(rows(0.3, 0.1, 0.3, 0.9), RepairOptions(**options)) == expected


def test_modules_without_a_cosine_come_last_and_zero_deltas_follow_the_policy():
    found = rows(float("nan"), 0.9, float("nan"), deltas={2: 0.0})
    assert select(found, RepairOptions(select="number", num_modules=1)) == {"m1"}
    assert select(found, RepairOptions(threshold=1.0, zero_delta="keep")) == {"m1"}
    assert select(found, RepairOptions(threshold=0.5, zero_delta="zero")) == {"m2"}


def test_an_update_outside_the_alignment_direction_is_the_first_to_be_repaired():
    before, after, factors, _ = case(12, 9, 2, 3, 0)
    changed = before.tensors["x"].clone()
    changed[:6] += 1.0
    after.tensors["x"], outside = changed, factors.b.clone()
    outside[:6] = 0.0
    found, report = repair(
        {"x": Factors(factors.a, outside, 2.0)}, before, after, RepairOptions(threshold=0.1, **QUIET)
    )
    assert (report.modules[0].cos, report.selected) == (0.0, ["x"])
    assert not bool(found["x"].any())
    nothing = Factors(factors.a, torch.zeros_like(outside), 2.0)
    _, report = repair({"x": nothing}, before, after, RepairOptions(threshold=0.1, **QUIET))
    assert (math.isnan(report.modules[0].cos), report.selected) == (True, [])


def two(zero_second=True):
    before, after, factors, _ = case(12, 9, 2, 3, 0)
    w = torch.ones(12, 9, dtype=torch.float64)
    before.tensors["y"], after.tensors["y"] = w, w if zero_second else w + 1
    return {"x": factors, "y": factors}, before, after


def test_equal_weights_of_one_module():
    factors, before, after = two()
    with pytest.raises(CheckpointError, match=r"y: .*equal.*zero_delta"):
        repair(factors, before, after, RepairOptions(**QUIET))
    kept, report = repair(factors, before, after, RepairOptions(select="all", zero_delta="keep", **QUIET))
    assert set(kept) == {"x"}
    assert report.selected == ["x"]
    zeroed, _ = repair(factors, before, after, RepairOptions(select="all", zero_delta="zero", **QUIET))
    assert not bool(zeroed["y"].any())


@pytest.mark.parametrize("policy", ["error", "keep", "zero"])
def test_equal_models_are_always_an_error(policy):
    before, _, factors, _ = case(8, 6, 2, 2, 0)
    with pytest.raises(CheckpointError, match="equal"):
        repair({"x": factors}, before, before, RepairOptions(zero_delta=policy, **QUIET))


@pytest.mark.parametrize("which", ["aligned", "unaligned"])
def test_a_checkpoint_with_nan_is_named(which):
    before, after, factors, _ = case(8, 6, 2, 2, 0)
    (after if which == "aligned" else before).tensors["x"][3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=f"x: the {which} weight"):
        repair({"x": factors}, before, after, RepairOptions(**QUIET))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(select="some"), "select='some'"),
        (dict(threshold=-0.1), "threshold=-0.1"),
        (dict(threshold=float("nan")), "threshold=nan"),
        (dict(select="number"), "num_modules=None"),
        (dict(select="number", num_modules=0), "num_modules=0"),
        (dict(select="number", num_modules=True), "num_modules=True"),
        (dict(projection="exact"), "projection='exact'"),
        (dict(rank=3), "rank and energy"),
        (dict(projection="topk", rank=3, energy=0.5), "one of them"),
        (dict(projection="topk", rank=0), "rank=0"),
        (dict(projection="topk", energy=1.5), "energy=1.5"),
        (dict(projection="soft", penalty=-1), "penalty=-1"),
        (dict(zero_delta="ignore"), "zero_delta='ignore'"),
        (dict(dtype=torch.float16), "float16"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(ConfigError, match=said):
        RepairOptions(**options)


def test_more_modules_than_there_are():
    before, after, factors, _ = case(8, 6, 2, 2, 0)
    with pytest.raises(ConfigError, match="num_modules=2, but the adapter has 1"):
        repair({"x": factors}, before, after, RepairOptions(select="number", num_modules=2, **QUIET))
