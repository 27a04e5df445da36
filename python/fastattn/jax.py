"""fastattn for JAX: `mha` and `mha_varlen` as operations of XLA on the CPU, with gradients.

Under ``jax.jit`` the compiled program calls fastattn's C++ directly, on XLA's own buffers: nothing is copied
and Python does not run. Gradients, ``jax.vmap``, ``jax.checkpoint`` and ``jax.eval_shape`` work.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

try:
    import jax
except ModuleNotFoundError as error:
    if error.name != "jax":
        raise
    message = "fastattn.jax needs JAX, which is not installed: pip install 'fastattn[jax]'"
    raise ModuleNotFoundError(message, name="jax") from None
import jax.ffi
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from fastattn import Gradients, _core
from fastattn._arguments import OPTIONS
from fastattn.masks import Mask

__all__ = ["mha", "mha_varlen"]

_INPUTS = ("q", "k", "v", *(x.name for x in OPTIONS if x.kind == "array"), "cu_q", "cu_kv")
# What must be known when a function is traced, apart from the two flags that say what is returned.
_STATIC = {x.name: x.kind for x in OPTIONS if x.kind not in ("array", "integer") and x.name != "device"}
_SIDE = frozenset(name.removeprefix("d") for name in Gradients._fields[3:])  # side arguments with gradients
_FORWARD, _BACKWARD = "fastattn_mha", "fastattn_mha_backward"


def _register() -> None:
    targets = _core.xla_ffi_targets()
    for name, handler in ((_FORWARD, targets["mha"]), (_BACKWARD, targets["mha_backward"])):
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
        # There the handler only says, in our words, that it cannot compute.
        for platform in ("CUDA", "ROCM"):
            jax.ffi.register_ffi_target(name, targets["not_here"], platform=platform)


_register()

_Struct: Any = jax.ShapeDtypeStruct
_Arrays = dict[str, Any]  # by the name of the argument; absent ones are not there
_Types = tuple[tuple[str, tuple[int, ...], Any], ...]  # name, shape, dtype


class _Settings(NamedTuple):
    """What is known when a function is traced, checked and converted; part of the compiled program."""

    attributes: tuple[tuple[str, Any], ...]  # of the call of the handler; what is None is absent
    layout: str
    out_dtype: str | None
    dropout: float
    finite_lse: bool  # of what is kept for the gradients


def mha(
    q: Any,
    k: Any,
    v: Any,
    *,
    layout: str = "bshd",
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: Any = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    softcap: float | None = None,
    sinks: Any = None,
    q_lens: Any = None,
    kv_lens: Any = None,
    dropout: float = 0.0,
    seed: Any = 0,
    return_lse: bool = False,
    return_weights: bool = False,
    out_dtype: Any = None,
    kernel: str | None = None,
) -> Any:
    """`fastattn.mha` for JAX, differentiable once in q, k, v, bias, alibi_slopes and sinks.

    Gradients also flow through ``lse``, not through ``weights``. A gradient of bias, alibi_slopes or sinks is
    computed only where it is asked for. Arrays, traced or not, are JAX's or NumPy's; all other arguments must
    be known when the function is traced, and become part of the compiled program.

    Parameters
    ----------
    q, k, v : array of float64, float32, float16 or bfloat16
        (B,Sq,Hq,D), (B,Sk,Hkv,D), (B,Sk,Hkv,Dv); ``layout="bhsd"``, three axes and two as in `fastattn.mha`.
        Hq is a multiple of Hkv. float64 needs ``jax_enable_x64``.
    layout, scale, causal, window, softcap, dropout, kernel
        As in `fastattn.mha`.
    q_offset : int or integer array () or (B,), optional
        Position of query row 0; an int of at most 32 bits without ``jax_enable_x64``. No value causes another
        compilation.
    mask : bool array, broadcastable to (B,Hq,Sq,Sk), or a Mask of `fastattn.masks`, optional
        A Mask must be known when the function is traced. A padding mask (B,Sk) goes in as ``mask[:, None, None, :]``.
    bias : array of q's or lse's dtype, broadcastable to (B,Hq,Sq,Sk), optional
    alibi_slopes : float array (Hq,) or (B,Hq), optional
    sinks : float array (Hq,), optional
    q_lens, kv_lens : integer array (B,), optional
    seed : int, integer array (), uint32 array (2,) or (4,), or a key of `jax.random`
        For the dropout. Two words are the high and the low 32 bits, so ``jax.random.key(7)`` (threefry) gives
        the same mask as 7. Four, a key of the kinds rbg and unsafe_rbg, are hashed. No value causes another
        compilation.
    return_lse, return_weights : bool
        As in `fastattn.mha`.
    out_dtype : dtype, optional
        As in `fastattn.mha`; the gradient of out is rounded to q's dtype.

    Returns
    -------
    out : Array
        q's shape with the last axis Dv, q's dtype.
    lse : Array (B,Hq,Sq), if asked for
    weights : Array (B,Hq,Sq,Sk), if asked for
        Both float64 for float64, else float32, without the axes that q lacks.

    Raises
    ------
    TypeError, ValueError, fastattn.UnsupportedError
        When the function is traced: as `fastattn.mha` for the same arguments; a setting that is traced.
    jax.errors.JaxRuntimeError, ValueError
        Whichever JAX makes of an error when the program runs: lengths out of range, a negative seed, no
        memory, another platform than the CPU.
    """
    return _attend(dict(locals()))


def mha_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_q: Any,
    cu_kv: Any = None,
    *,
    layout: str = "bshd",
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: Any = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    softcap: float | None = None,
    sinks: Any = None,
    kv_lens: Any = None,
    dropout: float = 0.0,
    seed: Any = 0,
    return_lse: bool = False,
    out_dtype: Any = None,
    kernel: str | None = None,
) -> Any:
    """`fastattn.mha_varlen` for JAX: packed entries, differentiable as `mha`.

    Parameters
    ----------
    q, k, v : array of float64, float32, float16 or bfloat16
        (Tq,Hq,D), (Tk,Hkv,D), (Tk,Hkv,Dv); heads first with ``layout="bhsd"``.
    cu_q, cu_kv : integer array (B + 1,)
        Bounds of the entries, traced or not; cu_kv None: cu_q. No value causes another compilation.
    mask, bias : array, broadcastable to (Hq,Tq,Tk), optional
        mask: or a Mask of `fastattn.masks`, whose rows are the packed ones.
    q_offset, kv_lens, alibi_slopes
        Of each entry: (B,), (B,) and (Hq,) or (B,Hq).
    layout, scale, causal, window, softcap, sinks, dropout, seed, return_lse, out_dtype, kernel
        As in `mha`.

    Returns
    -------
    out : Array (Tq,Hq,Dv) in q's layout
    lse : Array (Hq,Tq), if asked for

    Raises
    ------
    TypeError, ValueError, fastattn.UnsupportedError, jax.errors.JaxRuntimeError
        As `mha`; bounds that do not fit when the program runs.
    """
    if cu_q is None:
        raise TypeError("cu_q: expected an integer array (B + 1,), got None")
    return _attend(dict(locals()))


def _attend(given: dict[str, Any]) -> Any:
    """Either function; what one of them does not take is absent."""
    given = dict.fromkeys((*_INPUTS, "return_weights")) | given
    given["return_weights"] = given["return_weights"] or False
    q_offset, seed, layout, dropout = (given[name] for name in ("q_offset", "seed", "layout", "dropout"))
    return_lse, return_weights = given["return_lse"], given["return_weights"]
    lists = given["mask"] if isinstance(given["mask"], Mask) else None
    if lists is not None:
        given["mask"] = None
    arrays = {name: _as_array(name, given[name]) for name in _INPUTS if given[name] is not None or name in "qkv"}
    if q_offset is not None:
        arrays["q_offset"] = _offset(q_offset)
    settings = {name: given[name] for name in (*_STATIC, "return_lse", "return_weights", "out_dtype")}
    for name, value in settings.items():
        if isinstance(value, jax.core.Tracer):
            raise TypeError(
                f"{name}: expected a value that is known when the function is traced, got a traced "
                f"{value.aval}; see static_argnames of jax.jit"
            )
    types = tuple((name, x.shape, x.dtype) for name, x in arrays.items())
    if lists is None:
        _check(types, settings)
    else:
        _check_now(types, mask=lists, **settings)
        # By halves: without jax_enable_x64 there is no int64.
        arrays["mask_lists"] = jnp.asarray(lists._fastattn_words.view(np.uint32))
    words = _seed(seed)
    if dropout > 0:
        arrays["seed"] = words
    config: Any = jax.config  # in part without types
    out_dtype = None if given["out_dtype"] is None else np.dtype(given["out_dtype"]).name
    known = _Settings(_attributes(settings), layout, out_dtype, float(dropout), bool(config.jax_debug_infs))
    names = ("out", *("lse",) * bool(return_lse), *("weights",) * bool(return_weights))
    results = _mha(known, names, arrays)
    return results if len(results) > 1 else results[0]


# ---- arguments --------------------------------------------------------------------------------------
def _attributes(settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The settings as attributes of the call of the handler; what is None is absent."""
    made: dict[str, Any] = {}
    for name, kind in _STATIC.items():
        value = settings[name]
        if kind == "window":
            sides = (None, None) if value is None else value
            for side, bound in zip(("left", "right"), sides, strict=True):
                made[f"{name}_{side}"] = None if bound is None else np.int64(min(int(bound), 2**63 - 1))
        elif value is not None:
            made[name] = value if kind == "text" else np.bool_(value) if kind == "flag" else np.float64(float(value))
    if settings.get("out_dtype") is not None:
        made["out_dtype"] = np.dtype(settings["out_dtype"]).name
    return tuple((name, value) for name, value in made.items() if value is not None)


