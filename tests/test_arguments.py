"""Everything that writes the arguments down by hand agrees with csrc/core/arguments.inc."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import subproc

import fastattn
from fastattn import _arguments, reference

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(
    r'^FASTATTN_ARGUMENT\((\w+), k\w+, "([^"]*)", ' + ", ".join([r"(\w+)"] * 5) + r"\)$", re.MULTILINE
)


class Argument(NamedTuple):
    name: str
    default: object
    forward: str
    explain: str
    backward: str
    varlen: str
    varlen_backward: str


TABLE = [
    Argument(name, ast.literal_eval(default) if default else inspect.Parameter.empty, *taken)
    for name, default, *taken in ROW.findall((ROOT / "csrc/core/arguments.inc").read_text())
]
# Arguments by position have an order of their own.
POSITIONS = {
    "forward": ["q", "k", "v"],
    "explain": ["q", "k", "v"],
    "backward": ["dout", "q", "k", "v", "out", "lse"],
    "varlen": ["q", "k", "v", "cu_q", "cu_kv"],
    "varlen_backward": ["dout", "q", "k", "v", "out", "lse", "cu_q", "cu_kv"],
}


def arguments_of(function: str) -> dict[str, object]:
    """By name, with defaults; none where it is required."""
    first = POSITIONS[function]
    named = [x.name for x in TABLE if getattr(x, function) == "name"]
    defaults = {x.name: x.default for x in TABLE}
    required = dict.fromkeys([name for name in first if name != "cu_kv"], inspect.Parameter.empty)
    return {name: defaults[name] for name in (*first, *named)} | required


FORWARD, EXPLAIN, BACKWARD, VARLEN, VARLEN_BACKWARD = map(arguments_of, POSITIONS)


def without(arguments: dict[str, object], *names: str) -> dict[str, object]:
    return {name: default for name, default in arguments.items() if name not in names}


def signature(function: object) -> dict[str, object]:
    return {name: x.default for name, x in inspect.signature(function).parameters.items()}  # type: ignore[arg-type]


def test_the_table_is_read_whole():
    text = (ROOT / "csrc/core/arguments.inc").read_text()
    assert len(TABLE) == len(re.findall(r"^FASTATTN_ARGUMENT", text, re.MULTILINE)) > 20
    for function, names in POSITIONS.items():
        assert {x.name for x in TABLE if getattr(x, function) == "position"} == set(names)
    # Of packed entries everything that a padded batch has, but what bounds take the place of.
    assert set(FORWARD) - set(VARLEN) == {"q_lens", "return_weights"}
    assert set(BACKWARD) - set(VARLEN_BACKWARD) == {"q_lens"}


def test_the_table_of_python():
    rows = [x._replace(default=None) if x.default is inspect.Parameter.empty else x for x in TABLE]
    assert [(x.name, x.default, x.forward, x.backward) for x in _arguments.ARGUMENTS] == [
        (x.name, x.default, x.forward, x.backward) for x in rows
    ]
    assert [x.name for x in _arguments.OPTIONS] == [
        x.name for x in TABLE if x.forward == x.backward == "name"
    ]


# Of each kind: values of which an argument takes some, and one that none takes.
KINDS: dict[str, tuple[list[Any], Any]] = {
    "array": ([np.ones(1, dtype) for dtype in (np.bool_, np.int64, np.float32)], 0.5),
    "flag": ([True], 0.5),
    "integer": ([1], 0.5),
    "number": ([0.5], "0.5"),
    "text": (["bshd", "cpu", "cpu-scalar"], 0.5),
    "window": ([(1, None)], 0.5),
}


@pytest.mark.parametrize("argument", _arguments.OPTIONS, ids=lambda argument: argument.name)
def test_kinds(argument):
    q = np.ones((1, 1, 1, 8), np.float32)

    def takes(value: Any) -> bool:
        try:
            fastattn.explain(q, q, q, **{argument.name: value})
        except (TypeError, ValueError):
            return False
        return True

    good, bad = KINDS[argument.kind]
    assert any(map(takes, good))
    assert not takes(bad)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (fastattn.mha, FORWARD),
        (fastattn.explain, EXPLAIN),
        (fastattn.mha_backward, BACKWARD),
        (fastattn.mha_varlen, VARLEN),
        (fastattn.mha_varlen_backward, VARLEN_BACKWARD),
    ],
    ids=["mha", "explain", "mha_backward", "mha_varlen", "mha_varlen_backward"],
)
def test_the_compiled_functions(function, wanted):
    assert list(signature(function).items()) == list(wanted.items())
    for name, parameter in inspect.signature(function).parameters.items():
        optional = "varlen" in function.__name__ and name == "cu_kv"
        by_position = optional or wanted[name] is inspect.Parameter.empty
        kind = parameter.POSITIONAL_OR_KEYWORD if by_position else parameter.KEYWORD_ONLY
        assert parameter.kind == kind, name
    if function is fastattn.explain:
        return  # it refers to mha
    documented = set(re.findall(r"^([a-z_, ]+) : ", inspect.getdoc(function) or "", re.MULTILINE))
    documented |= set(re.findall(r"^([a-z_]+(?:, [a-z_]+)+)$", inspect.getdoc(function) or "", re.MULTILINE))
    assert set(wanted) <= {name for names in documented for name in names.split(", ")}


def test_the_reference():
    # It has no devices or kernels, writes into nothing, and takes the dtype of the computation.
    forward = without(FORWARD, "out", "out_dtype", "device", "kernel") | {"dtype": None}
    assert list(signature(reference.mha).items()) == list(forward.items())
    backward = without(BACKWARD, "device", "kernel") | {"out": None, "lse": None, "dtype": None}
    assert list(signature(reference.mha_backward).items()) == list(backward.items())


def test_pytorch():
    torch = pytest.importorskip("fastattn.torch")
    # seed=None draws from PyTorch's generator.
    assert list(signature(torch.mha).items()) == list((without(FORWARD, "out") | {"seed": None}).items())
    for operator in ("mha", "mha_backward"):
        schema = getattr(pytest.importorskip("torch").ops.fastattn, operator).default._schema
        names = {x.name.removesuffix("_tensor") for x in schema.arguments}
        names = {re.sub("^window_(left|right)$", "window", name) for name in names}
        wanted = set(FORWARD) - {"out", "return_lse"} if operator == "mha" else set(BACKWARD)
        assert names - {"need_dscale", "need_dsoftcap"} == wanted | {"cu_q", "cu_kv", "mask_lists"}


def test_jax():
    jax = pytest.importorskip("fastattn.jax")
    assert list(signature(jax.mha).items()) == list(without(FORWARD, "out", "device").items())


NEW_NUMBER = """
from fastattn import _core
rows, seen = _core.argument_rows(), []
honest = {name: getattr(_core, name) for name in ("mha", "mha_backward")}
_core.argument_rows = lambda: (*rows, ("sharpness", "number", "None", "name", "name"))

