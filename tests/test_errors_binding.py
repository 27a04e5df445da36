"""How arguments are taken: keywords, kinds of values, messages in Python's own words."""

from __future__ import annotations

import decimal
import fractions
import inspect
import pickle
import re
import sys

import numpy as np
import pytest
from inputs import qkv
from subproc import run

import fastattn
from fastattn import _arguments

KEYWORDS = [x.name for x in _arguments.ARGUMENTS if x.forward == "name"]  # of mha
FUNCTIONS = ["mha", "explain"]


@pytest.fixture
def arrays():
    return qkv(np.float32, B=2, Sq=5, Sk=7, Hq=4, Hkv=2, Dv=3)


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return getattr(fastattn, request.param)


# ---- keywords ---------------------------------------------------------------------------------------
def model(q, k, v, *, causal=False):
    """What the messages are compared with."""


def message_of(function, *args, **kwargs):
    with pytest.raises(TypeError) as error:
        function(*args, **kwargs)
    return str(error.value).split("() ", 1)[1]


def test_missing_arguments_as_python_says_it(function, arrays):
    q, k, v = arrays
    for args, kwargs in [
        ((), {}),
        ((q,), {}),
        ((q, k), {}),
        ((), {"k": k}),
        ((q,), {"v": v}),
        ((), {"causal": True}),
    ]:
        assert message_of(function, *args, **kwargs) == message_of(model, *args, **kwargs)


def test_unknown_and_repeated_arguments_as_python_says_it(function, arrays):
    q, k, v = arrays
    for args, kwargs in [
        ((q, k, v), {"q": q}),
        ((q, k, v), {"v": v}),
        ((q, k, v), {"is_causal": True}),
        ((q, k, v), {"Causal": True}),
        ((q, k, v), {"caus": True}),
        ((q, k, v), {"causal ": True}),
        ((q, k, v), {"": True}),
    ]:
        message = message_of(model, *args, **kwargs).partition(". Did you mean")[0]
        assert message_of(function, *args, **kwargs) == message
    assert "unexpected keyword argument" in message_of(function, q, k, v, **{"\udc80": 1})
    assert message_of(function, q, k, v, True) == "takes 3 positional arguments but 4 were given"


def test_the_function_is_named(arrays):
    for name in FUNCTIONS:
        with pytest.raises(TypeError, match=rf"^{name}\(\) "):
            getattr(fastattn, name)(*arrays, nonsense=1)


def test_keywords_that_are_not_interned(function, arrays):
    class Name(str):
        pass

    q, k, v = arrays
    plain = function(q, k, v, causal=True)
    for name in ("".join(["cau", "sal"]), Name("causal")):
        result = function(**{"".join(["", "q"]): q, "k": k, "v": v, name: True})
        if function is fastattn.mha:
            assert np.array_equal(result, plain)
            assert not np.array_equal(result, function(q, k, v))
        else:
            assert result == plain


def test_positions_by_keyword(arrays):
    q, k, v = arrays
    expected = fastattn.mha(q, k, v)
    assert np.array_equal(fastattn.mha(v=v, q=q, k=k), expected)
    assert np.array_equal(fastattn.mha(q, v=v, k=k), expected)


def test_none_is_the_default_where_the_default_is_none(arrays):
    optional = [x.name for x in _arguments.ARGUMENTS if x.forward == "name" and x.default is None]
    assert len(optional) > 12
    assert np.array_equal(fastattn.mha(*arrays, **dict.fromkeys(optional)), fastattn.mha(*arrays))
    for name in sorted(set(KEYWORDS) - set(optional)):
        with pytest.raises(TypeError, match=rf"^{name}: expected .*, got NoneType$"):
            fastattn.mha(*arrays, **{name: None})


def test_signature_and_docstring(function, arrays):
    signature = inspect.signature(function)
    more = [] if function is fastattn.mha else ["cu_q", "cu_kv"]
    assert list(signature.parameters) == ["q", "k", "v", *more, *KEYWORDS]
    for name, parameter in signature.parameters.items():
        if name in "qkv":
            assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            assert parameter.default is inspect.Parameter.empty
        else:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    defaults = {name: p.default for name, p in signature.parameters.items() if name not in "qkv"}
    given = function(*arrays, **defaults)
    assert (
        np.array_equal(given, function(*arrays)) if function is fastattn.mha else given == function(*arrays)
    )
    for section in ("Parameters\n----------", "Returns\n-------", "Raises\n------"):
        assert section in inspect.getdoc(function)
    if function is fastattn.mha:
        for name in ["q", "k", "v", *KEYWORDS]:
            assert re.search(rf"^(\w+, )?{name}(, \w+)? :", inspect.getdoc(function), re.MULTILINE), name


def test_functions_and_exceptions_can_be_pickled(function):
    assert pickle.loads(pickle.dumps(function)) is function
    for exception in (fastattn.UnsupportedError, fastattn.CudaError):
        copy = pickle.loads(pickle.dumps(exception("why")))
        assert type(copy) is exception
        assert copy.args == ("why",)
        assert exception.__module__ == "fastattn"


