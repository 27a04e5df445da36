"""The reference itself: by hand, by brute force, against PyTorch in float64; and the gate can fail."""

from __future__ import annotations

import itertools
import math

import gate
import numpy as np
import pytest
from inputs import DTYPES, normal, qkv

from fastattn import reference


# ---- Philox -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's kat_vectors for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert tuple(int(w) for w in reference.philox4x32(counter, key[0] | key[1] << 32)) == words


def scalar_philox(counter, seed):
    """With Python integers only."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed % 2**32, seed >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**64 - 1])
def test_dropout_keep_follows_its_definition(seed):
    for p, b, h in ((0.1, 0, 0), (0.5, 3, 2), (0.999, 1, 0)):
        keep = reference.dropout_keep(5, 11, p, seed, b, h)
        for i, j in itertools.product(range(5), range(11)):
            assert keep[i, j] == (scalar_philox((j // 4, i, h, b), seed)[j % 4] >= math.floor(p * 2**32))


def test_dropout_keep_rate_and_independence():
    keep = reference.dropout_keep(200, 500, 0.3, 7, 0, 0)
    assert abs(keep.mean() - 0.7) < 0.01
    for other in ((8, 0, 0), (7, 1, 0), (7, 0, 1)):
        assert abs((keep == reference.dropout_keep(200, 500, 0.3, *other)).mean() - 0.58) < 0.01
    with pytest.raises(ValueError, match="dropout"):
        reference.dropout_keep(1, 1, 1.0, 0, 0, 0)
    with pytest.raises(ValueError, match="seed"):
        reference.dropout_keep(1, 1, 0.5, -1, 0, 0)


# ---- brute force ------------------------------------------------------------------------------
def brute_force(
    q, k, v, *, scale, causal, window, q_offset, mask, bias, slopes, softcap, sinks, q_lens, kv_lens
):
    """Scalars, loops and fsum; bshd only."""
    B, Sq, Hq, _D = q.shape
    Sk, Hkv, Dv = v.shape[1:]
    out, lse = np.zeros((B, Sq, Hq, Dv)), np.full((B, Hq, Sq), -math.inf)
    for b, h, i in itertools.product(range(B), range(Hq), range(Sq)):
        ql = Sq if q_lens is None else int(q_lens[b])
        kl = Sk if kv_lens is None else int(kv_lens[b])
        if i >= ql:
            continue
        p = i + (kl - ql if q_offset is None else int(q_offset[b]))
        g = h // (Hq // Hkv)
        terms = []
        for j in range(kl):
            if causal and j > p:
                continue
            if window is not None and window[0] is not None and j < p - window[0]:
                continue
            if window is not None and window[1] is not None and j > p + window[1]:
                continue
            if mask is not None and not mask[b, h, i, j]:
                continue
            if bias is not None and bias[b, h, i, j] == -math.inf:
                continue
            s = scale * math.fsum(float(x) * float(y) for x, y in zip(q[b, i, h], k[b, j, g], strict=True))
            if softcap is not None:
                s = softcap * math.tanh(s / softcap)
            if slopes is not None:
                s -= float(slopes[b, h]) * abs(p - j)
            if bias is not None:
                s += float(bias[b, h, i, j])
            terms.append((s, v[b, j, g]))
        logits = [s for s, _ in terms] + ([] if sinks is None else [float(sinks[h])])
        if not logits:
            continue
        top = max(logits)
        total = math.fsum(math.exp(s - top) for s in logits)
        lse[b, h, i] = top + math.log(total)
        for d in range(Dv):
            out[b, i, h, d] = math.fsum(math.exp(s - top) * float(x[d]) for s, x in terms) / total
    return out, lse


@pytest.mark.parametrize("case", range(60))
def test_against_brute_force(case):
    rng = np.random.default_rng(case)
    B, Hkv, G, Sq, Sk = (int(x) for x in rng.integers(1, (4, 3, 4, 7, 8)))
    q, k, v = qkv(np.float64, B=B, Hq=G * Hkv, Hkv=Hkv, Sq=Sq, Sk=Sk, D=5, Dv=3, seed=case)

    def maybe(x):
        return x if rng.random() < 0.5 else None

    score = (B, G * Hkv, Sq, Sk)
    bias = rng.normal(size=score)
    bias[rng.random(score) < 0.2] = -np.inf
    kw = {
        "causal": bool(rng.random() < 0.5),
        "window": maybe((maybe(int(rng.integers(4))), maybe(int(rng.integers(4))))),
        "q_offset": maybe(rng.integers(-3, 6, B)),
        "mask": maybe(rng.random(score) < 0.7),
        "bias": maybe(bias),
        "softcap": maybe(0.7),
        "sinks": maybe(rng.normal(size=G * Hkv)),
        "q_lens": maybe(rng.integers(0, Sq + 1, B)),
        "kv_lens": maybe(rng.integers(0, Sk + 1, B)),
    }
    slopes = maybe(rng.normal(size=(B, G * Hkv)))
    out, lse = reference.mha(q, k, v, scale=0.3, alibi_slopes=slopes, return_lse=True, **kw)
    want_out, want_lse = brute_force(q, k, v, scale=0.3, slopes=slopes, **kw)
    np.testing.assert_allclose(out, want_out, rtol=0, atol=1e-13)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=1e-13)
    # The textbook of the gate is a second writing of the same definition.
    book, _ = gate.textbook(q, k, v, scale=0.3, alibi_slopes=slopes, **kw)
    has_value = np.isfinite(lse if kw["sinks"] is None else want_lse).swapaxes(1, 2)
    np.testing.assert_allclose(book[has_value], want_out[has_value], rtol=0, atol=1e-13)


# ---- PyTorch ------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["plain", "causal", "mask", "bias", "scale", "gqa", "cross"])
def test_against_torch_float64(case):
    torch = pytest.importorskip("torch")
    Hkv, Sk = (2 if case == "gqa" else 4), (13 if case == "cross" else 9)
    q, k, v = qkv(np.float64, B=2, Hq=4, Hkv=Hkv, Sq=9, Sk=Sk, D=8, Dv=6, layout="bhsd", seed=1)
    mask = np.random.default_rng(0).random((2, 1, 9, Sk)) < 0.6
    mask[..., 0] = True  # torch gives NaN to rows that see nothing
    bias = normal((4, 9, Sk), np.float64, 3)
    ours, theirs = {
        "causal": ({"causal": True}, {"is_causal": True}),
        "mask": ({"mask": mask}, {"attn_mask": torch.tensor(mask)}),
        "bias": ({"bias": bias}, {"attn_mask": torch.tensor(bias)}),
        "scale": ({"scale": -0.7}, {"scale": -0.7}),
        "gqa": ({}, {"enable_gqa": True}),
    }.get(case, ({}, {}))
    want = torch.nn.functional.scaled_dot_product_attention(*map(torch.tensor, (q, k, v)), **theirs).numpy()
    np.testing.assert_allclose(reference.mha(q, k, v, layout="bhsd", **ours), want, rtol=0, atol=1e-14)


# ---- by hand --------------------------------------------------------------------------------------
Z = np.zeros((3, 1))  # three queries or keys whose scores are all 0
V = np.array([[1.0], [2.0], [4.0]])


@pytest.mark.parametrize(
    ("kwargs", "out", "denominator"),
    [
        ({}, [7 / 3] * 3, [3, 3, 3]),
        ({"causal": True}, [1, 1.5, 7 / 3], [1, 2, 3]),
        ({"causal": True, "q_offset": 1}, [1.5, 7 / 3, 7 / 3], [2, 3, 3]),
        ({"causal": True, "q_offset": -1}, [0, 1, 1.5], [0, 1, 2]),
        ({"causal": True, "q_offset": -(10**18)}, [0, 0, 0], [0, 0, 0]),
        ({"causal": True, "q_offset": 2**63 - 1}, [7 / 3] * 3, [3, 3, 3]),
        ({"window": (0, 0)}, [1, 2, 4], [1, 1, 1]),
        ({"window": (1, None)}, [7 / 3, 7 / 3, 3], [3, 3, 2]),
        ({"window": (None, 1)}, [1.5, 7 / 3, 7 / 3], [2, 3, 3]),
        ({"window": (1, 1), "causal": True}, [1, 1.5, 3], [1, 2, 2]),
        ({"window": (2**63 - 1, 0)}, [1, 1.5, 7 / 3], [1, 2, 3]),
        ({"kv_lens": [2], "causal": True}, [0, 1, 1.5], [0, 1, 2]),  # the offset becomes 2 - 3
        ({"kv_lens": [2], "q_lens": [1], "causal": True}, [1.5, 0, 0], [2, 0, 0]),
        ({"kv_lens": [0]}, [0, 0, 0], [0, 0, 0]),
        ({"sinks": [0.0]}, [7 / 4] * 3, [4, 4, 4]),
        ({"sinks": [0.0], "mask": np.zeros(3, bool)}, [0, 0, 0], [1, 1, 1]),
        ({"sinks": [0.0], "q_lens": [1]}, [7 / 4, 0, 0], [4, 0, 0]),
        ({"mask": [[True], [False], [True]]}, [7 / 3, 0, 7 / 3], [3, 0, 3]),
        ({"bias": [0, math.log(2), -math.inf]}, [5 / 3] * 3, [3, 3, 3]),
        (
            {"alibi_slopes": [math.log(2)]},
            [(1 + 2 / 2 + 4 / 4) / 1.75, (0.5 + 2 + 2) / 2, (0.25 + 1 + 4) / 1.75],
            [1.75, 2, 1.75],
        ),
    ],
)
def test_by_hand(kwargs, out, denominator):
    got, lse = reference.mha(Z, Z, V, return_lse=True, **kwargs)
    np.testing.assert_allclose(got[:, 0], out, rtol=0, atol=1e-15)
    np.testing.assert_allclose(np.exp(lse), denominator, rtol=1e-15, atol=0)


def test_softcap_by_hand():
    q, k = np.array([[2.0]]), np.array([[3.0], [-50.0]])
    lse = reference.mha(q, k, k, scale=0.5, softcap=2.0, return_lse=True)[1]
    want = np.log(np.exp(2 * np.tanh(1.5)) + np.exp(2 * np.tanh(-25.0)))
    np.testing.assert_allclose(lse, [want], rtol=1e-15)


def test_masked_nan_does_not_leak_and_attended_nan_does():
    k, v = Z.copy(), V.copy()
    k[1], v[1] = np.nan, np.inf
    out, lse = reference.mha(Z, k, v, mask=np.array([True, False, True]), return_lse=True)
    np.testing.assert_allclose(out[:, 0], 2.5)
    np.testing.assert_allclose(np.exp(lse), 2.0)
    out = reference.mha(Z, k, v, causal=True)[:, 0]
    assert out[0] == 1.0
    assert np.isnan(out[1:]).all()
    assert (reference.mha(Z, Z, v)[:, 0] == np.inf).all()


def test_dtype_rounds_and_default_does_not():
    for dtype in DTYPES.values():
        q, k, v = qkv(dtype, Sq=3, Sk=5)
        exact, rounded = reference.mha(q, k, v), reference.mha(q, k, v, dtype=dtype)
        assert exact.dtype == np.float64
        assert rounded.dtype == dtype
        assert (exact.astype(dtype) == rounded).all()


# ---- the gate -------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["blas", "reversed", "sequential"])
def test_textbook_is_attention(dtype, order):
    q, k, v = qkv(dtype, B=2, Sq=17, Sk=33, Hq=4, Hkv=2, D=24, Dv=9, layout="bhsd")
    book, _ = gate.textbook(q, k, v, layout="bhsd", causal=True, order=order)
    error = gate._finite_error(book, reference.mha(q, k, v, layout="bhsd", causal=True))
    assert error < {"float64": 1e-14, "float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}[dtype.name]


def test_gate_fails_on_a_wrong_result(dtype):
    q, k, v = qkv(dtype, Sq=17, Sk=33, Hq=2, D=24)
    want = gate.oracle(q, k, v)
    gate.assert_out(want.out.astype(dtype), want, dtype)
    gate.assert_lse(want.lse.astype(gate.stats_dtype(dtype)), want, dtype)
    step = {"float64": 1e-13, "float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}[dtype.name]
    for bad in (want.out + step, np.where(np.arange(24) == 5, np.nan, want.out), np.zeros_like(want.out)):
        with pytest.raises(AssertionError):
            gate.assert_out(bad.astype(dtype), want, dtype)
    with pytest.raises(AssertionError):
        gate.assert_lse((want.lse + 2e-3).astype(gate.stats_dtype(dtype)), want, dtype)
