#!/usr/bin/env bash
# gloo gathers 8-, 32- and 64-bit integers and bfloat16, but no 16-bit integers (torch 2.13.0).
#
# Expected: collectives that only copy bytes take any dtype. Seen: all_gather_into_tensor of int16 and uint16 raises
# "Invalid scalar type", and so does full_tensor() of a DTensor that holds them. Bits that belong to 16-bit floats are
# kept as twice as many uint8. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 numpy
STORE=$folder/store "$folder/venv/bin/python" - <<'PYTHON'
import os

import torch
import torch.distributed as dist

store = dist.FileStore(os.environ["STORE"], 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
refused = []
for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.bfloat16):
    try:
        dist.all_gather_into_tensor(torch.empty(4, dtype=dtype), torch.ones(4, dtype=dtype))
    except RuntimeError as error:
        print(dtype, error)
        assert "Invalid scalar type" in str(error)
        refused.append(dtype)
print(torch.__version__, "refused:", refused)
assert refused == [torch.int16, torch.uint16]
dist.destroy_process_group()
PYTHON
