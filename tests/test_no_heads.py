"""Sizes of 0: no query heads are a multiple of any number of key heads."""

from __future__ import annotations

import numpy as np
import pytest
from inputs import PARTIAL, normal, stats_dtype

import fastattn
from fastattn import reference

KV_HEADS = [0, 1, 3]


def problem(dtype, layout, rank, kv_heads, Sq=3, Sk=5):
    def array(S, H, D):
        shape = (2, S, H, D) if layout == "bshd" else (2, H, S, D)
        return normal(shape[4 - rank :], dtype, 1)

    return array(Sq, 0, 8), array(Sk, kv_heads, 8), array(Sk, kv_heads, 6)


@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_forward_and_backward(kernel, dtype, layout, rank, kv_heads):
    for Sq, Sk in ((3, 5), (40, 700), (0, 5), (3, 0)):
        q, k, v = problem(dtype, layout, rank, kv_heads, Sq, Sk)
        # With arguments of each kind, along and without the axis of the heads.
        for side in (
            {},
            {"causal": True, "softcap": 2.0, "dropout": 0.3},
            {"mask": np.ones((1, Sq, Sk), bool), "bias": np.ones((Sq, Sk), dtype)},
            {"bias": np.ones((0, 1, Sk), dtype), "mask": np.ones((0, Sq, 1), bool)},
            {"alibi_slopes": np.ones(0, np.float32), "sinks": np.ones(0, np.float32)},
        ):
            kw = side | {"layout": layout, "kernel": kernel}
            out, lse = fastattn.mha(q, k, v, return_lse=True, **kw)
            assert out.shape == (*q.shape[:-1], 6)
            assert out.dtype == dtype
            assert lse.shape == ((2,) if rank == 4 else ()) + (0, Sq)
            assert fastattn.explain(q, k, v, **kw).kernel == kernel
            g = fastattn.mha_backward(np.ones_like(out), q, k, v, out, lse, **kw)
            given = {name: side.get(name) for name in ("bias", "alibi_slopes", "sinks")}
            for gradient, like in zip(g, (q, k, v, *given.values()), strict=True):
                assert (gradient is None) == (like is None)
                if like is not None:
                    assert (gradient.shape, gradient.dtype) == (like.shape, like.dtype)
                    assert not gradient.astype(np.float64).any()  # sums of nothing, written


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_weights(kernel, dtype, kv_heads):
    if kernel in PARTIAL:
        pytest.skip(f"{kernel} does not return the weights")
    q, k, v = problem(dtype, "bshd", 4, kv_heads)
    weights = fastattn.mha(q, k, v, kernel=kernel, return_weights=True)[-1]
    assert (weights.shape, weights.dtype) == ((2, 0, 3, 5), stats_dtype(dtype))


@pytest.mark.parametrize("kv_heads", KV_HEADS)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_reference(layout, kv_heads):
    q, k, v = problem(np.float32, layout, 4, kv_heads)
    kw = {"layout": layout, "sinks": np.ones(0), "alibi_slopes": np.ones((2, 0)), "bias": np.ones((3, 5))}
    out, lse, weights = reference.mha(q, k, v, return_lse=True, return_weights=True, **kw)
    assert out.shape == (*q.shape[:-1], 6)
    assert (lse.shape, weights.shape) == ((2, 0, 3), (2, 0, 3, 5))
    g = reference.mha_backward(np.ones_like(out), q, k, v, out, lse, **kw)
    assert [x.shape for x in g] == [q.shape, k.shape, v.shape, (3, 5), (2, 0), (0,)]
    assert not any(x.any() for x in g)


def test_query_heads_need_key_heads():
    q, k, v = (x.swapaxes(1, 2) for x in problem(np.float32, "bhsd", 4, 0))
    q = np.ones((2, 3, 2, 8), np.float32)
    for function in (fastattn.mha, fastattn.explain, reference.mha):
        with pytest.raises(ValueError, match=r"k: expected a number of heads that divides .*2"):
            function(q, k, v)


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_torch(layout, kv_heads):
    torch = pytest.importorskip("torch")
    import fastattn.torch as ft

    q, k, v = (torch.from_numpy(x).requires_grad_() for x in problem(np.float32, layout, 4, kv_heads))
    sinks, slopes = torch.ones(0, requires_grad=True), torch.ones(0, requires_grad=True)
    out, lse = ft.mha(q, k, v, layout=layout, sinks=sinks, alibi_slopes=slopes, return_lse=True)
    assert out.shape == (*q.shape[:-1], 6)
    assert lse.shape == (2, 0, 3)
    (out.sum() + lse.sum()).backward()
    for x in (q, k, v, sinks, slopes):
        assert x.grad.shape == x.shape
        assert not x.grad.any()


@pytest.mark.parametrize("lead", [(2,), (2, 3), ()])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_sdpa(lead, kv_heads):
    torch = pytest.importorskip("torch")
    import fastattn.torch as ft

    q, k = torch.ones(*lead, 0, 4, 8), torch.ones(*lead, kv_heads, 5, 8)
    k.requires_grad_()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    out = ft.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    assert out.shape == want.shape == (*lead, 0, 4, 8)
    out.sum().backward()
    assert not k.grad.any()


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_jax(layout, kv_heads):
    jax = pytest.importorskip("jax")
    import fastattn.jax as fj

    q, k, v = (jax.numpy.asarray(x) for x in problem(np.float32, layout, 4, kv_heads))
    sinks = jax.numpy.ones(0)

    def total(q, k, v, sinks):
        out, lse = fj.mha(q, k, v, layout=layout, sinks=sinks, return_lse=True)
        assert out.shape == (*q.shape[:-1], 6)
        return out.sum() + lse.sum()

    for function in (jax.grad, lambda f, a: jax.jit(jax.grad(f, a))):
        gradients = function(total, (0, 1, 2, 3))(q, k, v, sinks)
        for x, g in zip((q, k, v, sinks), gradients, strict=True):
            assert g.shape == x.shape
            assert not g.any()
