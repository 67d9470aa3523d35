"""Whether operations are traced or intercepted, so that they must be seen as operations."""

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_observed() -> bool:
    """Whether torch.compile traces this, or a dispatch mode intercepts it."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
