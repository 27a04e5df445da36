"""The arguments of `mha` and `mha_backward`, from csrc/core/arguments.inc, for modules that hand them on."""

from __future__ import annotations

import ast
from typing import Any, NamedTuple

from fastattn import _core


class Argument(NamedTuple):
    """A row of the table.

    Attributes
    ----------
    name : str
    kind : str
        "array", "number" (a float), "flag" (a bool), "text", "window" (two integers or None), or "integer",
        which may be an array as well.
    default : object
        None, too, for what is taken by position and has none.
    forward, backward : str
        How `mha` and `mha_backward` take it: by "position", by "name" or not ("none").
    """

    name: str
    kind: str
    default: Any
    forward: str
    backward: str


ARGUMENTS = tuple(
    Argument(name, kind, ast.literal_eval(default or "None"), forward, backward)
    for name, kind, default, forward, backward in _core.argument_rows()
)
# What both functions take by name: those of the problem, and where it is computed.
OPTIONS = tuple(x for x in ARGUMENTS if x.forward == x.backward == "name")


def names(*kinds: str) -> tuple[str, ...]:
    """The options of some kinds, in the order of the table."""
    return tuple(x.name for x in OPTIONS if x.kind in kinds)
