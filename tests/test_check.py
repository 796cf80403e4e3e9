"""`distill check`: every injected fault is named by the check that is there for it; healthy recipes raise none."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner

from distill import config, noise
from distill.cli import main
from distill.data import prepare
from distill.inspect.check import findings
from distill.losses.regression import mse
from distill.methods.consistency import Consistency
from distill.methods.guidance import Guidance
from distill.methods.tdm import TDM
from distill.noise import RectifiedFlow, Schedule, Table
from distill.training.experiment import build_experiment

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "configs" / "digits"
TOYS = sorted(tiny.TOY.glob("*.yaml"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "digits"
    prepare.digits(out)
    return out


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes name checkpoints/ from there
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def digits(shards, *overrides: str, name: str = "consistency"):
    keys = [f"data.path={shards}/train", f"eval.reference.path={shards}/test", "data.batch_size=16", "train.threads=1"]
    return build_experiment(config.load([DIGITS / f"{name}.yaml"], [*keys, *overrides]), allow=("test_check",))


def toy(*overrides: str, name: str = "tdm"):
    keys = ["data.batch_size=32", "train.threads=1", "roles.student.net.width=16", "roles.student.net.depth=1"]
    return build_experiment(config.load([tiny.TOY / f"{name}.yaml"], [*keys, *overrides]), allow=("test_check",))


def look(experiment, folder: Path, *only: str):
    """Findings, of the named checks alone if there are any."""
    from distill.inspect import check

    with pytest.MonkeyPatch.context() as patch:
        if only:
            patch.setattr(check, "CHECKS", {k: v for k, v in check.CHECKS.items() if k in only})
        if only and not set(only) & {"gradients", "sign", "rates"}:
            patch.setattr(check, "dry_run", lambda p: ())
        return findings(experiment, folder)


def caught(experiment, folder: Path, name: str, *says: str, level: str = "FAIL", only: bool = True) -> None:
    """`name` says this at this level."""
    found = look(experiment, folder, *([name] if only else []))
    texts = [f.text for f in found if f.name == name and f.level == level]
    assert any(all(s in text for s in says) for text in texts), "\n".join(map(str, found))


def failed(found) -> list[str]:
    return [str(f) for f in found if f.level == "FAIL"]


# -- no false alarm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", TOYS, ids=lambda p: p.stem)
def test_healthy_toys_pass(recipe, tmp_path):
    cfg = config.load([recipe], ["train.threads=1", "data.batch_size=128"])
    found = findings(build_experiment(cfg), tmp_path)
    assert not failed(found) and {f.name for f in found} >= {"data", "teacher", "sign", "gradients", "disk"}


@pytest.mark.parametrize("recipe", sorted(p.stem for p in DIGITS.glob("*.yaml") if p.stem != "base"))
def test_healthy_digits_pass(recipe, shards, tmp_path, monkeypatch):
    from distill.inspect.check import updates

    monkeypatch.setattr(updates, "BATCH", 4)
    monkeypatch.setattr(updates, "SEEDS", (1,))
    found = look(digits(shards, name=recipe), tmp_path, "data", "guidance", "start", "grid", "disk", "settings", "sign")
    assert not failed(found) and {f.name for f in found} >= {"guidance", "grid", "sign", "rates"}


@pytest.mark.parametrize("schedule", ["VE", "VPLinear", "VPCosine", "TrigFlow", "RectifiedFlow"])
def test_an_exact_teacher_passes_under_every_schedule(tmp_path, schedule):
    experiment = toy()
    experiment.method.teacher.schedule = getattr(noise, schedule)()
    found = look(experiment, tmp_path, "teacher")
    assert [f.level for f in found] == ["ok"], found


# -- the experiment is left as it was ---------------------------------------------------------------------------------


def test_a_checked_experiment_is_bit_identical(tmp_path):
    def state(experiment):
        method = experiment.method
        flags = [p.requires_grad for p in method.parameters()], [m.training for m in method.modules()]
        drawn = torch.get_rng_state().clone(), method.shared.get_state().clone()
        weights = {k: v.clone() for k, v in method.state_dict().items()}
        return weights, flags, drawn, method.step, method.total_steps, method.logs, set(vars(method))

    experiment = toy(name="dmd2")
    before, placement = state(experiment), experiment.method.placement
    findings(experiment, tmp_path)
    after = state(experiment)
    assert tiny.same(list(before[:6]), list(after[:6])) and before[6] == after[6]
    assert experiment.method.placement is placement and all(p.grad is None for p in experiment.method.parameters())


# -- conventions of the teacher --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["eps", "x", "flow"])
def test_a_wrong_prediction_type(shards, tmp_path, wrong):
    experiment = digits(shards)
    experiment.method.teacher.prediction = wrong
    caught(experiment, tmp_path, "teacher", f"roles.teacher.prediction: {wrong} fits the network worse than v; set v")


@pytest.mark.parametrize("shift", [3.0, 1 / 3])
def test_a_shifted_schedule(shards, tmp_path, shift):
    experiment = digits(shards)
    experiment.method.teacher.schedule = Table.of(RectifiedFlow(shift))
    caught(experiment, tmp_path, "teacher", "roles.teacher.schedule", "expects another noise level")


@dataclass(frozen=True)
class Swapped(Schedule):
    """Signal and noise in each other's place."""

    def alpha(self, t):
        return t

    def sigma(self, t):
        return 1 - t


