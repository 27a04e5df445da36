#!/usr/bin/env python
"""Every model class of the installed Transformers with attn_implementation="fastattn", beside "eager".

    python tools/walk_models.py [--out FILE] [--merge FILE] [--jobs N] [--all-heads] [MODEL_TYPE ...]

Each class is built tiny, with the same random weights in both, and runs forward without padding and with it
on either side, with output_attentions, as a decoder and as an encoder where the config says which, and
generates where it can. A class is "equal", "refused" by name, "skipped" with the reason (what "eager" cannot
run, or what cannot be built tiny from its config alone), or "wrong". Any "wrong" is exit status 1.

Where float32 is over the tolerance, both run once more in float64. They must agree there, and fastattn's
float32 must be about as near to that as eager's. Then it is rounding; such a class is "equal" with a reason.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import inspect
import json
import multiprocessing
import os
import platform
import re
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_check import checkout_commit, cpu_model, utc_now
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fastattn.torch
from fastattn.torch import _transformers

# Of the largest number of eager's: sums of float32 in another order, through whole models.
TOLERANCE = 5e-4
# In float64. Rounding that grows as much as in Sam2 leaves 1e-8; anything of float32 would be above 1e-6.
TOLERANCE_FLOAT64 = 1e-7
# How much farther than eager's float32 ours may be from float64, where float32 is over the tolerance.
AS_NEAR = 4.0
# Models that put tokens of their own behind those of the text, and how many.
TOKENS_BEHIND = {"VideoPrismTextModel": 1}
BATCH, LENGTH = 2, 12
MOST_PARAMETERS = 60_000_000
IMAGE = 32

SIZES: dict[str, int] = {}
for names, size in (
    ("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers depth "
     "num_decoder_layers text_layers", 2),
    ("num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
     "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads", 4),
    ("hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim emb_dim text_embed_dim "
     "decoder_hidden_size text_hidden_size adapter_in_dim adapter_out_dim out_hidden_size", 32),
    ("intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim moe_intermediate_size "
     "shared_expert_intermediate_size dim_feedforward mlp_dim ffn_hidden_size feed_forward_size", 48),
    ("head_dim d_kv swa_head_dim", 8),
    ("vocab_size vocab_size_per_layer_input", 100),
    ("num_experts n_routed_experts num_local_experts", 4),
    ("num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts experts_per_token", 2),
    ("projection_dim", 16),
    ("q_lora_rank kv_lora_rank", 16),
    ("image_size", IMAGE),
    ("first_k_dense_replace n_group topk_group", 1),
    ("index_topk index_kpool", 4),
):  # fmt: skip
    SIZES |= dict.fromkeys(names.split(), size)
FLOATS = dict.fromkeys(("initializer_range", "init_std", "initializer_factor"), 0.2)
TOKENS = {"eos_token_id": 99, "pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 2}
# What the rules do not find.
SPECIAL: dict[str, dict[str, Any]] = {"gpt_neo": {"attention_types": [[["global", "local"], 1]]}}
KV_HEADS = re.compile("(swa_)?num_(key_value|kv)_heads|n_kv_heads|num_key_value_heads_per_layer")
SHORT_WINDOW = {"sliding_window": 5, "attention_chunk_size": 5}


# ---- tiny models --------------------------------------------------------------------------------------


def tiny(config_class: Any, shrunk: str) -> Any:
    """A config with small sizes; `shrunk` says how much: "all", "equal heads" (of keys and of queries),
    "layers" (and vocabulary), "nothing"."""
    base = config_class()
    asked, equal_heads = shrunk, shrunk == "equal heads"
    shrunk = "all" if equal_heads else shrunk
    given: dict[str, Any] = {}
    known = {key.removeprefix("_") for key in vars(base)} | set(getattr(config_class, "attribute_map", {}))
    for key in known:
        try:
            value = getattr(base, key)
        except Exception:  # some have one in each layer's own config
            continue
        fixed = isinstance(rule := getattr(config_class, key, None), property) and rule.fset is None
        if key in config_class.sub_configs or fixed:
            continue
        number = isinstance(value, int) and not isinstance(value, bool)
        if key in TOKENS:
            given[key] = TOKENS[key]
        elif shrunk != "nothing" and number and key in SIZES and (value > SIZES[key]):
            if shrunk == "all" or "layer" in key or "vocab" in key:
                given[key] = SIZES[key]
        elif key in SHORT_WINDOW and number:
            given[key] = SHORT_WINDOW[key]
        elif shrunk == "all" and number and KV_HEADS.fullmatch(key):
            given[key] = 1 if value == 1 else 4 if equal_heads else 2
        elif key in FLOATS and isinstance(value, float) and value < 0.2:
            given[key] = FLOATS[key]
    types = getattr(base, "layer_types", None)
    if isinstance(types, list) and types and shrunk != "nothing" and not fixed_types(config_class):
        kinds = list(dict.fromkeys(types))
        kinds = kinds if len(kinds) > 1 else kinds * 2
        given["layer_types"] = kinds
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if key in known:
                given[key] = len(kinds)
    per_layer = [
        key for key in known
        if key.endswith(("layer_types", "_pattern", "per_layer")) and key != "layer_types"
        and isinstance(getattr(base, key, None), list)
    ]  # fmt: skip
    for key in per_layer:
        count = given.get("num_hidden_layers", getattr(base, "num_hidden_layers", None))
        if shrunk != "nothing" and count and len(getattr(base, key)) > count:
            given[key] = getattr(base, key)[:count]
    rope = getattr(base, "rope_parameters", None)
    if isinstance(rope, dict) and shrunk == "all":
        rope = copy.deepcopy(rope)
        if rope.get("mrope_section"):
            half = (
                given.get("head_dim", given.get("hidden_size", 64) // given.get("num_attention_heads", 4))
                // 2
            )
            third = max(half // 3, 1)
            rope["mrope_section"] = [half - 2 * third, third, third]
            given["rope_parameters"] = rope
    for key in config_class.sub_configs:
        value = getattr(base, key, None)
        if value is not None:
            given[key] = tiny(type(value), asked).to_dict()
    if shrunk == "all":
        given |= SPECIAL.get(config_class.model_type, {})
    return config_class(**given)


def fixed_types(config_class: Any) -> bool:
    rule = getattr(config_class, "layer_types", None)
    return isinstance(rule, property) and rule.fset is None


def n_parameters(model_class: Any, config: Any) -> int:
    with torch.device("meta"):
        model = model_class._from_config(copy.deepcopy(config), attn_implementation="eager")
    return sum(x.numel() for x in model.parameters())


def build(model_class: Any, config: Any, name: str) -> Any:
    torch.manual_seed(0)
    return model_class._from_config(copy.deepcopy(config), attn_implementation=name).eval()


def shake(model: Any) -> None:
    """So that no weight is the zero or the one that it starts as: gates, sinks, biases."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in model.parameters():
            if x.is_floating_point():
                x.add_(0.05 * torch.randn(x.shape, generator=generator).to(x.dtype))


