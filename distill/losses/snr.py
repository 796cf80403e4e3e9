r"""Weights of |x - x'|^2 by the signal-to-noise ratio SNR = alpha^2 / sigma^2, from log SNR (B,).

    "snr"   max(SNR, 1)             the larger of the errors in x and in eps: |eps - eps'|^2 = SNR |x - x'|^2
    "v"     SNR + 1                 the error in v = alpha eps - sigma x of a variance-preserving schedule
    "flow"  (alpha / sigma + 1)^2   the error in z - x, the flow of any schedule's straight paths
    "x"     1

Salimans and Ho, 2022, https://arxiv.org/abs/2202.00512, section 4; "x" is the choice of ProDiff,
https://arxiv.org/abs/2207.06389.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.errors import BadInput, suggest

WEIGHTS = ("snr", "v", "flow", "x")


def weight(name: str, log_snr: Tensor, limit: float = 20.0) -> Tensor:
    """(B,) of that name. log SNR is truncated at +-`limit`, as the paper's schedule is; infinite values are allowed.

    Raises:
        BadInput: if there is no weight of that name.
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
    raise BadInput(f"weight '{name}' is none of {', '.join(WEIGHTS)}.{suggest(name, WEIGHTS)}")
