"""fastattn.torch.scaled_dot_product_attention beside PyTorch's of plain operations (SDPBackend.MATH)."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import numpy as np
import pytest
from inputs import normal

torch = pytest.importorskip("torch")

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import fastattn  # noqa: E402
from fastattn.torch import scaled_dot_product_attention  # noqa: E402

Tensor = torch.Tensor
F64 = torch.float64


def peer(*args: Any, **keywords: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(*args, **keywords)


def tensor(*shape: int, dtype: Any = F64, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.asarray(normal(shape, np.float64, seed))).to(dtype)


def qkv(
    *leads: tuple[int, ...], L: int = 5, S: int = 7, E: int = 8, Ev: int = 6, dtype: Any = F64
) -> list[Tensor]:
    q, k, v = leads if len(leads) == 3 else leads * 3
    shapes = (*q, L, E), (*k, S, E), (*v, S, Ev)
    return [tensor(*shape, dtype=dtype, seed=n).requires_grad_() for n, shape in enumerate(shapes)]


def results(function: Any, inputs: list[Tensor], keywords: dict[str, Any]) -> list[Tensor]:
    """out and the gradients of everything that has one."""
    out = function(*inputs, **keywords)
    inputs = [x for x in (*inputs, keywords.get("attn_mask")) if x is not None and x.requires_grad]
    weights = tensor(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def agree(inputs: list[Tensor], keywords: dict[str, Any], tolerance: float = 1e-12) -> None:
    got, want = results(scaled_dot_product_attention, inputs, keywords), results(peer, inputs, keywords)
    assert got[0].is_contiguous()
    for n, (x, y) in enumerate(zip(got, want, strict=True)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), n
        assert torch.allclose(x, y, rtol=0, atol=tolerance), f"result {n}: {(x - y).abs().max():.3g}"


def test_signature():
    """As PyTorch's documentation has it."""
    parameters = inspect.signature(scaled_dot_product_attention).parameters.values()
    here = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
    text = torch.nn.functional.scaled_dot_product_attention.__doc__
    assert text is not None
    there = re.search(r"scaled_dot_product_attention\((.*?)\) -> Tensor", text, re.DOTALL)
    assert there is not None
    assert re.sub(r"\s+", " ", there[1]) == here


SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "2-D": ((),),
    "3-D": ((3,),),
    "4-D": ((2, 3),),
    "5-D": ((2, 2, 3),),
    "6-D": ((2, 1, 2, 3),),
    "batch of the keys": ((2, 3), (1, 3), (1, 3)),
    "batch of the queries": ((1, 3), (2, 3), (2, 3)),
    "batch of the values": ((1, 3), (1, 3), (2, 3)),
    "one key head": ((2, 3), (2, 1), (2, 1)),
    "one query head": ((2, 1), (2, 3), (2, 3)),
    "one value head": ((2, 3), (2, 3), (2, 1)),
    "fewer axes of keys": ((2, 3), (3,), (3,)),
    "2-D keys": ((2, 3), (), ()),
    "2-D queries": ((), (2, 3), (3,)),
    "5-D that broadcast": ((2, 1, 3), (1, 2, 3), (2, 1)),
}
MASKS: dict[str, tuple[int, ...]] = {
    "full": (5, 7),
    "of keys": (1, 7),
    "of queries": (5, 1),
    "one axis": (7,),
    "no axis": (),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, causal):
    agree(qkv(*SHAPES[name]), {"is_causal": causal})


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["2-D", "3-D", "4-D", "5-D", "one key head"])
def test_masks(name, mask, kind):
    values = tensor(*MASKS[mask], seed=5)
    agree(qkv(*SHAPES[name]), {"attn_mask": values > -0.8 if kind == "bool" else values.requires_grad_()})


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    ("name", "lead"),
    [
        ("3-D", (3,)), ("4-D", (2, 3)), ("4-D", (2, 1)), ("4-D", (3,)), ("5-D", (2, 2, 3)),
        ("5-D", (2, 1, 3)), ("5-D", (1, 2, 1)), ("5-D", (1, 1, 3)), ("5-D", (2, 3)),
        ("5-D that broadcast", (2, 2, 1)), ("batch of the keys", (2, 1)),
    ],
)  # fmt: skip
def test_masks_with_leading_axes(name, lead, kind):
    values = tensor(*lead, 5, 7, seed=5)
    agree(qkv(*SHAPES[name]), {"attn_mask": values > -0.8 if kind == "bool" else values.requires_grad_()})


