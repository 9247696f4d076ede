"""Run an experiment of PEFT's `method_comparison/MetaMathQA` with a GuardSpace config, from that folder:

    python PATH/run_guardspace.py -v experiments/guardspace/llama-3.2-3B-frozen-rank32

The arguments are those of its `run.py`, which runs unchanged. Before the adapter is made, the config gets what no file
holds: rows of the task, and for subspace="auto" a subspace. Both are written in the suite's own query template, since
the model there is no chat model.
"""

import json
import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from peft_safety import GuardSpaceConfig, calibrate
from peft_safety.data import calibration_rows

TASK_ROWS = 32


def batches(tokenizer: Any, texts: Sequence[str], size: int = 8) -> list[dict[str, Any]]:
    """Tokenized batches in which every token counts."""
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "right"
    result = []
    for start in range(0, len(texts), size):
        how = {"padding": True, "truncation": True, "max_length": 512, "return_tensors": "pt"}
        batch = tokenizer(list(texts[start : start + size]), **how)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        result.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return result


def give_data(model: Any, config: Any, tokenizer: Any, template: str, task: Sequence[dict[str, str]]) -> None:
    """Complete a GuardSpaceConfig in place. `task`: {query, response} rows."""
    config.task_data = batches(tokenizer, [template.format(query=row["query"]) + row["response"] for row in task])
    if config.subspace == "auto":
        rows = calibration_rows("guardspace", config.basis)
        texts = [template.format(query=row["prompt"]) + row.get("response", "") for row in rows]
        config.subspace = calibrate(model, config, batches(tokenizer, texts))


def main() -> None:
    """Put `give_data` before the suite's call of `get_peft_model`, then run its `run.py`."""
    sys.path.insert(0, os.getcwd())
    import utils  # the suite's
    from datasets import load_dataset
    from transformers import AutoTokenizer

    inject = utils.get_peft_model

    def get_peft_model(model: Any, config: Any, **options: Any) -> Any:
        if isinstance(config, GuardSpaceConfig):
            with open(utils.FILE_NAME_DEFAULT_TRAIN_PARAMS, encoding="utf-8") as file:
                template = json.load(file)["query_template"]
            task = list(load_dataset("meta-math/MetaMathQA", split=f"train[:{TASK_ROWS}]"))
            give_data(model, config, AutoTokenizer.from_pretrained(model.config._name_or_path), template, task)
        return inject(model, config, **options)

    utils.get_peft_model = get_peft_model
    sys.argv[0] = "run.py"
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
