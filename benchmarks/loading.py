"""What the checks cost: `verify`, and loading a protected adapter compared with loading a plain LoRA of the same rank.

Each arm runs in forks of one process that has imported everything: CPU seconds until the adapter is on a base model
that was read from the disk, and the peak memory after a forward pass. The arms take turns; the least of all rounds
counts, because other work on the machine only adds. The goal: 1.5 times the seconds, 1.1 times the memory of
plain PEFT.

    python -m benchmarks.loading
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from benchmarks import common
from peft_safety import GuardSpaceConfig, SafetySubspace, SaLoRAConfig, verify
from peft_safety.core.targets import target_layers
from peft_safety.reporting.report import environment

SIZES = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "init_lora_weights": False}
DIRECTIONS = 32
KINDS = ("plain", "frozen", "projected")
ARMS = (*KINDS, "verify")


def save(base: torch.nn.Module, directory: Path, kind: str) -> None:
    """An adapter, with random bases if it is protected."""
    side, axis = ("in", 1) if kind == "frozen" else ("out", 0)
    widths = {name: module.weight.shape[axis] for name, module in target_layers(base, "all-linear").items()}
    bases = {name: {side: torch.linalg.qr(torch.randn(width, DIRECTIONS)).Q} for name, width in widths.items()}
    space = SafetySubspace(bases)
    config = {
        "plain": lambda: LoraConfig(**SIZES),
        "frozen": lambda: GuardSpaceConfig(train="B", a_init="random", subspace=space, **SIZES),
        "projected": lambda: SaLoRAConfig(subspace=space, **SIZES),
    }[kind]()
    get_peft_model(base, config).save_pretrained(str(directory))


def measured(arm: str, source: str, root: Path) -> dict[str, float]:
    """CPU seconds and memory of one fork."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        common.reset_peak()
        start = time.process_time()
        if arm == "verify":
            verify(root / "projected")
            seconds = time.process_time() - start
        else:
            model = PeftModel.from_pretrained(common.load_causal(source), str(root / arm))
            seconds = time.process_time() - start
            model(torch.arange(8)[None])
        os.write(writer, json.dumps({"CPU s": seconds, "peak MiB": common.resident_mib()}).encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    with os.fdopen(reader) as pipe:
        result: dict[str, float] = json.load(pipe)
    return result


def main() -> None:
    parser = common.parser_of(__doc__)
    common.add_model(parser)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    source = common.model_source(args.model)
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as root:
        for kind in KINDS:
            save(common.load_causal(source), Path(root, kind), kind)
        gc.collect()
        gc.freeze()  # a full collection of everything imported costs as much as a load, and falls into any arm
        rounds = [{arm: measured(arm, source, Path(root)) for arm in ARMS} for _ in range(args.rounds)]
    rows = {arm: {key: min(each[arm][key] for each in rounds) for key in rounds[0][arm]} for arm in ARMS}
    table = [{"": arm, **row, **{f"{k}, ratio": row[k] / rows["plain"][k] for k in row}} for arm, row in rows.items()]
    common.show("loading an adapter, r = 16, all-linear", table)
    facts = environment(0, model=common.model_name(args.model), rounds=args.rounds)
    print(f"written to {common.record('loading', table, facts)}")


if __name__ == "__main__":
    main()
