"""Optimizers of several signatures: what they are given, that they learn and resume, and one sentence for the others."""

from __future__ import annotations

import copy
import importlib.util
import sys
import types

import pytest
import tiny
import torch

from distill.config.schema import Optim
from distill.errors import BadInput
from distill.methods.optim import keywords_of, optimizer_class, optimizer_of
from distill.models import MLP
from distill.training import checkpoints
from distill.training.experiment import build_experiment

KINDS = {
    "Adafactor": Optim(name="Adafactor", lr=3e-2),
    "Muon": Optim(name="Muon", lr=3e-3),
    "transformers.optimization.Adafactor": Optim(
        name="transformers.optimization.Adafactor",
        lr=3e-3,
        options={"scale_parameter": False, "relative_step": False},
    ),
    "bitsandbytes.optim.AdamW8bit": Optim(name="bitsandbytes.optim.AdamW8bit", lr=3e-3, options={"min_8bit_size": 16}),
    "prodigyopt.Prodigy": Optim(name="prodigyopt.Prodigy", lr=1.0, options={"d0": 1e-4}),
    "RMSprop": Optim(name="RMSprop", lr=1e-3),
    "torch.optim.SGD": Optim(name="torch.optim.SGD", lr=3e-2),
}


def learn(net, optimizer, steps):
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(x, torch.zeros(64)) - x.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_learns_and_its_state_goes_on(kind):
    package = kind.split(".")[0] if "." in kind else "torch"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    torch.manual_seed(0)
    net = MLP(dim=2, width=16, depth=1)
    make = lambda net: optimizer_of(KINDS[kind], list(net.parameters()), "student")
    optimizer = make(net)
    losses = learn(net, optimizer, 60)
    assert losses[-1] < 0.7 * losses[0]
    again, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    resumed = make(again)
    resumed.load_state_dict(state)
    assert learn(net, optimizer, 5) == learn(again, resumed, 5)


def test_a_class_gets_what_its_signature_takes():
    settings = Optim(lr=0.1, weight_decay=0.2, betas=[0.3, 0.4], eps=0.5)
    taken = {"lr": 0.1, "weight_decay": 0.2}
    assert keywords_of(torch.optim.SGD, settings, "student") == taken
    assert keywords_of(torch.optim.Adafactor, settings, "student") == taken, "its eps is a pair"
    assert keywords_of(torch.optim.Muon, settings, "student") == taken | {"eps": 0.5}
    assert keywords_of(torch.optim.AdamW, settings, "student") == taken | {"eps": 0.5, "betas": (0.3, 0.4)}
    settings.options = {"momentum": 0.9}
    assert optimizer_of(
        settings.__class__(name="SGD", options={"momentum": 0.9}), [torch.nn.Parameter(torch.ones(2))], "x"
    )
    with pytest.raises(BadInput, match=r"optim.student.options.momentum: AdamW has no such argument"):
        keywords_of(torch.optim.AdamW, settings, "student")


