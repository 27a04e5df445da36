"""merge_states and out_dtype: the whole from its parts."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from inputs import DTYPES, normal, qkv, stats_dtype

import fastattn
from fastattn import reference

pytestmark = pytest.mark.cpu_only


def parts_of(q, k, v, cuts, **kw):
    pairs = [
        fastattn.mha(q, k[:, a:b], v[:, a:b], return_lse=True, **kw)
        for a, b in zip([0, *cuts], [*cuts, k.shape[1]], strict=True)
    ]
    return [out for out, _ in pairs], [lse for _, lse in pairs]


@pytest.mark.parametrize("cuts", [[], [1], [40, 41], [0, 60, 100, 130]], ids=str)
def test_parts_are_the_whole(kernel, dtype, cuts):
    q, k, v = qkv(dtype, B=2, Sq=5, Sk=130, Hq=4, Hkv=2, D=16, Dv=24)
    wide = stats_dtype(dtype)
    outs, lses = parts_of(q, k, v, cuts, kernel=kernel, out_dtype=wide)
    assert all(x.dtype == wide for x in outs)
    out = np.empty((2, 5, 4, 24), dtype)
    result, lse = fastattn.merge_states(outs, lses, out=out)
    assert result is out
    want, want_lse = reference.mha(q, k, v, return_lse=True)
    eps = float(ml_dtypes.finfo(dtype).eps)
    assert np.abs(out.astype(np.float64) - want).max() <= 8 * eps * np.abs(want).max() + 1e-6 * (
        wide == np.float32
    )
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5 if wide == np.float32 else 1e-13)


@pytest.mark.parametrize("name", list(DTYPES))
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_by_the_formula(name, layout, rank):
    dtype, stats = DTYPES[name], stats_dtype(DTYPES[name])
    shape = (2, 70, 3, 9) if layout == "bshd" else (2, 3, 70, 9)
    shape = {2: (70, 9), 3: shape[1:], 4: shape}[rank]
    rows = {2: (70,), 3: (3, 70), 4: (2, 3, 70)}[rank]
    outs = normal((3, *shape), dtype, 1)
    lses = normal((3, *rows), stats, 2, spread=4.0)
    lses[1, ..., 5:9] = -np.inf
    lses[:, ..., 11] = -np.inf
    w = np.exp(lses.astype(np.float64) - np.where(np.isinf(m := lses.max(0)), 0, m))
    share = w / np.where(w.sum(0) == 0, 1, w.sum(0))
    if layout == "bshd" and rank > 2:
        share = share.swapaxes(-1, -2)
    want = (share[..., None] * outs.astype(np.float64)).sum(0)
    if layout == "bshd" and rank > 2:
        outs[1, ..., 5:9, :, :] = np.nan  # whatever a part without keys holds
    else:
        outs[1, ..., 5:9, :] = np.nan
    out, lse = fastattn.merge_states(outs, list(lses), layout=layout)
    assert out.dtype == dtype
    assert lse.dtype == stats
    eps = float(ml_dtypes.finfo(dtype).eps)
    assert np.abs(out.astype(np.float64) - want).max() <= 4 * eps * np.abs(want).max() + 1e-6 * (
        stats == np.float32
    )
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse, m + np.log(w.sum(0)), rtol=1e-5, atol=1e-6)
    assert np.all(lse[..., 11] == -np.inf)


def test_threads_and_strides_do_not_matter(threads):
    outs, lses = normal((4, 2, 300, 3, 40), np.float32, 1), normal((4, 2, 3, 300), np.float32, 2)
    fastattn.set_num_threads(1)
    out, lse = fastattn.merge_states(outs, lses)
    for n in (2, 3):
        fastattn.set_num_threads(n)
        spread = np.zeros((4, 2, 300, 3, 80), np.float32)[..., ::-2]
        spread[...] = outs
        again, again_lse = fastattn.merge_states(spread, lses[..., ::-1][..., ::-1])
        assert np.array_equal(out, again)
        assert np.array_equal(lse, again_lse)


def test_an_infinite_lse_has_all_the_weight():
    outs, lses = normal((3, 4, 2), np.float32, 1), np.zeros((3, 4), np.float32)
    lses[1, 2] = np.inf
    lses[0, 3] = np.nan
    out, lse = fastattn.merge_states(outs, lses)
    assert np.array_equal(out[2], outs[1, 2])
    assert lse[2] == np.inf
    assert np.isnan(lse[3])
    assert np.all(np.isnan(out[3]))


def test_of_packed_entries():
    q, k, v = (
        normal((6, 4, 8), np.float32, 1),
        normal((50, 2, 8), np.float32, 2),
        normal((50, 2, 8), np.float32, 3),
    )
    cu_q, halves = np.array([0, 1, 6]), (np.array([0, 10, 25]), np.array([25, 25, 50]))
    parts = [fastattn.mha_varlen(q, k, v, cu_q, cu, return_lse=True) for cu in halves]
    out, lse = fastattn.merge_states(*zip(*parts, strict=True))
    for b, keys in enumerate(([*range(10)], [*range(10, 50)])):
        rows = slice(*cu_q[b : b + 2])
        want, want_lse = fastattn.mha(q[rows], k[keys], v[keys], return_lse=True)
        np.testing.assert_allclose(out[rows], want, atol=1e-6)
        np.testing.assert_allclose(lse[:, rows], want_lse, atol=1e-6)


def test_of_tensors():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    outs = [torch.randn(2, 5, 3, 8, dtype=torch.bfloat16) for _ in range(2)]
    lses = [torch.randn(2, 3, 5) for _ in range(2)]
    out, lse = fastattn.merge_states(outs, lses)
    assert out.dtype == torch.bfloat16
    w = torch.softmax(torch.stack(lses), 0).transpose(-1, -2)[..., None]
    assert torch.allclose(out.float(), (torch.stack(outs).float() * w).sum(0), atol=2e-2)
    assert torch.allclose(lse, torch.logsumexp(torch.stack(lses), 0), atol=1e-6)


@pytest.mark.parametrize("name", list(DTYPES))
def test_out_dtype(name):
    dtype = DTYPES[name]
    q, k, v = qkv(dtype, Sq=40, Sk=50, Hq=2, D=16)
    plain, lse = fastattn.mha(q, k, v, return_lse=True)
    for asked in (dtype, name, dtype.type):
        again = fastattn.mha(q, k, v, out_dtype=asked)
        assert again.dtype == dtype
        assert np.array_equal(again.view(np.uint8), plain.view(np.uint8))
    wide = stats_dtype(dtype)
    unrounded, wide_lse = fastattn.mha(q, k, v, out_dtype=wide.name, return_lse=True)
    assert unrounded.dtype == wide
    assert np.array_equal(unrounded.astype(dtype).view(np.uint8), plain.view(np.uint8))
    assert np.array_equal(lse, wide_lse)
    assert fastattn.explain(q, k, v, out_dtype=wide).bytes >= fastattn.explain(q, k, v).bytes


OUTS, LSES = np.zeros((2, 3, 4, 5), np.float32), np.zeros((2, 4, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (([], []), ValueError, "outs: expected at least one part"),
        ((OUTS, LSES[:1]), ValueError, "lses: expected as many parts as outs, 2, got 1"),
        ((OUTS, LSES.astype(np.float64)), TypeError, r"lses\[0\]: expected float32, got float64"),
        ((OUTS, LSES[:, :3]), ValueError, r"lses\[0\]: expected shape \(Hq, Sq\) = \(4, 3\), got \(3, 3\)"),
        (
            ([OUTS[0], OUTS[1].astype(np.float16)], LSES),
            TypeError,
            r"outs\[1\]: expected float32, got float16",
        ),
        (([OUTS[0], OUTS[1, :2]], LSES), ValueError, r"outs\[1\]: expected shape \(3, 4, 5\) as outs\[0\]"),
        ((OUTS.astype(np.int32), LSES), TypeError, r"outs\[0\]: expected a float dtype, got int32"),
        ((OUTS[:, 0, 0], LSES), ValueError, r"outs\[0\]: expected 2, 3 or 4 axes"),
        (([1.0, 2.0], LSES), TypeError, r"outs\[0\]: expected"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        fastattn.merge_states(*call)


def test_refusals_of_out():
    with pytest.raises(ValueError, match=r"out.*outs\[0\]"):
        fastattn.merge_states(OUTS, LSES, out=OUTS[0])
    with pytest.raises(TypeError, match="out: expected a dtype that accumulates as outs do, got float64"):
        fastattn.merge_states(OUTS, LSES, out=np.zeros((3, 4, 5)))
    with pytest.raises(ValueError, match=r"out: expected shape \(3, 4, 5\)"):
        fastattn.merge_states(OUTS, LSES, out=np.zeros((3, 4, 4), np.float32))
    with pytest.raises(ValueError, match="layout"):
        fastattn.merge_states(OUTS, LSES, layout="sbhd")
    q = np.zeros((1, 2, 1, 8), np.float16)
    with pytest.raises(TypeError, match="out_dtype: expected float16 or float32, got float64"):
        fastattn.mha(q, q, q, out_dtype="float64")
    for wrong in ("int32", int, 3, "fp32"):
        with pytest.raises(TypeError, match="out_dtype: expected float64, float32, float16 or bfloat16, got"):
            fastattn.mha(q, q, q, out_dtype=wrong)
    with pytest.raises(TypeError, match="out: expected float32 as out_dtype says, got float16"):
        fastattn.mha(q, q, q, out_dtype="float32", out=np.zeros((1, 2, 1, 8), np.float16))


def test_sums_do_not_overflow():
    outs = np.full((2, 4, 8), 3e38, np.float32)
    out, _ = fastattn.merge_states(outs, np.zeros((2, 4), np.float32))
    np.testing.assert_allclose(out, outs[0], rtol=1e-6)


def test_shapes_are_checked_before_memory_is_asked_for():
    huge = np.broadcast_to(np.float32(1), (1 << 14, 1 << 14, 64, 64))
    with pytest.raises(ValueError, match=r"lses\[0\]: expected shape"):
        fastattn.merge_states([OUTS[0][None]], [huge])
