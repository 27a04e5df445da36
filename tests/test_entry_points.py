"""kernels(), explain(), forcing a kernel, threads, out=."""

from __future__ import annotations

import numpy as np
import pytest
from gate import check
from inputs import DTYPES, qkv, stats_dtype

import fastattn

KERNELS = fastattn.kernels()


@pytest.mark.parametrize("name", [info.name for info in KERNELS])
def test_kernel_is_usable_here(name):
    """The one place where kernels of this build that cannot run here show up, with the reason."""
    info = next(info for info in KERNELS if info.name == name)
    if not info.usable:
        assert info.reason
        pytest.skip(f"{name}: {info.reason}")
    assert not info.reason
    check(name, *qkv(DTYPES[str(info.dtypes[0])], Sq=9, Sk=17), causal=True)


def test_kernels():
    names = [info.name for info in KERNELS]
    assert len(set(names)) == len(names)
    cpu = [info for info in KERNELS if info.device == "cpu"]
    assert cpu[-1].name == "cpu-reference", "the last kernel is the one that supports everything"
    assert cpu[-1].usable
    assert {str(n) for n in cpu[-1].dtypes} == set(DTYPES)
    for info in KERNELS:
        assert info.name.startswith(info.device)
        assert {str(n) for n in info.dtypes} <= set(DTYPES)
        assert isinstance(info.usable, bool)
    assert {"cpu-avx512bf16", "cpu-avx512", "cpu-avx2", "cpu-neon", "cpu-scalar", "cpu-reference"} <= set(
        names
    )
    assert fastattn.kernels() == KERNELS


def test_public_names():
    for name in (
        "mha",
        "explain",
        "kernels",
        "reference",
        "get_num_threads",
        "set_num_threads",
        "UnsupportedError",
    ):
        assert name in fastattn.__all__
        assert getattr(fastattn, name).__doc__
    assert fastattn.__version__[0].isdigit()


# ---- explain --------------------------------------------------------------------------------------
def pairs(Sq, Sk, *, causal=False, window=None, q_lens=None, kv_lens=None, q_offset=None):
    """(row, key) pairs inside causal, window and lengths of one head, over the batch of the lengths."""
    total = 0
    for ql, kl in zip([Sq] if q_lens is None else q_lens, [Sk] if kv_lens is None else kv_lens, strict=True):
        i, j = np.arange(ql)[:, None] + (kl - ql if q_offset is None else q_offset), np.arange(kl)
        seen = np.ones((ql, kl), bool)
        if causal:
            seen &= j <= i
        if window is not None:
            seen &= (j >= i - window[0]) & (j <= i + window[1])
        total += int(seen.sum())
    return total


@pytest.mark.parametrize(
    "kw",
    [
        {},
        {"causal": True},
        {"window": (5, 3)},
        {"causal": True, "q_offset": -4},
        {"q_lens": np.array([11]), "kv_lens": np.array([29]), "causal": True},
    ],
    ids=str,
)
def test_explain(kernel, dtype, kw):
    q, k, v = qkv(dtype, Sq=40, Sk=50, Hq=6, Hkv=2, D=16, Dv=24)
    plan = fastattn.explain(q, k, v, kernel=kernel, **kw)
    assert plan.kernel == kernel
    assert plan.device.startswith(next(info.device for info in KERNELS if info.name == kernel))
    assert plan.algorithm
    assert plan.workspace_bytes >= 0
    assert plan.work_items >= 1
    assert plan.threads >= 1
    assert plan.flops == 2 * (16 + 24) * 6 * pairs(40, 50, **kw)
    arrays = q.nbytes + k.nbytes + v.nbytes + q.nbytes // 16 * 24
    assert 0 < plan.bytes <= arrays * 1.01 + 16
    if not kw:
        assert plan.bytes >= arrays
    assert kernel in str(plan)


