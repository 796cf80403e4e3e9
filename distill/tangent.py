r"""Directional derivatives of networks, and random streams that two branches share.

    jvp: (f(a), d/de f(a + e v) at e = 0)

for a = (a_1, ..., a_n) and v = (v_1, ..., v_n): by forward-mode differentiation, exact and one pass of about twice a
forward's cost, or by a central difference along the same direction, two passes more, for networks whose kernels have no
forward-mode derivative. Both go along `tangents` and nothing else, so a guided teacher's velocity is followed truly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.errors import BadInput, suggest
from distill.noise import bcast

JVPS = ("forward", "difference")


def jvp(
    fn: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor],
    method: str = "forward",
    step: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""(fn(*inputs), directional derivative of fn along `tangents`), both of the shape of fn's value.

    The value keeps its graph if gradients are on; so does the derivative, so detach it or run under `torch.no_grad()`.
    Autocast is off and attention is the written-out one inside. All passes draw the same random numbers (dropout).

    Args:
        fn: maps tensors (B, ...) to a tensor (B, ...), sample by sample.
        inputs, tangents: equally many tensors (B, ...) of equal shapes; a zero tangent holds its input fixed.
        method: "forward" (torch.func.jvp) or "difference": (fn(a + h v) - fn(a - h v)) / 2h.
        step: of a difference: h = step / max(1, |v|) per sample, |v| the largest root mean square of its tangents, so
            that no input moves by more than `step` or than `step` times its tangent. By default 1/50 of the cube root
            of the precision, 1e-4 in float32 and 1e-7 in float64: truncation against rounding for embeddings of time
            that turn up to a thousand times faster than t, as those of integer timesteps do.

    Raises:
        BadInput: if the network has no forward-mode derivative, or `method` is unknown.
    """
    inputs, tangents = tuple(inputs), tuple(v.to(a) for v, a in zip(tangents, inputs, strict=True))
    if method not in JVPS:
        raise BadInput(f"jvp '{method}' is none of {', '.join(JVPS)}.{suggest(method, JVPS)}")
    with torch.autocast(inputs[0].device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        return _forward(fn, inputs, tangents) if method == "forward" else _difference(fn, inputs, tangents, step)


def _forward(fn, inputs, tangents):
    try:
        return torch.func.jvp(fn, inputs, tangents)
    except RuntimeError as error:  # NotImplementedError is one
        with torch.no_grad():
            fn(*inputs)  # an error of the network itself comes out here, as it is
        reason = str(error).split(". ")[0].splitlines()[0]
        raise BadInput(
            f"The network has no forward-mode derivative ({reason}); set jvp: difference, "
            "or use a backbone without fused kernels (math_attention: true for UNet2D)."
        ) from error


def _difference(fn, inputs, tangents, step):
    step = torch.finfo(inputs[0].dtype).eps ** (1 / 3) / 50 if step is None else step
    size = torch.stack([v.flatten(1).square().mean(1).sqrt() if v.ndim > 1 else v.abs() for v in tangents]).amax(0)
    h = step / size.clamp_min(1)
    rewind = Rewind(inputs[0].device)
    value = fn(*inputs)
    with torch.no_grad():
        with rewind:
            ahead = fn(*(a + bcast(h, v) * v for a, v in zip(inputs, tangents)))
        with rewind:
            behind = fn(*(a - bcast(h, v) * v for a, v in zip(inputs, tangents)))
    return value, (ahead - behind) / bcast(2 * h, value)


class Rewind:
    """The random stream from here on, as often as wanted.

    A block `with rewind:` draws what was drawn just after `rewind = Rewind(device)`, so a target network drops the same
    units as the online one did; afterwards the stream goes on from where the block found it.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.start = self._now()

    def _now(self) -> list[Tensor]:
        state = [torch.get_rng_state()]
        return state + [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else state

    def _go(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self.device)

    def __enter__(self) -> Rewind:
        self.outside = self._now()
        self._go(self.start)
        return self

    def __exit__(self, *failure) -> None:
        self._go(self.outside)
