"""The fused tensor-core kernels: every compiled tile, several tiles of rows and keys, and what they refuse.

Run on a GPU of compute capability 8.0 or newer (``cuda-flash-sm90``: 9.0), and on the emulated one, where
the tensor cores' instructions are done in C++ from the layouts of the PTX manual.
"""

from __future__ import annotations

import numpy as np
import pytest
from gate import check
from inputs import DTYPES, qkv

import fastattn

from emulated_gpu import (  # isort: skip
    DeviceArray,
    needs_emulated_gpu,
    set_copies_eager,
    set_threads_reversed,
    synchronize,
)

KERNELS = ("cuda-flash-sm80", "cuda-flash-sm90")
INFO = next(kernel for kernel in fastattn.kernels() if kernel.name == KERNELS[0])
pytestmark = [
    pytest.mark.skipif(not INFO.usable, reason=f"the fused CUDA kernels: {INFO.reason}"),
    pytest.mark.parametrize("flash", KERNELS),
]
HALF = [DTYPES["float16"], DTYPES["bfloat16"]]


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("D", "Dv"),
    [(8, 8), (32, 64), (64, 64), (72, 96), (128, 128), (80, 128), (192, 128), (136, 8), (256, 248)],
)
def test_head_dimensions(flash, half, causal, D, Dv):
    q, k, v = qkv(half, B=1, Sq=70, Sk=150, Hq=2, Hkv=1, D=D, Dv=Dv)
    check(flash, q, k, v, causal=causal)


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 1), (3, 1, 300, 8, 2), (2, 129, 65, 4, 4), (1, 200, 200, 6, 2), (3, 150, 700, 14, 2)],
)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_sizes(flash, half, sizes, layout):
    B, Sq, Sk, Hq, Hkv = sizes
    q, k, v = qkv(half, B=B, Sq=Sq, Sk=Sk, Hq=Hq, Hkv=Hkv, D=64, layout=layout)
    check(flash, q, k, v, causal=True, layout=layout)


FEATURES = {
    "window": {"window": (40, 3)},
    "far window": {"window": (5, None), "q_offset": 120},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": [0.5, 0.25]},
    "sinks": {"sinks": [1.0, -2.0]},
    "lengths": {"kv_lens": [150, 37], "q_lens": [70, 0]},
    "causal lengths": {"kv_lens": [150, 37], "causal": True},
    "dropout": {"dropout": 0.3, "seed": 5},
    "negative scale": {"scale": -0.1, "causal": True},
    "scale of 0": {"scale": 0.0, "causal": True},
    "tiny scale": {"scale": 1e-60, "causal": True},
    "nothing attended": {"causal": True, "q_offset": -1000},
}


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(flash, half, feature):
    q, k, v = qkv(half, B=2, Sq=70, Sk=150, Hq=2, Hkv=1, D=64)
    check(flash, q, k, v, **FEATURES[feature])


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("name", ["mask", "bias"])
def test_masks_and_biases(flash, half, name):
    q, k, v = qkv(half, B=2, Sq=70, Sk=150, Hq=2, Hkv=1, D=64)
    rng = np.random.default_rng(0)
    side = (
        rng.random((2, 1, 70, 150)) < 0.5 if name == "mask" else rng.standard_normal((70, 150)).astype(half)
    )
    check(flash, q, k, v, **{name: side})


