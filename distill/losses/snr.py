r"""Weights of |x - x'|^2 by the signal-to-noise ratio, SNR = alpha^2 / sigma^2.

    "snr"   max(SNR, 1)             the larger of the errors in x and in eps: |eps - eps'|^2 = SNR |x - x'|^2
    "v"     SNR + 1                 the error in v = alpha eps - sigma x, for variance-preserving schedules
    "flow"  (alpha / sigma + 1)^2   the error in the flow z - x
    "x"     1

Salimans and Ho, 2022, https://arxiv.org/abs/2202.00512, section 4; ProDiff, https://arxiv.org/abs/2207.06389, uses "x".
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.errors import BadInput, suggest

WEIGHTS = ("snr", "v", "flow", "x")


def weight(name: str, log_snr: Tensor, limit: float = 20.0) -> Tensor:
    """The weight (B,).

    Args:
        name: "snr", "v", "flow" or "x".
        log_snr: (B,), may be infinite.
        limit: log_snr is clamped to [-limit, limit], as in the paper.

    Raises:
        BadInput: for another name.
    """
    snr = log_snr.clamp(-limit, limit).exp()
    if name == "snr":
        return snr.clamp(min=1)
    if name == "v":
        return snr + 1
    if name == "flow":
        return (snr.sqrt() + 1).square()
    if name == "x":
        return torch.ones_like(snr)
    raise BadInput(f"weight '{name}' must be one of {', '.join(WEIGHTS)}.{suggest(name, WEIGHTS)}")
