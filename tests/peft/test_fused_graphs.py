"""The fused path compiles in one graph, is captured in CUDA graphs, and never waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_safety import explain_dispatch
from peft_safety.registry.fused import SWITCH
from tests.peft import cells, fused_runs
from tests.peft.fused_cells import layer_of, protected, quantized


@pytest.mark.parametrize(("init", "training", "rows"), [("lora", True, 80), ("task", False, 3)])
def test_a_layer_compiles_in_one_graph(init: str, training: bool, rows: int, reference: None) -> None:
    torch._dynamo.reset()
    layer = layer_of(cells.protected(cells.WIDE, init, trained=True)).train(training)
    x = torch.randn(rows, 64, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).square().sum(), x)[0],
        expected,
        rtol=1e-4,
        atol=1e-4 * float(expected.abs().max()),
    )
    torch._dynamo.reset()


def test_a_model_compiles_in_one_graph(reference: None) -> None:
    torch._dynamo.reset()
    model = cells.protected(cells.WIDE, trained=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for rows in (2, 8):  # 24 tokens on PEFT's path, 96 on the fused one
        ids = cells.tokens(rows)
        torch.testing.assert_close(cells.logits(compiled, ids), cells.logits(model, ids), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("learns", [False, True])
def test_one_graph_for_few_rows_and_one_for_many(learns: bool, reference: None) -> None:
    """With dynamic shapes. In training there is one path, and one graph."""
    torch._dynamo.reset()
    layer = layer_of(cells.protected(cells.WIDE, trained=True))
    fused: list[bool] = []

    def seen(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        fused.append(any("nf4_lora" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(layer, backend=seen, fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(learns):
        for rows in (3, 64, 65, 100, 5):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    assert fused == ([True] if learns else [False, True])
    torch._dynamo.reset()


class Waits(TorchDispatchMode):
    """Records operations that bring a value of the device to the host, which stalls a GPU and cannot be captured in a
    CUDA graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if func._overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.equal,
            torch.ops.aten.nonzero,
            torch.ops.aten.is_nonzero,
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arm", ["salora", "salora-residual", "guardspace", "dropout"])
def test_no_step_waits_for_the_device(arm: str, reference: None) -> None:
    model = fused_runs.build(arm)
    layers = [layer for _, layer in cells.layers_of(model)]
    for training, rows in ((True, 70), (False, 70), (False, 2), (False, 1), (False, 1)):
        model.train(training)
        with Waits() as waits, torch.set_grad_enabled(training):
            for layer in layers:
                y = layer(torch.randn(rows, layer.in_features, requires_grad=training))
                if training:
                    y.sum().backward()
        assert waits.calls > 0
        assert not waits.found, f"{rows} rows: {waits.found}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_served_layer_is_captured_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    model = quantized(protected(), bias=True).to("cuda").eval()
    (row,) = explain_dispatch(model)
    assert row.path == "fused:triton", row
    for rows in (1, 80):
        x = torch.randn(rows, 64, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = model(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        with torch.no_grad():
            torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)
