r"""Preferences: ranking by any score, the DPO loss, and choice among K samples.

Scores (higher is better) rank and choose; they are never differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.errors import BadInput
from distill.noise import bcast


def rank(a: Tensor, b: Tensor, a_wins: Tensor) -> tuple[Tensor, Tensor]:
    """(winners, losers), each (B, ...), of the pairs (a_i, b_i); `a_wins` (B,) bool. Gradients reach both."""
    mask = bcast(a_wins, a)
    return torch.where(mask, a, b), torch.where(mask, b, a)


def dpo(winner: Tensor, loser: Tensor, ref_winner: Tensor, ref_loser: Tensor, beta: float) -> Tensor:
    r"""-log sigmoid(-beta [(e_w - e_w^ref) - (e_l - e_l^ref)]), the mean over pairs; https://arxiv.org/abs/2311.12908

    e are errors (B,), each minus a log-likelihood up to a constant: mean squared denoising errors at one t and noise
    for Diffusion-DPO, of student and reference on winner and loser. Where e is exactly -log p, the minimum over
    Bradley-Terry preferences of a reward r is p = p_ref exp(r / beta) / Z. The released code's `beta_dpo` is 2 beta.
    """
    return -F.logsigmoid(-beta * ((winner - ref_winner) - (loser - ref_loser))).mean()


def choice(scores: Tensor, temperature: float = 1.0) -> Tensor:
    r"""softmax(scores / temperature) over K, (B, K): the discrete-choice model of curation.

    https://arxiv.org/abs/2407.09499. Choosing so among K samples of p gives the density p(x) H_K(x),
    H_K(x) = E[K e^r(x) / (e^r(x) + sum_{j >= 2} e^r(x_j))], and p e^r / E_p e^r as K grows. temperature 0 takes the
    best (RAFT, https://arxiv.org/abs/2304.06767): K p(x) F_r(r(x))^{K-1}.

    Raises:
        BadInput: a score that is not a number, or a negative temperature.
    """
    if temperature < 0 or torch.isnan(scores).any():
        raise BadInput(f"choice needs numbers as scores and temperature at least 0, got temperature {temperature}.")
    scores = scores.detach().double()
    if temperature == 0:
        return F.one_hot(scores.argmax(1), scores.shape[1]).double()
    return torch.softmax(scores / temperature, dim=1)


def choose(scores: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """Index (B,) drawn from `choice(scores)` by inversion with `uniform` (B,) in [0, 1)."""
    below = choice(scores, temperature).cumsum(1)
    return (uniform.double()[:, None] >= below).sum(1).clamp_max(scores.shape[1] - 1)
