"""Stock networks that are told tensors (text, pooled text, sizes ...): what all families share."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from distill.errors import BadInput, suggest
from distill.nets.diffusers.backbones import MathAttention, Stock
from distill.nets.small import Scalar
from distill.noise import Schedule, Table


class Conditioned(Stock):
    r"""A stock network under the call `net(x, t, w=None, s=None, **cond)`.

    - `x`: latents (B, C, H, W) or (B, C, F, H, W), scaled as the family trains on them: with a the autoencoder's latents,
      x = (a - latent_shift) latent_scale. Other sizes than `shape` work where the stock network takes them.
    - `t`: (B,) float in [0, 1]. The stock network is told n = t N - 1 under a Table and n = N sigma_t under a flow, with
      N = `timesteps`; n need not be whole.
    - `w`, `s`: as for `Stock`, for students that are told them.
    - `cond`: tensors of B rows by name. `told` names those that the family must have, `extras` those that it may have
      or that are made from the size of x. `null` replaces the told ones by the null condition.

    A family says what `told` and `extras` are, how the stock network is called (`ask`), where its time embeddings are
    (`embeddings`) and how its pipeline's encoder is read (`prompt`).
    """

    part = "transformer"
    told: tuple[str, ...] = ("text",)
    bones: tuple[str, ...] = ()  # parts of the pipeline whose shape the encoders ask
    seen: tuple[str, ...] = ()  # parts that turn a first frame into conditions
    bones_seen: tuple[str, ...] = ()  # parts whose shape these ask
    null_zero = False  # whether the family's null condition is zeros
    latent_scale: float | tuple[float, ...] = 1.0
    latent_shift: float | tuple[float, ...] = 0.0
    pixels = 8  # a side of a latent in pixels

    @classmethod
    def wrap(cls, model: Any, schedule: Schedule, timesteps: int = 1000, guided: bool = False, flow_map: bool = False,
             math_attention: bool = False, size: tuple[int, ...] | None = None,
             checkpointing: bool = False) -> Conditioned:
        """Take an existing stock network as it is; `size` of `shape`, (H, W) or (F, H, W), if not the stock default.

        `checkpointing` computes the blocks' activations again in the backward pass instead of keeping them.

        Raises:
            BadInput: for a network that is told things which the family does not know, and for `math_attention` where
                the attention is not of the stock plain kind.
        """
        net = cls.__new__(cls)
        nn.Module.__init__(net)
        cls.check(model)
        net._adopt(model, guided, flow_map, timesteps, math_attention)
        net.schedule = schedule
        if checkpointing:
            model.enable_gradient_checkpointing()
        net.shape = (net.shape[0], *(size or net.shape[1:]))
        return net

    def _adopt(self, model, guided: bool, flow_map: bool, timesteps: int, math_attention: bool) -> None:
        setattr(self, self.part, model)
        self.set_sizes(model)
        self.timesteps, self.guided, self.flow_map = timesteps, guided, flow_map
        self.shape, self.classes, self.null_class = self.default_shape(model.config), 0, True
        inner = self.embeddings(model)
        if not inner and (guided or flow_map):
            raise BadInput(f"{type(model).__name__} has no TimestepEmbedding to add w or s to: leave guided, flow_map out.")
        dim = inner[0].linear_2.out_features if inner else 0
        self.guidance = Scalar(dim, period=16.0, zero=True) if guided else None
        self.gap = Scalar(dim, zero=True) if flow_map else None
        for module in model.modules() if math_attention else ():
            if hasattr(module, "processor"):  # each family may have an attention class of its own
                if not isinstance(module.processor, (AttnProcessor, AttnProcessor2_0)):
                    raise BadInput(f"{type(model).__name__} has {type(module.processor).__name__}, which math_attention "
                                   "cannot replace: leave it out.")
                module.set_processor(MathAttention())

    @staticmethod
    def check(model: Any) -> None:
        """Refuses a network that needs what the family does not give it."""

    def set_sizes(self, model: Any) -> None:
        """Attributes that depend on the network."""

    @staticmethod
    def default_shape(config) -> tuple[int, ...]:
        size = config.sample_size
        return config.in_channels, *((size, size) if isinstance(size, int) else size)

    @staticmethod
    def tokens(size: tuple[int, ...]) -> int:
        """Tokens of latents of `size`, on which a dynamic shift of time depends."""
        return math.prod(size)

    def timestep(self, t: Tensor) -> Tensor:
        if isinstance(self.schedule, Table):
            return super().timestep(t)
        return self.timesteps * self.schedule.sigma(t)

    def forward(self, x: Tensor, t: Tensor, w: Tensor | float | None = None, s: Tensor | None = None,
                **cond: Tensor) -> Tensor:
        known = self.told + self.extras
        for key in cond:
            if key not in known:
                raise BadInput(f"{type(self).__name__} is told {', '.join(known)}, not '{key}'.{suggest(key, known)}")
        for key in self.told:
            if key not in cond:
                raise BadInput(f"{type(self).__name__} needs the condition '{key}' (B, ...): `encode` makes it.")
        dtype = self.stock.dtype  # not that of the first weight: some families keep a few in float32
        cond = {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.items()}
        return super().forward(x.to(dtype), t, cond, w, s)

    def call(self, x: Tensor, n: Tensor, label: dict) -> Tensor:
        return self.ask(x, n, **label)

    def ask(self, x: Tensor, n: Tensor, **cond: Tensor) -> Tensor:
        """The stock network's answer, of the shape of x, at its timesteps n (B,)."""
        raise NotImplementedError

    @property
    def needs_null(self) -> bool:
        return not self.null_zero and not any(name.startswith("null_") for name, _ in self.named_buffers())

    def remember(self, null: dict[str, Tensor] | None) -> Conditioned:
        """Keep the null condition, `encode(folder, [""])`; None stands for zeros."""
        self.null_zero = null is None
        for key, value in (null or {}).items():
            if key in self.told and key not in self.kept:
                self.register_buffer(f"null_{key}", value[:1].detach().clone())
        return self

    def null(self, cond: dict) -> dict:
        """`cond` with every told tensor replaced by the null condition; what tells sizes stays.

        Raises:
            BadInput: if the null condition was not remembered, or is of another length than `cond`.
        """
        return {k: self._null(k, v) if k in self.told and k not in self.kept else v for k, v in cond.items()}

    def _null(self, key: str, value: Tensor) -> Tensor:
        row = dict(self.named_buffers(recurse=False)).get(f"null_{key}")
        if self.null_zero:
            return torch.zeros_like(value)
        if row is None:
            raise BadInput(f"{type(self).__name__} has no null '{key}': load it with null='', or call "
                           "net.remember(encode(folder, [''])).")
        if row.shape[1:] != value.shape[1:]:
            raise BadInput(f"'{key}' is {tuple(value.shape[1:])} a sample but its null {tuple(row.shape[1:])}: encode "
                           "both with the same max_sequence_length.")
        return row.to(value).expand_as(value)

    @staticmethod
    def prompt(encode, prompts: list[str], pipeline) -> dict[str, Tensor]:
        """The conditions of prompts; `encode(**kw)` is the `encode_prompt` of `pipeline` with its call's defaults."""
        raise NotImplementedError

    @staticmethod
    def frame(pipeline, image, pixels: Tensor, frames: int, generator) -> dict[str, Tensor]:
        """The conditions of one first frame, a PIL image and its `pixels` (1, 3, H, W), for `frames` frames of video."""
        raise NotImplementedError
