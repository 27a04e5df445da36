"""Errors of mha_backward: those of mha, and those of its own arguments, each naming the argument."""

from __future__ import annotations

import numpy as np
import pytest
from inputs import DTYPES, qkv
from test_errors import F4, TYPE_ERRORS, VALUE_ERRORS, expect, ones, parametrize

import fastattn

SWAPPED = np.dtype(F4).newbyteorder()
OUT, LSE = (2, 3, 4, 6), (2, 4, 3)  # of test_errors.base()

OWN_TYPE_ERRORS = [
    ("dout-none", "dout", {"dout": None}, ["None"]),
    ("dout-list", "dout", {"dout": [1.0]}, ["list"]),
    ("dout-int", "dout", {"dout": ones(*OUT, dtype=np.int32)}, ["int32", "float32"]),
    ("dout-dtype", "dout", {"dout": ones(*OUT, dtype=np.float64)}, ["float64", "float32"]),
    ("dout-order", "dout", {"dout": ones(*OUT).astype(SWAPPED)}, ["byte order"]),
    ("out-none", "out", {"out": None}, ["None"]),
    ("out-dtype", "out", {"out": ones(*OUT, dtype=np.float16)}, ["float16", "float32"]),
    ("out-order", "out", {"out": ones(*OUT).astype(SWAPPED)}, ["byte order"]),
    ("lse-none", "lse", {"lse": None}, ["None"]),
    ("lse-number", "lse", {"lse": 1.0}, ["float"]),
    ("lse-dtype", "lse", {"lse": ones(*LSE, dtype=np.float64)}, ["float64", "float32"]),
    ("lse-half", "lse", {"lse": ones(*LSE, dtype=np.float16)}, ["float16", "float32"]),
    ("dlse-list", "dlse", {"dlse": [[1.0]]}, ["list"]),
    ("dlse-dtype", "dlse", {"dlse": ones(*LSE, dtype=np.float64)}, ["float64", "float32"]),
    ("dlse-int", "dlse", {"dlse": ones(*LSE, dtype=np.int64)}, ["int64", "float32"]),
    ("need_dbias", "need_dbias", {"need_dbias": "yes"}, ["str", "bool"]),
    ("return_lse", "return_lse", {"return_lse": True}, []),
    ("return_weights", "return_weights", {"return_weights": True}, []),
]

OWN_VALUE_ERRORS = [
    ("dout-dim", "dout", {"dout": ones(2, 3, 4, 8)}, ["(2, 3, 4, 8)", "6"]),
    ("dout-layout", "dout", {"dout": ones(2, 4, 3, 6)}, ["(2, 4, 3, 6)"]),
    ("dout-rank", "dout", {"dout": ones(3, 4, 6)}, ["(3, 4, 6)"]),
    ("dout-broadcast", "dout", {"dout": ones(1, 3, 4, 6)}, ["(1, 3, 4, 6)"]),
    ("out-dim", "out", {"out": ones(2, 3, 4, 8)}, ["(2, 3, 4, 8)", "6"]),
    ("out-heads", "out", {"out": ones(2, 3, 2, 6)}, ["(2, 3, 2, 6)"]),
    ("lse-order", "lse", {"lse": ones(2, 3, 4)}, ["(2, 3, 4)", "(2, 4, 3)"]),
    ("lse-rank", "lse", {"lse": ones(2, 4, 3, 1)}, ["(2, 4, 3, 1)", "(2, 4, 3)"]),
    ("lse-scalar", "lse", {"lse": ones()}, ["()", "(2, 4, 3)"]),
    ("dlse-shape", "dlse", {"dlse": ones(2, 4, 1)}, ["(2, 4, 1)", "(2, 4, 3)"]),
]


def backward(q, k, v, *, dout=ones(*OUT), out=ones(*OUT), lse=ones(*LSE), **kwargs):  # noqa: B008
    """mha_backward with what belongs to test_errors.base(), unless given."""
    return fastattn.mha_backward(dout, q, k, v, out, lse, **kwargs)


def of_the_forward(rows):
    return [row for row in rows if row[1] != "out"]


@parametrize(of_the_forward(TYPE_ERRORS) + OWN_TYPE_ERRORS)
def test_type_errors(name, given, pieces):
    expect(TypeError, name, given, pieces, backward)


@parametrize(of_the_forward(VALUE_ERRORS) + OWN_VALUE_ERRORS)
def test_value_errors(name, given, pieces):
    expect(ValueError, name, given, pieces, backward)


