"""GPUs by name: memory, and what they compute at most, dense, from their makers' data sheets.

https://www.nvidia.com/en-us/data-center/h100/ (h200, a100, l40s, v100, t4 and b200 likewise); for GeForce and RTX the
architecture white papers, at 16 bits with float32 accumulation: https://images.nvidia.com/aem-dam/Solutions/geforce/ada/
nvidia-ada-gpu-architecture.pdf. Float32 is without TF32, as torch multiplies matrices by default.
"""

from __future__ import annotations

from dataclasses import dataclass

from distill.errors import BadInput, suggest


@dataclass(frozen=True)
class Card:
    """GB of memory, and operations a second at 16 bits and in float32."""

    memory: float
    half: float
    single: float


CARDS = {
    "b200": Card(180, 2250e12, 75e12),
    "h200": Card(141, 989e12, 67e12),
    "h100": Card(80, 989e12, 67e12),
    "h100-pcie": Card(80, 756e12, 51e12),
    "a100": Card(80, 312e12, 19.5e12),
    "a100-40": Card(40, 312e12, 19.5e12),
    "l40s": Card(48, 362e12, 91.6e12),
    "a6000": Card(48, 154.8e12, 38.7e12),
    "v100": Card(32, 125e12, 15.7e12),
    "5090": Card(32, 209.5e12, 104.8e12),
    "4090": Card(24, 165.2e12, 82.6e12),
    "3090": Card(24, 71e12, 35.6e12),
    "t4": Card(16, 65e12, 8.1e12),
}


def card(name: str) -> Card:
    """The card of this name.

    Raises:
        BadInput: nothing is known of it.
    """
    short = name.lower().replace("rtx", "").replace("nvidia", "").strip(" -_")
    if short not in CARDS:
        raise BadInput(f"--gpu: '{name}' is none of {', '.join(CARDS)}.{suggest(short, CARDS)} Or give --memory and --flops.")
    return CARDS[short]
