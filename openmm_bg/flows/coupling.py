"""Coupling layers: one half of the dimensions moves, by a map whose parameters the other half sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from openmm_bg.errors import InputError
from openmm_bg.flows.base import Transform, permute, wrap
from openmm_bg.flows.local import Surroundings
from openmm_bg.flows.networks import fourier_features, perceptron
from openmm_bg.flows.spline import circular_parameters, circular_spline, interval_parameters, interval_spline

Networks = Literal["joint", "split", "masked"]


def _halves(moved: Tensor) -> tuple[Tensor, Tensor]:
    moved = torch.as_tensor(moved, dtype=torch.bool)
    if moved.ndim != 1 or not moved.any():
        raise ValueError("a coupling needs a vector of bools that marks at least one dimension as moved")
    return moved.nonzero()[:, 0], (~moved).nonzero()[:, 0]


def columns_of(context: Tensor | None) -> Tensor | None:
    """A context ``(batch, features)`` with a sample per column."""
    return None if context is None else context.T


def scale_and_shift(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Log-scales ``2 tanh(s / 2)`` and shifts of numbers whose first half of rows is s."""
    s, shift = raw.chunk(2)
    # the logistic function costs a third of the hyperbolic tangent
    return 4 * torch.sigmoid(s) - 2, shift


