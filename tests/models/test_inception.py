"""FID's Inception against torch-fidelity's, and the files that its weights come in."""

from __future__ import annotations

import inceptions
import looks
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from distill.errors import BadInput
from distill.metrics.networks import inception
from distill.metrics.networks.vision import InceptionFeatures

# Features 127, 383, ..., 1919 (one of each branch of the last block) of two images 64 x 48 under the weights of
# `inceptions.filled`, by torch-fidelity 0.4.0:
# FeatureExtractorInceptionV3("", ["2048"], feature_extractor_weights_path="inception.pth")(images)[0][:, 127::256]
THEIRS = torch.tensor(
    [
        [
            0.0449623317,
            1.3335545063,
            0.8082551956,
            3.0776679516,
            0.0650268644,
            1.1618807316,
            0.4437759221,
            0.0207568202,
        ],
        [
            0.0432552584,
            1.3452335596,
            0.8273843527,
            3.0881307125,
            0.0524204485,
            1.1657917500,
            0.4612630308,
            0.0452604666,
        ],
    ]
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return inceptions.write(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def network(weights):
    return InceptionFeatures(str(weights))


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 64, 48), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_features_are_those_of_torch_fidelity(network, images):
    ours = network(images.float() / 127.5 - 1 + 0.003)  # less than half a grey value: the bytes of a saved image count
    assert ours.shape == (2, 2048) and not ours.requires_grad
    torch.testing.assert_close(ours[:, 127::256], THEIRS, rtol=1e-4, atol=1e-4)
    assert float((ours[0] - ours[1]).abs().max()) > 0.01  # the images are told apart


def test_resizing_reads_where_tensorflow_reads():
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    wide = inception.resize(ramp, 16)[0, 0, 0]
    assert wide.tolist() == [
        *(i / 2 for i in range(15)),
        7.0,
    ]  # pixel i is read at i 8 / 16, not at (i + 1/2) / 2 - 1/2
    assert inception.resize(ramp, 4)[0, 0, 3].tolist() == [0, 2, 4, 6]
    assert not torch.equal(inception.resize(ramp, 16), F.interpolate(ramp, (16, 16), mode="bilinear"))


def test_clean_resizing_is_pil_in_float(weights, network):
    import numpy as np
    from PIL import Image

    from distill.metrics.networks.vision import _clean

    images = ((looks.pictures(1, 0, 400)[..., :320] + 1) * 127.5).round().byte()
    made = _clean(images)
    plain = Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((299, 299), Image.Resampling.BICUBIC)
    assert made.shape == (1, 3, 299, 299) and made.dtype == torch.float32
    assert (
        float((made[0] - torch.from_numpy(np.array(plain)).permute(2, 0, 1)).abs().max()) < 1.2
    )  # theirs is rounded twice
    assert float((made - made.round()).abs().max()) > 0.3
    clean = InceptionFeatures(str(weights), resize="clean")
    assert clean.key != network.key
    assert torch.equal(network.model(made), clean(images.float() / 127.5 - 1))


def test_weights_come_in_three_kinds_of_file(weights, network, images, tmp_path, monkeypatch):
    save_file(torch.load(weights, weights_only=True), tmp_path / "inception.safetensors")

    class Detector(torch.nn.Module):
        """Called as StyleGAN's: uint8 in, features on demand."""

        def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            pooled = img.to(torch.float32).mean([2, 3])
            return pooled if return_features else pooled.sum(1, keepdim=True)

    torch.jit.script(Detector()).save(str(tmp_path / "detector.pt"))
    found = InceptionFeatures(str(tmp_path / "detector.pt"))(images.float() / 127.5 - 1)
    torch.testing.assert_close(found, images.float().mean((2, 3)))
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))  # found there by its name
    assert InceptionFeatures().key == network.key


@pytest.mark.parametrize(
    "name, text",
    [
        ("nowhere.pth", "does not exist; give a file of FID's Inception"),
        ("other.pth", "is not a file of FID's Inception (470 weights are missing"),
        ("broken.safetensors", "is not a file of FID's Inception"),
    ],
)
def test_other_files_are_refused(tmp_path, monkeypatch, name, text):
    torch.save({"layer.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(BadInput) as caught:
        inception.load(tmp_path / name)
    assert text in str(caught.value)
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "empty"))
    with pytest.raises(BadInput, match="weights: FID's Inception was not found; download https"):
        InceptionFeatures()
    with pytest.raises(BadInput, match="resize: 'bicubic' must be tf1 or clean"):
        InceptionFeatures(resize="bicubic")
