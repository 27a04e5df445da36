"""The operators ``fastattn::mha`` and ``fastattn::mha_backward``: how PyTorch sees the compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import _core

# Every argument is positional and has no default: the dispatcher drops those that equal their default.
_SIDES = (
    "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? q_lens, Tensor? kv_lens, "
    "Tensor? q_offset_tensor, Tensor? seed_tensor"
)
_OPTIONS = (
    "str layout, float? scale, bool causal, SymInt? window_left, SymInt? window_right, SymInt? q_offset, "
    "float? softcap, float dropout, SymInt seed, str? device, str? kernel"
)
_N_SIDES = 8
_N_INPUTS = 3 + _N_SIDES  # q, k, v come before the side arguments

_torch_library: Any = torch.library  # in part without types
_library = _torch_library.Library("fastattn", "FRAGMENT")
_library.define(
    f"mha(Tensor q, Tensor k, Tensor v, {_SIDES}, {_OPTIONS}, bool return_weights) -> "
    "(Tensor out, Tensor lse, Tensor weights)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "mha_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SIDES}, {_OPTIONS}, bool need_dbias) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dalibi_slopes, Tensor dsinks)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
mha = torch.ops.fastattn.mha.default
mha_backward = torch.ops.fastattn.mha_backward.default

# NumPy reads these where they lie, at a fraction of what PyTorch's __dlpack__ costs per call.
_NUMPY_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bool, torch.int64, torch.int32})


def _lend(x: Tensor) -> Any:
    """The memory of a tensor as the core takes it, without a copy."""
    if x.requires_grad:
        x = x.detach()
    return x.numpy() if x.is_cpu and x.dtype in _NUMPY_DTYPES else x


def _adopt(x: Any, like: Tensor) -> Tensor:
    """What the core returned as a tensor; an empty one for None, since operators return no None."""
    if x is None:
        return like.new_empty((0,))
    return x if isinstance(x, Tensor) else torch.from_numpy(x)


def _keywords(
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    q_lens: Tensor | None,
    kv_lens: Tensor | None,
    q_offset_tensor: Tensor | None,
    seed_tensor: Tensor | None,
    layout: str,
    scale: float | None,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    q_offset: int | None,
    softcap: float | None,
    dropout: float,
    seed: int,
    device: str | None,
    kernel: str | None,
) -> dict[str, Any]:
    """The arguments of the operators as those of the core."""
    keywords: dict[str, Any] = {
        "layout": layout,
        "scale": scale,
        "causal": causal,
        "q_offset": q_offset,
        "softcap": softcap,
        "dropout": dropout,
        # An int64 carries the seeds from 2**63 on as negative ones.
        "seed": seed % 2**64 if seed_tensor is None else int(seed_tensor),
        "device": device,
        "kernel": kernel,
    }
    if window_left is not None or window_right is not None:
        keywords["window"] = window_left, window_right
    for name, x in (
        ("mask", mask), ("bias", bias), ("alibi_slopes", alibi_slopes), ("sinks", sinks), ("q_lens", q_lens),
        ("kv_lens", kv_lens), ("q_offset", q_offset_tensor),
    ):  # fmt: skip
        if x is not None:
            keywords[name] = _lend(x)
    return keywords


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    keywords = _keywords(*rest[:-1])
    results = _core.mha(_lend(q), _lend(k), _lend(v), return_lse=True, return_weights=rest[-1], **keywords)
    return _adopt(results[0], q), _adopt(results[1], q), _adopt(results[2] if rest[-1] else None, q)


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    grads = _core.mha_backward(
        _lend(dout),
        *(_lend(x) for x in (q, k, v, out, lse)),
        dlse=None if dlse is None else _lend(dlse),
        need_dbias=rest[-1],
        **_keywords(*rest[:-1]),
    )
    return tuple(_adopt(x, q) for x in grads)


_library.impl("mha", _forward, "CompositeExplicitAutograd")
_library.impl("mha_backward", _backward, "CompositeExplicitAutograd")


# ---- shapes, for tracing and the meta device -----------------------------------------------------------


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    layout, return_weights = rest[_N_SIDES], rest[-1]
    if q.dim() not in (2, 3, 4) or not q.dim() == k.dim() == v.dim():
        raise ValueError(f"q, k, v: expected one rank of 2, 3 or 4, got {q.dim()}, {k.dim()}, {v.dim()}")
    bshd = q.dim() > 2 and layout == "bshd"
    rows = (*q.shape[:-3], q.shape[-2], q.shape[-3]) if bshd else q.shape[:-1]  # without the axes q lacks
    n_k = k.shape[-3] if bshd else k.shape[-2]
    stats = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty((*q.shape[:-1], v.shape[-1])),
        q.new_empty(rows, dtype=stats),
        q.new_empty((*rows, n_k), dtype=stats) if return_weights else q.new_empty((0,)),
    )


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    bias, alibi_slopes, sinks, need_dbias = *rest[1:4], rest[-1]
    given = (q, k, v, bias if need_dbias else None, alibi_slopes, sinks)
    return tuple(q.new_empty((0,)) if x is None else x.new_empty(x.shape) for x in given)


_torch_library.register_fake("fastattn::mha", _fake_forward, lib=_library)
_torch_library.register_fake("fastattn::mha_backward", _fake_backward, lib=_library)


# ---- derivatives ------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    out, lse, weights = output
    ctx.save_for_backward(*inputs[:_N_INPUTS], out, lse)
    ctx.options = inputs[_N_INPUTS:-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(weights)


def _differentiate(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, dweights: None
) -> tuple[Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    needed = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * len(needed)
    if dout is None and dlse is None:
        return tuple(grads)
    if dout is None:
        dout = out.new_zeros(()).expand(out.shape)
    bias = 4  # positions among the inputs: q 0, k 1, v 2, mask 3, bias 4, alibi_slopes 5, sinks 6
    results = _call_backward(dout, dlse, *inputs[:3], out, lse, *inputs[3:], *ctx.options, needed[bias])
    for position, grad in zip((0, 1, 2, bias, 5, 6), results, strict=True):
        if needed[position]:
            grads[position] = grad
    return tuple(grads)


def _refuse_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "fastattn.torch: attention is differentiable once; a gradient of its gradient was asked for "
        "(torch.nn.functional.scaled_dot_product_attention with SDPBackend.MATH has one)"
    )


_torch_library.register_autograd("fastattn::mha", _differentiate, setup_context=_save, lib=_library)
_torch_library.register_autograd("fastattn::mha_backward", _refuse_second_derivative, lib=_library)


# ---- torch.func -------------------------------------------------------------------------------------------


def _map_over(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """The rule of vmap: one call per entry, each on all threads.

    Not folded into the batch: sinks have no batch axis, and the dropout mask depends on the batch index.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        calls = [
            op(*(x if dim is None else x.select(dim, n) for x, dim in zip(args, in_dims, strict=True)))
            for n in range(info.batch_size)
        ]
        results = tuple(torch.stack(column) for column in zip(*calls, strict=True))
        return results, (0,) * len(results)

    return rule


