"""The torch energy against OpenMM's Reference platform: every term alone, all together, values and forces."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_bg.energies import ContextEnergy, ForceFieldEnergy, kernel
from openmm_bg.errors import InputError

KT = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin) * 300.0
ATOMS = 8


@pytest.fixture(scope="module")
def peptide() -> tuple[openmm.System, np.ndarray]:
    """ACE-ALA-NME, amber99sbildn + amber99_obc, and its positions in nm."""
    from openmmtools.testsystems import AlanineDipeptideVacuum

    geometry = AlanineDipeptideVacuum(constraints=None)
    field = app.ForceField("amber99sbildn.xml", "amber99_obc.xml")
    system = field.createSystem(geometry.topology, nonbondedMethod=app.NoCutoff, constraints=None)
    return system, geometry.positions.value_in_unit(unit.nanometer)


def reference(system: openmm.System, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Energies (kJ/mol) and forces (kJ/mol/nm) straight from OpenMM, without any code under test."""
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatform("Reference"))
    energies, forces = [], []
    for row in x.double().numpy():
        context.setPositions(row)
        state = context.getState(energy=True, forces=True)
        energies.append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
        forces.append(state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer))
    return np.array(energies), np.array(forces)


def assert_equal_to_openmm(energy: ForceFieldEnergy, system: openmm.System, x: torch.Tensor) -> None:
    potential, forces = reference(system, x)
    u, gradient = energy.value_and_gradient(x)
    np.testing.assert_allclose(u * KT, potential, rtol=1e-9, atol=1e-9)
    scale = np.abs(forces).max(axis=(1, 2), keepdims=True) + 1.0
    np.testing.assert_allclose(-gradient.numpy() * KT / scale, forces / scale, atol=1e-9)
    np.testing.assert_allclose(energy.potential(x), potential, rtol=1e-9, atol=1e-9)
    x = x.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(energy(x).sum(), x)
    torch.testing.assert_close(by_autograd, gradient, rtol=1e-10, atol=1e-10)


def random_forces(rng: np.random.Generator) -> dict[str, openmm.Force]:
    bonds, angles, torsions = (
        openmm.HarmonicBondForce(),
        openmm.HarmonicAngleForce(),
        openmm.PeriodicTorsionForce(),
    )
    for _ in range(10):
        i, j, k, m = (int(a) for a in rng.permutation(ATOMS)[:4])
        bonds.addBond(i, j, rng.uniform(0, 0.3), rng.uniform(0, 1e4))
        angles.addAngle(i, j, k, rng.uniform(0, np.pi), rng.uniform(0, 500))
        for n in rng.integers(1, 7, size=3):
            torsions.addTorsion(i, j, k, m, int(n), rng.uniform(-np.pi, np.pi), rng.normal(0, 10))
    nonbonded, born = openmm.NonbondedForce(), openmm.GBSAOBCForce()
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.NoCutoff)
    for i in range(ATOMS):
        charge = rng.normal(0, 0.5)
        nonbonded.addParticle(charge, rng.uniform(0.1, 0.3), 0.0 if i == 3 else rng.uniform(0, 1))
        born.addParticle(charge, rng.uniform(0.08, 0.3), rng.uniform(0.3, 1.2))
    for i, j, charge, sigma, epsilon in (
        (1, 0, 0, 1, 0),
        (2, 5, 0.2, 0.2, 0.4),
        (7, 3, 0, 0.3, 1),
        (4, 6, -0.3, 1, 0),
    ):
        nonbonded.addException(i, j, charge, sigma, epsilon)
    born.setSolventDielectric(40.0)
    born.setSoluteDielectric(2.0)
    born.setSurfaceAreaEnergy(3.0)
    return {
        "bonds": bonds,
        "angles": angles,
        "torsions": torsions,
        "nonbonded": nonbonded,
        "born": born,
    }