def inputs(model: Any) -> dict[str, Any]:
    """By the names of what forward takes."""
    generator = torch.Generator().manual_seed(2)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def ids(length: int = LENGTH) -> torch.Tensor:
        made = torch.randint(3, 97, (BATCH, length), generator=generator)
        made[:, -1] = TOKENS["eos_token_id"]  # where some take the features of the text
        return made

    config = model.config
    text = config.get_text_config()

    def find(*names: str, default: int) -> int:
        for one in (config, *(getattr(config, key, None) for key in config.sub_configs)):
            for name in names:
                value = getattr(one, name, None)
                if isinstance(value, (list, tuple)):
                    value = value[0]
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return default

    size = find("image_size", "img_size", default=IMAGE)
    channels = find("num_channels", "in_channels", "in_chans", default=3)
    mels = find("num_mel_bins", "n_mels", "input_feat_per_channel", "feature_size", "mel_bins", default=16)
    width = find("hidden_size", "d_model", default=32)
    frames = 2 * find("max_source_positions", default=20)
    signature = inspect.signature(model.forward).parameters
    required = [
        name for name, x in signature.items()
        if x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD
    ]  # fmt: skip
    have: dict[str, Any] = {
        "input_ids": ids(), "decoder_input_ids": ids(7), "pixel_values": rand(BATCH, channels, size, size),
        "pixel_values_videos": rand(BATCH, find("num_frames", default=4), channels, size, size),
        "input_features": rand(BATCH, mels, frames) if find("max_source_positions", default=0)
        else rand(BATCH, 40, mels),
        "input_values": rand(BATCH, 2000), "audio_values": rand(BATCH, 1, 2000),
        "inputs_embeds": rand(BATCH, LENGTH, width), "hidden_states": rand(BATCH, LENGTH, width),
        "past_values": rand(BATCH, find("context_length", default=32), find("num_input_channels", default=1)),
        "bbox": torch.tensor([1, 2, 30, 40]).expand(BATCH, LENGTH, 4),
        "inputs": ids(), "encoder_hidden_states": rand(BATCH, 9, width),
        "query_embeds": rand(BATCH, 6, width), "visual_embeds": rand(BATCH, 5, width),
        "token_type_ids": torch.zeros(BATCH, LENGTH, dtype=torch.long),
        "target_mask": None,
    }  # fmt: skip
    del text
    main = model.main_input_name
    wanted = [name for name in dict.fromkeys([*required, main]) if name in have or name in required]
    if "pixel_values" in signature and "input_ids" in signature and main == "input_ids":
        kind = type(model).__name__
        if re.search(
            "CLIP|Clip|Align|SigLip|Siglip|Flava|Bridge|Vilt|Owl|Group|Blip(?!2)|Kosmos2Model", kind
        ):
            wanted.append("pixel_values")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in signature:
        wanted.append("decoder_input_ids")
    missing = [name for name in wanted if name not in have]
    if missing:
        raise LookupError(f"no input for {', '.join(missing)}")
    return {name: have[name] for name in dict.fromkeys(wanted)}


