"""What earlier steps found: a ring that forgets the oldest, and the weight that it has in the log-variance."""

from __future__ import annotations

import math

import pytest
import torch

from openmm_bg.flows import MolecularFlow
from openmm_bg.training import ReversePath, reverse
from openmm_bg.training.objectives import Step
from openmm_bg.training.past import Past, recall, remember


def batch(first: int, n: int = 4) -> Past:
    number = torch.arange(first, first + n, dtype=torch.float64)
    return Past(number[:, None].expand(-1, 2), number, -number, number % 2 == 1)


def test_the_ring_holds_the_newest_and_nothing_where_nothing_was():
    tensors, random = {}, torch.Generator().manual_seed(0)
    like = torch.zeros(4, 2, dtype=torch.float64)
    assert recall(tensors, like, 12, 5, random).rest.isnan().all()
    remember(tensors, batch(0))
    held = recall(tensors, like, 12, 6, random)
    assert sorted(held.rest[~held.rest.isnan()].tolist()) == [0, 1, 2, 3] and len(held.rest) == 6
    for first in (4, 8, 12):
        remember(tensors, batch(first))
    held = recall(tensors, like, 12, 12, random)
    assert sorted(held.rest.tolist()) == list(range(4, 16))
    assert torch.equal(held.torsions, held.rest[:, None].expand(-1, 2)) and torch.equal(held.log_q, -held.rest)
    assert torch.equal(held.explored, held.rest % 2 == 1)


def test_the_rare_is_recalled_more_often():
    """One draw out of four densities, in proportion to q^-temper but e^3 times the median's at most."""
    log_q = torch.tensor([0.0, 0.0, -2.0, -20.0], dtype=torch.float64)
    tensors, like, random = {}, torch.zeros(4, 2, dtype=torch.float64), torch.Generator().manual_seed(1)
    recall(tensors, like, 4, 1, random)
    nowhere = torch.zeros(4, dtype=torch.bool)
    remember(tensors, Past(like, torch.arange(4.0, dtype=torch.float64), log_q, nowhere))
    drawn = torch.cat([recall(tensors, like, 4, 1, random, temper=0.5).rest for _ in range(4000)])
    found = torch.bincount(drawn.long(), minlength=4) / 4000
    # the lower median is -2
    weight = torch.tensor([-1.0, -1.0, 0.0, 3.0]).exp()
    expected = weight / weight.sum()
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_a_ring_is_never_written_in_place():
    tensors, like = {}, torch.zeros(4, 2, dtype=torch.float64)
    recall(tensors, like, 12, 1, torch.Generator())
    before = dict(tensors)
    remember(tensors, batch(0))
    assert before["past_rest"].isnan().all() and int(before["past_next"]) == 0
    assert all(tensors[name] is not before[name] for name in before)


class Turned:
    """A target whose stiff coordinates are the flow's own given torsions, which themselves want another density."""

    evaluations = 0

    def __init__(self, flow):
        self.flow = flow

    def value_and_gradient(self, q):
        leaf = q.detach().requires_grad_()
        t, y = self.flow.chart.split(leaf)
        u = -self.flow.log_prob_stiff(y, t) - 0.5 * torch.cos(t[:, 0])
        return u.detach(), torch.autograd.grad(u.sum(), leaf)[0]


