from __future__ import annotations

import pytest
import torch

from distill.export.identity_vae import SCALE, identity_vae


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_pass_through_and_back(channels):
    torch.manual_seed(0)
    vae, x = identity_vae(channels), 3 * torch.randn(4, channels, 8, 8)
    latents = vae.encode(x).latents
    torch.testing.assert_close(latents, x / SCALE, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(vae.decode(x / vae.config.scaling_factor).sample, x, rtol=1e-5, atol=1e-6)
