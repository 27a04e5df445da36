"""What `kernels` and `explain` return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from fastattn import _core


class KernelInfo(NamedTuple):
    """A kernel of this build.

    Attributes
    ----------
    name : str
        What ``mha(..., kernel=name)`` takes.
    device : str
        "cpu" or "cuda".
    dtypes : tuple of str
        The dtypes of q that it computes.
    usable : bool
        Whether this machine can run it.
    reason : str
        Why not; empty when usable.
    """

    name: str
    device: str
    dtypes: tuple[str, ...]
    usable: bool
    reason: str


class Gradients(NamedTuple):
    """What `mha_backward` returns: each gradient in its argument's shape and dtype.

    Attributes
    ----------
    dq : array
        The shape of q: with the default layout (B,Sq,Hq,D).
    dk : array
        The shape of k: (B,Sk,Hkv,D); summed over the query heads that share a key head.
    dv : array
        The shape of v: (B,Sk,Hkv,Dv); summed likewise.
    dbias : array or None
        The shape of bias; summed over the axes that bias broadcasts. None without bias, or with
        ``need_dbias=False``.
    dalibi_slopes : array or None
        (Hq,) or (B,Hq), as alibi_slopes; None without.
    dsinks : array or None
        (Hq,); None without sinks.
    """

    dq: Any
    dk: Any
    dv: Any
    dbias: Any
    dalibi_slopes: Any
    dsinks: Any


def kernels() -> list[KernelInfo]:
    """List the kernels of this build, in the order in which a call tries them.

    Returns
    -------
    list of KernelInfo
        The last one of each device, the plain reference, supports every problem.
    """
    return [KernelInfo(*row) for row in _core.kernel_rows()]


def _quantity(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} P{unit}"


@dataclass(frozen=True)
class Explanation:
    """The plan of one call of `mha`, as `explain` returns it. ``print`` shows it readably.

    Attributes
    ----------
    kernel : str
        The kernel that would run.
    device : str
        Where.
    device_choice : str
        Why there: who asked for it, or the estimate that chose it.
    algorithm : str
        Its way of working for this problem, with block sizes.
    workspace_bytes : int
        Memory beside inputs and outputs.
    work_items : int
        Pieces of work that are handed to threads.
    threads : int
        Threads that would take part.
    flops : float
        2 * (D + Dv) for each (row, key) pair inside causal, window, lengths and a Mask.
    bytes : float
        Inputs and outputs, each read or written once.
    refused : dict of str to str
        Every other kernel, and why it was not taken.
    """

    kernel: str
    device: str
    device_choice: str
    algorithm: str
    workspace_bytes: int
    work_items: int
    threads: int
    flops: float
    bytes: float
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"kernel     {self.kernel} on {self.device}",
            f"device     {self.device_choice}",
            f"algorithm  {self.algorithm}",
            f"work       {self.work_items} items on {self.threads} thread{'s' if self.threads != 1 else ''}",
            f"workspace  {_quantity(self.workspace_bytes, 'B')}",
            f"compute    {_quantity(self.flops, 'FLOP')}",
            f"traffic    {_quantity(self.bytes, 'B')}",
        ]
        width = max((len(name) for name in self.refused), default=0)
        for name, reason in self.refused.items():
            lines.append(f"not taken  {name:<{width}}  {reason}")
        return "\n".join(lines)
