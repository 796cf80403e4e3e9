"""Losses: pure functions from tensors to a scalar, or to one value per sample; no networks, no random numbers.

Examples:
    >>> import torch
    >>> from distill.losses.regression import mse
    >>> mse(torch.ones(2, 3), torch.zeros(2, 3)).item()
    1.0
"""
