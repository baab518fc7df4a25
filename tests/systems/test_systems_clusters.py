"""Clusters against their written energies, their symmetries, and identities of their Boltzmann averages."""

import itertools
import math

import pytest
import torch
from openmm_bg.systems import DoubleWellCluster, LennardJonesCluster

from openmm_bg import systems
from openmm_bg.errors import InputError

CLUSTERS = {
    "dw4": DoubleWellCluster,
    "lj13": LennardJonesCluster,
    "lj13_deep": lambda: LennardJonesCluster(13, well_depth=2.0),
    "lj3": lambda: LennardJonesCluster(3),
}


def spread(cluster, n, seed=0):
    """Random configurations without overlaps: jittered points of a lattice."""
    generator = torch.Generator().manual_seed(seed)
    d = cluster.spatial_dimension
    lattice = torch.tensor(list(itertools.product(range(3), repeat=d)), dtype=torch.float64)[: cluster.particles]
    jitter = 0.1 * torch.randn(n, cluster.particles, d, dtype=torch.float64, generator=generator)
    return ((3.0 if d == 2 else 1.1) * (lattice + jitter)).flatten(1)


def by_hand(name, x):
    """The published formulas, pair by pair."""
    total = 0.0
    for i, j in itertools.combinations(range(len(x)), 2):
        r = (x[i] - x[j]).norm().item()
        if name == "dw4":
            total += -4 * (r - 4) ** 2 + 0.9 * (r - 4) ** 4
        else:
            total += (2 if name == "lj13_deep" else 1) * (r**-12 - 2 * r**-6)
    return total + (0 if name == "dw4" else 0.5 * (x - x.mean(0)).square().sum().item())


@pytest.mark.parametrize("name", CLUSTERS)
def test_energy_gradient_and_precision(name):
    cluster = CLUSTERS[name]()
    x = spread(cluster, 3)
    points = x.view(3, cluster.particles, cluster.spatial_dimension)
    u, gradient = cluster.value_and_gradient(x)
    assert u.tolist() == pytest.approx([by_hand(name, p) for p in points], rel=1e-10)
    assert torch.allclose(cluster(x), u, rtol=1e-12)
    for i in range(x.shape[1]):
        step = torch.zeros(x.shape[1]).double()
        step[i] = 1e-5
        assert torch.allclose((cluster(x + step) - cluster(x - step)) / 2e-5, gradient[:, i], rtol=1e-6, atol=1e-5)
    # the written-out gradient against that of autograd
    tracked = x.clone().requires_grad_()
    (automatic,) = torch.autograd.grad(cluster(tracked).sum(), tracked)
    assert torch.allclose(automatic, gradient, rtol=1e-10, atol=1e-10)
    single, force = cluster.value_and_gradient(x.float())
    assert single.dtype == force.dtype == torch.float32 and torch.allclose(single.double(), u, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CLUSTERS)
