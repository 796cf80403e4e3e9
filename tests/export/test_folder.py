from __future__ import annotations

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.export import export
from distill.export.folder import stock_table
from distill.export.verify import stock_differences
from distill.models import MLP, Transformer
from distill.models.diffusers import DiT, UNet2D, grid_of, load, schedule_of
from distill.noise import RectifiedFlow, Table
from distill.times import Grid


def student(prediction="v", schedule=None, channels=1, kind=UNet2D, **kw):
    """A random student no layer of which hides behind a zero start."""
    torch.manual_seed(0)
    schedule = schedule or schedule_of("DDIMScheduler")
    kw.setdefault("timesteps", len(schedule.alphas_cumprod))
    kw |= {"widths": (8, 16)} if kind is UNet2D else {"width": 16, "depth": 2, "heads": 2}
    net = kind(size=8, channels=channels, **kw)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return Denoiser(net, schedule, prediction)


def test_stock_diffusers_draws_the_trainers_samples(tmp_path):
    """Six ways to walk, and the hard cases, all served by one process that cannot import us."""
    zero_snr = schedule_of("DDIMScheduler", rescale_betas_zero_snr=True)
    short = schedule_of("DDPMScheduler", num_train_timesteps=50, beta_schedule="squaredcos_cap_v2")
    for steps in (1, 2, 4):
        for sampler in ("ode", "renoise"):
            export(student(classes=3, guided=True), steps, sampler, tmp_path / f"{sampler}{steps}", w=2.5)
    export(student("eps", channels=3), 50, "ode", tmp_path / "teacher")
    export(student("x", zero_snr, classes=2), 4, "renoise", tmp_path / "zero_snr")
    export(student("v", short), 10, "renoise", tmp_path / "short")
    export(student(flow_map=True), 4, "ode", tmp_path / "flow_map")
    lattice = grid_of("LCMScheduler", 4)
    export(student(), lattice, "renoise", tmp_path / "lattice")
    flow = Table.of(RectifiedFlow(), 1000)
    export(student(schedule=flow, kind=DiT, classes=3), 4, "ode", tmp_path / "dit")
    export(student("x", channels=3, kind=DiT, classes=3, guided=True), 2, "renoise", tmp_path / "dit_renoise", w=2.5)
    pixels = load("tiny:adm")
    export(pixels, 4, "ode", tmp_path / "adm")  # its mean alone
    assert pixels.net.stock.config.out_channels == 6 and len(pixels.net.stock.conv_out.bias) == 6  # itself as it was
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 14
    for folder, value in zip(folders, stock_differences(folders)):
        assert value < (5e-5 if folder.name == "teacher" else 1e-5), folder.name  # fifty steps round more often
        samples = load_file(folder / "reference.safetensors")["samples"]
        assert samples.std() > 0.1 and samples.std(0).max() > 0.1, folder.name


def test_folder_holds_what_it_says(tmp_path):
    recipe = {"method": "x.Y", "steps": 3}
    out = export(
        student(classes=3, guided=True),
        2,
        "ode",
        tmp_path / "deep" / "out",
        method="Consistency",
        recipe=recipe,
        metrics={"fid": 1.23456, "nfe": 2},
        samples=torch.rand(5, 1, 8, 8) * 2 - 1,
        w=2.5,
    )
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "distill.json",
        "model_index.json",
        "reference.safetensors",
        "samples.png",
        "scheduler",
        "unet",
    ]
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    record = json.loads((out / "distill.json").read_text())
    assert record["steps"] == 2 and record["timesteps"] == [999, 499] and record["times"] == [1.0, 0.5, 0.0]
    assert record["prediction"] == "v" and record["guidance"] == 2.5 and record["sampler"] == "ode"
    assert record["metrics"] == {"fid": 1.23456, "nfe": 2} and len(record["recipe_hash"]) == 64
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["timestep_spacing"] == "trailing" and scheduler["clip_sample"] is False
    assert scheduler["set_alpha_to_one"] is True and scheduler["prediction_type"] == "v_prediction"
    assert scheduler["beta_schedule"] == "linear" and scheduler["trained_betas"] is None
    readme = (out / "README.md").read_text()
    for words in (
        "license: other",
        "Not stated: ",
        'from_pretrained("out")',
        "num_inference_steps=2",
        "method: x.Y",
        "1.235",
        "Consistency",
        "![samples](samples.png)",
        "2.5, in the weights",
    ):
        assert words in readme, words
    assert str(tmp_path) not in "".join(p.read_text() for p in out.rglob("*.json"))


@pytest.mark.parametrize("sampler", ["ode", "renoise"])
def test_load_gives_back_the_same_denoiser(tmp_path, sampler):
    ours = student("eps", classes=3, guided=True).eval()
    theirs = load(export(ours, 4, sampler, tmp_path / "out", w=2.5))
    assert theirs.prediction == "eps" and theirs.schedule == ours.schedule and theirs.net.classes == 3
    x_t, t = torch.randn(4, 1, 8, 8), torch.tensor([1.0, 0.75, 0.5, 0.03])
    label = torch.tensor([0, 2, -1, 1])
    torch.testing.assert_close(theirs(x_t, t, label=label), ours(x_t, t, label=label, w=2.5), rtol=1e-5, atol=1e-4)
    again = export(theirs, 4, sampler, tmp_path / "again")
    assert str(tmp_path) not in "".join(p.read_text() for p in again.rglob("*.json"))