def test_swapped_alpha_and_sigma(shards, tmp_path):
    experiment = digits(shards)
    experiment.method.teacher.schedule = Swapped()
    caught(experiment, tmp_path, "teacher", "alpha and sigma are swapped")


@pytest.mark.parametrize(
    "conditions, says", [(lambda t: 1 - t, "give it 1 - t"), (lambda t: t / 1000, "give it 1000 t")]
)
def test_a_wrong_time(shards, tmp_path, conditions, says):
    experiment = digits(shards)
    net = experiment.method.teacher.net
    forward = net.forward
    net.forward = lambda x, t, **kw: forward(x, conditions(t), **kw)
    caught(experiment, tmp_path, "teacher", says)


@pytest.mark.parametrize("scale", [5.0, 0.2])
def test_data_on_another_scale(shards, tmp_path, scale):
    experiment = digits(shards)
    load = experiment.data.loader
    experiment.data.loader = lambda *a: ({**b, "x": scale * b["x"]} for b in load(*a))
    caught(experiment, tmp_path, "teacher", f"multiply them by about {1 / scale:.3g}")


def test_a_teacher_that_learnt_nothing(shards, tmp_path):
    experiment = digits(shards)
    for p in experiment.method.teacher.parameters():
        torch.nn.init.normal_(p, std=0.3)
    caught(experiment, tmp_path, "teacher", "roles.teacher")


def test_an_oracle_of_other_data(tmp_path):
    experiment = toy()
    experiment.method.teacher.means *= 3
    caught(experiment, tmp_path, "teacher", "denoises worse than a linear map")


def test_weights_that_are_not_those_of_the_folder(shards, tmp_path):
    experiment = digits(shards)
    with torch.no_grad():
        next(experiment.method.teacher.parameters()).mul_(1.05)
    caught(experiment, tmp_path, "pipeline", "does not repeat the samples stored there")


