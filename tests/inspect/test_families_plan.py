"""Text-to-image, video and audio networks on shapes against the same networks on numbers."""

from __future__ import annotations

from itertools import repeat
from types import SimpleNamespace

import pytest
import torch

from distill import methods
from distill.inspect.plan.trace import networks, trace
from distill.models.diffusers import encode, load
from distill.models.diffusers import tiny as families
from distill.models.diffusers.folder import shapes_only

SIZES = {
    "sd15": (8, 8),
    "sdxl": (8, 8),
    "pixart": (8, 12),
    "sd3": (8, 8),
    "flux": (8, 8),
    "sana": (16, 16),
    "wan": (2, 4, 4),
    "ltx": (2, 2, 2),
    "cogvideox": (3, 4, 4),
}
FAST = ("wan",)


def seen(teacher, cond):
    method = methods.TDM({"teacher": teacher}, grid=2, guidance=3.0)
    batch = {"x": torch.randn(2, *method.shape)} | cond
    cfg = SimpleNamespace(seed=0, engine=SimpleNamespace(accumulate=1), train=SimpleNamespace(steps=10))
    data = SimpleNamespace(loader=lambda *_: repeat(batch))
    return trace(SimpleNamespace(method=method, cfg=cfg, data=data), brief=True), method


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SIZES])
def test_a_family_on_shapes_takes_what_it_takes_on_numbers(name, tmp_path):
    families.builders()[name]().save_pretrained(tmp_path, safe_serialization=True)
    cond = {k: v for k, v in encode(tmp_path, ["a cat", "two dogs"]).items() if isinstance(v, torch.Tensor)}
    real, _ = seen(load(tmp_path, size=SIZES[name]), cond)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    with shapes_only():
        shapes, method = seen(load(tmp_path, size=SIZES[name]), cond)
    assert all(p.is_meta for net in networks(method).values() for p in net.parameters())
    assert shapes.flops == pytest.approx(real.flops) and shapes.flops > 0
    for role, places in real.peaks.items():  # a GPU's attention pads its sums to 32 tokens, of which there are few here
        most = max(with_own for _, with_own in places.values())
        assert max(with_own for _, with_own in shapes.peaks[role].values()) == pytest.approx(most, rel=0.25)
