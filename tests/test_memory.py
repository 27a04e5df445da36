"""Memory grows with S, never with S x S; what cannot be had is a MemoryError that names the bytes."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from inputs import qkv
from subproc import run

import fastattn

SLOW = ("cpu-reference", "cpu-scalar")
MB = 2**20


def peak_growth(kernel: str, S: int, setup: str, kwargs: str, Sq: int | None = None) -> int:
    """Bytes by which one call raises the peak of resident memory, after a small call has warmed up."""
    out, _ = run(f"""
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        name = {kernel!r}
        fastattn.set_num_threads(2)
        S = {S}
        a = qkv(dtype_of(name), 1, {Sq or S}, 1, 16, Sk=S)
        {setup}
        fastattn.mha(*(x[:, :64] for x in a), kernel=name)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out = fastattn.mha(*a, kernel=name, {kwargs})
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
    """)  # fmt: skip
    return int(out)


@pytest.mark.one_dtype
@pytest.mark.parametrize(
    ("setup", "kwargs"),
    [
        ("", ""),
        ("", "causal=True, return_lse=True"),
        ("mask = np.ones((1, 1, 1, S), bool)", "mask=mask"),
        ("mask = np.broadcast_to(np.True_, (1, 1, S, S))", "mask=mask, causal=True"),
        ("bias = np.zeros((S,), a[0].dtype)", "bias=bias, dropout=0.1, alibi_slopes=np.ones(1)"),
    ],
    ids=["plain", "causal", "mask", "mask-square", "bias-dropout"],
)
def test_memory_is_linear(kernel, dtype, setup, kwargs):
    S = 5000 if kernel in SLOW else 16384
    growth = peak_growth(kernel, S, setup, kwargs)
    # The result and the workspace are a few rows' worth; even one bit for each score would be S*S/8.
    limit = S * S // (2 if kernel in SLOW else 8)
    assert growth < limit, f"{growth / MB:.1f} MB more at S = {S}; S*S is {S * S / MB:.0f} MB"


@pytest.mark.one_dtype
def test_decode_memory_is_small(kernel, dtype):
    S = 200_000
    growth = peak_growth(kernel, S, "", "", Sq=1)
    assert growth < 8 * MB, f"{growth / MB:.1f} MB for one query row"


@pytest.mark.one_dtype
def test_a_bool_mask_is_not_expanded(kernel, dtype):
    """A whole Sq x Sk mask costs what it is, one byte a score, and no float copy of it."""
    S = 3000 if kernel in SLOW else 8192
    growth = peak_growth(kernel, S, "mask = np.ones((S, S), bool)", "mask=mask, causal=True")
    assert growth < S * S, f"{growth / MB:.1f} MB more at S = {S}; the mask has {S * S / MB:.0f} MB"


@pytest.mark.one_dtype
@pytest.mark.parametrize("Sq", [None, 1, 4, 256])
def test_workspace_of_explain_is_linear(kernel, dtype, Sq):
    def workspace(S):
        q = np.broadcast_to(np.zeros((), dtype), (1, Sq or S, 2, 64))
        k = np.broadcast_to(np.zeros((), dtype), (1, S, 2, 64))
        return fastattn.explain(q, k, k, kernel=kernel).workspace_bytes

    small, large = workspace(2**14), workspace(2**17)
    assert large <= 8.5 * max(small, 1 * MB)


@pytest.mark.one_dtype
def test_no_memory_is_an_error_with_the_bytes(kernel, dtype):
    """2**46 rows of one number: 2**47 bytes or more, past any address space. The process goes on."""
    q = np.broadcast_to(np.ones((), dtype), (1, 2**46, 1, 1))
    k = np.ones((1, 1, 1, 1), dtype)
    with pytest.raises(MemoryError) as error:
        fastattn.mha(q, k, k, kernel=kernel)
    digits = re.sub(r"[,_' ](?=\d)", "", str(error.value))
    assert str(2**46 * dtype.itemsize) in digits or "TiB" in digits, str(error.value)
    many = np.broadcast_to(k, (1, 2**25, 1, 1))
    with pytest.raises(MemoryError):
        fastattn.mha(q[:, : 2**20], many, many, return_weights=True, kernel=kernel)
    arrays = qkv(dtype, Sq=4)
    assert np.isfinite(fastattn.mha(*arrays, kernel=kernel).astype(float)).all()


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in kB")
def test_nothing_leaks():
    out, _ = run("""
        import resource
        lens = np.array([33, 20])
        wrong = [{"kernel": "none"}, {"scale": "x"}, {"mask": lens}, {"kv_lens": lens[:1]}, {"nothing": 1}]
        def once(n):
            for _ in range(n):
                fastattn.mha(*a, causal=True, return_lse=True, return_weights=True, bias=bias, kv_lens=lens)
                fastattn.explain(*a, causal=True)
                for bad in wrong:
                    try:
                        fastattn.mha(*a, **bad)
                    except (TypeError, ValueError):
                        pass
                    else:
                        raise AssertionError(bad)
        a = qkv("float32", 2, 33, 2, 64)
        bias = np.zeros((33, 33), np.float32)
        once(300)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        once(1500)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)  # fmt: skip
    assert int(out) < 4 * 1024, f"{int(out)} kB more after 1500 rounds"
