from __future__ import annotations

import copy
import json
import subprocess
import sys

import diffusers
import pytest
import torch

from distill.denoise import Denoiser, Guided
from distill.errors import BadInput
from distill.models.diffusers import DiT, UNet2D, grid_of, load, prediction_of, schedule_of, schedulers
from distill.noise import VE, RectifiedFlow, Table
from distill.solvers import DDIM, solve
from distill.times import Grid

TABLES = [
    n + "Scheduler"
    for n in (
        "DDPM",
        "DDIM",
        "PNDM",
        "LMSDiscrete",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "HeunDiscrete",
        "LCM",
        "TCD",
        "DPMSolverMultistep",
        "DPMSolverSinglestep",
        "DEISMultistep",
        "UniPCMultistep",
        "KDPM2Discrete",
        "CogVideoXDDIM",
    )
]


KINDS = {UNet2D: {"widths": (8, 16)}, DiT: {"width": 16, "depth": 2, "heads": 2}}
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)


def tiny(kind=UNet2D, **kw):
    torch.manual_seed(0)
    net = kind(size=8, **KINDS[kind], **kw)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if not name.startswith(("guidance.outer", "gap.outer")):
                p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def shake_extra(net):
    with torch.no_grad():
        for part in (net.guidance, net.gap):
            for p in part.parameters() if part else ():
                p.add_(0.3 * torch.randn_like(p))
    return net


def batch(net, n=4):
    torch.manual_seed(1)
    return torch.randn(n, *net.shape), torch.tensor([1.0, 0.75, 0.5, 0.013])[:n]


# -- schedules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_table_is_the_schedulers_own(name):
    scheduler = getattr(diffusers, name)()
    schedule = schedule_of(scheduler)
    assert isinstance(schedule, Table) and schedule == schedule_of(name)
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    torch.testing.assert_close(schedule.alpha(t) ** 2, scheduler.alphas_cumprod.double(), rtol=1e-9, atol=1e-12)
    assert prediction_of(scheduler) == "eps"


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 50},
        {"rescale_betas_zero_snr": True},
    ],
    ids=str,
)
def test_table_follows_the_settings(settings):
    schedule = schedule_of("DDIMScheduler", **settings)
    stock = diffusers.DDIMScheduler(**settings).alphas_cumprod
    assert schedule.alphas_cumprod == tuple(stock.tolist())
    assert schedule == schedule_of(diffusers.DDIMScheduler(), **settings)
    assert schedule.zero_terminal_snr == ("rescale_betas_zero_snr" in settings)


def test_forward_process_is_the_stock_one():
    scheduler = diffusers.DDPMScheduler()
    x, z, n = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 499, 999])
    ours = schedule_of(scheduler).add_noise(x, (n + 1) / 1000, z)
    torch.testing.assert_close(ours, scheduler.add_noise(x, z, n), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", schedulers.FLOW)
def test_flow_is_rectified_flow_with_the_stock_shift(name):
    scheduler = getattr(diffusers, name)(shift=3.0)
    schedule = schedule_of(scheduler)
    assert schedule == RectifiedFlow(3.0) and prediction_of(scheduler) == "flow"
    t = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(schedule.sigma(t), scheduler.sigmas.double()[:1000], rtol=1e-6, atol=1e-7)


def test_flow_sigmas_of_vp_solvers_are_rectified_flow():
    config = {"use_flow_sigmas": True, "flow_shift": 5.0, "prediction_type": "flow_prediction"}
    assert schedule_of("UniPCMultistepScheduler", **config) == RectifiedFlow(5.0)
    assert prediction_of(diffusers.UniPCMultistepScheduler(**config)) == "flow"


def test_karras_schedulers_are_variance_exploding():
    assert schedule_of("EDMEulerScheduler") == VE(80.0, 7.0)
    assert schedule_of("CMStochasticIterativeScheduler", sigma_max=40.0) == VE(40.0, 7.0)
    assert prediction_of("EDMEulerScheduler") == "edm"
    with pytest.raises(BadInput, match="CMStochasticIterativeScheduler"):
        prediction_of("CMStochasticIterativeScheduler")


@pytest.mark.parametrize("kind, ours", schedulers.PREDICTIONS.items())
def test_prediction_types(kind, ours):
    if kind != "flow_prediction":
        assert prediction_of(diffusers.DDIMScheduler(prediction_type=kind)) == ours


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: schedule_of("IPNDMScheduler"), "IPNDMScheduler has no supported noise schedule"),
        (lambda: schedule_of("DDIMSchedular"), "Did you mean 'DDIMScheduler'"),
        (lambda: schedule_of("UNet2DModel"), "no scheduler 'UNet2DModel'"),
        (lambda: schedule_of("DDIMScheduler", beta_strat=1), "no setting 'beta_strat'. Did you mean 'beta_start'"),
        (lambda: schedule_of("AmusedScheduler"), "AmusedScheduler cannot be created"),
        (
            lambda: schedule_of("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True),
            "use_dynamic_shifting=False",
        ),
        (lambda: prediction_of(diffusers.DDIMScheduler(prediction_type="noise")), "'noise'"),
        (lambda: prediction_of(diffusers.EDMEulerScheduler(prediction_type="v_prediction")), "'v_prediction'"),
    ],
)
def test_unknown_schedulers_are_named(call, words):
    with pytest.raises(BadInput, match=words):
        call()


