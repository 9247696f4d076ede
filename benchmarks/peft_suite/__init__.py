"""PEFT's own tests with this package's configs in place of `LoraConfig`."""
