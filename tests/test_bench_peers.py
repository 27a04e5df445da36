"""Peers of ``bench``: each computes the same attention or says why it cannot."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from bench_tools import named, routes, same_threads, shrunk  # noqa: F401

from attnbench import timing
from attnbench.cases import Case
from attnbench.peers import base as peers
from attnbench.peers import onnx_model
from fastattn import reference

pytest.importorskip("ml_dtypes")
pytestmark = pytest.mark.usefixtures("same_threads")
# Refused by the library itself, and only once it runs.
RAISES = {"jax": "F16_F16_F32"}
BACKWARD = ["bert-backward", "gpt2-backward"]
BACKWARD += [f"llama-backward-{short}" for short in ("f32", "bf16", "f16")]


def peer_of(name: str) -> peers.Implementation:
    pytest.importorskip(name)
    if name == "numpy":
        pytest.importorskip("threadpoolctl")
    return peers.PEERS[name](1)


@pytest.mark.parametrize("name", list(peers.PEERS))
def test_each_peer_computes_the_same_attention(name: str) -> None:
    peer = peer_of(name)
    computed: list[Case] = []
    for case in routes():
        try:
            makers = peer.candidates(case)
        except peers.NotApplicable:
            continue
        inputs = peers.Inputs.of(case)
        want = reference.mha(inputs.q, inputs.k, inputs.v, **inputs.options)
        size = float(np.abs(inputs.v.astype(np.float64)).max())
        for make in makers:
            try:
                runner = make(inputs)
                out = runner.to_numpy(runner.run())
            except Exception as error:
                if case.dtype == "float16" and RAISES.get(name, "nothing") in str(error):
                    continue
                raise
            assert out.shape == want.shape
            error = np.abs(out.astype(np.float64) - want).max()
            assert error < timing.SAME_COMPUTATION[case.dtype] * size, (case, runner.implementation)
            assert case.flops <= runner.flops <= case.dense_flops
            computed.append(case)
    assert {case.name for case in computed if case.dtype == "float32"} >= {
        *("bert-s128", "gpt2", "whisper-cross", "llama-512-f32", "llama-chunk-f32", "decode-1k-f32"),
        *("mistral-16k-f32", "bert-mask", "bert-bias", "bert-alibi", "bert-window"),
        *("llama-mask-f32", "llama-bias-f32", "llama-alibi-f32", "llama-window-f32"),
    }


@pytest.mark.parametrize("name", ["torch", "jax", "numpy"])
def test_each_peer_computes_the_same_gradients(name: str) -> None:
    peer = peer_of(name)
    computed: set[str] = set()
    for case in map(shrunk, map(named, BACKWARD)):
        try:
            (make,) = peer.candidates(case)
        except peers.NotApplicable:
            continue
        inputs = peers.Inputs.of(case)
        want = reference.mha_backward(inputs.dout, inputs.q, inputs.k, inputs.v, **inputs.options)
        try:
            runner = make(inputs)
        except Exception as error:
            if case.dtype == "float16" and RAISES.get(name, "nothing") in str(error):
                continue
            raise
        for _ in range(2):  # nothing of the first call may spoil the second
            gradients = runner.to_numpy(runner.run())
        for x, gradient in zip(gradients, want, strict=False):
            assert x.shape == gradient.shape
            error = np.abs(x.astype(np.float64) - gradient).max()
            assert error < timing.SAME_COMPUTATION[case.dtype] * np.abs(gradient).max(), case
        assert case.flops <= runner.flops <= case.dense_flops
        computed.add(case.name)
    assert computed >= set(BACKWARD[: 3 if name == "numpy" else 4])


@pytest.mark.parametrize(
    ("name", "case", "reason"),
    [
        ("torch", "gemma2-1k-f32", "softcap"),
        ("torch", "bert-sinks", "sinks"),
        ("onnxruntime", "llama-bf16", "bfloat16"),
        ("onnxruntime", "bert-f64", "float64"),
        ("onnxruntime", "bert-sinks", "GroupQueryAttention"),
        ("onnxruntime", "bert-backward", "no gradients"),
        ("jax", "bert-f64", "float64"),
        ("jax", "llama-softcap-bf16", "softcap"),
        ("jax", "llama-sinks-f32", "sinks"),
        ("jax", "deepseek-f32", "as wide as"),
        ("jax", "mistral-16k-f32", "scores would take 34 GB"),
        ("numpy", "llama-f16", "plain loops"),
        ("numpy", "llama-8k-f32", "scores would take 9 GB"),
        ("numpy", "llama-backward-f16", "plain loops"),
    ],
)
def test_peers_say_why_they_are_left_out(name: str, case: str, reason: str) -> None:
    with pytest.raises(peers.NotApplicable, match=reason):
        peer_of(name).candidates(named(case))


@pytest.mark.parametrize(
    ("case", "operators"),
    [
        ("bert", {"Attention", "MultiHeadAttention"}),
        ("gpt2", {"Attention", "MultiHeadAttention", "GroupQueryAttention"}),
        ("llama-f32", {"Attention", "GroupQueryAttention"}),
        ("llama-f16", {"Attention", "GroupQueryAttention"}),
        ("llama-sinks-f32", {"GroupQueryAttention"}),
        ("decode-1k-f32", {"Attention", "GroupQueryAttention"}),
        ("deepseek-f32", {"Attention", "MultiHeadAttention"}),
        ("bert-softcap", {"Attention"}),
        ("bert-window", {"Attention", "MultiHeadAttention"}),
    ],
)
def test_onnx_runtime_tries_every_operator_that_has_the_case(case: str, operators: set[str]) -> None:
    small = shrunk(named(case))
    inputs = peers.Inputs.of(small)
    makers = peer_of("onnxruntime").candidates(small)
    assert {make(inputs).implementation for make in makers} == operators


def test_operators_that_keep_all_scores_are_refused_where_these_are_many() -> None:
    for name, fused in (("llama-8k-f32", True), ("llama-8k-f16", False)):
        large = named(name)
        small = peers.Inputs.of(shrunk(large))
        attention, group_query = peer_of("onnxruntime").candidates(large)
        inputs = peers.Inputs(large, small.q, small.k, small.v, small.options)
        for make in (attention,) if fused else (attention, group_query):
            with pytest.raises(peers.NotApplicable, match="scores would take 9 GB"):
                make(inputs)


def test_numpy_needs_threadpoolctl_for_another_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = importlib.import_module

    def without(name: str) -> object:
        if name == "threadpoolctl":
            raise ImportError(name)
        return honest(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(peers.NotApplicable, match="threadpoolctl"):
        peers.PEERS["numpy"](1000)


def test_onnx_models_are_valid_protobuf() -> None:
    ort = pytest.importorskip("onnxruntime")
    model = onnx_model.one_node_model(
        "LeakyRelu",
        domain="",
        opset=23,
        inputs=[onnx_model.Tensor("x", "float32", (2, 300))],
        outputs=[onnx_model.Tensor("y", "float32", (2, 300))],
        attributes={"alpha": 0.25},
    )
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    x = np.linspace(-1, 1, 600, dtype=np.float32).reshape(2, 300)
    (y,) = session.run(None, {"x": x})
    np.testing.assert_allclose(y, np.where(x < 0, 0.25 * x, x), rtol=1e-6)
