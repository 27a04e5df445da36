"""Gradients are of the kind of q: PyTorch, JAX; arrays without elements; memory grows with S, not S x S."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from inputs import normal, qkv
from subproc import run
from test_array_kinds import from_torch, same, to_torch, with_jax
from test_memory import MB, SLOW

import fastattn

torch = pytest.importorskip("torch")


def arguments(dtype):
    """Positions and keywords of mha_backward."""
    q, k, v = qkv(dtype, B=2, Sq=5, Sk=7, Hq=4, Hkv=2, Dv=3)
    kw = {
        "bias": normal((4, 1, 7), dtype, 3),
        "sinks": np.zeros(4),
        "alibi_slopes": np.full(4, 0.1, np.float32),
    }
    out, lse = fastattn.mha(q, k, v, return_lse=True, **kw)
    return (normal(out.shape, dtype, 4), q, k, v, out, lse), kw | {"dlse": normal(lse.shape, lse.dtype, 5)}


def test_torch(dtype):
    positions, kw = arguments(dtype)
    expected = fastattn.mha_backward(*positions, **kw)
    tensors, side_tensors = [to_torch(x) for x in positions], {n: to_torch(x) for n, x in kw.items()}
    for sides in (kw, side_tensors):
        grads = fastattn.mha_backward(*tensors, **sides)
        assert type(grads) is fastattn.Gradients
        for a, b in zip(grads, expected, strict=True):
            assert type(a) is torch.Tensor
            assert a.is_contiguous()
            assert not a.requires_grad
            assert same(from_torch(a), b)
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in tensors]
    assert same(from_torch(fastattn.mha_backward(*strided, **kw).dk), expected.dk)
    assert fastattn.mha_backward(*tensors)[3:] == (None, None, None)


def test_the_kind_follows_q():
    (dout, q, k, v, out, lse), _ = arguments(np.float32)
    expected = fastattn.mha_backward(dout, q, k, v, out, lse)
    others = [torch.from_numpy(x) for x in (dout, k, v, out, lse)]
    grads = fastattn.mha_backward(others[0], q, *others[1:])
    assert all(type(x) is np.ndarray for x in grads[:3])
    grads = fastattn.mha_backward(dout, torch.from_numpy(q), k, v, out, lse)
    assert all(type(x) is torch.Tensor for x in grads[:3])
    assert all(same(x.numpy(), y) for x, y in zip(grads[:3], expected[:3], strict=True))


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
def test_jax():
    # In a process of its own: jax starts threads, after which other tests may not fork.
    code = """
    for dtype in ("float64", "float32", "float16", ml_dtypes.bfloat16):
        q, k, v = qkv(dtype, 2, 5, 4, 16, Sk=7)
        bias = np.random.default_rng(0).normal(size=(4, 1, 7)).astype(dtype)
        out, lse = fastattn.mha(q, k, v, bias=bias, return_lse=True)
        expected = fastattn.mha_backward(q, q, k, v, out, lse, bias=bias)
        mine = [jnp.asarray(x) for x in (q, q, k, v, out, lse)]
        for side in (bias, jnp.asarray(bias)):
            grads = fastattn.mha_backward(*mine, bias=side)
            assert type(grads) is fastattn.Gradients and grads[4:] == (None, None)
            for a, b in zip(grads[:4], expected[:4]):
                assert isinstance(a, jax.Array) and same(a, b), dtype
        copy = np.array(grads.dq)
        for _ in range(20):
            fastattn.mha_backward(*[2 * x for x in mine])
        assert same(grads.dq, copy)
        assert jax.jit(lambda x: x + x)(grads.dv).shape == v.shape
    """
    run(with_jax(code))


@pytest.mark.parametrize("sizes", [{"B": 0}, {"Sq": 0}, {"Sk": 0}, {"Hq": 0}], ids=lambda x: next(iter(x)))
def test_arrays_without_elements(kernel, dtype, sizes):
    """Gradients of what is there are 0: nothing was computed with it, but the lse of rows without keys."""
    sizes = {"B": 2, "Sq": 3, "Sk": 5, "Hq": 4} | sizes
    q, k, v = qkv(dtype, D=8, Dv=6, **sizes)
    B, H = sizes["B"], sizes["Hq"]
    kw = {
        "bias": np.ones((H, 1, 1), dtype), "alibi_slopes": np.ones((B, H), np.float32), "sinks": np.zeros(H),
    }  # fmt: skip
    out, lse = fastattn.mha(q, k, v, kernel=kernel, return_lse=True, **kw)
    dlse = np.ones_like(lse)
    grads = fastattn.mha_backward(out, q, k, v, out, lse, dlse=dlse, kernel=kernel, **kw)
    for grad, x in zip(grads, (q, k, v, *kw.values()), strict=True):
        assert (grad.dtype, grad.shape) == (x.dtype, x.shape)
    for grad in grads[:5]:
        assert (grad == 0).all()
    assert (grads.dsinks == (B * sizes["Sq"] if sizes["Sk"] == 0 else 0)).all()


@pytest.mark.cpu_only  # it looks at the host's memory
@pytest.mark.one_dtype
@pytest.mark.skipif(sys.platform == "win32", reason="ru_maxrss")
@pytest.mark.parametrize(
    ("setup", "kwargs"),
    [
        ("", "causal=True"),
        (
            "bias = np.zeros((S,), a[0].dtype)",
            "bias=bias, dropout=0.1, alibi_slopes=np.ones(1), sinks=np.ones(1)",
        ),
    ],
    ids=["causal", "sums"],
)
def test_memory_is_linear(kernel, dtype, setup, kwargs):
    S = 2500 if kernel in SLOW else 10000
    out, _ = run(f"""
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        name = {kernel!r}
        fastattn.set_num_threads(2)
        S = {S}
        a = qkv(dtype_of(name), 1, S, 1, 16)
        {setup}
        def backward(n, **kw):
            out, lse = fastattn.mha(*(x[:, :n] for x in a), return_lse=True, kernel=name, **kw)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            grads = fastattn.mha_backward(a[0][:, :n], *(x[:, :n] for x in a), out, lse, kernel=name, **kw)
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        backward(64)
        print(backward(S, {kwargs}) * unit)
    """)  # fmt: skip
    # Six arrays of S x 16 and a few rows' worth beside them; one bit for each score would be S*S/8.
    limit = S * S // (1 if kernel in SLOW else 8)
    assert int(out) < limit, f"{int(out) / MB:.1f} MB more at S = {S}; S*S is {S * S / MB:.0f} MB"


@pytest.mark.one_dtype
@pytest.mark.cpu_only  # of a GPU's kernels the unit in work is finished
@pytest.mark.skipif(sys.platform == "win32", reason="it needs setitimer")
def test_an_interrupt_in_the_middle_leaves_a_process_that_works(kernel, dtype):
    """The workspace holds what an earlier, larger call left: nothing of it may be taken for this one's."""
    if kernel == "cpu-reference":
        pytest.skip("cpu-reference has no blocks")
    out, _ = run(f"""
        import signal
        name = {kernel!r}
        fastattn.set_num_threads(1)
        def call(S):
            a = qkv(dtype_of(name), 1, S, 1, 1024)
            out, lse = fastattn.mha(*a, return_lse=True)
            return (a[0], *a, out, lse)
        large, small = call(1200), call(768)
        def stop(*_):
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, stop)
        fastattn.mha_backward(*small, kernel=name)
        start = time.perf_counter()
        fastattn.mha_backward(*small, kernel=name)
        seconds, stopped = time.perf_counter() - start, 0
        for n in range(15):
            fastattn.mha_backward(*large)
            signal.setitimer(signal.ITIMER_REAL, seconds * 0.5 * (n + 1) / 15)
            try:
                fastattn.mha_backward(*small, kernel=name)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                stopped += 1
        print(stopped)
    """)  # fmt: skip
    assert int(out) > 0