def test_bases_of_the_exceptions():
    assert issubclass(fastattn.UnsupportedError, ValueError)
    assert issubclass(fastattn.CudaError, RuntimeError)


# ---- arrays -----------------------------------------------------------------------------------------
ARRAYS = ["q", "k", "v", "mask", "bias", "alibi_slopes", "sinks", "q_lens", "kv_lens", "out"]
NOT_ARRAYS = [
    [[1.0, 2.0]],
    (1,),
    "abc",
    b"abc",
    1.5,
    1,
    True,
    np.float32(1),
    np.ones,
    np.ndarray,
    {},
    object(),
    1j,
]


@pytest.mark.parametrize("value", NOT_ARRAYS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ARRAYS)
def test_not_an_array(function, arrays, name, value):
    given = dict(zip("qkv", arrays, strict=True)) | {name: value}
    kind = re.escape(type(value).__name__)
    with pytest.raises(TypeError, match=rf"^{name}: expected an array .*, got (numpy\.)?{kind}$"):
        function(**given)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_none_is_not_an_array(function, arrays, name):
    with pytest.raises(TypeError, match=rf"^{name}: expected an array .*, got NoneType$"):
        function(**(dict(zip("qkv", arrays, strict=True)) | {name: None}))


# ---- values -----------------------------------------------------------------------------------------
BOOLS = ["causal", "return_lse", "return_weights"]


@pytest.mark.parametrize(
    "value", ["yes", "", 1, 0, 1.0, np.int8(1), [], np.ones(1, bool), np.array(True)], ids=repr
)
@pytest.mark.parametrize("name", BOOLS)
def test_bools(function, arrays, name, value):
    with pytest.raises(TypeError, match=rf"^{name}: expected a bool, got "):
        function(*arrays, **{name: value})


NUMBERS = _arguments.names("number")


@pytest.mark.parametrize(
    "value",
    ["1", True, np.True_, 1j, [1.0], np.ones(1), np.ones((2, 2)), pytest.param(object(), id="object")],
    ids=repr,
)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(function, arrays, name, value):
    with pytest.raises(TypeError, match=rf"^{name}: expected a real number, got "):
        function(*arrays, **{name: value})


@pytest.mark.parametrize("value", [fractions.Fraction(1, 2), decimal.Decimal("0.5")])
def test_numbers_of_the_standard_library(arrays, value):
    for name in NUMBERS:
        assert np.array_equal(fastattn.mha(*arrays, **{name: value}), fastattn.mha(*arrays, **{name: 0.5}))


@pytest.mark.parametrize("name", NUMBERS)
def test_integers_that_are_no_floats(function, arrays, name):
    with pytest.raises(ValueError, match=rf"^{name}: the integer does not fit"):
        function(*arrays, **{name: 10**400})


def test_errors_of_a_number_are_left_alone(arrays):
    class Broken:
        def __float__(self):
            raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside"):
        fastattn.mha(*arrays, scale=Broken())


def test_seed(function, arrays):
    for value in (1.0, "1", None, [1], np.float32(1)):
        with pytest.raises(TypeError, match=r"^seed: expected an int, got "):
            function(*arrays, seed=value)
    for value in (-1, 2**64, -(10**30)):
        with pytest.raises(ValueError, match=rf"^seed: expected 0 <= seed < 2\*\*64, got {value}$"):
            function(*arrays, seed=value)
    function(*arrays, seed=2**64 - 1, dropout=0.5)


def test_window(function, arrays):
    for value in (3, "ab", {1, 2}, np.array([1, 2]), (1.0, 2), (1, "2"), (None, [])):
        with pytest.raises(
            TypeError, match=r"^window: expected \(left, right\), each an int >= 0 or None, got "
        ):
            function(*arrays, window=value)
    for value in ((), (1,), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"^window: expected \(left, right\).*, got \d items$"):
            function(*arrays, window=value)
    for value in ((-1, 0), (0, -1), (-(10**30), None)):
        with pytest.raises(ValueError, match=r"^window: "):
            function(*arrays, window=value)


def test_q_offset(function, arrays):
    for value in (1.0, "1", [1, 2], np.float32(1), None.__class__, 1j):
        with pytest.raises(
            TypeError, match=r"^q_offset: expected an int or an integer array of shape \(B,\), got "
        ):
            function(*arrays, q_offset=value)
    for value in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match=r"^q_offset: expected an int of at most 64 bits, got "):
            function(*arrays, q_offset=value)
    for value in (np.array([1.0, 2.0]), np.array(1.5), np.array([True, False])):
        with pytest.raises(TypeError, match="integer"):
            function(*arrays, q_offset=value)


@pytest.mark.parametrize("name", ["layout", "device", "kernel"])
def test_names(function, arrays, name):
    for value in (1, b"cpu", ["cpu"], np.array("cpu")):
        with pytest.raises(TypeError, match=rf"^{name}: expected a str"):
            function(*arrays, **{name: value})
    for value in ("", "\udc80", "nonsense", "cpu\0x", "x" * 100_000):
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            function(*arrays, **{name: value})


