"""PNG files: grids of images, grids side by side, scatter plots of 2-D samples. No window is opened."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from distill.data.sources.image import tile, to_uint8
from distill.errors import BadInput

INK, SOFT, PAPER, LINE, BLUE = "#1f2328", "#656d76", "#ffffff", "#d0d7de", "#0969da"


def grid(
    x: Tensor,
    columns: int | None,
    path: str | os.PathLike,
    labels: Sequence | None = None,
    scale: int | None = None,
) -> Path:
    """Images x (B, C, H, W) in [-1, 1], C 1 or 3, row by row in `columns` (None: nearly square), as a PNG at `path`.

    Values outside [-1, 1] are clipped. Small images grow by the whole factor `scale`, pixels staying square; None
    takes the one that makes an image about 48 pixels wide. `labels` (B,) are written under the images. `BadInput` on
    another shape, NaN, or as many labels as there are not images.
    """
    return _save(_tiles(x, columns, labels, scale).save, path)


def strip(x: Tensor, path: str | os.PathLike, side: int = 96, gap: int = 4) -> Path:
    """Images x (B, C, H, W) in [-1, 1] in one row, about `side` pixels wide each, transparent between them, as a PNG."""
    if x.shape[-1] > side:
        x = interpolate(x.float(), scale_factor=side / x.shape[-1], mode="area")
    return _save(_tiles(x, len(x), None, max(side // x.shape[-1], 1), gap, paper=None).save, path)


def side_by_side(
    panels: Mapping[str, Tensor],
    path: str | os.PathLike,
    columns: int | None = None,
    labels: Sequence | None = None,
    scale: int | None = None,
) -> Path:
    """Several grids beside each other, each under its title: `{"teacher, 4 steps": x, "student, 4 steps": y}`.

    Give all panels samples of the same noise and the same labels, and image i of one is comparable to image i of the
    next. Raises as `grid`.
    """
    from PIL import Image, ImageDraw

    size, margin, between = 16, 12, 24
    font = _font(size)
    images = {title: _tiles(x, columns, labels, scale) for title, x in _not_empty(panels, "side_by_side").items()}
    widths = [max(image.width, math.ceil(font.getlength(title))) for title, image in images.items()]
    top = margin + round(1.6 * size)
    height = top + max(image.height for image in images.values()) + margin
    sheet = Image.new("RGB", (2 * margin + sum(widths) + between * (len(widths) - 1), height), PAPER)
    draw, left = ImageDraw.Draw(sheet), margin
    for (title, image), width in zip(images.items(), widths):
        draw.text((left + width / 2, margin), title, fill=INK, font=font, anchor="mt")
        sheet.paste(image, (left + (width - image.width) // 2, top))
        left += width + between
    return _save(sheet.save, path)


def scatter(
    panels: Mapping[str, Tensor],
    path: str | os.PathLike,
    reference=None,
    points: int = 4000,
) -> Path:
    """2-D samples {title: x (n, 2)}, one panel each on the same square axes, over the reference, as a PNG.

    `reference`: an oracle with `log_prob(x, t)` and `sample(n, generator)`, drawn as contours of its density, or a
    tensor (m, 2), drawn as grey points; it sets the axes, and how many samples fall outside is written in the panel.
    At most `points` samples of each set are drawn (the first). `BadInput` on another shape or NaN.
    """
    sets = {title: _points(title, x, 2) for title, x in _not_empty(panels, "scatter").items()}
    around = _anchor(sets, reference, 2)
    centre, half = _window(around)
    figure, axes = _figure(len(sets), titled=any(sets))
    for ax, (title, x) in zip(axes, sets.items()):
        if isinstance(reference, Tensor):
            ax.scatter(*around[:points].T, s=3, color="#b6bec8", linewidths=0)
        elif reference is not None:
            _contours(ax, reference, centre, half)
        ax.scatter(*x[:points].T, s=4, color=BLUE, alpha=0.4 if len(x) > 500 else 0.8, linewidths=0, zorder=3)
        _dress(ax, title, x, centre, half)
        ax.set_ylim(centre[1] - half, centre[1] + half)
        ax.set_aspect("equal")
    return _save(figure.savefig, path)


def histogram(panels: Mapping[str, Tensor], path: str | os.PathLike, reference=None, bins: int = 80) -> Path:
    """1-D samples {title: x (n,) or (n, 1)}, one panel each on the same axes, over the reference, as a PNG at `path`.

    `reference`: a tensor of samples or an oracle with `log_prob(x, t)` and `sample(n, generator)`, drawn as a filled
    density behind the samples' outline. Densities count samples outside the axes. Raises as `scatter`.
    """
    sets = {title: _points(title, x.reshape(len(x), -1), 1) for title, x in _not_empty(panels, "histogram").items()}
    centre, half = _window(_anchor(sets, reference, 1))
    edges = torch.linspace(float(centre) - half, float(centre) + half, bins + 1, dtype=torch.float64)
    fine, width = torch.linspace(edges[0], edges[-1], 8 * bins, dtype=torch.float64), float(edges[1] - edges[0])

    def density(x: Tensor) -> Tensor:
        return torch.histogram(x[:, 0], edges).hist / (len(x) * width)

    figure, axes = _figure(len(sets), titled=any(sets))
    for ax, (title, x) in zip(axes, sets.items()):
        if isinstance(reference, Tensor):
            ax.stairs(density(_anchor(sets, reference, 1)), edges, fill=True, color="#ccd4dd")
        elif reference is not None:
            p = reference.log_prob(fine[:, None], torch.zeros_like(fine)).detach().cpu().exp()
            ax.fill_between(fine, p, color="#ccd4dd", linewidth=0)
        ax.stairs(density(x), edges, color=BLUE, linewidth=1.2)
        _dress(ax, title, x, centre, half)
        ax.set_ylim(bottom=0)
    return _save(figure.savefig, path)


def _tiles(
    x: Tensor,
    columns: int | None,
    labels: Sequence | None,
    scale: int | None,
    gap: int | None = None,
    paper: str | None = PAPER,
):
    """A PIL image of the grid, transparent between the images where `paper` is None."""
    from PIL import ImageDraw

    if x.ndim != 4 or x.shape[1] not in (1, 3) or len(x) == 0:
        raise BadInput(f"images have the shape {tuple(x.shape)}; give (B, C, H, W) with B > 0 and C 1 or 3.")
    if not torch.isfinite(x).all():
        raise BadInput("images hold NaN or infinite values; check the sampler that made them.")
    names = None if labels is None else labels.tolist() if isinstance(labels, Tensor) else list(labels)
    if names is not None and len(names) != len(x):
        raise BadInput(f"{len(names)} labels for {len(x)} images; give one per image, or none.")
    size = 11
    sheet, edges = tile(to_uint8(x), columns, scale, gap, 0 if names is None else round(1.3 * size), paper)
    draw, font = ImageDraw.Draw(sheet), _font(size)
    for name, (middle, bottom) in zip(names or (), edges):
        draw.text((middle, bottom + 2), str(name), fill=SOFT, font=font, anchor="mt")
    return sheet


def _figure(panels: int, titled: bool):
    """A figure without a window, and its axes; lower if no panel has a title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * panels, 3.75 if titled else 3.3), dpi=160, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False, sharey=True)[0]


