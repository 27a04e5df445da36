"""The operators ``fastattn::mha`` and ``fastattn::mha_backward``: how PyTorch sees the compiled functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastattn import Gradients, _core
from fastattn._arguments import OPTIONS, names
from fastattn.masks import Mask
from fastattn.torch._learned import fold_scale, scale_gradient, softcap_gradient

# Numbers that may be tensors instead, which are learned or change in a graph.
LEARNED = ("scale", "softcap")
_TYPES = {"text": "str", "number": "float", "flag": "bool", "integer": "SymInt"}


def _option_types() -> dict[str, str]:
    """The options that are no tensors, from the table of arguments."""
    types: dict[str, str] = {}
    for x in OPTIONS:
        if x.kind == "window":
            types |= {f"{x.name}_left": "SymInt?", f"{x.name}_right": "SymInt?"}
        elif x.kind != "array":
            types[x.name] = _TYPES[x.kind] + ("?" if x.default is None else "")
    return types


# Bounds make it `mha_varlen`.
_ARRAYS = (*names("array"), "cu_q", "cu_kv")
_MASK_LISTS = "mask_lists"  # a Mask, as int64
_QKV = dict.fromkeys(("q", "k", "v"), "Tensor")
_SIDES = dict.fromkeys((*_ARRAYS, *(f"{name}_tensor" for name in names("integer")), _MASK_LISTS), "Tensor?")
_OPTIONS = _option_types()
_NUMBERS = dict.fromkeys((f"{name}_tensor" for name in LEARNED), "Tensor?")
# The operators' arguments, all by position, with their types.
_FORWARD = {**_QKV, **_SIDES, **_OPTIONS, "return_weights": "bool", "out_dtype": "ScalarType?", **_NUMBERS}
_BACKWARD = {
    "dout": "Tensor", "dlse": "Tensor?", **_QKV, "out": "Tensor", "lse": "Tensor", **_SIDES, **_OPTIONS,
    "need_dbias": "bool", **_NUMBERS, **dict.fromkeys((f"need_d{name}" for name in LEARNED), "bool"),
}  # fmt: skip
# The dispatcher drops these at the end where they equal their default.
_TAIL = {name: "None" if name in _NUMBERS else "False" for name in list(_BACKWARD)[-2 * len(LEARNED) :]}
_DEFAULTS: dict[str, Any] = {**dict.fromkeys(_FORWARD), "return_weights": False}
_DEFAULTS |= {x.name: x.default for x in OPTIONS if x.name in _OPTIONS}
_PLAIN = frozenset((*names("text", "number", "flag"), "return_weights", "out_dtype", "need_dbias"))
_INTEGERS = names("integer")
_WINDOW = ("window_left", "window_right")
# The forward's arguments from `_N_TENSORS` to `_N_PLAIN` are no tensors.
_N_TENSORS, _N_PLAIN = len(_QKV) + len(_SIDES), len(_FORWARD) - len(_NUMBERS)
_SAVED = (*_QKV, *_SIDES, *_NUMBERS, *list(_FORWARD)[_N_TENSORS:_N_PLAIN])
# What has a gradient, in the order of the backward's results.
_DIFFERENTIABLE = (*(name.removeprefix("d") for name in Gradients._fields), *_NUMBERS)


def _schema(name: str, arguments: dict[str, str], results: Iterable[str]) -> str:
    declared = (f"{kind} {x}={_TAIL[x]}" if x in _TAIL else f"{kind} {x}" for x, kind in arguments.items())
    return f"{name}({', '.join(declared)}) -> ({', '.join(f'Tensor {x}' for x in results)})"


_SCHEMAS = (
    _schema("mha", _FORWARD, ("out", "lse", "weights")),
    _schema("mha_backward", _BACKWARD, (*Gradients._fields, *(f"d{name}" for name in LEARNED))),
)


def _all(arguments: dict[str, str], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """With None for what was dropped at the end."""
    return args + (None,) * (len(arguments) - len(args))


def _named(arguments: dict[str, str], args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(arguments, _all(arguments, args), strict=True))


def _given(arguments: dict[str, str], args: tuple[Any, ...]) -> dict[str, Any]:
    """By name, without those that are None, which are most: a loop over all of them is half the overhead."""
    return {name: x for name, x in zip(arguments, args, strict=False) if x is not None}


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


def _keywords(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the operators as those of the core; `given` is without q, k, v and what is None."""
    keywords: dict[str, Any] = {}
    for name, x in given.items():
        if name in _PLAIN:
            keywords[name] = x
        elif name in _ARRAYS:
            # A mask that is not bool is refused; as a tensor, in words for tensors.
            keywords[name] = x if name == "mask" and x.dtype != torch.bool else _lend(x)
        elif name in _INTEGERS:  # after its tensor, which counts
            # An int64 carries the seeds from 2**63 on as negative ones.
            keywords.setdefault(name, x % 2**64 if name == "seed" else x)
        elif name == _MASK_LISTS:
            keywords["mask"] = Mask._of_words(x.numpy())
        elif name == "q_offset_tensor":
            keywords["q_offset"] = _lend(x)
        elif name == "seed_tensor":
            keywords["seed"] = int(x)
        elif name in _NUMBERS:
            keywords[name.removesuffix("_tensor")] = float(x.detach())
        elif name in _WINDOW:
            keywords["window"] = tuple(given.get(side) for side in _WINDOW)
    return keywords


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = args[:3]
    keywords = _keywords(_given(_FORWARD, args))
    return_weights = keywords.pop("return_weights")
    if "cu_q" in keywords:
        results = _limited(_core.mha_varlen, _lend(q), _lend(k), _lend(v), return_lse=True, **keywords)
    else:
        if return_weights:
            keywords["return_weights"] = True
        results = _limited(_core.mha, _lend(q), _lend(k), _lend(v), return_lse=True, **keywords)
    weights = results[2] if return_weights else None
    return _adopt(results[0], q), _adopt(results[1], q), _adopt(weights, q)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    given = _given(_BACKWARD, args)
    dout, dlse, q, k, v, out, lse = args[:7]
    dout, out = dout.to(q.dtype), out.to(q.dtype)  # of an out_dtype
    keywords = _keywords(given)
    need_dbias = keywords.pop("need_dbias")
    dscale = dsoftcap = None
    if given.get("need_dsoftcap") and "cu_q" in keywords:
        raise NotImplementedError("softcap: there is no gradient of it for packed entries; use softcap.detach()")
    if given.get("need_dsoftcap"):
        value = softcap_gradient(
            lambda *args, **kw: _limited(_core.mha, *args, **kw), _lend, dout, dlse, q, k, v, out, keywords
        )
        dsoftcap = given["softcap_tensor"].new_tensor(value)
    folded, factor = q, 1.0
    if given.get("need_dscale"):
        folded, keywords["scale"], factor = fold_scale(q, keywords["scale"])
    grads = _limited(
        _core.mha_varlen_backward if "cu_q" in keywords else _core.mha_backward,
        _lend(dout),
        *(_lend(x) for x in (folded, k, v, out, lse)),
        dlse=None if dlse is None else _lend(dlse),
        need_dbias=need_dbias,
        **keywords,
    )
    dq, *others = (_adopt(x, q) for x in grads)
    if given.get("need_dscale"):
        dscale = given["scale_tensor"].new_tensor(scale_gradient(q, dq, keywords["scale"]))
        dq = dq if factor == 1.0 else dq * factor
    return dq, *others, _adopt(dscale, q), _adopt(dsoftcap, q)