# -- grids -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "TCD", "LCM"]
)
@pytest.mark.parametrize("steps", [1, 2, 4, 10])
def test_grid_is_what_stock_serves(name, steps):
    kind = getattr(diffusers, name + "Scheduler")
    config = {"original_inference_steps": steps} if name in ("TCD", "LCM") else {"timestep_spacing": "trailing"}
    scheduler = kind(**config)
    grid = grid_of(scheduler, steps)
    assert scheduler.num_inference_steps is None  # the user's scheduler is not touched
    scheduler.set_timesteps(steps)
    assert [round(t * 1000 - 1) for t in grid.times[:-1]] == scheduler.timesteps.tolist()
    assert grid == Grid.uniform(steps) == grid_of(name + "Scheduler", steps, **config)


def test_lcm_serves_its_own_lattice():
    assert grid_of("LCMScheduler", 4).times == (1.0, 0.76, 0.5, 0.26, 0.0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_grid_of_flow_has_the_stock_sigmas(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    grid = grid_of(scheduler, 4)
    scheduler.set_timesteps(4)
    sigma = schedule_of(scheduler).sigma(grid.tensor(dtype=torch.float64))
    torch.testing.assert_close(sigma, scheduler.sigmas.double(), rtol=0, atol=1e-6)


def test_grid_of_edm_has_the_stock_sigmas():
    scheduler = diffusers.EDMEulerScheduler()
    grid = grid_of(scheduler, 5)
    scheduler.set_timesteps(5)
    sigma = schedule_of(scheduler).sigma(grid.tensor(dtype=torch.float64))
    torch.testing.assert_close(sigma, scheduler.sigmas.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "scheduler, steps, words",
    [
        (diffusers.DDIMScheduler(), 4, "timestep 750.*timestep_spacing='trailing'"),
        (diffusers.DDIMScheduler(timestep_spacing="trailing"), 3, "666 to 333.*332.*divides 1000"),
        (diffusers.DDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=False), 4, "set_alpha_to_one=True"),
        (diffusers.DDIMScheduler(), 2000, "cannot serve 2000 steps"),
        (diffusers.LCMScheduler(original_inference_steps=3), 3, "998.*original_inference_steps"),
        (diffusers.DPMSolverMultistepScheduler(final_sigmas_type="sigma_min"), 4, "final_sigmas_type='zero'"),
        (diffusers.CMStochasticIterativeScheduler(), 2, "sigma=0.002"),
        (diffusers.KDPM2DiscreteScheduler(timestep_spacing="trailing"), 4, "7 times in 4 steps"),
    ],
)
def test_grids_that_cannot_be_trained_on_are_refused(scheduler, steps, words):
    with pytest.raises(BadInput, match=words):
        grid_of(scheduler, steps)


# -- the wrapper -------------------------------------------------------------------------------------------------


@each_kind
def test_wrapper_calls_the_stock_network_at_its_timesteps(kind):
    net = tiny(kind, classes=3)
    x, t = batch(net)
    label = torch.tensor([0, 2, -1, 1])
    stock = net.stock(x, torch.tensor([999, 749, 499, 12]), torch.tensor([0, 2, 3, 1])).sample
    torch.testing.assert_close(net(x, t, label), stock, rtol=0, atol=1e-6)
    assert torch.equal(net(x, t), net(x, t, label=torch.full((4,), -1)))
    assert net.shape == (1, 8, 8) and net.classes == 3


@each_kind
def test_new_inputs_start_at_zero_and_then_count(kind):
    teacher = tiny(kind, classes=2)
    student = kind(size=8, **KINDS[kind], classes=2, guided=True, flow_map=True).eval()
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected and all(k.startswith(("guidance.", "gap.")) for k in missing)
    x, t = batch(teacher)
    assert torch.equal(student(x, t, w=4.0, s=t / 2), teacher(x, t))
    shake_extra(student)
    base = student(x, t, w=4.0, s=t / 2)
    assert (base - student(x, t, w=5.0, s=t / 2)).abs().max() > 1e-4
    assert (base - student(x, t, w=4.0, s=t / 3)).abs().max() > 1e-4


@each_kind
def test_copies_share_nothing_and_keep_no_hook(kind):
    net = shake_extra(tiny(kind, guided=True))
    x, t = batch(net)
    before = net(x, t, w=3.0)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    assert torch.equal(net(x, t, w=3.0), before) and not torch.equal(other(x, t, w=3.0), before)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x, t, w=3.0), before)
    assert not any(m._forward_hooks for m in net.stock.modules())


