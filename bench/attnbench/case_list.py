"""The cases of `bench`: attention of models that people run.

Names are kept, so that records stay comparable.
"""

from __future__ import annotations

from dataclasses import replace

from attnbench.cases import DTYPES, MOST_KV_BYTES, Case


def _encoders() -> list[Case]:
    family, kind = "encoders and small models", "prefill"
    bert = Case("bert", "BERT-base", family, kind, 4, 12, 12, 512, 512, 64)
    return [
        replace(bert, name="bert-s128", batch=8, q_size=128, kv_size=128),
        bert,
        replace(bert, name="bert-f64", dtype="float64"),
        Case("vit", "ViT-B/16", family, kind, 8, 12, 12, 197, 197, 64),
        Case("whisper", "Whisper large encoder", family, kind, 1, 20, 20, 1500, 1500, 64),
        Case("whisper-cross", "Whisper cross-attention", family, "decode", 1, 20, 20, 1, 1500, 64),
        Case("gpt2", "GPT-2", family, kind, 1, 12, 12, 1024, 1024, 64, causal=True),
        Case("tiny", "one small call", family, "latency", 1, 1, 1, 8, 8, 16),
        Case("tiny-b4", "four small entries", family, "latency", 4, 1, 1, 16, 16, 32),
    ]


def _prefill() -> list[Case]:
    family, kind = "LLM prefill", "prefill"
    llama = Case("llama", "Llama-3-8B prefill", family, kind, 1, 32, 8, 2048, 2048, 128, causal=True)
    gemma = Case("gemma2-1k", "Gemma-2", family, kind, 1, 16, 8, 1024, 1024, 256, causal=True, softcap=50.0)
    plain = [
        replace(llama, name="llama-512", q_size=512, kv_size=512),
        llama,
        replace(llama, name="llama-8k", q_size=8192, kv_size=8192),
        replace(llama, name="llama-chunk", title="Llama-3-8B chunk on 8k", q_size=512, kv_size=8192),
        gemma,
        replace(gemma, name="gemma2-4k", q_size=4096, kv_size=4096),
        # Mistral's sliding window of 4096 counts the row's own key: 4095 keys before it.
        Case(
            "mistral-16k",
            "Mistral-7B",
            family,
            kind,
            *(1, 32, 8, 16384, 16384, 128),
            causal=True,
            window=(4095, None),
        ),
        Case(
            "deepseek",
            "DeepSeek MLA prefill",
            family,
            kind,
            *(1, 16, 16, 1024, 1024, 192),
            causal=True,
            value_dim=128,
        ),
    ]
    return [_in_dtype(case, short, dtype) for case in plain for short, dtype in DTYPES]


def _decode() -> list[Case]:
    family, kind = "LLM decode", "decode"
    plain = []
    for batch, prefix in ((1, "decode"), (16, "decode-b16")):
        for label, size in (("1k", 1024), ("4k", 4096), ("32k", 32768), ("128k", 131072)):
            title = f"Llama-3-8B decode, {label} keys"
            plain.append(Case(f"{prefix}-{label}", title, family, kind, batch, 32, 8, 1, size, 128))
    mha = Case("decode-mha-8k", "MHA decode, 8k keys", family, kind, 1, 32, 32, 1, 8192, 128)
    draft = replace(mha, name="draft-8k", title="Llama-3-8B, 4 drafted tokens, 8k keys", causal=True)
    plain += [
        mha,
        replace(mha, name="decode-70b-8k", title="Llama-3-70B decode, 8k keys", q_heads=64, kv_heads=8),
        replace(mha, name="decode-qwen-8k", title="Qwen3-235B decode, 8k keys", q_heads=64, kv_heads=4),
        replace(draft, kv_heads=8, q_size=4),
    ]
    cases = [_in_dtype(case, short, dtype) for case in plain for short, dtype in DTYPES]
    return [case for case in cases if case.kv_bytes <= MOST_KV_BYTES]


def _training() -> list[Case]:
    """Gradients alone: the forward has run before the clock starts."""
    family, kind = "training", "backward"
    d64 = Case("d64-1k-backward", "12 heads of 64, backward", family, kind, 1, 12, 12, 1024, 1024, 64)
    d128 = replace(d64, name="d128-1k-backward", title="8 heads of 128, backward", head_dim=128)
    d128 = replace(d128, q_heads=8, kv_heads=8)
    llama = Case(
        *("llama-backward", "Llama-3-8B backward", family, kind, 1, 32, 8, 2048, 2048, 128), causal=True
    )
    return [
        Case("bert-backward", "BERT-base backward", family, kind, 4, 12, 12, 512, 512, 64),
        Case("gpt2-backward", "GPT-2 backward", family, kind, 1, 12, 12, 1024, 1024, 64, causal=True),
        *(_in_dtype(case, short, dtype) for case in (d64, d128) for short, dtype in DTYPES[:2]),
        *(_in_dtype(llama, short, dtype) for short, dtype in DTYPES),
    ]


def _features(plain: Case, prefix: str, suffix: str) -> list[Case]:
    """What each feature costs beside the plain case, one at a time."""
    window = (1023, None) if plain.causal else (64, 64)
    changes: dict[str, Case] = {
        "mask": replace(plain, title="padding mask", feature="mask"),
        "bias": replace(plain, title="float bias", feature="bias"),
        "alibi": replace(plain, title="ALiBi", feature="alibi"),
        "sinks": replace(plain, title="sinks", feature="sinks"),
        "softcap": replace(plain, title="softcap", softcap=50.0),
        "window": replace(plain, title="window", window=window),
    }
    return [
        replace(
            case,
            name=f"{prefix}-{feature}{suffix}",
            title=f"{plain.title}, {case.title}",
            family="features",
            plain=plain.name,
        )
        for feature, case in changes.items()
    ]


def _in_dtype(case: Case, short: str, dtype: str) -> Case:
    return replace(case, name=f"{case.name}-{short}", dtype=dtype)


def _cases() -> list[Case]:
    cases = [*_encoders(), *_prefill(), *_decode()]
    by_name = {case.name: case for case in cases}
    cases += _features(by_name["bert"], "bert", "")
    for short, _ in DTYPES:
        cases += _features(by_name[f"llama-{short}"], "llama", f"-{short}")
    return [*cases, *_training()]


CASES = _cases()
QUICK = ",".join(
    (
        *("bert", "vit", "gpt2", "llama-f32", "llama-bf16", "gemma2-1k-f32"),
        *("decode-4k-f32", "decode-32k-f32", "decode-32k-bf16", "bert-mask", "tiny"),
        *("bert-backward", "llama-backward-f32"),
    )
)
