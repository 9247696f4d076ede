"""Calibration on what is no text, or not only text: images, sounds, embeddings, decoder inputs, any keyword."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_safety import GuardSpaceConfig, SafetySubspace, SaLoRAConfig, assert_protected, calibrate
from peft_safety.calibration.batches import content_digest
from peft_safety.calibration.cost import cost
from peft_safety.core.projection import principal_cosines
from peft_safety.errors import CalibrationError
from tests.compatibility.architectures import batch_of, model_of

RANK = 4
VIT, WHISPER, SOUND = "ViT, classifier", "Whisper", "Wav2Vec2, CTC"


def estimate(model, data, **options):
    given = {"method": "guardspace", "rank": RANK, "target_modules": "all-linear", "progress": False}
    given["allow_fewer"] = True  # heads see one row a sample
    return SafetySubspace.from_activations(model, data, **{**given, **options})


def inputs_of(model, name, batch, **options):
    """What a layer gets, as it comes."""
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    with torch.no_grad():
        model(**batch, **options)
    hook.remove()
    return found[0]


def assert_spans(space, name, rows):
    true = torch.linalg.svd(rows.double(), full_matrices=False).Vh[:RANK].mT
    assert float(principal_cosines(space.bases[name]["in"], true).min()) > 1 - 1e-5


@pytest.mark.parametrize(("name", "unit", "count"), [(VIT, "patches", 15), (SOUND, "frames", 3 * 48)])
def test_all_patches_and_frames_count(name, unit, count):
    model, batch = model_of(name), batch_of(name)
    space = estimate(model, [batch])
    facts = space.provenance
    assert (facts["samples"], facts[unit], facts["positions"]) == (3, count, "all")
    assert "tokens" not in facts, "there are none"
    own = {key: value for key, value in batch.items() if key != "labels"}
    seen = next(key for key, sides in space.bases.items() if sides["in"].shape[0] == 48)  # inside an MLP
    rows = inputs_of(model, seen, own).flatten(0, -2)
    assert len(rows) == count
    assert_spans(space, seen, rows)


def test_an_encoder_of_sounds_counts_frames_and_its_decoder_labels():
    model, batch = model_of(WHISPER), batch_of(WHISPER)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][1, 5:] = -100
    space = estimate(model, [batch])
    answered = batch["labels"] != -100
    assert (space.provenance["tokens"], space.provenance["frames"]) == (int(answered.sum()), 3 * 20)
    for name, chosen in (("encoder.layers.1.fc1", None), ("decoder.layers.1.fc1", answered)):
        x = inputs_of(model, f"model.{name}", batch)
        assert_spans(space, f"model.{name}", x.flatten(0, 1) if chosen is None else x[chosen])
    safe = calibrate(model, SaLoRAConfig(target_modules="all-linear", safety_rank=RANK), [batch], progress=False)
    assert {name for name in safe.left_out if ".encoder." not in name} <= {
        name for name in space.bases if name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
    }
    assert not any(".encoder." in name for name in safe.bases)
    assert "frames" not in safe.provenance


def test_an_encoder_decoder_takes_decoder_inputs_in_place_of_labels():
    model, batch = model_of("BART"), batch_of("BART")
    labels = batch["labels"][:, :9]
    given = {key: value for key, value in batch.items() if key != "labels"}
    ids = model.prepare_decoder_input_ids_from_labels(labels=labels)
    one = estimate(model, [{**given, "labels": labels}])
    other = estimate(model, [{**given, "decoder_input_ids": ids}])
    assert one.provenance["tokens"] == other.provenance["tokens"]
    for name, sides in one.bases.items():
        assert float(principal_cosines(sides["in"], other.bases[name]["in"]).min()) > 1 - 1e-5
    with pytest.raises(CalibrationError, match="needs labels, or decoder_input_ids"):
        estimate(model, [given])


def test_embeddings_in_place_of_tokens():
    model, batch = model_of("Llama"), batch_of("Llama")
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][1, 9:] = 0
    embedded = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach()}
    del embedded["input_ids"]
    one, other = estimate(model, [batch]), estimate(model, [embedded])
    assert one.provenance["tokens"] == other.provenance["tokens"] == 3 * 17 - 8
    for name, sides in one.bases.items():
        assert float(principal_cosines(sides["in"], other.bases[name]["in"]).min()) > 1 - 1e-5


class Anything(nn.Module):
    """A model of no library, with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(12, 8)

    def forward(self, signal, scale=1.0, **more):
        assert set(more) <= {"offset"}
        return self.fc(signal * scale + more.get("offset", 0.0))


