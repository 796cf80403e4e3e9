r"""Distances between two sets of samples, and between a set of samples and a density known exactly.

x are the evaluated samples (n, ...), y the reference (m, ...); both are flattened to vectors of d features: pass pixels
for toys and digits, features of a network for natural images. Everything is computed in float64 on the device of x, in
blocks of bounded memory. Functions without a generator argument are deterministic. NaN, infinity, different shapes and
too few samples raise `BadInput`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from distill.errors import BadInput, suggest

BLOCK = 1 << 23  # entries of a pairwise block: 64 MB in float64
Kernel = Callable[[Tensor, Tensor], Tensor]


def samples(name: str, x: Tensor, least: int = 2) -> Tensor:
    """x (n, ...) as float64 (n, d); `BadInput` when fewer than `least` samples or when a value is not finite."""
    if not isinstance(x, Tensor) or x.ndim == 0:
        raise BadInput(f"{name} is not a batch of samples; pass a tensor (n, ...).")
    if len(x) < least:
        raise BadInput(f"{name} has {len(x)} samples and this metric needs at least {least}; draw more.")
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise BadInput(f"{name} has {bad} of {x.numel()} values NaN or infinite; check the sampler that made it.")
    x = x.detach().cpu() if x.device.type == "mps" else x.detach()  # mps has no float64
    return x.reshape(len(x), -1).double()


def pair(x: Tensor, y: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Both sets as float64 (n, d), (m, d) on one device; `BadInput` when one sample of x is not shaped as one of y."""
    a, b = samples("x", x, least), samples("y", y, least)
    if x.shape[1:] != y.shape[1:]:
        raise BadInput(f"a sample of x is {tuple(x.shape[1:])} and one of y is {tuple(y.shape[1:])}; make them equal.")
    return a, b.to(a.device)


# --- two sets of samples ----------------------------------------------------------------------------------------


