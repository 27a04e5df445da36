"""Gradients over shapes: sequence lengths around tile edges, head dimensions, head ratios, layouts, ranks."""

from __future__ import annotations

import numpy as np
import pytest
from gate_backward import check_backward
from inputs import normal, qkv

import fastattn

LENGTHS = (1, 3, 17, 64, 100, 257, 300)
DIMS = (1, 5, 16, 40, 64, 100, 128)
HEADS = ((1, 1), (3, 3), (2, 1), (4, 2), (4, 1), (8, 2))


@pytest.mark.parametrize("n", range(len(LENGTHS)), ids=[str(x) for x in LENGTHS])
def test_lengths(kernel, dtype, n):
    S, other, third = (LENGTHS[(a * n + b) % len(LENGTHS)] for a, b in ((1, 0), (3, 5), (5, 3)))
    check_backward(kernel, *qkv(dtype, Sq=S, Sk=S, Hq=2, D=16, seed=n), causal=True)
    check_backward(kernel, *qkv(dtype, Sq=S, Sk=other, Hq=4, Hkv=2, D=16, seed=n))
    check_backward(kernel, *qkv(dtype, Sq=third, Sk=S, Hq=2, D=24, seed=n), causal=True)
    check_backward(kernel, *qkv(dtype, B=2, Sq=9, Sk=S, Hq=2, Hkv=1, D=64, seed=n))


@pytest.mark.parametrize("D", DIMS)
def test_head_dims(kernel, dtype, D):
    Dv = DIMS[(3 * DIMS.index(D) + 4) % len(DIMS)]
    check_backward(kernel, *qkv(dtype, B=2, Sq=37, Sk=70, Hq=2, Hkv=1, D=D, seed=D), causal=True)
    check_backward(kernel, *qkv(dtype, Sq=19, Sk=41, Hq=2, D=D, Dv=Dv, seed=D))


@pytest.mark.parametrize(("Hq", "Hkv"), HEADS)
def test_head_ratios(kernel, dtype, Hq, Hkv):
    for layout in ("bshd", "bhsd"):
        q, k, v = qkv(dtype, B=2, Sq=19, Sk=35, Hq=Hq, Hkv=Hkv, D=24, Dv=17, layout=layout, seed=Hq)
        check_backward(kernel, q, k, v, layout=layout, causal=True)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("rank", [4, 3, 2])
def test_layouts_and_ranks(kernel, dtype, layout, rank):
    B, H = (3 if rank == 4 else 1), (1 if rank == 2 else 6)
    heads = {"Hq": H, "Hkv": 2} if rank > 2 else {}
    q, k, v = qkv(dtype, B=B, Sq=11, Sk=21, D=16, Dv=12, layout=layout, rank=rank, **heads)
    lead = (B, H)[4 - rank :]
    sides = {"bias": normal((*lead, 11, 21), dtype, 7), "sinks": np.zeros(H), "alibi_slopes": np.ones((B, H))}
    dlse = normal((*lead, 11), np.float64 if dtype == np.float64 else np.float32, 8)
    check_backward(kernel, q, k, v, layout=layout, causal=True, dlse=dlse, **sides)


@pytest.mark.parametrize("rank", [3, 2])
def test_a_missing_axis_is_an_axis_of_one(kernel, dtype, rank):
    q, k, v = qkv(dtype, Sq=13, Sk=29, Hq=1, D=20)
    out, lse = fastattn.mha(q, k, v, kernel=kernel, causal=True, return_lse=True)
    arrays = (normal(q.shape, dtype, 1), q, k, v, out)
    whole = fastattn.mha_backward(*arrays, lse, kernel=kernel, causal=True)
    less = [x.reshape(x.shape[1:] if rank == 3 else x.shape[1::2]) for x in arrays]
    part = fastattn.mha_backward(*less, lse.reshape(lse.shape[4 - rank :]), kernel=kernel, causal=True)
    for a, b in zip(whole[:3], part[:3], strict=True):
        assert (a.reshape(b.shape) == b).all()


def test_batches(kernel, dtype):
    for B in (1, 2, 5):
        check_backward(kernel, *qkv(dtype, B=B, Sq=7, Sk=23, Hq=4, Hkv=2, D=16, seed=B), causal=True)


def test_results_are_plain_arrays(kernel, dtype):
    grads = check_backward(kernel, *qkv(dtype, B=2, Sq=5, Sk=7, Hq=2, D=8), bias=np.zeros((5, 1), dtype))
    assert grads._fields == ("dq", "dk", "dv", "dbias", "dalibi_slopes", "dsinks")
    for x in grads[:4]:
        assert x.flags.c_contiguous
        assert x.flags.writeable
