"""The fusions and masks as mathematics: their formulas, their gradients, and what must hold for any tensors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.methods.somf import fusions
from peft_safety.methods.somf.compose import Continued, Independent, dense_tensor, recompressed
from peft_safety.methods.somf.masks import (
    Masks,
    concrete,
    expected_density,
    export,
    initial_logit,
    noise,
    rescaled,
    rescaled_gate,
)
from peft_safety.methods.somf.options import FuseOptions
from peft_safety.methods.somf.report import product_norm
from peft_safety.plain_lora import Factors

FUSIONS = ("single", "task_arithmetic", "dare", "ties", "average")
M, N, R = 5, 6, 3
shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))
seeds = st.integers(0, 10_000)


def tensors(count, shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=dtype) for _ in range(count)]


def factors(seed, rank=R, scaling=2.0):
    a, b = tensors(1, (rank, N), seed)[0], tensors(1, (M, rank), seed + 1)[0]
    return Factors(a, b, scaling)


def combinations():
    for granularity, fusion, rescale in itertools.product(
        ("element", "row", "rank", "module"), FUSIONS, ("mean", "none", "norm")
    ):
        if granularity != "module" or rescale == "none":
            yield granularity, fusion, rescale


@pytest.mark.parametrize(("granularity", "fusion", "rescale"), list(combinations()))
def test_gradients_of_continued_adapters(granularity, fusion, rescale):
    options = FuseOptions(fusion=fusion, granularity=granularity, rescale=rescale, ties_density=0.6)
    tasks = [factors(seed) for seed in ((10,) if fusion == "single" else (10, 20))]
    update = Continued("m", factors(0), tasks, granularity, options)
    _check(update, options)


@pytest.mark.parametrize("granularity", ["row", "rank", "module"])
@pytest.mark.parametrize("fusion", ["single", "task_arithmetic", "average"])
@pytest.mark.parametrize("rescale", ["mean", "none", "norm"])
@pytest.mark.parametrize("with_safe", [True, False])
def test_gradients_of_independent_adapters(granularity, fusion, rescale, with_safe):
    if granularity == "module" and rescale != "none":
        with pytest.raises(ConfigError, match="cancels"):
            FuseOptions(granularity=granularity, rescale=rescale)
        return
    options = FuseOptions(fusion=fusion, granularity=granularity, rescale=rescale)
    tasks = [factors(10, 3)] if fusion == "single" else [factors(10, 3), factors(20, 2, 0.5)]
    _check(Independent("m", factors(0, 2) if with_safe else None, tasks, granularity, options), options)


def _check(update, options):
    """From logits, through the concrete mask with fixed noise and the whole fusion, to the factors."""
    names, given_shapes = zip(*update.shapes.items(), strict=True)
    logits = [
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()
        for shape in given_shapes
    ]
    drawn = [noise(logit.detach(), 7) for logit in logits]

    def weights(*values):
        masks = {
            name: concrete(value, u, options.temperature) for name, value, u in zip(names, values, drawn, strict=True)
        }
        a, b = update.factors(masks)
        return b @ a

    assert torch.autograd.gradcheck(weights, logits, eps=1e-7, atol=1e-6)
    gradients = torch.autograd.grad(weights(*logits).square().sum(), logits)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)


@pytest.mark.parametrize("rescale", ["mean", "none", "norm"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_of_full_weights(fusion, rescale):
    options = FuseOptions(fusion=fusion, rescale=rescale, ties_density=0.6)
    safe, *vectors = tensors(2 if fusion == "single" else 3, (4, 5))
    logit, u = tensors(1, (4, 5), 9)[0].requires_grad_(), noise(safe, 3)
    assert torch.autograd.gradcheck(
        lambda x: dense_tensor(safe, vectors, concrete(x, u, 0.5), options, "w"), [logit], eps=1e-7, atol=1e-6
    )


def test_gradient_of_the_density_penalty():
    logits = [x.requires_grad_() for x in (*tensors(1, (3, 4)), *tensors(1, (2,)))]
    covers = {"a": 1, "b": 7}
    assert torch.autograd.gradcheck(lambda x, y: expected_density({"a": x, "b": y}, covers), logits)
    half = expected_density({"a": torch.zeros(3, 4), "b": torch.full((2,), initial_logit(0.25))}, covers)
    assert float(half) == pytest.approx((12 * 0.5 + 14 * 0.25) / 26)


@given(shapes, seeds, st.integers(1, 4))
@settings(deadline=None)
def test_the_linear_fusions_are_their_formulas(shape, seed, count):
    vectors = tensors(count, shape, seed)
    weights = [0.3 * (i + 1) for i in range(count)]
    torch.testing.assert_close(
        fusions.task_arithmetic(vectors, weights), sum(w * v for w, v in zip(weights, vectors, strict=True))
    )
    torch.testing.assert_close(fusions.average(vectors), sum(vectors) / count)
    keeps = fusions.drop_masks(shape, count, 0.3, seed, "w", vectors[0])
    torch.testing.assert_close(
        fusions.dare(vectors, keeps, 0.3, weights),
        sum(w * k * v / 0.7 for w, k, v in zip(weights, keeps, vectors, strict=True)),
    )


@given(shapes, seeds, st.integers(1, 4), st.floats(0.05, 0.95), st.sampled_from(["sum", "mean"]))
@settings(deadline=None)
def test_ties_entry_by_entry(shape, seed, count, density, merge):
    vectors, weights = tensors(count, shape, seed), [0.4] * count
    thresholds = [fusions.trim_threshold(v, density) for v in vectors]
    found = fusions.ties(vectors, thresholds, weights, merge=merge)
    for index in range(vectors[0].numel()):
        values = [
            float(v.flatten()[index])
            for v, t in zip(vectors, thresholds, strict=True)
            if abs(float(v.flatten()[index])) >= float(t)
        ]
        agreeing = [v for v in values if (v > 0) == (sum(values) >= 0)]
        expected = 0.4 * sum(agreeing) / (max(1, len(agreeing)) if merge == "mean" else 1)
        assert float(found.flatten()[index]) == pytest.approx(expected, abs=1e-12)


@given(shapes, st.floats(0.01, 0.99), seeds)
@settings(deadline=None)
def test_trimming_keeps_the_share_that_was_asked_for(shape, density, seed):
    vector = tensors(1, shape, seed)[0]
    kept = int((vector.abs() >= fusions.trim_threshold(vector, density)).sum())
    assert kept == max(1, round(density * vector.numel()))


def test_dares_drops_depend_on_the_name_and_the_seed_only():
    like = torch.zeros(40, 50)
    first = fusions.drop_masks((40, 50), 2, 0.2, 1, "w", like)
    assert all(
        torch.equal(a, b) for a, b in zip(first, fusions.drop_masks((40, 50), 3, 0.2, 1, "w", like), strict=False)
    )
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], fusions.drop_masks((40, 50), 1, 0.2, 1, "v", like)[0])
    assert not torch.equal(first[0], fusions.drop_masks((40, 50), 1, 0.2, 2, "w", like)[0])
    assert float(first[0].mean()) == pytest.approx(0.8, abs=0.03)


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
    logit = torch.full((200_000,), initial_logit(0.7))
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
    torch.testing.assert_close(rescaled(vector, mask, "norm").norm(), vector.norm())
    for how in ("mean", "none", "norm"):
        assert not rescaled(vector, torch.zeros(shape, dtype=torch.float64), how).any()
        torch.testing.assert_close(rescaled(vector, torch.ones(shape, dtype=torch.float64), how), vector)


def test_a_gates_norm_is_that_of_the_update():
    f = factors(0, 4)
    gram = (f.b.mT @ f.b) * (f.a @ f.a.mT)
    gate = torch.tensor([0.2, 0.9, 0.0, 0.5], dtype=torch.float64)
    scaled = rescaled_gate(gate, gram, "norm")
    torch.testing.assert_close((f.b * scaled @ f.a).norm(), (f.b @ f.a).norm())
    torch.testing.assert_close(rescaled_gate(gate, gram, "mean").mean(), torch.ones((), dtype=torch.float64))
    assert not rescaled_gate(torch.zeros(4, dtype=torch.float64), gram, "mean").any()


@pytest.mark.parametrize("how", ["row", "rank", "module"])
def test_independent_adapters_are_an_exact_lora_of_the_summed_rank(how):
    safe, tasks = factors(0, 2), [factors(10, 3), factors(20, 1, 0.5)]
    update = Independent("m", safe, tasks, how, FuseOptions(granularity=how, rescale="none", weights=(0.3, 0.7)))
    masks = {
        name: (torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4).double()
        for name, shape in update.shapes.items()
    }
    a, b = update.factors(masks)
    assert a.shape == (6, N)
    expected = safe.scaling * safe.b @ safe.a
    for i, (task, w) in enumerate(zip(tasks, (0.3, 0.7), strict=True)):
        delta = task.scaling * task.b @ task.a
        if how == "row":
            delta = masks["m.rows"] * delta
        else:
            delta = task.scaling * task.b @ torch.diag(masks[f"m.task_{i}"].expand(task.a.shape[0])) @ task.a
        expected = expected + w * delta
    torch.testing.assert_close(b @ a, expected)


@pytest.mark.parametrize("rescale", ["mean", "norm"])
def test_rows_of_independent_adapters_are_rescaled_as_dense_updates(rescale):
    task = factors(10)
    update = Independent("m", None, [task], "row", FuseOptions(fusion="single", granularity="row", rescale=rescale))
    mask = torch.rand(M, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b = update.factors({"m.rows": mask})
    torch.testing.assert_close(b @ a, rescaled(task.scaling * task.b @ task.a, mask, rescale))


@given(st.integers(1, 7), seeds)
@settings(deadline=None)
def test_recompression_is_the_truncated_svd(rank, seed):
    a, b = tensors(1, (5, 7), seed)[0], tensors(1, (6, 5), seed + 1)[0]
    x, y, error = recompressed(a, b, rank)
    dense = b @ a
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    k = min(rank, 5)
    torch.testing.assert_close(y @ x, (u[:, :k] * s[:k]) @ vh[:k], atol=1e-9, rtol=1e-9)
    assert error == pytest.approx(float((dense - y @ x).norm() / dense.norm()), abs=1e-9)
    assert x.shape == (k, 7)


def test_norms_of_sums_of_products():
    pairs = [(*reversed(tensors(2, (4, 4), seed)), c) for seed, c in ((0, 1.0), (1, -2.0))]
    assert product_norm(pairs) == pytest.approx(float(sum(c * b @ a for a, b, c in pairs).norm()))


logit_sets = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.tuples(shapes, seeds), min_size=1, max_size=4)


@given(logit_sets, st.sampled_from(["threshold", "sample", "soft"]))
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
            kept = masks[name].bool()
            assert int(kept.sum()) == round(density * logit.numel())
            if bool(kept.any()) and not bool(kept.all()):
                assert float(logit[kept].min()) >= float(logit[~kept].max())
    lone = [name for name, logit in logits.items() if logit.numel() == 1]
    assert sum(int(masks[name].sum()) for name in lone) == round(density * len(lone))


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
        int(masks.values[n].sum()) == int(control.values[n].sum()) for n in masks if masks.values[n].numel() > 1
    )
    assert list(control) == list(masks)


def test_the_control_moves_bits():
    masks = export({"a": tensors(1, (30, 30), 0, torch.float32)[0]}, "threshold")
    assert float((masks.values["a"] != masks.shuffled(1).values["a"]).float().mean()) > 0.3


def test_a_missing_mask_is_named():
    with pytest.raises(ArtifactError, match="other"):
        Masks({"one": torch.ones(2, dtype=torch.uint8)})["other"]


@pytest.mark.parametrize(
    "bad",
    [
        {"method": "magic"},
        {"fusion": "slerp"},
        {"method": "ties", "fusion": "dare"},
        {"target_density": 0.0},
        {"target_density": 1.0},
        {"initial_density": 1.5},
        {"export_density": -0.1, "export": "topk"},
        {"export_density": 0.5},
        {"export": "topk"},
        {"ties_density": float("nan")},
        {"drop": True},
        {"temperature": 0},
        {"rank": 0},
        {"rank": 2.5},
        {"seed": -1},
        {"weights": (0.3, float("inf"))},
        {"granularity": "layer"},
        {"granularity": "module"},
    ],
)
def test_options_that_mean_nothing(bad):
    with pytest.raises(ConfigError):
        FuseOptions(**bad)


def test_weights_and_fusions_by_number_of_tasks():
    assert FuseOptions().fusion_of(1) == "single"
    assert FuseOptions().fusion_of(2) == "task_arithmetic"
    assert FuseOptions(method="ties").weights_of(3) == [0.4] * 3
    assert FuseOptions(method="average").weights_of(4) == [0.25] * 4
    assert FuseOptions(weights=(1, 2)).weights_of(2) == [1.0, 2.0]
    for options, tasks in (
        (FuseOptions(method="single"), 2),
        (FuseOptions(weights=(1, 2)), 3),
        (FuseOptions(method="average", weights=1.0), 2),
    ):
        with pytest.raises(ConfigError):
            options.weights_of(tasks)
