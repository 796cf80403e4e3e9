"""What precision and modes do to a turn: differences in low precision, dropout of critics, evaluations at guidance 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from distill import config
from distill.denoise import Denoiser, Guided
from distill.errors import BadInput
from distill.methods import DMD2, SCM, TDM, ConsistencyTraining
from distill.models import MLP, Transformer
from distill.models.lora import apply_layout
from distill.noise import RectifiedFlow
from distill.times import Shrinking
from distill.training.experiment import build_experiment

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs" / "toy").glob("*.yaml"))


# -- guidance 1 --------------------------------------------------------------------------------------------------------


def teacher_rows(recipe, w):
    """Rows that enter the teacher in four steps of 16 samples."""
    keys = ["log.wandb=disabled", "train.threads=1", "data.batch_size=16"]
    cfg = config.load([recipe], keys)
    cfg.method.pop("warm_start", None)
    cfg.method.pop("guidance_range", None)
    cfg.method.guidance = w
    experiment, rows = build_experiment(cfg), []
    method, batches = experiment.method, experiment.data.loader()
    method.teacher.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    torch.manual_seed(0)
    method.total_steps = 4
    for _ in range(4):
        method.training_step(next(batches))
    return sum(rows)


def guides(recipe):
    cfg = config.load([recipe])
    kind = config.resolve(cfg.method["_target_"])
    return "teacher" in kind.frozen and "teacher" in cfg.roles and kind.__name__ != "Guidance"  # draws its w


@pytest.mark.parametrize("recipe", filter(guides, RECIPES), ids=lambda p: p.stem)
def test_guidance_of_one_costs_one_evaluation(recipe, monkeypatch):
    guided = teacher_rows(recipe, 1.0)
    monkeypatch.setattr(Guided, "native", lambda self, x_t, t, w=None, **cond: self.denoiser(x_t, t, **cond))
    assert guided == teacher_rows(recipe, 1.0)


# -- differences in low precision --------------------------------------------------------------------------------------


def slope(student, pairs, x, z, precision):
    """The gradient of the loss with respect to all weights, one vector."""
    method = ConsistencyTraining({"student": student}, pairs=pairs)
    method.step, method.total_steps = 9, 10  # the last stage of ten
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        method.loss(x, z, {}).backward()
    return torch.cat([p.grad.flatten().double() for p in method.student.parameters() if p.grad is not None])


def test_ect_keeps_its_direction_in_bfloat16():
    class Late(Shrinking):
        """Pairs of one draw, as near as those of stage 7."""

        def __call__(self, n, schedule, progress, device=None, dtype=None):
            t = torch.linspace(0.2, 0.8, n, dtype=dtype)
            return t, t * (1 - 2.0**-9)

    def student(dtype):
        torch.manual_seed(0)
        net = Transformer(size=8, width=32, depth=2, heads=2)
        for p in net.parameters():
            nn.init.normal_(p, std=0.15)
        return Denoiser(net.to(dtype), RectifiedFlow(), "flow")

    x, z = torch.randn(8, 1, 8, 8), torch.randn(8, 1, 8, 8)
    exact = slope(student(torch.float64), Late(), x.double(), z.double(), "64")
    for precision in ("32", "bf16"):
        found = slope(student(torch.float32), Late(), x, z, precision)
        assert torch.cosine_similarity(found, exact, 0) > 0.999, precision


def test_a_difference_of_evaluations_of_adapters_on_a_bfloat16_base_is_refused():
    def method(jvp, dtype):
        net = Transformer(size=4, width=16, depth=1, heads=2).to(dtype)
        roles = {"teacher": Denoiser(net, RectifiedFlow(), "flow")}
        apply_layout(roles, "shared_base", {"rank": 2})
        return SCM(roles, jvp=jvp)

    with pytest.raises(BadInput, match="method.jvp: difference divides the rounding errors of the student's 16-bit"):
        method("difference", torch.bfloat16)
    method("difference", torch.float32)
    method("forward", torch.bfloat16)


# -- modes -------------------------------------------------------------------------------------------------------------


def dropping(**kw):
    net = MLP(dim=2, width=16, depth=1)
    net.leave = nn.Sequential(nn.Dropout(0.3), net.leave)
    return Denoiser(net, RectifiedFlow(), "flow")


@pytest.mark.parametrize("kind, extra", [(TDM, {}), (DMD2, {"adversarial": 0.1, "layers": "blocks.0.second"})])
def test_critics_drop_units_in_their_own_turns_only(kind, extra):
    torch.manual_seed(0)
    method = kind({"teacher": dropping()}, grid=2, student_every=1, **extra).train()
    seen, turn, inner = [], [], method._only
    method.critic.net.register_forward_pre_hook(lambda module, args: seen.append((turn[-1], module.training)))

    def only(role):
        turn.append(role)
        inner(role)

    method._only = only
    for _ in range(2):
        method.training_step({"x": torch.randn(8, 2)})
        assert not method.teacher.training and method.student.training
    assert {training for role, training in seen if role == "critic"} == {True}
    others = {role: training for role, training in seen if role not in ("critic", None)}
    assert "student" in others and not any(others.values())


def test_a_critic_equal_to_its_teacher_gives_the_student_no_gradient_despite_dropout():
    torch.manual_seed(0)
    method = TDM({"teacher": dropping()}, grid=1, student_every=1, guidance=1.0).train()
    method.critic.load_state_dict(method.teacher.state_dict())
    shared = method._part({"x": torch.randn(64, 2)}, warm=False)
    method._only("student")
    method.student_loss(*shared).backward()
    assert max(float(p.grad.abs().max()) for p in method.student.parameters()) < 1e-5
