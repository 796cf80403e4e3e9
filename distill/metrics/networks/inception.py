r"""The Inception network of FID (2015), whose pooled 2,048 features are compared by Fréchet and kernel distances.

The graph is that of TensorFlow's `classify_image` (Szegedy et al. 2015, https://arxiv.org/abs/1512.00567). It differs
from torchvision's Inception v3: average pools exclude the padding, the last block has a max pool, the eps of batch norm
is 0.001, and there are 1,008 classes. Weights are read from a file with torchvision's names, which pytorch-fid and
torch-fidelity use too.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.errors import BadInput

SIDE, WIDTH = 299, 2048
SOURCE = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"

# A block is its branches side by side; a branch is a chain of convolutions "name width kernel[/stride]" after a pool or
# none; "|" splits a chain in two. Convolutions of stride 1 keep the size.
_A = (
    "branch1x1 64 1",
    "branch5x5_1 48 1, branch5x5_2 64 5",
    "branch3x3dbl_1 64 1, branch3x3dbl_2 96 3, branch3x3dbl_3 96 3",
    "avg, branch_pool {} 1",
)
_B = ("branch3x3 384 3/2", "branch3x3dbl_1 64 1, branch3x3dbl_2 96 3, branch3x3dbl_3 96 3/2", "max/2")
_C = (
    "branch1x1 192 1",
    "branch7x7_1 {0} 1, branch7x7_2 {0} 1x7, branch7x7_3 192 7x1",
    "branch7x7dbl_1 {0} 1, branch7x7dbl_2 {0} 7x1, branch7x7dbl_3 {0} 1x7, branch7x7dbl_4 {0} 7x1, "
    "branch7x7dbl_5 192 1x7",
    "avg, branch_pool 192 1",
)
_D = (
    "branch3x3_1 192 1, branch3x3_2 320 3/2",
    "branch7x7x3_1 192 1, branch7x7x3_2 192 1x7, branch7x7x3_3 192 7x1, branch7x7x3_4 192 3/2",
    "max/2",
)
_E = (
    "branch1x1 320 1",
    "branch3x3_1 384 1, branch3x3_2a 384 1x3 | branch3x3_2b 384 3x1",
    "branch3x3dbl_1 448 1, branch3x3dbl_2 384 3, branch3x3dbl_3a 384 1x3 | branch3x3dbl_3b 384 3x1",
    "{}, branch_pool 192 1",
)
_BLOCKS = {
    "Mixed_5b": (_A, 32),
    "Mixed_5c": (_A, 64),
    "Mixed_5d": (_A, 64),
    "Mixed_6a": (_B, None),
    "Mixed_6b": (_C, 128),
    "Mixed_6c": (_C, 160),
    "Mixed_6d": (_C, 160),
    "Mixed_6e": (_C, 192),
    "Mixed_7a": (_D, None),
    "Mixed_7b": (_E, "avg"),
    "Mixed_7c": (_E, "max"),
}
_STEM = (
    "Conv2d_1a_3x3 32 3/2",
    "Conv2d_2a_3x3 32 3/1",
    "Conv2d_2b_3x3 64 3",
    "max/2",
    "Conv2d_3b_1x1 80 1",
    "Conv2d_4a_3x3 192 3/1",
    "max/2",
)
_POOLS = {
    "avg": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "max/2": lambda x: F.max_pool2d(x, 3, 2),
}


class Convolution(nn.Module):
    """Convolution without bias, batch norm, relu."""

    def __init__(self, channels: int, width: int, kernel: str):
        super().__init__()
        size, slash, stride = kernel.partition("/")
        sides = tuple(int(k) for k in size.split("x")) * (1 if "x" in size else 2)
        padding = (0, 0) if slash else tuple(k // 2 for k in sides)
        self.conv = nn.Conv2d(channels, width, sides, int(stride or 1), padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class InceptionBlock(nn.Module):
    """Branches side by side, their channels in order; `width` is those of its result."""

    def __init__(self, channels: int, branches: tuple[str, ...]):
        super().__init__()
        self.branches, self.width = [[link.split(" | ") for link in b.split(", ")] for b in branches], 0
        for branch in self.branches:
            inside = channels
            for link in branch:
                if link[0] not in _POOLS:
                    for convolution in link:
                        name, width, kernel = convolution.split()
                        self.add_module(name, Convolution(inside, int(width), kernel))
                    inside = int(width) * len(link)
            self.width += inside

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._along(branch, x) for branch in self.branches], 1)

    def _along(self, branch: list[list[str]], x: Tensor) -> Tensor:
        for link in branch:
            x = (
                _POOLS[link[0]](x)
                if link[0] in _POOLS
                else torch.cat([getattr(self, c.split()[0])(x) for c in link], 1)
            )
        return x


class InceptionNetwork(nn.Module):
    """uint8 images (B, 3, H, W) to the pooled features (B, 2048), float32."""

    def __init__(self):
        super().__init__()
        width = 3
        for link in _STEM:
            if link not in _POOLS:
                name, wide, kernel = link.split()
                self.add_module(name, Convolution(width, int(wide), kernel))
                width = int(wide)
        for name, (branches, setting) in _BLOCKS.items():
            block = InceptionBlock(width, tuple(b.format(setting) for b in branches))
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, 1008)  # unused by FID, but in the file

    def forward(self, images: Tensor) -> Tensor:
        x = (resize(images.float()) - 128) / 128
        for link in _STEM:
            x = _POOLS[link](x) if link in _POOLS else getattr(self, link.split()[0])(x)
        for name in _BLOCKS:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


def resize(x: Tensor, side: int = SIDE) -> Tensor:
    r"""Bilinear without antialiasing, as TensorFlow 1's `resize_bilinear`: pixel i is read at i size / side.

    That is half a pixel off what `F.interpolate` reads. Source:
    https://github.com/tensorflow/tensorflow/blob/v1.15.0/tensorflow/core/kernels/resize_bilinear_op.cc.
    """
    for axis in (2, 3):
        size = x.shape[axis]
        at = torch.arange(side, device=x.device, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
        low = at.long()
        shape = [side if a == axis else 1 for a in range(4)]
        a, b = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp_max(size - 1))
        x = a + (b - a) * (at - low).to(x).view(shape)
    return x


def load(path: str | Path) -> nn.Module:
    """The network with the weights of a file: .safetensors, .pth (read as weights only), or a TorchScript .pt.

    The TorchScript is that of NVIDIA's StyleGAN: it is called with uint8 images and `return_features=True`, and resizes.

    Raises:
        BadInput: no such file, or one that holds no FID Inception.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise BadInput(f"{path} does not exist; give a file of FID's Inception weights, such as {SOURCE}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        elif _scripted(path):
            return Scripted(torch.jit.load(path, map_location="cpu"))
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        network = InceptionNetwork()
        missing, extra = network.load_state_dict(weights, strict=False)
        lost = [name for name in missing if not name.startswith("fc.") and not name.endswith("num_batches_tracked")]
        if lost or [name for name in extra if not name.startswith("AuxLogits")]:
            raise ValueError(
                f"{len(lost)} weights are missing and {len(extra)} are unknown, such as {[*lost, *extra][0]}"
            )
    except Exception as error:  # torch's and safetensors' own come in several classes
        text = str(error).splitlines()[0][:200]
        raise BadInput(f"{path} is not a file of FID's Inception ({text}); use {SOURCE}.") from error
    return network.eval().requires_grad_(False)


def _scripted(path: Path) -> bool:
    """Whether a file is a TorchScript: a zip with code in it."""
    import zipfile

    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


class Scripted(nn.Module):
    """A TorchScript detector as a feature network."""

    def __init__(self, script: nn.Module):
        super().__init__()
        self.script = script.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.script(images, return_features=True).float()
