"""Small exact systems and deliberately imperfect flows for the tests of moves."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import openmm
import torch
from openmm import app, unit
from torch import nn

from openmm_bg.coordinates import InternalCoordinates, ZMatrix
from openmm_bg.energies import Energy
from openmm_bg.flows import Base, Flow, Transform, wrap
from openmm_bg.generator import BoltzmannGenerator
from openmm_bg.units import thermal_energy

TEMPERATURE = 300.0
KT = thermal_energy(TEMPERATURE)
HOT = 900.0
FACTOR = HOT / TEMPERATURE


class ProductFlow(Flow):
    """Independent coordinates: normals, and cardioids (1 + a cos(phi - phi0)) / 2 pi for angles on the circle."""

    def __init__(self, location, scale, circular=None):
        nn.Module.__init__(self)
        self.register_buffer("location", torch.as_tensor(location, dtype=torch.float64))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64))
        circular = [False] * len(self.location) if circular is None else circular
        self.register_buffer("circular", torch.tensor(circular))

    @property
    def dimension(self):
        return len(self.location)

    def sample(self, n, generator=None, *, broadened=False):
        options = {"generator": generator, "dtype": torch.float64}
        normal = self.location + self.scale * torch.randn(n, self.dimension, **options)
        angle = 2 * math.pi * torch.rand(n, self.dimension, **options)
        keep = torch.rand(n, self.dimension, **options) < (1 + self.scale * torch.cos(angle)) / 2
        angle = self.location + torch.where(keep, angle, angle + math.pi)
        y = torch.where(self.circular, torch.remainder(angle + math.pi, 2 * math.pi) - math.pi, normal)
        return y, self.log_prob(y)

    def terms(self, y):
        """Log density of the base and log-determinant, (n, dimension) each."""
        z = (y - self.location) / self.scale
        normal = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
        cardioid = torch.log1p(self.scale * torch.cos(y - self.location)) - math.log(2 * math.pi)
        return torch.where(self.circular, cardioid, normal), torch.where(self.circular, 0.0, -self.scale.log())

    def log_probs(self, y):
        base, log_det = self.terms(y)
        total = (base + log_det).sum(-1)
        return total, total


class PriorDropped(ProductFlow):
    """A faulty flow that reports its log-determinant as its density."""

    def log_probs(self, y):
        total = self.terms(y)[1].expand_as(y).sum(-1)
        return total, total


class JacobianDropped(InternalCoordinates):
    """Faulty coordinates without a volume element (the domain is kept)."""

    def forward(self, x):
        q, log_volume = super().forward(x)
        return q, torch.where(torch.isfinite(log_volume), 0.0, log_volume)

    def inverse(self, q, frame=None):
        x, log_volume = super().inverse(q, frame)
        return x, torch.where(torch.isfinite(log_volume), 0.0, log_volume)


def simulation_of(system, topology, positions, platform="Reference", seed=1, time_step=0.001):
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, time_step)
    integrator.setRandomNumberSeed(seed)
    simulation = app.Simulation(topology, system, integrator, openmm.Platform.getPlatform(platform))
    if positions is not None:
        simulation.context.setPositions(positions)
        simulation.context.setVelocitiesToTemperature(TEMPERATURE, seed)
    return simulation


def positions_of(simulation):
    return simulation.context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.nanometer)


def velocities_of(simulation):
    return simulation.context.getState(velocities=True).getVelocities(asNumpy=True)._value


# -- one particle in a harmonic well

SPRING = 100.0  # kJ/mol/nm^2


def harmonic_system():
    system = openmm.System()
    system.addParticle(39.9)
    force = openmm.CustomExternalForce("0.5*k*(x^2+y^2+z^2)")
    force.addGlobalParameter("k", SPRING)
    force.addParticle(0)
    system.addForce(force)
    topology = app.Topology()
    topology.addAtom("AR", app.element.argon, topology.addResidue("AR", topology.addChain()))
    return system, topology


def harmonic_generator(width=1.5):
    sigma = math.sqrt(KT / SPRING)
    return BoltzmannGenerator(None, ProductFlow([0.0] * 3, [width * sigma] * 3), defensive=0)


# -- a chain of four atoms: two soft bonds more than a bend, and a torsion

BOND, BOND_SIGMA = 0.15, 0.012
ANGLE, ANGLE_SIGMA = 1.9, 0.25
TORSION, TORSION_PHASE = 3.0, 1.0


def chain_topology():
    topology = app.Topology()
    residue = topology.addResidue("HOO", topology.addChain())
    atoms = [
        topology.addAtom(name, element, residue)
        for name, element in (
            ("H1", app.element.hydrogen),
            ("O1", app.element.oxygen),
            ("O2", app.element.oxygen),
            ("H2", app.element.hydrogen),
        )
    ]
    for a, b in pairwise(atoms):
        topology.addBond(a, b)
    return topology


def chain_system(masses=(12.0, 16.0, 16.0, 12.0)):
    system = openmm.System()
    for mass in masses:
        system.addParticle(mass)
    bonds, angles, torsions = openmm.HarmonicBondForce(), openmm.HarmonicAngleForce(), openmm.PeriodicTorsionForce()
    for i in range(3):
        bonds.addBond(i, i + 1, BOND, KT / BOND_SIGMA**2)
    for i in range(2):
        angles.addAngle(i, i + 1, i + 2, ANGLE, KT / ANGLE_SIGMA**2)
    torsions.addTorsion(0, 1, 2, 3, 1, TORSION_PHASE, TORSION)
    for force in (bonds, angles, torsions):
        system.addForce(force)
    return system


def chain_energy(q):
    """U/kT of internal coordinates (n, 6): three bonds, two angles, one torsion."""
    bonds, angles, torsion = q[:, :3], q[:, 3:5], q[:, 5]
    return (
        0.5 * ((bonds - BOND) ** 2).sum(1) / BOND_SIGMA**2
        + 0.5 * ((angles - ANGLE) ** 2).sum(1) / ANGLE_SIGMA**2
        + TORSION * (1 + np.cos(torsion - TORSION_PHASE)) / KT
    )


def chain_moments(q):
    """Observables (n, 4): mean bond, mean cosine of the angles, sine and cosine of the torsion."""
    return np.stack([q[:, :3].mean(1), np.cos(q[:, 3:5]).mean(1), np.sin(q[:, 5]), np.cos(q[:, 5])], axis=1)


def chain_exact():
    """The same averages by quadrature; in internal coordinates the chain's degrees of freedom are independent."""

    def average(f, x, log_density):
        weight = np.exp(log_density - log_density.max())
        return np.sum(f(x) * weight) / np.sum(weight)

    r = np.linspace(0.05, 0.3, 20001)
    theta = np.linspace(1e-6, np.pi - 1e-6, 20001)
    phi = np.linspace(-np.pi, np.pi, 20001)[:-1]
    log_r = -0.5 * (r - BOND) ** 2 / BOND_SIGMA**2 + 2 * np.log(r)
    log_theta = -0.5 * (theta - ANGLE) ** 2 / ANGLE_SIGMA**2 + np.log(np.sin(theta))
    log_phi = -TORSION * np.cos(phi - TORSION_PHASE) / KT
    return np.array(
        [
            average(lambda t: t, r, log_r),
            average(np.cos, theta, log_theta),
            average(np.sin, phi, log_phi),
            average(np.cos, phi, log_phi),
        ]
    )


