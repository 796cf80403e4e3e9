"""Any Method under a stock `lightning.Trainer`: counting, logging, checkpoints, resume, ddp, and what is refused."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
import warnings
from pathlib import Path

import lightning
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from distill import methods
from distill.data.toy import Samples
from distill.denoise import Denoiser, GaussianMixture
from distill.errors import BadInput
from distill.models.small import MLP
from distill.noise import RectifiedFlow
from distill.training.experiment import build_experiment

RECIPES = sorted(path.stem for path in tiny.TOY.glob("*.yaml"))
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def mixture():
    return GaussianMixture.ring(3, 1.0, 0.2, schedule=RectifiedFlow())


def tdm(seed=0, **options):
    torch.manual_seed(seed)
    student = Denoiser(MLP(dim=2, width=16, depth=1), RectifiedFlow(), "flow")
    roles = {"teacher": mixture(), "student": student, "critic": "student"}
    settings = {"critic": {"lr": 2e-3}, "student": {"lr": 1e-3, "decay": "cosine"}}
    return methods.TDM(roles, grid=2, student_every=5, optim=settings, **options)


def trainer(folder, steps, callbacks=(), logger=False, **options):
    saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    return lightning.Trainer(
        max_steps=steps,
        default_root_dir=folder,
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=saves,
        **(QUIET | options),
    )


def data(batch_size=8):
    return Samples(mixture(), batch_size)


def weights(method):
    return {k: v.clone() for k, v in method.state_dict().items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_method_ends_at_max_steps_and_counts_passes(recipe, tmp_path):
    experiment = build_experiment(tiny.recipe(name=recipe))
    runner = trainer(tmp_path, 3)
    runner.fit(experiment.method, experiment.data)
    assert runner.global_step == experiment.method.step == experiment.method.total_steps == 3
    assert len(runner.optimizers) == len(experiment.method.trainable)


class Rates(lightning.Callback):
    """Keeps the student's learning rate of each pass, and the total of the schedule."""

    def __init__(self):
        self.rates, self.totals = [], set()

    def on_train_batch_end(self, trainer, method, *_):
        self.rates.append(method.placement.optimizers["student"].param_groups[0]["lr"])
        self.totals.add(method.total_steps)


def finite(batches=4, batch_size=8, dim=2):
    x = torch.randn(batches * batch_size, dim)
    return torch.utils.data.DataLoader(torch.utils.data.StackDataset(x=x), batch_size=batch_size)


def epochs(folder, number, callbacks, **options):
    return trainer(folder, -1, callbacks, max_epochs=number, **options)


def test_epochs_set_the_length_of_the_schedules(tmp_path):
    """Cosine over 3 epochs of 4 batches: 1e-3 (1 + cos(pi k / 12)) / 2 at pass k."""
    method, rates = tdm(), Rates()
    epochs(tmp_path, 3, [rates]).fit(method, finite())
    assert rates.totals == {12} and method.step == 12
    expected = [1e-3 * (1 + math.cos(math.pi * k / 12)) / 2 for k in (0, 5, 10)]
    assert [rates.rates[k] for k in (0, 5, 10)] == pytest.approx(expected)


def test_the_earlier_of_steps_and_epochs_ends_the_schedule(tmp_path):
    for steps, number, total in ((5, 3, 5), (50, 2, 8)):
        rates = Rates()
        trainer(tmp_path, steps, [rates], max_epochs=number).fit(tdm(), finite())
        assert rates.totals == {total}


def test_a_second_fit_continues_the_count_and_a_resumed_one_ends_where_the_first_would(tmp_path):
    method, rates = tdm(), Rates()
    epochs(tmp_path, 2, [rates]).fit(method, finite())
    epochs(tmp_path, 1, [rates]).fit(method, finite())
    assert rates.totals == {8, 12} and method.step == 12
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    epochs(tmp_path, 2, [saves]).fit(tdm(), finite())
    rates, resumed = Rates(), tdm()
    epochs(tmp_path, 2, [rates]).fit(resumed, finite(), ckpt_path=tmp_path / "step=5.ckpt")
    assert rates.totals == {8} and len(rates.rates) == 3 and resumed.step == 8


def test_progressive_halves_over_the_epochs(tmp_path):
    experiment = build_experiment(tiny.recipe("method.warm_start=0", "method.rung_steps=null", name="progressive"))
    rungs = []
    seen = lightning.pytorch.callbacks.LambdaCallback(
        on_train_batch_end=lambda t, method, *_: rungs.append(method.rung)
    )
    epochs(tmp_path, 2, [seen]).fit(experiment.method, finite(2 * len(experiment.method.ladder), dim=1))
    assert rungs == [k for k in range(len(experiment.method.ladder)) for _ in range(4)]


