"""The reference's gradients: by hand, by finite differences, against PyTorch's; and the gate can fail."""

from __future__ import annotations

import math

import gate
import gate_backward
import ml_dtypes
import numpy as np
import pytest
from inputs import DTYPES, normal, qkv

import fastattn
from fastattn import reference

F8 = np.float64
GRADED = ("q", "k", "v", "bias", "alibi_slopes", "sinks")


def directional(loss, problem, name, seed, step=1e-5):
    """Central difference of loss(**problem) along a random direction of one array, and that direction."""
    direction = normal(problem[name].shape, F8, seed)
    up, down = (loss(**problem | {name: problem[name] + e * direction}) for e in (step, -step))
    return (up - down) / (2 * step), direction


def assert_finite_differences(problem, dout, dlse):
    """Every gradient of the reference along a random direction of its argument."""

    def loss(q, k, v, **kwargs):
        out, lse = reference.mha(q, k, v, return_lse=True, **kwargs)
        return np.sum(dout * out) + np.sum((dlse * lse)[np.isfinite(lse)])

    grads = reference.mha_backward(dout, **problem, dlse=dlse)
    for seed, (name, grad) in enumerate(zip(GRADED, grads, strict=True)):
        assert (grad is None) == (problem.get(name) is None), name
        if grad is None:
            continue
        assert grad.shape == problem[name].shape, name
        want, direction = directional(loss, problem, name, seed)
        got = np.sum(grad * direction)
        assert abs(got - want) < 1e-7 * (1 + np.sum(np.abs(grad * direction))), (name, got, want)


# ---- finite differences of each feature and of every pair -------------------------------------------
def bias_of(*which):
    """A bias that has only these axes of (B,Hq,Sq,Sk), the others 1."""
    return lambda *full: {"bias": normal(tuple(n if a in which else 1 for a, n in enumerate(full)), F8, 7)}


# Of (B, Hq, Sq, Sk): the arguments. Sizes are changed by SIZES, before.
ARGUMENTS = {
    "causal": lambda B, H, Sq, Sk: {"causal": True},
    "window": lambda B, H, Sq, Sk: {"window": (2, 1)},
    "window-left": lambda B, H, Sq, Sk: {"window": (1, None)},
    "q_offset": lambda B, H, Sq, Sk: {"q_offset": np.array([3, -1][:B])},
    "mask": lambda B, H, Sq, Sk: {"mask": np.random.default_rng(1).random((B, 1, Sq, Sk)) < 0.6},
    "bias": bias_of(0, 1, 2, 3),
    "bias-key": lambda B, H, Sq, Sk: {"bias": normal((Sk,), F8, 7)},
    "bias-row": bias_of(2),
    "bias-head": bias_of(1),
    "bias-batch-key": bias_of(0, 3),
    "bias-masks": lambda B, H, Sq, Sk: {"bias": np.where(np.eye(Sq, Sk, 1), -np.inf, 0.3)},
    "bias-number": lambda B, H, Sq, Sk: {"bias": np.array(0.25)},
    "alibi": lambda B, H, Sq, Sk: {"alibi_slopes": normal((H,), F8, 8)},
    "alibi-batch": lambda B, H, Sq, Sk: {"alibi_slopes": normal((B, H), F8, 8)},
    "softcap": lambda B, H, Sq, Sk: {"softcap": 0.8},
    "sinks": lambda B, H, Sq, Sk: {"sinks": normal((H,), F8, 9)},
    "q_lens": lambda B, H, Sq, Sk: {"q_lens": np.array([3, 0][:B])},
    "kv_lens": lambda B, H, Sq, Sk: {"kv_lens": np.array([5, 2][:B])},
    "dropout": lambda B, H, Sq, Sk: {"dropout": 0.4, "seed": 3},
    "scale-0": lambda B, H, Sq, Sk: {"scale": 0.0},
    "scale-negative": lambda B, H, Sq, Sk: {"scale": -0.7},
}
SIZES = {
    "gqa": {"Hkv": 1},
    "bhsd": {"layout": "bhsd"},
    "rank-3": {"rank": 3, "B": 1},
    "rank-2": {"rank": 2, "B": 1, "Hq": 1},
    "Dv": {"Dv": 3},
    "Dv-1": {"Dv": 1},
    "one-row": {"Sq": 1},
    "one-key": {"Sk": 1},
}


