"""`fastattn.mha` and `fastattn.mha_varlen` for tensors."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastattn._arguments import OPTIONS
from fastattn.masks import Mask
from fastattn.torch._ops import LEARNED, call

_DTYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


def mha(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str = "bshd",
    scale: float | Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: int | Tensor | None = None,
    mask: Tensor | Mask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | Tensor | None = None,
    sinks: Tensor | None = None,
    q_lens: Tensor | None = None,
    kv_lens: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    out_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    kernel: str | None = None,
) -> Any:
    """`fastattn.mha` for tensors, with gradients.

    Differentiable once in q, k, v, bias, alibi_slopes, sinks, scale and softcap. Gradients also flow through
    ``lse``, not through ``weights``. Under ``torch.autocast`` q, k and v are cast to its dtype, unless they
    are float64.

    Parameters
    ----------
    q, k, v : Tensor of float64, float32, float16 or bfloat16
        (B, Sq, Hq, D), (B, Sk, Hkv, D), (B, Sk, Hkv, Dv); ``layout="bhsd"``, three axes and two as in
        `fastattn.mha`. Hq is a multiple of Hkv. Any strides; none is copied.
    layout, causal, window, dropout, device, kernel
        As in `fastattn.mha`.
    scale, softcap : float or Tensor of one element, optional
        As in `fastattn.mha`. A tensor that requires grad gets one; that of softcap takes a second pass over
        the pairs, by plain operations in float64.
    q_offset : int or integer Tensor () or (B,), optional
    mask : bool Tensor, broadcastable to (B, Hq, Sq, Sk), or a Mask of `fastattn.masks`, optional
        A padding mask (B, Sk) goes in as ``mask[:, None, None, :]``.
    bias : Tensor of q's or lse's dtype, broadcastable to (B, Hq, Sq, Sk), optional
        Its gradient is computed only where it requires one.
    alibi_slopes : float Tensor (Hq,) or (B, Hq), optional
    sinks : float Tensor (Hq,), optional
    q_lens, kv_lens : integer Tensor (B,), optional
    seed : int or integer Tensor (), optional
        Of the dropout. None: drawn from PyTorch's default CPU generator in every call that drops anything, so
        that ``torch.manual_seed`` repeats it. A tensor makes a compiled function draw anew without being
        compiled anew.
    return_lse, return_weights : bool
    out_dtype : torch.dtype, optional
        float32 for q of 16 bits: out is not rounded, for `fastattn.merge_states`. Its gradient is rounded to
        q's dtype.

    Returns
    -------
    out : Tensor
        q's dtype (or out_dtype), device and layout, contiguous; its last axis is Dv.
    lse : Tensor (B, Hq, Sq), only with ``return_lse``
        float64 for float64, else float32.
    weights : Tensor (B, Hq, Sq, Sk), only with ``return_weights``
        As lse, before dropout; it does not require grad. With either of the two the result is a tuple.

    Raises
    ------
    TypeError
        Not a tensor, a dtype that is not supported, dtypes that differ; nested and sparse tensors.
    ValueError, fastattn.UnsupportedError, fastattn.CudaError, MemoryError
        As `fastattn.mha`.
    RuntimeError
        In the backward pass: a second derivative was asked for.
    NotImplementedError
        Forward-mode differentiation.

    Notes
    -----
    The operators are ``torch.ops.fastattn.mha`` and ``torch.ops.fastattn.mha_backward``: ``torch.compile``
    traces them without a break, ``torch.vmap`` calls them once per entry. The backward pass computes the
    weights again from lse [1]_.

    References
    ----------
    .. [1] Dao et al.: FlashAttention, NeurIPS 2022, algorithm 4.

    Examples
    --------
    >>> import torch, fastattn.torch
    >>> q = torch.randn(1, 128, 8, 64, requires_grad=True)
    >>> fastattn.torch.mha(q, q, q, causal=True).sum().backward()
    >>> q.grad.shape
    torch.Size([1, 128, 8, 64])
    """
    # TorchDynamo does not trace locals().
    return _attend(mha, {
        "q": q, "k": k, "v": v, "layout": layout, "scale": scale, "causal": causal, "window": window,
        "q_offset": q_offset, "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "softcap": softcap,
        "sinks": sinks, "q_lens": q_lens, "kv_lens": kv_lens, "dropout": dropout, "seed": seed,
        "return_lse": return_lse, "return_weights": return_weights, "out_dtype": out_dtype, "device": device,
        "kernel": kernel,
    })  # fmt: skip


def mha_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_kv: Tensor | None = None,
    *,
    layout: str = "bshd",
    scale: float | Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: int | Tensor | None = None,
    mask: Tensor | Mask | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lens: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    kernel: str | None = None,
) -> Any:
    """`fastattn.mha_varlen` for tensors, with gradients as those of `mha`.

    Parameters
    ----------
    q, k, v : Tensor of float64, float32, float16 or bfloat16
        (Tq, Hq, D), (Tk, Hkv, D), (Tk, Hkv, Dv): the rows and keys of all entries; heads first with
        ``layout="bhsd"``.
    cu_q, cu_kv : integer Tensor (B + 1,)
        Entry b has the rows ``cu_q[b]:cu_q[b + 1]`` and the keys of cu_kv, by default cu_q.
    mask, bias : Tensor, broadcastable to (Hq, Tq, Tk), optional
        mask: or a Mask of `fastattn.masks`, whose rows are the packed ones.
    q_offset, kv_lens, alibi_slopes
        Of each entry: int or (B,), (B,), (Hq,) or (B, Hq).
    layout, scale, causal, window, softcap, sinks, dropout, seed, return_lse, out_dtype, device, kernel
        As in `mha`. A softcap that requires grad is refused in the backward pass.

    Returns
    -------
    out : Tensor (Tq, Hq, Dv), in q's layout
    lse : Tensor (Hq, Tq), only with ``return_lse``

    Raises
    ------
    TypeError, ValueError, fastattn.UnsupportedError, fastattn.CudaError, MemoryError, RuntimeError
        As `mha`.

    Examples
    --------
    >>> import torch, fastattn.torch
    >>> q = torch.randn(6, 8, 64, requires_grad=True)
    >>> fastattn.torch.mha_varlen(q, q, q, torch.tensor([0, 1, 4, 6])).sum().backward()
    """
    return _attend(mha_varlen, {
        "q": q, "k": k, "v": v, "cu_q": cu_q, "cu_kv": cu_kv, "layout": layout, "scale": scale,
        "causal": causal, "window": window, "q_offset": q_offset, "mask": mask, "bias": bias,
        "alibi_slopes": alibi_slopes, "softcap": softcap, "sinks": sinks, "kv_lens": kv_lens,
        "dropout": dropout, "seed": seed, "return_lse": return_lse, "out_dtype": out_dtype, "device": device,
        "kernel": kernel,
    })  # fmt: skip


def _attend(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Either function; `given`: its arguments by name."""
    tensors = tuple(given.values())
    if has_torch_function(tensors):
        return handle_torch_function(function, tensors, **given)
    q, k, v = checked(TypeError, q=given["q"], k=given["k"], v=given["v"])
    given["seed"] = _seed(given["seed"], number("dropout", given["dropout"]))
    made = _options(given, q)
    for name in ("cu_q", "cu_kv") if "cu_q" in given else ():
        if (x := given[name]) is not None or name == "cu_q":
            check_side(TypeError, name, x, q)
            made[name] = x
    return_lse, return_weights = given["return_lse"], given.get("return_weights", False)
    made |= {"q": q, "k": k, "v": v, "return_weights": _flag("return_weights", return_weights)}
    if (dtype := given["out_dtype"]) is not None:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"out_dtype: expected a torch.dtype, got {type(dtype).__name__}")
        made["out_dtype"] = dtype
    out, lse, weights = call(made)
    if not (return_lse or return_weights):
        return out
    return (out, *((lse,) if return_lse else ()), *((weights,) if return_weights else ()))


