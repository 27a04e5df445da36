"""fastattn.masks: what the constructors say, every kernel against the bool array, bits, NaN, refusals."""

from __future__ import annotations

import copy
import pickle

import gate
import gate_backward
import numpy as np
import pytest
from inputs import normal, qkv
from subproc import run
from test_entry_bits import HKV, HQ, LENGTHS, attend, bits, entry_of, padded_batch
from test_varlen import attend_packed, pack

import fastattn
from fastattn import masks, reference

B, G = 2, 2


def made(Sq, Sk, seed=0):
    """A mask of every kind, with what it means by a plain definition: (mask, bool array)."""
    rng = np.random.default_rng([seed, Sq, Sk])
    i, j = np.arange(Sq)[:, None], np.arange(Sk)
    p = i + Sk - Sq
    ids_q, ids_kv = rng.integers(0, 4, (B, Sq)), rng.integers(0, 5, Sk)
    sorted_ids = np.sort(rng.integers(0, 4, Sk))
    edges = np.sort(rng.integers(0, Sk + 9, (B, 1, Sq, 6)), axis=-1) - 4
    within = (j >= edges[..., ::2, None]) & (j < edges[..., 1::2, None])
    allowed = rng.random((B, 1, -(-Sq // 8), -(-Sk // 24))) < 0.4
    index = rng.integers(-1, Sk, (B, HKV, Sq, 9))
    few = rng.integers(-1, -(-Sk // 4), (1, 1, Sq, 3))
    last = rng.random((B, HQ, Sq, 7)) < 0.5
    parents = np.array([-1, *(int(rng.integers(max(-1, n - 4), n)) for n in range(1, Sq))])
    ancestors = np.zeros((Sq, Sq), bool)
    for n, parent in enumerate(parents):
        ancestors[n] = ancestors[parent] if parent >= 0 else False
        ancestors[n, n] = True

    def picked(x, block):
        return (j == x[..., None]).any(-2) if block == 1 else (j // block == x[..., None]).any(-2)

    tree = np.ones((Sq, Sk), bool)
    if Sq <= Sk:
        tree[:, Sk - Sq :] = ancestors
    else:
        tree = ancestors[:, Sq - Sk :]
    tail = np.ones((B, HQ, Sq, Sk), bool)
    tail[..., max(Sk - 7, 0) :] = last[..., -min(Sk, 7) :]
    prefix = (j < np.array([3, Sk // 2]).reshape(B, 1, 1, 1)) | (j <= p)
    window = (j < 3) | ((j >= p - 11) & (j <= p))
    blocks = np.repeat(np.repeat(allowed, 8, axis=2), 24, axis=3)[:, :, :Sq, :Sk]
    return {
        "documents": (masks.documents(ids_q, ids_kv), ids_q[:, None, :, None] == ids_kv),
        "sorted": (masks.documents(sorted_ids[-min(Sq, Sk) :][np.arange(Sq) % min(Sq, Sk)], sorted_ids),
                   sorted_ids[-min(Sq, Sk) :][np.arange(Sq) % min(Sq, Sk)][:, None] == sorted_ids),
        "blocks": (masks.blocks(allowed, (8, 24)), blocks),
        "keys": (masks.keys(index), picked(index, 1)),
        "key-blocks": (masks.keys(few, 4), picked(few, 4)),
        "ranges": (masks.ranges(edges.reshape(B, 1, Sq, 3, 2)), within.any(-2)),
        "tail": (masks.tail(last), tail),
        "tree": (masks.tree(parents), tree),
        "prefix": (masks.prefix_lm([3, Sk // 2]), prefix),
        "sinks_window": (masks.sinks_window(3, 11), window),
        "chunks": (masks.chunks(13), p // 13 == j // 13),
        "joined": (masks.sinks_window(3, 11) & masks.blocks(allowed, (8, 24))
                   & masks.documents(ids_q, ids_kv),
                   window & blocks & (ids_q[:, None, :, None] == ids_kv)),
        "nothing": (masks.ranges(np.zeros((Sq, 0, 2), int)), np.zeros((Sq, Sk), bool)),
    }  # fmt: skip


NAMES = list(made(3, 5))
SIZES = [(1, 70), (4, 300), (70, 70), (90, 333), (12, 5)]


def by_query_heads(x):
    """(B, Hkv, ...) of a mask by heads of k, for each query head."""
    x = np.asarray(x)
    return np.repeat(x, HQ // HKV, axis=1) if x.ndim == 4 and x.shape[1] == HKV else x


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_meaning(name, sizes):
    mask, want = made(*sizes)[name]
    got = mask.to_bool(*sizes)
    assert got.dtype == bool
    assert got.ndim == 4
    assert np.array_equal(np.broadcast_to(got, np.broadcast_shapes(got.shape, want.shape)),
                          np.broadcast_to(want, np.broadcast_shapes(got.shape, want.shape)))  # fmt: skip


PROBLEMS = [
    (1, 300, {"kv_lens": True, "bias": True}),
    (4, 70, {"softcap": 4.0}),
    (75, 200, {"causal": True}),
    (70, 40, {"kv_lens": True}),
]


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel(kernel, dtype, name):
    for Sq, Sk, options in PROBLEMS:
        if kernel == "cpu-reference" and Sq > 4:
            Sq, Sk = Sq // 4, Sk // 4
        check_mask(kernel, dtype, name, Sq, Sk, options)


def check_mask(kernel, dtype, name, Sq, Sk, options):
    mask, _ = made(Sq, Sk)[name]
    q, k, v = qkv(dtype, B=B, Sq=Sq, Sk=Sk, Hq=HQ, Hkv=HKV, D=24, Dv=40)
    kw = {**options}
    if kw.pop("bias", False):
        kw["bias"] = normal((HQ, Sq, Sk), dtype, 3)
    if kw.get("kv_lens"):
        kw["kv_lens"] = np.array([Sk, Sk * 2 // 3])
    # The positions and the ends of the entries are the call's: the reference asks the Mask entry by entry.
    lens = kw.get("kv_lens", [Sk] * B)
    allowed = np.stack([mask._of_entry(b, (HQ, Sq, Sk), int(lens[b]) - Sq, int(lens[b])) for b in range(B)])
    as_bool = {**kw, "mask": allowed}
    want = gate.oracle(q, k, v, **as_bool)
    out, lse, weights = fastattn.mha(
        q, k, v, mask=mask, kernel=kernel, return_lse=True, return_weights=True, **kw
    )
    gate.assert_out(out, want, q.dtype)
    gate.assert_lse(lse, want, q.dtype)
    gate.assert_weights(weights, want, q.dtype)
    # Without the weights few rows are decoded.
    out, lse = fastattn.mha(q, k, v, mask=mask, kernel=kernel, return_lse=True, **kw)
    gate.assert_out(out, want, q.dtype)
    gate.assert_lse(lse, want, q.dtype)
    dout = normal(out.shape, dtype, 99)
    grads = fastattn.mha_backward(dout, q, k, v, out, lse, mask=mask, kernel=kernel, **kw)
    gate_backward.assert_gradients(grads, (q, k, v), dout, None, as_bool)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference(name):
    mask, want = made(9, 31)[name]
    q, k, v = qkv(np.float64, B=B, Sq=9, Sk=31, Hq=HQ, Hkv=HKV)
    mine = reference.mha(q, k, v, mask=mask, return_lse=True)
    other = reference.mha(q, k, v, mask=by_query_heads(want), return_lse=True)
    for a, b in zip(mine, other, strict=True):
        assert np.array_equal(a, b)
    entry = reference.mha(q[1:], k[1:], v[1:], mask=np.broadcast_to(by_query_heads(want), (B, HQ, 9, 31))[1:])
    assert np.array_equal(mine[0][1:], entry)


@pytest.mark.cpu_only
def test_what_causal_window_and_lengths_say_has_their_bits(kernel, dtype):
    for Sq, Sk in ((1, 2300), (150, 300)):
        q, k, v = qkv(dtype, B=B, Sq=Sq, Sk=Sk, Hq=HQ, Hkv=HKV, D=40)
        dout = normal(q.shape, dtype, 8)
        p = np.arange(Sq) + Sk - Sq
        end = np.minimum(p + 1, Sk)
        cases = [
            ({"causal": True}, masks.ranges(np.stack([0 * p, end], -1)[:, None])),
            (
                {"window": (60, 3)},
                masks.ranges(np.stack([np.maximum(p - 60, 0), np.minimum(p + 4, Sk)], -1)[:, None]),
            ),
            ({"causal": True, "window": (60, None)}, masks.sinks_window(0, 60)),
            ({}, masks.ranges([[0, Sk // 2], [Sk // 2, Sk]])),
            ({}, masks.documents(np.zeros(Sq, int), np.zeros(Sk, int))),
            ({}, masks.prefix_lm(Sk)),
            ({"causal": True}, masks.prefix_lm(0)),
        ]
        for plain, mask in cases:
            want = attend(kernel, (q, k, v, dout), plain)
            found = attend(kernel, (q, k, v, dout), {"mask": mask})
            for what in want:
                assert np.array_equal(bits(want[what]), bits(found[what])), (Sq, plain, what)


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", ["sinks_window", "chunks", "ranges", "keys"])
def test_an_entry_has_the_bits_that_it_has_alone(kernel, dtype, kind, threads):
    lengths = LENGTHS["short"]
    arrays = padded_batch(dtype, lengths, 40, 24)
    Sq = arrays[0].shape[1]
    rng = np.random.default_rng(3)
    edges = np.sort(rng.integers(0, 130, (len(lengths), 1, Sq, 4)), axis=-1)
    index = [rng.integers(-1, max(kv, 1) if kv else 0, (1, HKV, Sq, 5)) for _, kv in lengths]

    def mask_of(entries, rows):
        if kind == "ranges":
            own = edges[entries, :, rows]
            return masks.ranges(own.reshape(*own.shape[:-1], 2, 2))
        if kind == "keys":
            return masks.keys(np.concatenate(index)[entries, :, rows])
        return {"sinks_window": masks.sinks_window(2, 40), "chunks": masks.chunks(50)}[kind]

    fastattn.set_num_threads(1)
    alone = [
        attend(kernel, entry_of(arrays, b, *pair), {"mask": mask_of(slice(b, b + 1), slice(pair[0]))})
        for b, pair in enumerate(lengths)
    ]
    lens = {"q_lens": np.array([q for q, _ in lengths]), "kv_lens": np.array([kv for _, kv in lengths])}
    packed, cu_q, cu_kv = pack(arrays, lengths)
    if kind in ("ranges", "keys"):
        rows = [
            (edges if kind == "ranges" else np.concatenate(index))[b, :, :q]
            for b, (q, _) in enumerate(lengths)
        ]
        joined = np.concatenate(rows, axis=1)[None]
        whole = masks.keys(joined) if kind == "keys" else masks.ranges(joined.reshape(1, 1, -1, 2, 2))
    else:
        whole = mask_of(slice(None), slice(None))
    for n in (2,) if kernel == "cpu-reference" else (1, 2, 3):
        fastattn.set_num_threads(n)
        padded = attend(kernel, arrays, lens | {"mask": mask_of(slice(None), slice(None))})
        found = attend_packed(kernel, packed, cu_q, cu_kv, {"mask": whole})
        for b, (q_len, kv_len) in enumerate(lengths):
            for name, x in alone[b].items():
                own = slice(kv_len if name in ("dk", "dv") else q_len)
                got = padded[name][b][:, own] if name == "lse" else padded[name][b][own]
                assert np.array_equal(bits(x[0]), bits(got)), (name, b, n)
                cu = cu_kv if name in ("dk", "dv") else cu_q
                mine = slice(*cu[b : b + 2])
                got = found[name][:, mine] if name == "lse" else found[name][mine]
                assert np.array_equal(bits(x[0]), bits(got)), (name, b, n, "packed")


@pytest.mark.cpu_only
def test_packed_entries_against_the_reference(kernel):
    dtype = np.float64 if kernel in ("cpu-reference", "cpu-scalar", "cpu-avx2", "cpu-avx512") else np.float32
    if kernel == "cpu-avx512bf16":
        pytest.skip("no row for float64")
    lengths = [(5, 37), (0, 9), (20, 60)]
    arrays, cu_q, cu_kv = pack(padded_batch(np.dtype(dtype), lengths, 16, 16), lengths)
    rng = np.random.default_rng(1)
    options = {
        "tail": masks.tail(rng.random((1, HQ, 25, 6)) < 0.5),
        "keys": masks.keys(rng.integers(-1, 37, (HKV, 25, 4))),
        "blocks": masks.blocks(rng.random((HQ, 4, 9)) < 0.5, (8, 7)),
        "prefix": masks.prefix_lm([3, 0, 11]),
        "joined": masks.sinks_window(2, 9) & masks.prefix_lm([3, 0, 11]),
    }
    for name, mask in options.items():
        for kw in ({}, {"kv_lens": np.array([30, 9, 60]), "q_offset": np.array([2, 0, 7])}):
            kw = kw | {"mask": mask}
            found = attend_packed(kernel, arrays, cu_q, cu_kv, kw)
            out, lse = reference.mha_varlen(*arrays[:3], cu_q, cu_kv, return_lse=True, **kw)
            grads = reference.mha_varlen_backward(arrays[3], *arrays[:3], None, None, cu_q, cu_kv, **kw)
            want = {"out": out, "lse": lse, "dq": grads.dq, "dk": grads.dk, "dv": grads.dv}
            for what, x in want.items():
                assert np.allclose(found[what], x, atol=1e-11, rtol=1e-11), (name, what)


@pytest.mark.cpu_only
def test_what_is_hidden_is_never_looked_at(kernel, dtype):
    for Sq, Sk in ((2, 400), (80, 200)):
        for name in ("keys", "blocks", "ranges", "sinks_window", "documents"):
            mask, _ = made(Sq, Sk)[name]
            q, k, v = qkv(dtype, B=B, Sq=Sq, Sk=Sk, Hq=HQ, Hkv=HKV)
            dout = normal(q.shape, dtype, 8)
            allowed = np.broadcast_to(mask.to_bool(Sq, Sk, q_heads=HQ), (B, HQ, Sq, Sk))
            want = attend(kernel, (q, k, v, dout), {"mask": mask})
            # Keys that no row of a group sees, and then one that a few rows see.
            hidden = ~allowed.reshape(B, HKV, HQ // HKV, Sq, Sk).any(axis=(2, 3))
            bad_k, bad_v = (
                np.where(hidden.swapaxes(1, 2)[..., None], np.array(np.nan, dtype), x) for x in (k, v)
            )
            found = attend(kernel, (q, bad_k, bad_v, dout), {"mask": mask})
            for what in want:
                assert np.array_equal(bits(want[what]), bits(found[what])), (name, what)
            key = int(np.argmax(allowed[0, 0].any(0)))
            bad_v = v.copy()
            bad_v[0, key, 0] = np.nan
            out = fastattn.mha(q, k, bad_v, mask=mask, kernel=kernel)
            saw = allowed[0, 0, :, key]
            assert np.isnan(out[0, saw, 0].astype(np.float64)).all()
            assert np.array_equal(bits(out[0, ~saw, 0]), bits(want["out"][0, ~saw, 0]))


def test_explain_counts_what_is_allowed():
    q, k, v = qkv(np.float32, B=B, Sq=30, Sk=90, Hq=HQ, Hkv=HKV, D=8)
    for name, (mask, _) in made(30, 90).items():
        for kw in ({}, {"causal": True}):
            pairs = np.broadcast_to(mask.to_bool(30, 90, q_heads=HQ), (B, HQ, 30, 90))
            if kw:
                pairs = pairs & (np.arange(90) <= np.arange(30)[:, None] + 60)
            assert fastattn.explain(q, k, v, mask=mask, **kw).flops == 2 * 16 * pairs.sum(), name


def test_few_keys_are_gathered():
    q, k, v = qkv(np.float32, Sq=1, Sk=20_000, Hq=4, Hkv=2)
    index = np.random.default_rng(0).integers(0, 20_000, (2, 1, 500))
    plan = fastattn.explain(q, k, v, mask=masks.keys(index), device="cpu")
    assert "gathered" in plan.algorithm
    assert (
        "gathered" not in fastattn.explain(q, k, v, mask=masks.sinks_window(4, 3000), device="cpu").algorithm
    )


def test_memory_of_documents():
    """S 65,536 by lists: S*S bits would be 512 MB."""
    out, _ = run("""
        import resource
        from fastattn import masks
        S = 65_536
        ids = np.arange(S) // 300
        q, k, v = qkv(np.float32, 1, S, 1, 8)
        mask = masks.documents(ids) & masks.sinks_window(4, 100)
        fastattn.mha(q[:, :64], k[:, :64], v[:, :64])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out = fastattn.mha(q, k, v, causal=True, mask=mask)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, mask.nbytes // 1024)
    """)
    growth, held = map(int, out.split())
    assert growth < 48, growth
    assert held < 2 * 65_536 * 8 // 1024


def test_no_rows_no_keys():
    for Sq, Sk in ((0, 5), (3, 0), (0, 0)):
        q, k, v = qkv(np.float32, B=2, Sq=Sq, Sk=Sk, Hq=4, Hkv=2)
        made_of_nothing = {
            "blocks": masks.blocks(np.ones((2, 4, -(-Sq // 4), 1), bool), 4),
            "keys": masks.keys(np.full((2, 2, Sq, 3), -1)),
            "no keys": masks.keys(np.zeros((2, 2, Sq, 0), int)),
            "tail": masks.tail(np.ones((2, 1, Sq, 4), bool)),
            "no tail": masks.tail(np.ones((1, 4, Sq, 0), bool)),
            "documents": masks.documents(np.zeros((2, Sq), int), np.zeros((2, Sk), int)),
            "tree": masks.tree(np.arange(Sq) - 1),
            "ranges": masks.ranges(np.zeros((2, 4, Sq, 1, 2), int)),
        }
        for name, mask in made_of_nothing.items():
            allowed = np.broadcast_to(mask.to_bool(Sq, Sk, q_heads=4), (2, 4, Sq, Sk))
            want = fastattn.mha(q, k, v, mask=allowed)
            assert np.array_equal(fastattn.mha(q, k, v, mask=mask), want), name


def test_pickle_copy_and_repr():
    mask = masks.documents([0, 0, 1]) & masks.sinks_window(1, 1)
    for other in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), copy.copy(mask)):
        assert np.array_equal(other.to_bool(3, 3), mask.to_bool(3, 3))
    assert "lists & sinks_window" in repr(mask)
    with pytest.raises(AttributeError, match="immutable"):
        mask._conditions = ()
    ids = np.array([0, 0, 1])
    mask = masks.documents(ids)
    ids[:] = 7
    assert mask.to_bool(3, 3)[0, 0].sum() == 5


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: masks.ranges([[3, 5], [4, 6]]), ValueError, r"r: expected ascending, .*row 0 \(entry 0"),
        (lambda: masks.ranges([[[0, 1]], [[5, 3]]]), ValueError, r"got \[5, 3\) for row 1"),
        (lambda: masks.ranges([1, 2, 3]), ValueError, "r: expected a shape"),
        (lambda: masks.ranges([[0.5, 1]]), TypeError, "r: expected integers, got float64"),
        (lambda: masks.blocks([[1, 0]]), TypeError, "allowed: expected bool, got int64"),
        (lambda: masks.blocks([[True]], 0), ValueError, "block: expected an int >= 1, got 0"),
        (lambda: masks.blocks([[True]], "8"), TypeError, "block: expected an int, got str"),
        (lambda: masks.keys([[-2]]), ValueError, "index: expected numbers of keys, or -1, got -2"),
        (lambda: masks.keys(np.zeros((1,) * 5, int)), ValueError, "index: expected"),
        (lambda: masks.tail(np.zeros(3)), TypeError, "allowed: expected bool"),
        (lambda: masks.documents([0.0, 1.0]), TypeError, "ids_q: expected integers"),
        (lambda: masks.documents([[0], [1]], np.zeros((3, 4), int)), ValueError, "ids_kv: expected"),
        (lambda: masks.prefix_lm(-1), ValueError, "lengths: expected lengths >= 0"),
        (lambda: masks.sinks_window(-1, 3), ValueError, "keep: expected an int >= 0"),
        (lambda: masks.sinks_window(True, 3), TypeError, "keep: expected an int, got a bool"),
        (lambda: masks.chunks(2.0), TypeError, "size: expected an int, got float"),
        (lambda: masks.tree([0]), ValueError, "parents: expected -1 or an earlier token, got 0 for token 0"),
        (lambda: masks.tree([-1], -3), ValueError, "past: expected"),
        (lambda: masks.chunks(3) & np.ones(3, bool), TypeError, "unsupported operand"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_constructors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_masks_that_do_not_fit_the_call():
    q, k, v = qkv(np.float32, B=2, Sq=5, Sk=9, Hq=4, Hkv=2)
    wrong = [
        (
            masks.ranges(np.zeros((3, 1, 5, 1, 2), int)),
            r"expected a Mask for 2 entries, 4 heads and 5 rows.*\(3, 1, 5\)",
        ),
        (masks.ranges(np.zeros((6, 1, 2), int)), "5 rows"),
        (masks.keys(np.zeros((4, 5, 1), int)), "2 heads of k"),
        (masks.keys(np.array([[0], [0], [0], [9], [0]])), "row 3 of entry 0 selects key 9, which has 9 keys"),
        (masks.documents(np.zeros(5, int), np.zeros(8, int)), "expected Sk = 8 as the Mask has, got 9"),
        (masks.blocks(np.ones((1, 3), bool) & np.array([True, False, True]), (8, 4)), None),
        (masks.blocks(np.array([[True, False, True]]), (8, 3)), None),
        (
            masks.blocks(np.array([[True, False, True]]), (8, 2)),
            "expected Sk = 5 to 6 as the Mask has, got 9",
        ),
        (masks.prefix_lm([1, 2, 3]), "expected lengths of prefixes for 2 entries, got 3"),
    ]
    for mask, message in wrong:
        for call in (fastattn.mha, fastattn.explain):
            if message is None:
                call(q, k, v, mask=mask)
                continue
            with pytest.raises(ValueError, match="mask: .*" + message):
                call(q, k, v, mask=mask)
    nine = masks.chunks(2)
    for _ in range(7):
        nine = nine & masks.chunks(2)
    fastattn.mha(q, k, v, mask=nine)
    with pytest.raises(ValueError, match="at most 8"):
        nine & masks.chunks(2)
    with pytest.raises(ValueError, match="entries of at most 6 keys as the Mask has, got 9 for entry 0"):
        fastattn.mha_varlen(
            q[0],
            k[0],
            v[0],
            np.array([0, 5]),
            np.array([0, 9]),
            mask=masks.blocks(np.array([[True, False, True]]), 2),
        )


def test_a_gpu_kernel_refuses_by_name(kernel):
    if not kernel.startswith("cuda"):
        pytest.skip("a kernel of the CPU")
    q, k, v = qkv(np.float16, Sq=4, Hq=2, D=64)
    with pytest.raises(fastattn.UnsupportedError, match="bool arrays"):
        fastattn.mha(q, k, v, mask=masks.chunks(2), kernel=kernel)
