"""Which simulations a generator is of: the same molecule, another System of it, others, one among others."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import openmm
import pytest
from openmm import app

import openmm_bg as bg
from openmm_bg.flows import RealNVP


def _built(symbols: list[str], bonds: list[tuple[int, int]]) -> app.Topology:
    topology = app.Topology()
    residue = topology.addResidue("ALL", topology.addChain())
    atoms = [topology.addAtom(f"X{i}", app.Element.getBySymbol(s), residue) for i, s in enumerate(symbols)]
    for i, j in bonds:
        topology.addBond(atoms[i], atoms[j])
    return topology


@pytest.fixture(scope="module")
def plain(alanine):
    return bg.BoltzmannGenerator.for_molecule(alanine.topology, alanine.system, positions=alanine.positions)


def test_the_same_molecule_matches(plain, alanine):
    with warnings.catch_warnings():
        # the same molecule must pass in silence: a warning here fails the test
        warnings.simplefilter("error")
        assert plain.matches(alanine.topology, alanine.system)
        plain.check_simulation(alanine.topology, alanine.system)


def test_another_system_of_the_molecule_warns_once(plain, alanine):
    other = copy.deepcopy(alanine.system)
    other.addForce(openmm.CMMotionRemover())
    with pytest.warns(UserWarning, match="differs") as caught:
        plain.check_simulation(alanine.topology, other)
    assert len(caught) == 1
    with warnings.catch_warnings():
        # asking is not using: only check_simulation warns, so a warning here fails the test
        warnings.simplefilter("error")
        assert plain.matches(alanine.topology, other)


def test_a_system_that_cannot_be_written_only_differs(plain, alanine):
    other = copy.deepcopy(alanine.system)
    other.addForce(openmm.PythonForce(lambda state: (0.0, np.zeros((22, 3)))))
    with pytest.warns(UserWarning, match="differs"):
        plain.check_simulation(alanine.topology, other)


def test_other_molecules_are_refused(plain, alanine):
    topology, system = _built(["H", "O", "O", "H"], [(0, 1), (1, 2), (2, 3)]), openmm.System()
    for mass in (1.0, 16.0, 16.0, 1.0):
        system.addParticle(mass)
    with pytest.raises(bg.InputError, match="22 atoms"):
        plain.check_simulation(topology, system)
    symbols = [a.element.symbol for a in alanine.topology.atoms()]
    bonds = [(a.index, b.index) for a, b in alanine.topology.bonds()]
    assert plain.matches(_built(symbols, bonds), alanine.system)
    carbon = symbols.index("C")
    other = [*symbols[:carbon], "Si", *symbols[carbon + 1 :]]
    with pytest.raises(bg.InputError, match=f"Atom {carbon} "):
        plain.check_simulation(_built(other, bonds), alanine.system)
    with pytest.raises(bg.InputError, match="other bonds"):
        plain.check_simulation(_built(symbols, bonds[:-1]), alanine.system)
    constrained = bg.systems.load("alanine_dipeptide", constraints=app.HBonds)
    with pytest.raises(bg.InputError, match="constrains other bonds"):
        plain.check_simulation(alanine.topology, constrained.system)
    longer = copy.deepcopy(constrained.system)
    made = bg.BoltzmannGenerator.for_molecule(constrained.topology, constrained.system)
    assert made.matches(constrained.topology, longer)
    i, j, distance = longer.getConstraintParameters(0)
    longer.setConstraintParameters(0, i, j, distance * 1.01)
    assert not made.matches(constrained.topology, longer)
    with pytest.raises(bg.InputError, match="no molecule"):
        bg.BoltzmannGenerator(None, RealNVP(2, layers=2, hidden=(8,))).check_simulation(topology, system)


def test_the_molecule_among_others(plain, alanine):
    symbols = [a.element.symbol for a in alanine.topology.atoms()]
    bonds = [(a.index, b.index) for a, b in alanine.topology.bonds()]
    shifted = [(i + 1, j + 1) for i, j in bonds]
    topology = _built(["He", *symbols, "He"], shifted)
    system = openmm.System()
    for _ in range(24):
        system.addParticle(1.0)
    atoms = range(1, 23)
    assert plain.matches(topology, system, atoms)
    assert not plain.matches(topology, system)
    assert not plain.matches(topology, system, range(22))
    for wrong in ([*range(1, 22), 24], [-1, *range(1, 22)], [1, *range(1, 22)]):
        with pytest.raises(bg.InputError):
            plain.check_simulation(topology, system, wrong)
    system.addConstraint(0, 1, 0.1)
    with pytest.raises(bg.InputError, match="outside"):
        plain.check_simulation(topology, system, atoms)
