"""Attention and mask functions for Transformers 5: a model computes with them what it computes in "eager"."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
from typing import Any

import torch
from torch import Tensor

from fastattn.torch._mha import mha

try:
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.masking_utils import (
        AttentionMaskInterface,
        bidirectional_mask_function,
        causal_mask_function,
        prepare_padding_mask,
        sdpa_mask,
    )
except ImportError as error:
    raise ImportError(f"fastattn.torch.register needs transformers>=5,<6: {error}") from error
_active_collector: Any = None
with contextlib.suppress(ImportError):  # a private name
    from transformers.utils import output_capturing

    _active_collector = getattr(output_capturing, "_active_collector", None)

_ATTRIBUTE = "_fastattn_structure"  # of a mask that `mask` made
_GUARDED = "_fastattn_names"  # of the check that `register` puts in front of Transformers' own
_jit: Any = torch.jit  # in part without types

# Keywords that models hand to every implementation, or their callers through it (batches of collators and tokenizers,
# documented keywords), and that may be ignored. Any other is an error.
_REASONS = {
    "the mask has it": "sliding_window cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k cache_position",
    "the queries and keys are rotated, and the mask has packed sequences": "position_ids",
    "fastattn always is": "deterministic",
    "of the loss": "num_items_in_batch shift_labels",
    "of the model's forward pass; attention does not depend on it":
        "output_hidden_states output_router_logits return_dict",
    "the keys and values of the cache are in key and value": "use_cache",
    "of the model's caller; where attention depends on it, the mask has it":
        "length mm_token_type_ids return_loss special_tokens_mask token_type_ids",
    "of convolutions and state-space layers; the mask has packed sequences": "seq_idx",
}  # fmt: skip
_IGNORED = {name: reason for reason, names in _REASONS.items() for name in names.split()}
# Modules whose weights in "eager" are those without the sinks, which scale the output alone.
_WEIGHTS_WITHOUT_SINKS = frozenset({"GraniteSWAAttention", "GraniteMoeSWAAttention"})


def register(name: str) -> None:
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    _guard(name)


# ---- which models ------------------------------------------------------------------------------------


def _guard(name: str) -> None:
    """Has Transformers' check of ``attn_implementation`` refuse `name` for models that would not call us.

    It runs in the constructor of every model and of every model within one, and when the implementation is
    set later. For an implementation that was registered it only looks whether the name is known.
    """
    models: Any = PreTrainedModel
    check = models.get_correct_attn_implementation
    if not hasattr(check, _GUARDED):
        check = _guarded(check)
        models.get_correct_attn_implementation = check
    getattr(check, _GUARDED).add(name)


def _guarded(check: Any) -> Any:
    names: set[str] = set()

    @functools.wraps(check)
    def get_correct_attn_implementation(self: Any, *args: Any, **keywords: Any) -> Any:
        result = check(self, *args, **keywords)
        if result in names:
            kind = type(self)
            if not _calls_interface(kind):
                why = "computes attention by itself, without Transformers' AttentionInterface"
                raise ValueError(_refusal(kind.__name__, result, why))
            for base in kind.__mro__:
                _watch_tables(vars(sys.modules.get(base.__module__, object)), names)
        return result

    setattr(get_correct_attn_implementation, _GUARDED, names)
    return get_correct_attn_implementation


class _Table(dict[str, Any]):
    """Classes of attention by the name of an implementation, as some models have them."""

    names: frozenset[str] | set[str] = frozenset()

    def __missing__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        why = f"has {self['eager'].__name__} for {', '.join(self)} only"
        raise ValueError(_refusal((_under_construction() or ["this model"])[-1], name, why))


def _watch_tables(beside: Any, names: set[str]) -> None:
    """Has a model's tables of attention classes refuse our names by a message, where it would be a KeyError.

    Only the lookup itself tells which of the model's configs decides.
    """
    for key, table in list(beside.items()):
        if key.endswith("ATTENTION_CLASSES") and isinstance(table, dict) and "eager" in table:
            if not isinstance(table, _Table):
                table = beside[key] = _Table(table)
            table.names = names


def _refusal(model: str, name: str, why: str) -> str:
    outer = next((x for x in _under_construction() if x != model), None)
    within = "" if outer is None else f" of {outer}"
    # Of a model of several parts, the key "" is the outermost.
    parts = {"": "eager", "<the key of another part>": name}
    if outer is not None:
        parts = {"": name, "<the key of its config>": "eager"}
    return (
        f'attn_implementation: {model}{within} {why}, and would never call "{name}"; use '
        'attn_implementation="eager". In a model of several parts each may have its own: '
        f"attn_implementation={json.dumps(parts)}"
    )


def _under_construction() -> list[str]:
    """The models whose constructors are running, from the outermost on."""
    found: list[str] = []
    frame = inspect.currentframe()
    while frame is not None:
        model = frame.f_locals.get("self") if frame.f_code.co_name == "__init__" else None
        if isinstance(model, PreTrainedModel) and type(model).__name__ not in found:
            found.insert(0, type(model).__name__)
        frame = frame.f_back
    return found


def _calls_interface(model: type) -> bool:
    """Whether the modules of attention beside this class look up their function in the AttentionInterface.

    Of the classes of Transformers among its bases, the first with attention beside it decides. Without any it
    is a model of other models, which are asked in turn, or has no attention.
    """
    for base in model.__mro__:
        beside = vars(sys.modules.get(base.__module__, object))
        own = [
            x for x in beside.values()
            if isinstance(x, type) and issubclass(x, torch.nn.Module) and x.__module__ == base.__module__
            and "Attention" in x.__name__
        ]  # fmt: skip
        # Beside a user's class may be any module. Where such a model never calls us, it has eager's mask.
        if own and (any(map(_calls, own)) or base.__module__.partition(".")[0] == "transformers"):
            return any(map(_calls, own))
    return True


def _calls(attention_class: type) -> bool:
    for base in attention_class.__mro__:
        if base.__module__.partition(".")[0] == "torch":
            continue
        beside = vars(sys.modules.get(base.__module__, object))
        if any(isinstance(x, AttentionInterface) for x in beside.values()):
            return True
        forward: Any = vars(base).get("forward")
        while hasattr(forward, "__wrapped__"):
            forward = forward.__wrapped__
        names = getattr(getattr(forward, "__code__", None), "co_names", ())
        if "ALL_ATTENTION_FUNCTIONS" in names or "AttentionInterface" in names:
            return True
    return False


# ---- attention ---------------------------------------------------------------------------------------


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    output_attentions: bool | None = False,
    cache: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a model calls: query (B,Hq,Sq,D), key and value (B,Hkv,Sk,D) to (B,Sq,Hq,Dv).

    The mask is complete, sliding window included. Without one, a causal module sees keys from the top left,
    as in ``scaled_dot_product_attention``, if there are as many as queries. `s_aux` are the sinks of the
    heads, `sinks` (B,Hq,Sq,1) those of every query. `indices` (B,Sq,n) are the only keys that a query may
    see, and `block_indices` the blocks of keys.
    """
    if cache is not None:
        raise ValueError("fastattn: continuous batching (a paged cache) is not supported; use sdpa for it")
    for name, other in others.items():
        if other is not None and name not in _IGNORED:
            raise ValueError(
                f"{name}: {_name(module)} or its caller hands this keyword on, and fastattn does not know "
                'it; use attn_implementation="eager"'
            )
    n_batch = max(x.shape[0] for x in (query, key, value))
    # Learned queries, which the whole batch shares.
    query, key, value = (x.expand(n_batch, *x.shape[1:]) if x.shape[0] == 1 else x for x in (query, key, value))
    if block_indices is not None:
        attention_mask = _mask_of_blocks(module, query, key, attention_mask, block_indices, others)
    keywords = _keywords(module, query, key, attention_mask, is_causal)
    if indices is not None:
        chosen = _mask_of_indices(module, query, key, indices)
        keywords["mask"] = chosen & keywords["mask"] if "mask" in keywords else chosen
    if position_bias is not None:
        keywords["bias"] = position_bias + keywords["bias"] if "bias" in keywords else position_bias
    wanted = _weights_wanted(output_attentions)
    bare = wanted and s_aux is not None and any(x.__name__ in _WEIGHTS_WITHOUT_SINKS for x in type(module).__mro__)
    if bare and s_aux is not None and sinks is None:
        sinks = s_aux.view(1, -1, 1, 1).expand(*query.shape[:3], 1)
        s_aux = None
    out, lse, *weights = mha(
        *(x.transpose(1, 2) for x in (query, key, value)),
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
        return_lse=True,
        return_weights=wanted,
        **keywords,
    )
    if sinks is not None:
        if sinks.shape != (*lse.shape, 1):
            expected = f"(B, Hq, Sq, 1), here {(*lse.shape, 1)}"
            raise ValueError(f"sinks: expected {expected}, got {tuple(sinks.shape)} from {_name(module)}")
        # exp(lse) is the denominator without the sink: the sink's share is taken off all weights alike.
        share = torch.sigmoid(lse - sinks[..., 0].to(lse.dtype)).unsqueeze(-1)
        out = (out * share.transpose(1, 2)).to(out.dtype)
        if not bare:
            weights = [x * share.detach() for x in weights]
    return out, weights[0].to(query.dtype) if wanted else None


