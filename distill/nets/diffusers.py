r"""The one door to diffusers: stock schedulers become Schedules and Grids, stock backbones become Denoisers.

Integer timesteps and alpha-bar exist only here and in `distill.export`. A stock scheduler with N discrete steps numbers
them n = 0 .. N-1, least noise first; our time is t = (n + 1) / N, so that n = t N - 1 and t = 0 is clean data.
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path

import diffusers
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from distill.denoise import Denoiser
from distill.errors import BadInput, suggest
from distill.grid import Grid
from distill.nets.small import Scalar, extra_inputs, null_index
from distill.noise import VE, RectifiedFlow, Schedule, Table

PREDICTIONS = {"epsilon": "eps", "sample": "x", "v_prediction": "v", "flow_prediction": "flow"}  # stock -> ours
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
KARRAS = (*EDM, "CMStochasticIterativeScheduler", "KarrasVeScheduler")
# These step from n to n - N // K, whatever timestep comes next, and end at `final_alpha_cumprod`.
STRIDED = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", "PNDMScheduler")


# -- schedulers --------------------------------------------------------------------------------------------------


def scheduler_of(scheduler, **config):
    """A fresh stock scheduler from an instance, a class name, or a diffusers folder, with `config` overriding its own.

    Raises:
        BadInput: if diffusers has no such class, the class no such setting, the folder no scheduler, or if the class
            needs more than these settings.
    """
    if not isinstance(scheduler, (str, Path)):
        kind, stock = type(scheduler), scheduler.config
    elif (Path(scheduler) / "model_index.json").is_file():
        kind = _stock_class(_json(Path(scheduler) / "model_index.json").get("scheduler", [None, None])[1], "Scheduler")
        stock = _json(Path(scheduler) / "scheduler" / "scheduler_config.json")
    else:
        kind, stock = _stock_class(str(scheduler), "Scheduler"), {}
    known = inspect.signature(kind.__init__).parameters
    for key in config:
        if key not in known:
            raise BadInput(f"{kind.__name__} has no setting '{key}'.{suggest(key, known)}")
    try:
        return kind.from_config(stock, **config)
    except (TypeError, ImportError) as error:  # arguments without default, optional packages
        raise BadInput(f"{kind.__name__} cannot be made: {str(error).strip()}") from error


def schedule_of(scheduler, **config) -> Schedule:
    r"""The Schedule of a stock scheduler: an instance, a class name or a diffusers folder; `config` overrides its own.

    - `alphas_cumprod` (DDPM, DDIM, PNDM, Euler, DPM-Solver, LCM, ...; zero terminal SNR included) -> Table
    - flow matching, and `use_flow_sigmas` -> RectifiedFlow(shift)
    - EDM and Karras schedulers -> VE(sigma_max, rho)

    Raises:
        BadInput: for any other class, and for a shift that depends on the image (`use_dynamic_shifting`).
    """
    scheduler = scheduler_of(scheduler, **config)
    name, stock = type(scheduler).__name__, scheduler.config
    if stock.get("use_dynamic_shifting"):
        raise BadInput(f"{name} shifts time with the image size: pass use_dynamic_shifting=False and a shift.")
    if stock.get("use_flow_sigmas") and "flow_shift" in stock:
        return RectifiedFlow(float(stock.flow_shift))
    if name in FLOW:
        return RectifiedFlow(float(stock.shift))
    if name in KARRAS:
        return VE(float(stock.sigma_max), float(stock.get("rho", 7.0)))
    if not hasattr(scheduler, "alphas_cumprod"):
        raise BadInput(
            f"{name} has no noise schedule that we know: it is none of {', '.join(FLOW + KARRAS)}, "
            "and has no alphas_cumprod."
        )
    return Table(tuple(scheduler.alphas_cumprod.tolist()))


def prediction_of(scheduler) -> str:
    """What the scheduler takes the network's output for, in our names: eps, x, v, flow or edm.

    Raises:
        BadInput: if we have no name for it.
    """
    scheduler = scheduler_of(scheduler)
    name, kind = type(scheduler).__name__, scheduler.config.get("prediction_type")
    if name in FLOW:
        return "flow"
    if name in KARRAS:
        if name in EDM and kind == "epsilon":
            return "edm"
        raise BadInput(f"{name} with prediction_type={kind!r} has no counterpart: only EDM with 'epsilon' has.")
    if kind not in PREDICTIONS:
        raise BadInput(f"{name} has prediction_type={kind!r}, none of {', '.join(PREDICTIONS)}.")
    return PREDICTIONS[kind]


def grid_of(scheduler, steps: int, **config) -> Grid:
    r"""The Grid that a stock scheduler serves in `steps` steps: what the student must be trained on.

    Discrete schedulers: t = (n + 1) / N for each of its timesteps n. Flow and Karras schedulers: the time at which the
    schedule has each of its sigmas. `scheduler` and `config` as in `schedule_of`.

    Raises:
        BadInput: if these times do not start at noise or do not end at data, if the scheduler lands elsewhere than it
            asks the network next, or asks it more than once a step at different times.
    """
    scheduler = scheduler_of(scheduler, **config)
    name, schedule = type(scheduler).__name__, schedule_of(scheduler)
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise BadInput(f"{name} cannot serve {steps} steps: {error}") from error
    times = _times_of_table(scheduler, steps) if isinstance(schedule, Table) else _times_of_sigmas(scheduler, schedule)
    times = list(dict.fromkeys(times))  # schedulers of second order ask twice at one time
    if len(times) != steps + 1:
        raise BadInput(f"{name} asks the network at {len(times) - 1} times in {steps} steps: take one of first order.")
    return Grid(tuple(times))


def _times_of_sigmas(scheduler, schedule: Schedule) -> list[float]:
    sigma = getattr(scheduler, "sigmas", torch.full((1,), torch.nan)).double()
    if sigma[-1] != 0:
        raise BadInput(f"{type(scheduler).__name__} stops at sigma={sigma[-1]:g} instead of at data (sigma=0).")
    alpha = 1 - sigma if isinstance(schedule, RectifiedFlow) else torch.ones_like(sigma)
    return [round(t, 7) for t in schedule.time(2 * (alpha.log() - sigma.log())).tolist()]  # 7: float32 sigmas


def _times_of_table(scheduler, steps: int) -> list[float]:
    name, stock, total = type(scheduler).__name__, scheduler.config, len(scheduler.alphas_cumprod)
    nodes = scheduler.timesteps.tolist()
    if nodes[0] != total - 1:
        lcm = "original_inference_steps" in stock
        mend = f"original_inference_steps={steps}" if lcm else "timestep_spacing='trailing'"
        raise BadInput(
            f"{name} starts {steps} steps at timestep {nodes[0]:g}, not at noise ({total - 1}): set {mend} "
            f"and take a number of steps that divides {total}."
        )
    if name in STRIDED:
        stride = total // steps
        strays = [(a, b) for a, b in zip(nodes, nodes[1:]) if a - stride != b]
        if strays:
            raise BadInput(
                f"{name} steps from timestep {strays[0][0]} to {strays[0][0] - stride} but asks the network at "
                f"{strays[0][1]} next: take a number of steps that divides {total} (not {steps}) with trailing spacing."
            )
        if float(scheduler.final_alpha_cumprod) != 1:
            raise BadInput(f"{name} stops at timestep 0 instead of at data: set set_alpha_to_one=True.")
    if stock.get("final_sigmas_type", "zero") != "zero":
        raise BadInput(f"{name} stops at its smallest sigma instead of at data: set final_sigmas_type='zero'.")
    return [*((n + 1) / total for n in nodes), 0.0]


# -- backbones ---------------------------------------------------------------------------------------------------


class MathAttention(AttnProcessor):
    """softmax(Q K^T) V written out: the fused kernels have no forward-mode derivative (torch.func.jvp)."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        out = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return out.clone(memory_format=torch.contiguous_format)  # the next group norm views the tangent


