"""The fusions and masks as mathematics: their formulas, their gradients, and what must hold for any tensors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_safety.core.plain_lora import Factors
from peft_safety.errors import ConfigError
from peft_safety.methods.somf.masks import Masks, concrete, export, noise, rescaled
from peft_safety.methods.somf.options import FuseOptions
from peft_safety.methods.somf.updates import Continued, Independent, task_arithmetic

M, N, R = 5, 6, 3
shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))
seeds = st.integers(0, 10_000)


def tensors(count, shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=dtype) for _ in range(count)]


def factors(seed, rank=R, scaling=2.0):
    a, b = tensors(1, (rank, N), seed)[0], tensors(1, (M, rank), seed + 1)[0]
    return Factors(a, b, scaling)


def combinations(granularities):
    for granularity, tasks, rescale in itertools.product(granularities, (1, 2), ("mean", "none")):
        if granularity != "module" or rescale == "none":
            yield granularity, tasks, rescale


@pytest.mark.parametrize(("granularity", "tasks", "rescale"), list(combinations(("element", "row", "rank", "module"))))
def test_gradients_of_continued_adapters(granularity, tasks, rescale):
    weighted = [(0.3, factors(10)), (0.7, factors(20))][:tasks]
    _check(Continued("m", factors(0), weighted, granularity, rescale))


@pytest.mark.parametrize(("granularity", "tasks", "rescale"), list(combinations(("row", "rank", "module"))))
@pytest.mark.parametrize("with_safe", [True, False])
def test_gradients_of_independent_adapters(granularity, tasks, rescale, with_safe):
    weighted = [(0.3, factors(10, 3)), (0.7, factors(20, 2, 0.5))][:tasks]
    _check(Independent("m", factors(0, 2) if with_safe else None, weighted, granularity, rescale))


def _check(update):
    """From logits, through the concrete mask with fixed noise, to the weight."""
    names, given_shapes = zip(*update.mask_shapes.items(), strict=True)
    logits = [
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
        for shape in given_shapes
    ]
    drawn = [noise(logit.detach(), 7) for logit in logits]

    def weights(*values):
        masks = {name: concrete(value, u, 0.5) for name, value, u in zip(names, values, drawn, strict=True)}
        a, b = update.factors(masks.__getitem__)
        return b @ a

    assert torch.autograd.gradcheck(weights, logits, eps=1e-7, atol=1e-6)
    gradients = torch.autograd.grad(weights(*logits).square().sum(), logits)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)


@pytest.mark.parametrize("rescale", ["mean", "none"])
def test_gradients_of_full_weights(rescale):
    vector, u = tensors(1, (4, 5))[0], noise(tensors(1, (4, 5))[0], 3)
    logit = tensors(1, (4, 5), 9)[0].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: rescaled(vector, concrete(x, u, 0.5), rescale), [logit], eps=1e-7, atol=1e-6
    )


@given(shapes, seeds, st.integers(1, 4))
@settings(deadline=None)
def test_masking_the_sum_is_summing_the_masked(shape, seed, count):
    vectors = [(0.3 * (i + 1), v) for i, v in enumerate(tensors(count, shape, seed))]
    torch.testing.assert_close(task_arithmetic(vectors), sum(w * v for w, v in vectors))
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5).double()
    masked = [(w, rescaled(v, mask, "mean")) for w, v in vectors]
    torch.testing.assert_close(rescaled(task_arithmetic(vectors), mask, "mean"), task_arithmetic(masked))


@given(shapes, seeds, st.floats(0.1, 2.0))
@settings(deadline=None)
def test_concrete_samples_are_relaxed_coin_flips(shape, seed, temperature):
    logit = tensors(1, shape, seed, torch.float32)[0]
    u = noise(logit, seed)
    mask = concrete(logit, u, temperature)
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    margin = logit + torch.logit(u)
    clear = margin.abs() > 1e-4  # nearer than that, two ways of rounding may fall on two sides
    assert torch.equal((mask > 0.5)[clear], (margin > 0)[clear])
    assert torch.equal(u, noise(logit, seed))


def test_a_logit_is_a_keep_probability_at_any_temperature():
    logit = torch.full((200_000,), 0.7).logit()
    for temperature in (0.1, 0.5, 2.0):
        assert float((concrete(logit, noise(logit, 3), temperature) > 0.5).float().mean()) == pytest.approx(
            0.7, abs=0.005
        )


@given(shapes, seeds)
@settings(deadline=None)
def test_rescaling(shape, seed):
    vector = tensors(1, shape, seed)[0]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    assert torch.equal(rescaled(vector, mask, "none"), vector * mask)
    torch.testing.assert_close(rescaled(vector, mask, "mean"), vector * mask / mask.mean())
    for how in ("mean", "none"):
        assert not rescaled(vector, torch.zeros(shape, dtype=torch.float64), how).any()
        torch.testing.assert_close(rescaled(vector, torch.ones(shape, dtype=torch.float64), how), vector)


@pytest.mark.parametrize("how", ["row", "rank", "module"])
def test_independent_adapters_are_an_exact_lora_of_the_summed_rank(how):
    safe, tasks = factors(0, 2), [(0.3, factors(10, 3)), (0.7, factors(20, 1, 0.5))]
    update = Independent("m", safe, tasks, how, "none")
    (shape,) = update.mask_shapes.values()
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4).double()
    a, b = update.factors({f"m.{how}": mask}.__getitem__)
    assert a.shape == (6, N)
    gates = torch.ones(4, dtype=torch.float64)
    if how != "row":
        gates = mask if how == "rank" else mask.repeat_interleave(torch.tensor([3, 1]))
    expected = safe.scaling * safe.b @ safe.a
    for (w, task), gate in zip(tasks, gates.split([3, 1]), strict=True):
        delta = w * task.scaling * task.b @ torch.diag(gate) @ task.a
        expected = expected + (mask * delta if how == "row" else delta)
    torch.testing.assert_close(b @ a, expected)


def test_rows_of_independent_adapters_are_rescaled_as_dense_updates():
    task = factors(10)
    update = Independent("m", None, [(1.0, task)], "row", "mean")
    mask = torch.rand(M, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b = update.factors({"m.row": mask}.__getitem__)
    torch.testing.assert_close(b @ a, rescaled(task.scaling * task.b @ task.a, mask, "mean"))


logit_sets = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.tuples(shapes, seeds), min_size=1, max_size=4)


@given(logit_sets, st.sampled_from(["threshold", "sample"]))
@settings(deadline=None)
def test_exports_repeat_bit_by_bit(sets, how):
    logits = {name: tensors(1, shape, seed, torch.float32)[0] for name, (shape, seed) in sets.items()}
    first, second = export(logits, how, seed=3), export(logits, how, seed=3)
    assert all(torch.equal(first.values[name], second.values[name]) for name in logits)
    alone = {name: export({name: logit}, how, seed=3) for name, logit in logits.items()}
    assert all(torch.equal(first.values[name], alone[name].values[name]) for name in logits)


@given(logit_sets, st.floats(0.05, 0.95))
@settings(deadline=None)
def test_topk_keeps_the_stated_density_and_the_largest(sets, density):
    logits = {name: tensors(1, shape, seed, torch.float32)[0] for name, (shape, seed) in sets.items()}
    masks = export(logits, "topk", density=density)
    for name, logit in logits.items():
        if logit.numel() > 1:
            kept = masks.of(name).bool()
            assert int(kept.sum()) == round(density * logit.numel())
            if bool(kept.any()) and not bool(kept.all()):
                assert float(logit[kept].min()) >= float(logit[~kept].max())
    lone = [name for name, logit in logits.items() if logit.numel() == 1]
    assert sum(int(masks.of(name).sum()) for name in lone) == round(density * len(lone))


def test_topk_of_equal_logits_is_still_decided():
    assert export({"a": torch.zeros(10)}, "topk", density=0.3).values["a"].tolist() == [1] * 3 + [0] * 7
    with pytest.raises(ConfigError, match="density"):
        export({"a": torch.zeros(10)}, "topk")


@given(logit_sets, seeds)
@settings(deadline=None)
def test_the_control_has_the_same_density_everywhere_else(sets, seed):
    masks = export({name: tensors(1, shape, s, torch.float32)[0] for name, (shape, s) in sets.items()}, "threshold")
    control = masks.shuffled(seed)
    assert masks.density() == pytest.approx(control.density())
    assert all(
        int(masks.values[n].sum()) == int(control.values[n].sum()) for n in masks.values if masks.values[n].numel() > 1
    )
    assert list(control.values) == list(masks.values)


def test_the_control_moves_bits():
    masks = export({"a": tensors(1, (30, 30), 0, torch.float32)[0]}, "threshold")
    assert float((masks.values["a"] != masks.shuffled(1).values["a"]).float().mean()) > 0.3


def test_masks_of_other_modules_or_shapes_are_named():
    with pytest.raises(ConfigError, match="other"):
        Masks({"one": torch.ones(2, dtype=torch.uint8)}).check({"one": (2,), "other": (2,)})
    with pytest.raises(ConfigError, match="one: the masks have"):
        Masks({"one": torch.ones(2, dtype=torch.uint8)}).check({"one": (3,)})


@pytest.mark.parametrize(
    "bad",
    [
        {"method": "magic"},
        {"export": "soft"},
        {"rescale": "norm"},
        {"temperature": float("nan")},
        {"export_density": -0.1, "export": "topk"},
        {"export_density": 0.5},
        {"export": "topk"},
        {"temperature": 0},
        {"seed": -1},
        {"weights": (0.3, float("inf"))},
        {"granularity": "layer"},
        {"granularity": "module"},
    ],
)
def test_options_that_mean_nothing(bad):
    with pytest.raises(ConfigError):
        FuseOptions(**bad)


def test_weights_by_number_of_tasks():
    assert FuseOptions().weights_of(1) == [1.0]
    assert FuseOptions().weights_of(3) == [0.3] * 3
    assert FuseOptions(weights=(1, 2)).weights_of(2) == [1.0, 2.0]
    with pytest.raises(ConfigError, match="2 weights for 3 tasks"):
        FuseOptions(weights=(1, 2)).weights_of(3)


@pytest.mark.parametrize("method", ["single", "ties", "dare", "average"])
def test_other_merges_are_those_of_peft_and_mergekit(method):
    with pytest.raises(ConfigError, match=r"add_weighted_adapter\(.*mergekit"):
        FuseOptions(method=method)