def problem_with(*features):
    sizes = {"B": 2, "Hq": 2, "Sq": 4, "Sk": 6, "D": 5}
    for feature in features:
        sizes |= SIZES.get(feature, {})
    if sizes["Hq"] == 1:
        sizes.pop("Hkv", None)
    q, k, v = qkv(F8, **sizes, seed=len(features))
    kwargs = {"layout": sizes["layout"]} if "layout" in sizes else {}
    shape = tuple(sizes[n] for n in ("B", "Hq", "Sq", "Sk"))
    for feature in features:
        if feature in ARGUMENTS:
            kwargs |= ARGUMENTS[feature](*shape)
    lse_shape = shape[4 - q.ndim : 3]
    return (
        {"q": q, "k": k, "v": v} | kwargs,
        normal((*q.shape[:-1], v.shape[-1]), F8, 5),
        normal(lse_shape, F8, 6),
    )


FEATURES = [*ARGUMENTS, *SIZES]


@pytest.mark.parametrize("feature", FEATURES)
def test_finite_differences(feature):
    assert_finite_differences(*problem_with(feature))
    for other in FEATURES[FEATURES.index(feature) + 1 :]:
        assert_finite_differences(*problem_with(feature, other))


# ---- PyTorch ------------------------------------------------------------------------------------
def random_problem(case):
    rng = np.random.default_rng(case)
    B, Hkv, G, Sq, Sk = (int(x) for x in rng.integers(1, (4, 3, 4, 7, 8)))
    H = G * Hkv
    q, k, v = qkv(F8, B=B, Hq=H, Hkv=Hkv, Sq=Sq, Sk=Sk, D=5, Dv=3, seed=case)

    def maybe(x):
        return x if rng.random() < 0.5 else None

    bias = rng.normal(size=[(B, H, Sq, Sk), (H, 1, Sk), (Sk,), (B, 1, Sq, 1)][rng.integers(4)])
    bias[rng.random(bias.shape) < 0.2] = -np.inf
    return {
        "q": q,
        "k": k,
        "v": v,
        "bias": maybe(bias),
        "alibi_slopes": maybe(rng.normal(size=[(H,), (B, H)][rng.integers(2)])),
        "sinks": maybe(rng.normal(size=H)),
        "softcap": maybe(0.7),
        "causal": bool(rng.random() < 0.3),
        "window": (maybe(int(rng.integers(4))), maybe(int(rng.integers(3)))),
        "q_offset": maybe(rng.integers(-3, 6, B)),
        "mask": maybe(rng.random((B, 1, Sq, Sk)) < 0.7),
        "q_lens": maybe(rng.integers(0, Sq + 1, B)),
        "kv_lens": maybe(rng.integers(0, Sk + 1, B)),
        "dropout": maybe(0.3) or 0.0,
        "scale": 0.6,
        "seed": case,
    }


def torch_attention(torch, q, k, v, *, bias, alibi_slopes, sinks, softcap, scale, weights_of, keep):
    """Plain tensor operations on (B,S,H,F); weights_of holds (allowed, distance)."""
    allowed, distance = (torch.tensor(x) for x in weights_of)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    score = scale * q @ k.transpose(2, 3)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if alibi_slopes is not None:
        score = score - alibi_slopes[..., None, None] * distance
    if bias is not None:
        score = score + torch.where(torch.isfinite(bias), bias, 0.0)
    exps = torch.where(allowed, torch.exp(score), 0.0)
    total = exps.sum(-1) + (0 if sinks is None else torch.exp(sinks)[:, None])
    some = torch.where(total > 0, total, 1.0)
    return (exps / some[..., None] * torch.tensor(keep) @ v).transpose(1, 2), torch.log(some)


