"""A System in which one molecule can be decoupled from everything else, and the integrator that switches it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import unit

from openmm_bg.errors import InputError

ELECTROSTATICS, STERICS = "lambda_electrostatics", "lambda_sterics"
"""Context parameters of the decoupled System, 1 for full coupling and 0 for none."""

_COULOMB = 138.93545764438198  # kJ/mol nm/e^2

# They act between time steps, on the box or on velocities; a protocol with a work of its own has no place for them.
_ACTING = {
    "AndersenThermostat", "CMMotionRemover", "MonteCarloAnisotropicBarostat", "MonteCarloBarostat",
    "MonteCarloFlexibleBarostat", "MonteCarloMembraneBarostat",
}  # fmt: skip
# Bonded forces, restraints and biases, which stay as they are, and those that the alchemical factory replaces. Any
# other would keep the molecule coupled to its surroundings.
_KNOWN = {
    "CMAPTorsionForce", "CustomAngleForce", "CustomBondForce", "CustomCVForce", "CustomCentroidBondForce",
    "CustomCompoundBondForce", "CustomExternalForce", "CustomTorsionForce", "CustomVolumeForce", "HarmonicAngleForce",
    "HarmonicBondForce", "OrientationRestraintForce", "PeriodicTorsionForce", "RBTorsionForce", "RGForce", "RMSDForce",
    "CustomGBForce", "GBSAOBCForce", "NonbondedForce",
}  # fmt: skip


def decoupled_system(system: openmm.System, atoms: NDArray[np.int64], groups: int = -1) -> openmm.System:
    """A copy of a System with soft-core sterics and scaled electrostatics between a molecule and all other particles.

    At full coupling it is the System itself, but for the long-range dispersion correction of the molecule, which is a
    constant while the box is. Decoupled, the molecule is in vacuum: its internal interactions never change. With PME
    the charges are scaled where the whole of the lattice sum is taken (the 'exact' treatment of openmmtools), which
    would take the molecule's own electrostatics away as well; a sum over its pairs puts that back.

    Parameters
    ----------
    system : openmm.System
        Left as it is.
    atoms : int array
        The molecule.
    groups : int
        Force groups that are kept, as a bit mask. Barostats, Andersen thermostats and centre-of-mass motion removers
        are not.

    Raises
    ------
    InputError
        If a force would keep the molecule coupled to its surroundings.
    """
    molecule = [int(i) for i in atoms]
    if len(molecule) == system.getNumParticles():
        raise InputError(
            "The generator's molecule is the whole System, so there is nothing to decouple it from; use "
            "BoltzmannGeneratorSampler."
        )
    kept = copy.deepcopy(system)
    for index in reversed(range(kept.getNumForces())):
        force = kept.getForce(index)
        name = type(force).__name__
        if name in _ACTING or not groups >> force.getForceGroup() & 1:
            kept.removeForce(index)
        elif name not in _KNOWN:
            raise InputError(
                f"The System has a {name}, from which a molecule cannot be decoupled; switching moves need a force "
                "field whose nonbonded interactions are a NonbondedForce."
            )
    nonbonded = [force for force in kept.getForces() if isinstance(force, openmm.NonbondedForce)]
    if len(nonbonded) != 1:
        raise InputError(f"The System has {len(nonbonded)} NonbondedForces; switching moves need exactly one.")
    method = nonbonded[0].getNonbondedMethod()
    if method == openmm.NonbondedForce.LJPME:
        raise InputError("A molecule cannot be decoupled where dispersion is a lattice sum (LJPME); use PME.")
    lattice = method in (openmm.NonbondedForce.Ewald, openmm.NonbondedForce.PME)

    from openmmtools import alchemy  # slow to import, and prints

    factory = alchemy.AbsoluteAlchemicalFactory(
        alchemical_pme_treatment="exact",
        alchemical_rf_treatment="shifted",  # the reaction field of OpenMM
        disable_alchemical_dispersion_correction=True,
        split_alchemical_forces=False,
    )
    region = alchemy.AlchemicalRegion(alchemical_atoms=molecule, annihilate_electrostatics=lattice)
    result = factory.create_alchemical_system(kept, region)
    if lattice:
        result.addForce(_internal_electrostatics(nonbonded[0], molecule))
    return result


def _internal_electrostatics(nonbonded: openmm.NonbondedForce, molecule: list[int]) -> openmm.CustomBondForce:
    """What scaled charges lack of the molecule's own electrostatics: pairs lose a square, exceptions a factor."""
    force = openmm.CustomBondForce(
        f"{_COULOMB}*((1-{ELECTROSTATICS}^2)*pair + (1-{ELECTROSTATICS})*exception)/r",
    )
    force.addGlobalParameter(ELECTROSTATICS, 1.0)
    force.addPerBondParameter("pair")
    force.addPerBondParameter("exception")
    exceptions = {}
    for index in range(nonbonded.getNumExceptions()):
        i, j, product, _, _ = nonbonded.getExceptionParameters(index)
        exceptions[frozenset((i, j))] = product.value_in_unit(unit.elementary_charge**2)
    charges = [nonbonded.getParticleParameters(i)[0].value_in_unit(unit.elementary_charge) for i in molecule]
    for a, i in enumerate(molecule):
        for b, j in enumerate(molecule[:a]):
            product = exceptions.get(frozenset((i, j)))
            terms = (charges[a] * charges[b], 0.0) if product is None else (0.0, product)
            if any(terms):
                force.addBond(i, j, terms)
    return force


