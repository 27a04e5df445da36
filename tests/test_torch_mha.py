"""fastattn.torch.mha: results of fastattn.mha, gradients of autograd, and the company it keeps in PyTorch."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
from inputs import normal
from subproc import run

import fastattn

torch = pytest.importorskip("torch")

import torch_math  # noqa: E402

import fastattn.torch as ft  # noqa: E402

Tensor = torch.Tensor
F64, F32 = torch.float64, torch.float32


def tensor(*shape: int, dtype: Any = F64, seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.from_numpy(normal(shape, np.float64, seed, spread)).to(dtype)


def qkv(
    *,
    B: int = 2,
    Sq: int = 5,
    Sk: int = 7,
    Hq: int = 4,
    Hkv: int = 2,
    D: int = 8,
    Dv: int = 6,
    dtype: Any = F64,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        tensor(B, Sq, Hq, D, dtype=dtype, seed=1),
        tensor(B, Sk, Hkv, D, dtype=dtype, seed=2),
        tensor(B, Sk, Hkv, Dv, dtype=dtype, seed=3),
    )


SOME = torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.4
SOME[1, 2, 3] = False  # a row that may attend nothing
HIDING = torch.where(SOME, tensor(2, 4, 5, 7, seed=8), -math.inf)
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": -0.3},
    "causal": {"causal": True},
    "causal top left": {"causal": True, "q_offset": 0},
    "window": {"window": (2, 1)},
    "window left": {"causal": True, "window": (2, None)},
    "offsets": {"causal": True, "q_offset": torch.tensor([-2, 4])},
    "mask": {"mask": SOME},
    "mask of keys": {"mask": SOME[:, :1, :1]},
    "bias": {"bias": tensor(2, 4, 5, 7, seed=4)},
    "bias of heads": {"bias": tensor(4, 1, 7, seed=4)},
    "bias of keys": {"bias": tensor(7, seed=4)},
    "bias with -inf": {"bias": HIDING},
    "alibi": {"alibi_slopes": tensor(4, seed=5).abs()},
    "alibi of the batch": {"alibi_slopes": tensor(2, 4, seed=5).abs(), "causal": True},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": tensor(4, seed=6)},
    "lengths": {"q_lens": torch.tensor([3, 5]), "kv_lens": torch.tensor([7, 4]), "causal": True},
    "no keys": {"kv_lens": torch.tensor([0, 7])},
    "no keys, sinks": {"kv_lens": torch.tensor([0, 7]), "sinks": tensor(4, seed=6)},
    "dropout": {"dropout": 0.3, "seed": 11},
    "all": {
        "causal": True, "window": (4, None), "mask": SOME, "bias": tensor(4, 1, 7, seed=4), "softcap": 2.0,
        "alibi_slopes": tensor(4, seed=5).abs(), "sinks": tensor(4, seed=6), "dropout": 0.2,
        "seed": 2**64 - 3, "kv_lens": torch.tensor([7, 6]),
    },
}  # fmt: skip
LEARNED = ("bias", "alibi_slopes", "sinks")


def leaves(qkv: tuple[Tensor, ...], features: dict[str, Any], to: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """Fresh tensors that require grad, of the given dtype: q, k, v and what else is learned."""
    inputs = [x.detach().to(to).requires_grad_() for x in qkv]
    keywords = dict(features)
    for name in LEARNED:
        if name in keywords:
            keywords[name] = keywords[name].detach().to(to).requires_grad_()
            inputs.append(keywords[name])
    return inputs, keywords


def loss(out: Tensor, lse: Tensor) -> Tensor:
    """Weighs every element of both differently."""
    weight_out = tensor(*out.shape, seed=20).to(out.dtype)
    weight_lse = tensor(*lse.shape, seed=21).to(lse.dtype)
    return (out * weight_out).sum() + torch.where(lse.isfinite(), lse * weight_lse, 0.0).sum()


def with_gradients(function: Any, inputs: list[Tensor], keywords: dict[str, Any]) -> list[Tensor]:
    out, lse = function(*inputs[:3], **keywords)[:2]
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss(out, lse), inputs)]


def kept_lse(*args: Any, **keywords: Any) -> Any:
    return ft.mha(*args, return_lse=True, **keywords)


# ---- results and gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", FEATURES)
def test_gradients(name, precision):
    """The gate of gradients: three times the error of autograd on plain operations, and a floor."""
    ref = with_gradients(torch_math.attention, *leaves(qkv(), FEATURES[name], F64))
    book = with_gradients(torch_math.attention, *leaves(qkv(), FEATURES[name], precision))
    got = with_gradients(kept_lse, *leaves(qkv(), FEATURES[name], precision))
    floor = 1e-6 if precision == F32 else 1e-14
    for n, (x, r, b) in enumerate(zip(got, ref, book, strict=True)):
        assert (x.dtype, x.shape) == (precision, r.shape), n
        if n == 1:  # lse
            x, r, b = (torch.where(y == -math.inf, 1e6, y) for y in (x, r, b))
        size = max(1.0, r.abs().max().item())
        error, limit = (x - r).abs().max().item(), 3.0 * (b - r).abs().max().item()
        assert error <= limit + floor * size, f"result {n}: {error:.3g} > {limit:.3g}"


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_gradcheck(name, layout):
    """Against finite differences, which know no formula."""
    features = {key: x for key, x in FEATURES[name].items() if key != "mask"}
    features["layout"] = layout
    small = qkv(B=1, Sq=3, Sk=4, Hq=2, Hkv=1, D=2, Dv=3)
    small = small if layout == "bshd" else tuple(x.transpose(1, 2) for x in small)
    if name == "all":
        features |= {"bias": tensor(2, 3, 1, seed=4), "kv_lens": torch.tensor([3])}
        features |= {"alibi_slopes": tensor(2, seed=5), "sinks": tensor(2, seed=6)}
    inputs, keywords = leaves(small, features, F64)

    def function(q: Tensor, k: Tensor, v: Tensor, *learned: Tensor) -> Any:
        return kept_lse(q, k, v, **keywords | dict(zip(LEARNED, learned, strict=False)))

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("rank", [2, 3])
def test_fewer_axes(rank, layout):
    heads = {"Hq": 1, "Hkv": 1} if rank == 2 else {}

    def fewer(x: Tensor) -> Tensor:
        x = x[0] if layout == "bshd" else x[0].transpose(0, 1)
        return x if rank == 3 else x.reshape(-1, x.shape[-1])

    whole, _ = leaves(qkv(B=1, **heads), {}, F64)
    parts, _ = leaves(tuple(map(fewer, whole)), {}, F64)
    want, want_lse = ft.mha(*whole, causal=True, return_lse=True)
    got, got_lse = ft.mha(*parts, causal=True, return_lse=True, layout=layout)
    assert torch.equal(got, fewer(want))
    assert torch.equal(got_lse, want_lse[0] if rank == 3 else want_lse[0, 0])
    (want.sin().sum() + want_lse.cos().sum()).backward()
    (got.sin().sum() + got_lse.cos().sum()).backward()
    assert all(torch.equal(x.grad, fewer(y.grad)) for x, y in zip(parts, whole, strict=True))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(half):
    rounded = tuple(x.to(half).to(F64) for x in qkv())
    ref = with_gradients(torch_math.attention, *leaves(rounded, {"causal": True}, F64))
    got = with_gradients(kept_lse, *leaves(rounded, {"causal": True}, half))
    for n, (x, r) in enumerate(zip(got, ref, strict=True)):
        assert x.dtype == (F32 if n == 1 else half)
        assert (x.to(F64) - r).abs().max() <= 8 * torch.finfo(half).eps * r.abs().max()


def test_bias_of_float32_beside_bfloat16():
    (q, k, v, bias), keywords = leaves(qkv(), {"bias": tensor(4, 1, 7)}, torch.bfloat16)
    bias = bias.detach().to(F32).requires_grad_()
    ft.mha(q, k, v, **keywords | {"bias": bias}).sum().backward()
    assert bias.grad.dtype == F32
    assert bias.grad.shape == bias.shape


@pytest.mark.parametrize("asked", [("out",), ("lse",), ("lse", "weights"), ("out", "lse", "weights")])
def test_only_what_was_used_is_differentiated(asked):
    (q, k, v), _ = leaves(qkv(), {}, F64)
    results = dict(
        zip(("out", "lse", "weights"), ft.mha(q, k, v, return_lse=True, return_weights=True), strict=True)
    )
    ref = dict(zip(("out", "lse", "weights"), torch_math.attention(q, k, v), strict=True))
    assert not results["weights"].requires_grad
    assert torch.allclose(results["weights"], ref["weights"].detach(), rtol=0, atol=1e-12)
    asked = [name for name in asked if name != "weights"]
    got = torch.autograd.grad(sum(results[name].sin().sum() for name in asked), (q, k, v), allow_unused=True)
    want = torch.autograd.grad(sum(ref[name].sin().sum() for name in asked), (q, k, v), allow_unused=True)
    for x, y in zip(got, want, strict=True):
        assert torch.allclose(x, torch.zeros_like(x) if y is None else y, rtol=0, atol=1e-12)


def test_what_is_returned():
    q, k, v = qkv()
    out = ft.mha(q, k, v)
    for with_lse in (False, True):
        for with_weights in (False, True):
            got = ft.mha(q, k, v, return_lse=with_lse, return_weights=with_weights)
            want = fastattn.mha(q, k, v, return_lse=with_lse, return_weights=with_weights)
            got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
            assert [x.shape for x in got] == [x.shape for x in want]
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert out.is_contiguous()


@pytest.mark.parametrize("needs", [False, True])
def test_gradient_of_the_bias_only_where_it_is_needed(needs, monkeypatch):
    seen = []
    backward = fastattn._core.mha_backward

    def spy(*args: Any, **keywords: Any) -> Any:
        seen.append((keywords["need_dbias"], keywords["dlse"]))
        return backward(*args, **keywords)

    monkeypatch.setattr(fastattn._core, "mha_backward", spy)
    q, k, v = qkv()
    bias = tensor(4, 1, 7).requires_grad_(needs)
    ft.mha(q.requires_grad_(), k, v, bias=bias).sum().backward()
    assert seen == [(needs, None)]  # nor is a gradient of lse made up
    assert (bias.grad is not None) == needs


@pytest.mark.parametrize("learned", ["q", "k", "v", *LEARNED])
def test_one_that_requires_grad_is_enough(learned):
    keywords = {"bias": tensor(4, 1, 7), "alibi_slopes": tensor(4).abs(), "sinks": tensor(4)}
    arguments = dict(zip("qkv", qkv(), strict=True)) | keywords
    arguments[learned].requires_grad_()
    ft.mha(**arguments).sum().backward()
    assert arguments[learned].grad.abs().max() > 0
    assert all(x.grad is None for name, x in arguments.items() if name != learned)


def test_strides(monkeypatch):
    """Views go in as they are: q, k, v of one projection, and a gradient that is one number for all."""
    lent = []
    forward = fastattn._core.mha
    monkeypatch.setattr(fastattn._core, "mha", lambda *a, **kw: lent.extend(a) or forward(*a, **kw))
    packed = tensor(2, 5, 3, 4, 8, seed=9).requires_grad_()
    ft.mha(*packed.unbind(2), causal=True).sum().backward()
    assert all(np.shares_memory(x, packed.detach().numpy()) for x in lent)
    copy = packed.detach().clone().requires_grad_()
    torch_math.attention(*copy.unbind(2), causal=True)[0].sum().backward()
    assert torch.allclose(packed.grad, copy.grad, rtol=0, atol=1e-12)


def test_masked_nan_stays_out_of_the_gradients():
    (q, k, v), _ = leaves(qkv(), {}, F64)
    with torch.no_grad():
        k[:, 5:], v[:, 5:] = math.nan, math.inf
    ft.mha(q, k, v, mask=torch.arange(7) < 5).sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert (k.grad[:, 5:] == 0).all()


def test_empty():
    for sizes in ({"B": 0}, {"Sq": 0}, {"Sk": 0}):
        (q, k, v), _ = leaves(qkv(**sizes), {}, F64)
        out, lse = ft.mha(q, k, v, return_lse=True)
        loss(out, lse).backward()
        assert all(x.grad.shape == x.shape and (x.grad == 0).all() for x in (q, k, v))


def test_same_bits_again():
    results = [with_gradients(kept_lse, *leaves(qkv(dtype=F32), FEATURES["all"], F32)) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_tensor_for_seed_and_offset():
    q, k, v = qkv()
    for seed in (5, 2**63 - 1):
        want = ft.mha(q, k, v, dropout=0.5, seed=seed, causal=True, q_offset=1)
        got = ft.mha(q, k, v, dropout=0.5, seed=torch.tensor(seed), causal=True, q_offset=torch.tensor(1))
        assert torch.equal(got, want)
    assert torch.equal(ft.mha(q, k, v, dropout=0.5, seed=np.int64(5)), ft.mha(q, k, v, dropout=0.5, seed=5))
    for seed in (2**63, 2**64 - 1):
        want = fastattn.mha(q, k, v, dropout=0.5, seed=seed)
        assert torch.equal(ft.mha(q, k, v, dropout=0.5, seed=seed), want)


# ---- the rest of autograd -----------------------------------------------------------------------------


def test_a_second_derivative_is_refused():
    (q, k, v), _ = leaves(qkv(), {}, F64)
    (dq,) = torch.autograd.grad(ft.mha(q, k, v).sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_is_refused():
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: ft.mha(q, k, v), (q,), (q,))
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        assert torch.equal(ft.mha(q, k, v), fastattn.mha(q, k, v))  # nothing to differentiate
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            ft.mha(dual, k, v)


def test_without_gradients():
    (q, k, v), _ = leaves(qkv(), {}, F64)
    want = fastattn.mha(*(x.detach() for x in (q, k, v)))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = ft.mha(q, k, v)
        assert not out.requires_grad
        assert torch.equal(out, want)


def test_change_in_place_is_noticed():
    (q, k, v), _ = leaves(qkv(), {}, F64)
    mask = torch.ones(7, dtype=torch.bool)
    out = ft.mha(q, k, v, mask=mask)
    mask[0] = False
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.sum().backward()


def test_checkpointing_draws_the_same_dropout():
    (q, k, v), _ = leaves(qkv(), {}, F64)

    def block(q: Tensor) -> Tensor:
        return ft.mha(q, k, v, dropout=0.5, seed=torch.randint(2**63 - 1, ())).sin()

    torch.manual_seed(3)
    want = torch.autograd.grad(block(q).sum(), (q, k, v))
    torch.manual_seed(3)
    out = torch.utils.checkpoint.checkpoint(block, q, use_reentrant=False)
    got = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


# ---- torch.func ---------------------------------------------------------------------------------------

MAPPED = {
    "q": (tensor(3, 2, 5, 4, 8, seed=30), {}),
    "bias": (tensor(3, 4, 1, 7, seed=31), {}),
    "mask": (SOME.expand(3, 2, 4, 5, 7).clone(), {}),
    "sinks": (tensor(3, 4, seed=32), {}),
    "alibi_slopes": (tensor(3, 4, seed=33).abs(), {}),
    "kv_lens": (torch.tensor([[7, 3], [2, 5], [4, 4]]), {"causal": True}),
    "q_offset": (torch.tensor([0, 2, 5]), {"causal": True}),
    "seed": (torch.tensor([1, 2, 3]), {"dropout": 0.4}),
}


def mapped_call(name: str, fixed: dict[str, Any]) -> Any:
    arguments = dict(zip("qkv", qkv(), strict=True)) | fixed
    return lambda x: ft.mha(**arguments | {name: x}, return_lse=True)


@pytest.mark.parametrize("name", MAPPED)
def test_vmap(name):
    values, fixed = MAPPED[name]
    call = mapped_call(name, fixed)
    got = torch.vmap(call, in_dims=-1, out_dims=1)(values.movedim(0, -1))
    want = [torch.stack(column, 1) for column in zip(*map(call, values), strict=True)]
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["q", "bias", "sinks", "alibi_slopes"])
def test_vmap_of_gradients_and_back(name):
    """Gradients per sample, and the gradient of a mapped function."""
    values, fixed = MAPPED[name]
    call = mapped_call(name, fixed)

    def scalar(x: Tensor) -> Tensor:
        out, lse = call(x)
        return out.sin().sum() + lse.cos().sum()

    want = []
    for x in values:
        x = x.clone().requires_grad_()
        want += torch.autograd.grad(scalar(x), x)
    want = torch.stack(want)
    assert torch.equal(torch.vmap(torch.func.grad(scalar))(values), want)
    values = values.clone().requires_grad_()
    torch.vmap(scalar)(values).sum().backward()
    assert torch.equal(values.grad, want)


def test_jacobian():
    q, k, v = qkv(B=1, Sq=2, Sk=3, Hq=1, Hkv=1, D=2, Dv=2)
    got = torch.func.jacrev(lambda q: ft.mha(q, k, v))(q)
    want = torch.func.jacrev(lambda q: torch_math.attention(q, k, v)[0])(q)
    assert torch.allclose(got, want, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.jacrev(torch.func.jacrev(lambda q: ft.mha(q, k, v).sum()))(q)


# ---- autocast, devices --------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast(half):
    (q, k, v, bias), keywords = leaves(qkv(), {"bias": tensor(4, 1, 7)}, F32)
    with torch.autocast("cpu", dtype=half):
        out, lse = ft.mha(q, k.to(half), v, return_lse=True, **keywords)
    assert (out.dtype, lse.dtype) == (half, F32)
    out.sum().backward()
    assert {x.grad.dtype for x in (q, k, v, bias) if x.grad is not None} == {F32}
    want = fastattn.mha(*(x.detach().to(half) for x in (q, k, v)), bias=bias.detach())
    assert torch.equal(out, want)
    with torch.autocast("cpu", dtype=half, enabled=False):
        assert ft.mha(q, k, v).dtype == F32


def test_autocast_leaves_float64():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ft.mha(*qkv()).dtype == F64


def test_meta_device():
    q, k, v = (x.to("meta") for x in qkv())
    out, lse, weights = ft.mha(q, k, v, return_lse=True, return_weights=True)
    assert out.shape == (2, 5, 4, 6)
    assert lse.shape == (2, 4, 5)
    assert weights.shape == (2, 4, 5, 7)
    assert {x.device.type for x in (out, lse, weights)} == {"meta"}


# ---- errors -------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], Any, str]] = {
    "NumPy": ({"q": np.ones((2, 5, 4, 8))}, TypeError, "^q: expected a torch.Tensor, got ndarray"),
    "NumPy mask": ({"mask": np.ones(7, bool)}, TypeError, "^mask: expected a torch.Tensor, got ndarray"),
    "complex": ({"k": torch.ones(2, 7, 2, 8, dtype=torch.cfloat)}, TypeError, "^k: .* torch.complex64"),
    "integers": ({"v": torch.ones(2, 7, 2, 6, dtype=torch.int32)}, TypeError, "^v: .* torch.int32"),
    "mixed": (
        {"k": torch.ones(2, 7, 2, 8)},
        TypeError,
        "^k: expected torch.float64 .* got torch.float32",
    ),
    "device": ({"v": torch.ones(2, 7, 2, 6, dtype=F64, device="meta")}, TypeError, "^v: .* got .* on meta"),
    "device of the mask": (
        {"mask": torch.ones(7, dtype=torch.bool, device="meta")},
        TypeError,
        "^mask: expected a tensor on cpu, .* got meta",
    ),
    "device of the seed": ({"seed": torch.tensor(1, device="meta")}, TypeError, "^seed: .* got meta"),
    "sparse mask": (
        {"mask": torch.ones(5, 7).bool().to_sparse()},
        TypeError,
        "^mask: expected a dense tensor",
    ),
    "sparse": (
        {"q": torch.ones(2, 5, 4, 8, dtype=F64).to_sparse()},
        TypeError,
        "^q: expected a dense tensor",
    ),
    "heads": ({"k": torch.ones(2, 7, 3, 8, dtype=F64)}, ValueError, "^[kv]: "),
    "mask shape": ({"mask": torch.ones(6, dtype=torch.bool)}, ValueError, "^mask: "),
    "mask dtype": ({"mask": torch.ones(7)}, TypeError, "^mask: "),
    "layout": ({"layout": "hsbd"}, ValueError, "^layout: "),
    "scale": ({"scale": "big"}, TypeError, "^scale: expected a number, got 'big'"),
    "infinite scale": ({"scale": math.inf}, ValueError, "^scale: "),
    "window": ({"window": 3}, TypeError, "^window: "),
    "window of one": ({"window": (3,)}, TypeError, "^window: "),
    "negative window": ({"window": (-1, None)}, ValueError, "^window"),
    "dropout": ({"dropout": 1.0}, ValueError, "^dropout: "),
    "seed": ({"seed": -1}, ValueError, r"^seed: expected 0 <= seed < 2\*\*64, got -1"),
    "large seed": ({"seed": 2**64}, ValueError, "^seed: "),
    "seeds": ({"seed": torch.tensor([1, 2])}, TypeError, "^seed: "),
    "float seed": ({"seed": torch.tensor(1.0)}, TypeError, "^seed: "),
    "half a seed": ({"seed": 0.5}, TypeError, "^seed: expected an int, got 0.5"),
    "half an offset": ({"q_offset": 0.5}, TypeError, "^q_offset: expected an int, got 0.5"),
    "half a window": ({"window": (0.5, None)}, TypeError, "^window: expected an int, got 0.5"),
    "causal": ({"causal": "yes"}, TypeError, "^causal: expected a bool, got str"),
    "lengths": ({"kv_lens": torch.tensor([8, 1])}, ValueError, "^kv_lens"),
    "kernel": ({"kernel": "none"}, fastattn.UnsupportedError, "^kernel: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    changed, exception, message = WRONG[name]
    with pytest.raises(exception, match=message):
        ft.mha(**dict(zip("qkv", qkv(), strict=True)) | changed)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused():
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([torch.ones(3, 8), torch.ones(5, 8)], layout=layout)
        with pytest.raises(TypeError, match=r"^q: expected a dense tensor, got a nested one"):
            ft.mha(nested, nested, nested)


# ---- the module ---------------------------------------------------------------------------------------


def test_signature_is_that_of_the_core():
    core = inspect.signature(fastattn.mha).parameters
    here = inspect.signature(ft.mha).parameters
    assert [name for name in core if name != "out"] == list(here)
    for name, parameter in here.items():
        # PyTorch's own functions draw their dropout from its generator.
        assert parameter.default == (None if name == "seed" else core[name].default), name
        if name not in "qkv":
            assert parameter.kind == inspect.Parameter.KEYWORD_ONLY


def test_imported_on_demand_only():
    out, _ = run(
        """
        assert "torch" not in sys.modules
        assert "torch" in dir(fastattn)
        from fastattn import *
        assert "torch" not in sys.modules
        print(fastattn.torch.mha.__module__, "torch" in sys.modules, "transformers" in sys.modules)
        """
    )
    assert out.split() == ["fastattn.torch._mha", "True", "False"]


def test_without_pytorch():
    out, _ = run(
        """
        sys.modules["torch"] = None
        try:
            import fastattn.torch
        except ModuleNotFoundError as error:
            print(error.name, error)
        try:
            fastattn.torch
        except AttributeError as error:
            print(error)
        """
    )
    first, second = out.splitlines()
    assert first.startswith("torch fastattn.torch needs PyTorch")
    assert "pip install 'fastattn[torch]'" in first
    assert second == "module 'fastattn' has no attribute 'torch' here: " + first.removeprefix("torch ")


def test_training_is_that_of_pytorch():
    """A layer of self-attention learns the same with either function."""
    x, target = tensor(4, 6, 16, dtype=F32, seed=40), tensor(4, 6, 16, dtype=F32, seed=41)

    def train(attend: Any) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(0)
        project, mix = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        parameters = [*project.parameters(), *mix.parameters()]
        optimizer = torch.optim.SGD(parameters, 0.5, momentum=0.9)
        losses = []
        for _ in range(20):
            q, k, v = project(x).view(4, 6, 3, 4, 4).unbind(2)
            loss = torch.nn.functional.mse_loss(mix(attend(q, k, v).reshape(4, 6, 16)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, parameters

    def peer(*qkv: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in qkv)
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
        return out.transpose(1, 2)

    losses, parameters = train(lambda q, k, v: ft.mha(q, k, v, causal=True))
    want_losses, want_parameters = train(peer)
    assert losses[-1] < 0.9 * losses[0]
    assert np.allclose(losses, want_losses, rtol=1e-5)
    assert all(
        torch.allclose(x, y, rtol=0, atol=1e-5) for x, y in zip(parameters, want_parameters, strict=True)
    )


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("causal", "x"), ("layout", 3), ("dropout", None), ("kernel", 3), ("device", 3), ("return_weights", 1)],
)
def test_slips_are_named(keyword, value):
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(TypeError, match=f"^{keyword}: expected "):
        ft.mha(q, q, q, **{keyword: value})


def test_a_device_of_torch():
    q = torch.randn(1, 4, 2, 8)
    assert torch.equal(ft.mha(q, q, q, device=q.device), ft.mha(q, q, q))


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_a_mask_that_is_not_bool_gets_words_for_tensors(kind):
    q = torch.zeros(2, 5, 2, 8)
    mask = torch.ones(2, 5, dtype=kind)
    with pytest.raises(
        TypeError, match=r"^mask: expected bool, .*use mask\.bool\(\); .*mask\[:, None, None, :\]"
    ):
        ft.mha(q, q, q, mask=mask)
    if kind != torch.float32:
        with pytest.raises(RuntimeError, match=r"^attn_mask: expected bool, .*; use attn_mask\.bool\(\)$"):
            ft.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, attn_mask=mask[:, None, None, :])
    with pytest.raises(RuntimeError, match=r"pass attn_mask\[:, None, None, :\]$"):
        ft.scaled_dot_product_attention(
            *[torch.zeros(2, 2, 3, 8)] * 3, attn_mask=torch.ones(2, 3, dtype=kind)
        )
