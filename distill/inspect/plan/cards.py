"""Accelerators by name: memory, and peak operations per second, dense, from their makers' data sheets.

https://www.nvidia.com/en-us/data-center/h100/ (h200, a100, l40s, l4, a10, v100, t4 and b200 likewise); for GeForce and
RTX the architecture white papers, at 16 bits with float32 accumulation: https://images.nvidia.com/aem-dam/Solutions/
geforce/ada/nvidia-ada-gpu-architecture.pdf; https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html.
Float32 is without TF32, as torch multiplies matrices by default.
"""

from __future__ import annotations

from dataclasses import dataclass

from distill.errors import BadInput, suggest


@dataclass(frozen=True)
class Card:
    """GB of memory, operations per second at 16 bits and in float32, and what the device's name in torch contains."""

    memory: float
    half: float
    single: float
    device: str


CARDS = {
    "b200": Card(180, 2250e12, 75e12, "B200"),
    "h200": Card(141, 989e12, 67e12, "H200"),
    "h100": Card(80, 989e12, 67e12, "H100"),
    "h100-nvl": Card(94, 835e12, 60e12, "H100 NVL"),
    "h100-pcie": Card(80, 756e12, 51e12, "H100 PCIe"),
    "h800": Card(80, 989e12, 67e12, "H800"),
    "a100": Card(80, 312e12, 19.5e12, "A100"),
    "a100-40": Card(40, 312e12, 19.5e12, "A100-SXM4-40GB"),
    "a800": Card(80, 312e12, 19.5e12, "A800"),
    "l40s": Card(48, 362e12, 91.6e12, "L40S"),
    "l40": Card(48, 181e12, 90.5e12, "L40"),
    "l4": Card(24, 121e12, 30.3e12, "L4"),
    "a10g": Card(24, 70e12, 31.5e12, "A10G"),
    "a10": Card(24, 125e12, 31.2e12, "A10"),
    "a6000": Card(48, 154.8e12, 38.7e12, "A6000"),
    "v100": Card(32, 125e12, 15.7e12, "V100"),
    "mi300x": Card(192, 1307e12, 163.4e12, "MI300X"),
    "mi250x": Card(128, 383e12, 47.9e12, "MI250X"),
    "5090": Card(32, 209.5e12, 104.8e12, "RTX 5090"),
    "4090": Card(24, 165.2e12, 82.6e12, "RTX 4090"),
    "3090": Card(24, 71e12, 35.6e12, "RTX 3090"),
    "t4": Card(16, 65e12, 8.1e12, "T4"),
}


def card(name: str) -> Card:
    """The card of this name.

    Raises:
        BadInput: the card is unknown.
    """
    short = name.lower().replace("rtx", "").replace("nvidia", "").strip(" -_")
    if short not in CARDS:
        raise BadInput(
            f"--gpu: '{name}' is none of {', '.join(CARDS)}.{suggest(short, CARDS)} Or give --memory and --flops."
        )
    return CARDS[short]


def card_of_device(name: str) -> Card | None:
    """The card that `torch.cuda.get_device_name` names, by the longest name that it contains; None for an unknown one."""
    fitting = [card for card in CARDS.values() if card.device in name]
    return max(fitting, key=lambda card: len(card.device), default=None)
