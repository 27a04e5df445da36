"""Attention on the GPU: fastattn, each backend of PyTorch's SDPA by name, and plain CuPy.

All get the same torch tensors in layout bhsd. What a peer refuses is recorded with its own words.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import fastattn
from attnbench import dense
from attnbench.cases import Case
from attnbench.gpu.device import Gpu
from attnbench.peers.base import NotApplicable

BACKENDS = {
    "torch-flash": "FLASH_ATTENTION",
    "torch-cudnn": "CUDNN_ATTENTION",
    "torch-efficient": "EFFICIENT_ATTENTION",
    "torch-math": "MATH",
}
NAMES = (*BACKENDS, "cupy")
MOST_SCORE_BYTES = 40e9  # of a peer that keeps all scores, some of them in several copies
LONGEST_REASON = 400


@dataclass(frozen=True)
class Runner:
    """One implementation on one case."""

    run: Callable[[], Any]  # queues the call
    implementation: str
    to_torch: Callable[[Any], Any] = lambda out: out  # (B,Hq,Sq,Dv)
    context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext  # entered around all calls
    facts: dict[str, Any] = field(default_factory=dict)


class Implementation(Protocol):
    name: str

    def make(self, case: Case, q: Any, k: Any, v: Any) -> Runner:
        """Raises NotApplicable where it has no such attention; the first call may raise too."""


class FastAttn:
    name = "fastattn"

    def __init__(self, gpu: Gpu, kernel: str | None = None) -> None:
        self.kernel = kernel

    def make(self, case: Case, q: Any, k: Any, v: Any) -> Runner:
        options: dict[str, Any] = {"layout": "bhsd", "causal": case.causal, "kernel": self.kernel}
        plan = fastattn.explain(q, k, v, **options)
        if not plan.device.startswith("cuda"):
            raise NotApplicable(f"it would run on the {plan.device}: {plan.refused}")
        facts = {"algorithm": plan.algorithm, "workspace_bytes": plan.workspace_bytes}
        return Runner(lambda: fastattn.mha(q, k, v, **options), plan.kernel, facts=facts)


class Sdpa:
    """scaled_dot_product_attention, pinned to one backend."""

    def __init__(self, gpu: Gpu, name: str) -> None:
        self.name = name
        self.torch = gpu.torch
        self.attention = importlib.import_module("torch.nn.attention")
        self.backend = getattr(self.attention.SDPBackend, BACKENDS[name])

    def make(self, case: Case, q: Any, k: Any, v: Any) -> Runner:
        if case.causal and not dense.square_causal(case):
            raise NotApplicable("its is_causal is aligned to the first key")
        if self.name == "torch-math":
            refuse_large_scores(case)
        function = self.torch.nn.functional.scaled_dot_product_attention
        grouped = case.q_heads != case.kv_heads

        def run() -> Any:
            return function(q, k, v, is_causal=case.causal, enable_gqa=grouped)

        return Runner(run, BACKENDS[self.name], context=self._pinned)

    @contextlib.contextmanager
    def _pinned(self) -> Iterator[None]:
        with self.torch.inference_mode(), self.attention.sdpa_kernel(self.backend):
            yield


class CuPy:
    """The textbook: matmul, exp, matmul; everything between the products in place."""

    name = "cupy"

    def __init__(self, gpu: Gpu) -> None:
        self.torch = gpu.torch
        self.cupy = importlib.import_module("cupy")

    def make(self, case: Case, q: Any, k: Any, v: Any) -> Runner:
        if case.dtype not in ("float32", "float16"):
            raise NotApplicable(f"it is not timed in {case.dtype}")
        refuse_large_scores(case)
        cupy = self.cupy
        group = case.q_heads // case.kv_heads
        folded = (case.batch, case.kv_heads, group * case.q_size, case.head_dim)
        # Query heads of a group fold into rows, so that K and V are used as they are.
        rows, keys, values = (cupy.from_dlpack(x) for x in (q.reshape(folded), k, v))
        scale = rows.dtype.type(1.0 / math.sqrt(case.head_dim))
        hidden = None
        if case.causal:
            seen = cupy.tri(case.q_size, case.kv_size, case.kv_size - case.q_size, dtype=bool)
            hidden = cupy.tile(cupy.where(seen, 0, -cupy.inf).astype(rows.dtype), (group, 1))

        def run() -> Any:
            score = (rows * scale) @ keys.swapaxes(2, 3)
            if hidden is not None:
                score += hidden
            score -= score.max(axis=-1, keepdims=True)
            cupy.exp(score, out=score)
            total = score.sum(axis=-1, keepdims=True, dtype=cupy.float32)
            out = score @ values
            return (out / total).astype(rows.dtype)

        def to_torch(out: Any) -> Any:
            shape = case.batch, case.q_heads, case.q_size, case.v_dim
            return self.torch.from_dlpack(out).reshape(shape)

        return Runner(run, "matmul, exp, matmul", to_torch)


def choose(names: str | None) -> list[str]:
    """The peers of a comma-separated list; None: all; "none": none.

    Raises
    ------
    ValueError
        A name that is no peer here.
    """
    if names is None:
        return list(NAMES)
    chosen = [n.strip() for n in names.split(",") if n.strip() not in ("", "none")]
    for name in chosen:
        if name not in NAMES:
            raise ValueError(f"--peers: on the GPU expected some of {', '.join(NAMES)} or none, got {name!r}")
    return chosen


def implement(
    gpu: Gpu, names: Sequence[str], kernel: str | None = None
) -> tuple[list[Implementation], dict[str, str]]:
    """fastattn and the peers that can be had, and why the others cannot."""
    found: list[Implementation] = [FastAttn(gpu, kernel)]
    unavailable = {}
    for name in names:
        try:
            found.append(CuPy(gpu) if name == "cupy" else Sdpa(gpu, name))
        except (ImportError, AttributeError, RuntimeError) as error:
            unavailable[name] = refusal(error, [])
    return found, unavailable


def refuse_large_scores(case: Case) -> None:
    if case.score_bytes > MOST_SCORE_BYTES:
        raise NotApplicable(f"its scores would take {case.score_bytes / 1e9:.0f} GB")


def first_call(runner: Runner, call: Callable[[Callable[[], Any]], Any]) -> Any:
    """``call(runner.run)``; where it raises, what the library warned of before is part of the reason.

    Raises
    ------
    NotApplicable
        With the reason in the library's words.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            return call(runner.run)
        except Exception as error:
            raise NotApplicable(refusal(error, [str(w.message) for w in warned])) from error


def refusal(error: Exception, warned: Sequence[str]) -> str:
    """An exception and the warnings before it as one line: in these torch says why it refused a backend."""
    lines = [str(error).strip() or repr(error), *warned]
    first = [_without_place(line.strip().splitlines()[0]) for line in lines if line.strip()]
    text = "; ".join(dict.fromkeys(first))
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 3]}..."


def _without_place(line: str) -> str:
    """Without where in torch's sources it was raised."""
    return line.partition(" (Triggered internally at ")[0]
