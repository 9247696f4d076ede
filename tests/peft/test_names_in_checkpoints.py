"""Checkpoints whose names are not those of the model: vision-language models, and weights that could be one of two."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import peft_safety
from peft_safety import SaLoRAConfig
from peft_safety.core.checkpoints import open_weights
from peft_safety.core.targets import base_layers
from peft_safety.errors import CheckpointError, PeftSafetyError
from tests.peft.named_cells import random_subspace
from tests.tiny import tiny_llama


def llava(shift=0.0):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    ).eval()
    for parameter in model.parameters():
        parameter.data += shift * torch.randn(parameter.shape)
    return model


def test_checkpoints_with_other_names_than_their_model(tmp_path):
    model = llava()
    model.save_pretrained(tmp_path)
    source = open_weights(tmp_path)
    layers = {
        n: m
        for n, m in base_layers(model).items()
        if "q_proj" in n or "fc1" in n or n in ("lm_head", "model.multi_modal_projector.linear_1")
    }
    assert len(layers) == 5
    for name, layer in layers.items():
        with source.open(name) as matrix:
            torch.testing.assert_close(matrix.block(0, matrix.shape[1]), layer.weight.detach(), rtol=0, atol=0)
    for path in tmp_path.glob("config.json"):
        path.unlink()
    with (
        pytest.raises(CheckpointError, match="not there"),
        open_weights(tmp_path).open("model.language_model.layers.0.self_attn.q_proj"),
    ):
        pass


def test_a_base_models_config_may_hold_infinity(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields |= {"time_step_limit": [0.0, float("inf")], "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert "Infinity" in (tmp_path / "config.json").read_text()
    source = open_weights(tmp_path)
    assert source.tied
    with source.open("model.layers.0.self_attn.q_proj") as matrix:
        assert matrix.shape == (32, 32)


def test_safe_lora_and_protection_on_a_vision_language_model(tmp_path):
    llava().save_pretrained(tmp_path / "aligned")
    llava(0.05).save_pretrained(tmp_path / "unaligned")
    model = get_peft_model(llava(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "plain")
    report = peft_safety.safe_lora_dir(
        tmp_path / "plain", tmp_path / "unaligned", tmp_path / "aligned", select="all", progress=False
    )
    assert len(report.modules) == 2
    targets = [name for name in base_layers(llava()) if name.endswith("q_proj")]
    ours = get_peft_model(
        llava(), SaLoRAConfig(r=2, subspace=random_subspace(llava(), targets), target_modules=["q_proj"])
    )
    with torch.no_grad():
        for layer in ours.modules():
            if hasattr(layer, "lora_B"):
                layer.lora_B["default"].weight.add_(1)
    ours.save_pretrained(tmp_path / "ours")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        found, wanted = (
            m.eval()(input_ids=ids).logits for m in (PeftModel.from_pretrained(llava(), tmp_path / "ours"), ours)
        )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_weight_that_could_be_one_of_two_is_not_guessed(tmp_path):
    from safetensors.torch import save_file

    a, b = torch.zeros(4, 4), torch.ones(4, 4)
    save_file({"m.layers.0.lin.weight": a, "m.img.layers.0.lin.weight": b}, tmp_path / "model.safetensors")
    with pytest.raises(PeftSafetyError, match=r"layers\.0\.lin"), open_weights(tmp_path).open("layers.0.lin"):
        pass
    with open_weights(tmp_path).open("img.layers.0.lin") as matrix:
        assert bool(matrix.block(0, 4).all())
    save_file({"layers.0.lin.weight": a, "img.other.weight": b}, tmp_path / "model.safetensors")
    with pytest.raises(PeftSafetyError, match=r"img\.layers"), open_weights(tmp_path).open("img.layers.0.lin"):
        pass
