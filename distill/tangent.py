r"""Jacobian-vector products of networks, and replay of random numbers.

    jvp: (f(a), d/de f(a + e v) at e = 0)   for a = (a_1, ..., a_n) and v = (v_1, ..., v_n)

"forward" is forward-mode differentiation: exact, one pass at about twice the cost of a forward pass. "difference" is a
central difference: two extra passes, for networks whose kernels have no forward-mode derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.errors import BadInput, suggest
from distill.noise import bcast

JVP_METHODS = ("forward", "difference")
Inputs = tuple[Tensor, ...]


def jvp(
    fn: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor],
    method: str = "forward",
    step: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The value of `fn` and its directional derivative along `tangents`.

    Autocast is disabled and attention uses the math backend. All passes draw the same random numbers (dropout).

    Args:
        fn: maps tensors (B, ...) to a tensor (B, ...), sample by sample.
        inputs, tangents: equally many tensors (B, ...) of equal shapes; a zero tangent holds its input fixed.
        method: "forward" (torch.func.jvp) or "difference": (fn(a + h v) - fn(a - h v)) / 2h.
        step: for "difference": h = step / max(1, |v|) per sample, with |v| the largest root mean square of its
            tangents, so that no input moves by more than `step` in root mean square. The default is 1/50 of the cube
            root of the machine precision (1e-4 in float32, 1e-7 in float64). It balances truncation against rounding
            for embeddings of integer timesteps, which vary up to a thousand times faster than t.

    Returns:
        (fn(*inputs), derivative), both of the shape of the value. Both keep their graph if gradients are enabled:
        detach the derivative, or call under `torch.no_grad()`.

    Raises:
        BadInput: if the network has no forward-mode derivative, or `method` is unknown.
    """
    inputs = tuple(inputs)
    tangents = tuple(v.to(a) for v, a in zip(tangents, inputs, strict=True))
    if method not in JVP_METHODS:
        raise BadInput(f"jvp: '{method}' must be one of {', '.join(JVP_METHODS)}.{suggest(method, JVP_METHODS)}")
    with torch.autocast(inputs[0].device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        return _forward(fn, inputs, tangents) if method == "forward" else _difference(fn, inputs, tangents, step)


def _forward(fn: Callable[..., Tensor], inputs: Inputs, tangents: Inputs) -> tuple[Tensor, Tensor]:
    try:
        outputs = torch.func.jvp(fn, inputs, tangents)
        return outputs[0], outputs[1]
    except RuntimeError as error:  # includes NotImplementedError
        with torch.no_grad():
            fn(*inputs)  # re-raises an error of the network itself
        reason = str(error).split(". ")[0].splitlines()[0]
        raise BadInput(
            f"The network has no forward-mode derivative ({reason}); set jvp: difference, "
            "or use a backbone without fused kernels (math_attention: true for UNet2D)."
        ) from error


def _difference(
    fn: Callable[..., Tensor], inputs: Inputs, tangents: Inputs, step: float | None
) -> tuple[Tensor, Tensor]:
    step = torch.finfo(inputs[0].dtype).eps ** (1 / 3) / 50 if step is None else step
    size = torch.stack([v.flatten(1).square().mean(1).sqrt() if v.ndim > 1 else v.abs() for v in tangents]).amax(0)
    h = step / size.clamp_min(1)
    replay = ReplayRNG(inputs[0].device)
    value = fn(*inputs)
    with torch.no_grad():
        with replay:
            forward = fn(*(a + bcast(h, v) * v for a, v in zip(inputs, tangents)))
        with replay:
            backward = fn(*(a - bcast(h, v) * v for a, v in zip(inputs, tangents)))
    return value, (forward - backward) / bcast(2 * h, value)


class ReplayRNG:
    """Replays the random numbers drawn since its creation.

    Inside `with replay:` the generators repeat the numbers that were drawn after `replay = ReplayRNG(device)`, so that
    a target network uses the same dropout masks as the online network. After the block the generators continue from
    their state before the block.

    Args:
        device: the CUDA device whose generator is replayed together with that of the CPU.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.start = self._state()

    def _state(self) -> list[Tensor]:
        state = [torch.get_rng_state()]
        return state + [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else state

    def _set_state(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self.device)

    def __enter__(self) -> ReplayRNG:
        self.outside = self._state()
        self._set_state(self.start)
        return self

    def __exit__(self, *exception: object) -> None:
        self._set_state(self.outside)
