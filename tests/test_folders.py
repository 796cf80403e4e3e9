"""Metrics on the command line, of folders and of runs, by one process and by two, which must agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import looks
import numpy as np
import pytest
import torch
import two
from click.testing import CliRunner
from omegaconf import OmegaConf

from distill import config
from distill.cli import main
from distill.data import prepare
from distill.errors import BadInput
from distill.inspect import results
from distill.metrics import distances, features
from distill.metrics import folders as module
from distill.training import experiment as experiment
from distill.training.run import train

ROOT = Path(__file__).parents[1]
CAPTIONS = ["a cat", "two dogs", "y", "x z"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    features._built.clear()


def distill(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def numbers(text: str) -> dict[str, float]:
    lines = [line.split(": ") for line in text.splitlines() if line.count(": ") == 1]
    return {name: float(value) for name, value in lines if value != "None"}


def pair(*arguments: object, cache: Path) -> str:
    """The same command by two processes, as torchrun starts them; what the first one says."""
    from distill.training.launch import _port

    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_port()),
        "DISTILL_CACHE": str(cache),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "distill.cli", *map(str, arguments)],
            text=True,
            env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for r in range(2)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    return said[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Images, others with captions, and a tiny DINOv2 and CLIP."""
    base = tmp_path_factory.mktemp("folders")
    looks.save(base / "real", looks.pictures(61, 1, 8))
    looks.save(base / "made", looks.pictures(73, 0, 8, shift=0.2), [CAPTIONS[i % 4] for i in range(73)])
    looks.dinov2(base / "dino"), looks.clip(base / "clip")
    return base


def asked(folders) -> list[str]:
    return [
        "--metrics",
        "fd_dinov2,kd_dinov2,precision,recall,clip_score,mmd",
        f"fd_dinov2.weights={folders / 'dino'}",
        "fd_dinov2.side=28",
        "precision.features=dinov2",
        "recall.features=dinov2",
        f"clip_score.weights={folders / 'clip'}",
    ]


def test_two_processes_say_of_a_folder_what_one_says(folders, tmp_path):
    one = numbers(distill("score", folders / "made", folders / "real", *asked(folders)))
    assert list(one) == ["fd_dinov2", "kd_dinov2", "precision", "recall", "clip_score", "mmd", "samples", "reference"]
    assert one["samples"] == 73 and one["reference"] == 61 and one["fd_dinov2"] > 0
    x, y = (
        (torch.from_numpy(np.stack([np.asarray(p) for p in _open(folders / name)])).permute(0, 3, 1, 2) / 127.5 - 1)
        for name in ("made", "real")
    )
    assert one["mmd"] == pytest.approx(distances.squared_mmd(x, y), rel=1e-4)
    options = asked(folders)
    wanted = module.metric_settings(options[1], options[2:])
    first, second = two.ranks(lambda rank: module.score(folders / "made", folders / "real", wanted))
    assert first == second == {name: pytest.approx(value, rel=2e-5) for name, value in one.items()}


