"""fastattn.jax: results and gradients under jit and vmap, without copies and without compiling again."""

from __future__ import annotations

import contextlib
import textwrap
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import gate
import numpy as np
import pytest
from gate_backward import assert_gradients
from inputs import DTYPES, normal, qkv
from subproc import run

import fastattn

jax = pytest.importorskip("jax", minversion="0.5")
import jax.numpy as jnp  # noqa: E402

import fastattn.jax  # noqa: E402

# JAX makes one or the other of an error in a handler, depending on the way the program was called.
RUN_TIME_ERRORS = (jax.errors.JaxRuntimeError, ValueError)
CPU = jax.devices("cpu")[0]


def enable_x64() -> Any:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with jax.default_device(CPU):
        yield


def features(dtype: Any = np.float32) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By name: (arguments of qkv, arguments of mha) with every argument of mha."""
    usual = {"B": 2, "Sq": 9, "Sk": 13, "Hq": 4, "Hkv": 2, "Dv": 5}
    integer = np.array([3, 13], np.int32)
    cases = {
        "plain": {},
        "causal": {"causal": True, "scale": -0.3},
        "window": {"window": (4, 1), "q_offset": 2},
        "open window": {"window": [None, 2**70], "q_offset": np.array([-3, 5], np.int32)},
        "mask": {"mask": np.random.default_rng(0).random((2, 1, 9, 13)) > 0.4},
        "bias": {"bias": normal((4, 1, 13), dtype, 1), "softcap": 2.5},
        "alibi": {"alibi_slopes": normal((2, 4), np.float32, 2), "causal": True},
        "sinks": {"sinks": normal((4,), dtype, 3), "mask": np.arange(9)[:, None] > np.arange(13)},
        "lengths": {"q_lens": np.array([9, 8], np.int32), "kv_lens": integer},
        "dropout": {"dropout": 0.4, "seed": 2**63 + 5},
        "heads before the sequence": {"causal": True, "bias": normal((9, 13), dtype, 4)},
        "three axes": {"kv_lens": np.array([7], np.int32), "mask": np.arange(9)[:, None] != np.arange(13)},
        "a matrix": {"alibi_slopes": normal((1,), dtype, 5), "bias": normal((13,), dtype, 6)},
        "a matrix, bhsd": {"layout": "bhsd"},
    }
    shapes: dict[str, dict[str, Any]] = {
        "heads before the sequence": {**usual, "layout": "bhsd"},
        "three axes": {**usual, "B": 1, "rank": 3},
        "a matrix": {"Sq": 9, "Sk": 13, "Dv": 5, "rank": 2},
        "a matrix, bhsd": {"Sq": 9, "Sk": 13, "Dv": 5, "rank": 2},
    }
    cases["heads before the sequence"]["layout"] = "bhsd"
    return {name: (shapes.get(name, usual), kwargs) for name, kwargs in cases.items()}


# Every feature in float32, a few in the other dtypes.
FEATURES = [
    pytest.param(name, dtype, id=f"{name}-{dtype.name}")
    for name in features()
    for dtype in DTYPES.values()
    if dtype == np.float32 or name in ("causal", "bias", "sinks")
]


@pytest.fixture
def _x64(number: np.dtype[Any]) -> Iterator[None]:
    with enable_x64() if number == np.float64 else contextlib.nullcontext():
        yield


def to_numpy(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def assert_same(got: Any, want: Any) -> None:
    got, want = to_numpy(got), to_numpy(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(a, b)


def static_and_traced(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    traced = {name: x for name, x in kwargs.items() if isinstance(x, np.ndarray)}
    return {name: x for name, x in kwargs.items() if name not in traced}, traced


# ---- results ------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize(("name", "number"), FEATURES)
def test_results_are_those_of_mha(name, number):
    shapes, kwargs = features(number)[name]
    arrays = qkv(number, **shapes)
    static, traced = static_and_traced(kwargs)

    @jax.jit
    def compiled(q: Any, k: Any, v: Any, traced: dict[str, Any]) -> Any:
        return fastattn.jax.mha(q, k, v, return_lse=True, return_weights=True, **static, **traced)

    got = compiled(*arrays, traced)
    assert_same(got, fastattn.mha(*arrays, return_lse=True, return_weights=True, **kwargs))
    gate.assert_out(np.asarray(got[0]), gate.oracle(*arrays, **kwargs), number, name)
    assert_same(fastattn.jax.mha(*arrays, **kwargs), got[0])
    shapes_only = jax.eval_shape(
        lambda q: fastattn.jax.mha(q, *arrays[1:], return_lse=True, **kwargs), arrays[0]
    )
    assert [(x.shape, x.dtype) for x in shapes_only] == [(x.shape, x.dtype) for x in got[:2]]


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_agrees_with_jax_nn(name):
    q, k, v = (jnp.asarray(x) for x in qkv(DTYPES[name], B=2, Sq=24, Hq=4, Hkv=2))
    bias, lengths = jnp.asarray(normal((2, 4, 24, 24), DTYPES[name], 1)), jnp.array([24, 22])
    # Of rows that may attend nothing JAX makes the mean of the values: there is none here.
    mask = jnp.asarray(np.random.default_rng(0).random((1, 1, 24, 24)) > 0.3).at[..., 0].set(True)
    for theirs, ours in (
        (
            {"is_causal": True, "bias": bias, "mask": mask, "scale": 0.2},
            {"causal": True, "bias": bias, "mask": mask, "scale": 0.2},
        ),
        (
            {"key_value_seq_lengths": lengths, "local_window_size": (3, 2)},
            {"kv_lens": lengths, "window": (3, 2), "q_offset": 0},
        ),
    ):

        def loss(function: Any, kwargs: Any, q: Any, k: Any, v: Any) -> Any:
            return jnp.sum(jnp.sin(function(q, k, v, **kwargs).astype(np.float32)))

        got, want = (
            jax.jit(jax.value_and_grad(partial(loss, function, kwargs), (0, 1, 2)))(q, k, v)
            for function, kwargs in ((fastattn.jax.mha, ours), (jax.nn.dot_product_attention, theirs))
        )
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            close = 1e-5 if name == "float32" else 0.1
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=close, rtol=close)


def test_sizes_of_zero():
    for sizes in ({"B": 0}, {"Sq": 0}, {"Sk": 0}, {"Hq": 0, "Hkv": 0}):
        arrays = qkv(np.float32, **{"B": 2, "Sq": 3, "Sk": 4, "Hq": 2, "Hkv": 1, **sizes})
        assert_same(jax.jit(fastattn.jax.mha)(*arrays), fastattn.mha(*arrays))
        grads = jax.grad(lambda q, k, v: fastattn.jax.mha(q, k, v).sum(), (0, 1, 2))(*arrays)
        assert [x.shape for x in grads] == [x.shape for x in arrays]
        assert not any(np.asarray(x).any() for x in grads if sizes != {"Sq": 0})


def test_denormals_are_not_flushed():
    # XLA flushes them on its threads; fastattn's threads do not.
    q, _, _ = qkv(np.float32, Sq=64)
    tiny = np.full_like(q, 1e-41)
    assert_same(jax.jit(fastattn.jax.mha)(0 * q, 0 * q, tiny), fastattn.mha(0 * q, 0 * q, tiny))
    assert np.asarray(jax.jit(fastattn.jax.mha)(0 * q, 0 * q, tiny)).min() > 0


# ---- gradients ----------------------------------------------------------------------------------------
def differentiable(kwargs: dict[str, Any]) -> list[str]:
    return [name for name in ("bias", "alibi_slopes", "sinks") if name in kwargs]


@pytest.mark.usefixtures("_x64")
@pytest.mark.parametrize(("name", "number"), FEATURES)
def test_gradients_are_those_of_mha_backward(name, number):
    shapes, kwargs = features(number)[name]
    arrays = qkv(number, **shapes)
    out, lse = fastattn.mha(*arrays, return_lse=True, **kwargs)
    dout = normal(out.shape, number, 7)
    dlse = np.where(np.isfinite(lse), normal(lse.shape, lse.dtype, 8), 0).astype(lse.dtype)
    side = differentiable(kwargs)
    fixed = {name: x for name, x in kwargs.items() if name not in side}

    @partial(jax.jit, static_argnames="with_lse")
    def gradients(q: Any, k: Any, v: Any, *values: Any, with_lse: bool) -> Any:
        def forward(q: Any, k: Any, v: Any, *values: Any) -> Any:
            given = dict(zip(side, values, strict=True))
            return fastattn.jax.mha(q, k, v, return_lse=with_lse, **fixed, **given)

        _, pullback = jax.vjp(forward, q, k, v, *values)
        return pullback((dout, dlse) if with_lse else dout)

    for with_lse in (False, True):
        got = gradients(*arrays, *(kwargs[name] for name in side), with_lse=with_lse)
        dl = dlse if with_lse else None
        want = fastattn.mha_backward(dout, *arrays, out, lse, dlse=dl, **kwargs)
        assert_same(got, [x for x in want if x is not None])
        by_name = dict(zip(("dq", "dk", "dv", *("d" + name for name in side)), to_numpy(got), strict=True))
        named = fastattn.Gradients(*(by_name.get(field) for field in want._fields))
        assert_gradients(named, arrays, dout, dl, kwargs, where=name)


def plain(q: Any, k: Any, v: Any, bias: Any, slopes: Any, sinks: Any, softcap: float) -> tuple[Any, Any]:
    """Causal attention by jax.numpy: (out, lse)."""
    Sq, Sk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    score = jnp.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    distance = jnp.arange(Sq)[:, None] + Sk - Sq - jnp.arange(Sk)
    score = softcap * jnp.tanh(score / softcap) - slopes[:, None, None] * abs(distance) + bias
    score = jnp.where(distance >= 0, score, -jnp.inf)
    sink = jnp.broadcast_to(sinks[:, None, None], (*score.shape[:3], 1))
    lse = jax.nn.logsumexp(jnp.concatenate([score, sink], axis=3), axis=3)
    return jnp.einsum("bhij,bjhd->bihd", jnp.exp(score - lse[..., None]), v), lse


def test_gradients_are_those_of_plain_jax():
    with enable_x64():
        arrays = qkv(np.float64, B=2, Sq=9, Sk=13, Hq=4, Hkv=2, Dv=5)
        side = normal((1, 4, 1, 13), np.float64, 1), normal((4,), np.float64, 2), normal((4,), np.float64, 3)
        dout, dlse = normal((2, 9, 4, 5), np.float64, 4), normal((2, 4, 9), np.float64, 5)

        def ours(q: Any, k: Any, v: Any, bias: Any, slopes: Any, sinks: Any) -> Any:
            given = {"bias": bias, "alibi_slopes": slopes, "sinks": sinks}
            return fastattn.jax.mha(q, k, v, causal=True, softcap=1.5, return_lse=True, **given)

        def loss(function: Any, *args: Any) -> Any:
            out, lse = function(*args)
            return (jnp.sin(out) * dout).sum() + (lse * dlse).sum()

        got, want = (
            jax.jit(jax.grad(partial(loss, function), tuple(range(6))))(*arrays, *side)
            for function in (ours, partial(plain, softcap=1.5))
        )
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11, rtol=1e-11)


def operands_of_the_backward(function: Any, *args: Any) -> tuple[set[str], set[str]]:
    """Names of operands and results of the one call of the backward handler in the compiled program."""
    text = jax.jit(function).lower(*args).compile().as_text()
    (line,) = (line for line in text.splitlines() if 'custom_call_target="fastattn_mha_backward"' in line)
    names = [set(line.split(f'{what} = "')[1].split('"')[0].split()) for what in ("operands", "results")]
    return names[0], names[1]


def test_only_gradients_that_are_wanted_are_computed():
    q, k, v = qkv(np.float32, Sq=8, Hq=2)
    side = {"bias": normal((1, 2, 8, 8), np.float32, 1), "sinks": normal((2,), np.float32, 2)}
    dout = normal(q.shape, np.float32, 3)

    @jax.jit
    def out_of(q: Any, side: Any) -> Any:
        return (fastattn.jax.mha(q, k, v, return_lse=True, **side)[0] * dout).sum()

    operands, results = operands_of_the_backward(jax.grad(out_of), q, side)
    assert results == {"dq", "dk", "dv"}
    assert "dlse" not in operands
    assert operands_of_the_backward(jax.grad(out_of, 1), q, side)[1] == {"dq", "dk", "dv", "dbias", "dsinks"}

    def lse_of(q: Any, bias: Any) -> Any:
        return fastattn.jax.mha(q, k, v, return_lse=True, bias=bias)[1].sum()

    operands, results = operands_of_the_backward(jax.grad(lse_of), q, side["bias"])
    assert {"dlse", "bias"} <= operands
    # Pullbacks of one traced function, made before either runs.
    _, of_q = jax.vjp(lambda q: out_of(q, side), q)
    _, of_side = jax.vjp(lambda side: out_of(q, side), side)
    assert_same((of_q(1.0)[0], of_side(1.0)[0]), jax.grad(out_of, (0, 1))(q, side))


UNSEEN = np.arange(8)[:, None] > np.arange(8)  # the first row sees nothing
UNSEEING: dict[str, dict[str, Any]] = {
    "mask": {"mask": UNSEEN},
    "bias": {"bias": jnp.where(jnp.asarray(UNSEEN), 0.5, -jnp.inf)},
    "lengths": {"kv_lens": np.array([0], np.int32)},
    "causal": {"causal": True, "q_offset": -3},
    "sinks": {"mask": UNSEEN, "sinks": jnp.full(2, -jnp.inf)},
}


@pytest.mark.parametrize("rank", [4, 3])
@pytest.mark.parametrize("flag", ["jax_debug_infs", "jax_debug_nans"])
@pytest.mark.parametrize("name", UNSEEING)
def test_rows_that_see_nothing_are_no_mistake(name, flag, rank):
    """Nothing that JAX looks at, results or what it keeps for the gradients, has an infinity of ours."""
    q = jnp.asarray(qkv(np.float32, B=1, Sq=8, Hq=2, rank=rank)[0])
    keywords = UNSEEING[name]

    def loss(q: Any) -> Any:
        return (fastattn.jax.mha(q, q, q, **keywords) ** 2).sum()

    functions = (
        jax.grad(loss), jax.jit(jax.grad(loss)), jax.grad(jax.checkpoint(loss)),
        lambda q: jax.vjp(loss, q)[1](1.0)[0],
        lambda q: jax.vmap(jax.grad(loss))(q[None])[0],
    )  # fmt: skip
    want = jax.grad(loss)(q)
    anything = jnp.full_like(q, np.nan if flag == "jax_debug_nans" else np.inf)

    def of_masked(q: Any) -> Any:
        return fastattn.jax.mha(q, anything, anything, mask=np.zeros(8, bool)).sum()

    jax.config.update(flag, True)
    try:
        for function in functions:
            assert_same(function(q), want)
        assert not np.asarray(jax.grad(of_masked)(q)).any()
    finally:
        jax.config.update(flag, False)


def test_debugging_still_finds_mistakes():
    q = jnp.asarray(qkv(np.float32, B=1, Sq=8, Hq=2)[0])
    jax.config.update("jax_debug_infs", True)
    try:
        with pytest.raises(FloatingPointError):
            jax.grad(lambda q: (fastattn.jax.mha(q, q, q, mask=UNSEEN) / 0.0).sum())(q)
    finally:
        jax.config.update("jax_debug_infs", False)


def test_gradients_of_what_has_none():
    q, k, v = qkv(np.float32, Sq=8)
    lengths, mask = np.array([5], np.int32), np.ones((8, 8), bool)
    _, pullback = jax.vjp(lambda x, n, m: fastattn.jax.mha(x, k, v, kv_lens=n, mask=m), q, lengths, mask)
    dq, dlengths, dmask = pullback(q)
    assert np.asarray(dq).any()
    assert dlengths.dtype == dmask.dtype == jax.dtypes.float0

    def of_weights(q: Any) -> Any:
        return fastattn.jax.mha(q, k, v, return_weights=True)

    jax.grad(lambda q: of_weights(q)[0].sum())(q)
    with pytest.raises(ValueError, match=r"^return_weights: the weights have no gradient"):
        jax.grad(lambda q: of_weights(q)[1].sum())(q)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.grad(lambda q: jax.grad(lambda q: fastattn.jax.mha(q, k, v).sum())(q).sum())(q)


def test_checkpoint_and_scan():
    q, k, v = qkv(np.float32, Sq=8, Hq=2)

    def layers(wrap: Any, q: Any) -> Any:
        step = wrap(lambda x: x + fastattn.jax.mha(x, k, v, causal=True))
        return jax.lax.scan(lambda x, _: (step(x), None), q, length=3)[0].sum()

    def unrolled(q: Any) -> Any:
        for _ in range(3):
            q = q + fastattn.jax.mha(q, k, v, causal=True)
        return q.sum()

    want = jax.grad(unrolled)(q)
    for wrap in (lambda f: f, jax.checkpoint):
        np.testing.assert_allclose(jax.jit(jax.grad(partial(layers, wrap)))(q), want, rtol=1e-5, atol=1e-6)


def test_training_loop():
    # One head learns to copy the token before, by its relative bias alone.
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((4, 16, 1, 8)).astype(np.float32)
    target = np.roll(tokens, 1, axis=1)[:, 1:]
    parameters = {"q": np.zeros((8, 8), np.float32), "bias": np.zeros((16, 16), np.float32)}

    @jax.jit
    def step(parameters: Any, seed: Any) -> Any:
        def loss(p: Any) -> Any:
            out = fastattn.jax.mha(
                tokens @ p["q"], tokens, tokens, causal=True, bias=p["bias"], dropout=0.05, seed=seed
            )
            return jnp.mean((out[:, 1:] - target) ** 2)

        value, gradient = jax.value_and_grad(loss)(parameters)
        return value, jax.tree.map(lambda p, g: p - 40.0 * g, parameters, gradient)

    losses = []
    for key in jax.random.split(jax.random.key(0), 60):
        value, parameters = step(parameters, key)
        losses.append(float(value))
    assert losses[-1] < 0.25 * losses[0]


# ---- vmap ---------------------------------------------------------------------------------------------
def vmapped() -> dict[str, tuple[bool, dict[str, Any], dict[str, Any], tuple[int | None, ...]]]:
    """By name: (one call for all entries, traced arguments, fixed ones, the mapped axis of each traced)."""
    q, k, v = (np.stack(x) for x in zip(*(qkv(np.float32, B=2, Sq=5, Sk=7, Hq=4, Hkv=2, Dv=3, seed=n)
                                          for n in range(3)), strict=True))  # fmt: skip
    one = {"q": q[:, :1], "k": k[:, :1], "v": v[:, :1]}
    many = {"q": q, "k": k, "v": v}
    f32 = np.float32
    lengths = np.array([[1, 7], [3, 4], [0, 7]], np.int32)
    bias = normal((3, 1, 4, 5, 7), f32, 4)
    cases: dict[str, Any] = {
        "q, k, v": (True, many, {"causal": True, "return_lse": True}, (0, 0, 0)),
        "q alone": (True, {**many, "k": k[0], "v": v[0]}, {"return_weights": True}, (0, None, None)),
        "other axes": (True, {**many, "q": np.moveaxis(q, 0, 3), "v": np.moveaxis(v, 0, 4)}, {}, (3, 0, 4)),
        "matrices": (True, {name: x[:, 0, :, 0] for name, x in many.items()}, {}, (0, 0, 0)),
        "lengths": (True, {**many, "kv_lens": lengths, "q_lens": lengths[0] % 6}, {}, (0, 0, 0, 0, None)),
        "offsets": (True, {**many, "q_offset": np.arange(3)}, {"window": (1, 1)}, (0, 0, 0, 0)),
        "one offset": (True, {**many, "q_offset": np.array(1)}, {"window": (1, 1)}, (0, 0, 0, None)),
        "a mask": (True, {**many, "mask": bias > 0}, {}, (0, 0, 0, 0)),
        "one mask": (True, {**many, "mask": bias[0] > 0}, {}, (0, 0, 0, None)),
        "a bias": (True, {**one, "bias": bias}, {}, (0, 0, 0, 0)),
        "one bias": (True, {**one, "bias": bias[0]}, {}, (0, 0, 0, None)),
        "a bias for a batch": (False, {**many, "bias": bias}, {}, (0, 0, 0, 0)),
        "a bias of each entry": (True, {**many, "bias": normal((3, 2, 1, 1, 7), f32, 5)}, {}, (0, 0, 0, 0)),
        "slopes": (True, {**one, "alibi_slopes": normal((3, 4), f32, 6)}, {}, (0, 0, 0, 0)),
        "one slope": (True, {**one, "alibi_slopes": normal((4,), f32, 6)}, {}, (0, 0, 0, None)),
        "slopes for a batch": (False, {**many, "alibi_slopes": normal((3, 4), f32, 6)}, {}, (0, 0, 0, 0)),
        "slopes of each": (True, {**many, "alibi_slopes": normal((3, 2, 4), f32, 6)}, {}, (0, 0, 0, 0)),
        "sinks": (False, {**one, "sinks": normal((3, 4), f32, 7)}, {}, (0, 0, 0, 0)),
        "sinks for all": (False, {**one, "sinks": normal((4,), f32, 7)}, {}, (0, 0, 0, None)),
        "dropout": (False, many, {"dropout": 0.5, "seed": 3}, (0, 0, 0)),
        "seeds": (False, {**many, "seed": np.arange(3)}, {"dropout": 0.5}, (0, 0, 0, 0)),
    }
    return cases


@pytest.mark.parametrize("name", vmapped())
def test_vmap(name):
    in_one_call, traced, fixed, axes = vmapped()[name]
    entries = [
        {
            key: x if axis is None else np.take(x, n, axis)
            for (key, x), axis in zip(traced.items(), axes, strict=True)
        }
        for n in range(3)
    ]

    floats = tuple(n for n, x in enumerate(traced.values()) if x.dtype == np.float32)

    @partial(jax.grad, argnums=floats, has_aux=True)
    def function(*values: Any) -> Any:
        results = fastattn.jax.mha(**dict(zip(traced, values, strict=True)), **fixed)
        differentiable = jax.tree.leaves(results)[: 1 + ("return_lse" in fixed)]
        return sum((x**2).sum() for x in differentiable), results

    one_by_one = [to_numpy(function(*entry.values())) for entry in entries]
    mapped = jax.jit(jax.vmap(function, axes)).lower(*traced.values()).compile()
    assert_same(mapped(*traced.values()), jax.tree.map(lambda *x: np.stack(x), *one_by_one))
    assert (" while(" not in mapped.as_text()) == in_one_call


def test_nested_vmap():
    arrays = tuple(np.stack([x, -x]) for x in qkv(np.float32, B=6, Sq=5, Hq=2, layout="bhsd"))
    mapped = jax.vmap(jax.vmap(partial(fastattn.jax.mha, layout="bhsd")))
    want = [fastattn.mha(*(x[n] for x in arrays), layout="bhsd") for n in range(2)]
    assert_same(mapped(*arrays), np.stack(want))


# ---- dropout ------------------------------------------------------------------------------------------
def test_seeds():
    arrays = qkv(np.float32, B=2, Sq=16, Hq=2)
    dropped = partial(fastattn.jax.mha, *arrays, dropout=0.5)
    want = fastattn.mha(*arrays, dropout=0.5, seed=7)
    assert not np.array_equal(want, fastattn.mha(*arrays, dropout=0.5, seed=8))
    key = jax.random.key(7, impl="threefry2x32")
    for seed in (7, np.uint8(7), np.array(7), jnp.int32(7), key, jax.random.key_data(key)):
        assert_same(dropped(seed=seed), want)
    assert_same(
        dropped(seed=np.array([3, 9], np.uint32)), fastattn.mha(*arrays, dropout=0.5, seed=3 * 2**32 + 9)
    )
    with enable_x64():
        big = np.array(2**64 - 2, np.uint64)
        assert_same(dropped(seed=big), fastattn.mha(*arrays, dropout=0.5, seed=2**64 - 2))
    for bad in (-1, 2**64, np.arange(2), np.zeros((3,), np.uint32)):
        with pytest.raises(ValueError, match=r"^seed: expected"):
            dropped(seed=bad)
    for bad in (1.5, None, np.zeros(()), True):
        with pytest.raises(TypeError, match=r"^seed: expected"):
            dropped(seed=bad)
    with pytest.raises(
        RUN_TIME_ERRORS, match=r"INVALID_ARGUMENT: seed: expected 0 <= seed < 2\*\*64, got -3"
    ):
        dropped(seed=jnp.int32(-3))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_four_words(impl):
    """Typed and raw, given and by default; every word counts."""
    arrays = qkv(np.float32, B=2, Sq=16, Hq=2)
    dropped = partial(fastattn.jax.mha, *arrays, dropout=0.5)
    key = jax.random.key(7, impl=impl)
    want = dropped(seed=key)
    words = np.asarray(jax.random.key_data(key))
    assert words.shape == (4,)
    for seed in (words, jnp.asarray(words), jax.random.PRNGKey(7, impl=impl)):
        assert_same(dropped(seed=seed), want)
    with jax.default_prng_impl(impl):
        assert_same(dropped(seed=jax.random.key(7)), want)
        assert_same(dropped(seed=jax.random.PRNGKey(7)), want)
        assert_same(dropped(seed=7), fastattn.mha(*arrays, dropout=0.5, seed=7))
    others = [words ^ np.uint32(1 << bit) * (np.arange(4) == n) for n in range(4) for bit in (0, 31)]
    others += [words[[1, 0, 3, 2]], np.zeros(4), np.array([1, 2, 3, 4]), np.array([3, 4, 1, 2])]
    masks = [np.asarray(dropped(seed=x.astype(np.uint32))) for x in others]
    assert len({x.tobytes() for x in (*masks, np.asarray(want))}) == len(others) + 1
    # Traced, mapped and differentiated: the mask is that of the key alone.
    assert_same(jax.jit(lambda key: dropped(seed=key))(key), want)
    keys = jax.random.split(key, 3)
    assert_same(jax.vmap(lambda key: dropped(seed=key))(keys), np.stack([dropped(seed=key) for key in keys]))
    q, k, v = arrays

    def loss(q: Any, key: Any) -> Any:
        return (fastattn.jax.mha(q, k, v, dropout=0.5, seed=key) ** 2).sum()

    assert_same(jax.jit(jax.grad(loss))(q, key), jax.grad(loss)(q, words))
    with pytest.raises(ValueError, match=r"^seed: expected .* or \(4,\), got uint32\(2, 4\)"):
        dropped(seed=np.zeros((2, 4), np.uint32))


# ---- compilation, copies ------------------------------------------------------------------------------
class Compilations:
    """Counts programs that XLA compiles."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def test_nothing_is_compiled_twice():
    q, k, v = (jnp.asarray(x) for x in qkv(np.float32, B=2, Sq=8, Hq=2))
    seen = Compilations()
    eager = [
        lambda n: fastattn.jax.mha(q, k, v, dropout=0.5, seed=n, causal=True),
        lambda n: fastattn.jax.mha(q, k, v, q_offset=n, window=(2, 2)),
        lambda n: jax.grad(lambda q: fastattn.jax.mha(q * n, k, v, q_offset=n, window=(2, 2)).sum())(q),
    ]
    for function in eager:
        before = seen.count
        first = function(1)
        assert seen.count > before
        before = seen.count
        assert not np.array_equal(first, function(2))
        assert seen.count == before


