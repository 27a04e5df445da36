"""The C++ package from its sources: configure, build, install, and use it from another project."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.cpp_package,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed"),
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"),
    # The run-time library of a sanitizer must not be preloaded into compilers.
    pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="something is preloaded into every process"),
]


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


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
