"""Exports in half precision, of bases that have only half precision, and under a replaced scheduler."""

from __future__ import annotations

import copy
import json
import shutil

import diffusers
import pytest
import transformers
from safetensors.torch import load_file

from distill.errors import BadInput
from distill.export import export
from distill.export.verify import TOLERANCES, stock_differences
from distill.models.diffusers import load, tiny, tiny_parts
from distill.models.lora import SharedBase

SHIFTED = {"shift": 5.0}
TABLE = {"beta_end": 0.02, "prediction_type": "v_prediction"}


def half_only(folder, family):
    """A tiny pipeline whose weights are all in files of the variant fp16."""
    shutil.copytree(tiny.folder(family), folder)
    index = json.loads((folder / "model_index.json").read_text())
    for part, library in (("unet", diffusers), ("vae", diffusers), ("text_encoder", transformers)):
        model = getattr(library, index[part][1]).from_pretrained(folder / part).half()
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        model.save_pretrained(folder / part, variant="fp16")
    return folder


def student(path, adapter=False, **kw):
    one = load(path, **kw)
    if adapter:
        one.net = SharedBase(one.net, rank=3, targets="unet.*")
        one = copy.deepcopy(one)
    tiny_parts.shake(one.net, 0.2 if adapter else 0.03, seed=9)
    return one


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports by name, and what a process with stock diffusers says of each."""
    root = tmp_path_factory.mktemp("half")
    base = half_only(root / "base", "sd15")
    folders = {
        "of half": export(student(base), 2, "ode", root / "of-half"),
        "lora of half": export(student(base, adapter=True), 2, "ode", root / "lora-of-half", kind="lora"),
        "shifted": export(student("tiny:wan", size=(2, 4, 4), scheduler=SHIFTED), 2, "ode", root / "shifted"),
        "table": export(student("tiny:sd15", scheduler=TABLE), 2, "ode", root / "table"),
    }
    for dtype in ("bfloat16", "float16"):
        for sampler in ("ode", "renoise"):
            out = root / f"{dtype}-{sampler}"
            folders[f"{dtype} {sampler}"] = export(student("tiny:sd15"), 2, sampler, out, dtype=dtype)
        wrong = shutil.copytree(root / f"{dtype}-ode", root / f"{dtype}-wrong")
        config = wrong / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"timestep_spacing": "leading"}))
        folders[f"{dtype} wrong"] = wrong
    return folders, dict(zip(folders, stock_differences(list(folders.values()))))


def test_bases_in_half_precision_only_are_exported_whole(exported):
    folders, found = exported
    assert found["of half"] < 1e-5 and found["lora of half"] < 1e-5, found
    assert not [file for file in folders["of half"].rglob("*") if ".fp16" in file.name]
    diffusers.DiffusionPipeline.from_pretrained(folders["of half"])  # without an argument for the variant
    record = json.loads((folders["lora of half"] / "distill.json").read_text())
    assert record["variant"] == "fp16" and 'variant="fp16"' in (folders["lora of half"] / "README.md").read_text()


def test_the_scheduler_that_was_replaced_is_exported(exported):
    folders, found = exported
    assert found["shifted"] < 1e-5 and found["table"] < 1e-5, found
    assert json.loads((folders["shifted"] / "distill.json").read_text())["shift"] == 5.0
    stock = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folders["shifted"], subfolder="scheduler")
    stock.set_timesteps(2)
    assert stock.sigmas.tolist() == pytest.approx([1.0, 5 / 6, 0.0])  # 5 t / (1 + 4 t) at t = 1/2
    table = diffusers.DDIMScheduler.from_pretrained(folders["table"], subfolder="scheduler").config
    assert (table.beta_end, table.prediction_type) == (0.02, "v_prediction")


def test_tolerances_pass_roundings_and_no_wrong_scheduler(exported):
    folders, found = exported
    for dtype in ("bfloat16", "float16"):
        for sampler in ("ode", "renoise"):
            assert 0 < found[f"{dtype} {sampler}"] < TOLERANCES[dtype] / 2, found
        assert found[f"{dtype} wrong"] > 2 * TOLERANCES[dtype], found
        weights = load_file(folders[f"{dtype} ode"] / "unet" / "diffusion_pytorch_model.safetensors")
        assert {str(w.dtype) for w in weights.values()} == {f"torch.{dtype}"}


def test_what_is_not_written_in_half_precision_is_refused(tmp_path):
    with pytest.raises(BadInput, match="dtype 'bf16' must be one of float32, bfloat16, float16"):
        export(student("tiny:sd15"), 2, "ode", tmp_path / "out", dtype="bf16")
    with pytest.raises(BadInput, match="ONNX graphs are written in float32"):
        export(student("tiny:sd15"), 2, "ode", tmp_path / "out", kind="onnx", dtype="bfloat16")
    assert not list(tmp_path.iterdir())
