"""Packed entries: the bits that each has alone, side gradients, what lies outside of them, refusals."""

from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest
from inputs import normal
from test_entry_bits import HKV, HQ, LENGTHS, OPTIONS, attend, bits, padded_batch, spread

import fastattn
from fastattn import reference

pytestmark = pytest.mark.cpu_only

SHORT = LENGTHS["short"]


def bounds(lengths, first=0):
    return np.cumsum([first, *lengths])


def pack(arrays, lengths, first=0, last=0):
    """The entries of a padded batch one after another, with room before and behind them, and their bounds."""
    q, k, v, dout = arrays
    cu_q, cu_kv = (bounds([pair[n] for pair in lengths], first) for n in (0, 1))

    def packed(x, cu):
        y = np.full((cu[-1] + last, *x.shape[2:]), np.nan, x.dtype)
        for b in range(len(lengths)):
            y[cu[b] : cu[b + 1]] = x[b, : cu[b + 1] - cu[b]]
        return y

    return (packed(q, cu_q), packed(k, cu_kv), packed(v, cu_kv), packed(dout, cu_q)), cu_q, cu_kv


def attend_packed(kernel, arrays, cu_q, cu_kv, kw):
    q, k, v, dout = arrays
    out, lse = fastattn.mha_varlen(q, k, v, cu_q, cu_kv, kernel=kernel, return_lse=True, **kw)
    grads = fastattn.mha_varlen_backward(dout, q, k, v, out, lse, cu_q, cu_kv, kernel=kernel, **kw)
    return {"out": out, "lse": lse, **grads._asdict()}


def blocks(Tq, Tk, dtype, *, bias=False, mask=False):
    made = {"bias": normal((HQ, Tq, Tk), dtype, seed=5)} if bias else {}
    return made | ({"mask": np.random.default_rng(6).random((1, Tq, Tk)) < 0.6} if mask else {})


def given(options, dtype, Tq, Tk):
    """The options with their arrays."""
    kw = dict(options)
    kw |= blocks(Tq, Tk, dtype, bias=kw.pop("bias", False), mask=kw.pop("mask", False))
    if kw.get("sinks"):
        kw["sinks"] = normal((HQ,), np.float32, seed=7)
    if kw.get("alibi_slopes"):
        kw["alibi_slopes"] = np.linspace(0.01, 0.2, HQ, dtype=np.float32)
    return kw


def alone(kernel, arrays, kw, rows, keys):
    """An entry by `mha`: parts of the packed arrays."""
    q, k, v, dout = arrays
    own = {
        name: x[None, :, rows if x.shape[1] > 1 else slice(None), keys if x.shape[2] > 1 else slice(None)]
        if name in ("bias", "mask")
        else x
        for name, x in kw.items()
    }
    entry = (q[None, rows], k[None, keys], v[None, keys], dout[None, rows])
    return attend(kernel, entry, own), own, entry


@pytest.mark.parametrize("case", list(OPTIONS))
@pytest.mark.parametrize("lengths", list(LENGTHS))
def test_packed_entry_has_the_bits_that_it_has_alone(kernel, dtype, lengths, case, threads):
    pairs = LENGTHS[lengths]
    D, Dv = (40, 24) if lengths == "short" else (16, 32)
    arrays, cu_q, cu_kv = pack(padded_batch(dtype, pairs, D, Dv), pairs, first=2, last=3)
    kw = given(OPTIONS[case], dtype, len(arrays[0]), len(arrays[1]))
    fastattn.set_num_threads(1)
    wanted = [
        alone(kernel, arrays, kw, slice(*cu_q[b : b + 2]), slice(*cu_kv[b : b + 2]))[0]
        for b in range(len(pairs))
    ]
    for n in (2,) if kernel == "cpu-reference" else (1, 2, 3):
        fastattn.set_num_threads(n)
        found = attend_packed(kernel, arrays, cu_q, cu_kv, kw)
        for b, want in enumerate(wanted):
            for name, x in want.items():
                cu = cu_kv if name in ("dk", "dv") else cu_q
                mine = slice(*cu[b : b + 2])
                got = found[name][:, mine] if name == "lse" else found[name][mine]
                assert np.array_equal(bits(x[0]), bits(got)), (name, b, n)
        for name, cu in (("out", cu_q), ("dq", cu_q), ("dk", cu_kv), ("dv", cu_kv)):
            assert not np.any(found[name][: cu[0]]), name
            assert not np.any(found[name][cu[-1] :]), name
        outside = np.r_[: cu_q[0], cu_q[-1] : len(arrays[0])]
        assert np.all(found["lse"][:, outside] == -np.inf)


