"""Discriminator heads, and the layer features of a denoiser that they read."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distill.denoise import as_network, has_network, network_of
from distill.errors import BadInput, suggest

INPUT = ".input"  # suffix of a layer name: the input of the layer instead of its output


class FeatureExtractor:
    """Features of named layers of a denoiser's network at (x_t, t), as tokens.

    Hooks are registered for one call only; the network is not modified. Gradients flow to x_t, and to the network's
    parameters if they require gradients.

    Args:
        denoiser: a Denoiser with a network.
        names: dotted paths of modules in `denoiser.net`, as in `named_modules()`. The feature is the module's output,
            or its input if the name ends in `.input`.

    Raises:
        BadInput: if the denoiser has no network, the network has no such module, or a call does not run a module.
    """

    def __init__(self, denoiser: nn.Module, names: str | list[str]):
        self.denoiser, self.names = denoiser, [names] if isinstance(names, str) else list(names)
        if not has_network(denoiser):
            raise BadInput(f"{type(denoiser).__name__} has no network whose layers a discriminator head could read.")
        self.net = network_of(denoiser).base  # layer names of an adapter are those of its base
        known = [name for name, _ in self.net.named_modules()]
        for name in self.names:
            if name.removesuffix(INPUT) not in known:
                raise BadInput(
                    f"{self.net._get_name()} has no layer '{name}'.{suggest(name.removesuffix(INPUT), known)}"
                )

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> list[Tensor]:
        """The features of each layer, (B, tokens, channels)."""
        features: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name in self.names:
                module = self.net.get_submodule(name.removesuffix(INPUT))
                hooks.callback(_register_hook(module, name, features).remove)
            self.denoiser(x_t, t, **cond)
        for name in self.names:
            if name not in features:
                raise BadInput(f"layer '{name}' did not run when the network was called: name a layer that does.")
        return [tokens(features[name]) for name in self.names]


def _register_hook(module: nn.Module, name: str, features: dict[str, Tensor]) -> RemovableHandle:
    """A hook that stores the output of `module`, or its input for a name in `.input`, in `features`."""

    def store_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        features[name] = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))

    def store_output(module: nn.Module, args: tuple, out: Any) -> None:
        features[name] = out if isinstance(out, Tensor) else next(v for v in out if isinstance(v, Tensor))

    if name.endswith(INPUT):
        return module.register_forward_pre_hook(store_input, with_kwargs=True)
    return module.register_forward_hook(store_output)


def tokens(h: Tensor) -> Tensor:
    """Features (B, C), (B, N, C) or (B, C, *spatial) as (B, tokens, C)."""
    if h.ndim == 2:
        return h[:, None]
    return h if h.ndim == 3 else h.flatten(2).transpose(1, 2)


class Head(nn.Module):
    r"""Logits from features, per layer and token: LayerNorm -> Linear -> SiLU -> Linear -> SiLU -> Linear.

    The features depend on t and the condition, so these are not inputs of the head.

    Args:
        channels: number of channels of the features, one per layer.
        width: number of hidden channels.
    """

    def __init__(self, channels: int | list[int], width: int = 128):
        super().__init__()
        self.channels = [channels] if isinstance(channels, int) else list(channels)
        self.parts = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(c, elementwise_affine=False),
                nn.Linear(c, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, 1),
            )
            for c in self.channels
        )

    @classmethod
    @torch.no_grad()
    def of(cls, extractor: FeatureExtractor, shape: tuple[int, ...], width: int = 128) -> Head:
        """A head for the features of `extractor`, whose channels are read from one unconditional call.

        Args:
            extractor: the layers to read.
            shape: shape of one sample.
            width: number of hidden channels.

        Raises:
            BadInput: if the network needs conditions.
        """
        hint = "roles.head: {_target_: distill.models.heads.Head, channels: [...]}"
        if needs := as_network(extractor.net).conditions:
            raise BadInput(
                f"the channels of the layers cannot be measured, because the network needs {', '.join(needs)}: give {hint}."
            )
        device = next(extractor.denoiser.parameters()).device
        try:
            features = extractor(torch.zeros(1, *shape, device=device), torch.full((1,), 0.5, device=device))
        except TypeError as error:
            raise BadInput(
                f"the channels of the layers cannot be measured without a condition ({error}): give {hint}."
            ) from None
        return cls([feature.shape[-1] for feature in features], width)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits (B, tokens of all layers) that the features are those of real data."""
        logits = [part(h.to(part[1].weight.dtype)).squeeze(-1) for part, h in zip(self.parts, features)]
        return torch.cat(logits, dim=1)