class UNet2D(nn.Module):
    r"""Stock `UNet2DModel` under our call convention, `net(x, t, label=None, w=None, s=None)` (see `nets.small`).

    The network is asked at n = t N - 1, N = `timesteps`; n need not be whole. Class `classes`, the last row of the
    class embedding, is "no class" (label -1). The embeddings of w and of t - s start at zero and are added to the
    output of `time_embedding`, so that a fixed w folds into its bias exactly (`fold`).

    Args:
        size, channels: images are (channels, size, size).
        widths, attention: channels of each resolution, coarser by 2 each, and whether it has self-attention.
        layers: residual blocks a resolution.
        classes: number of classes, 0 for unconditional.
        groups: groups of the group norms and channels of an attention head; divides every width.
        guided, flow_map: whether the net is told w and s.
        timesteps: N of the Table that it is used with.
        math_attention: attention that `torch.func.jvp` can differentiate.

    Raises:
        BadInput: if widths and attention differ in length, or groups does not divide a width.
    """

    def __init__(self, size: int = 16, channels: int = 1, widths: tuple[int, ...] = (32, 48),
                 attention: tuple[bool, ...] = (False, True), layers: int = 1, classes: int = 0, groups: int = 8,
                 guided: bool = False, flow_map: bool = False, timesteps: int = 1000, math_attention: bool = False):
        super().__init__()
        if len(widths) != len(attention) or any(width % groups for width in widths):
            raise BadInput(
                f"UNet2D: widths={list(widths)} and attention={list(attention)} must be equally long, "
                f"and groups={groups} must divide every width."
            )
        unet = diffusers.UNet2DModel(
            sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=tuple(widths),
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
            layers_per_block=layers, norm_num_groups=groups, attention_head_dim=groups,
            add_attention=any(attention), num_class_embeds=classes + 1 if classes else None,
        )
        self._adopt(unet, guided, flow_map, timesteps, True, math_attention)

    @classmethod
    def wrap(cls, unet: diffusers.UNet2DModel, guided: bool = False, flow_map: bool = False, timesteps: int = 1000,
             null_class: bool = True, math_attention: bool = False) -> UNet2D:
        """Take an existing `UNet2DModel` as it is. `null_class`: its last class embedding stands for "no class".

        Raises:
            BadInput: for a network that is conditioned on other things than timestep and class number.
        """
        stock = unet.config
        if stock.time_embedding_type != "positional" or stock.class_embed_type is not None:
            raise BadInput(
                f"UNet2DModel with time_embedding_type={stock.time_embedding_type!r} and class_embed_type="
                f"{stock.class_embed_type!r}: only positional timesteps and numbered classes are read."
            )
        net = cls.__new__(cls)
        nn.Module.__init__(net)
        net._adopt(unet, guided, flow_map, timesteps, null_class, math_attention)
        return net

    def _adopt(self, unet, guided: bool, flow_map: bool, timesteps: int, null_class: bool, math_attention: bool):
        rows, size = unet.config.num_class_embeds or 0, unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.unet, self.timesteps, self.guided, self.flow_map = unet, timesteps, guided, flow_map
        self.shape = (unet.config.in_channels, height, width)
        self.null_class = null_class and rows > 0
        self.classes = rows - self.null_class
        dim = unet.time_embedding.linear_2.out_features
        self.guidance = Scalar(dim, period=16.0, zero=True) if guided else None
        self.gap = Scalar(dim, zero=True) if flow_map else None
        for module in unet.modules() if math_attention else ():
            if isinstance(module, Attention):
                module.set_processor(MathAttention())

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None,
                w: Tensor | float | None = None, s: Tensor | None = None) -> Tensor:
        n, rows = t * self.timesteps - 1, self._rows(label, t)
        extra = extra_inputs(self.guidance, self.gap, t, w, s)
        if extra is None:
            return self.unet(x, n, rows).sample
        # A hook that lives for one call: the module keeps no reference to itself, so deepcopy and pickle see none.
        hook = self.unet.time_embedding.register_forward_hook(lambda module, args, out: out + extra)
        try:
            return self.unet(x, n, rows).sample
        finally:
            hook.remove()

    def _rows(self, label: Tensor | None, t: Tensor) -> Tensor | None:
        """Row of the class embedding for each label, (B,), or None for an unconditional network."""
        if not self.classes:
            return None
        if not self.null_class and (label is None or bool((label < 0).any())):
            raise BadInput("label -1 (no class) reached a UNet2DModel without such a class: label every sample.")
        return null_index(label, self.classes, t)

    @torch.no_grad()
    def fold(self, w: float | None = None, gap: float | None = None) -> diffusers.UNet2DModel:
        r"""A plain copy of the `UNet2DModel` that is always told the same w and the same t - s = gap.

        b <- b + e_w(w) + e_gap(gap) for the bias b of `time_embedding.linear_2`, to whose output both are added: exact.

        Raises:
            BadInput: if w or gap is missing for a net that has this input, or given for one that has not.
        """
        for name, value, has in (("w", w, self.guided), ("gap", gap, self.flow_map)):
            if (value is not None) != has:
                raise BadInput(f"The network {'needs a fixed' if has else 'has no input'} {name}: "
                               f"{'give it to be folded in' if has else 'leave it out'}.")
        unet, like = copy.deepcopy(self.unet), self.unet.time_embedding.linear_2.bias
        t = torch.tensor([gap or 0.0], device=like.device)
        extra = extra_inputs(self.guidance, self.gap, t, w, torch.zeros_like(t))
        if extra is not None:
            unet.time_embedding.linear_2.bias += extra[0]
        return unet


