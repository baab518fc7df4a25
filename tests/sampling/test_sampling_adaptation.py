"""The running acceptance, its end, and the number of proposals that follows from it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from openmm_bg.errors import InputError
from openmm_bg.sampling.adaptation import Adaptation, proposals_needed


def test_average_follows_a_change_and_settles():
    adaptation, rng = Adaptation(), np.random.default_rng(1)
    assert math.isnan(adaptation.acceptance)
    for true in (0.9, 0.2):
        gains = [adaptation.observe(rng.binomial(20, true) / 20) for _ in range(1500)]
    assert gains == sorted(gains, reverse=True)
    assert adaptation.acceptance == pytest.approx(0.2, abs=0.02)


def test_closed_means_closed_also_after_a_checkpoint():
    adaptation, again = Adaptation(), Adaptation()
    again.load_state_dict(json.loads(json.dumps(adaptation.state_dict(), allow_nan=False)))
    assert again.updates == 0 and math.isnan(again.acceptance) and not again.closed
    adaptation.observe(0.3)
    adaptation.close()
    again.load_state_dict(json.loads(json.dumps(adaptation.state_dict(), allow_nan=False)))
    assert (again.acceptance, again.updates, again.closed) == (0.3, 1, True)
    for one in (adaptation, again):
        with pytest.raises(InputError, match="closed"):
            one.observe(0.5)


@pytest.mark.parametrize("acceptance", [0.001, 0.01, 0.25, 0.5, 0.9, 0.949, 0.95, 1.0])
def test_number_is_the_smallest_that_moves_with_the_chance_asked_for(acceptance):
    n = proposals_needed(acceptance, 10_000)
    assert 1 - (1 - acceptance) ** n >= 0.95 - 1e-12
    assert n == 1 or 1 - (1 - acceptance) ** (n - 1) < 0.95
    assert proposals_needed(acceptance, 3) == min(n, 3)
