"""`peft-safety train`: settings, data, plan and steps of a fine-tuning job on TRL's SFTTrainer."""
