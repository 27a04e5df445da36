"""The cases of ``bench --device cuda``. Names are kept, so that records stay comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from attnbench.cases import Case

DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "tf32": "float32", "f64": "float64"}
# The shapes that are timed in these dtypes too; all are in float16 and bfloat16.
WIDE = {
    "f32": ("bert", "gpt2", "llama-2k", "d128-8k", "decode-4k", "decode-b32-4k", "tiny"),
    "tf32": ("bert", "llama-2k", "d128-8k"),
    "f64": ("bert", "llama-2k"),
}
TF32_VARIABLE = "FASTATTN_TF32"  # read once per process


def _shapes() -> list[Case]:
    family, kind = "encoders and small models", "prefill"
    encoders = [
        Case("bert", "BERT-base", family, kind, 32, 12, 12, 512, 512, 64),
        Case("bert-s128", "BERT-base", family, kind, 256, 12, 12, 128, 128, 64),
        Case("gpt2", "GPT-2", family, kind, 8, 12, 12, 1024, 1024, 64, causal=True),
        Case("tiny", "one small call", family, "latency", 1, 1, 1, 8, 8, 16),
    ]
    llama = Case(
        "llama-2k", "Llama-3-8B prefill", "LLM prefill", kind, 1, 32, 8, 2048, 2048, 128, causal=True
    )
    prefill = [
        replace(llama, name="llama-512", q_size=512, kv_size=512),
        llama,
        replace(llama, name="llama-8k", q_size=8192, kv_size=8192),
    ]
    full = Case("d128-8k", "32 heads of 128", "long sequences", kind, 1, 32, 32, 8192, 8192, 128)
    long = [
        full,
        replace(full, name="d128-8k-causal", causal=True),
        replace(full, name="d64-8k", title="32 heads of 64", head_dim=64),
        replace(full, name="d256-4k", title="32 heads of 256", head_dim=256, q_size=4096, kv_size=4096),
    ]
    decode = []
    for prefix, batch, sizes in (("decode", 1, (1, 4, 32)), ("decode-b32", 32, (4, 32))):
        for size in sizes:
            title = f"Llama-3-8B decode, {size}k keys"
            decode.append(
                Case(f"{prefix}-{size}k", title, "LLM decode", "decode", batch, 32, 8, 1, 1024 * size, 128)
            )
    return [*encoders, *prefill, *long, *decode]


def _cases() -> list[Case]:
    return [
        replace(shape, name=f"{shape.name}-{short}", dtype=dtype)
        for shape in _shapes()
        for short, dtype in DTYPES.items()
        if short not in WIDE or shape.name in WIDE[short]
    ]


CASES = _cases()
QUICK = ",".join(
    (
        *("bert-f16", "bert-f32", "bert-tf32", "bert-f64", "llama-2k-f16", "llama-2k-bf16"),
        *("d128-8k-f16", "decode-4k-f16", "decode-b32-4k-bf16", "tiny-f32"),
    )
)
# From and to NumPy arrays; bfloat16 is float16 to a copy.
TRANSFER_CASES = [
    case
    for case in CASES
    if case.name
    in {
        *("bert-f32", "bert-f16", "gpt2-f32", "llama-2k-f32", "llama-2k-f16", "d128-8k-f16"),
        *("bert-f64", "decode-4k-f32", "decode-b32-4k-f16", "tiny-f32"),
    }
]
QUICK_TRANSFERS = "bert-f32,llama-2k-f16,decode-4k-f32,tiny-f32"


def flops(case: Case) -> float:
    """4 * B * Hq * Sq * Sk * D, half of it where causal: as others count it, who ignore the diagonal."""
    return case.dense_flops / (2 if case.causal else 1)


def needs_tf32(case: Case) -> bool | None:
    """Whether float32 may be TF32 in this case; None where it does not matter."""
    return case.name.endswith("-tf32") if case.dtype == "float32" else None


def limit_name(case: Case) -> str:
    """The measured peak that bounds its arithmetic: a dtype, or "tf32"."""
    return "tf32" if needs_tf32(case) else case.dtype


def split(cases: Sequence[Case], environment: Mapping[str, str]) -> tuple[list[Case], list[Case]]:
    """The cases that this process can time, and those that need one with the other FASTATTN_TF32."""
    here = environment.get(TF32_VARIABLE) == "1"
    mine = [case for case in cases if needs_tf32(case) in (None, here)]
    return mine, [case for case in cases if case not in mine]
