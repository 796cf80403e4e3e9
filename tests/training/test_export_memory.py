"""What reading a run and exporting its student costs in memory: one network, not one a role, and no moments."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch

from distill import config
from distill.data.toy import Conditions
from distill.inspect import results
from distill.models.copies import copy_network, share_weights
from distill.training import checkpoints
from distill.training.experiment import build_experiment
from distill.training.load import load_experiment

ROOT = Path(__file__).parents[2]
WIDTH, DEPTH, LIBC = 256, 4, ctypes.CDLL(None)

RECIPE = f"""
name: big
roles:
  teacher:
    _target_: distill.denoise.Denoiser
    net: {{_target_: distill.models.diffusers.DiT, size: 8, channels: 1, width: {WIDTH}, depth: {DEPTH}, heads: 4, classes: 4}}
    schedule: {{_target_: distill.noise.Table.of, schedule: {{_target_: distill.noise.RectifiedFlow}}}}
    prediction: v
method: {{_target_: distill.methods.TDM, grid: 2}}
data: {{_target_: {Conditions.__module__}.Conditions, shape: [1, 8, 8], classes: 4, batch_size: 2}}
optim: {{student: {{lr: 1.0e-4}}, critic: {{lr: 1.0e-4}}}}
"""


def anonymous() -> int:
    """Bytes of this process that belong to no file."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


class Peak:
    """The most such bytes within, beyond those at the start."""

    def __enter__(self):
        gc.collect()
        LIBC.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
        LIBC.malloc_trim(0)
        self.start = self.most = anonymous()
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.end.wait(0.002):
            self.most = max(self.most, anonymous())

    def __exit__(self, *error):
        self.end.set()
        self.thread.join()
        self.bytes = max(self.most, anonymous()) - self.start


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder as training leaves it, with moments that count."""
    folder = tmp_path_factory.mktemp("runs") / "big"
    recipe = folder.parent / "big.yaml"
    recipe.write_text(RECIPE)
    cfg = config.load([recipe], ["log.wandb=disabled"])
    experiment = build_experiment(cfg)
    experiment.method.configure_optimizers()
    for role in experiment.method.trainable:
        for p in getattr(experiment.method, role).parameters():
            p.grad = torch.ones_like(p)
        experiment.method.placement.bare_step(role)
    folder.mkdir()
    config.save(cfg, folder / "config.yaml")
    checkpoints.save(folder / "checkpoints", experiment.method.snapshot())
    return folder, sum(p.nbytes for p in experiment.method.ema.parameters()), experiment.method.ema.state_dict()


def alone(what: str, folder: Path, out: Path) -> int:
    """The peak of `what` in a process of its own: a heap that other tests have used has holes, which count as taken."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, what, str(folder), str(out)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def measured(what: str, folder: Path, out: Path) -> int:
    """Bytes of the second time: the first brings imports and caches."""
    act = (
        (lambda n: load_experiment(folder)) if what == "open" else (lambda n: results.export_run(folder, out / str(n)))
    )
    act(0)
    with Peak() as peak:
        kept = act(1)  # held until the peak is read
    del kept
    return peak.bytes


def test_opening_a_run_reads_one_network(trained, tmp_path):
    folder, size, weights = trained
    peak = alone("open", folder, tmp_path)
    assert peak < 1.3 * size, peak / size  # the teacher; the checkpoint has seven times as much
    experiment = load_experiment(folder)
    assert tiny.same(dict(experiment.method.ema.state_dict()), dict(weights))
    assert not tiny.same(dict(experiment.method.student.state_dict()), dict(experiment.method.teacher.state_dict()))


def test_exporting_holds_one_copy_of_the_student(trained, tmp_path):
    folder, size, _ = trained
    peak = alone("export", folder, tmp_path)
    assert peak < 1.5 * size, peak / size
    files = [tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors" for name in ("0", "1")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_copy_that_shares_is_a_network_of_its_own():
    net = torch.nn.Linear(3, 3)
    with share_weights():
        twin = copy_network(net)
    other = copy_network(net)
    assert twin.weight is not net.weight and twin.weight.data_ptr() == net.weight.data_ptr() != other.weight.data_ptr()
    twin.requires_grad_(False)
    assert net.weight.requires_grad


if __name__ == "__main__":
    print(measured(sys.argv[1], *map(Path, sys.argv[2:])))
