"""PyTorch's, CuPy's and JAX's own arrays on a real GPU: order, capture, memory, and large sizes."""

from __future__ import annotations

import importlib
import os

import numpy as np
import pytest
from emulated_gpu import IS_HERE

import fastattn

CUDA = next(kernel for kernel in fastattn.kernels() if kernel.name == "cuda-cublas")
pytestmark = pytest.mark.skipif(
    IS_HERE or not CUDA.usable, reason=f"needs a GPU: {CUDA.reason or 'the one of this build is emulated'}"
)


@pytest.fixture
def torch():
    module = pytest.importorskip("torch", reason="needs PyTorch")
    if not module.cuda.is_available():
        pytest.skip("needs a PyTorch that sees the GPU")
    module.manual_seed(0)
    return module


def tensors(torch, dtype, *shapes):
    return [torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype) for shape in shapes]


def exact(torch, q, k, v, causal=False):
    """In float64, BSHD; top-left or bottom-right is the same for as many keys as queries."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def worst(torch, got, want):
    return float((got.double() - want).abs().max())


TOLERANCE = {"float64": 1e-13, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize(
    "sizes", [(2, 128, 12, 12, 64), (1, 1000, 8, 2, 128), (1, 2048, 4, 1, 80), (40, 33, 3, 3, 17)]
)
def test_tensors(torch, name, sizes, causal):
    B, S, Hq, Hkv, D = sizes
    q, k, v = tensors(torch, getattr(torch, name), (B, S, Hq, D), (B, S, Hkv, D), (B, S, Hkv, D))
    out = fastattn.mha(q, k, v, causal=causal)
    assert out.dtype == q.dtype
    assert out.device == q.device
    assert worst(torch, out, exact(torch, q, k, v, causal)) <= TOLERANCE[name]


def test_bhsd_views_and_misaligned_ones(torch):
    q, k, v = tensors(torch, torch.float16, *[(2, 100, 6, 65)] * 3)
    want = exact(torch, *(x[..., 1:] for x in (q, k, v)))
    assert worst(torch, fastattn.mha(q[..., 1:], k[..., 1:], v[..., 1:]), want) <= TOLERANCE["float16"]
    turned = [x[..., 1:].transpose(1, 2) for x in (q, k, v)]
    assert worst(torch, fastattn.mha(*turned, layout="bhsd").transpose(1, 2), want) <= TOLERANCE["float16"]


def test_order_of_the_current_stream(torch):
    """Inputs that are still being made, on a stream that is not the default one."""
    want = None
    for _ in range(3):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            q = torch.full((1, 256, 8, 64), 0.5, device="cuda")
            out = fastattn.mha(q, q, q, causal=True) * 2
            del q  # its memory may be given to the next tensor of this stream at once
            torch.full((1, 256, 8, 64), float("nan"), device="cuda")
        stream.synchronize()
        want = torch.ones_like(out) if want is None else want
        assert torch.allclose(out, want)


def test_calls_do_not_wait(torch):
    q = torch.randn((1, 512, 8, 64), device="cuda")
    fastattn.mha(q, q, q)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    done = torch.cuda.Event()
    fastattn.mha(q, q, q)
    done.record()
    assert not done.query()


def test_graph_capture(torch):
    q, k, v = tensors(torch, torch.bfloat16, *[(4, 96, 8, 64)] * 3)
    out = torch.empty_like(q)
    fastattn.mha(q, k, v, causal=True, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastattn.mha(q, k, v, causal=True, out=out)
    for seed in range(3):
        torch.manual_seed(seed)
        q.copy_(torch.randn_like(q))
        want = fastattn.mha(q, k, v, causal=True)
        out.zero_()
        graph.replay()
        assert torch.equal(out, want)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("sizes", [(2, 128, 12, 12, 64), (1, 1000, 8, 2, 128), (40, 33, 3, 3, 17)])
def test_gradients(torch, name, sizes, causal):
    """Against autograd in float64; relative to the largest element."""
    B, S, Hq, Hkv, D = sizes
    shapes = [(B, S, Hq, D), (B, S, Hkv, D), (B, S, Hkv, D), (B, S, Hq, D)]
    q, k, v, dout = tensors(torch, getattr(torch, name), *shapes)
    out, lse = fastattn.mha(q, k, v, causal=causal, return_lse=True)
    grads = fastattn.mha_backward(dout, q, k, v, out, lse, causal=causal)
    given = [x.double().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(exact(torch, *given, causal), given, dout.double())
    for x, y in zip(grads[:3], want, strict=True):
        assert x.dtype == q.dtype
        assert worst(torch, x, y) <= 2 * TOLERANCE[name] * max(1.0, float(y.abs().max()))


def test_gradients_captured_and_again(torch):
    q, k, v, dout = tensors(torch, torch.float16, (3, 300, 8, 64), *[(3, 300, 2, 64)] * 2, (3, 300, 8, 64))
    bias = torch.randn((8, 1, 300), device="cuda").half()

    def backward():
        out, lse = fastattn.mha(q, k, v, causal=True, bias=bias, return_lse=True)
        return fastattn.mha_backward(dout, q, k, v, out, lse, causal=True, bias=bias)[:4]

    first = backward()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(backward(), first, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backward()
    for x in captured:
        x.zero_()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, first, strict=True))


def test_same_bits_again(torch):
    q, k, v = tensors(torch, torch.float16, (3, 700, 8, 128), (3, 700, 2, 128), (3, 700, 2, 128))
    first = fastattn.mha(q, k, v, causal=True)
    for _ in range(5):
        assert torch.equal(fastattn.mha(q, k, v, causal=True), first)


def test_memory_stays_small(torch):
    q = torch.randn((1, 16384, 16, 64), device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q)
    fastattn.mha(q, q, q, causal=True, out=out)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    fastattn.mha(q, q, q, causal=True, out=out)
    torch.cuda.synchronize()
    assert free - torch.cuda.mem_get_info()[0] < 400 << 20  # the scores would be 8 GiB
    assert fastattn.explain(q, q, q, causal=True).workspace_bytes < 100 << 20


def test_everything_at_once_as_on_the_cpu(torch):
    rng = np.random.default_rng(0)
    B, Sq, Sk, Hq, Hkv, D = 3, 150, 1300, 8, 2, 72
    q = rng.standard_normal((B, Sq, Hq, D)).astype(np.float32)
    k, v = rng.standard_normal((2, B, Sk, Hkv, D)).astype(np.float32)
    sides = {
        "mask": rng.random((B, 1, Sq, Sk)) < 0.8,
        "bias": rng.standard_normal((Hq, Sq, Sk)).astype(np.float32),
        "alibi_slopes": rng.random(Hq),
        "sinks": rng.standard_normal(Hq),
        "kv_lens": np.array([1300, 700, 1]),
        "q_lens": np.array([150, 3, 150]),
    }
    numbers = {"window": (500, 3), "softcap": 5.0, "dropout": 0.2, "seed": 7, "scale": 0.2}
    ask = {"return_lse": True, "return_weights": True}
    want = fastattn.mha(q, k, v, **sides, **numbers, **ask, device="cpu")
    there = [torch.from_numpy(x).cuda() for x in (q, k, v)]
    on_gpu = {name: torch.from_numpy(x).cuda() for name, x in sides.items()}
    for given in (sides, on_gpu):
        got = fastattn.mha(*there, **given, **numbers, **ask)
        for mine, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(mine.cpu().numpy(), theirs, atol=3e-5, rtol=2e-5)
    for mine, theirs in zip(
        fastattn.mha(q, k, v, **sides, **numbers, **ask, device="cuda"), want, strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=3e-5, rtol=2e-5)


def test_numpy_arrays_in_several_units():
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 2, 8192, 16, 64)).astype(np.float32)
    plan = fastattn.explain(q, k, v, causal=True, device="cuda")
    assert "units" in plan.algorithm
    got = fastattn.mha(q, k, v, causal=True, device="cuda")
    rows = slice(4000, 4020)
    want = fastattn.mha(q[:, rows], k, v, causal=True, q_offset=4000, device="cpu")
    np.testing.assert_allclose(got[:, rows], want, atol=2e-5)


def test_no_memory_on_the_device(torch):
    q = torch.randn((1, 4096, 8, 64), device="cuda")
    want = fastattn.mha(q, q, q)
    torch.cuda.synchronize()
    weights = 64 * 200_000**2 * 4
    assert weights > torch.cuda.get_device_properties(0).total_memory
    rows = np.zeros((200_000, 64, 8), np.float16)
    with pytest.raises(MemoryError, match="bytes"):
        fastattn.mha(*[torch.from_numpy(rows).cuda()] * 3, return_weights=True)
    assert torch.equal(fastattn.mha(q, q, q), want)


def test_gradients_are_not_lost_silently(torch):
    q = torch.randn((1, 8, 1, 16), device="cuda", requires_grad=True)
    with pytest.raises(TypeError, match="requires grad"):
        fastattn.mha(q, q, q)


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_cupy(name):
    cupy = pytest.importorskip("cupy", reason="needs CuPy")
    rng = np.random.default_rng(2)
    arrays = [rng.standard_normal((2, 70, 4, 32)).astype(name) for _ in range(3)]
    with cupy.cuda.Stream(non_blocking=True):
        out = fastattn.mha(*map(cupy.asarray, arrays), causal=True)
        assert type(out) is cupy.ndarray
        got = cupy.asnumpy(out)
    np.testing.assert_allclose(
        got.astype(float),
        fastattn.mha(*arrays, causal=True, device="cpu").astype(float),
        atol=TOLERANCE[name],
    )


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_jax(name):
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = pytest.importorskip("jax", reason="needs JAX")
    if not any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("needs a JAX that sees the GPU")
    jnp = importlib.import_module("jax.numpy")
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 70, 4, 32), dtype=name) for key in keys)
    out = fastattn.mha(q, k, v, causal=True)
    assert isinstance(out, jax.Array)
    assert out.devices() == q.devices()
    want = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)), is_causal=True)
    assert float(jnp.abs(out.astype(jnp.float32) - want).max()) <= TOLERANCE[name]
