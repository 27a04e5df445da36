"""Shapes, strides and options drawn by Hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
from gate import check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import STRIDES, qkv, restride

small = st.integers(1, 9)
length = st.one_of(st.integers(0, 20), st.integers(0, 140))
common = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def problems(draw):
    layout = draw(st.sampled_from(["bshd", "bhsd"]))
    rank = draw(st.sampled_from([4, 4, 4, 3, 2]))
    Hkv = 1 if rank == 2 else draw(st.integers(1, 3))
    G = 1 if rank == 2 else draw(st.integers(1, 4))
    sizes = {
        "B": draw(st.integers(1, 3)) if rank == 4 else 1,
        "Sq": draw(length),
        "Sk": draw(length),
        "Hq": Hkv * G,
        "Hkv": Hkv,
        "D": draw(st.integers(1, 70)),
        "Dv": draw(st.integers(1, 70)),
    }
    kinds = [s for s in STRIDES if rank > 2 or s != "swapped"]
    return layout, rank, sizes, [draw(st.sampled_from(kinds)) for _ in range(3)], draw(st.integers(0, 1000))


def build(dtype, problem):
    layout, rank, sizes, strides, seed = problem
    arrays = qkv(dtype, layout=layout, rank=rank, seed=seed, **sizes)
    return [restride(x, how) for x, how in zip(arrays, strides, strict=True)], sizes, layout


@common
@given(problem=problems(), causal=st.booleans())
def test_shapes_and_strides(kernel, dtype, problem, causal):
    arrays, _, layout = build(dtype, problem)
    check(kernel, *arrays, layout=layout, causal=causal, weights=True)


@st.composite
def score_shape(draw, sizes):
    """A shape that broadcasts to (B,Hq,Sq,Sk)."""
    full = [sizes["B"], sizes["Hq"], sizes["Sq"], sizes["Sk"]]
    rank = draw(st.integers(0, 4))
    return tuple(1 if draw(st.booleans()) else n for n in full[4 - rank :])


@common
@given(data=st.data())
def test_options(kernel, dtype, data):
    problem = data.draw(problems())
    arrays, sizes, layout = build(dtype, problem)
    B, Hq = sizes["B"], sizes["Hq"]
    rng = np.random.default_rng(problem[-1])

    def maybe(strategy):
        return data.draw(st.one_of(st.none(), strategy))

    shapes = score_shape(sizes)
    mask, bias = maybe(shapes), maybe(shapes)
    bound = st.one_of(st.none(), st.integers(0, 150))
    kw = {
        "causal": data.draw(st.booleans()),
        "window": maybe(st.tuples(bound, bound)),
        "q_offset": maybe(st.integers(-150, 150)),
        "mask": None if mask is None else np.array(rng.random(mask) < 0.7),
        "bias": None if bias is None else np.array(rng.normal(size=bias)).astype(dtype),
        "softcap": maybe(st.sampled_from([0.5, 20.0])),
        "sinks": maybe(st.just(rng.normal(size=Hq))),
        "alibi_slopes": maybe(st.just(rng.random((B, Hq)) / 50)),
        "q_lens": maybe(st.just(rng.integers(0, sizes["Sq"] + 1, B))),
        "kv_lens": maybe(st.just(rng.integers(0, sizes["Sk"] + 1, B))),
        "dropout": data.draw(st.sampled_from([0.0, 0.3])),
        "scale": maybe(st.floats(-0.5, 0.5)),
    }
    given_only = {name: value for name, value in kw.items() if value is not None}
    check(kernel, *arrays, layout=layout, weights=data.draw(st.booleans()), **given_only)


@pytest.mark.one_dtype
@common
@given(B=small, Sq=small, Sk=st.integers(1, 600), Hkv=st.integers(1, 3), G=small, D=st.integers(1, 130))
def test_decode_shapes(kernel, dtype, B, Sq, Sk, Hkv, G, D):
    check(kernel, *qkv(dtype, B=B, Sq=Sq, Sk=Sk, Hq=Hkv * G, Hkv=Hkv, D=D), causal=True)
