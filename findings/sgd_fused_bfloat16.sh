#!/usr/bin/env bash
# Fused SGD on CPUs leaves a bfloat16 parameter as it is (torch 2.13.0).
#
# Expected: the step that SGD takes without fused=True. Seen: without it all 4,096 elements change, with
# it none does; no error and no warning. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch

changed = {}
for fused in (False, True):
    parameter = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=0.5, fused=fused).step()
    changed[fused] = (parameter != 1).sum().item()
print(torch.__version__, changed)
assert changed == {False: 4096, True: 0}
PYTHON
