#!/usr/bin/env bash
# Train a language model with its experts sharded over ranks.
#
#   launch/train.sh [options of launch/train.py; --help lists them]
#
# Starts one process for each GPU, or two processes on a machine without a GPU. Environment:
#   NPROC_PER_NODE=4           number of processes
#   TORCHRUN_ARGS="--standalone --max-restarts 3"   options of torchrun; for several machines:
#   TORCHRUN_ARGS="--nnodes 2 --max-restarts 3 --rdzv-backend c10d --rdzv-id NAME --rdzv-endpoint HOST:PORT"
# The environment variables of launch/setup.sh apply too.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/setup.sh" train

for option in "$@"; do
  case $option in -h|--help) exec python3 "$here/train.py" --help ;; esac
done

gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
processes=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 2))}
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
  echo "error: NPROC_PER_NODE must be a positive number, got $processes" >&2
  exit 2
fi
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
# torchrun (torch 2.11 to 2.13) reuses a shared store after restarts; when the machines come back in
# another order, they do not agree on which machine has it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
# Unquoted, so that TORCHRUN_ARGS is split into words.
exec python3 -m torch.distributed.run ${TORCHRUN_ARGS:---standalone} \
  --nproc-per-node "$processes" "$here/train.py" "$@"
