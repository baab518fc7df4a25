"""Random Systems of every force that torch evaluates, against OpenMM's Reference platform."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import openmm
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from openmm_bg.energies import ContextEnergy, ForceFieldEnergy

ATOMS = 7
QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
FUZZ = settings(max_examples=10, **QUIET)
FEW = settings(
    max_examples=2, phases=[Phase.generate], **QUIET
)  # where most examples have a kernel of their own to compile
Maker = Callable[[np.random.Generator], openmm.Force]
MAKERS: dict[str, Maker] = {}


def maker(function: Maker) -> Maker:
    MAKERS[function.__name__] = function
    return function


def groups(rng: np.random.Generator, size: int) -> list[list[int]]:
    return [[int(i) for i in rng.permutation(ATOMS)[:size]] for _ in range(rng.integers(1, 6))]


@maker
def harmonic_bond(rng: np.random.Generator) -> openmm.Force:
    force = openmm.HarmonicBondForce()
    for pair in groups(rng, 2):
        force.addBond(*pair, rng.uniform(0.1, 0.3), rng.uniform(10, 1000))
    return force


@maker
def harmonic_angle(rng: np.random.Generator) -> openmm.Force:
    force = openmm.HarmonicAngleForce()
    for triple in groups(rng, 3):
        force.addAngle(*triple, rng.uniform(1, 3), rng.uniform(10, 500))
    return force


@maker
def periodic_torsion(rng: np.random.Generator) -> openmm.Force:
    force = openmm.PeriodicTorsionForce()
    for four in groups(rng, 4):
        force.addTorsion(*four, int(rng.integers(1, 7)), rng.uniform(-4, 4), rng.normal())
    return force


@maker
def ryckaert_bellemans(rng: np.random.Generator) -> openmm.Force:
    force = openmm.RBTorsionForce()
    for four in groups(rng, 4):
        force.addTorsion(*four, *rng.normal(size=6))
    return force


@maker
def torsion_maps(rng: np.random.Generator) -> openmm.Force:
    force = openmm.CMAPTorsionForce()
    sizes = [int(n) for n in rng.integers(3, 7, 3)]
    for n in sizes:
        force.addMap(n, rng.normal(size=n * n).tolist())
    for _ in range(4):
        a, b = groups(rng, 4)[0], groups(rng, 4)[0]
        force.addTorsion(int(rng.integers(3)), *a, *b)
    return force


def particles(force: openmm.NonbondedForce, rng: np.random.Generator) -> None:
    for _ in range(ATOMS):
        well = rng.uniform(0.1, 1) if rng.random() < 0.7 else 0.0
        force.addParticle(rng.normal(), rng.uniform(0.1, 0.3), well)
    for i, j in itertools.combinations(range(ATOMS), 2):
        if rng.random() < 0.2:
            force.addException(
                i, j, rng.normal() * rng.integers(2), rng.uniform(0.1, 0.3), rng.uniform() * rng.integers(2)
            )


@maker
def nonbonded(rng: np.random.Generator) -> openmm.Force:
    force = openmm.NonbondedForce()
    particles(force, rng)
    return force


@maker
def nonbonded_cutoff(rng: np.random.Generator) -> openmm.Force:
    force = openmm.NonbondedForce()
    particles(force, rng)
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffNonPeriodic)
    force.setCutoffDistance(rng.uniform(0.4, 0.9))
    force.setReactionFieldDielectric(rng.uniform(1, 80))
    force.setUseSwitchingFunction(bool(rng.integers(2)))
    force.setSwitchingDistance(0.3)
    return force


@maker
def nonbonded_offsets(rng: np.random.Generator) -> openmm.Force:
    force = openmm.NonbondedForce()
    particles(force, rng)
    for name in ("first", "second"):
        force.addGlobalParameter(name, rng.uniform(0.1, 1))
    for name in ("first", "second"):
        for i in rng.permutation(ATOMS)[:3]:
            force.addParticleParameterOffset(name, int(i), rng.normal(), 0.05, rng.uniform())
        for n in rng.permutation(force.getNumExceptions())[:2]:
            force.addExceptionParameterOffset(name, int(n), rng.normal(), 0.05, rng.uniform())
    if rng.integers(2):
        force.setNonbondedMethod(openmm.NonbondedForce.CutoffNonPeriodic)
        force.setCutoffDistance(0.7)
    return force


@maker
def born(rng: np.random.Generator) -> openmm.Force:
    force = openmm.GBSAOBCForce()
    for _ in range(ATOMS):
        force.addParticle(rng.normal(), rng.uniform(0.1, 0.2), rng.uniform(0.7, 0.9))
    force.setSolventDielectric(rng.uniform(20, 80))
    force.setSoluteDielectric(rng.uniform(1, 4))
    force.setSurfaceAreaEnergy(rng.uniform(0, 4))
    return force


@maker
def custom_bond(rng: np.random.Generator) -> openmm.Force:
    force = openmm.CustomBondForce("or*lambda/r^3 + select(step(r-I), log(r), r^2*k); k=2*or")
    force.addGlobalParameter("lambda", 0.4)
    force.addPerBondParameter("or")
    force.addPerBondParameter("I")
    for pair in groups(rng, 2):
        force.addBond(*pair, [rng.normal(), rng.uniform(0.3, 1)])
    return force


@maker
def custom_angle(rng: np.random.Generator) -> openmm.Force:
    force = openmm.CustomAngleForce("k*(cos(theta)-c)^2 + sin(theta)^4")
    for name in "kc":
        force.addPerAngleParameter(name)
    for triple in groups(rng, 3):
        force.addAngle(*triple, rng.normal(size=2).tolist())
    return force


@maker
def custom_torsion(rng: np.random.Generator) -> openmm.Force:
    force = openmm.CustomTorsionForce("k*min(d, 2*pi-d)^2; d=abs(theta-t0); pi=3.14159265358979")
    for name in ("k", "t0"):
        force.addPerTorsionParameter(name)
    for four in groups(rng, 4):
        force.addTorsion(*four, [rng.normal(), rng.uniform(-3, 3)])
    return force


@maker
def external(rng: np.random.Generator) -> openmm.Force:
    force = openmm.CustomExternalForce("k*((x-x0)^2 + y*z) + exp(-z^2)")
    for name in ("k", "x0"):
        force.addPerParticleParameter(name)
    for i in rng.permutation(ATOMS)[:4]:
        force.addParticle(int(i), rng.normal(size=2).tolist())
    return force


@maker
def compound(rng: np.random.Generator) -> openmm.Force:
    text = (
        "k*distance(p1,p2)*cos(dihedral(p1,p2,p3,p4)-angle(p2,p3,p4)) + f(x1, y2) + z4^2"
        "+ pointdistance(x1,y1,z1,0.5,z2,0.1) + pointangle(x1,y1,z1,x2,y2,z2,x4,y4,z4)"
        "+ pointdihedral(x1,y1,z1,x2,y2,z2,x3,y3,z3,1,2,z4)"
    )
    force = openmm.CustomCompoundBondForce(4, text)
    force.addPerBondParameter("k")
    grid = openmm.Continuous2DFunction(5, 6, rng.normal(size=30).tolist(), -1, 1, -0.5, 2, False)
    force.addTabulatedFunction("f", grid)
    for four in groups(rng, 4):
        force.addBond(four, [rng.normal()])
    return force


def custom_pairs(rng: np.random.Generator) -> openmm.CustomNonbondedForce:
    force = openmm.CustomNonbondedForce("a(t1,t2)/r^2 + q1*q2*f(r) + v1*v2/(r+c1+c2); c1=abs(q1)+lambda; c2=abs(q2)")
    for name in ("t", "q"):
        force.addPerParticleParameter(name)
    force.addGlobalParameter("lambda", 0.4)
    table = rng.normal(size=(3, 3))
    force.addTabulatedFunction("a", openmm.Discrete2DFunction(3, 3, (table + table.T).ravel().tolist()))
    force.addTabulatedFunction("f", openmm.Continuous1DFunction(rng.normal(size=9).tolist(), 0.05, 0.8, False))
    force.addComputedValue("v", "q*t+1")
    for _ in range(ATOMS):
        force.addParticle([float(rng.integers(3)), rng.normal()])
    for i, j in itertools.combinations(range(ATOMS), 2):
        if rng.random() < 0.2:
            force.addExclusion(i, j)
    return force


@maker
def custom_nonbonded(rng: np.random.Generator) -> openmm.Force:
    force = custom_pairs(rng)
    if rng.integers(2):
        force.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffNonPeriodic)
        force.setCutoffDistance(0.8)
        force.setUseSwitchingFunction(bool(rng.integers(2)))
        force.setSwitchingDistance(0.4)
    return force


@maker
def interaction_groups(rng: np.random.Generator) -> openmm.Force:
    force = custom_pairs(rng)
    for _ in range(rng.integers(1, 4)):
        sets = [rng.permutation(ATOMS)[: rng.integers(1, 6)].tolist() for _ in range(2)]
        force.addInteractionGroup(*sets)
    return force


@maker
def custom_born(rng: np.random.Generator) -> openmm.Force:
    force = openmm.CustomGBForce()
    for name in ("q", "or", "sr"):
        force.addPerParticleParameter(name)
    force.addGlobalParameter("scale", rng.uniform(0.5, 1))
    pair, alone = openmm.CustomGBForce.ParticlePair, openmm.CustomGBForce.SingleParticle
    free = openmm.CustomGBForce.ParticlePairNoExclusions
    force.addComputedValue("I", "scale*or1*exp(-r/sr2)/(r+sr1)", free if rng.integers(2) else pair)
    force.addComputedValue("B", "1/(1/or+I^2) + 0.1*x*y", alone)
    force.addComputedValue("C", "B*I+z", alone)
    force.addEnergyTerm("q^2/B + C*scale + x^2", alone)
    force.addEnergyTerm("q1*q2/sqrt(r^2+B1*B2*exp(-r^2/(4*B1*B2)))", free)
    force.addEnergyTerm("(C1+C2)*r", pair)
    for _ in range(ATOMS):
        force.addParticle([rng.normal(), rng.uniform(0.1, 0.2), rng.uniform(0.1, 0.3)])
    for i, j in itertools.combinations(range(ATOMS), 2):
        if rng.random() < 0.2:
            force.addExclusion(i, j)
    if rng.integers(2):
        force.setNonbondedMethod(openmm.CustomGBForce.CutoffNonPeriodic)
        force.setCutoffDistance(0.7)
    return force


def system_of(*forces: openmm.Force) -> openmm.System:
    system = openmm.System()
    for _ in range(ATOMS):
        system.addParticle(12.0)
    for force in forces:
        system.addForce(force)
    return system


def agree(system: openmm.System, x: torch.Tensor, compile: bool, **globals_now: float) -> None:
    energy = ForceFieldEnergy(system, 300, compile=compile)
    assert energy.fallback == ()
    reference = ContextEnergy(system, 300, platform="Reference")
    if globals_now:
        energy.set_global_parameters(globals_now)
        reference.set_global_parameters(globals_now)
    u, gradient = energy.value_and_gradient(x)
    v, expected = reference.value_and_gradient(x)
    assert torch.equal(torch.isfinite(u), torch.isfinite(v))
    scale = max(1.0, float(v.abs().max()))
    assert float((u - v).abs().max()) < 1e-10 * scale
    assert float((gradient - expected).abs().max()) < 1e-9 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(energy(x), u, rtol=1e-10, atol=1e-10 * scale)


def points(rng: np.random.Generator, rows: int = 6) -> torch.Tensor:
    """Conformations without close contacts, so that rounding does not hide behind huge energies."""
    found: list[np.ndarray] = []
    while len(found) < rows:
        x = rng.uniform(-0.45, 0.45, size=(ATOMS, 3))
        distances = np.linalg.norm(x[:, None] - x[None], axis=-1)[np.triu_indices(ATOMS, 1)]
        if distances.min() > 0.12:
            found.append(x)
    return torch.as_tensor(np.array(found))


@pytest.mark.parametrize("name", MAKERS)
@given(seed=st.integers(0, 2**32 - 1))
@FUZZ
def test_random_forces(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    agree(system_of(MAKERS[name](rng)), points(rng), False)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=4, phases=[Phase.generate], **QUIET)
def test_random_systems_compiled(seed: int) -> None:
    """All forces in one kernel, so that few have to be compiled."""
    rng = np.random.default_rng(seed)
    agree(system_of(*(make(rng) for name, make in MAKERS.items() if name != "interaction_groups")), points(rng), True)


@pytest.mark.parametrize("name", ["nonbonded_offsets", "custom_bond", "custom_nonbonded", "custom_born"])
@given(seed=st.integers(0, 2**32 - 1), value=st.floats(0, 2))
@FEW
def test_other_global_parameters(name: str, seed: int, value: float) -> None:
    rng = np.random.default_rng(seed)
    system = system_of(MAKERS[name](rng))
    first = next(iter(ForceFieldEnergy(system, 300).global_parameters))
    agree(system, points(rng), True, **{first: value})


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "torsion_maps"])
def test_second_derivatives(name: str) -> None:
    """Central differences of OpenMM's own forces."""
    rng = np.random.default_rng(11)
    system = system_of(MAKERS[name](rng))
    x = points(rng, 1)
    energy, reference = ForceFieldEnergy(system, 300), ContextEnergy(system, 300, platform="Reference")
    direction = torch.as_tensor(rng.normal(size=(1, ATOMS, 3)))
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(y).sum(), y, create_graph=True)
    (along,) = torch.autograd.grad((gradient * direction).sum(), y)
    step = 1e-6
    difference = (
        reference.value_and_gradient(x + step * direction)[1] - reference.value_and_gradient(x - step * direction)[1]
    ) / (2 * step)
    assert float((along - difference).abs().max()) < 2e-6 * max(1.0, float(difference.abs().max()))


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_bad_conformations(name: str, compile: bool) -> None:
    """Coincident, collinear and undefined: no error, no other row touched, nothing finite that OpenMM does not have."""
    rng = np.random.default_rng(4)
    system = system_of(MAKERS[name](rng))
    energy, reference = ForceFieldEnergy(system, 300, compile=compile), ContextEnergy(system, 300, platform="Reference")
    x = points(rng, 8)
    good, expected = energy.value_and_gradient(x)
    bad = x.clone()
    bad[1] = 0.0
    bad[2, :, 1:] = 0.0
    bad[3, 4] = torch.nan
    bad[4, 0, 2] = torch.inf
    bad[5, 1] = bad[5, 2]
    bad[6] = 1e300
    u, gradient = energy.value_and_gradient(bad)
    for row in (0, 7):
        assert torch.equal(u[row], good[row]) and torch.equal(gradient[row], expected[row])
    assert torch.isfinite(gradient).all() and not u.isnan().any()
    assert torch.isinf(u[[3, 4]]).all() and (gradient[[3, 4]] == 0).all()
    v = reference(bad)
    both = torch.isfinite(u) & torch.isfinite(v)
    torch.testing.assert_close(u[both], v[both], rtol=1e-6, atol=1e-6)
    beyond = torch.isfinite(u) & ~torch.isfinite(v)
    assert not beyond[[0, 3, 4, 7]].any()
    y = bad.clone().requires_grad_()
    energy(y)[torch.isfinite(u)].sum().backward()
    assert torch.isfinite(y.grad).all()


def test_left_to_openmm() -> None:
    periodic = openmm.CustomNonbondedForce("r")
    periodic.setNonbondedMethod(openmm.CustomNonbondedForce.CutoffPeriodic)
    external = openmm.CustomExternalForce("periodicdistance(x,y,z,0,0,0)")
    for _ in range(ATOMS):
        periodic.addParticle([])
    with pytest.warns(UserWarning, match=r"CustomNonbondedForce \(periodic\), CustomExternalForce \(periodic"):
        ForceFieldEnergy(system_of(periodic, external), 300)


def test_offsets_that_openmm_itself_does_not_agree_on() -> None:
    force = openmm.NonbondedForce()
    force.addGlobalParameter("scale", 1.0)
    for _ in range(ATOMS):
        force.addParticle(0.1, 0.2, 0.3)
    for _ in range(2):
        force.addParticleParameterOffset("scale", 1, 0.1, 0.0, 0.0)
    with pytest.warns(UserWarning, match="two offsets"):
        ForceFieldEnergy(system_of(force), 300)
