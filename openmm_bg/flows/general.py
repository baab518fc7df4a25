"""Flows for densities that are no molecule: RealNVP and spline couplings on R^d and on the torus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from openmm_bg.flows.base import Base, Composition, Flow
from openmm_bg.flows.coupling import AffineCoupling, Networks, SplineCoupling
from openmm_bg.flows.masks import alternating_masks, checkered_masks


class RealNVP(Flow):
    """Affine couplings over a standard normal (Dinh et al., 2017).

    Parameters
    ----------
    dimension, layers : int
    hidden : sequence of int
        Units of each hidden layer of the networks.
    networks : {"joint", "split", "masked"}
        See :class:`AffineCoupling`. Joint networks move random halves; with networks of their own for s and t the even
        and the odd dimensions move in turn, as in Rehman & Friesecke (2026), whose two flows are
        ``RealNVP(2, layers=6, hidden=(128,), networks="masked")`` with 7704 parameters and
        ``RealNVP(2, layers=6, hidden=(64,), networks="split")`` with 2316.
    seed : int
        Of the initial weights and of the random halves.

    Examples
    --------
    >>> flow = RealNVP(2, layers=4, hidden=(32,))
    >>> flow.sample(5, torch.Generator().manual_seed(0))[0].shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        dimension: int,
        *,
        layers: int = 8,
        hidden: Sequence[int] = (128, 128),
        networks: Networks = "joint",
        seed: int = 0,
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if networks == "joint":
                masks = alternating_masks(dimension, layers, torch.Generator().manual_seed(seed))
            else:
                masks = checkered_masks(dimension, layers)
            transforms = [AffineCoupling(mask, hidden=hidden, networks=networks) for mask in masks if mask.any()]
        super().__init__(Base([False] * dimension), Composition(transforms))
        self._config = {"dimension": dimension, "layers": layers, "hidden": list(hidden), "seed": seed}
        if networks != "joint":  # files of joint networks keep the fingerprint they always had
            self._config["networks"] = networks

    def config(self) -> dict[str, Any]:
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RealNVP:
        return cls(**config)


class SplineFlow(Flow):
    """Rational-quadratic spline couplings; dimensions marked circular are angles over a uniform base.

    Parameters
    ----------
    circular : sequence of bool
        One entry per dimension: True for an angle in [-pi, pi).
    layers, bins : int
        Couplings, and bins of each spline.
    bound : float
        Splines of the real line act on [-bound, bound] and leave everything beyond as it is.
    hidden : sequence of int
        Units of each hidden layer of the networks.
    seed : int
        Of the initial weights and of the random halves.

    References
    ----------
    Durkan, Bekasov, Murray & Papamakarios, Neural spline flows, NeurIPS 2019; on the circle: Rezende et al., ICML 2020.

    Examples
    --------
    >>> flow = SplineFlow([True, True], layers=4, hidden=(32,))
    >>> y, _ = flow.sample(5, torch.Generator().manual_seed(0))
    >>> bool((y.abs() <= 3.1416).all())
    True
    """

    def __init__(
        self,
        circular: Sequence[bool],
        *,
        layers: int = 8,
        bins: int = 12,
        bound: float = 6.0,
        hidden: Sequence[int] = (128, 128),
        seed: int = 0,
    ):
        circular = [bool(c) for c in circular]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            masks = alternating_masks(len(circular), layers, torch.Generator().manual_seed(seed))
            transforms = [
                SplineCoupling(mask, torch.tensor(circular), bins=bins, bound=bound, hidden=hidden)
                for mask in masks
                if mask.any()
            ]
        super().__init__(Base(circular), Composition(transforms))
        self._config = {
            "circular": circular,
            "layers": layers,
            "bins": bins,
            "bound": bound,
            "hidden": list(hidden),
            "seed": seed,
        }

    def config(self) -> dict[str, Any]:
        return dict(self._config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SplineFlow:
        return cls(**config)
