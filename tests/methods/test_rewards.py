"""Rewards that look at images and captions, in the methods that rank by them."""

from __future__ import annotations

import looks
import pytest
import torch

from distill import methods
from distill.denoise import Denoiser
from distill.metrics.rewards import ClipScore
from distill.models.small import Transformer
from distill.noise import RectifiedFlow

CAPTIONS = ["a cat", "two dogs", "y", "x z"]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return ClipScore(looks.clip(tmp_path_factory.mktemp("clip")))


def denoiser(channels: int = 3):
    net = Transformer(size=8, channels=channels, patch=4, width=16, depth=1, heads=2)
    torch.nn.init.normal_(net.leave.weight, std=0.3)
    return Denoiser(net, RectifiedFlow(), "flow")


class Told:
    """A reward that notes what it is told."""

    def __init__(self, reward):
        self.reward, self.heard = reward, []

    def __call__(self, x, data=None, **cond):
        self.heard.append((cond["caption"], self.reward(x, data=data, **cond)))
        return self.heard[-1][1]


@pytest.mark.parametrize("name", ["DistillationDPO", "DiffusionDPO", "Curation"])
def test_the_datas_captions_reach_the_reward_with_their_samples(reward, name):
    torch.manual_seed(0)
    conditions, extra = (
        Told(reward),
        {"Curation": {"group": 3, "synthetic": 0.5}, "DiffusionDPO": {"pair_steps": 2}}.get(name, {}),
    )
    optim = {} if name == "DistillationDPO" else {"student": {"lr": 1e-3}}
    method = getattr(methods, name)(
        {"teacher": denoiser(), "student": denoiser()}, metric=conditions, grid=2, optim=optim, **extra
    )
    method.configure_optimizers()
    method.train()
    method.training_step({"x": looks.pictures(4, 0, 8), "caption": CAPTIONS})
    expected = [c for c in CAPTIONS for _ in range(3)] if name == "Curation" else CAPTIONS
    assert conditions.heard and all(captions == expected for captions, _ in conditions.heard)
    assert all(len(score) == len(expected) and bool(torch.isfinite(score).all()) for _, score in conditions.heard)
    method.training_step({"x": looks.pictures(4, 0, 8), "caption": CAPTIONS[::-1]})
    assert conditions.heard[-1][0] == (expected[::-1])


def test_micro_batches_keep_their_own_captions(reward):
    conditions = Told(reward)
    method = methods.DistillationDPO({"teacher": denoiser(), "student": denoiser()}, metric=conditions, grid=1)
    method.configure_optimizers()
    method.placement.accumulate = 2
    method.training_step({"x": looks.pictures(4, 0, 8), "caption": CAPTIONS})
    assert [c for c, _ in conditions.heard] == [CAPTIONS[:2], CAPTIONS[:2], CAPTIONS[2:], CAPTIONS[2:]]


def test_curation_by_clip_keeps_what_clip_prefers(reward):
    torch.manual_seed(0)
    method = methods.Curation({"teacher": denoiser(), "student": denoiser()}, metric=reward, group=6, grid=2)
    method.configure_optimizers()
    z = torch.randn(8, 3, 8, 8)
    method.captions = CAPTIONS * 2
    kept, _ = method.draw(None, z, {})
    alone = methods.Curation({"teacher": method.teacher, "student": method.student}, metric=reward, group=1, grid=2)
    alone.configure_optimizers()
    alone.captions = method.captions
    any_one, _ = alone.draw(None, z, {})
    assert (
        float(reward(kept, caption=method.captions).mean())
        > float(reward(any_one, caption=method.captions).mean()) + 0.1
    )


def test_latents_are_decoded_for_the_reward(tmp_path, reward):
    from distill.models.diffusers import tiny as families

    pipeline = families.builders()["sd15"]()
    pipeline.save_pretrained(tmp_path / "sd")
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    from distill.models.diffusers import Latent

    seen = ClipScore(looks.clip(tmp_path / "clip"), decode=str(tmp_path / "sd"))(x, caption=CAPTIONS[:3])
    torch.testing.assert_close(seen, reward(Latent(tmp_path / "sd").decode(x), caption=CAPTIONS[:3]))