@pytest.mark.parametrize(
    "leads",
    [
        ((2, 4), (2, 2), (2, 2)), ((2, 6), (2, 2), (2, 1)), ((2, 6), (2, 2), (2, 3)), ((4,), (2,), (2,)),
        ((2, 3, 4), (2, 3, 2), (2, 3, 2)), ((2, 4), (1, 2), (2, 2)), ((2, 4), (2, 4), (2, 4)),
        ((3, 4), (2,), (1,)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads(leads, causal):
    agree(qkv(*leads), {"enable_gqa": True, "is_causal": causal})
    if not causal:
        agree(qkv(*leads), {"enable_gqa": True, "attn_mask": tensor(leads[0][-1], 5, 7).requires_grad_()})


def test_what_heads_and_batch_share_is_not_repeated(monkeypatch):
    seen = []
    forward = fastattn._core.mha
    monkeypatch.setattr(
        fastattn._core, "mha", lambda *a, **kw: seen.append((*a, kw["mask"])) or forward(*a, **kw)
    )
    agree(qkv((2, 2, 3), (2, 2, 1), (2, 2, 1)), {"attn_mask": tensor(1, 1, 3, 5, 7, seed=5) > -0.8})
    agree(qkv((2, 3), (2, 1), (2, 1)), {"attn_mask": tensor(3, 5, 7, seed=5) > -0.8})
    assert [[x.shape[:2] for x in call] for call in seen] == [
        [(4, 3), (4, 1), (4, 1), (3, 5)], [(2, 3), (2, 1), (2, 1), (3, 5)]
    ]  # fmt: skip


@pytest.mark.parametrize("scale", [None, 0.4, -0.5, 0, 2])
def test_scale(scale):
    agree(qkv((2, 3)), {"scale": scale})


@pytest.mark.parametrize("lead", [(2, 3), (2, 2, 3)])
@pytest.mark.parametrize(("L", "S"), [(7, 5), (1, 6), (6, 1), (0, 4), (4, 0)])
def test_lengths(L, S, lead):
    agree(qkv(lead, L=L, S=S), {"is_causal": True})
    agree(qkv(lead, L=L, S=S), {"attn_mask": tensor(*lead, L, S, seed=5) > -0.8})


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_may_attend_nothing(kind):
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    agree(qkv((2, 3)), {"attn_mask": mask if kind == "bool" else torch.where(mask, 0.0, -math.inf)})
    assert (scaled_dot_product_attention(*qkv((2, 3)), mask)[:, :, 2] == 0).all()


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32, "query"])
@pytest.mark.parametrize("precision", [F64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(precision, mask):
    inputs = qkv((2, 3), dtype=precision)
    values = tensor(5, 7, seed=5)
    if mask is torch.bool:
        values = values > -0.8
    elif mask is not None:
        values = values.to(precision if mask == "query" else mask)
    tolerance = 1e-12 if precision == F64 else 16 * torch.finfo(precision).eps
    agree(inputs, {"attn_mask": None if mask is None else values}, tolerance)


@pytest.mark.parametrize("mask", [None, torch.float32, torch.float16])
def test_autocast(mask):
    inputs = qkv((2, 3), dtype=torch.float32)
    if mask is not None:
        inputs = [x.detach().to(mask).requires_grad_() for x in inputs]
    keywords = {"attn_mask": None if mask is None else tensor(5, 7, dtype=mask)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        agree(inputs, keywords, 16 * torch.finfo(torch.bfloat16).eps)


# ---- dropout ------------------------------------------------------------------------------------------


def test_dropout_follows_the_seed_of_pytorch():
    inputs = qkv((2, 3))
    torch.manual_seed(1)
    first, second = (scaled_dot_product_attention(*inputs, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(scaled_dot_product_attention(*inputs, dropout_p=0.5), first)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.equal(scaled_dot_product_attention(*inputs, dropout_p=0.5), first)
    assert torch.equal(scaled_dot_product_attention(*inputs, dropout_p=0.5), second)


def test_dropout_keeps_the_mean():
    q, k = torch.zeros(2, 1, 1, 200, 4)  # all weights are equal: out counts the keys that are kept
    v = torch.ones(1, 1, 200, 1)
    torch.manual_seed(0)
    out = scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    # 40 000 weights: their mean is 1 with a deviation of sqrt(0.3 / 0.7 / 40000) = 0.0033.
    assert abs(out.mean().item() - 1.0) < 0.02
    assert out.std() > 0.02


def test_without_dropout_no_number_is_drawn():
    state = torch.get_rng_state()
    for p in (0.0, 1.0):
        scaled_dot_product_attention(*qkv((2, 3)), dropout_p=p)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_of_all():
    agree(qkv((2, 3)), {"dropout_p": 1.0})


# ---- errors -------------------------------------------------------------------------------------------

Q, K, V = (x.detach() for x in qkv((2, 3)))
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "mask and is_causal": ({"attn_mask": torch.ones(5, 7), "is_causal": True}, "^attn_mask: .*is_causal"),
    "dropout": ({"dropout_p": 1.1}, "^dropout_p: .* got 1.1"),
    "one axis": ({"query": Q[0, 0, 0], "key": K[0, 0, 0], "value": V[0, 0, 0]}, "got 1, 1 and 1"),
    "E": ({"key": K[..., :4]}, r"\(2, 3, 5, 8\), \(2, 3, 7, 4\)"),
    "S": ({"key": K[..., :4, :]}, r"\(2, 3, 4, 8\) and \(2, 3, 7, 6\)"),
    "heads": ({"key": K[:, :2], "value": V[:, :2]}, "2"),
    "batch": ({"key": torch.cat([K, K]), "value": torch.cat([V, V])}, "4"),
    "heads of a group": ({"key": K[:, :2], "value": V[:, :2], "enable_gqa": True}, "divide 3"),
    "dtype": ({"key": K.float()}, "^key: expected torch.float64 .* got torch.float32"),
    "device": ({"value": V.to("meta")}, "^value: .* on meta"),
    "device of the mask": ({"attn_mask": torch.ones(5, 7, device="meta")}, "^attn_mask: .* got meta"),
    "mask dtype": ({"attn_mask": torch.ones(5, 7, dtype=torch.float16)}, "^attn_mask: .* got torch.float16"),
    "integer mask": ({"attn_mask": torch.ones(5, 7, dtype=torch.int64)}, "^attn_mask: .* got torch.int64"),
    "mask shape": ({"attn_mask": torch.ones(5, 6)}, r"^attn_mask: .* \(2, 3, 5, 7\), got \(5, 6\)"),
    "mask of a batch": ({"attn_mask": torch.ones(3, 1, 5, 7)}, r"^attn_mask: .* got \(3, 1, 5, 7\)"),
    "larger mask": ({"attn_mask": torch.ones(1, 1, 1, 5, 7)}, r"^attn_mask: .* got \(1, 1, 1, 5, 7\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    """Where PyTorch raises a RuntimeError, so do we."""
    changed, message = WRONG[name]
    arguments = {"query": Q, "key": K, "value": V} | changed
    with pytest.raises(RuntimeError):
        peer(**arguments)
    with pytest.raises(RuntimeError, match=message):
        scaled_dot_product_attention(**arguments)


@pytest.mark.parametrize("p", [-0.1, math.nan])
def test_dropout_that_pytorch_takes_for_none(p):
    with pytest.raises(RuntimeError, match=r"^dropout_p: "):
        scaled_dot_product_attention(Q, K, V, dropout_p=p)


def test_no_head_axis_to_group():
    with pytest.raises(RuntimeError, match="head axis"):
        scaled_dot_product_attention(Q[0, 0], K, V, enable_gqa=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": Q.numpy()}, "^query: expected a torch.Tensor, got ndarray"),
        ({"attn_mask": np.ones((5, 7), bool)}, "^attn_mask: expected a torch.Tensor, got ndarray"),
        ({"value": V.to(torch.cfloat)}, "^value: .* torch.complex64"),
        ({"key": K.int()}, "^key: .* torch.int32"),
        ({"scale": "large"}, "^scale: "),
    ],
)
def test_type_errors(changed, message):
    with pytest.raises(TypeError, match=message):
        scaled_dot_product_attention(**{"query": Q, "key": K, "value": V} | changed)


# ---- torch.func -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, (7,), (3, 5, 7)])
def test_vmap(mask):
    """Per-sample gradients, with an axis that is not the first one."""
    inputs = [x.detach() for x in qkv((4, 3))]
    mask = None if mask is None else tensor(*mask, seed=5)

    def scalar(function: Any) -> Any:
        return lambda q, k, v: function(q, k, v, attn_mask=mask).sin().sum()

    def per_sample(function: Any) -> Any:
        return torch.vmap(torch.func.grad(scalar(function), (0, 1, 2)), in_dims=(1, 1, 1), out_dims=1)

    moved = [x.transpose(0, 1) for x in inputs]
    got, want = per_sample(scaled_dot_product_attention)(*moved), per_sample(peer)(*moved)
    assert all(torch.allclose(x, y, rtol=0, atol=1e-12) for x, y in zip(got, want, strict=True))


def test_vmap_draws_as_it_is_told():
    q, k, v = (x.detach() for x in qkv((4, 3)))

    def mapped(randomness: str) -> Tensor:
        call = torch.vmap(
            lambda _: scaled_dot_product_attention(q[0], k[0], v[0], dropout_p=0.5), randomness=randomness
        )
        return call(torch.zeros(3))

    same, different = mapped("same"), mapped("different")
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="random"):
        mapped("error")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_takes_masks_of_any_float_dtype(kind):
    q = torch.randn(1, 2, 5, 16)
    mask = torch.randn(5, 5).to(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scaled_dot_product_attention(q, q, q, mask)
    exact = torch.nn.functional.scaled_dot_product_attention(q, q, q, mask.float())
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 0.05
