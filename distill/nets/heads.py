"""Discriminator heads, and the features of a denoiser's named layers that they read."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.denoise import as_network, has_network, network_of
from distill.errors import BadInput, suggest

INPUT = ".input"


class Layers:
    """What named layers of a denoiser's network hold at (x_t, t), as tokens.

    The hooks live for one call only: the network itself is left as it was. Gradients flow to x_t, and to the network's
    parameters if they require them.

    Args:
        denoiser: a Denoiser with a network.
        names: dotted paths of modules inside `denoiser.net`, as in `named_modules()`. What leaves the module is taken;
            with a trailing `.input`, what enters it.

    Raises:
        BadInput: the denoiser has no network or the network has no such module; a layer that a call does not run.
    """

    def __init__(self, denoiser: nn.Module, names: str | list[str]):
        self.denoiser, self.names = denoiser, [names] if isinstance(names, str) else list(names)
        if not has_network(denoiser):
            raise BadInput(f"{type(denoiser).__name__} has no network for a head to read layers of.")
        self.net = network_of(denoiser).base  # an adapter's layers are its base's
        known = [name for name, _ in self.net.named_modules()]
        for name in self.names:
            if name.removesuffix(INPUT) not in known:
                raise BadInput(f"{type(self.net).__name__} has no layer '{name}'.{suggest(name, known)}")

    def __call__(self, x_t: Tensor, t: Tensor, **cond) -> list[Tensor]:
        """The features of each layer, (B, tokens, channels)."""
        found, handles = {}, []
        for name in self.names:
            module = self.net.get_submodule(name.removesuffix(INPUT))
            handles.append(_watch(module, name, found))
        try:
            self.denoiser(x_t, t, **cond)
        finally:
            for handle in handles:
                handle.remove()
        for name in self.names:
            if name not in found:
                raise BadInput(f"layer '{name}' did not run when the network was called; name one that does.")
        return [tokens(found[name]) for name in self.names]


def _watch(module: nn.Module, name: str, found: dict[str, Tensor]):
    def entering(module, args, kwargs):
        found[name] = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))

    def leaving(module, args, out):
        found[name] = out if isinstance(out, Tensor) else next(v for v in out if isinstance(v, Tensor))

    if name.endswith(INPUT):
        return module.register_forward_pre_hook(entering, with_kwargs=True)
    return module.register_forward_hook(leaving)


def tokens(h: Tensor) -> Tensor:
    """(B, C), (B, N, C) or (B, C, *space) features as (B, tokens, C)."""
    if h.ndim == 2:
        return h[:, None]
    return h if h.ndim == 3 else h.flatten(2).transpose(1, 2)


class Head(nn.Module):
    r"""Logits from features: per layer and token  LayerNorm -> Linear -> SiLU -> Linear -> SiLU -> Linear.

    The features know t and the condition, so the head is told neither.

    Args:
        channels: of the features, one number per layer.
        width: of the hidden layers.
    """

    def __init__(self, channels: int | list[int], width: int = 128):
        super().__init__()
        self.channels = [channels] if isinstance(channels, int) else list(channels)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(c, elementwise_affine=False), nn.Linear(c, width), nn.SiLU(),
                          nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)) for c in self.channels)  # fmt: skip

    @classmethod
    @torch.no_grad()
    def of(cls, layers: Layers, shape: tuple[int, ...], width: int = 128) -> Head:
        """A head for `layers`, measured on one sample of `shape` without conditions."""
        weight, hint = next(layers.denoiser.parameters()), "roles.head: {_target_: distill.nets.heads.Head, channels: [...]}"
        if needs := as_network(layers.net).told:
            raise BadInput(f"layers of a network that is told {', '.join(needs)} are not measured; give {hint}.")
        try:
            found = layers(torch.zeros(1, *shape, device=weight.device), torch.full((1,), 0.5, device=weight.device))
        except TypeError as error:
            raise BadInput(f"layers cannot be measured without a condition ({error}); give {hint}.") from None
        return cls([h.shape[-1] for h in found], width)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits (B, all tokens) that the features are those of real data."""
        return torch.cat([part(h.to(part[1].weight.dtype)).squeeze(-1) for part, h in zip(self.parts, features)], dim=1)


class Judge(nn.Module):
    r"""A discriminator of its own, without anyone's features, for vectors: an MLP on (x_t, t, label).

    For toys, whose exact teacher has no layers. Call it like a denoiser.

    Args:
        dim: size of x; images are flattened.
        width, classes: of the network.
    """

    def __init__(self, dim: int = 2, width: int = 128, classes: int = 0):
        super().__init__()
        from distill.nets.small import Condition

        self.condition = Condition(width, classes, False, False)
        self.enter, self.middle, self.leave = nn.Linear(dim, width), nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits (B, 1)."""
        c = self.condition(t, label, None, None)
        h = F.silu(self.enter(x_t.flatten(1)) + c)
        return self.leave(F.silu(self.middle(h) + c))