# ---- one class ----------------------------------------------------------------------------------------


def tensors(x: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(x, torch.Tensor):
        yield path, x
    elif isinstance(x, dict):
        for key, value in x.items():
            yield from tensors(value, f"{path}.{key}")
    elif isinstance(x, (list, tuple)):
        for i, value in enumerate(x):
            yield from tensors(value, f"{path}.{i}")


class Rows:
    """Which rows of the outputs to compare: those of padding are anything."""

    def __init__(self, real: torch.Tensor | None = None, behind: int = 0) -> None:
        """`real` (B,S) are the tokens that are no padding; `behind` them are more, of the model's own."""
        if real is not None and behind:
            real = torch.cat([real, real.new_ones(len(real), behind)], 1)
        self.real = real
        self.behind = behind

    def of(self, path: str, x: torch.Tensor) -> torch.Tensor:
        """In float64."""
        real = self.real
        x = x.double()
        if real is None:
            return x
        if path.endswith("pooler_output") and not real[:, -1 if self.behind else 0].all():
            return x[:0]  # of a row of padding
        length = real.shape[1]
        if x.dim() == 4 and x.shape[-2:] == (length, length):
            return x * real[:, None, :, None] if x.shape[0] == len(real) else x
        dropped = [] if self.behind else [length - 1]  # some drop the first one
        if x.dim() >= 2 and x.shape[0] == len(real) and x.shape[1] in (length, *dropped):
            return x[real[:, length - x.shape[1] :]]
        return x


def difference(want: Any, got: Any, rows: Rows, tolerance: float | None = None, least: float = 1e-6) -> str:
    """What differs, or nothing. Where eager has NaN, for -inf in a whole row of scores, fastattn has 0."""
    tolerance = TOLERANCE if tolerance is None else tolerance
    wants, gots = dict(tensors(want)), dict(tensors(got))
    if wants.keys() != gots.keys():
        return f"not the same outputs: {sorted(wants.keys() ^ gots.keys())[:4]}"
    for path, x in wants.items():
        y = gots[path]
        if x.shape != y.shape:
            return f"{path}: shape {tuple(y.shape)} for {tuple(x.shape)}"
        if not x.is_floating_point():
            continue
        x, y = rows.of(path, x), rows.of(path, y)
        finite, numbers = x.isfinite(), ~x.isnan()
        if not torch.equal(finite[numbers], y.isfinite()[numbers]):
            return f"{path}: NaN or Inf in other places"
        if finite.any():
            worst = ((x - y)[finite]).abs().max().item()
            size = x[finite].abs().max().item()
            if worst > tolerance * size + least:
                return f"{path}: off by {worst:.2g} of {size:.2g}"
    return ""


def has_numbers(outputs: Any) -> bool:
    """Whether there is anything to compare."""
    found = [x for _, x in tensors(outputs) if x.is_floating_point() and x.numel()]
    return not found or not all(x.isnan().all() for x in found)


# ---- float64 ------------------------------------------------------------------------------------------


class InFloat64(TorchFunctionMode):
    """The float32 that a model asks for is float64: most of eager's softmax is float32 for any dtype."""

    paused = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.paused:
            function = torch.Tensor.double if function is torch.Tensor.float else function
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in kwargs.items()}
        return function(*args, **kwargs)

    def __enter__(self) -> Any:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        torch.set_default_dtype(self.default)


