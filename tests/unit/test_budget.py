"""Calibration within a memory budget: more passes, the same bases."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peft_safety.calibration import bases, budget, grouped, moments
from peft_safety.calibration.bases import Size, input_basis
from peft_safety.calibration.batches import Counted
from peft_safety.calibration.coverage import task_inputs
from peft_safety.calibration.moments import InputMoments, collect
from peft_safety.calibration.token_rows import TokenRows
from peft_safety.core.projection import principal_cosines
from peft_safety.core.targets import target_layers
from peft_safety.errors import CalibrationError, ConfigError
from peft_safety.methods.guardspace.directions import frozen_factors
from tests.peft import cells
from tests.peft.guard_cells import HARMFUL, TASK, batches, subspace

ONE_LAYER = 3 * 8 * 64**2
"""Bytes that the widest layer of the tiny model takes."""


@pytest.fixture
def passes(monkeypatch):
    """The layers of each pass over the data."""
    seen = []
    collect = moments.collect
    monkeypatch.setattr(
        "peft_safety.calibration.activations.collect",
        lambda model, layers, *args, **kwargs: seen.append(list(layers)) or collect(model, layers, *args, **kwargs),
    )
    return seen


@pytest.mark.parametrize("options", [{}, {"sides": ("in", "out")}, {"against": TASK}, {"rank": None, "energy": 0.9}])
def test_the_bases_do_not_depend_on_the_budget(options, passes):
    whole = subspace(cells.base_model(), HARMFUL, **options)
    count = len(passes)
    parts = subspace(cells.base_model(), HARMFUL, memory=ONE_LAYER, **options)
    assert len(passes) - count > 2 * count
    assert whole.provenance == parts.provenance
    for name, sides in whole.bases.items():
        for side, basis in sides.items():
            assert basis.shape == parts.bases[name][side].shape
            assert float(principal_cosines(basis, parts.bases[name][side]).min()) > 1 - 1e-4


def test_layers_with_one_input_stay_together_and_share_their_basis(passes):
    space = subspace(cells.base_model(), memory=ONE_LAYER)
    assert sorted(len(layers) for layers in passes) == [1, 1, 2, 2]
    first = space.bases["model.layers.0.self_attn.q_proj"]["in"]
    assert space.bases["model.layers.0.self_attn.v_proj"]["in"] is first


def test_a_budget_that_is_too_small():
    with pytest.raises(CalibrationError, match="64 features"):
        subspace(cells.base_model(), memory=ONE_LAYER - 1)


@pytest.mark.parametrize(("text", "size"), [("4GB", 4e9), ("500 MiB", 500 * 2**20), (1000, 1000), ("1.5gb", 1.5e9)])
def test_budgets_as_people_write_them(text, size):
    assert budget.bytes_of(text, torch.device("cpu")) == size


@pytest.mark.parametrize("text", ["", "4 bananas", -1, 0, True, "GB", "1e9"])
def test_what_is_no_budget(text):
    with pytest.raises(ConfigError, match="memory="):
        budget.bytes_of(text, torch.device("cpu"))


def test_without_a_budget_half_of_the_free_memory():
    assert 2**20 < budget.bytes_of(None, torch.device("cpu")) < 2**50


@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    shared=st.lists(st.booleans(), min_size=20, max_size=20),
    room=st.integers(3 * 8 * 40**2, 20 * 8 * 40**2),
)
def test_groups_hold_every_layer_once_and_fit(widths, shared, room):
    layers = {f"layer{i}": nn.Linear(n, 2, bias=False) for i, n in enumerate(widths)}
    leaders = {}
    for i, n in enumerate(widths):
        same = i > 0 and shared[i] and widths[i - 1] == n
        leaders[f"layer{i}"] = leaders[f"layer{i - 1}"] if same else f"layer{i}"
    needs = {name: budget.need(layers[name]) for name in layers}
    parts = budget.groups(layers, leaders, needs, room)
    assert [name for part in parts for name in part] == list(layers)
    for part in parts:
        distinct = {leaders[name] for name in part}
        assert budget.together(needs[name] for name in distinct) <= room
    assert all(leaders[a] != leaders[b] for p, q in pairwise(parts) for a in p for b in q)


def massive(n, tokens=400, seed=0):
    """Inputs with a falling spectrum and one activation a thousand times the others, as real models have."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) * torch.arange(1, n + 1) ** -1.0
    x = x @ turn
    x[:, 7] *= 1000
    return x


