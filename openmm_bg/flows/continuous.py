"""Continuous normalizing flows: a velocity field integrated from the base to the target (Chen et al., 2018).

``dx/dt = v(t, x)`` carries latents at t = 0 to samples at t = 1, and ``d log q / dt = -div v`` carries their density.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from openmm_bg.errors import InputError
from openmm_bg.flows.base import Base, Flow, Transform, wrap
from openmm_bg.flows.velocity import PerceptronEnergy, PerceptronVelocity, VelocityField

_FIXED = ("euler", "midpoint", "rk4")
_ADAPTIVE = ("bosh3", "dopri5", "dopri8")


class ContinuousTransform(Transform):
    """The flow map of a velocity field from t = 0 to t = 1, with the integral of its divergence.

    Parameters
    ----------
    velocity : VelocityField
    circular : Tensor of bool, (dimension,), optional
        Dimensions that are wrapped into [-pi, pi) at the end.
    method : str
        ``"euler"``, ``"midpoint"``, ``"rk4"``: fixed steps, each row by itself. ``"bosh3"``, ``"dopri5"``,
        ``"dopri8"``: adaptive steps, the same for the whole batch, so a row depends on its company to within the
        tolerance.
    steps : int
        Of the fixed-step methods.
    rtol, atol : float
        Of the adaptive ones.
    divergence : {"exact", "hutchinson"}
        ``"hutchinson"`` estimates it with one Rademacher probe per row, from ``seed``, kept along the path: unbiased
        for the log-determinant, cheap for a field without closed form, and too noisy for a density that is relied
        upon.

    Notes
    -----
    Both directions are integrated numerically, so the round trip and the two log-determinants agree to the order of the
    method, not to rounding: with 40 steps of rk4 typically 1e-6, and sixteen times less for every doubling.
    """

    def __init__(
        self,
        velocity: VelocityField,
        *,
        circular: Tensor | None = None,
        method: str = "rk4",
        steps: int = 40,
        rtol: float = 1e-6,
        atol: float = 1e-6,
        divergence: Literal["exact", "hutchinson"] = "exact",
        seed: int = 0,
    ):
        super().__init__(velocity.dimension)
        if method not in _FIXED + _ADAPTIVE:
            raise InputError(f"There is no method {method!r}; choose one of {', '.join(_FIXED + _ADAPTIVE)}.")
        if divergence not in ("exact", "hutchinson"):
            raise InputError(f"divergence must be 'exact' or 'hutchinson', not {divergence!r}.")
        if not isinstance(steps, int) or steps < 1:
            raise InputError(f"steps must be a positive whole number, not {steps!r}.")
        if not (rtol > 0 and atol > 0):
            raise InputError(f"rtol and atol must be positive, not {rtol} and {atol}.")
        self.velocity = velocity
        self.method, self.steps, self.rtol, self.atol = method, steps, rtol, atol
        self.divergence, self.seed = divergence, seed
        self.register_buffer("circular", circular, persistent=False)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.integrate(z, 0.0, 1.0)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.integrate(y, 1.0, 0.0)

    def integrate(self, x: Tensor, start: float, end: float, steps: int | None = None) -> tuple[Tensor, Tensor]:
        """Points ``(batch, dimension)`` carried from one time to another, and the log-determinant of that map.

        ``steps`` are spread over the stretch; by default as many as its share of the unit interval is worth.
        """
        if len(x) == 0 or start == end:
            return x, x.new_zeros(len(x))
        probe = None
        if self.divergence == "hutchinson":
            bits = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(self.seed))
            probe = (2 * bits - 1).to(x)

        def rate(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            point = state[0]
            if probe is None:
                return self.velocity.with_divergence(t, point)
            return self.velocity.hutchinson(t, point, probe)

        times = torch.tensor([start, end], dtype=x.dtype, device=x.device)
        if self.method in _FIXED:
            count = steps or max(1, round(self.steps * abs(end - start)))
            # a hair more than the quotient, or rounding adds a last step of no length
            options = {"step_size": abs(end - start) / count * (1 + 1e-6)}
            path, log_det = odeint(rate, (x, x.new_zeros(len(x))), times, method=self.method, options=options)
        else:
            path, log_det = odeint(
                rate, (x, x.new_zeros(len(x))), times, method=self.method, rtol=self.rtol, atol=self.atol
            )
        y = path[-1]
        if self.circular is not None:
            y = torch.where(self.circular, wrap(y), y)
        return y, log_det[-1]


class ContinuousFlow(Flow):
    """A base density pushed along a velocity field.

    Parameters
    ----------
    base : Base
        Or anything with its ``dimension``, ``sample`` and ``log_prob``.
    velocity : VelocityField
    perturbation : torch.nn.Module, optional
        ``psi(t, x)``, what a learned path adds to the straight line between the energies of base and target. It has no
        part in sampling; it is here to be trained, saved and resumed together with the velocity.
    method, steps, rtol, atol, divergence
        See :class:`ContinuousTransform`. With ``divergence="hutchinson"`` the flow can be trained, but gives no density
        in evaluation mode.

    Examples
    --------
    >>> flow = ContinuousFlow(Base([False] * 2, std=3.0), PerceptronVelocity(2, hidden=32), steps=10)
    >>> y, log_prob = flow.sample(5, torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(flow.log_prob(y), log_prob))
    True
    """

    def __init__(
        self,
        base: Base,
        velocity: VelocityField,
        *,
        perturbation: nn.Module | None = None,
        method: str = "rk4",
        steps: int = 40,
        rtol: float = 1e-6,
        atol: float = 1e-6,
        divergence: Literal["exact", "hutchinson"] = "exact",
    ):
        circular = getattr(base, "circular", None)
        if circular is not None and not bool(circular.any()):
            circular = None
        transform = ContinuousTransform(
            velocity, circular=circular, method=method, steps=steps, rtol=rtol, atol=atol, divergence=divergence
        )
        super().__init__(base, transform)
        self.perturbation = perturbation

    @property
    def velocity(self) -> VelocityField:
        return self.transform.velocity

    def sample(
        self, n: int, generator: torch.Generator | None = None, *, broadened: bool = False
    ) -> tuple[Tensor, Tensor]:
        self._check_density()
        return super().sample(n, generator, broadened=broadened)

    def log_probs(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_density()
        return super().log_probs(y)

    def _check_density(self) -> None:
        if self.transform.divergence != "exact" and not self.training:
            raise InputError(
                "A density with an estimated divergence is noise; set flow.transform.divergence = 'exact' first."
            )

    def config(self) -> dict[str, Any]:
        transform = self.transform
        if type(self.base) is not Base or type(self.velocity) is not PerceptronVelocity:
            raise InputError(
                f"A continuous flow with {type(self.base).__name__} and {type(self.velocity).__name__} cannot be saved "
                "as a file; keep its state_dict yourself."
            )
        if self.perturbation is not None and type(self.perturbation) is not PerceptronEnergy:
            raise InputError(f"A perturbation of class {type(self.perturbation).__name__} cannot be saved as a file.")
        return {
            "circular": self.base.circular.tolist(),
            "std": self.base.std,
            "velocity": self.velocity.config(),
            "perturbation": None if self.perturbation is None else self.perturbation.config(),
            "method": transform.method,
            "steps": transform.steps,
            "rtol": transform.rtol,
            "atol": transform.atol,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ContinuousFlow:
        settings = dict(config)
        base = Base(settings.pop("circular"), std=settings.pop("std"))
        velocity = PerceptronVelocity(**settings.pop("velocity"))
        perturbation = settings.pop("perturbation")
        if perturbation is not None:
            perturbation = PerceptronEnergy(**perturbation)
        return cls(base, velocity, perturbation=perturbation, **settings)
