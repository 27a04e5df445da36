"""Attention in plain NumPy, float64 inside: slow, short, and written to be read.

This is the oracle of the tests and of ``python -m fastattn check``. It follows the definition
line by line, one batch entry and one head at a time, and materialises the Sq x Sk scores::

    score[i, j]  = softcap(scale * q[i] . k[j]) - slope * |p_i - j| + bias[i, j]     p_i = i + q_offset
    weight[i, j] = exp(score[i, j]) / (exp(sink) + sum_j' exp(score[i, j']))         over allowed keys only
    out[i]       = sum_j weight[i, j] * v[j]                                         over allowed keys only
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["dropout_keep", "mha", "philox4x32"]

Array = np.ndarray[Any, Any]


def mha(
    q: Any,
    k: Any,
    v: Any,
    *,
    layout: str = "bshd",
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: Any = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    softcap: float | None = None,
    sinks: Any = None,
    q_lens: Any = None,
    kv_lens: Any = None,
    dropout: float = 0.0,
    seed: int = 0,
    return_lse: bool = False,
    return_weights: bool = False,
    dtype: Any = None,
) -> Any:
    """Attention forward by its definition, in float64.

    Parameters
    ----------
    q : array
        bshd (B,Sq,Hq,D), bhsd (B,Hq,Sq,D), without batch (Sq,Hq,D) or (Hq,Sq,D), or a matrix (Sq,D).
    k, v : array
        The same rank and layout, with Sk keys and Hkv heads; Hq must be a multiple of Hkv. v has Dv features.
    layout : {"bshd", "bhsd"}
    scale : float, optional
        Default 1/sqrt(D).
    causal : bool
        Row i sees key j when j <= p, its position p = i + q_offset.
    window : (left, right), optional
        Row i sees p - left <= j <= p + right; None leaves that side open.
    q_offset : int or integer array (B,), optional
        Position of row 0 among the keys. Default: kv_len - q_len of the batch entry.
    mask : bool array, broadcastable to (B,Hq,Sq,Sk), optional
        True: may attend.
    bias : float array, broadcastable to (B,Hq,Sq,Sk), optional
        Added to the scores; -inf counts as masked.
    alibi_slopes : float array (Hq,) or (B,Hq), optional
    softcap : float, optional
        The scaled score becomes softcap * tanh(score / softcap).
    sinks : float array (Hq,), optional
        One more logit per head in the denominator, with no value.
    q_lens, kv_lens : integer array (B,), optional
        Valid lengths. Rows from q_len on have out 0 and lse -inf; keys from kv_len on are masked.
    dropout, seed : float, int
        Weights are dropped with this probability, see `dropout_keep`.
    return_lse, return_weights : bool
    dtype : dtype, optional
        None: all results are float64 and unrounded, whatever the dtype of q; that is what an error is
        measured against. Otherwise out is rounded to this dtype, lse and weights to float64 if it is that,
        else to float32.

    Returns
    -------
    out, or a tuple of out, then lse (B,Hq,Sq), then weights (B,Hq,Sq,Sk), as asked for. lse and weights
    drop the axes that q does not have.

    Raises
    ------
    ValueError
        Shapes or values that do not fit. `fastattn.mha` checks more, with better messages.
    """
    q, k, v = np.asarray(q), np.asarray(k), np.asarray(v)
    rank = q.ndim
    qs, ks, vs = (_to_bhsd(name, x, rank, layout) for name, x in (("q", q), ("k", k), ("v", v)))
    n_batch, n_heads, n_q, head_dim = qs.shape
    n_kv_heads, n_k, value_dim = vs.shape[1:]
    if ks.shape != (n_batch, n_kv_heads, n_k, head_dim) or vs.shape[0] != n_batch:
        raise ValueError(f"q, k, v: shapes {q.shape}, {k.shape}, {v.shape} do not fit together")
    if n_heads != n_kv_heads and (n_kv_heads == 0 or n_heads % n_kv_heads):
        raise ValueError(f"k: expected a number of heads that divides Hq = {n_heads}, got {n_kv_heads}")

    score_shape = (n_batch, n_heads, n_q, n_k)
    masks = None if mask is None else np.broadcast_to(np.asarray(mask, bool), score_shape)
    biases = None if bias is None else np.broadcast_to(np.asarray(bias), score_shape)
    slopes = None if alibi_slopes is None else np.broadcast_to(_f64(alibi_slopes), (n_batch, n_heads))
    sink_logits = np.full(n_heads, -np.inf) if sinks is None else np.broadcast_to(_f64(sinks), (n_heads,))
    q_len = _per_batch(q_lens, n_batch, n_q)
    kv_len = _per_batch(kv_lens, n_batch, n_k)
    default_offset = [b - a for a, b in zip(q_len, kv_len, strict=True)]
    offset = default_offset if q_offset is None else _per_batch(q_offset, n_batch)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    left, right = (None, None) if window is None else window

    out = np.zeros((n_batch, n_heads, n_q, value_dim))
    lse = np.full((n_batch, n_heads, n_q), -np.inf)
    weights = np.zeros(score_shape) if return_weights else None
    i = np.arange(n_q)[:, None]  # (Sq,1)
    j = np.arange(n_k)[None, :]  # (1,Sk)

    # NaN and Inf are data here: they propagate as in the formulas, without a warning.
    with np.errstate(all="ignore"):
        for b in range(n_batch):
            for h in range(n_heads):
                g = h // (n_heads // n_kv_heads)  # the key/value head that this query head shares

                allowed = (i < q_len[b]) & (j < kv_len[b])  # (Sq,Sk)
                if causal:
                    allowed &= j - i <= _clip(offset[b])
                if left is not None:
                    allowed &= j - i >= _clip(offset[b] - int(left))
                if right is not None:
                    allowed &= j - i <= _clip(offset[b] + int(right))
                if masks is not None:
                    allowed &= masks[b, h]
                if biases is not None:
                    allowed &= _f64(biases[b, h]) != -np.inf

                score = scale * (_f64(qs[b, h]) @ _f64(ks[b, g]).T)  # (Sq,Sk)
                if softcap is not None:
                    score = softcap * np.tanh(score / softcap)
                if slopes is not None:
                    score = score - slopes[b, h] * np.abs(float(offset[b]) + (i - j))
                if biases is not None:
                    score = score + _f64(biases[b, h])

                weight, row_lse = _softmax(score, allowed, sink_logits[h])
                lse[b, h, : q_len[b]] = row_lse[: q_len[b]]
                if weights is not None:
                    weights[b, h] = weight
                if dropout > 0.0:
                    keep = dropout_keep(n_q, n_k, dropout, seed, b, h)
                    weight = np.where(keep, weight / (1.0 - dropout), np.where(np.isnan(weight), weight, 0.0))
                out[b, h] = _weighted_sum(weight, _f64(vs[b, g]), allowed)

    if rank < 4:
        out, lse = out[0], lse[0]
        weights = None if weights is None else weights[0]
    if rank == 2:
        out, lse = out[0], lse[0]
        weights = None if weights is None else weights[0]
    if rank > 2 and layout == "bshd":
        out = np.ascontiguousarray(out.swapaxes(-3, -2))
    if dtype is not None:
        stats = np.float64 if np.dtype(dtype) == np.float64 else np.float32
        with np.errstate(all="ignore"):
            out, lse = out.astype(dtype), lse.astype(stats)
            weights = None if weights is None else weights.astype(stats)
    results = [out]
    if return_lse:
        results.append(lse)
    if weights is not None:
        results.append(weights)
    return results[0] if len(results) == 1 else tuple(results)


def _softmax(score: Array, allowed: Array, sink: float) -> tuple[Array, Array]:
    """Weights (Sq,Sk) and the logarithm of their denominator (Sq,). Keys not allowed have weight 0."""
    score = np.where(allowed, score, -np.inf)
    # Any finite shift gives the same weights; the largest logit keeps exp from overflowing.
    shift = np.max(score, axis=1, initial=-np.inf)
    shift = np.maximum(shift, sink) if np.isfinite(sink) else shift
    shift = np.where(np.isfinite(shift), shift, 0.0)
    exps = np.exp(score - shift[:, None])
    denominator = exps.sum(axis=1) + np.exp(sink - shift)
    # A row that may attend nothing has weights 0; one whose every allowed score is -inf is 0/0.
    weight = np.where(allowed, exps / denominator[:, None], 0.0)
    return weight, shift + np.log(denominator)


def _weighted_sum(weight: Array, value: Array, allowed: Array) -> Array:
    """weight @ value (Sq,Dv) over the allowed keys only: 0 * NaN of a masked key must not enter."""
    finite = np.isfinite(value)
    out = weight @ np.where(finite, value, 0.0)
    for key in np.flatnonzero(~finite.all(axis=1)):
        terms = weight[:, key, None] * value[None, key, :]  # (Sq,Dv)
        out += np.where(allowed[:, key, None] & ~finite[None, key, :], terms, 0.0)
    return out


def philox4x32(counter: tuple[Any, Any, Any, Any], seed: int) -> tuple[Array, Array, Array, Array]:
    """Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, SC'11): four random uint32 words per counter.

    Parameters
    ----------
    counter : four broadcastable integer arrays
        The 128-bit counter, as four 32-bit words.
    seed : int
        The 64-bit key, its low 32 bits first.

    Returns
    -------
    Four uint32 arrays of the broadcast shape.
    """
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in counter))
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product0 = np.uint64(0xD2511F53) * c0  # 32 x 32 bits: exact in 64
        product1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(key0),
            product1 & low32,
            (product0 >> shift) ^ c3 ^ np.uint64(key1),
            product0 & low32,
        )
        key0 = (key0 + 0x9E3779B9) & 0xFFFFFFFF
        key1 = (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0.astype(np.uint32), c1.astype(np.uint32), c2.astype(np.uint32), c3.astype(np.uint32)


def dropout_keep(n_q: int, n_k: int, dropout: float, seed: int, batch: int, head: int) -> Array:
    """Which weights of one batch entry and query head survive dropout, bool (Sq,Sk).

    Weight (i, j) has the random word j % 4 of counter (j // 4, i, head, batch) and survives when that
    word is at least floor(dropout * 2**32): the same on every kernel and device.

    Raises
    ------
    ValueError
        dropout outside [0, 1), or seed outside [0, 2**64).
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected 0 <= p < 1, got {dropout}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 <= seed < 2**64, got {seed}")
    blocks = np.arange((n_k + 3) // 4)[None, :]
    words = philox4x32((blocks, np.arange(n_q)[:, None], head, batch), seed)
    in_order = np.stack(words, axis=-1).reshape(n_q, 4 * blocks.size)[:, :n_k]
    return np.asarray(in_order >= np.uint32(int(dropout * 2.0**32)))


def _f64(x: Any) -> Array:
    return np.asarray(x).astype(np.float64)


def _to_bhsd(name: str, x: Array, rank: int, layout: str) -> Array:
    """A view as (B,H,S,D), whatever the caller's rank and layout."""
    if x.ndim != rank or rank not in (2, 3, 4):
        raise ValueError(f"{name}: expected rank 4, 3 or 2, the same as q, got shape {x.shape}")
    if layout not in ("bshd", "bhsd"):
        raise ValueError(f'layout: expected "bshd" or "bhsd", got {layout!r}')
    if rank == 2:
        return x[None, None]
    if layout == "bshd":
        x = x.swapaxes(-3, -2)
    return x if rank == 4 else x[None]


def _per_batch(values: Any, n_batch: int, default: int = 0) -> list[int]:
    """One Python int per batch entry from None, an int or an integer array (B,)."""
    array = np.asarray(default if values is None else values)
    return [int(x) for x in np.broadcast_to(array, (n_batch,))]


def _clip(bound: int) -> int:
    """Keeps a bound on j - i inside int64, far beyond any real i and j."""
    return max(-(2**62), min(2**62, bound))