def chain_zmatrix():
    return ZMatrix((0, 1, 2), np.array([[3, 2, 1, 0]]))


CHAIN_POSITIONS = np.array([[0.14, 0.05, 0.0], [0.0, 0.0, 0.0], [0.0, -0.15, 0.0], [0.1, -0.2, 0.12]])


def chain_generator(flow=ProductFlow, coordinates=InternalCoordinates, topology=True):
    """Means off, spreads too wide: an imperfect generator with an acceptance of about a third."""
    return BoltzmannGenerator(
        None,
        flow(
            [BOND + 0.004] * 3 + [ANGLE - 0.08] * 2 + [TORSION_PHASE + math.pi - 0.4],
            [1.2 * BOND_SIGMA] * 3 + [1.2 * ANGLE_SIGMA] * 2 + [0.5],
            [False] * 5 + [True],
        ),
        coordinates(chain_zmatrix()),
        topology=chain_topology() if topology else None,
        defensive=0,
    )


# -- a trimer with both bonds constrained and no potential

TRIMER_MASSES = (12.0, 3.0, 12.0)


def trimer():
    system = openmm.System()
    for mass in TRIMER_MASSES:
        system.addParticle(mass)
    constraints = [(0, 1, 0.1), (1, 2, 0.12)]
    for constraint in constraints:
        system.addConstraint(*constraint)
    topology = app.Topology()
    residue = topology.addResidue("TRI", topology.addChain())
    atoms = [topology.addAtom(name, app.element.carbon, residue) for name in "ABC"]
    topology.addBond(atoms[0], atoms[1])
    topology.addBond(atoms[1], atoms[2])
    coordinates = InternalCoordinates(
        ZMatrix((0, 1, 2), np.zeros((0, 4), dtype=int)), constraints=constraints, masses=TRIMER_MASSES
    )
    generator = BoltzmannGenerator(None, ProductFlow([1.9], [0.8]), coordinates, defensive=0)
    positions = np.array([[0.1, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.12, 0.0]])
    return system, topology, generator, positions


# -- flows with latents, a molecule with constrained bonds to hydrogen, and cheap energies