def _as_array(name: str, x: Any) -> Any:
    # By what it has: jax 0.8 also has arrays of a type without a public name.
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(f"{name}: expected an array of JAX or NumPy, got {type(x).__name__}")
    return jnp.asarray(x)


def _is_int(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _offset(x: Any) -> Any:
    """q_offset as an array, so that another value is not another program."""
    if not _is_int(x):
        x = _as_array("q_offset", x)
        if not jnp.issubdtype(x.dtype, np.integer):
            raise TypeError(f"q_offset: expected an int or an integer array () or (B,), got {x.dtype}")
        return x
    dtype = jax.dtypes.canonicalize_dtype(np.int64)
    bits = 8 * dtype.itemsize
    if not -(2 ** (bits - 1)) <= x < 2 ** (bits - 1):
        more = "" if bits == 64 else ", or of 64 with jax_enable_x64"
        raise ValueError(f"q_offset: expected an int of at most {bits} bits{more}, got {x}")
    return np.array(x, dtype)


def _seed(x: Any) -> Any:
    """The seed as the handler takes it: an integer array () or uint32 (2,), the high word first.

    Keys of the rbg kinds have four words, uint32 (4,); all of them make the two, by JAX's own hash of keys.
    """
    if _is_int(x):
        if not 0 <= x < 2**64:
            raise ValueError(f"seed: expected 0 <= seed < 2**64, got {x}")
        return np.array([int(x) >> 32, int(x) & 0xFFFFFFFF], np.uint32)
    x = _as_array("seed", x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.shape == (4,) and x.dtype == np.uint32:
        first = jax.random.wrap_key_data(x[:2], impl="threefry2x32")
        x = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(first, x[2]), x[3]))
    if (x.shape == () and jnp.issubdtype(x.dtype, np.integer)) or (x.shape == (2,) and x.dtype == np.uint32):
        return x
    raise (ValueError if jnp.issubdtype(x.dtype, np.integer) else TypeError)(
        f"seed: expected an int, an integer array (), or uint32 of shape (2,) or (4,), got {x.dtype}{x.shape}"
    )