@pytest.mark.parametrize(
    "settings, formula",
    [
        ({}, "linear"),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, "scaled_linear"),
        ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100}, "squaredcos_cap_v2"),
        ({"beta_start": 0.00012345}, None),
        ({"rescale_betas_zero_snr": True}, None),
        ({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}, None),
    ],
    ids=str,
)
def test_tables_survive_the_stock_settings(settings, formula):
    schedule = schedule_of("DDIMScheduler", **settings)
    stock = stock_table(schedule)
    assert stock.get("beta_schedule") == formula
    ours = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64)
    theirs = torch.tensor(schedule_of("LCMScheduler", **stock).alphas_cumprod, dtype=torch.float64)
    torch.testing.assert_close(theirs, ours, rtol=1.2e-7, atol=0)


def test_a_table_in_float64_is_served_to_float32():
    exact = Table(tuple((0.9999 - 0.9998 * (n / 999) ** 0.7) for n in range(1000)))
    served = schedule_of("DDIMScheduler", **stock_table(exact))
    served, exact = torch.tensor(served.alphas_cumprod), torch.tensor(exact.alphas_cumprod)
    torch.testing.assert_close(served, exact, rtol=1.2e-7, atol=0)


def test_w_of_a_student_without_the_input_is_only_noted(tmp_path):
    one = student()
    out = export(one, 2, "ode", tmp_path / "out", w=1.5)
    assert json.loads((out / "distill.json").read_text())["guidance"] == 1.5
    x, t = torch.randn(2, 1, 8, 8), torch.ones(2)
    assert torch.equal(load(out)(x, t), one(x, t))


def test_the_student_is_left_as_it_was(tmp_path):
    one = student(guided=True).train()
    before = {k: v.clone() for k, v in one.state_dict().items()}
    export(one, 2, "ode", tmp_path / "out", w=3.0)
    assert one.training and all(torch.equal(v, before[k]) for k, v in one.state_dict().items())


@pytest.mark.parametrize(
    "make, grid, sampler, kw, words",
    [
        (lambda: Denoiser(MLP(), schedule_of("DDIMScheduler"), "eps"), 4, "ode", {}, "MLP has no stock class.*UNet2D"),
        (
            lambda: Denoiser(Transformer(), schedule_of("DDIMScheduler"), "eps"),
            4,
            "ode",
            {},
            "Transformer has no stock",
        ),
        (lambda: student(), 4, "euler", {}, "sampler 'euler' is none of ode, renoise"),
        (lambda: student(), 3, "ode", {}, "666 to 333.*divides 1000"),
        (lambda: student(), 3, "renoise", {}, "998"),
        (lambda: student(), [1, 0.3, 0], "ode", {}, r"serves \[1, 0.5, 0\] in 2 steps.*trained on \[1, 0.3, 0\]"),
        (lambda: student(), [1, 0.3, 0], "renoise", {}, r"LCMScheduler serves \[1, 0.5, 0\]"),
        (lambda: student("flow"), 4, "ode", {}, "predicts 'flow'.*eps, x, v"),
        (lambda: Denoiser(UNet2D(), RectifiedFlow(), "v"), 4, "ode", {}, "under RectifiedFlow"),
        (lambda: student(timesteps=100), 4, "ode", {}, "timesteps=100.*1000"),
        (lambda: student(guided=True), 4, "ode", {}, "needs a fixed w"),
        (lambda: student(flow_map=True), 2, "renoise", {}, "t - s varies"),
    ],
)
def test_what_stock_cannot_serve_is_refused_and_leaves_nothing(tmp_path, make, grid, sampler, kw, words):
    with pytest.raises(BadInput, match=words):
        export(make(), grid, sampler, tmp_path / "out", **kw)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_never_touched(tmp_path):
    (tmp_path / "mine").write_text("dear")
    with pytest.raises(BadInput, match="exists already"):
        export(student(), 4, "ode", tmp_path)
    assert (tmp_path / "mine").read_text() == "dear"


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("distill.export.write.card", full)
    with pytest.raises(OSError, match="No space"):
        export(student(), 4, "ode", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_one_step_timestep_zero_is_refused(tmp_path):
    """LCM's c_skip is 1 at timestep 0: the network's last answer would be thrown away."""
    schedule = schedule_of("DDIMScheduler", num_train_timesteps=4)
    with pytest.raises(BadInput, match="timestep 0"):
        export(student(schedule=schedule), 4, "renoise", tmp_path / "out")
    assert Grid.uniform(4) == grid_of(diffusers.DDIMScheduler(4, timestep_spacing="trailing"), 4)
