"""The shapes that `bench` times, by name."""

from __future__ import annotations

import fnmatch
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
ITEM_SIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Case:
    """One problem: q (B,Sq,Hq,D), k and v (B,Sk,Hkv,D), all of one dtype.

    `kind` says what limits it: "prefill" is arithmetic, "decode" is reading K and V, and "latency" is the
    cost of the call itself.
    """

    name: str
    title: str
    kind: str
    batch: int
    q_heads: int
    kv_heads: int
    q_size: int
    kv_size: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = False

    @property
    def flops(self) -> float:
        """2 * (D + Dv) for every (query, key) pair that may attend; causal is aligned bottom-right."""
        pairs = self.q_size * self.kv_size
        if self.causal:
            # Row i sees its position, i + Sk - Sq, and every key before it.
            seen = [min(max(i + self.kv_size - self.q_size + 1, 0), self.kv_size) for i in range(self.q_size)]
            pairs = sum(seen)
        return 4.0 * self.batch * self.q_heads * self.head_dim * pairs

    @property
    def kv_bytes(self) -> int:
        return 2 * self.batch * self.kv_heads * self.kv_size * self.head_dim * ITEM_SIZE[self.dtype]

    @property
    def bytes(self) -> int:
        """Inputs and output, each once."""
        rows = 2 * self.batch * self.q_heads * self.q_size * self.head_dim
        return self.kv_bytes + rows * ITEM_SIZE[self.dtype]

    @property
    def shape(self) -> str:
        heads = f"{self.q_heads}" if self.q_heads == self.kv_heads else f"{self.q_heads}/{self.kv_heads}"
        size = f"{self.q_size}" if self.q_size == self.kv_size else f"{self.q_size}x{self.kv_size}"
        return f"B{self.batch} H{heads} S{size} D{self.head_dim}{' causal' if self.causal else ''}"

    def arrays(self, seed: int = 0) -> tuple[Array, Array, Array]:
        """q, k and v in layout bshd, standard normal."""
        rng = np.random.default_rng(seed)
        dtype = numpy_dtype(self.dtype)

        def draw(size: int, heads: int) -> Array:
            shape = (self.batch, size, heads, self.head_dim)
            return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

        q = draw(self.q_size, self.q_heads)
        k, v = (draw(self.kv_size, self.kv_heads) for _ in range(2))
        return q, k, v


def numpy_dtype(name: str) -> Any:
    """The NumPy dtype of one of fastattn's dtype names; bfloat16 comes from `ml_dtypes`."""
    if name == "bfloat16":
        # Only here: fastattn itself needs NumPy alone.
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    return np.dtype(name)


def _cases() -> list[Case]:
    cases = [
        Case("bert", "BERT-base", "prefill", 4, 12, 12, 512, 512, 64),
        Case("vit", "ViT-B/16", "prefill", 8, 12, 12, 197, 197, 64),
        Case("whisper", "Whisper large encoder", "prefill", 1, 20, 20, 1500, 1500, 64),
        Case("gpt2", "GPT-2", "prefill", 1, 12, 12, 1024, 1024, 64, causal=True),
    ]
    dtypes = (("f32", "float32"), ("bf16", "bfloat16"), ("f16", "float16"))
    for short, dtype in dtypes:
        name, title = f"llama-{short}", "Llama-8B prefill"
        cases.append(Case(name, title, "prefill", 1, 32, 8, 2048, 2048, 128, dtype, causal=True))
    for label, size in (("4k", 4096), ("32k", 32768)):
        for short, dtype in dtypes:
            name, title = f"decode-{label}-{short}", f"Llama-8B decode, {label} keys"
            cases.append(Case(name, title, "decode", 1, 32, 8, 1, size, 128, dtype))
    cases.append(Case("tiny", "one small call", "latency", 1, 1, 1, 8, 8, 16))
    return cases


CASES = _cases()


def select(patterns: str | None) -> list[Case]:
    """The cases that match one of the comma-separated patterns (``decode-*,tiny``), in the list's order.

    Raises
    ------
    ValueError
        A pattern that matches nothing.
    """
    if patterns is None:
        return CASES
    wanted = [p.strip() for p in patterns.split(",") if p.strip()]
    for pattern in wanted:
        if not any(fnmatch.fnmatch(case.name, pattern) for case in CASES):
            raise ValueError(f"--cases: {pattern!r} matches none of {', '.join(c.name for c in CASES)}")
    return [case for case in CASES if any(fnmatch.fnmatch(case.name, p) for p in wanted)]
