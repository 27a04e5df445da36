"""Few query rows against many keys: tiles of rows, columns of v, odd numbers of keys."""

from __future__ import annotations

import numpy as np
import pytest
from gate import check
from inputs import qkv

import fastattn

# (Sq, query heads of a key head): 1 to 8 rows in tiles of 4, 2 and 1.
ROWS = [(1, 1), (2, 1), (1, 3), (1, 4), (5, 1), (3, 2), (7, 1), (2, 4)]


def check_masked_values(kernel, q, k, v, poison):
    """What stands where nobody may look changes no bit."""
    mask = np.arange(k.shape[1]) % 7 != 3
    clean = fastattn.mha(q, k, v, kernel=kernel, mask=mask, return_lse=True)
    spoilt = v.copy()
    spoilt[:, ~mask] = poison
    got = fastattn.mha(q, k, spoilt, kernel=kernel, mask=mask, return_lse=True)
    for a, b in zip(got, clean, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize(("D", "Dv"), [(64, 32), (40, 64), (128, 96), (32, 128), (128, 128), (64, 80)])
@pytest.mark.parametrize(("Sq", "group"), ROWS)
def test_rows_and_columns(kernel, dtype, Sq, group, D, Dv):
    for Sk in (1, 2, 31, 65, 131, 700):
        q, k, v = qkv(dtype, B=2, Sq=Sq, Sk=Sk, Hq=3 * group, Hkv=3, D=D, Dv=Dv, seed=Sk)
        check(kernel, q, k, v)
    check(kernel, q, k, v, causal=True, window=(333, 0), sinks=np.ones(3 * group, np.float32))


# Up to 16 rows from 512 keys on are computed as these are.
@pytest.mark.parametrize(("D", "Dv"), [(64, 32), (40, 80)])
@pytest.mark.parametrize(("Sq", "group"), [(1, 16), (3, 4), (15, 1), (1, 13), (17, 1)])
def test_many_rows(kernel, dtype, Sq, group, D, Dv):
    for Sk in (511, 515, 2049):
        q, k, v = qkv(dtype, B=1, Sq=Sq, Sk=Sk, Hq=2 * group, Hkv=2, D=D, Dv=Dv, seed=Sk)
        check(kernel, q, k, v)
        mask = np.arange(Sk) % 5 != np.arange(Sq)[:, None] % 5
        check(kernel, q, k, v, causal=True, window=(600, 0), softcap=3.0, mask=mask)
    check(kernel, q, k, v, dropout=0.3, seed=4)


# Up to 32 from 12 MiB of keys and values on.
@pytest.mark.parametrize(("Sq", "group"), [(4, 8), (1, 23), (33, 1)])
def test_many_rows_of_large_heads(kernel, dtype, Sq, group):
    Sk = (12 << 20) // (192 * np.dtype(dtype).itemsize) + 1
    q, k, v = qkv(dtype, B=1, Sq=Sq, Sk=Sk, Hq=group, Hkv=1, D=128, Dv=64)
    kw = {"causal": True} if Sq > 1 else {}
    check(kernel, q, k, v, **kw)


@pytest.mark.parametrize(("Sq", "group"), ROWS)
def test_dropout(kernel, dtype, Sq, group):
    q, k, v = qkv(dtype, B=2, Sq=Sq, Sk=205, Hq=2 * group, Hkv=2, D=64, Dv=32)
    check(kernel, q, k, v, dropout=0.3, seed=11)


@pytest.mark.parametrize(("Sq", "group"), ROWS)
def test_one_key_gives_its_value(kernel, dtype, Sq, group):
    q, k, v = qkv(dtype, B=1, Sq=Sq, Sk=70, Hq=2 * group, Hkv=2, D=32, Dv=64)
    keys = np.array([67])
    for key in (0, 33, 66):
        mask = np.arange(70) == key
        out = fastattn.mha(q, k, v, kernel=kernel, mask=mask, kv_lens=keys)
        value = np.broadcast_to(v[:, key].repeat(group, axis=1)[:, None], out.shape)
        if np.dtype(dtype).itemsize == 2:  # the accumulator's last bits are rounded away
            assert np.array_equal(out, value)
        else:
            assert np.allclose(out, value, rtol=4 * np.finfo(dtype).eps, atol=0)


# Rows of prefill whose keys are split, as those of decode are.
@pytest.mark.parametrize(("Sq", "group"), [(100, 1), (64, 4)])
def test_split_keys_of_more_rows(kernel, dtype, Sq, group):
    q, k, v = qkv(dtype, B=1, Sq=Sq, Sk=2100, Hq=2 * group, Hkv=2, D=32, Dv=48)
    sinks = np.linspace(-1, 1, 2 * group, dtype=np.float32)
    check(kernel, q, k, v, causal=True, sinks=sinks)
    check(kernel, q, k, v, dropout=0.3, seed=4, softcap=4.0)
    check_masked_values(kernel, q, k, v, np.nan)


# An odd last key, with memory beyond it that must not be read as a key.
@pytest.mark.parametrize(("Sq", "group"), ROWS)
def test_what_lies_beyond_the_keys(kernel, dtype, Sq, group):
    q, k, v = qkv(dtype, B=1, Sq=Sq, Sk=72, Hq=2 * group, Hkv=2, D=32, Dv=64)
    for n in (1, 37, 64, 65, 71):
        expected = fastattn.mha(q, k[:, :n].copy(), v[:, :n].copy(), kernel=kernel, return_lse=True)
        for poison in (np.nan, np.inf, 1e4):
            filled = k.copy(), v.copy()
            filled[0][:, n:], filled[1][:, n:] = poison, poison
            for keys, values, kw in (
                (filled[0][:, :n], filled[1][:, :n], {}),
                (*filled, {"kv_lens": np.array([n]), "q_offset": n - Sq}),
            ):
                got = fastattn.mha(q, keys, values, kernel=kernel, return_lse=True, **kw)
                for a, b in zip(got, expected, strict=True):
                    assert np.array_equal(a, b), (n, poison, kw.keys())


# NaN and Inf among the values send an item through a second pass: nobody else's bits may change.
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize(("Sq", "group"), [*ROWS, (1, 13), (15, 1)])
def test_masked_values_change_no_bit(kernel, dtype, Sq, group, poison):
    Sk = 131 if Sq * group <= 8 else 700
    q, k, v = qkv(dtype, B=2, Sq=Sq, Sk=Sk, Hq=2 * group, Hkv=2, D=32, Dv=96)
    check_masked_values(kernel, q, k, v, poison)


@pytest.mark.parametrize(("Sq", "group"), ROWS)
def test_attended_poison_is_its_heads_alone(kernel, dtype, Sq, group):
    q, k, v = qkv(dtype, B=1, Sq=Sq, Sk=131, Hq=3 * group, Hkv=3, D=32, Dv=64)
    clean = fastattn.mha(q, k, v, kernel=kernel)
    for value, column in ((np.nan, 5), (np.inf, 44), (-np.inf, 63)):
        spoilt = v.copy()
        spoilt[0, 70, 1, column] = value
        out, _ = check(kernel, q, k, spoilt)
        good = np.ones(out.shape, bool)
        good[:, :, group : 2 * group, column] = False
        assert np.array_equal(out[good], clean[good])
        assert not np.isfinite(out[~good].astype(np.float32)).any()


# One row for each head: tiles of several heads, and of more keys for the heads left over. How many
# heads an item has depends on layout and threads; no bit may.
@pytest.mark.parametrize("heads", [1, 2, 4, 5, 9, 21])
def test_one_row_for_each_head(kernel, dtype, heads, threads):
    for D, Dv, Sk in ((32, 32, 700), (40, 72, 131), (8, 3, 1), (64, 64, 66)):
        q, k, v = qkv(dtype, B=1, Sq=1, Sk=Sk, Hq=heads, Hkv=heads, D=D, Dv=Dv, seed=heads)
        out, lse = check(kernel, q, k, v)
        by_head = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v))
        for n, keys, values in ((1, k, v), (3, k, v), (2, *by_head)):
            fastattn.set_num_threads(n)
            got = fastattn.mha(q, keys, values, kernel=kernel, return_lse=True)
            assert np.array_equal(got[0], out), n
            assert np.array_equal(got[1], lse), n
        alone = fastattn.mha(*(x[:, :, -1:].copy() for x in (q, k, v)), kernel=kernel)
        assert np.array_equal(alone, out[:, :, -1:])
