"""A VAE that passes pixels through, for stock pipelines that require one."""

from __future__ import annotations

import torch

SCALE = 1000.0  # latents are pixels / SCALE: the decoder's 3 tanh(u / 3) is u to 4e-8 there


@torch.no_grad()
def identity_vae(channels: int):
    r"""A stock `AutoencoderTiny` with decode(z / SCALE) = z and encode(x) = x / SCALE, C x H x W to C x H x W.

    Its decoder is 2 (W relu(V u) + 1/2) - 1 with V u = (SCALE u / 2, -SCALE u / 2), so that W = (1, -1) undoes the relu.
    """
    from diffusers import AutoencoderTiny

    wide = (2 * channels,)
    vae = AutoencoderTiny(
        in_channels=channels,
        out_channels=channels,
        latent_channels=channels,
        scaling_factor=SCALE,
        encoder_block_out_channels=wide,
        decoder_block_out_channels=wide,
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
    )
    into, out = [layer for layer in vae.encoder.layers if hasattr(layer, "weight")]
    _centre(into, torch.cat([torch.eye(channels), torch.zeros(channels, channels)]))
    _centre(out, torch.cat([torch.eye(channels), torch.zeros(channels, channels)], dim=1) * 2 / SCALE, -1 / SCALE)
    into, out = [layer for layer in vae.decoder.layers if hasattr(layer, "weight")]
    _centre(into, torch.cat([torch.eye(channels), -torch.eye(channels)]) * SCALE / 2)
    _centre(out, torch.cat([torch.eye(channels), -torch.eye(channels)], dim=1), 0.5)
    return vae.eval()


def _centre(conv, matrix: torch.Tensor, bias: float = 0.0) -> None:
    """Make a 3 x 3 convolution apply this matrix to each pixel alone."""
    conv.weight.zero_()
    conv.weight[:, :, 1, 1] = matrix
    if conv.bias is not None:
        conv.bias.fill_(bias)