def random_system(names: tuple[str, ...], seed: int) -> openmm.System:
    system = openmm.System()
    for i in range(ATOMS):
        system.addParticle(0.0 if i == 0 else 12.0)  # a massless particle has an energy like any other
    forces = random_forces(np.random.default_rng(seed))
    for name in names:
        system.addForce(forces[name])
    return system


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "names",
    [
        ("bonds",),
        ("angles",),
        ("torsions",),
        ("nonbonded",),
        ("born",),
        ("born", "torsions", "nonbonded", "angles", "bonds"),
    ],
    ids="+".join,
)
def test_random_systems(names: tuple[str, ...], seed: int) -> None:
    system = random_system(names, seed)
    energy = ForceFieldEnergy(system, 300)
    assert energy.fallback == () and len(energy.native) == len(names)
    x = torch.as_tensor(np.random.default_rng(seed).normal(0, 0.2, size=(8, ATOMS, 3)))
    assert_equal_to_openmm(energy, system, x)


def test_two_forces_of_one_class_add() -> None:
    system = random_system(("torsions", "bonds"), 0)
    for force in random_forces(np.random.default_rng(9)).values():
        system.addForce(force)
    x = torch.as_tensor(np.random.default_rng(1).normal(0, 0.2, size=(4, ATOMS, 3)))
    assert_equal_to_openmm(ForceFieldEnergy(system, 300), system, x)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05, 0.3], ids=["minimum", "thermal", "distorted", "heap"])
def test_peptide(peptide: tuple[openmm.System, np.ndarray], noise: float) -> None:
    system, positions = peptide
    energy = ForceFieldEnergy(system, 300)
    assert energy.fallback == ()
    x = torch.as_tensor(positions + noise * np.random.default_rng(2).normal(size=(8, 22, 3)))
    assert_equal_to_openmm(energy, system, x)


def test_nearly_coincident_atoms(peptide: tuple[openmm.System, np.ndarray]) -> None:
    system, positions = peptide
    x = np.stack([positions] * 3)
    for row, (i, j, distance) in enumerate([(1, 18, 1e-3), (4, 5, 1e-4), (0, 21, 1e-5)]):
        x[row, i] = x[row, j] + distance
    assert_equal_to_openmm(ForceFieldEnergy(system, 300), system, torch.as_tensor(x))


def test_long_batch_in_pieces(peptide: tuple[openmm.System, np.ndarray]) -> None:
    system, positions = peptide
    energy = ForceFieldEnergy(system, 300)
    x = torch.as_tensor(positions + 0.01 * np.random.default_rng(2).normal(size=(1500, 22, 3)))
    u, gradient = energy.value_and_gradient(x)
    for rows in (slice(0, 3), slice(700, 703), slice(1497, 1500)):
        v, h = energy.value_and_gradient(x[rows])
        torch.testing.assert_close(u[rows], v, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient[rows], h, rtol=1e-9, atol=1e-9)
    assert energy(x[:0]).shape == (0,) and energy.value_and_gradient(x[:0])[1].shape == (0, 22, 3)


def test_second_derivatives(peptide: tuple[openmm.System, np.ndarray]) -> None:
    """Hessian-vector products against central differences of OpenMM's forces."""
    system, positions = peptide
    energy = ForceFieldEnergy(system, 300)
    rng = np.random.default_rng(3)
    x = torch.as_tensor(positions + 0.01 * rng.normal(size=(2, 22, 3)))
    direction, step = torch.as_tensor(rng.normal(size=x.shape)), 1e-6
    _, ahead = reference(system, x + step * direction)
    _, behind = reference(system, x - step * direction)
    expected = -(ahead - behind) / (2 * step) / KT
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(y).sum(), y, create_graph=True)
    (product,) = torch.autograd.grad((gradient * direction).sum(), y)
    np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_gradgradcheck() -> None:
    system = random_system(("bonds", "angles", "torsions", "nonbonded", "born"), 4)
    energy = ForceFieldEnergy(system, 300)
    grid = np.stack(np.meshgrid(*[[0.0, 0.3]] * 3), -1).reshape(1, ATOMS, 3)
    x = torch.as_tensor(grid + np.random.default_rng(0).normal(0, 0.03, grid.shape)).requires_grad_()
    assert torch.autograd.gradcheck(energy, (x,), eps=1e-7, rtol=1e-4)
    assert torch.autograd.gradgradcheck(energy, (x,), eps=1e-7, rtol=1e-4, atol=1e-2)


