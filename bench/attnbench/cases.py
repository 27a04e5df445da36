"""The shapes that `bench` times, by name."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastattn._check.shapes import DRAWN, ITEM_SIZE, Array, numpy_dtype

Window = tuple[int | None, int | None]
DTYPES = (("f32", "float32"), ("bf16", "bfloat16"), ("f16", "float16"))
MOST_KV_BYTES = 4e9  # of a case: every peer keeps its own copy of K and V


@dataclass(frozen=True)
class Case:
    """One problem: q (B,Sq,Hq,D), k (B,Sk,Hkv,D) and v (B,Sk,Hkv,Dv), all of one dtype.

    `kind` says what limits it: "prefill" is arithmetic, "decode" is reading K and V, and "latency" is the
    cost of the call itself. "backward" is the gradients of such a problem, arithmetic again; the forward
    is not part of it. `family` is a heading. `causal` and `window` are those of `fastattn.mha`, aligned
    bottom-right. `feature` is an argument that needs an array: "mask", "bias", "alibi" or "sinks";
    `plain` is the name of the same case without its feature, softcap or window.
    """

    name: str
    title: str
    family: str
    kind: str
    batch: int
    q_heads: int
    kv_heads: int
    q_size: int
    kv_size: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = False
    value_dim: int | None = None  # None: head_dim
    softcap: float | None = None
    window: Window | None = None
    feature: str | None = None
    plain: str | None = None

    @property
    def v_dim(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def pairs(self) -> int:
        """(query, key) pairs of one head inside causal and window; a padding mask hides none of them here."""
        left, right = (None, None) if self.window is None else self.window
        position = np.arange(self.q_size) + self.kv_size - self.q_size
        last = np.full(self.q_size, self.kv_size - 1)
        if self.causal:
            last = np.minimum(last, position)
        if right is not None:
            last = np.minimum(last, position + right)
        first = np.zeros(self.q_size, int) if left is None else np.maximum(0, position - left)
        return int(np.maximum(0, last - first + 1).sum())

    @property
    def pair_flops(self) -> float:
        """2 * (D + Dv); backward 2 * (3 * D + 2 * Dv): scores again, dP, and what enters dq, dk and dv."""
        of_dim, of_v_dim = (3, 2) if self.kind == "backward" else (1, 1)
        return 2.0 * (of_dim * self.head_dim + of_v_dim * self.v_dim)

    @property
    def flops(self) -> float:
        return self.pair_flops * self.batch * self.q_heads * self.pairs

    @property
    def dense_flops(self) -> float:
        """The same where the pairs that may not attend are computed too."""
        return self.pair_flops * self.batch * self.q_heads * self.q_size * self.kv_size

    @property
    def score_bytes(self) -> int:
        """All scores at once, as the textbook keeps them."""
        scores = self.batch * self.q_heads * self.q_size * self.kv_size
        return scores * max(4, ITEM_SIZE[self.dtype])

    @property
    def kv_bytes(self) -> int:
        rows = self.batch * self.kv_heads * self.kv_size
        return rows * (self.head_dim + self.v_dim) * ITEM_SIZE[self.dtype]

    @property
    def bytes(self) -> int:
        """Inputs and outputs, each once; not the arrays of a feature."""
        rows = self.batch * self.q_heads * self.q_size
        forward = self.kv_bytes + rows * (self.head_dim + self.v_dim) * ITEM_SIZE[self.dtype]
        # Each array has its gradient; lse is float32, or float64.
        return 2 * forward + rows * max(4, ITEM_SIZE[self.dtype]) if self.kind == "backward" else forward

    @property
    def shape(self) -> str:
        heads = f"{self.q_heads}" if self.q_heads == self.kv_heads else f"{self.q_heads}/{self.kv_heads}"
        size = f"{self.q_size}" if self.q_size == self.kv_size else f"{self.q_size}x{self.kv_size}"
        dim = f"{self.head_dim}" if self.v_dim == self.head_dim else f"{self.head_dim}/{self.v_dim}"
        text = f"B{self.batch} H{heads} S{size} D{dim}{' causal' if self.causal else ''}"
        if self.window is not None:
            sides = ["all" if side is None else str(side) for side in self.window]
            text += f" window {sides[0]}" if self.causal else f" window {sides[0]},{sides[1]}"
        return text if self.softcap is None else f"{text} softcap {self.softcap:g}"

    def arrays(self, seed: int = 0) -> tuple[Array, Array, Array]:
        """q, k and v in layout bshd, standard normal; q is larger under a softcap, so that it matters."""
        rng = np.random.default_rng(seed)
        rows = (self.batch, self.q_size, self.q_heads), (self.batch, self.kv_size, self.kv_heads)
        q = _draw(rng, (*rows[0], self.head_dim), self.dtype)
        if self.softcap is not None:
            q *= q.dtype.type(4)
        k = _draw(rng, (*rows[1], self.head_dim), self.dtype)
        return q, k, _draw(rng, (*rows[1], self.v_dim), self.dtype)

    def dout(self, seed: int = 2) -> Array:
        """The gradient of the result, standard normal."""
        shape = (self.batch, self.q_size, self.q_heads, self.v_dim)
        return _draw(np.random.default_rng(seed), shape, self.dtype)

    def options(self, seed: int = 1) -> dict[str, Any]:
        """The keyword arguments of `fastattn.mha`, with the arrays of the feature.

        The mask is a padding mask (B,1,1,Sk): each entry of the batch has between half and all of its keys,
        a single entry three quarters. The bias is one per head (1,Hq,Sq,Sk) with full attention, as T5 has
        it, and shared by the heads (1,1,Sq,Sk) with causal. Sinks weigh about as much as all keys together.
        """
        rng = np.random.default_rng(seed)
        options: dict[str, Any] = {}
        if self.causal:
            options["causal"] = True
        if self.window is not None:
            options["window"] = self.window
        if self.softcap is not None:
            options["softcap"] = self.softcap
        if self.feature == "mask":
            share = np.linspace(0.5, 1.0, self.batch) if self.batch > 1 else np.array([0.75])
            lengths = np.maximum(1, np.round(share * self.kv_size))
            options["mask"] = np.arange(self.kv_size) < lengths[:, None, None, None]
        elif self.feature == "bias":
            heads = 1 if self.causal else self.q_heads
            options["bias"] = _draw(rng, (1, heads, self.q_size, self.kv_size), self.dtype)
        elif self.feature == "alibi":
            powers = np.arange(1, self.q_heads + 1) * (8.0 / self.q_heads)
            options["alibi_slopes"] = (2.0**-powers).astype(np.float32)
        elif self.feature == "sinks":
            sinks = rng.standard_normal(self.q_heads, dtype=np.float32)
            options["sinks"] = sinks + np.float32(np.log(self.kv_size))
        elif self.feature is not None:
            raise ValueError(f"case {self.name}: no feature is named {self.feature!r}")
        return options


def _draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Standard normal; a large array repeats itself, for drawing gigabytes would take longer than timing."""
    out: Array = np.empty(shape, numpy_dtype(dtype))
    flat = out.reshape(-1)
    numbers = rng.standard_normal(min(flat.size, DRAWN), dtype=np.float32).astype(out.dtype)
    for start in range(0, flat.size, DRAWN):
        part = flat[start : start + DRAWN]
        part[:] = numbers[: part.size]
    return out


def select(patterns: str | None, among: list[Case]) -> list[Case]:
    """The cases that match one of the comma-separated patterns (``decode-*,tiny``), in the list's order.

    Raises
    ------
    ValueError
        A pattern that matches nothing.
    """
    if patterns is None:
        return among
    wanted = [p.strip() for p in patterns.split(",") if p.strip()]
    for pattern in wanted:
        if not any(fnmatch.fnmatch(case.name, pattern) for case in among):
            raise ValueError(f"--cases: {pattern!r} matches none of {', '.join(c.name for c in among)}")
    return [case for case in among if any(fnmatch.fnmatch(case.name, p) for p in wanted)]
