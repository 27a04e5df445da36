"""KVCache and mha_cached: the bits of the plain call over the same keys, transactions, windows, threads."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from inputs import normal

import fastattn
from fastattn import KVCache, masks, mha_cached

HQ, HKV, D, DV = 4, 2, 24, 16


def bits(x):
    return np.ascontiguousarray(x).view(np.uint8)


def keys_of(n, dtype, seed):
    return normal((n, HKV, D), dtype, seed), normal((n, HKV, DV), dtype, seed + 1)


def filled(lengths, dtype, page=64, **options):
    """A cache with sequences of these lengths, their keys, and pages in no order."""
    total = sum(-(-n // page) for n in lengths) + 12
    cache = KVCache(HKV, D, DV, tokens=total * page, dtype=dtype, page=page, **options)
    shuffled = np.random.default_rng(page).permutation(cache._k.shape[0]).tolist()
    cache._free_pages = shuffled  # any order will do: a heap only prefers low ones
    cache._k[:], cache._v[:] = np.nan, np.nan
    ids = cache.add(len(lengths))
    whole = [keys_of(n, dtype, 10 * b) for b, n in enumerate(lengths)]
    for one, (k, v) in zip(ids, whole, strict=True):
        cache.append(k[None], v[None], [one])
    return cache, ids, whole


def snapshot(cache):
    """All that can be asked of a cache."""
    return (
        cache.ids.tolist(),
        cache.lengths[cache.ids].tolist(),
        cache.tokens_free,
        [[x.tobytes() for x in cache.read(one)] for one in cache.ids],
        sorted(cache._uses.tolist()),
    )


LENGTHS = [1, 300, 70, 0, 1100]


@pytest.mark.cpu_only
@pytest.mark.parametrize("page", [1, 16, 64, 100])
def test_pages_have_the_bits_of_the_plain_call(kernel, dtype, page, threads):
    lengths = [1, 30, 7, 0] if kernel == "cpu-reference" else LENGTHS
    cache, _ids, whole = filled(lengths, dtype, page)
    for Sq, kw in ((1, {}), (3, {"causal": False}), (40, {"window": (50, None)}), (2, {"softcap": 3.0})):
        q = normal((len(lengths), Sq, HQ, D), dtype, 5)
        for n in (2,) if kernel == "cpu-reference" else (1, 3):
            fastattn.set_num_threads(n)
            out, lse = mha_cached(q, cache, kernel=kernel, return_lse=True, **kw)
            for b, (k, v) in enumerate(whole):
                options = {"causal": True} | kw
                want = fastattn.mha(q[b], k, v, kernel=kernel, return_lse=True, **options)
                assert np.array_equal(bits(out[b]), bits(want[0])), (page, Sq, b)
                assert np.array_equal(bits(lse[b]), bits(want[1])), (page, Sq, b)


@pytest.mark.cpu_only
def test_prompts_beside_single_rows(kernel, dtype, threads):
    lengths = [200, 40, 3, 90]
    if kernel in ("cpu-reference", "cpu-scalar"):
        lengths = [n // 4 + 1 for n in lengths]
    cache, ids, whole = filled([n - 1 for n in lengths], dtype, 16)
    rows = [1, 30 if lengths[1] > 30 else 5, 1, 1]
    order = [2, 0, 1, 3]
    sizes = [rows[b] for b in order]
    cu = np.r_[0, np.cumsum(sizes)]
    q = normal((cu[-1], HQ, D), dtype, 3)
    k, v = keys_of(cu[-1], dtype, 77)
    fastattn.set_num_threads(2)
    out = mha_cached(q, cache, k=k, v=v, ids=ids[order], cu_q=cu, kernel=kernel)
    for n, b in enumerate(order):
        mine = slice(cu[n], cu[n + 1])
        keys, values = (np.concatenate([old, new[mine]]) for old, new in zip(whole[b], (k, v), strict=True))
        assert np.array_equal(
            bits(out[mine]), bits(fastattn.mha(q[mine], keys, values, causal=True, kernel=kernel))
        )
        assert cache.lengths[ids[b]] == keys.shape[0]
        for found, want in zip(cache.read(ids[b]), (keys, values), strict=True):
            assert np.array_equal(bits(found), bits(want))


@pytest.mark.cpu_only
@pytest.mark.parametrize(("keep", "left"), [(0, 40), (5, 40), (64, 10)])
def test_windows_equal_the_full_cache(dtype, keep, left, threads):
    whole = keys_of(700, dtype, 3)
    cache = KVCache(
        HKV, D, DV, tokens=16 * (8 + -(-keep // 16)), dtype=dtype, page=16, window=(left, None), keep=keep
    )
    full = KVCache(HKV, D, DV, tokens=720, dtype=dtype, page=16)
    cache.add()
    full.add()
    rng = np.random.default_rng(0)
    at = 0
    while at < 700:
        n = min(int(rng.integers(1, 40)), 700 - at)
        q = normal((1, n, HQ, D), dtype, at)
        k, v = (x[None, at : at + n] for x in whole)
        out = mha_cached(q, cache, k=k, v=v)
        want = mha_cached(q, full, k=k, v=v, mask=masks.sinks_window(keep, left))
        assert np.array_equal(bits(out), bits(want)), at
        at += n
    assert (cache.table[0] >= 0).sum() <= 8 + -(-keep // 16)
    with pytest.raises(
        ValueError, match=r"length: expected at least \d+, as the window of id 0 has given older"
    ):
        cache.truncate(0, 100)
    q = normal((1, 200, HQ, D), dtype, 1)
    with pytest.raises(ValueError, match="q: the window of id 0 has given back the keys below"):
        mha_cached(q, cache)


def test_forks_share_pages_until_they_are_written():
    cache, ids, whole = filled([100], np.float32, 16)
    free = cache.tokens_free
    forks = cache.fork(ids[0], 3)
    assert cache.tokens_free == free
    k, v = keys_of(5, np.float32, 50)
    cache.append(k[None], v[None], [forks[1]])
    assert cache.tokens_free == free - 16  # a copy of the last page, which had 4 keys
    for one, keys in ((ids[0], whole[0]), (forks[0], whole[0])):
        assert all(np.array_equal(a, b) for a, b in zip(cache.read(one), keys, strict=True))
    want = [np.concatenate([a, b]) for a, b in zip(whole[0], (k, v), strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(cache.read(forks[1]), want, strict=True))
    short = cache.fork(forks[1], length=37)[0]
    assert cache.lengths[short] == 37
    cache.free(forks)
    cache.free([ids[0], short])
    assert cache.tokens_free == cache._k.shape[0] * 16
    assert not cache._uses.any()


def test_reorder_moves_all_at_once():
    cache, ids, whole = filled([30, 50, 20], np.float32, 16)
    cache.reorder(ids[[1, 1, 0]])
    for one, b in zip(ids, (1, 1, 0), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(cache.read(one), whole[b], strict=True))
    with pytest.raises(ValueError, match="ids: expected one for each of the 3 ids in use, got 2"):
        cache.reorder(ids[:2])


def test_compact_keeps_chosen_keys():
    cache, ids, whole = filled([90], np.float32, 16)
    index = np.stack([np.arange(0, 90, 3), np.arange(1, 90, 3)])
    cache.compact(ids[0], index)
    k, v = cache.read(ids[0])
    for h in range(HKV):
        assert np.array_equal(k[:, h], whole[0][0][index[h], h])
        assert np.array_equal(v[:, h], whole[0][1][index[h], h])
    q = normal((1, 1, HQ, D), np.float32, 1)
    assert np.array_equal(mha_cached(q, cache)[0], fastattn.mha(q[0], k, v, causal=True))
    for option in ({"window": (3, None)}, {"mask": masks.chunks(4)}, {"alibi_slopes": np.ones(HQ)}):
        with pytest.raises(ValueError, match="id 0 was compacted"):
            mha_cached(q, cache, **option)


def test_out_of_pages_changes_nothing():
    cache, ids, _whole = filled([10, 10], np.float32, 16)
    cache.append(*(x[None] for x in keys_of(cache.tokens_free - 32, np.float32, 8)), [ids[0]])
    before = snapshot(cache)
    free = cache.tokens_free
    k, v = (np.stack([x, x]) for x in keys_of(40, np.float32, 9))
    with pytest.raises(MemoryError, match=r"6 pages of 16 keys are wanted, 2 are free"):
        cache.append(k, v)
    q = normal((2, 40, HQ, D), np.float32, 1)
    with pytest.raises(MemoryError):
        mha_cached(q, cache, k=k, v=v)
    with pytest.raises(ValueError, match="kernel"):
        mha_cached(q[:, :1], cache, k=k[:, :1], v=v[:, :1], kernel="nonsense")
    with pytest.raises(TypeError):
        mha_cached(q[:, :1].astype(np.float64), cache, k=k[:, :1], v=v[:, :1])
    assert cache.tokens_free == free
    assert snapshot(cache) == before


def test_a_failed_append_under_a_window_brings_old_pages_back():
    cache = KVCache(HKV, D, DV, tokens=64, page=16, window=(10, None))
    cache.add()
    k, v = keys_of(64, np.float32, 1)
    cache.append(k[None, :60], v[None, :60])
    before = [x.copy() for x in cache.read(0)]
    q = normal((1, 30, HQ, D), np.float32, 1)
    with pytest.raises(ValueError, match="kernel"):  # needs the pages that the window gives back
        mha_cached(q, cache, k=k[None, :30], v=v[None, :30], kernel="nonsense")
    assert cache.lengths[0] == 60
    for found, want in zip(cache.read(0), before, strict=True):
        assert np.array_equal(found, want)
    mha_cached(q, cache, k=k[None, :30], v=v[None, :30])
    assert cache.lengths[0] == 90


def test_over_arrays_of_somebody_else():
    pool_k, pool_v = normal((6, 8, HKV, D), np.float32, 1), normal((6, 8, HKV, DV), np.float32, 2)
    table = np.array([[4, 1, 5], [2, 0, 9]])
    cache = KVCache.from_arrays(pool_k, pool_v, [20, 11], block_table=table)
    q = normal((2, 1, HQ, D), np.float32, 3)
    out = mha_cached(q, cache)
    for b, n in enumerate((20, 11)):
        k, v = (x[table[b, : -(-n // 8)]].reshape(-1, *x.shape[2:])[:n] for x in (pool_k, pool_v))
        assert np.array_equal(out[b], fastattn.mha(q[b], k, v, causal=True))
    assert cache.tokens_free == 8
    cache.append(pool_k[None, 3, :5] * 2, pool_v[None, 3, :5], [1])
    assert np.array_equal(pool_k[0, 3:], pool_k[3, :5] * 2)  # the memory is the caller's
    with pytest.raises(ValueError, match="block_table: expected pages below 6, got 9 for page 2 of entry 1"):
        KVCache.from_arrays(pool_k, pool_v, [20, 24], block_table=table)
    plain = KVCache.from_arrays(pool_k, pool_v, [3] * 6)
    assert np.array_equal(
        mha_cached(q, plain, ids=[1, 5])[1], fastattn.mha(q[1], pool_k[5, :3], pool_v[5, :3])
    )


@pytest.mark.parametrize("way", ["pickle", "save"])
def test_saved_and_read_again(way, tmp_path, dtype):
    cache, ids, _ = filled([30, 50, 20], dtype, 16)
    cache.fork(ids[1])
    cache.free([ids[0]])
    if way == "pickle":
        again, order = pickle.loads(pickle.dumps(cache)), cache.ids
        assert again.tokens_free == cache.tokens_free
        assert np.array_equal(again.ids, cache.ids)
    else:
        cache.save(tmp_path / "cache.npz")
        again = KVCache.load(tmp_path / "cache.npz", tokens=300)
        order = again.ids
    for one, other in zip(cache.ids, order, strict=True):
        for a, b in zip(cache.read(one), again.read(other), strict=True):
            assert np.array_equal(bits(a), bits(b))
    assert (again._uses > 1).any()  # the fork still shares


def test_explain_and_masks_over_pages():
    cache, ids, whole = filled([100, 130], np.float32, 16)
    q = normal((2, 1, HQ, D), np.float32, 3)
    plan = fastattn.explain(q, cache, cache, kv_lens=cache.lengths[ids], device="cpu")
    assert plan.flops == 2 * (D + DV) * HQ * 230
    allowed = np.random.default_rng(0).random((2, 1, 1, 130)) < 0.5
    index = np.random.default_rng(1).integers(0, 100, (2, HKV, 1, 9))
    for mask in (allowed, masks.keys(index), masks.sinks_window(2, 9)):
        out = mha_cached(q, cache, mask=mask)
        for b, (k, v) in enumerate(whole):
            own = mask[b, :, :, : k.shape[0]] if mask is allowed else mask
            if isinstance(mask, masks.Mask) and mask._conditions[0].kind == 0:
                own = masks.keys(index[b])
            assert np.allclose(out[b], fastattn.mha(q[b], k, v, mask=own, causal=True), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda c: c.append(*c.rows(1, heads=3)), ValueError, r"k: expected \(2, n, 2, 24\) for 2 ids"),
        (lambda c: c.append(*c.rows(1), ids=[0, 0]), ValueError, "ids: expected each id once"),
        (lambda c: c.append(*c.rows(1), ids=[0, 7]), ValueError, "ids: 7 is not in use"),
        (lambda c: c.append(*c.rows(1, dtype=np.float64)), TypeError, "k: expected float32 as the"),
        (lambda c: c.free([5]), ValueError, "ids: 5 is not in use"),
        (lambda c: c.fork(0, length=11), ValueError, "length: expected at most the 10 keys of id 0, got 11"),
        (lambda c: c.truncate(0, 11), ValueError, "length: expected at most the 10 keys"),
        (lambda c: c.truncate(0, -1), ValueError, "length: expected an int >= 0"),
        (lambda c: c.compact(0, [3, 3]), ValueError, "index: expected ascending positions below 10"),
        (lambda c: KVCache(2, 8, tokens=10, dtype="int8"), TypeError, "dtype: expected one of float64"),
        (lambda c: KVCache(0, 8, tokens=10), ValueError, "kv_heads: expected an int >= 1, got 0"),
        (lambda c: KVCache(2, 8, tokens=10, keep=3), ValueError, "keep, rollback: expected a window"),
        (lambda c: KVCache(2, 8, tokens=10, window=(1, 0)), ValueError, r"window: expected \(left, None\)"),
    ],
)  # fmt: skip
def test_wrong_arguments_change_nothing(make, error, message):
    class Filled(KVCache):
        def rows(self, n, heads=HKV, dtype=np.float32):
            return np.zeros((2, n, heads, D), dtype), np.zeros((2, n, heads, DV), dtype)

    cache = Filled(HKV, D, DV, tokens=100)
    cache.add(2)
    cache.append(*cache.rows(10))
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        make(cache)
    assert snapshot(cache) == before


@pytest.mark.parametrize("name", ["q_lens", "kv_lens", "return_weights", "dropout", "layout"])
def test_what_mha_cached_does_not_take(name):
    cache, _, _ = filled([10], np.float32)
    with pytest.raises(TypeError, match=f"mha_cached.. got an unexpected keyword argument '{name}'"):
        mha_cached(normal((1, 1, HQ, D), np.float32, 1), cache, **{name: None})


def test_threads_append_fork_free_and_attend():
    cache = KVCache(HKV, D, DV, tokens=4000, page=16)
    errors = []

    def work(seed):
        rng = np.random.default_rng(seed)
        own = {}
        try:
            for _ in range(60):
                choice = rng.integers(5)
                if choice == 0 or not own:
                    own[int(cache.add()[0])] = [
                        np.zeros((0, HKV, D), np.float32),
                        np.zeros((0, HKV, DV), np.float32),
                    ]
                one = int(rng.choice(list(own)))
                if choice == 1:
                    fork = int(cache.fork(one)[0])
                    own[fork] = [x.copy() for x in own[one]]
                elif choice == 2 and len(own) > 3:
                    cache.free([one])
                    del own[one]
                    continue
                elif choice == 3 and len(own[one][0]):
                    length = int(rng.integers(len(own[one][0])))
                    cache.truncate(one, length)
                    own[one] = [x[:length] for x in own[one]]
                k, v = (rng.standard_normal((1, 7, HKV, n)).astype(np.float32) for n in (D, DV))
                q = rng.standard_normal((1, 7, HQ, D)).astype(np.float32)
                try:
                    out = mha_cached(q, cache, k=k, v=v, ids=[one])
                except MemoryError:
                    continue
                own[one] = [np.concatenate([x, y[0]]) for x, y in zip(own[one], (k, v), strict=True)]
                if not np.array_equal(out[0], fastattn.mha(q[0], *own[one], causal=True)):
                    errors.append((seed, one))
            for one, keys in own.items():
                if not all(np.array_equal(x, y) for x, y in zip(cache.read(one), keys, strict=True)):
                    errors.append((seed, one, "read"))
            cache.free(list(own))
        except BaseException as error:
            errors.append(error)
            raise

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert not cache._uses.any()
    assert cache.tokens_free == 4000


def test_an_interrupt_takes_the_append_back(monkeypatch):
    cache, ids, _whole = filled([20, 33], np.float32, 16, window=(8, None))
    k, v = (np.stack([x, x]) for x in keys_of(40, np.float32, 9))
    before = snapshot(cache)
    for name in ("_write", "_pages_of"):

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(cache, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                mha_cached(normal((2, 40, HQ, D), np.float32, 1), cache, k=k, v=v)
        assert snapshot(cache) == before
    mha_cached(normal((2, 40, HQ, D), np.float32, 1), cache, k=k, v=v)
    assert cache.lengths[ids].tolist() == [60, 73]


def test_a_sequence_that_a_running_call_appends_to_refuses_changes():
    cache, ids, _ = filled([20, 5], np.float32, 16)
    cache._busy.add(int(ids[0]))
    for change in (
        cache.fork,
        cache.free,
        lambda one: cache.truncate(one, 1),
        lambda one: cache.compact(one, [0]),
    ):
        with pytest.raises(ValueError, match="ids: a running call of mha_cached appends to 0"):
            change(ids[0])
    with pytest.raises(ValueError, match="appends to 0"):
        cache.reorder(ids)
    cache.fork(ids[1])


class Machine(RuleBasedStateMachine):
    """A cache against lists of keys."""

    @initialize(page=st.sampled_from([1, 4, 16]), tokens=st.integers(40, 200))
    def start(self, page, tokens):
        self.cache = KVCache(1, 4, tokens=tokens, page=page)
        self.model: dict[int, np.ndarray] = {}
        self.next = 1.0

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.model)))

    @rule(n=st.integers(0, 3))
    def add(self, n):
        for one in self.cache.add(n):
            self.model[int(one)] = np.zeros((0, 1, 4), np.float32)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), size=st.integers(0, 30))
    def append(self, data, size):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True, min_size=1))
        k = (self.next + np.arange(len(ids) * size * 4, dtype=np.float32)).reshape(len(ids), size, 1, 4)
        self.next += k.size
        try:
            if data.draw(st.booleans()):
                self.cache.append(k, -k, ids)
            else:
                mha_cached(k[:, :1] * 0 if size else np.zeros((len(ids), 1, 1, 4), np.float32),
                           self.cache, k=k, v=-k, ids=ids)  # fmt: skip
        except MemoryError:
            return
        for one, x in zip(ids, k, strict=True):
            self.model[one] = np.concatenate([self.model[one], x])

    @precondition(lambda self: self.model)
    @rule(data=st.data(), n=st.integers(0, 2))
    def fork(self, data, n):
        one = self.pick(data)
        length = data.draw(st.integers(0, len(self.model[one])))
        for new in self.cache.fork(one, n, length):
            self.model[int(new)] = self.model[one][:length]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        one = self.pick(data)
        self.cache.free(one)
        del self.model[one]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data):
        one = self.pick(data)
        length = data.draw(st.integers(0, len(self.model[one])))
        self.cache.truncate(one, length)
        self.model[one] = self.model[one][:length]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def reorder(self, data):
        live = sorted(self.model)
        ids = data.draw(st.lists(st.sampled_from(live), min_size=len(live), max_size=len(live)))
        self.cache.reorder(ids)
        self.model = {one: self.model[other] for one, other in zip(live, ids, strict=True)}

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def compact(self, data):
        one = self.pick(data)
        index = sorted(data.draw(st.sets(st.integers(0, max(len(self.model[one]) - 1, 0)))))
        index = np.array(index[: len(self.model[one])], int)
        try:
            self.cache.compact(one, index)
        except MemoryError:
            return
        self.model[one] = self.model[one][index]

    @rule()
    def copied(self):
        self.cache = pickle.loads(pickle.dumps(self.cache))

    @invariant()
    def same(self):
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        assert cache.ids.tolist() == sorted(self.model)
        for one, keys in self.model.items():
            k, v = cache.read(one)
            assert np.array_equal(k, keys)
            assert np.array_equal(v, -keys)
        used = cache.table[cache.table >= 0]
        assert np.array_equal(np.bincount(used, minlength=cache._uses.size), cache._uses)
        assert len(set(cache._free_pages)) == len(cache._free_pages) == (cache._uses == 0).sum()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
