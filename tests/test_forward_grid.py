"""Shapes: sequence lengths around tile edges, head dimensions, head ratios, layouts, ranks, decode."""

from __future__ import annotations

import numpy as np
import pytest
from gate import check
from inputs import qkv, stats_dtype

import fastattn

LENGTHS = (1, 2, 5, 6, 7, 15, 16, 17, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257, 300, 513)
DIMS = (1, 2, 3, 7, 8, 16, 31, 32, 33, 48, 64, 65, 80, 96, 128, 256, 300)
HEADS = ((1, 1), (2, 2), (3, 1), (4, 2), (5, 1), (6, 3), (7, 7), (8, 1), (10, 2), (12, 4), (32, 2))


@pytest.mark.parametrize("Sq", LENGTHS)
def test_query_lengths(kernel, dtype, Sq):
    Sk = LENGTHS[(7 * LENGTHS.index(Sq) + 3) % len(LENGTHS)]
    check(kernel, *qkv(dtype, Sq=Sq, Sk=Sk, D=32, seed=Sq))
    check(kernel, *qkv(dtype, Sq=Sq, Sk=Sq, D=40, seed=Sq), causal=True)


@pytest.mark.parametrize("Sk", LENGTHS)
def test_key_lengths(kernel, dtype, Sk):
    Sq = LENGTHS[(5 * LENGTHS.index(Sk) + 11) % len(LENGTHS)]
    check(kernel, *qkv(dtype, Sq=Sq, Sk=Sk, D=32, seed=Sk), causal=True)
    check(kernel, *qkv(dtype, Sq=9, Sk=Sk, D=64, seed=Sk))


# The last tile of rows has as many as are left, rounded up to two.
@pytest.mark.parametrize("Sq", range(18, 24))
def test_rows_of_the_last_tile(kernel, dtype, Sq):
    q, k, v = qkv(dtype, B=2, Sq=Sq, Sk=150, Hq=3, Hkv=1, D=40, Dv=72, seed=Sq)
    mask = np.arange(150) % 5 != np.arange(Sq)[:, None] % 5
    out, _ = check(kernel, q, k, v, mask=mask, softcap=3.0, causal=True, q_offset=60)
    check(kernel, q, k, v, window=(20, 3), q_offset=70, dropout=0.3, seed=4)
    check(kernel, q, k, v, bias=np.where(mask, 0.5, -np.inf).astype(stats_dtype(dtype)), weights=True)
    spoilt = v.copy()
    spoilt[1, 75, 0, ::2] = np.nan
    check(kernel, q, k, spoilt, causal=True, q_offset=60)
    # A GPU's matrix products may choose by the size.
    if fastattn.explain(q, k, v, kernel=kernel).device == "cpu":
        fewer = fastattn.mha(
            q[:, : Sq - 1], k, v, mask=mask[:-1], softcap=3.0, causal=True, q_offset=60, kernel=kernel
        )
        assert np.array_equal(fewer, out[:, : Sq - 1])


@pytest.mark.parametrize("D", DIMS)
def test_head_dims(kernel, dtype, D):
    check(kernel, *qkv(dtype, B=2, Sq=37, Sk=70, Hq=2, Hkv=1, D=D, seed=D), causal=True)
    check(kernel, *qkv(dtype, Sq=3, Sk=41, Hq=2, D=D, seed=D), weights=True)


@pytest.mark.parametrize(
    ("D", "Dv"), [(192, 128), (64, 1), (1, 64), (7, 129), (300, 33), (128, 512), (16, 48), (576, 512)]
)
def test_value_dim_differs(kernel, dtype, D, Dv):
    check(kernel, *qkv(dtype, Sq=33, Sk=66, Hq=2, D=D, Dv=Dv), causal=True)
    check(kernel, *qkv(dtype, Sq=1, Sk=66, Hq=4, Hkv=2, D=D, Dv=Dv))


