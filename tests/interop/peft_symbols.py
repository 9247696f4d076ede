"""Every symbol of PEFT that `peft_safety.registry` and `peft_safety.layers` use."""

SYMBOLS = {
    "peft.mapping": (
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "PEFT_TYPE_TO_PREFIX_MAPPING",
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    ),
    "peft.config": ("PeftConfigMixin.from_pretrained", "PeftConfigMixin._get_peft_type"),
    "peft.peft_model": ("PeftModel.save_pretrained", "PeftModel.load_adapter"),
    "peft.tuners.lora": (
        "LoraModel.add_weighted_adapter",
        "Linear.get_delta_weight",
        "Linear.merge",
        "ParamWrapper.get_delta_weight",
        "ParamWrapper.get_param",
        "LoraLayer.lora_A",
        "LoraLayer.lora_B",
        "LoraLayer._mixed_batch_forward",
        "LoraLayer.update_layer",
    ),
    "peft.tuners.tuners_utils": (
        "_maybe_include_all_linear_layers",
        "BaseTuner._unload_and_optionally_merge",
        "BaseTuner.merge_adapter",
        "BaseTuner.inject_adapter",
        "BaseTuner.delete_adapter",
        "BaseTunerLayer.get_base_layer",
        "BaseTunerLayer.enable_adapters",
        "BaseTunerLayer.delete_adapter",
        "BaseTunerLayer.active_adapters",
        "BaseTunerLayer.merged_adapters",
        "BaseTunerLayer.disable_adapters",
        "BaseTunerLayer._get_available_adapters",
        "BaseTunerLayer.frozen_peft_weight_names",
    ),
    "peft.tuners.lora.variants": (
        "ALoraLinearVariant.forward",
        "VeloraFunction",
        "VeloraLinearVariant._maybe_update_embed",
    ),
    "peft.tuners.lora.layer": ("Embedding.update_layer", "_ConvNd.update_layer"),
    "peft.tuners.xlora": ("XLoraModel",),
    "peft.tuners.mixed": ("MixedModel._unload_and_optionally_merge", "MixedModel.delete_adapter"),
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
    "peft.utils.other": ("transpose", "get_pattern_key", "AuxiliaryTrainingWrapper"),
    "peft.utils.hotswap": ("_pad_lora_weights", "hotswap_adapter", "hotswap_adapter_from_state_dict"),
}
"""Every PEFT symbol that is read, wrapped or overridden, by module. Instance attributes (`LoraLayer.lora_A`) are
checked on an instance.
"""

QUANTIZED = {
    "peft.tuners.lora.bnb": (
        "Linear4bit.forward",
        "Linear4bit.get_delta_weight",
        "Linear8bitLt.get_delta_weight",
        "Linear4bit.merge",
    ),
}
"""The same, where bitsandbytes is installed."""
