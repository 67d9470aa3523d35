#!/usr/bin/env bash
# Lint, types, all tests.
#
#   launch/test.sh [options of pytest]
#
# Uses the GPUs of the machine; without one, GPU tests are skipped and say so, and the Triton
# kernels run under Triton's interpreter. The environment variables of launch/setup.sh apply too.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/setup.sh" train,test
cd "$here/.."

ruff check .
ruff format --check .
mypy
python3 -m pytest "$@"
