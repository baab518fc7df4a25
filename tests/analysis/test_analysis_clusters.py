"""Distances of clusters against brute force, against closed forms, and under everything they must not notice."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.spatial.transform import Rotation

from openmm_bg.analysis import clusters, measure
from openmm_bg.analysis.clusters import cluster_distances, cluster_w2, pair_distances, single_pass_w2
from openmm_bg.errors import InputError


def droplets(rng, n, particles, dimension=3, spread=0.15):
    """Shaken copies of one shape: a cluster below its melting point."""
    shape = np.random.default_rng(99).normal(size=(particles, dimension))
    return (shape + spread * rng.normal(size=(n, particles, dimension))).reshape(n, -1)


def moved(x, rng, particles, dimension, *, permute=True, rotate=True, reflect=True):
    """The same configurations, each relabelled, turned, perhaps reflected, and shifted."""
    points = x.reshape(len(x), particles, dimension).copy()
    for k in range(len(points)):
        q = np.eye(dimension)
        if rotate:
            q, _ = np.linalg.qr(rng.normal(size=(dimension, dimension)))
            improper = reflect and rng.random() < 0.5
            if (np.linalg.det(q) < 0) != improper:
                q[:, 0] *= -1
        order = rng.permutation(particles) if permute else np.arange(particles)
        points[k] = points[k][order] @ q.T + rng.normal(size=dimension)
    return points.reshape(len(x), -1)


def brute_force(x, y, particles, dimension, *, permute, rotate, reflect):
    """Every permutation, and the angle by numerical minimisation from many starts."""
    x, y = x.reshape(particles, dimension), y.reshape(particles, dimension)
    x, y = x - x.mean(0), y - y.mean(0)
    orders = itertools.permutations(range(particles)) if permute else [tuple(range(particles))]
    mirrors = [1.0, -1.0] if rotate and reflect else [1.0]
    best = math.inf
    for order, mirror in itertools.product(orders, mirrors):
        z = y[list(order)] * ([mirror] + [1.0] * (dimension - 1))
        if not rotate:
            best = min(best, np.square(x - z).sum())
            continue

        def cost(angles, z=z):
            if dimension == 2:
                c, s = np.cos(angles[0]), np.sin(angles[0])
                return np.square(x - z @ np.array([[c, -s], [s, c]]).T).sum()
            return np.square(x - Rotation.from_rotvec(angles).apply(z)).sum()

        starts = [[k] for k in range(6)] if dimension == 2 else [[0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 3], [1, 1, 1]]
        best = min(best, *(minimize(cost, start).fun for start in starts))
    return math.sqrt(best)


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize(("permute", "rotate", "reflect"), list(itertools.product([False, True], repeat=3)))
def test_small_clusters_against_brute_force(dimension, permute, rotate, reflect):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3 * dimension)), rng.normal(size=(3, 3 * dimension))
    options = {"permute": permute, "rotate": rotate, "reflect": reflect}
    expected = [[brute_force(x, y, 3, dimension, **options) for y in b] for x in a]
    np.testing.assert_allclose(cluster_distances(a, b, 3, dimension, **options), expected, atol=1e-6)


def test_the_search_finds_what_all_permutations_find():
    rng = np.random.default_rng(1)
    for particles, dimension in ((5, 2), (4, 3)):
        a, b = rng.normal(size=(2, 12, particles * dimension))
        for reflect in (False, True):
            exact = cluster_distances(a, b, particles, dimension, reflect=reflect)
            x, y = (clusters._configurations(v, "v", particles, dimension) for v in (a, b))
            searched = np.sqrt(clusters._squared_searched(x, y, reflect, nearest=12, starts=96))
            assert (searched > exact - 1e-6).all(), "a search can only be above"
            np.testing.assert_allclose(searched, exact, atol=1e-6)


@pytest.mark.parametrize(("particles", "dimension"), [(4, 2), (7, 2), (4, 3), (8, 3)])
def test_distances_do_not_notice_labels_turns_and_shifts(particles, dimension):
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 6, particles * dimension))
    before = cluster_distances(a, b, particles, dimension)
    after = cluster_distances(a, moved(b, rng, particles, dimension), particles, dimension)
    np.testing.assert_allclose(after, before, atol=1e-6)
    same = cluster_distances(a, moved(a, rng, particles, dimension), particles, dimension)
    assert same.diagonal().max() < 1e-6 and cluster_w2(a, a[::-1], particles, dimension) < 1e-6


def test_mirror_images_differ_where_reflections_are_off():
    rng = np.random.default_rng(3)
    a = rng.normal(size=(5, 8 * 3))
    turned = moved(a, rng, 8, 3, reflect=False)
    mirrored = (a.reshape(-1, 8, 3) * [-1, 1, 1]).reshape(5, -1)
    assert cluster_distances(a, turned, 8, 3, reflect=False).diagonal().max() < 1e-6
    assert cluster_distances(a, mirrored, 8, 3, reflect=False).diagonal().min() > 0.1
    assert cluster_distances(a, mirrored, 8, 3).diagonal().max() < 1e-6


def test_more_freedom_and_a_longer_search_only_come_closer():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(2, 10, 13 * 3))
    plain = cluster_distances(a, b, 13, 3, permute=False, rotate=False)
    turned = cluster_distances(a, b, 13, 3, permute=False)
    named = cluster_distances(a, b, 13, 3, rotate=False)
    first = cluster_distances(a, b, 13, 3, nearest=0)
    both = cluster_distances(a, b, 13, 3, nearest=10)
    assert (turned < plain).all() and (named < plain).all()
    assert (both < turned).all() and (both <= named + 1e-9).all() and (both <= first).all()
    # |d_ij - d'_ij| <= |(x_i - y_i) - (x_j - y_j)|, whose squares sum to N times the squared distance
    left, right = np.sort(pair_distances(a, 13, 3)), np.sort(pair_distances(b, 13, 3))
    below = np.sqrt(np.square(left[:, None] - right).sum(-1) / 13)
    assert (both >= below).all()


def test_a_frozen_cluster_is_aligned_to_its_own_shape():
    rng = np.random.default_rng(5)
    a, b = droplets(rng, 20, 13), droplets(rng, 20, 13)
    labelled = cluster_distances(a, b, 13, 3, permute=False)
    found = cluster_distances(a, moved(b, rng, 13, 3), 13, 3, nearest=20)
    assert (found <= labelled + 1e-6).mean() > 0.99


def test_transport_of_labelled_points_is_that_of_the_plane():
    """Two particles on a line, fixed in name and orientation, are one number: their half difference times root 2."""
    rng = np.random.default_rng(6)
    u, v = rng.normal(size=30), rng.normal(size=30)
    a, b = np.stack([u, -u], 1), np.stack([v, -v], 1)
    expected = math.sqrt(2 * np.mean((np.sort(u) - np.sort(v)) ** 2))
    assert cluster_w2(a, b, 2, 1, permute=False, rotate=False) == pytest.approx(expected)
    # as distances alone, where the order of the two and the side they lie on are no matter
    expected = math.sqrt(2 * np.mean((np.sort(abs(u)) - np.sort(abs(v))) ** 2))
    assert cluster_w2(a, b, 2, 1) == pytest.approx(expected)
    assert cluster_w2(moved(a, rng, 2, 1), b, 2, 1) == pytest.approx(expected)


def test_weights_equal_repeated_configurations():
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(2, 5, 8))
    counts = np.array([1, 3, 2, 1, 1])
    assert cluster_w2(a, b, 4, 2, a_weights=counts) == pytest.approx(cluster_w2(np.repeat(a, counts, 0), b, 4, 2))
    left = single_pass_w2(a, b, 4, 2, b_weights=counts)
    assert left == pytest.approx(single_pass_w2(a, np.repeat(b, counts, 0), 4, 2))


def test_a_single_pass_lies_between_the_aligned_and_the_plain_distance():
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(2, 40, 8))
    single = single_pass_w2(a, b, 4, 2)
    assert cluster_w2(a, b, 4, 2) < single < cluster_w2(a, b, 4, 2, permute=False, rotate=False)
    # it forgives labels, but depends on how the configurations are turned
    assert single_pass_w2(a, moved(b, rng, 4, 2, rotate=False), 4, 2) == pytest.approx(single)
    assert abs(single_pass_w2(a, moved(b, rng, 4, 2), 4, 2) - single) > 1e-3


def test_a_distance_comes_with_its_floor():
    rng = np.random.default_rng(9)
    reference, other = droplets(rng, 200, 4, 2), droplets(rng, 80, 4, 2, spread=0.5)
    metric = partial(cluster_w2, particles=4, spatial_dimension=2)
    far = measure("shape", metric, reference, other, rng, n=40, repeats=3)
    near = measure("shape", metric, reference, moved(reference, rng, 4, 2), rng, n=40, repeats=3)
    assert not far.within_floor and near.within_floor and near.floor > 0


def test_pair_distances_count_each_pair_once():
    np.testing.assert_allclose(pair_distances([[0.0, 0.0, 3.0, 4.0, 3.0, 0.0]], 3, 2), [[5.0, 3.0, 4.0]])


@pytest.mark.parametrize(
    ("a", "b", "particles", "dimension"),
    [
        (np.zeros((2, 7)), np.zeros((2, 8)), 4, 2),
        (np.zeros((2, 8)), np.full((2, 8), np.nan), 4, 2),
        (np.zeros((0, 8)), np.zeros((2, 8)), 4, 2),
        (np.zeros((2, 8)), np.zeros((2, 8)), 2, 4),
        (np.zeros(8), np.zeros((2, 8)), 4, 2),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, particles, dimension):
    with pytest.raises(InputError):
        cluster_w2(a, b, particles, dimension)
    with pytest.raises(InputError):
        single_pass_w2(a, b, particles, dimension)
