"""What the cells of one process share: the aligned model, calibrations, adapters of plain LoRA, and the prompts."""

from __future__ import annotations

import gc
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from transformers import TrainerCallback

from benchmarks.common import load_causal, reset_peak, resident_mib, resident_now_mib
from benchmarks.frontier.adapters import check_finite, norm
from benchmarks.frontier.along import Along
from benchmarks.frontier.attack_rows import attacked
from benchmarks.frontier.attacks import attack_of, template
from benchmarks.frontier.cache import Cache
from benchmarks.frontier.cells import Cell
from benchmarks.frontier.measure import Measures
from examples import safety_patch
from examples.get_model import model_dir
from peft_safety import SafetySubspace
from peft_safety.data import load, refusal_pairs
from peft_safety.data.rows import Row
from peft_safety.errors import ArtifactError, ConfigError
from peft_safety.evaluation import Judge
from peft_safety.recipes.adapter import adapter_config
from peft_safety.recipes.load import TaskData, load_model, poisoned, task_data
from peft_safety.recipes.patch import PatchOptions, patch
from peft_safety.recipes.train import TrainOptions, finetune
from peft_safety.screening.screen import Screen

PATCH_DIR = Path(__file__).parents[1] / "data" / "patch"
"""The safety patch of the aligned model: the one that shipped with the examples when the benchmark ran."""
CALIBRATIONS = 3
"""Largest number of subspaces in memory; one can be as large as the model."""
Sets = Mapping[str, Sequence[str]]
Facts = dict[str, Any]