def _refuse_forward_mode(ctx: Any, *tangents: Any) -> None:
    raise NotImplementedError("fastattn.torch: attention has no forward-mode derivative (jvp, jacfwd)")


def _function(name: str, forward: Callable[..., Any], **methods: Callable[..., Any]) -> Any:
    methods = {"forward": forward, "jvp": _refuse_forward_mode, **methods}
    return type(
        name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in methods.items()}
    )


# Spares the dispatcher a detour where no derivative can be asked for.
_below_autograd: Any = torch._C._AutoDispatchBelowAutograd


def _forward_and_save(ctx: Any, *args: Any) -> Any:
    with _below_autograd():
        output = mha(*args)
    _save(ctx, args, output)
    return output


# What register_autograd makes of the same takes 0.1 ms per call, and does not compose with torch.func.
_Mha = _function("FastattnMha", _forward_and_save, backward=_differentiate)
_TransformedMha = _function(
    "FastattnMha",
    lambda *args: mha(*args),
    setup_context=_save,
    backward=_differentiate,
    vmap=lambda *args: _map_mha(*args),
)
_TransformedMhaBackward = _function(
    "FastattnMhaBackward",
    lambda *args: mha_backward(*args),
    setup_context=lambda ctx, inputs, output: None,
    backward=_refuse_second_derivative,
    vmap=lambda *args: _map_mha_backward(*args),
)


def call(*args: Any) -> Any:
    """`mha`, whatever differentiates, maps or compiles it: (out, lse, weights)."""
    if torch.compiler.is_compiling():
        return mha(*args)
    if torch._C._are_functorch_transforms_active():
        return _TransformedMha.apply(*args)
    learned = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:7])
    if learned or torch.autograd.forward_ad._current_level >= 0:
        return _Mha.apply(*args)
    with _below_autograd():
        return mha(*args)


def _call_backward(*args: Any) -> Any:
    if torch.compiler.is_compiling():
        return mha_backward(*args)
    if torch._C._are_functorch_transforms_active():
        return _TransformedMhaBackward.apply(*args)
    if torch.is_grad_enabled():  # create_graph=True
        return mha_backward(*args)
    with _below_autograd():
        return mha_backward(*args)


_map_mha: Callable[..., Any] = _map_over(call)
_map_mha_backward: Callable[..., Any] = _map_over(_call_backward)
_torch_library.register_vmap("fastattn::mha", _map_mha, lib=_library)
_torch_library.register_vmap("fastattn::mha_backward", _map_mha_backward, lib=_library)
