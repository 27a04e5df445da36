"""Other implementations of attention, each behind the same small interface. Imported only when asked for.

A peer gets its inputs in the layout it likes best, prepared before the clock starts, and as many threads as
fastattn. It says NotApplicable, with the reason, where it has no such attention.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import fastattn
from attnbench.cases import Case
from fastattn._check import machine
from fastattn._check.shapes import Array

MOST_SCORE_BYTES = 4e9  # of a peer that keeps all scores at once


class NotApplicable(Exception):
    """This peer cannot compute this case; the text says why."""


@dataclass(frozen=True)
class Inputs:
    """One case's arrays: q, k, v in layout bshd, and the other arguments of `fastattn.mha`.

    `dout`, the gradient of the result, is there where the case is a backward pass.
    """

    case: Case
    q: Array
    k: Array
    v: Array
    options: dict[str, Any]
    dout: Array | None = None

    @classmethod
    def of(cls, case: Case) -> Inputs:
        dout = case.dout() if case.kind == "backward" else None
        return cls(case, *case.arrays(), case.options(), dout)


@dataclass(frozen=True)
class Runner:
    """One call of one implementation on one case."""

    run: Callable[[], Any]  # returns when the result is there
    # The result as (B,Sq,Hq,Dv); of a backward pass dq, dk and dv, as q, k and v. Any float dtype.
    to_numpy: Callable[[Any], Any]
    implementation: str
    flops: float  # that it computes: hidden pairs count where it does not leave them out


Maker = Callable[[Inputs], Runner]


class Implementation(Protocol):
    name: str
    limited_by: str  # how its threads are limited

    def candidates(self, case: Case) -> list[Maker]:
        """Its ways to compute the case; where there are several, the fastest is timed.

        Raises
        ------
        NotApplicable
            Here or in each way.
        """


class FastAttn:
    name = "fastattn"
    limited_by = "fastattn.set_num_threads"

    def __init__(self, threads: int, kernel: str | None = None) -> None:
        self.kernel = kernel
        fastattn.set_num_threads(threads)

    def candidates(self, case: Case) -> list[Maker]:
        return [self._maker]

    def _maker(self, inputs: Inputs) -> Runner:
        if inputs.dout is not None:
            return self._backward(inputs, inputs.dout)
        q, k, v, options = inputs.q, inputs.k, inputs.v, inputs.options
        plan = fastattn.explain(q, k, v, kernel=self.kernel, **options)

        def run() -> Any:
            return fastattn.mha(q, k, v, kernel=self.kernel, **options)

        return Runner(run, np.asarray, plan.kernel, inputs.case.flops)

    def _backward(self, inputs: Inputs, dout: Array) -> Runner:
        """out and lse are there before the clock starts."""
        q, k, v, options = inputs.q, inputs.k, inputs.v, inputs.options
        # Named, because the plan of the forward is all that explain tells.
        kernel = fastattn.explain(q, k, v, device="cpu", kernel=self.kernel, **options).kernel
        out, lse = fastattn.mha(q, k, v, kernel=kernel, return_lse=True, **options)

        def run() -> Any:
            return fastattn.mha_backward(dout, q, k, v, out, lse, kernel=kernel, **options)

        def to_numpy(gradients: Any) -> Any:
            return gradients.dq, gradients.dk, gradients.dv

        return Runner(run, to_numpy, kernel, inputs.case.flops)


def _from_module(module: str, name: str) -> Callable[[int], Implementation]:
    def create(threads: int) -> Implementation:
        implementation = getattr(importlib.import_module(f"attnbench.peers.{module}"), name)(threads)
        return implementation  # type: ignore[no-any-return]

    return create


PEERS: dict[str, Callable[[int], Implementation]] = {
    "torch": _from_module("torch", "Torch"),
    "onnxruntime": _from_module("onnx", "OnnxRuntime"),
    "jax": _from_module("jax", "Jax"),
    "numpy": _from_module("numpy", "NumPy"),
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


def refuse_large_scores(case: Case) -> None:
    """For peers that keep all scores at once."""
    if case.score_bytes > MOST_SCORE_BYTES:
        raise NotApplicable(f"its scores would take {case.score_bytes / 1e9:.0f} GB")