@pytest.mark.parametrize("lead", [(30,), (2, 3, 5), (2, 3, 5, 1)])
def test_any_keyword_of_any_forward_and_any_number_of_dimensions(lead):
    signal, offset = torch.randn(*lead, 12), torch.randn(12)
    space = estimate(Anything(), [{"signal": signal, "scale": 2.0, "offset": offset}], target_modules=["fc"])
    assert space.provenance["vectors"] == 30
    assert_spans(space, "fc", (2.0 * signal + offset).reshape(-1, 12))


def test_arrays_and_lists_are_tensors_too():
    batch = batch_of(VIT)
    arrays = {key: value.numpy() for key, value in batch.items()}
    lists = {key: value.tolist() for key, value in batch.items()}
    lists["pixel_values"] = np.asarray(lists["pixel_values"], dtype="float32")
    digests = {estimate(model_of(VIT), [data]).digest for data in (batch, arrays, lists)}
    assert len(digests) == 1


def test_the_hash_of_the_data_covers_all_of_them():
    batch = batch_of("LLaVA")
    other = {**batch, "pixel_values": batch["pixel_values"].clone()}
    other["pixel_values"][1, 0, 0, 0] += 1
    turned = {key: value.flip(0) for key, value in batch.items()}
    assert content_digest([batch]) == content_digest([turned]) != content_digest([other])
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    assert content_digest([batch]) == content_digest(rows)
    table = {**batch, "image_sizes": torch.tensor([[32, 32], [32, 32], [32, 16]])}
    assert content_digest([table]) != content_digest([batch])


@pytest.mark.parametrize("name", [VIT, "LLaVA"])
def test_the_task_may_be_images(name):
    base, batch, task = model_of(name), batch_of(name), batch_of(name, seed=1)
    if name == "LLaVA":
        task = {**batch, "pixel_values": task["pixel_values"]}  # the same words about other images
    given = {"r": 2, "target_modules": "all-linear", "safety_rank": RANK}
    config = GuardSpaceConfig(**given, task_data=[task])
    config.subspace = calibrate(base, config, [batch], progress=False)
    model = get_peft_model(base, config)
    assert config.train == "B"
    assert model.peft_config["default"].a_init == "task"
    assert_protected(model)
    config = GuardSpaceConfig(**given, task_data=[batch], subspace=config.subspace)
    with pytest.raises(CalibrationError, match="the task data are the 3 rows"):
        get_peft_model(model_of(name), config)


@pytest.mark.parametrize("name", ["BERT, classifier", "BERT, regression", "CLIP", VIT, SOUND])
def test_salora_counts_every_position_where_there_is_no_response_and_says_so(name):
    config = SaLoRAConfig(target_modules="all-linear", safety_rank=RANK)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        space = calibrate(model_of(name), config, [batch_of(name)], progress=False)
    assert sum("counts the tokens of responses" in str(warning.message) for warning in caught) == 1
    assert space.provenance["positions"] == "all"


def test_a_language_model_still_needs_responses():
    batch = batch_of("Llama")
    del batch["labels"]
    with pytest.raises(CalibrationError, match="0 labeled tokens"):
        estimate(model_of("Llama"), [batch], method="salora")
    with pytest.raises(CalibrationError, match="0 labeled tokens"):  # asked for, not a default
        estimate(model_of("BERT, classifier"), [batch_of("BERT, classifier")], method="salora", positions="response")


def test_padded_sounds_are_counted_with_a_warning():
    batch = batch_of(SOUND)
    mask = torch.ones(3, 400, dtype=torch.long)
    mask[0, 200:] = 0
    with pytest.warns(UserWarning, match="do not say which patches or frames"):
        estimate(model_of(SOUND), [{**batch, "attention_mask": mask}])


def test_the_cost_of_images_is_counted_in_samples():
    batches = [batch_of(VIT), batch_of(VIT, seed=1)]
    options = {"method": "guardspace", "rank": RANK, "target_modules": "all-linear"}
    found = cost(model_of(VIT), batches, **options)
    assert (found.tokens, found.passes) == (6, 1)


def test_a_batch_without_data_is_refused():
    with pytest.raises(CalibrationError, match="batch 0 has labels, but no tensor of data"):
        estimate(model_of(VIT), [{"labels": torch.tensor([0, 1])}])
