#!/usr/bin/env bash
# Run the op on small shapes under NVIDIA's compute-sanitizer, which finds accesses out of bounds
# (memcheck), reads of uninitialized memory (initcheck) and races in shared memory (racecheck).
#
#   launch/sanitize.sh
#
# Needs a GPU and compute-sanitizer (part of the CUDA toolkit); fails if either is missing, or if
# a tool reports an error. The environment variables of launch/setup.sh apply.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/setup.sh" train,test

if ! command -v compute-sanitizer > /dev/null; then
  echo "error: compute-sanitizer must be on PATH; it is part of the CUDA toolkit" >&2
  exit 1
fi
if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: needs a CUDA device, found none" >&2
  exit 1
fi
# Allocates each tensor separately, so that the tools know its bounds.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck initcheck racecheck; do
  echo "$tool"
  options=()
  [ "$tool" = initcheck ] && options=(--no-library-products)
  compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 --show-backtrace no \
    python3 "$here/../tests/sanitized.py" "${options[@]}"
done
