"""Projections that are not made: a folded weight is used as it is, its gradient is projected, and the fold behind a
step takes all leaves at once.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_safety import SafetySubspace, assert_protected, projection
from peft_safety.layers import ProtectedLinear, fold_together, folding, protected_leaves
from peft_safety.projection import Side, leak, orthonormalize
from tests.peft import cells
from tests.peft.patch_cells import patched

LEAK = 1e-6
NO_WORK = ("aten.detach.default", "aten._unsafe_view.default", "aten.promote_types.default")


class Calls(TorchDispatchMode):
    """Counts the operations that reach the device: no views, no questions about types."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and str(func) not in NO_WORK:
            self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def projections(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a forward has looked at a weight ("settled"), and a fold at all of its values ("fold_")."""
    seen: Counter[str] = Counter()
    for name in ("settled", "fold_"):
        original = getattr(projection, name)

        def counted(*args: Any, _name: str = name, _original: Any = original) -> Any:
            seen[_name] += 1
            return _original(*args)

        monkeypatch.setattr(projection, name, counted)
    return seen


def leaf_of(d: int, r: int, k: int, side: Side, dtype: torch.dtype = torch.float32, seed: int = 0) -> ProtectedLinear:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(*((r, d) if side == "out" else (d, r)), bias=False)
    linear.weight.data = torch.randn(linear.weight.shape, generator=generator).to(dtype)
    return ProtectedLinear.replacing(linear, orthonormalize(torch.randn(d, k, generator=generator)), side)


def micro_steps(model: PeftModel, optimizer: torch.optim.Optimizer, accumulate: int) -> None:
    for micro in range(accumulate):
        ids = cells.tokens(seed=micro)
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant checkpointing"]
)
@pytest.mark.parametrize("side", ["out", "in"])
def test_no_forward_projects_a_weight_that_a_step_has_folded(
    side: Side, checkpointing: bool | None, projections: Counter[str]
) -> None:
    model = (cells.protected("linear", "task") if side == "out" else patched(side="in")).train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    optimizer = cells.adamw([p for p in model.parameters() if p.requires_grad])
    micro_steps(model, optimizer, 1)
    projections.clear()
    for _ in range(3):
        micro_steps(model, optimizer, accumulate=4)
    assert not projections
    assert_protected(model)
    assert all(
        leak(leaf.basis, leaf.raw(), leaf.side) <= LEAK
        for _, leaf in protected_leaves(model)
        if leaf.basis is not None
    )


@pytest.mark.parametrize("init", cells.INITS)
def test_what_is_known_changes_no_bit_of_a_training_run(init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run with every forward looking at its weights: the values decide, not the way they are known."""
    found = {}
    for blind in (False, True):
        with monkeypatch.context() as patch:
            if blind:
                patch.setattr(ProtectedLinear, "is_known", lambda self, factor, kind="weight": False)
            model = cells.protected("linear", init)
            cells.train(model, cells.adamw, 8)
            found[blind] = cells.logits(model)
    assert torch.equal(found[False], found[True])


@pytest.mark.parametrize("side", ["out", "in"])
def test_many_steps_follow_the_dense_formula_in_double_precision(side: Side) -> None:
    leaf = leaf_of(24, 3, 5, side, torch.float64)
    leaf.basis = orthonormalize(leaf.basis.double())
    leaf.fold()
    raw = leaf.raw().detach().clone().requires_grad_()
    c = torch.eye(24, dtype=torch.float64) - leaf.basis @ leaf.basis.T
    ours, dense = cells.adamw([leaf.raw()]), cells.adamw([raw])
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        target = torch.randn(raw.shape, generator=generator, dtype=torch.float64)
        (leaf.projected() - target).square().sum().backward()
        ((c @ raw if side == "out" else raw @ c) - target).square().sum().backward()
        for optimizer in (ours, dense):
            optimizer.step()
            optimizer.zero_grad()
    expected = (c @ raw if side == "out" else raw @ c).detach()
    assert float((leaf.raw().detach() - expected).abs().max()) <= 1e-12
    assert float((raw.detach() - expected).norm() / expected.norm()) > 1e-2, "the dense loop is never folded"


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("side", ["out", "in"])
def test_gradients_by_differences(side: Side, known: bool) -> None:
    leaf = leaf_of(7, 2, 3, side, torch.float64)
    leaf.basis = orthonormalize(leaf.basis.double())
    assert leaf.fold()
    leaf.mark_folded("weight", stepped=known)
    assert leaf.is_known(leaf.raw()) == known
    base = leaf.raw().detach().clone()
    x = torch.randn(4, leaf.in_features, dtype=torch.float64)
    loss = leaf(x).sin().sum()
    (gradient,) = torch.autograd.grad(loss, leaf.raw(), create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), leaf.raw())
    assert float(projection.coefficients(leaf.basis, gradient.detach(), side).norm()) <= 1e-12

    def value(step: torch.Tensor) -> torch.Tensor:
        w = projection.project_out(leaf.basis, base + step, side)
        return torch.nn.functional.linear(x, w).sin().sum()

    steps = torch.zeros_like(base, requires_grad=True)
    (expected,) = torch.autograd.grad(value(steps), steps, create_graph=True)
    (expected_second,) = torch.autograd.grad(expected.square().sum(), steps)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(second, expected_second, rtol=1e-9, atol=1e-9)
    h = 1e-6
    numeric = torch.stack(
        [
            (value(h * e) - value(-h * e)).detach() / (2 * h)
            for e in torch.eye(base.numel()).double().view(-1, *base.shape)
        ]
    )
    torch.testing.assert_close(gradient.flatten(), numeric, rtol=1e-6, atol=1e-8)