@each_kind
def test_folding_is_exact(kind):
    net = shake_extra(tiny(kind, classes=2, guided=True, flow_map=True))
    x, t = batch(net)
    plain = kind.wrap(net.fold(w=3.5, gap=0.25))
    conditions = net(x, t, torch.tensor([0, 1, -1, 0]), w=3.5, s=t - 0.25)
    torch.testing.assert_close(plain(x, t, torch.tensor([0, 1, -1, 0])), conditions, rtol=1e-5, atol=5e-6)
    assert (conditions - net(x, t, torch.tensor([0, 1, -1, 0]))).abs().max() > 1e-3
    for kw, words in (({"gap": 0.25}, "fixed w"), ({"w": 1.0}, "fixed gap")):
        with pytest.raises(BadInput, match=words):
            net.fold(**kw)
    with pytest.raises(BadInput, match="no input w"):
        tiny(kind).fold(w=1.0)


@each_kind
def test_the_embedding_of_the_gap_varies_slowly(kind):
    """Flow maps are differentiated in t: the fastest feature of t - s turns once over the range of times."""
    assert max(tiny(kind, flow_map=True).gap.frequencies) <= 2 * torch.pi


@each_kind
def test_jvp_with_math_attention(kind):
    net = tiny(kind, math_attention=True, timesteps=10)
    x, t = batch(net, 2)
    v = torch.randn_like(x)
    plain = kind.wrap(copy.deepcopy(net.stock), timesteps=10)
    _, slope = torch.func.jvp(net, (x, t), (v, torch.ones_like(t)))
    h = 2e-3
    central = (plain(x + h * v, t + h) - plain(x - h * v, t - h)) / (2 * h)
    assert slope.norm() > 1
    torch.testing.assert_close(slope, central, rtol=2e-2, atol=5e-3)


@each_kind
def test_math_attention_is_the_same_function(kind):
    net = tiny(kind)
    x, t = batch(net)
    fused = net(x, t)
    written_out = kind.wrap(net.stock, math_attention=True)(x, t)
    torch.testing.assert_close(written_out, fused, rtol=1e-4, atol=1e-5)


def test_unsupported_networks_raise():
    with pytest.raises(BadInput, match="fourier"):
        UNet2D.wrap(
            diffusers.UNet2DModel(
                8,
                1,
                1,
                time_embedding_type="fourier",
                block_out_channels=(8, 16),
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
                norm_num_groups=8,
            )
        )
    with pytest.raises(BadInput, match="groups=8"):
        UNet2D(widths=(12, 16))
    net = UNet2D.wrap(tiny(classes=2).unet, null_class=False)
    assert net.classes == 3
    x, t = batch(net)
    with pytest.raises(BadInput, match="no class"):
        net(x, t, torch.tensor([0, 1, -1, 0]))


def test_a_transformer_starts_at_zero_and_drops_no_label_by_itself():
    net = DiT(size=8, classes=3).train()
    x, t = batch(net)
    assert torch.equal(net(x, t), torch.zeros_like(x))
    net = tiny(DiT, classes=3).train()
    label = torch.tensor([0, 1, 2, 0])
    assert all(torch.equal(net(x, t, label), net(x, t, label)) for _ in range(20))
    assert not torch.equal(net(x, t, label), net(x, t))
    with pytest.raises(BadInput, match="patch=3"):
        DiT(size=8, patch=3)


def test_of_a_transformer_that_predicts_a_variance_the_mean_is_kept():
    stock = diffusers.DiTTransformer2DModel(2, 8, 4, 8, num_layers=1, sample_size=8, num_embeds_ada_norm=5)
    net = DiT.wrap(stock.eval())
    x, t = batch(net)
    assert net(x, t).shape == x.shape == (4, 4, 8, 8) and net.classes == 5
    whole = stock(x, t * 1000 - 1, torch.full((4,), 5)).sample
    assert torch.equal(net(x, t), whole[:, :4]) and whole.shape[1] == 8