@pytest.fixture
def flow() -> MolecularFlow:
    flow = MolecularFlow(7, [5, 6], {}, [], layers=2, hidden=8, torsion_hidden=8).double()
    flow.initialize(0.3 * torch.randn(100, 7, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        for parameter in flow.torsions.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return flow


@pytest.mark.parametrize("gain", [-0.7, 0.4, 2.0])
def test_the_log_variance_counts_the_past_as_it_would_be_drawn_now(flow, gain):
    """By hand, for a past of one point alone: its log-weight is today's, its share is q now over q then, e at most."""
    random, n = torch.Generator().manual_seed(3), 16
    objective = ReversePath(power=0.0, explore=0.0, temper=0.0, memory=2, recall=1)
    step = Step(flow, Turned(flow), None, n, 0.0, random)
    objective(step)
    first = objective.tensors["past_rest"][:n]
    # the flow's own stiff coordinates are exact, so what is left of the weight is what the torsions want
    expected = 0.5 * torch.cos(objective.tensors["past_torsions"][:n, 0])
    torch.testing.assert_close(first - first.mean(), expected - expected.mean(), rtol=0, atol=1e-9)

    point = torch.tensor([0.1, -0.2], dtype=torch.float64)
    now = flow.log_prob_torsions(point[None]).detach()
    objective.tensors |= {
        "past_torsions": point.expand(2 * n, 2).clone(),
        "past_rest": torch.full((2 * n,), 0.9, dtype=torch.float64),
        "past_log_q": (now - gain).expand(2 * n).clone(),
        "past_next": torch.zeros(1, dtype=torch.long),
    }
    _, numbers = objective(step)
    t, rest = objective.tensors["past_torsions"][:n], objective.tensors["past_rest"][:n]
    log_w = torch.cat([rest - flow.log_prob_torsions(t).detach(), (0.9 - now).expand(n)])
    share = torch.tensor([1.0] * n + [math.exp(min(gain, 1.0))] * n, dtype=torch.float64)
    mean = (share * log_w).sum() / share.sum()
    variance = (share * (log_w - mean) ** 2).sum() / share.sum()
    assert float(numbers["log_variance"]) == pytest.approx(float(variance), rel=1e-9)


def test_without_memory_the_past_is_silent(flow):
    losses = []
    for options in ({"memory": 0}, {"recall": 0}):
        objective, random = ReversePath(explore=0.0, **options), torch.Generator().manual_seed(3)
        losses.append([])
        for _ in range(3):
            losses[-1].append(objective(Step(flow, Turned(flow), None, 16, 0.0, random))[0].item())
            objective.advance()
        assert "past_rest" not in objective.tensors
    assert losses[0] == losses[1] and all(math.isfinite(loss) for loss in losses[0])


def test_the_rare_is_recalled_less_often_at_the_end(flow, monkeypatch):
    asked = []
    monkeypatch.setattr(reverse, "recall", lambda *a: asked.append(a[-1]) or recall(*a))
    for progress in (0.0, 0.5, 1.0):
        step = Step(flow, Turned(flow), None, 16, progress, torch.Generator().manual_seed(3))
        ReversePath(recall_temper=0.6)(step)
    assert asked == pytest.approx([0.6, 0.4, 0.2])


class Holed(Turned):
    """It wants much more of the torsions where the first of them is negative."""

    def value_and_gradient(self, q):
        u, gradient = super().value_and_gradient(q)
        return u - 5.0 * (self.flow.chart.split(q)[0][:, 0] < 0), gradient


def test_of_what_was_turned_anywhere_the_holes_are_kept_and_heard_as_long_as_they_are_holes(flow, monkeypatch):
    n = 16
    t = torch.full((n, 2), 0.2, dtype=torch.float64)
    t[:3, 0] = -0.2  # a hole, and the next ones are none
    explored = torch.arange(n) < 6
    objective = ReversePath(power=0.0, memory=2, recall=1)
    monkeypatch.setattr(objective, "_draw_torsions", lambda *_: (t, explored))
    objective(Step(flow, Holed(flow), None, n, 0.0, torch.Generator().manual_seed(3)))
    known, which = objective.tensors["past_rest"][:n].isfinite(), objective.tensors["past_explored"][:n]
    assert known.tolist() == [True] * 3 + [False] * 3 + [True] * 10 and torch.equal(which, explored)

    # three more draws: two of the past were turned, one of them lies where it should
    past = torch.tensor([0.0, 0.0, 0.0, 4.0, 0.5], dtype=torch.float64).requires_grad_()
    turned = torch.tensor([False, False, False, True, True])
    spread, deviation = objective._log_variance(past, turned, torch.ones(5, dtype=torch.float64), 0.0)
    mean = 4.5 / 5
    torch.testing.assert_close(deviation, past.detach() - mean)
    assert spread.item() == pytest.approx((3 * mean**2 + (4 - mean) ** 2) / 4)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.4), (1.0, 0.1)])
def test_torsions_of_the_data_are_among_those_drawn(flow, progress, share):
    """As many as asked for at the start, a quarter of that at the end, and none of them counts as turned anywhere."""
    known = torch.cat([torch.zeros(5, dtype=torch.float64), torch.tensor([2.5, -2.5], dtype=torch.float64)])
    objective, n = ReversePath(explore=0.5, familiar=0.4), 4000
    step = Step(flow, Turned(flow), lambda rows: known.expand(rows, 7), n, progress, torch.Generator().manual_seed(3))
    t, explored = objective._draw_torsions(flow, step)
    of_data = (t == known[5:]).all(1)
    assert abs(float(of_data.double().mean()) - share) < 4 * math.sqrt(share * (1 - share) / n)
    assert not explored[of_data].any() and bool(explored[~of_data].any()) == (progress < 1)
    step = Step(flow, Turned(flow), None, n, progress, torch.Generator().manual_seed(3))
    assert not (objective._draw_torsions(flow, step)[0] == known[5:]).all(1).any()
