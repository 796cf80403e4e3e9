from __future__ import annotations

import pytest
import torch

from distill.export.card import card, picture

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


def test_card_code_runs_as_six_lines_of_stock_diffusers():
    code = card(RECORD | {"classes": 3, "null_class": True}, None, "mine", False).split("```")[1].splitlines()[1:]
    assert len(code) <= 6 and not any("distill" in line for line in code)
    compile("\n".join(code), "card", "exec")


@pytest.mark.parametrize(
    "kind, network, named",
    [
        ("lora", "UNet2DConditionModel", True),
        ("lora", "WanTransformer3DModel", True),
        ("lora", "FluxTransformer2DModel", True),
        ("lora", "LTXVideoTransformer3DModel", False),
        ("lora", "SanaTransformer2DModel", False),
        ("lora", "CogVideoXTransformer3DModel", False),
        ("single-file", "UNet2DConditionModel", True),
        ("single-file", "WanTransformer3DModel", False),
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


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_picture_puts_samples_side_by_side(channels, mode):
    samples = torch.full((3, channels, 4, 4), -1.0)
    samples[1] = 1.0
    samples[2] = 7.0  # clipped
    sheet = picture(samples)
    assert sheet.mode == mode and sheet.size == (8, 8)
    gray = sheet.convert("L")
    assert [gray.getpixel(p) for p in ((0, 0), (4, 0), (0, 4), (4, 4))] == [0, 255, 255, 0]
