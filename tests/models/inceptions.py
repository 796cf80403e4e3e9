"""FID's Inception with weights computed from a formula and written to a file."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch

from distill.metrics.networks.inception import InceptionNetwork


def filled() -> InceptionNetwork:
    """Each tensor drawn by a generator seeded with its name, scaled so that no layer fades or explodes."""
    network = InceptionNetwork().eval()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                drawn = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                if name.endswith("running_var"):
                    value.copy_(torch.rand(value.shape, generator=drawn) + 0.5)
                    continue
                noise = torch.randn(value.shape, generator=drawn)
                if name.endswith("bn.weight"):
                    value.copy_(1 + 0.1 * noise)
                else:
                    value.copy_(noise * (0.1 if value.ndim == 1 else (2 / value[0].numel()) ** 0.5))
    return network


def write(folder: Path) -> Path:
    torch.save(filled().state_dict(), folder / "inception.pth")
    return folder / "inception.pth"
