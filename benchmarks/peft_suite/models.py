"""Tiny random models under the names that PEFT's tests ask the Hub for, as a cache of the Hub lays them out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB = 1024
"""PEFT's tests name tokens up to 1000."""
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<mask>")

_LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
_MOE = {**_LLAMA, "hidden_size": 32, "head_dim": 8, "num_key_value_heads": 2}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_OPT = {
    "hidden_size": 16,
    "ffn_dim": 16,
    "word_embed_proj_dim": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "max_position_embeddings": 256,
}
_GPT2 = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 256}
_T5 = {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 5, "num_heads": 4, "decoder_start_token_id": 0}
_GEMMA = {**_LLAMA, "head_dim": 8, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "opt": ("OPTForCausalLM", "OPTConfig", _OPT),
    "opt12": ("OPTForCausalLM", "OPTConfig", {**_OPT, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 12}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {k: v for k, v in _BERT.items() if "key" not in k}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 5, "n_head": 4}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_LLAMA, "hidden_size": 32, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**_LLAMA, "hidden_size": 8, "intermediate_size": 32}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_MOE, "num_local_experts": 4}),
    "qwen3moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_MOE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "gptoss": ("GptOssForCausalLM", "GptOssConfig", {**_MOE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_MOE, "num_local_experts": 4, "intermediate_size_mlp": 64, "moe_layers": [0, 1]},
    ),
    "mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", {"hidden_size": 32, "num_hidden_layers": 2}),
    "nemotron": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "hybrid_override_pattern": "M*",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 1,
        },
    ),
    "bert": ("BertModel", "BertConfig", _BERT),
    "bert_cls": ("BertForSequenceClassification", "BertConfig", _BERT),
    "roberta": ("RobertaModel", "RobertaConfig", _BERT),
    "roberta_cls": ("RobertaForSequenceClassification", "RobertaConfig", _BERT),
    "deberta": ("DebertaModel", "DebertaConfig", {**_BERT, "pos_att_type": ["c2p", "p2c"]}),
    "deberta2": ("DebertaV2Model", "DebertaV2Config", {**_BERT, "pos_att_type": ["c2p", "p2c"]}),
    "llama_cls": ("LlamaForSequenceClassification", "LlamaConfig", _LLAMA),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 4,
            "decoder_ffn_dim": 4,
            "max_position_embeddings": 256,
            "forced_eos_token_id": None,
        },
    ),
    "clip": ("CLIPTextModelWithProjection", "CLIPTextConfig", {**_BERT, "projection_dim": 32}),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3},
    ),
}
"""Class, config class and sizes. Widths are those of the models on the Hub, or near them."""

NAMES = {
    "facebook/opt-125m": "opt12",
    "facebook/opt-350m": "opt12",
    "hf-internal-testing/Mixtral-tiny": "mixtral",
    "hf-internal-testing/tiny-qwen3-moe": "qwen3moe",
    "hf-internal-testing/tiny-random-BertModel": "bert",
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": "gemma3",
    "hf-internal-testing/tiny-random-LlamaForCausalLM": "llama",
    "hf-internal-testing/tiny-random-MistralForCausalLM": "mistral",
    "hf-internal-testing/tiny-random-gpt2": "gpt2",
    "microsoft/resnet-18": "resnet",
    "openai-community/gpt2": "gpt2",
    "peft-internal-testing/opt-125m": "opt12",
    "peft-internal-testing/tiny-clip-text-2": "clip",
    "peft-internal-testing/tiny-dummy-qwen2": "qwen2",
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": "bart",
    "peft-internal-testing/tiny-random-BertForSequenceClassification": "bert_cls",
    "peft-internal-testing/tiny-random-BertModel": "bert",
    "peft-internal-testing/tiny-random-BloomForCausalLM": "bloom",
    "peft-internal-testing/tiny-random-DebertaModel": "deberta",
    "peft-internal-testing/tiny-random-DebertaV2Model": "deberta2",
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": "gpt2",
    "peft-internal-testing/tiny-random-GPTJForCausalLM": "gptj",
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": "neox",
    "peft-internal-testing/tiny-random-LlamaForCausalLM": "llama",
    "peft-internal-testing/tiny-random-OPTForCausalLM": "opt",
    "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab": "opt",
    "peft-internal-testing/tiny-random-ResNetForImageClassification": "resnet",
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": "roberta_cls",
    "peft-internal-testing/tiny-random-RobertaModel": "roberta",
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": "t5",
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": "t5",
    "peft-internal-testing/tiny-random-gpt2": "gpt2",
    "peft-internal-testing/tiny-random-t5": "t5",
    "tiiuae/falcon-mamba-tiny-dev": "mamba",
    "trl-internal-testing/tiny-GptOssForCausalLM": "gptoss",
    "trl-internal-testing/tiny-Llama4ForCausalLM": "llama4",
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": "llama_cls",
    "trl-internal-testing/tiny-NemotronHForCausalLM-nano": "nemotron",
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": "qwen2",
    "trl-internal-testing/tiny-Qwen3ForCausalLM": "qwen3",
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": "qwen3moe",
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "llama",
}
ADAPTERS = {"peft-internal-testing/tiny-OPTForCausalLM-lora": "peft-internal-testing/tiny-random-OPTForCausalLM"}
"""Plain LoRA adapters that the tests load, and their base model."""


def build(cache: Path) -> dict[str, str]:
    """Fill a cache of the Hub, as `HF_HUB_CACHE` names one. Returns the models that this transformers cannot build,
    with the reason: their tests fail with plain LoRA, and count for nobody.
    """
    failed = {}
    for name, kind in NAMES.items():
        try:
            _publish(cache, name, lambda folder, kind=kind: _save(folder, kind))  # type: ignore[misc]
        except (AttributeError, KeyError, ImportError, TypeError, ValueError, RuntimeError) as error:
            failed[name] = f"{type(error).__name__}: {error}"
    for name, base in ADAPTERS.items():
        _publish(cache, name, lambda folder, base=base: _save_adapter(folder, base, NAMES[base]))  # type: ignore[misc]
    return failed


def _publish(cache: Path, name: str, save: Callable[[Path], None]) -> None:
    """Write a repository with one revision, unless it is there."""
    repository, revision = cache / f"models--{name.replace('/', '--')}", hashlib.sha1(name.encode()).hexdigest()
    if (repository / "refs" / "main").is_file():
        return
    save(repository / "snapshots" / revision)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(revision)


def model_of(kind: str) -> Any:
    """A random model, the same each time."""
    import torch
    import transformers

    model_name, config_name, sizes = KINDS[kind]
    own = {} if kind == "resnet" else {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = getattr(transformers, config_name)(**own, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config)
    for parameter in model.parameters():  # some are left as they were allocated
        if not bool(torch.isfinite(parameter).all()) or parameter.ndim == 3:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def _save(folder: Path, kind: str) -> None:
    model_of(kind).save_pretrained(folder)
    if kind != "resnet":
        tokenizer().save_pretrained(folder)


def _save_adapter(folder: Path, base: str, kind: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(base_model_name_or_path=base, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model_of(kind), config).save_pretrained(str(folder))


def tokenizer() -> Any:
    """A byte-level tokenizer with the special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    result = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    tokens = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=result, model_max_length=256, **tokens)
