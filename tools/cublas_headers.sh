#!/usr/bin/env bash
# Prints a folder with the headers of cuBLAS, for check_cublas_abi: tools/cublas_headers.sh <cache folder>
# They come only with the whole library, 400 MB, which is downloaded once for them and not kept. When that takes longer
# than a minute, or fails, nothing is printed, and the status is 0: check_cublas_abi is then shown as disabled.
set -euo pipefail
cache=${1:?usage: tools/cublas_headers.sh <cache folder>}
version=13.0.2.14
folder=$cache/cublas-$version
if [ ! -e "$folder/cublasLt.h" ]; then
  download=$(mktemp -d "${TMPDIR:-/tmp}/cublas.XXXXXX")
  trap 'rm -rf "$download"' EXIT
  if ! timeout 60 python -m pip download --quiet --disable-pip-version-check --no-cache-dir --no-deps \
    --only-binary=:all: --dest "$download" "nvidia-cublas==$version" >&2; then
    echo "cuBLAS $version could not be downloaded within a minute: check_cublas_abi is not compiled" >&2
    exit
  fi
  python - "$download" "$folder" <<'PY' >&2
import sys
import zipfile
from pathlib import Path

wheel = next(Path(sys.argv[1]).glob("*.whl"))
folder = Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
with zipfile.ZipFile(wheel) as archive:
    # cublasLt.h last: it marks the folder as complete.
    for name in ("cublas_api.h", "cublasLt.h"):
        (folder / name).write_bytes(archive.read(f"nvidia/cu13/include/{name}"))
PY
fi
printf '%s\n' "$folder"
