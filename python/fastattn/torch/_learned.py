"""Gradients of the numbers that may be learned: scale and softcap, each one for all heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastattn.masks import Mask

# Pairs of a query and a key, of all heads together, that `softcap_gradient` holds at once, in float64.
_PAIRS_AT_ONCE = 2**20
_SMALL_SCALE = 2.0**-10


def fold_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float, float]:
    """(q * factor, scale / factor, factor), for a backward whose dq tells the gradient of scale.

    dq is scale times the sum that is asked for. Where scale is small, or 0, too little of the sum would be
    left in dq; then q takes the power of two of scale, which rounds nothing.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if abs(scale) >= _SMALL_SCALE:
        return q, scale, 1.0
    rest, exponent = math.frexp(scale)
    factor = 0.0 if scale == 0.0 else 2.0**exponent
    return q * factor, 1.0 if scale == 0.0 else rest, factor


def scale_gradient(q: Tensor, dq: Tensor, scale: float) -> float:
    """sum(dS * (q . k)) over all pairs, which is sum(q * dq) / scale, since dq = scale * sum(dS * k)."""
    # Rows that do not take part have dq = 0, and may hold anything.
    products = torch.where(dq == 0, 0.0, q.double() * dq.double())
    return _total(products) / scale


def softcap_gradient(
    forward: Callable[..., Any],
    lend: Callable[[Tensor], Any],
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    keywords: dict[str, Any],
) -> float:
    """sum(dS * d(c tanh(s / c)) / dc) over all pairs, in float64, for a few rows of queries at a time.

    `keywords` are those of the core, for q, k, v as they are. The weights are the core's, and so all that
    restricts or moves the scores is its business; only the rows of a block are cut out here.
    """
    layout, cap = keywords["layout"], keywords["softcap"]
    scale = 1.0 / math.sqrt(q.shape[-1]) if (given := keywords.get("scale")) is None else given
    q, k, v, out, dout = (_heads_first(x, layout) for x in (q, k, v, out, dout))
    (n_batch, heads, n_q, _), (_, kv_heads, n_k, _) = q.shape, k.shape
    if q.numel() == 0 or k.numel() == 0:
        return 0.0
    group = heads // kv_heads

    def grouped(x: Tensor) -> Tensor:  # (B, Hq, rows, n) to (B, Hkv, G, rows, n), float64
        return x.double().reshape(n_batch, kv_heads, group, *x.shape[2:])

    keys, values = (x.double().unsqueeze(2).transpose(-1, -2) for x in (k, v))
    rows = max(1, _PAIRS_AT_ONCE // (n_batch * heads * n_k))
    lent_k, lent_v = lend(k), lend(v[..., :1])
    total = 0.0
    # Autocast would round the products.
    with torch.autocast(q.device.type, enabled=False):
        for first in range(0, n_q, rows):
            block = slice(first, min(first + rows, n_q))
            _, weights = forward(
                lend(q[:, :, block]), lent_k, lent_v, **_of_rows(keywords, block, n_q, n_k), return_weights=True
            )
            weight = grouped(torch.as_tensor(weights, device=q.device))
            douts = grouped(dout[:, :, block])
            delta = (douts * grouped(out[:, :, block])).sum(-1, keepdim=True)
            if dlse is not None:
                delta = delta - grouped(dlse.reshape(n_batch, heads, n_q)[:, :, block, None])
            dscore = douts @ values
            if keywords["dropout"] > 0:
                dscore *= _kept(keywords, block, weight)
            dscore.sub_(delta).mul_(weight)
            # From 20 on tanh is 1, and its derivative 0: where the score is infinite too.
            share = (grouped(q[:, :, block]) @ keys).mul_(scale / cap).clamp_(-64.0, 64.0)
            capped = share.tanh()
            slope = torch.addcmul(capped, share, (capped * capped).sub_(1.0))
            # Pairs that are masked may hold anything.
            total += _total(slope.mul_(dscore).masked_fill_(weight == 0, 0.0))
    return total


def _total(x: Tensor) -> float:
    """The sum, in an order that the number of threads does not change."""
    rows = x.sum(-1)
    return float(np.sum(rows.numpy())) if rows.is_cpu else float(rows.sum())


def _heads_first(x: Tensor, layout: str) -> Tensor:
    """A view (B, H, S, features)."""
    if x.dim() == 2:
        return x[None, None]
    x = x if layout == "bhsd" else x.transpose(-3, -2)
    return x if x.dim() == 4 else x[None]


def _of_rows(keywords: dict[str, Any], block: slice, n_q: int, n_k: int) -> dict[str, Any]:
    """The core's keywords for some rows alone, heads first, without dropout."""
    first, size = block.start, block.stop - block.start
    # The kernel is any one that gives weights, on the same device.
    mine = {name: x for name, x in keywords.items() if name not in ("dropout", "seed", "kernel")}
    for name in ("mask", "bias"):
        x = mine.get(name)
        if isinstance(x, Mask):
            mine[name] = x._of_rows(block.start, block.stop)
        elif x is not None and len(x.shape) > 1 and x.shape[-2] > 1:
            mine[name] = x[..., block, :]
    q_len, kv_len = (
        _int64(mine[name]) if mine.get(name) is not None else n for name, n in (("q_lens", n_q), ("kv_lens", n_k))
    )
    offset = kv_len - q_len if mine.get("q_offset") is None else mine["q_offset"]
    most = 2**63 - 1 - first
    if isinstance(offset, int):
        mine["q_offset"] = min(offset, most) + first
    else:
        mine["q_offset"] = _int64(offset).clamp(max=most) + first
    if isinstance(q_len, Tensor):
        mine["q_lens"] = (q_len - first).clamp(0, size)
    return mine | {"layout": "bhsd"}


def _int64(x: Any) -> Tensor:
    return torch.as_tensor(x).to(torch.int64)


def _kept(keywords: dict[str, Any], block: slice, like: Tensor) -> Tensor:
    """1 / (1 - dropout) for the weights that dropout keeps, else 0, in the shape of `like`."""
    from fastattn.reference import philox4x32

    n_batch, heads, n_k = like.shape[0], like.shape[1] * like.shape[2], like.shape[-1]
    words = philox4x32(
        (
            np.arange((n_k + 3) // 4),
            np.arange(block.start, block.stop)[:, None],
            np.arange(heads)[:, None, None],
            np.arange(n_batch)[:, None, None, None],
        ),
        keywords["seed"],
    )
    keep = np.stack(words, axis=-1).reshape(n_batch, heads, block.stop - block.start, -1)[..., :n_k]
    p = keywords["dropout"]
    factors = np.where(keep >= np.uint32(int(p * 2.0**32)), 1.0 / (1.0 - p), 0.0)
    return torch.from_numpy(factors).to(like.device).reshape(like.shape)
