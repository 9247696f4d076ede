"""One leaf: every forward projects, tokens that are decoded share a projection, and whoever looks past the forward
finds a folded weight.
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
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_safety import GuardSpaceConfig, SafetySubspace, assert_protected
from peft_safety.core import projection
from peft_safety.core.projection import Side, leak, orthonormalize
from peft_safety.layers import ProtectedLinear, protected_leaves
from tests.peft import cells
from tests.peft.patch_cells import patched

LEAK = 1e-6


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a factor is projected for a forward, or for a gradient ("project_wide"), and looked at in order to be
    folded ("fold_").
    """
    seen: Counter[str] = Counter()
    for name in ("project_wide", "fold_"):
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


def constrained(model: nn.Module) -> list[tuple[str, ProtectedLinear]]:
    return [(name, leaf) for name, leaf in protected_leaves(model) if leaf.basis is not None]


@pytest.mark.parametrize("base", ["linear", "nf4"])
def test_a_training_step_folds_nothing_and_eval_folds_all(base: str, calls: Counter[str]) -> None:
    """PEFT's forwards read `lora_A.weight` for its dtype: that alone must not fold an input-side factor."""
    model = patched(base, side="both").train()
    calls.clear()
    cells.train(model, cells.adamw, 3)
    assert calls["fold_"] == 0
    assert calls["project_wide"] == 2 * 3 * len(constrained(model)), "once for a forward, once for its gradient"
    assert max(leak(leaf.basis, leaf.raw(), leaf.side) for _, leaf in constrained(model)) > 1e-3, (
        "Adam moves the raw weight into the span"
    )
    model.eval()
    assert max(leak(leaf.basis, leaf.raw(), leaf.side) for _, leaf in constrained(model)) <= LEAK
    assert_protected(model)


def test_saving_folds_in_place(tmp_path: Path) -> None:
    model = cells.protected().train()
    cells.train(model, cells.adamw, 3)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name, leaf in constrained(model):
        assert torch.equal(stored[f"{name.removesuffix('.default')}.weight"], leaf.raw())
        assert leak(leaf.basis, leaf.raw(), leaf.side) <= LEAK


def test_gathered_weights_are_folded_on_their_way_to_the_file(tmp_path: Path) -> None:
    """FSDP and ZeRO gather what the optimizer left; `state_dict` of a leaf never saw it."""
    model = cells.protected().train()
    cells.train(model, cells.adamw, 3)
    state = {name: value.detach().clone() for name, value in model.named_parameters()}
    before = {name: value.clone() for name, value in state.items()}
    model.save_pretrained(tmp_path, state_dict=state)
    assert all(torch.equal(value, before[name]) for name, value in state.items()), "the caller's tensors stay"
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name, leaf in constrained(model):
        assert leak(leaf.basis, state[f"{name}.weight"], leaf.side) > 1e-3
        assert leak(leaf.basis, stored[f"{name.removesuffix('.default')}.weight"], leaf.side) <= LEAK


@torch.no_grad()
def test_decoded_tokens_share_the_projection_until_somebody_writes(calls: Counter[str]) -> None:
    leaf = leaf_of(32, 4, 5, "out").eval()
    prompt, token = torch.randn(2, 7, 4), torch.randn(2, 1, 4)

    def expected(x: Tensor) -> Tensor:
        return nn.functional.linear(x, projection.project_out(leaf.basis, leaf.raw()))

    def made(x: Tensor, times: int, how: str) -> None:
        calls.clear()
        for _ in range(3):
            torch.testing.assert_close(leaf(x), expected(x), msg=lambda text: f"{how}: {text}")
        assert calls["project_wide"] == times, how

    made(prompt, 3, "a prompt")
    made(token, 1, "tokens")
    leaf.raw().copy_(torch.randn(32, 4))
    made(token, 1, "tokens after a write")
    leaf.raw().data = torch.randn(32, 4)
    made(token, 1, "tokens after other data")
    leaf.load_state_dict({"weight": torch.randn(32, 4)})
    made(token, 1, "tokens after a load")
    leaf.raw().data.copy_(torch.randn(32, 4))  # past torch's version counter
    y = leaf(token).flatten(0, 1)
    assert float((y @ leaf.basis).norm() / y.norm()) <= LEAK, "the old update, protected"
    made(prompt, 3, "the next prompt")
    made(token, 1, "its tokens")
    twin = copy.deepcopy(leaf)
    twin.raw().mul_(2)
    torch.testing.assert_close(twin(token), 2 * leaf(token))
    leaf.train()
    made(token, 3, "training mode")


def test_a_reader_in_training_mode_gets_a_folded_weight() -> None:
    leaf = leaf_of(32, 4, 5, "in").train()
    for _ in range(2):
        leaf.raw().data.copy_(torch.randn(4, 32))
        assert leak(leaf.basis, leaf.weight, "in") <= LEAK


def test_decoding_is_that_of_an_uncached_run() -> None:
    model = patched(side="both")
    cells.perturb(model)
    ids = cells.tokens(rows=1, length=5)
    cached, uncached = (
        model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("side", ["out", "in"])
def test_gradients_by_differences(side: Side) -> None:
    leaf = leaf_of(7, 2, 3, side, torch.float64)
    leaf.basis = orthonormalize(leaf.basis.double())
    base = leaf.raw().detach().clone()
    x = torch.randn(4, leaf.in_features, dtype=torch.float64)
    loss = leaf(x).sin().sum()
    (gradient,) = torch.autograd.grad(loss, leaf.raw(), create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), leaf.raw())
    assert float(projection.coefficients(leaf.basis, gradient.detach(), side).norm()) <= 1e-12

    def value(step: Tensor) -> Tensor:
        w = projection.project_out(leaf.basis, base + step, side)
        return nn.functional.linear(x, w).sin().sum()

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
    x, w = torch.randn(5, 3), torch.randn(12, 3)

    def value(weight: Tensor) -> Tensor:
        return torch.func.functional_call(leaf, {"weight": weight}, x).sin().sum()

    expected = w.clone().requires_grad_()
    nn.functional.linear(x, projection.project_out(leaf.basis, expected)).sin().sum().backward()
    torch.testing.assert_close(torch.func.grad(value)(w), expected.grad)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(value))(w.expand(2, -1, -1))[1], expected.grad)


def test_products_of_low_precision_are_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 leaves 1e-3 of what one pass removes. CPUs without it compute in fp32 whatever is allowed: here the
    products are rounded by hand.
    """
    exact = projection.coefficients
    monkeypatch.setattr(projection, "coefficients", lambda u, w, side: exact(u, w, side) * (1 + 1e-3))
    leaf = leaf_of(32, 4, 8, "out")
    before = torch.get_float32_matmul_precision()
    found = {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        try:
            found[precision] = float(
                exact(leaf.basis, leaf.projected().detach(), "out").norm() / leaf.raw().detach().norm()
            )
        finally:
            torch.set_float32_matmul_precision(before)
    assert found["high"] <= 2e-6
    assert found["highest"] >= 1e-4


def shared_subspace() -> SafetySubspace:
    """One input basis for q and v of each layer, as calibration gives it."""
    bases: dict[str, Any] = {}
    for layer in range(2):
        u = orthonormalize(torch.randn(32, cells.K, generator=torch.Generator().manual_seed(layer)))
        bases |= {f"model.layers.{layer}.self_attn.{kind}_proj": {"in": u} for kind in "qv"}
    return SafetySubspace(bases)


def with_shared(subspace: SafetySubspace) -> PeftModel:
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
