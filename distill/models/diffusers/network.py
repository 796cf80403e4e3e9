"""Adapters of stock networks: the base class, and the one of networks conditioned on tensors (text, pooled text, sizes)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoise import Conditions, Network
from distill.errors import BadInput, suggest
from distill.models.copies import copy_network, share_weights
from distill.models.diffusers.attention import use_math_attention
from distill.models.families.family import Family
from distill.models.small import ScalarEmbedding, extra_inputs, null_index
from distill.noise import VE, Schedule, Table

GAP_PERIOD = 8.0  # of the embedding of t - s: flow maps are differentiated in t, so it must vary slowly
HALF = (torch.bfloat16, torch.float16)
SIGMA_MIN = 0.002  # the least noise on which EDM's networks were trained, https://arxiv.org/abs/2206.00364, table 1


class StockNetwork(Network):
    r"""A diffusers network with integer timesteps and class labels.

    The stock network gets the timestep n = t N - 1 with N = `timesteps`; n need not be an integer. The embeddings of w
    and of t - s are zero at initialisation and are added to the output of every time embedding, so that a fixed w can
    be folded exactly into their biases (`fold`).

    Attributes:
        family: its declaration, with what a given stock network changes.
        pixels: side of a latent in pixels; 1 for pixel models.
    """

    family: Family
    pixels: int = 1

    def embeddings(self, model: Any) -> list[nn.Module]:
        """The time embeddings of the stock network, to whose output those of w and t - s are added."""
        found = []
        for path in self.family.embeddings:
            if "*" in path:
                found += [module for name, module in model.named_modules() if fnmatchcase(name, path)]
            else:
                found.append(model.get_submodule(path))
        return found

    def _attach(
        self,
        family: Family,
        model: Any,
        *,
        guided: bool,
        flow_map: bool,
        timesteps: int,
        math_attention: bool,
        classes: int = 0,
        null_class: bool = True,
    ) -> None:
        """Registers the stock network as the module `part`, and adds the embeddings of w and t - s."""
        self.family, self.part, self.pixels = family, family.part, family.pixels
        self.add_module(family.part, model)
        self.timesteps, self.guided, self.flow_map = timesteps, guided, flow_map
        self.shape, self.classes, self.null_class = family.default_shape(model.config), classes, null_class
        embeddings = self.embeddings(model)
        if not embeddings and (guided or flow_map):
            raise BadInput(
                f"{type(model).__name__} has no TimestepEmbedding to add w or s to: leave guided and flow_map out."
            )
        dim = _last_linear(embeddings[0]).out_features if embeddings else 0
        self.guidance = ScalarEmbedding(dim, period=16.0, zero=True) if guided else None
        self.gap = ScalarEmbedding(dim, period=GAP_PERIOD, zero=True) if flow_map else None
        if math_attention:
            use_math_attention(model)

    def cast(self, dtype: torch.dtype) -> StockNetwork:
        """Its weights in `dtype`, except those that the stock class keeps in float32 when it loads in half precision."""
        kept = tuple(self.stock._keep_in_fp32_modules or ()) if dtype in HALF else ()
        for tensors in (self.named_parameters(), self.named_buffers()):
            for name, tensor in tensors:
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(torch.float32 if {*name.split(".")} & {*kept} else dtype)
        return self

    @property
    def stock(self) -> Any:
        """The diffusers network."""
        return self.get_submodule(self.part)

    def call(self, x: Tensor, n: Tensor, label: Tensor | None) -> Tensor:
        """The output of the stock network at timesteps n (B,), of the shape of x: a predicted variance is dropped."""
        return self.stock(x, n, self.class_rows(label, n)).sample[:, : x.shape[1]]

    def timestep(self, t: Tensor) -> Tensor:
        """The timestep n (B,) of the stock network for t (B,) in [0, 1]."""
        return t * self.timesteps - 1

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        w: Tensor | float | None = None,
        s: Tensor | None = None,
    ) -> Tensor:
        n = self.timestep(t)
        extra = extra_inputs(self.guidance, self.gap, t, w, s)
        if extra is None:
            return self.call(x, n, label)
        with ExitStack() as hooks:  # permanent hooks would refer to this module, and a copy's hooks to the original
            for module in self.embeddings(self.stock):
                hooks.callback(module.register_forward_hook(lambda module, args, out: out + extra.to(out.dtype)).remove)
            return self.call(x, n, label)

    def class_rows(self, label: Tensor | None, t: Tensor) -> Tensor | None:
        """Row of the class embedding for each label (B,); None for an unconditional network."""
        if not self.classes:
            return None
        if not self.null_class and (label is None or not label.is_meta and bool((label < 0).any())):
            raise BadInput(
                f"label -1 (no class) was passed to a {type(self.stock).__name__} without such a class: label every sample."
            )
        return null_index(label, self.classes, t)

    @torch.no_grad()
    def fold(self, w: float | None = None, gap: float | None = None) -> Any:
        r"""The stock network with a constant w and a constant t - s = gap folded into its weights.

        b <- b + e_w(w) + e_gap(gap) for the bias b of the last layer of each time embedding, to whose output both are added:
        exact. The other weights share memory with this network.

        Raises:
            BadInput: if w or gap is missing for a network with this input, or given for one without it.
        """
        for name, value, is_input in (("w", w, self.guided), ("gap", gap, self.flow_map)):
            if is_input and value is None:
                raise BadInput(f"The network needs a fixed {name}: pass the value to fold in.")
            if value is not None and not is_input:
                raise BadInput(f"The network has no input {name}: leave it out.")
        with share_weights():
            model = copy_network(self.stock)
        t = torch.tensor([gap or 0.0], device=next(self.parameters()).device)
        extra = extra_inputs(self.guidance, self.gap, t, w, torch.zeros_like(t))
        for module in self.embeddings(model) if extra is not None else ():
            last = _last_linear(module)
            last.bias = nn.Parameter(last.bias + extra[0])
        return model


def _last_linear(embedding: nn.Module) -> nn.Linear:
    """The layer of a time embedding that makes its output."""
    return [module for module in embedding.modules() if isinstance(module, nn.Linear)][-1]


class TensorConditioned(StockNetwork):
    r"""A stock network conditioned on tensors, called as `net(x, t, w=None, s=None, **cond)`.

    - `x`: latents (B, C, H, W), (B, C, F, H, W) or (B, C, L), scaled as in the family's training:
      x = (a - latent_shift) latent_scale with a the latents of the autoencoder. Sizes other than `shape` are accepted
      where the stock network accepts them.
    - `t`: float time (B,) in [0, 1]. The stock network gets the timestep n = t N - 1 under a Table, n = N sigma_t under a
      flow, with N = `timesteps`, and n = log(sigma_t) / 4 under EDM's VE; n need not be an integer.
    - `w`, `s`: as for `StockNetwork`, for students with these inputs.
    - `cond`: tensors of B rows by name: all of `conditions`, any of `optional_conditions`.

    What differs between families is in their `Family`.

    Attributes:
        null_is_zero: whether the null condition is zeros.
        latent_scale, latent_shift: scaling of the latents; numbers, or one per channel.
    """

    null_is_zero: bool = False
    latent_scale: float | tuple[float, ...] = 1.0
    latent_shift: float | tuple[float, ...] = 0.0

    @classmethod
    def wrap(
        cls,
        family: Family,
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
            family: the declaration.
            model: an instance of its stock class.
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
        family.check_supported(model)
        family = replace(family, **family.variant(model))
        net._attach(family, model, guided=guided, flow_map=flow_map, timesteps=timesteps, math_attention=math_attention)
        net.conditions, net.optional_conditions = family.conditions, family.optional_conditions
        net.null_keeps, net.null_is_zero = family.null_keeps, family.null_is_zero
        net.schedule = schedule
        if checkpointing:
            model.enable_gradient_checkpointing()
        net.shape = (net.shape[0], *(size or net.shape[1:]))
        return net

    def _get_name(self) -> str:
        return self.family.network  # in messages: this class stands for many

    def timestep(self, t: Tensor) -> Tensor:
        """The pipeline's timestep n (B,) for t (B,) in [0, 1]."""
        if self.family.clock == "t":
            return t
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
                    f"{self.family.network} has no condition '{key}'.{suggest(key, known)} It has {', '.join(known)}."
                )
        for key in self.conditions:
            if key not in cond:
                raise BadInput(f"{self.family.network} needs the condition '{key}' (B, ...); `encode` computes it.")
        dtype = self.stock.dtype  # not the dtype of the first weight: some families keep a few weights in float32
        cond = {k: v.to(dtype) if v.is_floating_point() else v for k, v in cond.items()}
        return super().forward(x.to(dtype), t, cond, w, s)

    def call(self, x: Tensor, n: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The prediction (B, ...), from the output of the stock network at timesteps n (B,)."""
        family = self.family
        out = family.call(self, x, self.model_time(n, x.dtype), **cond)
        return out if family.sign == 1 else family.sign * out

    def model_time(self, n: Tensor, dtype: torch.dtype) -> Tensor:
        """What the stock network gets for the timesteps n (B,), by the arithmetic of its stock pipeline."""
        kind, total = self.family.model_time, self.timesteps
        n = n.to(dtype) if self.family.time_dtype == "x" else n
        return {"n": lambda: n, "n / N": lambda: n / total, "1 - n / N": lambda: (total - n) / total}[kind]()

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
                f"{self.family.network} has no null '{key}': load it with null='', or call "
                "net.set_null(encode(folder, ['']))."
            )
        if row.shape[1:] != value.shape[1:]:
            raise BadInput(
                f"'{key}' has the shape {tuple(value.shape[1:])} per sample, but its null condition has "
                f"{tuple(row.shape[1:])}: encode both with the same max_sequence_length."
            )
        return row.to(value).expand_as(value)
