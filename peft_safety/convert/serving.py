"""What servers of LoRA adapters accept, and the commands that serve one. Each rule was read in the source of the
version that is named here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from shlex import quote

from peft_safety.core.certificate import read_certificate
from peft_safety.core.plain_lora import PREFIX, read_plain
from peft_safety.core.snapshot import reading
from peft_safety.errors import ConfigError
from peft_safety.registry.frozen import check_certified

SERVERS = {"vllm": "vLLM 0.33.0", "sglang": "SGLang 0.5.23", "llama.cpp": "llama.cpp (of llama-cpp-python 0.3.36)"}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `--max-lora-rank` (`vllm/config/lora.py`, without 1). vLLM fills smaller adapters with zeros itself."""
VLLM_HEADS = ("classifier", "score")
"""What `modules_to_save` may hold (`vllm/lora/peft_helper.py`)."""
SGLANG_LAYER = re.compile(r"layers\.\d+\.")
"""SGLang leaves out modules whose name lacks this, without a word (`sglang/srt/lora/lora.py`)."""
FOLDED = ("rank_pattern", "alpha_pattern", "use_rslora")
"""Fields that SGLang, llama.cpp and earlier vLLM ignore: they would compute another function."""


def check_server(server: str, modules: Collection[str], rank: int, saved: Iterable[str], conv1d: bool) -> None:
    """Refuse, by a ConfigError, an adapter that a server does not load, or would compute something else from.

    Args:
        modules: names of the modules with factors.
        saved: keys of the tensors that are no factors.
        conv1d: whether the base weights are stored transposed (`fan_in_fan_out`).
    """
    if server not in SERVERS:
        raise ConfigError(f"no server {server!r} is known. Use one of {', '.join(SERVERS)}.")
    problem = None
    heads = VLLM_HEADS if server == "vllm" else ()
    if unread := [key for key in saved if key.split(".")[-2] not in heads]:
        remedy = "Train without modules_to_save, save with save_embedding_layers=False"
        problem = f"does not read {unread[0].removeprefix(PREFIX)}. {remedy}"
    elif server == "vllm" and rank > VLLM_RANKS[-1]:
        problem = f"takes ranks up to {VLLM_RANKS[-1]}, not {rank}. Train with a smaller rank (a residual doubles it)"
    elif server == "sglang":
        outside = [name for name in modules if not SGLANG_LAYER.search(name) and not name.endswith("lm_head")]
        queries = [name for name in modules if name.endswith("q_proj")]
        values = [name.removesuffix("q_proj") + "v_proj" for name in queries]
        if outside:
            problem = f"ignores {outside[0]}, which is in no numbered layer. Train without it"
        elif lacking := [name for name in values if name not in modules]:
            problem = f"needs factors of {lacking[0]} beside those of its q_proj. Target both"
    elif server == "llama.cpp" and conv1d:
        problem = "transposes factors of Conv1D layers (GPT-2) wrongly. Use another server"
    if problem is not None:
        raise ConfigError(f"{SERVERS[server]} {problem}, or merge the adapter into the base model.")


def serving_commands(directory: str | os.PathLike[str], server: str) -> list[str]:
    """Check that a server loads a plain LoRA directory as it is, and return the shell commands that serve it.

    Args:
        directory: an adapter with a frozen A as it was saved, or an exported one.
        server: "vllm", "sglang" or "llama.cpp".

    Raises:
        ConfigError: a protected adapter that has to be exported first, or one that the server does not take.
        ArtifactError: a damaged directory, or a `lora_A` that is not the one of its certificate.
    """
    with reading(directory, warn=True) as path:
        certificate = read_certificate(path)
        if certificate is not None:
            check_certified(path, certificate)
        plain = read_plain(path, warn=False)
        fields = plain.fields
        rank = max(factor.a.shape[0] for factor in plain.factors.values())
        check_server(server, plain.factors, rank, plain.extra, bool(fields.get("fan_in_fan_out")))
        unfit = [name for name in FOLDED if fields.get(name)]
        unfit += ["target_modules"] if isinstance(fields.get("target_modules"), str) else []
        if unfit:
            raise ConfigError(
                f"{directory}: servers ignore its {unfit[0]}. Write it with one rank and full names: peft-safety "
                f"export {directory} --for {server} --out DIR."
            )
    return _commands(Path(directory), server, rank, str(fields.get("base_model_name_or_path") or "BASE"))


def _commands(directory: Path, server: str, rank: int, base: str) -> list[str]:
    name = directory.resolve().name.replace("=", "-")  # servers split at the first one
    named = quote(f"{name}={directory}")
    if server == "vllm":
        fitting = next(size for size in VLLM_RANKS if size >= rank)
        return [f"vllm serve {quote(base)} --enable-lora --max-lora-rank {fitting} --lora-modules {named}"]
    if server == "sglang":
        return [f"python -m sglang.launch_server --model-path {quote(base)} --enable-lora --lora-paths {named}"]
    file = quote(f"{directory}.gguf")
    local = f" --base {quote(base)}" if os.path.isdir(base) else ""
    return [
        f"python convert_lora_to_gguf.py {quote(str(directory))}{local} --outfile {file}",
        f"llama-server --model BASE.gguf --lora {file}",
    ]
