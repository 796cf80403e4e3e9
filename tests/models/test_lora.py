from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from distill import config
from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.export import export
from distill.export.verify import stock_differences
from distill.models import Transformer
from distill.models.diffusers import DiT
from distill.models.lora import LoRAAdapter, SharedBase, apply_layout
from distill.noise import RectifiedFlow, Table
from distill.training.experiment import build_experiment
from distill.training.load import load_experiment
from distill.training.run import train

ROOT = Path(__file__).parents[2]


def base(rank=4, **kw):
    torch.manual_seed(0)
    net = Transformer(size=4, patch=2, width=16, depth=2, heads=2, classes=3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return SharedBase(net, rank, **kw)


def moved(shared):
    """A copy of the base with an adapter that is not zero."""
    adapter = copy.deepcopy(shared)
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return adapter


def ask(net):
    torch.manual_seed(1)
    return net(torch.randn(5, 1, 4, 4), torch.rand(5), label=torch.tensor([0, 1, 2, -1, 0]))


def test_an_adapter_starts_as_its_base_and_adds_a_product_of_low_rank():
    shared = base(alpha=8.0)
    adapter = copy.deepcopy(shared)
    assert isinstance(adapter, LoRAAdapter) and torch.equal(ask(adapter), ask(shared))
    adapter, before = moved(shared), ask(shared)
    assert not torch.allclose(ask(adapter), before)
    assert torch.equal(ask(shared), before), "the base answers for the adapter"
    by_hand = copy.deepcopy(shared.net)
    for name, down, up in zip(shared.targets, adapter.down, adapter.up):
        by_hand.get_submodule(name).weight.data += 8.0 / 4 * up.data @ down.data
    torch.testing.assert_close(ask(adapter), ask(by_hand), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ask(adapter.merged()), ask(by_hand), rtol=1e-5, atol=1e-6)
    assert not any(m._forward_hooks for m in shared.net.modules())


def test_adapters_share_the_base_and_nothing_else():
    shared = base()
    first = moved(shared)
    second = copy.deepcopy(first)
    assert first.base is second.base is shared.net
    assert torch.equal(ask(first), ask(second))
    kept = ask(first)
    ask(second).square().mean().backward()
    with torch.no_grad():
        for p in second.parameters():
            p -= 0.1 * p.grad
    assert torch.equal(ask(first), kept) and not torch.equal(ask(second), kept)
    assert all(p.grad is None for p in first.parameters())
    ids = {id(p) for p in shared.parameters()}
    assert not ids & {id(p) for a in (first, second) for p in a.parameters()}
    assert set(second.state_dict()) == {f"{k}.{i}" for k in ("down", "up") for i in range(len(shared.targets))}


def test_targets_by_pattern_and_their_faults():
    assert all("qkv" in name for name in base(targets=["*.qkv"]).targets)
    with pytest.raises(BadInput, match="no linear layer of Transformer matches"):
        base(targets=["*.attention"])
    teacher = {"teacher": Denoiser(base().net, RectifiedFlow(), "flow")}
    for layout, adapter, words in (
        ("shared", None, "Did you mean 'shared_base'"),
        ("full", {"rank": 2}, "set the layout"),
        ("shared_base", {"rang": 2}, "roles.adapter.rang is unknown. Did you mean 'rank'"),
    ):
        with pytest.raises(BadInput, match=words):
            apply_layout(teacher, layout, adapter)
    with pytest.raises(BadInput, match="needs a teacher"):
        apply_layout({}, "shared_base")


SMALL = [
    "log.wandb=disabled",
    "train.threads=1",
    "train.steps=3",
    "train.validate_every=0",
    "data.batch_size=8",
    "eval.validation_samples=10",
    "eval.samples=10",
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    from distill.data import prepare

    root = tmp_path_factory.mktemp("lora")
    prepare.digits(root / "data")
    return root


@pytest.mark.parametrize("recipe", ["tdm", "dmd2-head"])
def test_roles_are_adapters_on_one_base(digits, recipe):
    """Resident weights of teacher, student, critic, head and average against one network, and who moves."""
    cfg = config.load(
        [ROOT / "configs" / "digits" / f"{recipe}.yaml"],
        [
            *SMALL,
            f"data.path={digits}/data/train",
            "eval.reference=null",
            "roles.layout=shared_base",
            "roles.adapter.rank=1",
            "roles.adapter.targets=['*.attn1.to_*']",
            f"roles.teacher.path={ROOT}/checkpoints/digits-teacher",
        ],
    )
    cfg.roles.pop("critic", None)  # one with inputs that the teacher lacks is a network of its own
    experiment = build_experiment(cfg)
    method = experiment.method
    one = sum(p.numel() for p in method.teacher.parameters())
    roles = [m for m in (method.teacher, method.student, method.critic, method.ema)]
    resident = {id(p): p.numel() for m in roles for p in m.parameters()}
    assert sum(resident.values()) <= 1.2 * one
    assert all(isinstance(m.net, LoRAAdapter) and m.net.base is method.teacher.net.net for m in roles[1:])
    frozen = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    begun = {k: v.clone() for k, v in method.student.state_dict().items()}
    train(cfg, digits / f"run-{recipe}")
    again = load_experiment(digits / f"run-{recipe}")
    assert all(torch.equal(v, frozen[k]) for k, v in again.method.teacher.state_dict().items())
    assert any(not torch.equal(v, begun[k]) for k, v in again.method.student.state_dict().items())


def test_an_adapter_is_exported_as_the_network_that_it_makes(tmp_path):
    torch.manual_seed(0)
    shared = SharedBase(DiT(size=8, width=16, depth=2, heads=2, classes=3), 2)
    for p in shared.parameters():
        torch.nn.init.normal_(p, std=0.2)
    student = Denoiser(moved(shared), Table.of(RectifiedFlow(), 1000), "v")
    out = export(student, 4, "ode", tmp_path / "out")
    assert stock_differences([out])[0] < 1e-5
