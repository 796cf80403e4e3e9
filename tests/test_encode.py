"""From a folder of pictures to shards of latents and text, and from these to a trained student."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from zlib import crc32

import diffusers
import numpy as np
import pytest
import torch
import webdataset
from click.testing import CliRunner
from omegaconf import OmegaConf
from PIL import Image

from distill import config
from distill.cli import main
from distill.data import encode as encoding
from distill.data.audit import audit
from distill.data.encode import EncodeConfig, Encoder, encode
from distill.data.shards.buckets import Buckets
from distill.data.shards.dataset import Shards
from distill.data.sources.plan import SourceSettings, plan_folder
from distill.errors import BadInput
from distill.models.diffusers import FirstFrames, Geometry, Latent, Prompts, fingerprints, load, tiny_parts
from distill.models.diffusers import tiny as families
from distill.training.experiment import build_experiment
from distill.training.run import train

PARTI = Path(os.environ.get("DISTILL_DATA", Path(__file__).parents[2] / "shared" / "data")) / "prompts/PartiPrompts.tsv"
SIZES = [(16, 16), (16, 26), (24, 16)]  # (H, W)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "sd"
    families.builders()["sd15"]().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten pictures of three sizes in two class folders, with captions; number 7's caption is empty."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(10):
        folder = root / ("cat", "dog")[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (*SIZES[i % 3], 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("" if i == 7 else f"a {folder.name} of kind {'abcdefghij'[i]}")
    return root


def encode_config(src, out, pipeline, dtype="float32", caption=None, skip_bad=False, batch=3, **source) -> EncodeConfig:
    source = SourceSettings(caption=caption, **({"size": (16, 16), "per_shard": 4} | source))
    return EncodeConfig(src, out, str(pipeline), source, dtype, batch=batch, skip_bad=skip_bad)


def encoded(src, out, pipeline, **options) -> list[str]:
    """Encode; returns the lines of progress."""
    facts = []
    encode(encode_config(src, out, pipeline, **options), progress=facts.append)
    return facts


@pytest.fixture(scope="module")
def shards(pipeline, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "out"
    encoded(photos, out, pipeline)
    return out


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def cli(*args) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(a) for a in args])
    return result.exit_code, result.output


# -- what is in the shards --------------------------------------------------------------------------------------------


def test_latents_and_text_are_the_pipelines_own(shards, pipeline, photos):
    stored = Shards(shards / "train", 4).all()
    assert (
        stored["x"].shape == (10, 4, 8, 8)
        and stored["text"].shape == (10, 12, 16)
        and len(set(stored["caption"])) == 10
    )
    latent, prompts = Latent(pipeline), Prompts(pipeline)
    i = stored["caption"].index("a cat of kind a")  # a picture that needs no resizing
    pixels = torch.from_numpy(np.array(Image.open(photos / "cat" / "0.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    vae = latent.vae  # called without our class: scaled latents, then decoded
    direct = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(stored["x"][i : i + 1], direct, atol=1e-6, rtol=1e-5)
    picture = vae.decode(direct / vae.config.scaling_factor).sample
    torch.testing.assert_close(latent.decode(stored["x"][i : i + 1]), picture, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stored["text"][i : i + 1], prompts(["a cat of kind a"])["text"], atol=1e-6, rtol=1e-5)


def test_the_null_condition_is_kept_and_stands_for_empty_captions(shards, pipeline):
    source = Shards(shards / "train", 4)
    stored, null = source.all(), source.null["text"]
    torch.testing.assert_close(null, Prompts(pipeline)([""])["text"])
    assert torch.equal(stored["text"][stored["caption"].index("")], null[0])
    teacher = load(pipeline)
    torch.testing.assert_close(teacher.net.null({"text": stored["text"]})["text"][:1], null)


def test_half_precision_halves_the_shards_and_comes_out_as_float32(shards, pipeline, photos, tmp_path):
    encoded(photos, tmp_path / "half", pipeline, dtype="float16")
    whole, half = Shards(shards / "train", 4), Shards(tmp_path / "half" / "train", 4)
    assert half.info.bytes * 2 == whole.info.bytes and half.info.members["text"].dtype == "float16"
    for key in ("x", "text"):
        assert half.all()[key].dtype == torch.float32
        torch.testing.assert_close(half.all()[key], whole.all()[key], atol=2e-3, rtol=1e-3)


def test_a_pipeline_of_classes_keeps_labels_and_no_text(photos, tmp_path):
    from distill.data import prepare

    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=2,
    )
    diffusers.DiTPipeline(network, tiny_parts.vae(), tiny_parts.ddim()).save_pretrained(tmp_path / "dit")
    encoded(photos, tmp_path / "out", tmp_path / "dit")
    prepare.images(photos, tmp_path / "images", size=16, test=0)
    encoded(tmp_path / "images", tmp_path / "again", tmp_path / "dit")
    for out in ("out", "again"):
        source = Shards(tmp_path / out / "train", 4)
        assert source.info.names == ("cat", "dog") and not source.info.members and source.null is None
        assert sorted(source.all()["label"].tolist()) == [0] * 5 + [1] * 5
    cfg = recipe(tmp_path / "dit", "Consistency", tmp_path / "out" / "train")
    cfg.roles.teacher = {"_target_": "distill.models.diffusers.load", "path": str(tmp_path / "dit")}
    assert train(cfg, tmp_path / "run").method.step == 2


def test_sound_is_a_source_too(tmp_path, monkeypatch):
    monkeypatch.setattr(
        diffusers, "CosineDPMSolverMultistepScheduler", lambda **kw: tiny_parts.ddim()
    )  # needs torchsde
    families.builders()["stable_audio"]().save_pretrained(tmp_path / "audio")
    (tmp_path / "songs").mkdir()
    for i in range(2):
        song = 0.5 * np.sin(np.arange(16)[None] * (i + 1) * np.ones((2, 1))).astype(np.float32)
        np.save(tmp_path / "songs" / f"{i}.npy", song)
        (tmp_path / "songs" / f"{i}.txt").write_text(f"tone {i}")
    encoded(tmp_path / "songs", tmp_path / "out", tmp_path / "audio", size=None)
    stored = Shards(tmp_path / "out" / "train", 2).all()
    assert stored["x"].shape == (2, 3, 8) and {"text", "duration"} < set(stored)


@pytest.mark.parametrize("mode", [{}, {"cache_mb": 0, "window": 4}])
def test_any_batch_can_be_reached_without_those_before(shards, mode):
    source = Shards(shards / "train", 3, **mode)
    whole, late = list(islice(source.loader(), 7)), list(islice(source.loader(start=4), 3))
    for a, b in zip(whole[4:], late):
        assert a.keys() == {"x", "text", "caption"} and a["caption"] == b["caption"]
        assert torch.equal(a["x"], b["x"]) and torch.equal(a["text"], b["text"])


def test_sdxl_has_two_conditions_and_zeros_for_none(photos, tmp_path):
    families.builders()["sdxl"]().save_pretrained(tmp_path / "sdxl")
    encoded(photos, tmp_path / "out", tmp_path / "sdxl", test=0.3)
    source = Shards(tmp_path / "out" / "train", 4)
    assert source.all()["pooled"].shape == (7, 24) and len(Shards(tmp_path / "out" / "test", 4).all()["x"]) == 3
    assert not any(v.any() for v in source.null.values()) and source.null["text"].shape == (1, 12, 40)


def test_image_shards_and_videos_are_sources_too(pipeline, photos, tmp_path):
    from distill.data import prepare

    prepare.images(photos, tmp_path / "images", size=16, test=0.2)
    encoded(tmp_path / "images", tmp_path / "out", pipeline)
    train, test = (Shards(tmp_path / "out" / s, 4).all() for s in ("train", "test"))
    plain = Shards(tmp_path / "images" / "train", 4).all()
    assert plain["caption"] == train["caption"] and len(test["x"]) == 2
    torch.testing.assert_close(Latent(pipeline).encode(plain["x"]), train["x"], atol=1e-5, rtol=1e-4)

    families.builders()["wan"]().save_pretrained(tmp_path / "wan")
    clips, random = tmp_path / "clips", np.random.default_rng(0)
    clips.mkdir()
    for i in range(2):
        np.save(clips / f"{i}.npy", random.integers(0, 255, (7, 40, 20, 3), dtype=np.uint8))
    with pytest.raises(BadInput, match="7 frames.*--frames 5"):
        encoded(clips, tmp_path / "video", tmp_path / "wan", caption="a clip", size=(32, 16))
    encoded(clips, tmp_path / "video5", tmp_path / "wan", caption="a clip", size=(32, 16), frames=5)
    assert Shards(tmp_path / "video5" / "train", 2).all()["x"].shape == (2, 16, 2, 4, 2)
    with pytest.raises(BadInput, match="holds video.*makes images"):
        encoded(clips, tmp_path / "wrong", pipeline, caption="a clip")


@pytest.mark.parametrize(
    "family, size, conditions", [("wan_i2v", (32, 32), {"image", "clip"}), ("cogvideox_i2v", (32, 32), {"image"})]
)
def test_an_image_to_video_pipeline_has_first_frames_too(family, size, conditions, tmp_path):
    path, clips, random = families.folder(family), tmp_path / "clips", np.random.default_rng(0)
    clips.mkdir()
    for i in range(3):
        np.save(clips / f"{i}.npy", random.integers(0, 255, (9, 40, 32, 3), dtype=np.uint8))
        (clips / f"{i}.txt").write_text("a clip of kind " + "abc"[i])
    encoded(clips, tmp_path / "out", path, size=size, frames=9)
    encoded(clips, tmp_path / "again", path, size=size, frames=9, batch=1)
    source = Shards(tmp_path / "out" / "train", 3)
    stored, again = source.all(), Shards(tmp_path / "again" / "train", 3).all()
    assert all(torch.equal(stored[key], again[key]) for key in conditions)  # a draw is of its sample, whoever makes it
    assert conditions < set(stored) and set(source.null) == {"text"}
    i = stored["caption"].index("a clip of kind b")
    frame = Image.fromarray(np.load(clips / "1.npy")[0, 4:36])  # a picture of the requested size
    direct = FirstFrames(path)(
        [frame], tuple(stored["x"].shape[2:]), torch.Generator().manual_seed(crc32(b"000000001"))
    )
    for key in conditions:
        torch.testing.assert_close(stored[key][i : i + 1], direct[key], atol=1e-6, rtol=1e-5)
    assert cli("data", "audit", tmp_path / "out", "--pipeline", path)[0] == 0
    cfg = recipe(path, "Consistency", tmp_path / "out" / "train")
    cfg.roles.teacher.size = list(stored["x"].shape[2:])
    assert train(cfg, tmp_path / "run").method.step == 2
    (tmp_path / "a.txt").write_text("a clip")
    with pytest.raises(BadInput, match="needs a first frame besides the prompt"):
        encoded(tmp_path / "a.txt", tmp_path / "prompts", path)


# -- killed, shared, resumed ------------------------------------------------------------------------------------------


def test_a_killed_run_continues_where_it_was(shards, pipeline, photos, tmp_path, monkeypatch):
    out, begun = tmp_path / "out", []

    class Killed(BaseException):
        pass

    inner = Encoder.encode

    def interrupted(self, items):
        begun.append(1)
        if len(begun) == 4:  # in the middle of the second shard
            raise Killed
        return inner(self, items)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(Encoder, "encode", interrupted)
        encoded(photos, out, pipeline)
    assert not out.exists()  # nothing half-written is picked up
    with pytest.raises(BadInput, match=r"begun with size = \[16, 16\], not \[20, 20\].*remove it"):
        encoded(photos, out, pipeline, size=(20, 20))
    facts = encoded(photos, out, pipeline)
    assert "1 of 3 shards exist" in facts[0] and not any("000000.tar" in line for line in facts)
    ours, theirs = bytes_of(out), bytes_of(shards)
    assert ours.keys() == theirs.keys() and all(ours[k] == theirs[k] for k in ours)
    assert encoded(photos, out, pipeline) == [f"{out}: complete already."]


def test_a_source_that_changed_since_is_refused(pipeline, photos, tmp_path):
    source, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, source)
    encoded(source, out, pipeline)
    assert encoded(source, out, pipeline) == [f"{out}: complete already."]
    caption = next(source.rglob("*.txt"))
    before = caption.stat()

    def refused():
        with pytest.raises(BadInput, match=f"some of {source} were edited, added or removed since.*remove it first"):
            encoded(source, out, pipeline)

    caption.write_text("x" * before.st_size)  # of the same length
    refused()
    os.utime(caption, ns=(before.st_atime_ns, before.st_mtime_ns))
    encoded(source, out, pipeline)
    extra = caption.with_name("new.png")
    shutil.copy(next(source.rglob("*.png")), extra)
    refused()
    extra.unlink()
    caption.unlink()
    refused()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    encoding._begin(
        encode_config(prompts, tmp_path / "begun", pipeline)
    )  # a run that was killed before its first shard
    prompts.write_text("a cat\na dog\n")
    with pytest.raises(BadInput, match="holds an unfinished begun that was begun with other files"):
        encoded(prompts, tmp_path / "begun", pipeline)


def test_an_unfinished_folder_of_another_release_is_refused(pipeline, photos, tmp_path):
    _, folder = encoding._begin(encode_config(photos, tmp_path / "out", pipeline))
    plan = json.loads((folder.folder / "plan.json").read_text())
    plan["plan"]["jobs"][0]["at"] = plan["plan"]["jobs"][0].pop("folder")
    (folder.folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(BadInput, match="begun by another release: remove it"):
        encoded(photos, tmp_path / "out", pipeline)


def test_ranks_and_workers_share_the_shards(shards, pipeline, photos, tmp_path, monkeypatch):
    out, monkeypatched = tmp_path / "out", {"WORLD_SIZE": "2"}
    for rank in "10":
        for name, value in (monkeypatched | {"RANK": rank}).items():
            monkeypatch.setenv(name, value)
        facts = encoded(photos, out, pipeline)
        assert len([line for line in facts if "samples" in line]) == {"0": 2, "1": 1}[rank]
        assert out.exists() == (rank == "0")  # the last rank finishes
    assert bytes_of(out) == bytes_of(shards)


@pytest.mark.slow
def test_worker_processes_write_the_same_and_survive_a_kill(shards, pipeline, photos, tmp_path):
    command = [
        sys.executable,
        "-m",
        "distill.cli",
        "data",
        "encode",
        photos,
        tmp_path / "out",
        "--pipeline",
        pipeline,
        "--size",
        "16",
        "--per-shard",
        "4",
        "--batch",
        "3",
        "--dtype",
        "float32",
        "--workers",
        "2",
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    child.stdout.readline()
    child.kill()
    child.wait()
    assert subprocess.run(command, capture_output=True).returncode == 0
    ours, theirs = bytes_of(tmp_path / "out"), bytes_of(shards)
    assert ours == theirs


def test_a_shard_that_is_being_written_is_left_alone(pipeline, photos, tmp_path):
    import fcntl

    _, folder = encoding._begin(encode_config(photos, tmp_path / "out", pipeline))
    with open(folder.folder / "temporary" / "train-000000.tar", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="another process is writing shard 000000.tar"):
            encoded(photos, tmp_path / "out", pipeline)


# -- buckets ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucketed(pipeline, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("buckets") / "out"
    encoded(photos, out, pipeline, buckets=True)
    return out / "train"


def test_buckets_hold_pictures_of_one_shape_and_about_one_area(bucketed):
    source = Buckets(bucketed, 2)
    assert set(source.shapes) == {(4, 8, 8), (4, 6, 10), (4, 10, 6)} and source.info.count == 10
    assert all(abs(h * w / 64 - 1) < 0.1 for _, h, w in source.shapes)
    seen = [tuple(b["x"].shape) for b in islice(source.loader(), 50)]
    assert len(set(seen)) == 3 and {s[0] for s in seen} == {2}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_bucket_of_a_step_is_that_of_all_ranks_and_of_a_resumed_run(bucketed, accumulate):
    def batches(start, count, **where):
        source = Buckets(bucketed, 2)
        source.accumulate = accumulate
        return list(islice(source.loader(start=start, **where), count))

    whole, other = batches(0, 18), batches(0, 18, rank=1, world=2)
    assert [b["x"].shape for b in whole] == [b["x"].shape for b in other]
    assert all(len({b["x"].shape for b in whole[i : i + accumulate]}) == 1 for i in range(0, 18, accumulate))
    for start in (1, 7, 12):
        assert all(torch.equal(a["x"], b["x"]) for a, b in zip(whole[start:], batches(start, 18 - start)))
    each = [c for b in islice(Buckets(bucketed, 2).loader(), 6) for c in b["caption"]]
    assert len(set(each)) >= 8  # a pass, of buckets with 4, 3 and 3 samples in batches of 2


def test_a_plain_split_is_no_bucket_and_the_other_way_round(shards, bucketed):
    with pytest.raises(BadInput, match="holds no buckets"):
        Buckets(shards / "train", 2)
    with pytest.raises(BadInput, match="give one of its splits: .*16x16"):
        Shards(bucketed, 2)


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text",
    {
        "a.txt": "a cat\n\n  two dogs \n",
        "a.tsv": 'Prompt\tNote\na cat\tan "open quote\ntwo dogs\t\n',
        "a.csv": 'id,prompt\n1,a cat\n2,"two dogs"\n',
    }.items(),
)
def test_prompts_alone(name, text, pipeline, tmp_path):
    (tmp_path / name).write_text(text)
    code, output = cli("data", "prompts", tmp_path / name, tmp_path / "out", "--pipeline", pipeline)
    assert code == 0 and "2 samples of (4, 8, 8)" in output
    source = Shards(tmp_path / "out" / "train", 2)
    batch = next(source.loader())
    assert not source.samples and set(batch["caption"]) == {"a cat", "two dogs"} and set(batch) == {"text", "caption"}
    assert len(source.all(1)["text"]) == 1


@pytest.mark.slow
@pytest.mark.skipif(not PARTI.is_file(), reason="PartiPrompts.tsv is not here (set DISTILL_DATA)")
def test_a_list_of_real_prompts(pipeline, tmp_path):
    code, output = cli("data", "prompts", PARTI, tmp_path / "out", "--pipeline", pipeline, "--batch", "64")
    assert code == 0
    assert Shards(tmp_path / "out" / "train", 2, cache_mb=0).info.count == len(PARTI.read_text().splitlines()) - 1
    assert cli("data", "audit", tmp_path / "out", "--pipeline", pipeline)[0] == 0


# -- to a student -----------------------------------------------------------------------------------------------------


def tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    """A shard made without the package's writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        writer = webdataset.TarWriter(file, encoder=False)
        for key, members in samples.items():
            writer.write({"__key__": key, **members})
        writer.close()


