"""`distill check`: healthy runs raise no false alarm, a checked run is left as it was, and what the verbs do with faults.

The faults that it finds are in tests/inspect/test_check_faults.py.
"""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from checks import DIGITS, ROOT, TOYS, digits, failed, look, many_latents, spoilt, toy
from click.testing import CliRunner

from distill import config, noise
from distill.cli import main
from distill.data import prepare
from distill.data.toy import Conditions
from distill.inspect.check import findings
from distill.training.experiment import build_experiment


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


# -- no false alarm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", TOYS, ids=lambda p: p.stem)
def test_healthy_toys_pass(recipe, tmp_path):
    cfg = config.load([recipe], ["train.threads=1", "data.batch_size=128"])
    found = findings(build_experiment(cfg), tmp_path)
    print(*found, sep="\n")
    assert not failed(found) and {f.name for f in found} >= {"data", "teacher", "sign", "gradients", "disk"}


SOON = ("tdm", "scm", "consistency", "mmd")  # the other recipes of the digits are `make test-all`
RECIPES = sorted(p.stem for p in DIGITS.glob("*.yaml") if p.stem != "base")


@pytest.mark.parametrize("recipe", [pytest.param(n, marks=[] if n in SOON else [pytest.mark.slow]) for n in RECIPES])
def test_healthy_digits_pass(recipe, shards, tmp_path, monkeypatch):
    from distill.inspect.check import signs, updates

    monkeypatch.setattr(updates, "BATCH", 4)
    monkeypatch.setattr(signs, "SEEDS", (1,))
    found = look(
        digits(shards, name=recipe),
        tmp_path,
        "data",
        "guidance",
        "start",
        "grid",
        "disk",
        "settings",
        "sign",
        "rates",
        "conditions",
        "finite",
        "gradients",
    )
    print(*found, sep="\n")
    assert not failed(found) and {f.name for f in found} >= {"guidance", "grid", "sign", "rates"}


@pytest.mark.parametrize("schedule", ["VE", "VPLinear", "VPCosine", "TrigFlow", "RectifiedFlow"])
def test_an_exact_teacher_passes_under_every_schedule(tmp_path, schedule):
    experiment = toy()
    experiment.method.teacher.schedule = getattr(noise, schedule)()
    found = look(experiment, tmp_path, "teacher")
    assert [f.level for f in found] == ["ok"], found


def test_a_folder_without_references_is_compared_with_its_scheduler(shards, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(ROOT / "checkpoints" / "digits-teacher", folder)
    (folder / "reference.safetensors").unlink()
    assert [f.level for f in look(digits(shards, f"roles.teacher.path={folder}"), tmp_path, "pipeline")] == ["ok"]


def one_class(shards):
    """The threes of a teacher of ten classes."""
    experiment = digits(shards)
    every = experiment.data.all()
    x = every["x"][every["label"] == 3]
    experiment.data.loader = lambda *a: (
        {"x": x[i : i + 16], "label": torch.full((16,), 3)} for i in range(0, len(x) - 16, 16)
    )
    return experiment


def one_sample(shards):
    """A run on one sample, which must be learnt by heart."""
    experiment = digits(shards)
    batch = {k: v[:1].repeat(16, *[1] * (v.ndim - 1)) for k, v in next(experiment.data.loader(0, 1, 0)).items()}
    experiment.data.loader = lambda *a: iter([batch] * 20)
    experiment.data.info = experiment.data.info.__class__(**vars(experiment.data.info) | {"count": 1})
    return experiment


def long_tailed(shards):
    """Nine of ten samples are of one class."""
    experiment = digits(shards)
    every = experiment.data.all()
    ones = torch.cat([torch.nonzero(every["label"] == 1)[:, 0].repeat(8), torch.arange(160)])
    order = ones[torch.randperm(len(ones), generator=torch.Generator().manual_seed(0))]
    experiment.data.loader = lambda *a: (
        {"x": every["x"][i], "label": every["label"][i]} for i in order[: len(order) // 16 * 16].split(16)
    )
    return experiment


# Healthy but unusual runs: how each is made, and the checks that may warn of what is unusual in it.
UNUSUAL = {
    "one class of ten": (one_class, {"data"}),
    "one sample": (one_sample, {"data", "batch", "guidance"}),
    "long-tailed classes": (long_tailed, {"data"}),
    "MMD on 512 latents": (lambda shards: many_latents("[0.2, 0.5, 1.0, 2.0]"), set()),
    "no labels": (lambda shards: spoilt(digits(shards), label=lambda v: torch.full_like(v, -1)), set()),
    "noisy pictures": (
        lambda shards: spoilt(digits(shards), x=lambda x: (x + 0.1 * torch.randn_like(x)).clamp(-1, 1)),
        set(),
    ),
    "batch of one": (lambda shards: digits(shards, "data.batch_size=1", name="tdm"), set()),
    "bfloat16": (lambda shards: digits(shards, "engine.precision=bf16"), set()),
    "float16": (lambda shards: digits(shards, "engine.precision=16"), set()),
    "adapters": (
        lambda shards: digits(shards, "roles.layout=shared_base", "roles.adapter={rank: 4}", name="tdm"),
        set(),
    ),
    "one step, high guidance": (lambda shards: digits(shards, "method.grid=1", "method.guidance=4", name="tdm"), set()),
    "long warm-up": (lambda shards: digits(shards, "optim.student.warmup=200", name="tdm"), set()),
    "SGD with a small clip": (
        lambda shards: digits(shards, "optim.student={name: SGD, lr: 0.1, clip: 0.01}"),
        set(),
    ),
    "ten critic turns": (lambda shards: digits(shards, "method.student_every=10", name="dmd2"), set()),
    "few classes, mirrored at random": (
        lambda shards: spoilt(digits(shards), x=lambda x: torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(3))),
        set(),
    ),
    "VE": (
        lambda shards: toy(
            "roles.teacher.schedule={_target_: distill.noise.VE}",
            "roles.student.schedule={_target_: distill.noise.VE}",
            "roles.student.prediction=edm",
        ),
        set(),
    ),
    "labels alone": (lambda shards: without_samples(digits(shards, name="tdm")), set()),
}


def without_samples(experiment):
    experiment.data = Conditions([1, 8, 8], 10, 16)
    return experiment


FAST_UNUSUAL = ("one class of ten", "one sample", "bfloat16", "MMD on 512 latents", "long-tailed classes")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST_UNUSUAL else [pytest.mark.slow]) for n in UNUSUAL]
)
def test_healthy_but_unusual_runs_pass(name, shards, tmp_path, monkeypatch):
    from distill.inspect.check import signs, updates

    monkeypatch.setattr(updates, "BATCH", 8)
    monkeypatch.setattr(signs, "SEEDS", (1,))
    build, may_warn = UNUSUAL[name]
    found = look(build(shards), tmp_path)
    print(*found, sep="\n")
    assert not failed(found) and {f.name for f in found if f.level == "WARN"} <= may_warn
    assert not any("failed to run" in f.text for f in found)


