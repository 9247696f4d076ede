"""`trl sft` with a protected adapter: TRL's parser, so its flags and `--config job.yaml`, and TRL's trainer.

python examples/trl_sft.py --model_name_or_path M --dataset_name D --output_dir adapter --learning_rate 5e-4

D is a Hub id, or a directory with JSON lines (not a file). Two defaults differ from TRL's: no dropout, and all linear
layers are adapted.
"""

from __future__ import annotations

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_quantization_config

from peft_safety import GuardSpaceConfig
from peft_safety.errors import ConfigError

TASK_ROWS = 32


def main() -> None:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    parser.set_defaults(lora_dropout=0.0)
    script, training, model = parser.parse_args_and_config()
    if script.dataset_streaming:
        raise ConfigError("dataset_streaming: the adapter is made from the first rows. Load the data set as a whole.")
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    data = load_dataset(script.dataset_name, name=script.dataset_config)
    rows = data[script.dataset_train_split]
    adapter = GuardSpaceConfig(
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,  # refused: it rescales the update
        target_modules=model.lora_target_modules or "all-linear",
        target_parameters=model.lora_target_parameters,
        modules_to_save=model.lora_modules_to_save,
        task_type=model.lora_task_type,
        task_data=rows.select(range(min(TASK_ROWS, len(rows)))),
    )
    trainer = SFTTrainer(
        model.model_name_or_path,
        args=training,
        train_dataset=rows,
        eval_dataset=data[script.dataset_test_split] if training.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model),
        peft_config=adapter,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
