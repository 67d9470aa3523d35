#!/usr/bin/env bash
# Optimizer.load_state_dict converts float state to the dtype of its parameter (torch 2.13.0).
#
# Expected: state comes back in the dtype that it was saved in. Seen: an optimizer of one's own that keeps a float32
# second moment for a bfloat16 parameter has a bfloat16 one after loading its own state dict; .999 is then 1. Only
# a state tensor named "step" keeps its dtype. An optimizer with such state has to load its tensors itself. (Source:
# torch/optim/optimizer.py, _process_value_according_to_param_policy.) Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


class Own(torch.optim.Optimizer):
    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {})
        for parameter in parameters:
            self.state[parameter] = {
                "second": torch.full((3,), 0.999, dtype=torch.float32),
                "step": torch.full((3,), 0.999, dtype=torch.float32),
            }


parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
optimizer = Own([parameter])
optimizer.load_state_dict(optimizer.state_dict())
state = optimizer.state[parameter]
print(torch.__version__, state)
assert state["second"].dtype == torch.bfloat16
assert state["step"].dtype == torch.float32
PYTHON
