"""Constrained mass transport: from a broad flow to the target by steps of bounded length, on the flow's own samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import logsumexp
from torch import Tensor
from torch.nn import functional

from openmm_bg.errors import InputError
from openmm_bg.training.objectives import Step

_LARGEST = 70.0  # log of the largest multiplier
_CHUNK = 4096
# Effective share of the weights to the target from which on the flow is there; with constraints that is implied.
_AT_TARGET = 0.5
# Where the constraints hardly bind (sum of the multipliers) and weights mean something (their share), the flow is as
# near as it comes once that share has not grown by so much from some rounds to the next.
_HARDLY, _SPEAKS, _GROWTH, _WINDOW = 0.25, 0.1, 1.05, 6
_LEAST_BOUND = 0.3


class Transport(NamedTuple):
    """One step on the way to the target.

    Attributes
    ----------
    trust, entropy : float
        The multipliers of the two constraints, zero where a constraint does not bind.
    log_ratio : ndarray (n,)
        ``log q_next / q`` at the samples, normalised on them; -inf where the target has no density.
    divergence, entropy_drop : float
        ``KL(q_next || q)`` and ``H(q) - H(q_next)`` on the samples.
    """

    trust: float
    entropy: float
    log_ratio: NDArray[np.float64]
    divergence: float
    entropy_drop: float


def transport(
    log_target: NDArray[np.float64],
    log_density: NDArray[np.float64],
    trust_region: float | None = None,
    entropy_bound: float | None = None,
) -> Transport:
    """The distribution nearest to the target within reach of q, from samples of q.

    It minimises ``KL(q' || p)`` under ``KL(q' || q) <= trust_region`` and ``H(q) - H(q') <= entropy_bound`` and has the
    form ``q' ~ q^(lambda/s) p^(1/s)`` with ``s = 1 + lambda + eta``; the multipliers maximise the concave dual::

        g(lambda, eta) = -s log Z(lambda, eta) - lambda trust_region + eta (H(q) - entropy_bound)
        Z = E_q[(p / q^(1 + eta))^(1/s)]

    whose gradient is the slack of the two constraints. Both, one, or none of them bind: the cases are tried in turn.

    Parameters
    ----------
    log_target, log_density : ndarray (n,), float64
        Log of the target (up to a constant) and of q, at samples of q. The target may be -inf.
    trust_region, entropy_bound : float or None
        In nats; None leaves a constraint out.

    Returns
    -------
    Transport

    Raises
    ------
    InputError
        If no sample has any target density, or a bound is not positive.

    References
    ----------
    Constrained Mass Transport, arXiv:2510.18460 (ICLR 2026), whose equation (11) has the sign of the entropy term
    reversed.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=20_000)
    >>> step = transport(-0.5 * (x - 2) ** 2, -0.5 * x**2 - 0.5 * np.log(2 * np.pi), trust_region=0.1)
    >>> round(step.divergence, 6), step.entropy
    (0.1, 0.0)
    """
    log_p, log_q = (np.asarray(a, dtype=np.float64) for a in (log_target, log_density))
    for name, bound in (("trust_region", trust_region), ("entropy_bound", entropy_bound)):
        if bound is not None and not 0 < bound < math.inf:
            raise InputError(f"{name} must be a positive number of nats, not {bound}.")
    inside = np.isfinite(log_p) & np.isfinite(log_q)
    if not inside.any():
        raise InputError("No sample of the flow has a finite energy: the flow and the target do not overlap at all.")
    n, p, q = len(log_p), log_p[inside], log_q[inside]
    p = p - p.max()  # a large constant would eat the digits of what is compared
    held = -float(np.mean(log_q[np.isfinite(log_q)]))

    def at(trust: float, entropy: float) -> tuple[NDArray[np.float64], float, float]:
        """log q'/q, KL(q' || q) and the drop of entropy."""
        log_w = (p - (1 + entropy) * q) / (1 + trust + entropy)
        log_w = log_w - (logsumexp(log_w) - math.log(n))
        w = np.exp(log_w - math.log(n))
        return log_w, float(w @ log_w), held + float(w @ (q + log_w))

    def root(slack: Callable[[float], float], guess: float = 1.0) -> float:
        """The multiplier at which a slack that falls with it is zero; 0 where it never binds."""
        if slack(0.0) <= 0:
            return 0.0
        low = high = min(math.log(max(guess, 1e-9)), _LARGEST)
        while slack(math.exp(low)) <= 0:
            low -= 2.0
        high = max(high, low + 1.0)
        while slack(math.exp(high)) > 0:
            if high > _LARGEST:
                return math.inf
            high += 2.0 + 0.1 * abs(high)
        return math.exp(brentq(lambda u: slack(math.exp(u)), low, high, xtol=1e-11))

    most = math.inf if trust_region is None else trust_region
    drop = math.inf if entropy_bound is None else entropy_bound
    slightly = 1e-6

    def fits(trust: float, entropy: float) -> bool:
        _, divergence, fallen = at(trust, entropy)
        return divergence <= most * (1 + slightly) and fallen <= drop + slightly * abs(drop)

    # samples that the target gives no density cost more than any bound: nothing else moves
    nowhere = (math.exp(_LARGEST), 0.0)
    multipliers = (0.0, 0.0)
    if not fits(*multipliers):
        one = None if trust_region is None else (root(lambda m: at(m, 0.0)[1] - most), 0.0)
        two = None if entropy_bound is None else (0.0, root(lambda m: at(0.0, m)[2] - drop))
        ends = [pair for pair in (one, two) if pair is not None and math.isfinite(sum(pair))]
        alone = next((pair for pair in ends if fits(*pair)), None)
        if alone is not None:
            multipliers = alone
        elif one is None or two is None:
            multipliers = ends[0] if ends else nowhere
        elif not math.isfinite(one[0]):
            multipliers = nowhere
        else:
            last = one[0]

            def both(entropy: float) -> float:
                # concave in both, so the slack of one at the best of the other falls, too
                nonlocal last
                last = root(lambda m: at(m, entropy)[1] - most, last)
                return at(last, entropy)[2] - drop

            entropy = root(both, two[1] if math.isfinite(two[1]) else 1.0)
            both(entropy if math.isfinite(entropy) else math.exp(_LARGEST))
            multipliers = (last, min(entropy, math.exp(_LARGEST)))
    log_w, divergence, fallen = at(*multipliers)
    log_ratio = np.full(n, -math.inf)
    log_ratio[inside] = log_w
    return Transport(*multipliers, log_ratio, divergence, fallen)


@dataclass
class ConstrainedMassTransport:
    """Learn a target without data, by steps that stay within reach of the flow's own samples.

    In every round the flow draws ``samples`` and their energies; :func:`transport` finds the next distribution on the
    way to the target; and the flow learns it from these samples alone. No forces, no walkers. When both constraints
    have ceased to bind and half of the samples count, the flow is at the target, and after ``patience`` more rounds the
    stage ends. It ends as well where the constraints hardly bind (multipliers below a quarter together), more than a
    tenth of the samples count, and that share has not grown by a twentieth from six rounds to the next six: this
    learning rate brings the flow no nearer.

    Special cases: ``entropy_bound=None`` follows the geometric path, ``trust_region=None`` the tempered one, both None
    is self-distillation by importance weights.

    Parameters
    ----------
    trust_region : float or None
        Largest ``KL(q_next || q)`` in nats. The effective share of the weights is then about 1 / (1 + 2 trust_region)
        in any number of dimensions.
    entropy_bound : float, None or "auto"
        Largest loss of entropy in a round, in nats. "auto" estimates before every round how much entropy there is to
        lose, and allows twice the even share of what remains, so that the bound ceases to bind half-way; never less
        than 0.3.
    samples, steps_per_round : int
        Size of the buffer, and steps of the optimiser on it.
    rounds : int
        How many "auto" plans for.
    patience : int
        Rounds at the target before the stage ends.
    loss : {"log_variance", "likelihood"}
        How the next distribution is learned: by the variance of ``log q_theta - log q_next`` over the buffer, whose
        gradient vanishes once it is learned, or by weighted maximum likelihood, as published.
    clip : float
        Share of the largest weights that are lowered to the largest of the others (likelihood).
    delta : float
        Deviations in the log-variance beyond this (nats) count linearly.

    References
    ----------
    Constrained Mass Transport, arXiv:2510.18460 (ICLR 2026).

    Examples
    --------
    >>> import openmm_bg as bg
    >>> generator = bg.BoltzmannGenerator(bg.systems.load("gmm4"), bg.flows.RealNVP(2, layers=2, hidden=(8,)))
    >>> objective = ConstrainedMassTransport(samples=200, steps_per_round=3)
    >>> generator.fit(steps=6, objective=objective, progress=False).evaluations
    400
    """

    trust_region: float | None = 0.3
    entropy_bound: float | Literal["auto"] | None = "auto"
    samples: int = 20_000
    steps_per_round: int = 150
    rounds: int = 30
    patience: int = 2
    loss: Literal["log_variance", "likelihood"] = "log_variance"
    clip: float = 1e-4
    delta: float = 3.0
    needs_data: bool = field(default=False, init=False)
    needs_energy: bool = field(default=True, init=False)
    state: dict[str, Any] = field(default_factory=dict, init=False)
    tensors: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name, least in (("samples", 100), ("steps_per_round", 1), ("rounds", 1), ("patience", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        if self.loss not in ("log_variance", "likelihood"):
            raise InputError(f"loss must be 'log_variance' or 'likelihood', not {self.loss!r}.")
        if not self.delta > 0:
            raise InputError(f"delta must be positive, not {self.delta}.")
        if not 0 <= self.clip < 1:
            raise InputError(f"clip must be at least 0 and below 1, not {self.clip}.")
        for name in ("trust_region", "entropy_bound"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise InputError(f"{name} must be a positive number of nats, not {value}.")
        if isinstance(self.trust_region, str):
            raise InputError(f"trust_region must be a number of nats or None, not {self.trust_region!r}.")
        if isinstance(self.entropy_bound, str) and self.entropy_bound != "auto":
            raise InputError(f"entropy_bound must be a number of nats, None or 'auto', not {self.entropy_bound!r}.")

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        calls = int(self.state.get("calls", 0))
        if calls % self.steps_per_round == 0:
            self.state["seen"] = self._refill(step)
        numbers = dict(self.state["seen"])
        self.state["calls"] = calls + 1
        done = self.state.get("arrived", 0) > self.patience or self._stalled()
        if done and (calls + 1) % self.steps_per_round == 0:
            self.state["finished"] = 1
        rows = torch.randint(len(self.tensors["q"]), (step.batch_size,), generator=step.generator, device=step.device)
        q, log_next, weight = (self.tensors[name][rows] for name in ("q", "log_next", "weight"))
        log_prob = step.flow.log_prob(q)
        if self.loss == "likelihood":
            return -(weight * log_prob).mean(), numbers
        deviation = log_prob - log_next
        known = deviation.detach()
        near = (known - known.median()).abs() < self.delta
        deviation = deviation - known[near].mean()
        # the next distribution says where it matters; the present one keeps the rest from drifting
        emphasis = 0.5 + 0.5 * weight.clamp(max=5.0)
        loss = functional.huber_loss(deviation, torch.zeros_like(deviation), delta=self.delta, weight=emphasis)
        return loss, numbers | {"spread": float(known[near].std())}

    @torch.no_grad()
    def _refill(self, step: Step) -> dict[str, float]:
        parts = []
        while sum(len(part[0]) for part in parts) < self.samples:
            size = min(_CHUNK, self.samples - sum(len(part[0]) for part in parts))
            q, log_q = step.flow.sample(size, step.generator)
            parts.append((q, log_q, step.target.value(torch.where(torch.isfinite(q), q, 0.0))))
        q, log_q, u = (torch.cat(column) for column in zip(*parts, strict=True))
        known, energy = (a.double().numpy(force=True) for a in (log_q, u))
        log_p = np.where(np.isfinite(energy) & np.isfinite(known), -energy, -math.inf)
        bound = self._bound(log_p, known)
        move = transport(log_p, known, self.trust_region, bound)
        log_ratio = move.log_ratio
        log_w = log_p - known
        now = float(np.exp(2 * logsumexp(log_w) - logsumexp(2 * log_w)) / len(log_w))
        arrived = move.trust == 0 and move.entropy == 0 and now >= _AT_TARGET
        self.state["arrived"] = self.state.get("arrived", 0) + 1 if arrived else 0
        self.state["round"] = self.state.get("round", 0) + 1
        near = move.trust + move.entropy < _HARDLY and now > _SPEAKS
        self.state["shares"] = [*self.state.get("shares", []), now][-2 * _WINDOW :] if near else []
        weights = np.exp(log_ratio)
        if self.clip > 0:
            order = np.sort(weights)
            weights = weights.clip(max=order[-1 - min(math.ceil(self.clip * len(order)), len(order) - 1)])
        inside = np.isfinite(log_ratio)
        rows = torch.as_tensor(np.flatnonzero(inside), device=q.device)

        def kept(values: NDArray[np.float64]) -> Tensor:
            return torch.as_tensor(values[inside]).to(q)

        self.tensors = {
            "q": q[rows],
            "log_next": kept(known + np.where(inside, log_ratio, 0.0)),
            "weight": kept(weights / weights[inside].mean()),
        }
        share = weights[inside].sum() ** 2 / (len(weights) * (weights[inside] ** 2).sum())
        return {
            "round": float(self.state["round"]), "lambda": move.trust, "eta": move.entropy,
            "entropy_bound": math.nan if bound is None else bound, "divergence": move.divergence,
            "entropy_drop": move.entropy_drop, "round_ess": float(share), "target_ess": now,
            "lost": float(1 - inside.mean()),
        }  # fmt: skip

    def _stalled(self) -> bool:
        shares = self.state.get("shares", [])
        before, after = sum(shares[:_WINDOW]), sum(shares[_WINDOW:])
        return len(shares) == 2 * _WINDOW and after < _GROWTH * before

    def _bound(self, log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> float | None:
        if self.entropy_bound != "auto":
            return self.entropy_bound
        inside = np.isfinite(log_p)
        if not inside.any():
            return None
        log_w = log_p[inside] - log_q[inside]
        log_z = logsumexp(log_w) - math.log(len(log_p))
        w = np.exp(log_w - logsumexp(log_w))
        # by importance weights: poor while the flow is far away, better where it matters
        ahead = -float(np.mean(log_q[np.isfinite(log_q)])) - (float(w @ -log_p[inside]) + log_z)
        left = max(self.rounds - int(self.state.get("round", 0)), self.rounds // 4, 1)
        # what a flow of finite capacity is left with must not bind for ever
        return float(max(2 * ahead / left, _LEAST_BOUND))
