"""What the target says of the data: given in any unit, or evaluated once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from openmm import unit
from small_runs import QUICK, well, well_data

import openmm_bg as bg
from openmm_bg.errors import InputError
from openmm_bg.flows import RealNVP
from openmm_bg.training import LogVariance, Settings


class Counted(bg.Energy):
    """A normal density that remembers how many rows it was asked for."""

    def __init__(self, mean: float):
        super().__init__((2,))
        self.mean, self.asked = mean, 0

    def reduced(self, x):
        self.asked += len(x)
        return 0.5 * (x - self.mean).square().sum(-1)


def test_given_energies_are_used_and_not_evaluated():
    """The generator's energy is another one: what is learned is what the given energies say."""
    data = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    truth, wrong = Counted(0.5), Counted(-3.0)
    settings = Settings(batch_size=64, validation_size=16, validate_every=5, average=0.9)
    arguments = dict(likelihood_steps=0, steps=20, objective=LogVariance(own=0), settings=settings, progress=False)
    generators = [
        bg.BoltzmannGenerator(energy, RealNVP(2, layers=2, hidden=(8,)), defensive=0.0) for energy in (truth, wrong)
    ]
    evaluated = generators[0].fit(data, **arguments)
    validations = truth.asked - 400
    given = generators[1].fit(data, energies=truth.reduced(data), **arguments)
    assert (evaluated.evaluations, given.evaluations) == (400, 0)
    assert wrong.asked == validations  # the samples of validations are not counted
    assert [r["loss"] for r in given.history] == pytest.approx([r["loss"] for r in evaluated.history], rel=1e-4)


@pytest.mark.parametrize(
    ("objective", "evaluations"), [(LogVariance(own=0), 300), (LogVariance(own=0.5), 300 + 12 * 32), (None, 12 * 64)]
)
def test_rows_of_data_are_evaluated_once_if_at_all(objective, evaluations):
    result = well().fit(
        well_data(300), likelihood_steps=2, steps=12, objective=objective, settings=QUICK, progress=False
    )
    assert result.evaluations == evaluations


def test_energies_of_another_shape_or_without_data_are_refused():
    data = well_data(50)
    for wrong in (torch.zeros(49), torch.zeros(50, 1), torch.zeros(())):
        with pytest.raises(InputError, match="50 conformations"):
            well().fit(data, energies=wrong, steps=1, progress=False)
    with pytest.raises(InputError, match="belong to data"):
        well().fit(energies=torch.zeros(50), steps=1, progress=False)


def test_energies_of_a_molecule_come_in_kilojoules_or_with_their_unit():
    """Bare numbers, kJ/mol and kcal/mol teach what energies that are evaluated teach; those of lost frames go."""
    path = Path(__file__).parents[1] / "data" / "alanine_small.bg"
    frames = bg.BoltzmannGenerator.load(path).sample(100, seed=1).positions.numpy()
    settings = Settings(batch_size=32, validation_size=16, validate_every=2, learning_rate=2e-3)

    def generator():
        return bg.BoltzmannGenerator.load(path)

    potential = generator().energy.potential(torch.as_tensor(frames)).numpy()
    frames[7] = np.nan
    potential[7] = 1e6
    outcomes = []
    for energies in (
        None,
        list(potential),
        unit.Quantity(potential, unit.kilojoules_per_mole),
        unit.Quantity(potential / 4.184, unit.kilocalories_per_mole),
    ):
        with pytest.warns(UserWarning, match="of 100 frames are left out"):
            outcomes.append(
                generator().fit(
                    frames, energies=energies, likelihood_steps=0, steps=4, objective=LogVariance(own=0),
                    settings=settings, progress=False,
                )
            )  # fmt: skip
    assert outcomes[0].evaluations > 80 and [outcome.evaluations for outcome in outcomes[1:]] == [0, 0, 0]
    spreads = [[record["spread"] for record in outcome.history] for outcome in outcomes]
    for other in spreads[1:]:
        assert other == pytest.approx(spreads[0], rel=1e-3)
