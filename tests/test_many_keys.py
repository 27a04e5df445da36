"""Sums over many keys or rows: what a float32 that runs on over all of them would lose."""

from __future__ import annotations

import numpy as np
import pytest
from gate import check
from inputs import DTYPES, qkv, stats_dtype

import fastattn


@pytest.fixture(autouse=True)
def _on_the_cpu(request):
    if "kernel" in request.fixturenames and request.getfixturevalue("kernel").startswith("cuda"):
        pytest.skip("the sums of the CUDA kernels run on")


def repeated(row, n):
    """(1, n, 1, D): the same row n times, of no memory."""
    return np.broadcast_to(row, (1, n, 1, row.size))


def values(dtype):
    return np.linspace(0.7, 1.7, 8).astype(dtype)


def tolerance(dtype):
    return {8: 1e-11, 4: 1e-5, 2: np.finfo(dtype).eps if np.dtype(dtype) == np.float16 else 2.0**-8}[
        np.dtype(dtype).itemsize
    ]


# A row by itself, few rows whose keys are split, and rows that are not.
@pytest.mark.one_dtype
@pytest.mark.parametrize(("Sq", "n"), [(1, 2**22 + 5), (3, 2**20 + 5), (33, 2**20 + 5), (300, 2**16 + 5)])
def test_equal_keys(kernel, dtype, Sq, n):
    """All additions round in the same direction: after 2**20 keys 5e-5 was gone, after 2**31 a twentieth."""
    if kernel == "cpu-reference":
        n = n // 64
    q, v = np.ones((1, Sq, 1, 8), dtype), values(dtype)
    out, lse = fastattn.mha(q, repeated(np.ones(8, dtype), n), repeated(v, n), kernel=kernel, return_lse=True)
    want = v.astype(np.float64)
    assert np.abs(out.astype(np.float64) / want - 1).max() <= tolerance(dtype)
    assert np.abs(lse - (np.sqrt(8) + np.log(n))).max() < 1e-5


def test_equal_keys_in_float16(kernel):
    """The dtype rounds to 5e-4, and that was exceeded."""
    n = 2**24 if kernel != "cpu-reference" else 2**16
    if kernel == "cpu-avx512bf16":
        pytest.skip("takes bfloat16")
    v = values(np.float16)
    k = repeated(np.ones(8, np.float16), n)
    out = fastattn.mha(np.ones((1, 1, 1, 8), np.float16), k, repeated(v, n), kernel=kernel)
    assert (out == v).all()


def test_equal_rows_of_the_backward(kernel, dtype):
    """dv is the sum of dout over all rows, dk that of dS q."""
    n = 2**17 if kernel != "cpu-reference" else 2**10
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, 2, 1, 8)).astype(dtype)
    q, dout = repeated(values(dtype), n), repeated(values(dtype)[::-1], n)
    out, lse = fastattn.mha(q[:, :1], k, v, kernel=kernel, return_lse=True)
    kw = {"kernel": kernel, "causal": False}
    one = fastattn.mha_backward(dout[:, :1], q[:, :1], k, v, out, lse, **kw)
    many = fastattn.mha_backward(
        dout, q, k, v, np.broadcast_to(out, q.shape), np.broadcast_to(lse, (1, 1, n)), **kw
    )
    for name in ("dk", "dv"):
        got, row = (getattr(g, name).astype(np.float64) for g in (many, one))
        if np.dtype(dtype) == np.float16:  # beyond its range
            finite = np.abs(n * row) < 6e4
            got, row = got[finite], row[finite]
        # What a sum over one row is rounded to is known to half a spacing of the dtype.
        np.testing.assert_allclose(got, n * row, rtol=2 * tolerance(dtype) + np.finfo(stats_dtype(dtype)).eps)