@pytest.mark.parametrize("case", range(40))
def test_against_autograd(case):
    torch = pytest.importorskip("torch")
    problem = random_problem(case)
    q, v = problem["q"], problem["v"]
    B, Sq, H, _ = q.shape
    dout, dlse = normal((*q.shape[:-1], 3), F8, 98), normal((B, H, Sq), F8, 97)

    restrictions = ("causal", "window", "q_offset", "mask", "q_lens", "kv_lens", "dropout", "seed", "bias")
    pieces = gate.pieces(
        q, problem["k"], v, order="blas", layout="bshd", **{n: problem[n] for n in restrictions}
    )
    tensors = {
        n: None if problem[n] is None else torch.tensor(problem[n], requires_grad=True) for n in GRADED
    }
    out, lse = torch_attention(
        torch, **tensors, softcap=problem["softcap"], scale=problem["scale"],
        weights_of=(pieces.allowed, pieces.distance), keep=pieces.keep,
    )  # fmt: skip
    exists = np.arange(Sq) < np.reshape(Sq if problem["q_lens"] is None else problem["q_lens"], (-1, 1, 1))
    loss = (out * torch.tensor(dout * exists.swapaxes(1, 2)[..., None])).sum()
    (loss + (lse * torch.tensor(dlse * exists)).sum()).backward()

    grads = reference.mha_backward(dout, **problem, dlse=dlse)
    for name, grad in zip(GRADED, grads, strict=True):
        assert (grad is None) == (tensors[name] is None)
        if grad is not None:
            want = tensors[name].grad
            want = np.zeros(grad.shape) if want is None else want.numpy()
            np.testing.assert_allclose(grad, want, rtol=0, atol=1e-12, err_msg=name)


# ---- by hand ------------------------------------------------------------------------------------
def test_by_hand():
    """Two keys of the same score: weights 1/2, dw = (1, 3), delta 2, ds = (-1/2, 1/2) + dlse/2."""
    q, k, v = np.zeros((1, 1)), np.array([[1.0], [2.0]]), np.array([[1.0], [3.0]])
    one = np.ones((1, 1))
    dq, dk, dv, dbias, dslopes, dsinks = reference.mha_backward(one, q, k, v, scale=2.0, bias=np.zeros(2))
    assert (dq, dslopes, dsinks) == (2 * (-0.5 * 1 + 0.5 * 2), None, None)
    assert (dk == 0).all()
    assert (dv == 0.5).all()
    assert (dbias == [-0.5, 0.5]).all()
    grads = reference.mha_backward(
        one,
        q,
        k,
        v,
        dlse=np.array([4.0]),
        q_offset=3,
        alibi_slopes=np.zeros(1),
        sinks=np.full(1, math.log(2)),
    )
    # The sink has weight 1/2 and the keys 1/4 each, so delta = 1; distances 3 and 2.
    ds = 0.25 * (1 - 1 + 4), 0.25 * (3 - 1 + 4)
    np.testing.assert_allclose(grads.dq, ds[0] * 1 + ds[1] * 2)
    np.testing.assert_allclose(grads.dalibi_slopes, [-(ds[0] * 3 + ds[1] * 2)])
    np.testing.assert_allclose(grads.dsinks, [0.5 * (4 - 1)])


def test_softcap_by_hand():
    q, k, v = np.array([[0.5]]), np.array([[1.0], [-3.0]]), np.array([[1.0], [0.0]])
    grads = reference.mha_backward(np.ones((1, 1)), q, k, v, scale=1.0, softcap=2.0)
    s = 2 * np.tanh(np.array([0.25, -0.75]))
    w = np.exp(s) / np.exp(s).sum()
    ds = w * (v[:, 0] - w[0]) * (1 - (s / 2) ** 2)
    np.testing.assert_allclose(grads.dq[0], ds @ k, rtol=1e-14)
    np.testing.assert_allclose(grads.dk[:, 0], ds * 0.5, rtol=1e-14)


