#!/usr/bin/env bash
# Builds the extension with a sanitizer into build/<name>-site and runs pytest on it:
#   tools/sanitized_pytest.sh asan|asan-short|tsan [pytest arguments]
# Without arguments: asan runs all tests but those that measure memory or build things, asan-short what .ci/run has time
# for, tsan the tests of threads.
# The interpreter itself is not instrumented, so the run-time library is preloaded; libstdc++ with it, as
# the sanitizer looks for __cxa_throw before the extension is there. CPython does not free everything at exit:
# leak detection is off.
set -euo pipefail
cd "$(dirname "$0")/.."
set=${1:?usage: tools/sanitized_pytest.sh asan|asan-short|tsan [pytest arguments]}
shift
name=${set%-short}
case "$name" in
  asan) sanitize=address,undefined libs=(libasan.so libubsan.so) ;;
  tsan) sanitize=thread libs=(libtsan.so) ;;
  *) echo "unknown sanitizer: $name" >&2; exit 2 ;;
esac
if [ $# -eq 0 ]; then
  case "$set" in
    asan) set -- tests --ignore=tests/test_memory.py --ignore=tests/test_cpp_package.py ;;
    asan-short) set -- --pairs diagonal -n auto --dist loadfile \
      tests/test_{arrays,dlpack,errors,errors_binding,features,masks,nan_rules,strides,xla_handlers,backward_{features,nan_rules,strides}}.py ;;
    # The thread sanitizer holds signals back until the next system call, and does not follow fork().
    tsan) set -- tests/test_{concurrency,determinism,backward_determinism}.py -k "not ctrl_c and not interrupt and not signal and not fork" ;;
  esac
fi
cxx=${CXX:-c++}
site=$PWD/build/$name-site

python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$site" \
  --config-settings=build-dir="build/$name-python" --config-settings=cmake.build-type=Debug \
  --config-settings=cmake.define.CMAKE_CXX_FLAGS_DEBUG="-Og -g1" --config-settings=install.strip=false \
  --config-settings=cmake.define.FASTATTN_SANITIZE="$sanitize" \
  --config-settings=cmake.define.FASTATTN_CUDA=OFF .

preload=""
for lib in "${libs[@]}" libstdc++.so.6; do
  preload="$preload $("$cxx" -print-file-name="$lib")"
done
run=()
if [ "$name" = tsan ]; then run=(setarch "$(uname -m)" -R); fi

export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}
export TSAN_OPTIONS=halt_on_error=1:die_after_fork=0:suppressions=$PWD/tools/tsan.supp${TSAN_OPTIONS:+:$TSAN_OPTIONS}
# --capture=sys: a report on the file descriptor of stderr must not be swallowed.
"${run[@]}" env LD_PRELOAD="${preload# }" python -m pytest -p no:cacheprovider --capture=sys -q "$@"
