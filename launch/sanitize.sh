#!/usr/bin/env bash
# Run the op at small shapes under NVIDIA's compute-sanitizer: reads and writes out of bounds
# (memcheck), reads of memory never written (initcheck), races in shared memory (racecheck).
#
#   launch/sanitize.sh
#
# Needs a GPU and compute-sanitizer (part of the CUDA toolkit); fails if either is missing, or if
# anything is found. The environment variables of launch/setup.sh apply.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/setup.sh" train,test

if ! command -v compute-sanitizer > /dev/null; then
  echo "error: compute-sanitizer must be on PATH; it comes with the CUDA toolkit" >&2
  exit 1
fi
if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: needs a CUDA device, this machine has none" >&2
  exit 1
fi
# Every tensor in an allocation of its own, so that its bounds are known.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck initcheck racecheck; do
  echo "$tool"
  options=()
  [ "$tool" = initcheck ] && options=(--no-library-products)
  compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 --show-backtrace no \
    python3 "$here/../tests/sanitized.py" "${options[@]}"
done
