#!/usr/bin/env bash
# Lint, types, tests.
#
#   launch/test.sh [--quick] [options of pytest]
#
# --quick runs a part of the tests, for an answer in three minutes. It leaves out the tests marked slow (whole runs of
# scripts, of the benchmark and of the READMEs' examples on several ranks; runs that are killed, stalled or restarted),
# and of each other test all parameters but the first: further backends, dtypes, shapes, routings, numbers of ranks, bad
# options and damaged files.
#
# Without a GPU, the Triton kernels run under Triton's interpreter, tests of GPUs are skipped and say
# so, and two tests run at a time: -n 1 in the options runs one. The environment variables of launch/setup.sh apply too.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/setup.sh" train,test
cd "$here/.."

ruff check .
ruff format --check .
mypy
workers=(-n 2 --no-loadscope-reorder)
if python3 -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  # Tests of GPU memory need a GPU to themselves.
  workers=()
fi
python3 -m pytest "${workers[@]}" "$@"