@pytest.mark.parametrize("size", [Size(rank=12), Size(share=0.25), Size(energy=0.999999)])
def test_iterating_finds_what_the_exact_decomposition_finds(size, monkeypatch):
    x = massive(160)
    exact, values = input_basis(x.T @ x, size, "layer")
    monkeypatch.setattr(bases, "DENSE_LIMIT", 16)
    found, spectrum = input_basis(x.T @ x, size, "layer")
    assert found.shape == exact.shape
    assert float(principal_cosines(exact, found).min()) > 1 - 1e-4
    torch.testing.assert_close(spectrum, values, rtol=1e-3, atol=0)


def test_wide_inputs_of_few_tokens_are_kept_themselves_and_give_the_same_span(monkeypatch):
    exact = subspace(cells.base_model())
    monkeypatch.setattr(bases, "DENSE_LIMIT", 16)
    kept = []
    monkeypatch.setattr(TokenRows, "__matmul__", watched(TokenRows.__matmul__, kept))
    one = [{key: value[:1, :24] for key, value in batches()[0].items()}]  # 24 tokens for 64 features
    few, again = (subspace(cells.base_model(), one, rank=4, memory=memory) for memory in (None, 3 * 10**5))
    assert kept, "no layer was calibrated by its rows"
    monkeypatch.setattr(bases, "DENSE_LIMIT", 2048)
    dense = subspace(cells.base_model(), one, rank=4)
    assert set(few.bases) == set(exact.bases)
    for name in dense.bases:
        for other in (few, again):
            cosines = principal_cosines(dense.bases[name]["in"], other.bases[name]["in"])
            assert float(cosines.min()) > 1 - 1e-6, name
        assert few.provenance["covered"][name] == pytest.approx(dense.provenance["covered"][name], abs=1e-6)


def watched(function, calls):
    def call(*args):
        calls.append(args)
        return function(*args)

    return call


def test_rows_hold_what_the_moment_holds_with_a_massive_activation_too():
    x = massive(160, tokens=90).float()
    rows = TokenRows(160, x.device)
    for part in x.split(40):
        rows.add(part)
    moment = x.double().T @ x.double()
    q = torch.randn(160, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for found, wanted in ((rows @ q, moment @ q), (rows.dense(), moment), (rows.diagonal(), moment.diagonal())):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-12
    basis, spectrum = input_basis(moment, Size(rank=12), "layer")
    found, values = input_basis(rows, Size(rank=12), "layer")
    assert float(principal_cosines(basis, found).min()) > 1 - 1e-6
    torch.testing.assert_close(values, spectrum, rtol=1e-5, atol=0)


def test_more_rows_than_features_become_a_moment():
    layer = nn.Linear(8, 2, bias=False)
    seen = InputMoments({"layer": layer}, as_rows=["layer"])
    x = torch.randn(3, 4, 8)
    with seen.watching():
        for part in x:
            seen.expect(Counted((torch.ones(1, 4, dtype=torch.bool),)))
            layer(part[None])
    assert isinstance(seen.operator("layer"), torch.Tensor)
    rows = x.reshape(-1, 8).double()
    torch.testing.assert_close(seen.moment("layer"), rows.T @ rows)


def test_the_widest_layer_of_an_8b_model_fits_into_4_gb():
    wide = nn.Linear(14336, 4096, bias=False, device="meta")
    assert budget.together([budget.need(wide, tokens=5000, width=14336 // 4)]) < 4e9
    assert budget.together([budget.need(wide)]) > 4e9


def test_the_directions_of_a_task_within_a_budget_take_more_passes_and_are_the_same(monkeypatch):
    model = cells.base_model()
    space = subspace(model, HARMFUL)
    layers = target_layers(model, list(cells.LINEAR_TARGETS))
    ranks, features = dict.fromkeys(layers, 4), {name: layer.in_features for name, layer in layers.items()}
    whole, shares = task_inputs(model, layers, space, batches(TASK), progress=False)
    wanted = frozen_factors(space, ranks, whole, features)
    seen = []
    monkeypatch.setattr(grouped, "collect", lambda *args, **options: seen.append(args[1]) or collect(*args, **options))
    parts, again = task_inputs(model, layers, space, batches(TASK), memory=ONE_LAYER, progress=False)
    assert len(seen) > 2
    assert shares == again
    found = frozen_factors(space, ranks, parts, features)
    for name, a in wanted.items():
        torch.testing.assert_close(found[name], a, rtol=1e-5, atol=1e-6)
