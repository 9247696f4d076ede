"""What the steps of a job share: settings, rows, tokenizer, the adapter's config, and the model once it is needed."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from peft_safety.core import base_weights as weights
from peft_safety.core.checks import check_positive, size_pattern, whole
from peft_safety.core.missing import not_found
from peft_safety.data.chat import Collator, Feature
from peft_safety.data.rows import SHAPES, Row
from peft_safety.data.templates import plain_messages, roles
from peft_safety.errors import ConfigError, DataError, extra
from peft_safety.evaluation.prompts import prompt_set
from peft_safety.evaluation.tasks import WHOLE
from peft_safety.recipes.adapter import TASK_ROWS, adapter_config
from peft_safety.recipes.job.contexts import check_chat, check_kind, checked_rows
from peft_safety.recipes.job.data import JobData, feature, has_turns, read_data, unanswered
from peft_safety.recipes.job.options import STEPS
from peft_safety.recipes.job.settings import Settings
from peft_safety.recipes.job.state import State
from peft_safety.recipes.load import TaskData

with extra("trl", "a job needs TRL"):
    from datasets import Dataset
    from trl import get_quantization_config
    from trl.trainer.utils import create_model_from_path

CONFIG_OPTIONS = (
    "safety_energy", "basis", "positions", "train", "window", "a_init", "init", "combine", "combine_rank",
)  # fmt: skip
"""Options that are fields of a config under the same name."""
SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
"""What `accelerate launch` sets."""
BATCH = 8
"""Rows in a batch of calibration."""


class Job:
    """One job. Everything that can be refused before a model is loaded is refused when it is made."""

    def __init__(self, settings: Settings, callbacks: Sequence[TrainerCallback] = ()) -> None:
        self.settings, self.own, self.training = settings, settings.own, settings.training
        self.callbacks = callbacks
        self.main: bool = PartialState().is_main_process
        self.progress = self.main and not self.training.disable_tqdm
        self.out = Path(self.training.output_dir or "trainer_output")
        if self.training.use_cpu and any(os.environ.get(name) == "true" for name in SHARDING):
            wrong = "accelerate shards no model on CPUs: it would train whole replicas"
            raise ConfigError(f"{wrong}. Leave FSDP or DeepSpeed out, or set use_cpu: false where there are GPUs.")
        try:
            for report in get_reporting_integration_callbacks(self.training.report_to):
                report()
        except (ImportError, RuntimeError, ValueError) as error:
            raise ConfigError(f"report_to={self.training.report_to}: {error}") from error
        if self.training.push_to_hub and self.training.hub_token is not None:
            where = "transformers writes hub_token into training_args.bin, which push_to_hub uploads"
            raise ConfigError(f"{where}. Leave hub_token out, and log in: hf auth login, or HF_TOKEN.")
        if unknown := sorted(set(self.own.skip or ()) - set(STEPS)):
            raise ConfigError(f"skip={unknown[0]!r} is no step. Steps: {', '.join(STEPS)}.")
        if self.own.drop_flagged and "screen" in (self.own.skip or ()):
            raise ConfigError("drop_flagged needs the step screen. Do not skip it.")
        if self.protected and not self.own.subspace:
            raise ConfigError("subspace is empty. Give auto, a file, a directory or a Hub id.")
        if self.own.calibration_rows is not None:
            check_positive(self.own, "calibration_rows")
        if (kind := self.own.calibration_contexts) is not None:
            check_kind(kind, self.own.method, self.own.subspace)
        self.clean: list[Row] = [] if self.own.clean is None else checked_rows(self.own.clean)
        self.config = config_of(settings)
        self.tokenizer = _tokenizer(settings)
        seed, text_field = self.training.seed, self.training.dataset_text_field
        self.data = read_data(settings.script, text_field, self.own.held_out, self.own.poison, seed)
        self.unanswered = _unanswered(self.data.train, self.tokenizer)
        _check_assistant(self.data, self.training)
        if kind is not None:
            check_chat(self.data.train, "calibration_contexts")
        if self.own.drop_flagged:
            check_chat(self.data.train, "drop_flagged")
        measured = "measure" not in (self.own.skip or ())
        if measured:
            prompt_set(self.own.eval_split, 1)
        self.task = TaskData([], self._held_out() if measured else [], self.data.labels)
        self.features(TASK_ROWS if self.protected else 1)
        self.state = State(self.out, writes=self.main)
        self.sharded = False
        self.tuned: PeftModel | None = None

    def leave_out(self, dropped: Sequence[int]) -> None:
        """Take rows out of those to train on, by number."""
        kept = sorted({*range(len(self.data.train))} - {*dropped})
        if not kept:
            raise DataError("drop_flagged leaves no row to train on. Look at the rows: peft-safety screen --show.")
        self.data = replace(self.data, train=self.data.train.select(kept))

    @property
    def note(self) -> str | None:
        """On rows without an answer, if there are any."""
        only = self.training.assistant_only_loss
        what = "TRL trains on the end of their blank turns" if only else "TRL trains on the user's words"
        return f"{self.unanswered} of {len(self.data.train)} rows have no answer: {what}" if self.unanswered else None

    @property
    def adapter_dir(self) -> Path:
        return self.out / "adapter"

    @property
    def protected(self) -> bool:
        return self.own.method != "lora"

    @property
    def subspace(self) -> str | None:
        """Where the subspace is: as given, or in the file that the step `calibrate` writes."""
        auto = str(self.out / "subspace.safetensors") if self.own.subspace == "auto" else self.own.subspace
        return auto if self.protected else None

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base model, as TRL loads it."""
        given, training = self.settings.model, self.training
        options: dict[str, Any] = {
            "revision": given.model_revision,
            "trust_remote_code": training.trust_remote_code,
            "attn_implementation": given.attn_implementation,
            "dtype": given.dtype,
        }
        quantization = get_quantization_config(given)
        if quantization is not None:
            options["quantization_config"] = quantization
        if training.world_size > 1:
            options["device_map"] = None
        try:
            with _unsharded(training.deepspeed_plugin):
                given_too = training.model_init_kwargs or {}
                model = create_model_from_path(given.model_name_or_path, **(options | given_too))
        except (OSError, ValueError) as error:
            raise ConfigError(not_found("model", given.model_name_or_path, error)) from error
        weights.stay_unpacked(model)
        if training.world_size > 1 and quantization is None:
            model = model.to(training.device)
        return model

    def adapted(self) -> PeftModel:
        """The model under the trained adapter: the one in memory, or the one on disk."""
        if self.tuned is None:
            if not self.adapter_dir.is_dir():
                raise ConfigError(f"no adapter at {self.adapter_dir}. Run the step train, too.")
            self.tuned = PeftModel.from_pretrained(self.model, str(self.adapter_dir))
        return self.tuned

    def features(self, count: int) -> list[Feature]:
        """Tokens and labels of the first training rows, cut where training cuts them."""
        limit = self.training.max_length or WHOLE
        kept = slice(-limit, None) if self.training.truncation_mode == "keep_end" else slice(limit)
        rows = self._encoded(self.data.train.select(range(min(count, len(self.data.train)))), "training")
        return [{name: values[kept] for name, values in row.items()} for row in rows]

    def batches(self, count: int) -> list[dict[str, Any]]:
        """The same as batches."""
        rows, collate = self.features(count), Collator(self.tokenizer)
        return [collate(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]

    def _held_out(self) -> list[Row]:
        """Held-out rows to measure on: {text, label} as they are, others with the labels that training has."""
        rows = self.data.raw if self.data.labels else self.data.held_out
        if rows is None:
            return []
        chosen = random.Random(self.training.seed).sample(range(len(rows)), len(rows))[: self.own.eval_limit]
        drawn = rows.select(chosen)
        return [*drawn] if self.data.labels else [*self._encoded(drawn, "held-out")]

    def _encoded(self, rows: Dataset, kind: str) -> list[Feature]:
        result = []
        for number, row in enumerate(rows):
            try:
                given = self.training
                result.append(feature(self.tokenizer, row, given.dataset_text_field, given.completion_only_loss))
            except DataError as error:
                raise DataError(f"{kind} row {number}: {error}") from error
        return result


def _unanswered(data: Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows have no answer; refused if there is one in none of them, or no template to write turns by."""
    if has_turns(data) and not tokenizer.chat_template:
        remedy = "Give chat_template_path, a Jinja file or a model that has one."
        raise DataError(f"the tokenizer of {tokenizer.name_or_path} has no chat template. {remedy}")
    count = unanswered(data)
    if count == len(data):
        found = roles(plain_messages(data[0]["messages"]))
        raise DataError(
            f"none of the {count} rows has an answer to train on: no turn of the role 'assistant' says anything "
            f"(roles of the first row: {found}). Name the roles user and assistant, or give {SHAPES}."
        )
    return count


def _check_assistant(data: JobData, training: Any) -> None:
    """Refuse rows without a turn of the assistant where TRL would refuse them once the trainer is made."""
    parts = (data.train, data.held_out if training.eval_strategy != "no" else None)
    for part in parts if training.assistant_only_loss else ():
        if part is not None and (count := unanswered(part, silent=True)):
            problem = f"{count} of {len(part)} rows have no turn of the role 'assistant'"
            raise DataError(f"{problem}, which assistant_only_loss needs. Leave them out, or the option.")


@contextmanager
def _unsharded(plugin: Any) -> Iterator[None]:
    """ZeRO-3 shards weights when training begins, not when they are loaded: one process alone calibrates on them."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin is not None:
            plugin.set_deepspeed_weakref()


def config_of(settings: Settings) -> LoraConfig:
    """The adapter's config: TRL's fields of LoRA, and those of the method."""
    given, own = settings.model, settings.own
    options = {name: getattr(own, name) for name in CONFIG_OPTIONS}
    options["safety_rank"] = whole(own.safety_rank)
    options["safety_rank_pattern"] = size_pattern(own.safety_rank_pattern)
    options |= {"target_parameters": given.lora_target_parameters, "modules_to_save": given.lora_modules_to_save}
    options |= {"use_rslora": given.use_rslora or None, "use_dora": given.use_dora or None}
    if own.method != "lora":
        options["subspace"] = own.subspace
    targets = given.lora_target_modules
    if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"[\w.]+", targets):
        targets = [targets]  # TRL turns a single name into a regular expression
    sizes = {"r": given.lora_r, "lora_alpha": given.lora_alpha, "lora_dropout": given.lora_dropout}
    return adapter_config(own.method, target_modules=targets, **sizes, **options)


def _tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    name, template = settings.model.model_name_or_path, settings.training.chat_template_path
    options = {
        "revision": settings.model.model_revision,
        "trust_remote_code": settings.training.trust_remote_code,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if template is not None:
            path = Path(template)
            own = path.read_text("utf-8") if path.is_file() else AutoTokenizer.from_pretrained(template).chat_template
            tokenizer.chat_template = own
    except (OSError, ValueError) as error:
        raise ConfigError(not_found("tokenizer", name, error)) from error
    tokenizer.eos_token = settings.training.eos_token or tokenizer.eos_token
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer
