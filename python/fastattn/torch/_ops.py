"""The operators ``fastattn::mha`` and ``fastattn::mha_backward``: how PyTorch sees the compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastattn import _core
from fastattn.torch._learned import fold_scale, scale_gradient, softcap_gradient

# All is positional. The dispatcher drops arguments at the end that equal their default.
_SIDES = (
    "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? q_lens, Tensor? kv_lens, "
    "Tensor? q_offset_tensor, Tensor? seed_tensor"
)
_OPTIONS = (
    "str layout, float? scale, bool causal, SymInt? window_left, SymInt? window_right, SymInt? q_offset, "
    "float? softcap, float dropout, SymInt seed, str? device, str? kernel"
)
# Used instead of `scale` and `softcap`: the numbers as tensors, which may be learned or change in a graph.
_NUMBERS = "Tensor? scale_tensor=None, Tensor? softcap_tensor=None"
_N_SIDES, _N_OPTIONS = 8, 11
_N_INPUTS = 3 + _N_SIDES  # q, k, v come before the side arguments
_REST = _N_SIDES + _N_OPTIONS + 1  # of the arguments after the first tensors: those without a default
_SCHEMAS = (
    f"mha(Tensor q, Tensor k, Tensor v, {_SIDES}, {_OPTIONS}, bool return_weights, {_NUMBERS}) -> "
    "(Tensor out, Tensor lse, Tensor weights)",
    "mha_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SIDES}, {_OPTIONS}, bool need_dbias, {_NUMBERS}, bool need_dscale=False, "
    "bool need_dsoftcap=False) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dalibi_slopes, Tensor dsinks, Tensor dscale, "
    "Tensor dsoftcap)",
)

# NumPy reads these where they lie, at a fraction of what PyTorch's __dlpack__ costs per call.
_NUMPY_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bool, torch.int64, torch.int32})


def _lend(x: Tensor) -> Any:
    """The memory of a tensor as the core takes it, without a copy."""
    if x.requires_grad:
        x = x.detach()
    if x.is_neg() or x._is_zerotensor():  # views whose memory does not hold their numbers
        x = x.clone()
    return x.numpy() if x.is_cpu and x.dtype in _NUMPY_DTYPES else x


def _adopt(x: Any, like: Tensor) -> Tensor:
    """What the core returned as a tensor; an empty one for None, since operators return no None."""
    if x is None:
        return like.new_empty((0,))
    return x if isinstance(x, Tensor) else torch.from_numpy(x)


def _limited(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """A call of the core, on no more threads than PyTorch may use."""
    before = 0
    try:
        before = _core.limit_threads(torch.get_num_threads())
        return function(*args, **keywords)
    finally:
        _core.limit_threads(before)


def _numbers(rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with a default, as many as there may be."""
    return (*rest[_REST:], None, None, False, False)[:4] if len(rest) < _REST + 4 else rest[_REST:]


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
    scale_tensor: Tensor | None,
    softcap_tensor: Tensor | None,
) -> dict[str, Any]:
    """The arguments of the operators as those of the core."""
    scale = scale if scale_tensor is None else float(scale_tensor.detach())
    softcap = softcap if softcap_tensor is None else float(softcap_tensor.detach())
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
            # A mask that is not bool is refused; as a tensor, in words for tensors.
            keywords[name] = x if name == "mask" and x.dtype != torch.bool else _lend(x)
    return keywords


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return_weights = rest[_REST - 1]
    keywords = _keywords(*rest[: _REST - 1], *_numbers(rest)[:2])
    keywords |= {"return_lse": True, "return_weights": return_weights}
    results = _limited(_core.mha, _lend(q), _lend(k), _lend(v), **keywords)
    return _adopt(results[0], q), _adopt(results[1], q), _adopt(results[2] if return_weights else None, q)


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    scale_tensor, softcap_tensor, need_dscale, need_dsoftcap = _numbers(rest)
    settings: tuple[Any, ...] = (*rest[: _REST - 1], scale_tensor, softcap_tensor)
    keywords = _keywords(*settings)
    dscale = dsoftcap = None
    if need_dsoftcap:
        value = softcap_gradient(
            lambda *args, **kw: _limited(_core.mha, *args, **kw), _lend, dout, dlse, q, k, v, out, keywords
        )
        dsoftcap = softcap_tensor.new_tensor(value)
    folded, factor = q, 1.0
    if need_dscale:
        folded, keywords["scale"], factor = fold_scale(q, keywords["scale"])
    grads = _limited(
        _core.mha_backward,
        _lend(dout),
        *(_lend(x) for x in (folded, k, v, out, lse)),
        dlse=None if dlse is None else _lend(dlse),
        need_dbias=rest[_REST - 1],
        **keywords,
    )
    dq, *others = (_adopt(x, q) for x in grads)
    if need_dscale:
        dscale = scale_tensor.new_tensor(scale_gradient(q, dq, keywords["scale"]))
        dq = dq if factor == 1.0 else dq * factor
    return dq, *others, _adopt(dscale, q), _adopt(dsoftcap, q)


# ---- shapes, for tracing and the meta device -----------------------------------------------------------


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    layout, return_weights = rest[_N_SIDES], rest[_REST - 1]
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
    bias, alibi_slopes, sinks, need_dbias = *rest[1:4], rest[_REST - 1]
    scale, softcap, need_dscale, need_dsoftcap = _numbers(rest)
    numbers = (scale if need_dscale else None, softcap if need_dsoftcap else None)
    given = (q, k, v, bias if need_dbias else None, alibi_slopes, sinks, *numbers)
    return tuple(q.new_empty((0,)) if x is None else x.new_empty(x.shape) for x in given)


# ---- derivatives ------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    out, lse, weights = output
    ctx.save_for_backward(*inputs[:_N_INPUTS], *_numbers(inputs[3:])[:2], out, lse)
    ctx.options = inputs[_N_INPUTS : 3 + _REST - 1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(weights)


def _differentiate(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, dweights: None
) -> tuple[Tensor | None, ...]:
    *inputs, scale, softcap, out, lse = ctx.saved_tensors
    needed = ctx.needs_input_grad
    grads: list[Tensor | None] = [None] * len(needed)
    learned = [*needed[3 + _REST :], False, False][:2]  # scale, softcap
    if dout is None and dlse is None:
        return tuple(grads)
    if dout is None:
        dout = out.new_zeros(()).expand(out.shape)
    bias = 4  # positions among the inputs: q 0, k 1, v 2, mask 3, bias 4, alibi_slopes 5, sinks 6
    results = _call_backward(
        dout, dlse, *inputs[:3], out, lse, *inputs[3:], *ctx.options, needed[bias], scale, softcap, *learned
    )
    for position, grad in zip((0, 1, 2, bias, 5, 6, 3 + _REST, 4 + _REST), results, strict=True):
        if position < len(needed) and needed[position]:
            grads[position] = grad
    return tuple(grads)


def _refuse_second_derivative(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "fastattn.torch: attention is differentiable once; a gradient of its gradient was asked for "
        "(torch.nn.functional.scaled_dot_product_attention with SDPBackend.MATH has one)"
    )


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
    tensors = (*args[:7], *args[3 + _REST :])
    learned = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
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


# ---- FLOPs ------------------------------------------------------------------------------------------------


def _score_flops(q: Any, k: Any, rest: tuple[Any, ...]) -> Any:
    """2 for every query, key and head; shapes in."""
    seq = -3 if len(q) > 2 and rest[_N_SIDES] == "bshd" else -2
    return 2 * prod(q[:-1]) * k[seq]


def _forward_flops(q: Any, k: Any, v: Any, *rest: Any, **_: Any) -> Any:
    # As FlopCounterMode counts PyTorch's own function: every pair, those that causal or a mask excludes too.
    return _score_flops(q, k, rest) * (q[-1] + v[-1])


def _backward_flops(
    dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any, **_: Any
) -> Any:
    return _score_flops(q, k, rest) * (3 * q[-1] + 2 * v[-1])  # the scores once more, dq, dk; dP, dv


# ---- registration -----------------------------------------------------------------------------------------


def _register() -> Any:
    torch_library: Any = torch.library  # in part without types
    library = torch_library.Library("fastattn", "FRAGMENT")
    try:
        for schema in _SCHEMAS:
            library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for name, implementation, fake, backward, saved, mapped, flops in (
            ("mha", _forward, _fake_forward, _differentiate, _save, _map_mha, _forward_flops),
            ("mha_backward", _backward, _fake_backward, _refuse_second_derivative, None, _map_mha_backward,
             _backward_flops),
        ):  # fmt: skip
            library.impl(name, implementation, "CompositeExplicitAutograd")
            torch_library.register_fake(f"fastattn::{name}", fake, lib=library)
            torch_library.register_autograd(f"fastattn::{name}", backward, setup_context=saved, lib=library)
            torch_library.register_vmap(f"fastattn::{name}", mapped, lib=library)
            register_flop_formula(getattr(torch.ops.fastattn, name))(flops)
    except BaseException:
        library._destroy()
        raise
    return library


def _registered() -> bool:
    """Whether this process has the operators: an earlier import made them, and left sys.modules."""
    if not hasattr(torch.ops.fastattn, "mha"):
        return False
    for schema in _SCHEMAS:
        packet = getattr(torch.ops.fastattn, schema.partition("(")[0])
        if packet.default._schema != torch._C.parse_schema(f"fastattn::{schema}"):
            raise ImportError("fastattn.torch: this process has the operators of another version; restart it")
    return True


if not _registered():
    # PyTorch's dispatcher keeps the functions above, and they this: the operators live as long as it.
    _library = _register()
mha: Any = torch.ops.fastattn.mha.default
mha_backward: Any = torch.ops.fastattn.mha_backward.default