def test_dtype_of_lse(dtype):
    """float64 beside float64, float32 beside the others."""
    q, k, v = qkv(dtype, B=2, Sq=3, Sk=5, Hq=2)
    out, lse = fastattn.mha(q, k, v, return_lse=True)
    wrong = lse.astype(np.float32 if dtype == np.float64 else np.float64)
    with pytest.raises(TypeError, match=rf"^lse: .*{lse.dtype}.*{wrong.dtype}"):
        fastattn.mha_backward(out, q, k, v, out, wrong)
    with pytest.raises(TypeError, match=rf"^dlse: .*{lse.dtype}.*{wrong.dtype}"):
        fastattn.mha_backward(out, q, k, v, out, lse, dlse=wrong)


@pytest.mark.parametrize("rank", [3, 2])
def test_rank_of_lse(rank):
    q, k, v = qkv(F4, Sq=3, Sk=5, Hq=1, rank=rank)
    out, lse = fastattn.mha(q, k, v, return_lse=True)
    for wrong in (lse[None], lse[..., :2], np.broadcast_to(lse, (2, *lse.shape))):
        with pytest.raises(ValueError, match=r"^lse: "):
            fastattn.mha_backward(out, q, k, v, out, wrong)


def test_positions_and_names():
    q, k, v = qkv(F4, B=2, Sq=3, Sk=5, Hq=2)
    out, lse = fastattn.mha(q, k, v, return_lse=True)
    for positions, missing in (((), "dout"), ((out, q, k, v), "out"), ((out, q, k, v, out), "lse")):
        with pytest.raises(TypeError, match=rf"mha_backward.*\b{missing}\b"):
            fastattn.mha_backward(*positions)
    with pytest.raises(TypeError, match="mha_backward"):
        fastattn.mha_backward(out, q, k, v, out, lse, lse)
    with pytest.raises(TypeError, match=r"\blse\b"):
        fastattn.mha_backward(out, q, k, v, out, lse, lse=lse)
    by_name = fastattn.mha_backward(dout=out, q=q, k=k, v=v, out=out, lse=lse)
    assert np.array_equal(by_name.dq, fastattn.mha_backward(out, q, k, v, out, lse).dq)


@pytest.mark.parametrize(
    "name", ["dout", "q", "k", "v", "out", "lse", "dlse", "bias", "sinks", "alibi_slopes"]
)
def test_torch_requires_grad(name):
    torch = pytest.importorskip("torch")
    given = {n: torch.randn(1, 4, 2, 8) for n in ("dout", "q", "k", "v", "out")}
    given |= {n: torch.zeros(1, 2, 4) for n in ("lse", "dlse")}
    given |= {"bias": torch.zeros(4, 4), "sinks": torch.zeros(2), "alibi_slopes": torch.zeros(2)}
    fastattn.mha_backward(**given)
    given[name].requires_grad_()
    with torch.no_grad(), pytest.raises(TypeError, match=rf"^{name}: .* requires grad"):
        fastattn.mha_backward(**given)


# ---- UnsupportedError -----------------------------------------------------------------------------
def test_kernels_that_cannot_run_say_why():
    for info in fastattn.kernels():
        if not info.usable:
            expect(fastattn.UnsupportedError, info.name, {"kernel": info.name}, [info.reason], backward)


def test_kernels_without_a_backward_pass_say_so():
    others = [info for info in fastattn.kernels() if info.usable and info.device != "cpu"]
    if not others:
        pytest.skip("every usable kernel is one of the CPU, and those have a backward pass")
    for info in others:
        q, k, v = qkv(DTYPES[info.dtypes[0]], Sq=3, D=64)
        out, lse = fastattn.mha(q, k, v, return_lse=True)
        try:
            fastattn.mha_backward(out, q, k, v, out, lse, kernel=info.name)
            message = ""
        except fastattn.UnsupportedError as error:
            message = str(error)
        assert message in ("", f'kernel: "{info.name}" cannot compute this call: it has no backward pass')


def test_kernels_refuse_dtypes_that_they_do_not_have(kernel):
    names = {str(n) for n in next(info.dtypes for info in fastattn.kernels() if info.name == kernel)}
    for name in set(DTYPES) - names:
        q, k, v = qkv(DTYPES[name], Sq=3)
        out, lse = fastattn.mha(q, k, v, return_lse=True)
        with pytest.raises(fastattn.UnsupportedError, match=name):
            fastattn.mha_backward(out, q, k, v, out, lse, kernel=kernel)
