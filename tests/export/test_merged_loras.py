"""Two LoRA files merged act in stock diffusers as (1 - w) A + w B on every layer, whatever their ranks and alphas.

Files whose layers have several ranks, or with `.alpha` beside diffusers' own names, load at wrong strengths or not at all:
https://github.com/huggingface/diffusers/issues/14409, https://github.com/huggingface/diffusers/issues/14088.
"""

from __future__ import annotations

import diffusers
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from distill.cli import main
from distill.models.diffusers import tiny

# a student's LoRA of rank 4 on attention, and a style's whose ranks and alphas differ from layer to layer
FILES = {"a": [("attn", 4, 4)], "b": [("to_q", 8, 3), ("to_k", 2, 2), ("ff", 2, 1)]}
SHARE = 0.3


def layers(network):
    return {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)}


def keys(layout, part, name):
    if layout == "kohya":
        stem = "lora_unet_" + name.replace(".", "_")
        return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"
    return f"{part}.{name}.lora_A.weight", f"{part}.{name}.lora_B.weight", None


def write(path, layout, part, network, spec, seed):
    generator, file = torch.Generator().manual_seed(seed), {}
    for name, layer in layers(network).items():
        found = next(((rank, alpha) for pattern, rank, alpha in spec if pattern in name), None)
        if found:
            rank, value = found
            down, up, alpha = keys(layout, part, name)
            file[down] = 0.1 * torch.randn(rank, layer.in_features, generator=generator)
            file[up] = 0.1 * torch.randn(layer.out_features, rank, generator=generator)
            file |= {alpha: torch.tensor(float(value))} if alpha else {}
    save_file(file, path)


@pytest.mark.parametrize("family, layout", [("sd15", "diffusers"), ("sd15", "kohya"), ("flux", "diffusers")])
def test_a_merged_file_acts_in_stock_diffusers_as_the_sum_of_both(tmp_path, family, layout):
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny.folder(family))
    part = "unet" if family == "sd15" else "transformer"
    network = pipe.components[part]
    start = {name: layer.weight.detach().clone() for name, layer in layers(network).items()}
    expected = dict(start)
    for name, spec in FILES.items():
        write(tmp_path / f"{name}.safetensors", layout, part, network, spec, ord(name))
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "out")]
    done = CliRunner().invoke(main, ["merge", *paths, "--share", str(SHARE)])
    assert done.exit_code == 0, done.output
    for path, weight in zip(paths, (1 - SHARE, SHARE)):
        file = load_file(path)
        for name in expected:
            down, up, alpha = keys(layout, part, name)
            if down in file:
                scale = float(file[alpha]) / len(file[down]) if alpha else 1.0
                expected[name] = expected[name] + weight * scale * file[up] @ file[down]
    pipe.load_lora_weights(paths[2])
    pipe.fuse_lora(components=[part])
    pipe.unload_lora_weights()
    found = {name: layer.weight.detach() for name, layer in layers(network).items()}
    touched = [name for name in start if not torch.equal(expected[name], start[name])]
    assert len(touched) > 5 and found.keys() == expected.keys()
    for name in found:
        assert (found[name] - expected[name]).abs().max() < 1e-5, name


def test_the_older_name_of_the_share_is_refused_with_its_new_one(tmp_path):
    result = CliRunner().invoke(main, ["merge", "a", "b", str(tmp_path / "c"), "--weight", "0.3"])
    assert result.exit_code == 2 and "--weight is --share now: give --share 0.3." in result.output
