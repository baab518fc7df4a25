"""One contract for every invertible map, one for every density."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from openmm_bg.flows import (
    AffineCoupling,
    AffineTorsions,
    AutoregressiveSpline,
    Base,
    Composition,
    ConditionalAffine,
    ConditionalWhitening,
    ContinuousFlow,
    Flow,
    Mixing,
    MolecularFlow,
    PerceptronEnergy,
    PerceptronVelocity,
    RealNVP,
    SplineCoupling,
    SplineFlow,
    SplineTorsions,
    circular_spline,
    wrap,
)
from openmm_bg.flows.local import Surroundings

MOVED = torch.tensor([True, False, True, False, True])
CIRCULAR = torch.tensor([True, False, False, True, True])


def whitening(context: int) -> ConditionalWhitening:
    transform = ConditionalWhitening(5, context).double()
    rng = torch.Generator().manual_seed(3)
    y = torch.randn(200, 5, generator=rng, dtype=torch.float64) @ torch.randn(5, 5, generator=rng, dtype=torch.float64)
    transform.fit(y, torch.randn(200, context, generator=rng, dtype=torch.float64) if context else None)
    return transform


# name: (transform, which dimensions are angles, whether untrained means identity)
# three blocks in a row; the features of the context belong to the first and the last
AROUND = Surroundings.of([0, 0, 1, 2, 2], [0, 0, 2, 2], [(0, 1), (1, 2)], 0)
TRANSFORMS = {
    "affine": lambda: (AffineCoupling(MOVED), [False] * 5, True),
    "affine with context": lambda: (AffineCoupling(MOVED, 4), [False] * 5, True),
    "affine, split networks": lambda: (AffineCoupling(MOVED, 4, (16,), "split"), [False] * 5, True),
    "affine, masked networks": lambda: (AffineCoupling(MOVED, 4, (16,), "masked"), [False] * 5, True),
    "affine, local networks": lambda: (AffineCoupling(MOVED, 4, (16,), surroundings=AROUND), [False] * 5, True),
    "conditional affine, local networks": lambda: (ConditionalAffine(5, 4, (16,), AROUND), [False] * 5, True),
    "affine without condition": lambda: (AffineCoupling(torch.ones(5).bool()), [False] * 5, True),
    "spline, all real": lambda: (SplineCoupling(MOVED, torch.zeros(5).bool()), [False] * 5, True),
    "spline, all circular": lambda: (SplineCoupling(MOVED, torch.ones(5).bool()), [True] * 5, True),
    "spline, mixed": lambda: (SplineCoupling(MOVED, CIRCULAR, 4), CIRCULAR.tolist(), True),
    "spline, local networks": lambda: (
        SplineCoupling(MOVED, torch.zeros(5).bool(), 4, bins=4, hidden=(16,), surroundings=AROUND), [False] * 5, True,
    ),
    "autoregressive": lambda: (AutoregressiveSpline([1, 3, 1, 2, 1]), [True] * 5, True),
    "autoregressive, few conditions": lambda: (
        AutoregressiveSpline([1, 3, 1, 2, 1], conditions=[[], [0], [1], [0], [2, 3]]), [True] * 5, True,
    ),
    "conditional affine": lambda: (ConditionalAffine(5, 4), [False] * 5, True),
    "mixing": lambda: (Mixing(5), [False] * 5, True),
    "mixing beside a context": lambda: (Mixing(5, 4), [False] * 5, True),
    "whitening": lambda: (whitening(0), [False] * 5, False),
    "conditional whitening": lambda: (whitening(4), [False] * 5, False),
    "composition": lambda: (
        Composition([AffineCoupling(MOVED, 4), AffineCoupling(~MOVED), ConditionalAffine(5, 4)]), [False] * 5, True,
    ),
}  # fmt: skip


def disturb(module: torch.nn.Module, seed: int = 0, size: float = 0.3) -> None:
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)


@pytest.fixture(params=TRANSFORMS, ids=list(TRANSFORMS))
def case(request):
    transform, circular, identity = TRANSFORMS[request.param]()
    transform = transform.double()
    rng = torch.Generator().manual_seed(1)
    z = Base(circular).double().sample(40, rng)
    context = None
    if transform.context_dimension:
        context = torch.randn(40, transform.context_dimension, generator=rng, dtype=torch.float64)
    return transform, z, context, torch.tensor(circular), identity


def test_untrained_transform_is_the_identity(case):
    transform, z, context, _, identity = case
    if not identity:
        pytest.skip("set by data, never the identity")
    y, log_det = transform(z, context)
    torch.testing.assert_close(y, z, atol=1e-12, rtol=0)
    torch.testing.assert_close(log_det, torch.zeros(40, dtype=z.dtype), atol=1e-12, rtol=0)


def test_round_trip(case):
    transform, z, context, circular, _ = case
    disturb(transform)
    y, forward = transform(z, context)
    back, inverse = transform.inverse(y, context)
    difference = torch.where(circular, wrap(back - z), back - z)
    assert difference.abs().max() < 1e-9
    assert (forward + inverse).abs().max() < 1e-9
    assert not torch.allclose(y, z), "a disturbed transform must move something"


def test_log_determinant_is_autograds(case):
    transform, z, context, _, _ = case
    disturb(transform)
    for row in range(3):
        given = None if context is None else context[row : row + 1]

        def one(v, given=given):
            return transform(v[None], given)[0][0]

        def back(v, given=given):
            return transform.inverse(v[None], given)[0][0]

        for function, method, point in (
            (one, transform, z[row]),
            (back, transform.inverse, one(z[row]).detach()),
        ):
            jacobian = torch.autograd.functional.jacobian(function, point)
            expected = torch.linalg.slogdet(jacobian)[1]
            torch.testing.assert_close(method(point[None], given)[1][0], expected, atol=1e-9, rtol=1e-9)


def test_pushed_score_is_that_of_the_density_and_the_path_keeps_its_gradient(case):
    transform, z, context, circular, _ = case
    disturb(transform)
    base = Base(circular.tolist(), std=1.3).double()
    y, log_det, score = transform.push_score(z, base.score(z), context)
    plain, plain_log_det = transform(z, context)
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(log_det, plain_log_det)
    leaf = y.detach().requires_grad_()
    back, inverse = transform.inverse(leaf, context)
    (expected,) = torch.autograd.grad((base.log_prob(back) + inverse).sum(), leaf)
    torch.testing.assert_close(score, expected, atol=1e-8, rtol=1e-8)
    assert not score.requires_grad
    parameters = list(transform.parameters())
    if parameters:
        weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=z.dtype)
        one, two = (torch.autograd.grad((path * weights).sum(), parameters, allow_unused=True) for path in (y, plain))
        for a, b in zip(one, two, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [n for n in TRANSFORMS if "affine" in n])
def test_gradients_written_by_hand_are_those_of_finite_differences(name):
    transform = TRANSFORMS[name]()[0].double()
    disturb(transform)
    rng = torch.Generator().manual_seed(6)
    points = [torch.randn(2, 5, generator=rng, dtype=torch.float64)]
    if transform.context_dimension:
        points.append(torch.randn(2, transform.context_dimension, generator=rng, dtype=torch.float64))
    points = [point.requires_grad_() for point in points]
    for direction in (transform.forward, transform.inverse):
        assert torch.autograd.gradcheck(direction, points)
        assert torch.autograd.gradgradcheck(direction, points)
    # and those of the weights, against operations that autograd knows
    network = getattr(transform, "network", None)
    if hasattr(network, "plain"):
        kept, context = torch.randn(len(getattr(transform, "keep", [])), 3, dtype=torch.float64), None
        if transform.context_dimension:
            context = torch.randn(transform.context_dimension, 3, dtype=torch.float64)
        by_hand, plain = network.columns(kept, context), network.plain(kept, context, network.weights())
        torch.testing.assert_close(by_hand, plain)
        weights = network.weights()
        one, two = (torch.autograd.grad(out.square().sum(), weights) for out in (by_hand, plain))
        torch.testing.assert_close(one, two)


def test_local_networks_see_what_is_within_reach_and_nothing_else():
    around = Surroundings.of([0, 1, 2, 3], [3, 0], [(0, 1), (1, 2), (2, 3)], 1)
    assert around.near[:, :4].tolist() == [[abs(i - j) <= 1 for j in range(4)] for i in range(4)]
    assert around.near[:, 4:].tolist() == [[abs(i - j) <= 2 for j in range(4)] for i in range(4)]
    layer = AffineCoupling(torch.tensor([True, False, True, False]), 2, (8,), surroundings=around).double()
    disturb(layer)
    z, context = torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    before = layer(z, context)[0]
    for kept, moves in ((1, [0, 2]), (3, [2])):
        there = z.clone()
        there[0, kept] = 1.0
        assert ((layer(there, context)[0] != before)[0].nonzero()[:, 0].tolist()) == sorted([*moves, kept])
    for feature, moves in ((0, [2]), (1, [0, 2])):
        there = context.clone()
        there[0, feature] = 1.0
        assert (layer(z, there)[0] != before)[0].nonzero()[:, 0].tolist() == moves


def test_a_molecular_flow_of_blocks_grows_linearly_and_is_rebuilt_from_its_config():
    def flow(residues):
        blocks = [b for b in range(residues) for _ in range(6)]
        return MolecularFlow(
            6 * residues, torsions=range(5, 6 * residues, 6), rotors={}, stiff_torsions=[], layers=2, hidden=8,
            torsion_hidden=4, blocks=blocks, bonded_blocks=[(b, b + 1) for b in range(residues - 1)],
        )  # fmt: skip

    def stiff(flow):
        return sum(p.numel() for p in flow.stiff.parameters())

    # random masks change the widest block a little
    assert stiff(flow(24)) == pytest.approx(3 * stiff(flow(8)), rel=0.1)
    one = flow(3)
    one.initialize(0.1 * torch.randn(200, 18, generator=torch.Generator().manual_seed(0)))
    disturb(one.stiff, size=0.1)
    two = MolecularFlow.from_config(one.config())
    two.load_state_dict(one.state_dict())
    q = one.sample(5, torch.Generator().manual_seed(1))[0]
    torch.testing.assert_close(one.log_prob(q), two.log_prob(q))


def test_options_that_are_not_used_leave_no_trace_in_the_config():
    names = {"torsion_conditions", "neighbours", "spline_layers", "spline_bins", "spline_bound", "blocks", "reach"}
    names.add("mixing")
    assert not names & molecular("spline").config().keys()
    assert names <= FLOWS["molecular, every option"]().config().keys()
    with pytest.raises(ValueError, match="stiff"):
        molecular("spline", neighbours=[(0, 4)])
    with pytest.raises(ValueError, match="'spline'"):
        molecular("realnvp", torsion_conditions=[[], []])


def test_gradients_reach_every_parameter(case):
    transform, z, context, _, _ = case
    disturb(transform)
    if not list(transform.parameters()):
        pytest.skip("nothing to train")
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=z.dtype)
    y, log_det = transform(z, context)
    ((y * weights).sum() + log_det.sum()).backward()
    for name, parameter in transform.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("pattern", list(itertools.product([False, True], repeat=3)))
def test_every_pattern_of_circular_channels(pattern):
    """A spline of another library split its parameters by the wrong count here."""
    circular = torch.tensor(pattern)
    for moved in itertools.product([False, True], repeat=3):
        if not any(moved):
            continue
        layer = SplineCoupling(torch.tensor(moved), circular, hidden=(8,)).double()
        disturb(layer)
        z = Base(pattern).double().sample(10, torch.Generator().manual_seed(2))
        y, log_det = layer(z)
        expected = torch.stack(
            [
                torch.autograd.functional.jacobian(lambda v, layer=layer: layer(v[None])[0][0], row).slogdet()[1]
                for row in z
            ]
        )
        torch.testing.assert_close(log_det, expected, atol=1e-9, rtol=1e-9)
        kept = [i for i in range(3) if not moved[i]]
        assert torch.equal(y[:, kept], z[:, kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_angle_falls_between_bins(dtype):
    rng = torch.Generator().manual_seed(0)
    parameters = 3 * torch.randn(4, 36, 1, generator=rng, dtype=dtype).expand(-1, -1, 200001)
    grid = torch.linspace(-math.pi, math.pi, 200001, dtype=dtype).expand(4, -1)
    ones = torch.ones(4, 1, dtype=dtype)
    for inverse in (False, True):
        y, log_derivative = circular_spline(grid, parameters, ones, inverse=inverse)
        assert torch.isfinite(y).all() and torch.isfinite(log_derivative).all()
        if dtype == torch.float64:
            assert (y.diff() > -1e-9).all(), "monotone"


def test_a_rotor_has_its_symmetry_exactly():
    flow = SplineTorsions([1, 3]).double()
    disturb(flow)
    t, log_prob = flow.sample(50, torch.Generator().manual_seed(0))
    turned = t.clone()
    turned[:, 1] = wrap(t[:, 1] + 2 * math.pi / 3)
    torch.testing.assert_close(flow.log_prob(turned), log_prob, atol=1e-6, rtol=0)
    turned[:, 0] = wrap(t[:, 0] + 2 * math.pi / 3)
    assert (flow.log_prob(turned) - log_prob).abs().max() > 0.1


def molecular(kind: str, **options) -> MolecularFlow:
    flow = MolecularFlow(
        7, torsions=[4, 5], rotors={5: (3, 6)}, stiff_torsions=[3, 6], torsion_model=kind, layers=4, hidden=16,
        **options,
    ).double()  # fmt: skip
    rng = torch.Generator().manual_seed(4)
    centre = torch.tensor([0.1, 1.9, 0.15, 2.1, 0.0, 1.0, -2.1], dtype=torch.float64)
    flow.initialize(centre + 0.1 * torch.randn(300, 7, generator=rng, dtype=torch.float64))
    return flow


# name: (flow, volume of the box to integrate over)
FLOWS = {
    "realnvp": lambda: RealNVP(2, layers=4, hidden=(16,)).double(),
    "realnvp, split": lambda: RealNVP(2, layers=4, hidden=(16,), networks="split").double(),
    "realnvp, masked": lambda: RealNVP(2, layers=4, hidden=(16,), networks="masked").double(),
    "spline": lambda: SplineFlow([False, True], layers=4, hidden=(16,)).double(),
    "torus": lambda: SplineTorsions([1, 3], hidden=8).double(),
    "affine torus": lambda: AffineTorsions(
        [1, 3], layers=4, hidden=(16,), generator=torch.Generator().manual_seed(0)
    ).double(),
    "continuous": lambda: ContinuousFlow(Base([False] * 2, std=2.0), PerceptronVelocity(2, 16, odd=True)).double(),
    "continuous, mixed": lambda: ContinuousFlow(
        Base([False, True]), PerceptronVelocity(2, 16, circular=[False, True]), perturbation=PerceptronEnergy(2, 8)
    ).double(),
    "molecular spline": lambda: molecular("spline"),
    "molecular realnvp": lambda: molecular("realnvp"),
    "molecular, every option": lambda: molecular(
        "spline",
        blocks=[0, 0, 0, 1, 1, 1, 1],
        bonded_blocks=[(0, 1)],
        torsion_conditions=[[], []],
        neighbours=[(0, 1), (1, 2), (2, 3)],
        spline_layers=2,
        spline_bins=4,
        mixing=True,
    ),
}


@pytest.fixture(params=FLOWS, ids=list(FLOWS))
def flow(request):
    flow = FLOWS[request.param]()
    disturb(flow, size=0.2)
    return flow


def test_sample_and_log_prob_agree(flow):
    for broadened in (False, True):
        y, log_prob = flow.sample(400, torch.Generator().manual_seed(0), broadened=broadened)
        torch.testing.assert_close(flow.log_probs(y)[int(broadened)], log_prob, atol=1e-6, rtol=0)


def test_a_seed_reproduces_samples(flow):
    first = flow.sample(20, torch.Generator().manual_seed(7))[0]
    again = flow.sample(20, torch.Generator().manual_seed(7))[0]
    other = flow.sample(20, torch.Generator().manual_seed(8))[0]
    assert torch.equal(first.nan_to_num(), again.nan_to_num()) and not torch.equal(first, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_have_no_density(flow, bad):
    y, log_prob = flow.sample(6, torch.Generator().manual_seed(0))
    y[2, 0] = bad
    got = flow.log_prob(y)
    assert got[2] == -math.inf
    keep = [0, 1, 3, 4, 5]
    torch.testing.assert_close(got[keep], log_prob[keep], atol=1e-6, rtol=0)


def test_deep_copies_and_dtypes(flow):
    copied = copy.deepcopy(flow)
    y, log_prob = flow.sample(50, torch.Generator().manual_seed(0))
    assert torch.equal(copied.log_prob(y), flow.log_prob(y))
    single = copied.float()
    finite = torch.isfinite(log_prob)
    error = (single.log_prob(y.float()).double() - log_prob)[finite].abs()
    assert error.median() < 1e-3


@pytest.mark.parametrize("name", ["realnvp", "realnvp, split", "realnvp, masked", "spline", "torus", "affine torus"])
@pytest.mark.parametrize("broadened", [False, True])
def test_densities_integrate_to_one(name, broadened):
    """Independent of the sampler: a sum over a grid."""
    flow = FLOWS[name]()
    disturb(flow, size=0.15)
    torus = name in ("torus", "affine torus")
    reach = [math.pi, math.pi] if torus else ([60.0, math.pi] if name == "spline" else [60.0, 60.0])
    axes = [torch.linspace(-r, r, 801, dtype=torch.float64)[:-1] + r / 800 for r in reach]
    grid = torch.cartesian_prod(*axes)
    cell = 4 * reach[0] * reach[1] / 800**2
    with torch.no_grad():
        total = sum(flow.log_probs(part)[int(broadened)].exp().sum() for part in grid.split(50000)) * cell
    # the affine torus loses what falls outside one turn; it may never exceed one
    if name == "affine torus":
        draws = flow.rsample(100000, torch.Generator().manual_seed(0), broadened=broadened)
        inside = torch.isfinite(draws).all(-1).double().mean()
        assert abs(total - inside) < 0.01
    else:
        assert abs(total - 1) < 5e-3


@pytest.mark.parametrize("kind", ["spline", "realnvp"])
def test_molecular_flow_follows_its_own_density(kind):
    """Draws against density by importance: E_broad[q / q_broad] = mass of q inside the support."""
    flow = molecular(kind)
    disturb(flow, size=0.1)
    y, _ = flow.sample(40000, torch.Generator().manual_seed(1), broadened=True)
    plain, broad = flow.log_probs(y)
    ratio = torch.where(torch.isfinite(broad), (plain - broad).exp(), 0.0)
    mass = torch.isfinite(flow.sample(40000, torch.Generator().manual_seed(2))[1]).double().mean()
    assert abs(ratio.mean() - mass) < 4 * ratio.std() / 200 + 0.01


def test_molecular_chart_is_a_shear():
    flow = molecular("spline")
    q = flow.sample(20, torch.Generator().manual_seed(0))[0]
    t, y = flow.chart.split(q)
    assert wrap(flow.chart.join(t, y) - q).abs().max() < 1e-12

    def chart(v):
        return torch.cat([part[0] for part in flow.chart.split(v[None])])

    jacobian = torch.autograd.functional.jacobian(chart, q[0])
    assert abs(torch.linalg.slogdet(jacobian)[1]) < 1e-12


def test_relabelling_a_rotor_turns_its_torsion_by_a_third():
    flow = molecular("spline")
    q = torch.tensor([[0.1, 1.9, 0.15, 2.0, 0.3, 1.0, -2.2]], dtype=torch.float64)
    first, second, third = q[0, 5], q[0, 5] + q[0, 3], q[0, 5] + q[0, 6]
    relabelled = q.clone()
    # the second hydrogen becomes the first, the third the second, the first the third
    relabelled[0, 5] = wrap(second)
    relabelled[0, 3] = wrap(third - second)
    relabelled[0, 6] = wrap(first - second)
    before, after = flow.chart.split(q)[0], flow.chart.split(relabelled)[0]
    torch.testing.assert_close(wrap(3 * before[:, 1]), wrap(3 * after[:, 1]))
    torch.testing.assert_close(flow.log_prob_torsions(before), flow.log_prob_torsions(after))


def test_a_stiff_torsion_may_not_leave_its_turn():
    flow = molecular("spline")
    t = torch.zeros(2, 2, dtype=torch.float64)
    y = torch.zeros(2, 5, dtype=torch.float64)
    y[1, flow.chart.periodic.nonzero()[0, 0]] = 3.5
    joined = flow.chart.join(t, y)
    assert torch.isfinite(joined[0]).all() and torch.isnan(joined[1]).all()


def test_config_rebuilds_the_architecture():
    for name in (
        "molecular spline", "molecular realnvp", "molecular, every option", "realnvp", "realnvp, split",
        "realnvp, masked", "spline", "continuous", "continuous, mixed",
    ):  # fmt: skip
        flow = FLOWS[name]()
        disturb(flow)
        again = type(flow).from_config(flow.config()).double()
        again.load_state_dict(flow.state_dict())
        y, log_prob = flow.sample(20, torch.Generator().manual_seed(0))
        assert torch.equal(again.log_prob(y), flow.log_prob(y))
        assert torch.equal(again.sample(20, torch.Generator().manual_seed(0))[1], log_prob)


def test_the_flows_of_rehman_and_friesecke_have_their_parameters():
    for networks, hidden, published in (("masked", 128, 7704), ("split", 64, 2316)):
        flow = RealNVP(2, layers=6, hidden=(hidden,), networks=networks)
        assert sum(parameter.numel() for parameter in flow.parameters()) == published


def test_masked_networks_see_the_kept_dimensions_alone():
    layer = AffineCoupling(MOVED, hidden=(8,), networks="masked").double()
    disturb(layer)
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = torch.where(MOVED, z + 1, z)
    torch.testing.assert_close(layer(z)[1], layer(other)[1], atol=0, rtol=0)


def test_separate_networks_move_the_dimensions_in_turn():
    for name in ("realnvp, split", "realnvp, masked"):
        layers = FLOWS[name]().transform.transforms
        assert [layer.move.tolist() for layer in layers] == [[0], [1]] * 2


def test_joint_networks_are_what_they_were():
    """Files name no networks, and their weights keep their names."""
    flow = RealNVP(2, layers=2, hidden=(8,), seed=3)
    assert flow.config() == {"dimension": 2, "layers": 2, "hidden": [8], "seed": 3}
    names = ["move", "keep", "restore"]
    names += [f"network.{layer}.{what}" for layer in (0, 2) for what in ("weight", "bias")]
    assert list(flow.transform.transforms[0].state_dict()) == names
    with pytest.raises(ValueError, match="joint, split, masked"):
        RealNVP(2, networks="separate")


def test_flow_learns_a_gaussian():
    flow = Flow(
        Base([False] * 2),
        Composition([AffineCoupling(torch.tensor([True, False])), AffineCoupling(torch.tensor([False, True]))]),
    )
    rng = torch.Generator().manual_seed(0)
    data = torch.randn(2000, 2, generator=rng) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = -flow.log_prob(data).mean()
        loss.backward()
        optimizer.step()
    entropy = math.log(2 * math.pi * math.e) + math.log(0.6)
    assert abs(loss.item() - entropy) < 0.05