def recorded(name):
    def function(*args, sharpness, **keywords):
        seen.append((name, sharpness))
        return honest[name](*args, **keywords)
    return function

for name in honest:
    setattr(_core, name, recorded(name))
"""


def test_a_new_number_reaches_the_core_through_pytorch():
    pytest.importorskip("torch")
    code = """
    import torch
    from fastattn.torch import _mha, _ops
    q = torch.ones(1, 2, 1, 8, requires_grad=True)
    given = {x.name: x.default for x in _ops.OPTIONS} | {"sharpness": 1}
    made = _mha._options(given, q) | {"q": q, "k": q, "v": q}
    _ops.call(made)[0].sum().backward()
    print(seen)
    """
    out, _ = subproc.run(NEW_NUMBER + textwrap.dedent(code), prelude=False)
    assert out.strip() == "[('mha', 1.0), ('mha_backward', 1.0)]"


def test_a_new_number_is_an_attribute_for_xla():
    pytest.importorskip("jax")
    code = """
    from fastattn import jax
    given = dict.fromkeys(jax._STATIC) | {"layout": "bshd", "sharpness": 1}
    print(*((name, type(value).__name__, str(value)) for name, value in jax._attributes(given)))
    """
    out, _ = subproc.run(NEW_NUMBER + textwrap.dedent(code), prelude=False)
    assert out.strip() == "('layout', 'str', 'bshd') ('sharpness', 'float64', '1.0')"


def test_stubs():
    tree = ast.parse((ROOT / "python/fastattn/_core.pyi").read_text())
    (options,) = [x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "_Options"]
    (packed,) = [x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "_Shared"]

    def names(of: ast.ClassDef) -> list[str]:
        return [x.target.id for x in of.body if isinstance(x, ast.AnnAssign)]  # type: ignore[union-attr]

    for name, wanted in (
        ("mha", FORWARD),
        ("explain", EXPLAIN),
        ("mha_backward", BACKWARD),
        ("mha_varlen", VARLEN),
        ("mha_varlen_backward", VARLEN_BACKWARD),
    ):
        shared = names(packed) + ([] if "varlen" in name else names(options))
        both = ("varlen", "varlen_backward") if "varlen" in name else ("forward", "backward")
        assert sorted(shared) == sorted(
            x.name for x in TABLE if {getattr(x, taken) for taken in both} == {"name"}
        )
        functions = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == name]
        assert functions
        for function in functions:
            own = [x.arg for x in (*function.args.args, *function.args.kwonlyargs)]
            assert set(own) | set(shared) == set(wanted)
            assert not set(own) & set(shared)
            for x, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
                # An overload without a default asks for True.
                assert default is None or ast.literal_eval(default) == wanted[x.arg]


def test_documents():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text.partition("## Arguments of `mha`")[2], re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(FORWARD)

    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    block = re.search(r"```text\nmha\((.*?)\)\n```", text, re.DOTALL)
    assert block is not None
    written = re.findall(r"(\w+)=([^,\s]+)", block[1])
    wanted = [(x.name, x.default) for x in TABLE if x.forward == "name"]
    assert [(name, ast.literal_eval(default)) for name, default in written] == wanted
