"""What the regularised energies of Theorem 1 cost: L1 and W2 errors of the density against the threshold."""

import math

import numpy as np
import openmm
import torch
from scipy.integrate import cumulative_simpson, simpson

import openmm_bg as bg
from _rehman_friesecke.molecule import load_molecule
from _rehman_friesecke.tables import Row
from openmm_bg.analysis import backbone_dihedrals, torus_w2
from openmm_bg.analysis.statistics import kish_size

CONSTRUCTIONS = ("rational", "smooth", "pairwise")
BALL = 1.0
"""nm: the domain of the ion pair is a ball of this radius around the cation."""
PAIR_THRESHOLDS = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 20.0)
MOLECULE_THRESHOLDS = (25.0, 30.0, 35.0, 40.0, 45.0, 50.0, 60.0)


def ion_pair() -> openmm.System:
    """Sodium and chloride in a medium of permittivity 78.5: Lennard-Jones and Coulomb, as in (2) of the paper."""
    system = openmm.System()
    force = openmm.NonbondedForce()
    # the medium divides the product of the charges, so each charge by the root
    charge = 1 / math.sqrt(78.5)
    for mass, sign, sigma, epsilon in ((22.99, 1, 0.2439, 0.3658), (35.45, -1, 0.4478, 0.1489)):
        system.addParticle(mass)
        force.addParticle(sign * charge, sigma, epsilon)
    force.setNonbondedMethod(openmm.NonbondedForce.NoCutoff)
    system.addForce(force)
    return system


def pair_rows(points: int = 200_001) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Exact errors for the ion pair, by quadrature over the distance.

    Both densities are radial, so the optimal transport moves along the radius and W2 is that of the radii.

    Returns
    -------
    rows : list of dict
    curves : dict
        ``r`` in nm and u - u_min in kT: the true one and, at a threshold of 4 kT, each construction.
    """
    energy = bg.ForceFieldEnergy(ion_pair(), temperature=300, compile=False)
    # one point short of the collision, where the true energy is infinite
    r = np.linspace(0.0, BALL, points)[1:]
    x = torch.zeros(len(r), 2, 3, dtype=torch.float64)
    x[:, 1, 0] = torch.as_tensor(r)
    u = _values(energy, x)
    lowest = float(u.min())
    shell = 4 * math.pi * r**2
    z = simpson(shell * np.exp(lowest - u), x=r)
    volume = 4 / 3 * math.pi * BALL**3
    exact = shell * np.exp(lowest - u) / z
    rows, curves = [], {"r": r, "true": u - lowest}
    for threshold in PAIR_THRESHOLDS:
        for kind in CONSTRUCTIONS:
            soft = _values(bg.regularize(energy, threshold, kind, offset=lowest), x)
            density = shell * np.exp(lowest - soft)
            density /= simpson(density, x=r)
            l1 = float(simpson(np.abs(density - exact), x=r))
            bound = 2 * volume * math.exp(-threshold) / z
            rows.append(
                {
                    "part": "regularised",
                    "table": "ion pair",
                    "kind": kind,
                    "threshold": threshold,
                    "eps": 1 / threshold,
                    "l1": l1,
                    "l1_bound": bound,
                    "w2": _radial_w2(r, exact, density),
                    "w2_bound": 2 * BALL * math.sqrt(l1 / 2),
                    "w2_bound_a_priori": 2 * BALL * math.sqrt(bound / 2),
                    "largest_change_below": float(np.abs(soft - u)[u - lowest <= threshold].max()),
                }
            )
            if threshold == 4.0:
                curves[kind] = soft - lowest
    return rows, curves


def _values(energy: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return torch.cat([energy(part) for part in x.split(50_000)]).numpy()


def _radial_w2(r: np.ndarray, one: np.ndarray, other: np.ndarray) -> float:
    """W2 of two densities of the radius, nm, from their quantile functions."""
    # quantiles at mid-steps of equal probability, finer towards both ends where a small core has its mass
    edges = 0.5 * (1 - np.cos(np.linspace(0, math.pi, 400_001)))
    middle, width = 0.5 * (edges[1:] + edges[:-1]), np.diff(edges)
    quantiles = []
    for density in (one, other):
        mass = cumulative_simpson(density, x=r, initial=0)
        quantiles.append(np.interp(middle, mass / mass[-1], r))
    return math.sqrt(float(width @ (quantiles[0] - quantiles[1]) ** 2))


def molecule_rows(positions: np.ndarray, temperature: float = 300.0) -> list[Row]:
    """Errors for alanine dipeptide by reweighting frames of the true density, which is exact: w = exp(u - u_eps).

    W2 is that of phi and psi between the same frames with and without weights, so it has no floor of its own. Frames
    of the true density cannot show mass that the regularised one puts where the true one has none; there the energy is
    at least the threshold, and the first step of the bound, 2 E|1 - w|, counts what frames can show.

    Parameters
    ----------
    positions : ndarray, (frames, atoms, 3)
        nm, at ``temperature``.
    """
    molecule = load_molecule()
    energy = bg.ForceFieldEnergy(molecule.system, temperature=temperature)
    x = torch.as_tensor(positions)
    u = _values(energy, x)
    lowest = _minimum(molecule.system, positions[int(u.argmin())], energy)
    angles = backbone_dihedrals(positions, molecule.topology).pair()
    rows = []
    for threshold in MOLECULE_THRESHOLDS:
        for kind in CONSTRUCTIONS:
            soft = _values(bg.regularize(energy, threshold, kind, offset=lowest), x)
            # the per-pair form sums in another order: what is rounding counts as rounding
            log_weight = u - soft
            weight = np.exp(log_weight)
            l1 = float(np.abs(weight / weight.mean() - 1).mean())
            w2 = torus_w2(angles, angles, b_weights=weight)
            rows.append(
                {
                    "part": "regularised",
                    "table": "alanine dipeptide",
                    "kind": kind,
                    "threshold": threshold,
                    "eps": 1 / threshold,
                    "frames": len(u),
                    "above": float((u - lowest > threshold).mean()),
                    "l1": l1,
                    "l1_bound": 2 * float(np.abs(1 - weight).mean()),
                    "w2": w2,
                    "w2_bound": 180 * math.sqrt(2) * math.sqrt(l1 / 2),
                    "effective": kish_size(weight) / len(u),
                    "largest_log_weight": float(np.abs(log_weight).max()),
                }
            )
    return rows


def _minimum(system: openmm.System, positions: np.ndarray, energy: bg.ForceFieldEnergy) -> float:
    """Reduced energy of the minimum below a conformation, from which thresholds are counted."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    openmm.LocalEnergyMinimizer.minimize(context, 0.1)
    x = context.getState(positions=True).getPositions(asNumpy=True)._value
    return float(_values(energy, torch.as_tensor(np.array(x))[None])[0])
