"""scale and softcap as tensors in fastattn.torch: their gradients, and what has none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from inputs import normal

import fastattn

torch = pytest.importorskip("torch")

import torch_math  # noqa: E402

import fastattn.torch as ft  # noqa: E402
from fastattn.torch import _learned, _ops  # noqa: E402

Tensor = torch.Tensor
F64, F32 = torch.float64, torch.float32


def tensor(*shape: int, dtype: Any = F64, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.asarray(normal(shape, np.float64, seed))).to(dtype)


def qkv(dtype: Any = F64, *, B: int = 2, Hq: int = 4, Hkv: int = 2) -> list[Tensor]:
    shapes = (B, 5, Hq, 8), (B, 7, Hkv, 8), (B, 7, Hkv, 6)
    return [tensor(*shape, dtype=dtype, seed=n) for n, shape in enumerate(shapes)]


SOME = torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.4
SOME[1, 2, 3] = False  # a row that may attend nothing
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1), "q_offset": 1},
    "offsets": {"causal": True, "q_offset": torch.tensor([-2, 4])},
    "one offset": {"causal": True, "q_offset": torch.tensor(1)},
    "mask": {"mask": SOME},
    "mask of queries": {"mask": SOME[:1, :1, :, :1]},
    "mask of keys": {"mask": SOME[0, 0, 0]},
    "bias": {"bias": tensor(4, 5, 7, seed=4)},
    "alibi": {"alibi_slopes": tensor(2, 4, seed=5).abs()},
    "sinks": {"sinks": tensor(4, seed=6)},
    "lengths": {"q_lens": torch.tensor([3, 5]), "kv_lens": torch.tensor([7, 4]), "causal": True},
    "small lengths": {"q_lens": torch.tensor([3, 0], dtype=torch.uint8), "kv_lens": torch.tensor([0, 7])},
    "dropout": {"dropout": 0.3, "seed": 11},
    "all": {
        "causal": True, "window": (4, None), "mask": SOME, "bias": tensor(4, 1, 7, seed=4),
        "alibi_slopes": tensor(4, seed=5).abs(), "sinks": tensor(4, seed=6), "dropout": 0.2,
        "seed": 2**64 - 3, "kv_lens": torch.tensor([7, 6]),
    },
}  # fmt: skip
NUMBERS = [(0.3, None), (None, 0.7), (-0.4, 1.5), (0.0, 2.0), (1e-7, None), (3.0, 1e4), (0.3, 0.05)]


def loss(out: Tensor, lse: Tensor) -> Tensor:
    weighted = (out * tensor(*out.shape, seed=20).to(out.dtype)).sum()
    weights = tensor(*lse.shape, seed=21).to(lse.dtype)
    return weighted + torch.where(lse.isfinite(), lse * weights, 0.0).sum()


def gradients(function: Any, scale: Any, softcap: Any, features: dict[str, Any], dtype: Any) -> list[Tensor]:
    """Of q, k, v, and of the numbers that are given."""
    inputs = [x.requires_grad_() for x in qkv(dtype)]
    keywords = dict(features)
    for name, x in (("scale", scale), ("softcap", softcap)):
        if x is not None:
            keywords[name] = torch.tensor(x, dtype=F32).to(dtype).requires_grad_()
            inputs.append(keywords[name])
    out, lse = function(*inputs[:3], **keywords)[:2]
    return list(torch.autograd.grad(loss(out, lse), inputs))


def ours(*args: Any, **keywords: Any) -> Any:
    return ft.mha(*args, return_lse=True, **keywords)


@pytest.mark.parametrize("rows", ["all rows", "two rows"])
@pytest.mark.parametrize(("scale", "softcap"), NUMBERS)
@pytest.mark.parametrize("name", FEATURES)
def test_gradients(name, scale, softcap, rows, monkeypatch):
    """Those of autograd on plain operations, whatever the number of rows at once."""
    if rows == "two rows":
        monkeypatch.setattr(_learned, "_PAIRS_AT_ONCE", 2 * 2 * 4 * 7)
    want = gradients(torch_math.attention, scale, softcap, FEATURES[name], F64)
    got = gradients(ours, scale, softcap, FEATURES[name], F64)
    for n, (x, y) in enumerate(zip(got, want, strict=True)):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-12), f"{n}: {x} {y}"


@pytest.mark.parametrize("precision", [F32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("scale", "softcap"), NUMBERS)
def test_other_dtypes(scale, softcap, precision):
    features = {"causal": True, "sinks": tensor(4, seed=6)}
    rounded = [x.to(precision).to(F64).requires_grad_() for x in qkv()]
    numbers = {
        name: torch.tensor(x, dtype=F32).to(precision).to(F64).requires_grad_()
        for name, x in (("scale", scale), ("softcap", softcap))
        if x is not None
    }
    out, lse = torch_math.attention(*rounded, **numbers, **features)[:2]
    want = torch.autograd.grad(loss(out, lse), [*rounded, *numbers.values()])
    got = gradients(ours, scale, softcap, features, precision)
    size = max(1.0, *(y.abs().max().item() for y in want))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == precision
        assert (x.to(F64) - y).abs().max() <= 20 * torch.finfo(precision).eps * size


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_gradcheck(rank, layout):
    """Against finite differences, which know no formula."""
    heads = (1, 1) if rank == 2 else (4, 2)
    shapes = [(3, heads[0], 2), (4, heads[1], 2), (4, heads[1], 3)]
    inputs = [tensor(1, *shape, seed=n) for n, shape in enumerate(shapes)]
    if layout == "bhsd":
        inputs = [x.transpose(1, 2) for x in inputs]
    if rank < 4:
        inputs = [x[0] if rank == 3 else x.reshape(-1, x.shape[-1]) for x in inputs]
    inputs += [torch.tensor(0.4, dtype=F64), torch.tensor([1.3], dtype=F64)]

    def function(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, softcap: Tensor) -> Any:
        return ours(q, k, v, layout=layout, scale=scale, softcap=softcap, causal=True)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs])


def test_other_gradients_are_those_without():
    """A learned number changes no other gradient's bits, nor the result's."""
    features = FEATURES["all"]
    inputs = [x.requires_grad_() for x in qkv()]
    out, lse = ours(*inputs, scale=0.3, softcap=1.5, **features)
    want = torch.autograd.grad(loss(out, lse), inputs)
    numbers = [torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.3, 1.5)]
    out2, lse2 = ours(*inputs, scale=numbers[0], softcap=numbers[1], **features)
    got = torch.autograd.grad(loss(out2, lse2), [*inputs, *numbers])[:3]
    assert torch.equal(out, out2)
    assert torch.equal(lse, lse2)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_masked_nan_stays_out():
    q, k, v = qkv()
    k[:, 5:], v[:, 5:], q[:, 4] = math.nan, math.inf, math.nan
    scale, softcap = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.3, 1.5))
    keywords = {"kv_lens": torch.tensor([5, 5]), "q_lens": torch.tensor([4, 4])}
    ft.mha(q, k, v, scale=scale, softcap=softcap, **keywords).square().sum().backward()
    got = scale.grad.clone(), softcap.grad.clone()
    scale.grad = softcap.grad = None
    ft.mha(q[:, :4], k[:, :5], v[:, :5], scale=scale, softcap=softcap).square().sum().backward()
    assert torch.allclose(torch.stack(got), torch.stack([scale.grad, softcap.grad]), rtol=1e-12)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"Hq": 0, "Hkv": 0}])
def test_no_elements(sizes):
    scale, softcap = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.3, 1.5))
    ft.mha(*qkv(**sizes), scale=scale, softcap=softcap).sum().backward()
    assert scale.grad == softcap.grad == 0


@pytest.mark.parametrize("make", [torch.tensor, lambda x: torch.nn.Parameter(torch.full((1,), x))])
def test_one_that_requires_grad_is_enough(make):
    q, k, v = qkv(F32)
    scale = make(0.3).requires_grad_()
    out = ft.mha(q, k, v, scale=scale)
    assert torch.equal(out, ft.mha(q, k, v, scale=scale.item()))
    out.square().sum().backward()
    assert scale.grad.shape == scale.shape
    assert scale.grad.abs() > 0
    with torch.no_grad():
        assert not ft.mha(q, k, v, scale=scale).requires_grad


def test_only_what_is_learned_is_computed(monkeypatch):
    def fail(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(fastattn.torch._ops, "softcap_gradient", fail)
    monkeypatch.setattr(fastattn.torch._ops, "scale_gradient", fail)
    q, k, v = (x.requires_grad_() for x in qkv())
    ft.mha(q, k, v, scale=torch.tensor(0.3), softcap=torch.tensor(2.0)).sum().backward()
    assert q.grad is not None


def test_sdpa():
    q, k, v = (x.transpose(1, 2) for x in qkv(Hkv=4))
    mask = tensor(5, 7, seed=3)
    for scale in (0.3, 0.0, -2.0):
        results = []
        for function in (ft.scaled_dot_product_attention, None):
            number = torch.tensor(scale, dtype=F64, requires_grad=True)
            if function is None:
                weights = (q @ k.transpose(-1, -2) * number + mask).softmax(-1)
                out = weights @ v
            else:
                out = function(q, k, v, mask, scale=number)
            results.append(torch.autograd.grad(out.sin().sum(), number)[0])
        assert torch.allclose(*results, rtol=1e-12)


# ---- the company it keeps -------------------------------------------------------------------------------


def learned(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, softcap: Tensor) -> Tensor:
    out, lse = ft.mha(q, k, v, scale=scale.exp(), softcap=softcap, causal=True, return_lse=True)
    return out.sin().sum() + lse.cos().sum()


def all_learned() -> list[Tensor]:
    numbers = [torch.tensor(-1.0, dtype=F64), torch.tensor(2.5, dtype=F64)]
    return [x.requires_grad_() for x in (*qkv(), *numbers)]


def test_compiled_in_one_graph():
    torch.compiler.reset()
    inputs = all_learned()
    compiled = torch.compile(learned, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for more in (0.0, 0.5):  # another value is not another graph
            inputs[3] = (inputs[3].detach() + more).requires_grad_()
            want = torch.autograd.grad(learned(*inputs), inputs)
            got = torch.autograd.grad(compiled(*inputs), inputs)
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    q, k, v = (x.detach().transpose(1, 2) for x in qkv(Hkv=4))
    attend = torch.compile(ft.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    scale = torch.tensor(0.3, dtype=F64, requires_grad=True)
    (got,) = torch.autograd.grad(attend(q, k, v, scale=scale).sin().sum(), scale)
    (want,) = torch.autograd.grad(ft.scaled_dot_product_attention(q, k, v, scale=scale).sin().sum(), scale)
    assert got == want


@pytest.mark.parametrize("which", [(0.3, None), (None, 2.0), (0.3, 2.0)])
def test_opcheck(which):
    numbers = [None if x is None else torch.tensor(x).requires_grad_() for x in which]
    first = dict(zip("qkv", (x.requires_grad_() for x in qkv(F32)), strict=True))
    learned_numbers = {f"{name}_tensor": x for name, x in zip(_ops.LEARNED, numbers, strict=True)}
    forward = tuple((_ops._DEFAULTS | first | learned_numbers).values())
    torch.library.opcheck(torch.ops.fastattn.mha.default, forward)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in forward]
    out, lse, _ = torch.ops.fastattn.mha.default(*detached)
    needed = [x is not None for x in which]
    shared = detached[3 : list(_ops._FORWARD).index("return_weights")]
    backward = (torch.ones_like(out), None, *detached[:3], out, lse, *shared, False)
    torch.library.opcheck(torch.ops.fastattn.mha_backward.default, (*backward, *detached[-2:], *needed))


def test_torch_func():
    inputs = [x.detach() for x in all_learned()]
    want = torch.autograd.grad(learned(*(args := all_learned())), args)
    got = torch.func.grad(learned, argnums=(0, 1, 2, 3, 4))(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    scales = torch.tensor([-1.0, -0.5, 0.2], dtype=F64)
    mapped = torch.vmap(torch.func.grad(learned, argnums=3), in_dims=(None, None, None, 0, None))
    alone = [torch.func.grad(learned, argnums=3)(*inputs[:3], x, inputs[4]) for x in scales]
    assert torch.equal(mapped(*inputs[:3], scales, inputs[4]), torch.stack(alone))


def test_checkpoint_and_autocast():
    inputs = all_learned()
    want = torch.autograd.grad(learned(*inputs), inputs)
    again = torch.utils.checkpoint.checkpoint(learned, *inputs, use_reentrant=False)
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(again, inputs), want, strict=True))
    scale, softcap = (torch.tensor(x, requires_grad=True) for x in (0.3, 2.0))
    q, k, v = qkv(F32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ft.mha(q, k, v, scale=scale, softcap=softcap)
        out.float().square().sum().backward()  # nor inside of it are the products rounded
    rounded = [x.bfloat16() for x in (q, k, v)]
    other = [torch.tensor(x, requires_grad=True) for x in (0.3, 2.0)]
    ft.mha(*rounded, scale=other[0], softcap=other[1]).float().square().sum().backward()
    assert (scale.grad, softcap.grad) == (other[0].grad, other[1].grad)


def test_errors():
    q, k, v = qkv()
    for name in ("scale", "softcap"):
        with pytest.raises(TypeError, match=f"^{name}: expected a number or a real tensor of one element"):
            ft.mha(q, k, v, **{name: torch.ones(2)})
        with pytest.raises(TypeError, match=f"^{name}: .*complex64"):
            ft.mha(q, k, v, **{name: torch.ones((), dtype=torch.cfloat)})
        with pytest.raises(TypeError, match=f"^{name}: expected a tensor on cpu"):
            ft.mha(q, k, v, **{name: torch.ones((), device="meta")})
        with pytest.raises(ValueError, match=f"^{name}: expected a finite"):
            ft.mha(q, k, v, **{name: torch.tensor(math.nan)})
    p = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(TypeError, match=r"^dropout: there is no gradient of it"):
        ft.mha(q, k, v, dropout=p)
    with pytest.raises(TypeError, match=r"^dropout_p: there is no gradient of it"):
        ft.scaled_dot_product_attention(q, q, q, dropout_p=p)


@pytest.mark.parametrize("name", ["scale", "softcap", "dropout"])
def test_refused_where_it_would_be_lost(name):
    """In the functions of fastattn itself, as for arrays."""
    q, k, v = qkv(F32)
    out, lse = fastattn.mha(q, k, v, return_lse=True)
    for number in (torch.tensor(0.3, requires_grad=True), torch.nn.Parameter(torch.full((1,), 0.3))):
        for function, args in (
            (fastattn.mha, (q, k, v)),
            (fastattn.mha, (q.numpy(), k.numpy(), v.numpy())),
            (fastattn.explain, (q, k, v)),
            (fastattn.mha_backward, (out, q, k, v, out, lse)),
        ):
            with pytest.raises(TypeError, match=rf"^{name}: this \w+ requires grad, .*{name}\.detach\(\)"):
                function(*args, **{name: number})
    assert fastattn.mha(q, k, v, **{name: torch.tensor(0.3)}).shape == out.shape