@pytest.mark.parametrize("order", [[6, 2, 0, 5, 1, 4, 3], [4, 4, 4], [1]])
def test_order_and_layout_do_not_matter(kernel, dtype, order, threads):
    fastattn.set_num_threads(2)
    picked = [x[order] for x in padded_batch(dtype, SHORT, 33, 32)]
    arrays, cu_q, cu_kv = pack(picked, [SHORT[b] for b in order])
    found = attend_packed(kernel, arrays, cu_q.astype(np.int32), cu_kv.astype(np.uint16), {"causal": True})
    heads_first = [spread(x.swapaxes(0, 1)[None], 2)[0] for x in arrays]
    other = attend_packed(kernel, heads_first, cu_q, cu_kv, {"causal": True, "layout": "bhsd"})
    for at in range(len(order)):
        rows, keys = slice(*cu_q[at : at + 2]), slice(*cu_kv[at : at + 2])
        want = alone(kernel, arrays, {"causal": True}, rows, keys)[0]
        for name, x in want.items():
            mine = keys if name in ("dk", "dv") else rows
            got = found[name][:, mine] if name == "lse" else found[name][mine]
            swapped = other[name] if name == "lse" else other[name].swapaxes(0, 1)
            swapped = swapped[:, mine] if name == "lse" else swapped[mine]
            assert np.array_equal(bits(x[0]), bits(got)), (name, at)
            assert np.array_equal(bits(x[0]), bits(swapped)), (name, at)


def test_lengths_and_offsets_are_of_each_entry(kernel, dtype):
    arrays, cu_q, cu_kv = pack(padded_batch(dtype, SHORT, 16, 16), SHORT)
    kv_lens = np.maximum(np.diff(cu_kv) - [0, 5, 1, 64, 3, 0, 299], 0)
    offsets = np.array([0, -4, 9, 2, 50, 1, 7])
    slopes = np.random.default_rng(3).random((len(SHORT), HQ)).astype(np.float32)
    kw = {"causal": True, "window": (120, None), "softcap": 3.0}
    found = attend_packed(
        kernel, arrays, cu_q, cu_kv, kw | {"kv_lens": kv_lens, "q_offset": offsets, "alibi_slopes": slopes}
    )
    for b in range(len(SHORT)):
        rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_kv[b : b + 2])
        own = kw | {
            "kv_lens": kv_lens[b : b + 1],
            "q_offset": offsets[b : b + 1],
            "alibi_slopes": slopes[b : b + 1],
        }
        q, k, v, dout = (x[None, part] for x, part in zip(arrays, (rows, keys, keys, rows), strict=True))
        out, lse = fastattn.mha(q, k, v, kernel=kernel, return_lse=True, **own)
        grads = fastattn.mha_backward(dout, q, k, v, out, lse, kernel=kernel, **own)
        assert np.array_equal(bits(found["out"][rows]), bits(out[0]))
        assert np.array_equal(bits(found["lse"][:, rows]), bits(lse[0]))
        assert np.array_equal(bits(found["dq"][rows]), bits(grads.dq[0]))
        assert np.array_equal(bits(found["dk"][keys]), bits(grads.dk[0]))
        assert np.array_equal(bits(found["dv"][keys]), bits(grads.dv[0]))
        assert np.array_equal(bits(found["dalibi_slopes"][b]), bits(grads.dalibi_slopes[0]))