def _open(folder):
    from PIL import Image

    return [Image.open(file) for file in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize(
    "given, says",
    [
        (["made", "real", "--metrics", "fids"], "--metrics: 'fids' is none of fd, accuracy, mmd"),
        (["made", "--metrics", "fd"], "--metrics: fd of pixels needs real images"),
        (["made", "real", "--metrics", "accuracy"], "accuracy needs a run's labels"),
        (["made", "fd_dinov2.weights=dino", "fd_dinov2.side=28"], "fd_dinov2 needs real images; name its reference"),
        (["made", "real"], "--metrics: name some"),
        (["made", "real", "more", "--metrics", "fd"], "Give one or two paths"),
        (["made", "nowhere", "--metrics", "fd"], "nowhere does not exist"),
        (["made", "real", "weights=a"], "'weights=a' must be NAME.KEY=VALUE of a metric"),
        (["real", "clip_score.weights=clip"], "ClipScore needs a caption per sample"),
    ],
)
def test_bad_input_is_one_sentence(folders, monkeypatch, given, says):
    monkeypatch.chdir(folders)
    said = distill("score", *given, code=2)
    assert says in said and len(said.splitlines()) == 1


def test_too_few_samples_are_reported_in_one_sentence(folders, tmp_path):
    few = looks.save(tmp_path / "few", looks.pictures(9, 0, 8))
    said = distill("score", few, folders / "real", f"fd_dinov2.weights={folders / 'dino'}", "fd_dinov2.side=28")
    lines = [line for line in said.splitlines() if "singular" in line]
    assert (
        len(lines) == 1
        and lines[0].startswith("distill: fd_dinov2 of 9 samples with 12 features: ")
        and ".py" not in said
    )


def test_published_statistics_are_a_reference_on_the_command_line(folders, tmp_path):
    from distill.metrics.networks.vision import Dinov2

    x = looks.pictures(61, 1, 8)
    y = Dinov2(str(folders / "dino"), side=28)(x).double().numpy()
    np.savez(tmp_path / "stats.npz", mu=y.mean(0), sigma=np.cov(y, rowvar=False))
    common = [f"fd_dinov2.weights={folders / 'dino'}", "fd_dinov2.side=28"]
    images = numbers(distill("score", folders / "made", folders / "real", *common))
    stats = numbers(distill("score", folders / "made", tmp_path / "stats.npz", *common))
    assert stats["fd_dinov2"] == pytest.approx(images["fd_dinov2"], rel=1e-4)


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """A teacher of two steps on shards of the real images, validated and measured by name."""
    base = tmp_path_factory.mktemp("run")
    prepare.images(folders / "real", base / "data", size=None)
    network = {
        "_target_": "distill.models.small.Transformer",
        "size": 8,
        "channels": 3,
        "patch": 4,
        "width": 16,
        "depth": 1,
        "heads": 2,
    }
    denoiser = {
        "_target_": "distill.denoise.Denoiser",
        "net": network,
        "prediction": "flow",
        "schedule": {"_target_": "distill.noise.RectifiedFlow"},
    }
    split = next(p.parent for p in (base / "data").rglob("*.tar"))
    recipe = {
        "name": "named",
        "roles": {"student": denoiser},
        "method": {"_target_": "distill.methods.Diffusion", "grid": 4},
        "data": {"_target_": "distill.data.shards.Shards", "path": str(split), "batch_size": 8},
        "train": {"steps": 2, "validate_every": 1, "keep_best": 1, "threads": 1},
        "log": {"wandb": "disabled"},
        "eval": {
            "samples": 40,
            "validation_samples": 20,
            "evaluations": [2, 4],
            "metrics": {
                "kd_dinov2": {"weights": str(folders / "dino"), "side": 28},
                "fd_dinov2": None,
                "bold_score": {"_target_": "distill.metrics.rewards.Ink", "grain": 0},
            },
        },
    }
    cfg = config.checked(OmegaConf.create(recipe))
    train(cfg, base / "runs" / "named")
    return base / "runs" / "named"


def test_a_run_validates_by_name_and_two_processes_measure_what_one_measures(trained, tmp_path):
    header = (trained / "metrics.csv").read_text().splitlines()[0]
    assert "validation/kd_dinov2" in header and "validation/bold_score" in header and "validation/fd," not in header
    distill("eval", trained)
    one = json.loads((trained / "metrics.json").read_text())
    assert set(one["teacher"]["4"]) == {"kd_dinov2", "fd_dinov2", "bold_score"}
    (trained / "metrics.json").unlink()
    answers = two.ranks(lambda rank: results.evaluate(trained)["teacher"]["4"])
    agree(one, json.loads((trained / "metrics.json").read_text()))
    assert answers[0] == answers[1]


def agree(one, other):
    assert other["about"]["samples"] == one["about"]["samples"] == 40
    for row in ("teacher", "training_free"):
        for nfe, scores in one[row].items():
            assert other[row][nfe] == {k: pytest.approx(v, rel=1e-3, abs=1e-5) for k, v in scores.items()}


@pytest.mark.slow
def test_torchruns_processes_measure_what_one_measures(trained, folders, tmp_path):
    distill("eval", trained)
    one = json.loads((trained / "metrics.json").read_text())
    pair("eval", trained, cache=tmp_path / "other")
    agree(one, json.loads((trained / "metrics.json").read_text()))
    command = ["score", folders / "made", folders / "real", *asked(folders)]
    found = numbers(pair(*command, cache=tmp_path / "other"))
    assert found == {name: pytest.approx(value, rel=2e-5) for name, value in numbers(distill(*command)).items()}


def test_metrics_are_refused_before_a_run_starts(trained, tmp_path):
    cfg = config.load([trained / "config.yaml"], ["eval.metrics={fid: {weights: /nowhere.pth}}"])
    with pytest.raises(BadInput, match="/nowhere.pth does not exist"):
        train(cfg, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    suite = experiment.build_experiment(config.load([trained / "config.yaml"])).suite()
    assert suite.headline == "kd_dinov2" and suite.measures.device == ("cuda" if torch.cuda.is_available() else "cpu")
