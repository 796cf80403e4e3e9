from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from distill.cli import main
from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.export import export
from distill.export.verify import stock_differences
from distill.models import MLP
from distill.models.diffusers import UNet2D, load, schedule_of, tiny_parts
from distill.models.diffusers import tiny as families
from distill.noise import RectifiedFlow


def test_the_graph_is_the_students_step_at_any_batch(tmp_path):
    """x and x_s of onnxruntime against torch, at times and a number of rows that it was not traced with."""
    torch.manual_seed(0)
    net = tiny_parts.shake(UNet2D(size=8, widths=(8, 16), classes=3, guided=True))
    student = Denoiser(net, schedule_of("DDIMScheduler"), "v")
    out = export(student, 2, "renoise", tmp_path / "out", kind="onnx", w=2.5)
    assert json.loads((out / "distill.json").read_text())["batch"] is None
    graph = onnxruntime.InferenceSession(out / "student.onnx")
    x_t, t, s, noise = torch.randn(5, 1, 8, 8), torch.rand(5), torch.rand(5), torch.randn(5, 1, 8, 8)
    label = torch.tensor([0, 1, 2, -1, 1])
    given = {"x_t": x_t, "t": t, "s": s, "label": label, "noise": noise}
    x, x_s = (torch.from_numpy(v) for v in graph.run(["x", "x_s"], {k: np.asarray(v) for k, v in given.items()}))
    with torch.no_grad():
        wanted = student(x_t, t, label=label, w=torch.full((5,), 2.5))
    assert (x - wanted).abs().max() / wanted.abs().max() < 1e-5
    wanted = student.schedule.add_noise(wanted, s, noise)
    assert (x_s - wanted).abs().max() / wanted.abs().max() < 1e-5
    assert stock_differences([out])[0] < 1e-5
    space, code = {}, (out / "README.md").read_text().split("```")[1].removeprefix("python\n")
    exec(code.replace('"out/', f'"{tmp_path}/out/'), space)  # as it stands on the card, conditions too
    assert space["x"].shape == (1, 1, 8, 8) and list(space["cond"]) == ["label"]
    stored = load_file(out / "reference.safetensors")
    save_file(stored | {"samples": stored["samples"] + 0.01}, out / "reference.safetensors")
    assert 1e-3 < stock_differences([out])[0] < 0.1


def test_the_verbs_export_and_verify(tmp_path, monkeypatch):
    """A network of our own, which no stock class holds, leaves as ONNX; the exit code tells what verify finds."""
    monkeypatch.chdir(tmp_path)
    tiny.train(tmp_path / "run", name="teacher")
    call = lambda *args: CliRunner().invoke(main, list(args))
    done = call("export", "run", "out", "--as", "onnx")
    assert done.exit_code == 0 and "loads without distill" in done.output, done.output
    readme = (tmp_path / "out" / "README.md").read_text()
    space = {}
    monkeypatch.setattr(onnxruntime, "InferenceSession", Counted)
    exec(readme.split("```")[1].removeprefix("python\n").replace('"out/', f'"{tmp_path}/out/'), space)
    record = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert space["x"].shape == (1, *record["shape"]) and Counted.runs == record["steps"]
    assert "other samples" not in call("verify", "out").output
    stored = load_file(tmp_path / "out" / "reference.safetensors")
    save_file(stored | {"samples": stored["samples"] + 1}, tmp_path / "out" / "reference.safetensors")
    refused = call("verify", "out")
    assert refused.exit_code == 2 and "draws other samples than the trainer" in refused.output
    assert call("verify", "run").exit_code == 2
    for kind, words in (("lora", "no stock pipeline that loads a LoRA"), ("single-file", "is not conditioned on text")):
        refused = call("export", "run", "other", "--as", kind)
        assert refused.exit_code == 2 and words in refused.output
    assert not (tmp_path / "other").exists()


class Counted(onnxruntime.InferenceSession):
    runs = 0

    def run(self, *args, **kw):
        Counted.runs += 1
        return super().run(*args, **kw)


def test_networks_of_our_own_need_no_stock_class(tmp_path):
    torch.manual_seed(0)
    out = export(Denoiser(MLP(dim=2), RectifiedFlow(), "flow"), 3, "ode", tmp_path / "out", kind="onnx")
    assert stock_differences([out])[0] < 1e-5


FAMILIES = {
    "sd1": (families.builders()["sd15"], {}, None),
    "sdxl": (families.builders()["sdxl"], {}, None),
    "sd3": (families.builders()["sd3"], {}, None),
    "flux-dev": (families.builders()["flux"], {"size": (8, 8)}, None),
    "wan": (families.builders()["wan"], {"size": (2, 4, 4)}, None),
    "sana": (families.builders()["sana"], {"size": (16, 16)}, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_text_families(tmp_path, name):
    build, kw, batch = FAMILIES[name]
    build().save_pretrained(tmp_path / "teacher")
    student = load(tmp_path / "teacher", null=None, **kw)
    tiny_parts.shake(student.net, 0.03, seed=9)
    out = export(student, 4, "ode", tmp_path / "out", kind="onnx")
    assert json.loads((out / "distill.json").read_text())["batch"] == batch
    found = stock_differences([out])[0]
    print(f"{name} onnx ode: {found:.1e}")
    assert found < 1e-5


@pytest.mark.slow
def test_a_graph_that_does_not_load_is_refused(tmp_path):
    """PixArt squeezes its tokens, of which there are more than one: nothing in torch, an error in ONNX."""
    families.builders()["pixart_sigma"]().save_pretrained(tmp_path / "teacher")
    with pytest.raises(BadInput, match="PixArtTransformer2DModel becomes a graph that onnxruntime does not load"):
        export(load(tmp_path / "teacher", null=None), 4, "ode", tmp_path / "out", kind="onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["teacher"]
