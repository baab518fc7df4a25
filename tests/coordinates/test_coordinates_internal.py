"""The bijection: round trips, volume elements, domain, gradients."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from openmm import unit

from openmm_bg.coordinates import Frame, InternalCoordinates, ZMatrix, angle, half_turns_from
from openmm_bg.errors import InputError

pytestmark = pytest.mark.usefixtures("form")

BUTANE = ZMatrix.from_bonds(4, [(0, 1), (1, 2), (2, 3)], "CCCC")


def rotations(n, generator):
    matrices = torch.linalg.qr(torch.randn(n, 3, 3, generator=generator, dtype=torch.float64))[0]
    return matrices * torch.linalg.det(matrices)[:, None, None]


def skew(w):
    zero = torch.zeros(())
    return torch.stack([zero, -w[2], w[1], w[2], zero, -w[0], -w[1], w[0], zero]).reshape(3, 3).to(w)


def on_circle(full, zmatrix):
    """Coordinates with torsions as sine and cosine, so that pi and -pi compare equal."""
    start = len(zmatrix.bonds) + len(zmatrix.angles)
    return torch.cat([full[:, :start], full[:, start:].sin(), full[:, start:].cos()], 1)


@pytest.fixture(scope="module")
def coordinates(dipeptide, form):
    return InternalCoordinates(dipeptide.zmatrix)


@pytest.fixture
def random():
    return torch.Generator().manual_seed(3)


def test_round_trip_of_dynamics_and_distortions(dipeptide, coordinates, random):
    noise = torch.randn(40, 22, 3, generator=random, dtype=torch.float64)
    far = torch.tensor([50.0, -80.0, 20.0])
    for x in (
        dipeptide.frames,
        dipeptide.frames + 0.02 * noise,
        dipeptide.frames + 0.2 * noise,
        dipeptide.frames + far,
    ):
        q, log_volume = coordinates(x)
        back, inverse_log_volume = coordinates.inverse(q, coordinates.frame(x))
        tolerance = 1e-12 if x.abs().max() < 10 else 1e-11  # 100 nm has an ulp of 1.4e-14
        assert (back - x).abs().max() < tolerance
        torch.testing.assert_close(inverse_log_volume, log_volume, rtol=0, atol=1e-10)
        again, _ = coordinates(coordinates.inverse(q)[0])
        torch.testing.assert_close(
            on_circle(again, dipeptide.zmatrix), on_circle(q, dipeptide.zmatrix), rtol=0, atol=1e-10
        )


def test_energy_is_unchanged(dipeptide, coordinates):
    x = dipeptide.frames[:10]
    back, _ = coordinates.inverse(coordinates(x)[0], coordinates.frame(x))
    elsewhere, _ = coordinates.inverse(coordinates(x)[0])
    energy = dipeptide.potential(x)
    assert np.abs(dipeptide.potential(back) - energy).max() < 1e-9
    assert np.abs(dipeptide.potential(elsewhere) - energy).max() < 1e-9


def test_every_molecule_round_trips(molecule, random):
    elements, bonds = molecule
    coordinates = InternalCoordinates(ZMatrix.from_bonds(len(elements), bonds, elements))
    assert coordinates.dimension == 3 * len(elements) - 6 == len(coordinates.kinds)
    x = torch.randn(4, len(elements), 3, generator=random, dtype=torch.float64)
    q, log_volume = coordinates(x)
    assert log_volume.isfinite().all() and q.shape == (4, coordinates.dimension)
    back, _ = coordinates.inverse(q, coordinates.frame(x))
    assert (back - x).abs().max() < 1e-9  # random angles come near 180 degrees


@st.composite
def trees(draw):
    size = draw(st.integers(3, 12))
    bonds = [(draw(st.integers(0, i - 1)), i) for i in range(1, size)]
    elements = draw(st.lists(st.sampled_from("CNOHS"), min_size=size, max_size=size))
    relabel = draw(st.permutations(range(size)))
    return size, [(relabel[i], relabel[j]) for i, j in bonds], elements, draw(st.integers(0, 2**32 - 1))


@settings(max_examples=60, deadline=None)
@given(trees())
def test_random_trees_round_trip(tree):
    size, bonds, elements, seed = tree
    zmatrix = ZMatrix.from_bonds(size, bonds, elements)
    coordinates = InternalCoordinates(zmatrix)
    x = torch.tensor(np.random.default_rng(seed).normal(size=(3, size, 3)))
    references = torch.tensor(np.concatenate([zmatrix.angles, zmatrix.rows[:, 1:]]))
    assume(angle(x, references).sin().min() > 1e-2)
    q, log_volume = coordinates(x)
    back, inverse_log_volume = coordinates.inverse(q, coordinates.frame(x))
    assert (back - x).abs().max() < 1e-9
    torch.testing.assert_close(inverse_log_volume, log_volume, rtol=0, atol=1e-9)


def test_shape_does_not_depend_on_the_pose(dipeptide, coordinates, random):
    x = dipeptide.frames
    turn, shift = rotations(len(x), random), torch.randn(len(x), 1, 3, generator=random, dtype=torch.float64)
    q, log_volume = coordinates(x)
    moved_q, moved_log_volume = coordinates(x @ turn.mT + shift)
    torch.testing.assert_close(
        on_circle(moved_q, dipeptide.zmatrix), on_circle(q, dipeptide.zmatrix), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(moved_log_volume, log_volume, rtol=0, atol=1e-11)


def test_frames(dipeptide, coordinates):
    a, b, c = dipeptide.zmatrix.seed
    q, _ = coordinates(dipeptide.frames)
    x, _ = coordinates.inverse(q)
    assert (x[:, b] == 0).all() and (x[:, a, 0] > 0).all() and (x[:, a, 1:] == 0).all()
    assert (x[:, c, 1] > 0).all() and (x[:, c, 2] == 0).all()
    frame = coordinates.frame(dipeptide.frames)
    torch.testing.assert_close(frame.origin, dipeptide.frames[:, b])
    torch.testing.assert_close(frame.rotation.mT @ frame.rotation, torch.eye(3).double().expand(40, 3, 3))
    assert (torch.linalg.det(frame.rotation) > 0).all()
    torch.testing.assert_close(x @ frame.rotation.mT + frame.origin[:, None], dipeptide.frames, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_volume_element_against_autograd(dipeptide, coordinates, random, side):
    """log|det dx/d(q, position of b, rotation vector)| is log J with no constant, wherever the rotation starts."""
    for x in dipeptide.frames[:3, None]:
        q, log_volume = coordinates(x)
        origin, start = torch.randn(3, generator=random, dtype=torch.float64), rotations(1, random)[0]

        def positions(q, origin, w, start=start):
            turn = torch.linalg.matrix_exp(skew(w))
            turn = turn @ start if side == "left" else start @ turn
            return coordinates.inverse(q[None], Frame(origin[None], turn[None]))[0].reshape(-1)

        zero = torch.zeros(3, dtype=torch.float64)
        blocks = torch.autograd.functional.jacobian(positions, (q[0], origin, zero))
        numeric = torch.linalg.slogdet(torch.cat(blocks, 1)).logabsdet
        assert abs(numeric - log_volume[0]) < 1e-12 * abs(numeric)


def test_log_volume_is_the_closed_form(dipeptide, coordinates):
    q, log_volume = coordinates(dipeptide.frames)
    bond, bend = (torch.tensor([kind == name for kind in coordinates.kinds]) for name in ("bond", "angle"))
    closed = 2 * q[:, bond].log().sum(1) + q[:, bend].sin().log().sum(1)
    torch.testing.assert_close(log_volume, closed, rtol=0, atol=1e-12)
    assert bond.sum() == 21 and bend.sum() == 20
    torsion_rows = coordinates.torsion_rows
    assert torsion_rows[torsion_rows >= 0].tolist() == list(range(19))
    assert all((row >= 0) == (kind == "torsion") for row, kind in zip(torsion_rows, coordinates.kinds, strict=True))


def test_gradients(random):
    coordinates = InternalCoordinates(ZMatrix.from_bonds(6, [(0, 1), (1, 2), (2, 3), (1, 4), (2, 5)], "CCCCHH"))
    x = torch.randn(2, 6, 3, generator=random, dtype=torch.float64, requires_grad=True)
    q = coordinates(x)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(coordinates, x)
    assert torch.autograd.gradcheck(coordinates.inverse, q)
    assert torch.autograd.gradgradcheck(coordinates.inverse, q)
    assert torch.autograd.gradcheck(lambda q, x: coordinates.inverse(q, coordinates.frame(x))[0], (q, x))


def assert_only_bad_rows_are_lost(function, good, bad, fill):
    """Bad rows among good ones: +inf and no gradient; the good rows as if they were alone."""
    alone = good.clone().requires_grad_()
    mixed = torch.stack([row for pair in zip(good.expand(len(bad), *good.shape[1:]), bad, strict=True) for row in pair])
    mixed.requires_grad_()
    out, log_volume = function(mixed)
    out_alone, log_volume_alone = function(alone)
    assert (log_volume[1::2] == math.inf).all()
    assert (out[1::2].isnan() if math.isnan(fill) else out[1::2] == fill).all()
    torch.testing.assert_close(out[::2], out_alone.expand_as(out[::2]))
    torch.testing.assert_close(log_volume[::2], log_volume_alone.expand(len(bad)))
    (gradient,) = torch.autograd.grad(out.nan_to_num().sum() + log_volume[::2].sum(), mixed, retain_graph=True)
    (expected,) = torch.autograd.grad(out_alone.sum() + log_volume_alone.sum(), alone)
    assert (gradient[1::2] == 0).all()
    torch.testing.assert_close(gradient[::2], expected.expand_as(gradient[::2]))
    (gradient,) = torch.autograd.grad(log_volume.sum(), mixed)
    assert gradient.isfinite().all() and (gradient[1::2] == 0).all() and (gradient[::2] != 0).any()


def test_positions_outside_the_domain(dipeptide, coordinates):
    good = dipeptide.frames[:1]
    bad = good.repeat(8, 1, 1)
    a, b, c = dipeptide.zmatrix.seed
    bad[0, 3, 1] = math.nan
    bad[1, 3, 1] = math.inf
    bad[2, 3, 1] = 1e300
    bad[3, 3] = bad[3, dipeptide.zmatrix.bonds[dipeptide.zmatrix.bonds[:, 0] == 3][0, 1]]  # on its bond atom
    bad[4, c] = 2 * bad[4, b] - bad[4, a]  # straight seed
    bad[5] = 0.3  # all atoms in one place
    bad[6] = torch.arange(22.0)[:, None] * torch.tensor([0.1, 0.05, 0.02])  # on a line
    bad[7] = math.nan
    assert_only_bad_rows_are_lost(coordinates, good, bad, fill=0)


def test_shapes_outside_the_domain(coordinates, dipeptide):
    good = coordinates(dipeptide.frames[:1])[0]
    bond, bend, torsion = (coordinates.kinds.index(kind) for kind in ("bond", "angle", "torsion"))
    wrong = [(bond, 0), (bond, -0.1), (bend, 0), (bend, math.pi), (bend, -1), (bend, 4), (torsion, math.inf)]
    wrong += [(index, math.nan) for index in (bond, bend, torsion)] + [(bond, 1e300)]
    bad = good.repeat(len(wrong), 1)
    for row, (index, value) in enumerate(wrong):
        bad[row, index] = value
    assert_only_bad_rows_are_lost(coordinates.inverse, good, bad, fill=math.nan)


def test_collinear_references_between_siblings():
    """Atoms 3, 1, 2 on a line give the torsion of atom 4 no plane, though every angle of the z-matrix is fine."""
    coordinates = InternalCoordinates(ZMatrix((0, 1, 2), np.array([[3, 1, 0, 2], [4, 3, 1, 2]])))
    good = torch.tensor([[0.1, 0.1, 0.1, 0.1, 1.5, 1.5, 1.5, 2.0, 1.0]], dtype=torch.float64)
    bad = torch.tensor([[0.1, 0.1, 0.1, 0.1, math.pi / 2, math.pi / 2, 1.5, math.pi, 1.0]], dtype=torch.float64)
    assert_only_bad_rows_are_lost(coordinates.inverse, good, bad, fill=math.nan)


def test_frames_that_are_not_finite_lose_their_rows(coordinates, dipeptide):
    x = dipeptide.frames[:2].clone()
    q, log_volume = coordinates(x)
    frame = coordinates.frame(x)
    frame.rotation[0] = math.nan
    back, inverse_log_volume = coordinates.inverse(q, frame)
    assert back[0].isnan().all() and inverse_log_volume[0] == math.inf
    assert (back[1] - x[1]).abs().max() < 1e-12 and abs(inverse_log_volume[1] - log_volume[1]) < 1e-12


def test_torsions_are_taken_modulo_two_pi():
    coordinates = InternalCoordinates(BUTANE, half_turns=[1])
    q = torch.tensor([[0.15, 0.15, 0.15, 1.9, 1.9, 2.5]], dtype=torch.float64)
    x, _ = coordinates.inverse(q)
    for turns in (-2, 1, 3):
        shifted = q.clone()
        shifted[:, -1] += 2 * math.pi * turns
        torch.testing.assert_close(coordinates.inverse(shifted)[0], x)
        torch.testing.assert_close(coordinates(x)[0], q)


def test_half_turns():
    free = InternalCoordinates(BUTANE)
    plus, minus = InternalCoordinates(BUTANE, half_turns=[1]), InternalCoordinates(BUTANE, half_turns=[-1])
    q = torch.tensor([[0.15, 0.15, 0.15, 1.9, 1.9, phi] for phi in (-3.0, -0.1, 0.1, 3.0)], dtype=torch.float64)
    x, log_volume = free.inverse(q)
    for coordinates, kept in ((plus, slice(2, 4)), (minus, slice(0, 2))):
        for values in (coordinates(x)[1], coordinates.inverse(q)[1]):
            assert values.isfinite().tolist() == [i in range(4)[kept] for i in range(4)]
            torch.testing.assert_close(values[kept], log_volume[kept])


def test_half_turns_keep_chirality_and_labels(dipeptide):
    half_turns = half_turns_from(dipeptide.zmatrix, dipeptide.frames[0].numpy())
    # The alpha carbon has two narrow siblings, as has each of the three methyls; planar centres have none.
    assert np.abs(half_turns).sum() == 8 and half_turns.dtype == np.int8
    assert (half_turns == half_turns_from(dipeptide.zmatrix, 10 * dipeptide.frames[0].numpy() * unit.angstrom)).all()
    coordinates = InternalCoordinates(dipeptide.zmatrix, half_turns=half_turns)
    x = dipeptide.frames
    assert coordinates(x)[1].isfinite().all()
    assert (coordinates(x * torch.tensor([1.0, 1.0, -1.0]))[1] == math.inf).all()  # the mirror image
    names = [f"{atom.residue.name}:{atom.name}" for atom in dipeptide.topology.atoms()]
    i, j, k = (names.index(f"ALA:HB{n}") for n in (1, 2, 3))
    swapped, turned = x.clone(), x.clone()
    swapped[:, [i, j]] = x[:, [j, i]]
    turned[:, [i, j, k]] = x[:, [j, k, i]]
    assert (coordinates(swapped)[1] == math.inf).all()
    assert coordinates(turned)[1].isfinite().all()


def test_pyramidal_nitrogen_may_invert():
    amine = ZMatrix.from_bonds(4, [(0, 1), (0, 2), (0, 3)], "NHHH")
    x = np.array([[0.0, 0, 0], [0.09, 0, 0.03], [-0.05, 0.08, 0.03], [-0.05, -0.08, 0.03]])
    assert half_turns_from(amine, x).tolist() == [0]


def test_config_and_copies_give_the_same_numbers(dipeptide):
    half_turns = half_turns_from(dipeptide.zmatrix, dipeptide.frames[0].numpy())
    coordinates = InternalCoordinates(dipeptide.zmatrix, half_turns=half_turns, masses=dipeptide.masses)
    assert "compile" not in coordinates.config()
    stored = InternalCoordinates.from_config(json.loads(json.dumps(coordinates.config())))
    stored.load_state_dict(coordinates.state_dict())
    assert stored.config() == coordinates.config()
    for other in (stored, copy.deepcopy(coordinates), copy.deepcopy(coordinates).to(torch.float32).to(torch.float64)):
        for mine, theirs in zip(coordinates(dipeptide.frames), other(dipeptide.frames), strict=True):
            assert torch.equal(mine, theirs)


def test_single_precision(dipeptide, coordinates):
    single = copy.deepcopy(coordinates).to(torch.float32)
    assert single.free.dtype == torch.int64
    x = dipeptide.frames.float()
    q, log_volume = single(x)
    back, inverse_log_volume = single.inverse(q, single.frame(x))
    assert q.dtype == log_volume.dtype == back.dtype == inverse_log_volume.dtype == torch.float32
    assert (back - x).abs().max() < 1e-5
    assert (log_volume - coordinates(dipeptide.frames)[1]).abs().max() < 1e-4


def test_empty_batch(coordinates):
    q, log_volume = coordinates(torch.zeros(0, 22, 3))
    assert q.shape == (0, 60) and log_volume.shape == (0,)
    assert coordinates.inverse(q)[0].shape == (0, 22, 3)


def test_refused_inputs(dipeptide, coordinates):
    with pytest.raises(InputError, match=r"\(batch, 22, 3\)"):
        coordinates(torch.zeros(2, 21, 3))
    with pytest.raises(InputError, match=r"\(batch, 60\)"):
        coordinates.inverse(torch.zeros(2, 66))
    for half_turns in ([1, 2], [2] * 19, [0.5] * 19):
        with pytest.raises(InputError, match="half_turns"):
            InternalCoordinates(dipeptide.zmatrix, half_turns=half_turns)
    with pytest.raises(InputError, match="masses"):
        InternalCoordinates(dipeptide.zmatrix, masses=[1.0])
    with pytest.raises(InputError, match="check"):
        InternalCoordinates.from_config({"zmatrix": dipeptide.zmatrix.to_dict()})
    with pytest.raises(InputError, match="reference positions"):
        half_turns_from(dipeptide.zmatrix, np.zeros((3, 3)))
