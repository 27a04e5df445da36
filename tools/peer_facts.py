"""Runs on the CPU what docs/comparison.md says of fastattn, PyTorch and JAX.

pip install '.[test]' && python tools/peer_facts.py
"""

from __future__ import annotations

import inspect
import resource
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import fastattn

Array = np.ndarray[Any, Any]


def use_fastattn(q: Array, k: Array, v: Array, **options: Any) -> Array:
    return fastattn.mha(q, k, v, **options)


def use_torch(q: Array, k: Array, v: Array, mask: Array | None = None, causal: bool = False) -> Array:
    import torch

    tensors = [torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)]
    attention = torch.nn.functional.scaled_dot_product_attention
    out = attention(*tensors, attn_mask=None if mask is None else torch.from_numpy(mask), is_causal=causal)
    return out.transpose(1, 2).numpy()


def use_jax(q: Array, k: Array, v: Array, mask: Array | None = None, causal: bool = False) -> Array:
    import jax

    if mask is not None:
        mask = mask[None, None]
    return np.asarray(jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal))


def arrays(sq: int, sk: int, d: int, dv: int, heads: int = 1, dtype: str = "float32") -> list[Array]:
    rng = np.random.default_rng(0)
    shapes = (1, sq, heads, d), (1, sk, heads, d), (1, sk, heads, dv)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def attempt(call: Callable[[], str]) -> str:
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"


def head_dimensions(run: Callable[..., Array]) -> str:
    for d, dv in ((1, 1), (7, 7), (300, 300), (64, 24)):
        q, k, v = arrays(4, 6, d, dv)
        expected = fastattn.reference.mha(q, k, v)
        if not np.allclose(attempt_array(run, q, k, v), expected, atol=1e-4):
            return f"fails at D={d}, Dv={dv}"
    return "any, Dv too"


def attempt_array(run: Callable[..., Array], *operands: Array) -> Array:
    try:
        return run(*operands)
    except Exception:
        return np.array(np.nan)


def dtypes(run: Callable[..., Array]) -> str:
    names = "float64", "float32", "float16"
    return ", ".join(n for n in names if str(attempt_array(run, *arrays(4, 6, 8, 8, dtype=n)).dtype) == n)


def causal_alignment(run: Callable[..., Array]) -> str:
    q, k, v = arrays(2, 5, 8, 8)
    first = run(q, k, v, causal=True)[0, 0, 0]
    return "first row at first key" if np.allclose(first, v[0, 0, 0]) else "last row at last key"


def masked_row(run: Callable[..., Array]) -> str:
    q, k, v = arrays(4, 6, 8, 8)
    mask = np.ones((4, 6), bool)
    mask[0] = False
    row = run(q, k, v, mask=mask)[0, 0, 0]
    if not row.any():
        return "0"
    return "mean of the values" if np.allclose(row, v[0, :, 0].mean(axis=0)) else str(row[:2])


def masked_nan(run: Callable[..., Array]) -> str:
    q, k, v = arrays(4, 6, 8, 8)
    mask = np.ones((4, 6), bool)
    mask[:, 5] = False
    v[0, 5] = np.nan
    return "never seen" if np.isfinite(run(q, k, v, mask=mask)).all() else "NaN"


def score_memory(run: Callable[..., Array]) -> str:
    """How far the peak of the process rises: 4096 x 4096 float32 scores of 4 heads are 256 MiB."""
    small = arrays(64, 64, 64, 64, heads=4)
    large = arrays(4096, 4096, 64, 64, heads=4)
    run(*small)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(*large)
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / 2**20:.0f} MiB of 256"


FACTS = {
    "memory for scores": score_memory,  # first: the peak only ever rises
    "dtypes": dtypes,
    "head dimensions": head_dimensions,
    "causal with Sq != Sk": causal_alignment,
    "row that may attend nothing": masked_row,
    "NaN in a masked value": masked_nan,
}


def main() -> None:
    import jax
    import torch

    print(
        f"fastattn {fastattn.__version__}, PyTorch {torch.__version__}, JAX {jax.__version__}, on the CPU\n"
    )
    for name, fact in FACTS.items():
        for library, run in (("fastattn", use_fastattn), ("PyTorch", use_torch), ("JAX", use_jax)):
            print(f"{name:28} {library:9} {attempt(lambda fact=fact, run=run: fact(run))}")
    print(
        "\nPyTorch's arguments:",
        torch.nn.functional.scaled_dot_product_attention.__doc__.split(")")[0].split("(")[1],
    )
    print("JAX's arguments:    ", ", ".join(inspect.signature(jax.nn.dot_product_attention).parameters))


if __name__ == "__main__":
    main()
