#!/usr/bin/env bash
# Prints the path of an nvcc that works: CUDACXX, the one of PATH or of /usr/local/cuda, else that of the extra
# cuda-build, installed into an environment of its own, where no other build finds it: tools/cuda_toolchain.sh <folder>
# Everything else goes to stderr.
#   export CUDACXX=$(tools/cuda_toolchain.sh build/cuda-venv)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: tools/cuda_toolchain.sh <folder of the environment>}
for nvcc in "${CUDACXX:-nvcc}" "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" /usr/local/cuda/bin/nvcc; do
  if nvcc=$(command -v "$nvcc") && "$nvcc" --version >/dev/null 2>&1; then
    printf '%s\n' "$nvcc"
    exit
  fi
done

mapfile -t wanted < <(python tools/requirements.py --only cuda-build)
[ -x "$venv/bin/python" ] || python -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${wanted[@]}" >&2
nvcc=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13/bin/nvcc
"$nvcc" --version >&2
printf '%s\n' "$nvcc"