@pytest.mark.parametrize(("D", "Dv"), [(128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("names", [("softcap", "alibi"), ("mask", "dropout"), ("bias",)], ids=str)
def test_elementwise_arguments_in_wide_tiles(flash, names, D, Dv):
    q, k, v = qkv(np.float16, B=1, Sq=70, Sk=150, Hq=2, Hkv=1, D=D, Dv=Dv)
    rng = np.random.default_rng(0)
    all_ = {
        "softcap": {"softcap": 2.0},
        "alibi": {"alibi_slopes": [0.5, 0.25]},
        "mask": {"mask": rng.random((70, 150)) < 0.5},
        "dropout": {"dropout": 0.3, "seed": 5},
        "bias": {"bias": rng.standard_normal((2, 70, 150)).astype(np.float32)},
    }
    check(flash, q, k, v, causal=True, **{key: x for name in names for key, x in all_[name].items()})


@pytest.mark.parametrize("D", [8, 64, 128])
@pytest.mark.parametrize("size", [1000.0, 4000.0, 20000.0])
def test_scores_of_any_size(flash, D, size):
    """A row's maximum is rounded, a product in an FMA is not: of large scores their difference is large."""
    rng = np.random.default_rng(1)
    q = (size * (1 + rng.random((1, 40, 1, D)))).astype(np.float16)
    k = np.zeros((1, 400, 1, D), np.float16)
    rise = np.linspace(0.1, 1, 400) * size
    k[0, :, 0] = rise[:, None]
    v = qkv(np.float16, Sq=1, Sk=400, D=D)[2]
    out = fastattn.mha(q, k, v[:, :, :1], kernel=flash, scale=0.9876)
    np.testing.assert_allclose(out.astype(float), np.repeat(v[:, 399:, :1], 40, 1).astype(float), atol=2e-3)


def test_masked_nan_does_not_leak(flash):
    q, k, v = qkv(np.float16, Sq=70, Sk=150, Hq=2, Hkv=1, D=64)
    want = fastattn.mha(q, k, v, causal=True, q_offset=20, kernel=flash)
    v[:, 40:], k[:, 60:] = np.nan, np.nan
    got = fastattn.mha(q, k, v, causal=True, q_offset=20, kernel=flash)
    # Rows into which a NaN leaked are summed again, in another order.
    np.testing.assert_allclose(got[:, :20].astype(float), want[:, :20].astype(float), atol=2e-3)
    assert np.isnan(got[:, 20:].astype(float)).all()


@needs_emulated_gpu
@pytest.mark.parametrize("case", ["bshd", "bhsd", "broadcast", "one entry", "one key", "slice", "one head"])
def test_arrays_on_the_device_are_read_where_they_lie(flash, case):
    half = np.float16
    B, Sk, Hkv = (
        1 if case == "one entry" else 3,
        1 if case == "one key" else 150,
        1 if case == "one head" else 2,
    )
    q, k, v = qkv(half, B=B, Sq=40, Sk=Sk, Hq=2 * Hkv, Hkv=Hkv, D=64)
    layout = "bshd"
    if case == "bhsd":
        q, k, v = (x.transpose(0, 2, 1, 3).copy() for x in (q, k, v))
        layout = "bhsd"
    elif case == "broadcast":  # the same memory for all entries of k, and for all heads of v
        k, v = np.broadcast_to(k[:1], k.shape), np.broadcast_to(v[:, :, :1], v.shape)
    elif case == "slice":
        wide = [np.full((*x.shape[:3], 3 * 64), np.nan, half) for x in (q, k, v)]
        for x, to in zip((q, k, v), wide, strict=True):
            to[..., 64:128] = x
        q, k, v = (x[..., 64:128] for x in wide)
    want = fastattn.mha(q, k, v, layout=layout, causal=True, device="cpu").astype(float)
    out = np.full(q.shape, 7, half)
    fastattn.mha(*map(DeviceArray, (q, k, v)), out=DeviceArray(out), layout=layout, causal=True, kernel=flash)
    synchronize()
    np.testing.assert_allclose(out.astype(float), want, atol=2e-3)


@needs_emulated_gpu
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("reversed_", [False, True])
@pytest.mark.parametrize("D", [64, 128])
def test_copies_early_and_late_and_threads_in_both_orders(flash, eager, reversed_, D):
    q, k, v = qkv(np.float16, B=1, Sq=150, Sk=900, Hq=4, Hkv=2, D=D)
    set_copies_eager(eager)
    set_threads_reversed(reversed_)
    try:
        check(flash, q, k, v, causal=True)
        check(flash, q, k, v, softcap=3.0)
    finally:
        set_copies_eager(False)
        set_threads_reversed(False)


def test_same_bits_again(flash):
    q, k, v = qkv(np.float16, B=2, Sq=100, Sk=300, Hq=4, Hkv=2, D=128)
    first = fastattn.mha(q, k, v, causal=True, kernel=flash)
    np.testing.assert_array_equal(fastattn.mha(q, k, v, causal=True, kernel=flash), first)


def test_what_it_refuses(flash):
    q, k, v = qkv(np.float16, Sq=8, D=64)
    refused = [
        ({"return_weights": True}, (q, k, v), "does not return the weights"),
        ({}, qkv(np.float16, Sq=8, D=60), "multiples of 8"),
        ({}, qkv(np.float16, Sq=8, D=264), "up to 256"),
        ({}, qkv(np.float32, Sq=8, D=64), "takes float16, bfloat16, not float32"),
    ]
    for keywords, arrays, reason in refused:
        with pytest.raises(fastattn.UnsupportedError, match=reason):
            fastattn.mha(*arrays, kernel=flash, **keywords)


def test_it_is_not_taken_until_a_gpu_has_proven_it(flash):
    q, k, v = qkv(np.float16, Sq=8, D=64)
    plan = fastattn.explain(q, k, v, device="cuda")
    assert plan.kernel == "cuda-cublas"
    assert "no GPU has run it yet" in plan.refused[flash]
    rows = {"cuda-flash-sm80": 128, "cuda-flash-sm90": 192}[flash]
    assert fastattn.explain(q, k, v, kernel=flash).algorithm.startswith(f"fused, tiles of {rows} rows")