def checked(wrong: type[Exception], **tensors: Any) -> list[Tensor]:
    """The tensors, cast by autocast. `wrong` is raised for dtypes or devices that differ."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.is_nested or x.layout != torch.strided:
            kind = "a nested one; pad it and mask the padding" if x.is_nested else x.layout
            raise TypeError(f"{name}: expected a dense tensor, got {kind}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16, got {x.dtype}")
    results = list(tensors.values())
    first = results[0]
    kind = first.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        # PyTorch's own operators leave float64 as it is, too.
        results = [x if x.dtype == torch.float64 else x.to(dtype) for x in results]
        first = results[0]
    dtype, device = first.dtype, first.device
    for name, x in zip(tensors, results, strict=True):
        if x.dtype != dtype or x.device != device:
            expected = f"{dtype} on {device}, as the first one"
            raise wrong(f"{name}: expected {expected}, got {x.dtype} on {x.device}")
    return results


def check_side(wrong: type[Exception], name: str, x: Any, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
    # A number of the host goes with any device, as in PyTorch.
    if x.device != q.device and (x.dim() or not x.is_cpu):
        raise wrong(f"{name}: expected a tensor on {q.device}, as the first one, got {x.device}")


def _options(given: dict[str, Any], q: Tensor) -> dict[str, Any]:
    """The options of `mha` as those of the operators; what has its default is left out."""
    made: dict[str, Any] = {}
    for name, kind, default in _OPTIONS:
        x = given.get(name, default)
        if x is default:
            continue
        if name == "mask" and isinstance(x, Mask):
            made["mask_lists"] = _words_of(x)
            continue
        if kind == "array":
            check_side(TypeError, name, x, q)
            made[name] = x
        elif name in LEARNED:
            made[name], made[f"{name}_tensor"] = learned_number(name, x, q)
        elif kind == "integer" and isinstance(x, Tensor):
            check_side(TypeError, name, x, q)
            made[f"{name}_tensor"] = x
        elif kind == "window":
            made[f"{name}_left"], made[f"{name}_right"] = _pair(x)
        else:
            made[name] = _CONVERT[kind](name, x)
    return made


def _words_of(mask: Mask) -> Tensor:
    return torch.as_tensor(np.array(mask._fastattn_words))


def _seed(seed: Any, dropout: float) -> int | Tensor:
    """An int64 or a tensor; drawn where it is None and matters."""
    if seed is None:
        return drawn_seed() if dropout else 0
    if isinstance(seed, Tensor):
        if seed.dim() or seed.is_floating_point():
            got = f"{seed.dtype} {tuple(seed.shape)}"
            raise TypeError(f"seed: expected an int or an integer tensor of shape (), got {got}")
        return seed
    value = integer("seed", seed)
    if not 0 <= value < 2**64:
        raise ValueError(f"seed: expected 0 <= seed < 2**64, got {seed}")
    # The operator's integers have 64 bits and a sign.
    return value if value < 2**63 else value - 2**64


def _flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool):
        raise TypeError(f"{name}: expected a bool, got {type(x).__name__}")
    return x


def _text(name: str, x: Any) -> str:
    if isinstance(x, torch.device) and name == "device":
        return str(x)
    if not isinstance(x, str):
        raise TypeError(f"{name}: expected a str, got {type(x).__name__}")
    return x


def _pair(window: Any) -> tuple[int | None, int | None]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: expected (left, right), got {window!r}")
    left, right = (None if side is None else integer("window", side) for side in window)
    return left, right


def integer(name: str, x: Any) -> int:
    if isinstance(x, int):  # index() would compile its value in
        return x
    try:
        return index(x)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {x!r}") from None


def number(name: str, x: Any) -> float:
    """A float, which alone the dispatcher takes."""
    if type(x) is float:
        return x
    if isinstance(x, Tensor) and x.requires_grad:
        raise TypeError(f"{name}: there is no gradient of it, and this tensor requires one; use {name}.detach()")
    try:
        return float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {x!r}") from None


def learned_number(
    name: str, x: Any, q: Tensor, wrong: type[Exception] = TypeError
) -> tuple[float | None, Tensor | None]:
    """As a number or as a tensor (), one of them None; the operator reads the tensor when it runs."""
    if not isinstance(x, Tensor):
        return None if x is None else number(name, x), None
    check_side(wrong, name, x, q)
    if x.numel() != 1 or x.is_complex():
        got = f"{x.dtype} {tuple(x.shape)}"
        raise TypeError(f"{name}: expected a number or a real tensor of one element, got {got}")
    return None, x.reshape(()) if x.dim() else x


def drawn_seed() -> Tensor:
    """A seed from PyTorch's default CPU generator, which torch.manual_seed and checkpointing control."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


_OPTIONS = tuple((x.name, x.kind, x.default) for x in OPTIONS)
_CONVERT: dict[str, Callable[[str, Any], Any]]
_CONVERT = {"text": _text, "number": number, "flag": _flag, "integer": integer}
