"""Packed entries for `fastattn.reference`: a padded batch of the same entries, computed there, and packed again."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from fastattn._attention import Gradients
from fastattn.masks import Mask

Array = np.ndarray[Any, Any]


class Packed:
    """Entries of arrays without a batch axis, by their bounds."""

    def __init__(self, q: Any, k: Any, cu_q: Any, cu_kv: Any, layout: str) -> None:
        if np.ndim(q) != 3 or layout not in ("bshd", "bhsd"):
            raise ValueError(f"q: expected 3 axes in 'bshd' or 'bhsd', got shape {np.shape(q)} in {layout!r}")
        self.seq, head = (0, 1) if layout == "bshd" else (1, 0)
        self.heads, self.rows, self.keys = (np.shape(q)[head], np.shape(q)[self.seq], np.shape(k)[self.seq])
        self.cu_q = self._bounds("cu_q", cu_q, self.rows)
        self.cu_kv = self.cu_q if cu_kv is None else self._bounds("cu_kv", cu_kv, self.keys)
        if self.cu_kv.shape != self.cu_q.shape or self.cu_kv[-1] > self.keys:
            raise ValueError("cu_kv: expected as many bounds as cu_q, of at most Tk")
        self.q_lens, self.kv_lens = np.diff(self.cu_q), np.diff(self.cu_kv)

    @staticmethod
    def _bounds(name: str, cu: Any, size: int) -> Array:
        if cu is None or np.asarray(cu).dtype.kind not in "iu":
            raise ValueError(f"{name}: expected (B + 1,) integers")
        bounds: Array = np.asarray(cu).astype(np.int64)
        wrong = bounds.ndim != 1 or bounds.size == 0
        if wrong or bounds[0] < 0 or bounds[-1] > size or np.any(np.diff(bounds) < 0):
            raise ValueError(f"{name}: expected (B + 1,) bounds that do not decrease, from 0 to {size}")
        return bounds

    def _pad(self, x: Array, cu: Array, axis: int) -> list[Array]:
        """Each entry's part along an axis, with zeros up to the longest."""
        longest = int(np.diff(cu).max(initial=0))
        parts = (np.take(x, range(a, b), axis) for a, b in pairwise(cu))
        room = [(0, 0)] * x.ndim
        return [np.pad(y, [*room[:axis], (0, longest - y.shape[axis]), *room[axis + 1 :]]) for y in parts]

    def _stack(self, entries: list[Array], like: Array) -> Array:
        return np.stack(entries) if entries else np.zeros((0, *like.shape), like.dtype)

    def rows_of(self, x: Any, name: str = "q") -> Array:
        """q, out and their gradients: (B, ...) of the longest entry's rows."""
        x = self._checked(name, x, 3, self.seq, self.rows)
        return self._stack(self._pad(x, self.cu_q, self.seq), x)

    def keys_of(self, x: Any, name: str = "k") -> Array:
        x = self._checked(name, x, 3, self.seq, self.keys)
        return self._stack(self._pad(x, self.cu_kv, self.seq), x)

    def stats_of(self, x: Any, name: str = "lse") -> Array:
        """lse and its gradient: (Hq, Tq) to (B, Hq, Sq)."""
        x = self._checked(name, x, 2, 1, self.rows)
        return self._stack(self._pad(x, self.cu_q, 1), x)

    @staticmethod
    def _checked(name: str, given: Any, rank: int, axis: int, size: int) -> Array:
        x: Array = np.asarray(given)
        if x.ndim != rank or x.shape[axis] != size:
            raise ValueError(f"{name}: expected {rank} axes with {size} on axis {axis}, got shape {x.shape}")
        return x

    def pairs_of(self, x: Any) -> Array:
        """mask and bias: broadcast to (Hq, Tq, Tk), each entry's own block of it."""
        x = np.broadcast_to(x, (self.heads, self.rows, self.keys))
        blocks = []
        for b in range(self.q_lens.size):
            mine = x[:, self.cu_q[b] : self.cu_q[b + 1], self.cu_kv[b] : self.cu_kv[b + 1]]
            wide = (longest - n for longest, n in zip(self._longest(), mine.shape[1:], strict=True))
            blocks.append(np.pad(mine, [(0, 0), *((0, n) for n in wide)]))
        return self._stack(blocks, x)

    def _longest(self) -> tuple[int, int]:
        return int(self.q_lens.max(initial=0)), int(self.kv_lens.max(initial=0))

    def packed(self, padded: Array, cu: Array, size: int, axis: int, fill: float = 0.0) -> Array:
        """The way back; `fill` outside of all entries."""
        shape = list(padded.shape[1:])
        shape[axis] = size
        x = np.full(shape, fill, padded.dtype)
        for b in range(cu.size - 1):
            to, length = [slice(None)] * len(shape), int(cu[b + 1] - cu[b])
            to[axis] = slice(int(cu[b]), int(cu[b + 1]))
            x[tuple(to)] = np.take(padded[b], range(length), axis)
        return x

    def packed_pairs(self, padded: Array) -> Array:
        x = np.zeros((self.heads, self.rows, self.keys), padded.dtype)
        for b, (n, m) in enumerate(zip(self.q_lens, self.kv_lens, strict=True)):
            x[:, self.cu_q[b] : self.cu_q[b + 1], self.cu_kv[b] : self.cu_kv[b + 1]] = padded[b, :, :n, :m]
        return x

    def options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Of the call on the padded batch."""
        options = dict(given)
        for name in ("mask", "bias"):
            if options.get(name) is not None and not isinstance(options[name], Mask):
                options[name] = self.pairs_of(options[name])
        for name in ("q_lens", "return_weights"):
            if options.pop(name, None) is not None:
                raise ValueError(f"{name}: expected none for packed entries")
        if options.get("kv_lens") is None:
            options["kv_lens"] = self.kv_lens
        lens = np.broadcast_to(options["kv_lens"], self.kv_lens.shape)
        if np.any(lens < 0) or np.any(lens > self.kv_lens):
            raise ValueError(f"kv_lens: expected lengths from 0 to {self.kv_lens}, got {lens}")
        if isinstance(options.get("mask"), Mask):
            options["mask"] = self.blocks_of(options["mask"], lens, options.get("q_offset"))
        return options | {"q_lens": self.q_lens}

    def blocks_of(self, mask: Mask, kv_lens: Array, q_offset: Any) -> Array:
        """A Mask as bool (B, Hq, Sq, Sk): its rows are the packed ones, its keys those of the entry."""
        offsets = kv_lens - self.q_lens if q_offset is None else np.broadcast_to(q_offset, kv_lens.shape)
        most_rows, most_keys = self._longest()
        x = np.zeros((self.q_lens.size, self.heads, most_rows, most_keys), bool)
        for b, (rows, n_keys) in enumerate(zip(self.q_lens, self.kv_lens, strict=True)):
            shape = (self.heads, int(rows), int(n_keys))
            x[b, :, :rows, :n_keys] = mask._of_entry(b, shape, int(offsets[b]), int(kv_lens[b]), int(self.cu_q[b]))
        return x


def forward(mha: Callable[..., Any], x: Packed, q: Any, k: Any, v: Any, given: dict[str, Any]) -> Any:
    out, lse = mha(x.rows_of(q), x.keys_of(k), x.keys_of(v, "v"), **x.options(given), return_lse=True)
    return x.packed(out, x.cu_q, x.rows, x.seq), x.packed(lse, x.cu_q, x.rows, 1, -np.inf)


def backward(
    mha_backward: Callable[..., Gradients], x: Packed, rows: list[Any], keys: list[Any], stats: list[Any],
    given: dict[str, Any],
) -> Gradients:  # fmt: skip
    """rows: dout, q, out; keys: k, v; stats: lse, dlse. What is None stays None."""
    dout, q, out = (None if y is None else x.rows_of(y, n) for n, y in zip(("dout", "q", "out"), rows, strict=True))
    k, v = (x.keys_of(y, n) for n, y in zip("kv", keys, strict=True))
    lse, dlse = (None if y is None else x.stats_of(y, n) for n, y in zip(("lse", "dlse"), stats, strict=True))
    grads = mha_backward(dout, q, k, v, out, lse, dlse=dlse, **x.options(given))
    return grads._replace(
        dq=x.packed(grads.dq, x.cu_q, x.rows, x.seq),
        dk=x.packed(grads.dk, x.cu_kv, x.keys, x.seq),
        dv=x.packed(grads.dv, x.cu_kv, x.keys, x.seq),
        dbias=None if grads.dbias is None else x.packed_pairs(grads.dbias),
    )
