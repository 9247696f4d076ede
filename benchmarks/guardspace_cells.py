"""What a cell of `benchmarks.guardspace` does: fine-tune the aligned model as the cell says, and measure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback

from benchmarks.guardspace import Cache, Cell, Protocol
from peft_safety import SafetySubspace
from peft_safety.data import calibration_rows, load, refusal_pairs
from peft_safety.estimate.coverage import task_shares
from peft_safety.estimate.moments import to_batches
from peft_safety.estimate.targets import target_layers
from peft_safety.evaluation import KeywordJudge
from peft_safety.evaluation.generate import generate
from peft_safety.evaluation.judges import Verdict
from peft_safety.evaluation.metrics import Rate
from peft_safety.methods.protected import adapter_layers
from peft_safety.recipes.adapter import AdapterOptions
from peft_safety.recipes.bench import JUDGED_TOKENS
from peft_safety.recipes.bench import Bench as Measures
from peft_safety.recipes.load import TaskData, load_model, poisoned, task_data
from peft_safety.recipes.train import TrainOptions, finetune
from peft_safety.report import environment

LARGEST = 1 / 2
"""Bases are estimated once at this share and cut to smaller ones: the top eigenvectors are nested."""


def environment_of(protocol: Protocol) -> dict[str, Any]:
    """What the figures depend on."""
    return environment(0, model=protocol.aligned, threads=torch.get_num_threads(), **{k: v for k, v in asdict(protocol).items() if k != "aligned"})


def truncated(subspace: SafetySubspace, fraction: float) -> SafetySubspace:
    """The leading directions of each input basis, as many as `fraction` of the dimensions."""
    cut: dict[int, torch.Tensor] = {}
    bases: dict[str, dict[Any, torch.Tensor]] = {}
    for name, sides in subspace.bases.items():
        u = sides["in"]
        if id(u) not in cut:
            cut[id(u)] = u[:, : max(1, round(fraction * u.shape[0]))].contiguous()
        bases[name] = {"in": cut[id(u)]}
    facts = {k: v for k, v in subspace.provenance.items() if k != "covered"}
    return SafetySubspace(bases, None, subspace.fingerprints, {**facts, "rank": fraction})


@torch.no_grad()
def norm(model: torch.nn.Module) -> float:
    """`sqrt(sum ||dW||_F^2)` over the modules of the adapter."""
    total = 0.0
    for layer in adapter_layers(model, "default").values():
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        total += float(((b.mT @ b) * (a @ a.mT)).sum()) * float(layer.scaling["default"]) ** 2
    return float(total**0.5)


class Along(TrainerCallback):
    """Measures refusal during a long fine-tune, each time its steps have doubled; the end is the cell's own measurement."""

    def __init__(self, bench: Bench, cell: Cell) -> None:
        self.bench, self.cell = bench, cell
        self.found: dict[int, dict[str, Any]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        parts, rest = divmod(state.max_steps, max(state.global_step, 1))
        if rest or parts == 1 or parts > self.cell.epochs or parts & (parts - 1):
            return
        harmful = self.bench._measures(self.cell).prompts.harmful
        answers = generate(model, self.bench.tokenizer, harmful, max_new_tokens=JUDGED_TOKENS, progress=False)
        verdicts = [KeywordJudge()(prompt, answer.text) for prompt, answer in zip(harmful, answers, strict=True)]
        rates = {name: Rate.of(verdict is kind for verdict in verdicts) for name, kind in (("refusal", Verdict.REFUSAL), ("compliance", Verdict.COMPLIANCE))}
        self.found[state.global_step] = {"norm": norm(model), **{name: rate.to_json() for name, rate in rates.items()}}


class Bench:
    """The aligned model, and what has been made of it so far."""

    def __init__(self, cache: Cache, prompts: Mapping[str, Sequence[str]], aligned: Path | None = None) -> None:
        self.cache, self.prompts, self.protocol = cache, prompts, cache.protocol
        self.directory = aligned or self._align()
        self.model, self.tokenizer = load_model(self.directory)
        self.subspaces: dict[tuple[str, str, int], SafetySubspace] = {}
        self.measures: dict[tuple[str, int], Measures] = {}

    def _align(self) -> Path:
        """SmolLM2-135M-Instruct with a safety patch merged in, made once."""
        from examples.get_model import model_dir
        from peft_safety.recipes.patch import patch

        out = self.cache.folder / "aligned"
        if not (out / "config.json").is_file():
            model, tokenizer = load_model(model_dir())
            patched, _ = patch(model, tokenizer)
            tokenizer.save_pretrained(out)
            patched.merge_and_unload().save_pretrained(out)
        return out

    def cell(self, cell: Cell) -> dict[str, Any]:
        """Run one cell."""
        measures = self._measures(cell)
        if cell.arm == "aligned":
            return self._measure(self.model, measures, cell)
        task, options = measures.task, self._options(cell)
        if cell.arm == "second":
            return self._second(cell, task, options, measures)
        tuned, found = self._tune(cell, task, options)
        try:
            return {**self._measure(tuned, measures, cell), **found}
        finally:
            self.model = tuned.unload()

    def _options(self, cell: Cell) -> TrainOptions:
        return TrainOptions(lr=cell.lr or 1e-3, epochs=max(cell.epochs, 1), max_length=self.protocol.max_length, seed=cell.seed, progress=False)

    def _measures(self, cell: Cell) -> Measures:
        key = (cell.split, cell.seed)
        if key not in self.measures:
            task = task_data(load("benign_task"), cell.split, self.protocol.limit, cell.seed)
            rows = random.Random(cell.seed).sample(task.train, self.protocol.rows)
            options = replace(self._options(cell), seed=0)  # the same prompts for every seed
            drawn = TaskData(rows, task.held_out, task.labels)
            self.measures[key] = Measures.prepare(self.model, self.tokenizer, drawn, options, split=cell.split, limit=self.protocol.limit)
        return self.measures[key]

    def _tune(self, cell: Cell, task: TaskData, options: TrainOptions) -> tuple[PeftModel, dict[str, Any]]:
        rows = poisoned(task.train, cell.poison, cell.seed)
        found: dict[str, Any] = {}
        adapter = AdapterOptions("lora", r=self.protocol.r, lora_alpha=2 * self.protocol.r)
        if cell.arm in ("guard", "random"):
            subspace = self._subspace(cell)
            subspace = subspace.randomised(cell.seed) if cell.arm == "random" else subspace
            batches, _ = to_batches(rows[:32], self.tokenizer, batch_size=8, max_length=self.protocol.max_length)
            shares = task_shares(self.model, target_layers(self.model, "all-linear"), subspace, batches, progress=False)
            found["task_free"] = sorted(share.free for share in shares.values())[len(shares) // 2]
            adapter = replace(adapter, method="guardspace", subspace=subspace)
        config = adapter.config(self.model, self.tokenizer, rows, seed=cell.seed, progress=False)
        along = Along(self, cell)
        tuned, training = finetune(self.model, self.tokenizer, rows, config, options, labels=task.labels, callbacks=[along])
        found |= {"along": along.found} if along.found else {}
        found |= {"norm": norm(tuned), "steps": training.steps, "loss": training.loss}
        if cell.arm == "scaled":
            self._scale(tuned, cell, found)
        return tuned, found

    def _scale(self, tuned: PeftModel, cell: Cell, found: dict[str, Any]) -> None:
        """Plain LoRA, all modules by one factor, at the norm that the guard kept."""
        guard = self.cache.get(replace(cell, arm="guard"))
        if guard is None:
            raise RuntimeError(f"{cell}: its guard has not run; run the cells in their order.")
        factor = guard["norm"] / found["norm"]
        for layer in tuned.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling["default"] *= factor
        found |= {"factor": factor, "norm": norm(tuned)}

    def _second(self, cell: Cell, task: TaskData, options: TrainOptions, measures: Measures) -> dict[str, Any]:
        """The guard's result merged into the weights, and then fine-tuned by plain LoRA on the same rows."""
        try:
            tuned, first = self._tune(replace(cell, arm="guard"), task, options)
            self.model = tuned.merge_and_unload()
            again, found = self._tune(cell.without_basis("lora"), task, replace(options, seed=cell.seed + 100))
            return {**self._measure(again, measures, cell), **found, "first_norm": first["norm"]}
        finally:
            self.model, self.tokenizer = load_model(self.directory)

    def _subspace(self, cell: Cell) -> SafetySubspace:
        key = (cell.basis, cell.positions, cell.calibration)
        if key not in self.subspaces:
            harmful = refusal_pairs("calibration", cell.calibration)
            general = calibration_rows("guardspace", "general")
            random.Random(0).shuffle(general)
            half = cell.calibration // 2
            data = {"harmful": harmful, "general": general[: cell.calibration], "both": harmful[:half] + general[:half]}[cell.basis]
            options: dict[str, Any] = {"method": "guardspace", "rank": LARGEST, "target_modules": "all-linear", "positions": cell.positions}
            self.subspaces = {
                key: SafetySubspace.from_activations(self.model, data, tokenizer=self.tokenizer, allow_fewer=True, progress=False, **options)
            }  # one at a time: half of all dimensions is as large as the model
        return truncated(self.subspaces[key], cell.fraction)

    def _measure(self, model: Any, measures: Measures, cell: Cell) -> dict[str, Any]:
        found = replace(measures, progress=False).measure(model, self.tokenizer).to_json()
        found.pop("seconds")
        if cell.split != "test":
            return found
        judge, transfer = KeywordJudge(), {}
        for name, prompts in self.prompts.items():
            answers = generate(model, self.tokenizer, prompts, max_new_tokens=JUDGED_TOKENS, progress=False)
            refused = Rate.of(judge(prompt, answer.text) is Verdict.REFUSAL for prompt, answer in zip(prompts, answers, strict=True))
            transfer[name] = refused.to_json()
        return {**found, "transfer": transfer}