def test_muon_moves_matrices_by_muon_and_vectors_by_adamw():
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in (matrix, vector)]
    settings = Optim(name="Muon", lr=0.1, weight_decay=0.01, betas=[0.8, 0.9], eps=1e-6)
    ours = optimizer_of(settings, [matrix, vector], "student")
    muon = torch.optim.Muon(twins[:1], lr=0.1, weight_decay=0.01, eps=1e-6, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(twins[1:], lr=0.1, weight_decay=0.01, betas=(0.8, 0.9), eps=1e-6)
    for i in range(3):
        for p, q in zip((matrix, vector), twins):
            p.grad = q.grad = torch.full_like(p, 0.5 + i)
        ours.step(), muon.step(), adam.step()
    assert torch.equal(matrix, twins[0]) and torch.equal(vector, twins[1])
    alone = optimizer_of(settings, [matrix], "student")
    assert isinstance(alone, torch.optim.Muon), "of matrices alone, as those of a LoRA"
    assert alone.param_groups[0]["adjust_lr_fn"] == "match_rms_adamw", "one learning rate means one size of steps"


def test_another_package_has_to_be_allowed_and_installed(monkeypatch):
    module = types.ModuleType("outside")
    module.Plain = type("Plain", (torch.optim.SGD,), {"__module__": "outside"})
    module.Other = type("Other", (), {"__module__": "outside"})
    monkeypatch.setitem(sys.modules, "outside", module)
    build = lambda name, *allow: build_experiment(tiny.recipe(f"optim.student.name={name}"), allow)
    with pytest.raises(BadInput, match=r"optim.student.name: .*--allow outside"):
        build("outside.Plain")
    assert build("outside.Plain", "outside").method.optim["student"].name == "outside.Plain"
    with pytest.raises(BadInput, match="optim.student.name: outside has no 'Other'"):
        build("outside.Other", "outside")
    with pytest.raises(BadInput, match="'absent_package' is not installed"):
        build("absent_package.Adam", "absent_package")
    with pytest.raises(BadInput, match="x: absent_package is not installed.*pip install absent_package,"):
        optimizer_class("absent_package.inner.Adam", "x")
    with pytest.raises(BadInput, match="--allow os"):
        build("os.system")
    for reads_files in ("torch.hub.load", "torch.load"):  # of a package that needs no --allow
        with pytest.raises(BadInput, match="optim.student.name"):
            build(reads_files)
    with pytest.raises(BadInput, match=r"transformers.optimization.Adafactor refuses its settings"):
        build("transformers.optimization.Adafactor", "transformers")


# -- on resume -------------------------------------------------------------------------------------------------------

CHANGES = ("lr=0.01", "weight_decay=20.0", "betas=[0.9,0.9]", "eps=0.1", "clip=1.0e-6")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """The weights after eight steps, four of them resumed under changed settings."""

    def run(name, kind, *changes):
        folder = tmp_path_factory.mktemp("runs") / "run"
        keys = [f"optim.student.name={kind}"]
        tiny.train(folder, *keys, "train.steps=4", name="teacher")
        tiny.train(
            folder, *keys, "train.steps=8", *(f"optim.student.{c}" for c in changes), name="teacher", resume=True
        )
        state = checkpoints.load(checkpoints.latest(folder / "checkpoints"))
        assert state["step"] == 8
        return torch.cat([v.flatten() for v in state["networks"]["student"].values()])

    return run


def test_changed_settings_of_an_optimizer_are_in_force_on_resume(ended):
    same = ended("same", "AdamW")
    for change in CHANGES:
        assert not torch.equal(ended(change.split("=")[0], "AdamW", change), same), change


def test_another_optimizer_on_resume_is_refused(tmp_path):
    tiny.train(tmp_path / "run", "train.steps=1")
    with pytest.raises(BadInput, match="--resume: optim.student.name is SGD but was AdamW"):
        tiny.train(tmp_path / "run", "train.steps=2", "optim.student.name=SGD", resume=True)


def test_a_stock_trainer_resumes_with_the_methods_own_settings(tmp_path):
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from distill.denoise import Denoiser
    from distill.methods import Diffusion
    from distill.noise import RectifiedFlow

    def fit(steps, decay, **kw):
        torch.manual_seed(0)
        role = Denoiser(MLP(dim=2, width=8, depth=1), RectifiedFlow(), "flow")
        method = Diffusion({"student": role}, optim={"student": {"weight_decay": decay}})
        data = torch.utils.data.DataLoader([{"x": torch.randn(2)} for _ in range(16)], batch_size=4)
        saves = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
        lightning.Trainer(max_steps=steps, callbacks=[saves], **quiet).fit(method, data, **kw)
        return method.placement.optimizers["student"].param_groups[0]["weight_decay"]

    assert fit(2, 0.1) == 0.1
    assert fit(4, 0.5, ckpt_path=tmp_path / "last.ckpt") == 0.5