def frechet(x: Tensor, y: Tensor) -> float:
    r"""Fréchet (2-Wasserstein) distance, squared, of the Gaussians fitted to x and y.

    |m_x - m_y|^2 + tr C_x + tr C_y - 2 tr (C_x^{1/2} C_y C_x^{1/2})^{1/2}, the last trace being the nuclear norm of
    C_x^{1/2} C_y^{1/2}; both roots are symmetric eigendecompositions, C are unbiased covariances. With the features
    of an Inception network this is FID. Biased upwards, roughly by a constant over n: compare only at equal n and m.
    Source: Heusel et al. 2017, https://arxiv.org/abs/1706.08500.

    With fewer samples than features, where C (d, d) would not fit, the trace is the nuclear norm of the (n, m) matrix
    X Y^T / sqrt((n - 1) (m - 1)) of centred samples, which is the same number.
    """
    x, y = pair(x, y)
    if len(x) * len(y) >= x.shape[1] ** 2:
        return frechet_moments(*moments(x), *moments(y))
    distance, scale = (x.mean(0) - y.mean(0)).square().sum(), math.sqrt((len(x) - 1) * (len(y) - 1))
    cross = torch.zeros(len(x), len(y), dtype=x.dtype, device=x.device)
    width = max(1, BLOCK // max(len(x), len(y)))
    for i in range(0, x.shape[1], width):
        a, b = (part[:, i : i + width] - part[:, i : i + width].mean(0) for part in (x, y))
        cross += a @ b.T
        distance += a.square().sum() / (len(x) - 1) + b.square().sum() / (len(y) - 1)
    return float(distance - 2 * torch.linalg.matrix_norm(cross / scale, "nuc"))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) of samples (n, ...), float64."""
    x = samples("x", x)
    centred = x - x.mean(0)
    return x.mean(0), centred.T @ centred / (len(x) - 1)


def frechet_moments(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> float:
    """The Fréchet distance of `frechet` from means (d,) and covariances (d, d), such as published statistics."""

    def root(cov: Tensor) -> Tensor:
        value, vector = torch.linalg.eigh(cov)
        return vector * value.clamp_min(0).sqrt() @ vector.T

    root_x, root_y = root(cov_x.double()), root(cov_y.to(cov_x.device).double())
    cross = torch.linalg.matrix_norm(root_x @ root_y, "nuc")
    mean = (mean_x - mean_y.to(mean_x)).square().sum()
    return float(mean + root_x.square().sum() + root_y.square().sum() - 2 * cross)


def squared_mmd(x: Tensor, y: Tensor, kernel: str = "cubic", bandwidth: float | None = None) -> float:
    r"""Squared maximum mean discrepancy, the unbiased U-statistic; it can be negative for equal distributions.

    E k(x, x') + E k(y, y') - 2 E k(x, y) over distinct pairs, with one of two kernels:

    "cubic"  k(a, b) = (<a, b>/d + 1)^3, which compares the first three moments. On Inception features this is KID,
             Bińkowski et al. 2018, https://arxiv.org/abs/1801.01401.
    "rbf"    k(a, b) = exp(-|a - b|^2 / (2 h^2)), which is zero only for equal distributions. The default bandwidth is
             h^2 = E|y - y'|^2 / 2 = tr C_y, which depends on the reference only, so that students are comparable.
    """
    x, y = pair(x, y)
    if kernel == "cubic":
        return -_contrast(x, y, lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3)
    if kernel != "rbf":
        raise BadInput(f"kernel '{kernel}' is unknown; use 'cubic' or 'rbf'.{suggest(kernel, ('cubic', 'rbf'))}")
    h = bandwidth or float(y.var(0).sum().sqrt())
    if not h > 0:
        raise BadInput(f"the rbf bandwidth is {h}; give a positive one or a reference that is not constant.")
    return -_contrast(x, y, lambda a, b: torch.exp(distance_matrix(a, b).square() / (-2 * h * h)))


def energy_distance(x: Tensor, y: Tensor) -> float:
    r"""2 E|x - y| - E|x - x'| - E|y - y'| over distinct pairs: unbiased, zero in expectation iff the distributions are equal.

    Not the square root (scipy's is). Source: Székely and Rizzo 2013, https://doi.org/10.1016/j.jspi.2013.03.018.
    """
    return _contrast(*pair(x, y), distance_matrix)


def precision_recall(x: Tensor, y: Tensor, k: int = 3) -> tuple[float, float]:
    r"""Improved precision and recall.

    precision = share of x inside the union of the balls B(y_j, r_j), r_j the distance from y_j to its k-th neighbour
    in y; recall the same with x and y exchanged. Precision falls with bad samples, recall with missing modes.
    Both depend on n and m: compare at equal sizes. Source: Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991.
    """
    if k < 1:
        raise BadInput(f"k is {k}; precision and recall need at least the first neighbour.")
    x, y = pair(x, y, least=k + 1)

    def radii(a: Tensor) -> Tensor:  # the smallest k + 1 contain the point itself
        return torch.cat(
            [distance_matrix(rows, a).topk(k + 1, largest=False).values[:, -1] for _, rows in row_blocks(a, a)]
        )

    def covered(a: Tensor, b: Tensor) -> float:
        r = radii(b)
        return sum(int((distance_matrix(rows, b) <= r).any(1).sum()) for _, rows in row_blocks(a, b)) / len(a)

    return covered(x, y), covered(y, x)


def wasserstein1d(x: Tensor, y: Tensor) -> float:
    r"""W_1 = \int |F_x(v) - F_y(v)| dv of two sets of scalars, (n,) or (n, 1); n and m may differ. By scipy."""
    from scipy.stats import wasserstein_distance

    x, y = pair(x, y, least=1)
    if x.shape[1] != 1:
        raise BadInput(f"wasserstein1d compares scalars, not {x.shape[1]} features; pass one coordinate at a time.")
    return float(wasserstein_distance(x[:, 0].cpu().numpy(), y[:, 0].cpu().numpy()))


def distance_matrix(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j| (n, m) of rows a (n, d) and b (m, d)."""
    # Through a matrix product it is 16 times faster at d = 784, at the cost of an absolute error of about 1e-7 |a|.
    mode = "use_mm_for_euclid_dist" if a.shape[1] > 64 else "donot_use_mm_for_euclid_dist"
    return torch.cdist(a, b, compute_mode=mode)


def row_blocks(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows of x whose pairwise matrix with y is bounded, each with its first index."""
    size = max(1, BLOCK // len(y))
    return ((i, x[i : i + size]) for i in range(0, len(x), size))


def _contrast(x: Tensor, y: Tensor, kernel: Kernel) -> float:
    """2 mean k(x, y) - mean k(x, x') - mean k(y, y'), the same sample never paired with itself."""

    def own(a: Tensor) -> float:
        total = 0.0
        for i, rows in row_blocks(a, a):
            block = kernel(rows, a)
            block.diagonal(offset=i).zero_()
            total += float(block.sum())
        return total / (len(a) * (len(a) - 1))

    cross = sum(float(kernel(rows, y).sum()) for _, rows in row_blocks(x, y)) / (len(x) * len(y))
    return 2 * cross - own(x) - own(y)


# --- samples against a label ------------------------------------------------------------------------------------


class Accuracy:
    """Share of generated samples that a classifier fitted on real data gives the label they were drawn for.

    An RBF support vector machine on flattened values (sklearn SVC, C = 10, gamma = "scale"), fitted on at most `limit`
    of the real samples. With more than 50 classes, the 5 nearest of these samples vote by inverse distance instead, since
    the machine's cost grows with the square of the classes. Classes with one real sample are left out of fit and scores.
    A share `held_out` of the real data is not used for the fit; `.held_out` is the accuracy on it, that of a perfect model.

    Raises:
        BadInput: fewer than two classes have two samples each.
    """

    def __init__(self, x_real: Tensor, y_real: Tensor, held_out: float = 0.2, limit: int = 10_000, seed: int = 0):
        from sklearn.model_selection import train_test_split
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.svm import SVC

        x, y = samples("x_real", x_real, 4).cpu().numpy(), _labels("y_real", y_real, len(x_real)).numpy()
        common = classes_with(y_real, 2).numpy()
        if len(common) < 2:
            raise BadInput("y_real needs two classes with two samples each; give labelled data.")
        self.shape = tuple(x_real.shape[1:])
        rows = np.isin(y, common)
        x, y = x[rows], y[rows]
        stratify = y if int(held_out * len(y)) >= len(common) else None  # one of each class on both sides
        x_fit, x_test, y_fit, y_test = train_test_split(x, y, test_size=held_out, stratify=stratify, random_state=seed)
        model = (
            SVC(C=10.0, gamma="scale")
            if len(common) <= 50
            else KNeighborsClassifier(min(5, len(x_fit)), weights="distance")
        )
        self.model = model.fit(x_fit[:limit], y_fit[:limit])
        self.classes = torch.as_tensor(self.model.classes_)
        self.held_out = float(self.model.score(x_test, y_test))

    def predict(self, x: Tensor) -> Tensor:
        """Class (n,) int64 of every sample."""
        flat = samples("x", x, 1)
        if tuple(x.shape[1:]) != self.shape:
            raise BadInput(f"a sample of x is {tuple(x.shape[1:])} and the classifier was fitted on {self.shape}.")
        return torch.as_tensor(self.model.predict(flat.cpu().numpy()))

    def score(self, x: Tensor, label: Tensor) -> float:
        """Share of x (n, ...) classified as label (n,), of the samples whose class was fitted; NaN where there is none.

        Raises:
            BadInput: a label is -1 (no class).
        """
        known = torch.isin(_labels("label", label, len(x)), self.classes)
        if not known.any():
            return math.nan
        return float((self.predict(x[known]) == label.cpu()[known]).double().mean())


def classes_with(label: Tensor, samples: int) -> Tensor:
    """The classes that at least so many of `label` (n,) have, ascending."""
    classes, counts = label.cpu().long().unique(return_counts=True)
    return classes[counts >= samples]


def _labels(name: str, label: Tensor, n: int) -> Tensor:
    if label.shape != (n,) or label.is_floating_point() or label.lt(0).any():
        raise BadInput(f"{name} is {tuple(label.shape)} {label.dtype}; give {n} integer classes >= 0, one per sample.")
    return label.cpu().long()


# --- samples against a density known exactly ---------------------------------------------------------------------
# The oracle is a Gaussian or GaussianMixture of distill.denoise; x is moved to its device.


def mode_masses(x: Tensor, oracle) -> Tensor:
    r"""Share of x (n, D) in each component k of a GaussianMixture, (K,): argmax_k w_k N(x; m_k, s_k^2 I)."""
    x = _points(x, oracle)
    t, modes = x.new_zeros(len(x)), len(oracle.means)
    each = [oracle.log_prob(x, t, label=torch.full_like(t, k, dtype=torch.long)) for k in range(modes)]
    mode = (torch.stack(each, 1) + oracle.log_weights).argmax(1)
    return torch.bincount(mode, minlength=modes).cpu().double() / len(x)


def mode_kl(x: Tensor, oracle) -> float:
    r"""KL(w || m) = sum_k w_k log(w_k / m_k) of the true weights w against the empirical masses of x, in nats, >= 0.

    m_k = (n_k + w_k) / (n + 1): one pseudo-sample distributed as w, so that a missing mode adds about w_k log n instead
    of infinity. n exact samples of well separated modes have about (K - 1) / (2 n).
    """
    weights = oracle.log_weights.exp().cpu()
    m = (mode_masses(x, oracle) * len(x) + weights) / (len(x) + 1)
    return float((weights * (weights / m).log()).sum())


def nll_gap(x: Tensor, oracle, n: int = 200_000, seed: int = 0) -> float:
    r"""E_x[-log p(x)] - H(p) in nats, p the oracle's density; the entropy H comes from n exact samples.

    Positive: samples where the data has little mass. Negative: samples too close to the modes. Zero is necessary for
    x ~ p but not sufficient (a missing mode does not change it); use it together with `mode_kl`.
    """
    x = _points(x, oracle)
    exact, _ = oracle.sample(n, generator=torch.Generator().manual_seed(seed))
    return float(_log_prob(oracle, exact.double()).mean() - _log_prob(oracle, x).mean())


def kl(p, q, n: int = 200_000, seed: int = 0) -> float:
    r"""KL(p || q) = E_p[log p - log q] in nats of two oracles, exact densities on both sides, n exact samples of p."""
    x = _points(p.sample(n, generator=torch.Generator().manual_seed(seed))[0], q)
    return float((_log_prob(p, x) - _log_prob(q, x)).mean())


def map_kl(student: Callable[[Tensor], Tensor], z: Tensor, oracle) -> float:
    r"""KL(student || data) in nats of a one-step student x = G(z), z ~ N(0, I) (n, D), by change of variables.

    E_z[log N(z; 0, I) - log|det dG/dz| - log p(G(z))]: exact if G is injective, a lower bound otherwise, infinite if the
    Jacobian is singular. G must treat samples independently. The Jacobian costs D backward passes, so D should be small.
    G is called in the precision of z.
    """
    samples("z", z)
    z = z.detach().requires_grad_(True)
    with torch.enable_grad():
        x = student(z)
        rows = [torch.autograd.grad(x[:, i].sum(), z, retain_graph=True)[0] for i in range(z.shape[1])]
    log_det = torch.linalg.slogdet(torch.stack(rows, 1).double()).logabsdet
    log_z = -0.5 * (z.detach().double().square() + math.log(2 * math.pi)).sum(1)
    return float((log_z - log_det).mean() - _log_prob(oracle, _points(x, oracle)).mean().to(z.device))


def _points(x: Tensor, oracle) -> Tensor:
    """x (n, D) in float64 on the oracle's device; `BadInput` when D is not the oracle's."""
    means = oracle.means[0] if hasattr(oracle, "means") else oracle.mean
    flat = samples("x", x, 1)
    if x.shape[1:] != means.shape:
        raise BadInput(
            f"a sample of x is {tuple(x.shape[1:])} and of the oracle {tuple(means.shape)}; make them equal."
        )
    return flat.reshape(x.shape).to(means.device)


def _log_prob(oracle, x: Tensor) -> Tensor:
    return oracle.log_prob(x, x.new_zeros(len(x)))
