"""Attention and its gradients in plain NumPy, float64 inside: slow, short, and written to be read.

This is the oracle of the tests and of ``python -m fastattn check``. It follows the definition
line by line, one batch entry and one head at a time, and materialises the Sq x Sk scores::

    score[i, j]  = softcap(scale * q[i] . k[j]) - slope * |p_i - j| + bias[i, j]     p_i = i + q_offset
    weight[i, j] = exp(score[i, j]) / (exp(sink) + sum_j' exp(score[i, j']))         over allowed keys only
    out[i]       = sum_j weight[i, j] * v[j]                                         over allowed keys only

`mha_backward` differentiates these lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from fastattn import _reference_varlen as _varlen
from fastattn._attention import Gradients
from fastattn.masks import Mask

__all__ = ["dropout_keep", "mha", "mha_backward", "mha_varlen", "mha_varlen_backward", "philox4x32"]

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
    mask : bool array, broadcastable to (B,Hq,Sq,Sk), or a Mask of `fastattn.masks`, optional
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
    problem = _Problem(locals())
    out = np.zeros(problem.out_shape)
    lse = np.full(problem.lse_shape, -np.inf)
    weights = np.zeros(problem.score_shape) if return_weights else None

    # NaN and Inf are data here: they propagate as in the formulas, without a warning.
    with np.errstate(all="ignore"):
        for b, h, g in problem.heads():
            pairs = problem.pairs(b, h)
            weight, row_lse, _ = _softmax(pairs.score, pairs.allowed, problem.sinks[h])
            exists = problem.exists(b)
            lse[b, h, exists] = row_lse[exists]
            if weights is not None:
                weights[b, h] = weight
            out[b, h] = _weighted_sum(weight * pairs.keep, _f64(problem.v[b, g]), pairs.allowed)

    out = problem.as_given(out)
    lse = problem.drop_axes(lse)
    weights = None if weights is None else problem.drop_axes(weights)
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


def mha_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any = None,
    lse: Any = None,
    *,
    dlse: Any = None,
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
    need_dbias: bool = True,
    dtype: Any = None,
) -> Gradients:
    """Gradients of ``sum(dout * out) + sum(dlse * lse)``, in float64.

    With w the weights, keep the factor of dropout (0 or 1/(1 - dropout)), s0 the scaled score and c the
    softcap, over allowed pairs (i, j) only (FlashAttention-2, arXiv:2307.08691, section 3.1.2)::

        dv[j]     = sum_i keep[i,j] * w[i,j] * dout[i]
        dw[i, j]  = keep[i,j] * dout[i] . v[j]
        delta[i]  = dout[i] . out[i]                               = sum_j w[i,j] * dw[i,j]
        ds[i, j]  = w[i,j] * (dw[i,j] - delta[i] + dlse[i])        the gradient of score, and of bias
        ds0[i, j] = ds[i,j] * (1 - tanh(s0[i,j] / c)**2)           without softcap ds
        dq[i]     = scale * sum_j ds0[i,j] * k[j]
        dk[j]     = scale * sum_i ds0[i,j] * q[i]
        dslope    = -sum_ij ds[i,j] * |p_i - j|
        dsink     = sum_i exp(sink - lse[i]) * (dlse[i] - delta[i])

    Parameters
    ----------
    dout : array
        Gradient of out, in its shape.
    q, k, v : array
        As in `mha`, and so are the arguments not listed here.
    out, lse : array, optional
        What `mha` returned. None: computed here, in float64 and unrounded; that is what an error is
        measured against. Otherwise w is exp(score - lse), with the given lse, which may be of more keys.
    dlse : array (B,Hq,Sq), optional
        Gradient of lse; without the axes that q does not have.
    need_dbias : bool
    dtype : dtype, optional
        None: all gradients are float64 and unrounded. Otherwise dq, dk, dv are rounded to this dtype, the
        others to the dtype of their argument.

    Returns
    -------
    Gradients
        Each in its argument's shape, None where the argument was not given (dbias: nor asked for). dk and
        dv are summed over the query heads that share them, the others over the axes that broadcast.

    Raises
    ------
    ValueError
        Shapes or values that do not fit. `fastattn.mha_backward` checks more, with better messages.

    Notes
    -----
    Masked pairs contribute nothing, whatever q, k, v and dout hold. A row that may attend nothing has no
    gradient but that of its sink, which is then its lse.
    """
    problem = _Problem(locals())
    douts = problem.as_bhsd("dout", dout)
    outs = None if out is None else problem.as_bhsd("out", out)
    lses = None if lse is None else problem.rows("lse", lse)
    dlses = np.zeros(problem.lse_shape) if dlse is None else problem.rows("dlse", dlse)

    dq, dk, dv = (np.zeros(x.shape) for x in (problem.q, problem.k, problem.v))
    dbias = np.zeros(problem.score_shape) if bias is not None and need_dbias else None
    dslopes = np.zeros(problem.lse_shape[:2])
    dsinks = np.zeros(problem.lse_shape[:2])

    with np.errstate(all="ignore"):
        for b, h, g in problem.heads():
            pairs = problem.pairs(b, h)
            allowed = pairs.allowed
            q_h, k_h, v_h = _f64(problem.q[b, h]), _f64(problem.k[b, g]), _f64(problem.v[b, g])
            dout_h = _f64(douts[b, h])

            weight, row_lse, sink_weight = _softmax(pairs.score, allowed, problem.sinks[h])
            out_h = _weighted_sum(weight * pairs.keep, v_h, allowed) if outs is None else _f64(outs[b, h])
            if lses is not None:
                ratio = _lse_ratio(row_lse, lses[b, h])
                weight = np.where(allowed, weight * ratio[:, None], 0.0)
                sink_weight = sink_weight * ratio

            # No sum over no keys: dout of a row that attends nothing is never seen.
            delta = np.where(allowed.any(axis=1), np.sum(dout_h * out_h, axis=1), 0.0)  # (Sq,)
            # What every logit of the row gets, its sink too, in proportion to its weight.
            drow = _f64(dlses[b, h]) - delta
            dweight = pairs.keep * (dout_h @ v_h.T)  # (Sq,Sk)
            dscore = np.where(allowed, weight * (dweight + drow[:, None]), 0.0)
            dscore0 = np.where(allowed, dscore * pairs.cap_slope, 0.0)

            dv[b, g] += _weighted_sum((weight * pairs.keep).T, dout_h, allowed.T)
            dq[b, h] = problem.scale * _weighted_sum(dscore0, k_h, allowed)
            dk[b, g] += problem.scale * _weighted_sum(dscore0.T, q_h, allowed.T)
            if dbias is not None:
                dbias[b, h] = dscore
            dslopes[b, h] = -np.sum(dscore * pairs.distance)
            dsinks[b, h] = np.sum((sink_weight * drow)[problem.exists(b)])

        grads = Gradients(
            problem.as_given(dq),
            problem.as_given(dk),
            problem.as_given(dv),
            None if dbias is None else _sum_to(dbias, np.shape(bias)),
            None if alibi_slopes is None else _sum_to(dslopes, np.shape(alibi_slopes)),
            None if sinks is None else _sum_to(dsinks, np.shape(sinks)),
        )
        if dtype is None:
            return grads
        dtypes = [dtype] * 3 + [np.asarray(x).dtype for x in (bias, alibi_slopes, sinks)]
        return Gradients(*(None if x is None else x.astype(t) for x, t in zip(grads, dtypes, strict=True)))


def mha_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_q: Any,
    cu_kv: Any = None,
    *,
    layout: str = "bshd",
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """`mha` of packed entries, by way of a padded batch of them.

    Parameters
    ----------
    q, k, v : array
        (Tq,Hq,D), (Tk,Hkv,D), (Tk,Hkv,Dv); heads first with ``layout="bhsd"``.
    cu_q, cu_kv : integer array (B + 1,)
        Entry b has the rows ``cu_q[b]:cu_q[b + 1]`` and the keys of cu_kv, by default cu_q.
    return_lse : bool
    **options
        As in `mha`, but q_lens and return_weights. mask and bias broadcast to (Hq,Tq,Tk), of which an entry
        reads its own block; what `mha` has for each batch entry is here for each entry.

    Returns
    -------
    out, or (out, lse): (Tq,Hq,Dv) in q's layout, (Hq,Tq). Rows outside of all entries are 0 and -inf.

    Raises
    ------
    ValueError
        Shapes, bounds or values that do not fit.
    """
    packed = _varlen.Packed(q, k, cu_q, cu_kv, layout)
    out, lse = _varlen.forward(mha, packed, q, k, v, {"layout": layout, **options})
    return (out, lse) if return_lse else out


def mha_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_q: Any,
    cu_kv: Any = None,
    *,
    dlse: Any = None,
    layout: str = "bshd",
    **options: Any,
) -> Gradients:
    """Gradients of `mha_varlen`, by way of a padded batch.

    Parameters
    ----------
    dout, out, lse, dlse : array
        As in `mha_backward`, in the shapes of `mha_varlen`'s results; out, lse and dlse may be None.
    q, k, v, cu_q, cu_kv, layout, **options
        As in `mha_varlen`, and `need_dbias` and `dtype` as in `mha_backward`.

    Returns
    -------
    Gradients
        As `mha_backward`; 0 outside of all entries, and for pairs of two entries.

    Raises
    ------
    ValueError
        Shapes, bounds or values that do not fit.
    """
    packed = _varlen.Packed(q, k, cu_q, cu_kv, layout)
    given = {"layout": layout, **options}
    grads = _varlen.backward(mha_backward, packed, [dout, q, out], [k, v], [lse, dlse], given)
    if grads.dbias is not None:
        dbias = _sum_to(grads.dbias.astype(np.float64), np.shape(options["bias"]))
        grads = grads._replace(dbias=dbias.astype(grads.dbias.dtype))
    return grads


class _Pairs(NamedTuple):
    """What `mha` and `mha_backward` know of the (query, key) pairs of one batch entry and head: (Sq,Sk)."""

    allowed: Array
    distance: Array  # |p_i - j|
    score: Array  # of allowed pairs; of the others anything
    cap_slope: Array  # derivative of softcap at the scaled score; 1 without one
    keep: Array  # factor of the weight by dropout: 0 or 1/(1 - dropout)


class _Problem:
    """The arguments of `mha`, checked and in one form: q, k, v (B,H,S,D), the rest as the loops need it."""

    def __init__(self, given: dict[str, Any], dtype: Any = np.float64) -> None:
        # Of the computation. `check` asks for narrower ones, to see by how much they are off.
        self.dtype = np.dtype(dtype)
        x = SimpleNamespace(**given)
        q, k, v = np.asarray(x.q), np.asarray(x.k), np.asarray(x.v)
        self.rank, self.layout = q.ndim, x.layout
        self.q, self.k, self.v = (
            _to_bhsd(name, array, q.ndim, x.layout) for name, array in (("q", q), ("k", k), ("v", v))
        )
        n_batch, n_heads, n_q, head_dim = self.q.shape
        n_kv_heads, n_k, value_dim = self.v.shape[1:]
        if self.k.shape != (n_batch, n_kv_heads, n_k, head_dim) or self.v.shape[0] != n_batch:
            raise ValueError(f"q, k, v: shapes {q.shape}, {k.shape}, {v.shape} do not fit together")
        if n_heads != n_kv_heads and (n_kv_heads == 0 or n_heads % n_kv_heads):
            raise ValueError(f"k: expected a number of heads that divides Hq = {n_heads}, got {n_kv_heads}")

        self.out_shape = (n_batch, n_heads, n_q, value_dim)
        self.lse_shape = (n_batch, n_heads, n_q)
        self.score_shape = (n_batch, n_heads, n_q, n_k)
        self.scale = 1.0 / math.sqrt(head_dim) if x.scale is None else float(x.scale)
        self.causal, self.dropout, self.seed = x.causal, x.dropout, x.seed
        self.softcap = None if x.softcap is None else float(x.softcap)
        self.window = (None, None) if x.window is None else x.window
        if isinstance(x.mask, Mask):
            self.mask: Any = x.mask
            x.mask._check_sizes(n_q, n_k)
        else:
            self.mask = None if x.mask is None else np.broadcast_to(np.asarray(x.mask, bool), self.score_shape)
        self.bias = None if x.bias is None else np.broadcast_to(np.asarray(x.bias), self.score_shape)
        slopes = x.alibi_slopes
        self.slopes = None if slopes is None else self.wide(np.broadcast_to(slopes, (n_batch, n_heads)))
        self.sinks = self.wide(np.broadcast_to(-np.inf if x.sinks is None else x.sinks, (n_heads,)))
        self.q_len = _per_batch(x.q_lens, n_batch, n_q)
        self.kv_len = _per_batch(x.kv_lens, n_batch, n_k)
        default_offset = [b - a for a, b in zip(self.q_len, self.kv_len, strict=True)]
        self.offset = default_offset if x.q_offset is None else _per_batch(x.q_offset, n_batch)

    def wide(self, x: Any) -> Array:
        """In the dtype of sums and weights."""
        return np.asarray(x).astype(np.float64 if self.dtype == np.float64 else np.float32)

    def rounded(self, x: Array) -> Array:
        """To the dtype of the computation and back."""
        return x if self.dtype == np.float64 else self.wide(x.astype(self.dtype))

    def heads(self) -> Iterator[tuple[int, int, int]]:
        """Every batch entry and query head (b, h), with the key/value head g that it shares."""
        n_batch, n_heads = self.lse_shape[:2]
        for b in range(n_batch):
            for h in range(n_heads):
                yield b, h, h // (n_heads // self.k.shape[1])

    def exists(self, b: int) -> Array:
        """Which rows are no padding, bool (Sq,)."""
        return np.arange(self.lse_shape[2]) < self.q_len[b]

    def pairs(self, b: int, h: int) -> _Pairs:
        n_q, n_k = self.score_shape[2:]
        i = np.arange(n_q)[:, None]  # (Sq,1)
        j = np.arange(n_k)[None, :]  # (1,Sk)
        offset = self.offset[b]

        allowed = (i < self.q_len[b]) & (j < self.kv_len[b])  # (Sq,Sk)
        if self.causal:
            allowed &= j - i <= _clip(offset)
        left, right = self.window
        if left is not None:
            allowed &= j - i >= _clip(offset - int(left))
        if right is not None:
            allowed &= j - i <= _clip(offset + int(right))
        if isinstance(self.mask, Mask):
            shape = self.score_shape[1:]
            allowed &= self.mask._of_entry(b, shape, self.offset[b], self.kv_len[b])[h]
        elif self.mask is not None:
            allowed &= self.mask[b, h]
        if self.bias is not None:
            allowed &= _f64(self.bias[b, h]) != -np.inf

        g = h // (self.q.shape[1] // self.k.shape[1])
        score = self.rounded(self.scale * (self.wide(self.q[b, h]) @ self.wide(self.k[b, g]).T))
        cap_slope = np.ones_like(score)
        if self.softcap is not None:
            tanh = np.tanh(score / self.softcap)
            score, cap_slope = self.softcap * tanh, 1.0 - tanh * tanh
        distance = self.wide(np.abs(float(offset) + (i - j)))
        if self.slopes is not None:
            score = score - self.slopes[b, h] * distance
        if self.bias is not None:
            score = score + self.wide(self.bias[b, h])

        keep = np.ones_like(score)
        if self.dropout > 0.0:
            keep = self.wide(dropout_keep(n_q, n_k, self.dropout, self.seed, b, h) / (1.0 - self.dropout))
        return _Pairs(allowed, distance, score, cap_slope, keep)

    def as_bhsd(self, name: str, x: Any) -> Array:
        """dout or out as (B,Hq,Sq,Dv)."""
        bhsd = _to_bhsd(name, np.asarray(x), self.rank, self.layout)
        if bhsd.shape != self.out_shape:
            raise ValueError(f"{name}: expected (B,Hq,Sq,Dv) = {self.out_shape}, got {bhsd.shape}")
        return bhsd

    def rows(self, name: str, x: Any) -> Array:
        """lse or dlse as (B,Hq,Sq)."""
        x = np.asarray(x)
        x = x if x.dtype == np.float32 else _f64(x)
        expected = self.lse_shape[4 - self.rank :]
        if x.shape != expected:
            raise ValueError(f"{name}: expected {expected}, got {x.shape}")
        return np.reshape(x, self.lse_shape)

    def as_given(self, x: Array) -> Array:
        """(B,H,S,D) in the caller's rank and layout."""
        x = self.drop_axes(x)
        return np.ascontiguousarray(x.swapaxes(-3, -2)) if self.rank > 2 and self.layout == "bshd" else x

    def drop_axes(self, x: Array) -> Array:
        """(B,H,...) without the axes that q does not have."""
        return x if self.rank == 4 else x[0] if self.rank == 3 else x[0, 0]