# Stock class of the denoising network -> how to wrap it, `wrap(model, timesteps=N, **kw)`.
BACKBONES = {"UNet2DModel": UNet2D.wrap}


def load(path: str | Path, revision: str | None = None, **kw) -> Denoiser:
    """A Denoiser from a diffusers folder, or from a model of the hub ("owner/name"); in eval mode, float32.

    The network is read from safetensors; schedule and prediction are the scheduler's. `kw` goes to the wrapper
    (`UNet2D.wrap`: guided, flow_map, null_class, math_attention).

    Raises:
        BadInput: for a path that is no diffusers folder, missing or broken weights, a class without a wrapper, or a
            class-conditional network of which nobody says whether its last class is "no class".
    """
    folder = _folder(path, revision)
    index = _json(folder / "model_index.json")
    part = next((p for p in ("unet", "transformer") if p in index), None)
    name = index[part][1] if part else None
    if name not in BACKBONES:
        raise BadInput(f"{folder}: its network is {name}, and only {', '.join(BACKBONES)} can be loaded.")
    schedule = schedule_of(folder)
    if not isinstance(schedule, Table):
        raise BadInput(f"{folder}: {name} counts discrete timesteps, but {index['scheduler'][1]} has none.")
    model = _weights(_stock_class(name), folder / part)
    if model.config.num_class_embeds and "null_class" not in kw:
        record = _json(folder / "distill.json") if (folder / "distill.json").is_file() else {}
        if "null_class" not in record:
            raise BadInput(f"{folder}: is the last class of its network 'no class'? Pass null_class=True or False.")
        kw["null_class"] = record["null_class"]
    net = BACKBONES[name](model, timesteps=len(schedule.alphas_cumprod), **kw)
    return Denoiser(net, schedule, prediction_of(folder)).eval()