def test_layout_is_named(function, arrays):
    with pytest.raises(ValueError, match=r"^layout: expected 'bshd' or 'bhsd', got 'BSHD'$"):
        function(*arrays, layout="BSHD")


def test_threads_argument():
    for value in (1.0, "2", None, True):
        with pytest.raises(TypeError, match=r"^n: expected an int, got "):
            fastattn.set_num_threads(value)
    for value in (0, -1, 2**31, 10**30):
        with pytest.raises(ValueError, match=r"^n: expected an int"):
            fastattn.set_num_threads(value)
    before = fastattn.get_num_threads()
    fastattn.set_num_threads(np.int64(before))
    assert fastattn.get_num_threads() == before
    assert str(inspect.signature(fastattn.set_num_threads)) == "(n)"
    assert str(inspect.signature(fastattn.get_num_threads)) == "()"


# ---- errors that must not leave anything behind -------------------------------------------------------
def test_errors_do_not_leak():
    code = """
    import gc, sys
    q, k, v = qkv(np.float32, 1, 4, 2, 8)
    wrong = np.zeros((9, 9), bool)
    def all_wrong():
        for kwargs in ({"mask": wrong}, {"mask": 3}, {"nonsense": 1}, {"window": (1, "a")}, {"kernel": "x"},
                       {"out": wrong}, {"scale": np.nan}, {"q_offset": 10**30}):
            try:
                fastattn.mha(q, k, v, **kwargs)
            except (TypeError, ValueError):
                continue
            raise AssertionError(kwargs)
    for _ in range(20):
        all_wrong()
    gc.collect()
    before, blocks = [sys.getrefcount(x) for x in (q, k, v, wrong, None)], sys.getallocatedblocks()
    for _ in range(300):
        all_wrong()
    gc.collect()
    after, more = [sys.getrefcount(x) for x in (q, k, v, wrong, None)], sys.getallocatedblocks() - blocks
    assert [a - b for a, b in zip(after[:4], before)] == [0] * 4
    assert abs(more) < 100, more
    """
    run(code)


def test_memory_error_names_the_result_and_the_bytes():
    q = np.broadcast_to(np.zeros((), np.float32), (1, 2**44, 1, 8))
    k = np.zeros((1, 3, 1, 8), np.float32)
    with pytest.raises(MemoryError, match=f"out.* {2**44 * 32} bytes"):
        fastattn.mha(q, k, k)
    # What is wrong with the arguments matters more.
    with pytest.raises(ValueError, match=r"^v: "):
        fastattn.mha(q, k, k[:, :2])


@pytest.mark.skipif(sys.version_info < (3, 12), reason="pybind11 needs CPython 3.12 for this")
def test_module_in_another_interpreter():
    # NumPy cannot be in two interpreters of a process; without it our module still loads and says so.
    code = """
    try:
        import _interpreters as interpreters
    except ImportError:
        import _xxsubinterpreters as interpreters
    from fastattn import _core
    script = f'''
    import importlib.machinery, importlib.util
    loader = importlib.machinery.ExtensionFileLoader("fastattn._core", {_core.__file__!r})
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("fastattn._core", loader))
    loader.exec_module(module)
    assert module.get_num_threads() >= 1
    assert issubclass(module.UnsupportedError, ValueError)
    assert len(module.kernel_rows()) >= 2
    try:
        module.set_num_threads(0)
    except ValueError:
        pass
    else:
        raise AssertionError("no error")
    '''
    import textwrap
    for _ in range(3):
        other = interpreters.create()
        failure = interpreters.run_string(other, textwrap.dedent(script))
        assert failure is None, failure
        interpreters.destroy(other)
        q = np.ones((2, 4), np.float32)
        assert (fastattn.mha(q, q, q) == 1).all()
        try:
            fastattn.mha(q, q, q, kernel="nonsense")
        except fastattn.UnsupportedError:
            pass
    print("fine")
    """
    assert run(code)[0].strip() == "fine"


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="there it works")
def test_a_sub_interpreter_that_is_too_old_is_told():
    """Before 3.12 the import waited forever for the GIL of the main interpreter."""
    code = """
    import _xxsubinterpreters as interpreters
    script = '''
    for _ in range(2):  # nothing is left behind by the first
        try:
            import fastattn
        except ImportError as error:
            assert "sub-interpreter" in str(error) and "3.12" in str(error), error
        else:
            raise AssertionError("no error")
    '''
    import textwrap
    for _ in range(2):
        other = interpreters.create()
        interpreters.run_string(other, textwrap.dedent(script))
        interpreters.destroy(other)
    import fastattn, numpy as np
    q = np.ones((2, 4), np.float32)
    assert (fastattn.mha(q, q, q) == 1).all()
    """
    run(code, prelude=False, timeout=60)
