"""llama.cpp's own converter and server on adapters of ours: the GGUF file holds the update that PEFT computes, it is
blind, and the server answers as PEFT does.

`make nightly` fetches both into `.llama_cpp`: the converter out of the source distribution of llama-cpp-python, the
server as compiled in xllamacpp.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer

from examples.get_model import default_dir, is_complete
from peft_safety import GuardSpaceConfig, SafetySubspace, SaLoRAConfig, export_lora
from peft_safety.convert.serving import serving_commands
from peft_safety.core.projection import leak, orthonormalize
from peft_safety.core.targets import target_layers
from tests.interop.helpers import MAX_LEAK, random_subspace
from tests.tiny import tiny_llama

gguf = pytest.importorskip("gguf")

ROOT = Path(os.environ.get("LLAMA_CPP_DIR", Path(__file__).resolve().parents[2] / ".llama_cpp"))
CONVERTERS = sorted(ROOT.rglob("convert_lora_to_gguf.py"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CONVERTERS, reason=f"no convert_lora_to_gguf.py under {ROOT}: make nightly fetches it"),
]


VOCAB = 49_152
"""Of the tokenizer of SmolLM2, which the converter knows."""


def base_model() -> nn.Module:
    """With logits that are far from one another."""
    model = tiny_llama(vocab=VOCAB)
    model.lm_head.weight.data *= 20
    return model


def subspace() -> SafetySubspace:
    """Random bases of the inputs."""
    generator = torch.Generator().manual_seed(0)
    layers = target_layers(base_model(), "all-linear")
    return SafetySubspace(
        {
            name: {"in": orthonormalize(torch.randn(layer.in_features, 4, generator=generator))}
            for name, layer in layers.items()
        }
    )


def trained(kind: str) -> PeftModel:
    common = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    configs = {
        "frozen": lambda: GuardSpaceConfig(**common, subspace=subspace(), train="B", a_init="random"),
        "window": lambda: GuardSpaceConfig(**common, subspace=subspace(), train="window", window=8, a_init="random"),
        "projected": lambda: GuardSpaceConfig(**common, subspace=subspace(), train="A"),
        "residual": lambda: SaLoRAConfig(
            **common,
            subspace=random_subspace(base_model()),
            init="task",
            task_data=random_subspace(base_model(), rank=8, seed=5),
            rank_pattern={"down_proj": 6},
        ),
    }
    model = get_peft_model(base_model(), configs[kind]())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(4, 200, (2, 9), generator=torch.Generator().manual_seed(5))
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def run(script: str, *arguments: str | Path) -> None:
    path = str(CONVERTERS[0].with_name(script))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, path, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


def exported(kind: str, model: PeftModel, folder: Path) -> Path:
    """The adapter's directory; its GGUF file lies beside it, made by the command that we print."""
    base_model().save_pretrained(folder / "base")
    if kind == "frozen":
        model.save_pretrained(folder / "adapter")
    else:
        export_lora(model, folder / "adapter", server="llama.cpp")
    _, script, *arguments = shlex.split(serving_commands(folder / "adapter", "llama.cpp")[0])
    run(script, *arguments, "--base", folder / "base")
    return folder / "adapter"


def stored_factors(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors in a GGUF file by the module's name in transformers, with what llama.cpp scales them by."""
    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)).float() for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    result = {}
    for module in target_layers(base_model(), "all-linear"):
        name = names.get_name(module)
        a, b = tensors.pop(f"{name}.weight.lora_a"), tensors.pop(f"{name}.weight.lora_b")
        if name.endswith(("attn_q", "attn_k")):
            heads = 4 if name.endswith("q") else 2
            b = b.reshape(heads, -1, 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)  # undoes the converter's order
        result[module] = a, b * alpha / b.shape[1]
    assert not tensors, "nothing but the factors"
    return result


@pytest.mark.parametrize("kind", ["frozen", "window", "projected", "residual"])
def test_the_gguf_file_holds_the_update_that_peft_computes(tmp_path: Path, kind: str) -> None:
    adapter, space = exported(kind, trained(kind), tmp_path), subspace()
    reference = PeftModel.from_pretrained(base_model(), adapter).get_base_model()
    for module, (a, b) in stored_factors(tmp_path / "adapter.gguf").items():
        expected = reference.get_submodule(module).get_delta_weight("default").detach()
        assert expected.abs().max() > 1e-4, "an untrained factor compares nothing"
        torch.testing.assert_close(b @ a, expected, rtol=1e-5, atol=1e-7)
        if kind != "residual":  # it is one of outputs
            assert leak(space.bases[module]["in"], b @ a, "in") <= MAX_LEAK


def answers(xllamacpp: Any, base: Path, ids: list[int], adapter: Path | None = None) -> dict[int, float]:
    """The fifty largest log-probabilities of the next token, by llama.cpp's server with everything in fp32."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.warmup = str(base), 64, False
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cpuparams.n_threads = 1
    if adapter is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    request = {"prompt": ids, "n_predict": 1, "logprobs": 50, "temperature": 0.0}
    answer = xllamacpp.Server(parameters).handle_completions(request)
    return {entry["id"]: entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


@pytest.mark.real_model
@pytest.mark.skipif(not is_complete(default_dir()), reason="needs the tokenizer of SmolLM2: make model")
@pytest.mark.parametrize("kind", ["frozen", "projected"])
def test_the_server_answers_as_peft_does(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    xllamacpp, model = pytest.importorskip("xllamacpp"), trained(kind)
    exported(kind, model, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(default_dir() / name, tmp_path / "base")
    run("convert_hf_to_gguf.py", tmp_path / "base", "--outfile", tmp_path / "base.gguf", "--outtype", "f32")
    ids = AutoTokenizer.from_pretrained(default_dir())("The cat sat on the mat.")["input_ids"]
    with torch.no_grad():
        bare, tuned = (m(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for m in (base_model(), model))
    for expected, adapter in ((bare, None), (tuned, tmp_path / "adapter.gguf")):
        for token, value in answers(xllamacpp, tmp_path / "base.gguf", ids, adapter).items():
            assert value == pytest.approx(float(expected[token]), abs=1e-3)
    assert (tuned - bare).abs().max() > 0.1, "the adapter is another function than the model"
