"""The cases of ``bench``: what they count, the arrays they make, and that a wrong result would be noticed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bench_tools import named, routes, same_threads, shrunk  # noqa: F401

import fastattn
from attnbench import case_list, cases, dense, timing
from attnbench.peers.base import FastAttn, Inputs
from attnbench.sample import Sample, sample_of
from fastattn import reference

pytest.importorskip("ml_dtypes")
pytestmark = pytest.mark.usefixtures("same_threads")
FEATURES = [
    *("llama-mask-f32", "llama-bias-f32", "llama-alibi-f32", "llama-sinks-f32", "llama-softcap-f32"),
    *("llama-window-f32", "bert-mask", "bert-bias", "bert-alibi", "bert-sinks"),
    *("bert-softcap", "bert-window"),
]


def test_names_are_unique_and_those_of_earlier_records_are_there() -> None:
    names = [case.name for case in case_list.CASES]
    assert len(set(names)) == len(names)
    earlier = ["bert", "vit", "whisper", "gpt2", "tiny"]
    earlier += [
        f"{name}-{short}" for name in ("llama", "decode-4k", "decode-32k") for short in ("f32", "bf16", "f16")
    ]
    assert set(earlier) <= set(names)


def test_every_case_with_a_feature_has_a_plain_case_that_differs_in_nothing_else() -> None:
    by_name = {case.name: case for case in case_list.CASES}
    featured = [case for case in case_list.CASES if case.plain is not None]
    assert len(featured) == 24
    same = ("batch", "q_heads", "kv_heads", "q_size", "kv_size", "head_dim", "v_dim", "dtype", "causal")
    for case in featured:
        plain = by_name[str(case.plain)]
        assert all(getattr(case, name) == getattr(plain, name) for name in same)
        assert (plain.feature, plain.softcap, plain.window) == (None, None, None)
        assert (case.feature, case.softcap, case.window) != (None, None, None)


def test_decode_keeps_to_the_memory_of_a_small_machine() -> None:
    assert max(case.kv_bytes for case in case_list.CASES) <= 4e9
    names = {case.name for case in case_list.CASES}
    assert {"decode-b16-4k-f32", "decode-b16-32k-f16", "decode-128k-f32"} <= names
    assert "decode-b16-128k-bf16" not in names


@pytest.mark.parametrize("case", case_list.CASES, ids=lambda case: case.name)
def test_the_cases_count_what_explain_counts(case: cases.Case) -> None:
    # Views of a single number: explain reads no element.
    zero = np.zeros((), cases.numpy_dtype(case.dtype))
    q = np.broadcast_to(zero, (case.batch, case.q_size, case.q_heads, case.head_dim))
    k = np.broadcast_to(zero, (case.batch, case.kv_size, case.kv_heads, case.head_dim))
    v = np.broadcast_to(zero, (case.batch, case.kv_size, case.kv_heads, case.v_dim))
    products = 2.5 if case.kind == "backward" else 1.0  # five instead of two; all of them have Dv = D
    assert case.flops == products * fastattn.explain(q, k, v, **case.options()).flops
    assert case.kv_bytes == k.nbytes + v.nbytes


@pytest.mark.parametrize("case", routes(), ids=lambda case: case.name)
def test_fastattn_computes_every_case(case: cases.Case) -> None:
    inputs = Inputs.of(case)
    assert [x.dtype.name for x in (inputs.q, inputs.k, inputs.v)] == [case.dtype] * 3
    out = fastattn.mha(inputs.q, inputs.k, inputs.v, **inputs.options)
    sample = Sample(inputs)
    assert sample.error(np.asarray(out)) < timing.SAME_COMPUTATION[case.dtype] * sample.size
    sides = sum(getattr(x, "nbytes", 0) for x in inputs.options.values())
    assert case.bytes + sides == fastattn.explain(inputs.q, inputs.k, inputs.v, **inputs.options).bytes
    # All pairs, counted one by one.
    plain = {name: x for name, x in inputs.options.items() if name in ("causal", "window")}
    assert case.pairs == dense.allowed(replace(case, feature=None), plain).sum()
    assert case.dense_flops >= case.flops


@pytest.mark.parametrize("case", routes(backward=True), ids=lambda case: case.name)
def test_fastattn_computes_the_gradients_of_every_backward_case(case: cases.Case) -> None:
    inputs = Inputs.of(case)
    assert inputs.dout is not None
    runner = FastAttn(1)._maker(inputs)
    gradients = runner.run()
    sample = sample_of(inputs)
    assert sample.error(runner.to_numpy(gradients)) < timing.SAME_COMPUTATION[case.dtype]
    out, lse = fastattn.mha(inputs.q, inputs.k, inputs.v, return_lse=True, **inputs.options)
    arrays = (inputs.q, inputs.k, inputs.v, out, lse, inputs.dout, *gradients[:3])
    assert inputs.dout.dtype == out.dtype
    assert inputs.dout.shape == out.shape
    assert case.bytes == sum(x.nbytes for x in arrays)
    assert case.dense_flops >= case.flops


def test_a_backward_case_counts_every_product() -> None:
    wide = replace(named("d64-1k-backward-f32"), value_dim=80)
    for case in (wide, replace(wide, causal=True)):
        assert case.flops == 2 * (3 * 64 + 2 * 80) * 12 * case.pairs


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize("case", routes(backward=True), ids=lambda case: case.name)
def test_a_wrong_gradient_is_noticed(case: cases.Case, wrong: int) -> None:
    inputs = Inputs.of(case)
    runner = FastAttn(1)._maker(inputs)
    gradients = list(runner.to_numpy(runner.run()))
    sample, honest = sample_of(inputs), gradients[wrong]
    spoilt = honest.copy()
    spoilt[-1, -1, -1, 0] = np.nan
    # Scaled wrongly, another order of heads or rows, a number missing, another shape.
    others = (1.1 * honest.astype(float), np.roll(honest, 1, axis=1), spoilt, honest[..., :-1])
    for gradient in (*others, np.roll(honest, 1, axis=2)) if honest.shape[2] > 1 else others:
        gradients[wrong] = gradient
        assert sample.error(tuple(gradients)) > timing.SAME_COMPUTATION[case.dtype]


@pytest.mark.parametrize("name", [*FEATURES, "mistral-16k-f32", "llama-chunk-f32"])
def test_dense_arrays_say_the_same_as_the_options(name: str) -> None:
    inputs = Inputs.of(shrunk(named(name)))
    keep = {key: x for key, x in inputs.options.items() if key in ("softcap", "sinks")}
    added = dense.additive(inputs.case, inputs.options, np.float64)
    got = reference.mha(inputs.q, inputs.k, inputs.v, bias=added, **keep)
    want = reference.mha(inputs.q, inputs.k, inputs.v, **inputs.options)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("name", FEATURES)
def test_a_result_without_the_feature_is_noticed(name: str) -> None:
    """On the case's own number of keys: with many of them a feature may change little."""
    case = named(name)
    case = replace(case, batch=min(2, case.batch), q_heads=2, kv_heads=1, head_dim=32)
    inputs = Inputs.of(case)
    sample = Sample(inputs)
    limit = timing.SAME_COMPUTATION[case.dtype] * sample.size

    def error(**options: Any) -> float:
        return sample.error(np.asarray(fastattn.mha(inputs.q, inputs.k, inputs.v, **options)))

    assert error(**inputs.options) <= limit
    (feature,) = set(inputs.options) - {"causal"}
    assert error(**{key: x for key, x in inputs.options.items() if key != feature}) > limit
    if feature == "window":
        left, right = inputs.options["window"]
        assert error(**inputs.options | {"window": (left + 1, right)}) > limit


