"""Tiny random models of many architectures, with a batch that each of them trains on."""

from __future__ import annotations

from typing import Any

import torch
import transformers

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
EXPERTS = {**HEADS, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
OLD = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ENCODER = {**TEXT, "max_position_embeddings": 64}
REGRESSION = {"num_labels": 1, "problem_type": "regression"}
VISION = {k: TEXT[k] for k in TEXT if k not in ("vocab_size", "pad_token_id")} | {"image_size": 32, "patch_size": 16}
TWO_SIDED = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WAV2VEC2 = {
    **{k: TEXT[k] for k in TEXT if k != "pad_token_id"},
    "conv_dim": (16, 16),
    "conv_kernel": (8, 4),
    "conv_stride": (4, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
LATENT = {
    **GROUPED,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
SSM = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1}

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT, classifier": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "BERT, tokens": ("BertForTokenClassification", "BertConfig", ENCODER),
    "BART": ("BartForConditionalGeneration", "BartConfig", TWO_SIDED),
    "BLOOM": ("BloomForCausalLM", "BloomConfig", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "BERT, regression": ("BertForSequenceClassification", "BertConfig", {**ENCODER, **REGRESSION}),
    "CLIP": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**ENCODER, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": 16},
    ),
    "CLIP text": ("CLIPTextModelWithProjection", "CLIPTextConfig", ENCODER),
    "Cohere": ("CohereForCausalLM", "CohereConfig", GROUPED),
    "DeBERTa-v2, classifier": ("DebertaV2ForSequenceClassification", "DebertaV2Config", ENCODER),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT),
    "DistilBERT, classifier": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 99, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "Falcon": ("FalconForCausalLM", "FalconConfig", TEXT),
    "Falcon-Mamba": (
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", HEADS),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", HEADS),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", OLD),
    "GPT-J": ("GPTJForCausalLM", "GPTJConfig", {**OLD, "rotary_dim": 4}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "GPT-OSS": ("GptOssForCausalLM", "GptOssConfig", {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Granite": ("GraniteForCausalLM", "GraniteConfig", GROUPED),
    "Granite-MoE": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**GROUPED, "num_local_experts": 4}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Llama, classifier": ("LlamaForSequenceClassification", "LlamaConfig", GROUPED),
    "Llama 4, text": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**HEADS, "num_local_experts": 4, "intermediate_size_mlp": 48, "moe_layers": [0, 1]},
    ),
    "LLaVA": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **GROUPED},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": 98,
            "image_token_id": 98,
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -1,
        },
    ),
    "Mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "MPT": ("MptForCausalLM", "MptConfig", {"vocab_size": 99, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "OLMo 2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "OLMoE": ("OlmoeForCausalLM", "OlmoeConfig", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    ),
    "Phi": ("PhiForCausalLM", "PhiConfig", TEXT),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Qwen2-MoE": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**GROUPED, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", HEADS),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EXPERTS, "num_experts": 4}),
    "RoBERTa, classifier": ("RobertaForSequenceClassification", "RobertaConfig", ENCODER),
    "SmolLM3": ("SmolLM3ForCausalLM", "SmolLM3Config", GROUPED),
    "StableLM": ("StableLmForCausalLM", "StableLmConfig", GROUPED),
    "Starcoder 2": ("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
    "ViT, classifier": ("ViTForImageClassification", "ViTConfig", {**VISION, "num_labels": 3}),
    "Wav2Vec2, CTC": ("Wav2Vec2ForCTC", "Wav2Vec2Config", WAV2VEC2),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {**TWO_SIDED, "num_mel_bins": 8}),
}
"""Class, config class and sizes, by the name in docs/compatibility.md."""

TOKENS = 17
INVOCATION = 91
"""A token that every row has once."""


class Attending(torch.nn.Module):
    """One `nn.MultiheadAttention` between embeddings and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(99, 32)
        self.attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = torch.nn.Linear(32, 99)

    def forward(self, input_ids: torch.Tensor, **other: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        return {"logits": self.head(self.attention(x, x, x)[0])}


def model_of(name: str) -> Any:
    """A random model in eval mode, the same each time."""
    if name == "MultiheadAttention":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Attending().eval()
    model_name, config_name, sizes = ARCHITECTURES[name]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name == "Whisper":
        sizes = {**sizes, "max_source_positions": 20, "max_target_positions": 64}
    if name in ("LLaVA", "ViT, classifier", "CLIP"):
        special = {}
    config = getattr(transformers, config_name)(**{**special, **sizes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_name)(config).eval()
        for parameter in model.parameters():  # some are left as they were allocated
            if parameter.ndim == 3 or not bool(torch.isfinite(parameter).all()):
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch_of(name: str, seed: int = 0) -> dict[str, Any]:
    """Three rows with labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (3, TOKENS), generator=generator)
    ids[:, 6] = INVOCATION
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    kind = ARCHITECTURES.get(name, ("",))[0]
    if "SequenceClassification" in kind:
        batch["labels"] = torch.tensor([0.5, -1.0, 2.0]) if "regression" in name else torch.tensor([0, 1, 1])
    elif "TokenClassification" in kind:
        batch["labels"] = ids % 2
    elif name == "CLIP text":
        del batch["labels"]
    elif name == "CLIP":
        ids[:, -1] = 2
        pixels = torch.randn(3, 3, 32, 32, generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "return_loss": True}
    elif name == "Wav2Vec2, CTC":
        batch = {"input_values": torch.randn(3, 400, generator=generator), "labels": ids[:, :6]}
    elif name == "LLaVA":
        ids[:, 1:5] = 98
        batch["pixel_values"] = torch.randn(3, 3, 32, 32, generator=generator)
    elif name == "ViT, classifier":
        pixels = torch.randn(3, 3, 32, 32, generator=generator)
        batch = {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2])}
    elif name == "Whisper":
        batch = {"input_features": torch.randn(3, 8, 40, generator=generator), "labels": ids}
    return batch


ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
TARGETS: dict[str, Any] = {
    "DeepSeek-V3": ATTENTION,
    "Falcon-Mamba": ["in_proj", "x_proj"],
    "Llama 4, text": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
"""Where it is not "all-linear"."""
SAVING: dict[str, Any] = {"Wav2Vec2, CTC": {"save_embedding_layers": False}}
"""Options of `save_pretrained`."""
EVERY = ("GuardSpace B", "GuardSpace window", "GuardSpace A", "SaLoRA", "patch")
LIMITS: dict[str, tuple[tuple[str, ...], str]] = {
    "DeepSeek-V3": (
        EVERY,
        'With "all-linear" PEFT targets the fused experts and the router, too; targeted here: attention.',
    ),
    "Falcon-Mamba": (
        ("LoRA", *EVERY),
        'PEFT refuses `out_proj`, and so "all-linear"; targeted here: `in_proj`, `x_proj`.',
    ),
    "Wav2Vec2, CTC": (("LoRA", *EVERY), "PEFT saves it only with `save_embedding_layers=False`."),
    "Llama 4, text": (("LoRA", *EVERY), 'PEFT\'s "all-linear" breaks the router; targeted here: attention.'),
}
"""Which methods take an architecture with a limit, and what it is."""
REFUSED: dict[str, tuple[tuple[str, ...], str, str]] = {}
"""Which methods refuse one, why, and what the error says."""
