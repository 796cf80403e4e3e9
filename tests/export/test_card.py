from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from distill import config
from distill.denoise import Denoiser
from distill.export import export, lora
from distill.export.card import card
from distill.export.verify import verify
from distill.models.diffusers import FAMILIES, DiT, load, schedule_of, tiny_parts
from distill.models.families import sd, wan, z_image
from distill.solvers import DDIM, solve
from distill.times import Grid

RECORD = {
    "distill": "0.1.0",
    "steps": 1,
    "timesteps": [999],
    "times": [1.0, 0.0],
    "sampler": "renoise",
    "prediction": "eps",
    "guidance": None,
    "classes": 0,
    "null_class": False,
    "method": "",
    "metrics": {},
    "licence": "mit",
}


def test_card_of_an_unconditional_one_step_student():
    text = card(RECORD, None, "mine", False)
    assert text.startswith("---\nlicense: mit\n")
    assert "pipe(batch_size=10, num_inference_steps=1)" in text and "exactly 1 step:" in text
    assert "class_labels" not in text and "samples.png" not in text and "Recipe" not in text and "metric " not in text
    assert "| guidance (1 is conditional) | none |" in text and "{" not in text


FIFTY = RECORD | {"steps": 50, "timesteps": [999] * 50, "times": [k / 50 for k in range(50, -1, -1)]}
ONNX = {"kind": "onnx", "file": "a.onnx", "conditions": [], "shape": [2]}


def test_card_states_numbers_only_where_it_has_some():
    bare, measured = (card(FIFTY | {"metrics": m}, None, "mine", False) for m in ({}, {"fd": 0.5}))
    assert "Sample with exactly 50 steps: `distill verify` draws that many." in bare and "measured" not in bare
    assert "the numbers below were measured there" in measured and measured.index("below") < measured.index(
        "| fd | 0.5 |"
    )


@pytest.mark.parametrize("w, guided", [(None, False), (1.0, False), (1, False), (2.5, True), (0.5, True)])
@pytest.mark.parametrize("part", ["unet", "transformer", "onnx"])
def test_card_states_guidance_only_where_there_is_some(w, guided, part):
    record = RECORD | {"guidance": w, "classes": 3, "part": part} | (ONNX if part == "onnx" else {})
    text = card(record, None, "mine", False)
    row = next(line for line in text.splitlines() if line.startswith("| guidance"))
    assert row.endswith(f"| {w:g}, in the weights |" if guided else "| none |")
    rest = text.replace(row, "")
    assert ("guidance is in the weights already" in rest) == (guided and part == "transformer")
    assert ("guidance are inside the graph" in rest) == (guided and part == "onnx")


@pytest.mark.parametrize("classes, tag", [(0, "unconditional-image-generation"), (3, None)])
def test_card_calls_no_class_conditional_model_unconditional(classes, tag):
    head = card(RECORD | {"classes": classes}, None, "mine", False).split("---")[1]
    assert (f"pipeline_tag: {tag}\n" if tag else "library_name") in head and ("pipeline_tag" in head) == (
        tag is not None
    )


def test_card_code_runs_as_six_lines_of_stock_diffusers():
    code = card(RECORD | {"classes": 3, "null_class": True}, None, "mine", False).split("```")[1].splitlines()[1:]
    assert len(code) <= 6 and not any("distill" in line for line in code)
    compile("\n".join(code), "card", "exec")


@pytest.mark.parametrize(
    "kind, network, named",
    [
        ("lora", "UNet2DConditionModel", True),
        ("lora", "WanTransformer3DModel", True),
        ("lora", "FluxTransformer2DModel", False),
        ("lora", "SD3Transformer2DModel", False),
        ("lora", "LTXVideoTransformer3DModel", False),
        ("lora", "SanaTransformer2DModel", False),
        ("lora", "CogVideoXTransformer3DModel", False),
        ("single-file", "UNet2DConditionModel", True),
        ("single-file", "WanTransformer3DModel", False),
        ("single-file", "FluxTransformer2DModel", False),
        ("single-file", "SanaTransformer2DModel", False),
        ("pipeline", "UNet2DConditionModel", False),
    ],
)
def test_comfyui_is_named_only_where_it_reads_the_file(kind, network, named):
    about = {"kind": kind, "network": network, "call": {}, "base": "a/b", "scheduler": "DDIMScheduler", "part": "unet"}
    about |= {"files": ["a.safetensors"], "file": "a.safetensors", "pipeline": "P"}
    assert ("ComfyUI" in card(RECORD | about, None, "mine", False)) == named


def test_card_shortens_long_grids_and_names_the_null_class():
    many = RECORD | {
        "steps": 50,
        "timesteps": list(range(999, -1, -20)),
        "times": [k / 50 for k in range(50, -1, -1)],
        "classes": 10,
        "null_class": True,
    }
    text = card(many, None, "teacher", True)
    assert "999, 979, 959, 939, ..., 79, 59, 39, 19" in text and '0 to 9; 10 is "no class"' in text


