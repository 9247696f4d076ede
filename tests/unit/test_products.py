"""What a layer multiplies its parameters by, as calibration sees it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peft_safety.calibration.products import Products
from peft_safety.core.parameters import ParameterOf
from peft_safety.errors import CalibrationError, UnsupportedLayerError
from tests.peft.test_frozen_experts import EXPERTS, KINDS, base_model

IN, OUT, EXPERT_COUNT = 6, 10, 3


class Owner(nn.Module):
    def __init__(self, *shape, **fields):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        for name, value in fields.items():
            setattr(self, name, value)


def seen(owner, compute):
    """The rows that `Products` sees in a computation, and its result, which must be what it is without."""
    rows = []
    with torch.no_grad():
        expected = compute(owner.weight)
        with Products({"w": ParameterOf(owner, "weight")}, lambda name, x: rows.append(x.clone())):
            result = compute(owner.weight)
    torch.testing.assert_close(result, expected)
    return torch.cat(rows) if rows else torch.zeros(0, IN)


X = torch.randn(2, 4, IN)
FLAT = X.reshape(-1, IN)
PER_EXPERT = torch.randn(EXPERT_COUNT, 5, IN)
MATRIX = {
    "linear": lambda w: F.linear(X, w),
    "linear with bias": lambda w: F.linear(X, w, torch.ones(OUT)),
    "matmul": lambda w: X @ w.t(),
    "mm": lambda w: torch.mm(FLAT, w.T),
    "the weight on the left": lambda w: w @ FLAT.T,
    "addmm": lambda w: torch.addmm(torch.zeros(OUT), FLAT, w.mT),
    "einsum": lambda w: torch.einsum("bti,oi->bto", X, w),
    "one row": lambda w: torch.stack([w @ row for row in FLAT]),
    "cast": lambda w: FLAT.double() @ w.double().T,
    "pieces": lambda w: torch.cat([FLAT @ piece.T for piece in w.chunk(2)[:1]]),
    "a contiguous transpose": lambda w: FLAT @ w.t().contiguous(),
    "some rows": lambda w: F.linear(X, w[torch.tensor([1, 3])]),
}
STACK = {
    "bmm": lambda w: torch.bmm(PER_EXPERT, w.mT),
    "baddbmm": lambda w: torch.baddbmm(torch.zeros(1), PER_EXPERT, w.transpose(1, 2)),
    "einsum": lambda w: torch.einsum("eti,eoi->eto", PER_EXPERT, w),
    "a loop": lambda w: torch.stack([F.linear(PER_EXPERT[i], w[i]) for i in range(EXPERT_COUNT)]),
    "chosen weights": lambda w: torch.bmm(
        w[torch.arange(EXPERT_COUNT).repeat_interleave(5)], PER_EXPERT.view(-1, IN, 1)
    ),
}


@pytest.mark.parametrize("how", MATRIX)
def test_rows_of_a_matrix(how):
    torch.testing.assert_close(seen(Owner(OUT, IN), MATRIX[how]).float(), FLAT)


@pytest.mark.parametrize("how", STACK)
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_a_stack(how, transposed):
    owner = Owner(EXPERT_COUNT, *((IN, OUT) if transposed else (OUT, IN)), is_transposed=transposed)
    rows = seen(owner, lambda w: STACK[how](w.mT if transposed else w))
    torch.testing.assert_close(rows, PER_EXPERT.reshape(-1, IN))


def test_grouped_products_end_at_the_last_offset():
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    owner, x = Owner(EXPERT_COUNT, 16, 8), torch.randn(7, 8)
    rows = seen(owner, lambda w: torch._grouped_mm(x, w.transpose(-2, -1), offs=ends)[:5])
    torch.testing.assert_close(rows, x[:5])


@given(st.lists(st.sampled_from(["t", "double", "unsqueeze", "clone", "first", "detach"]), max_size=5))
@settings(max_examples=40, deadline=None)
def test_through_any_chain_of_views_and_copies(chain):
    def follow(w):
        turned = False
        for step in chain:
            if step == "t":
                w, turned = w.mT, not turned
            elif step == "double":
                w = w.double()
            elif step == "unsqueeze":
                w = w[None]
            elif step == "clone":
                w = w.clone(memory_format=torch.contiguous_format)
            elif step == "first":
                w = w[:3] if not turned else w[..., :3]
            else:
                w = w.detach()
        w = w if turned else w.mT
        return FLAT.to(w.dtype) @ w

    torch.testing.assert_close(seen(Owner(OUT, IN), follow).float(), FLAT)


@pytest.mark.parametrize("compute", [lambda w: torch.ones(2, OUT) @ w, lambda w: torch.ones(2, OUT) @ w.clone()])
def test_inputs_on_the_other_side_are_refused(compute):
    with pytest.raises(UnsupportedLayerError, match=r"w: weight .*sums over the axis that PEFT takes for its outputs"):
        seen(Owner(OUT, IN), compute)


def test_a_square_weight_says_by_its_axis_on_which_side_the_inputs_are():
    x = torch.randn(3, IN)
    torch.testing.assert_close(seen(Owner(IN, IN), lambda w: x @ w.T), x)
    with pytest.raises(UnsupportedLayerError, match="outputs"):
        seen(Owner(IN, IN), lambda w: x @ w)


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: FLAT @ (w + 1).T,
        lambda w: w.norm(),
        lambda w: F.embedding(torch.tensor([1]), w),
        lambda w: torch.cat([w, w]),
    ],
)
def test_an_operation_that_hides_inputs_is_refused(compute):
    with pytest.raises(CalibrationError, match=r"w: weight .*cannot be seen"):
        seen(Owner(OUT, IN), compute)


@pytest.mark.parametrize("compute", [lambda w: FLAT[:, :3] @ w[:, :3].T, lambda w: FLAT @ w[:, torch.arange(IN)].T])
def test_some_of_the_features_are_refused(compute):
    with pytest.raises((CalibrationError, UnsupportedLayerError), match="w: "):
        seen(Owner(OUT, IN), compute)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@torch.no_grad()
def test_every_implementation_of_the_experts_shows_the_same_rows(kind, implementation):
    owner = copy.deepcopy(base_model(kind).get_submodule(EXPERTS))
    moe = pytest.importorskip("transformers.integrations.moe", reason="comes with transformers 5")
    if implementation != "eager" and implementation not in moe.ALL_EXPERTS_FUNCTIONS:
        pytest.skip("this transformers has no such implementation")
    x, routes = torch.randn(9, 32), torch.randint(0, 4, (9, 2))
    routes[:, 1] = (routes[:, 0] + 1) % 4
    gates = torch.rand(9, 2)

    def gram(how):
        owner.config = copy.deepcopy(owner.config)
        owner.config._experts_implementation = how
        sums = {name: 0.0 for name in ("gate_up_proj", "down_proj")}

        def see(name, rows):
            sums[name] = sums[name] + rows.double().T @ rows.double()

        with Products({name: ParameterOf(owner, name) for name in sums}, see):
            output = owner(x, routes, gates)
        torch.testing.assert_close(output, owner(x, routes, gates))
        return sums

    found, expected = gram(implementation), gram("eager")
    torch.testing.assert_close(expected["gate_up_proj"], 2 * x.double().T @ x.double())
    for name, moment in expected.items():
        torch.testing.assert_close(found[name], moment, rtol=1e-4, atol=1e-4)