def test_no_copies():
    arrays = qkv(np.float32, B=1, Sq=64, Hq=4, D=32)
    large = np.prod(arrays[0].shape)
    for function in (
        partial(fastattn.jax.mha, causal=True),
        jax.vmap(lambda q, k, v: fastattn.jax.mha(q, k, v)),
        lambda q, k, v: jax.vjp(lambda *x: fastattn.jax.mha(*x), q, k, v)[1](q),
    ):
        compiled = jax.jit(function).lower(*arrays).compile()
        text = compiled.as_text()
        assert 'custom_call_target="fastattn_mha"' in text
        for operation in (" copy(", " transpose(", " broadcast(", "fusion("):
            assert operation not in text
        # Of temporary arrays there are out and lse, which the backward pass takes.
        assert compiled.memory_analysis().temp_size_in_bytes < 1.2 * 4 * large


# ---- errors -------------------------------------------------------------------------------------------
def test_errors_when_traced():
    q, k, v = qkv(np.float32, B=2, Sq=5, Sk=7, Hq=4, Hkv=2)
    mha = fastattn.jax.mha
    mha(q, k, v, causal=True, scale=1.0)  # equal to what is refused below, but of another type
    for error, message, call in (
        (ValueError, r"^v: expected shape \(2, 7, 2, ", lambda: mha(q, k, v[:, 1:])),
        (ValueError, r"^k: expected a number of heads|^k: .*Hq", lambda: mha(q[:, :, :3], k, v)),
        (
            TypeError,
            "^k: expected float32, got float16|^k: expected .*float32",
            lambda: mha(q, k.astype("f2"), v),
        ),
        (
            TypeError,
            "^q: expected a float dtype, got int32",
            lambda: mha(*(x.astype("i4") for x in (q, k, v))),
        ),
        (TypeError, "^q: expected an array of JAX or NumPy, got list", lambda: mha([1.0], k, v)),
        (TypeError, "^k: expected an array of JAX or NumPy, got NoneType", lambda: mha(q, None, v)),
        (
            ValueError,
            "^mask: expected a shape that broadcasts",
            lambda: mha(q, k, v, mask=np.ones((3, 3), bool)),
        ),
        (TypeError, "^mask: expected bool", lambda: mha(q, k, v, mask=np.ones((5, 7)))),
        (ValueError, r"^q_offset: expected shape \(B,\)", lambda: mha(q, k, v, q_offset=np.arange(3))),
        (TypeError, "^q_offset: expected", lambda: mha(q, k, v, q_offset=1.5)),
        (
            TypeError,
            "^q_offset: expected an int or an integer array",
            lambda: mha(q, k, v, q_offset=np.ones(())),
        ),
        (ValueError, "^q_offset: expected an int of at most 32 bits", lambda: mha(q, k, v, q_offset=2**31)),
        (ValueError, r"^kv_lens: expected shape \(B,\)", lambda: mha(q, k, v, kv_lens=np.arange(3))),
        (ValueError, "^layout: expected 'bshd' or 'bhsd'", lambda: mha(q, k, v, layout="sbhd")),
        (TypeError, "^scale: expected a real number, got str", lambda: mha(q, k, v, scale="x")),
        (ValueError, "^scale: expected a finite number", lambda: mha(q, k, v, scale=np.inf)),
        (TypeError, "^causal: expected a bool", lambda: mha(q, k, v, causal=1)),
        (TypeError, "^window: expected", lambda: mha(q, k, v, window=3)),
        (ValueError, "^window: expected a left size >= 0", lambda: mha(q, k, v, window=[-1, 2])),
        (ValueError, "^dropout: expected 0 <= p < 1", lambda: mha(q, k, v, dropout=1.0)),
        (fastattn.UnsupportedError, "^kernel: expected one of", lambda: mha(q, k, v, kernel="none")),
        (
            TypeError,
            "^scale: expected a value that is known",
            lambda: jax.jit(lambda s: mha(q, k, v, scale=s))(1.0),
        ),
    ):
        with pytest.raises(error, match=message):
            call()
        with pytest.raises(error, match=message):  # and not only the first time
            call()
    assert mha(q, k, v, causal=True, scale=jnp.float32(0.5)).shape == q.shape


