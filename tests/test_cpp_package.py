"""The C++ package from its sources: configure, build, install, and use it from another project."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed"),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"),
    # The run-time library of a sanitizer must not be preloaded into compilers.
    pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="something is preloaded into every process"),
]


def run(*command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | (env or {}),
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.cpp_package  # ctest has the same test of its own build
def test_installed_package_builds_and_runs_a_consumer(tmp_path: Path) -> None:
    # Not optimised: this is about the package, and takes a third of the time.
    options = ["-DCMAKE_BUILD_TYPE=Debug", "-DFASTATTN_TESTS=OFF", "-DFASTATTN_CUDA=OFF"]
    run("cmake", "-S", ROOT, "-B", tmp_path / "build", *options)
    run("cmake", "--build", tmp_path / "build", "--parallel", os.cpu_count() or 1)
    printed = run(
        "cmake",
        f"-DBUILD={tmp_path / 'build'}",
        f"-DWORK={tmp_path / 'package'}",
        f"-DCONSUMER={ROOT / 'tests/cpp/consumer'}",
        "-P",
        ROOT / "tests/cpp/check_package.cmake",
    )
    assert "1.66047" in printed

    installed = {
        path.relative_to(tmp_path / "package/prefix") for path in tmp_path.glob("package/prefix/**/*.*")
    }
    assert Path("include/fastattn/attention.h") in installed
    assert not [path for path in installed if path.suffix in {".py", ".so"}], (
        "the C++ component has Python files"
    )


# ---- flags from outside --------------------------------------------------------------------------
FAST = "-ffinite-math-only -funsafe-math-optimizations -freciprocal-math -fno-signed-zeros"
WAYS = {
    "CXXFLAGS": ({"CXXFLAGS": "-ffast-math"}, []),
    "CXXFLAGS, by name": ({"CXXFLAGS": FAST, "LDFLAGS": FAST}, []),
    "CMAKE_CXX_FLAGS": ({}, [f"-DCMAKE_CXX_FLAGS=-Ofast {FAST}"]),
    "CMAKE_CXX_FLAGS_RELEASE": ({}, ["-DCMAKE_CXX_FLAGS_RELEASE=-Ofast -DNDEBUG"]),
    "the compiler": ({"CXX": f"{os.environ.get('CXX', 'c++')} -ffast-math"}, []),
}


def macros(command: list[str]) -> dict[str, str]:
    """What a compiler command predefines."""
    i = command.index("-c")
    command = [*command[: command.index("-o")], "-E", "-dM", command[i + 1]]
    source = command.pop()
    lines = run(*command, "-x", "c++", "/dev/null", cwd=Path(source).parent).splitlines()
    return dict(line.split(" ", 2)[1:] for line in lines if line.count(" ") > 1)


@pytest.mark.parametrize(("env", "options"), WAYS.values(), ids=WAYS)
def test_fast_math_is_taken_back(env: dict[str, str], options: list[str], tmp_path: Path) -> None:
    """In every object of every instruction set, and in the link: NaN was put where a row sees nothing."""
    has_pybind11 = not subprocess.run(
        [sys.executable, "-c", "import pybind11"], capture_output=True
    ).returncode
    python = [f"-DPython_EXECUTABLE={sys.executable}", f"-DFASTATTN_PYTHON={'ON' if has_pybind11 else 'OFF'}"]
    options = ["-G", "Ninja", "-DFASTATTN_TESTS=OFF", "-DFASTATTN_CUDA=OFF", *python, *options]
    if shutil.which("ninja") is None:
        options[1] = "Unix Makefiles"
    run("cmake", "-S", ROOT, "-B", tmp_path, *options, env=env)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    assert len(commands) > 15
    assert {"isa_scalar.cpp", "dispatch.cpp"} <= {Path(entry["file"]).name for entry in commands}
    asked = set(re.findall(r"-(?:Ofast|f[a-z-]+)", " ".join([*env.values(), *options])))
    assert all(asked & set(shlex.split(entry["command"])) for entry in commands)
    seen = set()
    for entry in commands:
        arguments = shlex.split(entry["command"])
        flags = tuple(word for word in arguments if word.startswith("-") and word not in ("-c", "-o"))
        if flags in seen:
            continue
        seen.add(flags)
        defined = macros(arguments)
        assert defined.get("__FINITE_MATH_ONLY__", "0") == "0", entry["file"]
        for name in ("FAST_MATH", "ASSOCIATIVE_MATH", "RECIPROCAL_MATH", "NO_SIGNED_ZEROS"):
            assert f"__{name}__" not in defined, (name, entry["file"])
    if has_pybind11 and shutil.which("ninja") is not None:
        link = run("ninja", "-C", tmp_path, "-t", "commands", "_core").splitlines()[-1]
        link = next(part for part in link.split(" && ") if " -shared " in part)
        done = subprocess.run(
            [*shlex.split(link), "-###"], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert "-shared" in done.stderr
        assert "crtfastmath" not in done.stderr, "import would change the floating-point environment"


@pytest.mark.parametrize(
    "flag", ["-ffast-math", "-Ofast", "-ffinite-math-only", "-funsafe-math-optimizations"]
)
def test_an_object_with_fast_math_does_not_compile(flag: str) -> None:
    """Should a flag get past ours, as one of a compiler's wrapper that comes last."""
    guard = ROOT / "csrc/core/ieee_arithmetic.h"
    command = [os.environ.get("CXX", "c++"), "-fsyntax-only", "-x", "c++", str(guard)]
    subprocess.run(command, check=True)
    done = subprocess.run([*command, flag], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "wrong results with" in done.stderr


# ---- in somebody's project -----------------------------------------------------------------------
PARENT = """
cmake_minimum_required(VERSION 3.20)
project(parent VERSION 1.2.3 LANGUAGES CXX)
include(GNUInstallDirs)
find_package(Threads REQUIRED)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(watched CMAKE_BUILD_TYPE CMAKE_CXX_FLAGS CMAKE_CXX_FLAGS_RELEASE CMAKE_CXX_STANDARD BUILD_SHARED_LIBS
  CMAKE_INSTALL_LIBDIR CMAKE_PREFIX_PATH CMAKE_MODULE_PATH CMAKE_POSITION_INDEPENDENT_CODE BUILD_TESTING)
get_cmake_property(before CACHE_VARIABLES)
foreach(name IN LISTS before)
  get_property(cached_${name} CACHE ${name} PROPERTY VALUE)
endforeach()
foreach(name IN LISTS watched)
  set(value_of_${name} "${${name}}")
endforeach()
add_subdirectory(@ROOT@ fastattn)
get_cmake_property(after CACHE_VARIABLES)
foreach(name IN LISTS after)
  get_property(value CACHE ${name} PROPERTY VALUE)
  if(NOT name IN_LIST before)
    if(NOT name MATCHES "^(FASTATTN_|fastattn_)")
      message(SEND_ERROR "new in the cache: ${name}=${value}")
    endif()
  elseif(NOT "${value}" STREQUAL "${cached_${name}}")
    message(SEND_ERROR "changed in the cache: ${name} from '${cached_${name}}' to '${value}'")
  endif()
endforeach()
foreach(name IN LISTS watched)
  if(NOT "${${name}}" STREQUAL "${value_of_${name}}")
    message(SEND_ERROR "changed: ${name} from '${value_of_${name}}' to '${${name}}'")
  endif()
endforeach()
add_executable(theirs main.cpp)
target_link_libraries(theirs PRIVATE fastattn::fastattn)
install(TARGETS theirs)
"""


@pytest.mark.parametrize("build_type", ["", "Debug"])
def test_a_parent_keeps_its_settings(build_type: str, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(PARENT.replace("@ROOT@", str(ROOT)))
    (tmp_path / "main.cpp").write_text("#include <fastattn/attention.h>\nint main() {}\n")
    libraries = tmp_path / "elsewhere" / "lib64"
    options = [
        "-DFASTATTN_CUDA=OFF",
        f"-DCMAKE_BUILD_TYPE={build_type}",
        f"-DCMAKE_INSTALL_LIBDIR={libraries}",
    ]
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", *options)
    cache = (tmp_path / "build/CMakeCache.txt").read_text()
    assert f"CMAKE_BUILD_TYPE:STRING={build_type}\n" in cache
    assert "FASTATTN_TESTS:BOOL=OFF" in cache
    commands = json.loads((tmp_path / "build/compile_commands.json").read_text())
    by_name = {Path(entry["file"]).name: entry["command"] for entry in commands}
    # Without a build type ours is optimised all the same, and theirs is left alone.
    assert (" -O3 " in by_name["isa_scalar.cpp"]) == (not build_type)
    assert " -O3 " not in by_name["main.cpp"]
    assert "-ffp-contract" not in by_name["main.cpp"]


@pytest.mark.parametrize("at", ["configuration", "installation"])
def test_an_absolute_libdir(at: str, tmp_path: Path) -> None:
    """The prefix may be given when the project is configured or when it is installed."""
    libraries, prefix = tmp_path / "libraries", tmp_path / "prefix"
    options = ["-DFASTATTN_TESTS=OFF", "-DFASTATTN_CUDA=OFF", f"-DCMAKE_INSTALL_LIBDIR={libraries}"]
    options += [f"-DCMAKE_INSTALL_PREFIX={prefix}"] if at == "configuration" else []
    run("cmake", "-S", ROOT, "-B", tmp_path / "build", *options)
    (tmp_path / "build/libfastattn.a").write_bytes(b"")  # where things are is asked here, not what they do
    given = ["--prefix", prefix] if at == "installation" else []
    run("cmake", "--install", tmp_path / "build", "--component", "cpp", *given)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(user CXX)\nfind_package(fastattn REQUIRED)\n"
        'file(GENERATE OUTPUT found.txt CONTENT "$<TARGET_FILE:fastattn::fastattn>\\n'
        '$<TARGET_PROPERTY:fastattn::fastattn,INTERFACE_INCLUDE_DIRECTORIES>")\n'
    )
    package = f"-Dfastattn_DIR={libraries}/cmake/fastattn"
    run("cmake", "-S", tmp_path, "-B", tmp_path / "user", package)
    library, headers = (tmp_path / "user/found.txt").read_text().splitlines()
    assert Path(library) == libraries / "libfastattn.a"
    assert (Path(headers) / "fastattn/attention.h").is_file()


# ---- from sources that one may not write to ------------------------------------------------------
def without_the_right_to_write() -> None:
    """In a child: the super-user obeys the permission bits like others."""
    import ctypes

    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2, 3):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
            if libc.prctl(24, capability, 0, 0, 0):  # PR_CAPBSET_DROP; in force as of the next program
                raise OSError(ctypes.get_errno(), "prctl")


