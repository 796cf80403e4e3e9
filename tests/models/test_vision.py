"""Features of DINOv2 and CLIP against transformers' own models and processors."""

from __future__ import annotations

import looks
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from distill.errors import BadInput
from distill.metrics import rewards
from distill.metrics.networks import vision

CAPTIONS = ["a cat", "two dogs", "a cat", "x"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return looks.clip(tmp_path_factory.mktemp("clip"))


def photos(x):
    return [Image.fromarray(p) for p in ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()]


def test_pixels_are_rounded_clipped_and_grey_is_three_equal_channels():
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.2]).view(1, 1, 1, 5)
    found = vision.to_bytes(x)
    assert found.shape == (1, 3, 1, 5) and found[0, 2, 0].tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(BadInput, match="not images .* decode latents by eval.decode"):
        vision.to_bytes(torch.zeros(2, 4, 8, 8))
    with pytest.raises(BadInput, match="NaN or infinite"):
        vision.to_bytes(torch.full((1, 3, 2, 2), torch.nan))


@pytest.mark.parametrize("side", [224, 56])
def test_dinov2_sees_the_whole_image_as_the_metric_is_defined(tmp_path, side):
    folder, x = looks.dinov2(tmp_path / "dino"), looks.pictures(3, 0, side=40)[:, :, :30]
    model = transformers.Dinov2Model.from_pretrained(folder).eval()
    arrays = [np.asarray(p.resize((side, side), Image.Resampling.BICUBIC)) / 255 for p in photos(x)]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    batch = torch.tensor(np.stack([(a - mean) / std for a in arrays]), dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = model.layernorm(model.encoder(model.embeddings(batch)).last_hidden_state)[:, 0]
    ours = vision.Dinov2(folder, **{} if side == 224 else {"side": side})(x)
    assert ours.shape == (3, 12) and float(theirs.std(0).max()) > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_clip_scores_are_the_models_own_logits(clip):
    x = looks.pictures(4, 1, side=50)[..., :40]
    model, read = transformers.CLIPModel.from_pretrained(clip).eval(), transformers.CLIPProcessor.from_pretrained(clip)
    inputs = read(text=CAPTIONS, images=photos(x), return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diagonal()
    cosine = logits / model.logit_scale.exp()
    score, pick = rewards.ClipScore(clip), rewards.PickScore(clip)
    assert float(cosine.std()) > 0.01 and bool((cosine > 0).all())
    torch.testing.assert_close(score(x, caption=CAPTIONS), 100 * cosine, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pick(x, caption=CAPTIONS), logits, rtol=1e-4, atol=1e-4)
    for reward in (score, pick):
        reward.clip.model.text_projection.weight.data.neg_()
    assert score(x, caption=CAPTIONS).tolist() == [0] * 4  # a score stops at zero, a preference does not
    torch.testing.assert_close(pick(x, caption=CAPTIONS), -logits, rtol=1e-4, atol=1e-4)


def test_captions_may_be_one_a_class(clip):
    x, label = looks.pictures(4, 1), torch.tensor([1, 0, 1, 1])
    conditions = rewards.PickScore(clip, prompts=["no", "yes"])(x, label=label)
    assert torch.equal(conditions, rewards.PickScore(clip)(x, caption=["yes", "no", "yes", "yes"]))
    assert not torch.equal(conditions, rewards.PickScore(clip)(x, caption=["no"] * 4))
    with pytest.raises(BadInput, match="ClipScore needs a caption per sample"):
        rewards.ClipScore(clip)(x, label=label)
    with pytest.raises(BadInput, match="prompts: 2 of them for class 2"):
        rewards.ClipScore(clip, prompts=["a", "b"])(x, label=label + 1)


def test_the_aesthetic_head_is_a_chain_of_linear_layers_on_the_unit_embedding(clip, tmp_path):
    x, head = (
        looks.pictures(3, 2),
        torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Dropout(), torch.nn.Linear(8, 1)).eval(),
    )
    torch.save({f"layers.{k}": v for k, v in head.state_dict().items()}, tmp_path / "head.pth")
    model, read = transformers.CLIPModel.from_pretrained(clip), transformers.CLIPProcessor.from_pretrained(clip)
    with torch.no_grad():
        seen = model.get_image_features(**read(images=photos(x), return_tensors="pt")).pooler_output
        theirs = head(seen / seen.norm(dim=-1, keepdim=True))[:, 0]
    torch.testing.assert_close(rewards.Aesthetic(str(tmp_path / "head.pth"), clip)(x), theirs, rtol=1e-4, atol=1e-5)
    torch.save(torch.nn.Linear(7, 1).state_dict(), tmp_path / "other.pth")
    with pytest.raises(BadInput, match="other.pth is not a chain of linear layers"):
        rewards.Aesthetic(str(tmp_path / "other.pth"), clip)


def test_weights_that_are_not_there_are_named(tmp_path):
    for weights in (str(tmp_path / "nowhere"), "a/b/c"):
        with pytest.raises(BadInput, match="is neither a folder here nor an 'owner/name' of the hub"):
            vision.Dinov2(weights)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no CLIPModel that can be loaded"):
        vision.ClipNetwork(str(tmp_path / "empty"))


def test_a_key_names_the_weights_and_nothing_else(tmp_path):
    folder = looks.dinov2(tmp_path / "dino")
    one, again, other = vision.Dinov2(folder), vision.Dinov2(folder), vision.Dinov2(folder, side=112)
    assert one.key == again.key != other.key
    changed = vision.Dinov2(folder)
    next(changed.model.parameters()).data[..., 0] += 1e-3
    assert changed.key != one.key