def test_symmetries(name):
    cluster = CLUSTERS[name]()
    d = cluster.spatial_dimension
    x = spread(cluster, 4)
    points = x.view(4, cluster.particles, d)
    u = cluster(x)
    generator = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    order = torch.randperm(cluster.particles, generator=generator)
    for same in (points + 7.3, points @ turn, points[:, order], -points):
        assert torch.allclose(cluster(same.flatten(1)), u, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(cluster(1.1 * x), u, rtol=1e-3)
    gradient = cluster.value_and_gradient(x)[1].view_as(points)
    assert gradient.sum(1).abs().max() < 1e-9 * gradient.abs().max()
    centred = cluster.centre(x + 5)
    assert centred.view_as(points).mean(1).abs().max() < 1e-12
    assert torch.allclose(cluster.centre(x), centred, atol=1e-12) and torch.allclose(cluster(centred), u, rtol=1e-10)


def test_lennard_jones_minima():
    # two particles at the minimum of a pair; and the icosahedron of the Cambridge Cluster Database, -44.326801
    pair = LennardJonesCluster(2)
    assert pair(torch.tensor([[0.0, 0, 0, 1, 0, 0]])).item() == pytest.approx(-1 + 0.25)
    golden = (1 + math.sqrt(5)) / 2
    corners = [(0.0, s, t * golden) for s in (1, -1) for t in (1, -1)]
    corners = [c[k:] + c[:k] for c in corners for k in range(3)]
    ball = torch.tensor([(0.0, 0.0, 0.0), *corners], dtype=torch.float64) / math.sqrt(1 + golden**2)
    cluster = systems.load("lj13")
    lowest = min(
        cluster((size * ball).view(1, -1)).item() - 0.5 * 12 * size**2
        for size in torch.linspace(0.94, 1.0, 601).tolist()
    )
    assert lowest == pytest.approx(-44.326801, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coincident_particles(dtype):
    cluster = LennardJonesCluster(13)
    x = spread(cluster, 3).to(dtype)
    x[1, :3] = x[1, 3:6]
    x[2, 0] = math.nan
    u, gradient = cluster.value_and_gradient(x)
    assert torch.isfinite(u[0]) and u[1] == math.inf and u[2] == math.inf
    assert torch.isfinite(gradient).all() and gradient[0].any() and not gradient[1:].any()
    assert torch.equal(cluster(x), u)
    well = DoubleWellCluster()
    x = torch.zeros(1, 8, dtype=dtype)
    u, gradient = well.value_and_gradient(x)
    assert u.item() == pytest.approx(6 * (0.9 * 256 - 64), rel=1e-5) and not gradient.any()
    tracked = x.requires_grad_()
    assert torch.isfinite(torch.autograd.grad(well(tracked).sum(), tracked)[0]).all()


def per_walker(values, walkers):
    chains = values.view(-1, walkers).mean(0)
    return chains.mean().item(), chains.std().item() / math.sqrt(walkers)


@pytest.mark.parametrize(
    ("name", "walkers", "rounds", "burn_in"), [("dw4", 300, 5, 60), ("lj13_deep", 100, 5, 80), ("lj3", 200, 5, 60)]
)
def test_reference_obeys_the_identities_of_the_boltzmann_density(name, walkers, rounds, burn_in):
    cluster = CLUSTERS[name]()
    n = walkers * rounds
    x = cluster.reference(n, torch.Generator().manual_seed(3), walkers=walkers, burn_in=burn_in, thinning=5)
    assert x.shape == (n, *cluster.event_shape) and x.dtype == torch.float64
    assert torch.allclose(cluster.centre(x), x, atol=1e-12)
    assert torch.isfinite(cluster(x)).all()
    assert len(x.unique(dim=0)) > 0.9 * n
    # integration by parts in the subspace: the average of x . grad u is its dimension
    gradient = cluster.value_and_gradient(x)[1]
    mean, error = per_walker((x * gradient).sum(1), walkers)
    assert abs(mean - (cluster.particles - 1) * cluster.spatial_dimension) < 5 * error
    # no direction is special
    points = x.view(n, cluster.particles, -1)
    axis, error = per_walker((points[..., 0] ** 2 - points[..., 1] ** 2).sum(1), walkers)
    assert abs(axis) < 5 * error


def test_reference_of_dw4_agrees_with_importance_sampling():
    cluster = systems.load("dw4")
    generator = torch.Generator().manual_seed(4)
    x = cluster.centre(2.2 * torch.randn(600_000, 8, dtype=torch.float64, generator=generator))
    u = cluster(x)
    weight = torch.softmax(x.square().sum(1) / (2 * 2.2**2) - u, 0)
    points = cluster.reference(600, generator, walkers=600, burn_in=100)
    for observable in (
        cluster,
        lambda x: x.square().sum(1),
        lambda x: (x.view(-1, 4, 2)[:, 0] - x.view(-1, 4, 2)[:, 1]).norm(dim=1),
    ):
        exact = (weight * observable(x)).sum()
        floor = (weight * (observable(x) - exact)).square().sum()
        values = observable(points)
        assert abs(values.mean() - exact) < 5 * torch.sqrt(floor + values.var() / len(values))


def test_reference_does_not_depend_on_where_it_starts():
    class Elsewhere(LennardJonesCluster):
        start_spread = 0.3

    settings = {"walkers": 150, "burn_in": 80}
    a, b = (
        kind(13, well_depth=2.0).reference(150, torch.Generator().manual_seed(seed), **settings)
        for kind, seed in ((LennardJonesCluster, 5), (Elsewhere, 6))
    )
    cluster = LennardJonesCluster(13, well_depth=2.0)
    for observable in (cluster, lambda x: x.square().sum(1)):
        p, q = observable(a), observable(b)
        assert abs(p.mean() - q.mean()) < 5 * math.sqrt((p.var() + q.var()) / 150)
    again = LennardJonesCluster(13, well_depth=2.0).reference(3, torch.Generator().manual_seed(7), burn_in=5)
    same = LennardJonesCluster(13, well_depth=2.0).reference(3, torch.Generator().manual_seed(7), burn_in=5)
    assert torch.equal(again, same)


def test_registry():
    assert systems.load("dw4").event_shape == (8,)
    assert systems.load("lj13").event_shape == (39,) and systems.load("lj13").well_depth == 1.0
    assert systems.load("lj13", well_depth=2.0).well_depth == 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LennardJonesCluster(1), "particles must be a whole number of at least 2"),
        (lambda: LennardJonesCluster(13, well_depth=0), "well_depth must be"),
        (lambda: DoubleWellCluster().reference(0, torch.Generator()), "n must be"),
        (lambda: DoubleWellCluster().reference(5, torch.Generator(), burn_in=0), "burn_in must be"),
        (lambda: DoubleWellCluster().centre(torch.zeros(2, 4, 2)), "takes the shape"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