# Many terms for one number: over the batch, the heads, blocks of rows, blocks of keys, all of them.
@pytest.mark.parametrize(
    ("B", "Hq", "Sq", "Sk"),
    [(2**14, 1, 1, 3), (1, 2**14, 1, 3), (1, 1, 2**18, 3), (1, 1, 3, 2**22 + 5), (9, 8, 400, 1200)],
    ids=["batch", "heads", "rows", "keys", "all"],
)
def test_equal_terms_of_the_backward(kernel, dtype, B, Hq, Sq, Sk):
    """With equal keys and values dS is dlse / Sk: dbias had lost 1e-4 over a batch, dq 8e-6 over keys."""
    if kernel == "cpu-reference":
        B, Hq, Sq, Sk = (max(1, min(n // 8, 2**14)) if n > 8 else n for n in (B, Hq, Sq, Sk))
    q, dout = (np.broadcast_to(np.asarray(x, dtype), (B, Sq, Hq, 4)) for x in (0.1, 2.0**-10))
    k, v = (np.broadcast_to(np.asarray(x, dtype), (B, Sk, 1, 4)) for x in (0.3, 1.25))
    kw = {"bias": np.zeros((1, 1, 1, 1), stats_dtype(dtype)), "alibi_slopes": np.zeros(Hq)}
    out, lse = fastattn.mha(q, k, v, kernel=kernel, return_lse=True, **kw)
    dlse = np.broadcast_to(lse.dtype.type(0.37), lse.shape)
    # The weights are those that lse tells, in float64.
    score = 2 * float(q.flat[0]) * float(k.flat[0])
    weight, keys = np.exp(score - lse.astype(np.float64)).mean(), np.arange(Sk, dtype=np.float64)
    ds, distance = float(dlse.flat[0]) * weight, sum(np.abs(i + Sk - Sq - keys).sum() for i in range(Sq))
    want = {
        "dbias": B * Hq * Sq * Sk * ds,
        "dalibi_slopes": -B * ds * distance,
        "dq": Sk * ds * float(k.flat[0]) / 2,
    }
    grads = fastattn.mha_backward(dout, q, k, v, out, lse, dlse=dlse, kernel=kernel, **kw)
    # A score is known to eps times its size, and so is a weight; products with k run on over a block of keys.
    limits = {"dbias": 1.5e-6, "dalibi_slopes": 1.5e-6, "dq": 5e-6}
    for name, value in want.items():
        limit = 1e-11 if lse.dtype == np.float64 else limits[name]
        if name == "dq" and np.dtype(dtype).itemsize == 2:
            limit = 2 * tolerance(dtype)  # dS and dq are rounded
        np.testing.assert_allclose(getattr(grads, name).astype(np.float64), value, rtol=limit, err_msg=name)


def test_threads_do_not_move_the_sections_of_dq(kernel, threads):
    """Five heads are one item each for one thread, and an item per chunk of keys for three."""
    Sk = 2**19 if kernel != "cpu-reference" else 2**9
    dtype = DTYPES["bfloat16" if kernel == "cpu-avx512bf16" else "float32"]
    q, k, v = qkv(dtype, B=1, Sq=2, Sk=Sk, D=4)
    q, k, v = (np.broadcast_to(x, (5, *x.shape[1:])) for x in (q, k, v))
    kw = {"kernel": kernel, "alibi_slopes": np.full((5, 1), 1e-6)}
    out, lse = fastattn.mha(q, k, v, return_lse=True, **kw)
    results = []
    for n in (1, 3):
        fastattn.set_num_threads(n)
        results.append(fastattn.mha_backward(q, q, k, v, out, lse, dlse=np.ones_like(lse), **kw))
    for a, b in zip(*results, strict=True):
        assert a is None or np.array_equal(a, b)


@pytest.mark.parametrize("seed", range(3))
def test_masks_do_not_move_the_sections(kernel, dtype, threads, seed):
    """Where sums move to their totals depends on the keys alone, not on an item's rows or what they see."""
    rng = np.random.default_rng(seed)
    for Sq, Sk in ((1, 2**18), (300, 5000)):
        if kernel == "cpu-reference":
            Sk = Sk // 16
        q, k, v = qkv(dtype, Sq=Sq, Sk=Sk, D=8, seed=seed)
        mask = np.ones((Sq, Sk), bool)
        begin = rng.integers(0, Sk - Sk // 3)
        mask[: Sq // 2 + 1, begin : begin + Sk // 3] = False  # whole blocks of some rows
        mask[Sq // 3 :, : Sk // 2] &= rng.random(Sk // 2) < 0.5
        outs = []
        for n in (1, 3):
            fastattn.set_num_threads(n)
            outs.append(fastattn.mha(q, k, v, mask=mask, kernel=kernel, return_lse=True))
        assert all(np.array_equal(a, b) for a, b in zip(*outs, strict=True))


def test_masked_nan_beyond_a_section(kernel, dtype):
    """The second pass, which leaves it out, has the sums of the first."""
    Sk = 150_000 if kernel != "cpu-reference" else 2000
    q, k, v = qkv(dtype, Sq=1, Sk=Sk, D=8)
    mask = np.arange(Sk) % 7 != 3
    clean = fastattn.mha(q, k, v, mask=mask, kernel=kernel)
    v[:, ~mask] = np.nan
    assert np.array_equal(fastattn.mha(q, k, v, mask=mask, kernel=kernel), clean)


# Problems whose sums over all keys were up to 1.2 times over the gate, on every kernel that sums in float32.
@pytest.mark.one_dtype
@pytest.mark.parametrize("seed", [3, 9, 15])
@pytest.mark.parametrize(
    "given", [{}, {"softcap": 50.0, "sinks": np.ones(1, np.float32)}], ids=["plain", "cap"]
)
def test_few_keys_with_most_of_the_weight(kernel, dtype, seed, given):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.random((1, n, 1, 80)).astype(dtype) for n in (25, 1834, 1834))
    bias = (5 * rng.standard_normal((25, 1834))).astype(stats_dtype(dtype))
    q, v = (x * dtype.type(factor) for x, factor in ((q, 0.1), (v, 1e29)))
    check(kernel, q, k, v, bias=bias, causal=True, **given)
