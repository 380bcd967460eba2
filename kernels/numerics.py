"""In which dtype things are added up, and what autocast may not touch.

Half-precision weights keep half-precision products and are accumulated in float32: a top-k or a
threshold compares scores that differ in the last digits (KERNELS.md section 4).
"""

import contextlib

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half-precision weights, otherwise the weights' own dtype."""
    return torch.float32 if dtype in HALF else dtype


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context without autocast on x's device; free where autocast is off already."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