def _softmax(score: Array, allowed: Array, sink: float) -> tuple[Array, Array, Array]:
    """Weights (Sq,Sk), the logarithm of their denominator (Sq,), and the weight of the sink (Sq,).

    Keys not allowed have weight 0, and so has a sink of -inf; one of +inf has all the weight.
    """
    score = np.where(allowed, score, -np.inf)
    # Any finite shift gives the same weights; the largest logit keeps exp from overflowing.
    shift = np.max(score, axis=1, initial=-np.inf)
    shift = np.maximum(shift, sink) if np.isfinite(sink) else shift
    shift = np.where(np.isfinite(shift), shift, 0.0)
    exps = np.exp(score - shift[:, None])
    sink_exp = np.exp(sink - shift)
    denominator = exps.sum(axis=1) + sink_exp
    # A row that may attend nothing has weights 0; one whose every allowed score is -inf is 0/0.
    weight = np.where(allowed, exps / denominator[:, None], 0.0)
    sink_weight = np.full(shift.shape, float(sink > 0)) if np.isinf(sink) else sink_exp / denominator
    return weight, shift + np.log(denominator), sink_weight


def _lse_ratio(own: Array, given: Array) -> Array:
    """exp(own - given) (Sq,): what exp(score - given) is to the weight.

    1 where given is so large that the log of a few keys is lost in its rounding, and agrees as far as that
    tells: beside a bias of -1e9, say, it knows nothing of the number of keys.
    """
    info, size = np.finfo(given.dtype), np.abs(given)
    coarse = (info.eps * size > 1 / 1024) & (np.abs(own - given) <= 4 * info.eps * size)
    return np.where((own == given) | coarse | (size == info.max), 1.0, np.exp(own - given))


def _weighted_sum(weight: Array, value: Array, allowed: Array) -> Array:
    """weight @ value over the allowed pairs only: 0 * NaN of a masked pair must not enter.

    weight and allowed (M,N), value (N,F); weight is 0 where not allowed.
    """
    finite = np.asarray(np.isfinite(value).all(axis=1))
    out = np.where(finite, weight, 0.0) @ np.where(finite[:, None], value, 0.0)
    for n in np.flatnonzero(~finite):
        out += np.where(allowed[:, n, None], weight[:, n, None] * value[n], 0.0)
    return np.asarray(out)


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sums x over the axes along which an array of this shape was broadcast to it."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    ones = tuple(n for n, size in enumerate(shape) if size == 1)
    return np.asarray(x.sum(axis=ones, keepdims=True))


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
