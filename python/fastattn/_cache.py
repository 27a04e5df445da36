"""Keys and values in pages: `KVCache`, and attention over it, `mha_cached`."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterable
from operator import index as as_integer
from typing import Any

import numpy as np

from fastattn import _core, masks

Array = np.ndarray[Any, Any]

_FLOATS = ("float64", "float32", "float16", "bfloat16")


class KVCache:
    """Keys and values of sequences that grow, in pages of one pool.

    A sequence has an id, from `add` to `free`. Pages are shared by `fork` and copied when one of the sequences
    writes. Memory is allocated once, for `tokens` keys, and touched when it is first written. Every method is
    all or nothing: after an error nothing has changed. Other threads may call any method while `mha_cached`
    runs; what it reads stays as it is.

    Parameters
    ----------
    kv_heads, head_dim : int
        Hkv and D.
    value_dim : int, optional
        Dv; default D.
    tokens : int
        Keys of all sequences together, rounded up to pages.
    dtype : dtype or str
        float64, float32, float16 or bfloat16 (of ``ml_dtypes``); that of q.
    page : int
        Keys of a page. Multiples of 64 are read where they lie, others are copied block by block.
    window : (left, None), optional
        Rows attend p - left <= j <= p. Pages wholly older are given back by the next `append`; positions stay
        what they were.
    keep : int
        With a window: the first `keep` keys stay, and are attended (attention sinks).
    rollback : int
        With a window: so many keys more are kept, so that `truncate` can go back.

    Attributes
    ----------
    lengths : integer array, read-only
        ``lengths[id]``: its keys; -1 of ids that are not in use.
    table : integer array (ids, N), read-only
        Row id: its pages in order, -1 where there is none.
    tokens_free : int
        Keys that free pages have room for.
    nbytes : int
        Of the pool.

    Raises
    ------
    TypeError, ValueError
        Wrong sizes, a dtype that is not supported.
    MemoryError
        The pool cannot be had.

    Examples
    --------
    >>> import numpy as np, fastattn
    >>> cache = fastattn.KVCache(2, 64, tokens=1000)
    >>> ids = cache.add(3)
    >>> q, k, v = (np.ones((3, 5, heads, 64), np.float32) for heads in (8, 2, 2))
    >>> fastattn.mha_cached(q, cache, k=k, v=v).shape
    (3, 5, 8, 64)
    >>> cache.lengths[ids]
    array([5, 5, 5])
    """

    _left: int | None  # of the window

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        tokens: int,
        dtype: Any = "float32",
        page: int = 64,
        window: tuple[int | None, int | None] | None = None,
        keep: int = 0,
        rollback: int = 0,
    ) -> None:
        heads, dim = _size("kv_heads", kv_heads, 1), _size("head_dim", head_dim, 1)
        v_dim = dim if value_dim is None else _size("value_dim", value_dim, 1)
        page, tokens = _size("page", page, 1), _size("tokens", tokens, 0)
        kind = _float_dtype(dtype)
        count = -(-tokens // page)
        shape = (count, page, heads)
        self._start(np.empty((*shape, dim), kind), np.empty((*shape, v_dim), kind), range(count))
        self._keep, self._rollback = _size("keep", keep, 0), _size("rollback", rollback, 0)
        if window is not None:
            if not isinstance(window, tuple | list) or len(window) != 2 or window[1] is not None:
                raise ValueError(f"window: expected (left, None), got {window!r}")
            self._left = None if window[0] is None else _size("window", window[0], 0)
        if self._left is None and (self._keep or self._rollback):
            raise ValueError("keep, rollback: expected a window=(left, None) beside them, got none")

    def _start(self, k: Array, v: Array, free: Iterable[int]) -> None:
        self._k, self._v = k, v
        self._page = k.shape[1]
        self._free_pages = list(free)  # a heap: low numbers first, so that sequences lie in one piece
        self._uses = np.zeros(k.shape[0], np.int64)  # of each page by sequences
        self._lengths = np.full(8, -1, np.int64)
        self._table = np.full((8, 4), -1, np.int64)
        self._base = np.zeros(8, np.int64)  # keys [base, length) are there, beside the first `keep`
        self._compacted = np.zeros(8, bool)
        self._written = np.zeros(8, bool)  # its last page may be read by a running call as it was
        self._lock = threading.RLock()
        self._busy: set[int] = set()  # ids to which a running call has appended
        self._clock = 0
        self._running: list[int] = []  # when the running calls began
        self._limbo: list[tuple[int, int]] = []  # pages without use, and when they became so
        self._left = None
        self._keep = self._rollback = 0

    # ---- what can be asked --------------------------------------------------------------------------
    @property
    def lengths(self) -> Array:
        return _read_only(self._lengths)

    @property
    def table(self) -> Array:
        return _read_only(self._table)

    @property
    def nbytes(self) -> int:
        return int(self._k.nbytes + self._v.nbytes)

    @property
    def tokens_free(self) -> int:
        with self._lock:
            self._settle()
            return int(len(self._free_pages) * self._page)

    @property
    def ids(self) -> Array:
        """The ids in use, ascending."""
        return np.flatnonzero(self._lengths >= 0)

    def __repr__(self) -> str:
        _, page, heads, dim = self._k.shape
        return (
            f"<fastattn KVCache: {self.ids.size} sequences, {self.tokens_free} of {self._k.shape[0] * page} tokens "
            f"free, {heads} heads, D {dim}, Dv {self._v.shape[3]}, {self._k.dtype}, page {page}>"
        )

    # ---- ids ----------------------------------------------------------------------------------------
    def add(self, n: int = 1) -> Array:
        """n new, empty sequences.

        Returns
        -------
        integer array (n,)
            Their ids, the lowest that are not in use.
        """
        n = _size("n", n, 0)
        with self._lock:
            ids = self._unused(n)
            self._lengths[ids] = 0
            self._base[ids] = 0
            self._compacted[ids] = self._written[ids] = False
            return ids

    def free(self, ids: Any) -> None:
        """Gives sequences and their pages back."""
        with self._lock:
            which = self._ids(ids, unique=True, change=True)
            for one in which:
                self._release(self._table[one])
            self._table[which] = -1
            self._lengths[which] = -1

    def fork(self, id: int, n: int = 1, length: int | None = None) -> Array:
        """n sequences that begin as `id` does, up to `length` keys.

        Their pages are shared until one of them is written.

        Returns
        -------
        integer array (n,)
        """
        n = _size("n", n, 0)
        with self._lock:
            one = int(self._ids([id], change=True)[0])
            size = int(self._lengths[one])
            length = size if length is None else _size("length", length, 0)
            if length > size:
                raise ValueError(f"length: expected at most the {size} keys of id {one}, got {length}")
            self._check_kept("length", one, length)
            ids = self._unused(n)
            row = self._table[one].copy()
            row[-(-length // self._page) :] = -1
            self._table[ids] = row
            self._uses[row[row >= 0]] += n
            self._lengths[ids] = length
            self._base[ids] = self._base[one]
            self._compacted[ids] = self._compacted[one]
            self._written[ids] = bool(self._running)
            return ids

    def reorder(self, ids: Any) -> None:
        """Beams: the i-th id in use becomes what ids[i] was, all at once."""
        with self._lock:
            live = self.ids
            which = self._ids(ids)
            self._ids(live, change=True)
            if which.size != live.size:
                raise ValueError(f"ids: expected one for each of the {live.size} ids in use, got {which.size}")
            new = self._table[which]
            used = new[new >= 0]
            self._uses += np.bincount(used, minlength=self._uses.size)
            old = self._table[live].copy()
            self._table[live] = new
            for x in (self._lengths, self._base, self._compacted):
                x[live] = x[which]
            self._written[live] = bool(self._running)
            self._release(old)

    # ---- keys ---------------------------------------------------------------------------------------
    def append(self, k: Any, v: Any, ids: Any = None, cu: Any = None) -> None:
        """Appends keys and values; none where there is no room for all.

        Parameters
        ----------
        k, v : array (B, n, Hkv, D), (B, n, Hkv, Dv)
            Of B sequences; with `cu` packed, (T, Hkv, D) and (T, Hkv, Dv).
        ids : integer array (B,), optional
            Default: all ids in use, ascending. None twice.
        cu : integer array (B + 1,), optional
            Sequence b gets the rows ``cu[b]:cu[b + 1]``.

        Raises
        ------
        TypeError, ValueError
            Another shape or dtype than the cache has, unknown ids, one id twice.
        MemoryError
            Names the pages wanted and free. Nothing was appended.
        """
        with self._lock:
            self._append(k, v, ids, cu).commit()

    def truncate(self, id: int, length: int) -> None:
        """Keeps the first `length` keys: drafts that were rejected go."""
        with self._lock:
            one = int(self._ids([id], change=True)[0])
            size, length = int(self._lengths[one]), _size("length", length, 0)
            if length > size:
                raise ValueError(f"length: expected at most the {size} keys of id {one}, got {length}")
            self._check_kept("length", one, length)
            pages = -(-length // self._page)
            self._release(self._table[one, pages:])
            self._table[one, pages:] = -1
            self._lengths[one] = length
            self._written[one] |= bool(self._running)

    def compact(self, id: int, index: Any) -> None:
        """Keeps some keys, and renumbers them: eviction.

        Kept keys stay in the past of rows to come; a window, ALiBi or a Mask is an error for this sequence from
        then on, as they go by positions.

        Parameters
        ----------
        id : int
        index : integer array (n,) or (Hkv, n)
            Positions, ascending; of each head its own.
        """
        with self._lock:
            one = int(self._ids([id], change=True)[0])
            size, heads = int(self._lengths[one]), self._k.shape[2]
            at = np.asarray(index)
            if at.dtype.kind not in "iu" or at.ndim not in (1, 2) or (at.ndim == 2 and at.shape[0] != heads):
                raise ValueError(f"index: expected integers (n,) or ({heads}, n), got {at.dtype}{at.shape}")
            at = np.broadcast_to(at.astype(np.int64), (heads, at.shape[-1]))
            if at.size and (at.min() < 0 or at.max() >= size or np.any(np.diff(at, axis=1) <= 0)):
                raise ValueError(f"index: expected ascending positions below {size}, got {np.asarray(index)!r}")
            if self._base[one] > 0:
                raise ValueError(f"id {one}: its window has given pages back; it cannot be compacted")
            k, v = self._read(one)
            chosen = [np.take_along_axis(x, at.T[:, :, None], axis=0) for x in (k, v)]
            pages = -(-at.shape[1] // self._page)
            row = self._table[one]
            own = row[(row >= 0)]
            own = own[self._uses[own] == 1] if not self._running else own[:0]
            fresh = self._take(max(pages - own.size, 0))
            mine = np.r_[own[:pages], fresh].astype(np.int64)
            old = row[~np.isin(row, mine)].copy()
            self._table[one] = -1
            self._table[one, :pages] = mine
            self._uses[fresh] = 1
            self._write(mine, 0, *chosen)
            self._lengths[one] = at.shape[1]
            self._base[one] = 0
            self._compacted[one] = True
            self._release(old)

    def read(self, id: int) -> tuple[Array, Array]:
        """Copies of k (length, Hkv, D) and v (length, Hkv, Dv); zeros for what a window has given back."""
        with self._lock:
            return self._read(int(self._ids([id])[0]))

    # ---- other memory, files ------------------------------------------------------------------------
    @classmethod
    def from_arrays(cls, k: Any, v: Any, lengths: Any, *, block_table: Any = None) -> KVCache:
        """A cache over memory of somebody else, without a copy.

        Parameters
        ----------
        k, v : array (P, page, Hkv, D), (P, page, Hkv, Dv)
            Pages; or without a table (B, S, Hkv, D), one page for each sequence.
        lengths : integer array (B,)
        block_table : integer array (B, N), optional
            Pages of each sequence; what its length does not reach is free for `append`, and so are pages that
            no row has.

        Raises
        ------
        TypeError, ValueError
            Shapes or dtypes that do not fit, pages that are not there.
        """
        k, v, sizes = np.asarray(k), np.asarray(v), np.asarray(lengths)
        if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
            raise ValueError(f"k, v: expected (P, page, Hkv, D) and (P, page, Hkv, Dv), got {k.shape} and {v.shape}")
        if _float_dtype(k.dtype) != _float_dtype(v.dtype):
            raise TypeError(f"v: expected {k.dtype} as k, got {v.dtype}")
        count, page = k.shape[:2]
        table = np.arange(count)[:, None] if block_table is None else np.asarray(block_table)
        if sizes.dtype.kind not in "iu" or sizes.ndim != 1:
            raise ValueError(f"lengths: expected integers (B,), got {sizes.dtype}{sizes.shape}")
        if table.dtype.kind not in "iu" or table.ndim != 2 or table.shape[0] != sizes.size:
            raise ValueError(f"block_table: expected integers ({sizes.size}, N), got {table.dtype}{table.shape}")
        cache = cls.__new__(cls)
        cache._start(k, v, ())
        used = np.zeros(count, bool)
        ids = cache.add(sizes.size)
        cache._widen(table.shape[1])
        for b, size in enumerate(sizes.tolist()):
            pages = -(-size // page)
            if not 0 <= size <= table.shape[1] * page:
                raise ValueError(f"lengths: expected 0 to {table.shape[1] * page} keys, got {size} for entry {b}")
            row = table[b, :pages].astype(np.int64)
            wrong = np.flatnonzero((row < 0) | (row >= count))
            if wrong.size:
                n = int(wrong[0])
                raise ValueError(f"block_table: expected pages below {count}, got {row[n]} for page {n} of entry {b}")
            cache._table[b, :pages] = row
            cache._uses += np.bincount(row, minlength=count)
            used[row] = True
        cache._lengths[ids] = sizes
        cache._free_pages = np.flatnonzero(~used).tolist()
        return cache

    def save(self, file: Any, ids: Any = None) -> None:
        """Writes sequences to a file (``np.savez``): their pages as they are."""
        with self._lock:
            np.savez(file, **self._state(self.ids if ids is None else self._ids(ids, unique=True)))

    @classmethod
    def load(cls, file: Any, *, tokens: int | None = None) -> KVCache:
        """The cache of `save`, with room for `tokens` keys; default: for those it has. Ids are 0, 1, ..."""
        with np.load(file, allow_pickle=False) as state:
            return cls._of_state(dict(state), tokens)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {**self._state(self.ids), "tokens": self._k.shape[0] * self._page, "own": self.ids}

    def __setstate__(self, state: dict[str, Any]) -> None:
        other = self._of_state(state, state["tokens"])
        self.__dict__.update(other.__dict__)
        own = state["own"]
        if own.size and not np.array_equal(own, np.arange(own.size)):  # the ids that they had
            self._widen(0, int(own.max()) + 1)
            for x, empty in ((self._lengths, -1), (self._table, -1), (self._base, 0), (self._compacted, False)):
                moved = x[: own.size].copy()
                x[: own.size] = empty
                x[own] = moved

    def _state(self, ids: Array) -> dict[str, Any]:
        rows = self._table[ids, : -(-int(self._lengths[ids].max(initial=0)) // self._page)]
        used, numbers = np.unique(rows[rows >= 0], return_inverse=True)
        table = np.full_like(rows, -1)
        table[rows >= 0] = numbers
        name = self._k.dtype.name
        raw = {2: np.uint16, 4: np.uint32, 8: np.uint64}[self._k.dtype.itemsize]
        return {
            "k": self._k[used].view(raw), "v": self._v[used].view(raw), "dtype": np.array(name), "table": table,
            "lengths": self._lengths[ids], "base": self._base[ids], "compacted": self._compacted[ids],
            "window": np.array([-1 if self._left is None else self._left, self._keep, self._rollback]),
        }  # fmt: skip

    @classmethod
    def _of_state(cls, state: dict[str, Any], tokens: int | None) -> KVCache:
        kind = _float_dtype(str(state["dtype"]))
        k, v = (state[name].view(kind) for name in "kv")
        count, page, heads, dim = k.shape
        pages = count if tokens is None else -(-_size("tokens", tokens, 0) // page)
        if pages < count:
            raise ValueError(f"tokens: expected at least {count * page}, as are in use, got {tokens}")
        cache = cls(heads, dim, v.shape[3], tokens=pages * page, dtype=kind, page=page)
        cache._k[:count], cache._v[:count] = k, v
        left, cache._keep, cache._rollback = (int(x) for x in state["window"])
        cache._left = None if left < 0 else left
        table = state["table"]
        ids = cache.add(table.shape[0])
        cache._widen(table.shape[1])
        cache._table[ids, : table.shape[1]] = table
        cache._uses += np.bincount(table[table >= 0], minlength=pages)
        cache._lengths[ids], cache._base[ids] = state["lengths"], state["base"]
        cache._compacted[ids] = state["compacted"]
        cache._free_pages = np.flatnonzero(cache._uses == 0).tolist()
        return cache

    # ---- pages --------------------------------------------------------------------------------------
    def _settle(self) -> None:
        """Pages that no running call may read any more are free."""
        oldest = min(self._running, default=self._clock + 1)
        waiting = []
        for page, since in self._limbo:
            if since < oldest:
                heapq.heappush(self._free_pages, page)
            else:
                waiting.append((page, since))
        self._limbo = waiting

    def _release(self, pages: Array) -> None:
        pages = pages[pages >= 0].ravel()
        np.subtract.at(self._uses, pages, 1)
        unused = np.unique(pages[self._uses[pages] == 0])
        self._limbo += [(page, self._clock) for page in unused.tolist()]
        self._settle()

    def _take(self, n: int, besides: int = 0) -> Array:
        """n free pages, whose use is not counted yet. besides: further ones that will be free."""
        self._settle()
        if n > len(self._free_pages) + besides:
            free = len(self._free_pages) + besides
            raise MemoryError(f"KVCache: {n} pages of {self._page} keys are wanted, {free} are free")
        return np.array([heapq.heappop(self._free_pages) for _ in range(min(n, len(self._free_pages)))], np.int64)

    def _widen(self, pages: int, ids: int = 0) -> None:
        slots, width = self._table.shape
        if pages > width or ids > slots:
            new = (
                max(slots, 2 * slots if ids > slots else 0, ids),
                max(width, 2 * width if pages > width else 0, pages),
            )
            table = np.full(new, -1, np.int64)
            table[:slots, :width] = self._table
            self._table = table
        if ids > slots:
            more = self._table.shape[0] - slots
            self._lengths = np.r_[self._lengths, np.full(more, -1, np.int64)]
            self._base = np.r_[self._base, np.zeros(more, np.int64)]
            self._compacted = np.r_[self._compacted, np.zeros(more, bool)]
            self._written = np.r_[self._written, np.zeros(more, bool)]

    def _unused(self, n: int) -> Array:
        found = np.flatnonzero(self._lengths < 0)
        if found.size < n:
            self._widen(0, self._lengths.size + n - found.size)
            found = np.flatnonzero(self._lengths < 0)
        return found[:n].copy()

    def _ids(self, ids: Any, *, unique: bool = False, change: bool = False) -> Array:
        given = np.asarray(ids)
        if given.dtype.kind not in "iu" and given.size:
            raise TypeError(f"ids: expected integers, got {given.dtype}")
        which = np.atleast_1d(given).astype(np.int64)
        if which.ndim != 1:
            raise ValueError(f"ids: expected (B,), got {which.shape}")
        for one in which[(which < 0) | (which >= self._lengths.size)].tolist():
            raise ValueError(f"ids: {one} is not in use")
        for one in which[self._lengths[which] < 0].tolist():
            raise ValueError(f"ids: {one} is not in use")
        if unique and np.unique(which).size != which.size:
            raise ValueError(f"ids: expected each id once, got {which.tolist()}")
        for one in which.tolist() if change and self._busy else ():
            if one in self._busy:
                raise ValueError(f"ids: a running call of mha_cached appends to {one}")
        return which

    def _check_kept(self, name: str, one: int, length: int) -> None:
        base = int(self._base[one])
        if base and self._left is not None and max(length - self._left, 0) < base:
            raise ValueError(
                f"{name}: expected at least {base + self._left}, as the window of id {one} has given older pages "
                f"back, got {length}"
            )

    def _read(self, one: int) -> tuple[Array, Array]:
        size = int(self._lengths[one])
        row = self._table[one, : -(-size // self._page)]
        results = []
        for pool in (self._k, self._v):
            x = pool[np.maximum(row, 0)]
            x[row < 0] = 0
            results.append(x.reshape(-1, *x.shape[2:])[:size])
        return results[0], results[1]

    def _write(self, row: Array, first: int, k: Array, v: Array) -> None:
        """Keys from position `first` on; row: all pages of the sequence."""
        done, n = 0, k.shape[0]
        while done < n:
            at, offset = divmod(first + done, self._page)
            size = min(self._page - offset, n - done)
            for pool, x in ((self._k, k), (self._v, v)):
                pool[row[at], offset : offset + size] = x[done : done + size]
            done += size

    def _append(self, k: Any, v: Any, ids: Any, cu: Any) -> _Appended:
        which = self.ids if ids is None else self._ids(ids)
        which = self._ids(which, unique=True, change=True)
        rows, bounds = self._rows("k", k, self._k, which, cu), self._rows("v", v, self._v, which, cu)
        if not np.array_equal(rows[1], bounds[1]):
            raise ValueError(f"v: expected as many keys as k, got {np.shape(v)} and {np.shape(k)}")
        sizes = np.diff(rows[1])
        return _Appended(self, which, sizes, rows[0], bounds[0], rows[1])

    def _rows(self, name: str, x: Any, pool: Array, which: Array, cu: Any) -> tuple[Array, Array]:
        """As packed rows, and their bounds."""
        rows = np.asarray(x) if isinstance(x, np.ndarray) or not hasattr(x, "__dlpack__") else np.from_dlpack(x)
        if rows.dtype != pool.dtype:
            raise TypeError(f"{name}: expected {pool.dtype} as the cache has, got {rows.dtype}")
        if cu is None:
            if rows.ndim != 4 or rows.shape[0] != which.size or rows.shape[2:] != pool.shape[2:]:
                wanted = (which.size, "n", *pool.shape[2:])
                raise ValueError(f"{name}: expected {wanted} for {which.size} ids, got {rows.shape}".replace("'", ""))
            return rows.reshape(-1, *rows.shape[2:]), np.arange(which.size + 1) * rows.shape[1]
        bounds = np.asarray(cu)
        if rows.ndim != 3 or rows.shape[1:] != pool.shape[2:]:
            raise ValueError(f"{name}: expected packed rows (T, {pool.shape[2]}, {pool.shape[3]}), got {rows.shape}")
        if bounds.dtype.kind not in "iu" or bounds.shape != (which.size + 1,):
            raise ValueError(f"cu: expected ({which.size} + 1,) integers, got {bounds.dtype}{bounds.shape}")
        bounds = bounds.astype(np.int64)
        if np.any(np.diff(bounds) < 0) or bounds[0] < 0 or bounds[-1] > rows.shape[0]:
            raise ValueError(
                f"cu: expected bounds that do not decrease, from 0 to {rows.shape[0]}, got {bounds.tolist()}"
            )
        return rows, bounds

    def _begin(self) -> int:
        """A call that reads pages runs: until it ends none of them is given to anybody else."""
        self._clock += 1
        self._running.append(self._clock)
        return self._clock

    def _end(self, began: int) -> None:
        if began:
            self._running.remove(began)
        self._settle()

    @property
    def _fastattn_pages(self) -> tuple[Array, Array, Array]:
        """What the compiled module reads, of the ids in use."""
        return self._pages_of(self.ids)

    def _pages_of(self, which: Array) -> tuple[Array, Array, Array]:
        # Pages that a window has given back are hidden, so any number stands for them.
        width = int(-(-self._lengths[which].max(initial=0) // self._page))
        return self._k, self._v, np.maximum(self._table[which, :width], 0)


class _Appended:
    """Keys that were appended, and the way back."""

    def __init__(self, cache: KVCache, which: Array, sizes: Array, k: Array, v: Array, bounds: Array) -> None:
        self.cache, self.which = cache, which
        page = cache._page
        old = cache._lengths[which]
        new = old + sizes
        first, last = old // page, -(-new // page)  # pages that are written: [first, last)
        cache._widen(int(last.max(initial=0)))
        rows = cache._table[which]
        # Shared, or read by a running call as it was before: written to a copy.
        partial = (old % page != 0) & (sizes > 0)
        at = rows[np.arange(which.size), np.minimum(first, rows.shape[1] - 1)] if which.size else first
        copies = partial & ((cache._uses[np.maximum(at, 0)] > 1) | cache._written[which])
        wanted = np.maximum(last - -(-old // page), 0) * (sizes > 0)
        total = int(wanted.sum() + copies.sum())
        expired, bases = self._expired(old, sizes, rows)
        gone = rows[expired]
        unused = np.unique(gone[(cache._uses[gone] == np.bincount(gone, minlength=cache._uses.size)[gone])])
        if cache._running:
            unused = unused[:0]
        before = (rows.copy(), old.copy(), cache._base[which].copy(), cache._written[which].copy())
        self.before = before
        self.saved: list[tuple[Array, Array, Array]] = []
        self.left = [gone]  # uses that end with the commit
        self.taken, self.reused = cache._take(total, unused.size), unused[:0]
        try:
            reused = unused[: total - self.taken.size]
            self.saved = [(pool, reused, pool[reused]) for pool in (cache._k, cache._v)] if reused.size else []
            self.reused = reused
            rows = rows.copy()
            rows[expired] = -1
            self._place(rows, old, first, last, copies)
            self._fill(rows, old, sizes, k, v, bounds)
            cache._table[which] = rows
            cache._lengths[which] = new
            cache._base[which] = bases
            cache._written[which] = False
        except BaseException:  # an interrupt
            self.undo()
            raise

    def _place(self, rows: Array, old: Array, first: Array, last: Array, copies: Array) -> None:
        """The pages that are written, in the rows of the table."""
        cache, page = self.cache, self.cache._page
        pages = iter(np.r_[self.taken, self.reused].tolist())
        self.left = [self.left[0][~np.isin(self.left[0], self.reused)]]
        for b in range(self.which.size):
            if copies[b]:
                source, to = int(rows[b, first[b]]), next(pages)
                used = int(old[b] % page)
                for pool in (cache._k, cache._v):
                    pool[to, :used] = pool[source, :used]
                self.left.append(np.array([source]))
                rows[b, first[b]] = to
            for n in range(int(-(-old[b] // page)), int(last[b])):
                rows[b, n] = next(pages)
        cache._uses[self.taken] = 1
        cache._uses[self.reused] = 1

    def _fill(self, rows: Array, old: Array, sizes: Array, k: Array, v: Array, bounds: Array) -> None:
        cache, page = self.cache, self.cache._page
        if self.which.size > 1 and bool(np.all(sizes == 1)):
            places = rows[np.arange(self.which.size), old // page]
            cache._k[places, old % page] = k[bounds[:-1]]
            cache._v[places, old % page] = v[bounds[:-1]]
            return
        for b in range(self.which.size):
            mine = slice(bounds[b], bounds[b + 1])
            cache._write(rows[b], int(old[b]), k[mine], v[mine])

    def _expired(self, old: Array, sizes: Array, rows: Array) -> tuple[Array, Array]:
        """Which pages the windows of the next rows have left behind, and where what stays begins."""
        cache = self.cache
        expired = np.zeros(rows.shape, bool)
        bases = cache._base[self.which].copy()
        if cache._left is None:
            return expired, bases
        page = cache._page
        begin = np.maximum(old - cache._left - cache._rollback, 0) // page  # the first page that stays
        sinks = -(-cache._keep // page)
        numbers = np.arange(rows.shape[1])
        expired = (numbers >= sinks) & (numbers < begin[:, None]) & (rows >= 0) & (sizes > 0)[:, None]
        bases = np.where((begin > sinks) & (sizes > 0), np.maximum(bases, begin * page), bases)
        return expired, bases

    def commit(self) -> None:
        for pages in self.left:
            self.cache._release(pages)

    def undo(self) -> None:
        cache = self.cache
        rows, lengths, base, written = self.before
        cache._table[self.which, : rows.shape[1]] = rows
        cache._table[self.which, rows.shape[1] :] = -1
        cache._lengths[self.which], cache._base[self.which] = lengths, base
        cache._written[self.which] = written
        for pool, pages, content in self.saved:
            pool[pages] = content
        gone, count = np.unique(rows[np.isin(rows, self.reused)], return_counts=True)
        cache._uses[self.taken] = 0
        cache._uses[gone] = count
        for page in self.taken.tolist():
            cache._limbo.append((page, cache._clock))
        cache._settle()


def mha_cached(
    q: Any,
    cache: KVCache,
    *,
    k: Any = None,
    v: Any = None,
    ids: Any = None,
    cu_q: Any = None,
    causal: bool = True,
    **options: Any,
) -> Any:
    """Attention of new rows over a cache; with k and v these are appended first.

    Rows stand last: row i of a sequence has the position ``length - Sq + i``. On the CPU it has the bits that
    `mha` gives over the same keys in one piece.

    Parameters
    ----------
    q : array (B, Sq, Hq, D), or packed (Tq, Hq, D)
        Rows of B sequences, in the dtype of the cache. Packed rows may be a prompt of one sequence and a single
        row of another.
    cache : KVCache
    k, v : array, optional
        New keys (B, n, Hkv, D) and values (B, n, Hkv, Dv); packed as q, with the bounds of cu_q.
    ids : integer array (B,), optional
        The sequences; default: all in use, ascending.
    cu_q : integer array (B + 1,), optional
        Bounds of packed rows.
    causal : bool
    **options
        As in `mha`, but q_lens, kv_lens, return_weights, dropout and seed. mask and bias have the Sk of the
        longest sequence; with a window and ``keep`` a mask must be a Mask.

    Returns
    -------
    out, or (out, lse)
        As `mha`, or `mha_varlen` with cu_q.

    Raises
    ------
    TypeError, ValueError, fastattn.UnsupportedError, MemoryError
        As `mha` and `KVCache.append`. Nothing was appended then, nor after an interrupt.
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache: expected a KVCache, got {type(cache).__name__}")
    for name in ("q_lens", "kv_lens", "return_weights", "dropout", "seed", "cu_kv", "layout"):
        if name in options:
            raise TypeError(f"mha_cached() got an unexpected keyword argument '{name}'")
    if (k is None) != (v is None):
        raise ValueError("k, v: expected both, or none")
    appended = None
    began = 0
    try:
        with cache._lock:
            which = cache.ids if ids is None else cache._ids(ids)
            if k is not None:
                appended = cache._append(k, v, which, cu_q)
                cache._busy.update(which.tolist())
            settings = _positions(cache, which, options)
            lens = cache._lengths[which]
            _check_window(cache, which, lens, q, cu_q)
            pages = _Pages(cache._pages_of(which))
            began = cache._begin()
        core: Any = _core
        if cu_q is None:
            result = core.mha(q, pages, pages, kv_lens=lens, causal=causal, **settings)
        else:
            result = core.mha_varlen(q, pages, pages, cu_q, kv_lens=lens, causal=causal, **settings)
    except BaseException:
        with cache._lock:
            if appended is not None:
                cache._busy.difference_update(appended.which.tolist())
                appended.undo()
            cache._end(began)
        raise
    with cache._lock:
        if appended is not None:
            cache._busy.difference_update(appended.which.tolist())
            appended.commit()
        cache._end(began)
    return result


