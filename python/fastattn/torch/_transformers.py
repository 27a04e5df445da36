"""Attention and mask functions for Transformers 5, by the conventions of its ``sdpa`` implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.torch._mha import mha

try:
    from transformers import AttentionInterface
    from transformers.masking_utils import (
        AttentionMaskInterface,
        bidirectional_mask_function,
        causal_mask_function,
        prepare_padding_mask,
        sdpa_mask,
    )
except ImportError as error:
    raise ImportError(f"fastattn.torch.register needs transformers>=5,<6: {error}") from error

_ATTRIBUTE = "_fastattn_structure"  # of a mask that `mask` made
_jit: Any = torch.jit  # in part without types


def register(name: str) -> None:
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = False,
    cache: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a model calls: query (B,Hq,Sq,D), key and value (B,Hkv,Sk,D) to (B,Sq,Hq,Dv).

    The mask is complete, sliding window included. Without one, a causal module of more than one query sees
    keys from the top left, as in ``scaled_dot_product_attention``. `s_aux` are the sinks.
    """
    if cache is not None:
        raise ValueError("fastattn: continuous batching (a paged cache) is not supported; use sdpa for it")
    keywords: dict[str, Any] = {}
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # The length comes first: the other way round a compiled model gets a SymBool.
        if query.shape[2] > 1 and causal:
            keywords = {"causal": True, "q_offset": 0}
    elif attention_mask.dtype == torch.bool:
        keywords = _structure_of(attention_mask) or {"mask": attention_mask}
    else:
        keywords = {"bias": attention_mask}
    if position_bias is not None:
        keywords["bias"] = position_bias + keywords["bias"] if "bias" in keywords else position_bias
    results = mha(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
        seed=torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu") if dropout > 0.0 else 0,
        return_lse=True,
        return_weights=bool(output_attentions),
        **keywords,
    )
    return results[0], results[2].to(query.dtype) if output_attentions else None


# ---- masks -------------------------------------------------------------------------------------------


def mask(**keywords: Any) -> Any:
    """The mask of ``sdpa``: None where `is_causal` says it all, else bool (B,1,Sq,Sk).

    Where the pattern is known, the tensor carries it: `attention` then computes by causality, window and a
    mask of keys, (B,1,1,Sk), which skips what is not attended.
    """
    if torch.compiler.is_compiling() or _jit.is_tracing():
        return sdpa_mask(**keywords)  # a trace must not depend on values
    with torch.inference_mode(False):  # a tensor made in inference mode does not count its changes
        made: Any = sdpa_mask(**keywords)
    if type(made) is Tensor and not made.is_inference() and made.shape[-2] > 1:  # no fake tensor
        structure = _structure(**keywords) if "q_offset" in keywords else None  # older: cache_position
        if structure is not None:
            setattr(made, _ATTRIBUTE, (made._version, structure))
    return made


def _structure(
    *,
    kv_length: int,
    q_offset: Any,
    kv_offset: int,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    local_size: Any = None,
    allow_is_causal_skip: bool = False,
    config: Any = None,
    **_: Any,
) -> dict[str, Any] | None:
    """Keywords of `mha` for the pattern that the arguments of a mask function describe, if they are one."""
    keywords: dict[str, Any] = {}
    if mask_function is not bidirectional_mask_function:
        keywords = {"causal": True, "q_offset": q_offset - kv_offset}
        if mask_function is not causal_mask_function:
            # local_size is the sliding window or the size of a chunk; any further condition forbids the skip.
            is_window = (
                allow_is_causal_skip
                and local_size is not None
                and local_size == getattr(config, "sliding_window", None)
                and getattr(config, "attention_chunk_size", None) is None
            )
            if not is_window:
                return None
            keywords["window"] = local_size - 1, None
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        keys = padding[:, kv_offset : kv_offset + kv_length]
        if not keys.all():
            keywords["mask"] = keys[:, None, None, :]
    return keywords


def _structure_of(attention_mask: Tensor) -> dict[str, Any]:
    """The pattern of this very tensor, unless it was changed since; a copy or a view carries none."""
    if torch.compiler.is_compiling():
        return {}
    known = getattr(attention_mask, _ATTRIBUTE, None)
    return dict(known[1]) if known is not None and known[0] == attention_mask._version else {}