def test_functional_transforms_see_the_projection() -> None:
    leaf = leaf_of(12, 3, 4, "out")
    fold_together([leaf])
    x, w = torch.randn(5, 3), torch.randn(12, 3)

    def value(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(leaf, {"weight": weight}, x).sin().sum()

    expected = w.clone().requires_grad_()
    torch.nn.functional.linear(x, projection.project_out(leaf.basis, expected)).sin().sum().backward()
    torch.testing.assert_close(torch.func.grad(value)(w), expected.grad)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(value))(w.expand(2, -1, -1))[1], expected.grad)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("limit", [folding.MAX_GROUP_BYTES, 5000, 1], ids=["at once", "in parts", "one by one"])
def test_a_grouped_fold_is_the_fold_of_each(limit: int, batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "MAX_GROUP_BYTES", limit)
    shapes: list[Any] = [
        (32, 4, 5, "out"),
        (32, 4, 5, "in"),
        (48, 2, 7, "out"),
        (32, 4, 6, "out"),
        (32, 4, 5, "out", torch.bfloat16),
    ]
    leaves = [leaf_of(*shape, seed=7 * i + j) for j in range(4) for i, shape in enumerate(shapes)]
    before = [leaf.raw().detach().clone() for leaf in leaves]
    fold_together(leaves, batched)
    for leaf, raw in zip(leaves, before, strict=True):
        expected = projection.project_out(leaf.basis.double(), raw.double(), leaf.side)
        eps = torch.finfo(raw.dtype).eps
        torch.testing.assert_close(leaf.raw().double(), expected, rtol=2 * eps, atol=4 * eps)
        assert leak(leaf.basis, leaf.raw(), leaf.side) <= projection.leak_tolerance(raw.dtype)
        assert leaf.is_known(leaf.raw())
        assert not leaf.fold(), "what the step has folded must not be folded again: a resumed run would differ"


def test_a_step_of_a_7b_model_folds_in_at_most_ten_calls() -> None:
    """The modules of Llama-2-7B, 32 layers of seven, with narrow matrices in place of its own: the number of calls
    does not depend on the width.
    """
    widths = {"q": 40, "k": 40, "v": 40, "o": 40, "gate": 108, "up": 108, "down": 40}
    leaves = [
        leaf_of(d, 4, 8, "out", seed=100 * layer + i) for layer in range(32) for i, d in enumerate(widths.values())
    ]
    with Calls() as calls:
        fold_together(leaves, batched=True)
    assert 0 < calls.ops.total() <= 10, calls.ops
    assert all(leak(leaf.basis, leaf.raw()) <= LEAK for leaf in leaves)


def test_products_of_low_precision_are_made_twice() -> None:
    leaves, counts = [leaf_of(32, 4, 8, "out", seed=seed) for seed in range(2)], []
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            with Calls() as calls:
                fold_together(leaves, batched=True)
        finally:
            torch.set_float32_matmul_precision(before)
        counts.append(calls.ops["aten.baddbmm.default"])
    assert counts == [1, 2]


def test_writes_past_the_version_counter_are_found_at_the_next_fold_step_or_save() -> None:
    """`.data` escapes torch's own bookkeeping: until one of these, a trained leaf computes with what was written."""
    for remedy in ("step", "save", "fold"):
        model = cells.protected()
        optimizer = cells.train(model, cells.adamw, 1)
        name, leaf = next(protected_leaves(model))
        assert leaf.is_known(leaf.raw())
        leaf.raw().data.copy_(torch.randn(leaf.raw().shape))
        if remedy == "step":
            micro_steps(model, optimizer, 1)
        elif remedy == "save":
            assert leak(leaf.basis, model.state_dict()[f"{name}.weight"]) <= LEAK
        else:
            assert leaf.fold()
        assert leak(leaf.basis, leaf.raw()) <= LEAK