def test_collinear_angle_has_a_value_and_no_nan() -> None:
    system = openmm.System()
    for _ in range(3):
        system.addParticle(12.0)
    angle = openmm.HarmonicAngleForce()
    angle.addAngle(0, 1, 2, 2.0, 100.0)
    system.addForce(angle)
    x = torch.tensor([[[0.0, 0, 0], [0.1, 0, 0], [0.2, 0, 0]], [[0.0, 0, 0], [0.1, 0, 0], [0.05, 0, 0]]])
    u, gradient = ForceFieldEnergy(system, 300).value_and_gradient(x.double())
    np.testing.assert_allclose(u * KT, [50 * (np.pi - 2) ** 2, 200.0])
    assert (gradient == 0).all()


def test_float32(peptide: tuple[openmm.System, np.ndarray]) -> None:
    system, positions = peptide
    energy = ForceFieldEnergy(system, 300)
    x = torch.as_tensor(positions + 0.01 * np.random.default_rng(2).normal(size=(8, 22, 3)))
    u, gradient = energy.value_and_gradient(x.float())
    v, h = energy.value_and_gradient(x)
    assert u.dtype == gradient.dtype == energy(x.float()).dtype == torch.float32
    torch.testing.assert_close(u.double(), v, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(gradient.double(), h, rtol=1e-3, atol=1e-1)


def test_conversion_and_copy_keep_the_constants(peptide: tuple[openmm.System, np.ndarray]) -> None:
    system, positions = peptide
    energy = ForceFieldEnergy(system, 300)
    x = torch.as_tensor(positions[None])
    expected = energy(x)
    assert torch.equal(copy.deepcopy(energy)(x), expected)
    assert torch.equal(copy.deepcopy(energy).to(torch.float32)(x), expected)
    assert torch.equal(copy.deepcopy(energy).float().double()(x), expected)
    assert not energy.state_dict()


def test_the_system_is_copied(peptide: tuple[openmm.System, np.ndarray]) -> None:
    system, positions = copy.deepcopy(peptide[0]), peptide[1]
    energy = ForceFieldEnergy(system, 300)
    x = torch.as_tensor(positions[None])
    before = energy(x)
    system.getForce(0).setBondParameters(0, 0, 1, 1.0, 1e6)
    assert torch.equal(energy(x), before)
    assert energy.system.getForce(0).getBondParameters(0) == peptide[0].getForce(0).getBondParameters(0)


def test_temperature(peptide: tuple[openmm.System, np.ndarray]) -> None:
    system, positions = peptide
    x = torch.as_tensor(positions[None])
    cold, hot = ForceFieldEnergy(system, 300), ForceFieldEnergy(system, 600 * unit.kelvin)
    assert hot.temperature == 600.0 and hot.thermal_energy == pytest.approx(2 * KT)
    for a, b in zip(cold.value_and_gradient(x), hot.value_and_gradient(x), strict=True):
        torch.testing.assert_close(a, 2 * b)
    torch.testing.assert_close(cold.potential(x), hot.potential(x))


def test_what_only_moves_atoms_contributes_nothing(peptide: tuple[openmm.System, np.ndarray]) -> None:
    system, positions = copy.deepcopy(peptide[0]), peptide[1]
    system.addForce(openmm.AndersenThermostat(300, 1))
    system.addForce(openmm.MonteCarloBarostat(1, 300))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        energy = ForceFieldEnergy(system, 300)
    assert energy.fallback == () and "CMMotionRemover" not in energy.native
    assert torch.equal(
        energy(torch.as_tensor(positions[None])),
        ForceFieldEnergy(peptide[0], 300)(torch.as_tensor(positions[None])),
    )


def test_wrong_input_is_named(peptide: tuple[openmm.System, np.ndarray]) -> None:
    energy = ForceFieldEnergy(peptide[0], 300)
    with pytest.raises(InputError, match=r"\(batch, 22, 3\)"):
        energy(torch.zeros(22, 3))
    with pytest.raises(InputError, match="floating"):
        energy(torch.zeros(1, 22, 3, dtype=torch.long))
    with pytest.raises(InputError, match="Reference"):
        ForceFieldEnergy(peptide[0], 300, platform="Abacus")
    with pytest.raises(InputError, match=r"openmm\.System"):
        ForceFieldEnergy("system.xml", 300)
    with pytest.raises(InputError, match="positive"):
        ForceFieldEnergy(peptide[0], -1)


def test_compiled_and_plain_agree(peptide: tuple[openmm.System, np.ndarray]) -> None:
    system, positions = peptide
    plain, compiled = ForceFieldEnergy(system, 300, compile=False), ForceFieldEnergy(system, 300)
    rng = np.random.default_rng(5)
    for rows in (1, 300):
        x = torch.as_tensor(positions + 0.02 * rng.normal(size=(rows, 22, 3)))
        x[0, 3, 1] = torch.nan
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(compiled(x), plain(x))
            for a, b in zip(compiled.value_and_gradient(x), plain.value_and_gradient(x), strict=True):
                torch.testing.assert_close(a, b)
    assert torch.equal(copy.deepcopy(compiled)(x), compiled(x))
    assert torch.equal(pickle.loads(pickle.dumps(compiled))(x), compiled(x))


def test_second_derivatives_of_the_compiled_energy(peptide: tuple[openmm.System, np.ndarray]) -> None:
    """Against central differences of OpenMM's forces."""
    system, positions = peptide
    energy, reference = ForceFieldEnergy(system, 300), ContextEnergy(system, 300, platform="Reference")
    x = torch.as_tensor(positions + 0.005 * np.random.default_rng(2).normal(size=(1, 22, 3)))
    direction = torch.as_tensor(np.random.default_rng(3).normal(size=(1, 22, 3)))
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(y).sum(), y, create_graph=True)
    (along,) = torch.autograd.grad((gradient * direction).sum(), y)
    step = 1e-6
    _, after = reference.value_and_gradient(x + step * direction)
    _, before = reference.value_and_gradient(x - step * direction)
    difference = (after - before) / (2 * step)
    assert float((along - difference).abs().max() / difference.abs().max()) < 1e-6


