r"""The Dacorogna-Moser map between two densities on a box in the plane.

With u from the Neumann problem -Lap u = rho1 - rho0, the velocity v_t = grad u / ((1 - t) rho0 + t rho1) carries rho0
along the straight line of densities (1 - t) rho0 + t rho1 to rho1. Its flow at t = 1 is the Moser map T, a
diffeomorphism of the box that keeps every wall. No network and no training: it is the transport map whose existence and
approximability Rehman & Friesecke prove (their section 4.1 and Theorem 2), and it is here to be compared with.

What is discrete and what is not:

- grad u comes from a grid of cell centres, by cosine transforms, and is interpolated by cubic B-splines that are odd
  across the walls a component is normal to and even across the others, so that nothing leaves the box. The coefficients
  of the spline are found in the same transform, by division, so that this symmetry is exact.
- the densities are the given functions, never interpolated.
- time runs as t = 1 - (1 - r)^3, because v grows like 1/rho1 towards t = 1, in equal RK4 steps of r.

The error in the map is second order in the cell width: the cosine series of rho1 - rho0 feels its slope at the walls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dctn, idct, idst
from torch import Tensor

from openmm_bg.errors import InputError
from openmm_bg.flows.base import Flow, Transform
from openmm_bg.flows.box import BoxBase, check_bounds

LogDensity = Callable[[Tensor], Tensor]

_PAD = 2  # a cubic spline in the outermost half cell reaches two coefficients past the wall
_NEWTON = 20  # iterations; two or three are used


class MoserTransform(Transform):
    """The Moser map from one density to another on a box in the plane, float64.

    The log-determinant is that of the numerical map itself: every RK4 step comes with its derivative (RK4 applied to
    the variational equation is the derivative of RK4), instead of an integral of div v, which would agree with the map
    only up to the errors of both. So :meth:`forward` matches autograd to rounding whatever the grid and the steps, and
    a density built on it is exact for the points it makes. :meth:`inverse` undoes the steps one by one by Newton's
    method, instead of integrating back, so that both directions are one and the same bijection, to rounding.

    The map is fixed at construction; it has no parameters. It follows the module through ``.to(dtype)``, but float32
    leaves only about five digits. Rows outside the box, or not finite, come back as NaN. Exactly on a wall the map can
    stretch by more than 1e16 along it; then no float leads back to a given point of the wall.

    Parameters
    ----------
    log_reference, log_target : callable
        Points ``(batch, 2)`` to log-densities ``(batch,)``, differentiable by torch, finite everywhere on the box. Each
        is normalised on the box by quadrature, so constants do not matter.
    bounds : ((low, high), (low, high))
        The walls. Keep the box as small as the target allows: where rho1 falls far below rho0, to 1e-5 or so, points
        on a wall are swept along it at a speed of 1/rho1 and need many steps.
    grid : int or (int, int)
        Cells per axis of the Poisson problem.
    steps : int
        RK4 steps. For samples of the reference 16 do; the walls need the rest.

    Attributes
    ----------
    log_masses : tuple of float
        log of the integrals over the box of exp(log_reference) and exp(log_target).

    Raises
    ------
    InputError
        For a density that is not positive and finite on the box, one whose mass quadrature cannot pin down (then the
        masses of the two cannot be matched), results of a wrong shape, or steps so few that the map folds over itself.

    References
    ----------
    J. Moser, Trans. Amer. Math. Soc. 120 (1965) 286; B. Dacorogna and J. Moser, Ann. Inst. H. Poincare C 7 (1990) 1.

    Examples
    --------
    >>> box = [(-1.0, 1.0), (-1.0, 1.0)]
    >>> T = MoserTransform(lambda x: 0 * x[:, 0], lambda x: -x.square().sum(-1), box, grid=32)
    >>> y, log_det = T(torch.tensor([[0.5, 0.5], [1.0, -1.0]], dtype=torch.float64))
    >>> bool((y[0] < 0.5).all()), y[1].tolist()
    (True, [1.0, -1.0])
    """

    def __init__(
        self,
        log_reference: LogDensity,
        log_target: LogDensity,
        bounds: Sequence[tuple[float, float]],
        *,
        grid: int | tuple[int, int] = 64,
        steps: int = 48,
    ):
        super().__init__(2)
        walls = check_bounds(bounds, 2)
        cells = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if len(cells) != 2 or not all(isinstance(n, int) and n >= 4 for n in cells):
            raise InputError(f"grid must be a whole number of at least 4, or two of them, not {grid}.")
        if not isinstance(steps, int) or steps < 1:
            raise InputError(f"steps must be a whole number of at least 1, not {steps}.")
        self.grid, self.steps = cells, steps
        self.log_reference, self.log_target = log_reference, log_target
        self.register_buffer("low", walls[:, 0].clone(), persistent=False)
        self.register_buffer("high", walls[:, 1].clone(), persistent=False)
        self.register_buffer("cell", (walls[:, 1] - walls[:, 0]) / torch.tensor(cells), persistent=False)

        named = {"log_reference": log_reference, "log_target": log_target}
        self.log_masses = tuple(_log_mass(name, density, walls) for name, density in named.items())
        axes = [
            low + (torch.arange(n, dtype=torch.float64) + 0.5) * h
            for low, n, h in zip(self.low, cells, self.cell, strict=True)
        ]
        centres = torch.cartesian_prod(*axes)
        reference, target = (
            (_evaluate(name, density, centres) - log_mass).exp()
            for (name, density), log_mass in zip(named.items(), self.log_masses, strict=True)
        )
        difference = (target - reference).reshape(cells).numpy()
        coefficients = _gradient_coefficients(difference, (walls[:, 1] - walls[:, 0]).tolist())
        self.register_buffer("coefficients", torch.from_numpy(coefficients).flatten(1), persistent=False)
        self._check_on_a_lattice()

    # --- the velocity and its derivative ---------------------------------------------------------------------------

    def _gradient(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """grad u at points of the box, ``(batch, 2)``, and its derivative, ``(batch, component, direction)``."""
        at = (p - self.low) / self.cell - 0.5
        # the last cell ends at the wall itself
        first = torch.minimum(at.detach().floor(), torch.tensor(self.grid, dtype=p.dtype, device=p.device) - 1)
        weights, slopes = _cubic_weights(at - first)
        corner = first.long() + (_PAD - 1)
        width = self.grid[1] + 2 * _PAD
        reach = torch.arange(4, device=p.device)
        index = (corner[:, 0, None, None] + reach[:, None]) * width + corner[:, 1, None, None] + reach
        local = self.coefficients[:, index]  # (component, batch, 4, 4)
        along_y = (local * weights[:, 1, None, :]).sum(-1)
        value = (along_y * weights[:, 0]).sum(-1)
        by_x = (along_y * slopes[:, 0]).sum(-1) / self.cell[0]
        by_y = ((local * slopes[:, 1, None, :]).sum(-1) * weights[:, 0]).sum(-1) / self.cell[1]
        return value.T, torch.stack([by_x.T, by_y.T], -1)

    def _density(self, p: Tensor, left: float) -> tuple[Tensor, Tensor]:
        """left rho0 + (1 - left) rho1, ``(batch,)``, and its gradient, ``(batch, 2)``."""
        attached = p.requires_grad and torch.is_grad_enabled()
        with torch.enable_grad():
            q = p if attached else p.detach().requires_grad_()
            reference = (self.log_reference(q) - self.log_masses[0]).exp()
            target = (self.log_target(q) - self.log_masses[1]).exp()
            density = left * reference + (1 - left) * target
            if not density.requires_grad:  # two uniform densities do not depend on their argument
                return density, torch.zeros_like(q)
            (slope,) = torch.autograd.grad(density.sum(), q, create_graph=attached)
        return (density if attached else density.detach()), slope

    def _fold(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Points reflected into the box at its walls, and -1 for every coordinate that comes out mirrored."""
        width = self.high - self.low
        turns = torch.floor((p - self.low) / width)
        mirrored = turns.remainder(2) == 1
        within = p - turns * width
        folded = torch.where(mirrored, self.low + self.high - within, within)
        inside = (p >= self.low) & (p <= self.high)  # these stay as they are, to the last digit
        return torch.where(inside, p, folded), torch.where(mirrored & ~inside, -1.0, 1.0).to(p.dtype)

    def velocity(self, p: Tensor, r: float) -> tuple[Tensor, Tensor]:
        """dp/dr at the rescaled time r in [0, 1], ``(batch, 2)``, and its derivative by p, ``(batch, 2, 2)``.

        t = 1 - (1 - r)^3. Past a wall the field goes on as its mirror image: RK4 may look there between its steps.
        """
        p, sign = self._fold(p)
        gradient, hessian = self._gradient(p)
        density, slope = self._density(p, (1 - r) ** 3)
        rate = (3 * (1 - r) ** 2 / density)[:, None]
        v = rate * gradient
        derivative = rate[..., None] * hessian - v[..., None] * (slope / density[:, None])[:, None, :]
        return sign * v, sign[:, :, None] * derivative * sign[:, None, :]

    # --- the map ---------------------------------------------------------------------------------------------------

    def _step(self, p: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """RK4 step k from p, and its derivative by p."""
        h = 1 / self.steps
        r, one = k * h, torch.eye(2, dtype=p.dtype, device=p.device)
        v1, m1 = self.velocity(p, r)
        v2, d = self.velocity(p + h / 2 * v1, r + h / 2)
        m2 = d @ (one + h / 2 * m1)
        v3, d = self.velocity(p + h / 2 * v2, r + h / 2)
        m3 = d @ (one + h / 2 * m2)
        v4, d = self.velocity(p + h * v3, r + h)
        m4 = d @ (one + h * m3)
        return p + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4), one + h / 6 * (m1 + 2 * m2 + 2 * m3 + m4)

    def _unstep(self, p: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Where step k to p came from, by Newton's method, and the derivative of the step there."""
        tolerance = 8 * torch.finfo(p.dtype).eps * (self.high - self.low).max()
        h = 1 / self.steps
        with torch.no_grad():
            guess = p - h * self.velocity(p, (k + 1) * h)[0]
            q = torch.where(self.contains(guess)[:, None], guess, p)
            for _ in range(_NEWTON):
                reached, derivative = self._step(q, k)
                change = torch.linalg.solve(derivative, (reached - p)[..., None])[..., 0]
                # where a step stretches, the last digit of q is more than the last digit of p
                error = torch.minimum((reached - p).abs().amax(-1), change.abs().amax(-1))
                if (error <= tolerance).all():
                    break
                q = self._fold(q - change)[0]
            else:
                raise RuntimeError(
                    f"The Moser map could not be inverted at {int((~(error <= tolerance)).sum())} of {len(p)} points, "
                    f"which lie near the walls: take more steps than {self.steps}."
                )
        if p.requires_grad:
            # one more step of Newton, whose value is q to rounding and whose derivative by p is that of the inverse
            q = q - torch.linalg.solve(derivative, (reached - p)[..., None])[..., 0]
            derivative = self._step(q, k)[1]
        return q, derivative

    def jacobian(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The map and its derivative: ``(batch, 2)`` in the box to ``(batch, 2)`` and ``(batch, 2, 2)``."""
        m = torch.eye(2, dtype=z.dtype, device=z.device)
        for k in range(self.steps):
            z, derivative = self._step(z, k)
            m = derivative @ m
        return z, m

    def contains(self, z: Tensor) -> Tensor:
        """Which rows of ``(batch, 2)`` lie in the closed box, ``(batch,)`` bool."""
        return ((z >= self.low) & (z <= self.high)).all(-1)

    def _inside(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if z.ndim != 2 or z.shape[1] != 2:
            raise InputError(f"points of the plane have the shape (batch, 2), not {tuple(z.shape)}.")
        z = z.to(self.low.dtype)
        inside = self.contains(z)
        return inside, torch.where(inside[:, None], z, (self.low + self.high) / 2)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reference to target: ``(T(z), log det DT(z))``; NaN for rows outside the box."""
        inside, p = self._inside(z)
        log_det = p.new_zeros(len(p))
        for k in range(self.steps):
            p, derivative = self._step(p, k)
            log_det = log_det + _log_det(derivative)
        # the walls stay where they are up to rounding
        p = self._fold(p)[0]
        return torch.where(inside[:, None], p, math.nan), torch.where(inside, log_det, math.nan)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Target to reference: ``(z, -log det DT(z))`` with T(z) = y; NaN for rows outside the box.

        First derivatives by y are exact; second ones are not carried.
        """
        inside, p = self._inside(y)
        log_det = p.new_zeros(len(p))
        for k in reversed(range(self.steps)):
            p, derivative = self._unstep(p, k)
            log_det = log_det - _log_det(derivative)
        p = self._fold(p)[0]
        return torch.where(inside[:, None], p, math.nan), torch.where(inside, log_det, math.nan)

    def _check_on_a_lattice(self, points: int = 17) -> None:
        """Refuse a map that folds: the determinant must be positive, on the walls too."""
        axes = [
            torch.linspace(low, high, points, dtype=torch.float64)
            for low, high in zip(self.low, self.high, strict=True)
        ]
        p, slack = torch.cartesian_prod(*axes), 1e-9 * (self.high - self.low)
        for k in range(self.steps):
            p, derivative = self._step(p, k)
            if not ((_det(derivative) > 0) & (p >= self.low - slack).all(-1) & (p <= self.high + slack).all(-1)).all():
                raise InputError(
                    f"with {self.steps} steps the Moser map folds over itself at the walls; take more steps, a smaller "
                    "box, or a reference closer to the target there."
                )


class MoserFlow(Flow):
    """A density on a box in the plane, sampled by the Moser map from a uniform or a cut normal base.

    Its density is that of the numerical map: close to the target, and exact for the samples. The support is the box;
    ``log_prob`` is -inf outside. A base on a bounded box has no broadened copy, so both entries of ``log_probs`` are
    equal. The flow holds the function ``log_target`` and so cannot be written to a generator file.

    Parameters
    ----------
    log_target, bounds, grid, steps
        As for :class:`MoserTransform`.
    std, mean
        As for :class:`BoxBase`: None for the uniform base.

    Examples
    --------
    >>> flow = MoserFlow(lambda x: -2 * x.square().sum(-1), [(-1.5, 1.5), (-1.5, 1.5)], std=1.0, grid=32)
    >>> y, log_prob = flow.sample(5, torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(flow.log_prob(y), log_prob))
    True
    """

    def __init__(
        self,
        log_target: LogDensity,
        bounds: Sequence[tuple[float, float]],
        *,
        std: float | Sequence[float] | None = None,
        mean: float | Sequence[float] = 0.0,
        grid: int | tuple[int, int] = 64,
        steps: int = 48,
    ):
        check_bounds(bounds, 2)
        base = BoxBase(bounds, std, mean)
        super().__init__(base, MoserTransform(base.log_prob, log_target, bounds, grid=grid, steps=steps))

    def log_probs(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density at ``y``, ``(batch,)``, twice; -inf outside the box."""
        z, log_det = self.transform.inverse(y)
        inside = torch.isfinite(log_det)
        value = self.base.log_prob(z) + log_det
        value = torch.where(inside, value, -math.inf)
        return value, value


# --- the pieces ----------------------------------------------------------------------------------------------------


def _evaluate(name: str, log_density: LogDensity, points: Tensor) -> Tensor:
    """A log-density at ``(n, 2)`` points; InputError unless it is ``(n,)``, finite, and not so low as to be 0."""
    with torch.no_grad():
        value = log_density(points)
    if not isinstance(value, Tensor) or value.shape != (len(points),):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{name} must turn points (n, 2) into log-densities (n,): {len(points)} points gave {shape}.")
    bad = ~torch.isfinite(value)
    if bad.any():
        where = ", ".join(f"{x:.4g}" for x in points[bad.nonzero()[0, 0]].tolist())
        raise InputError(f"{name} is not finite at ({where}): both densities must be positive on the whole box.")
    if value.max() - value.min() > 600:
        raise InputError(f"{name} spans more than 600 on the box, where its density is no longer positive in floats.")
    return value.double()


def _log_mass(name: str, log_density: LogDensity, walls: Tensor) -> float:
    """log of the integral over the box, by Gauss-Legendre at two orders that must agree."""
    found = []
    for order in (96, 144):
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(order))
        middle, half = walls.mean(1), (walls[:, 1] - walls[:, 0]) / 2
        points = torch.cartesian_prod(*(m + h * nodes for m, h in zip(middle, half, strict=True)))
        value = _evaluate(name, log_density, points) + torch.outer(weights, weights).flatten().log()
        found.append(torch.logsumexp(value, 0).item() + half.log().sum().item())
    if abs(found[1] - found[0]) > 1e-3:
        raise InputError(
            f"the mass of {name} on the box is not resolved (two quadratures give its log as {found[0]:.6g} and "
            f"{found[1]:.6g}), so the masses cannot be matched; take a smaller box or a smoother density."
        )
    return found[1]


def _gradient_coefficients(difference: NDArray[np.float64], widths: Sequence[float]) -> NDArray[np.float64]:
    """Cubic B-spline coefficients of grad u, -Lap u = difference with Neumann walls: ``(2, nx + 4, ny + 4)``.

    In a cosine series the Laplacian, the derivative and the interpolation condition of the B-spline are all diagonal:
    u_k = g_k / |k|^2, the derivative turns cosines into sines, and the spline divides by (2 + cos(k h)) / 3 per axis.
    """
    nx, ny = difference.shape
    kx, ky = (np.pi * np.arange(n) / width for n, width in zip((nx, ny), widths, strict=True))
    square = kx[:, None] ** 2 + ky[None, :] ** 2
    square[0, 0] = 1.0
    u = dctn(difference, type=2, norm="ortho") / square
    u[0, 0] = 0.0  # a constant moves nothing; dropping it subtracts the mean of the difference
    u /= np.outer((2 + np.cos(np.pi * np.arange(nx) / nx)) / 3, (2 + np.cos(np.pi * np.arange(ny) / ny)) / 3)
    out = []
    for axis, k in enumerate((kx[:, None], ky[None, :])):
        # sine k sits where cosine k - 1 would, and the highest one is absent
        sines = np.roll(-u * k, -1, axis=axis)
        sines[(slice(None),) * axis + (-1,)] = 0.0
        values = idct(idst(sines, type=2, norm="ortho", axis=axis), type=2, norm="ortho", axis=1 - axis)
        padded = np.pad(values, _PAD, mode="symmetric")
        sign = np.ones(padded.shape[axis])
        sign[:_PAD] = sign[-_PAD:] = -1.0
        out.append(padded * np.expand_dims(sign, 1 - axis))
    return np.stack(out)


def _cubic_weights(f: Tensor) -> tuple[Tensor, Tensor]:
    """The four cubic B-spline weights at offsets f in [0, 1), and their derivatives: ``(..., 4)`` each."""
    g = 1 - f
    weights = [g**3 / 6, 2 / 3 - f**2 * (1 + g) / 2, 2 / 3 - g**2 * (1 + f) / 2, f**3 / 6]
    slopes = [-(g**2) / 2, f * (3 * f - 4) / 2, -g * (3 * g - 4) / 2, f**2 / 2]
    return torch.stack(weights, -1), torch.stack(slopes, -1)


def _det(m: Tensor) -> Tensor:
    return m[:, 0, 0] * m[:, 1, 1] - m[:, 0, 1] * m[:, 1, 0]


def _log_det(m: Tensor) -> Tensor:
    det = _det(m)
    if not (det > 0).all():
        raise RuntimeError("The Moser map folds over itself at one of these points: take more steps.")
    return det.log()
