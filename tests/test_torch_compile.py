"""The operators in torch.compile: opcheck, one graph forward and backward, no compiling anew."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from inputs import normal

torch = pytest.importorskip("torch")

import fastattn.torch as ft  # noqa: E402
from fastattn.torch import _ops  # noqa: E402

Tensor = torch.Tensor
F32, F64 = torch.float32, torch.float64


def tensor(*shape: int, dtype: Any = F32, seed: int = 0) -> Tensor:
    return torch.from_numpy(normal(shape, np.float64, seed)).to(dtype)


def qkv(*, B: int = 2, Sq: int = 5, Sk: int = 7, Hq: int = 4, Hkv: int = 2, dtype: Any = F32) -> list[Tensor]:
    shapes = (B, Sq, Hq, 8), (B, Sk, Hkv, 8), (B, Sk, Hkv, 6)
    return [tensor(*shape, dtype=dtype, seed=n).requires_grad_() for n, shape in enumerate(shapes)]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def arguments(changed: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments of torch.ops.fastattn.mha but the tensors that are learned numbers."""
    first = dict(zip("qkv", qkv(dtype=changed.get("dtype", F32)), strict=True))
    rest = {name: x for name, x in changed.items() if name != "dtype"}
    given = _ops._DEFAULTS | first | rest
    assert given.keys() == _ops._DEFAULTS.keys()
    return tuple(given.values())[: _ops._N_PLAIN]


SAMPLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "float64": {"dtype": F64, "causal": True},
    "bfloat16": {"dtype": torch.bfloat16, "return_weights": True},
    "window": {"causal": True, "window_left": 2, "q_offset": 1, "scale": 0.3},
    "learned": {
        "bias": tensor(4, 1, 7).requires_grad_(), "alibi_slopes": tensor(4).abs().requires_grad_(),
        "sinks": tensor(4).requires_grad_(), "softcap": 2.0,
    },
    "masked": {
        "mask": torch.arange(7) < 5, "q_lens": torch.tensor([5, 3]), "kv_lens": torch.tensor([7, 4]),
        "q_offset_tensor": torch.tensor([0, 2]), "causal": True,
    },
    "dropout": {"dropout": 0.3, "seed_tensor": torch.tensor(7)},
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    """Schema, autograd registration, shapes and strides of fake tensors, and tracing with dynamic shapes."""
    inputs = arguments(SAMPLES[name])
    torch.library.opcheck(torch.ops.fastattn.mha.default, inputs)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    out, lse, _ = torch.ops.fastattn.mha.default(*detached)
    for dlse, need_dbias in ((None, False), (torch.ones_like(lse), True)):
        shared = detached[3 : list(_ops._FORWARD).index("return_weights")]
        backward = (torch.ones_like(out), dlse, *detached[:3], out, lse, *shared, need_dbias)
        torch.library.opcheck(torch.ops.fastattn.mha_backward.default, backward)


