r"""Preferences: ranking pairs by a score, the DPO loss, and choosing among K samples.

Higher scores are better; no gradient flows through them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.errors import BadInput
from distill.noise import bcast


def rank(a: Tensor, b: Tensor, a_wins: Tensor) -> tuple[Tensor, Tensor]:
    """(winners, losers), each (B, ...), of the pairs (a_i, b_i); `a_wins` (B,) is boolean. Gradients reach both."""
    mask = bcast(a_wins, a)
    return torch.where(mask, a, b), torch.where(mask, b, a)


def dpo(winner: Tensor, loser: Tensor, ref_winner: Tensor, ref_loser: Tensor, beta: float) -> Tensor:
    r"""-log sigmoid(-beta [(e_w - e_w^ref) - (e_l - e_l^ref)]), the mean over pairs; https://arxiv.org/abs/2311.12908

    If e = -log p, the minimum over Bradley-Terry preferences of a reward r is p = p_ref exp(r / beta) / Z.

    Args:
        winner, loser: errors e of the student on winner and loser (B,); for Diffusion-DPO mean squared denoising
            errors at the same time and noise.
        ref_winner, ref_loser: errors of the reference (B,).
        beta: strength of the regularisation towards the reference; `beta_dpo` of the released code is 2 beta.
    """
    return -F.logsigmoid(-beta * ((winner - ref_winner) - (loser - ref_loser))).mean()


def choice_probabilities(scores: Tensor, temperature: float = 1.0) -> Tensor:
    r"""softmax(scores / temperature) over the K samples (B, K): the discrete-choice model of curation.

    Choosing among K samples of p with these probabilities gives the density p(x) H_K(x), with
    H_K(x) = E[K e^r(x) / (e^r(x) + sum_{j >= 2} e^r(x_j))], which converges to p e^r / E_p e^r as K grows
    (https://arxiv.org/abs/2407.09499). temperature = 0 chooses the best sample (RAFT,
    https://arxiv.org/abs/2304.06767), which gives the density K p(x) F_r(r(x))^{K-1}.

    Args:
        scores: (B, K).
        temperature: at least 0.

    Raises:
        BadInput: for a score that is NaN, or a negative temperature.
    """
    if temperature < 0 or torch.isnan(scores).any():
        raise BadInput(
            f"choosing samples needs scores without NaN and a temperature of at least 0, got temperature {temperature}."
        )
    scores = scores.detach().double()
    if temperature == 0:
        return F.one_hot(scores.argmax(1), scores.shape[1]).double()
    return torch.softmax(scores / temperature, dim=1)


def sample_choice(scores: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """Index (B,) drawn from `choice_probabilities(scores)` by inversion of the cumulative sum at `uniform` (B,)."""
    cumulative = choice_probabilities(scores, temperature).cumsum(1)
    return (uniform.double()[:, None] >= cumulative).sum(1).clamp_max(scores.shape[1] - 1)
