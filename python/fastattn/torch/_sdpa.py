"""``torch.nn.functional.scaled_dot_product_attention`` on top of the operator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastattn.torch._mha import check_side, checked, drawn_seed, learned_number, number
from fastattn.torch._ops import call


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, computed by fastattn.

    Parameters
    ----------
    query : Tensor (..., Hq, L, E)
        Two or more axes; the leading ones of query, key and value broadcast.
    key : Tensor (..., H, S, E)
    value : Tensor (..., H, S, Ev)
    attn_mask : Tensor, broadcastable to (..., Hq, L, S), optional
        bool (True takes part), or added to the scores: of query's dtype or float32.
    dropout_p : float
        0 <= p <= 1. The seed comes from PyTorch's default CPU generator: torch.manual_seed repeats it.
        Applied whenever positive, as there.
    is_causal : bool
        Row i sees keys 0 to i (aligned at the top left). Not together with attn_mask.
    scale : float or Tensor of one element, optional
        Default 1/sqrt(E). A tensor that requires grad gets one.
    enable_gqa : bool
        Query heads share key and value heads, whose numbers divide Hq.

    Returns
    -------
    Tensor (..., Hq, L, Ev)
        Contiguous. A row that may attend nothing is 0.

    Raises
    ------
    RuntimeError
        Where PyTorch raises it: shapes, dtypes or devices that do not fit, attn_mask with is_causal, a
        dropout_p outside [0, 1].
    TypeError
        Not a tensor, or a dtype that is not a float of 16 to 64 bits; nested and sparse tensors.

    Notes
    -----
    NaN and Inf in keys and values that are masked do not reach the result; in PyTorch they do. Gradients,
    autocast, compilation and vmap are those of `mha`.
    """
    tensors = (query, key, value, attn_mask, dropout_p, scale)
    if has_torch_function(tensors):
        return handle_torch_function(
            scaled_dot_product_attention, tensors, query, key, value, attn_mask=attn_mask,
            dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    wanted = getattr(query, "dtype", None)  # before autocast changes it
    query, key, value = checked(RuntimeError, query=query, key=key, value=value)
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise RuntimeError(
            f"query, key, value: expected two axes or more, got {query.dim()}, {key.dim()} and {value.dim()}"
        )
    if key.shape[-1] != query.shape[-1] or value.shape[-2] != key.shape[-2]:
        raise RuntimeError(
            "query, key, value: expected shapes (..., L, E), (..., S, E) and (..., S, Ev), got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    dropped = number("dropout_p", dropout_p)
    if not 0.0 <= dropped <= 1.0:
        raise RuntimeError(f"dropout_p: expected a probability between 0 and 1, got {dropout_p}")
    lead: tuple[int, ...] = query.shape[:-2]
    merge = query.dim() > 4 or not lead == key.shape[:-2] == value.shape[:-2]
    if merge:
        lead, query, key, value = _merged(query, key, value, enable_gqa)
    mask = bias = None
    if attn_mask is not None:
        if is_causal:
            raise RuntimeError("attn_mask: expected None with is_causal=True")
        check_side(RuntimeError, "attn_mask", attn_mask, query)
        scores = (*lead, query.shape[-2], key.shape[-2])
        if not _broadcasts(attn_mask.shape, scores):
            of_keys = attn_mask.shape == (scores[0], scores[-1]) and len(scores) == 4
            hint = "; if its axes are (B, S), pass attn_mask[:, None, None, :]" if of_keys else ""
            raise RuntimeError(
                f"attn_mask: expected a shape that broadcasts to {scores}, got {tuple(attn_mask.shape)}{hint}"
            )
        if merge:
            attn_mask = _merged_mask(attn_mask, lead[:-1])
        if attn_mask.dtype == torch.bool:
            mask = attn_mask
        elif attn_mask.dtype not in _mask_dtypes(wanted, query):
            hint = "" if attn_mask.is_floating_point() else "; use attn_mask.bool()"
            raise RuntimeError(f"attn_mask: expected bool, float32 or {wanted}, got {attn_mask.dtype}{hint}")
        else:
            single = attn_mask.dtype == torch.float32 and query.dtype != torch.float64
            bias = attn_mask if single else attn_mask.to(query.dtype)
    drop = 0.0 < dropped < 1.0
    seed = drawn_seed() if drop else None
    scale, scale_tensor = learned_number("scale", scale, query, RuntimeError)
    given = {
        "q": query, "k": key, "v": value, "mask": mask, "bias": bias, "seed_tensor": seed, "layout": "bhsd",
        "scale": scale, "scale_tensor": scale_tensor, "causal": is_causal,
        "q_offset": 0 if is_causal else None, "dropout": dropped if drop else 0.0,
    }  # fmt: skip
    out: Tensor = call(given)[0]
    if dropped == 1.0:
        out = out * 0.0
    return out.reshape(*lead, *out.shape[-2:]) if merge else out


def _mask_dtypes(wanted: Any, query: Tensor) -> tuple[Any, ...]:
    """Float dtypes that attn_mask may have; autocast casts it too."""
    kind = query.device.type
    cast = kind != "meta" and torch.is_autocast_enabled(kind)
    return (torch.float32, wanted, *((torch.float16, torch.bfloat16) if cast else ()))


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(
        n == 1 or n == m for n, m in zip(reversed(shape), reversed(target), strict=False)
    )


def _merged(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], Tensor, Tensor, Tensor]:
    """The leading axes broadcast, (..., Hq), and the tensors with these merged to (B, H)."""
    broadcast: Any = torch.broadcast_shapes
    leads = [x.shape[:-2] for x in (query, key, value)]
    if enable_gqa:
        if min(map(len, leads)) == 0:
            raise RuntimeError("enable_gqa: expected query, key and value with a head axis")
        outer = broadcast(*(lead[:-1] for lead in leads))
        heads, *shared = (lead[-1] for lead in leads)
        if not heads == shared[0] == shared[1] and any(n == 0 or heads % n for n in shared):
            raise RuntimeError(f"enable_gqa: expected numbers of heads that divide {heads}, got {shared}")
        if shared[0] != shared[1]:  # mha wants one number for both
            key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
        kv_heads = key.shape[-3]
    else:
        *outer, heads = broadcast(*leads)
        # Keys and values that all heads share need not be repeated.
        kv_heads = 1 if all(len(lead) == 0 or lead[-1] == 1 for lead in leads[1:]) else heads
    n_batch = math.prod(outer)

    def merged(x: Tensor, n_heads: int) -> Tensor:
        return x.expand(*outer, n_heads, -1, -1).reshape(n_batch, n_heads, *x.shape[-2:])

    return (*outer, heads), merged(query, heads), merged(key, kv_heads), merged(value, kv_heads)


def _merged_mask(mask: Tensor, outer: tuple[int, ...]) -> Tensor:
    """The mask of (..., Hq, L, S) as one of (B, Hq, L, S); without these axes, it broadcasts over B."""
    if mask.dim() <= 3:
        return mask
    last = mask.shape[-3:]
    if all(n == 1 for n in mask.shape[:-3]):
        return mask.reshape(last)
    return mask.expand(*outer, *last).reshape(math.prod(outer), *last)