@pytest.mark.parametrize("shape", ["HQK", "1QK", "HQ1", "H1K", "H11", "1Q1", "11K", "111", "QK", "K"])
def test_gradients_of_what_entries_share(kernel, dtype, shape, threads):
    """dbias, dalibi_slopes and dsinks are the sums of those of the entries alone."""
    lengths = [(3, 50), (0, 7), (200, 230), (5, 0), (1, 600), (40, 33)]
    arrays, cu_q, cu_kv = pack(padded_batch(dtype, lengths, 16, 16), lengths, first=1, last=2)
    size = {"H": HQ, "Q": len(arrays[0]), "K": len(arrays[1]), "1": 1}
    kw = {
        "bias": normal(tuple(size[axis] for axis in shape), dtype, seed=4),
        "sinks": normal((HQ,), np.float32, seed=7),
        "alibi_slopes": np.linspace(0.01, 0.2, HQ, dtype=np.float32),
    }
    fastattn.set_num_threads(2)
    found = attend_packed(kernel, arrays, cu_q, cu_kv, kw)
    wide = np.broadcast_to(kw["bias"], (HQ, len(arrays[0]), len(arrays[1]))).astype(np.float64)
    q, k, v, dout = (x.astype(np.float64) for x in arrays)
    for x, cu in ((q, cu_q), (dout, cu_q), (k, cu_kv), (v, cu_kv)):
        x[: cu[0]] = x[cu[-1] :] = 0.0
    want = reference.mha_varlen_backward(dout, q, k, v, None, None, cu_q, cu_kv, **(kw | {"bias": wide}))
    dbias = reference._sum_to(np.abs(want.dbias), np.shape(kw["bias"]))
    sums = reference._sum_to(want.dbias, np.shape(kw["bias"]))
    eps = float(ml_dtypes.finfo(dtype).eps)
    got = found["dbias"].astype(np.float64)
    assert got.shape == sums.shape
    assert np.all(np.abs(got - sums) <= 60 * max(eps, 1e-15) * (dbias + np.abs(want.dbias).max()))
    assert np.all(got[dbias == 0] == 0)  # of no pair, or of pairs of two entries
    for name in ("dsinks", "dalibi_slopes"):
        x = getattr(want, name)
        assert np.all(np.abs(found[name] - x) <= 200 * max(eps, 2e-7) * np.abs(x).max()), name
    again = attend_packed(kernel, arrays, cu_q, cu_kv, kw)
    for name in ("dbias", "dsinks", "dalibi_slopes"):
        assert np.array_equal(bits(found[name]), bits(again[name]))


def test_dropout_goes_by_the_number_of_the_entry(kernel, dtype):
    padded = padded_batch(dtype, SHORT, 16, 16)
    arrays, cu_q, cu_kv = pack(padded, SHORT)
    kw = {"dropout": 0.3, "seed": 11}
    found = attend_packed(kernel, arrays, cu_q, cu_kv, kw)
    lens = {"q_lens": np.diff(cu_q), "kv_lens": np.diff(cu_kv)}
    batch = attend(kernel, padded, kw | lens)
    for b, (n, _) in enumerate(SHORT):
        assert np.array_equal(bits(found["out"][cu_q[b] : cu_q[b + 1]]), bits(batch["out"][b, :n]))
        assert np.array_equal(bits(found["dq"][cu_q[b] : cu_q[b + 1]]), bits(batch["dq"][b, :n]))


