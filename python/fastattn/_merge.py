"""Attention over disjoint sets of keys, put together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastattn import _core


def merge_states(outs: Iterable[Any], lses: Iterable[Any], *, layout: str = "bshd", out: Any = None) -> Any:
    """Exact attention over the union of disjoint sets of keys, from out and lse of each.

    With m the largest lse and w = exp(lse - m): ``out = sum(w * outs) / sum(w)``, ``lse = m + log(sum(w))``
    [1]_ [2]_. Sums are taken in float32 (float64 for float64), in the order given, and rounded once.

    Parameters
    ----------
    outs : sequence of arrays, or an array with a leading axis
        out of each part, all of one shape and dtype: (B, Sq, Hq, Dv), in the layout, or with fewer axes as
        `mha` has them; of packed entries (Tq, Hq, Dv). Parts of ``out_dtype="float32"`` are not rounded.
    lses : sequence of arrays, or an array with a leading axis
        lse of each part, (B, Hq, Sq): float64 for float64, else float32.
    layout : {"bshd", "bhsd"}
        Of outs and of the result.
    out : array, optional
        Written in place and returned: outs' shape; outs' dtype or another that is summed in the same one.

    Returns
    -------
    out : array
        Of outs' kind, dtype and layout.
    lse : array (B, Hq, Sq)

    Raises
    ------
    TypeError
        Not an array, dtypes that differ, a tensor that requires grad.
    ValueError
        No part, numbers of parts or shapes that differ, `out` overlapping a part.
    UnsupportedError
        Arrays on a GPU.

    Notes
    -----
    A part with lse -inf counts for nothing, whatever its out holds; without any other part the result is 0 and
    -inf. Sinks belong into one part alone.

    References
    ----------
    .. [1] Milakov, Gimelshein: Online normalizer calculation for softmax, 2018.
    .. [2] Dao et al.: Flash-Decoding for long-context inference, 2023.

    Examples
    --------
    >>> import numpy as np, fastattn
    >>> q, k = np.random.rand(1, 4, 8, 64), np.random.rand(1, 100, 8, 64)
    >>> parts = [fastattn.mha(q, x, x, return_lse=True) for x in (k[:, :30], k[:, 30:])]
    >>> out, lse = fastattn.merge_states(*zip(*parts))
    >>> np.allclose(out, fastattn.mha(q, k, k))
    True
    """
    return _core.merge_states(tuple(outs), tuple(lses), layout, out)
