"""An export carries the licence of its base, and its files can be read by everybody."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch

from distill.denoise import Denoiser
from distill.export import export
from distill.export.licence import Licence, front_matter, licence_of
from distill.models.diffusers import UNet2D, load, schedule_of
from distill.models.diffusers import tiny as families
from distill.models.lora import SharedBase

FLUX = "---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\nlicense_link: LICENSE.md\ntags: [a]\n---\n# FLUX\n"


def pixel_student():
    torch.manual_seed(0)
    return Denoiser(UNet2D(size=8, widths=(8, 16)), schedule_of("DDIMScheduler"), "v")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A Stable Diffusion twin whose folder states no licence."""
    folder = tmp_path_factory.mktemp("teacher")
    families.builders()["sd15"]().save_pretrained(folder)
    return folder


@pytest.fixture
def student(teacher):
    yield load(teacher, null=None)
    for name in ("README.md", "LICENSE.md", "LICENSE"):
        (teacher / name).unlink(missing_ok=True)


def test_without_a_base_none_is_claimed(tmp_path):
    out = export(pixel_student(), 2, "ode", tmp_path / "out")
    card = (out / "README.md").read_text()
    assert front_matter(card)["license"] == "other" and "Not stated" in card and "apache" not in card
    assert json.loads((out / "distill.json").read_text())["licence"] == "other"


def test_that_of_the_bases_card_is_taken_with_its_name_link_and_file(teacher, student, tmp_path):
    (teacher / "README.md").write_text(FLUX)
    (teacher / "LICENSE.md").write_text("FLUX.1 [dev] Non-Commercial License\n")
    out = export(student, 4, "ode", tmp_path / "out")
    head = front_matter((out / "README.md").read_text())
    assert (head["license"], head["license_name"]) == ("other", "flux-1-dev-non-commercial-license")
    assert head["license_link"] == "LICENSE.md" and "Non-Commercial" in (out / "LICENSE.md").read_text()
    again = licence_of(load(out, null=None))  # and so on to a student of the student
    assert (again.name, again.title, again.file.name) == ("other", "flux-1-dev-non-commercial-license", "LICENSE.md")


@pytest.mark.parametrize("kind", ["lora", "single-file", "onnx"])
def test_files_that_are_not_pipelines_state_it_too(teacher, student, tmp_path, kind):
    (teacher / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    if kind == "lora":
        student.net = SharedBase(student.net, rank=2, targets="*.to_q")
    out = export(student, 4, "ode", tmp_path / "out", kind=kind)
    assert front_matter((out / "README.md").read_text())["license"] == "creativeml-openrail-m"


@pytest.mark.parametrize(
    "text, name, link",
    [
        ("                                 Apache License\n                           Version 2.0", "apache-2.0", None),
        ("MIT License\n\nCopyright", "mit", None),
        ("CreativeML Open RAIL++-M License", "openrail++", None),
        ("Our own terms", "other", "LICENSE"),
    ],
)
def test_a_licence_file_alone_is_recognised_or_linked(teacher, student, text, name, link):
    (teacher / "LICENSE").write_text(text)
    found = licence_of(student)
    assert (found.name, found.link, found.known) == (name, link, True)


def test_a_card_without_a_readable_head_states_none(teacher, student):
    for card in ("# no head", "---\nlicense: [\n---\n", "---\n- a\n---\n", "---\ntags: [a]\n---\n"):
        (teacher / "README.md").write_text(card)
        assert licence_of(student) == Licence() and not Licence().known


def test_the_users_word_comes_first(tmp_path):
    out = export(pixel_student(), 2, "ode", tmp_path / "out", licence="mit")
    assert (out / "README.md").read_text().startswith("---\nlicense: mit\n")


def test_files_have_the_mode_of_plain_files_and_the_bases_stay_as_they_were(teacher, student, tmp_path):
    before = {f: f.stat().st_mode for f in teacher.rglob("*")}
    umask = os.umask(0o027)
    try:
        out = export(student, 4, "ode", tmp_path / "out")
    finally:
        os.umask(umask)
    for file in out.rglob("*"):
        if file.is_file() and file.stat().st_nlink == 1:
            assert stat.S_IMODE(file.stat().st_mode) == 0o640, file
    assert (out / "unet" / "diffusion_pytorch_model.safetensors").stat().st_nlink == 1
    assert {f: f.stat().st_mode for f in teacher.rglob("*")} == before
