#!/usr/bin/env bash
# Train a language model with its experts sharded over ranks.
#
#   launch/train.sh [options of launch/train.py; --help lists them]
#
# Starts one process for each GPU, or two processes on a machine without a GPU. Exit status: 0 when all
# steps are done, 2 when options or data are refused, 128 + n after signal n, else 1. Environment:
#   NPROC_PER_NODE=4           number of processes
#   TORCHRUN_ARGS="--standalone --max-restarts 3"   options of torchrun; for several machines:
#   TORCHRUN_ARGS="--nnodes 2 --max-restarts 3 --rdzv-backend c10d --rdzv-id NAME --rdzv-endpoint HOST:PORT"
# The environment variables of launch/setup.sh apply too.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/setup.sh" train
exec python3 "$here/start.py" "$@"