def test_explain_tells_why_every_other_kernel_was_refused(dtype):
    q, k, v = qkv(dtype, Sq=40, Sk=50, Hq=6, Hkv=2, D=16)
    plan = fastattn.explain(q, k, v)
    others = {info.name: info for info in KERNELS if info.name != plan.kernel}
    assert {name for name in others if others[name].device == "cpu"} <= set(plan.refused)
    for name, reason in plan.refused.items():
        assert reason
        if not others[name].usable:
            assert others[name].reason in reason
        assert name in str(plan)
        assert reason in str(plan)
    first = next(info.name for info in KERNELS if info.usable and dtype.name in map(str, info.dtypes))
    assert plan.kernel == first


def test_explain_does_not_run_or_allocate():
    """A problem of 2**50 scores is explained at once."""
    q = np.broadcast_to(np.float32(1), (1, 2**25, 1, 64))
    plan = fastattn.explain(q, q, q, causal=True)
    assert plan.flops == pytest.approx(2 * 128 * 2**25 * (2**25 + 1) / 2)


def test_explain_knows_return_arguments_and_out():
    q, k, v = qkv(np.float32, Sq=40, Sk=50, Hq=2, D=16)
    plain = fastattn.explain(q, k, v)
    more = fastattn.explain(q, k, v, return_lse=True, return_weights=True, out=np.empty_like(q))
    assert more.bytes == plain.bytes + 4 * 2 * 40 + 4 * 2 * 40 * 50


# ---- forcing --------------------------------------------------------------------------------------
def test_forcing_takes_effect():
    """cpu-reference sums in double, the vector kernels in float: the bits tell them apart."""
    q, k, v = qkv(np.float32, Sq=40, Sk=300, Hq=2, D=80)
    exact = fastattn.mha(q, k, v, kernel="cpu-reference")
    others = [
        i.name for i in KERNELS if i.usable and i.name != "cpu-reference" and "float32" in map(str, i.dtypes)
    ]
    if not others:
        pytest.skip("no other kernel computes float32 here")
    for name in others:
        assert not np.array_equal(exact, fastattn.mha(q, k, v, kernel=name)), name
    plan = fastattn.explain(q, k, v)
    assert np.array_equal(fastattn.mha(q, k, v), fastattn.mha(q, k, v, kernel=plan.kernel))


def test_cpu_reference_is_exact_to_the_last_rounding():
    from fastattn import reference

    q, k, v = qkv(np.float32, Sq=40, Sk=300, Hq=2, D=80)
    want = reference.mha(q, k, v, causal=True, dtype=np.float32)
    got = fastattn.mha(q, k, v, causal=True, kernel="cpu-reference")
    assert (got != want).mean() < 1e-3
    np.testing.assert_allclose(got, want, rtol=2e-7)


# ---- threads and out ------------------------------------------------------------------------------
def test_num_threads(threads):
    for n in (1, 3, 2):
        fastattn.set_num_threads(n)
        assert fastattn.get_num_threads() == n
        q, k, v = qkv(np.float32, B=4, Sq=256, Hq=8, D=64)
        assert fastattn.explain(q, k, v).threads == n
    for bad in (0, -1):
        with pytest.raises(ValueError, match=str(bad)):
            fastattn.set_num_threads(bad)
    for wrong in (1.5, "2", None):
        with pytest.raises(TypeError):
            fastattn.set_num_threads(wrong)
    assert fastattn.get_num_threads() == 2


def test_out(kernel, dtype):
    q, k, v = qkv(dtype, B=2, Sq=9, Sk=20, Hq=4, Hkv=2, D=16, Dv=12)
    want = fastattn.mha(q, k, v, kernel=kernel)
    out = np.full_like(want, 3)
    assert fastattn.mha(q, k, v, kernel=kernel, out=out) is out
    assert np.array_equal(out, want)
    got, lse, weights = fastattn.mha(q, k, v, kernel=kernel, out=out, return_lse=True, return_weights=True)
    assert got is out
    assert lse.dtype == weights.dtype == stats_dtype(dtype)


def test_results_do_not_share_memory():
    q, k, v = qkv(np.float32, Sq=9, Hq=2)
    a = fastattn.mha(q, k, v, return_lse=True, return_weights=True)
    b = fastattn.mha(q, k, v, return_lse=True, return_weights=True)
    for x in a:
        assert x.flags.owndata or x.base is not None
        assert x.flags.writeable
        assert not any(np.shares_memory(x, y) for y in (*b, q, k, v))
