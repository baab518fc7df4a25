"""Annealed Langevin dynamics on top of a learned velocity field, with weights that make it exact.

Walkers start from the base and go through a sequence of times. Between two times the velocity field carries them, and
the weight takes up what it misses: ``log w += f_t(x) - f_t'(x') + log|det dx'/dx|``. At every time Metropolis-adjusted
Langevin moves leave exp(-f_t) as it is and the weights alone. Without a velocity field this is annealed importance
sampling; with a perfect one all weights are equal after any number of steps.

References
----------
Jarzynski, Phys. Rev. E 56, 5018 (1997); Neal, Stat. Comput. 11, 125 (2001); Vaikuntanathan & Jarzynski, J. Chem. Phys.
134, 054107 (2011); Albergo & Vanden-Eijnden, NETS: a non-equilibrium transport sampler, arXiv:2410.02711.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openmm_bg.errors import InputError
from openmm_bg.flows import ContinuousFlow, GradientFlowVelocity
from openmm_bg.flows.base import wrap
from openmm_bg.generator import BoltzmannGenerator, Samples
from openmm_bg.sampling.interpolation import GradientFlowPath, Interpolation, PathPoint
from openmm_bg.sampling.target import Target

Path = Interpolation | GradientFlowPath
ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]

_KNOTS = 65
# where nothing is refused (angles without a force) lengths would grow for ever
_LONGEST = math.log(1e4)
_NORMAL = statistics.NormalDist()


@dataclass
class Walkers:
    """Where an annealed sweep stands.

    Attributes
    ----------
    t : float
    x : Tensor, (n, dimension)
    log_weights : Tensor, (n,)
        Since the last resampling.
    log_z : float
        What resampling has taken out of the weights.
    energy, gradient : Tensor, (n,) and (n, dimension)
        Of the target at x.
    acceptance : float
        Share of Langevin moves accepted at this time; NaN where there were none.
    """

    t: float
    x: Tensor
    log_weights: Tensor
    log_z: float
    energy: Tensor
    gradient: Tensor
    acceptance: float


@dataclass
class StepSizes:
    """Lengths of Langevin moves along the path, tuned to accept 60 percent; fixed where not ``adapting``.

    A Langevin move of size s is accepted with probability 2 Phi(-c s^(3/2)), c the roughness of the place (Roberts &
    Rosenthal, J. R. Stat. Soc. B 60, 255 (1998)): an observed acceptance gives c, and c the size to accept 60 percent.
    """

    log_size: Tensor = field(default_factory=lambda: torch.full((_KNOTS,), math.log(1e-2), dtype=torch.float64))
    adapting: bool = True

    def __call__(self, t: float) -> float:
        return math.exp(float(self.log_size[self._knot(t)]))

    def learn(self, t: float, acceptance: float) -> None:
        if self.adapting:
            # far off, the law holds poorly
            seen = min(max(acceptance, 0.01), 0.99)
            change = 2 / 3 * math.log(_NORMAL.inv_cdf(0.3) / _NORMAL.inv_cdf(0.5 * seen))
            change = min(max(change, -1.0), 1.0)
            knot = self._knot(t)
            # a sweep comes to later times next, and starts there with what it has learned here
            share = 0.9 ** (torch.arange(_KNOTS, dtype=torch.float64) - knot)
            share[:knot] = 0.0
            share[max(0, knot - 1) : knot] = 0.5
            self.log_size = (self.log_size + share * change).clamp(max=_LONGEST)

    def _knot(self, t: float) -> int:
        return min(_KNOTS - 1, max(0, round(t * (_KNOTS - 1))))


@torch.no_grad()
def anneal(
    path: Path,
    target: ValueAndGradient,
    times: Tensor,
    n: int,
    generator: torch.Generator,
    *,
    moves: int = 1,
    leapfrog: int = 1,
    sizes: StepSizes,
    transport: bool = True,
    substeps: int = 1,
    resample_below: float = 0.0,
) -> Iterator[Walkers]:
    """Walkers at each of ``times`` in turn, weighted for exp(-f_t).

    Parameters
    ----------
    path : Interpolation or GradientFlowPath
    target : callable
        Energies and gradients of the target, ``(n,)`` and ``(n, dimension)``; one call per time and leapfrog step.
    times : Tensor, (k,)
        Rising, the first above 0.
    n : int
    generator : torch.Generator
    moves : int
        Moves at each time.
    leapfrog : int
        Steps of a move: one makes it a Langevin move; many go farther for their energies, in straighter lines.
    sizes : StepSizes
    transport : bool
        Whether the velocity field moves the walkers; without it this is annealed importance sampling.
    substeps : int
        Steps of the integrator between two times.
    resample_below : float
        Resample when the effective share of walkers falls below this; 0 never does.
    """
    flow = path.flow
    x = flow.base.sample(n, generator)
    energy, gradient = target(x)
    t, log_z = 0.0, 0.0
    point = path(x.new_tensor(0.0), x, energy, gradient)
    # zero where the path starts at the base
    log_weights = -flow.base.log_prob(x) - point.value
    for time in times.tolist():
        before = point.value
        if transport:
            x, log_det = flow.transform.integrate(x, t, time, steps=substeps)
            energy, gradient = target(x)
        else:
            log_det = x.new_zeros(n)
        t = time
        point = path(x.new_tensor(t), x, energy, gradient)
        change = before - point.value + log_det
        # a walker without an energy has no weight, whatever infinities met
        log_weights = torch.where(torch.isfinite(change), log_weights + change, -math.inf)
        if resample_below > 0 and float(_share(log_weights)) < resample_below:
            log_z += float(torch.logsumexp(log_weights, 0)) - math.log(n)
            chosen = systematic(log_weights, generator)
            x, energy, gradient = x[chosen], energy[chosen], gradient[chosen]
            point = PathPoint(point.value[chosen], point.gradient[chosen], point.rate[chosen])
            log_weights = torch.zeros_like(log_weights)
        accepted = math.nan
        for _ in range(moves):
            x, energy, gradient, point, accepted = _move(
                path, target, t, x, energy, gradient, point, sizes(t), leapfrog, generator
            )
            sizes.learn(t, accepted)
        yield Walkers(t, x, log_weights, log_z, energy, gradient, accepted)


def _move(
    path: Path,
    target: ValueAndGradient,
    t: float,
    x: Tensor,
    energy: Tensor,
    gradient: Tensor,
    point: PathPoint,
    size: float,
    leapfrog: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, PathPoint, float]:
    """One Hamiltonian move of all walkers at time t; of one leapfrog step it is a Langevin move."""
    base = path.flow.base
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    if hasattr(base, "centre"):
        # a base on the subspace of zero centroid: walkers must not leave it
        noise = base.centre(noise)
    circular = getattr(base, "circular", None)
    turning = circular is not None and bool(circular.any())
    length: float | Tensor = math.sqrt(2 * size)
    if leapfrog > 1:
        # lengths vary, or a vibration whose period divides the trajectory would never be left
        length = length * (0.6 + 0.8 * torch.rand(len(x), 1, generator=generator, dtype=x.dtype))
    new, new_energy, new_gradient, new_point, momentum = x, energy, gradient, point, noise
    for _ in range(leapfrog):
        half = momentum - 0.5 * length * new_point.gradient
        # momenta do not turn with the angles, so the way back undoes the very turn that led here
        lifted = new + length * half
        new = torch.where(circular, wrap(lifted), lifted) if turning else lifted
        new_energy, new_gradient = target(new)
        new_point = path(x.new_tensor(t), new, new_energy, new_gradient)
        momentum = half - 0.5 * length * new_point.gradient
    log_accept = point.value - new_point.value + 0.5 * (noise.square() - momentum.square()).sum(-1)
    # without an energy a state is never entered
    log_accept = torch.nan_to_num(log_accept, nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    take = torch.rand(len(x), generator=generator, dtype=x.dtype).log() < log_accept
    rows = take[:, None]
    point = PathPoint(
        torch.where(take, new_point.value, point.value),
        torch.where(rows, new_point.gradient, point.gradient),
        torch.where(take, new_point.rate, point.rate),
    )
    x, gradient = torch.where(rows, new, x), torch.where(rows, new_gradient, gradient)
    return x, torch.where(take, new_energy, energy), gradient, point, float(take.double().mean())


def _share(log_weights: Tensor) -> Tensor:
    """Effective share of walkers, 0 to 1."""
    w = torch.softmax(log_weights, 0)
    return 1 / (len(w) * w.square().sum())


def systematic(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """Indices of as many walkers, drawn systematically in proportion to their weights."""
    n = len(log_weights)
    cumulative = torch.softmax(log_weights.double(), 0).cumsum(0)
    places = (torch.arange(n, dtype=torch.float64) + torch.rand(1, generator=generator, dtype=torch.float64)) / n
    return torch.searchsorted(cumulative / cumulative[-1], places).clamp(max=n - 1)


def annealed_transport(
    generator: BoltzmannGenerator,
    n: int,
    *,
    steps: int = 50,
    moves: int = 1,
    leapfrog: int = 1,
    rate: float = 0.0,
    transport: bool = True,
    substeps: int = 1,
    resample_below: float = 0.0,
    tuning: int = 200,
    chunk: int = 4096,
    seed: int = 0,
) -> Samples:
    """Weighted samples of a target by a learned velocity field and Langevin moves along its path.

    Exact for any field: the weights are those of Jarzynski's equality, and their mean is Z. Move lengths are tuned on
    walkers of their own, so that those returned are independent of each other (without resampling).

    Parameters
    ----------
    generator : BoltzmannGenerator
        With an energy and a :class:`ContinuousFlow`.
    n : int
    steps, moves : int
        Times on the way, evenly spaced, and moves at each.
    leapfrog : int
        Leapfrog steps of a move; one makes it a Langevin move, see :func:`anneal`.
    rate : float
        Of the schedule it was trained with; see :class:`Interpolation`. A gradient flow has its own path and no rate.
    transport : bool
        False leaves the velocity out: annealed importance sampling.
    substeps, resample_below
        See :func:`anneal`; resampling makes walkers of one chunk depend on each other.
    tuning : int
        Walkers that tune the moves.
    chunk : int
        Walkers at a time.
    seed : int

    Returns
    -------
    Samples
        ``log_prob`` is NaN: a walker's density after Langevin moves is not known, nor needed.

    Raises
    ------
    InputError
        If the generator has no energy or no continuous flow, or an argument is out of range.

    Examples
    --------
    Walkers of an untrained field, which owe everything to their moves:

    >>> import openmm_bg as bg
    >>> from openmm_bg.flows import Base, ContinuousFlow, PerceptronVelocity
    >>> from openmm_bg.sampling import log_normalizer
    >>> target = bg.systems.load("double_well", beta=2.0)
    >>> flow = ContinuousFlow(Base([False] * 2), PerceptronVelocity(2, 16))
    >>> generator = bg.BoltzmannGenerator(target, flow, defensive=0)
    >>> walkers = annealed_transport(generator, 2000, steps=20, leapfrog=4, seed=1)
    >>> z = log_normalizer(walkers.log_weights)
    >>> abs(z.value - target.log_z) < 4 * z.error < 0.2
    True
    """
    least = {
        "n": (n, 1),
        "steps": (steps, 1),
        "moves": (moves, 0),
        "leapfrog": (leapfrog, 1),
        "substeps": (substeps, 1),
        "chunk": (chunk, 1),
    }
    if moves:
        least["tuning"] = (tuning, 2)
    for name, (value, bound) in least.items():
        if not isinstance(value, int) or value < bound:
            raise InputError(f"{name} must be a whole number of at least {bound}, not {value!r}.")
    if generator.energy is None or not isinstance(generator.flow, ContinuousFlow):
        raise InputError("Annealed transport needs a generator with an energy and a ContinuousFlow.")
    if generator.flow.transform.divergence != "exact":
        raise InputError(
            "Weights from an estimated divergence are biased; set flow.transform.divergence = 'exact' first."
        )
    gradient_flow = isinstance(generator.flow.velocity, GradientFlowVelocity)
    path = GradientFlowPath(generator.flow) if gradient_flow else Interpolation(generator.flow, rate)
    target = Target(generator, torch.float64).value_and_gradient
    random = torch.Generator().manual_seed(seed)
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:]
    sizes = StepSizes()
    settings = {"moves": moves, "leapfrog": leapfrog, "transport": transport, "substeps": substeps, "sizes": sizes}
    if moves:
        for _ in range(2):
            for _ in anneal(path, target, times, tuning, random, **settings):
                pass
    sizes.adapting = False
    parts, log_weights = [], []
    left = n
    while left > 0:
        size = min(chunk, left)
        left -= size
        for walkers in anneal(path, target, times, size, random, resample_below=resample_below, **settings):
            last = walkers
        parts.append(last.x)
        log_weights.append(last.log_weights + last.log_z)
    x = generator.place(torch.cat(parts))
    weights = torch.cat(log_weights)
    with torch.no_grad():
        energy = generator.energy(x)
    return Samples(x, torch.full_like(weights, math.nan), energy, weights)