def test_card_lays_out_the_nested_metrics_of_a_run():
    rows = {"teacher": {"1": {"fid": 3.14159}, "4": {"fid": 2.5, "recall": 1}}, "student": {"4": {"fid": None}}}
    rows |= {"solvers": {"1": {"fid": "heun"}}, "about": {"samples": 4000, "reference": 360}}
    text = card(RECORD | {"metrics": rows}, None, "mine", False)
    assert "\n4,000 samples per row, against 360 reference samples.\n" in text
    for line in (
        "| model | evaluations | fid | recall |",
        "| teacher | 1 | 3.142 |  |",
        "| teacher | 4 | 2.5 | 1 |",
        "| student | 4 |  |  |",
    ):
        assert line in text, line
    assert "heun" not in text


# -- what a card says of other programs -----------------------------------------------------------------------------


def factors(network, names):
    """Factors (A, B) of rank 2 for linear layers by their names."""
    layers = {n: m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(names)}
    assert layers
    return {n: (torch.randn(2, m.in_features), torch.randn(m.out_features, 2)) for n, m in layers.items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for key in found:
        assert torch.equal(found[key].squeeze(), expected[key].squeeze()), key


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_extra_lora_file_of_a_unet_has_kohyas_layout(name):
    from diffusers.loaders import lora_conversion_utils as stock

    unet = load(f"tiny:{name}", null=None).net.stock
    pairs = factors(unet, ("to_q", "to_out.0", "ff.net.2", "time_emb_proj"))
    found, alphas = stock._convert_non_diffusers_lora_to_diffusers(sd.kohya_keys(pairs), unet_name="unet")
    expected = {}
    for layer, (down, up) in pairs.items():  # by the names that diffusers used before peft
        stem = f"unet.{layer.replace('to_out.0', 'to_out')}" + ("_lora" if ".to_" in layer else ".lora")
        expected |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    same({k.replace(".processor", ""): v for k, v in found.items()}, expected)
    assert set(alphas.values()) <= {2.0}


def test_the_extra_lora_file_of_wan_has_the_layout_of_its_own_code():
    from diffusers.loaders import lora_conversion_utils as stock

    pairs = factors(load("tiny:wan", null=None).net.stock, ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"))
    found = stock._convert_non_diffusers_wan_lora_to_diffusers(dict(wan.wan_keys(pairs)))
    same(found, lora.stock_keys(pairs, "transformer"))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_single_file_of_a_unet_has_the_layout_of_the_original_code(name):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = load(f"tiny:{name}", null=None).net.stock
    file = sd.original_keys(unet.state_dict(), unet.config)
    back = convert_ldm_unet_checkpoint(dict(file), dict(unet.config))
    same(dict(back), unet.state_dict())


def test_those_four_layouts_are_all_that_cards_promise():
    layouts = {name: family.lora_keys for name, family in FAMILIES.items() if family.lora_keys}
    assert layouts == {
        "UNet2DConditionModel": sd.kohya_keys,
        "WanTransformer3DModel": wan.wan_keys,
        "ZImageTransformer2DModel": z_image.comfyui_keys,
    }
    assert [name for name, family in FAMILIES.items() if family.original_keys] == ["UNet2DConditionModel"]


# -- what it says to call -------------------------------------------------------------------------------------------


def test_the_code_of_a_class_conditional_card_runs_as_written_and_draws_the_students_samples(tmp_path, monkeypatch):
    """`DiTPipeline` guides by default, with class 1000; the card's call does not, and `verify` makes the same call."""
    torch.manual_seed(0)
    student = tiny_parts.shake(
        Denoiser(DiT(size=8, width=16, depth=1, heads=2, classes=3), schedule_of("DDIMScheduler"), "v")
    )
    out = export(student, 4, "ode", tmp_path / "dit")
    record = json.loads((out / "distill.json").read_text())
    assert record["call"] == {"num_inference_steps": 4, "guidance_scale": 1.0}
    text = (out / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert "guidance_scale=1.0, " not in code and "num_inference_steps=4, guidance_scale=1.0" in code
    assert "by default `DiTPipeline` guides with class 1000" in " ".join(text.split())
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert (tmp_path / "sample.png").exists() and len(names["images"]) == 10
    labels = torch.tensor([i % 3 for i in range(10)])
    noise = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    drawn = names["pipe"](
        labels.tolist(), **record["call"], generator=torch.Generator().manual_seed(1), output_type="np"
    ).images
    ours = solve(student, noise, Grid.uniform(4).times, DDIM(), label=labels)
    assert (torch.from_numpy(drawn)[..., 0] - (ours[:, 0] / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-4
    assert verify(out) < 1e-5


def test_the_recipe_on_the_shipped_teachers_card_is_one_that_is_read(tmp_path):
    folder = Path(__file__).parents[2] / "checkpoints" / "digits-teacher"
    recipe = (folder / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "recipe.yaml").write_text(recipe)
    cfg = config.load([tmp_path / "recipe.yaml"])
    assert cfg.engine.precision == "32" and cfg.name == "digits-teacher"
    record = json.loads((folder / "distill.json").read_text())
    assert record["recipe_hash"] == hashlib.sha256(recipe.encode()).hexdigest()