def switching_integrator(
    couplings: NDArray[np.float64], step_size: float, tolerance: float, seed: int = 1
) -> openmm.CustomIntegrator:
    """Newtonian dynamics in which every step has a coupling of its own; see :func:`propagate`.

    A step is half a drift, the change of the coupling, a kick and half a drift; the half drifts of neighbours are one.
    It evaluates forces once, preserves volume and is undone by reversed velocities, with constraints as well: drifts
    are those of RATTLE, free motion on the manifold of the constraints, and kicks are projected on it. So rigid water
    (SETTLE) stays rigid, virtual sites follow their parents, and particles without a mass stay where they are.

    There is no friction and no noise on purpose. The error of the total energy of symplectic dynamics stays bounded
    however long it runs, whereas the shadow work of Langevin dynamics accumulates as a random walk.

    Parameters
    ----------
    couplings : ndarray, shape (steps, 2)
        Electrostatics and sterics at step 0, 1, ...
    step_size : float
        ps.
    tolerance : float
        Relative, of the constraints.
    seed : int
        Not zero. Nothing is drawn, but all Contexts of the Reference platform share one stream of random numbers, which
        the last of them to be made begins anew.
    """
    integrator = openmm.CustomIntegrator(step_size)
    integrator.setRandomNumberSeed(seed)
    integrator.setConstraintTolerance(tolerance)
    for name in ("index", "direction", "kick", "drift"):
        integrator.addGlobalVariable(name, 0)
    integrator.addPerDofVariable("free", 0)
    for name, column in ((ELECTROSTATICS, couplings[:, 0]), (STERICS, couplings[:, 1])):
        integrator.addTabulatedFunction(f"{name}_at", openmm.Discrete1DFunction(column.tolist()))
    # Forces at the beginning: platforms may place virtual sites at the end of a step of the integrator only.
    integrator.beginIfBlock("kick > 0")
    for name in (ELECTROSTATICS, STERICS):
        integrator.addComputeGlobal(name, f"{name}_at(index)")
    integrator.addComputePerDof("v", "v + dt*f/m")
    integrator.addConstrainVelocities()
    integrator.addComputeGlobal("index", "index + direction")
    integrator.endBlock()
    integrator.addComputePerDof("x", "x + drift*dt*v")
    integrator.addComputePerDof("free", "x")
    integrator.addConstrainPositions()
    integrator.addComputePerDof("v", "v + (x - free)/(drift*dt)")
    integrator.addConstrainVelocities()
    return integrator


def propagate(integrator: openmm.CustomIntegrator, steps: range) -> None:
    """Make the steps of these numbers, up or down, with a :func:`switching_integrator`."""
    integrator.setGlobalVariableByName("index", steps.start)
    integrator.setGlobalVariableByName("direction", steps.step)
    for kick, drift, count in ((0, 0.5, 1), (1, 1.0, len(steps) - 1), (1, 0.5, 1)):
        integrator.setGlobalVariableByName("kick", kick)
        integrator.setGlobalVariableByName("drift", drift)
        integrator.step(count)


def decoupled_context(
    context: openmm.Context, system: openmm.System, integrator: openmm.CustomIntegrator
) -> openmm.Context:
    """A Context of a decoupled System on the platform of another Context, with the same properties."""
    platform = context.getPlatform()
    properties: dict[str, Any] = {
        name: platform.getPropertyValue(context, name)
        for name in platform.getPropertyNames()
        if name != "DeviceName"  # says what DeviceIndex chose
    }
    return openmm.Context(system, integrator, platform, properties)