def recipe(pipeline, method, path, source="shards.Shards", *more):
    cfg = {
        "roles": {"teacher": {"_target_": "distill.models.diffusers.load", "path": str(pipeline), "null": None}},
        "method": {"_target_": f"distill.methods.{method}", "grid": 2, "guidance": 3.0},
        "data": {"_target_": f"distill.data.{source}", "path": str(path), "batch_size": 2},
        "train": {"steps": 2, "threads": 1},
        "log": {"wandb": "disabled"},
        "eval": {"samples": 6, "validation_samples": 4},
    }
    return config.checked(config.merge(OmegaConf.create(cfg), OmegaConf.from_dotlist(list(more))))


@pytest.mark.parametrize("method", ["Consistency", "TDM"])
def test_two_steps_on_encoded_data(method, pipeline, shards, tmp_path):
    experiment = train(recipe(pipeline, method, shards / "train"), tmp_path / "run")
    before, after = load(pipeline).net, experiment.method.student.net
    assert experiment.method.step == 2 and (tmp_path / "run" / "samples" / "step-00000002.png").exists()
    assert any(bool((a != b).any()) for a, b in zip(before.parameters(), after.parameters()))
    assert torch.equal(after.null_text, Shards(shards / "train", 1).null["text"])  # the text encoder was not loaded
    assert (tmp_path / "run" / "metrics.csv").read_text().count("\n") > 1


