"""The published initialization of GuardSpace: the components of a weight that do least on the data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_safety.errors import (
    CalibrationError,
)
from peft_safety.methods.guardspace import Preconditioner, irrelevant_factors

seeds = st.integers(0, 2**31)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 12), st.integers(2, 12), st.sampled_from(["root", "moment"]), st.floats(0, 3))
def test_all_components_together_are_the_weight(seed, m, n, kind, decay):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, 4 * n, generator=g).T * torch.arange(1, n + 1).float() ** -decay).T
    w = torch.randn(m, n, generator=g)
    b, a = irrelevant_factors(w, Preconditioner.of(x @ x.T, kind, "layer"), min(m, n), "layer")
    torch.testing.assert_close(b @ a, w, atol=2e-4, rtol=2e-4)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 5), st.sampled_from(["root", "moment"]))
def test_the_smallest_components_do_least_on_the_data(seed, rank, kind):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(10, 60, generator=g).T * torch.arange(1, 11).float() ** -1.0).T
    w = torch.randn(8, 10, generator=g)
    prepared = Preconditioner.of(x @ x.T, kind, "layer")
    b, a = irrelevant_factors(w, prepared, rank, "layer")
    values = torch.linalg.svdvals(w.double() @ prepared.matrix)
    assert torch.linalg.matrix_norm(b.double() @ a.double() @ prepared.matrix).square() == pytest.approx(
        float(values[-rank:].square().sum()), rel=1e-4
    )
    if kind == "root":  # in units of the data: no more energy than the same share of any other split into components
        energy = (b @ a @ x).square().sum()
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        plain = (u[:, -rank:] * s[-rank:]) @ vh[-rank:]
        assert energy <= (plain @ x).square().sum() * (1 + 1e-2)


def test_a_weight_without_small_components_cannot_be_started_from():
    w = torch.outer(torch.ones(6), torch.arange(1.0, 6.0))
    with pytest.raises(CalibrationError, match="Use a larger r, or init='lora'"):
        irrelevant_factors(w, Preconditioner.of(torch.eye(5), "root", "layer"), 2, "layer")
    for bad in (torch.zeros(5, 5), torch.full((5, 5), float("nan"))):
        with pytest.raises(CalibrationError, match="second moment"):
            Preconditioner.of(bad, "root", "layer")