def _check(arrays: _Types, settings: dict[str, Any]) -> None:
    """The checks of `fastattn.mha`, by itself; remembered, since most calls are like the one before."""
    window = settings["window"]
    settings = {**settings, "window": tuple(window) if isinstance(window, list) else window}
    try:
        hash(tuple(settings.values()))
    except TypeError:
        _check_now(arrays, **settings)
    else:
        _check_once(arrays, **settings)


def _check_now(arrays: _Types, **settings: Any) -> None:
    # Arrays of one element, broadcast: nothing is allocated, nothing computed.
    like: dict[str, Any] = {name: np.broadcast_to(np.zeros((), dtype), shape) for name, shape, dtype in arrays}
    _core.explain(like.pop("q"), like.pop("k"), like.pop("v"), device="cpu", **like, **settings)


_check_once = lru_cache(maxsize=4096, typed=True)(_check_now)


# ---- the operation ----------------------------------------------------------------------------------
@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(settings: _Settings, names: tuple[str, ...], arrays: _Arrays) -> tuple[Any, ...]:
    results = _call(_FORWARD, settings, names, _with_all_axes(settings, arrays))
    given = arrays["q"].shape

    def without_axes(name: str, x: Any) -> Any:  # those that q lacks
        if "cu_q" in arrays:
            return x
        return x.reshape((*given[:-1], x.shape[-1]) if name == "out" else x.shape[4 - len(given) :])

    return tuple(without_axes(name, results[name]) for name in names)