def no_rounding(
    run: Callable[[Any, dict[str, Any]], Any], models: tuple[Any, Any], given: dict[str, Any], rows: Rows,
    want: Any, got: Any, mode: InFloat64,
) -> str:  # fmt: skip
    """Why a difference of `want` and `got` is not float32's rounding, or nothing: it is."""
    exact: list[Any] = []
    try:
        for model in models:
            double = copy.deepcopy(model).double()
            wide = {key: x.double() if is_float(x) else x for key, x in given.items()}
            with mode:
                exact.append(run(double, wide))
            del double
    except Exception as error:
        return f"cannot run in float64: {type(error).__name__}: {error}".splitlines()[0][:200]
    if not has_numbers(exact[0]):
        return "in float64 eager gives NaN"
    if different := difference(exact[0], exact[1], rows, TOLERANCE_FLOAT64, least=1e-15):
        return f"in float64 {different}"
    wants, gots = dict(tensors(want)), dict(tensors(got))
    for path, x in tensors(exact[0]):
        if wants[path].shape != x.shape:
            return f"{path}: shape {tuple(x.shape)} in float64"
        if not x.is_floating_point():
            continue
        x, y, z = (rows.of(path, one) for one in (x, wants[path], gots[path]))
        finite = x.isfinite() & y.isfinite() & z.isfinite()
        if finite.any():
            size = x[finite].abs().max().item()
            eager, ours = ((one - x)[finite].abs().max().item() for one in (y, z))
            if ours > max(AS_NEAR * eager, TOLERANCE * size + 1e-6):
                return f"{path}: {ours:.2g} from float64, eager {eager:.2g}"
    return ""


def is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def refusal(error: BaseException, names: set[str]) -> str | None:
    """The message of a ValueError of ours that names a class of the model."""
    text = str(error)
    ours = isinstance(error, ValueError) and ("fastattn" in text or "attn_implementation" in text)
    return text if ours and any(name in text for name in names) else None