def same(a, b):
    return all(
        (x is None) == (y is None) and (x is None or np.array_equal(x, y, equal_nan=True))
        for x, y in zip(a, b, strict=True)
    )


# ---- out and lse, dtype -----------------------------------------------------------------------------
def test_out_and_lse_are_used():
    q, k, v = qkv(F8, B=2, Sq=5, Sk=9, Hq=4, Hkv=2, D=6, Dv=3)
    kwargs = {"causal": True, "softcap": 2.0, "sinks": np.zeros(4), "dropout": 0.2}
    dout = normal((2, 5, 4, 3), F8, 1)
    out, lse = reference.mha(q, k, v, return_lse=True, **kwargs)
    want = reference.mha_backward(dout, q, k, v, **kwargs)
    assert same(reference.mha_backward(dout, q, k, v, out, lse, **kwargs), want)
    assert same(reference.mha_backward(dout, q, k, v, out, **kwargs), want)
    other = reference.mha_backward(dout, q, k, v, 0 * out, lse + 0.5, **kwargs)  # delta 0, weights less
    np.testing.assert_allclose(other.dv, want.dv * np.exp(-0.5))
    assert not np.allclose(other.dq, want.dq * np.exp(-0.5))
    assert (other.dsinks == 0).all()


def test_a_part_of_the_keys_with_out_and_lse_of_all():
    """What context parallelism needs: w is exp(score - lse) with the given lse."""
    q, k, v = qkv(F8, B=2, Sq=5, Sk=9, Hq=4, Hkv=2, D=6)
    dout, dlse = normal(q.shape, F8, 1), normal((2, 4, 5), F8, 2)
    out, lse = reference.mha(q, k, v, return_lse=True)
    whole = reference.mha_backward(dout, q, k, v, out, lse, dlse=dlse)
    parts = [
        reference.mha_backward(dout, q, k[:, some], v[:, some], out, lse, dlse=dlse)
        for some in (slice(4), slice(4, None))
    ]
    np.testing.assert_allclose(parts[0].dq + parts[1].dq, whole.dq, rtol=0, atol=1e-14)
    for name in ("dk", "dv"):
        got = np.concatenate([getattr(x, name) for x in parts], axis=1)
        np.testing.assert_allclose(got, getattr(whole, name), rtol=0, atol=1e-14)


LOWEST = {name: float(ml_dtypes.finfo(name).min) for name in ("bfloat16", "float32", "float64")}


@pytest.mark.parametrize(
    ("lowest", "given"),
    [
        (-1e9, np.float32(-1e9)),
        (-1e9, np.nextafter(np.float32(-1e9), np.float32(0))),  # 64 more
        (LOWEST["float32"], np.float32(LOWEST["float32"])),
        (LOWEST["bfloat16"], np.float32(LOWEST["float32"])),  # kernels end at the largest number
        (LOWEST["float32"], np.float64(LOWEST["float32"])),
        (LOWEST["float64"], np.float64(LOWEST["float64"])),
    ],
)
def test_lse_that_is_too_large_for_the_log(lowest, given):
    """A row masked by a finite bias: lse holds the bias alone, and the weights add up to 1 all the same."""
    q, k, v = qkv(F8, Sq=3, Sk=4, D=2)
    bias = np.full((3, 4), lowest)
    out = reference.mha(q, k, v, bias=bias)
    grads = reference.mha_backward(np.ones(q.shape), q, k, v, out, np.full((1, 1, 3), given), bias=bias)
    np.testing.assert_allclose(grads.dv.sum(axis=1), 3.0)
    np.testing.assert_allclose(grads.dbias.sum(axis=1), 0.0, atol=1e-12)