def _refuse_other_halves(coupling: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    # the networks and their inputs were laid out for the halves that were drawn: no weights can change those
    for name, built in coupling.named_buffers(recurse=False):
        loaded = state.get(prefix + name)
        if loaded is not None and not torch.equal(loaded.cpu(), built.cpu()):
            raise InputError(
                f"These weights are of a flow whose coupling {prefix.rstrip('.') or 'layer'} moves other dimensions; "
                "load them into a flow with the config() of the one they were taken from, its seed included."
            )


class _Coupling(Transform):
    """Cuts vectors into the moved and the kept dimensions, a sample per column, and joins them again.

    Weights of a coupling with other halves are refused with an InputError.
    """

    together: Tensor
    restore: Tensor

    def __init__(self, dimension: int, context_dimension: int, moved: int):
        super().__init__(dimension, context_dimension)
        self._sizes_of_parts = [moved, dimension - moved]
        self.register_load_state_dict_pre_hook(_refuse_other_halves)

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return permute(z.T, self.together, self.restore, 0).split(self._sizes_of_parts)

    def _whole(self, parts: Tensor) -> Tensor:
        return permute(parts, self.restore, self.together, 0).T


class AffineCoupling(_Coupling):
    """RealNVP: y_moved = z_moved exp(s) + t with s, t functions of the rest (Dinh et al., 2017).

    The log-scale is ``2 tanh(s / 2)``: a layer can stretch by e^2 at most, which keeps a deep flow invertible in
    float32.

    Parameters
    ----------
    moved : Tensor of bool, (dimension,)
    context_dimension : int
    hidden : sequence of int
    networks : {"joint", "split", "masked"}
        One network for s and t together, or one for each. Split networks see the kept dimensions and set the moved
        ones; masked networks see the whole vector with the moved dimensions at zero, and what they say of the kept
        dimensions goes unused.
    surroundings : Surroundings, optional
        One small network per block, which sees the blocks around it, in place of a joint one.
    """

    def __init__(
        self,
        moved: Tensor,
        context_dimension: int = 0,
        hidden: Sequence[int] = (128, 128),
        networks: Networks = "joint",
        surroundings: Surroundings | None = None,
    ):
        if networks not in get_args(Networks):
            raise ValueError(f"networks must be one of {', '.join(get_args(Networks))}, not {networks!r}")
        move, keep = _halves(moved)
        super().__init__(len(moved), context_dimension, len(move))
        self.register_buffer("move", move)
        self.register_buffer("keep", keep)
        together = torch.cat([move, keep])
        self.register_buffer("together", together, persistent=False)
        self.register_buffer("restore", torch.argsort(together))
        self.networks = networks
        if surroundings is not None:
            self.network = surroundings.network(keep.tolist(), move.tolist(), hidden[0])
        elif networks == "joint":
            self.network = perceptron(len(keep) + context_dimension, hidden, 2 * len(move))
        else:
            inputs, outputs = (len(keep), len(move)) if networks == "split" else (len(moved), len(moved))
            self.scale_network = perceptron(inputs + context_dimension, hidden, outputs)
            self.shift_network = perceptron(inputs + context_dimension, hidden, outputs)

    def _raw(self, kept: Tensor, context: Tensor | None) -> Tensor:
        """Numbers of all log-scales, then all shifts, a sample per column."""
        if self.networks == "joint":
            return self.network.columns(kept, context)
        if self.networks == "masked":
            kept = kept.new_zeros(self.dimension, kept.shape[1]).index_copy(0, self.keep, kept)
        numbers = [network.columns(kept, context) for network in (self.scale_network, self.shift_network)]
        if self.networks == "masked":
            numbers = [n.index_select(0, self.move) for n in numbers]
        return torch.cat(numbers)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        moved, kept = self._parts(z)
        log_scale, shift = scale_and_shift(self._raw(kept, columns_of(context)))
        y = torch.cat([torch.addcmul(shift, moved, log_scale.exp()), kept])
        return self._whole(y), log_scale.sum(0)

    def push_score(self, z: Tensor, score: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        if self.networks != "joint":
            return super().push_score(z, score, context)
        moved, kept = self._parts(z)
        raw, slopes = self.network.traced(kept, columns_of(context))
        log_scale, shift = scale_and_shift(raw)
        y = torch.cat([torch.addcmul(shift, moved, log_scale.exp()), kept])
        with torch.no_grad():
            # d log q / dy_kept at fixed y_moved: through the log-determinant and through z_moved, by the chain rule
            score_moved, score_kept = self._parts(score)
            by_shift = score_moved * (-log_scale).exp()
            if len(kept):
                by_raw = torch.cat([(score_moved * moved + 1) * (1 - log_scale.square() / 4), by_shift])
                score_kept = score_kept - self.network.pull(by_raw, slopes, len(kept))
            pushed = self._whole(torch.cat([by_shift, score_kept]))
        return self._whole(y), log_scale.sum(0), pushed

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        moved, kept = self._parts(y)
        log_scale, shift = scale_and_shift(self._raw(kept, columns_of(context)))
        z = torch.cat([(moved - shift) * (-log_scale).exp(), kept])
        return self._whole(z), -log_scale.sum(0)


class SplineCoupling(_Coupling):
    """Rational-quadratic spline coupling; each dimension lies on the real line or on the circle.

    Parameters
    ----------
    moved : Tensor of bool, (dimension,)
    circular : Tensor of bool, (dimension,)
        True for angles in [-pi, pi); they enter the network as cos and sin and move by a spline of the circle and a
        turn.
    context_dimension, bins, bound, hidden
        Splines have ``bins`` bins, on [-bound, bound] for the dimensions that are not circular.
    order : int
        Multiples of an angle whose cos and sin enter the network.
    surroundings : Surroundings, optional
        See :class:`AffineCoupling`; no dimension may be circular.
    """

    def __init__(
        self,
        moved: Tensor,
        circular: Tensor,
        context_dimension: int = 0,
        *,
        bins: int = 12,
        bound: float = 6.0,
        hidden: Sequence[int] = (128, 128),
        order: int = 3,
        surroundings: Surroundings | None = None,
    ):
        if len(circular) != len(moved):
            raise ValueError("circular and moved must have one entry per dimension")
        circular = torch.as_tensor(circular, dtype=torch.bool)
        move, keep = _halves(moved)
        super().__init__(len(moved), context_dimension, len(move))
        self.bins, self.bound, self.order = bins, bound, order
        for name, index in {
            "move_real": move[~circular[move]],
            "move_circular": move[circular[move]],
            "keep_real": keep[~circular[keep]],
            "keep_circular": keep[circular[keep]],
        }.items():
            self.register_buffer(name, index)
        together = torch.cat([self.move_real, self.move_circular, self.keep_real, self.keep_circular])
        self.register_buffer("together", together, persistent=False)
        self.register_buffer("restore", torch.argsort(together), persistent=False)
        real, turning = len(self.move_real), len(self.move_circular)
        self._sizes = [real * interval_parameters(bins), turning * circular_parameters(bins), turning]
        inputs = len(self.keep_real) + 2 * order * len(self.keep_circular) + context_dimension
        if surroundings is None:
            self.network = perceptron(inputs, hidden, sum(self._sizes))
        elif circular.any():
            raise ValueError("networks that see their surroundings set splines of the real line alone")
        else:
            self.network = surroundings.network(
                keep.tolist(), move.tolist(), hidden[0], interval_parameters(bins), True
            )

    def _inputs(self, kept: Tensor) -> Tensor:
        """What the network sees of the kept dimensions."""
        real, angles = kept.split([len(self.keep_real), len(self.keep_circular)])
        return torch.cat([real, fourier_features(angles, self.order)]) if len(angles) else real

    def _map(self, moved: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Moved rows and the logarithms of their derivatives, from the numbers that the network sets."""
        real, turning, shift = raw.split(self._sizes)
        x, angle = moved.split([len(self.move_real), len(self.move_circular)])
        # the spline itself runs from samples to latents, see openmm_bg.flows.spline
        real = real.unflatten(0, (len(x), interval_parameters(self.bins)))
        x, log_derivative = interval_spline(x, real, self.bound, inverse=not inverse)
        if not len(angle):
            return x, log_derivative
        turning, ones = (
            turning.unflatten(0, (len(angle), circular_parameters(self.bins))),
            angle.new_ones(len(angle), 1),
        )
        if inverse:
            angle, log_turn = circular_spline(wrap(angle - shift), turning, ones)
        else:
            angle, log_turn = circular_spline(wrap(angle), turning, ones, inverse=True)
            angle = wrap(angle + shift)
        return torch.cat([x, angle]), torch.cat([log_derivative, log_turn])

    def _apply_to(self, y: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        moved, kept = self._parts(y)
        raw = self.network.columns(self._inputs(kept), columns_of(context))
        moved, log_derivative = self._map(moved, raw, inverse)
        return self._whole(torch.cat([moved, kept])), log_derivative.sum(0)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_to(z, context, inverse=False)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_to(y, context, inverse=True)

    @torch.enable_grad()
    def push_score(self, z: Tensor, score: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        moved, kept = self._parts(z if z.requires_grad else z.detach().requires_grad_())
        inputs = self._inputs(kept)
        raw, slopes = self.network.traced(inputs, columns_of(context))
        y, log_derivative = self._map(moved, raw, inverse=False)
        score_moved, score_kept = self._parts(score.detach())
        ones = torch.ones_like(y)
        # s_y = (s_z - d log f' / dz) / f' for what moves
        (bend,) = torch.autograd.grad(log_derivative, moved, ones, retain_graph=True)
        score_moved = (score_moved - bend) * (-log_derivative.detach()).exp()
        if len(kept):
            # at fixed y the numbers of the spline change log q by the negative of what s_y f + log f' gains from them
            (by_raw,) = torch.autograd.grad((y, log_derivative), raw, (score_moved, ones), retain_graph=True)
            through = self.network.pull(by_raw, slopes, len(inputs))
            if len(self.keep_circular):
                (through,) = torch.autograd.grad(inputs, kept, through, retain_graph=True)
            score_kept = score_kept - through
        pushed = self._whole(torch.cat([score_moved, score_kept]))
        return self._whole(torch.cat([y, kept])), log_derivative.sum(0), pushed