def variants(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "", {}
    text = config.get_text_config()
    either = getattr(text, "is_decoder", None) is False and hasattr(text, "add_cross_attention")
    if either and not getattr(config, "is_encoder_decoder", False):
        yield "is_decoder=True", {"is_decoder": True}
    if type(text).__name__ in BIDIRECTIONAL:
        yield "is_causal=False", {"is_causal": False}


# A sample: any decoder's config takes is_causal.
BIDIRECTIONAL = {"LlamaConfig", "Qwen3Config", "MistralConfig", "GPT2Config", "GemmaConfig", "OPTConfig"}


def walk_class(model_class: Any, config_class: Any) -> dict[str, Any]:
    reasons: list[str] = []
    for shrunk in ("all", "equal heads", "layers", "nothing"):
        try:
            config = tiny(config_class, shrunk)
            count = n_parameters(model_class, config)
            if count > MOST_PARAMETERS:
                reasons.append(f"{count} parameters")
                continue
            eager = build(model_class, config, "eager")
            shake(eager)
            given = inputs(eager)
            with torch.no_grad():
                eager(**given)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:250]
            reasons.append(text)
            continue
        break
    else:
        return {"status": "skipped", "reason": "; ".join(dict.fromkeys(reasons))}
    result: dict[str, Any] = {"status": "equal", "checks": []}
    rounding: list[str] = []
    for variant, changes in variants(config):
        other = copy.deepcopy(config)
        for key, value in changes.items():
            setattr(other.get_text_config(), key, value)
        try:
            if changes:
                eager = build(model_class, other, "eager")
                shake(eager)
                with torch.no_grad():
                    eager(**given)
        except Exception:
            continue
        one = compare(model_class, other, eager, given)
        result["checks"] += [f"{variant} {x}".strip() for x in one.pop("checks", [])]
        rounding += [f"{variant} {x}".strip() for x in one.pop("rounding", [])]
        if one["status"] != "equal":
            return {**result, **one, "variant": variant}
        result |= one
    if rounding:
        result["reason"] = f"float32 over the tolerance, float64 equal: {'; '.join(rounding)}"
    return result


