r"""Jacobian-vector products of networks, and replay of random numbers.

    jvp: (f(a), d/de f(a + e v) at e = 0)   for a = (a_1, ..., a_n) and v = (v_1, ..., v_n)

"forward" is forward-mode differentiation: exact, one pass at about twice the cost of a forward pass. "difference" is a
difference quotient along v: two extra passes, for networks whose kernels have no forward-mode derivative, and for
networks whose derivative in time is not that of the function they were trained to be.

The latter are networks that embed a timestep of 0 to 1000 in sinusoids: a small component A sin(1000 t) of the output,
which costs almost nothing in training, has the derivative 1000 A. A quotient over t - h to t + h keeps at most A / h of
it, with an error of O(h^2) on the smooth part (`Derivative`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distill.denoise import Denoiser, network_of
from distill.errors import BadInput, suggest
from distill.noise import bcast

JVP_METHODS = ("forward", "difference")
LEAST_16_BIT = 0.02  # least step in t for 16-bit weights; the digits teacher's cosine to float32 exceeds 0.95 there
Inputs = tuple[Tensor, ...]
Reach = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Derivative:
    """How a method differentiates its student along a path (x_t, t, ...).

    Attributes:
        method: "forward" or "difference".
        step: for "difference": how far t moves to each side; None for the smallest step that the precision allows.
    """

    method: str = "forward"
    step: float | None = None

    @classmethod
    def choose(cls, method: str | None, step: float | None, denoiser: Denoiser, smooth: float) -> Derivative:
        """The derivative for a student.

        Args:
            method: "forward", "difference", or None: "difference" for networks with integer timesteps, else "forward".
            step: step of "difference" in t; None: `smooth` for networks with integer timesteps.
            denoiser: the student.
            smooth: a step over which sinusoids of integer timesteps average out.

        Raises:
            BadInput: if `method` is unknown, `step` is not in (0, 0.5) or comes without a difference, or is below 0.02
                for a network with 16-bit weights, where rounding errors exceed the difference.
        """
        integer = network_of(denoiser).timesteps > 0
        method = method or ("difference" if integer else "forward")
        if method not in JVP_METHODS:
            raise BadInput(
                f"method.jvp: '{method}' must be one of {', '.join(JVP_METHODS)}.{suggest(method, JVP_METHODS)}"
            )
        if method == "forward":
            if step is not None:
                raise BadInput("method.jvp_step: forward mode takes no step; set jvp: difference, or leave it out.")
            return cls()
        if step is not None and not 0 < step < 0.5:
            raise BadInput(f"method.jvp_step: {step} must be between 0 and 0.5, in units of t.")
        step = smooth if step is None and integer else step
        if (
            any(p.dtype in (torch.bfloat16, torch.float16) for p in network_of(denoiser).base.parameters())
            and (step or 0) < LEAST_16_BIT
        ):
            raise BadInput(
                "method.jvp: difference divides the rounding errors of the student's 16-bit weights by the step; set "
                f"jvp_step: {LEAST_16_BIT} or more, load the network in float32 (engine.precision may be bf16), or set "
                "jvp: forward."
            )
        return cls(method, step)

    def __call__(
        self,
        fn: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        tangents: Sequence[Tensor],
        low: Tensor | float = 0.0,
        high: Tensor | float = 1.0,
    ) -> Tensor:
        """d/de fn(inputs + e tangents) at e = 0 (B, ...), without gradient.

        Args:
            fn, inputs, tangents: as for `jvp`; the second input is the time t (B,), and its tangent is positive.
            low, high: range in which t stays, (B,) or numbers; a quotient that it cuts is one-sided, of error O(h).
        """
        reach = None
        if self.step is not None:
            t, dt = inputs[1], tangents[1]
            reach = ((t - low).clamp(0, self.step) / dt, (high - t).clamp(0, self.step) / dt)
        with torch.no_grad():
            return jvp(fn, inputs, tangents, self.method, reach)[1]


def jvp(
    fn: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor],
    method: str = "forward",
    reach: Reach | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The value of `fn` and its directional derivative along `tangents`.

    Autocast is disabled and attention uses the math backend. All passes draw the same random numbers (dropout).

    Args:
        fn: maps tensors (B, ...) to a tensor (B, ...), sample by sample.
        inputs, tangents: equally many tensors (B, ...) of equal shapes; a zero tangent holds its input fixed.
        method: "forward" (torch.func.jvp) or "difference": (fn(a + p v) - fn(a - q v)) / (p + q).
        reach: for "difference": (q, p), each (B,). By default p = q = h / max(1, |v|) per sample, with |v| the largest
            root mean square of its tangents, and h 1/50 of the cube root of the machine precision (1e-4 in float32,
            1e-7 in float64). That balances truncation against rounding for embeddings of integer timesteps, and
            follows the exact derivative.

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
        return _forward(fn, inputs, tangents) if method == "forward" else _difference(fn, inputs, tangents, reach)


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
            "or use a backbone without fused kernels (math_attention: true, where the network takes it)."
        ) from error


def _difference(
    fn: Callable[..., Tensor], inputs: Inputs, tangents: Inputs, reach: Reach | None
) -> tuple[Tensor, Tensor]:
    back, ahead = _smallest(inputs, tangents) if reach is None else reach
    replay = ReplayRNG(inputs[0].device)
    value = fn(*inputs)
    with torch.no_grad():
        with replay:
            forward = fn(*(a + bcast(ahead, v) * v for a, v in zip(inputs, tangents)))
        with replay:
            backward = fn(*(a - bcast(back, v) * v for a, v in zip(inputs, tangents)))
    span = (back + ahead).clamp_min(torch.finfo(back.dtype).tiny)  # 0 where t has no room: the quotient is 0
    return value, (forward - backward) / bcast(span, value)


def _smallest(inputs: Inputs, tangents: Inputs) -> Reach:
    """The step to each side (B,) that balances truncation against rounding."""
    size = torch.stack([v.flatten(1).square().mean(1).sqrt() if v.ndim > 1 else v.abs() for v in tangents]).amax(0)
    h = torch.finfo(inputs[0].dtype).eps ** (1 / 3) / 50 / size.clamp_min(1)
    return h, h


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
