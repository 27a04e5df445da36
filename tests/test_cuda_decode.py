"""The fused kernel for few query rows: every compiled tile, keys in one piece and in many, refusals.

Runs on a GPU of compute capability 8.0 or newer, and on the emulated one, where the tensor cores'
instructions are done in C++ from the layouts of the PTX manual.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gate import check
from inputs import DTYPES, qkv, restride

import fastattn

KERNEL = "cuda-decode"
INFO = next(kernel for kernel in fastattn.kernels() if kernel.name == KERNEL)
pytestmark = pytest.mark.skipif(not INFO.usable, reason=f"{KERNEL}: {INFO.reason}")
HALF = [DTYPES["float16"], DTYPES["bfloat16"]]


def run(q: Any, k: Any, v: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
    result = fastattn.mha(q, k, v, kernel=KERNEL, return_lse=True, **kwargs)
    assert isinstance(result, tuple)
    return result


def pieces(q: Any, k: Any, v: Any, **kwargs: Any) -> int:
    """In how many pieces the keys of a head are."""
    algorithm = fastattn.explain(q, k, v, kernel=KERNEL, **kwargs).algorithm
    return int(algorithm.split("keys in ")[1].split()[0]) if "keys in" in algorithm else 1


def assert_same_bits(got: tuple[np.ndarray, ...], want: tuple[np.ndarray, ...]) -> None:
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("G", [2, 10])  # blocks of 16 rows, and of 32 where there are some
@pytest.mark.parametrize(
    ("D", "Dv"),
    [(8, 8), (32, 64), (64, 64), (72, 96), (96, 40), (128, 128), (80, 128), (192, 128), (256, 248)],
)
def test_head_dimensions(half, G, D, Dv):
    q, k, v = qkv(half, B=1, Sq=2, Sk=200, Hq=G, Hkv=1, D=D, Dv=Dv)
    check(KERNEL, q, k, v, causal=True)


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("Sq", range(1, 17))
def test_every_number_of_rows(half, Sq):
    q, k, v = qkv(half, B=2, Sq=Sq, Sk=150, Hq=4, Hkv=2, D=64)
    check(KERNEL, q, k, v, causal=True)


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("G", [1, 3, 8, 32])
@pytest.mark.parametrize("Sq", [1, 5, 16])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_groups(half, G, Sq, layout):
    q, k, v = qkv(half, B=1, Sq=Sq, Sk=140, Hq=2 * G, Hkv=2, D=64, layout=layout)
    check(KERNEL, q, k, v, causal=True, layout=layout)


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("Sk", [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 5000])
def test_numbers_of_keys(half, Sk):
    q, k, v = qkv(half, B=1, Sq=1, Sk=Sk, Hq=4, Hkv=2, D=64)
    check(KERNEL, q, k, v)


@pytest.mark.parametrize("D", [64, 96, 128, 192, 256])
def test_many_pieces(D):
    q, k, v = qkv(np.float16, B=2, Sq=3, Sk=2000, Hq=4, Hkv=2, D=D)
    assert pieces(q, k, v) == 16
    check(KERNEL, q, k, v, causal=True)


def test_the_most_pieces():
    q, k, v = qkv(np.float16, Sq=1, Sk=40000, Hq=2, Hkv=1, D=16)
    assert pieces(q, k, v) == 63  # of 640 keys
    check(KERNEL, q, k, v)


FEATURES: dict[str, dict[str, Any]] = {
    "window": {"window": (40, 3)},
    "far window": {"window": (5, None), "q_offset": 120},
    "window before the end": {"window": (30, 20), "q_offset": 60},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": [0.5, 0.25, 0.125, 0.0]},
    "sinks": {"sinks": [1.0, -2.0, np.inf, -np.inf]},
    "sinks of rows without keys": {"sinks": [1.0, -2.0, 0.0, 3.0], "causal": True, "q_offset": -1000},
    "lengths": {"kv_lens": [150, 37], "q_lens": [5, 0]},
    "no keys": {"kv_lens": [0, 1]},
    "causal lengths": {"kv_lens": [150, 37], "causal": True},
    "dropout": {"dropout": 0.3, "seed": 5},
    "dropout with a window": {"dropout": 0.3, "seed": 5, "window": (43, 0), "q_offset": 100},
    "negative scale": {"scale": -0.1, "causal": True},
    "scale of 0": {"scale": 0.0, "causal": True},
    "tiny scale": {"scale": 1e-60, "causal": True},
    "nothing attended": {"causal": True, "q_offset": -1000},
    "first rows attend nothing": {"causal": True, "q_offset": -3},
}


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("Sk", [150, 1100])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(half, Sk, feature):
    q, k, v = qkv(half, B=2, Sq=5, Sk=Sk, Hq=4, Hkv=2, D=64)
    assert pieces(q, k, v) == {150: 2, 1100: 9}[Sk]
    check(KERNEL, q, k, v, **FEATURES[feature])


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("Sk", [150, 1100])
@pytest.mark.parametrize("name", ["mask", "bias", "mask of one key", "bias of -inf"])
def test_masks_and_biases(half, Sk, name):
    q, k, v = qkv(half, B=2, Sq=5, Sk=Sk, Hq=4, Hkv=2, D=64)
    rng = np.random.default_rng(0)
    side: Any = rng.random((2, 1, 5, Sk)) < 0.5
    if name == "mask of one key":
        side = np.arange(Sk) == rng.integers(0, Sk, (2, 4, 5, 1))
    elif name == "bias":
        side = rng.standard_normal((5, Sk)).astype(half)
    elif name == "bias of -inf":
        side = np.where(side, 0, -np.inf).astype(half)
    check(KERNEL, q, k, v, **{name.split()[0]: side})


@pytest.mark.parametrize("kv_lens", [[1100, 0, 1, 64], [65, 500, 128, 1099]])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_of_every_entry(kv_lens, causal):
    q, k, v = qkv(np.float16, B=4, Sq=4, Sk=1100, Hq=4, Hkv=2, D=64)
    for b, n in enumerate(kv_lens):  # what lies beyond a length is nobody's business
        k[b, n:], v[b, n:] = np.nan, np.inf
    check(KERNEL, q, k, v, kv_lens=kv_lens, causal=causal)
    check(KERNEL, q, k, v, kv_lens=kv_lens, causal=causal, q_lens=[4, 4, 0, 1], sinks=[0.5, 1.0, -1.0, 0.0])


def test_all_at_once():
    q, k, v = qkv(np.float16, B=2, Sq=6, Sk=1000, Hq=6, Hkv=2, D=80, Dv=96)
    rng = np.random.default_rng(1)
    check(
        KERNEL, q, k, v, causal=True, window=(700, 0), kv_lens=[1000, 600], q_lens=[6, 4], softcap=5.0,
        alibi_slopes=rng.random(6), sinks=rng.standard_normal(6), mask=rng.random((2, 1, 1, 1000)) < 0.9,
        bias=rng.standard_normal((6, 1, 1000)).astype(np.float16), dropout=0.2, seed=3, scale=0.2,
    )  # fmt: skip


@pytest.mark.parametrize("Sk", [150, 1100])
def test_masked_nan_does_not_leak(Sk):
    q, k, v = qkv(np.float16, Sq=16, Sk=Sk, Hq=2, Hkv=1, D=64)
    want = fastattn.mha(q, k, v, causal=True, q_offset=20, kernel=KERNEL)
    v[:, 28:], k[:, 28:] = np.nan, np.nan
    got = fastattn.mha(q, k, v, causal=True, q_offset=20, kernel=KERNEL)
    # Rows into which a NaN leaked are summed again, in another order.
    np.testing.assert_allclose(got[:, :8].astype(float), want[:, :8].astype(float), atol=2e-3)
    assert np.isnan(got[:, 8:].astype(float)).all()


@pytest.mark.parametrize("Sk", [150, 1100])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("of", ["k", "v"])
def test_attended_nan_and_inf_arrive(Sk, value, of):
    q, k, v = qkv(np.float16, Sq=4, Sk=Sk, Hq=2, Hkv=1, D=64)
    (k if of == "k" else v)[0, 77, 0, 5] = value
    check(KERNEL, q, k, v)
    check(KERNEL, q, k, v, mask=np.arange(Sk) != 77)


@pytest.mark.parametrize("how", ["padded", "negative", "negative-last", "strided-last", "swapped", "fortran"])
def test_strides(how):
    q, k, v = (restride(x, how) for x in qkv(np.float16, B=2, Sq=5, Sk=300, Hq=4, Hkv=2, D=64))
    check(KERNEL, q, k, v, causal=True)


def test_same_bits_again():
    q, k, v = qkv(np.float16, B=2, Sq=4, Sk=3000, Hq=4, Hkv=2, D=128)
    assert_same_bits(run(q, k, v, causal=True), run(q, k, v, causal=True))


ALONE: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (300, 0)},
    "lengths": {"kv_lens": np.array([1500, 40, 0, 700, 129])},
    "sinks and softcap": {"sinks": np.array([0.5, 1.0, 0.0, -1.0]), "softcap": 3.0},
}


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("feature", ALONE)
@pytest.mark.parametrize("Sq", [1, 9])
def test_an_entry_has_the_same_bits_whatever_else_is_in_the_batch(half, feature, Sq):
    q, k, v = qkv(half, B=5, Sq=Sq, Sk=1500, Hq=4, Hkv=2, D=64)
    options = ALONE[feature]
    every = run(q, k, v, **options)
    for entries in ([0], [1], [2], [3], [4], [3, 1], [4, 0, 2, 1]):
        part = {name: x[entries] if name == "kv_lens" else x for name, x in options.items()}
        got = run(q[entries], k[entries], v[entries], **part)
        assert_same_bits(got, (every[0][entries], every[1][entries]))


def test_a_kv_head_has_the_same_bits_whatever_other_heads_there_are():
    q, k, v = qkv(np.float16, B=2, Sq=3, Sk=1500, Hq=12, Hkv=4, D=64)
    every = run(q, k, v, causal=True)
    for kv_head in range(4):
        heads = slice(3 * kv_head, 3 * kv_head + 3)
        got = run(q[:, :, heads], k[:, :, kv_head : kv_head + 1], v[:, :, kv_head : kv_head + 1], causal=True)
        assert_same_bits(got, (every[0][:, :, heads], every[1][:, heads]))


def test_what_it_refuses():
    q, k, v = qkv(np.float16, Sq=8, D=64)
    refused: list[tuple[dict[str, Any], Any, str]] = [
        ({"return_weights": True}, (q, k, v), "does not return the weights"),
        ({}, qkv(np.float16, Sq=8, D=60), "takes head dimensions that are multiples of 8"),
        ({}, qkv(np.float16, Sq=8, D=64, Dv=20), "takes head dimensions that are multiples of 8"),
        ({}, qkv(np.float16, Sq=8, D=264), "takes head dimensions up to 256"),
        ({}, qkv(np.float16, Sq=17, D=64), "takes up to 16 query rows"),
        ({}, qkv(np.float32, Sq=8, D=64), "takes float16, bfloat16, not float32"),
    ]
    for keywords, arrays, reason in refused:
        with pytest.raises(fastattn.UnsupportedError) as caught:
            fastattn.mha(*arrays, kernel=KERNEL, **keywords)
        assert str(caught.value) == f'kernel: "{KERNEL}" cannot compute this call: {reason}'


def test_it_is_not_taken_until_a_gpu_has_proven_it():
    q, k, v = qkv(np.float16, Sq=8, D=64)
    plan = fastattn.explain(q, k, v, device="cuda")
    assert plan.kernel == "cuda-cublas"
    assert "no GPU has run it yet" in plan.refused[KERNEL]


def test_what_it_says_of_a_call():
    q, k, v = qkv(np.float16, B=3, Sq=2, Sk=4096, Hq=8, Hkv=2, D=128)
    plan = fastattn.explain(q, k, v, kernel=KERNEL)
    assert plan.algorithm.startswith(
        "fused, 16 rows a block, head dimensions up to 128, keys in 16 pieces of 256"
    )
    q, k, v = qkv(np.float16, Sq=16, Sk=64, Hq=8, Hkv=2, D=40)
    plan = fastattn.explain(q, k, v, kernel=KERNEL)
    assert plan.algorithm.startswith("fused, 32 rows a block, head dimensions up to 64, arrays")
