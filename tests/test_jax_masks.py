"""A Mask of fastattn.masks in fastattn.jax: the core's numbers and gradients, under jit, grad and vmap."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn
from fastattn import masks

jax = pytest.importorskip("jax")
fj = pytest.importorskip("fastattn.jax")
jnp = jax.numpy

SQ, SK = 20, 33
IDS = np.random.default_rng(0).integers(0, 3, (2, SK))
MASKS = {
    "documents": masks.documents(IDS[:, -SQ:], IDS),
    "joined": masks.sinks_window(2, 9) & masks.tail(np.random.default_rng(2).random((SQ, 5)) < 0.5),
    "keys": masks.keys(np.random.default_rng(1).integers(-1, SK, (2, 2, SQ, 5))),
}


def arrays():
    rng = np.random.default_rng(0)
    shapes = ((2, SQ, 4, 8), (2, SK, 2, 8), (2, SK, 2, 8))
    return [jnp.asarray(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


@pytest.mark.parametrize("name", list(MASKS))
def test_is_the_call_of_numpy(name):
    q, k, v = arrays()
    kw = {"mask": MASKS[name], "causal": True, "return_lse": True}
    given = [np.asarray(x) for x in (q, k, v)]
    want, want_lse = fastattn.mha(*given, **kw)
    for function in (lambda *x: fj.mha(*x, **kw), jax.jit(lambda *x: fj.mha(*x, **kw))):
        out, lse = function(q, k, v)
        assert np.array_equal(np.asarray(out), want)
        assert np.array_equal(np.asarray(lse), want_lse)
    got = jax.jit(jax.grad(lambda *x: (fj.mha(*x, mask=MASKS[name], causal=True) ** 2).sum(), (0, 1, 2)))(
        q, k, v
    )
    grads = fastattn.mha_backward(2 * want, *given, want, want_lse, mask=MASKS[name], causal=True)
    for x, grad in zip(got, grads, strict=False):
        assert np.array_equal(np.asarray(x), grad)


def test_mapped():
    q, k, v = arrays()
    one = MASKS["joined"]
    mapped = jax.vmap(lambda q, k, v: fj.mha(q, k, v, mask=one))(q, k, v)
    for b in range(2):
        assert np.array_equal(np.asarray(mapped[b]), np.asarray(fj.mha(q[b], k[b], v[b], mask=one)))


def test_packed_entries():
    q, k, v = (x[0] for x in arrays())
    cu_q, cu_kv = np.array([0, 6, 20]), np.array([0, 11, 33])
    mask = masks.sinks_window(1, 3) & masks.prefix_lm([2, 5])
    want = fastattn.mha_varlen(*map(np.asarray, (q, k, v)), cu_q, cu_kv, mask=mask)
    assert np.array_equal(np.asarray(fj.mha_varlen(q, k, v, cu_q, cu_kv, mask=mask)), want)


def test_a_mask_that_does_not_fit():
    with pytest.raises(ValueError, match="mask: expected Sk = 9 as the Mask has, got 33"):
        fj.mha(*arrays(), mask=masks.documents(np.zeros(SQ, int), np.zeros(9, int)))
