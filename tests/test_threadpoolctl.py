"""threadpoolctl controls our pool, whichever of the two is imported first."""

from __future__ import annotations

import pytest
from subproc import run

pytest.importorskip("threadpoolctl")

ORDERS = {
    "before": "import threadpoolctl, fastattn",
    "after": "import fastattn, threadpoolctl",
    "from": "import fastattn\nfrom threadpoolctl import threadpool_limits",
    "late": "import fastattn\nfastattn.kernels()\nimport importlib\nimportlib.import_module('threadpoolctl')",
}

USE = """
import os, sys, threadpoolctl
def ours():
    return [x for x in threadpoolctl.threadpool_info() if x["user_api"] == "fastattn"]
fastattn.set_num_threads(3)
(info,) = ours()
assert info["num_threads"] == 3, info
assert info["internal_api"] == "fastattn", info
assert info["version"] == fastattn.__version__, info
assert os.path.samefile(info["filepath"], fastattn._core.__file__), info
with threadpoolctl.threadpool_limits(2):
    assert fastattn.get_num_threads() == 2
    with threadpoolctl.threadpool_limits({"fastattn": 1}):
        assert fastattn.get_num_threads() == 1
    assert fastattn.get_num_threads() == 2
assert fastattn.get_num_threads() == 3
with threadpoolctl.threadpool_limits(1, user_api="blas"):
    assert fastattn.get_num_threads() == 3
assert not [f for f in sys.meta_path if type(f).__module__.startswith("fastattn")], sys.meta_path
assert not type(threadpoolctl.__spec__.loader).__module__.startswith("fastattn")
assert threadpoolctl.__loader__ is threadpoolctl.__spec__.loader
import inspect
assert "class LibController" in inspect.getsource(threadpoolctl)
print("fine")
"""


@pytest.mark.parametrize("order", ORDERS)
def test_import_order(order):
    assert run(ORDERS[order] + "\n" + USE, prelude=False)[0].strip() == "fine"


def test_the_compiled_module_of_another_package_has_the_same_name(tmp_path):
    code = f"""
    import ctypes, shutil, _ctypes, fastattn, threadpoolctl
    ctypes.CDLL(shutil.copy(_ctypes.__file__, {str(tmp_path / "_core.so")!r}))
    (info,) = [x for x in threadpoolctl.threadpool_info() if x["user_api"] == "fastattn"]
    assert info["filepath"] == fastattn._core.__file__, info
    with threadpoolctl.threadpool_limits(1):
        assert fastattn.get_num_threads() == 1
    """
    run(code, prelude=False)


@pytest.mark.parametrize("again", ["purge", "reload"])
def test_after_a_second_import(again):
    code = f"""
    import importlib, sys
    import fastattn
    if {again!r} == "purge":
        for name in [name for name in sys.modules if name.partition(".")[0] == "fastattn"]:
            del sys.modules[name]
        import fastattn
    else:
        importlib.reload(sys.modules["fastattn._threadpoolctl"])
        importlib.reload(fastattn)
    import threadpoolctl
    assert [x for x in threadpoolctl.threadpool_info() if x["user_api"] == "fastattn"]
    assert not [f for f in sys.meta_path if type(f).__module__.startswith("fastattn")], sys.meta_path
    """
    run(code, prelude=False)


def test_it_is_not_imported_by_us():
    code = """
    import sys, fastattn
    assert "threadpoolctl" not in sys.modules
    import json.tool  # other imports pass
    fastattn.set_num_threads(1)
    assert "threadpoolctl" not in sys.modules
    """
    run(code, prelude=False)


def test_where_it_is_not_installed():
    code = """
    import sys, fastattn
    sys.path[:] = []
    sys.path_importer_cache.clear()
    for _ in range(2):
        try:
            import threadpoolctl
        except ModuleNotFoundError as error:
            assert error.name == "threadpoolctl"
        else:
            raise AssertionError("found")
    """
    run(code, prelude=False)


def test_fastattn_imported_twice():
    code = """
    import importlib, sys, fastattn
    importlib.reload(fastattn)
    assert len([f for f in sys.meta_path if type(f).__module__.startswith("fastattn")]) == 1
    import threadpoolctl
    """
    run(code + "\n    importlib.reload(fastattn)\n", prelude=False)
    run("import importlib, fastattn\nimportlib.reload(fastattn)\n" + USE, prelude=False)


@pytest.mark.parametrize("content", ["", "LibController = None", "def register(x): raise AssertionError(x)"])
def test_versions_that_cannot_be_extended(tmp_path, content):
    (tmp_path / "threadpoolctl.py").write_text(content)
    for imports in ("import fastattn, threadpoolctl", "import threadpoolctl, fastattn"):
        code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{imports}\nprint(threadpoolctl.__file__)"
        assert str(tmp_path) in run(code, prelude=False)[0]


def test_errors_while_it_is_imported(tmp_path):
    (tmp_path / "threadpoolctl.py").write_text("raise ZeroDivisionError('inside')")
    code = f"""
    import sys, fastattn
    sys.path.insert(0, {str(tmp_path)!r})
    for _ in range(2):
        try:
            import threadpoolctl
        except ZeroDivisionError:
            pass
        else:
            raise AssertionError
    sys.path.pop(0)
    """
    run(code + USE.replace("\n", "\n    "), prelude=False)
