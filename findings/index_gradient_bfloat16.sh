#!/usr/bin/env bash
# The gradient of table[ids] stalls in 16 bits on CPUs, that of index_select does not (torch 2.13.0).
#
# Expected: both sum a row's uses alike. Seen: for a row used 8,192 times in bfloat16, table[ids] gives
# 256 and index_select 8,192. A plain-PyTorch baseline of embedding or expert tables is wrong in hot rows
# for that reason. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch

table = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
ids = torch.zeros(8192, dtype=torch.long)
(indexed,) = torch.autograd.grad(table[ids].sum(), table)
(selected,) = torch.autograd.grad(table.index_select(0, ids).sum(), table)
print(torch.__version__, indexed.item(), selected.item())
assert (indexed.item(), selected.item()) == (256, 8192)
PYTHON