def test_a_wheel_from_sources_that_are_read_only(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core")
    pytest.importorskip("pybind11")
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("cmake", "csrc", "python"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for path in (tree, *tree.rglob("*")):
        path.chmod(path.stat().st_mode & 0o555)
    probe = f"open({str(tree / 'probe')!r}, 'w')"
    try:
        child = subprocess.run(
            [sys.executable, "-c", probe], preexec_fn=without_the_right_to_write, check=False
        )
    except subprocess.SubprocessError:
        pytest.skip("this process may write anywhere, and cannot give that up")
    if child.returncode == 0:
        pytest.skip("this process may write anywhere, and cannot give that up")
    # Configured and packed; nothing of it is compiled.
    options = {"build.targets": "help", "install.components": "none", "cmake.define.FASTATTN_CUDA": "OFF"}
    code = f"""
import os
from scikit_build_core.build import build_wheel
os.chdir({str(tree)!r})
print(build_wheel({str(tmp_path)!r}, {options!r}))
"""
    before = sorted(tree.rglob("*"))
    # CI names a folder for builds below the sources; a user's build has none.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SKBUILD_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=without_the_right_to_write,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        assert list(tmp_path.glob("fastattn-*.whl"))
        assert sorted(tree.rglob("*")) == before
    finally:
        for path in (tree, *tree.rglob("*")):
            path.chmod(path.stat().st_mode | 0o700)