def test_dtype_rounds_each_gradient_to_that_of_its_argument():
    q, k, v = qkv(np.float16, Sq=3, Sk=5, Hq=2)
    bias, slopes, sinks = np.ones(5, np.float32), np.ones(2, F8), np.ones(2, DTYPES["bfloat16"])
    kwargs = {"bias": bias, "alibi_slopes": slopes, "sinks": sinks}
    exact = reference.mha_backward(q, q, k, v, **kwargs)
    rounded = reference.mha_backward(q, q, k, v, **kwargs, dtype=np.float16)
    assert all(x.dtype == F8 for x in exact)
    for x, y, argument in zip(exact, rounded, (q, k, v, bias, slopes, sinks), strict=True):
        assert y.dtype == argument.dtype
        assert np.array_equal(x.astype(argument.dtype), y)
    assert reference.mha_backward(q, q, k, v, **kwargs, need_dbias=False).dbias is None


@pytest.mark.parametrize("name", ["dout", "out", "lse", "dlse"])
def test_wrong_shapes(name):
    q, k, v = qkv(F8, B=2, Sq=3, Sk=5, Hq=2, D=4, Dv=6)
    given = {"dout": np.ones((2, 3, 2, 6)), name: np.ones((2, 2, 4))}
    with pytest.raises(ValueError, match=name):
        reference.mha_backward(q=q, k=k, v=v, **given)


# ---- NaN and Inf ------------------------------------------------------------------------------------
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
def test_masked_poison_does_not_leak(poison):
    q, k, v = qkv(F8, B=2, Sq=6, Sk=9, Hq=4, Hkv=2, D=5, Dv=4)
    mask = np.random.default_rng(0).random((2, 1, 6, 9)) < 0.6
    mask[:, :, 2] = False  # a row that may attend nothing
    mask[..., 7] = False  # a key that nobody may attend
    kwargs = {
        "mask": mask, "q_lens": np.array([6, 4]), "kv_lens": np.array([9, 5]), "sinks": np.zeros(4),
        "bias": normal((6, 9), F8, 3), "alibi_slopes": np.ones(4), "dropout": 0.3, "softcap": 2.0,
    }  # fmt: skip
    dout, dlse = normal((2, 6, 4, 4), F8, 4), normal((2, 4, 6), F8, 5)
    clean = reference.mha_backward(dout, q, k, v, dlse=dlse, **kwargs)
    for x in (k, v):
        x[:, 7], x[1, 5:] = poison, poison
    for x in (q, dout):
        x[:, 2], x[1, 4:] = poison, poison
    dlse[1, :, 4:] = poison
    assert same(reference.mha_backward(dout, q, k, v, dlse=dlse, **kwargs), clean)
    assert (clean.dk[:, 7] == 0).all()
    assert (clean.dv[1, 5:] == 0).all()
    assert (clean.dq[:, 2] == 0).all()
    assert (clean.dq[1, 4:] == 0).all()


def bad(x):
    return np.argwhere(~np.isfinite(x)).tolist()


def test_attended_nan_propagates():
    """Row 1 sees keys 0 and 1, row 2 sees all; the NaN stays where the formulas carry it."""
    q, k, v = qkv(F8, Sq=3, Sk=3, D=1, rank=2)
    one = np.ones((3, 1))

    def with_nan(name, at):
        given = {"dout": one.copy(), "q": q.copy(), "k": k.copy(), "v": v.copy()}
        given[name][at] = np.nan
        grads = reference.mha_backward(**given, causal=True, bias=np.zeros((3, 3)))
        return [[i for i, *_ in bad(x)] for x in (grads.dq, grads.dk, grads.dv)]

    assert with_nan("v", 2) == [[2], [0, 1, 2], []]  # delta of row 2; v itself is in no weight
    assert with_nan("k", 2) == [[2], [0, 1, 2], [0, 1, 2]]
    assert with_nan("dout", 1) == [[1], [0, 1], [0, 1]]
    assert with_nan("q", 0) == [[0], [0], [0]]


