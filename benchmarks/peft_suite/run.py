"""Run the tests of one arm, one file of PEFT's after the other, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peft_suite.plugin import finished

SECONDS = 120
"""For one test."""
FILES = (
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_initialization",
    "test_target_parameters",
    "test_tuners_utils",
    "test_trainable_tokens",
    "test_low_level_api",
    "test_mixed",
    "test_lora_variants",
    "test_velora",
    "test_bdlora",
    "test_other",
    "test_config",
    "test_helpers",
    "test_xlora",
    "test_arrow",
    "test_lora_conversion",
    "test_lora_intruders",
    "test_lora_ga",
    "test_lorafa",
    "test_loraplus",
    "test_integrations",
    "test_mapping",
    "test_riemannian_lora",
    "test_token_classification_qa",
    "test_randlora",
    "test_unilora",
    "test_auto",
    "test_hub_features",
)
"""The files in which LoRA is tested without an accelerator or pictures from the Hub, large ones first."""


def results_file(folder: Path, arm: str, file: str) -> Path:
    return folder / "results" / arm / f"{file}.jsonl"


def passing(folder: Path, file: str) -> list[str]:
    """The tests that plain LoRA passes and that concern it."""
    rows = finished(results_file(folder, "plain", file))
    return [test for test, row in rows.items() if row["outcome"] == "passed" and row["lora"]]


def run(tests: Path, folder: Path, arm: str, files: Sequence[str]) -> list[str]:
    """Run what has not run. Returns the files whose process ended before its tests did; another run continues them."""
    broken = []
    for file in files:
        results = results_file(folder, arm, file)
        results.parent.mkdir(parents=True, exist_ok=True)
        options = ["--suite-arm", arm, "--suite-results", str(results)]
        if arm != "plain":
            wanted = set(passing(folder, file))
            if not wanted - finished(results).keys():
                continue
            only = results.with_suffix(".tests")
            only.write_text("\n".join(sorted(wanted)), encoding="utf-8")
            options += ["--suite-only", str(only)]
        elif results.with_suffix(".done").exists():
            continue
        code = _pytest(tests, folder, file, options, results.with_suffix(".log"))
        print(f"{arm}: {file} ended with {code}", flush=True)
        if code in (0, 1, 5):  # passed, some failed, nothing to run
            results.with_suffix(".done").touch()
        else:
            broken.append(file)
    return broken


def _pytest(tests: Path, folder: Path, file: str, options: Sequence[str], log: Path) -> int:
    """`-c`: this package's own settings of pytest are not those of PEFT's tests."""
    root = Path(__file__).parents[2]
    settings = folder / "pytest.ini"
    settings.write_text("[pytest]\n", encoding="utf-8")
    temporary = folder / "temporary" / log.parent.name / file
    temporary.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.peft_suite.plugin", "-c", str(settings)]
    command += ["-q", "--tb=no", "--no-header", "-p", "no:cacheprovider", "--import-mode=prepend"]
    command += ["--timeout", str(SECONDS), "--basetemp", str(temporary)]
    paths = [str(root), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with log.open("a", encoding="utf-8") as output:
        full = [*command, *options, str(tests / f"{file}.py")]
        return subprocess.run(full, env=environment, stdout=output, stderr=output, cwd=folder, check=False).returncode