# ---- shapes, for tracing and the meta device -----------------------------------------------------------


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = _named(_FORWARD, args)
    q, k, v = given["q"], given["k"], given["v"]
    ranks = (3,) if given["cu_q"] is not None else (2, 3, 4)
    if q.dim() not in ranks or not q.dim() == k.dim() == v.dim():
        expected = " or ".join(map(str, ranks))
        raise ValueError(f"q, k, v: expected one rank of {expected}, got {q.dim()}, {k.dim()}, {v.dim()}")
    bshd = q.dim() > 2 and given["layout"] == "bshd"
    rows = (*q.shape[:-3], q.shape[-2], q.shape[-3]) if bshd else q.shape[:-1]  # without the axes q lacks
    n_k = k.shape[-3] if bshd else k.shape[-2]
    stats = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=given["out_dtype"] or q.dtype),
        q.new_empty(rows, dtype=stats),
        q.new_empty((*rows, n_k), dtype=stats) if given["return_weights"] else q.new_empty((0,)),
    )


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    given = _named(_BACKWARD, args)
    needed = {"bias": given["need_dbias"], **{f"{name}_tensor": given[f"need_d{name}"] for name in LEARNED}}
    like = [given[name] if needed.get(name, True) else None for name in _DIFFERENTIABLE]
    return tuple(given["q"].new_empty((0,)) if x is None else x.new_empty(x.shape) for x in like)