_mha = jax.jit(_attention, static_argnums=(0, 1))


def _attention_fwd(settings: _Settings, names: tuple[str, ...], primals: Any) -> Any:
    arrays = {name: primal.value for name, primal in primals.items()}
    # A pytree without arrays: which keys it has is known when the backward pass is traced.
    wanted = {name: None for name in _SIDE & primals.keys() if primals[name].perturbed}
    all_names = tuple(dict.fromkeys((*names, "out", "lse")))
    results = dict(zip(all_names, _attention(settings, all_names, arrays), strict=True))
    lse = results["lse"]
    if settings.finite_lse:
        # A row that sees nothing has -inf, which jax_debug_infs takes for a mistake.
        infinite = jnp.isinf(lse)
        lse = jnp.where(infinite, 0, lse), infinite & (lse > 0), infinite & (lse < 0)
    # The arrays as they came: else what is kept of an eager call is a result, which JAX may look at.
    return tuple(results[name] for name in names), (arrays, results["out"], lse, wanted)


def _attention_bwd(settings: _Settings, names: tuple[str, ...], residuals: Any, cotangents: Any) -> Any:
    arrays, out, lse, wanted = residuals
    if settings.finite_lse:
        lse, above, below = lse
        lse = jnp.where(above, np.inf, jnp.where(below, -np.inf, lse)).astype(lse.dtype)
    given = {
        "d" + name: x
        for name, x in zip(names, cotangents, strict=True)
        if not isinstance(x, jax.custom_derivatives.SymbolicZero)
    }
    if "dweights" in given:
        raise ValueError("return_weights: the weights have no gradient; compute them by jax.numpy for that")
    full = _with_all_axes(settings, arrays)
    shapes = {name: x.shape for name, x in _result_types(settings, ("out", "lse"), full).items()}
    rows = {"out": out, "lse": lse, "dout": jnp.zeros_like(out), **given}
    rows = {name: x.reshape(shapes[name.removeprefix("d")]) for name, x in rows.items()}
    if settings.out_dtype is not None:  # the backward pass takes q's
        rows |= {name: rows[name].astype(full["q"].dtype) for name in ("out", "dout")}
        settings = _without_out_dtype(settings)
    side = tuple("d" + name for name in sorted(wanted))
    gradients = _call(_BACKWARD, settings, ("dq", "dk", "dv", *side), {**full, **rows})
    # Zeros that nobody reads where no gradient is wanted: jax 0.6 to 0.8 want one pytree always.
    for name in _SIDE & arrays.keys() - wanted.keys():
        gradients["d" + name] = jnp.zeros_like(arrays[name])
    return (
        {
            name: gradients["d" + name].reshape(x.shape) if "d" + name in gradients else None
            for name, x in arrays.items()
        },
    )


_attention.defvjp(_attention_fwd, _attention_bwd, symbolic_zeros=True)


def _without_out_dtype(settings: _Settings) -> _Settings:
    return settings._replace(attributes=tuple(x for x in settings.attributes if x[0] != "out_dtype"), out_dtype=None)


# ---- axes -------------------------------------------------------------------------------------------
def _with_all_axes(settings: _Settings, arrays: _Arrays) -> _Arrays:
    """q, k, v, mask and bias with four axes; packed entries have none for a batch."""
    if "cu_q" in arrays:
        return arrays
    rank = arrays["q"].ndim
    head = 1 if settings.layout == "bhsd" else 2
    missing = {2: (0, head), 3: (0,), 4: ()}[rank]
    axes = dict.fromkeys("qkv", missing)
    axes |= {name: tuple(range(4 - arrays[name].ndim)) for name in ("mask", "bias") if name in arrays}
    return {name: jnp.expand_dims(x, axes.get(name, ())) for name, x in arrays.items()}


