"""Packed entries on the emulated GPU: a call for each, and zeros outside of them."""

from __future__ import annotations

import numpy as np
import pytest
from inputs import normal

import fastattn

from emulated_gpu import (  # isort: skip
    LibraryArray,
    needs_emulated_gpu,
    synchronize,
)

pytestmark = needs_emulated_gpu

CU_Q, CU_KV = np.array([1, 4, 4, 40, 41, 41]), np.array([2, 8, 20, 20, 90, 99])
ROWS, KEYS, HQ, HKV = 44, 103, 4, 2
KERNELS = ["cuda-cublas", "cuda-flash-sm80", "cuda-flash-sm90"]


def problem(dtype, D=16, Dv=24):
    q, k, v = (
        normal((ROWS, HQ, D), dtype, 1),
        normal((KEYS, HKV, D), dtype, 2),
        normal((KEYS, HKV, Dv), dtype, 3),
    )
    return q, k, v, normal((ROWS, HQ, Dv), dtype, 4)


def options(dtype):
    lens = np.diff(CU_KV) - [1, 0, 0, 30, 2]
    slopes = np.random.default_rng(5).random((5, HQ)).astype(np.float32)
    return {
        "plain": {},
        "causal": {"causal": True, "window": (20, None), "q_offset": np.array([0, 1, -3, 9, 2])},
        "sides": {"kv_lens": lens, "alibi_slopes": slopes, "softcap": 3.0},
        "scores": {
            "bias": normal((HQ, ROWS, KEYS), dtype, 6),
            "mask": np.random.default_rng(7).random((1, ROWS, KEYS)) < 0.7,
            "sinks": np.ones(HQ, np.float32),
        },
    }


def close(got, want, dtype):
    eps = {2: 4e-3, 4: 3e-6, 8: 1e-13}[np.dtype(dtype).itemsize]
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    same = np.isinf(want)
    assert np.array_equal(got[same], want[same])
    scale = 1 + np.abs(want[~same]).max(initial=0)
    assert np.abs(got[~same] - want[~same]).max(initial=0) <= eps * scale


def on_device(x):
    return x if x is None else LibraryArray(x.copy())


@pytest.mark.parametrize("case", ["plain", "causal", "sides", "scores"])
@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("name", ["float32", "float16", "float64"])
def test_forward(name, where, case):
    dtype = np.dtype(name)
    q, k, v, _ = problem(dtype)
    kw = options(dtype)[case]
    want, want_lse = fastattn.mha_varlen(q, k, v, CU_Q, CU_KV, device="cpu", return_lse=True, **kw)
    for kernel in KERNELS[:1] if name != "float16" else KERNELS:
        if where == "host":
            out, lse = fastattn.mha_varlen(q, k, v, CU_Q, CU_KV, kernel=kernel, return_lse=True, **kw)
        else:
            given = map(on_device, (q, k, v))
            out, lse = fastattn.mha_varlen(*given, CU_Q, CU_KV, kernel=kernel, return_lse=True, **kw)
            synchronize()
            out, lse = out.numpy(), lse.numpy()
        close(out, want, dtype)
        close(lse, want_lse, np.float32 if name == "float16" else dtype)
        for rows in (slice(0, 1), slice(41, 44)):
            assert not np.any(out[rows])
            assert np.all(lse[:, rows] == -np.inf)


@pytest.mark.parametrize("case", ["plain", "causal", "sides", "scores"])
@pytest.mark.parametrize("where", ["host", "device"])
def test_backward(where, case):
    dtype = np.dtype(np.float32)
    q, k, v, dout = problem(dtype)
    kw = options(dtype)[case]
    kw.pop("sinks", None)
    out, lse = fastattn.mha_varlen(q, k, v, CU_Q, CU_KV, device="cpu", return_lse=True, **kw)
    kw["need_dbias"] = False
    arrays = (dout, q, k, v, out, lse)
    want = fastattn.mha_varlen_backward(*arrays, CU_Q, CU_KV, device="cpu", **kw)
    if where == "host":
        got = fastattn.mha_varlen_backward(*arrays, CU_Q, CU_KV, kernel="cuda-cublas", **kw)
    else:
        got = fastattn.mha_varlen_backward(*map(on_device, arrays), CU_Q, CU_KV, kernel="cuda-cublas", **kw)
        synchronize()
    for name, x in want._asdict().items():
        found = getattr(got, name)
        assert (found is None) == (x is None), name
        if x is not None:
            close(found if where == "host" else found.numpy(), x, dtype)


def test_what_is_refused():
    q, k, v, dout = problem(np.float32)
    sinks = np.ones(HQ, np.float32)
    with pytest.raises(fastattn.UnsupportedError, match=r"takes no packed entries .* with dropout"):
        fastattn.mha_varlen(q, k, v, CU_Q, CU_KV, dropout=0.5, kernel="cuda-cublas")
    with pytest.raises(fastattn.UnsupportedError, match=r"bounds of packed entries .* from the host alone"):
        fastattn.mha_varlen(*map(on_device, (q, k, v, CU_Q, CU_KV)))
    half = [x.astype(np.float16) for x in (q, k, v)]
    with pytest.raises(fastattn.UnsupportedError, match="returns out in q's dtype"):
        fastattn.mha_varlen(*half, CU_Q, CU_KV, out_dtype="float32", kernel="cuda-cublas")
    out, lse = fastattn.mha_varlen(q, k, v, CU_Q, CU_KV, sinks=sinks, return_lse=True)
    with pytest.raises(fastattn.UnsupportedError, match="has no dsinks of packed entries"):
        fastattn.mha_varlen_backward(dout, q, k, v, out, lse, CU_Q, CU_KV, sinks=sinks, kernel="cuda-cublas")
    plan = fastattn.explain(q, k, v, cu_q=CU_Q, cu_kv=CU_KV, kernel="cuda-cublas")
    assert "one for each packed entry" in plan.algorithm
