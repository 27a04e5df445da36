"""Sums over many keys or rows: what a float32 that runs on over all of them would lose."""

from __future__ import annotations

import numpy as np
import pytest
from gate import check
from inputs import qkv, stats_dtype

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
