"""Judges that run here, by transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from peft_safety.data.templates import Chat
from peft_safety.errors import ConfigError
from peft_safety.evaluation.generate import generate
from peft_safety.evaluation.judges.base import Family
from peft_safety.evaluation.judges.encoder import architectures, no_model
from peft_safety.evaluation.versions import version_of

BATCHES = 16
"""Batches between two looks at what was judged; rows of similar length are batched within them."""


class LocalRunner:
    """A causal model, an image-text model that reads text alone (Llama Guard 4), or a LoRA adapter of one.

    Args:
        model: Hub id or directory; safetensors only, no code of its own.
        load_in_4bit: quantize to NF4 on the way in.
        batch_size: rows at once.

    Raises:
        ConfigError: no such model, or one that does not write.
    """

    url = None

    def __init__(self, model: str, *, load_in_4bit: bool = False, batch_size: int = 16) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
        from transformers.utils import cached_file, find_adapter_config_file

        from peft_safety.core.base_weights import nf4_config

        self.model, self.batch_size, self.load_in_4bit = model, batch_size, load_in_4bit
        cuda = torch.cuda.is_available()
        options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
        options["dtype"] = torch.float32 if not cuda else torch.bfloat16 if load_in_4bit else "auto"
        if load_in_4bit:
            options["quantization_config"] = nf4_config(options["dtype"])
        if cuda:
            options["device_map"] = "auto"
        try:
            adapter = find_adapter_config_file(model) is not None
            kinds = ["ForCausalLM"] if adapter else architectures(model)
            if adapter:
                cached_file(model, "adapter_model.safetensors")  # its pickle, if it has one, is never read
            loaders = {"ForCausalLM": AutoModelForCausalLM, "ForConditionalGeneration": AutoModelForImageTextToText}
            loader: Any = next((loaders[end] for end in loaders if any(kind.endswith(end) for kind in kinds)), None)
            if loader is None:
                raise ConfigError(f"judge {model!r} is a {kinds}. Give a model that writes text.")
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            self.loaded: Any = loader.from_pretrained(model, **options).eval()
        except ConfigError:
            raise
        except (ImportError, OSError, ValueError) as error:
            raise no_model(model, error) from error

    @cached_property
    def version(self) -> str:
        return version_of(self.model) + (" in NF4" if self.load_in_4bit else "")

    def shorten(self, text: str, tokens: int) -> str:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= tokens else str(self.tokenizer.decode(ids[:tokens]))

    def answers(self, family: Family, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, str]]:
        options: dict[str, Any] = {"max_new_tokens": family.tokens, "batch_size": self.batch_size}
        texts = [self.text(family, *pair) for pair in pairs]
        for start in range(0, len(texts), BATCHES * self.batch_size):
            part = texts[start : start + BATCHES * self.batch_size]
            answers = generate(self.loaded, self.tokenizer, part, rendered=True, progress=False, **options)
            yield from ((start + place, answer.text) for place, answer in enumerate(answers))

    def text(self, family: Family, prompt: str, response: str) -> str:
        """The question as the model reads it, special tokens included."""
        question = family.question(prompt, response)
        if isinstance(question, str):
            return (self.tokenizer.bos_token or "") + question
        return Chat(self.tokenizer, options=family.variables).text(question, header=family.header)