def test_other_writes_are_noticed_at_once(projections: Counter[str]) -> None:
    model = cells.protected()
    cells.train(model, cells.adamw, 1)
    projections.clear()
    _, leaf = next(protected_leaves(model))
    for write in (
        lambda w: w.copy_(torch.randn(w.shape)),
        lambda w: setattr(w, "data", torch.randn(w.shape)),
        lambda w: w.add_(1),
    ):
        with torch.no_grad():
            write(leaf.raw())
        y = leaf(torch.randn(5, leaf.in_features)).detach()
        assert float((y @ leaf.basis).norm() / y.norm()) <= LEAK
        leaf.mark_folded("weight", stepped=True)  # so that the next write is the one that is noticed
    assert projections["settled"] == 3


def test_a_frozen_adapter_is_served_without_a_projection(tmp_path: Path, projections: Counter[str]) -> None:
    model = cells.protected("linear", "task", trained=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(cells.base_model(), tmp_path)
    projections.clear()
    assert torch.equal(cells.logits(loaded), cells.logits(model))
    assert projections["settled"] == len([1 for _, leaf in protected_leaves(model) if leaf.basis is not None]), (
        "only the trainable model looks"
    )
    projections.clear()
    cells.logits(loaded)
    assert not projections


def test_a_copy_knows_nothing_but_computes_the_same() -> None:
    model = cells.protected()
    cells.train(model, cells.adamw, 2)
    twin = copy.deepcopy(model)
    assert all(leaf.is_known(leaf.raw()) for _, leaf in protected_leaves(model))
    assert not any(leaf.is_known(leaf.raw()) for _, leaf in protected_leaves(twin))
    assert torch.equal(cells.logits(twin), cells.logits(model))


def shared_subspace() -> SafetySubspace:
    """One input basis for q and v of each layer, as calibration gives it."""
    bases: dict[str, Any] = {}
    for layer in range(2):
        u = orthonormalize(torch.randn(32, cells.K, generator=torch.Generator().manual_seed(layer)))
        bases |= {f"model.layers.{layer}.self_attn.{kind}_proj": {"in": u} for kind in "qv"}
    return SafetySubspace(bases)


def with_shared(subspace: SafetySubspace) -> PeftModel:
    from peft_safety import GuardSpaceConfig

    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(cells.base_model(), GuardSpaceConfig(**options, subspace=subspace))
    model.add_adapter("other", GuardSpaceConfig(**options, subspace=subspace))
    return cells.perturb(model)


def test_one_basis_is_held_once_whoever_uses_it() -> None:
    subspace = shared_subspace()
    model = with_shared(subspace)
    own = {id(u) for sides in subspace.bases.values() for u in sides.values()}
    bases = [leaf.basis for _, leaf in protected_leaves(model)]
    assert len(bases) == 8
    assert len({id(u) for u in bases}) == 2
    assert not {id(u) for u in bases} & own
    assert not {u.data_ptr() for u in bases} & {
        u.data_ptr() for sides in subspace.bases.values() for u in sides.values()
    }
    model.to(torch.float64).float()
    assert {id(leaf.basis) for _, leaf in protected_leaves(model)} == {id(u) for u in bases}
    twin = copy.deepcopy(model)
    copied = {id(leaf.basis) for _, leaf in protected_leaves(twin)}
    assert len(copied) == 2
    assert not copied & {id(u) for u in bases}
    assert_protected(twin)


def test_an_adapter_made_in_inference_mode_computes_the_same() -> None:
    expected = cells.logits(cells.protected())
    with torch.inference_mode():
        model = cells.protected()
        assert torch.equal(cells.logits(model), expected)
        assert_protected(model)


def test_a_hot_swap_leaves_the_basis_of_another_adapter_alone(tmp_path: Path) -> None:
    subspace = shared_subspace()
    model = with_shared(subspace)
    new = with_shared(subspace.randomized(seed=5))
    new.save_pretrained(tmp_path, selected_adapters=["default"])
    hotswap_adapter(model, str(tmp_path), "default")
    assert_protected(model)  # "other" still has its own
    model.delete_adapter("other")
    before = {name: leaf.basis for name, leaf in protected_leaves(model)}
    again = with_shared(subspace)
    again.save_pretrained(tmp_path, selected_adapters=["default"])
    hotswap_adapter(model, str(tmp_path), "default")
    assert_protected(model)
    assert all(leaf.basis is before[name] for name, leaf in protected_leaves(model)), (
        "in place where nobody else uses it: compiled graphs stay valid"
    )
    assert torch.equal(cells.logits(model), cells.logits(again))