@pytest.mark.parametrize("cu", [[0], [4], [2, 2, 2], [0, 0]], ids=str)
def test_no_rows(kernel, dtype, cu):
    q, k = normal((4, HQ, 8), dtype, 1), normal((4, HKV, 8), dtype, 2)
    kw = {"sinks": np.ones(HQ, np.float32), "bias": np.ones((1, 4, 4), dtype)}
    found = attend_packed(kernel, (q, k, k, q), np.array(cu), None, kw)
    assert np.all(found.pop("lse") == -np.inf)
    for name, x in found.items():
        assert x is None or not np.any(x), name


def test_entries_without_keys_have_the_lse_of_their_sinks(kernel, dtype):
    q, k = normal((4, HQ, 8), dtype, 1), normal((4, HKV, 8), dtype, 2)
    sinks = np.arange(HQ, dtype=np.float32)
    out, lse = fastattn.mha_varlen(
        q, k, k, np.array([0, 3, 4]), np.array([0, 0, 4]), sinks=sinks, return_lse=True, kernel=kernel
    )
    np.testing.assert_allclose(lse[:, :3], np.broadcast_to(sinks[:, None], (HQ, 3)), rtol=1e-6)
    assert not np.any(out[:3])


def test_result_into_an_array(kernel, dtype):
    arrays, cu_q, cu_kv = pack(padded_batch(dtype, SHORT, 16, 24), SHORT)
    q, k, v, _ = arrays
    want = fastattn.mha_varlen(q, k, v, cu_q, cu_kv, kernel=kernel)
    out = np.full((*q.shape[:2], 48), np.nan, dtype)[..., ::2]
    assert fastattn.mha_varlen(q, k, v, cu_q, cu_kv, out=out, kernel=kernel) is out
    assert np.array_equal(bits(out), bits(want))


def test_the_reference_is_mha_entry_by_entry():
    arrays, cu_q, cu_kv = pack(padded_batch(np.float64, SHORT, 8, 8), SHORT)
    q, k, v, dout = arrays
    kw = {"causal": True, "window": (40, 3), "sinks": np.ones(HQ)}
    kw |= blocks(len(q), len(k), np.float64, bias=True, mask=True)
    out, lse = reference.mha_varlen(q, k, v, cu_q, cu_kv, return_lse=True, **kw)
    grads = reference.mha_varlen_backward(dout, q, k, v, out, lse, cu_q, cu_kv, **kw)
    dsinks = 0
    for b in range(len(SHORT)):
        rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_kv[b : b + 2])
        own = kw | {"bias": kw["bias"][:, rows, keys], "mask": kw["mask"][:, rows, keys]}
        one, one_lse = reference.mha(q[rows], k[keys], v[keys], return_lse=True, **own)
        np.testing.assert_allclose(out[rows], one, atol=1e-14)
        np.testing.assert_allclose(lse[:, rows], one_lse, atol=1e-14)
        mine = reference.mha_backward(dout[rows], q[rows], k[keys], v[keys], one, one_lse, **own)
        np.testing.assert_allclose(grads.dq[rows], mine.dq, atol=1e-13)
        np.testing.assert_allclose(grads.dk[keys], mine.dk, atol=1e-13)
        np.testing.assert_allclose(grads.dv[keys], mine.dv, atol=1e-13)
        np.testing.assert_allclose(grads.dbias[:, rows, keys], mine.dbias, atol=1e-13)
        dsinks = dsinks + mine.dsinks
    np.testing.assert_allclose(grads.dsinks, dsinks, atol=1e-12)


def test_explain_lists_the_entries():
    q, k = np.zeros((1003, 4, 64), np.float32), np.zeros((3000, 2, 64), np.float32)
    plan = fastattn.explain(
        q,
        k,
        k,
        cu_q=np.array([0, 1, 2, 3, 1003]),
        cu_kv=np.array([0, 600, 1200, 1800, 3000]),
        kernel="cpu-scalar",
    )
    assert "3 entries: decode" in plan.algorithm
    assert "1 entry: prefill" in plan.algorithm
    pairs = 3 * 600 + 1000 * 1200
    assert plan.flops == pairs * 4 * 2 * 128
    assert plan.bytes == 2 * q.nbytes + 2 * k.nbytes + 2 * 5 * 8


