r"""Adversarial losses on logits that a sample is real, (B,) or (B, patches); patches are averaged.

    softplus  discriminator  log(1 + e^{-l(real)}) + log(1 + e^{l(fake)}),  generator  log(1 + e^{-l(fake)})
    hinge     discriminator  (1 - l(real))_+ + (1 + l(fake))_+,             generator  -l(fake)

The optimal softplus logit is log p_real - log p_fake. https://arxiv.org/abs/1406.2661 (non-saturating form),
https://arxiv.org/abs/1705.02894 (hinge).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.errors import BadInput, suggest

FORMS = ("softplus", "hinge")
SHARE = 0.1  # largest ratio of gradient norms that "auto" allows; docs/methods/dmd2.md has what others do


def generator(fake: Tensor, form: str = "softplus") -> Tensor:
    """The generator's loss, a scalar, falling in the logits of its samples."""
    return F.softplus(-fake).mean() if _known(form) == "softplus" else -fake.mean()


def discriminator(real: Tensor, fake: Tensor, form: str = "softplus") -> Tensor:
    """The discriminator's loss, a scalar."""
    if _known(form) == "softplus":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def r1(logit: Tensor, x: Tensor) -> Tensor:
    r"""E |d l / d x|^2 / 2, exact, with a graph for a second backward pass; l is the mean over patches.

    x (B, ...) must require gradient and `logit` be computed from it. https://arxiv.org/abs/1801.04406
    """
    total = logit.flatten(1).mean(1).sum() if logit.ndim > 1 else logit.sum()
    (slope,) = torch.autograd.grad(total, x, create_graph=True)
    return 0.5 * slope.square().flatten(1).sum(1).mean()


def r1_near(logit: Tensor, near: Tensor, step: float) -> Tensor:
    r"""E (l(x) - l(x + step n))^2 / (2 step^2), n ~ N(0, I): tends to `r1` as step -> 0, without a second derivative.

    https://arxiv.org/abs/2501.08316 (approximated R1), without their division by step^2: their weight w is
    2 w step^2 here.
    """
    change = (logit - near).flatten(1).mean(1) if logit.ndim > 1 else logit - near
    return 0.5 * (change / step).square().mean()


def discriminate(
    logit: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    noise: Tensor,
    penalty: float = 0.0,
    step: float | None = None,
    form: str = "softplus",
) -> Tensor:
    """`discriminator` on logit(real) and logit(fake), plus `penalty` times R1 at `real`: exact, or by a step of size
    `step` along `noise` ~ N(0, I). real, fake, noise: (B, ...), the first two noised alike."""
    real, fake = real.detach().requires_grad_(bool(penalty) and step is None), fake.detach()
    l = logit(real)
    loss = discriminator(l, logit(fake), form)
    if not penalty:
        return loss
    return loss + penalty * (r1(l, real) if step is None else r1_near(l, logit(real + step * noise), step))


def balance(x: Tensor, main: Tensor, extra: Tensor, floor: float = 1e-8) -> Tensor:
    r"""|d main / d x| / |d extra / d x|, detached: the factor that gives `extra` the gradient norm of `main` at x.

    The advice of DMD2's authors for its GAN weight, computed instead of searched. Both must depend on x; their graphs
    are kept.
    """
    of = [torch.autograd.grad(loss, x, retain_graph=True)[0].norm() for loss in (main, extra)]
    return of[0] / of[1].clamp_min(floor)


def weigh(a: float, how: bool | str, x: Tensor, main: Tensor, extra: Tensor) -> float | Tensor:
    r"""The factor on `extra` in main + factor * extra, detached.

    Args:
        a: the weight that the recipe gives.
        how: False: a itself.  True: a times `balance`, so a is the ratio of the gradients' norms at x.  "auto": the same
            with a at most `SHARE`, so that `extra` never drowns `main` and no weight has to be searched for.
        x: (B, ...) what both losses depend on, such as the student's sample; the gradient stops there, so that no
            network's weights are needed and shards of one work too.

    Gradient-norm matching as in VQGAN, https://arxiv.org/abs/2012.09841, equation 7, there at the last layer's weights.
    """
    if balancing(how) is False:
        return a
    return (min(a, SHARE) if how == "auto" else a) * balance(x, main, extra)


def balancing(how: bool | str) -> bool | str:
    """`how` of `weigh`, if it is one."""
    if how not in (False, True, "auto"):
        raise BadInput(f"balance: '{how}' must be false, true or auto.{suggest(str(how), ('auto', 'true', 'false'))}")
    return how


def _known(form: str) -> str:
    if form not in FORMS:
        raise BadInput(f"adversarial form '{form}' is none of {', '.join(FORMS)}.{suggest(form, FORMS)}")
    return form