def test_narrow_kernels_are_not_called_a_turned_sign(tmp_path):
    found = look(many_latents("[0.05, 0.1, 0.2, 0.4]"), tmp_path, "data", "sign")
    assert [(f.name, f.level) for f in found if f.level in ("FAIL", "skipped")] == [
        ("data", "FAIL"),
        ("sign", "skipped"),
    ]


def test_the_words_of_a_teachers_run_name_no_critic(shards, tmp_path):
    """A run of method Diffusion has neither critic nor teacher, so no finding may speak of them, healthy or not."""
    for keys in ([], ["optim.student.lr=1e-9"], ["optim.student.lr=3"], ["method.ema=0.99999"]):
        for finding in look(
            toy("roles.student.net.depth=2", *keys, name="teacher"), tmp_path, "sign", "rates", "settings"
        ):
            assert "critic" not in finding.text and "teacher" not in finding.text, finding


def test_a_loaded_student_may_be_untrained_where_no_teacher_is_distilled(shards, tmp_path):
    """A folder of random weights is a start of `Diffusion`, and of consistency training; a teacher must denoise."""
    for name, level in (("ect", "WARN"), ("tdm", "FAIL")):
        experiment = digits(shards, name=name)
        with torch.no_grad():
            for role in ("student", "teacher"):
                if experiment.method.role(role) is not None:
                    for p in experiment.method.role(role).parameters():
                        p.normal_(0, 0.3, generator=torch.Generator().manual_seed(p.numel()))
        (found,) = look(experiment, tmp_path, "teacher")
        assert found.level == level and "worse than a linear map" in found.text, found
        assert found.text.endswith("Continue if it starts untrained.") == (level == "WARN")


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


# -- the command line --------------------------------------------------------------------------------------------------


def distill(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def quick(monkeypatch):
    """Settings alone, to see what the verbs do with what a check says."""
    from distill.inspect import check

    monkeypatch.setattr(check, "_dry_run", lambda p: [])
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
    assert distill("train", *keys, "train.steps=3", "--resume").exit_code == 0, "a run that continues was checked again"


def test_a_checked_run_equals_one_that_was_not(tmp_path):
    from distill.training import run_folder

    keys = [tiny.TOY / "teacher.yaml", *tiny.SMALL, "train.steps=2", "--runs"]
    checked, plain = distill("train", *keys, tmp_path / "a"), distill("train", *keys, tmp_path / "b", "--no-check")
    assert checked.exit_code == plain.exit_code == 0 and "checks passed" in checked.stdout
    assert "checks passed" not in plain.stdout
    assert tiny.same(
        run_folder.latest_state(tmp_path / "a" / "toy-teacher"), run_folder.latest_state(tmp_path / "b" / "toy-teacher")
    )
