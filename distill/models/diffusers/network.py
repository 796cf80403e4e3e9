"""The base class of stock networks that are conditioned on tensors (text, pooled text, sizes)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from distill.denoise import Conditions
from distill.errors import BadInput, suggest
from distill.models.families.label import StockNetwork
from distill.noise import VE, Schedule, Table

SIGMA_MIN = 0.002  # the least noise on which EDM's networks were trained, https://arxiv.org/abs/2206.00364, table 1


def encode_text(encode: Callable[..., Any], prompts: list[str], pipeline: Any) -> dict[str, Tensor]:
    """The `encode_prompt` of families with the condition text alone."""
    return {"text": encode(prompt=prompts, do_classifier_free_guidance=False)[0]}


def encode_masked_text(encode: Callable[..., Any], prompts: list[str], pipeline: Any) -> dict[str, Tensor]:
    """The `encode_prompt` of families with the conditions text and text_mask."""
    out = encode(prompt=prompts, do_classifier_free_guidance=False)
    return {"text": out[0], "text_mask": out[1]}


class TensorConditioned(StockNetwork):
    r"""A stock network conditioned on tensors, called as `net(x, t, w=None, s=None, **cond)`.

    - `x`: latents (B, C, H, W), (B, C, F, H, W) or (B, C, L), scaled as in the family's training:
      x = (a - latent_shift) latent_scale with a the latents of the autoencoder. Sizes other than `shape` are accepted
      where the stock network accepts them.
    - `t`: float time (B,) in [0, 1]. The stock network gets the timestep n = t N - 1 under a Table, n = N sigma_t under a
      flow, with N = `timesteps`, and n = log(sigma_t) / 4 under EDM's VE; n need not be an integer.
    - `w`, `s`: as for `StockNetwork`, for students with these inputs.
    - `cond`: tensors of B rows by name: all of `conditions`, any of `optional_conditions`.

    A family defines `conditions`, `call_stock`, `embeddings` and `encode_prompt`, and where needed the attributes below.

    Attributes:
        prompt_config_parts: components that `encode_prompt` needs without weights, for their configs.
        frame_parts: components that `encode_frame` needs.
        frame_config_parts: components that `encode_frame` needs without weights, for their configs.
        null_is_zero: whether the null condition is zeros.
        even_sigmas: whether the stock pipeline passes evenly spaced sigmas of its own to the scheduler.
        call_guides: whether the stock pipeline evaluates the network twice unless its call has `guidance_scale=1.0`.
        lora_layout: layout of the second file of a LoRA export, that of the original code, which ComfyUI reads: "kohya",
            "wan", or "" for none.
        original_file: whether the file of a single-file export is in the layout of the original U-Nets, which ComfyUI reads.
        latent_scale, latent_shift: scaling of the latents; numbers, or one per channel.
    """

    part = "transformer"
    conditions: tuple[str, ...] = ("text",)
    prompt_config_parts: tuple[str, ...] = ()
    frame_parts: tuple[str, ...] = ()
    frame_config_parts: tuple[str, ...] = ()
    null_is_zero: bool = False
    even_sigmas: bool = False
    call_guides: bool = True
    lora_layout: str = ""
    original_file: bool = False
    latent_scale: float | tuple[float, ...] = 1.0
    latent_shift: float | tuple[float, ...] = 0.0
    pixels: int = 8

    @classmethod
    def wrap(
        cls,
        model: Any,
        schedule: Schedule,
        timesteps: int = 1000,
        guided: bool = False,
        flow_map: bool = False,
        math_attention: bool = False,
        size: tuple[int, ...] | None = None,
        checkpointing: bool = False,
    ) -> TensorConditioned:
        """Wraps an existing stock network.

        Args:
            model: an instance of the family's diffusers class.
            schedule: the noise schedule, which determines the timesteps.
            timesteps: N.
            guided, flow_map: add the inputs `w` and `s`.
            math_attention: use attention that supports forward-mode differentiation.
            size: of the latents, (H, W) or (F, H, W), instead of the default of the network.
            checkpointing: recompute activations in the backward pass to save memory.

        Raises:
            BadInput: for a variant of the network that the family does not support, and for `math_attention` with
                attention processors that it cannot replace.
        """
        net = cls.__new__(cls)
        nn.Module.__init__(net)
        cls.check_supported(model)
        net._attach(model, guided=guided, flow_map=flow_map, timesteps=timesteps, math_attention=math_attention)
        net.configure(model)
        net.schedule = schedule
        if checkpointing:
            model.enable_gradient_checkpointing()
        net.shape = (net.shape[0], *(size or net.shape[1:]))
        return net

    @staticmethod
    def check_supported(model: Any) -> None:
        """Raises BadInput for a variant of the network that the family does not support."""

    def configure(self, model: Any) -> None:
        """Sets attributes that depend on the stock network, such as `conditions`."""

    @staticmethod
    def token_count(size: tuple[int, ...]) -> int:
        """Number of tokens of latents of `size`, on which a dynamic time shift depends."""
        return math.prod(size)

    @staticmethod
    def pack(x: Tensor) -> Tensor:
        """x in the layout of the latents that the stock pipeline takes and returns."""
        return x

    @staticmethod
    def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of `pack`; `shape` is that of x, with the batch."""
        return packed

    def timestep(self, t: Tensor) -> Tensor:
        if isinstance(self.schedule, Table):
            return super().timestep(t)
        if isinstance(self.schedule, VE):  # the noise level of EDM's networks
            return self.schedule.sigma(t).clamp_min(SIGMA_MIN).log() / 4
        return self.timesteps * self.schedule.sigma(t)

    def forward(
        self, x: Tensor, t: Tensor, w: Tensor | float | None = None, s: Tensor | None = None, **cond: Tensor
    ) -> Tensor:
        known = self.conditions + self.optional_conditions
        for key in cond:
            if key not in known:
                raise BadInput(
                    f"{type(self).__name__} has no condition '{key}'.{suggest(key, known)} It has {', '.join(known)}."
                )
        for key in self.conditions:
            if key not in cond:
                raise BadInput(f"{type(self).__name__} needs the condition '{key}' (B, ...); `encode` computes it.")
        dtype = self.stock.dtype  # not the dtype of the first weight: some families keep a few weights in float32
        cond = {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.items()}
        return super().forward(x.to(dtype), t, cond, w, s)

    def call(self, x: Tensor, n: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.call_stock(x, n, **cond)

    def call_stock(self, x: Tensor, n: Tensor, **cond: Tensor) -> Tensor:
        """The output of the stock network, of the shape of x, at timesteps n (B,)."""
        raise NotImplementedError

    @property
    def needs_null(self) -> bool:
        return not self.null_is_zero and not any(name.startswith("null_") for name, _ in self.named_buffers())

    def set_null(self, null: dict[str, Tensor] | None) -> TensorConditioned:
        """Sets the null condition, such as `encode(folder, [""])`; None stands for zeros."""
        self.null_is_zero = null is None
        for key, value in (null or {}).items():
            if key in self.conditions and key not in self.null_keeps:
                self.register_buffer(f"null_{key}", value[:1].detach().clone())
        return self

    def null(self, cond: Conditions) -> Conditions:
        """`cond` with the null condition for all `conditions` except `null_keeps`; optional conditions are unchanged.

        Raises:
            BadInput: if no null condition was set, or its shape differs from that of `cond`.
        """
        replaced = [key for key in self.conditions if key not in self.null_keeps]
        return {key: self._null(key, value) if key in replaced else value for key, value in cond.items()}

    def _null(self, key: str, value: Tensor) -> Tensor:
        row = dict(self.named_buffers(recurse=False)).get(f"null_{key}")
        if self.null_is_zero:
            return torch.zeros_like(value)
        if row is None:
            raise BadInput(
                f"{type(self).__name__} has no null '{key}': load it with null='', or call "
                "net.set_null(encode(folder, ['']))."
            )
        if row.shape[1:] != value.shape[1:]:
            raise BadInput(
                f"'{key}' has the shape {tuple(value.shape[1:])} per sample, but its null condition has "
                f"{tuple(row.shape[1:])}: encode both with the same max_sequence_length."
            )
        return row.to(value).expand_as(value)

    @staticmethod
    def encode_prompt(encode: Callable[..., Any], prompts: list[str], pipeline: Any) -> dict[str, Tensor]:
        """The conditions of prompts, one row each; `encode` is `pipeline.encode_prompt` with the defaults of its call."""
        raise NotImplementedError

    @staticmethod
    def encode_frame(
        pipeline: Any, image: Any, pixels: Tensor, frames: int, generator: Generator | None
    ) -> dict[str, Tensor]:
        """The conditions of a first frame, a PIL image and its `pixels` (1, 3, H, W), for a video of `frames` frames."""
        raise NotImplementedError
