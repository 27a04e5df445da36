"""Plain attention, without a mask, of which `check` and `tune` measure the speed."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
ITEM_SIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
# Random numbers per array, repeated from there on; odd, so that neighbours never get the same ones.
DRAWN = (1 << 22) + 3


@dataclass(frozen=True)
class Shape:
    """q (B,Sq,Hq,D), k (B,Sk,Hkv,D) and v (B,Sk,Hkv,Dv), with B = 1 and all of one dtype."""

    q_heads: int
    kv_heads: int
    q_size: int
    kv_size: int
    head_dim: int
    value_dim: int
    dtype: str = "float32"

    def __str__(self) -> str:
        heads = f"{self.q_heads}" if self.q_heads == self.kv_heads else f"{self.q_heads}/{self.kv_heads}"
        size = f"{self.q_size}" if self.q_size == self.kv_size else f"{self.q_size}x{self.kv_size}"
        return f"B1 H{heads} S{size} D{self.head_dim}"

    @property
    def flops(self) -> float:
        return 2.0 * (self.head_dim + self.value_dim) * self.q_heads * self.q_size * self.kv_size

    @property
    def kv_bytes(self) -> int:
        return self.kv_heads * self.kv_size * (self.head_dim + self.value_dim) * ITEM_SIZE[self.dtype]

    @property
    def bytes_in(self) -> int:
        return self.kv_bytes + self.q_heads * self.q_size * self.head_dim * ITEM_SIZE[self.dtype]

    @property
    def bytes_out(self) -> int:
        return self.q_heads * self.q_size * self.value_dim * ITEM_SIZE[self.dtype]

    def arrays(self) -> tuple[Array, Array, Array]:
        """q, k and v, standard normal."""
        rng = np.random.default_rng(0)

        # A large one repeats itself, for drawing gigabytes would take longer than timing.
        def draw(*sizes: int) -> Array:
            numbers = rng.standard_normal(min(math.prod(sizes), DRAWN), dtype=np.float32)
            return np.resize(numbers.astype(numpy_dtype(self.dtype)), (1, *sizes))

        q = draw(self.q_size, self.q_heads, self.head_dim)
        k = draw(self.kv_size, self.kv_heads, self.head_dim)
        return q, k, draw(self.kv_size, self.kv_heads, self.value_dim)


def numpy_dtype(name: str) -> Any:
    """The NumPy dtype of one of fastattn's dtype names; bfloat16 comes from `ml_dtypes`."""
    if name == "bfloat16":
        # Only here: fastattn itself needs NumPy alone.
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    return np.dtype(name)
