"""Image-to-video teachers and pixel models with a learned variance against their stock pipelines."""

from __future__ import annotations

import json
from functools import partial

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

from distill.denoise import Guided
from distill.errors import BadInput
from distill.methods.tdm import TDM
from distill.models.diffusers import FAMILIES, FirstFrames, UNet2D, encode, grid_of, load, tiny
from distill.models.families import cogvideox
from distill.solvers import DDIM, Ancestral, solve

STEPS, W, PROMPTS = 10, 3.5, ["a cat", "two dogs"]
CASES = {  # build, shape of latents, frames of video, axes that the stock pipeline swaps, prediction
    "wan-i2v": (tiny.builders()["wan_i2v"], (16, 2, 4, 4), 5, False, "flow"),
    "cogvideox-i2v": (partial(cogvideox.tiny, True, image=True), (4, 3, 4, 4), 9, True, "v"),
    "cogvideox-i2v-learned-places": (
        partial(cogvideox.tiny, True, image=True, use_learned_positional_embeddings=True),
        (4, 3, 4, 4),
        9,
        True,
        "v",
    ),
    "cogvideox-1.5-i2v": (partial(cogvideox.tiny, True, 2, image=True, ofs_embed_dim=8), (4, 4, 4, 4), 13, True, "v"),
}


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def pictures(height, width):
    values = np.random.default_rng(3).integers(0, 255, (2, height, width, 3), dtype=np.uint8)
    return [PIL.Image.fromarray(v) for v in values]


@pytest.fixture(scope="module", params=CASES)
def family(request, tmp_path_factory):
    build, shape, frames, swapped, prediction = CASES[request.param]
    pipe, path = build(), tmp_path_factory.mktemp("frames") / request.param
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(path)
    z, images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(5)), pictures(40, 40)
    cond = encode(path, PROMPTS) | FirstFrames(path)(images, shape[1:], torch.Generator().manual_seed(7))
    return pipe, path, z, images, cond, frames, swapped, prediction


def stock(family):
    pipe, path, z, images, cond, frames, swapped, prediction = family
    random, out = torch.Generator().manual_seed(7), []
    for i, (image, prompt) in enumerate(zip(images, PROMPTS)):  # it takes one image a call
        latents = z[i : i + 1].transpose(1, 2) if swapped else z[i : i + 1]
        found = pipe(
            image,
            prompt,
            height=32,
            width=32,
            num_frames=frames,
            num_inference_steps=STEPS,
            guidance_scale=W,
            latents=latents.clone(),
            generator=random,
            output_type="latent",
            return_dict=False,
        )[0]
        out.append(found.transpose(1, 2) if swapped else found)
    return torch.cat(out)


@torch.no_grad()
def test_our_solver_lands_where_the_image_pipeline_does(family):
    pipe, path, z, images, cond, frames, swapped, prediction = family
    denoiser = load(path, size=z.shape[2:])
    assert denoiser.prediction == prediction and denoiser.net.shape == z.shape[1:]

    def ours(**broken):
        return solve(Guided(denoiser, W), z, grid_of(path, STEPS), DDIM(), **cond | broken).float()

    theirs = stock(family)
    found = difference(ours(), theirs)
    print(f"{path.name}: {found:.1e}")
    assert theirs.isfinite().all() and theirs.std() > 0.1 and found < 1e-4
    for key, value in cond.items():
        assert difference(ours(**{key: torch.zeros_like(value)}), theirs) > 1e-3, key
    null = denoiser.null(cond)
    assert all(null[key] is cond[key] for key in ("image", "clip") if key in cond) and null["text"] is not cond["text"]
    with pytest.raises(BadInput, match="needs the condition 'image'"):
        denoiser(z, torch.full((2,), 0.5), text=cond["text"])


def test_an_image_to_video_teacher_is_distilled(family):
    pipe, path, z, images, cond, frames, swapped, prediction = family
    method = TDM({"teacher": load(path, size=z.shape[2:])}, grid=2, guidance=W, optim={"student": {"lr": 1e-3}})
    optimizers = method.configure_optimizers()
    method.optimizers, method.manual_backward, method.total_steps = lambda: optimizers, lambda loss: loss.backward(), 1
    before = [p.clone() for p in method.student.parameters()]
    method.training_step(cond)
    assert any(not torch.equal(a, b) for a, b in zip(before, method.student.parameters()))
    assert method.sample(z, cond).isfinite().all()


def test_pipelines_without_a_first_frame_raise(tmp_path):
    tiny.builders()["wan"]().save_pretrained(tmp_path / "wan")
    with pytest.raises(BadInput, match="WanPipeline takes no first frame; use an image-to-video"):
        FirstFrames(tmp_path / "wan")
    file = tmp_path / "wan" / "transformer" / "config.json"
    for changes in ({"in_channels": 36}, {"image_dim": 16, "in_channels": 36, "pos_embed_seq_len": 514}):
        network = diffusers.WanTransformer3DModel.from_config(json.loads(file.read_text()) | changes)
        with pytest.raises(BadInput, match="only Wan 2.1's text to video and image to video"):
            FAMILIES["WanTransformer3DModel"].check_supported(network)


# -- a learned variance --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_adm_without_its_sampler_noise(tmp_path, monkeypatch):
    """Its stock sampler is stochastic: with the noise switched off it is the posterior's mean, whatever the variance."""
    pipe, path = tiny.builders()["adm"](), tmp_path / "adm"
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(path)
    from diffusers.pipelines.ddpm import pipeline_ddpm
    from diffusers.schedulers import scheduling_ddpm

    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(pipeline_ddpm, "randn_tensor", lambda *a, **kw: z.clone())
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **kw: torch.zeros(shape))
    kept = []
    step = pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step", lambda *a, **kw: kept.append(step(*a, **kw)) or kept[-1])
    pipe(batch_size=2, num_inference_steps=STEPS, output_type="np")
    theirs, denoiser, times = kept[-1].prev_sample, load(path), [t / STEPS for t in range(STEPS, -1, -1)]
    assert denoiser.net.shape == (3, 8, 8)

    def ours(denoiser):
        x = z.double()
        for t, s in zip(times, times[1:]):
            t, s = (torch.full((2,), a, dtype=torch.float64) for a in (t, s))
            x = Ancestral()(denoiser, x, t, s, noise=torch.zeros_like(x))
        return x.float()

    found = difference(ours(denoiser), theirs)
    print(f"adm: {found:.1e}")
    assert theirs.std() > 0.1 and found < 1e-4
    monkeypatch.setattr(UNet2D, "call", lambda self, x, n, label: self.stock(x, n).sample[:, x.shape[1] :])
    assert difference(ours(denoiser), theirs) > 1e-2  # the variance instead of the mean
    monkeypatch.undo()
    with pytest.raises(BadInput, match="from 3 to 4 channels"):
        UNet2D.wrap(
            diffusers.UNet2DModel(
                in_channels=3,
                out_channels=4,
                block_out_channels=(8,),
                norm_num_groups=4,
                down_block_types=("DownBlock2D",),
                up_block_types=("UpBlock2D",),
            )
        )
