"""Weights that train, and their averages, are float32 beside a teacher in bfloat16, and move as beside one in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill import config
from distill.denoise import Denoiser
from distill.methods import TDM
from distill.models import Transformer
from distill.models.lora import apply_layout
from distill.noise import RectifiedFlow
from distill.training.experiment import build_experiment

ROOT = Path(__file__).parents[2]


def stepped(dtype, *keys):
    """Four steps of a published recipe's twin; its method, and its weights before."""
    keys = [
        "model=tiny",
        "train.steps=4",
        "optim.student.lr=1e-5",
        "method.ema=0.9",
        f"roles.teacher.dtype={dtype}",
        *keys,
    ]
    torch.manual_seed(0)
    experiment = build_experiment(config.load([ROOT / "configs/sd15/tdm.yaml"], keys))
    method, batches = experiment.method.train(), experiment.data.loader()
    method.total_steps = 4
    before = {name: [p.detach().clone() for p in getattr(method, name).parameters()] for name in ("student", "ema")}
    for _ in range(4):
        method.training_step(next(batches))
    return method, before


def share_moved(method, before, name):
    pairs = list(zip(getattr(method, name).parameters(), before[name]))
    return sum(int((p != q).sum()) for p, q in pairs) / sum(p.numel() for p, _ in pairs)


@pytest.mark.parametrize("layout", ["full", "shared_base"])
def test_student_and_average_move_beside_a_teacher_in_bfloat16(layout):
    keys = [f"roles.layout={layout}", *(["roles.adapter=null"] if layout == "full" else [])]
    (full, start), (half, begun) = stepped("float32", *keys), stepped("bfloat16", *keys)
    assert {p.dtype for p in half.teacher.parameters()} == {torch.bfloat16}, "the frozen base stays small"
    for name in ("student", "critic", "ema"):
        assert {p.dtype for p in getattr(half, name).parameters()} == {torch.float32}
    moments = [v.dtype for s in half.placement.optimizers["student"].state.values() for v in s.values()]
    assert set(moments) == {torch.float32}
    for name in ("student", "ema"):
        moved = share_moved(full, start, name)
        assert moved > 0.4 and share_moved(half, begun, name) > 0.95 * moved


def test_an_adapter_on_a_bfloat16_base_computes_with_and_without_autocast():
    torch.manual_seed(0)
    net = Transformer(size=4, width=16, depth=1, heads=2).bfloat16()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    roles = {"teacher": Denoiser(net, RectifiedFlow(), "flow")}
    apply_layout(roles, "shared_base", {"rank": 2})
    method = TDM(roles, grid=1)
    for up in method.student.net.up:
        torch.nn.init.normal_(up, std=0.3)
    x, t = torch.randn(4, 1, 4, 4), torch.rand(4)
    plain = method.student(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        cast = method.student(x, t)
    merged = Denoiser(method.student.net.merged(), RectifiedFlow(), "flow").float()(x, t)
    for found in (plain, cast):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, merged, rtol=0.1, atol=0.1)
    plain.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in method.student.net.parameters())