def test_a_folder_without_references_is_compared_with_its_scheduler(shards, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(ROOT / "checkpoints" / "digits-teacher", folder)
    (folder / "reference.safetensors").unlink()
    experiment = digits(shards, f"roles.teacher.path={folder}")
    assert [f.level for f in look(experiment, tmp_path, "pipeline")] == ["ok"]
    experiment.method.teacher.prediction = "eps"
    caught(experiment, tmp_path, "pipeline", "does not repeat what its stock scheduler makes of the network")


# -- data ------------------------------------------------------------------------------------------------------------


def spoilt(experiment, **change):
    """The experiment with its batches changed: column -> function of the column."""
    load = experiment.data.loader
    experiment.data.loader = lambda *a: (
        {k: change[k](v) if k in change else v for k, v in b.items()} for b in load(*a)
    )
    return experiment


def test_nan_in_the_data(tmp_path):
    experiment = spoilt(toy(), x=lambda x: x.masked_fill(torch.arange(len(x))[:, None] == 3, torch.nan))
    caught(experiment, tmp_path, "data", "hold NaN or infinity", only=False)


def test_constant_labels(shards, tmp_path):
    caught(
        spoilt(digits(shards), label=torch.zeros_like), tmp_path, "data", "labels are all 0 though there are 10 classes"
    )


def test_labels_beyond_the_classes(shards, tmp_path):
    caught(spoilt(digits(shards), label=lambda v: v + 1), tmp_path, "data", "labels reach 10, but there are 10 classes")


def test_labels_in_another_order(shards, tmp_path):
    experiment = spoilt(digits(shards), label=lambda v: (v + 3) % 10)
    caught(experiment, tmp_path, "guidance", "denoises better without its condition", level="WARN")


def test_samples_that_are_all_the_same(tmp_path):
    caught(spoilt(toy(), x=torch.ones_like), tmp_path, "data", "samples are all the same")


def test_a_wrong_range_of_pixels(shards, tmp_path):
    caught(spoilt(digits(shards), x=lambda x: 8 * x + 8), tmp_path, "data", "values reach 16", "correct the range")


def test_a_wrong_sigma_data(tmp_path):
    caught(toy("method.sigma_data=20", name="scm"), tmp_path, "data", "method.sigma_data: 20 stands for")


def test_a_batch_larger_than_the_data(shards, tmp_path):
    experiment = digits(shards, "data.batch_size=2000")
    caught(experiment, tmp_path, "batch", "data.batch_size: 2000 is more than the 1438 samples")


def test_another_global_batch_than_the_recipe_says(shards, tmp_path):
    experiment = digits(shards, "expect={batch: 128}", "engine.accumulate=4")
    caught(experiment, tmp_path, "batch", "expect.batch is 128, but a step has 64")


# -- guidance and the start ------------------------------------------------------------------------------------------


def test_no_null_class_for_guidance(shards, tmp_path):
    experiment = digits(shards, "method.guidance=2.0")
    experiment.method.teacher.net.null_class = False
    caught(experiment, tmp_path, "guidance", "no class for 'no class'")


def test_a_null_condition_equal_to_the_condition(shards, tmp_path):
    experiment = digits(shards, "method.guidance=2.0")
    experiment.method.teacher.net.null = lambda cond: cond
    caught(experiment, tmp_path, "guidance", "the null condition equals the condition")


def test_a_teacher_deaf_to_its_condition(shards, tmp_path):
    experiment = digits(shards, "method.guidance=2.0")
    forward = experiment.method.teacher.net.forward
    experiment.method.teacher.net.forward = lambda x, t, label=None, **kw: forward(x, t, **kw)
    caught(experiment, tmp_path, "guidance", "changes nothing in its output")


def test_guidance_without_a_condition(tmp_path):
    caught(toy("method.guidance=2.0"), tmp_path, "guidance", "2 does nothing, because the data carries no condition")


@pytest.mark.parametrize("w", [0.0, 0.5, -1.0])
def test_guidance_below_one(shards, tmp_path, w):
    caught(digits(shards, f"method.guidance={w}"), tmp_path, "guidance", f"{w:g} is below 1", "w + 1", level="WARN")


def test_a_grid_off_the_scheduler(shards, tmp_path):
    caught(
        digits(shards, "method.grid=[1, 0.7, 0.31, 0]"), tmp_path, "grid", "method.grid", "LCMScheduler starts 3 steps"
    )
    caught(digits(shards, "method.grid=3", name="tdm"), tmp_path, "grid", "method.grid: DDIMScheduler")


def test_a_student_that_is_not_the_teacher_at_the_start(shards, tmp_path):
    experiment = digits(shards)
    with torch.no_grad():
        next(experiment.method.student.parameters()).mul_(1.1)
    caught(experiment, tmp_path, "start", "differs from the teacher before its first update")


def test_new_inputs_that_do_not_start_at_zero(shards, tmp_path):
    experiment = digits(shards, name="guidance")
    with torch.no_grad():
        experiment.method.student.net.guidance.outer.bias.add_(1.0)
    caught(experiment, tmp_path, "start", "new inputs w and s do not start at zero")


# -- signs, gradients and rates ----------------------------------------------------------------------------------------


class Away(Consistency):
    """Its loss with the wrong sign."""

    def loss(self, x, z, cond):
        return -super().loss(x, z, cond)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


class Uphill(Consistency):
    """The right value, its gradient turned round."""

    def loss(self, x, z, cond):
        return Reversed.apply(super().loss(x, z, cond))


class Pushing(TDM):
    """Teacher and critic in each other's place."""

    def student_loss(self, path, cond, conditions):
        teacher, critic = self.guided, self.critic
        vars(self)["guided"], self._modules["critic"] = critic, teacher
        try:
            return super().student_loss(path, cond, conditions)
        finally:
            vars(self).pop("guided")
            self._modules["critic"] = critic


class Fleeing(TDM):
    """A critic that leaves the student."""

    def critic_loss(self, path, cond, conditions):
        return -super().critic_loss(path, cond, conditions)


class Detached(Guidance):
    """A loss without the student in it."""

    def loss(self, x, z, cond):
        return mse(x.requires_grad_(), x.detach())


@pytest.mark.parametrize(
    "wrong, name, role",
    [
        ("Away", "consistency", "student"),
        ("Uphill", "consistency", "student"),
        ("Pushing", "tdm", "student"),
        ("Fleeing", "tdm", "critic"),
    ],
)
def test_a_turned_sign(tmp_path, wrong, name, role):
    experiment = toy(f"method._target_=test_check.{wrong}", name=name)
    caught(experiment, tmp_path, "sign", f"{role}'s", "a sign in its loss is wrong")


def test_a_turned_sign_on_images(shards, tmp_path):
    experiment = digits(shards, "method._target_=test_check.Pushing", name="tdm")
    caught(experiment, tmp_path, "sign", "student's update moves a shifted student further away")


def test_a_loss_without_its_role(tmp_path):
    experiment = toy("method._target_=test_check.Detached", name="guidance")
    caught(experiment, tmp_path, "gradients", "the loss of student's turn does not depend on student")


def test_a_frozen_role_that_requires_gradient(shards, tmp_path):
    experiment = digits(shards)
    experiment.method.teacher.requires_grad_(True)
    caught(experiment, tmp_path, "gradients", "frozen roles require gradients (teacher.")


def test_a_dead_parameter(tmp_path):
    experiment = toy(name="consistency")
    net = experiment.method.student.net
    net.forgotten = torch.nn.Linear(3, 3)
    experiment.method._parameters_of["student"] = list(experiment.method.student.parameters())
    caught(experiment, tmp_path, "gradients", "2 of ", "never get a gradient", "forgotten.weight", level="WARN")


def test_infinite_weights(tmp_path):
    experiment = toy(name="consistency")
    with torch.no_grad():
        next(experiment.method.student.parameters()).fill_(torch.inf)
    caught(experiment, tmp_path, "gradients", "student's")


@pytest.mark.parametrize("lr, level", [(1e3, "FAIL"), (0.03, "WARN"), (1e-11, "WARN")])
def test_a_learning_rate_out_of_all_proportion(tmp_path, lr, level):
    experiment = toy(f"optim.student.lr={lr}", name="consistency")
    caught(experiment, tmp_path, "rates", f"optim.student.lr: {lr:g} makes the first update", level=level)


# -- disk and settings -------------------------------------------------------------------------------------------------


def test_a_full_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 100))
    caught(toy(), tmp_path / "not" / "yet", "disk", "3 checkpoints", f"are free at {tmp_path}", "--runs")


