#!/usr/bin/env bash
# Configures, builds and tests one preset of CMakePresets.json: tools/cpp.sh <preset> [ctest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
preset=${1:?usage: tools/cpp.sh <preset> [ctest arguments]}
shift

run=()
# GCC's thread sanitizer cannot map its shadow on kernels with strong address randomisation.
if [ "$preset" = tsan ]; then run=(setarch "$(uname -m)" -R); fi

cmake --preset "$preset"
cmake --build --preset "$preset" --parallel "$(nproc)"
"${run[@]}" ctest --preset "$preset" "$@"
