"""Other implementations of attention, each behind the same small interface. Imported only when asked for.

A peer gets its inputs in the layout it likes best, prepared before the clock starts, and as many threads as
fastattn. It says NotApplicable, with the reason, where it has no such attention.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import fastattn
from fastattn._cli import machine
from fastattn._cli.cases import Case
from fastattn._cli.onnx_model import one_node_model

Array = np.ndarray[Any, Any]


class NotApplicable(Exception):
    """This peer cannot compute this case; the text says why."""


@dataclass(frozen=True)
class Runner:
    """One call of one implementation on one case."""

    run: Callable[[], Any]  # returns when the result is there
    to_numpy: Callable[[Any], Array]  # the result as (B,Sq,Hq,D), any float dtype
    implementation: str


class Implementation(Protocol):
    name: str
    version: str

    def prepare(self, case: Case, q: Array, k: Array, v: Array) -> Runner: ...


class FastAttn:
    name = "fastattn"

    def __init__(self, threads: int, kernel: str | None = None) -> None:
        self.version = fastattn.__version__
        self.kernel = kernel
        fastattn.set_num_threads(threads)

    def prepare(self, case: Case, q: Array, k: Array, v: Array) -> Runner:
        plan = fastattn.explain(q, k, v, causal=case.causal, kernel=self.kernel)

        def run() -> Any:
            return fastattn.mha(q, k, v, causal=case.causal, kernel=self.kernel)

        return Runner(run, np.asarray, plan.kernel)


class Torch:
    name = "torch"

    def __init__(self, threads: int) -> None:
        self.torch = torch = importlib.import_module("torch")
        self.version = str(torch.__version__)
        torch.set_num_threads(threads)

    def prepare(self, case: Case, q: Array, k: Array, v: Array) -> Runner:
        torch = self.torch
        if case.causal and case.q_size != case.kv_size:
            raise NotApplicable("its is_causal is aligned top-left")
        attention = torch.nn.functional.scaled_dot_product_attention
        grouped = case.q_heads != case.kv_heads
        qt, kt, vt = (self._tensor(x).transpose(1, 2).contiguous() for x in (q, k, v))  # (B,H,S,D)

        def run() -> Any:
            with torch.inference_mode():
                return attention(qt, kt, vt, is_causal=case.causal, enable_gqa=grouped)

        def to_numpy(out: Any) -> Array:
            return np.asarray(out.transpose(1, 2).float().numpy())

        return Runner(run, to_numpy, "scaled_dot_product_attention")

    def _tensor(self, x: Array) -> Any:
        if x.dtype.name == "bfloat16":
            return self.torch.from_numpy(x.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(x)


class OnnxRuntime:
    """MultiHeadAttention of com.microsoft and Attention of opset 23; where both apply, the faster one."""

    name = "onnxruntime"

    def __init__(self, threads: int) -> None:
        self.ort = importlib.import_module("onnxruntime")
        self.version = str(self.ort.__version__)
        self.threads = threads

    def prepare(self, case: Case, q: Array, k: Array, v: Array) -> Runner:
        if case.dtype not in ("float32", "float16"):
            raise NotApplicable(f"no CPU attention in {case.dtype}")
        if case.causal and case.q_size != case.kv_size:
            raise NotApplicable("its is_causal is aligned top-left")
        heads = {"q_num_heads": case.q_heads, "kv_num_heads": case.kv_heads, "is_causal": int(case.causal)}
        candidates = [self._runner(case, (q, k, v), ("Attention", "", 23), heads)]
        if case.dtype == "float32" and case.q_heads == case.kv_heads:
            own = {"num_heads": case.q_heads, "unidirectional": int(case.causal)}
            candidates.append(self._runner(case, (q, k, v), ("MultiHeadAttention", "com.microsoft", 1), own))
        if len(candidates) == 1:
            return candidates[0]
        return min(candidates, key=lambda runner: min(_seconds(runner.run) for _ in range(3)))

    def _runner(
        self,
        case: Case,
        arrays: tuple[Array, ...],
        operator: tuple[str, str, int],
        attributes: dict[str, int],
    ) -> Runner:
        op, domain, opset = operator
        # (B,S,H,D) as the operators' (B,S,H*D).
        inputs = {name: x.reshape(*x.shape[:2], -1) for name, x in zip("qkv", arrays, strict=True)}
        shapes = {name: x.shape for name, x in inputs.items()}
        model = one_node_model(
            op,
            domain=domain,
            opset=opset,
            inputs=shapes,
            output=("out", shapes["q"]),
            dtype=case.dtype,
            attributes=attributes,
        )
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Its threads spin on after a call otherwise, and take CPU from whoever is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            session = self.ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise NotApplicable(str(error).splitlines()[0]) from error
        binding = session.io_binding()
        values = {name: self.ort.OrtValue.ortvalue_from_numpy(x) for name, x in inputs.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        out = self.ort.OrtValue.ortvalue_from_numpy(np.empty_like(inputs["q"]))
        binding.bind_ortvalue_output("out", out)

        def run() -> Any:
            session.run_with_iobinding(binding)
            return values, out  # the binding itself does not keep its inputs alive

        return Runner(run, lambda result: np.asarray(result[1].numpy()).reshape(arrays[0].shape), op)


class Jax:
    name = "jax"

    def __init__(self, threads: int) -> None:
        # XLA sizes its pool once, from this variable, when the CPU client starts.
        os.environ["NPROC"] = str(threads)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        self.jax = importlib.import_module("jax")
        self.version = str(self.jax.__version__)

    def prepare(self, case: Case, q: Array, k: Array, v: Array) -> Runner:
        jax = self.jax
        if case.causal and case.q_size != case.kv_size:
            raise NotApplicable("its is_causal is aligned top-left")
        qj, kj, vj = (jax.numpy.asarray(x) for x in (q, k, v))
        attention = jax.jit(lambda a, b, c: jax.nn.dot_product_attention(a, b, c, is_causal=case.causal))

        def run() -> Any:
            return attention(qj, kj, vj).block_until_ready()

        return Runner(run, np.asarray, "jax.nn.dot_product_attention")


class NumPy:
    """The textbook, as one would write it for speed: batched products, everything after them in place."""

    name = "numpy"

    def __init__(self, threads: int) -> None:
        self.version = np.__version__
        try:
            threadpoolctl = importlib.import_module("threadpoolctl")
        except ImportError:
            # Without it NumPy's BLAS keeps the threads it started with: all CPUs.
            if threads != machine.usable_cpus():
                raise NotApplicable("needs threadpoolctl to run on --threads threads") from None
        else:
            threadpoolctl.threadpool_limits(threads, user_api="blas")

    def prepare(self, case: Case, q: Array, k: Array, v: Array) -> Runner:
        if case.dtype not in ("float32", "float64"):
            raise NotApplicable(f"its {case.dtype} products are plain loops")
        group = case.q_heads // case.kv_heads
        batch, heads, dim = case.batch, case.kv_heads, case.head_dim
        # Query heads of a group fold into rows, so that K and V are used as they are: (B,Hkv,G*Sq,D).
        grouped = q.reshape(batch, case.q_size, heads, group, dim).transpose(0, 2, 3, 1, 4)
        qn = np.ascontiguousarray(grouped).reshape(batch, heads, group * case.q_size, dim)
        kn, vn = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (k, v))  # (B,Hkv,Sk,D)
        scale = q.dtype.type(1.0 / math.sqrt(dim))
        hidden = None
        if case.causal:
            i, j = np.arange(case.q_size)[:, None], np.arange(case.kv_size)
            rows = np.where(j > i + case.kv_size - case.q_size, -np.inf, 0.0).astype(q.dtype)
            hidden = np.tile(rows, (group, 1))

        def run() -> Any:
            score = (qn * scale) @ kn.swapaxes(2, 3)  # (B,Hkv,G*Sq,Sk)
            if hidden is not None:
                score += hidden
            score -= score.max(axis=-1, keepdims=True)
            np.exp(score, out=score)
            total = score.sum(axis=-1, keepdims=True)
            out = score @ vn
            out /= total
            return out

        def to_numpy(out: Array) -> Array:
            parts = out.reshape(batch, heads, group, case.q_size, dim)
            return parts.transpose(0, 3, 1, 2, 4).reshape(q.shape)

        return Runner(run, to_numpy, "numpy.matmul, exp, matmul")


PEERS: dict[str, Callable[[int], Implementation]] = {
    "torch": Torch,
    "onnxruntime": OnnxRuntime,
    "jax": Jax,
    "numpy": NumPy,
}


def choose(names: str | None) -> list[str]:
    """The peers asked for by a comma-separated list; None: all that are installed; "none": no peer.

    Raises
    ------
    ValueError
        A name that is no peer, or a peer that is not installed.
    """
    if names is None:
        return [name for name in PEERS if machine.installed_version(name) is not None]
    chosen = [n.strip() for n in names.split(",") if n.strip() not in ("", "none")]
    for name in chosen:
        if name not in PEERS:
            raise ValueError(f"--peers: expected some of {', '.join(PEERS)} or none, got {name!r}")
        if machine.installed_version(name) is None:
            raise ValueError(f"--peers: {name} is not installed")
    return chosen


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