def test_errors_when_run():
    q, k, v = qkv(np.float32, B=2, Sq=5, Sk=7)
    compiled = jax.jit(lambda n: fastattn.jax.mha(q, k, v, kv_lens=n))
    for bad in (8, -1):
        message = f"INVALID_ARGUMENT: kv_lens: expected lengths from 0 to 7, got {bad} at index 1"
        with pytest.raises(RUN_TIME_ERRORS, match=message):
            compiled(np.array([3, bad])).block_until_ready()
    assert_same(compiled(np.array([3, 7])), fastattn.mha(q, k, v, kv_lens=np.array([3, 7])))


def test_forced_kernel():
    arrays = qkv(np.float32, B=2, Sq=5)
    for kernel in ("cpu-scalar", "cpu-reference"):
        forced = partial(fastattn.jax.mha, kernel=kernel)
        assert_same(forced(*arrays), fastattn.mha(*arrays, kernel=kernel))
        dq = jax.vjp(forced, *arrays)[1](np.ones_like(arrays[0]))[0]
        out, lse = fastattn.mha(*arrays, kernel=kernel, return_lse=True)
        want = fastattn.mha_backward(np.ones_like(out), *arrays, out, lse, kernel=kernel)
        assert_same(dq, want.dq)


def test_other_platforms_are_refused():
    # The handler that is registered for CUDA; there is none here, so the CPU calls it.
    jax.ffi.register_ffi_target(
        "fastattn_not_here", fastattn._core.xla_ffi_targets()["not_here"], platform="cpu"
    )
    x = jnp.zeros(3)
    call = jax.ffi.ffi_call(
        "fastattn_not_here", jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential"
    )
    with pytest.raises(RUN_TIME_ERRORS, match=r"UNIMPLEMENTED: fastattn\.jax computes on the CPU only"):
        jax.jit(call)(x).block_until_ready()


