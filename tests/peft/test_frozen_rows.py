"""The rows of a frozen `lora_A`, and the digest of a factor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_safety import assert_protected
from peft_safety.core.certificate import digest
from peft_safety.core.projection import leak, orthonormalize
from peft_safety.methods.guardspace.directions import ROW_NORM, blind_rows
from tests.peft import cells
from tests.peft.guard_cells import subspace
from tests.peft.test_frozen import frozen, lora_a

LEAK = 1e-6


def test_more_rows_than_the_complement_has_are_zero():
    space = subspace(cells.base_model(), rank=30, allow_fewer=True)
    with pytest.warns(UserWarning, match="rows of zeros"):
        model = frozen(space=space, a_init="random")
    weight = next(w for n, w in lora_a(model).items() if n.endswith("1.self_attn.q_proj"))
    assert [bool(row.any()) for row in weight] == [True, True, False, False]
    assert_protected(model)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(4, 40),
    share=st.floats(0.1, 0.9),
    rank=st.integers(1, 12),
    seed=st.integers(0, 9),
    task=st.booleans(),
)
def test_blind_rows(n, share, rank, seed, task):
    generator = torch.Generator().manual_seed(seed)
    k = min(max(1, round(share * n)), n - 1)
    basis = orthonormalize(torch.randn(n, k, generator=generator, dtype=torch.float64)).float()
    x = torch.randn(200, n, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, n, dtype=torch.float64)
    rows = blind_rows(basis, rank, moment=x.T @ x if task else None, seed=seed)
    free = min(rank, n - k)
    assert rows.shape == (rank, n)
    assert leak(basis, rows, "in") <= LEAK
    used = rows[:free].double() / ROW_NORM
    torch.testing.assert_close(used @ used.T, torch.eye(free, dtype=torch.float64), atol=1e-5, rtol=0)
    assert not rows[free:].any()
    if task:  # no other rows of that number see more of the task outside the null space
        outside = x - x @ basis.double() @ basis.double().T
        best = torch.linalg.svdvals(outside)[:free].square().sum()
        assert float((x @ used.T).square().sum()) >= float(best) * (1 - 1e-3)


def test_zero_rows_do_not_count_in_a_digest():
    a = torch.randn(3, 8)
    assert digest(torch.cat([a, torch.zeros(2, 8)])) == digest(a)
    assert digest(a.bfloat16()) != digest(a)
    assert digest(torch.cat([a[:1], torch.zeros(1, 8), a[1:]])) == digest(a), "padding stands behind each group's rows"
    assert digest(a.flip(0)) != digest(a)
