"""Stock calls and LoRA files that go wrong without an error, one by one, and what exports do about each."""

from __future__ import annotations

import copy
import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.errors import BadInput
from distill.export import export, stock
from distill.models.diffusers import load, tiny, tiny_parts
from distill.models.lora import SharedBase

GUIDED_AT_ONE = ("z_image",)  # families whose stock call guides with w = 2 at guidance_scale=1.0


def student(name, adapter=False):
    """A student that is not its teacher; as an adapter, with alpha other than rank."""
    one = load(f"tiny:{name}", size=(8, 8))
    if adapter:
        one.net = SharedBase(one.net, rank=3, alpha=6, targets="transformer.*")
        one = copy.deepcopy(one)
    tiny_parts.shake(one.net, 0.2 if adapter else 0.03, seed=9)
    return one


def record_of(folder):
    return json.loads((folder / "distill.json").read_text())


@pytest.mark.parametrize("name", GUIDED_AT_ONE)
def test_the_call_of_a_student_does_not_guide(tmp_path, name):
    """`pipe(prompt, **call)` evaluates one row a step; with the 1.0 of other families it would be two, and another image."""
    out = export(student(name), 4, "ode", tmp_path / "out")
    record = record_of(out)
    assert record["call"]["guidance_scale"] == 0.0
    assert stock.difference(out, 4, "", "cpu") < 1e-5
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    rows, forward = [], pipe.transformer.forward
    pipe.transformer.forward = lambda x, *args, **kw: rows.append(len(x)) or forward(x, *args, **kw)

    def drawn(**kw):
        rows.clear()
        latents = load_file(out / "reference.safetensors")["noise"][:1]
        call = record["reference"]["call"] | record["call"] | kw
        return pipe("a cat", latents=latents.clone(), output_type="latent", return_dict=False, **call)[0]

    right = drawn()
    assert rows == [1] * 4
    wrong = drawn(guidance_scale=1.0)
    assert rows == [2] * 4 and (wrong - right).abs().max() > 1e-2 * right.abs().max()
    readme = (out / "README.md").read_text()
    assert "guidance_scale=0.0" in readme and "guidance_scale=1.0" not in readme


@pytest.mark.parametrize("sampler", ["ode", "renoise"])
def test_every_key_of_a_lora_lands(tmp_path, sampler):
    out = export(student("z_image", adapter=True), 4, sampler, tmp_path / "lora", kind="lora", w=2.0)
    record = record_of(out)
    layers = sum(isinstance(m, torch.nn.Linear) for m in load("tiny:z_image", null=None).net.stock.modules())
    assert len(record["files"]) == 2 and all(stock.layers_of(out / file) == layers for file in record["files"])
    assert stock.difference(out, 4, "", "cpu") < 1e-5  # both files, each alone
    assert "ComfyUI" in (out / "README.md").read_text()


def test_a_lora_that_lands_in_part_is_refused(tmp_path):
    """Native names, with query, key and value as one layer: stock diffusers loads the feed-forward layers alone."""
    out = export(student("z_image", adapter=True), 4, "ode", tmp_path / "lora", kind="lora")
    extra = out / record_of(out)["files"][1]
    native = {}
    for key, value in load_file(extra).items():
        if ".to_q." in key:
            down = key.endswith("lora_A.weight")
            fused = [value] * 3 if down else [torch.zeros_like(value)] * 3
            native[key.replace("to_q", "qkv")] = torch.cat(fused, 0) if down else torch.block_diag(*fused)
        elif ".to_k." not in key and ".to_v." not in key:
            native[key.replace(".to_out.0.", ".out.")] = value
    save_file(native, extra)
    found = stock.difference(out, 4, "", "cpu")
    assert isinstance(found, str) and "were loaded" in found, found


def test_omni_networks_are_refused():
    family = load("tiny:z_image", null=None).net.family
    config = diffusers.ZImageTransformer2DModel.load_config(tiny.folder("z_image") / "transformer")
    with torch.device("meta"):
        network = diffusers.ZImageTransformer2DModel.from_config(dict(config) | {"siglip_feat_dim": 8})
    with pytest.raises(BadInput, match="siglip_feat_dim .Omni. reads images beside the latents"):
        family.check_supported(network)


@pytest.mark.parametrize("kind, sampler", [("pipeline", "renoise"), ("single-file", "ode")])
def test_stock_code_draws_the_students_samples(tmp_path, kind, sampler):
    out = export(student("z_image"), 4, sampler, tmp_path / "out", kind=kind)
    assert stock.difference(out, 4, "", "cpu") < 1e-5