def test_a_row_that_attends_nothing_has_the_gradient_of_its_sink():
    q, k, v = qkv(F8, Sq=4, Sk=3, Hq=2)
    dlse = normal((1, 2, 4), F8, 1)
    kwargs = {"mask": np.zeros(3, bool), "q_lens": np.array([3])}
    grads = reference.mha_backward(np.ones(q.shape), q, k, v, dlse=dlse, sinks=np.ones(2), **kwargs)
    np.testing.assert_allclose(grads.dsinks, dlse[0, :, :3].sum(axis=1))
    assert all((x == 0).all() for x in grads[:3])
    grads = reference.mha_backward(np.ones(q.shape), q, k, v, dlse=dlse, sinks=np.full(2, -np.inf), **kwargs)
    assert (grads.dsinks == 0).all()


def test_nothing_at_all():
    for sizes in ({"B": 0}, {"Sq": 0}, {"Sk": 0}, {"Hq": 0}):
        q, k, v = qkv(F8, **({"B": 2, "Sq": 3, "Sk": 4, "Hq": 2} | sizes))
        bias = np.ones(1)
        grads = reference.mha_backward(q, q, k, v, bias=bias, alibi_slopes=np.ones(q.shape[2]))
        for grad, x in zip(grads, (q, k, v, bias, np.ones(q.shape[2])), strict=False):
            assert grad.shape == x.shape
            assert (grad == 0).all()


# ---- the gate -------------------------------------------------------------------------------------
SIDES = {"bias": normal((4, 1, 33), F8, 1), "alibi_slopes": np.full(4, 0.1), "sinks": np.zeros(4)}


def gated(dtype):
    q, k, v = qkv(dtype, B=2, Sq=17, Sk=33, Hq=4, Hkv=2, D=24, Dv=9, layout="bhsd")
    dout, dlse = normal((2, 4, 17, 9), dtype, 99), normal((2, 4, 17), gate.stats_dtype(dtype), 98)
    sides = {name: x.astype(dtype) for name, x in SIDES.items()}
    return (q, k, v), dout, dlse, {"layout": "bhsd", "causal": True, "softcap": 2.0, "dropout": 0.2} | sides


@pytest.mark.parametrize("order", ["blas", "reversed", "sequential"])
def test_textbook_is_the_gradient(dtype, order):
    arrays, dout, dlse, kwargs = gated(dtype)
    want = reference.mha_backward(dout, *arrays, dlse=dlse, **kwargs)
    for saved in (False, True):
        book = gate_backward.textbook_backward(*arrays, dout, dlse, order=order, saved=saved, **kwargs)
        for got, ref in zip(book, want, strict=True):
            assert got.shape == ref.shape
            relative = gate._finite_error(got, ref) / np.abs(ref).max()
            assert (
                relative < {"float64": 1e-14, "float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}[dtype.name]
            )


def test_gate_fails_on_a_wrong_gradient(dtype):
    arrays, dout, dlse, kwargs = gated(dtype)
    exact = reference.mha_backward(dout, *arrays, dlse=dlse, dtype=dtype, **kwargs)
    assert isinstance(exact, fastattn.Gradients)
    gate_backward.assert_gradients(exact, arrays, dout, dlse, kwargs)
    step = {"float64": 1e-12, "float32": 1e-4, "float16": 5e-2, "bfloat16": 0.3}[dtype.name]
    for n, x in enumerate(exact):
        nan = x.copy()
        nan.flat[0] = np.nan
        for wrong in (x + (step * np.abs(x).max()).astype(dtype), nan, np.zeros_like(x), x[..., 1:], None):
            grads = fastattn.Gradients(*exact[:n], wrong, *exact[n + 1 :])
            with pytest.raises(AssertionError, match=exact._fields[n]):
                gate_backward.assert_gradients(grads, arrays, dout, dlse, kwargs)
