"""Tensor parallelism in two processes: what rank 0 finds is printed as one line of JSON.

python -m tests.distributed.split FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from peft_safety import GuardSpaceConfig, SafetySubspace, SaLoRAConfig, assert_protected, calibrate, verify
from peft_safety.core.projection import principal_cosines
from peft_safety.errors import PeftSafetyError
from tests.peft import cells

STEPS = 5
COLUMNS = ["q_proj", "v_proj", "gate_proj"]


def batch(seed: int) -> dict[str, torch.Tensor]:
    ids = cells.tokens(rows=6, seed=seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def config(subspace: SafetySubspace | str = "auto") -> GuardSpaceConfig:
    given: dict[str, Any] = {"r": 4, "target_modules": COLUMNS, "safety_rank": 6, "task_data": [batch(100)]}
    return GuardSpaceConfig(**given, train="B", subspace=subspace)


def train(model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def base(folder: Path, split: bool) -> Any:
    options = {"distributed_config": DistributedConfig(tp_size=2, tp_plan="auto")} if split else {}
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, **options).eval()


def refused(make: Any, folder: Path) -> str:
    """What a refusal says, and that it left the model alone."""
    model = base(folder, split=True)
    names = [name for name, _ in model.named_modules()]
    try:
        make(model)
    except PeftSafetyError as error:
        assert [name for name, _ in model.named_modules()] == names
        return f"{type(error).__name__}: {error}"
    return ""


def run(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    plain = get_peft_model(base(folder, split=True), LoraConfig(r=4, target_modules=COLUMNS))
    train(plain)
    model = base(folder, split=True)
    given = config()
    given.subspace = space = calibrate(model, given, [batch(200)], progress=False)
    model = get_peft_model(model, given)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    shapes = [type(layer.lora_B["default"].weight).__name__, *layer.lora_B["default"].weight.to_local().shape]
    own = [layer.lora_A["default"].weight.clone() for _ in range(2)]
    dist.broadcast(own[1], 0)
    train(model)
    assert_protected(model)
    model.eval().save_pretrained(folder / f"adapter{rank}")
    with torch.no_grad():
        logits = model(**batch(300)).logits
    found = {
        "factor": shapes,
        "one A": torch.equal(*own),
        "merge": refused(lambda _: model.merge_adapter(), folder),
        "rows": refused(lambda m: get_peft_model(m, row_config()), folder),
        "rows calibrated": refused(lambda m: calibrate(m, row_config(), [batch(0)], progress=False), folder),
        "projected": refused(lambda m: get_peft_model(m, GuardSpaceConfig(**projected(space))), folder),
        "SaLoRA": refused(lambda m: get_peft_model(m, salora(folder)), folder),
    }
    dist.barrier()
    if rank == 0:
        alone = base(folder, split=False)
        reference = calibrate(alone, config(), [batch(200)], progress=False)
        one = get_peft_model(base(folder, split=False), config(space))
        train(one)
        report = verify(folder / "adapter0", alone, space)
        loaded = PeftModel.from_pretrained(alone, folder / "adapter0").eval()
        assert_protected(loaded)
        with torch.no_grad():
            saved, expected = (m(**batch(300)).logits for m in (loaded, one.eval()))
        found |= {
            "leak": report.worst_leak,
            "checked": report.blindness_checked and report.base_checked,
            "saved": float((saved - logits).abs().max() / logits.abs().max()),
            "trajectory": float((expected - logits).norm() / logits.norm()),
            "span": min(
                float(principal_cosines(s["in"], space.bases[n]["in"]).min()) for n, s in reference.bases.items()
            ),
        }
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def row_config() -> GuardSpaceConfig:
    return GuardSpaceConfig(r=4, target_modules=["o_proj"], safety_rank=6, train="B", a_init="random")


def projected(space: SafetySubspace) -> dict[str, Any]:
    return {"r": 4, "target_modules": COLUMNS, "subspace": space, "train": "A"}


def salora(folder: Path) -> SaLoRAConfig:
    whole = SafetySubspace.load(folder / "salora.safetensors")
    return SaLoRAConfig(r=4, target_modules=COLUMNS, subspace=whole)


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    model = cells.base_model()
    model.save_pretrained(folder / "base")
    given = SaLoRAConfig(r=4, target_modules=COLUMNS, safety_rank=6)
    calibrate(model, given, [batch(200)], progress=False).save(folder / "salora.safetensors")
    spawn = torch.multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=run, args=(rank, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
