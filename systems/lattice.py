"""A quantum particle in a double well, as a periodic path in imaginary time."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from openmm_bg.systems._helpers import normal, positive, uniform, whole
from torch import Tensor

from openmm_bg.energies import Energy
from openmm_bg.errors import InputError

__all__ = ["LatticeDoubleWell"]

_MOST_POINTS = 4000
_ROWS = 8192


class LatticeDoubleWell(Energy):
    r"""The Euclidean action of a particle in a double well on a periodic lattice of imaginary times.

    S(x) = a sum_i [(m / 2) ((x_i - x_{i-1}) / a)^2 + (lambda / 4) x_i^4 - (m / 2) x_i^2], with x_0 = x_N and
    a = T / N. The number m is the mass and also the coefficient of the quadratic term. The wells lie at
    +-sqrt(m / lambda), and the barrier between them is m^2 / (4 lambda) per unit of time: for m >= 3 a path stays
    almost surely on one side, so there are two modes of equal weight. Target of Mate & Fleuret, Learning
    Interpolations between Boltzmann Densities (TMLR 2023), with N = 4 to 64 and m = 1.5 to 6.

    Exact values come from the transfer matrix K(x, y) = exp(-a [(V(x) + V(y)) / 2 + (m / 2) ((x - y) / a)^2]) on a
    grid: its sums converge exponentially in the spacing, and at the spacing chosen, half the smallest width of one
    site between its neighbours, they are exact to rounding.

    Parameters
    ----------
    sites : int
        N, at least 2; the dimension.
    m : float
        Positive.
    total_time : float
        T, positive.
    coupling : float
        lambda, positive.

    Examples
    --------
    >>> lattice = LatticeDoubleWell(sites=16, m=1.5)
    >>> round(lattice.log_z, 5), round(lattice.mean_square, 5), round(lattice.same_sign_probability, 4)
    (1.05092, 1.01284, 0.5707)
    >>> lattice.sample(3, torch.Generator().manual_seed(0)).shape
    torch.Size([3, 16])
    """

    def __init__(self, sites: int = 16, m: float = 6.0, total_time: float = 4.0, coupling: float = 1.0) -> None:
        sites_checked = whole("sites", sites, 2)
        super().__init__((sites_checked,))
        self.sites = sites_checked
        self.m = positive("m", m)
        self.total_time = positive("total_time", total_time)
        self.coupling = positive("coupling", coupling)
        self.spacing = a = self.total_time / self.sites
        """a, the time between two sites."""
        well = math.sqrt(self.m / self.coupling)
        tail = max(1.0, (self.m * self.coupling) ** (-1 / 6), (self.coupling * self.total_time) ** -0.25)
        self._edge = well + 4 * tail
        stiffness = 2 * self.m / a + 2 * self.m * a + 6 * math.sqrt(a * self.coupling)
        self._points = 2 * math.ceil(2 * self._edge * math.sqrt(stiffness)) + 1
        if self._points > _MOST_POINTS:
            raise InputError(
                f"sites={sites}, m={m}, total_time={total_time}, coupling={coupling} need a transfer matrix of "
                f"{self._points} points, more than {_MOST_POINTS}: take fewer sites, a longer time or a smaller m."
            )

    def reduced(self, x: Tensor) -> Tensor:
        square = x * x
        kinetic = (x - x.roll(1, dims=-1)).square() * (self.m / (2 * self.spacing))
        potential = square * (self.coupling / 4 * square - self.m / 2) * self.spacing
        return (kinetic + potential).sum(-1)

    @property
    def log_z(self) -> float:
        """log of the integral of exp(-S)."""
        _, _, values, _ = self._spectrum
        # the matrix was built on V - min V
        shift = self.total_time * self.m**2 / (4 * self.coupling)
        return float(_log_trace(values, self.sites)) + shift

    @property
    def mean_square(self) -> float:
        """The average of x_i^2, the same for every site."""
        grid, _, _, _ = self._spectrum
        return float(self._marginal @ grid**2)

    @property
    def same_sign_probability(self) -> float:
        """The probability that all sites lie on the same side of zero."""
        # Gauss-Legendre on the half line: there the integrand does not vanish at zero
        nodes, weights = np.polynomial.legendre.leggauss(self._points)
        root = np.sqrt(weights * self._edge / 2)
        kernel = self._kernel((nodes + 1) * self._edge / 2) * root[:, None] * root
        half = _log_trace(np.linalg.eigvalsh(kernel), self.sites)
        _, _, values, _ = self._spectrum
        return min(1.0, 2 * math.exp(half - _log_trace(values, self.sites)))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Independent samples, (n, sites) float64.

        A path on the grid is drawn exactly, site by site, each given the last one and the return to the first. Then
        every site is redrawn once from its exact continuous density between its neighbours: first the odd sites,
        then the even ones. That one sweep turns the law on the grid into the law on the line. All sums over the
        grid that stand between the two, of one site between its neighbours, equal the integrals up to a relative
        exp(-2 pi^2 4) = 1e-34 for a Gaussian of the smallest width, and the density of the result is that exact.
        """
        grid, kernel, values, vectors = self._spectrum
        share = values / values[-1]
        device = generator.device
        step = torch.as_tensor(kernel, device=device)
        cdf = torch.as_tensor(np.cumsum(self._marginal), device=device)
        path = torch.empty(n, self.sites, dtype=torch.int64, device=device)
        path[:, 0] = torch.searchsorted(cdf, uniform(n, generator=generator) * cdf[-1])
        for site in range(1, self.sites):
            # eigenvalues of the powers, because a product of matrices would have to be kept for every site
            back = (vectors * share ** (self.sites - site)) @ vectors.T
            home = torch.as_tensor(np.maximum(back, 0), device=device)
            for rows in path.split(_ROWS):
                cumulative = (step[rows[:, site - 1]] * home[rows[:, 0]]).cumsum(-1)
                target = uniform(len(rows), 1, generator=generator) * cumulative[:, -1:]
                rows[:, site] = torch.searchsorted(cumulative, target).squeeze(-1).clamp(max=len(grid) - 1)
        x = torch.as_tensor(grid, device=device)[path]
        even = range(0, self.sites - self.sites % 2, 2)
        # with an odd number the last site is a neighbour of the first, so it comes by itself
        last = range(self.sites - 1, self.sites) if self.sites % 2 else range(0)
        for group in (range(1, self.sites, 2), even, last):
            chosen = torch.tensor(list(group), dtype=torch.int64, device=device)
            if len(chosen):
                middle = 0.5 * (x[:, chosen - 1] + x[:, (chosen + 1) % self.sites])
                x[:, chosen] = self._between(middle.flatten(), generator).view_as(middle)
        return x

    def _between(self, middle: Tensor, generator: torch.Generator) -> Tensor:
        """One site given the mean of its two neighbours, exactly, by rejection.

        Its energy is (A / 2) (x - middle)^2 - (a m / 2) x^2 + (a lambda / 4) x^4. Because x^4 >= 2 c x^2 - c^2, a
        Gaussian of precision P = A - a m + a lambda c lies above for every c, and the ratio of the two is
        exp(-(a lambda / 4) (x^2 - c)^2): c is best the square of the mode.
        """
        a, m, quartic = self.spacing, self.m, self.spacing * self.coupling
        stiff = 2 * m / a
        linear = stiff - a * m
        centre2 = max(0.0, -linear / quartic)
        size = middle.abs()
        # Newton from above on the convex cubic of the mode, quartic y^3 + linear y = stiff |middle|
        mode = (stiff * size / quartic) ** (1 / 3) + math.sqrt(centre2) + 1e-12
        for _ in range(12):
            slope = 3 * quartic * mode * mode + linear
            mode = mode - (quartic * mode**3 + linear * mode - stiff * size) / slope
        precision = (linear + quartic * mode * mode).clamp(min=1 / (centre2 + 1 / math.sqrt(quartic)))
        c = (precision - linear) / quartic
        centre, width = stiff * middle / precision, precision.rsqrt()
        result = torch.empty_like(middle)
        left = torch.arange(len(middle), device=middle.device)
        while len(left):
            x = centre[left] + width[left] * normal(len(left), generator=generator)
            accept = torch.exp(-quartic / 4 * (x * x - c[left]).square())
            good = uniform(len(left), generator=generator) < accept
            result[left[good]] = x[good]
            left = left[~good]
        return result

    @cached_property
    def _spectrum(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Grid, kernel with its spacing, eigenvalues in ascending order, eigenvectors in columns."""
        grid = np.linspace(-self._edge, self._edge, self._points)
        kernel = self._kernel(grid) * (grid[1] - grid[0])
        values, vectors = np.linalg.eigh(kernel)
        return grid, kernel, np.maximum(values, 0), vectors

    @cached_property
    def _marginal(self) -> np.ndarray:
        """Probabilities of the grid points at one site."""
        _, _, values, vectors = self._spectrum
        p = vectors**2 @ (values / values[-1]) ** self.sites
        return p / p.sum()

    def _kernel(self, x: np.ndarray) -> np.ndarray:
        # counted from min V, so nothing overflows
        half = self.spacing / 8 * self.coupling * (x**2 - self.m / self.coupling) ** 2
        return np.exp(-half[:, None] - half - self.m / (2 * self.spacing) * (x[:, None] - x) ** 2)


def _log_trace(values: np.ndarray, power: int) -> float:
    """log of the trace of a matrix to a power, from its eigenvalues in ascending order."""
    top = values[-1]
    return power * math.log(top) + math.log(np.sum((np.maximum(values, 0) / top) ** power))
