"""The package as tools see it: that walk over modules, and that look for imports without running anything."""

from __future__ import annotations

import ast
import modulefinder
import pkgutil
import re
from pathlib import Path

import pytest
from subproc import run

import fastattn

ROOT = Path(__file__).parents[1]

# ---- a walk never raises -------------------------------------------------------------------------
# What a module that is asked for may do: not be there in two ways, or be there and fail.
ABSENT = {
    "not installed": """
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "jax"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Absent())
        found = set()
    """,
    "blocked": """
        sys.modules["torch"] = sys.modules["jax"] = None
        found = set()
    """,
    "broken": """
        import importlib.abc, importlib.machinery
        class Broken(importlib.abc.Loader):
            def find_spec(self, name, path=None, target=None):
                return importlib.machinery.ModuleSpec(name, self) if name in ("torch", "jax") else None
            def create_module(self, spec): return None
            def exec_module(self, module): raise OSError("libtorch.so: cannot open shared object file")
        sys.meta_path.insert(0, Broken())
        found = {"torch", "jax"}
    """,
    "too old": """
        import types
        for name in ("torch", "jax"): sys.modules[name] = types.ModuleType(name)  # has nothing
        found = {"torch", "jax"}
    """,
}
WALK = """
import inspect, pkgutil, pydoc, warnings
from unittest import mock
assert set(dir(fastattn)) & {"torch", "jax"} == found, dir(fastattn)
assert "reference" in dir(fastattn)
for name in ("torch", "jax"):
    assert not hasattr(fastattn, name)
    assert getattr(fastattn, name, "default") == "default"
    try:
        getattr(fastattn, name)
    except AttributeError as error:
        assert f"has no attribute '{name}' here: " in str(error) and error.__cause__ is not None, error
    try:
        exec(f"from fastattn import {name}")
    except Exception as error:
        assert not isinstance(error, AttributeError) or "fastattn" not in str(error), error
    else:
        raise AssertionError
names = {name for name, value in inspect.getmembers(fastattn)}
assert set(fastattn.__all__) <= names and not names & {"torch", "jax"}
assert "mha_backward" in pydoc.render_doc(fastattn)
autospec = mock.create_autospec(fastattn)
assert autospec.mha and autospec.reference.mha
for name in dir(fastattn):
    getattr(fastattn, name, None)
walk = pkgutil.walk_packages(fastattn.__path__, "fastattn.", onerror=lambda name: None)
assert "fastattn.torch" in {module.name for module in walk}
"""


@pytest.mark.parametrize("absent", ABSENT.values(), ids=ABSENT)
def test_a_walk_without_frameworks_never_raises(absent: str) -> None:
    import textwrap

    run(textwrap.dedent(absent) + WALK)


def test_names_that_there_are_not() -> None:
    with pytest.raises(AttributeError, match=r"^module 'fastattn' has no attribute 'nonsense'$"):
        fastattn.nonsense  # noqa: B018


# ---- frozen applications -------------------------------------------------------------------------
# Not NumPy's affair and not ours: found where they are installed, by whoever imports what needs them.
OTHERS = {"ml_dtypes"}


def imported_by_cpp() -> set[str]:
    """The modules that the sources of the extension import by name."""
    names = set()
    for path in (ROOT / "csrc/bindings").glob("*.[ch]*"):
        text = path.read_text()
        names |= set(re.findall(r'(?:ImportModule\w*|module_::import|imported_module)\("([\w.]+)"', text))
        unreadable = re.findall(r"(?:PyImport_Import\w*|module_::import)\((?!\").*", text)
        assert not unreadable, f"{path.name}: which module is that? {unreadable}"
    return names


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What static analysis of `import fastattn` finds, as PyInstaller, py2app and others do it."""
    script = tmp_path_factory.mktemp("frozen") / "application.py"
    script.write_text("import fastattn, fastattn.__main__\n")
    # Not into the frameworks, nor into NumPy: that takes minutes, and is theirs. Hence only our package here.
    folder = tmp_path_factory.mktemp("packages")
    (folder / "fastattn").symlink_to(Path(fastattn.__file__).parent)
    finder = modulefinder.ModuleFinder([str(folder)], excludes=["torch", "jax"])
    finder.run_script(str(script))
    return set(finder.modules) | set(finder.badmodules)


def test_static_analysis_sees_what_only_cpp_imports(seen: set[str]) -> None:
    wanted = imported_by_cpp()
    assert {"fastattn._arrays", "fastattn._attention", "fastattn._cuda", "threading"} <= wanted
    for name in wanted - OTHERS:
        # Of NumPy's own modules the package is enough, tools know what belongs to it.
        assert (name.partition(".")[0] if name.startswith("numpy.") else name) in seen, name


def test_static_analysis_sees_the_whole_package(seen: set[str]) -> None:
    """But for the modules that need a framework: who uses one of those imports it by name."""
    package = Path(fastattn.__file__).parent
    names = {
        module.name
        for module in pkgutil.walk_packages([str(package)], "fastattn.", onerror=lambda name: None)
    }
    own = {name for name in names if name.split(".")[1] not in ("torch", "jax")}
    assert len(own) > 15
    assert sorted(own - seen) == []


def test_our_modules_are_imported_by_statements() -> None:
    """A name that is put together when the program runs is seen by no tool."""
    for path in (ROOT / "python/fastattn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("import_module", "__import__")
            ):
                wanted = ast.unparse(node.args[0])
                on_demand = path.name == "__init__.py" and wanted == "f'fastattn.{name}'"
                assert on_demand or "fastattn" not in wanted, f"{path.name}: {wanted}"


def test_import_loads_nothing_of_that() -> None:
    out, _ = run(
        """
        import sys
        before = set(sys.modules)
        import fastattn
        late = ("numpy", "fastattn._arrays", "fastattn._cuda", "fastattn.reference", "importlib.util")
        print([name for name in late if name in sys.modules and name not in before])
        """,
        prelude=False,
    )
    assert out == "[]\n"