class Bench:
    """The aligned model, and what has been made from it so far.

    Args:
        cache: finished cells; adapters of plain LoRA are kept in the same folder.
        sets: further prompt sets by name, for test cells.
        aligned: directory of the aligned model; default SmolLM2-135M-Instruct with the safety patch in
            `PATCH_DIR`, or `unaligned` with a patch made once.
        unaligned: directory of the model before its alignment, for the methods that need it.
        judges: in addition to the keyword matcher.
        task: rows of the trained task; default the package's own.
        patch: how a new patch is made; default `PatchOptions` for another model.
        data: directory of the public sets, for the attack "foreign".
    """

    def __init__(
        self,
        cache: Cache,
        sets: Sets = MappingProxyType({}),
        aligned: Path | None = None,
        *,
        unaligned: Path | None = None,
        judges: Sequence[Judge] = (),
        task: Sequence[Row] | None = None,
        patch: PatchOptions | None = None,
        data: Path | None = None,
    ) -> None:
        self.cache, self.sets, self.protocol, self.judges = cache, sets, cache.protocol, judges
        self.task_rows = list(load("benign_task") if task is None else task)
        self._unaligned, self._patch, self._data = unaligned, patch, data
        transformers.utils.logging.disable_progress_bar()  # the cells have one
        self.directory = aligned or self._align()
        self.loaded, self.model, self.tokenizer = "", *load_model(self.directory)
        self.subspaces: dict[tuple[Any, ...], SafetySubspace] = {}
        self.screens: dict[tuple[str, int], Screen] = {}
        self._measures: dict[tuple[str, int], Measures] = {}
        self._general: dict[str, list[dict[str, Any]]] = {}

    @property
    def unaligned(self) -> Path:
        """Directory of the model before its alignment."""
        return self._unaligned or model_dir()

    def _align(self) -> Path:
        """The unaligned model with a safety patch merged into it: that of `PATCH_DIR`, or a new one for another
        model or recipe. One process makes it, once.
        """
        out = self.cache.folder / f"aligned{self.cache.protocol.patch}"
        with self.cache.lock("aligned", wait=True):
            if not (out / "config.json").is_file():
                model, tokenizer = load_model(self.unaligned)
                if self._unaligned is None and self._patch is None:
                    patched = safety_patch.attach(model, PATCH_DIR)
                else:
                    patched = patch(model, tokenizer, self._patch)[0].merge_and_unload()
                self.publish(out, lambda staged: (tokenizer.save_pretrained(staged), patched.save_pretrained(staged)))
        return out

    @staticmethod
    def publish(out: Path, write: Callable[[Path], Any]) -> None:
        """Write a directory by one rename: it is complete or not there.

        Raises:
            ArtifactError: it cannot be written.
        """
        staged = out.with_name(f".{out.name}.part")
        try:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            write(staged)
            staged.rename(out)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(staged, ignore_errors=True)
            raise ArtifactError(
                f"{out} cannot be written: {error}. Finished cells are safe; make room and run the same command again."
            ) from error

    def use(self, kind: str) -> None:
        """Load the aligned model without adapters, in fp32 ("") or in 4 bits ("nf4"), if it is not loaded already."""
        if self.model is not None and kind == self.loaded:
            return
        if kind not in ("", "nf4"):
            raise ConfigError(f"load {kind!r} is unknown. Choose '' (fp32) or 'nf4'.")
        self.model = None
        gc.collect()
        self.model = load_causal(self.directory, nf4=True) if kind else load_model(self.directory)[0]
        self.loaded = kind

    def measures(self, cell: Cell) -> Measures:
        """What a cell is measured on. Prompts are the same for every arm and seed; the held-out rows depend on the
        seed.
        """
        key = (cell.split, cell.seed)
        if key not in self._measures:
            last = cell.split == "test"
            second = (
                task_data(load("second_task"), cell.split, self.protocol.second, 0)
                if last and self.protocol.second
                else None
            )
            if cell.split not in self._general:
                self.use("")
            made = Measures.prepare(
                self.model,
                self.tokenizer,
                self.protocol,
                cell.split,
                self.task(cell),
                second,
                sets={name: tuple(rows) for name, rows in self.sets.items()} if last else {},
                judges=self.judges,
                general=self._general.get(cell.split),
            )
            self._general[cell.split], self._measures[key] = made.general, made
            self.use(cell.load)
        return self._measures[key]

    def task(self, cell: Cell) -> TaskData:
        """The rows of the task for a seed: the training rows, and the held-out rows of the cell's split."""
        data = task_data(self.task_rows, cell.split, self.protocol.limit, cell.seed)
        return TaskData(
            random.Random(cell.seed).sample(data.train, min(self.protocol.rows, len(data.train))),
            data.held_out,
            data.labels,
        )

    def options(self, cell: Cell) -> TrainOptions:
        """How a cell trains."""
        return TrainOptions(
            lr=cell.lr or 1e-3,
            epochs=max(cell.epochs, 1),
            max_length=self.protocol.max_length,
            seed=cell.seed,
            progress=False,
        )

    def config(self, method: str = "lora", **options: Any) -> Any:
        """The config of an adapter, of the rank that all arms share unless `r` is given."""
        r = options.pop("r", self.protocol.r)
        return adapter_config(method, r=r, lora_alpha=2 * r, **options)

    def refusals(self, count: int, seed: int = 0) -> list[dict[str, str]]:
        """Requests with refusals that a defense may use; no attack has them."""
        return refusal_pairs("calibration", count, seed)

    def rows(self, cell: Cell) -> list[Any]:
        """What a cell trains on."""
        clean = self.task(cell).train
        if not cell.attack:
            return poisoned(clean, cell.poison, cell.seed)
        return attacked(cell.attack, clean, cell.poison, cell.seed, self.model, self.tokenizer, self._data)

    def train(
        self,
        cell: Cell,
        config: Any,
        rows: Sequence[Row],
        *,
        options: TrainOptions | None = None,
        model: Any = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> tuple[PeftModel, Facts]:
        """Fine-tune the aligned model (or `model`); returns it with its norm, its loss and what it cost.

        Raises:
            DivergedError: weights that are not finite.
        """
        along = Along(self.measures(cell), self.tokenizer, cell.epochs)
        reset_peak()
        cuda = torch.cuda.is_available()
        held = torch.cuda.memory_allocated() / 2**20 if cuda else resident_now_mib()
        labels, spent = self.task(cell).labels, {}
        with timed(spent, "train"), template(self.tokenizer, attack_of(cell.attack)):
            tuned, run = finetune(
                self.model if model is None else model,
                self.tokenizer,
                rows,
                config,
                options or self.options(cell),
                labels=labels,
                callbacks=[along, *callbacks],
            )
        check_finite(tuned, run, cell)
        facts = {
            "norm": norm(tuned),
            "steps": run.steps,
            "loss": run.loss,
            **spent,
            "added_mib": round((run.peak_memory_mib if cuda else resident_mib()) - held),
        }
        return tuned, {**facts, **({"along": along.results} if along.results else {})}

    def plain(self, cell: Cell) -> tuple[Path, Facts]:
        """The adapter of plain LoRA for the same rows and seed. The first cell that needs it trains it; then it is
        kept, so that all arms that change a trained adapter start from the same one.
        """
        lora = cell.without_basis("lora")
        name = self.protocol.adapter_key(lora)
        out = self.cache.folder / "adapters" / name
        with self.cache.lock(f"adapter-{name}", wait=True):
            if not out.is_dir():
                tuned, facts = self.train(lora, self.config(), self.rows(lora))

                def write(staged: Path) -> None:
                    tuned.save_pretrained(str(staged))
                    (staged / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

                self.publish(out, write)
                self.model = tuned.unload()
        return out, json.loads((out / "facts.json").read_text(encoding="utf-8"))

    def discard(self, name: str) -> None:
        """Delete a saved adapter."""
        shutil.rmtree(self.cache.folder / "adapters" / name, ignore_errors=True)

    def attach(self, directory: Path, name: str = "default") -> PeftModel:
        """The aligned model with a saved adapter."""
        return PeftModel.from_pretrained(self.model, str(directory), adapter_name=name)

    def subspace(self, key: tuple[Any, ...], make: Callable[[], SafetySubspace]) -> SafetySubspace:
        """A safety subspace of the loaded model, estimated once in a process."""
        full = (self.loaded, *key)
        if full not in self.subspaces:
            while len(self.subspaces) >= CALIBRATIONS:
                self.subspaces.pop(next(iter(self.subspaces)))
            self.subspaces[full] = make()
        return self.subspaces[full]


@contextmanager
def timed(facts: Facts, name: str) -> Iterator[None]:
    """Add the time of a block to `facts`: seconds by the clock, and on the CPU also seconds of processor time, which
    other programs on the machine disturb less.
    """
    started, used = time.perf_counter(), time.process_time()
    yield
    spent = {f"{name}_seconds": time.perf_counter() - started}
    if not torch.cuda.is_available():
        spent[f"{name}_cpu_seconds"] = time.process_time() - used
    for key, seconds in spent.items():
        facts[key] = round(facts.get(key, 0.0) + seconds, 2)