def test_layouts_of_results():
    """bhsd and fewer axes: the fake tensors of all results are what the real ones are."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = (x.detach().transpose(1, 2) for x in qkv())
    for x, layout in (
        ((q, k, v), "bhsd"),
        ((q[0], k[0], v[0]), "bshd"),
        ((q[0, 0], k[0, 0], v[0, 0]), "bshd"),
    ):
        if layout == "bshd" and x[0].dim() == 3:
            x = tuple(y.transpose(0, 1) for y in x)
        real = ft.mha(*x, layout=layout, return_lse=True, return_weights=True)
        with FakeTensorMode() as mode:
            fake = ft.mha(*map(mode.from_tensor, x), layout=layout, return_lse=True, return_weights=True)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
            assert a.is_contiguous()


def learned_loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
    out, lse = ft.mha(q, k, v, causal=True, bias=bias, sinks=sinks, softcap=3.0, return_lse=True)
    return out.sin().sum() + lse.cos().sum()


def sdpa_loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = bias + sinks[:, None, None]
    return ft.scaled_dot_product_attention(q, k, v, mask, scale=0.2, enable_gqa=True).sin().sum()


LOSSES = {"mha": learned_loss, "sdpa": sdpa_loss}
once = torch._dynamo.config.patch(error_on_recompile=True)
BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")),
]


def inputs_of(Sq: int, Sk: int) -> list[Tensor]:
    return [*qkv(Sq=Sq, Sk=Sk), tensor(4, 1, Sk).requires_grad_(), tensor(4).requires_grad_()]


@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
@once
def test_one_graph_forward_and_backward(name, backend):
    inputs = inputs_of(5, 7)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend=backend)
    want = [LOSSES[name](*inputs), *torch.autograd.grad(LOSSES[name](*inputs), inputs)]
    for _ in range(2):
        loss = compiled(*inputs)
        got = [loss, *torch.autograd.grad(loss, inputs)]
        assert all(torch.allclose(x, y, rtol=1e-6, atol=1e-6) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("name", LOSSES)
@once
def test_dynamic_shapes_are_compiled_once(name):
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager", dynamic=True)
    for Sq, Sk in ((5, 7), (6, 9), (11, 12), (3, 20)):
        inputs = inputs_of(Sq, Sk)
        loss, want = compiled(*inputs), LOSSES[name](*inputs)
        assert torch.equal(loss, want)
        grads = torch.autograd.grad(loss, inputs), torch.autograd.grad(want, inputs)
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", [int, torch.tensor])
@once
def test_arguments_that_change_are_not_compiled_in(kind):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def decode(q: Tensor, k: Tensor, v: Tensor, offset: Any, seed: Any, lens: Tensor, left: int) -> Tensor:
        keywords = {"q_offset": offset, "kv_lens": lens, "window": (left, None)}
        return ft.mha(q, k, v, causal=True, dropout=0.2, seed=seed, **keywords)

    q, k, v = (x.detach() for x in qkv())
    for n in range(2, 6):
        lens = torch.tensor([n, 7])
        want = ft.mha(
            q, k, v, causal=True, q_offset=n, dropout=0.2, seed=n + 1, kv_lens=lens, window=(n, None)
        )
        assert torch.equal(decode(q, k, v, kind(n), kind(n + 1), lens, n), want)


BROADCAST: dict[str, Any] = {
    "queries of batch 1": ((1, 4), (3, 4), (3, 4)),
    "queries of batch 1, groups": ((1, 4), (3, 2), (3, 2)),
    "one head": ((3, 4), (3, 1), (3, 1)),
    "no batch": ((3, 4), (4,), ()),
}


@pytest.mark.parametrize("name", BROADCAST)
@once
def test_sdpa_broadcasts_with_dynamic_shapes(name):
    """Learned queries of batch 1 against a batch of keys, as the Q-Former has them, and others."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ft.scaled_dot_product_attention(q, k, v, mask, enable_gqa=name.endswith("groups"))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for L, S in ((5, 7), (6, 9)):
        lengths = (L, S, S)
        q, k, v = (
            tensor(*lead, n, 8).requires_grad_() for lead, n in zip(BROADCAST[name], lengths, strict=True)
        )
        mask = tensor(3, 1, 1, S, seed=4) > -0.5
        out, want = compiled(q, k, v, mask), attend(q, k, v, mask)
        assert torch.equal(out, want)
        grads = (
            torch.autograd.grad(out.sin().sum(), (q, k, v)),
            torch.autograd.grad(want.sin().sum(), (q, k, v)),
        )
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
        plain = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, enable_gqa=name.endswith("groups")
        )
        assert torch.allclose(want, plain, rtol=1e-5, atol=1e-5)


@once
def test_dropout_draws_anew_in_every_call():
    q, k, v = (x.detach().transpose(1, 2) for x in qkv(Hkv=4))
    compiled = torch.compile(
        lambda: ft.scaled_dot_product_attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(1)
    first, second = compiled(), compiled()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(compiled(), first)
    torch.manual_seed(1)
    assert torch.equal(ft.scaled_dot_product_attention(q, k, v, dropout_p=0.5), first)


def test_autocast_inside_and_outside():
    q, k, v = qkv()

    def inside() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ft.mha(q, k, v)

    def outside() -> Tensor:
        return ft.mha(q, k, v)

    want = inside()
    assert want.dtype == torch.bfloat16
    assert torch.equal(torch.compile(inside, fullgraph=True, backend="aot_eager")(), want)
    compiled = torch.compile(outside, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(), want)
    assert compiled().dtype == F32


def test_errors_name_the_argument():
    q, k, v = qkv()
    compiled = torch.compile(ft.mha, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"^mask: "):  # by the core, when it runs
        compiled(q, k, v, mask=torch.ones(6, dtype=torch.bool))
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"k: expected torch\.float32"
    ):  # when it is traced
        compiled(q, k.detach().double(), v)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ft.mha(q, k, v, causal=True)

    q, k, v = (x.detach() for x in qkv())
    length = torch.export.Dim("length", min=2, max=64)
    shapes = ({}, {1: length}, {1: length})
    program = torch.export.export(Layer(), (q, k, v), dynamic_shapes=shapes)
    longer = [q, *(torch.cat([x, x], 1) for x in (k, v))]
    assert torch.equal(program.module()(*longer), ft.mha(*longer, causal=True))


def test_vmap_in_a_graph():
    q, k, v = (x.detach() for x in qkv())
    mapped = torch.vmap(lambda q: ft.mha(q, k, v), in_dims=2, out_dims=2)
    q = torch.stack([q, 2.0 * q, -q], 2)
    assert torch.equal(torch.compile(mapped, fullgraph=True, backend="aot_eager")(q), mapped(q))


def test_only_the_queries_are_dynamic():
    """The mask's rows are a plain number then, the queries' a symbol."""
    torch.compiler.reset()
    compiled = torch.compile(ft.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    q, k, mask = tensor(1, 2, 5, 16), tensor(1, 2, 7, 16), tensor(5, 7)
    torch._dynamo.maybe_mark_dynamic(q, 2)
    assert torch.equal(compiled(q, k, k, mask), ft.scaled_dot_product_attention(q, k, k, mask))
