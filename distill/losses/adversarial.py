r"""Adversarial losses on logits l(x) that x is real, (B,) or (B, patches); patches are averaged.

    softplus  discriminator  log(1 + e^{-l(real)}) + log(1 + e^{l(fake)}),  generator  log(1 + e^{-l(fake)})
    hinge     discriminator  (1 - l(real))_+ + (1 + l(fake))_+,             generator  -l(fake)

The optimal softplus logit is log p_real - log p_fake. Sources: https://arxiv.org/abs/1406.2661 (softplus, the
non-saturating form), https://arxiv.org/abs/1705.02894 (hinge).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.errors import BadInput, suggest

FORMS = ("softplus", "hinge")
R1_STEPS = {torch.bfloat16: 0.05}  # of "auto", where a step of 0.01 is lost in rounding
MAX_RATIO = 0.1  # largest ratio of gradient norms of "auto"; docs/methods/dmd2.md compares it with other codebases


def generator_loss(fake: Tensor, form: str = "softplus") -> Tensor:
    """The generator's loss, a scalar.

    Args:
        fake: logits of generated samples.
        form: "softplus" or "hinge".

    Raises:
        BadInput: for another form.
    """
    return F.softplus(-fake).mean() if _check_form(form) == "softplus" else -fake.mean()


def discriminator_loss(real: Tensor, fake: Tensor, form: str = "softplus") -> Tensor:
    """The discriminator's loss, a scalar.

    Args:
        real, fake: logits of real and of generated samples.
        form: "softplus" or "hinge".

    Raises:
        BadInput: for another form.
    """
    if _check_form(form) == "softplus":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def r1(logit: Tensor, x: Tensor) -> Tensor:
    r"""The exact R1 penalty E |dl/dx|^2 / 2, a scalar with a graph; l is the mean over patches.

    Args:
        logit: (B,) or (B, patches), computed from x.
        x: real samples (B, ...) that require gradient.

    https://arxiv.org/abs/1801.04406
    """
    total = logit.flatten(1).mean(1).sum() if logit.ndim > 1 else logit.sum()
    (slope,) = torch.autograd.grad(total, x, create_graph=True)
    return 0.5 * slope.square().flatten(1).sum(1).mean()


def approximate_r1(logit: Tensor, perturbed: Tensor, step: float) -> Tensor:
    r"""E (l(x) - l(x + step n))^2 / (2 step^2), n ~ N(0, I): converges to `r1` as step -> 0, without second derivatives.

    Args:
        logit: l(x), (B,) or (B, patches).
        perturbed: l(x + step n), of the same shape.
        step: standard deviation of the perturbation.

    https://arxiv.org/abs/2501.08316, which does not divide by step^2: a weight w of the paper is 2 w step^2 here.
    """
    change = (logit - perturbed).flatten(1).mean(1) if logit.ndim > 1 else logit - perturbed
    return 0.5 * (change / step).square().mean()


def penalised_discriminator_loss(
    logit: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    noise: Tensor,
    penalty: float = 0.0,
    step: float | str | None = None,
    form: str = "softplus",
) -> Tensor:
    """`discriminator_loss` plus `penalty` times the R1 penalty at the real samples.

    Args:
        logit: the discriminator, (B, ...) -> (B,) or (B, patches).
        real, fake: real and generated samples (B, ...), at the same noise level; gradients do not reach them.
        noise: N(0, I) (B, ...), the direction of the approximate penalty.
        penalty: weight of the R1 penalty.
        step: None for the exact penalty, else the step of `approximate_r1`; "auto" takes that of `r1_step`.
        form: "softplus" or "hinge".
    """
    real, fake = real.detach().requires_grad_(bool(penalty) and step is None), fake.detach()
    real_logit = logit(real)
    loss = discriminator_loss(real_logit, logit(fake), form)
    if not penalty:
        return loss
    if step is None:
        return loss + penalty * r1(real_logit, real)
    step = r1_step(real_logit) if isinstance(step, str) else step
    return loss + penalty * approximate_r1(real_logit, logit(real + step * noise), step)


def r1_step(logit: Tensor) -> float:
    """The step of `approximate_r1` for the precision of this logit: 0.05 in bfloat16, else 0.01.

    In bfloat16 rounding makes the penalty of a step of 0.01 1.4 to 2.7 times the exact one, that of 0.05 about 1.03 times.
    The precision is that of autocast, where it is on, else the logit's own.
    """
    kind = logit.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else logit.dtype
    return R1_STEPS.get(dtype, 0.01)


def check_r1_step(step: float | str | None) -> float | str | None:
    """Returns `step` if it is None, "auto" or positive; raises BadInput otherwise."""
    if step is None or step == "auto" or not isinstance(step, str) and step > 0:
        return step
    raise BadInput(f"r1_step: '{step}' must be auto, a positive number, or none for the exact penalty.")


def gradient_ratio(x: Tensor, main: Tensor, extra: Tensor, floor: float = 1e-8) -> Tensor:
    r"""|d main / dx| / |d extra / dx|, detached: the factor that gives `extra` the gradient norm of `main` at x.

    Both losses must depend on x; their graphs are retained. The authors of DMD2 recommend this ratio for choosing the
    GAN weight; here it is computed.
    """
    main_norm, extra_norm = (torch.autograd.grad(loss, x, retain_graph=True)[0].norm() for loss in (main, extra))
    return main_norm / extra_norm.clamp_min(floor)


def extra_loss_weight(weight: float, balance: bool | str, x: Tensor, main: Tensor, extra: Tensor) -> float | Tensor:
    r"""The factor on `extra` in main + factor * extra, detached.

    Args:
        weight: the configured weight.
        balance: False returns `weight`. True returns `weight` times `gradient_ratio`, so that `weight` is the ratio of
            the gradient norms at x. "auto" does the same with a ratio of at most `MAX_RATIO`.
        x: the tensor (B, ...) that both losses depend on, such as the student's sample. Gradients are taken with
            respect to x and not to weights, which may be sharded.

    Gradient-norm matching as in VQGAN, https://arxiv.org/abs/2012.09841, equation 7, there at the last layer's weights.
    """
    if check_balance(balance) is False:
        return weight
    return (min(weight, MAX_RATIO) if balance == "auto" else weight) * gradient_ratio(x, main, extra)


def check_balance(balance: bool | str) -> bool | str:
    """Returns `balance` if it is False, True or "auto"; raises BadInput otherwise."""
    if balance not in (False, True, "auto"):
        hint = suggest(str(balance), ("auto", "true", "false"))
        raise BadInput(f"balance: '{balance}' must be false, true or auto.{hint}")
    return balance


def _check_form(form: str) -> str:
    if form not in FORMS:
        raise BadInput(f"adversarial form '{form}' must be one of {', '.join(FORMS)}.{suggest(form, FORMS)}")
    return form