class Stretched(Transform):
    """Normals stretched and moved; circles by the Moebius map that gathers them around the location."""

    def __init__(self, location, scale, circular):
        super().__init__(len(location))
        self.register_buffer("location", torch.tensor(location, dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))
        self.register_buffer("circular", torch.tensor(circular))

    def _slope(self, z, k):
        # of 2 atan(k tan(z / 2))
        return k / (torch.cos(z / 2) ** 2 + (k * torch.sin(z / 2)) ** 2)

    def forward(self, z, context=None):
        turned = wrap(self.location + 2 * torch.atan2(self.scale * torch.sin(z / 2), torch.cos(z / 2)))
        y = torch.where(self.circular, turned, self.location + self.scale * z)
        log_det = torch.where(self.circular, self._slope(z, self.scale).log(), self.scale.log())
        return y, log_det.sum(-1)

    def inverse(self, y, context=None):
        offset = y - self.location
        angle = wrap(offset)
        turned = 2 * torch.atan2(torch.sin(angle / 2), self.scale * torch.cos(angle / 2))
        z = torch.where(self.circular, turned, offset / self.scale)
        log_det = torch.where(self.circular, self._slope(angle, 1 / self.scale).log(), -self.scale.log())
        return z, log_det.sum(-1)


def latent_flow(location, scale, circular):
    return Flow(Base(circular), Stretched(location, scale, circular))


def stretched_generator(coordinates=None, topology=None, width=0.8, defensive=0.3):
    """A generator of the chain with latents, too narrow and off; with a large share of its broadened copy."""
    coordinates = InternalCoordinates(chain_zmatrix()) if coordinates is None else coordinates
    centre = {"bond": BOND + 0.003, "angle": ANGLE - 0.1, "torsion": TORSION_PHASE + math.pi - 0.5}
    spread = {"bond": width * BOND_SIGMA, "angle": width * ANGLE_SIGMA, "torsion": 0.6}
    kinds = coordinates.kinds
    flow = latent_flow([centre[k] for k in kinds], [spread[k] for k in kinds], [k == "torsion" for k in kinds])
    return BoltzmannGenerator(None, flow, coordinates, topology=topology, defensive=defensive)


def hydrogen_bonds_constrained():
    """The chain with both bonds to its ends constrained: System, generator, positions.

    The two constraints share no atom, so that their mass-metric factor is constant and the moments of what is left are
    those of the free chain.
    """
    masses = (1.008, 16.0, 16.0, 1.008)
    system = chain_system(masses)
    constraints = [(0, 1, BOND), (2, 3, BOND)]
    for constraint in constraints:
        system.addConstraint(*constraint)
    coordinates = InternalCoordinates(chain_zmatrix(), constraints=constraints, masses=masses)
    generator = stretched_generator(coordinates, chain_topology())
    q = torch.tensor([[BOND, ANGLE, ANGLE, 1.0]], dtype=torch.float64)
    return system, generator, coordinates.inverse(q)[0][0].numpy()


class CheapChain(Energy):
    """A poor relative of the chain: bonds too soft and long, angles too small, no torsion at all."""

    def __init__(self):
        super().__init__((4, 3))

    def reduced(self, x):
        arms = x.diff(dim=1)
        bonds = arms.norm(dim=-1)
        angles = torch.acos(-(arms[:, 1:] * arms[:, :-1]).sum(-1) / (bonds[:, 1:] * bonds[:, :-1]))
        stretch = ((bonds - BOND - 0.002) / BOND_SIGMA).square().sum(-1)
        return 0.4 * stretch + 0.5 * ((angles - ANGLE + 0.05) / ANGLE_SIGMA).square().sum(-1)

    def potential(self, x):
        return self(x) * KT


class HarmonicEnergy(Energy):
    """A well of another stiffness than the harmonic System's."""

    def __init__(self, stiffness):
        super().__init__((3,))
        self.stiffness = stiffness

    def reduced(self, x):
        return 0.5 * self.stiffness * SPRING * x.square().sum(-1) / KT

    def potential(self, x):
        return self(x) * KT


def exact_chain(n, factor, rng):
    """Internal coordinates (n, 6) of the chain at `factor` times the temperature: all of them are independent."""

    def draw(grid, log_density, size):
        cumulative = np.cumsum(np.exp(log_density - log_density.max()))
        return np.interp(rng.uniform(size=size), cumulative / cumulative[-1], grid)

    r, theta, phi = (
        np.linspace(0.05, 0.3, 5001),
        np.linspace(1e-6, np.pi - 1e-6, 5001),
        np.linspace(-np.pi, np.pi, 5001),
    )
    bonds = draw(r, -0.5 * (r - BOND) ** 2 / BOND_SIGMA**2 / factor + 2 * np.log(r), (n, 3))
    angles = draw(theta, -0.5 * (theta - ANGLE) ** 2 / ANGLE_SIGMA**2 / factor + np.log(np.sin(theta)), (n, 2))
    torsion = draw(phi, -TORSION * np.cos(phi - TORSION_PHASE) / KT / factor, (n, 1))
    return np.concatenate([bonds, angles, torsion], 1)
