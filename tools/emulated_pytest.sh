#!/usr/bin/env bash
# Builds the extension with the emulated GPU into build/emulated-site and runs pytest on it:
#   tools/emulated_pytest.sh [pytest arguments]
# Without arguments: the tests that loop over kernels, those of them that name CUDA, and all of tests/test_cuda_*.py.
set -euo pipefail
cd "$(dirname "$0")/.."
site=$PWD/build/emulated-site

python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$site" \
  --config-settings=build-dir=build/emulated-python --config-settings=cmake.define.FASTATTN_CUDA=EMULATED .

export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
run() { python -m pytest -p no:cacheprovider -q "$@"; }
if [ $# -gt 0 ]; then
  run "$@"
  exit
fi
# By their names, -k chooses all tests of test_cuda_*.py.
run --pairs "${FASTATTN_TEST_PAIRS:-all}" -n auto --dist loadfile -k cuda \
  tests/test_{forward_grid,features,masks,nan_rules,strides,large_scores,errors,concurrency}.py \
  tests/test_backward_{grid,features,nan_rules,strides,kinds}.py tests/test_cuda_*.py