def _check_window(cache: KVCache, which: Array, lens: Array, q: Any, cu_q: Any) -> None:
    """The rows see no keys that a window has given back."""
    base = cache._base[which]
    if cache._left is None or not base.any():
        return
    shape = np.shape(q)
    rows = np.diff(np.asarray(cu_q)) if cu_q is not None else np.full(which.size, shape[1] if len(shape) == 4 else 0)
    if rows.shape != lens.shape:
        return  # an error of the call, which says it better
    wrong = np.flatnonzero((base > 0) & (rows > 0) & (np.maximum(lens - rows - cache._left, 0) < base))
    if wrong.size:
        b = int(wrong[0])
        raise ValueError(
            f"q: the window of id {which[b]} has given back the keys below {base[b]}, so it has "
            f"{lens[b] - base[b] - cache._left} rows at most, got {rows[b]}"
        )


class _Pages:
    """Pool and table of one call, as the compiled module takes them for k and v."""

    def __init__(self, pages: tuple[Array, Array, Array]) -> None:
        self._fastattn_pages = pages


def _positions(cache: KVCache, which: Array, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the window of the cache."""
    options = dict(options)
    by_position = [name for name in ("window", "alibi_slopes", "q_offset") if options.get(name) is not None] + [
        "mask"
    ] * isinstance(options.get("mask"), masks.Mask)
    compacted = which[cache._compacted[which]]
    if compacted.size and (by_position or cache._left is not None):
        name = by_position[0] if by_position else "window"
        raise ValueError(f"{name}: id {compacted[0]} was compacted, its positions are not what they were")
    if cache._left is None:
        return options
    left, right = options.get("window") or (None, None)
    if cache._keep == 0:
        options["window"] = (cache._left if left is None else min(cache._left, as_integer(left)), right)
        return options
    mask = options.get("mask")
    if mask is not None and not isinstance(mask, masks.Mask):
        raise TypeError("mask: expected a Mask beside a window that keeps the first keys, got an array")
    own = masks.sinks_window(cache._keep, cache._left)
    options["mask"] = own if mask is None else own & mask
    return options


def _size(name: str, x: Any, least: int) -> int:
    if isinstance(x, bool):
        raise TypeError(f"{name}: expected an int, got a bool")
    try:
        value = int(as_integer(x))
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(x).__name__}") from None
    if value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value}")
    return value


def _float_dtype(dtype: Any) -> np.dtype[Any]:
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in _FLOATS:
        raise TypeError(f"dtype: expected one of {', '.join(_FLOATS)}, got {name}")
    if name == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    else:
        dtype = name
    kind: np.dtype[Any] = np.dtype(dtype)
    return kind


def _read_only(x: Array) -> Array:
    view = x.view()
    view.setflags(write=False)
    return view