def test_bounds_that_change_meanwhile_are_safe():
    """Another thread writes to the bounds: whatever is computed, nothing outside of the arrays is touched."""
    cu = np.array([0, 40, 90, 150, 200])
    q = normal((200, 4, 16), np.float32, 1)
    stop = threading.Event()

    def write():
        rng = np.random.default_rng(0)
        while not stop.is_set():
            cu[1:4] = rng.choice([-(2**62), 2**62, 10, 190], 3)
            cu[1:4] = (40, 90, 150)

    writer = threading.Thread(target=write)
    writer.start()
    refused = 0
    try:
        for _ in range(200):
            try:
                out, lse = fastattn.mha_varlen(q, q, q, cu, return_lse=True, causal=True)
                fastattn.mha_varlen_backward(q, q, q, q, out, lse, cu, causal=True)
            except ValueError:  # seen before it was read for good
                refused += 1
    finally:
        stop.set()
        writer.join()
    assert refused < 200


# ---- refusals -----------------------------------------------------------------------------------------
Q, K = np.zeros((6, 4, 8), np.float32), np.zeros((9, 2, 8), np.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_q": [0, 3, 2, 6]}, ValueError, r"cu_q: .* do not decrease, got 2 at index 2 after 3"),
        ({"cu_q": [0, 3, 2, 6]}, ValueError, r"\(entry 1\)"),
        ({"cu_q": [-1, 3, 4, 6]}, ValueError, r"cu_q: expected bounds of at least 0, got -1 at index 0"),
        ({"cu_q": [0, 3, 4, 7]}, ValueError, r"cu_q: .* at most Tq = 6, got 7 at index 3"),
        ({"cu_kv": [0, 3, 4, 10]}, ValueError, r"cu_kv: .* at most Tk = 9, got 10 at index 3"),
        ({"cu_kv": [0, 3, 9]}, ValueError, r"cu_kv: .*\(B \+ 1,\) = \(4,\) as cu_q, got \(3,\)"),
        ({"cu_q": [[0, 6]]}, ValueError, r"cu_q: expected shape \(B \+ 1,\), with B >= 0, got \(1, 2\)"),
        ({"cu_q": np.zeros(0, int)}, ValueError, r"cu_q: .*with B >= 0, got \(0,\)"),
        ({"cu_q": [0.0, 1.0, 2.0, 6.0]}, TypeError, r"cu_q: expected an integer dtype, got float64"),
        ({"cu_q": None}, TypeError, r"cu_q: expected an integer array \(B \+ 1,\), got None"),
        ({"q": Q[None]}, ValueError, r"k: expected"),
        ({"q": Q[None], "k": K[None], "v": K[None]}, ValueError, r"q: expected 3 axes \(Tq, Hq, D\)"),
        ({"kv_lens": [2, 2, 9]}, ValueError, r"kv_lens: expected lengths from 0 to 5, got 9 at index 2"),
        ({"kv_lens": [2, 2]}, ValueError, r"kv_lens: expected shape \(B,\) = \(3,\)"),
        ({"bias": np.zeros((1, 4, 6, 9), np.float32)}, ValueError, r"bias: expected at most 3 axes"),
        ({"mask": np.zeros((6, 8), bool)}, ValueError, r"mask: .*\(Hq, Tq, Tk\) = \(4, 6, 9\), got"),
        ({"alibi_slopes": np.ones((2, 4))}, ValueError, r"\(B, Hq\) = \(3, 4\)"),
        ({"out": np.zeros((1, 6, 4, 8), np.float32)}, ValueError, r"out: expected"),
        ({"kernel": "cuda-cublas"}, ValueError, r"cuda"),
    ],
)  # fmt: skip
def test_refusals(change, error, message):
    call = {"q": Q, "k": K, "v": K, "cu_q": [0, 1, 3, 6], "cu_kv": [0, 2, 4, 9]} | change
    call = {name: np.array(x) if isinstance(x, list) else x for name, x in call.items()}
    with pytest.raises(error, match=message):
        fastattn.mha_varlen(**call)


