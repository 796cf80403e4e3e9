from __future__ import annotations

import copy
import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.errors import BadInput
from distill.export import blend, export
from distill.export.verify import stock_differences
from distill.inspect.frontier import interpolate_exports
from distill.models import MLP
from distill.models.diffusers import load, tiny_parts
from distill.models.diffusers import tiny as families
from distill.models.lora import LoRAAdapter, SharedBase


def shared(rank=3, alpha=None, seed=0):
    torch.manual_seed(seed)
    return SharedBase(MLP(dim=2), rank=rank, alpha=alpha)


def adapter(base, seed):
    return tiny_parts.shake(LoRAAdapter(base), 0.3, seed)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_adapters_mix_by_their_product(share):
    """W_0 + (1 - w) B_a A_a + w B_b A_b, also where ranks and alphas differ; the factors' mix is something else."""
    one, two = adapter(shared(3, 6), 1), adapter(shared(2, 1), 2)
    theirs, mixed = two.merged().state_dict(), copy.deepcopy(one)
    ends, name = (one.merged().state_dict(), theirs), one.shared.targets[0] + ".weight"
    blend.merge_adapters(mixed, two, share)
    whole = mixed.merged().state_dict()
    for key in whole:
        torch.testing.assert_close(whole[key], torch.lerp(ends[0][key], ends[1][key], share), rtol=1e-5, atol=1e-6)
    x, t = torch.randn(4, 2), torch.rand(4)
    torch.testing.assert_close(mixed(x, t), mixed.merged()(x, t), rtol=1e-4, atol=1e-5)
    if 0 < share < 1:
        same = adapter(shared(3, 6), 2)
        down, up = (torch.lerp(a[0], b[0], share) for a, b in ((one.down, same.down), (one.up, same.up)))
        wrong = one.shared.net.state_dict()[name] + one.shared.scale * up @ down
        right = torch.lerp(ends[0][name], same.merged().state_dict()[name], share)
        assert (wrong - right).abs().max() > 1e-2


def test_other_bases_are_refused():
    with pytest.raises(BadInput, match="different bases or layers"):
        blend.merge_adapters(adapter(shared(seed=0), 1), adapter(shared(seed=1), 1), 0.5)


def lora_file(path, layout, rank, alpha, seed, names=("x.a", "x.b"), wide=6):
    generator = torch.Generator().manual_seed(seed)
    first, second = blend.ENDINGS[layout]
    weights = {}
    for name in names:
        weights[name + first] = torch.randn(rank, wide, generator=generator)
        weights[name + second] = torch.randn(5, rank, generator=generator)
        weights[f"{name}.alpha"] = torch.tensor(float(alpha))
    save_file(weights, path)
    return path


@pytest.mark.parametrize("layout", [0, 1])
def test_files_mix_with_their_alphas(tmp_path, layout):
    a = lora_file(tmp_path / "a.safetensors", layout, 4, 1, 1)
    b = lora_file(tmp_path / "b.safetensors", layout, 2, 8, 2, ("x.b", "x.c"))
    out = tmp_path / "out.safetensors"
    assert interpolate_exports(a, b, out, (0.3,))
    found, first, second = load_file(out), *blend.ENDINGS[layout]
    assert {len(value) for name, value in found.items() if name.endswith(first)} == {6}  # one rank for all layers
    assert any(name.endswith(".alpha") for name in found) == (layout == blend.KOHYA)
    product = lambda weights, name, factor: factor * weights[name + second] @ weights[name + first]
    ours, theirs = load_file(a), load_file(b)
    for name, wanted in (
        ("x.a", 0.7 * product(ours, "x.a", 1 / 4)),
        ("x.c", 0.3 * product(theirs, "x.c", 8 / 2)),
        ("x.b", 0.7 * product(ours, "x.b", 1 / 4) + 0.3 * product(theirs, "x.b", 8 / 2)),
    ):
        factor = found[f"{name}.alpha"].item() / len(found[name + first]) if layout == blend.KOHYA else 1.0
        torch.testing.assert_close(product(found, name, factor), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "how, words",
    [
        (lambda p: lora_file(p / "b.safetensors", 1, 4, 1, 1), "different layouts"),
        (lambda p: lora_file(p / "b.safetensors", 0, 4, 1, 1, wide=7), "different sizes in the two LoRAs"),
        (lambda p: save_file({"weight": torch.ones(2)}, p / "b.safetensors") or p / "b.safetensors", "holds no LoRA"),
        (lambda p: p, "give two of a kind"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, how, words):
    a = lora_file(tmp_path / "a.safetensors", 0, 4, 1, 1)
    with pytest.raises(BadInput, match=words):
        interpolate_exports(a, how(tmp_path), tmp_path / "out.safetensors", (0.5,))
    assert not (tmp_path / "out.safetensors").exists()


def test_exported_folders_mix_and_are_proven_again(tmp_path):
    families.builders()["sd3"]().save_pretrained(tmp_path / "teacher")
    ends, jobs = {}, []
    for kind in ("pipeline", "lora"):
        for seed in (1, 2):
            one = load(tmp_path / "teacher", null=None)
            if kind == "lora":
                one.net = SharedBase(one.net, rank=2, alpha=4, targets="transformer.transformer_blocks.*attn.to_*")
                one = copy.deepcopy(one)
            tiny_parts.shake(one.net, 0.05, seed)
            net = one.net.merged() if kind == "lora" else one.net
            ends[kind, seed] = net.stock.state_dict()
            export(one, 4, "ode", tmp_path / f"{kind}{seed}", kind=kind)
        jobs.append(blend.merge_folders(tmp_path / f"{kind}1", tmp_path / f"{kind}2", tmp_path / f"{kind}-mix", 0.3))
    for value in stock_differences(jobs):
        assert not isinstance(value, str) and value < 1e-5, value
    mixed = diffusers.SD3Transformer2DModel.from_pretrained(jobs[0] / "transformer").state_dict()
    for key, value in mixed.items():
        torch.testing.assert_close(value, torch.lerp(ends["pipeline", 1][key], ends["pipeline", 2][key], 0.3))
    pairs, _ = blend.read(jobs[1] / "pytorch_lora_weights.safetensors")
    base = load(tmp_path / "teacher", null=None).net.stock.state_dict()
    for name, (down, up) in pairs.items():
        key = name.removeprefix("transformer.") + ".weight"
        wanted = torch.lerp(ends["lora", 1][key], ends["lora", 2][key], 0.3)
        torch.testing.assert_close(base[key] + up @ down, wanted, rtol=1e-4, atol=1e-5)
    assert json.loads((jobs[1] / "distill.json").read_text())["rank"] == 4
    files = [tmp_path / f"lora{seed}" / "pytorch_lora_weights.safetensors" for seed in (1, 2)]
    assert interpolate_exports(*files, tmp_path / "mixed.safetensors", (0.3,))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    pipe.load_lora_weights(tmp_path, weight_name="mixed.safetensors")
    pipe.fuse_lora()
    fused = pipe.transformer.state_dict()
    for name, (down, up) in pairs.items():
        key = name.removeprefix("transformer.")
        torch.testing.assert_close(
            fused[f"{key}.base_layer.weight"], base[f"{key}.weight"] + up @ down, rtol=1e-4, atol=1e-5
        )
    with pytest.raises(BadInput, match="has kind pipeline and .* lora: merge exports that differ in weights only"):
        blend.merge_folders(tmp_path / "pipeline1", tmp_path / "lora1", tmp_path / "none", 0.5)