def test_without_a_compiler_the_plain_form_is_used(
    peptide: tuple[openmm.System, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(text: str, number: str) -> object:
        raise kernel.NoCompiler("no C++ compiler was found")

    monkeypatch.setattr(kernel, "_library", broken)
    system, positions = peptide
    x = torch.as_tensor(positions[None]).repeat(300, 1, 1)  # more than one piece
    energy = ForceFieldEnergy(system, 300)
    with pytest.warns(UserWarning, match=r"not compiled.*no C\+\+ compiler") as record:
        u, gradient = energy.value_and_gradient(x)
        energy(x)
    assert len(record) == 1
    expected = ForceFieldEnergy(system, 300, compile=False).value_and_gradient(x)
    torch.testing.assert_close((u, gradient), expected)


def test_global_parameters() -> None:
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1.0)
    bond = openmm.CustomBondForce("0.5*lambda*k*r^2")
    bond.addGlobalParameter("lambda", 0.5)
    bond.addPerBondParameter("k")
    bond.addBond(0, 1, [4.0])
    system.addForce(bond)
    rest = openmm.CustomCVForce("lambda*bond")
    rest.addGlobalParameter("lambda", 0.5)
    inner = openmm.HarmonicBondForce()
    inner.addBond(0, 1, 0.0, 2.0)
    rest.addCollectiveVariable("bond", inner)
    system.addForce(rest)
    with pytest.warns(UserWarning, match="CustomCVForce"):
        energy = ForceFieldEnergy(system, 300)
    x = torch.tensor([[[0.0, 0, 0], [3.0, 0, 0]]], dtype=torch.float64)
    assert energy.global_parameters == {"lambda": 0.5}
    assert float(energy.potential(x)) == pytest.approx(9.0 + 4.5)
    energy.set_global_parameters({"lambda": 2.0})
    assert float(energy.potential(x)) == pytest.approx(36.0 + 18.0)
    assert float(copy.deepcopy(energy).potential(x)) == pytest.approx(54.0)
    with pytest.raises(InputError, match=r"'mu'.*lambda"):
        energy.set_global_parameters({"mu": 1.0})
    with pytest.raises(InputError, match="finite"):
        energy.set_global_parameters({"lambda": np.nan})