def compare(model_class: Any, config: Any, eager: Any, given: dict[str, Any]) -> dict[str, Any]:
    calls = 0
    names = {type(x).__name__ for x in eager.modules()}
    behind = max(TOKENS_BEHIND.get(name, 0) for name in names)
    mode = InFloat64()

    def counted(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        mode.paused = True  # what fastattn casts by itself stays as it is
        try:
            return _transformers.attention(*args, **keywords)
        finally:
            mode.paused = False

    registered = ALL_ATTENTION_FUNCTIONS["fastattn"]
    transformers.AttentionInterface.register("fastattn", counted)
    checks: list[str] = []
    rounding: list[str] = []
    check = "construction"
    try:
        ours = build(model_class, config, "fastattn")
        ours.load_state_dict(eager.state_dict())
        for check, run, real in runs(eager, given):
            try:
                want = run(eager, given)
            except Exception:
                continue  # a combination that the model does not take
            if not has_numbers(want):
                return {"status": "skipped", "checks": checks, "reason": f"{check}: eager gives NaN"}
            got = run(ours, given)
            rows = Rows(real, behind)
            if different := difference(want, got, rows):
                if why := no_rounding(run, (eager, ours), given, rows, want, got, mode):
                    reason = f"{check}: {different}; {why}"
                    return {"status": "wrong", "checks": checks, "reason": reason}
                rounding.append(f"{check}: {different}")
            checks.append(check)
    except Exception as error:
        if text := refusal(error, names):
            return {"status": "refused", "when": check, "reason": text, "checks": checks}
        text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return {"status": "wrong", "reason": f"{check}: {text}", "checks": checks}
    finally:
        transformers.AttentionInterface.register("fastattn", registered)
    return {"status": "equal", "checks": checks, "calls": calls, "rounding": rounding}


def runs(
    eager: Any, given: dict[str, Any]
) -> Iterator[tuple[str, Callable[[Any, dict[str, Any]], Any], torch.Tensor | None]]:
    """Names, what to run with a model and its inputs, and which tokens are no padding."""
    for check, options in forward_checks(eager, given):
        real = options.pop("_real", None)
        yield check, functools.partial(forward, options), real
    for check, options in generation_checks(eager, given):
        yield check, functools.partial(generate, options), None


def forward(options: dict[str, Any], model: Any, given: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        return model(**{**given, **options})


def forward_checks(model: Any, given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    signature = inspect.signature(model.forward).parameters
    yield "forward", {}
    lengths = torch.tensor([[LENGTH], [LENGTH - 5]])
    right = torch.arange(LENGTH) < lengths
    masks = {"right": right, "left": right.flip(1)}
    text = "input_ids" in given and "attention_mask" in signature
    left = {}
    if text:
        real = masks["left"]
        left = {"input_ids": given["input_ids"] * real, "attention_mask": real.long(), "_real": real}
    if text:
        for side, real in masks.items():
            ids = given["input_ids"] * real
            yield f"{side} padding", {"input_ids": ids, "attention_mask": real.long(), "_real": real}
        yield "all-ones mask", {"attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}
    takes_any = any(x.kind is x.VAR_KEYWORD for x in signature.values())
    if "output_attentions" in signature or takes_any:
        yield "output_attentions", {"output_attentions": True}
        if text:
            yield "output_attentions, left padding", {"output_attentions": True, **left}
    if "logits_to_keep" in signature:
        yield "logits_to_keep=3", {"logits_to_keep": 3}
        if text:
            yield "logits_to_keep=3, left padding", {"logits_to_keep": 3, **left}


def generation_checks(model: Any, given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not model.can_generate():
        return
    yield "generation", {}
    if "input_ids" in given:
        mask = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 5]])).flip(1).long()
        yield "generation, left padding", {"attention_mask": mask}


def generate(options: dict[str, Any], model: Any, given: dict[str, Any]) -> Any:
    keep = {key: x for key, x in given.items() if not key.startswith("decoder_")}
    result = model.generate(
        **keep, **options, max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=1,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return {"sequences": result["sequences"], "logits": result["logits"]}


# ---- all of them --------------------------------------------------------------------------------------


def model_classes(config_class: Any, all_heads: bool) -> list[Any]:
    """The classes with this config; without `all_heads` the base model and those that generate."""
    module = sys.modules[config_class.__module__]
    package = config_class.__module__.rpartition(".")[0]
    del module
    found = {}
    folder = os.path.dirname(inspect.getfile(config_class))
    for file in sorted(os.listdir(folder)):
        if file.startswith("modeling_") and file.endswith(".py"):
            try:
                modeling = __import__(f"{package}.{file[:-3]}", fromlist=["x"])
            except ImportError:
                continue
            for name, x in vars(modeling).items():
                if (
                    isinstance(x, type)
                    and issubclass(x, transformers.PreTrainedModel)
                    and x.__module__ == modeling.__name__
                    and x.config_class is config_class
                    and "forward" in dir(x)
                    and x.forward is not torch.nn.Module.forward
                    and not name.endswith(("PreTrainedModel", "PretrainedModel"))
                ):
                    found[name] = x
    if all_heads:
        return list(found.values())
    heads = [
        x
        for x in found.values()
        if not re.search(r"For(?!CausalLM|ConditionalGeneration)|LMHead", x.__name__)
    ]
    return heads or list(found.values())[:1]


def walk_type(model_type: str, all_heads: bool, only: set[str] | None = None) -> dict[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    results = {}
    for model_class in model_classes(config_class, all_heads):
        if only is None or model_class.__name__ in only:
            start = time.perf_counter()
            try:
                result = walk_class(model_class, config_class)
            except MemoryError:
                result = {"status": "skipped", "reason": "out of memory"}
            result["seconds"] = round(time.perf_counter() - start, 1)
            results[model_class.__name__] = result
    return results


def quiet() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.set_num_threads(1)
    fastattn.torch.register()


def child(pipe: Any, model_type: str, all_heads: bool) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    quiet()
    try:
        pipe.send(walk_type(model_type, all_heads))
    except BaseException as error:
        pipe.send({model_type: {"status": "skipped", "reason": f"{type(error).__name__}: {error}"[:200]}})


def main() -> int:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="MODEL_TYPE")
    parser.add_argument("--out", metavar="FILE", help="the results as JSON")
    parser.add_argument("--merge", metavar="FILE", help="a record in which these results replace older ones")
    parser.add_argument("--commit", help="of the installed fastattn, where it is not this checkout's")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--all-heads", action="store_true", help="also classifiers and other heads")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one model type")
    args = parser.parse_args()
    record = Record(args.merge, args.commit) if args.merge else None
    types = args.types or sorted(CONFIG_MAPPING)
    fork = multiprocessing.get_context("fork")
    waiting, running = collections.deque(types), {}
    results: dict[str, Any] = {}
    while waiting or running:
        while waiting and len(running) < args.jobs:
            model_type = waiting.popleft()
            ours, theirs = fork.Pipe()
            process = fork.Process(target=child, args=(theirs, model_type, args.all_heads))
            process.start()
            theirs.close()
            running[model_type] = process, ours, time.monotonic() + args.timeout
        ready = multiprocessing.connection.wait([x[1] for x in running.values()], timeout=1.0)
        for model_type, (process, pipe, until) in list(running.items()):
            if pipe in ready:
                try:
                    found = pipe.recv()
                except EOFError:
                    process.join()
                    found = {model_type: {"status": "skipped", "reason": f"ended with {process.exitcode}"}}
            elif time.monotonic() > until:
                process.kill()
                found = {model_type: {"status": "skipped", "reason": f"longer than {args.timeout:.0f} s"}}
            else:
                continue
            process.join()
            del running[model_type]
            results |= found
            if args.out:
                write(args.out, results)
            if record is not None:
                record.replace(model_type, found)
            for name, result in found.items():
                if result["status"] == "wrong" or args.types:
                    print(name, {k: v for k, v in result.items() if args.types or k != "checks"}, flush=True)
    counts = collections.Counter(x["status"] for x in results.values())
    print(dict(counts))
    return 1 if counts["wrong"] else 0


def write(file: str, results: dict[str, Any]) -> None:
    """After every model type, so that a walk that is stopped leaves what it has."""
    counts = collections.Counter(x["status"] for x in results.values())
    head = {"transformers": transformers.__version__, "torch": torch.__version__, "counts": dict(counts)}
    with open(file, "w") as out:
        json.dump(head | {"models": dict(sorted(results.items()))}, out, indent=1)
        out.write("\n")


class Record:
    """What of each class is known, in a file that is kept: of one Transformers, from one walk or several."""

    def __init__(self, file: str, commit: str | None) -> None:
        """Raises ValueError for a file of other versions: numbers of two are not to be added."""
        self.file = Path(file)
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        new = {**versions, "walks": [], "models": {}}
        old = json.loads(self.file.read_text()) if self.file.exists() else new
        for name, version in versions.items():
            if old[name] != version:
                raise ValueError(f"--merge: {file} is of {name} {old[name]}, this is {version}")
        self.versions = versions
        cpus = len(os.sched_getaffinity(0))
        machine = f"{cpu_model()}, {cpus} CPUs, {platform.system()} {platform.machine()}"
        walk = {"commit": commit or checkout_commit(), "when": utc_now(), "machine": machine}
        self.walks = [*old["walks"], walk]
        self.models: dict[str, Any] = old["models"]

    def replace(self, model_type: str, found: dict[str, Any]) -> None:
        """All that was known of this type gives way; written at once, as a walk may be stopped."""
        kept = {name: x for name, x in self.models.items() if x["type"] != model_type}
        for name, result in found.items():
            # The first line says it; the rest is in --out.
            reason = {"reason": " ".join(result["reason"].split())[:160]} if "reason" in result else {}
            last = len(self.walks) - 1
            kept[name] = {"status": result["status"], **reason, "type": model_type, "walk": last}
        self.models = dict(sorted(kept.items()))
        self.write()

    def write(self) -> None:
        """A line for each class."""
        used = sorted({x["walk"] for x in self.models.values()})
        counts = collections.Counter(x["status"] for x in self.models.values())
        head: dict[str, Any] = {**self.versions, "counts": dict(sorted(counts.items()))}
        models = {name: x | {"walk": used.index(x["walk"])} for name, x in self.models.items()}
        rows = [f"  {json.dumps(name)}: {json.dumps(x)}" for name, x in models.items()]
        lines = [
            *(f" {json.dumps(key)}: {json.dumps(x)}," for key, x in head.items()),
            ' "walks": [', ",\n".join(f"  {json.dumps(self.walks[i])}" for i in used), " ],",
            ' "models": {', ",\n".join(rows), " }",
        ]  # fmt: skip
        self.file.write_text("\n".join(["{", *lines, "}"]) + "\n")


if __name__ == "__main__":
    import multiprocessing.connection

    sys.exit(main())