@pytest.mark.parametrize(
    "keys, says",
    [
        (["method.ema=0.9999"], "method.ema: 0.9999 has a half-life of 6,931 steps"),
        (["optim.student.warmup=5000"], "optim.student.warmup: 5000 steps are not over"),
        (["train.validate_every=9999"], "train.validate_every: 9999 is never reached"),
        (["train.steps=100", "train.validate_every=0"], "method.warm_start: 500 steps, but the run has 100"),
        (["optim.critic.lr=0"], "optim.critic.lr: 0 trains nothing"),
        (["train.keep_best=2", "train.validate_every=0"], "train.keep_best: nothing is validated"),
    ],
)
def test_settings_that_never_come_into_play(tmp_path, keys, says):
    caught(toy(*keys), tmp_path, "settings", says, level="WARN")


# -- the command line --------------------------------------------------------------------------------------------------


def distill(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def quick(monkeypatch):
    """Settings alone, to see what the verbs do with what a check says."""
    from distill.inspect import check

    monkeypatch.setattr(check, "dry_run", lambda p: ())
    monkeypatch.setattr(check, "CHECKS", {k: check.CHECKS[k] for k in ("batch", "disk", "settings")})


def test_check_prints_a_line_each_and_exits_with_two_on_a_fault(quick, tmp_path):
    recipe = tiny.TOY / "teacher.yaml"
    good = distill("check", recipe, "--runs", tmp_path / "runs")
    assert good.exit_code == 0 and [line.split()[1] for line in good.stdout.splitlines()] == [
        "batch",
        "disk",
        "settings",
    ]
    bad = distill("check", recipe, "expect={batch: 7}")
    assert (
        bad.exit_code == 2 and "FAIL" in bad.stdout and bad.stderr.startswith("distill: check batch: expect.batch is 7")
    )
    assert not list(tmp_path.iterdir())


def test_train_refuses_a_fault_and_leaves_no_folder(quick, tmp_path):
    keys = [tiny.TOY / "teacher.yaml", *tiny.SMALL, "train.steps=2", "expect={batch: 7}", "--runs", tmp_path / "runs"]
    refused = distill("train", *keys)
    assert refused.exit_code == 2 and "--no-check" in refused.stderr and not (tmp_path / "runs").exists()
    assert distill("train", *keys, "--no-check").exit_code == 0
    assert distill("train", *keys, "train.steps=3", "--resume").exit_code == 0, "a run that goes on was checked again"


def test_a_checked_run_equals_one_that_was_not(tmp_path):
    from distill.training import run_folder

    keys = [tiny.TOY / "teacher.yaml", *tiny.SMALL, "train.steps=2", "--runs"]
    checked, plain = distill("train", *keys, tmp_path / "a"), distill("train", *keys, tmp_path / "b", "--no-check")
    assert checked.exit_code == plain.exit_code == 0 and "checks passed" in checked.stdout
    assert "checks passed" not in plain.stdout
    assert tiny.same(
        run_folder.latest_state(tmp_path / "a" / "toy-teacher"), run_folder.latest_state(tmp_path / "b" / "toy-teacher")
    )


def test_a_check_that_breaks_stops_nobody(tmp_path, monkeypatch):
    from distill.inspect import check

    monkeypatch.setattr(check, "CHECKS", {"data": lambda p: 1 / 0})
    monkeypatch.setattr(check, "dry_run", lambda p: ())
    assert [(f.level, "ZeroDivisionError" in f.text) for f in findings(toy(), tmp_path)] == [("WARN", True)]