# ---- derivatives ------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    out, lse, weights = output
    inputs = _all(_FORWARD, inputs)
    ctx.save_for_backward(*inputs[:_N_TENSORS], *inputs[_N_PLAIN:], out, lse)
    ctx.options = inputs[_N_TENSORS:_N_PLAIN]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(weights)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, dweights: None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * len(ctx.needs_input_grad)
    *inputs, out, lse = ctx.saved_tensors
    needed = dict(zip(_FORWARD, ctx.needs_input_grad, strict=False))
    given = {
        "dout": out.new_zeros(()).expand(out.shape) if dout is None else dout,
        "dlse": dlse, "out": out, "lse": lse, "need_dbias": needed["bias"],
        **dict(zip(_SAVED, (*inputs, *ctx.options), strict=True)),
        **{f"need_d{name}": needed.get(f"{name}_tensor", False) for name in LEARNED},
    }  # fmt: skip
    results = _call_backward(*(given[name] for name in _BACKWARD))
    grads = dict(zip(_DIFFERENTIABLE, results, strict=True))
    return tuple(grads.get(name) if is_needed else None for name, is_needed in needed.items())


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
    return type(name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in methods.items()})


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


def call(given: dict[str, Any]) -> Any:
    """`mha`, whatever differentiates, maps or compiles it: (out, lse, weights). Options have defaults."""
    return _call(*(_DEFAULTS | given).values())


def _call(*args: Any) -> Any:
    if torch.compiler.is_compiling():
        return mha(*args)
    if torch._C._are_functorch_transforms_active():
        return _TransformedMha.apply(*args)
    tensors = (*args[:_N_TENSORS], *args[_N_PLAIN:])
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


_map_mha: Callable[..., Any] = _map_over(_call)
_map_mha_backward: Callable[..., Any] = _map_over(_call_backward)


# ---- FLOPs ------------------------------------------------------------------------------------------------


def _flops(arguments: dict[str, str], of_q: int, of_v: int) -> Callable[..., Any]:
    """The formula of an operator with so many products of D and Dv features per pair; shapes in.

    As FlopCounterMode counts PyTorch's own function: every pair, those that causal or a mask excludes too.
    """

    def formula(*args: Any, **_: Any) -> Any:
        given = _named(arguments, args)
        q, k, v = given["q"], given["k"], given["v"]
        seq = -3 if len(q) > 2 and given["layout"] == "bshd" else -2
        return 2 * prod(q[:-1]) * k[seq] * (of_q * q[-1] + of_v * v[-1])

    return formula


# ---- registration -----------------------------------------------------------------------------------------


def _register() -> Any:
    torch_library: Any = torch.library  # in part without types
    library = torch_library.Library("fastattn", "FRAGMENT")
    try:
        for schema in _SCHEMAS:
            library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for name, implementation, fake, backward, saved, mapped, flops in (
            ("mha", _forward, _fake_forward, _differentiate, _save, _map_mha, _flops(_FORWARD, 1, 1)),
            # The scores once more, dq and dk; dP and dv.
            ("mha_backward", _backward, _fake_backward, _refuse_second_derivative, None, _map_mha_backward,
             _flops(_BACKWARD, 3, 2)),
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