def test_two_steps_on_prompts_alone_and_a_method_that_needs_data_refuses(pipeline, tmp_path):
    (tmp_path / "a.txt").write_text("a cat\ntwo dogs\nthree birds\n")
    encoded(tmp_path / "a.txt", tmp_path / "out", pipeline)
    train(recipe(pipeline, "TDM", tmp_path / "out" / "train"), tmp_path / "run")
    with pytest.raises(BadInput, match="holds no samples, and Consistency trains on them"):
        build_experiment(recipe(pipeline, "Consistency", tmp_path / "out" / "train"))


def test_two_steps_on_buckets(pipeline, bucketed, tmp_path):
    cfg = recipe(pipeline, "Consistency", bucketed, "shards.buckets.Buckets", "engine.accumulate=2", "train.steps=4")
    experiment = train(cfg, tmp_path / "run")
    assert experiment.data.accumulate == 2 and experiment.method.step == 4


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(pipeline, tmp_path_factory):
    """Copies of the pipeline: without its autoencoder, without its text encoder, and with other ones."""
    root = tmp_path_factory.mktemp("others")
    for name in ("no-vae", "no-text", "text", "vae", "scale"):
        shutil.copytree(pipeline, root / name)
    index = json.loads((root / "no-vae" / "model_index.json").read_text())
    del index["vae"]
    (root / "no-vae" / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(root / "no-vae" / "vae")
    shutil.rmtree(root / "no-text" / "text_encoder")
    torch.manual_seed(9)
    tiny_parts.shake(tiny_parts.clip(), seed=9).save_pretrained(root / "text" / "text_encoder")
    tiny_parts.shake(tiny_parts.vae(), seed=9).save_pretrained(root / "vae" / "vae")
    facts = json.loads((root / "scale" / "vae" / "config.json").read_text())
    (root / "scale" / "vae" / "config.json").write_text(json.dumps(facts | {"scaling_factor": 0.5}))
    return root


def test_a_fingerprint_depends_on_weights_and_settings_and_not_on_versions(pipeline, others, tmp_path):
    whole = fingerprints(pipeline)
    assert fingerprints(others / "vae")["text"] == whole["text"] == fingerprints(others / "scale")["text"]
    assert len({fingerprints(others / n)["vae"] for n in ("vae", "scale", "text")}) == 3
    assert (
        fingerprints(others / "text") == {"vae": whole["vae"], "text": fingerprints(others / "text")["text"]} != whole
    )
    shutil.copytree(pipeline, tmp_path / "again")
    facts = json.loads((tmp_path / "again" / "vae" / "config.json").read_text())
    (tmp_path / "again" / "vae" / "config.json").write_text(
        json.dumps(facts | {"_diffusers_version": "9", "_name_or_path": "x"})
    )
    assert fingerprints(tmp_path / "again") == whole


@pytest.mark.parametrize(
    "other, words",
    [
        ("vae", "encoded by another autoencoder .*encode it again by `distill data encode --pipeline"),
        ("scale", "encoded by another autoencoder"),
        ("text", "encoded by other text encoders"),
    ],
)
@pytest.mark.parametrize("layout", [(), ("roles.layout=shared_base", "roles.adapter.rank=2")], ids=["full", "lora"])
def test_shards_of_another_pipeline_are_refused(other, words, layout, others, shards):
    with pytest.raises(BadInput, match=words):
        build_experiment(recipe(others / other, "Consistency", shards / "train", "shards.Shards", *layout))


@pytest.mark.parametrize("size, words", [((16, 18), "multiples of 4 .* give 16x16"), ((20, 20), None)])
def test_a_wrong_size_is_refused_with_the_right_one(size, words, pipeline, photos, tmp_path):
    if words:
        with pytest.raises(BadInput, match=words):
            encoded(photos, tmp_path / "out", pipeline, size=size)
        return
    encoded(photos, tmp_path / "out", pipeline, size=size)
    cfg = recipe(pipeline, "Consistency", tmp_path / "out" / "train")
    with pytest.raises(BadInput, match=r"set roles.student.size to \[10, 10\], or encode"):
        build_experiment(cfg)
    cfg.roles.teacher.size = [10, 10]
    assert build_experiment(cfg).method.shape == (4, 10, 10)


def test_a_pipeline_without_its_parts_is_named(others, photos, tmp_path):
    with pytest.raises(BadInput, match="no-vae has no autoencoder"):
        encoded(photos, tmp_path / "a", others / "no-vae")
    with pytest.raises(BadInput, match="no-text has no text_encoder.*copy that folder"):
        encoded(photos, tmp_path / "b", others / "no-text")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_an_unreadable_picture_is_named_or_listed(pipeline, photos, tmp_path):
    src = shutil.copytree(photos, tmp_path / "photos")
    (src / "cat" / "4.png").write_bytes(b"no picture")
    with pytest.raises(BadInput, match="4.png cannot be read .*repair or remove it, or give --skip-bad"):
        encoded(src, tmp_path / "out", pipeline)
    encoded(src, tmp_path / "out", pipeline, skip_bad=True)  # continues what was begun
    assert Shards(tmp_path / "out" / "train", 2).info.count == 9
    assert "4.png" in (tmp_path / "out" / "skipped.txt").read_text()


@pytest.mark.parametrize(
    "arrange, words",
    {
        "file": (lambda out: out.write_text("mine"), "exists already and is never overwritten"),
        "folder": (lambda out: out.mkdir(), "exists already and is never overwritten"),
    }.items(),
)
def test_an_out_that_is_something_else_is_left_alone(arrange, words, pipeline, photos, tmp_path):
    arrange, words = words
    arrange(tmp_path / "out")
    with pytest.raises(BadInput, match=words):
        encoded(photos, tmp_path / "out", pipeline)
    assert not (tmp_path / ".out.unfinished").exists()


def test_whole_shards_of_other_settings_are_not_taken_for_these(shards, pipeline, photos):
    with pytest.raises(BadInput, match="was made with dtype = float32, not float16"):
        encoded(photos, shards, pipeline, dtype="float16")


def test_missing_captions_and_wrong_sources_are_named(pipeline, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "photos" / "a.png")
    for args, words in (
        (("encode", tmp_path / "photos"), "has no captions.*write a .txt beside"),
        (("encode", tmp_path / "nowhere"), "does not exist"),
        (("prompts", tmp_path / "photos"), "is a folder: give a file of prompts"),
        (("encode", tmp_path / "photos", "--size", "big"), "--size big: give one number"),
    ):
        code, output = cli("data", args[0], args[1], tmp_path / "out", "--pipeline", pipeline, *args[2:])
        assert code == 2 and __import__("re").search(words, output), output
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    assert (
        "columns a, b, but no Prompt"
        in cli("data", "prompts", tmp_path / "a.csv", tmp_path / "o", "--pipeline", pipeline)[1]
    )


def test_hidden_folders_do_not_decide_the_kind_of_a_source(tmp_path):
    clips = tmp_path / "clips"
    for path in (
        clips / ".ipynb_checkpoints" / "poster.png",
        clips / ".cache" / "index.json",
        clips / ".cache" / "a.tar",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("hidden")
    for i in range(2):
        np.save(clips / f"{i}.npy", np.zeros((5, 32, 32, 3), np.uint8))
    plan = plan_folder(clips, SourceSettings(caption="a clip"))
    assert [Path(file).name for job in plan.jobs for file in job.files] in (["0.npy", "1.npy"], ["1.npy", "0.npy"])


def test_photos_with_an_index_of_their_own_are_not_taken_for_shards(photos, tmp_path):
    src = shutil.copytree(photos, tmp_path / "photos")
    (src / "index.json").write_text('{"photos": 10}')
    (src / "cat" / "index.json").write_text("[]")
    plan = plan_folder(src, SourceSettings(size=(16, 16)))
    assert sum(len(job.files) for job in plan.jobs) == 10 and plan.names == ["cat", "dog"]


def test_the_byte_order_mark_of_a_prompt_file_is_no_text(pipeline, tmp_path):
    (tmp_path / "a.txt").write_text("a cat\ntwo dogs\n", encoding="utf-8-sig")
    encoded(tmp_path / "a.txt", tmp_path / "out", pipeline)
    assert set(Shards(tmp_path / "out" / "train", 2).all()["caption"]) == {"a cat", "two dogs"}


# -- audit ------------------------------------------------------------------------------------------------------------


def test_the_audit_of_good_shards(shards, bucketed, pipeline):
    code, output = cli("data", "audit", shards, "--pipeline", pipeline)
    assert code == 0 and "10 samples: float32 (4, 8, 8)" in output and "captions: 10 different ones, 1 empty" in output
    assert "nothing wrong" in output and "text: float32 (12, 16)" in output
    assert len(audit(bucketed)) == 3


def test_the_audit_measures_what_is_there(shards):
    report, x = audit(shards / "train")[0], Shards(shards / "train", 2).all()["x"]
    line = next(line for line in report.facts if line.startswith("x: "))
    assert f"mean {x.mean():.3f}, standard deviation {x.std(unbiased=False):.3f}" in line


def test_the_audit_finds_what_is_wrong(shards, pipeline, others, tmp_path):
    from distill.data.sources import array

    def good(**changes):
        return {
            "npy": array.encode(np.random.default_rng(0).normal(size=(4, 8, 8)).astype(np.float32)),
            "text.npy": array.encode(np.zeros((12, 16), np.float32)),
            "txt": b"a",
        } | changes

    nan = np.zeros((4, 8, 8), np.float32)
    nan[0, 0, 0] = np.nan
    without = good()
    del without["text.npy"]
    tar(
        tmp_path / "bad" / "0.tar",
        {
            "0": good(),
            "1": good(npy=array.encode(nan)),
            "2": without,
            "3": good(**{"text.npy": array.encode(np.zeros((9, 16), np.float32))}),
            "4": good(),
        },
    )
    tar(tmp_path / "bad" / "1.tar", {"4": good()})
    code, output = cli("data", "audit", tmp_path / "bad")
    assert code == 2 and "4 wrong" in output
    for words in (
        "sample 1 (holds NaN",
        "sample 2 (has no .text.npy member)",
        "sample 3 (.text.npy member is float32 (9, 16)",
        "1 keys occur more than once, such as 4",
    ):
        assert words in output, output
    code, output = cli("data", "audit", shards, "--pipeline", others / "vae")
    assert code == 2 and "encoded by vae" in output
    raw = {
        str(i): good(npy=array.encode(9 * np.random.default_rng(i).normal(size=(4, 8, 8)).astype(np.float32)))
        for i in range(4)
    }
    tar(tmp_path / "raw" / "0.tar", raw)
    code, output = cli("data", "audit", tmp_path / "raw", "--pipeline", pipeline)
    assert code == 2 and "lack the autoencoder's scale and shift" in output


def test_geometry_of_all_families(tmp_path):
    expected = {"sd15": (2, 4, 1), "flux": (2, 4, 1), "wan": (8, 16, 4), "ltx": (32, 32, 8)}
    for name, (pixels, multiple, frames) in expected.items():
        families.builders()[name]().save_pretrained(tmp_path / name)
        geometry = Geometry.of(tmp_path / name)
        assert (geometry.pixels, geometry.multiple, geometry.frames) == (pixels, multiple, frames), name
    assert replace(geometry, frames=8).latents((3, 9, 64, 64)) == (8, 2, 2, 2)
