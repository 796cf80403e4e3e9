"""Losses: pure functions from tensors to a scalar, or to one value per sample; no networks, no random numbers."""
