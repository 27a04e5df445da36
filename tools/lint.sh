#!/usr/bin/env bash
# Every static check. `tools/lint.sh fix` rewrites what can be rewritten first.
set -euo pipefail
cd "$(dirname "$0")/.."

mapfile -t sources < <(find csrc tests/cpp tests/cuda_emulator bench -regex '.*\.\(h\|cpp\|inc\|cu\|cuh\)' | sort)
if [ "${1:-}" = fix ]; then
  ruff check --fix .
  ruff format .
  clang-format -i "${sources[@]}"
fi
ruff check .
ruff format --check .
mypy
clang-format --dry-run -Werror "${sources[@]}"
# clang-format leaves comments and strings as wide as they are.
if grep -nE '^.{111,}' "${sources[@]}"; then
  echo "lint: more than 110 columns" >&2
  exit 1
fi
