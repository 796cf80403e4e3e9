"""The declaration of a model family, and the functions that several families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Pipeline = Any  # a stock pipeline of diffusers
Weights = dict[str, Tensor]
Factors = dict[str, tuple[Tensor, Tensor]]  # LoRA factors (A, B) by the layer's name in the stock network


@dataclass(frozen=True)
class LatentLayout:
    """How the latents of the stock call are arranged.

    Args:
        pack: x (B, ...) to the latents that the stock pipeline takes and returns.
        unpack: the inverse, of the packed latents and the shape of x with the batch.
    """

    pack: Callable[[Tensor], Tensor] = lambda x: x
    unpack: Callable[[Tensor, tuple[int, ...]], Tensor] = lambda packed, shape: packed


def _pack_patches(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.flatten(3).flatten(1, 2)


def _unpack_patches(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    batch, channels, height, width = shape
    patches = packed.reshape(batch, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(shape)


PLAIN = LatentLayout()  # (B, C, ...) as ours
PATCHES = LatentLayout(_pack_patches, _unpack_patches)  # 2 x 2 patches as tokens (B, H/2 W/2, 4 C), the channel first
FRAMES_FIRST = LatentLayout(
    lambda x: x.transpose(1, 2), lambda packed, shape: packed.transpose(1, 2)
)  # (B, F, C, H, W)
TOKENS = LatentLayout(  # one token a latent position, (B, F H W, C)
    lambda x: x.flatten(2).transpose(1, 2), lambda packed, shape: packed.transpose(1, 2).reshape(shape)
)


@dataclass(frozen=True)
class Twin:
    """A tiny random pipeline of a family, and how the tests call it.

    Args:
        build: makes the pipeline, of stock classes with small random networks (`distill.models.diffusers.tiny_parts`).
        shape: of a latent that the tests sample.
        call: arguments of the stock call besides prompt, size, steps and guidance.
        load: options of `distill.models.diffusers.load`.
        parity: whether the stock loop is deterministic and needs prompts alone, so that the common parity test applies.
    """

    build: Callable[[], Pipeline]
    shape: tuple[int, ...] = (4, 8, 8)
    call: Mapping[str, Any] = field(default_factory=dict)
    load: Mapping[str, Any] = field(default_factory=dict)
    parity: bool = True


@dataclass(frozen=True)
class Published:
    """A published model by the numbers of its configs, for plans and tests without weights.

    Args:
        pipeline, index: class of the pipeline, and further keys of its model_index.json.
        network: config of the network.
        scheduler, scheduler_config: class and config of the scheduler.
        vae: config of the autoencoder.
        shape: of a sample, at the model's default size.
        conditions: shape of each condition of a sample.
        parameters: of the network, in billions.
    """

    pipeline: str
    network: Mapping[str, Any]
    scheduler: str
    scheduler_config: Mapping[str, Any]
    vae: Mapping[str, Any]
    shape: tuple[int, ...]
    conditions: Mapping[str, tuple[int, ...]]
    parameters: float
    index: Mapping[str, Any] = field(default_factory=dict)


def square(config: Any) -> tuple[int, ...]:
    """Shape of a sample by `in_channels` and `sample_size` of the stock config."""
    size = config.sample_size
    return config.in_channels, *((size, size) if isinstance(size, int) else size)


def encode_text(encode: Callable[..., Any], prompts: list[str], pipeline: Pipeline) -> dict[str, Tensor]:
    """The `encode_prompt` of families with the condition text alone."""
    return {"text": encode(prompt=prompts, do_classifier_free_guidance=False)[0]}


def encode_masked_text(encode: Callable[..., Any], prompts: list[str], pipeline: Pipeline) -> dict[str, Tensor]:
    """The `encode_prompt` of families with the conditions text and text_mask."""
    out = encode(prompt=prompts, do_classifier_free_guidance=False)
    return {"text": out[0], "text_mask": out[1]}


@dataclass(frozen=True, kw_only=True)
class Family:
    r"""The facts of a stock network and its pipelines. Everything else reads them here.

    In the functions `net` is the adapter (`TensorConditioned`): `net.stock` is the stock network, `net.pixels` the side
    of a latent in pixels, `net.timesteps` the number N of timesteps.

    Args:
        network: name of the stock class, by which a folder's family is found.
        adapter: the class in place of `TensorConditioned`; a network conditioned on labels has one of its own.
        part: component of the pipeline that holds the network.
        call: `call(net, x, time, **cond)`, the output of the stock network, of the shape of x. `time` is what
            `model_time` states.
        embeddings: paths of the modules to whose output the embeddings of w and s are added; `*` stands for one level.
        check_supported: raises BadInput for a variant of the stock network that is not supported.
        variant: the declarations that a given stock network changes, such as its conditions.
        clock: the pipeline's timestep n of the time t: "scheduler", that of the schedule; or "t".
        model_time: what the stock network gets: "n", "n / N", or "1 - n / N".
        time_dtype: whether n is rounded to the dtype of x first, as some stock pipelines do; else it is float32.
        sign: of the prediction in the network's answer.
        default_shape: shape of a sample from the stock config.
        pixels: side of a latent in pixels, where the autoencoder's config does not state it.
        patch: sides of latents must be multiples of it, where the config does not state it; tokens have this side.
        frames: video frames per latent frame after the first, where the autoencoder does not state it; 0 for images.
        layout: of the latents that the stock call takes and returns.
        conditions, optional_conditions: names of the condition tensors.
        null_keeps: conditions that the null condition does not replace.
        null_is_zero: whether the null condition is zeros.
        encode_prompt: `encode_prompt(encode, prompts, pipeline)`, the conditions of prompts, one row each. `encode` is
            the pipeline's own `encode_prompt` with the defaults of its call, which are its `options`.
        prompt_config_parts: components that `encode_prompt` needs without weights, for their configs.
        frame_conditions: conditions that encode the first frame of image-to-video networks.
        encode_frame: `encode_frame(pipeline, image, pixels, frames, generator)`, the conditions of a first frame, a PIL
            image and its pixels (1, 3, H, W), for a video of so many frames.
        frame_parts, frame_config_parts: components that `encode_frame` needs, and those it needs without weights.
        even_sigmas: whether the pipeline passes evenly spaced sigmas of its own to the scheduler.
        guidance_argument: argument of the stock call that is our w.
        guidance_offset: w less that argument: 1 where the stock call guides by c + g (c - n) with c the conditional and
            n the null prediction.
        no_guidance: arguments of the stock call that turn guidance off; empty where a bare call has none.
        mute: changes the stock network so that the stock pipeline does not guide; then no argument is needed.
        scheduler_settings: settings of exported schedulers that stock pipelines read.
        ode_scheduler: class of the folder's scheduler to keep for deterministic students, if it serves them.
        bare_calls: (pipeline class, scheduler class, steps) -> the pipeline class whose defaults are these.
        lora_keys: keys of the original code for LoRA factors by our layers' names, which ComfyUI reads.
        original_keys: `original_keys(weights, config)`, the weights under the names of the original code.
        label_pipeline: name of the stock pipeline of a network that is conditioned on labels.
        build_pipeline: `build_pipeline(network, scheduler, vae, classes)` makes it.
        needs_classes: whether it cannot sample without labels.
        twins: tiny pipelines by name, for "tiny:NAME" and the tests.
        published: published models by their hub ids.
    """

    network: str
    adapter: Any = None
    part: str = "transformer"
    call: Callable[..., Tensor] | None = None
    embeddings: tuple[str, ...] = ()
    check_supported: Callable[[Any], None] = lambda model: None
    variant: Callable[[Any], dict[str, Any]] = lambda model: {}
    clock: Literal["scheduler", "t"] = "scheduler"
    model_time: Literal["n", "n / N", "1 - n / N"] = "n"
    time_dtype: Literal["float32", "x"] = "float32"
    sign: int = 1
    default_shape: Callable[[Any], tuple[int, ...]] = square
    pixels: int = 8
    patch: int = 1
    frames: int = 0
    layout: LatentLayout = PLAIN
    conditions: tuple[str, ...] = ("text",)
    optional_conditions: tuple[str, ...] = ()
    null_keeps: tuple[str, ...] = ()
    null_is_zero: bool = False
    encode_prompt: Callable[..., dict[str, Tensor]] = encode_text
    prompt_config_parts: tuple[str, ...] = ()
    frame_conditions: tuple[str, ...] = ()
    encode_frame: Callable[..., dict[str, Tensor]] | None = None
    frame_parts: tuple[str, ...] = ()
    frame_config_parts: tuple[str, ...] = ()
    even_sigmas: bool = False
    guidance_argument: str = "guidance_scale"
    guidance_offset: float = 0.0
    no_guidance: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    mute: Callable[[Any], None] | None = None
    scheduler_settings: Mapping[str, Any] = field(default_factory=dict)
    ode_scheduler: str = ""
    bare_calls: Mapping[tuple[str, str, int], str] = field(default_factory=dict)
    lora_keys: Callable[[Factors], Weights] | None = None
    original_keys: Callable[[Weights, Any], Weights] | None = None
    label_pipeline: str = ""
    build_pipeline: Callable[..., Pipeline] | None = None
    needs_classes: bool = False
    twins: Mapping[str, Twin] = field(default_factory=dict)
    published: Mapping[str, Published] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """The module that declares it, for messages."""
        return (self.call or self.adapter).__module__

    @property
    def takes_labels(self) -> bool:
        """Whether its networks are conditioned on class labels, or on nothing, instead of tensors such as text."""
        return bool(self.label_pipeline)

    def token_count(self, size: tuple[int, ...]) -> int:
        """Number of tokens of latents of `size`, (H, W), (F, H, W) or (L,), on which a dynamic time shift depends."""
        count = 1
        for i, side in enumerate(size):
            count *= side // self.patch if i >= len(size) - 2 else side
        return count
