"""Features of named layers, and the heads that read them."""

import pytest
import torch

from distill.denoise import Denoiser, Gaussian
from distill.errors import BadInput
from distill.models.heads import FeatureExtractor, Head, tokens
from distill.models.small import MLP, Transformer
from distill.noise import RectifiedFlow


def points():
    return Denoiser(MLP(2, width=16, depth=2, classes=3), RectifiedFlow())


def images():
    net = Transformer(size=4, channels=1, patch=2, width=16, depth=2, heads=2)
    return Denoiser(net, RectifiedFlow())


def test_layers_are_read_where_they_stand():
    d = points().double()
    x, t, label = torch.randn(5, 2).double(), torch.rand(5).double(), torch.tensor([0, 1, 2, -1, 0])
    first, last = FeatureExtractor(d, ["enter", "leave.input"])(x, t, label=label)
    assert torch.equal(first, d.net.enter(x)[:, None])
    assert torch.allclose(d.net.leave(last[:, 0]), d.native(x, t, label=label))
    assert not torch.equal(last, FeatureExtractor(d, "leave.input")(x, t)[0]), "features do not know the label"


def test_hooks_are_gone_after_the_call_even_when_it_fails():
    d = points()
    layers = FeatureExtractor(d, ["enter", "leave.input"])
    layers(torch.randn(5, 2), torch.rand(5))
    with pytest.raises(RuntimeError):
        layers(torch.randn(5, 3), torch.rand(5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in d.net.modules())


def test_tokens_of_vectors_sequences_and_images():
    assert tokens(torch.zeros(2, 7)).shape == (2, 1, 7)
    assert tokens(torch.zeros(2, 5, 7)).shape == (2, 5, 7)
    image = torch.arange(24.0).view(1, 2, 3, 4)
    assert tokens(image).shape == (1, 12, 2) and tokens(image)[0, 5].tolist() == [5.0, 17.0]


def test_a_head_fits_the_layers_it_is_made_for():
    d = images()
    layers = FeatureExtractor(d, ["blocks.0", "leave.input"])
    head = Head.of(layers, (1, 4, 4), width=8)
    assert head.channels == [16, 16]
    assert head(layers(torch.randn(3, 1, 4, 4), torch.rand(3))).shape == (3, 8)


def test_gradient_reaches_the_sample_through_a_frozen_network():
    d = points().requires_grad_(False)
    layers = FeatureExtractor(d, "leave.input")
    head = Head.of(layers, (2,))
    x = torch.randn(5, 2, requires_grad=True)
    head(layers(x, torch.rand(5))).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in d.parameters())
    assert all(p.grad is not None for p in head.parameters())


def test_bad_layers_are_refused_with_a_suggestion():
    with pytest.raises(BadInput, match="no layer 'leav.input'. Did you mean 'leave'"):
        FeatureExtractor(points(), "leav.input")
    with pytest.raises(BadInput, match="Gaussian has no network"):
        FeatureExtractor(Gaussian([0.0], 1.0, RectifiedFlow()), "enter")
    with pytest.raises(BadInput, match="'blocks.0' did not run"):
        FeatureExtractor(points(), "blocks.0")(torch.randn(5, 2), torch.rand(5))