def test_what_it_does_not_take():
    for name in ("q_lens", "return_weights"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            fastattn.mha_varlen(Q, K, K, np.array([0, 6]), np.array([0, 9]), **{name: None})
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'cu_q'"):
        fastattn.mha_varlen(Q, K, K)
    with pytest.raises(ValueError, match="cu_kv: expected none without cu_q"):
        fastattn.explain(Q, K, K, cu_kv=np.array([0, 9]))


def test_a_gradient_names_its_shape():
    cu_q, cu_kv = np.array([0, 6]), np.array([0, 9])
    out, lse = fastattn.mha_varlen(Q, K, K, cu_q, cu_kv, return_lse=True)
    with pytest.raises(ValueError, match=r"lse: expected shape \(Hq, Tq\) = \(4, 6\), got \(4, 5\)"):
        fastattn.mha_varlen_backward(out, Q, K, K, out, lse[:, :5], cu_q, cu_kv)
    with pytest.raises(ValueError, match="dout"):
        fastattn.mha_varlen_backward(out[:5], Q, K, K, out, lse, cu_q, cu_kv)


@pytest.mark.parametrize("shape", ["1Q1", "HQ1", "H1K", "11K", "HQK"])
def test_dbias_of_an_entry_has_the_bits_that_it_has_alone(kernel, dtype, shape):
    """Its blocks are those of the entry's own sizes, whatever stands beside it."""
    lengths = [(2, 600), (3, 1600), (0, 5), (7, 700)]
    arrays, cu_q, cu_kv = pack(padded_batch(dtype, lengths, 8, 8), lengths)
    size = {"H": HQ, "Q": len(arrays[0]), "K": len(arrays[1]), "1": 1}
    kw = {"bias": normal(tuple(size[axis] for axis in shape), dtype, seed=4)}
    kw["kv_lens"] = np.diff(cu_kv) - 1
    got = attend_packed(kernel, arrays, cu_q, cu_kv, kw)["dbias"]
    for b in range(len(lengths)):
        rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_kv[b : b + 2])
        part = (
            slice(None),
            rows if shape[1] == "Q" else slice(None),
            keys if shape[2] == "K" else slice(None),
        )
        own = {"bias": kw["bias"][part], "kv_lens": kw["kv_lens"][b : b + 1]}
        q, k, v, dout = (x[None, y] for x, y in zip(arrays, (rows, keys, keys, rows), strict=True))
        out, lse = fastattn.mha(q, k, v, kernel=kernel, return_lse=True, **own)
        want = fastattn.mha_backward(dout, q, k, v, out, lse, kernel=kernel, **own).dbias
        assert np.array_equal(bits(got[part]), bits(want)), b


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lens": [3, 7, 2]}, "kv_lens: expected lengths"),
        ({"kv_lens": [-1, 1, 1]}, "kv_lens: expected lengths"),
        ({"q_lens": [1, 1, 1]}, "q_lens: expected none"),
        ({"cu_q": [0.0, 1.0, 3.0, 6.0]}, "cu_q: expected"),
        ({"cu_q": None}, "cu_q: expected"),
        ({"cu_kv": [0, 2, 4, 10]}, "cu_kv: expected"),
        ({"v": K[:8]}, "v: expected"),
        ({"return_weights": True}, "return_weights: expected none"),
    ],
)
def test_refusals_of_the_reference(change, message):
    call = {"q": Q, "k": K, "v": K, "cu_q": [0, 1, 3, 6], "cu_kv": [0, 2, 4, 9]} | change
    with pytest.raises(ValueError, match=message):
        reference.mha_varlen(**call)
