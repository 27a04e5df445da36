"""Masks without a place for every pair: which keys each row may attend, in O(S) memory.

``mask=`` of `fastattn.mha` and its kin takes a `Mask` as well as a bool array. What is hidden is neither read nor
computed, so the time follows the pairs that are left. A mask comes on top of causal, window and lengths: a pair
must be allowed by all of them. Rows are numbered as those of q, keys as those of the entry, and row i stands at the
position p = i + q_offset.

    fastattn.mha(q, k, v, causal=True, mask=masks.documents(ids))
    fastattn.mha(q, k, v, mask=masks.sinks_window(4, 1023) & masks.documents(ids))
"""

from __future__ import annotations

from operator import index as as_integer
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Mask", "blocks", "chunks", "documents", "keys", "prefix_lm", "ranges", "sinks_window", "tail", "tree"]

Array = np.ndarray[Any, Any]
_MOST_CONDITIONS = 8
_FAR = 2**62
_LISTS, _PREFIX, _CHUNKS, _SINKS_WINDOW = range(4)  # as MaskCondition::Kind of the C++ API
_NO_LIST = np.zeros((1, 1, 1), np.int64), np.zeros(2, np.int64), np.zeros((0, 2), np.int64)


class _Condition(NamedTuple):
    """What one constructor says; see `MaskCondition` of the C++ API, whose fields these are."""

    kind: int
    which: Array = _NO_LIST[0]  # list of a row: `index` there
    starts: Array = _NO_LIST[1]
    spans: Array = _NO_LIST[2]
    lengths: Array = np.zeros((), np.int64)
    row_block: int = 1
    kv_heads: bool = False  # the heads of index are those of k
    from_end: bool = False  # -1: the entry's last key
    exact: bool = False  # the call must have the first key of each block of `size` keys
    least_keys: int = 0
    most_keys: int = 2**63 - 1
    size: int = 1
    keep: int = 0
    left: int = 0

    def to_words(self) -> list[Array]:
        """The fields in order, sizes in place of arrays, and then these."""
        arrays = (self.which, self.starts, self.spans, self.lengths)
        sizes = (*self.which.shape, self.starts.size, self.spans.shape[0], self.lengths.ndim, self.lengths.size)
        head = np.array([self.kind, *sizes, *map(int, self[5:])], np.int64)
        return [head, *(np.ascontiguousarray(x, np.int64).ravel() for x in arrays)]

    @classmethod
    def of_words(cls, words: Array, at: int) -> tuple[_Condition, int]:
        head = [int(x) for x in words[at : at + 17]]
        at += 17
        arrays = []
        for shape in (head[1:4], (head[4],), (head[5], 2), (head[7],) * head[6]):
            size = int(np.prod(shape))
            arrays.append(words[at : at + size].reshape(shape))
            at += size
        flags = (bool(x) for x in head[9:12])
        fields: Any = (head[0], *arrays, head[8], *flags, *head[12:])
        return cls(*fields), at

    def to_bool(self, rows: int, n_keys: int, offset: int, kv_len: int, first_row: int) -> Array:
        """(B or 1, heads or 1, rows, n_keys), for an entry of kv_len keys whose rows begin at first_row."""
        j = np.arange(n_keys)
        p = np.arange(rows)[:, None] + offset
        if self.kind == _PREFIX:
            allowed: Array = (j < self.lengths.reshape(-1, 1, 1, 1)) | (j <= p)
            return allowed
        if self.kind == _CHUNKS:
            allowed = j // self.size == p // self.size
            return allowed[None, None]
        if self.kind == _SINKS_WINDOW:
            allowed = (j < self.keep) | ((j >= p - self.left) & (j <= p))
            return allowed[None, None]
        edges = np.zeros((self.starts.size - 1, n_keys + 1), np.int8)
        owner = np.repeat(np.arange(self.starts.size - 1), np.diff(self.starts))
        begin, end = np.clip(self.spans + (kv_len if self.from_end else 0), 0, n_keys).T
        np.add.at(edges, (owner, begin), 1)
        np.add.at(edges, (owner, end), -1)
        lists = np.cumsum(edges[:, :-1], axis=1, dtype=np.int8).astype(bool)
        of_row = (first_row + np.arange(rows)) // self.row_block
        picked: Array = lists[self.which[:, :, of_row if self.which.shape[2] != 1 else of_row * 0]]
        return picked

    def check_sizes(self, rows: int, n_keys: int) -> None:
        if self.kind != _LISTS:
            return
        if self.exact and np.any(self.spans - self.size >= n_keys):
            raise ValueError(f"Sk: the mask selects key {int(self.spans.max()) - self.size}, got {n_keys} keys")
        if not self.least_keys <= n_keys <= self.most_keys:
            raise ValueError(f"Sk: expected {self._sizes()} keys, as the mask has, got {n_keys}")
        found = self.which.shape[2]
        if found != 1 and found != -(-rows // self.row_block):
            raise ValueError(f"Sq: expected rows for {found} lists of {self.row_block} rows, got {rows}")

    def _sizes(self) -> str:
        same = self.least_keys == self.most_keys
        return str(self.most_keys) if same else f"{self.least_keys} to {self.most_keys}"


class Mask:
    """Which keys each row may attend. Made by the functions of this module; immutable.

    ``m1 & m2`` allows what both allow. Arrays that a mask was made of are copied.

    Attributes
    ----------
    nbytes : int
        What it holds.
    """

    __slots__ = ("__weakref__", "_words")
    _words: Array  # int64: all of it, as C++, PyTorch's operators and XLA's programs take it

    def __init__(self, conditions: tuple[_Condition, ...]) -> None:
        parts = [np.array([len(conditions)], np.int64)]
        for condition in conditions:
            parts += condition.to_words()
        self._hold(np.concatenate(parts))

    @classmethod
    def _of_words(cls, words: Array) -> Mask:
        mask = cls.__new__(cls)
        mask._hold(words)
        return mask

    def _hold(self, words: Array) -> None:
        words.setflags(write=False)
        object.__setattr__(self, "_words", words)

    @property
    def _fastattn_words(self) -> Array:
        """What the compiled module reads."""
        return self._words

    @property
    def _conditions(self) -> tuple[_Condition, ...]:
        found, at = [], 1
        for _ in range(int(self._words[0])):
            condition, at = _Condition.of_words(self._words, at)
            found.append(condition)
        return tuple(found)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Mask is immutable: cannot set {name}")

    def __copy__(self) -> Mask:
        return self

    def __deepcopy__(self, memo: Any) -> Mask:
        return self

    def __reduce__(self) -> Any:
        return Mask._of_words, (np.array(self._words),)

    def __and__(self, other: Any) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        conditions = self._conditions + other._conditions
        if len(conditions) > _MOST_CONDITIONS:
            raise ValueError(f"Mask: expected at most {_MOST_CONDITIONS} masks joined by &, got {len(conditions)}")
        return Mask(conditions)

    def __repr__(self) -> str:
        kinds = ("lists", "prefix_lm", "chunks", "sinks_window")
        return f"<fastattn Mask: {' & '.join(kinds[x.kind] for x in self._conditions)}, {self.nbytes} bytes>"

    @property
    def nbytes(self) -> int:
        return int(self._words.nbytes)

    def to_bool(self, Sq: int, Sk: int, *, q_offset: int | None = None, q_heads: int | None = None) -> Array:
        """The same as an array with a place for every pair, for tests and pictures.

        Parameters
        ----------
        Sq, Sk : int
        q_offset : int, optional
            Position of row 0. Default: Sk - Sq, the last row at the last key.
        q_heads : int, optional
            Hq. Repeats what a mask says by heads of k for each query head of a group.

        Returns
        -------
        bool array (B or 1, heads or 1, Sq, Sk)

        Raises
        ------
        ValueError
            The mask is of other sizes.
        """
        self._check_sizes(Sq, Sk)
        return self._pairs(Sq, Sk, Sk - Sq if q_offset is None else q_offset, Sk, 0, q_heads)

    def _check_sizes(self, rows: int, n_keys: int) -> None:
        for condition in self._conditions:
            condition.check_sizes(rows, n_keys)

    def _pairs(self, rows: int, n_keys: int, offset: int, kv_len: int, first_row: int, q_heads: int | None) -> Array:
        allowed: Array = np.ones((1, 1, rows, n_keys), bool)
        for condition in self._conditions:
            one = condition.to_bool(rows, n_keys, offset, kv_len, first_row)
            if condition.kv_heads and q_heads is not None and one.shape[1] > 1:
                if q_heads % one.shape[1]:
                    raise ValueError(f"q_heads: expected a multiple of {one.shape[1]}, got {q_heads}")
                one = np.repeat(one, q_heads // one.shape[1], axis=1)
            allowed = allowed & one
        return allowed

    def _of_rows(self, first: int, last: int) -> Mask:
        """Of rows [first, last) of every entry alone; the positions are the call's."""
        found = []
        for x in self._conditions:
            if x.kind == _LISTS and x.which.shape[2] != 1:
                x = x._replace(which=x.which[:, :, np.arange(first, last) // x.row_block], row_block=1)
            found.append(x)
        return Mask(tuple(found))

    def _of_entry(self, b: int, shape: tuple[int, int, int], offset: int, kv_len: int, first_row: int = 0) -> Array:
        """Of entry b alone: bool (q_heads, rows, keys) = shape."""
        x = self._pairs(*shape[1:], offset, kv_len, first_row, shape[0])
        entry: Array = np.broadcast_to(x[b if x.shape[0] > 1 else 0], shape)
        return entry


def ranges(r: Any) -> Mask:
    """Unions of intervals of keys, row by row.

    Parameters
    ----------
    r : integer array, broadcastable to (B, Hq, Sq, R, 2)
        ``r[b, h, i]``: the R half-open intervals [begin, end) of keys that the row may attend, ascending and
        disjoint. Empty ones count for nothing; what lies outside of the keys is cut off.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        Not integers, another shape, intervals that overlap or do not ascend: the row is named.
    """
    x = _integers("r", r)
    if not 2 <= x.ndim <= 5 or x.shape[-1] != 2:
        raise ValueError(f"r: expected a shape that broadcasts to (B, Hq, Sq, R, 2), got {x.shape}")
    x = x.reshape((1,) * (5 - x.ndim) + x.shape)
    begin, end = x[..., 0], x[..., 1]
    before = np.maximum.accumulate(np.where(end > begin, end, -_FAR), axis=-1)
    wrong = begin > end
    wrong[..., 1:] |= (end > begin)[..., 1:] & (begin[..., 1:] < before[..., :-1])
    if wrong.any():
        b, h, i, n = (int(at[0]) for at in np.nonzero(wrong))
        got = ", ".join(f"[{a}, {z})" for a, z in x[b, h, i].tolist())
        raise ValueError(
            f"r: expected ascending, disjoint intervals, got {got} for row {i} (entry {b}, head {h}), see number {n}"
        )
    return _from_intervals(begin, end)


def blocks(allowed: Any, block: tuple[int, int] | int = 64) -> Mask:
    """Block-sparse attention. Blocks that are False are never read or computed.

    Parameters
    ----------
    allowed : bool array, broadcastable to (B, Hq, ceil(Sq / bq), ceil(Sk / bk))
    block : (bq, bk) or int
        Rows and keys of a block.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        Not bool, another shape, a block of no rows or keys.
    """
    bq, bk = (block, block) if not isinstance(block, tuple | list) else block
    bq, bk = _positive("block", bq), _positive("block", bk)
    x = _bools("allowed", allowed, "(B, Hq, ceil(Sq / bq), ceil(Sk / bk))")
    if x.shape[-1] == 1:  # all keys or none
        end = np.where(x, _FAR, 0)
        return _from_intervals(np.zeros_like(end), end, row_block=bq)
    begin, end = _runs(x)
    n = x.shape[-1]
    return _from_intervals(begin * bk, end * bk, row_block=bq, least_keys=(n - 1) * bk + 1, most_keys=n * bk)


def keys(index: Any, block: int = 1) -> Mask:
    """Selected keys, row by row: top-k sparse attention.

    Parameters
    ----------
    index : integer array (B or 1, Hkv or 1, Sq, n), or without leading axes
        The keys that a row selects, or the blocks of `block` keys, in any order; -1: none. What comes twice
        counts once.
    block : int
        Keys of a block; the last one may be short.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        Not integers, another shape, numbers below -1. A number beyond the keys is an error of the call.
    """
    block = _positive("block", block)
    x = _integers("index", index)
    if not 1 <= x.ndim <= 4:
        raise ValueError(f"index: expected (B or 1, Hkv or 1, Sq, n), got {x.shape}")
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    if np.any(x < -1):
        at = tuple(int(a[0]) for a in np.nonzero(x < -1))
        raise ValueError(f"index: expected numbers of keys, or -1, got {int(x[at])} at {list(at)}")
    if np.any(x >= _FAR // block):
        raise ValueError(f"index: expected numbers of keys, got {int(x.max())}")
    x = np.sort(x, axis=-1)
    first = np.ones(x.shape, bool)
    first[..., 1:] = x[..., 1:] != x[..., :-1]
    first &= x >= 0
    # Intervals of one block each; neighbours are joined on the way.
    begin = np.where(first, x * block, 0)
    end = np.where(first, (x + 1) * block, 0)
    return _from_intervals(begin, end, kv_heads=True, exact=True, size=block)


def tail(allowed: Any) -> Mask:
    """A bool array over the entry's last keys alone; all earlier ones are allowed.

    Parameters
    ----------
    allowed : bool array, broadcastable to (B, Hq, Sq, n)
        The last n keys of the entry, kv_lens counted.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        Not bool, another shape.
    """
    x = _bools("allowed", allowed, "(B, Hq, Sq, n)")
    n = x.shape[-1]
    begin, end = _runs(x)
    early = np.zeros((*x.shape[:-1], 1), np.int64)
    nothing = begin == end
    begin, end = np.where(nothing, 0, begin - n), np.where(nothing, 0, end - n)
    return _from_intervals(
        np.concatenate([early - _FAR, begin], -1), np.concatenate([early - n, end], -1), from_end=True
    )


def documents(ids_q: Any, ids_kv: Any = None) -> Mask:
    """Rows attend keys of their own document: sequences that were packed into one for training.

    Parameters
    ----------
    ids_q, ids_kv : integer array (Sq,) or (B, Sq); (Sk,) or (B, Sk)
        Which document a row and a key belong to, in any order; by default the same.

    Returns
    -------
    Mask
        The keys of a document are intervals, so memory is O(Sq + Sk) whatever their order.

    Raises
    ------
    TypeError, ValueError
        Not integers, another shape.
    """
    rows = _ids("ids_q", ids_q)
    cols = rows if ids_kv is None else _ids("ids_kv", ids_kv)
    batch = max(rows.shape[0], cols.shape[0])
    if {rows.shape[0], cols.shape[0]} - {1, batch}:
        raise ValueError(f"ids_kv: expected (Sk,) or ({rows.shape[0]}, Sk), got {np.shape(ids_kv)}")
    index, starts, spans, lists, found = [], [np.zeros(1, np.int64)], [], 0, 0
    for b in range(batch):
        own, mine = cols[b % cols.shape[0]], rows[b % rows.shape[0]]
        begin = np.flatnonzero(np.r_[True, own[1:] != own[:-1]]) if own.size else np.zeros(0, np.int64)
        end = np.r_[begin[1:], own.size] if own.size else begin
        order = np.argsort(own[begin], kind="stable")
        known, first = np.unique(own[begin][order], return_index=True)
        at = np.searchsorted(known, mine)
        # The list after the last one is empty: of rows whose document has no keys.
        there = at < known.size
        there[there] = known[at[there]] == mine[there]
        index.append(np.where(there, at, known.size) + lists)
        starts.append(np.r_[first[1:], begin.size, begin.size][: known.size + 1] + found)
        if known.size == 0:
            starts[-1] = np.full(1, found, np.int64)
        spans.append(np.stack([begin[order], end[order]], -1))
        lists += known.size + 1
        found += begin.size
    return Mask((
        _Condition(
            _LISTS, np.array(index, np.int64)[:, None], np.concatenate(starts).astype(np.int64),
            np.ascontiguousarray(np.concatenate(spans), np.int64), least_keys=cols.shape[1], most_keys=cols.shape[1],
        ),
    ))  # fmt: skip


def prefix_lm(lengths: Any) -> Mask:
    """A row at position p attends key j if j < length or j <= p: a prefix seen by all, then causal.

    Call it without ``causal``.

    Parameters
    ----------
    lengths : int or integer array (B,)
        Of the prefix of each entry.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        Not integers, another shape, lengths below 0.
    """
    x = _integers("lengths", lengths)
    if x.ndim > 1:
        raise ValueError(f"lengths: expected an int or (B,), got {x.shape}")
    if np.any(x < 0):
        raise ValueError(f"lengths: expected lengths >= 0, got {int(x.min())}")
    return Mask((_Condition(_PREFIX, lengths=x),))


def sinks_window(keep: int, left: int) -> Mask:
    """The first `keep` keys, and those with p - left <= j <= p: streaming with attention sinks.

    Parameters
    ----------
    keep : int
    left : int
        As in the ``window`` of `fastattn.mha`.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        Not integers, numbers below 0.

    References
    ----------
    Xiao et al.: Efficient Streaming Language Models with Attention Sinks, ICLR 2024.
    """
    return Mask((_Condition(_SINKS_WINDOW, keep=_at_least("keep", keep, 0), left=_at_least("left", left, 0)),))


def chunks(size: int) -> Mask:
    """Row and key stand in the same chunk of `size` positions.

    Parameters
    ----------
    size : int

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        Not an integer, or below 1.
    """
    return Mask((_Condition(_CHUNKS, size=_positive("size", size)),))


def tree(parents: Any, past: Any = None) -> Mask:
    """A tree of drafted tokens: each attends the past, its ancestors and itself.

    Parameters
    ----------
    parents : integer array (n,) or (B, n)
        The parent of each of the n drafted tokens, which are the rows of q; -1: none but the past. Parents
        come before their children.
    past : int or integer array (B,), optional
        Keys before the tree, which then has the keys from `past` on. Default: the tree has the entry's last n keys.

    Returns
    -------
    Mask

    Raises
    ------
    TypeError, ValueError
        Not integers, another shape, a parent that does not come before its child.
    """
    x = _integers("parents", parents)
    if x.ndim not in (1, 2):
        raise ValueError(f"parents: expected (n,) or (B, n), got {x.shape}")
    x = np.atleast_2d(x)
    n = x.shape[1]
    wrong = (x < -1) | (x >= np.arange(n))
    if wrong.any():
        b, i = (int(at[0]) for at in np.nonzero(wrong))
        raise ValueError(f"parents: expected -1 or an earlier token, got {int(x[b, i])} for token {i} (entry {b})")
    allowed = np.zeros((x.shape[0], n + 1, n), bool)  # the last row: of no parent
    for i in range(n):
        for b in range(x.shape[0]):
            allowed[b, i] = allowed[b, x[b, i]]
            allowed[b, i, i] = True
    allowed = allowed[:, None, :n]
    if past is None:
        return tail(allowed)
    before = _integers("past", past)
    if before.ndim > 1 or np.any(before < 0):
        raise ValueError(f"past: expected an int >= 0 or (B,) of them, got {past!r}")
    before = before.reshape(-1, 1, 1, 1)
    if x.shape[0] != 1 and before.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"past: expected an int or ({x.shape[0]},), got {before.shape[0]} numbers")
    begin, end = np.broadcast_arrays(*_runs(allowed), before)[:2]
    shape = np.broadcast_shapes(begin.shape, before.shape)
    begin, end = (np.broadcast_to(y, shape) for y in (begin, end))
    nothing = begin == end
    early = np.zeros((*shape[:-1], 1), np.int64)
    return _from_intervals(
        np.concatenate([early, np.where(nothing, 0, begin + before)], -1),
        np.concatenate([early + before, np.where(nothing, 0, end + before)], -1),
    )


def _from_intervals(begin: Array, end: Array, **fields: Any) -> Mask:
    """Intervals (B, heads, rows, R), ascending but for empty ones, as lists: joined where they touch."""
    shape = begin.shape[:-1]
    begin, end = (x.reshape(int(np.prod(shape)), x.shape[-1]) for x in (begin, end))
    row, at = np.nonzero(end > begin)
    begin, end = begin[row, at], end[row, at]
    joins = np.zeros(row.size, bool)
    joins[1:] = (row[1:] == row[:-1]) & (begin[1:] == end[:-1])
    first = np.flatnonzero(~joins)
    spans = np.stack([begin[first], end[np.r_[first[1:], row.size] - 1] if first.size else end[:0]], -1)
    count = np.bincount(row[first], minlength=int(np.prod(shape)))
    starts = np.r_[0, np.cumsum(count)]
    index = np.arange(count.size).reshape(shape)
    return Mask((
        _Condition(
            _LISTS, index.astype(np.int64), starts.astype(np.int64), np.ascontiguousarray(spans, np.int64), **fields
        ),
    ))  # fmt: skip


def _runs(x: Array) -> tuple[Array, Array]:
    """The runs of True along the last axis of a bool array, as padded intervals [begin, end)."""
    padded = np.zeros((*x.shape[:-1], x.shape[-1] + 2), np.int8)
    padded[..., 1:-1] = x
    edges = np.diff(padded, axis=-1)
    flat = edges.reshape(int(np.prod(x.shape[:-1])), edges.shape[-1])
    row, begin = np.nonzero(flat == 1)
    end = np.nonzero(flat == -1)[1]
    count = np.bincount(row, minlength=flat.shape[0])
    most = int(count.max(initial=0))
    place = np.arange(row.size) - np.repeat(np.cumsum(count) - count, count)
    result = []
    for numbers in (begin, end):
        y = np.zeros((flat.shape[0], most), np.int64)
        y[row, place] = numbers
        result.append(y.reshape(*x.shape[:-1], most))
    return result[0], result[1]


def _integers(name: str, x: Any) -> Array:
    """A copy as int64, cut to numbers whose sums fit."""
    found = np.asarray(x)
    if found.dtype.kind not in "iu" and not (found.size == 0 and not isinstance(x, np.ndarray)):
        raise TypeError(f"{name}: expected integers, got {found.dtype}")
    if found.dtype == np.uint64:
        found = np.minimum(found, np.uint64(_FAR))
    return np.array(np.clip(found.astype(np.int64), -_FAR, _FAR))


def _ids(name: str, x: Any) -> Array:
    found = np.asarray(x)
    if found.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {found.dtype}")
    if found.ndim not in (1, 2):
        raise ValueError(f"{name}: expected (S,) or (B, S), got {found.shape}")
    return np.atleast_2d(found)


def _bools(name: str, x: Any, shape: str) -> Array:
    found = np.asarray(x)
    if found.dtype != bool:
        raise TypeError(f"{name}: expected bool, got {found.dtype}")
    if not 1 <= found.ndim <= 4:
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {found.shape}")
    return found.reshape((1,) * (4 - found.ndim) + found.shape)


def _at_least(name: str, x: Any, least: int) -> int:
    if isinstance(x, bool | np.bool_):
        raise TypeError(f"{name}: expected an int, got a bool")
    try:
        value = as_integer(x)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(x).__name__}") from None
    if value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value}")
    return min(value, _FAR)


def _positive(name: str, x: Any) -> int:
    return _at_least(name, x, 1)
