"""Calibration: one streaming pass gives what a dense SVD of all activations gives, whatever the batching, and never
counts a masked token.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_safety import SafetySubspace
from peft_safety.calibration.moments import collect
from peft_safety.core.projection import principal_cosines
from peft_safety.core.targets import base_layers, target_layers
from peft_safety.data import refusal_pairs
from peft_safety.data.chat import Collator, encode_rows
from peft_safety.errors import CalibrationError, ConfigError
from tests.tiny import tiny_llama, tiny_tokenizer

RANK = 5
Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pairs():
    return refusal_pairs("calibration", 12)


def estimate(model, data, **options):
    return SafetySubspace.from_activations(
        model, data, **{"rank": RANK, "target_modules": "all-linear", "progress": False, **options}
    )


def dense_reference(model, pairs, tokenizer) -> dict[str, torch.Tensor]:
    """`W X` of every layer, one unpadded sequence at a time, all response tokens side by side: the definition, with
    everything held in memory.
    """
    outputs: dict[str, list[torch.Tensor]] = {}
    for feature in encode_rows(tokenizer, pairs, 512):
        keep = torch.tensor(feature["labels"]) != -100
        hooks = [
            layer.register_forward_hook(
                lambda _, args, out, name=name, keep=keep: outputs.setdefault(name, []).append(
                    out[0, keep].detach().double()
                )
            )
            for name, layer in target_layers(model, "all-linear").items()
        ]
        model(torch.tensor([feature["input_ids"]]))
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts).mT for name, parts in outputs.items()}


def test_one_streaming_pass_spans_what_the_dense_svd_spans(pairs):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    subspace = estimate(model, pairs, tokenizer=tokenizer, batch_size=5)
    for name, outputs in dense_reference(model, pairs, tokenizer).items():
        exact = torch.linalg.svd(outputs, full_matrices=False)
        assert float(principal_cosines(subspace.bases[name]["out"], exact.U[:, :RANK]).min()) > 1 - 1e-5, name
        torch.testing.assert_close(subspace.spectra[name]["out"].double(), exact.S[:RANK], rtol=1e-4, atol=0)


def test_a_share_of_each_layers_outputs(pairs):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    subspace = estimate(
        model, pairs, tokenizer=tokenizer, rank=0.5, target_modules=[Q0, Q0.replace("q_proj", "k_proj")]
    )
    assert {name: subspace.rank(name) for name in subspace.module_names} == {Q0: 16, Q0.replace("q_proj", "k_proj"): 8}
    exact = torch.linalg.svd(dense_reference(model, pairs, tokenizer)[Q0], full_matrices=False).U[:, :16]
    assert float(principal_cosines(subspace.bases[Q0]["out"], exact).min()) > 1 - 1e-4


@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_batch_size_and_padding_do_not_matter(pairs, batch_size):
    reference = estimate(tiny_llama(), pairs, tokenizer=tiny_tokenizer(), batch_size=4)
    found = estimate(tiny_llama(), pairs, tokenizer=tiny_tokenizer(), batch_size=batch_size)
    for name in reference.module_names:
        assert float(principal_cosines(reference.bases[name]["out"], found.bases[name]["out"]).min()) > 1 - 1e-5
    assert reference.provenance["tokens"] == found.provenance["tokens"]


def test_prompt_tokens_and_padding_do_not_count():
    tokenizer = tiny_tokenizer()
    batch = Collator(tokenizer)(encode_rows(tokenizer, refusal_pairs("calibration", 6), 512))
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    padding = batch["attention_mask"] == 0
    assert padding.any()
    other["input_ids"][padding] = 77  # what stands in the padding must not matter
    a, b = estimate(tiny_llama(), [batch]), estimate(tiny_llama(), [other])
    for name in a.module_names:
        assert torch.equal(a.bases[name]["out"], b.bases[name]["out"])
    layers = target_layers(tiny_llama(), "all-linear")
    assert collect(tiny_llama(), layers, [], progress=False).tokens == 0
    assert a.provenance["tokens"] == int((batch["labels"] != -100).sum())


def test_layers_with_one_input_share_one_moment(pairs):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    batch = Collator(tokenizer)(encode_rows(tokenizer, pairs, 512))
    moments = collect(model, target_layers(model, "all-linear"), [batch], progress=False)
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert moments.moment(attention + "q_proj") is moments.moment(attention + "v_proj")
    assert moments.moment(mlp + "gate_proj") is moments.moment(mlp + "up_proj")
    assert moments.moment(attention + "q_proj") is not moments.moment(attention + "o_proj")


def test_an_adapter_on_the_model_is_switched_off_and_comes_back(pairs):
    tokenizer = tiny_tokenizer()
    bare = estimate(tiny_llama(), pairs, tokenizer=tokenizer)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.train()
    found = estimate(model, pairs, tokenizer=tokenizer)
    assert found.digest == bare.digest
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert model.training
    ids = torch.randint(4, 200, (1, 9))
    with model.disable_adapter():
        off = model(ids).logits
    assert not torch.equal(model(ids).logits, off)


@pytest.mark.parametrize("option", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [4, 5, 6]}])
def test_what_an_adapter_trained_beside_its_factors_is_switched_off_too(option, pairs):
    bare = estimate(tiny_llama(), pairs, tokenizer=tiny_tokenizer())
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], **option))
    trained = {name: p for name, p in model.named_parameters() if "modules_to_save" in name or "tokens_delta" in name}
    for parameter in trained.values():
        torch.nn.init.normal_(parameter)
    ids = torch.arange(4, 20)[None]
    before = model(ids).logits
    assert trained
    assert not torch.equal(before, tiny_llama()(ids).logits)
    assert estimate(model, pairs, tokenizer=tiny_tokenizer()).digest == bare.digest
    assert all(parameter.requires_grad for parameter in trained.values())
    torch.testing.assert_close(model(ids).logits, before)


def test_calibrating_under_a_merged_adapter_is_refused(pairs):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        estimate(model, pairs, tokenizer=tiny_tokenizer())


def test_the_same_call_gives_the_same_bits_and_records_where_they_came_from(pairs):
    first, second = (estimate(tiny_llama(), pairs, tokenizer=tiny_tokenizer()) for _ in range(2))
    assert first.digest == second.digest
    assert first.provenance == second.provenance
    assert {"method", "rank", "seed", "data", "samples", "tokens"} <= set(first.provenance)
    assert (
        estimate(tiny_llama(), pairs[:-1], tokenizer=tiny_tokenizer()).provenance["data"] != first.provenance["data"]
    )


def test_hooks_are_gone_afterwards_even_after_an_error(pairs):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="NaN"):
        estimate(model, pairs, tokenizer=tiny_tokenizer())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "targets",
    ["all-linear", ["q_proj", "down_proj"], ["model.layers.1.self_attn.v_proj"], r".*\.1\..*(gate|up)_proj", None],
)
def test_targets_are_those_that_peft_matches(targets):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=targets))
    theirs = {name for name in model.base_model.targeted_module_names}
    assert set(target_layers(tiny_llama(), targets)) == theirs
    assert set(target_layers(model, targets)) == theirs
    assert theirs <= set(base_layers(model))


def test_what_matches_nothing_is_named():
    with pytest.raises(ConfigError, match=r"query_key_value.*q_proj"):
        target_layers(tiny_llama(), ["query_key_value"])


def test_a_layer_with_fewer_directions_than_asked_for_is_refused_or_protected_whole(pairs):
    ids = torch.tensor([[5, 6, 5, 6, 5, 6, 5, 6]])  # two distinct tokens: a first layer sees two directions
    data = [{"input_ids": ids, "labels": ids}]
    targets = ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(CalibrationError, match=r"layers.0.self_attn.q_proj.*span 2 directions.*allow_fewer"):
        estimate(tiny_llama(), data, target_modules=targets)
    with pytest.warns(UserWarning, match=r"span 2 directions.*takes all"):
        subspace = estimate(tiny_llama(), data, target_modules=targets, allow_fewer=True)
    assert subspace.rank(targets[0]) == 2
    weight, inputs = (
        tiny_llama().get_submodule(targets[0]).weight,
        torch.nn.functional.normalize(tiny_llama().model.embed_tokens(ids[0, :2])),
    )
    outputs = (weight @ inputs.mT).detach()
    u = subspace.bases[targets[0]]["out"]
    torch.testing.assert_close(u @ (u.mT @ outputs), outputs, rtol=0, atol=1e-5)


def test_rows_without_a_tokenizer_are_refused(pairs):
    with pytest.raises(CalibrationError, match="tokenizer"):
        estimate(tiny_llama(), pairs)


def test_logits_are_computed_only_where_the_head_is_calibrated(pairs):
    model, seen = tiny_llama(), []
    model.register_forward_hook(lambda *call: seen.append(call[-1].logits.shape[1]))
    estimate(model, pairs, tokenizer=tiny_tokenizer(), target_modules=["q_proj"])
    assert set(seen) == {1}
    seen.clear()
    space = estimate(model, pairs, tokenizer=tiny_tokenizer(), target_modules=["lm_head"])
    assert min(seen) > 1
    assert space.module_names == ["lm_head"]
