#!/usr/bin/env bash
# opcheck rejects a correct custom op that returns an integer tensor before a float one (torch 2.13.0).
#
# Expected: the order of outputs does not matter. Seen: test_aot_dispatch_dynamic fails with "result type Float can't
# be cast to the desired output type Long", as it adds up all outputs into the first; with the float tensor first it
# passes. An op that returns indices and scores is declared with the scores first. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import Tensor
from torch.testing._internal.optests.generate_tests import OpCheckError


def declare(name: str, order: tuple[int, int]) -> object:
    @torch.library.custom_op(f"findings::{name}", mutates_args=())
    def op(values: Tensor) -> tuple[Tensor, Tensor]:
        both = (values.argsort(1), values * 2)
        return both[order[0]], both[order[1]]

    @op.register_fake
    def _(values: Tensor) -> tuple[Tensor, Tensor]:
        both = (values.new_empty(values.shape, dtype=torch.int64), torch.empty_like(values))
        return both[order[0]], both[order[1]]

    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[order.index(1)] * 2

    def setup(ctx: object, inputs: object, output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[order.index(0)])

    op.register_autograd(backward, setup_context=setup)
    return op


values = torch.randn(3, 4, requires_grad=True)
print(torch.__version__, torch.library.opcheck(declare("float_first", (1, 0)), (values,)))
try:
    torch.library.opcheck(declare("integer_first", (0, 1)), (values,))
except OpCheckError as error:
    print(error)
    assert "result type Float can't be cast to the desired output type Long" in str(error)
else:
    raise AssertionError("opcheck accepts an integer tensor first")
PYTHON