def test_calls_from_threads():
    arrays = qkv(np.float32, B=2, Sq=64, Hq=2)
    want = fastattn.mha(*arrays, causal=True)
    compiled = jax.jit(partial(fastattn.jax.mha, causal=True))
    compiled(*arrays)
    got: list[Any] = []
    workers = [
        threading.Thread(target=lambda: got.extend(np.asarray(compiled(*arrays)) for _ in range(20)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(got) == 80
    assert all(np.array_equal(x, want) for x in got)


def test_two_devices():
    code = """
    import jax, fastattn.jax
    from functools import partial
    from jax.sharding import PartitionSpec as P
    jax.config.update("jax_platforms", "cpu")
    q, k, v = qkv(np.float32, 2, 8, 2, 16)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    want = fastattn.mha(q, k, v)
    split = [jax.device_put(x, jax.sharding.NamedSharding(mesh, P("batch"))) for x in (q, k, v)]
    assert np.array_equal(jax.jit(fastattn.jax.mha)(*split), want)
    if hasattr(jax, "shard_map"):
        parts = partial(jax.shard_map, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"), check_vma=False)
        compiled = jax.jit(parts(fastattn.jax.mha)).lower(*split).compile()
        assert "all-gather" not in compiled.as_text()
        assert np.array_equal(compiled(*split), want)
        gradients = jax.grad(lambda *x: fastattn.jax.mha(*x).sum(), (0, 1, 2))
        for a, b in zip(jax.jit(parts(gradients))(*split), gradients(q, k, v), strict=True):
            assert np.array_equal(a, b)
    """
    run(code, env={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})


def test_imported_on_demand():
    code = """
    import sys
    assert "jax" not in sys.modules and "jax" in dir(fastattn)
    assert fastattn.jax.mha.__name__ == "mha" and "jax" in sys.modules
    import importlib
    importlib.reload(fastattn.jax)  # registers the same handlers again
    """
    run(code)
    code = """
    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name == "jax":
                raise ModuleNotFoundError("No module named 'jax'", name="jax")
    sys.meta_path.insert(0, Hidden())
    needs = "fastattn.jax needs JAX, which is not installed: pip install 'fastattn[jax]'"
    try:
        import fastattn.jax
    except ModuleNotFoundError as error:
        assert str(error) == needs
    else:
        raise AssertionError
    try:
        fastattn.jax
    except AttributeError as error:
        assert str(error) == "module 'fastattn' has no attribute 'jax' here: " + needs
    else:
        raise AssertionError
    """
    run(textwrap.dedent(code))
