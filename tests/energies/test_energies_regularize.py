"""The properties of Theorem 1: the same energy below the threshold, bounded, continuously differentiable."""

from __future__ import annotations

import math

import pytest
import torch
from openmm import app, unit

from openmm_bg.energies import Energy, ForceFieldEnergy, regularize
from openmm_bg.errors import InputError

KINDS = ["rational", "smooth"]


class Line(Energy):
    """u(x) = x: the regularised energy is the continuation itself. Beyond 1e6 a collision."""

    def __init__(self) -> None:
        super().__init__((1,))

    def reduced(self, x: torch.Tensor) -> torch.Tensor:
        u = x[:, 0]
        return torch.where(u < 1e6, u, torch.inf)


def on_line(values: list[float], kind: str, c: float = 10.0, offset: float = -7.0) -> torch.Tensor:
    energy = regularize(Line(), c, kind, offset=offset)
    return energy(torch.tensor(values, dtype=torch.float64)[:, None])


@pytest.mark.parametrize("kind", KINDS)
def test_identical_below_the_threshold_and_bounded_above(kind: str) -> None:
    below = [-1e5, -7.0, 0.1, 2.9, 3.0]
    assert on_line(below, kind).tolist() == below
    above = on_line([3.1, 5.0, 8.0, 20.0, 1e3, 9e5, 2e6], kind)
    assert (above.diff() >= 0).all() and above[0] > 3.0 and above[-1] == 13.0


def test_formulas() -> None:
    u, c = 8.0, 10.0  # v = 15 above the offset, y = 1/2
    assert float(on_line([u], "rational")[0]) == pytest.approx(c + c * 0.5 / 1.5 - 7.0)
    assert float(on_line([u], "smooth")[0]) == pytest.approx(0.5 * 15.0 + 0.5 * 2 * c - 7.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [3.0, 13.0], ids=["threshold", "twice"])
def test_continuously_differentiable(kind: str, at: float) -> None:
    h = 1e-6
    left, middle, right = on_line([at - h, at, at + h], kind).tolist()
    assert (middle - left) / h == pytest.approx((right - middle) / h, abs=1e-5)
    x = torch.tensor([[at - h], [at], [at + h]], dtype=torch.float64)
    _, slope = regularize(Line(), 10.0, kind, offset=-7.0).value_and_gradient(x)
    torch.testing.assert_close(slope, slope[1].expand_as(slope), rtol=0, atol=1e-5)
    assert slope[1, 0].item() == pytest.approx((right - left) / (2 * h), abs=1e-5)


def test_kinds_differ_in_their_gradient_above() -> None:
    x = torch.tensor([[1e3]], dtype=torch.float64)
    assert regularize(Line(), 10.0, "rational").value_and_gradient(x)[1] > 0
    assert regularize(Line(), 10.0, "smooth").value_and_gradient(x)[1] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_molecule(kind: str, dtype: torch.dtype) -> None:
    from openmmtools.testsystems import AlanineDipeptideVacuum

    geometry = AlanineDipeptideVacuum(constraints=None)
    field = app.ForceField("amber99sbildn.xml", "amber99_obc.xml")
    system = field.createSystem(geometry.topology, nonbondedMethod=app.NoCutoff, constraints=None)
    energy = ForceFieldEnergy(system, 300)
    positions = torch.as_tensor(geometry.positions.value_in_unit(unit.nanometer), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.0, 0.002, 0.01, 0.02, 0.1, 0.5, 0.0, 0.0, 0.0])[:, None, None]
    x = positions + scale * torch.randn((9, 22, 3), generator=generator, dtype=dtype)
    x[6, 0] = x[6, 21]  # a collision has the plateau's energy
    x[7, 0] = x[7, 21] + 1e-5  # nearly one: overflows in float32
    x[8, 2, 1] = math.nan  # no conformation at all

    offset = float(energy(x[:1]))
    soft = regularize(energy, 100.0, kind, offset=offset)
    u, v = energy(x), soft(x)
    below = u - offset <= 100.0
    assert below[:2].all() and not below[4:].any()
    assert torch.equal(v[below], u[below])
    assert torch.isfinite(v[:8]).all() and (v[:8] <= offset + 200.001).all()
    assert v[6] == pytest.approx(offset + 200.0, rel=1e-6) and v[8] == math.inf

    value, gradient = soft.value_and_gradient(x)
    torch.testing.assert_close(value, v)
    assert torch.isfinite(gradient).all() and (gradient[[6, 8]] == 0).all()
    assert torch.equal(gradient[below], energy.value_and_gradient(x)[1][below])
    y = x.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(soft(y).sum(), y)
    tolerance = 1e-4 if dtype is torch.float32 else 1e-9
    torch.testing.assert_close(by_autograd, gradient, rtol=tolerance, atol=100 * tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_twice_differentiable(kind: str) -> None:
    class Bowl(Energy):
        def reduced(self, x: torch.Tensor) -> torch.Tensor:
            return (x**4).sum(-1)

    x = torch.tensor([[0.5, 0.5], [1.5, 1.0], [1.3, 1.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(regularize(Bowl((2,)), 3.0, kind), (x,))


def test_wrong_input_is_named() -> None:
    for threshold in (0.0, -1.0, math.inf, math.nan, "high", 5 * unit.kilojoule_per_mole):
        with pytest.raises(InputError, match="threshold"):
            regularize(Line(), threshold)
    with pytest.raises(InputError, match="rational, smooth"):
        regularize(Line(), 1.0, "tanh")
    with pytest.raises(InputError, match="offset"):
        regularize(Line(), 1.0, offset=math.inf)
