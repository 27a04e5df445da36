"""fastattn.torch beside PyTorch's tools: threads, the generator, torch.fx, FLOPs, a second import."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from subproc import run

import fastattn

torch = pytest.importorskip("torch")

from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count  # noqa: E402

import fastattn.torch as ft  # noqa: E402

Tensor = torch.Tensor


def qkv(Hkv: int = 4, *, heads_first: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 5, 4, 8), (2, 7, Hkv, 8), (2, 7, Hkv, 6)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(x.transpose(1, 2) if heads_first else x).requires_grad_() for x in inputs]


# ---- threads --------------------------------------------------------------------------------------------


def test_no_more_threads_than_pytorch():
    """Every call of the core, forward and backward, on however many threads; the process keeps its number."""
    code = """
    import os, torch, fastattn.torch as ft
    fastattn.set_num_threads(4)
    started = lambda: len(os.listdir("/proc/self/task"))
    seen = []
    for name in ("mha", "mha_backward"):
        def spy(*args, _core=getattr(fastattn._core, name), **keywords):
            limit = fastattn._core.limit_threads(0)
            fastattn._core.limit_threads(limit)
            seen.append((limit, fastattn.explain(*(q.detach(),) * 3).threads))
            return _core(*args, **keywords)
        setattr(fastattn._core, name, spy)
    q = torch.randn(1, 512, 4, 32, requires_grad=True)
    bits = []
    for n in (1, 3, 8):
        torch.set_num_threads(n)
        before = started()
        softcap = torch.tensor(20.0, requires_grad=True)
        out = ft.mha(q, q, q, softcap=softcap)
        bits.append([out, *torch.autograd.grad(out.square().sum(), q)])
        by_heads = q.transpose(1, 2)
        ft.scaled_dot_product_attention(by_heads, by_heads, by_heads).sum().backward()
        if n == 1:
            assert started() == before  # no worker of ours
        assert seen and all(entry == (n, min(n, 4)) for entry in seen), seen
        seen.clear()
        assert fastattn.get_num_threads() == 4
        assert fastattn.explain(*(q.detach(),) * 3).threads == 4
    assert all(torch.equal(x, y) for other in bits[1:] for x, y in zip(bits[0], other))
    try:
        ft.mha(q, q[:, :, :3], q)
    except ValueError:
        assert fastattn._core.limit_threads(0) == 0  # after an error too
    """
    run(code)


def test_the_limit_is_the_thread_s_own():
    code = """
    import threading
    q = np.ones((1, 512, 4, 32), np.float32)
    fastattn.set_num_threads(4)
    assert fastattn._core.limit_threads(2) == 0
    others = []
    thread = threading.Thread(target=lambda: others.append(fastattn.explain(q, q, q).threads))
    thread.start()
    thread.join()
    assert others == [4]
    assert fastattn.explain(q, q, q).threads == 2
    assert fastattn._core.limit_threads(0) == 2
    assert fastattn.explain(q, q, q).threads == 4
    """
    run(code)


# ---- dropout without a seed -----------------------------------------------------------------------------


def test_dropout_draws_from_the_generator():
    q, k, v = qkv()
    call = partial(ft.mha, q, k, v, dropout=0.5)
    torch.manual_seed(1)
    first, second = call(), call(seed=None)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(call(), first)
    state = torch.get_rng_state()
    assert torch.equal(call(seed=3), call(seed=3))
    assert torch.equal(
        call(seed=torch.tensor(3)), fastattn.mha(*(x.detach() for x in (q, k, v)), dropout=0.5, seed=3)
    )
    ft.mha(q, k, v)  # drops nothing, and so draws nothing
    assert torch.equal(torch.get_rng_state(), state)


def test_the_gradient_has_the_mask_of_the_result():
    q, k, v = qkv()
    torch.manual_seed(1)
    got = torch.autograd.grad(ft.mha(q, k, v, dropout=0.5).sin().sum(), (q, k, v))
    torch.manual_seed(1)
    seed = torch.randint(2**63 - 1, ())
    want = torch.autograd.grad(ft.mha(q, k, v, dropout=0.5, seed=seed).sin().sum(), (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_again(reentrant):
    q, k, v = qkv()

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ft.mha(q, k, v, dropout=0.5).sin()

    torch.manual_seed(3)
    want = torch.autograd.grad(block(q, k, v).sum(), (q, k, v))
    torch.manual_seed(3)
    torch.utils.checkpoint.checkpoint(block, q, k, v, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(x.grad, y) for x, y in zip((q, k, v), want, strict=True))


def test_compiled_dropout_draws_anew():
    torch.compiler.reset()
    q, k, v = qkv()
    compiled = torch.compile(partial(ft.mha, dropout=0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    first, second = compiled(q, k, v), compiled(q, k, v)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(compiled(q, k, v), first)
    torch.manual_seed(1)
    assert torch.equal(ft.mha(q, k, v, dropout=0.5), first)


def test_vmap_draws_as_it_is_told():
    q, k, v = (x.detach() for x in qkv())

    def mapped(randomness: str) -> Tensor:
        return torch.vmap(lambda _: ft.mha(q, k, v, dropout=0.5), randomness=randomness)(torch.zeros(3))

    same, different = mapped("same"), mapped("different")
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="random"):
        mapped("error")


# ---- torch.fx, and others that take calls over ------------------------------------------------------------


class Sdpa(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return ft.scaled_dot_product_attention(q, k * 1.5, v, mask, scale=0.3)


class Mha(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sinks = torch.nn.Parameter(torch.ones(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = ft.mha(q, k * 1.5, v, causal=True, sinks=self.sinks, return_lse=True)
        return out + lse.transpose(1, 2)[..., None]


@pytest.mark.parametrize("kind", [Sdpa, Mha])
def test_symbolic_trace(kind):
    inputs, module = qkv(heads_first=kind is Sdpa), kind()
    if kind is Sdpa:
        inputs.append(torch.ones(5, 7, dtype=torch.bool).tril(2))
    traced = torch.fx.symbolic_trace(module)
    function = ft.scaled_dot_product_attention if kind is Sdpa else ft.mha
    assert [n.target for n in traced.graph.nodes if n.target is function]
    want = module(*inputs)
    for call in (traced, torch.fx.Interpreter(traced).run, torch.fx.symbolic_trace(traced)):
        got = call(*inputs)
        assert torch.equal(got, want)
        grads = (
            torch.autograd.grad(got.sin().sum(), inputs[:3]),
            torch.autograd.grad(module(*inputs).sin().sum(), inputs[:3]),
        )
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


def test_every_tensor_can_be_traced():
    """Wherever the one traced value stands."""
    q, k, v = (x.detach() for x in qkv())
    values: dict[str, Any] = {
        "q": q, "k": k, "v": v, "scale": torch.tensor(0.3), "softcap": torch.tensor(2.0),
        "mask": torch.ones(7, dtype=torch.bool), "bias": torch.ones(7), "alibi_slopes": torch.ones(4),
        "sinks": torch.ones(4), "q_lens": torch.tensor([5, 3]), "kv_lens": torch.tensor([2, 7]),
        "q_offset": torch.tensor(1), "seed": torch.tensor(1),
    }  # fmt: skip

    def with_one(function: Any, given: dict[str, Any], name: str) -> Any:
        return lambda x: function(**given | {name: x})

    for name, value in values.items():
        call = with_one(ft.mha, {"q": q, "k": k, "v": v, "dropout": 0.2, "seed": 5}, name)
        assert torch.equal(torch.fx.symbolic_trace(call)(value), call(value)), name
    heads_first = {"query": q, "key": k, "value": v}
    heads_first = {name: x.transpose(1, 2) for name, x in heads_first.items()}
    for name, value in {**heads_first, "attn_mask": torch.ones(7), "scale": 0.3}.items():
        call = with_one(ft.scaled_dot_product_attention, heads_first, name)
        assert torch.equal(torch.fx.symbolic_trace(call)(value), call(value)), name


def test_subclasses_and_modes():
    seen = []

    class Logged(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    q = qkv(heads_first=True)[0].detach()
    out = ft.scaled_dot_product_attention(q.as_subclass(Logged), q, q)
    assert isinstance(out, Logged)
    assert torch.equal(out.as_subclass(Tensor), ft.scaled_dot_product_attention(q, q, q))
    assert seen[0] is ft.scaled_dot_product_attention
    seen.clear()
    with Mode():
        ft.mha(q, q, q)
    assert seen[0] is ft.mha
    with torch.device("cpu"):
        assert torch.equal(ft.mha(q, q, q), ft.mha(q, q, q, device="cpu"))


# ---- FLOPs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("Hkv", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["mha", "mha, bhsd", "three axes", "sdpa"])
def test_flops_are_those_of_sdpa(name, causal, Hkv):
    """Of every pair, as FlopCounterMode counts PyTorch's own function."""
    inputs = qkv(Hkv, heads_first=name != "mha")
    shapes = [(2, 4, 5, 8), (2, Hkv, 7, 8), (2, Hkv, 7, 6)]
    call: Any = partial(ft.mha, causal=causal, layout="bshd" if name == "mha" else "bhsd")
    if name == "sdpa":
        call = partial(ft.scaled_dot_product_attention, is_causal=causal, enable_gqa=True)
    if name == "three axes":
        inputs = [x[0] for x in inputs]
        shapes = [(1, *shape[1:]) for shape in shapes]
    forward = sdpa_flop_count(*shapes)
    with FlopCounterMode(display=False) as counter:
        out = call(*inputs)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == sdpa_backward_flop_count((*shapes[0][:3], 6), *shapes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(*(x.to("meta") for x in inputs))
    assert counter.get_total_flops() == forward


def test_flops_of_a_matrix():
    q = torch.randn(5, 8)
    with FlopCounterMode(display=False) as counter:
        ft.mha(q, q, q)
    assert counter.get_total_flops() == sdpa_flop_count(*((1, 1, 5, 8),) * 3)


# ---- importing again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["fastattn.torch", "fastattn"])
def test_imported_again_after_its_modules_are_gone(package):
    code = f"""
    import gc, torch
    import fastattn.torch as first
    q = torch.randn(1, 5, 2, 4, requires_grad=True)
    want = first.mha(q, q, q)
    (gradient,) = torch.autograd.grad(want.sum(), q)
    for _ in range(3):
        for name in [name for name in sys.modules if (name + ".").startswith("{package}.")]:
            del sys.modules[name]
        gc.collect()
        import fastattn.torch as again
        assert again is not first
        for module in (first, again):
            out = module.mha(q, q, q)
            assert torch.equal(out, want)
            assert torch.equal(torch.autograd.grad(out.sum(), q)[0], gradient)
            assert torch.equal(torch.vmap(lambda x: module.mha(x, x, x))(q[None])[0], want)
            compiled = torch.compile(module.mha, backend="aot_eager", fullgraph=True)
            assert torch.equal(compiled(q, q, q), want)
    """
    run(code)


def test_reloaded():
    code = """
    import importlib, torch, fastattn.torch
    q = torch.randn(1, 5, 2, 4)
    want = fastattn.torch.mha(q, q, q)
    for name in [name for name in sys.modules if name.startswith("fastattn.torch")]:
        importlib.reload(sys.modules[name])
    assert torch.equal(fastattn.torch.mha(q, q, q), want)
    """
    run(code)


def test_operators_of_another_version():
    code = """
    import torch
    library = torch.library.Library("fastattn", "FRAGMENT")
    library.define("mha(Tensor q) -> Tensor")
    library.define("mha_backward(Tensor q) -> Tensor")
    try:
        import fastattn.torch
    except ImportError as error:
        print(error)
    """
    assert "the operators of another version; restart" in run(code)[0]


def test_an_import_that_fails_leaves_nothing():
    code = """
    import torch
    real, torch.library.register_autograd = torch.library.register_autograd, None
    try:
        import fastattn.torch
    except TypeError:
        pass
    torch.library.register_autograd = real
    import fastattn.torch
    q = torch.randn(1, 5, 2, 4, requires_grad=True)
    fastattn.torch.mha(q, q, q).sum().backward()
    assert q.grad is not None
    """
    run(code)