# ---- the call of the handler ------------------------------------------------------------------------
def _result_types(settings: _Settings, names: tuple[str, ...], operands: _Arrays) -> _Arrays:
    """Shape and dtype of each result; q, k, v have four axes, or three of packed entries."""
    q, k, v = operands["q"], operands["k"], operands["v"]
    seq, head = (-3, -2) if settings.layout == "bshd" else (-2, -3)
    rows = (*q.shape[:-3], q.shape[head], q.shape[seq])
    stats = np.float64 if q.dtype == np.float64 else np.float32
    types = {
        "out": _Struct((*q.shape[:-1], v.shape[-1]), settings.out_dtype or q.dtype),
        "lse": _Struct(rows, stats),
        "weights": _Struct((*rows, k.shape[seq]), stats),
    }
    types |= {"d" + name: _Struct(x.shape, x.dtype) for name, x in operands.items()}
    return {name: types[name] for name in names}


def _call(target: str, settings: _Settings, names: tuple[str, ...], operands: _Arrays) -> _Arrays:
    @custom_vmap
    def call(operands: _Arrays) -> _Arrays:
        types = _result_types(settings, names, operands)
        function = jax.ffi.ffi_call(target, tuple(types.values()), vmap_method="sequential")
        attributes = {"operands": " ".join(operands), "results": " ".join(names), **dict(settings.attributes)}
        return dict(zip(names, function(*operands.values(), **attributes), strict=True))

    @call.def_vmap
    def batched_call(size: int, batched: Any, operands: _Arrays) -> tuple[_Arrays, dict[str, bool]]:
        mapped = {name for name, is_mapped in batched[0].items() if is_mapped}
        one = {name: _Struct(x.shape[name in mapped :], x.dtype) for name, x in operands.items()}
        if _can_fold(settings, names, mapped, one):
            results = call(_fold(size, names, mapped, operands, one["q"].shape[0]))
            types = _result_types(settings, names, one)
            results = {name: x.reshape(size, *types[name].shape) for name, x in results.items()}
        else:
            shared = {name: x for name, x in operands.items() if name not in mapped}
            results = jax.lax.map(
                lambda entry: call({name: {**shared, **entry}[name] for name in operands}),
                {name: operands[name] for name in operands if name in mapped},
            )
        return results, dict.fromkeys(names, True)

    @jax.custom_jvp
    def underived_call(operands: _Arrays) -> Any:
        return call(operands)

    @underived_call.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError("fastattn.jax.mha: there are first derivatives only, by jax.grad or jax.vjp")

    results: _Arrays = underived_call(operands)
    return results


# ---- jax.vmap ---------------------------------------------------------------------------------------
# The mapped axis joins the batch axis of one call where that computes what one call for each entry would;
# elsewhere there is one call after the other.
def _can_fold(settings: _Settings, names: tuple[str, ...], mapped: set[str], one: _Arrays) -> bool:
    batch = one["q"].shape[0]
    # The mask depends on the place in the batch; bounds and lists of keys are of one call.
    if settings.dropout > 0 or "cu_q" in one or "mask_lists" in one:
        return False
    if "sinks" in mapped or "dsinks" in names:  # sinks have no batch axis
        return False
    # A gradient that is summed over the batch, but not over the mapped axis.
    summed = {"dbias": "bias" in one and one["bias"].shape[0] != batch}
    summed["dalibi_slopes"] = "alibi_slopes" in one and one["alibi_slopes"].ndim == 1 and batch != 1
    return not any(summed.get(name) for name in names)


def _fold(size: int, names: tuple[str, ...], mapped: set[str], operands: _Arrays, batch: int) -> _Arrays:
    def fold(name: str, x: Any) -> Any:
        shape = x.shape[name in mapped :]  # of one entry
        per_entry = name in mapped or "d" + name in names
        if name == "sinks" or (name == "q_offset" and shape == () and not per_entry):
            return x
        if name == "alibi_slopes" and len(shape) == 1:
            if not per_entry:
                return x
            shape = (1, *shape)
        elif name in ("mask", "bias") and shape[0] == 1 and not per_entry:
            return x
        elif name == "q_offset" and shape == ():
            shape = (1,)
        x = x.reshape(size if name in mapped else 1, *shape)
        x = jnp.broadcast_to(x, (size, batch, *shape[1:]))
        return x.reshape(size * batch, *shape[1:])

    return {name: fold(name, x) for name, x in operands.items()}