@pytest.mark.parametrize("method", [tdm, lambda: build_experiment(tiny.recipe(name="ect")).method])
def test_a_trainer_without_end_is_refused_where_a_schedule_needs_one(method, tmp_path):
    with pytest.raises(BadInput, match=r"has no end: give Trainer\(max_steps=...\)"):
        trainer(tmp_path, -1).fit(method(), data())


def test_a_pass_in_which_no_student_steps_counts_too(tmp_path):
    """The student steps in each fifth pass; checkpoints lie at passes 10 and 20 of 23."""
    method, saves = tdm(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=10, save_top_k=-1)
    runner = trainer(tmp_path, 23, [saves])
    runner.fit(method, data())
    assert runner.global_step == 23
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["step=10.ckpt", "step=20.ckpt"]


def test_losses_and_rates_reach_the_loggers(tmp_path):
    pytest.importorskip("tensorboard")
    loggers = [
        CSVLogger(tmp_path / "csv"),
        TensorBoardLogger(tmp_path / "board"),
    ]
    runner = trainer(tmp_path, 10, [LearningRateMonitor("step")], loggers, log_every_n_steps=1)
    runner.fit(tdm(), data())
    with open(Path(loggers[0].log_dir) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = {int(r["step"]): float(r["critic/loss"]) for r in rows if r["critic/loss"]}
    assert sorted(losses) == list(range(10)) and len(set(losses.values())) == 10
    assert len({r["student/loss"] for r in rows if r["student/loss"]}) == 2, "the student steps in each fifth pass"
    rates = [float(r["lr-AdamW-1"]) for r in rows if r.get("lr-AdamW-1")]
    assert rates[0] == pytest.approx(1e-3) and rates[-1] < 0.6e-3, "cosine over the Trainer's own max_steps"
    assert list((tmp_path / "board").rglob("events.*"))


WANDB = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/training"]
from lightning.pytorch.loggers import WandbLogger
from test_stock_trainer import data, tdm, trainer

logger = WandbLogger(project="distill", save_dir={folder!r}, offline=True)
trainer({folder!r}, 3, [], [logger], log_every_n_steps=1).fit(tdm(), data())
assert logger.experiment.summary["critic/loss"] > 0 and logger.experiment.summary["trainer/global_step"] == 2
logger.experiment.finish()
"""


def test_losses_reach_wandb_offline(tmp_path):
    """In a process of its own: Lightning's logger sets WANDB_MODE for good."""
    program = WANDB.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    assert list(tmp_path.glob("wandb/offline-run-*"))


QUICK = ("tdm", "progressive", "consistency", "dmd2", "ladd")  # the other recipes resume in `make test-all`


@pytest.mark.parametrize("recipe", [r if r in QUICK else pytest.param(r, marks=pytest.mark.slow) for r in RECIPES])
def test_a_resumed_fit_goes_on_bit_for_bit(recipe, tmp_path):
    def one():
        return build_experiment(tiny.recipe("method.ema=0.9", name=recipe))

    whole = one()
    trainer(tmp_path, 7).fit(whole.method, whole.data)
    first, saves = one(), ModelCheckpoint(tmp_path / "c", every_n_train_steps=3, save_top_k=-1)
    trainer(tmp_path, 7, [saves]).fit(first.method, first.data)
    (path,) = (tmp_path / "c").glob("*step=3.ckpt")
    kept = torch.load(path, weights_only=False)["state_dict"]
    assert not any(k.startswith("teacher.") for k in kept), "frozen networks are read from their source"
    second = one()
    torch.manual_seed(99)
    second.method.total_steps = 0
    runner = trainer(tmp_path, 7)
    runner.fit(second.method, second.data, ckpt_path=path)
    assert runner.global_step == second.method.step == 7
    for name, value in weights(whole.method).items():
        assert torch.equal(value, weights(second.method)[name]), name
    assert torch.equal(whole.method.shared.get_state(), second.method.shared.get_state())


class Resumable:
    """A loader of another library: passes over 40 rows, each in another order; its state is the next batch."""

    def __init__(self):
        x, label = mixture().sample(40, torch.Generator().manual_seed(0))
        self.rows, self.next = [{"x": a.float(), "label": b} for a, b in zip(x, label)], 0

    def __iter__(self):
        while True:
            epoch, batch = divmod(self.next, 5)
            order = torch.randperm(40, generator=torch.Generator().manual_seed(epoch)).tolist()
            self.next += 1
            (rows,) = torch.utils.data.DataLoader(
                self.rows, batch_sampler=[order[8 * batch : 8 * batch + 8]], generator=torch.Generator()
            )
            yield rows

    def __len__(self):
        return 100

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def test_a_foreign_loader_with_a_state_resumes_bit_for_bit(tmp_path):
    whole, second, saves = tdm(), tdm(seed=1), ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1)
    torch.manual_seed(5)
    trainer(tmp_path, 12, [saves]).fit(whole, Resumable())
    (path,) = tmp_path.glob("*step=7.ckpt")
    torch.manual_seed(99)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(not resumable|no length)")
        trainer(tmp_path, 12).fit(second, Resumable(), ckpt_path=path)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