def _weights(kind: type, folder: Path):
    """A stock model from a folder with config.json and safetensors, every weight of it."""
    if not list(folder.glob("*.safetensors")):
        mend = "save the pickled weights again as safetensors" if list(folder.glob("*.bin")) else "copy them there"
        raise BadInput(f"{folder}: the network's weights (*.safetensors) are missing: {mend}.")
    try:
        model, report = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # diffusers, safetensors and torch each raise their own
        raise BadInput(f"{folder}: the weights cannot be read, copy the folder again ({error}).") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise BadInput(f"{folder}: weights missing or misshapen, such as "
                       f"{(report['missing_keys'] or report['mismatched_keys'])[0]}: copy the folder again.")
    return model


def _folder(path: str | Path, revision: str | None) -> Path:
    """A local diffusers folder, or the local snapshot of a model of the hub: configs and safetensors, no code."""
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return folder
    here = folder.is_absolute() or folder.parent.is_dir()  # "checkpoints/x" beside a folder checkpoints is no hub id
    if folder.exists() or here or len(folder.parts) != 2 or folder.parts[0].startswith("."):
        raise BadInput(f"{folder} is no diffusers folder: it has no model_index.json.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # offline, absent, gated: each its own class
        raise BadInput(f"'{path}' is neither a folder here nor a model that the hub gives us ({error}).") from error


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} cannot be read as JSON: {error}") from error


def _stock_class(name: str | None, ending: str = ""):
    """The class of diffusers with this name."""
    names = [n for n in dir(diffusers) if n.endswith(ending or "Model")]
    if not name or not name.endswith(ending) or not hasattr(diffusers, name):
        raise BadInput(f"diffusers has no {ending.lower() or 'class'} '{name}'.{suggest(str(name), names)}")
    return getattr(diffusers, name)
