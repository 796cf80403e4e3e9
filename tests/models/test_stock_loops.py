"""Families against their stock loops, step by step: every call of the network, with the scheduler as it is published."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from distill.denoise import Guided
from distill.models.diffusers import FAMILIES, Family, Geometry, Twin, encode, load
from distill.solvers import DDIM, solve
from distill.times import Grid

PROMPTS = ["a cat", "two dogs run"]  # of different lengths
STRICT = ("z_image", "z_image_wide")  # twins of the families that are tried here
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the largest value
BREAKS = 1e-2  # what a missing condition, mask, null or time must change at least


@dataclass
class Loop:
    """A stock loop that was run."""

    states: list[Any]  # (x_t, sigma, what the scheduler got) of each step
    end: torch.Tensor


@dataclass
class Tried:
    family: Family
    twin: Twin
    pipe: Any
    path: Any
    pixels: int
    z: torch.Tensor

    def stock(self, steps: int, w: float | None) -> Loop:
        """The stock pipeline's loop; its own default of guidance for w = None."""
        states, layout, scheduler = [], self.family.layout, self.pipe.scheduler
        original = scheduler.step

        def step(output, timestep, sample, **kw):
            sigma = scheduler.sigmas[len(states)].item()
            states.append((layout.unpack(sample, self.z.shape), sigma, layout.unpack(output, self.z.shape)))
            return original(output, timestep, sample, **kw)

        height, width = (self.pixels * side for side in self.z.shape[-2:])
        guided = {} if w is None else {self.family.guidance_argument: w - self.family.guidance_offset}
        scheduler.step = step
        try:
            end = self.pipe(
                list(PROMPTS),  # the stock pipeline writes its template into the list
                height=height,
                width=width,
                num_inference_steps=steps,
                latents=layout.pack(self.z.clone()),
                output_type="latent",
                return_dict=False,
                **guided | dict(self.twin.call),
            )[0]
        finally:
            del scheduler.step
        return Loop(states, layout.unpack(end, self.z.shape).float())

    def default_w(self) -> float:
        import inspect

        default = inspect.signature(self.pipe.__call__).parameters[self.family.guidance_argument].default
        return default + self.family.guidance_offset

    def load(self, **kw):
        return load(self.path, **dict(self.twin.load) | kw)


@pytest.fixture(scope="module", params=STRICT)
def tried(request, tmp_path_factory):
    family, twin = next((f, f.twins[request.param]) for f in FAMILIES.values() if request.param in f.twins)
    pipe, path = twin.build(), tmp_path_factory.mktemp("loops") / request.param
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(path)
    z = torch.randn(len(PROMPTS), *twin.shape, generator=torch.Generator().manual_seed(5))
    return Tried(family, twin, pipe, path, Geometry.of(path).pixels, z)


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
def predictions(denoiser, loop, cond):
    """Our prediction of the flow at every state of the stock loop, from E[x | x_t]."""
    found = []
    for x_t, sigma, _ in loop.states:
        logsnr = 2 * (
            torch.tensor(1 - sigma, dtype=torch.float64).log() - torch.tensor(sigma, dtype=torch.float64).log()
        )
        t = denoiser.schedule.time(logsnr).expand(len(x_t))
        x = denoiser(x_t.float(), t, **cond)
        found.append((x_t.float() - x) / sigma)
    return found


def worst(denoiser, loop, cond):
    ours = predictions(denoiser, loop, cond)
    return max(difference(a, theirs.float()) for a, (*_, theirs) in zip(ours, loop.states, strict=True))


@pytest.mark.parametrize("w", [1.0, 4.0, None])
@pytest.mark.parametrize("steps", [4, 25])
def test_every_prediction_is_that_of_the_stock_loop(tried, steps, w):
    denoiser, cond, loop = tried.load(), encode(tried.path, PROMPTS), tried.stock(steps, w)
    w = tried.default_w() if w is None else w
    found = worst(Guided(denoiser, w), loop, cond)
    grid = Grid.uniform(steps)
    with torch.no_grad():
        end = difference(solve(Guided(denoiser, w), tried.z, grid, DDIM(), **cond).float(), loop.end)
    print(f"{tried.path.name}, {steps} steps, w = {w:g}: {found:.1e} at a step, {end:.1e} at the end")
    assert len(loop.states) == steps and loop.end.std() > 0.1
    assert found < TOLERANCE["float32"] and end < TOLERANCE["float32"]


def test_weights_in_half_precision_stay_close(tried):
    denoiser, cond, loop = tried.load(dtype="bfloat16"), encode(tried.path, PROMPTS), tried.stock(4, 1.0)
    found = worst(denoiser, loop, cond)
    print(f"{tried.path.name}, bfloat16: {found:.1e}")
    assert found < TOLERANCE["bfloat16"]


def test_whatever_is_left_out_breaks_it(tried, monkeypatch):
    """Each condition, each mask, the null, the time, its map, and the sign."""
    denoiser, cond, loop = tried.load(), encode(tried.path, PROMPTS), tried.stock(4, 4.0)
    compare = partial(worst, Guided(denoiser, 4.0), loop)
    assert compare(cond) < TOLERANCE["float32"]
    for key, value in cond.items():
        left_out = torch.ones_like(value) if key.endswith("mask") else torch.zeros_like(value)
        assert compare(cond | {key: left_out}) > BREAKS, key
    net, null = denoiser.net, encode(tried.path, [""])
    net.set_null({k: v if k.endswith("mask") else torch.zeros_like(v) for k, v in null.items()})
    assert compare(cond) > BREAKS, "null"
    net.set_null(null)
    for name, changed in {
        "timestep": lambda t: torch.full_like(t, 500.0),
        "model_time": lambda n, dtype: torch.full_like(n, 0.5),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(net, name, changed)
            assert compare(cond) > BREAKS, name
    assert compare(cond) < TOLERANCE["float32"]


def test_a_prompt_does_not_depend_on_its_neighbours(tried):
    """Nor on the length that it is padded to."""
    denoiser, cond = tried.load(null=None), encode(tried.path, PROMPTS)
    t = torch.full((1,), 0.6)
    with torch.no_grad():
        both = denoiser(tried.z, t.expand(2), **cond)
        alone = denoiser(tried.z[1:], t, **{k: v[1:] for k, v in cond.items()})
    assert difference(both[1:], alone) < 1e-5