def test_the_sample_notices_a_wrong_shape() -> None:
    inputs = Inputs.of(shrunk(named("bert")))
    out = np.asarray(fastattn.mha(inputs.q, inputs.k, inputs.v))
    assert Sample(inputs).error(out[..., :-1]) == np.inf


def test_the_sample_notices_nan_in_any_row() -> None:
    inputs = Inputs.of(shrunk(named("bert")))
    out = np.asarray(fastattn.mha(inputs.q, inputs.k, inputs.v))
    sample = Sample(inputs)
    for index, _ in sample.parts:
        spoilt = out.copy()
        spoilt[index][0, -1, 0, 0] = np.nan
        assert sample.error(spoilt) == np.inf


def test_large_arrays_repeat_without_equal_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "DRAWN", 1001)
    _, k, _ = shrunk(named("llama-f16")).arrays()
    keys = k.reshape(-1, k.shape[-1])
    assert len(np.unique(keys, axis=0)) == len(keys)
    assert 0.9 < float(k.astype(float).std()) < 1.1


def test_unknown_features_are_refused() -> None:
    with pytest.raises(ValueError, match="'rope'"):
        replace(named("bert"), feature="rope").options()


def test_patterns_choose_cases_in_the_order_of_the_list() -> None:
    chosen = cases.select("tiny, decode-b16-*-f16,bert", case_list.CASES)
    names = [case.name for case in chosen]
    assert names == ["bert", "tiny", "decode-b16-1k-f16", "decode-b16-4k-f16", "decode-b16-32k-f16"]
    assert cases.select(None, case_list.CASES) == case_list.CASES
    with pytest.raises(ValueError, match="'nonsense'"):
        cases.select("tiny,nonsense", case_list.CASES)


def test_the_quick_cases_are_few_and_have_their_plain_cases() -> None:
    quick = cases.select(case_list.QUICK, case_list.CASES)
    assert 8 <= len(quick) <= 13
    names = {case.name for case in quick}
    assert all(case.plain in names for case in quick if case.plain is not None)
    assert {case.kind for case in quick} == {"prefill", "backward", "decode", "latency"}