def _dress(ax, title: str, x: Tensor, centre: Tensor, half: float) -> None:
    """Title, limits, quiet ticks, and how many samples the panel does not show."""
    outside = int(((x - centre).abs() > half).any(1).sum())
    if outside:
        note = ax.text(0.98, 0.98, f"{outside} of {len(x)} outside", transform=ax.transAxes, ha="right", va="top")
        note.set(color=INK, size=8, zorder=4, bbox={"facecolor": PAPER, "alpha": 0.85, "linewidth": 0, "pad": 1.5})
    ax.set_title(title, size=11, color=INK)
    ax.set_xlim(centre[0] - half, centre[0] + half)
    ax.tick_params(labelsize=7, colors=SOFT, length=2)
    ax.spines[:].set_color(LINE)


def _anchor(sets: Mapping[str, Tensor], reference, d: int) -> Tensor:
    """The points (m, d) that set the axes."""
    if reference is None:
        return torch.cat(list(sets.values()))
    if not isinstance(reference, Tensor):
        reference, _ = reference.sample(4000, generator=torch.Generator().manual_seed(0))
    return _points("reference", reference.reshape(len(reference), -1), d)


def _window(around: Tensor) -> tuple[Tensor, float]:
    """Centre (d,) and half the side of the square that holds all points and a margin."""
    low, high = around.amin(0), around.amax(0)
    return (low + high) / 2, 0.58 * float((high - low).max()) or 1.0


def _contours(ax, oracle, centre: Tensor, half: float, cells: int = 160) -> None:
    """Filled contours of the oracle's density, each level holding less mass than the one below it."""
    side = torch.linspace(-half, half, cells, dtype=torch.float64)
    v, u = torch.meshgrid(side + centre[1], side + centre[0], indexing="ij")
    where = torch.stack([u, v], -1).reshape(-1, 2)
    p = oracle.log_prob(where, where.new_zeros(len(where))).detach().cpu().exp().reshape(cells, cells)
    order = p.flatten().sort(descending=True).values
    mass = order.cumsum(0) / order.sum()
    levels = sorted({float(order[(mass > share).nonzero()[0, 0]]) for share in (0.99, 0.9, 0.6, 0.3)})
    shades = ["#eef1f4", "#dfe4ea", "#ccd4dd", "#b6c1cd"][-len(levels) :]
    ax.contourf(u, v, p, levels=[*levels, float(order[0]) * 1.01], colors=shades, zorder=1)


def _points(name: str, x: Tensor, d: int) -> Tensor:
    x = x.detach().cpu().double()
    if x.ndim != 2 or x.shape[1] != d or len(x) == 0:
        raise BadInput(f"'{name}' has the shape {tuple(x.shape)}; this plot takes (n, {d}) with n > 0.")
    if not torch.isfinite(x).all():
        raise BadInput(f"'{name}' holds NaN or infinite values; check the sampler that made it.")
    return x


def _not_empty(panels: Mapping[str, Tensor], name: str) -> Mapping[str, Tensor]:
    if not panels:
        raise BadInput(f"{name} has no panels; give at least one title with its samples.")
    return panels


def _font(size: int):
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def _save(save: Callable, path: str | os.PathLike) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, format="png")
    return path
