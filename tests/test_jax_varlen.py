"""`fastattn.jax.mha_varlen`: results, gradients, jit, vmap, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn

jax = pytest.importorskip("jax")
fj = pytest.importorskip("fastattn.jax")
jnp = jax.numpy

CU_Q, CU_KV = np.array([0, 3, 3, 40, 41], np.int32), np.array([0, 5, 9, 60, 100], np.int32)


def arrays(dtype=np.float32, Hq=4, Hkv=2, D=16, Dv=24):
    rng = np.random.default_rng(0)
    shapes = ((CU_Q[-1], Hq, D), (CU_KV[-1], Hkv, D), (CU_KV[-1], Hkv, Dv))
    return [jnp.asarray(rng.standard_normal(shape).astype(dtype)) for shape in shapes]


@pytest.mark.parametrize("kind", [np.float32, np.float16, jnp.bfloat16], ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_is_the_call_of_numpy(kind, layout):
    q, k, v = arrays(kind)
    if layout == "bhsd":
        q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
    kw = {"causal": True, "layout": layout, "return_lse": True}
    want = fastattn.mha_varlen(*map(np.asarray, (q, k, v)), CU_Q, CU_KV, **kw)
    for function in (fj.mha_varlen, jax.jit(lambda *x: fj.mha_varlen(*x, **kw))):
        got = function(q, k, v, CU_Q, CU_KV, **(kw if function is fj.mha_varlen else {}))
        for x, y in zip(got, want, strict=True):
            assert x.dtype == y.dtype
            assert np.array_equal(np.asarray(x), y)


def test_gradients():
    q, k, v = arrays()
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((4, 1, 100)).astype(np.float32))
    sinks = jnp.arange(4, dtype=jnp.float32)

    def loss(q, k, v, bias, sinks):
        out, lse = fj.mha_varlen(q, k, v, CU_Q, CU_KV, bias=bias, sinks=sinks, return_lse=True)
        return (out * out).sum() + lse.sum()

    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))(q, k, v, bias, sinks)
    given = [np.asarray(x) for x in (q, k, v)]
    kw = {"bias": np.asarray(bias), "sinks": np.asarray(sinks)}
    out, lse = fastattn.mha_varlen(*given, CU_Q, CU_KV, return_lse=True, **kw)
    want = fastattn.mha_varlen_backward(2 * out, *given, out, lse, CU_Q, CU_KV, dlse=np.ones_like(lse), **kw)
    for x, name in zip(got, ("dq", "dk", "dv", "dbias", "dsinks"), strict=True):
        assert np.array_equal(np.asarray(x), getattr(want, name)), name


def test_bounds_are_traced_and_mapped():
    q, k, v = arrays()
    compiled = jax.jit(lambda cu_q, cu_kv: fj.mha_varlen(q, k, v, cu_q, cu_kv))
    for cu_q, cu_kv in ((CU_Q, CU_KV), (CU_Q * 0, CU_KV), (CU_Q, CU_KV - CU_KV // 2)):
        want = fastattn.mha_varlen(*map(np.asarray, (q, k, v)), cu_q, cu_kv)
        assert np.array_equal(np.asarray(compiled(cu_q, cu_kv)), want)
    both = jnp.stack([CU_Q, CU_Q * 0])
    mapped = jax.vmap(lambda cu: fj.mha_varlen(q, k, v, cu, CU_KV))(both)
    for x, cu in zip(mapped, both, strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(fj.mha_varlen(q, k, v, cu, CU_KV)))


def test_refusals():
    q, k, v = arrays()
    with pytest.raises(TypeError, match="cu_q: expected an integer array"):
        fj.mha_varlen(q, k, v, None)
    with pytest.raises(ValueError, match="q: expected 3 axes"):
        fj.mha_varlen(q[None], k[None], v[None], CU_Q, CU_KV)
    with pytest.raises(TypeError, match="cu_q: expected an integer dtype"):
        fj.mha_varlen(q, k, v, CU_Q.astype(np.float32))
    with pytest.raises(Exception, match="cu_q: expected bounds that do not decrease"):
        jax.block_until_ready(fj.mha_varlen(q, k, v, CU_Q[::-1].copy(), CU_KV))


@pytest.mark.parametrize("packed", [False, True])
def test_unrounded_results(packed):
    q, k, v = arrays(jnp.bfloat16)
    bounds = (CU_Q, CU_KV) if packed else ()

    def attend(q, k, v, **kw):
        return (fj.mha_varlen if packed else fj.mha)(q, k, v, *bounds, causal=True, **kw)

    plain = attend(q, k, v)
    for function in (attend, jax.jit(attend, static_argnames="out_dtype")):
        out = function(q, k, v, out_dtype="float32")
        assert out.dtype == np.float32
        assert np.array_equal(np.asarray(out.astype(jnp.bfloat16)), np.asarray(plain))
        assert not np.array_equal(np.asarray(out), np.asarray(plain.astype(np.float32)))
    got = jax.grad(lambda *x: attend(*x, out_dtype=jnp.float32).sum(), (0, 1, 2))(q, k, v)
    want = jax.grad(lambda *x: attend(*x).astype(np.float32).sum(), (0, 1, 2))(q, k, v)
    for x, y in zip(got, want, strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y))
    with pytest.raises(TypeError, match="out_dtype: expected bfloat16 or float32, got float64"):
        attend(q, k, v, out_dtype="float64")