def _weights_wanted(output_attentions: bool | None) -> bool:
    """Asked for in the call, or by a model that records what its modules return."""
    if output_attentions or _active_collector is None:
        return bool(output_attentions)
    if torch.compiler.is_compiling() and not getattr(_active_collector, "compiling", False):
        return False  # a layer compiled by itself cannot read a context variable
    recorded = _active_collector.get()
    return recorded is not None and any("attentions" in key for key in recorded)


def _name(module: torch.nn.Module) -> str:
    return type(module).__name__


def _keywords(
    module: torch.nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, is_causal: bool | None
) -> dict[str, Any]:
    """Keywords of `mha` for the mask."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # The length comes first: the other way round a compiled model gets a SymBool.
        if n_queries > 1 and causal:
            if n_queries != n_keys:
                raise ValueError(
                    f"attention_mask: {_name(module)} is causal and gave no mask for {n_queries} queries and "
                    f"{n_keys} keys, which does not say where the queries stand; use "
                    'attn_implementation="eager"'
                )
            return {"causal": True, "q_offset": 0}
        return {}
    known = _structure_of(attention_mask)
    if known is not None and attention_mask.shape[-2:] == (n_queries, n_keys):
        return known
    if attention_mask.dtype == torch.bool:
        return {"mask": attention_mask}
    # Promoted as in a sum with the scores.
    exact = attention_mask.dtype in (query.dtype, torch.float32) and query.dtype != torch.float64
    return {"bias": attention_mask if exact else attention_mask.to(query.dtype)}


def _mask_of_indices(module: torch.nn.Module, query: Tensor, key: Tensor, indices: Tensor) -> Tensor:
    if indices.dim() != 3 or indices.shape[:2] != (query.shape[0], query.shape[2]):
        expected = f"(B, Sq, n), here {(query.shape[0], query.shape[2])} and n"
        raise ValueError(f"indices: expected {expected}, got {tuple(indices.shape)} from {_name(module)}")
    chosen = torch.zeros(*indices.shape[:2], key.shape[2], dtype=torch.bool, device=key.device)
    return chosen.scatter(-1, indices.long(), True).unsqueeze(1)


def _mask_of_blocks(
    module: Any, query: Tensor, key: Tensor, attention_mask: Tensor | None, blocks: Tensor, others: dict[str, Any]
) -> Tensor:
    """As the model makes it for "eager" (MiniMax M3)."""
    make = getattr(getattr(module, "indexer", None), "build_block_mask", None)
    if make is None:
        raise ValueError(
            f'block_indices: {_name(module)} has no indexer.build_block_mask; use attn_implementation="eager"'
        )
    positions = others.get("position_ids")
    n_queries, n_keys = query.shape[2], key.shape[2]
    if positions is None:
        positions = torch.arange(n_keys - n_queries, n_keys, device=query.device)
    positions = positions if positions.dim() > 1 else positions.unsqueeze(0)
    made: Tensor = make(blocks, attention_mask, n_keys, query.dtype, query.device, positions.expand(query.shape[0], -1))
    return made == 0


# ---- masks -------------------------------------------------------------------------------------------


def mask(*, dtype: torch.dtype = torch.float32, **keywords: Any) -> Tensor:
    """The mask of ``eager``, (B,1,Sq,Sk), 0 or the least number of `dtype`; never None.

    A model may slice it, add to it, or add it to scores of its own. An untouched one carries its pattern, by
    which `attention` computes: causality, window and a mask of keys, (B,1,1,Sk), which skips what is not
    attended, or else the bool mask.
    """
    keywords |= {"allow_is_bidirectional_skip": False}
    # A trace must not depend on values.
    traced = torch.compiler.is_compiling() or _jit.is_tracing()
    structure = None if traced or "q_offset" not in keywords else _structure(**keywords)  # older: cache_position
    keywords["allow_is_causal_skip"] = False
    make: Any = sdpa_mask  # in part without types
    if traced:
        return _added(make(**keywords).to(torch.bool), dtype)
    with torch.inference_mode(False):  # a tensor made in inference mode does not count its changes
        allowed = make(**keywords).to(torch.bool)
        made = _added(allowed, dtype)
    if type(made) is Tensor and not made.is_inference():  # no fake tensor
        setattr(made, _ATTRIBUTE, (made._version, {"mask": allowed} if structure is None else structure))
    return made


def _added(allowed: Any, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, torch.finfo(dtype).min)


def _structure(
    *,
    q_length: int,
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
        first = q_offset - kv_offset
        keywords = {"causal": True, "q_offset": first}
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
        elif q_length == 1 and isinstance(first, int) and first >= kv_length - 1:
            keywords = {}  # the next token sees all keys
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        keys = padding[:, kv_offset : kv_offset + kv_length]
        if not keys.all():
            # A copy: the caller may write to its own before the backward pass.
            keywords["mask"] = keys[:, None, None, :].to(torch.bool, copy=True)
    return keywords


def _structure_of(attention_mask: Tensor) -> dict[str, Any] | None:
    """The pattern of this very tensor, unless it was changed since; a copy or a view carries none."""
    if torch.compiler.is_compiling():
        return None
    known = getattr(attention_mask, _ATTRIBUTE, None)
    return dict(known[1]) if known is not None and known[0] == attention_mask._version else None