@pytest.mark.parametrize(("Hq", "Hkv"), HEADS)
def test_head_ratios(kernel, dtype, Hq, Hkv):
    for layout in ("bshd", "bhsd"):
        q, k, v = qkv(dtype, B=2, Sq=19, Sk=35, Hq=Hq, Hkv=Hkv, D=24, Dv=17, layout=layout, seed=Hq)
        check(kernel, q, k, v, layout=layout, causal=True)
        check(kernel, q[..., :1, :] if layout == "bhsd" else q[:, :1], k, v, layout=layout)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("rank", [4, 3, 2])
def test_layouts_and_ranks(kernel, dtype, layout, rank):
    heads = {"Hq": 1} if rank == 2 else {"Hq": 6, "Hkv": 2}
    q, k, v = qkv(
        dtype, B=3 if rank == 4 else 1, Sq=11, Sk=21, D=16, Dv=12, layout=layout, rank=rank, **heads
    )
    out, lse, weights = check(kernel, q, k, v, layout=layout, causal=True, weights=True)
    assert out.shape == (*q.shape[:-1], 12)
    lead = {4: (3, 6), 3: (6,), 2: ()}[rank]
    assert lse.shape == (*lead, 11)
    assert weights.shape == (*lead, 11, 21)


@pytest.mark.parametrize("rank", [3, 2])
def test_a_missing_axis_is_an_axis_of_one(kernel, dtype, rank):
    q, k, v = qkv(dtype, Sq=13, Sk=29, Hq=1, D=20)
    whole = fastattn.mha(q, k, v, kernel=kernel, causal=True)
    part = fastattn.mha(*(x.reshape(x.shape[1:] if rank == 3 else x.shape[1::2]) for x in (q, k, v)),
                        kernel=kernel, causal=True)  # fmt: skip
    assert (part == whole.reshape(part.shape)).all()


@pytest.mark.parametrize("Sq", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("Sk", [1, 31, 700, 2049])
def test_decode(kernel, dtype, Sq, Sk):
    check(kernel, *qkv(dtype, B=2, Sq=Sq, Sk=Sk, Hq=4, Hkv=1, D=64, seed=Sk), causal=True)
    check(kernel, *qkv(dtype, Sq=Sq, Sk=Sk, Hq=3, D=40, Dv=72, seed=Sk))


def test_batches(kernel, dtype):
    for B in (1, 2, 3, 17):
        check(kernel, *qkv(dtype, B=B, Sq=7, Sk=23, Hq=4, Hkv=2, D=16, seed=B), causal=True)


@pytest.mark.one_dtype
def test_many_tiny_problems(kernel, dtype):
    check(kernel, *qkv(dtype, B=40, Sq=2, Sk=3, Hq=20, Hkv=5, D=4))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize(
    "zero", [{"B": 0}, {"Sq": 0}, {"Sk": 0}, {"Hq": 0, "Hkv": 0}, {"Sq": 0, "Sk": 0}, {"B": 0, "Sk": 0}]
)
def test_zero_sizes(kernel, dtype, layout, zero):
    sizes = {"B": 2, "Sq": 3, "Sk": 5, "Hq": 4, "Hkv": 2} | zero
    q, k, v = qkv(dtype, D=8, Dv=6, layout=layout, **sizes)
    for causal in (False, True):
        check(kernel, q, k, v, layout=layout, causal=causal, weights=True)
    sinks = np.arange(sizes["Hq"], dtype=np.float32)
    _, lse, _ = check(kernel, q, k, v, layout=layout, sinks=sinks, weights=True)
    if sizes["Sk"] == 0 and lse.size:
        np.testing.assert_allclose(lse, np.broadcast_to(sinks[None, :, None], lse.shape), rtol=1e-15)
    lens = np.zeros(sizes["B"], np.int64)
    check(kernel, q, k, v, layout=layout, q_lens=lens, kv_lens=lens, weights=True)
    mask = np.ones((sizes["B"], 1, sizes["Sq"], sizes["Sk"]), bool)
    check(kernel, q, k, v, layout=layout, mask=mask, weights=True)