def test_a_loader_with_a_state_and_no_length_is_warned_of(tmp_path):
    class Endless(Resumable):
        __len__ = None

    with pytest.warns(UserWarning, match="Endless has a state but no length, .* Give it a __len__"):
        trainer(tmp_path, 1).fit(tdm(), Endless())


def test_any_loader_of_dictionaries_trains_and_a_plain_one_is_warned_of(tmp_path):
    x, label = mixture().sample(64, torch.Generator().manual_seed(0))
    rows = [{"x": a.float(), "label": b} for a, b in zip(x, label)]
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=3)

    def loader():
        return torch.utils.data.DataLoader(rows, batch_size=8)

    trainer(tmp_path, 3, [saves]).fit(tdm(), loader())
    with pytest.warns(UserWarning, match="dataloader is not resumable"):
        trainer(tmp_path, 5).fit(tdm(), loader(), ckpt_path=saves.best_model_path)
    pairs = torch.utils.data.DataLoader([(a.float(), b) for a, b in zip(x, label)], batch_size=8)
    with pytest.raises(BadInput, match="yields list; a method trains on dictionaries"):
        trainer(tmp_path, 3).fit(tdm(), pairs)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}, "pytorch-lightning_version": lightning.__version__, "loops": {}, "epoch": 0}, path)
    with pytest.raises(BadInput, match="no state of a distill method"):
        trainer(tmp_path, 3).fit(tdm(), data(), ckpt_path=path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gradient_clip_val": 1.0}, "gradient clipping is not supported"),
        ({"accumulate_grad_batches": 2}, "gradient accumulation is not supported"),
        ({"precision": "bf16-true"}, 'use "bf16-mixed"'),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message, tmp_path):
    with pytest.raises(Exception, match=message):
        trainer(tmp_path, 3, **options).fit(tdm(), data())


def test_a_step_by_hand(tmp_path):
    method = tdm()
    before = weights(method)
    method.training_step(next(iter(data())))
    assert method.step == 1 and any(not torch.equal(v, before[k]) for k, v in weights(method).items())


DDP = """
import sys, torch
sys.path[:0] = [{tests!r}, {tests!r} + "/training"]
from test_stock_trainer import data, tdm, trainer, weights

if __name__ == "__main__":
    method = tdm()
    runner = trainer({folder!r}, 6, devices=2, strategy="ddp")
    runner.fit(method, data())
    assert runner.global_step == 6
    if runner.is_global_zero:
        torch.save(weights(method), {folder!r} + "/stock.pt")
"""


def test_two_processes_of_stock_ddp_equal_our_own(tmp_path):
    from reference import launch

    tests = str(Path(__file__).parents[1])
    script = tmp_path / "stock.py"
    script.write_text(DDP.format(tests=tests, folder=str(tmp_path)))
    subprocess.run([sys.executable, str(script)], check=True, timeout=300)
    ours = tmp_path / "ours.py"
    ours.write_text(OURS.format(tests=tests, folder=str(tmp_path)))
    launch(tmp_path, [str(ours)])
    stock, own = (torch.load(tmp_path / f"{name}.pt") for name in ("stock", "ours"))
    assert stock.keys() == own.keys()
    for name, value in own.items():
        torch.testing.assert_close(stock[name], value, rtol=1e-5, atol=1e-5, msg=name)


OURS = """
import sys, torch
sys.path[:0] = [{tests!r}, {tests!r} + "/training"]
from distill.config.schema import Engine
from distill.training import launch
from distill.training.trainer import fit
from test_stock_trainer import data, tdm, weights

engine = Engine(strategy="ddp", devices=2, accelerator="cpu")
launch.join_processes(engine)
method = tdm()
fit(method, data(), 6, engine=engine)
if torch.distributed.get_rank() == 0:
    torch.save(weights(method), {folder!r} + "/ours.pt")
"""