def test_guided_ddim_steps_are_the_stock_transformer_pipelines(tmp_path):
    torch.manual_seed(0)
    stock = diffusers.DiTTransformer2DModel(2, 8, 4, 8, num_layers=2, sample_size=8, num_embeds_ada_norm=1000).eval()
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    vae = diffusers.AutoencoderTiny(
        4,
        4,
        latent_channels=4,
        encoder_block_out_channels=(4,),
        num_encoder_blocks=(0,),
        decoder_block_out_channels=(4,),
        num_decoder_blocks=(0,),
    )
    pipeline, states = diffusers.DiTPipeline(stock, vae, scheduler), []
    pipeline.save_pretrained(tmp_path / "dit")
    pipeline.set_progress_bar_config(disable=True)
    step = scheduler.step
    scheduler.step = lambda *a, **kw: states.append(step(*a, **kw)) or states[-1]
    generator = torch.Generator().manual_seed(0)
    pipeline([3, 7], guidance_scale=2.5, generator=generator, num_inference_steps=10, output_type="np")
    z = torch.randn(2, 4, 8, 8, generator=generator.manual_seed(0))
    denoiser = load(tmp_path / "dit")
    guided = Guided(denoiser, 2.5)
    with torch.no_grad():
        ours = solve(guided, z, grid_of(tmp_path / "dit", 10).times, DDIM(), label=torch.tensor([3, 7]))
        plain = solve(denoiser, z, grid_of(tmp_path / "dit", 10).times, DDIM(), label=torch.tensor([3, 7]))
    stock = states[-1].prev_sample[:2]
    assert (ours - stock).abs().max() < 1e-5 * stock.abs().max()
    assert (ours - plain).abs().max() > 1e-2 * stock.abs().max()


def test_ten_ddim_steps_are_the_stock_pipelines():
    net = tiny()
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False, prediction_type="v_prediction")
    denoiser = Denoiser(net, schedule_of(scheduler), prediction_of(scheduler))
    generator = torch.Generator().manual_seed(0)
    pipeline = diffusers.DDIMPipeline(net.unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(batch_size=4, generator=generator, num_inference_steps=10, output_type="np").images
    z = torch.randn(4, *net.shape, generator=generator.manual_seed(0))
    with torch.no_grad():
        ours = solve(denoiser, z, grid_of(scheduler, 10).times, DDIM())
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, torch.from_numpy(stock), rtol=0, atol=1e-4)


# -- loading -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A stock DDPM folder that somebody else made."""
    pipeline = diffusers.DDPMPipeline(tiny().unet, diffusers.DDPMScheduler(prediction_type="v_prediction"))
    pipeline.save_pretrained(tmp_path / "ddpm")
    return tmp_path / "ddpm"


def test_load_reads_network_schedule_and_prediction(folder):
    denoiser, net = load(folder), tiny()
    assert denoiser.prediction == "v" and denoiser.schedule == schedule_of("DDPMScheduler") == schedule_of(folder)
    assert not denoiser.training
    x, t = batch(net)
    assert torch.equal(denoiser.net(x, t), net(x, t))
    assert load(str(folder), guided=True).net.guided
    assert grid_of(folder, 4, timestep_spacing="trailing") == Grid.uniform(4)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_load_names_the_fault_of_a_folder(folder, tmp_path):
    def refused(words):
        with pytest.raises(BadInput, match=words):
            load(folder)

    with pytest.raises(BadInput, match="no model_index.json"):
        load(tmp_path)
    with pytest.raises(BadInput, match="no model_index.json"):
        load(tmp_path / "absent")
    index, weights = folder / "model_index.json", folder / "unet" / "diffusion_pytorch_model.safetensors"
    edit(index, unet=["diffusers", "UNet1DModel"])
    refused("UNet1DModel.*only .*UNet2DModel")
    edit(index, unet=["diffusers", "UNet2DModel"], scheduler=["diffusers", "EDMEulerScheduler"])
    refused("EDMEulerScheduler")
    edit(index, scheduler=["diffusers", "DDPMScheduler"])
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused("cannot be read")
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    refused("missing: save the pickled weights again as safetensors")
    from safetensors.torch import load as from_bytes
    from safetensors.torch import save_file

    state = from_bytes(whole)
    del state["conv_in.weight"]
    save_file(state, weights)
    refused("conv_in.weight")
    index.write_text("{")
    refused("model_index.json is not JSON")


def test_load_requires_null_class_for_class_conditional_networks(tmp_path):
    diffusers.DDIMPipeline(tiny(classes=2).unet, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "labelled")
    with pytest.raises(BadInput, match="null_class"):
        load(tmp_path / "labelled")
    assert load(tmp_path / "labelled", null_class=True).net.classes == 2
    assert load(tmp_path / "labelled", null_class=False).net.classes == 3


def test_load_takes_configs_and_safetensors_only_from_the_hub(folder, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot(name, **kw):
        asked.update(kw, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert load("somebody/ddpm", revision="abc").prediction == "v"
    assert asked["name"] == "somebody/ddpm" and asked["revision"] == "abc"
    assert asked["allow_patterns"] == ["*.json", "*/*.safetensors"]

    def offline(name, **kw):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(BadInput, match="somebody/ddpm.*offline"):
        load("somebody/ddpm")


def test_the_models_package_does_not_import_diffusers():
    code = "import sys, distill.models, distill.export.folder; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
