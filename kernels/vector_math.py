"""MKL's vector functions, each called once alone before threads share it.

torch computes `cos`, `exp`, `log` and others of a CPU tensor by MKL, which picks a function's code at its first call. When that
call is made by several threads at once, one of them may run code of another accuracy: a relative error of up to 1e-4 in its
share of that one result (pytorch issue 188792; MKL before 2025.0). A run's first weights, position tables or losses then
differ from the next run's.
"""

from __future__ import annotations

import functools

import torch

TRIGONOMETRIC = (
    torch.acos,
    torch.asin,
    torch.atan,
    torch.cos,
    torch.cosh,
    torch.sin,
    torch.sinh,
    torch.tan,
    torch.tanh,
)
EXPONENTIAL = (torch.exp, torch.exp2, torch.expm1, torch.log, torch.log10, torch.log1p, torch.log2, torch.sigmoid)
OTHERS = (torch.erf, torch.erfc, torch.erfinv, torch.lgamma, torch.rsqrt, torch.sqrt, torch.trunc)


@functools.cache
def settle() -> None:
    """Call it in each process before the first large tensor is computed with; a second call costs nothing."""
    for dtype in (torch.float32, torch.float64):
        few = torch.full((8,), 0.5, dtype=dtype)  # too few to be shared out
        for function in (*TRIGONOMETRIC, *EXPONENTIAL, *OTHERS):
            function(few)
        few.pow(0.3)
